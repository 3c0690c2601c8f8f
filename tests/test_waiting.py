"""Promises of ``waiting.py``: fair, bounded, and no place is ever lost."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from inferencia.backends.base import Backend
from inferencia.backends.brands import make_backend
from inferencia.catalogue.snapshot import Candidate
from inferencia.errors import ApiError, ModelNotFound, QueueFull, QueueTimeout
from inferencia.settings import BackendConfig, QueueConfig
from inferencia.waiting import (
    MAX_SERVED,
    Line,
    Look,
    NobodyToWaitFor,
    Place,
    Waiter,
)
from seeds import seeds


class Clock:
    """What breakers are asked with."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class House:
    """Backends, a line in front of them, and who was served in which order."""

    def __init__(
        self,
        *places: int,
        max_waiting: int = 100,
        timeout: float = 60.0,
        **further: Any,
    ) -> None:
        self.clock = Clock()
        self.backends = [
            make_backend(
                BackendConfig(
                    name=f"b{number}", url="http://127.0.0.1:1", max_concurrency=limit
                )
            )
            for number, limit in enumerate(places)
        ]
        self.line = Line(
            QueueConfig(max_waiting=max_waiting, timeout=timeout),
            admits=self.admits,
            clock=self.clock,
            **further,
        )
        self.served: list[str] = []
        self.places: dict[str, Place] = {}

    def admits(self, backend: Backend) -> bool:
        return not backend.is_down and backend.breaker.admits(self.clock.now)

    def look_at(self, *backends: Backend) -> Look:
        wanted = backends or self.backends

        def look() -> Sequence[Candidate]:
            return [Candidate(b, "m") for b in wanted if self.admits(b)]

        return look

    def visit(
        self, name: str, *backends: Backend, priority: int = 0
    ) -> "asyncio.Task[Place]":
        """A request; its key is the name up to the first digit."""
        waiter = self.line.waiter(name.rstrip("0123456789"), "m", priority)
        return asyncio.ensure_future(self._visit(name, waiter, self.look_at(*backends)))

    async def _visit(self, name: str, waiter: Waiter, look: Look) -> Place:
        place = self.line.enter(waiter, look) or await waiter.wait()
        self.served.append(name)
        self.places[name] = place
        return place

    async def line_up(self, *names: str, **further: Any) -> list["asyncio.Task[Place]"]:
        tasks = [self.visit(name, **further) for name in names]
        await settled()
        return tasks

    async def end(self, name: str) -> None:
        """The request of that name is over; let the next one notice its place."""
        self.places.pop(name).turn.end()
        await settled()

    async def serve_all(self) -> list[str]:
        """End whoever is served until nobody is left."""
        while self.places:
            await self.end(next(iter(self.places)))
        return self.served

    def assert_is_empty(self) -> None:
        assert len(self.line) == 0
        for backend in self.backends:
            assert backend.in_flight == 0
            assert backend.on_free is None
            assert self.line.waiting_at(backend) == 0
        assert self.line._timer is None


async def settled() -> None:
    """Let everybody run who can."""
    for _ in range(4):
        await asyncio.sleep(0)


# --- places ----------------------------------------------------------------------


async def test_a_free_place_is_taken_at_once_without_waiting() -> None:
    house = House(1)
    waiter = house.line.waiter("a", "m")
    place = house.line.enter(waiter, house.look_at())
    assert place is not None
    assert place.candidate.backend.in_flight == 1
    assert waiter.since is None
    place.turn.end()
    house.assert_is_empty()


async def test_the_best_of_several_free_places_is_taken() -> None:
    house = House(1, 1)
    house.visit("a1")
    house.visit("a2")
    await settled()
    chosen = [house.places[n].candidate.backend.name for n in ("a1", "a2")]
    assert chosen == ["b0", "b1"]


async def test_whoever_waits_gets_the_place_that_is_free_first() -> None:
    house = House(1, 1, 1)
    await house.line_up("a1", "a2", "a3", "b1")
    assert house.served == ["a1", "a2", "a3"]
    await house.end("a2")
    assert house.places["b1"].candidate.backend is house.backends[1]


async def test_a_place_goes_only_to_those_whom_its_backend_serves() -> None:
    house = House(1, 1)
    await house.line_up("a1", "a2")
    one, two = house.backends
    house.visit("b1", one)
    house.visit("c1", two)
    await settled()
    await house.end("a2")
    assert house.served[-1] == "c1"
    assert house.line.waiting_at(one) == 1
    assert house.line.waiting_at(two) == 0


async def test_a_freed_place_is_given_away_in_the_same_call() -> None:
    house = House(1)
    await house.line_up("a1", "b1")
    house.places.pop("a1").turn.end()
    assert house.backends[0].in_flight == 1
    # Nothing is left for a newcomer, although the waiter has not run yet.
    assert house.line.enter(house.line.waiter("c", "m"), house.look_at()) is None


async def test_one_freed_place_wakes_one_waiter() -> None:
    house = House(1)
    await house.line_up("a1", *(f"b{n}" for n in range(20)))
    await house.end("a1")
    assert len(house.served) == 2
    assert len(house.line) == 19


# --- fairness --------------------------------------------------------------------


async def test_a_key_with_fifty_waiting_does_not_delay_anothers_first() -> None:
    house = House(1)
    await house.line_up("a0", *(f"a{n}" for n in range(1, 51)))
    await house.line_up("b1")
    await house.end("a0")
    assert house.served == ["a0", "b1"]


async def test_keys_take_turns_and_each_keeps_its_own_order() -> None:
    house = House(1)
    await house.line_up("a1", "a2", "a3", "b1", "b2", "a4", "c1")
    assert await house.serve_all() == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_a_key_that_comes_back_does_not_overtake_those_who_stayed() -> None:
    house = House(1)
    await house.line_up("a1", "a2", "a3", "c1")
    await house.end("a1")
    await house.line_up("c2")  # c is being served just now
    await house.end("c1")
    assert house.served == ["a1", "c1", "a2"]
    await house.end("a2")
    assert house.served[-1] == "c2"


async def test_higher_priority_goes_first_and_keys_take_turns_within_it() -> None:
    house = House(1)
    await house.line_up("a0", "a1", "b1")
    await house.line_up("x1", "x2", "y1", priority=5)
    assert await house.serve_all() == ["a0", "x1", "y1", "x2", "b1", "a1"]


async def test_turns_are_counted_for_each_backend_apart() -> None:
    house = House(1, 1)
    one, two = house.backends
    await house.line_up("z1", "z2")  # every place is taken
    for name in ("a1", "a2", "b1", "b2"):
        house.visit(name, one)
    house.visit("a3", two)
    await settled()
    await house.end("z2")  # a is served at the other backend
    assert house.served[-1] == "a3"
    await house.end("z1")
    assert house.served[-1] == "a1"


@pytest.mark.parametrize("seed", range(40))
async def test_nobody_waits_longer_than_one_turn_of_every_other_key(seed: int) -> None:
    rng = random.Random(seed)
    house = House(rng.randint(1, 3), max_waiting=1000)
    keys = "abcde"
    serial = 0
    came: dict[str, int] = {}  # name -> places given when it came first of its key
    for _ in range(300):
        if rng.random() < 0.5:
            serial += 1
            key = rng.choice(keys)
            waits = any(w.key == key for w in house.line._waiting)
            name = f"{key}{serial}"
            house.visit(name)
            if not waits:
                came[name] = len(house.served)
            await settled()
        elif house.places:
            await house.end(rng.choice(sorted(house.places)))
        for name in house.served:
            if name in came:
                before = house.served.index(name) - came.pop(name)
                assert before < len(keys)
    await house.serve_all()
    house.assert_is_empty()


@pytest.mark.parametrize("seed", range(40))
async def test_the_order_that_positions_tell_is_the_order_of_service(seed: int) -> None:
    rng = random.Random(seed)
    house = House(1)
    await house.line_up("z0")
    for number in range(rng.randint(1, 25)):
        key = rng.choice("abcd")
        house.visit(f"{key}{number}", priority=int(key == "d"))
    await settled()
    told = house.line.order_at(house.backends[0])
    assert [waiter.position for waiter in told] == list(range(1, len(told) + 1))
    happened = []
    while house.line:
        before = set(house.line._waiting)
        await house.end(next(iter(house.places)))
        (served,) = before - set(house.line._waiting)
        happened.append(served)
    assert happened == told
    await house.serve_all()


async def test_a_waiter_at_two_backends_has_the_better_of_its_positions() -> None:
    house = House(1, 1)
    one, two = house.backends
    await house.line_up("z1", "z2")
    for name in ("a1", "a2"):
        house.visit(name, one)
    await settled()
    waiter = house.line.waiter("a", "m")
    assert waiter.position == 0
    assert house.line.enter(waiter, house.look_at(one, two)) is None
    assert waiter.position == 1
    assert house.line.order_at(one).index(waiter) == 2


async def test_what_is_remembered_of_who_was_served_is_bounded() -> None:
    house = House(1)
    for number in range(MAX_SERVED + 10):
        house.line.note_served(house.backends[0], f"key-{number}")
    assert len(house.line._served) == MAX_SERVED


# --- bounds ----------------------------------------------------------------------


async def test_a_full_line_refuses_at_once_and_says_when_to_come_again() -> None:
    house = House(1, max_waiting=2)
    await house.line_up("a1", "a2", "a3")
    with pytest.raises(QueueFull) as refused:
        await house.visit("a4")
    assert refused.value.status == 503
    assert refused.value.code == "queue_full"
    assert refused.value.headers["Retry-After"] == "5"
    assert "2 requests wait already" in refused.value.message
    assert await house.serve_all() == ["a1", "a2", "a3"]


async def test_with_max_waiting_zero_nobody_waits() -> None:
    house = House(1, max_waiting=0)
    await house.line_up("a1")
    with pytest.raises(QueueFull):
        await house.visit("b1")


async def test_a_key_that_fills_the_line_makes_room_for_another() -> None:
    house = House(1, max_waiting=4)
    tasks = await house.line_up("z0", "a1", "a2", "a3", "a4")
    await house.line_up("b1", "b2")
    with pytest.raises(QueueFull):
        await tasks[4]
    with pytest.raises(QueueFull):
        await tasks[3]
    with pytest.raises(QueueFull):
        await house.visit("b3")  # both have two now
    assert await house.serve_all() == ["z0", "a1", "b1", "a2", "b2"]


async def test_a_full_line_makes_room_for_a_higher_priority() -> None:
    house = House(1, max_waiting=2)
    tasks = await house.line_up("z0", "a1", "b1")
    await house.line_up("x1", priority=1)
    with pytest.raises(QueueFull):
        await tasks[1]
    with pytest.raises(QueueFull):
        await house.visit("c1", priority=-1)
    assert await house.serve_all() == ["z0", "x1", "b1"]


async def test_waiting_ends_at_the_deadline() -> None:
    house = House(1, timeout=0.01)
    await house.line_up("a1")
    with pytest.raises(QueueTimeout) as refused:
        await house.visit("a2")
    assert refused.value.status == 503
    assert refused.value.code == "queue_timeout"
    assert refused.value.headers["Retry-After"] == "5"
    await house.serve_all()
    house.assert_is_empty()


async def test_a_timeout_of_zero_is_none() -> None:
    house = House(1, timeout=0)
    await house.line_up("a1", "a2")
    (waiter,) = house.line._waiting
    assert waiter._timer is None
    assert await house.serve_all() == ["a1", "a2"]


async def test_entering_again_keeps_rank_and_deadline() -> None:
    house = House(1)
    await house.line_up("z0")
    look = house.look_at()
    first = house.line.waiter("a", "m")
    assert house.line.enter(first, look) is None
    since, deadline = first.since, first._timer and first._timer.when()
    house.visit("a2")
    waiting = asyncio.ensure_future(first.wait())
    await settled()
    await house.end("z0")
    place = await waiting
    place.turn.end()  # it came to nothing; a2 has it now
    await settled()
    assert house.served == ["z0", "a2"]
    house.visit("a3")
    await settled()
    assert house.line.enter(first, look) is None
    assert first.since == since
    assert first._timer is not None
    assert first._timer.when() == deadline
    assert first.position == 1
    waiting = asyncio.ensure_future(first.wait())
    await house.end("a2")
    (await waiting).turn.end()
    await settled()
    assert await house.serve_all() == ["z0", "a2", "a3"]
    house.assert_is_empty()


async def test_a_change_of_bounds_holds_for_those_who_come_after_it() -> None:
    house = House(1, max_waiting=1)
    await house.line_up("a1", "a2")
    house.line.change(QueueConfig(max_waiting=3))
    await house.line_up("a3", "a4")
    assert len(house.line) == 3
    house.line.change(QueueConfig(max_waiting=0))
    with pytest.raises(QueueFull):
        await house.visit("a5")
    assert await house.serve_all() == ["a1", "a2", "a3", "a4"]


# --- leaving ---------------------------------------------------------------------


async def test_a_client_that_leaves_frees_its_place_in_line_at_once() -> None:
    house = House(1, max_waiting=1)
    tasks = await house.line_up("a1", "b1")
    tasks[1].cancel()
    await settled()
    await house.line_up("c1")
    assert await house.serve_all() == ["a1", "c1"]
    house.assert_is_empty()


async def test_a_client_that_has_left_gets_no_turn() -> None:
    house = House(1)
    tasks = await house.line_up("a1", "b1", "c1")
    tasks[1].cancel()  # it has not run since
    house.places.pop("a1").turn.end()
    await settled()
    assert house.served == ["a1", "c1"]


async def test_a_place_given_to_a_client_that_then_leaves_goes_to_the_next() -> None:
    house = House(1)
    tasks = await house.line_up("a1", "b1", "c1")
    house.places.pop("a1").turn.end()  # b has the place, and has not run since
    tasks[1].cancel()
    await settled()
    assert house.served == ["a1", "c1"]
    await house.serve_all()
    house.assert_is_empty()


async def test_a_deadline_and_a_cancellation_at_once_are_one_leaving() -> None:
    house = House(1)
    tasks = await house.line_up("a1", "b1")
    (waiter,) = house.line._waiting
    house.line._give_up(waiter)
    tasks[1].cancel()
    await settled()
    assert tasks[1].cancelled()
    await house.serve_all()
    house.assert_is_empty()


# --- what changes meanwhile ------------------------------------------------------


async def test_a_backend_that_comes_back_lets_waiters_go() -> None:
    house = House(1, 2)
    house.backends[1].is_down = True
    await house.line_up("a1", "b1", "c1", "d1")
    assert house.served == ["a1"]
    house.backends[1].is_down = False
    house.line.look_again()
    await settled()
    assert house.served == ["a1", "b1", "c1"]


async def test_waiters_follow_to_a_backend_that_was_configured_anew() -> None:
    house = House(1)
    old = house.backends[0]
    await house.line_up("a1", "b1", "c1")
    new = House(2).backends[0]
    house.backends[:] = [new]
    house.line.look_again()
    await settled()
    assert house.served == ["a1", "b1", "c1"]
    assert old.on_free is None
    await house.serve_all()
    house.assert_is_empty()


async def test_who_waits_for_a_backend_that_goes_down_is_told() -> None:
    house = House(1)
    tasks = await house.line_up("a1", "b1")
    house.backends[0].is_down = True
    house.line.look_again()
    with pytest.raises(NobodyToWaitFor):
        await tasks[1]


async def test_who_waits_elsewhere_too_goes_on_waiting_there() -> None:
    house = House(1, 1)
    one, two = house.backends
    await house.line_up("a1", "a2", "b1")
    one.is_down = True
    house.line.look_again()
    assert house.line.waiting_at(one) == 0
    await house.end("a2")
    assert house.places["b1"].candidate.backend is two


async def test_a_breaker_that_opens_ends_the_waiting_for_its_backend() -> None:
    house = House(1)
    tasks = await house.line_up("a1", "b1", "c1")
    for _ in range(5):
        house.backends[0].breaker.failed(house.clock.now)
    house.places.pop("a1").turn.end()
    for task in tasks[1:]:
        with pytest.raises(NobodyToWaitFor):
            await task
    house.assert_is_empty()


async def test_a_breaker_that_lets_a_probe_through_is_noticed_in_time() -> None:
    house = House(1, 1, look_seconds=0.01)
    one, two = house.backends
    for _ in range(5):
        one.breaker.failed(house.clock.now)
    tasks = await house.line_up("a1", "b1")
    assert house.places["a1"].candidate.backend is two
    house.clock.now += 10.0
    await asyncio.wait_for(tasks[1], 5)
    assert house.places["b1"].candidate.backend is one


async def test_a_probe_of_a_half_open_breaker_is_one_request_only() -> None:
    house = House(1, 5)
    one, two = house.backends
    for _ in range(5):
        two.breaker.failed(house.clock.now)
    await house.line_up("a1", "b1", "c1", "d1")
    house.clock.now += 10.0
    house.line.look_again()
    await settled()
    assert house.served == ["a1", "b1"]
    assert two.in_flight == 1
    assert house.line.waiting_at(two) == 0
    assert house.line.waiting_at(one) == 2
    house.places["b1"].turn.succeeded()
    house.line.look_again()
    await settled()
    assert house.served == ["a1", "b1", "c1", "d1"]


async def test_a_model_that_vanishes_ends_the_waiting_for_it() -> None:
    house = House(1)
    await house.line_up("z0")
    gone = False

    def look() -> Sequence[Candidate]:
        if gone:
            raise ModelNotFound("no such model")
        return [Candidate(house.backends[0], "m")]

    waiter = house.line.waiter("a", "m")
    assert house.line.enter(waiter, look) is None
    gone = True
    house.line.look_again()
    with pytest.raises(NobodyToWaitFor):
        await waiter.wait()


async def test_who_finds_nobody_does_not_wait() -> None:
    house = House(1)
    house.backends[0].is_down = True
    with pytest.raises(NobodyToWaitFor):
        house.line.enter(house.line.waiter("a", "m"), house.look_at())


# --- everything at once ----------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(40, 150))
async def test_no_place_is_lost_or_given_twice_whatever_happens(seed: int) -> None:
    """Arrivals, ends, leavings, timeouts, failures and reloads, in any order."""
    rng = random.Random(seed)
    house = House(
        *(rng.randint(1, 3) for _ in range(rng.randint(1, 3))), max_waiting=12
    )
    line = house.line
    tasks: dict[str, asyncio.Task[Place]] = {}
    serial = 0

    def arrive() -> None:
        nonlocal serial
        serial += 1
        name = f"{rng.choice('abc')}{serial}"
        count = rng.randint(1, len(house.backends))
        some = rng.sample(house.backends, count)
        tasks[name] = house.visit(name, *some, priority=rng.choice((0, 0, 1)))

    def end() -> None:
        if house.places:
            name = rng.choice(sorted(house.places))
            turn = house.places.pop(name).turn
            if rng.random() < 0.2:
                turn.failed(house.clock.now)
            elif rng.random() < 0.5:
                turn.succeeded()
            turn.end()

    def leave() -> None:
        open_ones = [name for name, task in tasks.items() if not task.done()]
        if open_ones:
            tasks[rng.choice(open_ones)].cancel()

    def expire() -> None:
        if line._waiting:
            line._give_up(rng.choice(list(line._waiting)))

    def flip() -> None:
        backend = rng.choice(house.backends)
        backend.is_down = not backend.is_down
        line.look_again()

    def pass_time() -> None:
        house.clock.now += rng.choice((0.1, 11.0))
        line.look_again()

    steps = [arrive] * 6 + [end] * 4 + [leave] * 2 + [expire, flip, pass_time]
    for _ in range(400):
        rng.choice(steps)()
        for backend in house.backends:
            assert backend.in_flight <= backend.config.max_concurrency
            if line.waiting_at(backend) and house.admits(backend):
                assert backend.is_full, "somebody waits for a free place"
        assert len(line) <= 12
        assert all(waiter._at for waiter in line._waiting)
        if rng.random() < 0.3:
            await settled()
    for backend in house.backends:
        backend.is_down = False
    house.clock.now += 100.0
    line.look_again()
    await settled()
    while house.places or line:
        for name in list(house.places):
            house.places.pop(name).turn.end()
        house.clock.now += 100.0
        line.look_again()
        await settled()
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    for result in results:
        fair = (Place, ApiError, NobodyToWaitFor, asyncio.CancelledError)
        assert isinstance(result, fair), result
    house.assert_is_empty()


@pytest.mark.parametrize("first", ["cancel", "end", "expire", "look"])
@pytest.mark.parametrize("second", ["cancel", "end", "expire", "look"])
@pytest.mark.parametrize("third", ["cancel", "end", "expire", "look", "nothing"])
@pytest.mark.parametrize("gap", [0, 1, 2])
async def test_events_of_one_moment_leave_nothing_behind_in_any_order(
    first: str, second: str, third: str, gap: int
) -> None:
    house = House(1)
    tasks = await house.line_up("a1", "b1", "c1")
    waiter = next(iter(house.line._waiting))
    held = house.places.pop("a1").turn
    deeds: dict[str, Callable[[], object]] = {
        "cancel": tasks[1].cancel,
        "end": held.end,
        "expire": lambda: house.line._give_up(waiter),
        "look": house.line.look_again,
        "nothing": lambda: None,
    }
    for deed in (first, second, third):
        deeds[deed]()
        for _ in range(gap):
            await asyncio.sleep(0)
    held.end()
    await settled()
    await house.serve_all()
    assert "c1" in house.served
    await asyncio.gather(*tasks, return_exceptions=True)
    house.assert_is_empty()
