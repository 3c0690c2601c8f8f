"""What always holds of the scheduler, whatever comes, in which order ever.

A worker and clients that act at random, on a loop whose clock jumps (timetravel.py).
Each start and stop is held against the rules in the moment in which it happens.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace

import pytest

import timetravel
from inferencia.errors import ApiError
from inferencia.models.deciding import (
    Loaded,
    Phase,
    Situation,
    Wanted,
    can_start,
    decide,
    make_rules,
    room_for,
)
from inferencia.models.definitions import Group, MatrixSets, ModelDefinition
from inferencia.models.running import Lease, State
from inferencia.models.scheduler import (
    PATIENCE_SECONDS,
    LoadFailed,
    Scheduler,
    Written,
)
from inferencia.settings import QueueConfig
from seeds import seeds

NAMES = "abcdef"
MAX_LOAD_SECONDS = 8.0
MAX_STOP_SECONDS = 3.0
MAX_SERVICE_SECONDS = 6.0


def random_written(rng: random.Random) -> Written:
    """Rules of any kind."""
    kind = rng.choice(["none", "groups", "matrix"])
    if kind == "none":
        return None
    if kind == "matrix":
        sets = tuple(
            frozenset(rng.sample(NAMES, rng.randint(1, 4)))
            for _ in range(rng.randint(1, 4))
        )
        costs = {name: rng.randint(1, 5) for name in NAMES if rng.random() < 0.3}
        return MatrixSets(sets, costs)
    names = list(NAMES)
    rng.shuffle(names)
    cuts = sorted(rng.sample(range(len(names)), 3))
    parts = [names[: cuts[0]], names[cuts[0] : cuts[1]], names[cuts[1] : cuts[2]]]
    return [
        Group(
            f"g{number}",
            tuple(part),
            swap=rng.random() < 0.5,
            exclusive=rng.random() < 0.5,
            persistent=rng.random() < 0.3,
        )
        for number, part in enumerate(parts)
    ]


def may_be_together(written: Written, model: str, others: set[str]) -> bool:
    """The rules once more, as plainly as they can be said."""
    if isinstance(written, MatrixSets):
        return not others or any(others | {model} <= one for one in written.sets)
    default = Group("(default)", ())
    groups = {name: group for group in written or () for name in group.members}
    mine = groups.get(model, default)
    for other in others:
        theirs = groups.get(other, default)
        if theirs.name == mine.name and mine.swap:
            return False
        if theirs.name != mine.name and mine.exclusive and not theirs.persistent:
            return False
    return True


class House:
    """A scheduler among people and machines that do as they like."""

    def __init__(self, seed: int, *, calm: bool = False) -> None:
        self.rng = random.Random(seed)
        self.calm = calm  # nothing fails, and nobody interferes
        self.is_lucky = calm  # loads succeed
        self.loop = asyncio.get_running_loop()
        self.late = 0.0  # by how much the clock is ahead of the loop's
        self.written = random_written(self.rng)
        self.budget = self.rng.choice([None, 8, 12, 20])
        self.sizes = {name: self.rng.randint(1, 10) for name in NAMES}
        # Some take another amount than was thought, some are not known at all.
        self.used = {name: self.rng.randint(1, 10) for name in NAMES}
        for name in NAMES:
            if self.rng.random() < 0.2:
                del self.sizes[name]
            if self.rng.random() < 0.3:
                del self.used[name]
        self.models = {name: self.definition(name) for name in NAMES}
        self.up: dict[str, bool] = {}  # whether it serves; from start to gone
        self.leases: dict[Lease, str] = {}  # those that clients hold
        self.may_be_cut: set[str] = set()  # somebody said so
        self.cut: set[Lease] = set()
        self.reloaded_at = 0.0
        # In the order of coming, so that a seed tells the same story each time.
        self.clients: dict[asyncio.Task[None], None] = {}
        self.others: dict[asyncio.Task[None], None] = {}
        self.violations: list[str] = []
        self.starts: list[str] = []
        self.waits: list[float] = []
        self.scheduler = Scheduler(
            self.models,
            self.written,
            budget=self.budget,
            estimate=self.sizes.get,
            worker=self,
            queue=QueueConfig(
                max_waiting=10_000 if calm else 30,
                timeout=0.0 if calm else self.rng.choice([0.0, 60.0]),
            ),
            clock=self.clock,
        )

    def clock(self) -> float:
        return self.loop.time() + self.late

    def definition(self, name: str) -> ModelDefinition:
        return ModelDefinition(
            id=name,
            command=("serve", name, str(self.rng.randint(0, 3))),
            concurrency_limit=0 if self.calm else self.rng.choice([0, 1, 2, 10]),
            ttl=self.rng.choice([0.0, 0.0, 5.0, 60.0]),
            priority=0 if self.calm else self.rng.choice([0, 0, 3]),
        )

    # The worker.

    async def start(self, model: str) -> None:
        self.expect(model not in self.up, f"{model} is started twice")
        self.look_at_start(model)
        self.up[model] = False
        self.starts.append(model)
        await asyncio.sleep(self.rng.uniform(0, MAX_LOAD_SECONDS))
        luck = 1.0 if self.is_lucky else self.rng.random()
        if luck < 0.15:
            del self.up[model]
            raise LoadFailed("bad luck")
        if luck < 0.2:
            self.scheduler.exited(model, "died in its cradle")
            await asyncio.sleep(1)
        self.up[model] = True

    async def stop(self, model: str, *, grace: float | None) -> None:
        self.expect(model in self.up, f"{model} does not run")
        for lease, name in self.leases.items():
            if name == model and lease not in self.cut:
                is_cut = lease.lost is not None and model in self.may_be_cut
                self.expect(is_cut, f"{model} is stopped while it serves")
                self.cut.add(lease)
        self.up[model] = False
        await asyncio.sleep(self.rng.uniform(0, MAX_STOP_SECONDS))
        del self.up[model]
        self.may_be_cut.discard(model)

    def memory(self, model: str) -> int | None:
        return self.used.get(model)

    def expect(self, holds: bool, otherwise: str) -> None:
        # The scheduler survives a worker's exceptions, so they would not be seen.
        if not holds:
            self.violations.append(f"{otherwise} at {self.loop.time():.2f}")

    def look_at_start(self, model: str) -> None:
        if self.reloaded_at == self.loop.time():
            return  # it was decided by the rules of a moment ago
        others = set(self.up)
        if self.written is not None or self.budget is None:
            is_good = may_be_together(self.written, model, others)
            self.expect(is_good, f"{model} is started beside {others}")
        if self.budget is not None:
            rules = make_rules(self.written, has_budget=True)
            total = sum(self.size(name) for name in others | {model})
            movable = {name for name in others if not rules.stays(model, name)}
            is_good = total <= self.budget or not movable
            self.expect(is_good, f"{model} takes {total} together with {others}")

    def size(self, name: str) -> int:
        state = {state.model: state for state in self.scheduler.states()}[name]
        size = state.memory_measured or state.memory_estimated
        if size is None:
            return 0 if self.written is not None else self.budget or 0
        return size

    # Clients.

    def visit(self, model: str) -> None:
        task = asyncio.ensure_future(self._visit(model))
        self.clients[task] = None
        task.add_done_callback(self.clients.pop)

    async def _visit(self, model: str) -> None:
        key = self.rng.choice("xyz")
        priority = 0 if self.calm else self.rng.choice([0, 0, 0, 5])
        came = self.loop.time()
        try:
            async with self.scheduler.lease(model, key=key, priority=priority) as lease:
                self.waits.append(self.loop.time() - came)
                assert self.up[model] or lease.lost
                self.leases[lease] = model
                try:
                    await asyncio.sleep(self.rng.uniform(0, MAX_SERVICE_SECONDS))
                finally:
                    del self.leases[lease]
        except ApiError:
            assert not self.calm

    def act(self) -> None:
        """Somebody does something."""
        model = self.rng.choice(NAMES)
        if self.calm:
            self.visit(model)
            return
        deeds: Sequence[tuple[int, Callable[[str], None]]] = [
            (60, self.visit),
            (10, self.leave),
            (3, self.crash),
            (3, self.unload),
            (2, self.load),
            (2, self.reload),
            (2, self.step),
            (1, self.scheduler.file_changed),
        ]
        (deed,) = self.rng.choices([d for _, d in deeds], [w for w, _ in deeds])
        deed(model)

    def leave(self, model: str) -> None:
        if self.clients:
            self.rng.choice(list(self.clients)).cancel()

    def crash(self, model: str) -> None:
        if model in self.up:
            self.may_be_cut.add(model)
            self.scheduler.exited(model, "killed")

    def unload(self, model: str) -> None:
        if self.up.get(model):
            self.may_be_cut.add(model)
        self._ask(self.scheduler.unload(model, now=self.rng.random() < 0.3))

    def load(self, model: str) -> None:
        self._ask(self.scheduler.load(model))

    def _ask(self, what: Coroutine[None, None, None]) -> None:
        async def asked() -> None:
            try:
                await what
            except ApiError:
                pass

        task = asyncio.ensure_future(asked())
        self.others[task] = None
        task.add_done_callback(self.others.pop)

    def reload(self, model: str) -> None:
        self.reloaded_at = self.loop.time()
        if self.rng.random() < 0.3:
            self.models.pop(model, None)
        else:
            self.models[model] = self.definition(model)
        if self.rng.random() < 0.3:
            self.written = random_written(self.rng)
        if self.rng.random() < 0.3:
            self.budget = self.rng.choice([None, 8, 12, 20])
        models = {n: replace(m) for n, m in self.models.items()}
        self.scheduler.replace(models, self.written, budget=self.budget)

    def step(self, model: str) -> None:
        self.late += self.rng.choice([1.0, 30.0, 3600.0])

    # What holds.

    def assert_all_is_well(self) -> None:
        states = {state.model: state for state in self.scheduler.states()}
        for name, state in states.items():
            alive = [
                lease
                for lease, model in self.leases.items()
                if model == name and lease.lost is None
            ]
            assert state.in_flight >= len(alive), state
            if state.state is State.READY:
                assert self.up[name], f"{name} is not ready"
        assert self.scheduler.waiting <= len(self.clients) + len(self.others)
        assert self.violations == []

    async def act_for(self, steps: int, pause: float) -> None:
        for _ in range(steps):
            self.act()
            for _ in range(self.rng.choice([0, 1, 2, 5])):
                await asyncio.sleep(0)
            if self.rng.random() < 0.7:
                await asyncio.sleep(self.rng.uniform(0, pause))
            self.assert_all_is_well()

    async def all_gone(self, within: float) -> None:
        async with asyncio.timeout(within):
            while rest := [*self.clients, *self.others]:
                for result in await asyncio.gather(*rest, return_exceptions=True):
                    is_usual = isinstance(result, asyncio.CancelledError)
                    assert result is None or is_usual, result

    async def end(self) -> None:
        """Let everybody finish, and see that nothing is left."""
        self.is_lucky = True
        await self.all_gone(within=3600)
        for state in self.scheduler.states():
            assert state.in_flight == 0, state
            assert state.waiting == 0, state
        assert self.scheduler.waiting == 0
        await self.scheduler.aclose()
        await asyncio.sleep(0)
        assert not self.up
        assert self.violations == []
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("seed", seeds(10, 25))
def test_whatever_happens_the_rules_hold_and_all_are_served(seed: int) -> None:
    async def story() -> None:
        house = House(seed)
        await house.act_for(400, pause=random.Random(seed).choice([0.3, 2.0]))
        await house.end()
        assert len(house.starts) > 4, "this story is dull"

    timetravel.run(story())


@pytest.mark.parametrize("seed", seeds(4, 8))
def test_nobody_waits_longer_than_fairness_allows(seed: int) -> None:
    async def story() -> None:
        house = House(seed, calm=True)
        await house.act_for(400, pause=0.6)
        await house.end()
        # Each model may have a turn for each key before it is mine.
        turn = sum(
            [PATIENCE_SECONDS, MAX_SERVICE_SECONDS, MAX_STOP_SECONDS, MAX_LOAD_SECONDS]
        )
        assert max(house.waits) < len(NAMES) * 3 * turn
        assert len(house.waits) == 400

    timetravel.run(story())


@pytest.mark.parametrize("seed", seeds(4, 8))
def test_closing_in_the_middle_of_everything_leaves_nothing(seed: int) -> None:
    async def story() -> None:
        house = House(seed)
        await house.act_for(60, pause=0.5)
        house.may_be_cut |= set(NAMES)
        await house.scheduler.aclose()
        assert not house.up
        assert house.violations == []
        await house.all_gone(within=MAX_SERVICE_SECONDS)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    timetravel.run(story())


# --- decisions --------------------------------------------------------------------


def random_situation(rng: random.Random) -> Situation:
    """A situation, not only of those that can come about."""
    names = rng.sample(NAMES, len(NAMES))
    split = rng.randint(0, len(names))
    return Situation(
        rules=make_rules(random_written(rng), has_budget=True),
        budget=rng.choice([None, 5, 10, 20]),
        loaded=tuple(
            Loaded(
                name,
                rng.choice(list(Phase)),
                size=rng.randint(0, 12),
                is_busy=rng.random() < 0.4,
                last_used=rng.uniform(0, 100),
            )
            for name in names[:split]
        ),
        wanted=tuple(
            Wanted(name, rng.randint(0, 12), rng.random() < 0.5)
            for name in names[split:]
        ),
        held=frozenset(n for n in names if rng.random() < 0.2),
    )


@pytest.mark.parametrize("seed", seeds(60, 300))
def test_decisions_keep_to_the_rules(seed: int) -> None:
    now = random_situation(random.Random(seed))
    done = decide(now)
    before = {one.model: one for one in now.loaded}
    sizes = {one.model: one.size for one in now.loaded}
    sizes |= {one.model: one.size for one in now.wanted}

    for model in done.evict:
        assert before[model].may_go, f"{model} cannot go"
    assert len(set(done.evict)) == len(done.evict)
    assert set(done.turns) <= {one.model for one in now.wanted}
    coming = {n for n, one in before.items() if one.phase is Phase.ROOM}
    assert set(done.give_up) <= coming
    assert set(done.start) <= (coming - set(done.give_up)) | set(done.turns)

    after = {
        name: replace(one, phase=Phase.STOPPING) if name in done.evict else one
        for name, one in before.items()
        if name not in done.give_up
    }
    for model in done.turns:
        after[model] = Loaded(model, Phase.ROOM, sizes[model])
    for model in done.start:
        after[model] = replace(after[model], phase=Phase.LOADING)
    # Whoever has its turn and does not start waits only for those that are going.
    for model, one in after.items():
        if one.phase is Phase.ROOM:
            wanted = Wanted(model, one.size)
            room = room_for(wanted, after.values(), now.rules, now.budget, now.held)
            assert not room.goers, f"{model} has its turn, but no room"
            assert not can_start(wanted, after.values(), now.rules, now.budget)

    if done.head is not None:
        wanted = next(one for one in now.wanted if one.model == done.head)
        room = room_for(wanted, after.values(), now.rules, now.budget, now.held)
        # (Those behind it may have made room for it, too.)
        assert room.blocked_by or done.evict, f"{done.head} could have its turn"
        assert bool(done.hold) == wanted.is_overdue
    # All who are first in line have had their turns.
    firsts = [one.model for one in now.wanted]
    if done.head is not None:
        firsts = firsts[: firsts.index(done.head)]
    assert list(done.turns[: len(firsts)]) == firsts


@pytest.mark.parametrize("seed", seeds(60, 300))
def test_nobody_goes_who_could_have_stayed(seed: int) -> None:
    rng = random.Random(seed)
    now = random_situation(rng)
    there = [replace(one, phase=Phase.READY) for one in now.loaded]
    for wanted in now.wanted:
        room = room_for(wanted, there, now.rules, now.budget)
        must = now.rules.must_go(wanted.model, there, ())
        for spared in room.goers - must:
            rest = [o for o in there if o.model not in room.goers or o.model == spared]
            assert room_for(wanted, rest, now.rules, now.budget).goers, (
                f"{spared} could have stayed"
            )
