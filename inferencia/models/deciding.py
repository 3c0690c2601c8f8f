"""Who may run, and who must make room: plain functions of what is known.

Nothing here waits, reads a clock or starts anything. ``scheduler.py`` describes the
moment as a ``Situation``, gets ``Decisions`` back and carries them out.

A model that takes room, or soon will, is in one of these phases:

========  ==========================================================================
ROOM      its turn has come; it starts as soon as those that make room are gone
LOADING   its process starts
READY     it serves; it is busy while it does, and else it may be told to go
STOPPING  it goes; it still takes memory, but nobody reckons with it any more
========  ==========================================================================

**What holds.** A model is told to go only if it is READY and not busy. What remains
keeps to the rules (groups or a matrix, as llama-swap has them) and to the memory
budget, both. As few go as will do: the cheapest first, among equals the least recently
used, and none whose going turns out not to be needed.

**Bigger than the budget.** A model that does not fit even if all others go runs alone
rather than never; beside those only that may not be unloaded for it (persistent).

**Who comes next** is a matter of the line (``turns.py``). The first model in it that
cannot have its room now is the *head*. Others behind it may load meanwhile if that
takes nothing from the room that the head is going to have. Models that are loaded go on
serving, so that A B C A B C becomes A A B B C C; but once the head has been passed over
for too long (``Wanted.is_overdue``), those that stand in its way are *held*: they take
no further requests, become idle, and make room.
"""

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from inferencia.models.definitions import Group, MatrixSets


class Phase(enum.Enum):
    """Where a model stands that takes room; see the module's header."""

    ROOM = "room"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that takes room, or soon will."""

    model: str
    phase: Phase
    size: int = 0  # bytes of memory; 0 if nobody knows
    is_busy: bool = False  # it serves, or finishes what it serves before it goes
    last_used: float = 0.0  # when its last request ended, on the caller's clock

    @property
    def may_go(self) -> bool:
        """Whether it may be unloaded now."""
        return self.phase is Phase.READY and not self.is_busy


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that somebody waits for and that takes no room yet."""

    model: str
    size: int = 0
    is_overdue: bool = False  # it has been passed over for as long as it may be


# --- what may be loaded together --------------------------------------------------


class Rules(Protocol):
    """Which models may be loaded together."""

    def must_go(
        self, model: str, loaded: Sequence[Loaded], held: Collection[str]
    ) -> set[str]:
        """Those of ``loaded`` that must be gone before ``model`` is started."""

    def stays(self, model: str, other: str) -> bool:
        """Whether ``other`` is never unloaded to make room for ``model``."""

    def is_persistent(self, model: str) -> bool:
        """Whether other groups' models never cause it to be unloaded."""

    def cost(self, model: str) -> int:
        """How bad it is to unload it; cheaper ones go first."""


class NoRules:
    """Any models may be together; what fits is a matter of memory alone."""

    def must_go(
        self, model: str, loaded: Sequence[Loaded], held: Collection[str]
    ) -> set[str]:
        return set()

    def stays(self, model: str, other: str) -> bool:
        return False

    def is_persistent(self, model: str) -> bool:
        return False

    def cost(self, model: str) -> int:
        return 1


_DEFAULT_GROUP = Group("(default)", ())


class GroupRules(NoRules):
    """llama-swap's ``groups``; models that are in none form one that swaps.

    As there, loading a model of a group that is not exclusive unloads no exclusive
    group, so the two then run together.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self._groups = {member: g for g in groups for member in g.members}

    def _group(self, model: str) -> Group:
        return self._groups.get(model, _DEFAULT_GROUP)

    def must_go(
        self, model: str, loaded: Sequence[Loaded], held: Collection[str]
    ) -> set[str]:
        mine = self._group(model)
        gone = set()
        for other in loaded:
            theirs = self._group(other.model)
            if theirs.name == mine.name:
                clash = mine.swap
            else:
                clash = mine.exclusive and not theirs.persistent
            if clash:
                gone.add(other.model)
        return gone

    def stays(self, model: str, other: str) -> bool:
        theirs = self._group(other)
        return theirs.persistent and theirs.name != self._group(model).name

    def is_persistent(self, model: str) -> bool:
        return self._group(model).persistent


class MatrixRules(NoRules):
    """llama-swap's ``matrix``: what is loaded is part of one of its sets.

    The set is chosen for which the least has to go, by evict costs. Among equals (where
    llama-swap takes the first) one that can be had at once is preferred, then one that
    has been waited for already, then the first.
    """

    def __init__(self, matrix: MatrixSets) -> None:
        self._sets = matrix.sets
        self._costs = matrix.evict_costs

    def must_go(
        self, model: str, loaded: Sequence[Loaded], held: Collection[str]
    ) -> set[str]:
        choices = [s for s in self._sets if model in s] or [frozenset((model,))]

        def badness(allowed: frozenset[str]) -> tuple[int, bool, int]:
            goers = [other for other in loaded if other.model not in allowed]
            busy = [other.model for other in goers if not other.may_go]
            total = sum(self.cost(other.model) for other in goers)
            return total, bool(busy), sum(name not in held for name in busy)

        best = min(choices, key=badness)
        return {other.model for other in loaded if other.model not in best}

    def cost(self, model: str) -> int:
        return self._costs.get(model, 1)


def make_rules(
    written: Sequence[Group] | MatrixSets | None, *, has_budget: bool
) -> Rules:
    """The rules that hold.

    Args:
        written: what the configuration says; None if it says nothing. Then a memory
            budget decides alone, and without one the models swap one for the other.
        has_budget: whether a memory budget is known.
    """
    if isinstance(written, MatrixSets):
        return MatrixRules(written)
    if written is None and has_budget:
        return NoRules()
    return GroupRules(written or ())


# --- room for one model -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Room:
    """What must be gone before a model can start."""

    evict: frozenset[str]  # idle: they can be told to go now
    blocked_by: frozenset[str]  # busy, loading or about to: they cannot

    @property
    def goers(self) -> frozenset[str]:
        """All that stand in the way."""
        return self.evict | self.blocked_by


def room_for(
    wanted: Wanted,
    loaded: Collection[Loaded],
    rules: Rules,
    budget: int | None,
    held: Collection[str] = (),
) -> Room:
    """Who must go for a model; those that are STOPPING are as good as gone.

    Args:
        wanted: the model; if it is among ``loaded`` that is passed over.
        loaded: all that take room.
        rules: what may be together.
        budget: bytes for all models; None if that does not matter.
        held: those that take no more requests, so that waiting for them makes sense.
    """
    others = [
        other
        for other in loaded
        if other.phase is not Phase.STOPPING and other.model != wanted.model
    ]
    goers = _in_the_way(wanted, others, rules, budget, held)
    evict = frozenset(o.model for o in others if o.model in goers and o.may_go)
    return Room(evict, frozenset(goers) - evict)


def can_start(
    wanted: Wanted, loaded: Collection[Loaded], rules: Rules, budget: int | None
) -> bool:
    """Whether a model may start in this moment, with those that are STOPPING there."""
    others = [
        other
        for other in loaded
        if other.phase is not Phase.ROOM and other.model != wanted.model
    ]
    return not _in_the_way(wanted, others, rules, budget, ())


def is_too_big(
    wanted: Wanted, loaded: Collection[Loaded], rules: Rules, budget: int | None
) -> bool:
    """Whether a model exceeds the budget even if all go that may be made to."""
    if budget is None:
        return False
    lasting = sum(one.size for one in loaded if _lasts(one, wanted, rules))
    return wanted.size + lasting > budget


def _lasts(other: Loaded, wanted: Wanted, rules: Rules) -> bool:
    is_going = other.phase is Phase.STOPPING
    return not is_going and rules.stays(wanted.model, other.model)


def _in_the_way(
    wanted: Wanted,
    others: Sequence[Loaded],
    rules: Rules,
    budget: int | None,
    held: Collection[str],
) -> set[str]:
    goers = rules.must_go(wanted.model, others, held)
    goers |= {
        other.model
        for other in others
        if other.phase is Phase.ROOM
        and not _bears(other, wanted, others, rules, budget)
    }
    if budget is not None:
        rest = [other for other in others if other.model not in goers]
        goers |= _for_memory(wanted, rest, rules, budget, held)
    return goers


def _bears(
    promised: Loaded,
    wanted: Wanted,
    others: Sequence[Loaded],
    rules: Rules,
    budget: int | None,
) -> bool:
    """Whether one that was promised its room can still start if another starts first.

    The budget matters only to one that exceeds it: else all that were promised room
    have been reckoned with.
    """
    newcomer = Loaded(wanted.model, Phase.LOADING, wanted.size)
    if rules.must_go(promised.model, (newcomer,), ()):
        return False
    itself = Wanted(promised.model, promised.size)
    rest = [other for other in others if other is not promised]
    return rules.stays(promised.model, wanted.model) or not is_too_big(
        itself, rest, rules, budget
    )


def _for_memory(
    wanted: Wanted,
    others: Sequence[Loaded],
    rules: Rules,
    budget: int,
    held: Collection[str],
) -> set[str]:
    movable = [other for other in others if not _lasts(other, wanted, rules)]
    if is_too_big(wanted, others, rules, budget):
        # It waits for those that were promised room even if they stay: what it takes
        # over the budget would be theirs.
        promised = [other for other in others if other.phase is Phase.ROOM]
        return {other.model for other in (*movable, *promised)}
    over = wanted.size + sum(other.size for other in others) - budget

    def reluctance(other: Loaded) -> tuple[bool, bool, int, float]:
        # Who is idle goes first. Among the busy, to stay with those that are held
        # already keeps the choice from wandering, which would let none become idle.
        is_fresh = not other.may_go and other.model not in held
        return not other.may_go, is_fresh, rules.cost(other.model), other.last_used

    return _fewest(sorted(movable, key=reluctance), over)


def _fewest(candidates: Sequence[Loaded], over: int) -> set[str]:
    """The first of them that free ``over`` bytes, less those that are not needed."""
    picked = []
    for candidate in candidates:
        if over <= 0:
            break
        picked.append(candidate)
        over -= candidate.size
    for candidate in reversed(picked.copy()):
        if over + candidate.size <= 0:
            picked.remove(candidate)
            over += candidate.size
    return {candidate.model for candidate in picked}


# --- the whole situation ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision depends on."""

    rules: Rules
    budget: int | None = None  # bytes
    loaded: tuple[Loaded, ...] = ()
    wanted: tuple[Wanted, ...] = ()  # in the order of the line
    held: frozenset[str] = frozenset()  # as decided last


@dataclass(frozen=True, slots=True)
class Decisions:
    """What is to be done, in this order."""

    give_up: tuple[str, ...] = ()  # ROOM that cannot be had after all: wait again
    evict: tuple[str, ...] = ()  # READY -> STOPPING
    turns: tuple[str, ...] = ()  # wanted -> ROOM
    start: tuple[str, ...] = ()  # ROOM -> LOADING, in this moment
    too_big: tuple[str, ...] = ()  # among those started: over the budget
    hold: frozenset[str] = frozenset()  # no further requests for these
    head: str | None = None  # who waits first and cannot have its room now
    # Whether only serving stands in its way, so that its patience is tried.
    is_passed_over: bool = False


@dataclass(slots=True)
class _Plan:
    """Decisions in the making, and the world as they leave it."""

    situation: Situation
    world: dict[str, Loaded]
    give_up: list[str] = field(default_factory=list)
    evict: list[str] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    too_big: list[str] = field(default_factory=list)

    def room_for(self, wanted: Wanted) -> Room:
        now = self.situation
        return room_for(wanted, self.world.values(), now.rules, now.budget, now.held)

    def unload(self, models: Iterable[str]) -> None:
        for model in sorted(models, key=lambda m: (self.world[m].last_used, m)):
            self.world[model] = replace(self.world[model], phase=Phase.STOPPING)
            self.evict.append(model)

    def start_if_free(self, one: Loaded) -> None:
        """Start a model that has its turn, if all who made room are gone."""
        wanted = Wanted(one.model, one.size)
        now = self.situation
        there = self.world.values()
        if can_start(wanted, there, now.rules, now.budget):
            self.world[one.model] = replace(one, phase=Phase.LOADING)
            self.start.append(one.model)
            if is_too_big(wanted, there, now.rules, now.budget):
                self.too_big.append(one.model)


def decide(now: Situation) -> Decisions:
    """What to do in a situation.

    1. Over the budget, because a model turned out bigger: idle ones go.
    2. Whose turn has come already gets room again if it shrank, or gives up.
    3. Those who wait get their turn, one after the other.

    Whoever has its turn and whose room is free starts.
    """
    plan = _Plan(now, {one.model: one for one in now.loaded})
    plan.unload(_surplus(plan.world.values(), now.rules, now.budget))
    for one in now.loaded:
        if one.phase is Phase.ROOM:
            _keep_turn(plan, one)
    head, room = _give_turns(plan)
    return Decisions(
        give_up=tuple(plan.give_up),
        evict=tuple(plan.evict),
        turns=tuple(plan.turns),
        start=tuple(plan.start),
        too_big=tuple(plan.too_big),
        hold=room.goers if head is not None and head.is_overdue else frozenset(),
        head=head.model if head is not None else None,
        is_passed_over=bool(room.blocked_by)
        and all(plan.world[m].phase is Phase.READY for m in room.blocked_by),
    )


def _surplus(loaded: Collection[Loaded], rules: Rules, budget: int | None) -> set[str]:
    """Idle models that should go because all together exceed the budget."""
    there = [one for one in loaded if one.phase is not Phase.STOPPING]
    over = sum(one.size for one in there) - (budget or 0)
    if budget is None or over <= 0:
        return set()
    common = [one for one in there if not rules.is_persistent(one.model)]
    idle = [one for one in common if one.may_go]
    idle.sort(key=lambda one: (rules.cost(one.model), one.last_used))
    if idle and len(idle) == len(common):
        # Alone it may exceed the budget; the one that was used last is most useful.
        idle.remove(max(idle, key=lambda one: one.last_used))
    return _fewest(idle, over)


def _keep_turn(plan: _Plan, one: Loaded) -> None:
    room = plan.room_for(Wanted(one.model, one.size))
    if room.blocked_by:
        del plan.world[one.model]
        plan.give_up.append(one.model)
    else:
        plan.unload(room.evict)
        plan.start_if_free(one)


_NOTHING = Room(frozenset(), frozenset())


def _give_turns(plan: _Plan) -> tuple[Wanted | None, Room]:
    """Give turns to all who can have theirs; return the first who cannot, and why."""
    head: Wanted | None = None
    heads_room = _NOTHING
    for wanted in plan.situation.wanted:
        room = plan.room_for(wanted)
        if room.blocked_by:
            if head is None:
                head, heads_room = wanted, room
        elif head is None or _leaves_room(plan, wanted, room, head, heads_room):
            plan.unload(room.evict)
            one = Loaded(wanted.model, Phase.ROOM, wanted.size)
            plan.world[wanted.model] = one
            plan.turns.append(wanted.model)
            plan.start_if_free(one)
    return head, heads_room


def _leaves_room(
    plan: _Plan, wanted: Wanted, room: Room, head: Wanted, heads_room: Room
) -> bool:
    """Whether a model fits beside the head once the head has its room."""
    gone = room.evict | heads_room.goers
    future = [one for one in plan.world.values() if one.model not in gone]
    future.append(Loaded(head.model, Phase.ROOM, head.size))
    now = plan.situation
    return not room_for(wanted, future, now.rules, now.budget).goers
