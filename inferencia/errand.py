"""One request's way to a backend that takes it.

The way, numbered as in the code:

1. The catalogue orders the candidates for the model's name.
2. The first that takes the request gets it. Another is tried only if connecting
   failed, since then nothing can have been worked on. If those that are left are busy,
   the request waits in line for whichever has a free place first. If none is left, a
   sleeping machine is woken.
3. A backend that may list the model once it has loaded it is waited for.
4. When every candidate is down, or one answers 429 or 5xx, the model's configured
   fallbacks get their turn, as long as nothing of an answer has gone out.

What it means to give a request to a backend is said by who inherits from ``Errand``:
``relaying`` for requests with an answer, ``api.realtime`` for WebSockets.
"""

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from inferencia.backends.base import Backend, Turn
from inferencia.catalogue.choosing import Catalogue, NotListedYet, Resolution
from inferencia.catalogue.snapshot import Candidate
from inferencia.context import Context
from inferencia.errors import (
    ApiError,
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    ModelNotFound,
    Overloaded,
)
from inferencia.upstream.answer import (
    ConnectFailed,
    NoDescriptors,
    Silent,
    UpstreamError,
)
from inferencia.usage import UsageBook
from inferencia.waiting import Line, NobodyToWaitFor, Place, Waiter

log = logging.getLogger(__name__)

# How often a loading engine is asked for its list again.
_LOADING_POLL_SECONDS = 0.5
# What is advised when nobody took the request.
RETRY_SECONDS = 5.0

# What says, whenever asked, what is being waited for.
Words = Callable[[], str]


class NotTaken(Exception):
    """A candidate could not even be connected to; the next one may be tried."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class Errand(ABC):
    """One request on its way; lives as long as the request."""

    # What says what its backend is waited for; set while it is.
    _words: Words = str

    def __init__(
        self,
        catalogue: Catalogue,
        line: Line,
        usage: UsageBook,
        context: Context,
        model: str | None,
        affinity: bytes | None = None,
    ) -> None:
        """Stand at the beginning of the way.

        Args:
            catalogue: knows which backends serve a model.
            line: where requests wait for busy ones.
            usage: where is written what begins.
            context: of the request; its key is known.
            model: as the request names it.
            affinity: what ``catalogue.affinity_key`` made of the request.
        """
        assert context.key is not None
        self._catalogue = catalogue
        self._line = line
        self._usage = usage
        self._context = context
        self._key = context.key
        self._model = model
        self._affinity = affinity
        # Backends of the model that could not be connected to, and the last one's why.
        self._refused: tuple[Backend, ...] = ()
        self._refusal: ApiError | None = None

    # --- what is particular about a kind of request ------------------------------

    @abstractmethod
    async def _try(self, candidate: Candidate, turn: Turn) -> bool:
        """Give the request to one candidate, stay until all is over, end its turn.

        Returns:
            Whether it took the request; False: it could not be connected to, which
            was told to ``_pass_over``.

        Raises:
            ApiError: it failed otherwise.
        """

    @property
    def _has_answered(self) -> bool:
        """Whether something of an answer has gone to the client."""
        return False

    @abstractmethod
    def _say_while_waiting(self, words: Words | None) -> None:
        """Tell the client from now on what is waited for; None: nothing special."""

    @abstractmethod
    def _wait_for(self, backends: Sequence[Backend]) -> None:
        """Note that an answer of one of these is waited for; called before waiting."""

    # --- who answers it ----------------------------------------------------------

    async def _serve(self) -> None:
        """Try the model's candidates (1), then its fallbacks' (4)."""
        model = self._model
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
            if self._has_answered or not _is_worth_a_fallback(failure):
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
                    raise loaded_too_long(error.backend) from error
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
        """Give the request to the first candidate that takes it (2)."""
        measurement = self._context.measurement
        measurement.model = resolution.model
        if not measurement.is_begun:
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
            retry_after=RETRY_SECONDS,
        )

    async def _try_in_line(self, resolution: Resolution) -> bool:
        """Give the request to whichever candidate has a free place first.

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
        measurement = self._context.measurement
        position = waiter.position
        if measurement.queue_position is None:
            measurement.queue_position = position
        log.debug("%s: waits in line at position %d", self._context.id, position)
        self._wait_for(waiter.backends)
        # 0 means that the wait is over and this coroutine has not been told yet.
        with self._held_back(lambda: f"position {max(1, waiter.position)}"):
            return await waiter.wait()

    async def _try_after_waking(self, resolution: Resolution) -> bool:
        """Wake the machines that do not answer until one takes the request.

        Returns:
            Whether one took it; False: there is none that could be woken.
        """
        asleep = self._catalogue.sleepers(resolution.model)
        refused = (b for b in self._refused if self._catalogue.can_wake(b))
        asleep += tuple(b for b in refused if b not in asleep)
        for backend in asleep:
            log.info('%s: wakes "%s"', self._context.id, backend.name)
            self._context.measurement.backend = backend.name
            self._wait_for((backend,))
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

    def _pass_over(self, backend: Backend, refusal: NotTaken) -> bool:
        """Note that a candidate took no connection; False, for ``_try`` to return."""
        log.info("%s: %s", self._context.id, refusal)
        self._refused += (backend,)
        self._refusal = refusal.error
        return False

    async def _get_ready(self, turn: Turn) -> None:
        """Wait for what the backend needs before it can be asked: its model."""

        def tell(say: Words) -> None:
            self._words = say

        with self._held_back(lambda: self._words()):
            await turn.get_ready(
                key=self._key.name, priority=self._key.priority, tell=tell
            )

    @contextlib.contextmanager
    def _held_back(self, words: Words) -> Iterator[None]:
        """Count the time inside as waiting, of which comments tell."""
        began = time.monotonic()
        self._context.waits_for = words
        self._say_while_waiting(words)
        try:
            yield
        finally:
            self._context.waits_for = None
            self._say_while_waiting(None)
            measurement = self._context.measurement
            waited = time.monotonic() - began
            measurement.queued = (measurement.queued or 0.0) + waited


def broke(backend: Backend, turn: Turn, error: UpstreamError) -> ApiError:
    """What an upstream failure is to the client; the backend's breaker hears it."""
    if isinstance(error, NoDescriptors):  # no fault of the backend's
        log.warning("%s", error)
        return Overloaded(str(error), retry_after=RETRY_SECONDS)
    turn.failed(time.monotonic(), unreachable=isinstance(error, ConnectFailed))
    if isinstance(error, ConnectFailed) and error.reason != "timeout":
        return BackendUnavailable(backend.why(error), retry_after=RETRY_SECONDS)
    if isinstance(error, ConnectFailed | Silent):
        return BackendTimeout(backend.why(error))
    return BackendError(backend.why(error))


def loaded_too_long(backend: Backend) -> BackendTimeout:
    """What is said of a backend that is loading its model for too long."""
    return BackendTimeout(
        f'backend "{backend.name}" was still loading its model after '
        f"{backend.config.timeout:g} s",
        retry_after=RETRY_SECONDS,
    )


def _is_worth_a_fallback(error: ApiError) -> bool:
    is_unknown = isinstance(error, ModelNotFound)
    return is_unknown or error.status == 429 or error.status >= 500
