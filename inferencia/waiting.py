"""The waiting line: requests for which every place is taken.

A backend with ``max_concurrency`` works on so many requests at once. Who comes when all
that could serve it are full waits here, for a place at *any* of them. A request is a
``Waiter`` and moves through these states:

========  ==========================================================================
outside   it has just come, or tries the place that it was given
waiting   it stands in line at one backend or more, and its deadline runs
served    it has a ``Place``: a candidate, and a turn that has begun; it ends the turn
left      its deadline passed, it had to make room, its client left, or none of its
          backends takes requests any more
========  ==========================================================================

**Who is next** at a backend that has a free place: the highest priority; then the key
that was served there longest ago, so that keys take turns, whatever each has waiting;
then who came first.

**A freed place is given away in the very call that frees it** (``Turn.end`` leads
here), so there is no moment in which a newcomer could take it, and nobody is woken in
vain. As long as a backend has a free place nobody waits for it; a newcomer may
therefore take a free place without asking who waits. Who was given a place and is
cancelled before noticing gives it back, and it goes to the next.

**What changes meanwhile.** ``Turn.end`` tells of free places, ``look_again`` of
backends that came, went, or were configured anew; each waiter then looks for its
candidates afresh. What only time changes, such as a breaker that lets a probe through,
is noticed within ``LOOK_SECONDS``.

**A full line** is shared fairly too: a key that has fewer waiting than another gets in,
and the newest of the other's is sent away.

Everything is decided in plain calls; a future for each waiter carries the outcome.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from inferencia.backends.base import Backend, Turn
from inferencia.catalogue.snapshot import Candidate
from inferencia.errors import ApiError, QueueFull, QueueTimeout
from inferencia.settings import QueueConfig

# A breaker opens for ten seconds, so half of that is soon enough to notice that it is
# over; it costs each waiter one look-up.
LOOK_SECONDS = 5.0

# What clients are advised that could not wait, or have waited for too long.
_RETRY_SECONDS = 5.0

# Who was served where lately: pairs of backend and key, about 200 bytes each.
MAX_SERVED = 10_000

# Where a request may wait, best first; only backends that take requests now.
Look = Callable[[], Sequence[Candidate]]


class NobodyToWaitFor(Exception):
    """None of the backends that could serve the request takes requests now."""


@dataclass(frozen=True, slots=True)
class Place:
    """A candidate's place, taken; whoever gets it ends the turn."""

    candidate: Candidate
    turn: Turn


class Waiter:
    """One request, as the line knows it; made by ``Line.waiter``."""

    __slots__ = (
        "_at",
        "_future",
        "_line",
        "_look",
        "_number",
        "_timer",
        "key",
        "model",
        "priority",
        "since",
    )

    def __init__(self, line: "Line", key: str, model: str, priority: int) -> None:
        self.key = key
        self.model = model
        self.priority = priority
        # When it had to wait first, by the loop's clock; None if it never had to.
        self.since: float | None = None
        self._line = line
        self._number = 0  # in the order of coming; 0 until it has to wait
        self._look: Look = tuple
        self._at: dict[Backend, Candidate] = {}  # where it waits
        self._future: asyncio.Future[Place] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def position(self) -> int:
        """Its place in line, 1 if it is next; 0 while it does not wait."""
        return self._line._position(self)

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Where it waits, best first."""
        return tuple(self._at)

    async def wait(self) -> Place:
        """Wait for a place; ``Line.enter`` has just returned None.

        Cancelling it leaves the line, and passes a place on that was given meanwhile.

        Raises:
            QueueTimeout: ``queue.timeout`` has passed.
            QueueFull: it had to make room for another key's request.
            NobodyToWaitFor: its backends take no requests any more.
        """
        future = self._future
        assert future is not None
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                future.result().turn.end()
            raise
        finally:
            self._line._remove(self)


class Line:
    """All that wait, and who is next."""

    def __init__(
        self,
        config: QueueConfig,
        *,
        admits: Callable[[Backend], bool],
        clock: Callable[[], float] = time.monotonic,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """Make an empty line.

        Args:
            config: how many may wait, and for how long.
            admits: whether a backend takes requests now; its being full aside.
            clock: what breakers are asked with.
            look_seconds: how often waiters look for what only time changes.
        """
        self._config = config
        self._admits = admits
        self._clock = clock
        self._look_seconds = look_seconds
        self._waiting: dict[Waiter, None] = {}
        self._at: dict[Backend, dict[Waiter, None]] = {}
        self._came = 0
        # When a key was last served at a backend, in places given so far; oldest first.
        self._served: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._places = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def waiting_at(self, backend: Backend) -> int:
        """How many would take a place there; some may wait elsewhere as well."""
        return len(self._at.get(backend, ()))

    def waiting_by_model(self) -> Mapping[str, int]:
        """How many wait for each model, by its resolved name."""
        return Counter(waiter.model for waiter in self._waiting)

    def change(self, config: QueueConfig) -> None:
        """Other bounds from now on; who waits already keeps place and deadline."""
        self._config = config

    def waiter(self, key: str, model: str, priority: int = 0) -> Waiter:
        """A request that may have to wait.

        Args:
            key: the name of its API key.
            model: what it is for, in messages.
            priority: higher goes first.
        """
        return Waiter(self, key, model, priority)

    def note_served(self, backend: Backend, key: str) -> None:
        """Note that a key got a place; the next one is another key's, if one waits."""
        self._places += 1
        pair = (backend.name, key)
        self._served[pair] = self._places
        self._served.move_to_end(pair)
        if len(self._served) > MAX_SERVED:
            self._served.popitem(last=False)

    def enter(self, waiter: Waiter, look: Look) -> Place | None:
        """Take a free place, or stand in line.

        A waiter whose place came to nothing may enter again; it keeps its rank and
        its deadline.

        Returns:
            The place, or None: then ``waiter.wait`` must be awaited at once.

        Raises:
            QueueFull: as many wait as may.
            NobodyToWaitFor: ``look`` found nobody.
        """
        candidates = look()
        if not candidates:
            raise NobodyToWaitFor
        for candidate in candidates:
            if not candidate.backend.is_full:
                return self._taken(waiter, candidate)
        loop = asyncio.get_running_loop()
        if waiter.since is None:
            self._make_room(waiter)
            self._came += 1
            waiter._number = self._came
            waiter.since = loop.time()
        waiter._future = loop.create_future()
        if self._config.timeout:
            deadline = waiter.since + self._config.timeout
            waiter._timer = loop.call_at(deadline, self._give_up, waiter)
        waiter._look = look
        self._waiting[waiter] = None
        self._stand(waiter, candidates)
        if self._timer is None:
            self._timer = loop.call_later(self._look_seconds, self._tick)
        return None

    def look_again(self) -> None:
        """Note that backends, or what they serve, have changed."""
        self._reconsider(tuple(self._waiting))

    def order_at(self, backend: Backend) -> list[Waiter]:
        """Who gets a place there one after the other, if nobody else comes."""
        waiters = sorted(self._at.get(backend, ()), key=lambda w: w._number)
        # A key has one place in each round, and all rounds go in the same order.
        turns: Counter[tuple[int, str]] = Counter()
        firsts: dict[tuple[int, str], tuple[int, int, int]] = {}
        ranks = {}
        for waiter in waiters:
            group = (waiter.priority, waiter.key)
            first = firsts.setdefault(group, self._rank(backend, waiter))
            ranks[waiter] = (-waiter.priority, turns[group], first)
            turns[group] += 1
        return sorted(waiters, key=lambda w: ranks[w])

    # Giving places away.

    def _fill(self, backend: Backend) -> None:
        """Give the free places of a backend to those who wait for it."""
        while (at := self._at.get(backend)) and not backend.is_full:
            if not self._admits(backend):
                self._reconsider(tuple(at))
                return
            waiter = min(at, key=lambda w: self._rank(backend, w))
            future = waiter._future
            candidate = waiter._at[backend]
            self._remove(waiter)
            if future is not None and not future.done():  # done: its client has left
                future.set_result(self._taken(waiter, candidate))

    def _taken(self, waiter: Waiter, candidate: Candidate) -> Place:
        backend = candidate.backend
        self.note_served(backend, waiter.key)
        return Place(candidate, backend.begin(self._clock()))

    def _rank(self, backend: Backend, waiter: Waiter) -> tuple[int, int, int]:
        last_served = self._served.get((backend.name, waiter.key), 0)
        return (-waiter.priority, last_served, waiter._number)

    def _position(self, waiter: Waiter) -> int:
        lines = [self.order_at(backend) for backend in waiter._at]
        return min((line.index(waiter) + 1 for line in lines), default=0)

    # Standing in line.

    def _stand(self, waiter: Waiter, candidates: Iterable[Candidate]) -> None:
        waiter._at = {}
        for candidate in candidates:
            backend = candidate.backend
            waiter._at[backend] = candidate
            self._at.setdefault(backend, {})[waiter] = None
            backend.on_free = self._fill

    def _step_out(self, waiter: Waiter) -> None:
        for backend in waiter._at:
            at = self._at[backend]
            del at[waiter]
            if not at:
                del self._at[backend]
                backend.on_free = None
        waiter._at = {}

    def _remove(self, waiter: Waiter) -> None:
        """Take a waiter out of the line. Calling it again does nothing."""
        self._step_out(waiter)
        self._waiting.pop(waiter, None)
        if waiter._timer is not None:
            waiter._timer.cancel()
            waiter._timer = None
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send_away(self, waiter: Waiter, reason: Exception) -> None:
        future = waiter._future
        self._remove(waiter)
        if future is not None and not future.done():
            future.set_exception(reason)

    def _give_up(self, waiter: Waiter) -> None:
        seconds = self._config.timeout
        self._send_away(
            waiter,
            QueueTimeout(
                f'every backend that serves "{waiter.model}" was busy for '
                f"{seconds:g} s",
                retry_after=_RETRY_SECONDS,
            ),
        )

    # A full line.

    def _make_room(self, newcomer: Waiter) -> None:
        """See that one more may wait.

        Raises:
            QueueFull: nobody has to go for the newcomer's sake.
        """
        if len(self._waiting) < self._config.max_waiting:
            return
        groups = Counter((w.priority, w.key) for w in self._waiting)
        if groups:
            # The lowest priority has to go first; in it, the key with the most.
            group = min(groups, key=lambda g: (g[0], -groups[g]))
            own = groups[newcomer.priority, newcomer.key]
            is_fairer = group[0] == newcomer.priority and groups[group] > own + 1
            if group[0] < newcomer.priority or is_fairer:
                members = (w for w in self._waiting if (w.priority, w.key) == group)
                newest = max(members, key=lambda w: w._number)
                self._send_away(newest, self._full(newest))
                return
        raise self._full(newcomer)

    def _full(self, waiter: Waiter) -> QueueFull:
        return QueueFull(
            f'every backend that serves "{waiter.model}" is busy, and '
            f"{self._config.max_waiting} requests wait already",
            retry_after=_RETRY_SECONDS,
        )

    # What changes meanwhile.

    def _tick(self) -> None:
        self._timer = None
        self.look_again()
        if self._waiting:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._look_seconds, self._tick)

    def _reconsider(self, waiters: Iterable[Waiter]) -> None:
        """Let waiters look for their candidates again, then give away what is free."""
        for waiter in waiters:
            if waiter not in self._waiting:
                continue
            try:
                candidates = waiter._look()
            except ApiError:
                candidates = ()  # the request itself will find out what is wrong
            if candidates:
                self._step_out(waiter)
                self._stand(waiter, candidates)
            else:
                self._send_away(waiter, NobodyToWaitFor())
        for backend in tuple(self._at):
            if not backend.is_full and self._admits(backend):
                self._fill(backend)
