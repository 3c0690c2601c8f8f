"""From the name in a request to ordered candidates, or to words for why there are none.

**A name is resolved** in this order: exact name, Ollama's implied ``:latest``, alias
(exact, then globs in the order of the configuration). Whether the key may see a model
is asked about the resolved name, and a refused name is answered exactly as an unknown
one. A model that was listed once stays known while its backend is down (503, not 404).
A configured name without glob characters is known before any list, and is offered if
the list has nothing that is wanted: servers of one model often ignore its name.

**Candidates are ordered** by priority, then the backend that last served this
conversation (its prompt cache is warm; not if it is full), then least load, then by
turns. Backends that are down, those whose breaker is open, and those that have spent
what they may today, are no candidates. One that does not answer and has ``wake.mac`` is
a sleeper: to be woken if no candidate takes the request.
"""

import difflib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

from inferencia.backends.base import Backend
from inferencia.backends.listing import MAX_ID_LENGTH
from inferencia.catalogue.roster import CONFIGURED, DOWN_RETRY_SECONDS, Roster
from inferencia.catalogue.snapshot import Candidate, with_status
from inferencia.catalogue.watching import LOADING_POLL_SECONDS
from inferencia.errors import BackendUnavailable, ModelNotFound
from inferencia.settings import RoutingConfig, WatchdogConfig
from inferencia.spending import Spending

# Conversations whose backend is remembered; about 100 bytes each.
MAX_AFFINITIES = 10_000

# Comparing names is slow (microseconds each); beyond this many, only the first are.
_MAX_COMPARED = 500


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a requested name has come to."""

    model: str  # the name as it is listed
    candidates: tuple[Candidate, ...]  # best first; none if there are only sleepers
    fallbacks: tuple[str, ...]  # further names to resolve if all of them fail


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
        super().__init__(backend.trouble, retry_after=LOADING_POLL_SECONDS)
        self.backend = backend


class Catalogue(Roster):
    """All backends and what they serve, by the names that clients ask for."""

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
            backends, watchdog, on_change, clock: see ``Roster``.
            routing: names, aliases, fallbacks.
            spending: knows which backends have spent enough for today.
            names: knows further names of models.
        """
        super().__init__(backends, watchdog, on_change=on_change, clock=clock)
        self._routing = routing
        self._spending = spending or Spending()
        self._names = names
        # Why a model that nobody lists may be there soon; None if nobody expects it.
        self.expected: Callable[[str], str | None] | None = None
        # Why a model that nobody lists is here and cannot be served; None if it is not.
        self.unusable: Callable[[str], str | None] | None = None
        self._affinities: OrderedDict[bytes, str] = OrderedDict()  # backends by name
        self._turns = 0  # resolutions so far, for taking turns
        self._last_turns: dict[str, int] = {}  # when a backend was last the first

    async def replace(
        self,
        backends: Sequence[Backend],
        routing: RoutingConfig,
        watchdog: WatchdogConfig | None = None,
    ) -> None:
        """Swap the configuration; see ``replace_group`` for what that means."""
        self._routing = routing
        self.watchdog = watchdog or self.watchdog
        await self.replace_group(CONFIGURED, backends)

    async def replace_group(self, group: str, backends: Sequence[Backend]) -> None:
        self._last_turns.clear()  # of those that go, nothing is kept
        await super().replace_group(group, backends)

    # What it is asked.

    @property
    def is_ready(self) -> bool:
        """Whether some model can be served now."""
        now = self.clock()
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
            with_status(entry, ours[entry["id"]]) if entry["id"] in ours else entry
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
        return self._admits(backend, self.clock())

    def sleepers(self, model: str) -> tuple[Backend, ...]:
        """Backends of a model that do not answer and can be woken, by priority."""
        served = self._snapshot.served.get(model, ()) if self._wakeable else ()
        return tuple(c.backend for c in served if self._sleeps(c.backend))

    # From a name to candidates.

    def _name_of(
        self, requested: str | None, may_see: Callable[[str], bool]
    ) -> str | None:
        """The known model that is meant, whether or not it may be seen."""
        requested = requested or self._routing.default_model
        if requested:
            return self._known_as(requested)
        visible = self._snapshot.visible(may_see)
        now = self.clock()
        servable = [
            name
            for name in visible
            if any(self._admits(c.backend, now) for c in self._snapshot.served[name])
        ]
        loaded = (name for name in servable if self._snapshot.is_loaded(name))
        first = next(iter(servable or visible), None)
        return next(loaded, first)

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
            if listed := self._snapshot.listed_as(name):
                return listed
            passed.add(name)
            name = self._alias_of(name)
        return None

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
        now = self.clock()
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
        is_broken = not backend.breaker.admits(self.clock())
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
            return BackendUnavailable(why, retry_after=DOWN_RETRY_SECONDS)
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
        near = nearest(wanted, self._snapshot.visible(may_see))
        hint = f'; nearest: "{near}"' if near else ""
        if target and may_see(target) and not self._snapshot.listed_as(target):
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
            seat.ask()
        troubles = [
            seat.backend.trouble
            or f'backend "{seat.backend.name}" has not answered yet'
            for seat in self._seats
        ]
        return BackendUnavailable(
            "; ".join(troubles[:3]) or "no backend is configured",
            retry_after=DOWN_RETRY_SECONDS,
        )

    def _unavailable(self, name: str) -> BackendUnavailable:
        now = self.clock()
        reasons = []
        waits = []
        for seat in self._seats:
            backend = seat.backend
            if all(c.backend is not backend for c in self._snapshot.served[name]):
                continue
            if backend.is_down:
                seat.ask()
                reasons.append(backend.trouble or f'backend "{backend.name}" is down')
                waits.append(DOWN_RETRY_SECONDS)
            elif self._is_spent(backend):
                reasons.append(
                    f'backend "{backend.name}" has spent its daily_spend of '
                    f"{backend.config.daily_spend:g}; more from 00:00 UTC on"
                )
                waits.append(self._spending.seconds_left_today)
            else:
                seat.ask()  # it may be back before its breaker lets anybody see
                waits.append(backend.breaker.retry_after(now))
                reasons.append(
                    f'backend "{backend.name}" failed too often; it is tried again in '
                    f"{waits[-1]:.0f} s"
                )
        return BackendUnavailable(
            f'model "{name}" cannot be served now: {"; ".join(reasons[:3])}',
            retry_after=min(waits, default=DOWN_RETRY_SECONDS),
        )


def _id_of(entry: Mapping[str, Any]) -> str:
    return str(entry["id"])


def nearest(wanted: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant: one that holds it, else a similar one."""
    lower = wanted.lower()
    inside = [name for name in names if lower and lower in name.lower()]
    if inside:
        return min(inside, key=len)
    similar = difflib.get_close_matches(wanted, names[:_MAX_COMPARED], n=1)
    return similar[0] if similar else None
