"""One request from a client to whichever backend answers it.

The way of a request, numbered as in the code:

1. The catalogue orders the candidates for the model's name.
2. The first that takes the request gets it. Another is tried only if connecting
   failed, since then nothing can have been worked on. If those that are left are busy,
   the request waits in line for whichever has a free place first. If none is left, a
   sleeping machine is woken.
3. A backend that is still loading its model is waited for.
4. An error answer becomes an error of ours that says what the backend said.
5. A good answer is copied to the client, or put together if it was asked for as a
   stream for the client's sake.
6. When every candidate is down, or one answers 429 or 5xx, the model's configured
   fallbacks get their turn, as long as nothing of an answer has gone out.

Waiting is kept alive by the ``Delivery``; being left by the client is a cancellation
that closes the upstream connection wherever it stands.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from inferencia import estimating
from inferencia.backends.base import Backend, Turn
from inferencia.backends.headers import has_met_us
from inferencia.backends.listing import parse_json
from inferencia.breaker import Verdict, verdict_of
from inferencia.catalogue import (
    Candidate,
    Catalogue,
    NotListedYet,
    Resolution,
    affinity_key,
)
from inferencia.context import CONTEXT, Context
from inferencia.copying import Delivery
from inferencia.errors import (
    ApiError,
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    LoopDetected,
    ModelNotFound,
)
from inferencia.loadingstate import LoadingState
from inferencia.middleware import own_fault
from inferencia.models.filtering import filtered
from inferencia.refusals import error_answer, error_answer_of
from inferencia.reshaping import Reshaped, Shape
from inferencia.spending import Spending
from inferencia.translate.assembly import (
    Assembler,
    AssemblyError,
    assembler_for,
    request_changes,
    what_a_stream_lacks,
)
from inferencia.upstream.answer import (
    Answer,
    BadAnswer,
    ConnectFailed,
    Silent,
    Truncated,
    UpstreamError,
)
from inferencia.usage import UsageBook
from inferencia.waiting import Line, NobodyToWaitFor, Place, Waiter

log = logging.getLogger(__name__)

# Whose clients can be told by thoughts that a model is being loaded.
_CHATS = ("/v1/chat/completions", "/chat/completions")

# An error answer longer than this says nothing that a person would read.
MAX_ERROR_BYTES = 1 << 20

# How often a loading engine is asked again, and what is advised when it took too long.
_LOADING_POLL_SECONDS = 0.5
_LOADING_RETRY_SECONDS = 5.0


@dataclass(slots=True)
class Call:
    """What a client asked for, read once and not changed.

    (Not frozen: with so many fields that would cost each request a microsecond.)
    """

    method: str
    path: str  # as the backend knows it
    query: str  # without anything that names a model; "" or "a=b&c=d"
    content_type: str | None
    body: bytes
    model: str | None
    values: Mapping[str, Any]  # decoded top-level members, or form fields
    rewrite: Callable[[Mapping[str, Any]], bytes]  # the body with members changed
    wants_stream: bool
    hides_usage: bool = False  # a usage chunk must be asked for, and kept back
    must_finish: bool = False  # a stream that ends without saying so was cut
    pads: bool = True  # the answer is JSON, so that white space may go before it
    anthropic: bool = False
    # The same request as this backend understands it, and what makes of its answer (by
    # the model's name) the one that the client expects. None: the request as it is.
    for_backend: "Callable[[Backend], Call] | None" = None
    reshape: Callable[[str], Shape] | None = None


class Relay:
    """Takes calls to backends."""

    def __init__(
        self,
        catalogue: Catalogue,
        line: Line,
        spending: Spending,
        usage: UsageBook,
        *,
        keepalive: float,
        instance: str,
    ) -> None:
        """Make a relay.

        Args:
            catalogue: knows which backends serve a model.
            line: where requests wait for busy ones.
            spending: is told what each request has used.
            usage: where is written what begins and what has ended.
            keepalive: ``server.sse_keepalive`` in seconds.
            instance: this process's name in ``Via``.
        """
        self.catalogue = catalogue
        self.line = line
        self.spending = spending
        self.usage = usage
        self.keepalive = keepalive
        self._instance = instance

    def answer(self, request: web.Request, call: Call) -> Awaitable[web.StreamResponse]:
        """Have ``call`` answered, and the answer delivered to the client.

        Raises:
            ApiError: it failed before anything was written.
        """
        context = request[CONTEXT]
        headers = request.headers
        if "Via" in headers and has_met_us(headers.items(), self._instance):
            raise LoopDetected(
                "this request has been here before: a backend's URL leads back to "
                "this server"
            )
        measurement = context.measurement
        measurement.bytes_in = len(call.body)
        measurement.stream = call.wants_stream
        measurement.is_work = True
        return _Errand(self, request, context, call).run()


class _NotTaken(Exception):
    """A candidate could not even be connected to; the next one may be tried."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class _Errand:
    """One call on its way; lives as long as its request."""

    def __init__(
        self, relay: Relay, request: web.Request, context: Context, call: Call
    ) -> None:
        assert context.key is not None
        self._catalogue = relay.catalogue
        self._line = relay.line
        self._spending = relay.spending
        self._usage = relay.usage
        self._request = request
        self._context = context
        self._key = context.key
        self._call = call
        # Backends of the model that could not be connected to, and the last one's why.
        self._refused: tuple[Backend, ...] = ()
        self._refusal: ApiError | None = None
        # With one backend there is nothing to prefer.
        self._affinity = (
            affinity_key(self._key.name, call.model or "", call.values)
            if self._catalogue.has_choice
            else None
        )
        self._delivery = Delivery(
            request,
            context.measurement,
            headers=context.headers,
            wants_stream=call.wants_stream,
            keepalive=relay.keepalive,
            anthropic=call.anthropic,
            owner=self,
        )

    async def run(self) -> web.StreamResponse:
        """Serve the call.

        Raises:
            ApiError: it failed before anything was written.
        """
        delivery, context = self._delivery, self._context
        try:
            await self._serve()
        except ApiError as error:
            delivery.fail(error)
        except asyncio.CancelledError:
            interruption = context.interrupted()
            if interruption is None:
                raise
            delivery.fail(interruption)
        except ConnectionError:
            raise
        except Exception:
            if not delivery.has_begun:
                raise
            log.exception("request %s failed by our own fault", context.id)
            delivery.fail(own_fault(context.id))
        finally:
            relayed = delivery.close()
            self._spending.record(context.measurement)
        return relayed

    # --- what the delivery tells ------------------------------------------------

    def ended(self) -> None:
        """Note how the request ended, before its client can know."""
        self._usage.end(self._context.measurement)

    def guess_cost(self, answer: Callable[[], Any]) -> None:
        """Estimate the tokens that the engine did not count."""
        call = self._call
        prompt = estimating.prompt_tokens(call.path, call.values)
        if prompt is not None:
            completion = estimating.completion_tokens(call.path, answer())
            self._context.measurement.estimate(prompt, completion)

    # --- who answers it ----------------------------------------------------------

    async def _serve(self) -> None:
        """Try the model's candidates (1), then its fallbacks' (6)."""
        model = self._call.model
        failure: ApiError
        try:
            resolution = await self._find(model)
        except ModelNotFound as error:
            # The machine that has it may never have been up; its name is known if it
            # has fallbacks. They must not open what the key may not see.
            if model is None or not self._key.may_see(model):
                raise
            fallbacks, failure = self._catalogue.fallbacks(model), error
        except ApiError as error:
            fallbacks, failure = self._catalogue.fallbacks(model), error
        else:
            try:
                await self._try_each(resolution)
                return
            except ApiError as error:
                fallbacks, failure = resolution.fallbacks, error
        for name in fallbacks:
            if self._delivery.answer_begun or not _is_worth_a_fallback(failure):
                break
            # (A backend's message may quote the prompt.)
            why = failure.code or failure.status
            log.info("%s: %s; trying %s", self._context.id, why, name)
            try:
                found = self._resolve(name) or await self._look_again(name)
                await self._try_each(found)
                return
            except ModelNotFound:
                continue  # this key may not see it
            except ApiError as error:
                failure = error
        raise failure

    async def _find(self, model: str | None) -> Resolution:
        """The candidates, also if they are known only when a backend has loaded (3)."""
        asked = time.monotonic()
        while True:
            try:
                return self._resolve(model) or await self._look_again(model)
            except NotListedYet as error:
                allowed = error.backend.config.timeout
                if allowed and time.monotonic() - asked > allowed:
                    raise _loaded_too_long(error.backend) from error
                if self._catalogue.fallbacks(model):
                    raise
                await asyncio.sleep(_LOADING_POLL_SECONDS)

    def _resolve(self, model: str | None) -> Resolution | None:
        """The candidates; None if the name is not known so far."""
        try:
            return self._catalogue.resolve(
                model, self._key.may_see, affinity_key=self._affinity
            )
        except ModelNotFound:
            return None

    async def _look_again(self, model: str | None) -> Resolution:
        """The candidates for a name that has been listed just now, perhaps."""
        await self._catalogue.refresh()
        return self._catalogue.resolve(
            model, self._key.may_see, affinity_key=self._affinity
        )

    async def _try_each(self, resolution: Resolution) -> None:
        """Give the call to the first candidate that takes it (2)."""
        measurement = self._context.measurement
        measurement.model = resolution.model
        if not measurement.entry:
            candidates = resolution.candidates
            sole = candidates[0].backend.name if len(candidates) == 1 else None
            self._usage.begin(measurement, sole)
        self._refused, self._refusal = (), None
        some_are_busy = False
        for candidate in resolution.candidates:
            backend = candidate.backend
            now = time.monotonic()
            if not backend.breaker.admits(now):
                continue
            if backend.config.max_concurrency:
                if backend.is_full:
                    some_are_busy = True
                    continue
                self._line.note_served(backend, self._key.name)
            if await self._try(candidate, backend.begin(now)):
                return
        if some_are_busy and await self._try_in_line(resolution):
            return
        if await self._try_after_waking(resolution):
            return
        raise self._refusal or BackendUnavailable(
            f'no backend that serves "{resolution.model}" takes requests now',
            retry_after=_LOADING_RETRY_SECONDS,
        )

    async def _try_in_line(self, resolution: Resolution) -> bool:
        """Give the call to whichever candidate has a free place first.

        Returns:
            Whether one took it; False: there is none left to wait for.
        """
        waiter = self._line.waiter(self._key.name, resolution.model, self._key.priority)

        def look() -> Sequence[Candidate]:
            found = self._catalogue.resolve(
                resolution.model, self._key.may_see, affinity_key=self._affinity
            )
            return [c for c in found.candidates if c.backend not in self._refused]

        while True:
            try:
                place = self._line.enter(waiter, look) or await self._turn_of(waiter)
            except NobodyToWaitFor:
                if self._resolve(resolution.model) is None:
                    await self._look_again(resolution.model)  # it may say why
                if not look():
                    return False
                continue
            if await self._try(place.candidate, place.turn):
                return True

    async def _turn_of(self, waiter: Waiter) -> Place:
        """Wait until it is this one's turn."""
        measurement, delivery = self._context.measurement, self._delivery
        position = waiter.position
        if measurement.queue_position is None:
            measurement.queue_position = position
        log.debug("%s: waits in line at position %d", self._context.id, position)
        if self._call.pads and all(b.config.pad_nonstream for b in waiter.backends):
            delivery.allow_padding()
        # 0 means that the wait is over and this coroutine has not been told yet.
        with self._held_back(lambda: f"position {max(1, waiter.position)}"):
            return await waiter.wait()

    async def _try_after_waking(self, resolution: Resolution) -> bool:
        """Wake the machines that do not answer until one takes the call.

        Returns:
            Whether one took it; False: there is none that could be woken.
        """
        asleep = self._catalogue.sleepers(resolution.model)
        refused = (b for b in self._refused if self._catalogue.can_wake(b))
        asleep += tuple(b for b in refused if b not in asleep)
        for backend in asleep:
            log.info('%s: wakes "%s"', self._context.id, backend.name)
            self._context.measurement.backend = backend.name
            if backend.config.pad_nonstream and self._call.pads:
                self._delivery.allow_padding()
            try:
                with self._held_back(lambda: "a machine wakes up"):
                    await self._catalogue.wake(backend)
            except BackendUnavailable as error:
                self._refusal = error
                continue
            self._refused = tuple(b for b in self._refused if b is not backend)
            if await self._try_in_line(resolution):
                return True
        return False

    @contextlib.contextmanager
    def _held_back(self, words: Callable[[], str]) -> Iterator[None]:
        """Count the time inside as waiting, of which comments tell."""
        began = time.monotonic()
        self._delivery.say_while_waiting(words)
        try:
            yield
        finally:
            self._delivery.say_while_waiting(None)
            measurement = self._context.measurement
            waited = time.monotonic() - began
            measurement.queued = (measurement.queued or 0.0) + waited

    async def _try(self, candidate: Candidate, turn: Turn) -> bool:
        """Give the call to one candidate, and end its turn.

        Returns:
            Whether it took the call; False: it could not be connected to.
        """
        backend, call = candidate.backend, self._call
        self._context.measurement.backend = backend.name
        if call.for_backend is not None:
            call = self._call = call.for_backend(backend)
        try:
            if backend.config.pad_nonstream and call.pads:
                self._delivery.allow_padding()
            if not turn.is_ready:
                await self._get_ready(turn)
            assembler = None
            if (
                backend.assembles
                and not call.wants_stream
                and what_a_stream_lacks(call.path, call.values) is None
            ):
                assembler = assembler_for(call.path)
            changes = self._changes(candidate, assembles=assembler is not None)
            answer = await self._past_loading(backend, turn, call.rewrite(changes))
            if assembler is not None and _is_event_stream(answer):
                await self._put_together(backend, turn, answer, assembler(call.values))
            else:
                await self._copy(backend, turn, answer)
        except _NotTaken as refusal:
            log.info("%s: %s", self._context.id, refusal)
            self._refused += (backend,)
            self._refusal = refusal.error
            return False
        finally:
            turn.end()
        self._catalogue.note_served(self._affinity, backend)
        return True

    async def _get_ready(self, turn: Turn) -> None:
        """Wait for what the backend needs before it can be asked: its model (3)."""
        words: Callable[[], str] = str

        def tell(say: Callable[[], str]) -> None:
            nonlocal words
            words = say

        state = None
        if self._call.wants_stream and self._call.path in _CHATS:
            if turn.tells_of_loading:
                model = self._context.measurement.model or ""
                state = LoadingState(model, self._context.id, lambda: words())
                state.begin(self._delivery.tell)
        try:
            with self._held_back(lambda: words()):
                await turn.get_ready(
                    key=self._key.name, priority=self._key.priority, tell=tell
                )
            if state is not None:
                state.done()
        finally:
            if state is not None:
                state.end()

    def _changes(self, candidate: Candidate, *, assembles: bool) -> dict[str, Any]:
        """The members that have to differ from what the client sent."""
        call = self._call
        changes: dict[str, Any] = {}
        filters = candidate.backend.filters
        if filters is not None and call.values:
            changes = filtered(filters, call.model, call.values)
        if candidate.upstream_id != call.model:
            changes["model"] = candidate.upstream_id
        if assembles:
            changes |= request_changes(call.path, call.values)
        elif call.hides_usage:
            options = call.values.get("stream_options") or {}
            changes["stream_options"] = options | {"include_usage": True}
        return changes

    async def _past_loading(self, backend: Backend, turn: Turn, body: bytes) -> Answer:
        """Send until there is a good answer (3, 4)."""
        allowed = backend.config.timeout
        asked = time.monotonic()
        while True:
            try:
                answer = await self._send(backend, body)
            except UpstreamError as error:
                failure = self._broke(backend, turn, error)
                if isinstance(error, ConnectFailed):
                    raise _NotTaken(failure) from error
                raise failure from error
            if 200 <= answer.status < 300:
                return answer
            try:
                said = await answer.read(MAX_ERROR_BYTES)
            except UpstreamError as error:
                raise self._broke(backend, turn, error) from error
            if not backend.is_loading(answer.status, said):
                if verdict_of(answer.status) is Verdict.FAILURE:
                    turn.failed(time.monotonic())
                raise error_answer(backend, answer, said)
            if allowed and time.monotonic() - asked > allowed:
                raise _loaded_too_long(backend)
            await asyncio.sleep(_LOADING_POLL_SECONDS)

    def _send(self, backend: Backend, body: bytes) -> Awaitable[Answer]:
        call = self._call
        return backend.send(
            call.method,
            f"{call.path}?{call.query}" if call.query else call.path,
            self._request.headers.items(),
            body,
            silence_seconds=backend.config.timeout,
            content_type=call.content_type,
            request_id=self._context.id,
        )

    async def _copy(self, backend: Backend, turn: Turn, answer: Answer) -> None:
        """Hand the answer on as it comes (5)."""
        call, delivery = self._call, self._delivery
        if call.reshape is not None:
            model = self._context.measurement.model or ""
            answer = Reshaped(answer, call.reshape(model))
        try:
            await delivery.copy(
                answer,
                stall_timeout=backend.config.stall_timeout,
                hide_usage=call.hides_usage,
                must_finish=call.must_finish,
            )
        except UpstreamError as error:
            raise self._broke(backend, turn, error) from error
        if delivery.carried_error:
            turn.failed(time.monotonic())
        else:
            turn.succeeded()

    async def _put_together(
        self, backend: Backend, turn: Turn, answer: Answer, assembler: Assembler
    ) -> None:
        """Make one answer of a stream that the client did not ask for (5)."""
        measurement = self._context.measurement
        gathering = Gathering(answer, assembler, backend.config.stall_timeout)
        try:
            await gathering.whole()
        except UpstreamError as error:
            raise self._broke(backend, turn, error) from error
        finally:
            measurement.add_usage(assembler.usage)
        if assembler.error is not None:
            turn.failed(time.monotonic())
            raise error_answer_of(backend, 502, assembler.error)
        try:
            whole = assembler.result()
        except AssemblyError as error:
            raise self._broke(backend, turn, BadAnswer(str(error))) from error
        if self._call.reshape is not None:
            shape = self._call.reshape(measurement.model or "")
            whole = shape.feed(whole) + shape.finish()
        turn.succeeded()
        if assembler.usage is None:
            self.guess_cost(lambda: parse_json(whole))
        self._delivery.send(200, "application/json", whole)

    def _broke(self, backend: Backend, turn: Turn, error: UpstreamError) -> ApiError:
        """What an upstream failure is to the client; the backend's breaker hears it."""
        turn.failed(time.monotonic(), unreachable=isinstance(error, ConnectFailed))
        if isinstance(error, ConnectFailed) and error.reason != "timeout":
            return BackendUnavailable(
                backend.why(error), retry_after=_LOADING_RETRY_SECONDS
            )
        if isinstance(error, ConnectFailed | Silent):
            return BackendTimeout(backend.why(error))
        return BackendError(backend.why(error))


def _loaded_too_long(backend: Backend) -> BackendTimeout:
    return BackendTimeout(
        f'backend "{backend.name}" was still loading its model after '
        f"{backend.config.timeout:g} s",
        retry_after=_LOADING_RETRY_SECONDS,
    )


class Gathering:
    """The sink of an answer that is put together before the client gets it."""

    def __init__(self, answer: Answer, assembler: Assembler, stall: float) -> None:
        self._answer = answer
        self._assembler = assembler
        self._stall = stall
        self._has_begun = False  # comments on the progress don't count
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def whole(self) -> None:
        """Wait for the end of the answer.

        Raises:
            UpstreamError: it was cut, ended before it was finished, or is no answer.
        """
        self._answer.attach(self)
        try:
            await self._done
        finally:
            self._answer.cancel()

    def data(self, data: bytes) -> None:
        assembler = self._assembler
        if not self._has_begun and b"data" in data:
            self._has_begun = True
            self._answer.silence_seconds = self._stall
        assembler.feed(data)
        if assembler.broken is not None:
            self.failed(BadAnswer(assembler.broken))
        elif assembler.error is not None:
            self._succeeded()  # nothing that comes after it could count

    def end(self) -> None:
        assembler = self._assembler
        assembler.finish()
        if assembler.complete or assembler.error is not None:
            self._succeeded()
        elif assembler.broken is not None:
            self.failed(BadAnswer(assembler.broken))
        else:
            self.failed(Truncated("the stream ended before it was finished"))

    def _succeeded(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def failed(self, error: UpstreamError) -> None:
        if not self._done.done():
            self._done.set_exception(error)


def _is_event_stream(answer: Answer) -> bool:
    return (answer.header("content-type") or "").startswith("text/event-stream")


def _is_worth_a_fallback(error: ApiError) -> bool:
    is_unknown = isinstance(error, ModelNotFound)
    return is_unknown or error.status == 429 or error.status >= 500
