"""Which backends serve a model: from the name in a request to ordered candidates.

One task for each backend asks for its model list, again and again; a machine that is
slow or off holds up nobody but itself. What they find is one immutable snapshot that
is swapped whole, so ``resolve`` and ``listing`` are plain functions that never wait.

**A name is resolved** in this order: exact name, Ollama's implied ``:latest``, alias
(exact, then globs in the order of the configuration). Whether the key may see a model
is asked about the resolved name, and a refused name is answered exactly as an unknown
one. A model that was listed once stays known while its backend is down (503, not 404).
A configured name without glob characters is known before any list, and is offered if
the list has nothing that is wanted: servers of one model often ignore its name.

**Backends come in groups**: those of the configuration, and those that other parts of
the program bring and take away while it runs (the models on this machine, the machines
behind a tunnel). Each group is swapped by itself. A backend that lists its models
without being asked (``lists_itself``) is not watched.

**Candidates are ordered** by priority, then the backend that last served this
conversation (its prompt cache is warm; not if it is full), then least load, then by
turns. Backends that are down, those whose breaker is open, and those that have spent
what they may today, are no candidates. One that does not answer and has ``wake.mac`` is
a sleeper: to be woken if no candidate takes the request.

**The watchdog.** ``fail_threshold`` failed probes in a row take a backend down, one
good one brings it back; both are logged once. A server that is loading its model is
not down. Clouds are asked for their list every ten minutes, and never taken down by
it: how requests end tells more, through the breaker.
"""

import asyncio
import contextlib
import difflib
import hashlib
import json
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol, Self

from inferencia.backends.base import (
    Backend,
    ListedModel,
    ListFailed,
    NotAsked,
    StillLoading,
)
from inferencia.backends.listing import MAX_ID_LENGTH
from inferencia.errors import BackendUnavailable, ModelNotFound
from inferencia.settings import RoutingConfig, WatchdogConfig
from inferencia.spending import Spending
from inferencia.wake import StillAsleep, Waker

log = logging.getLogger(__name__)

# The group of the backends that the configuration names.
CONFIGURED = "configured"

# ``refresh`` comes before every 404, so strangers to a name must not become a flood of
# probes; and a cloud's list is asked for with our key.
REFRESH_SECONDS = 2.0
_CLOUD_REFRESH_SECONDS = 60.0
# How long a 404 is held back for the sake of a model that appeared just now.
_REFRESH_WAIT_SECONDS = 2.0

# A model that is being loaded shows up soon.
_LOADING_POLL_SECONDS = 2.0
_LONGEST_POLL_SECONDS = 600.0

# What clients are advised when a backend is down: a request for one of its models has
# it probed at once, so the next one may find it back.
_DOWN_RETRY_SECONDS = 5.0

# Conversations whose backend is remembered; about 100 bytes each.
MAX_AFFINITIES = 10_000

# A conversation is told from others by this many characters of each of its texts.
_AFFINITY_CHARACTERS = 2048
_AFFINITY_TEXTS = 256
_AFFINITY_PROMPT_CHARACTERS = 256

# Comparing names is slow (microseconds each); beyond this many, only the first are.
_MAX_COMPARED = 500

# Members of a backend's own record that clients have a use for. Not among them: file
# paths, command lines, permissions.
_KEPT_MEMBERS = (
    "name",
    "display_name",
    "description",
    "context_length",
    "context_window",
    "max_context_length",
    "max_model_len",
    "max_output_tokens",
    "architecture",
    "capabilities",
    "supported_parameters",
    "pricing",
    "meta",
)
_MAX_MEMBER_LENGTH = 4096  # characters of JSON


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that can take the request, and the model's name there."""

    backend: Backend
    upstream_id: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a requested name has come to."""

    model: str  # the name as it is listed
    candidates: tuple[Candidate, ...]  # best first; none if there are only sleepers
    fallbacks: tuple[str, ...]  # further names to resolve if all of them fail


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """All that is known at one moment."""

    served: Mapping[str, tuple[Candidate, ...]]  # by name, names sorted
    hidden: frozenset[str]  # names that are served and not listed
    loaded: frozenset[str]  # names that a server says are in its memory
    ours: Mapping[str, Backend]  # names whose backend knows whether they are loaded
    entries: tuple[dict[str, Any], ...]  # of /v1/models, sorted by id


class Names(Protocol):
    """Names that mean models and change while the program runs."""

    def pinned(self, requested: str) -> str | None:
        """What a requested name means before anything else; None: nothing at all."""

    def alias_of(self, name: str) -> str | None:
        """What a name that no backend lists stands for now."""

    def entries(self) -> Sequence[dict[str, Any]]:
        """Such names as ``/v1/models`` shows them."""


class NotListedYet(BackendUnavailable):
    """Nobody lists the model, but a backend that loads one may do so soon."""

    def __init__(self, backend: Backend) -> None:
        """Name the backend that is loading."""
        super().__init__(backend.trouble, retry_after=_LOADING_POLL_SECONDS)
        self.backend = backend


@dataclass(slots=True, eq=False)
class _Seat:
    """One backend's place: what it listed, and the task that asks it."""

    backend: Backend
    group: str
    models: tuple[ListedModel, ...] = ()  # of the last list
    failures: int = 0  # failed probes in a row
    is_loading: bool = False  # as of the last probe
    said: str = ""  # the trouble that was logged last
    probed: float | None = None  # when the last probe ended; None: none did
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # to probe now
    waiting: list[asyncio.Future[None]] = field(default_factory=list)  # for that probe
    task: asyncio.Task[None] | None = None
    waker: Waker | None = None  # only with ``wake.mac``

    @property
    def offered(self) -> tuple[ListedModel, ...]:
        return self.models or self.backend.exact_models

    @property
    def may_list_more(self) -> bool:
        """Whether it loads a model whose name nobody knows yet."""
        return self.is_loading and not self.offered

    def take_over(self, other: "_Seat") -> None:
        """Know what was known of the same server, until it is asked again."""
        self.models = other.models
        self.failures = other.failures
        self.is_loading = other.is_loading
        self.backend.take_over(other.backend)

    def poll_seconds(self, interval: float) -> float:
        """The time until the next probe."""
        if self.is_loading:
            return min(interval, _LOADING_POLL_SECONDS)
        if self.failures and self.backend.is_cloud:
            slower = interval * 2.0 ** min(self.failures - 1, 10)
            return min(slower, _LONGEST_POLL_SECONDS)
        if self.failures:
            return interval
        return self.backend.poll_seconds(interval)


class Catalogue:
    """All backends and what they serve. It owns them: ``aclose`` closes them too."""

    def __init__(
        self,
        backends: Sequence[Backend],
        routing: RoutingConfig,
        watchdog: WatchdogConfig,
        *,
        spending: Spending | None = None,
        names: Names | None = None,
        on_change: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a catalogue; nothing is asked before ``start``.

        Args:
            backends: with names of their own.
            routing: names, aliases, fallbacks.
            watchdog: how often to probe, and how patiently.
            spending: knows which backends have spent enough for today.
            names: knows further names of models.
            on_change: called when models, a backend's being up, or the backends
                themselves have changed.
            clock: what breakers are asked with.
        """
        self._routing = routing
        self._watchdog = watchdog
        self._spending = spending or Spending()
        self._names = names
        self._on_change = on_change
        self._clock = clock
        self._created = int(time.time())
        self._seats = [self._seat_of(backend) for backend in backends]
        self._wakeable = self._with_wakers()
        self._snapshot = self._made()
        # Why a model that nobody lists may be there soon; None if nobody expects it.
        self.expected: Callable[[str], str | None] | None = None
        # Why a model that nobody lists is here and cannot be served; None if it is not.
        self.unusable: Callable[[str], str | None] | None = None
        self._affinities: OrderedDict[bytes, str] = OrderedDict()
        self._turns = 0  # resolutions so far, for taking turns
        self._last_turns: dict[str, int] = {}  # when a backend was last the first
        self._is_started = False
        self._leaving: set[asyncio.Task[None]] = set()

    # Its life.

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def start(self) -> None:
        """Begin to ask the backends, each at once."""
        self._is_started = True
        for seat in self._seats:
            self._follow(seat)

    async def aclose(self) -> None:
        """Stop asking and close the backends. Calling it again does nothing."""
        self._is_started = False
        seats, self._seats = self._seats, []
        leaving, self._leaving = self._leaving, set()
        await _cancelled([*(seat.task for seat in seats), *leaving])
        for seat in seats:
            if seat.waker is not None:
                await seat.waker.aclose()
            await seat.backend.aclose()

    async def replace(
        self,
        backends: Sequence[Backend],
        routing: RoutingConfig,
        watchdog: WatchdogConfig | None = None,
    ) -> None:
        """Swap the configuration; see ``replace_group`` for what that means."""
        self._routing = routing
        self._watchdog = watchdog or self._watchdog
        await self.replace_group(CONFIGURED, backends)

    async def replace_group(self, group: str, backends: Sequence[Backend]) -> None:
        """Swap the backends of one group; those of other groups stay.

        Backends among ``backends`` that are here already (the same objects; see
        ``Backend.same_as``) keep their list, breaker and requests. One that is the same
        server with other settings takes over the list. Those that go are closed when
        their last request has ended.

        Args:
            group: ``CONFIGURED``, or a name of the caller's.
            backends: all that the group has from now on, with names of their own.
        """
        here = {id(seat.backend): seat for seat in self._seats}
        members = [here.get(id(b)) or self._seat_of(b, group) for b in backends]
        others = [seat for seat in self._seats if seat.group != group]
        # What is configured comes first, wherever the order decides.
        staying = members + others if group == CONFIGURED else others + members
        kept = set(map(id, staying))
        going = [seat for seat in self._seats if id(seat) not in kept]
        before = {_what_is_listed(seat.backend): seat for seat in going}
        for seat in members:
            if seat.backend.lists_itself:
                continue
            old = before.get(_what_is_listed(seat.backend))
            if seat.task is None and old is not None:
                seat.take_over(old)
        self._seats = staying
        self._wakeable = self._with_wakers()
        self._last_turns.clear()
        self._swap()
        for seat in members:
            if self._is_started and seat.task is None:
                self._follow(seat)
        for seat in going:
            self._see_off(seat.backend)
        self._tell()
        await _cancelled([seat.task for seat in going])
        for seat in going:
            if seat.waker is not None:
                await seat.waker.aclose()

    def relist(self, backend: Backend) -> None:
        """Take note that a backend that lists itself has other models now."""
        for seat in self._seats:
            if seat.backend is backend:
                seat.models = backend.own_models
        self._swap()
        self._tell()

    def _seat_of(self, backend: Backend, group: str = CONFIGURED) -> _Seat:
        seat = _Seat(backend, group)
        if backend.lists_itself:
            backend.is_listed = True
            seat.models = backend.own_models
        if backend.config.wake.mac is not None:

            async def answers() -> bool:
                await self._probe(seat)
                return not seat.failures

            seat.waker = Waker(backend.config.wake, backend.name, answers)
        return seat

    def _with_wakers(self) -> dict[Backend, _Seat]:
        return {s.backend: s for s in self._seats if s.waker is not None}

    def _see_off(self, backend: Backend) -> None:
        async def close_when_idle() -> None:
            try:
                await backend.wait_until_idle()
            finally:
                await backend.aclose()

        task = asyncio.get_running_loop().create_task(close_when_idle())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    # What it is asked.

    @property
    def backends(self) -> tuple[Backend, ...]:
        """In the order of the configuration."""
        return tuple([seat.backend for seat in self._seats])

    @property
    def has_choice(self) -> bool:
        """Whether there is more than one backend."""
        return len(self._seats) > 1

    @property
    def is_ready(self) -> bool:
        """Whether some model can be served now."""
        now = self._clock()
        return any(
            (self._admits(candidate.backend, now) or self._sleeps(candidate.backend))
            and (candidate.backend.is_listed or candidate.backend.is_cloud)
            for candidates in self._snapshot.served.values()
            for candidate in candidates
        )

    def listing(self, may_see: Callable[[str], bool]) -> list[dict[str, Any]]:
        """The ``data`` of ``/v1/models``, sorted by id, each model once.

        Models of backends that are down are in it: they are known, and come back.
        The records are shared; they must not be changed.
        """
        ours = self._snapshot.ours
        return [
            _with_status(entry, ours[entry["id"]]) if entry["id"] in ours else entry
            for entry in self._all_entries()
            if may_see(entry["id"])
        ]

    def _all_entries(self) -> Sequence[dict[str, Any]]:
        entries = self._snapshot.entries
        further = () if self._names is None else self._names.entries()
        return sorted((*entries, *further), key=_id_of) if further else entries

    def entry(self, name: str, may_see: Callable[[str], bool]) -> dict[str, Any]:
        """One model's record in ``listing``; its name may be an alias.

        Raises:
            ModelNotFound: it is not known, or this key may not see it.
        """
        known = self._known_as(name)
        for entry in self.listing(may_see):
            if entry["id"] in (name, known):
                return entry
        raise self._unknown(name, may_see)

    def models_of(self, backend: Backend) -> tuple[str, ...]:
        """The names that a backend offers, as it last listed them."""
        return tuple(
            model.id
            for seat in self._seats
            if seat.backend is backend
            for model in seat.offered
        )

    def resolve(
        self,
        requested: str | None,
        may_see: Callable[[str], bool],
        *,
        affinity_key: bytes | None = None,
    ) -> Resolution:
        """Find who can serve a model.

        Args:
            requested: the name in the request; None or "" if it has none: then
                ``routing.default_model``, else, of those that can be served, one that
                its server says is loaded, else the first by name.
            may_see: whether the key may use a model, by its resolved name.
            affinity_key: what ``affinity_key()`` made of the request.

        Raises:
            ModelNotFound: it is not known, or this key may not see it.
            BackendUnavailable: it is known, but nobody serves it now; or no backend
                ever told what it serves; or one still loads what may be it.
        """
        name = self._name_of(requested, may_see)
        if name is None or not may_see(name):
            raise self._unknown(requested, may_see)
        candidates = self._ordered(name, affinity_key)
        if not candidates and not self.sleepers(name):
            raise self._unavailable(name)
        fallbacks = self.fallbacks(requested or name) if self._routing.fallbacks else ()
        return Resolution(name, candidates, fallbacks)

    def fallbacks(self, requested: str | None) -> tuple[str, ...]:
        """The names to resolve, with the same ``may_see``, when a model fails."""
        requested = requested or self._routing.default_model or ""
        configured = self._routing.fallbacks
        name = self._known_as(requested) or requested
        return configured.get(name) or configured.get(requested) or ()

    def note_served(self, affinity_key: bytes | None, backend: Backend) -> None:
        """Remember who served a conversation, so that its next turn goes there."""
        if affinity_key is None or not self._routing.affinity:
            return
        self._affinities[affinity_key] = backend.name
        self._affinities.move_to_end(affinity_key)
        if len(self._affinities) > MAX_AFFINITIES:
            self._affinities.popitem(last=False)

    def admits(self, backend: Backend) -> bool:
        """Whether a backend takes requests now, if it has a free place."""
        return self._admits(backend, self._clock())

    def sleepers(self, model: str) -> tuple[Backend, ...]:
        """Backends of a model that do not answer and can be woken, by priority."""
        served = self._snapshot.served.get(model, ()) if self._wakeable else ()
        return tuple(c.backend for c in served if self._sleeps(c.backend))

    def can_wake(self, backend: Backend) -> bool:
        """Whether there is a way to wake its machine."""
        return backend in self._wakeable

    def wakings(self, backend: Backend) -> int:
        """How often its machine was to be woken so far."""
        seat = self._wakeable.get(backend)
        return 0 if seat is None or seat.waker is None else seat.waker.wakings

    async def wake(self, backend: Backend) -> None:
        """Wake a backend's machine, and return when its server answers.

        Raises:
            BackendUnavailable: it did not within ``wake.timeout``, now or just before.
        """
        seat = self._wakeable.get(backend)
        if seat is None or seat.waker is None:
            raise BackendUnavailable(
                f'backend "{backend.name}" is gone', retry_after=_DOWN_RETRY_SECONDS
            )
        try:
            await seat.waker.wake()
        except StillAsleep as error:
            raise BackendUnavailable(
                f'the machine of backend "{backend.name}" {error}',
                retry_after=error.retry_after,
            ) from error
        # What failed while it slept says nothing about it.
        backend.breaker.succeeded()

    async def refresh(self) -> None:
        """Ask the reachable backends again, for a model that appeared just now.

        Each is asked at most every ``REFRESH_SECONDS``, and one that is slow is not
        waited for long. Backends that are down are asked too, but not waited for.
        """
        waiting = []
        for seat in self._seats:
            if seat.task is None or not self._ask(seat):
                continue
            if not seat.backend.is_down:
                waiting.append(seat.task.get_loop().create_future())
                seat.waiting.append(waiting[-1])
        if waiting:
            await asyncio.wait(waiting, timeout=_REFRESH_WAIT_SECONDS)

    # From a name to candidates.

    def _name_of(
        self, requested: str | None, may_see: Callable[[str], bool]
    ) -> str | None:
        """The known model that is meant, whether or not it may be seen."""
        requested = requested or self._routing.default_model
        if requested:
            return self._known_as(requested)
        hidden = self._snapshot.hidden
        visible = [n for n in self._snapshot.served if n not in hidden and may_see(n)]
        now = self._clock()
        servable = [
            name
            for name in visible
            if any(self._admits(c.backend, now) for c in self._snapshot.served[name])
        ]
        loaded = (name for name in servable if self._is_loaded(name))
        first = next(iter(servable or visible), None)
        return next(loaded, first)

    def _is_loaded(self, name: str) -> bool:
        ours = self._snapshot.ours.get(name)
        return name in self._snapshot.loaded or (ours is not None and ours.has_loaded)

    def _known_as(self, requested: str) -> str | None:
        """The listed name, along any chain of aliases."""
        if self._names is not None:
            pinned = self._names.pinned(requested)
            if pinned is None:
                return None
            requested = pinned
        if requested in self._snapshot.served:
            return requested
        if len(requested) > MAX_ID_LENGTH:
            return None
        name: str | None = requested
        passed: set[str] = set()
        while name is not None and name not in passed:
            if listed := self._listed_as(name):
                return listed
            passed.add(name)
            name = self._alias_of(name)
        return None

    def _listed_as(self, name: str) -> str | None:
        served = self._snapshot.served
        if name in served:
            return name
        latest = f"{name}:latest"
        return latest if latest in served else None

    def _alias_of(self, requested: str) -> str | None:
        aliases = self._routing.aliases
        if requested in aliases:
            return aliases[requested]
        if self._names is not None and (meant := self._names.alias_of(requested)):
            return meant
        matches = (aliases[glob] for glob in aliases if fnmatchcase(requested, glob))
        return next(matches, None)

    def _ordered(self, name: str, affinity_key: bytes | None) -> tuple[Candidate, ...]:
        """The candidates that take requests now, best first."""
        now = self._clock()
        admitted = [
            candidate
            for candidate in self._snapshot.served[name]
            if self._admits(candidate.backend, now)
        ]
        if len(admitted) < 2:
            return tuple(admitted)
        favourite = self._favourite(affinity_key)

        def rank(candidate: Candidate) -> tuple[int, bool, float, int]:
            backend = candidate.backend
            is_favourite = backend.name == favourite and not backend.is_full
            last_turn = self._last_turns.get(backend.name, 0)
            return (-backend.priority, not is_favourite, backend.load, last_turn)

        admitted.sort(key=rank)
        self._turns += 1
        self._last_turns[admitted[0].backend.name] = self._turns
        return tuple(admitted)

    def _favourite(self, affinity_key: bytes | None) -> str | None:
        if affinity_key is None or not self._routing.affinity:
            return None
        name = self._affinities.get(affinity_key)
        if name is not None:
            self._affinities.move_to_end(affinity_key)
        return name

    def _admits(self, backend: Backend, now: float) -> bool:
        return (
            not backend.is_down
            and backend.breaker.admits(now)
            and (backend.config.daily_spend is None or not self._is_spent(backend))
        )

    def _is_spent(self, backend: Backend) -> bool:
        return self._spending.is_over(backend.name)

    def _sleeps(self, backend: Backend) -> bool:
        seat = self._wakeable.get(backend)
        if seat is None or self._is_spent(backend):
            return False
        # A breaker that opened before the watchdog has lost patience.
        is_broken = not backend.breaker.admits(self._clock())
        return backend.is_down or (is_broken and seat.failures > 0)

    # Words for what cannot be served.

    def _unknown(
        self, requested: str | None, may_see: Callable[[str], bool]
    ) -> ModelNotFound | BackendUnavailable:
        loading = next((s.backend for s in self._seats if s.may_list_more), None)
        if loading is not None:
            return NotListedYet(loading)
        name = requested or self._routing.default_model
        if self.expected and name and may_see(name) and (why := self.expected(name)):
            return BackendUnavailable(why, retry_after=_DOWN_RETRY_SECONDS)
        target = name and self._alias_of(name)
        for known in (name, target):
            if self.unusable and known and may_see(known):
                if why := self.unusable(known):
                    return ModelNotFound(
                        f'model "{known}" cannot be served: {why}', param="model"
                    )
        if not any(seat.backend.is_listed for seat in self._seats):
            return self._nobody_answered()
        if not (requested or self._routing.default_model):
            return ModelNotFound("no model is available to this key", param="model")
        wanted = (requested or self._routing.default_model or "")[:MAX_ID_LENGTH]
        hidden = self._snapshot.hidden
        visible = [n for n in self._snapshot.served if n not in hidden and may_see(n)]
        near = nearest(wanted, visible)
        hint = f'; nearest: "{near}"' if near else ""
        if target and may_see(target) and not self._listed_as(target):
            hint = f' (an alias of "{target}", which no backend lists)'
        never = next((s for s in self._seats if not s.backend.is_listed), None)
        doubt = ""
        if never is not None and never.backend.trouble and not never.offered:
            doubt = f"What one backend serves is not known: {never.backend.trouble}."
        return ModelNotFound(
            f'model "{wanted}" is not known{hint}.',
            param="model",
            lists=True,
            doubt=doubt,
        )

    def _nobody_answered(self) -> BackendUnavailable:
        """No list ever came, so nothing can be said about any name."""
        for seat in self._seats:
            self._ask(seat)
        troubles = [
            seat.backend.trouble
            or f'backend "{seat.backend.name}" has not answered yet'
            for seat in self._seats
        ]
        return BackendUnavailable(
            "; ".join(troubles[:3]) or "no backend is configured",
            retry_after=_DOWN_RETRY_SECONDS,
        )

    def _unavailable(self, name: str) -> BackendUnavailable:
        now = self._clock()
        reasons = []
        waits = []
        for seat in self._seats:
            backend = seat.backend
            if all(c.backend is not backend for c in self._snapshot.served[name]):
                continue
            if backend.is_down:
                self._ask(seat)
                reasons.append(backend.trouble or f'backend "{backend.name}" is down')
                waits.append(_DOWN_RETRY_SECONDS)
            elif self._is_spent(backend):
                reasons.append(
                    f'backend "{backend.name}" has spent its daily_spend of '
                    f"{backend.config.daily_spend:g}; more from 00:00 UTC on"
                )
                waits.append(self._spending.seconds_left_today)
            else:
                self._ask(seat)  # it may be back before its breaker lets anybody see
                waits.append(backend.breaker.retry_after(now))
                reasons.append(
                    f'backend "{backend.name}" failed too often; it is tried again in '
                    f"{waits[-1]:.0f} s"
                )
        return BackendUnavailable(
            f'model "{name}" cannot be served now: {"; ".join(reasons[:3])}',
            retry_after=min(waits, default=_DOWN_RETRY_SECONDS),
        )

    # Following the backends.

    def _follow(self, seat: _Seat) -> None:
        if seat.backend.lists_itself:
            return
        loop = asyncio.get_running_loop()
        seat.task = loop.create_task(self._keep_asking(seat))

    async def _keep_asking(self, seat: _Seat) -> None:
        while True:
            await self._probe(seat)
            seat.asked.clear()  # who asked meanwhile got this probe
            # Jitter, so that several gateways do not ask a machine in step.
            seconds = seat.poll_seconds(self._watchdog.interval)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * random.uniform(0.9, 1.1)):
                    await seat.asked.wait()

    def _ask(self, seat: _Seat) -> bool:
        """Have a backend probed now; False if that was done just before."""
        if seat.backend.lists_itself:
            return False
        gap = _CLOUD_REFRESH_SECONDS if seat.backend.is_cloud else REFRESH_SECONDS
        if seat.probed is not None and self._clock() - seat.probed < gap:
            return False
        seat.asked.set()
        return True

    async def _probe(self, seat: _Seat) -> None:
        try:
            await self._look(seat)
        except Exception:
            # A fault of ours in one backend's code must not end its watch.
            log.exception("probing backend %s failed", seat.backend.name)
            self._failed(seat)
        finally:
            seat.probed = self._clock()
            waiting, seat.waiting = seat.waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def _look(self, seat: _Seat) -> None:
        try:
            models = await seat.backend.list_models(self._watchdog.request_timeout)
        except StillLoading:
            self._answered(seat, seat.models, is_loading=True)
        except NotAsked as error:
            log.warning("%s", error)
        except ListFailed:
            self._failed(seat)
        else:
            seat.backend.is_listed = True
            self._answered(seat, models, is_loading=False)

    def _answered(
        self, seat: _Seat, models: tuple[ListedModel, ...], *, is_loading: bool
    ) -> None:
        backend = seat.backend
        was_down = backend.is_down
        had = {(model.id, model.upstream_id) for model in seat.offered}
        seat.models = models
        seat.is_loading = is_loading
        if seat.failures or backend.is_unreachable:
            # It was gone and is back: what failed before says nothing about it now. One
            # that lists its models all along and fails requests stays shut out.
            backend.breaker.succeeded()
            backend.is_unreachable = False
        seat.failures = 0
        backend.is_down = False
        if was_down:
            log.info('back in service: backend "%s"', backend.name)
        self._say(seat)
        self._swap()
        has = {(model.id, model.upstream_id) for model in seat.offered}
        if was_down or had != has:
            self._tell()

    def _failed(self, seat: _Seat) -> None:
        backend = seat.backend
        seat.is_loading = False
        seat.failures += 1
        if backend.is_cloud or backend.is_down:
            return
        if seat.failures >= self._watchdog.fail_threshold:
            backend.is_down = True
            log.warning("out of service: %s", backend.trouble)
            self._tell()
        else:
            self._say(seat)

    def _say(self, seat: _Seat) -> None:
        """Log what is wrong with a backend that is not down, each thing once."""
        trouble = seat.backend.trouble
        if trouble and trouble != seat.said:
            log.info("%s", trouble)
        seat.said = trouble

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change()

    def _swap(self) -> None:
        self._snapshot = self._made()

    def _made(self) -> _Snapshot:
        """Merge what all backends offer."""
        served: dict[str, list[Candidate]] = {}
        entries: dict[str, dict[str, Any]] = {}
        loaded: set[str] = set()
        ours: dict[str, Backend] = {}
        seats = sorted(self._seats, key=lambda seat: -seat.backend.priority)
        for seat in seats:
            for model in seat.offered:
                candidate = Candidate(seat.backend, model.upstream_id)
                served.setdefault(model.id, []).append(candidate)
                if seat.backend.lists_itself and "status" not in model.raw:
                    ours[model.id] = seat.backend
                if model.id not in entries and not model.is_hidden:
                    entries[model.id] = self._entry(model, seat.backend)
                if _is_loaded(model.raw):
                    loaded.add(model.id)
        names = sorted(served)
        return _Snapshot(
            {name: tuple(served[name]) for name in names},
            frozenset(name for name in names if name not in entries),
            frozenset(loaded),
            ours,
            tuple(entries[name] for name in names if name in entries),
        )

    def _entry(self, model: ListedModel, backend: Backend) -> dict[str, Any]:
        """A model as ``/v1/models`` shows it."""
        created = model.raw.get("created")
        owner = model.raw.get("owned_by")
        entry = {
            "id": model.id,
            "object": "model",
            "created": created if type(created) is int else self._created,
            "owned_by": owner if isinstance(owner, str) and owner else backend.name,
        }
        for name in _KEPT_MEMBERS:
            value = model.raw.get(name)
            if value is not None and _is_small(value):
                entry[name] = value
        status = model.raw.get("status")
        if backend.lists_itself and isinstance(status, dict):
            entry["status"] = {
                "value": "loaded" if _is_loaded(model.raw) else "unloaded"
            }
        return entry


def _what_is_listed(backend: Backend) -> tuple[object, ...]:
    """What decides which models a backend lists, and under which names."""
    config = backend.config
    return (config.type, config.url, config.prefix, config.models)


def _is_loaded(raw: Mapping[str, Any]) -> bool:
    """Whether a list says that a model is in memory, as llama-server's router does."""
    status = raw.get("status")
    return isinstance(status, dict) and status.get("value") == "loaded"


def _id_of(entry: Mapping[str, Any]) -> str:
    return str(entry["id"])


def _with_status(entry: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """An entry with whether the model is in memory, as llama-server's router says."""
    return entry | {"status": {"value": "loaded" if backend.has_loaded else "unloaded"}}


def _is_small(value: object) -> bool:
    try:
        return len(json.dumps(value)) <= _MAX_MEMBER_LENGTH
    except (ValueError, RecursionError):
        return False


async def _cancelled(tasks: Sequence[asyncio.Task[None] | None]) -> None:
    """Cancel tasks and wait until they have ended."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


def nearest(wanted: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant: one that holds it, else a similar one."""
    lower = wanted.lower()
    inside = [name for name in names if lower and lower in name.lower()]
    if inside:
        return min(inside, key=len)
    similar = difflib.get_close_matches(wanted, names[:_MAX_COMPARED], n=1)
    return similar[0] if similar else None


def affinity_key(
    key_name: str, model: str | None, values: Mapping[str, Any]
) -> bytes | None:
    """What tells one conversation from others, from its first turn to its last.

    It is made of the key, the model, and the messages up to the first of the user (or
    the beginning of ``prompt`` or ``input``), so later turns have the same one.

    Args:
        key_name: the name of the API key.
        model: the requested name.
        values: the top-level members of the request.

    Returns:
        16 bytes, or None if the request has no conversation.
    """
    texts: list[str] = []
    for value in _beginning(values):
        _gather(value, texts, depth=0)
    if not texts:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for text in (key_name, model or "", *texts):
        part = text[:_AFFINITY_CHARACTERS].encode("utf-8", "surrogatepass")
        digest.update(b"%d:%d:%b" % (len(text), len(part), part))
    return digest.digest()


def _beginning(values: Mapping[str, Any]) -> Iterator[Any]:
    """The parts of a request that its conversation's later turns repeat."""
    for name in ("messages", "input", "prompt"):
        value = values.get(name)
        if isinstance(value, str) and value:
            yield value[:_AFFINITY_PROMPT_CHARACTERS]
        elif isinstance(value, list) and value:
            yield values.get("system") or values.get("instructions")
            for item in value:
                yield item
                if not isinstance(item, dict) or item.get("role") == "user":
                    break
        else:
            continue
        return


def _gather(value: Any, texts: list[str], *, depth: int) -> None:
    """Collect the texts in a JSON value, in order; enough of them, not all."""
    if len(texts) >= _AFFINITY_TEXTS or depth > 8:
        return
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        for member in value.values():
            _gather(member, texts, depth=depth + 1)
    elif isinstance(value, list):
        for member in value:
            _gather(member, texts, depth=depth + 1)
