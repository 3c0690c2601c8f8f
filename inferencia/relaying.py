"""One request from a client to whichever backend answers it.

Which backend that is, ``errand`` finds out. Here is what comes then, numbered as in the
code:

1. The request is sent, with those members changed that have to be. A backend that is
   still loading its model is waited for.
2. An error answer becomes an error of ours that says what the backend said.
3. A good answer is copied to the client, or put together if it was asked for as a
   stream for the client's sake.

Waiting is kept alive by the ``Delivery``; being left by the client is a cancellation
that closes the upstream connection wherever it stands.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from inferencia import estimating
from inferencia.backends.base import Backend, Turn
from inferencia.backends.headers import has_met_us
from inferencia.backends.listing import parse_json
from inferencia.breaker import Verdict, verdict_of
from inferencia.catalogue.affinity import affinity_key
from inferencia.catalogue.choosing import Catalogue
from inferencia.catalogue.snapshot import Candidate
from inferencia.context import CONTEXT, Context
from inferencia.copying import Delivery
from inferencia.errand import Errand, NotTaken, Words, broke, loaded_too_long
from inferencia.errors import ApiError, LoopDetected
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
    Truncated,
    UpstreamError,
)
from inferencia.usage import UsageBook
from inferencia.waiting import Line

log = logging.getLogger(__name__)

# Whose clients can be told by thoughts that a model is being loaded.
_CHATS = ("/v1/chat/completions", "/chat/completions")

# An error answer longer than this says nothing that a person would read.
MAX_ERROR_BYTES = 1 << 20

# A body that is as large is not kept in memory while its answer is copied. For smaller
# ones, letting go would cost more than it is worth.
LARGE_BYTES = 64 * 1024

# How often a loading engine is asked again.
_LOADING_POLL_SECONDS = 0.5


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
    # The body's bytes that are counted as being in memory; and who counts, if it is so
    # large that it should be let go early.
    held: int = 0
    release: Callable[[int], None] | None = None

    def let_go(self) -> None:
        """Forget the body and what was read of it: nobody will need it again."""
        self.body, self.values, self.rewrite = b"", {}, _forgotten
        held, self.held = self.held, 0
        if self.release is not None:
            self.release(held)


def _forgotten(changes: Mapping[str, Any]) -> bytes:
    raise AssertionError("a request whose answer has begun is not sent again")


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
        # A request that was made of another one has no body of its own.
        measurement.bytes_in = len(call.body) or measurement.bytes_in
        measurement.stream = call.wants_stream
        measurement.is_work = True
        return _Relaying(self, request, context, call).run()


class _Relaying(Errand):
    """One call on its way; lives as long as its request."""

    # What a request that is forgotten (``answer_begins``) had, as far as we can tell.
    _prompt_estimate: int | None = None

    def __init__(
        self, relay: Relay, request: web.Request, context: Context, call: Call
    ) -> None:
        assert context.key is not None
        affinity = None
        if relay.catalogue.has_choice:  # with one backend there is nothing to prefer
            affinity = affinity_key(context.key.name, call.model or "", call.values)
        super().__init__(
            relay.catalogue, relay.line, relay.usage, context, call.model, affinity
        )
        self._spending = relay.spending
        self._request = request
        self._call = call
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
        prompt = self._guessed_prompt()
        if prompt is not None:
            completion = estimating.completion_tokens(self._call.path, answer())
            self._context.measurement.estimate(prompt, completion)

    def _guessed_prompt(self) -> int | None:
        if self._prompt_estimate is not None:
            return self._prompt_estimate
        return estimating.prompt_tokens(self._call.path, self._call.values)

    def answer_begins(self) -> None:
        """Let go of a large body: it was sent, and will not be sent again."""
        call = self._call
        self._prompt_estimate = estimating.prompt_tokens(call.path, call.values)
        call.let_go()

    # --- what the errand asks of it ----------------------------------------------

    @property
    def _has_answered(self) -> bool:
        return self._delivery.answer_begun

    def _say_while_waiting(self, words: Words | None) -> None:
        self._delivery.say_while_waiting(words)

    def _wait_for(self, backends: Sequence[Backend]) -> None:
        if self._call.pads and all(b.config.pad_nonstream for b in backends):
            self._delivery.allow_padding()

    async def _try(self, candidate: Candidate, turn: Turn) -> bool:
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
        except NotTaken as refusal:
            return self._pass_over(backend, refusal)
        finally:
            turn.end()
        self._catalogue.note_served(self._affinity, backend)
        return True

    async def _get_ready(self, turn: Turn) -> None:
        """Wait for what the backend needs; a chat may be told so by thoughts."""
        call = self._call
        if not (call.wants_stream and call.path in _CHATS and turn.tells_of_loading):
            await super()._get_ready(turn)
            return
        model = self._context.measurement.model or ""
        state = LoadingState(model, self._context.id, lambda: self._words())
        state.begin(self._delivery.tell)
        try:
            await super()._get_ready(turn)
            state.done()
        finally:
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
        """Send until there is a good answer (1, 2)."""
        allowed = backend.config.timeout
        asked = time.monotonic()
        while True:
            try:
                answer = await self._send(backend, body)
            except UpstreamError as error:
                failure = broke(backend, turn, error)
                if isinstance(error, ConnectFailed):
                    raise NotTaken(failure) from error
                raise failure from error
            if 200 <= answer.status < 300:
                return answer
            try:
                said = await answer.read(MAX_ERROR_BYTES)
            except UpstreamError as error:
                raise broke(backend, turn, error) from error
            if not backend.is_loading(answer.status, said):
                if verdict_of(answer.status) is Verdict.FAILURE:
                    turn.failed(time.monotonic())
                raise error_answer(backend, answer, said)
            if allowed and time.monotonic() - asked > allowed:
                raise loaded_too_long(backend)
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
        """Hand the answer on as it comes (3)."""
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
                tells_begin=call.release is not None,
            )
        except UpstreamError as error:
            raise broke(backend, turn, error) from error
        if delivery.carried_error:
            turn.failed(time.monotonic())
        else:
            turn.succeeded()

    async def _put_together(
        self, backend: Backend, turn: Turn, answer: Answer, assembler: Assembler
    ) -> None:
        """Make one answer of a stream that the client did not ask for (3)."""
        measurement = self._context.measurement
        gathering = Gathering(answer, assembler, backend.config.stall_timeout)
        measurement.tap = gathering
        try:
            await gathering.whole()
        except UpstreamError as error:
            raise broke(backend, turn, error) from error
        except asyncio.CancelledError:
            # Who hangs up has still had the engine work for him.
            if assembler.usage is None and gathering.events:
                measurement.estimate(self._guessed_prompt(), gathering.events)
            raise
        finally:
            measurement.add_usage(assembler.usage)
        if assembler.error is not None:
            turn.failed(time.monotonic())
            raise error_answer_of(backend, 502, assembler.error)
        try:
            whole = assembler.result()
        except AssemblyError as error:
            raise broke(backend, turn, BadAnswer(str(error))) from error
        if self._call.reshape is not None:
            shape = self._call.reshape(measurement.model or "")
            whole = shape.feed(whole) + shape.finish()
        turn.succeeded()
        if assembler.usage is None:
            self.guess_cost(lambda: parse_json(whole))
        self._delivery.send(200, "application/json", whole)


class Gathering:
    """The sink of an answer that is put together before the client gets it."""

    def __init__(self, answer: Answer, assembler: Assembler, stall: float) -> None:
        self._answer = answer
        self._assembler = assembler
        self._stall = stall
        self._has_begun = False  # comments on the progress don't count
        self.events = 0  # about as many as tokens
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
        self.events += data.count(b"data:")
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
