"""The line: requests that wait for a model on this machine.

A request stands here from the moment it cannot have a lease at once until it gets one,
is sent away, or its client leaves. The line knows who is next and how long anybody may
wait; which model is loaded for whom is decided elsewhere (``deciding.py``).

**Who is next**: the highest priority; then the key whose turn was longest ago, so that
keys take turns, whatever each has waiting; then who came first. A turn is a lease that
had to be waited for; what a key gets without waiting does not count against it.

**Bounds.** Only so many may wait. A full line is shared fairly: a key that has fewer
waiting than another gets in, and the newest of the other's is sent away. A request
waits for its turn for so long at most; the time in which its model has had its turn and
is being loaded does not count.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping

from inferencia.errors import ApiError, QueueFull, QueueTimeout
from inferencia.models.running import Lease, Model
from inferencia.settings import QueueConfig

# Timers may come a little early by the clock that we are given.
_SLACK_SECONDS = 0.001

# What clients are advised that could not wait, or have waited for too long.
RETRY_SECONDS = 5.0

# Whose turn was when: about 200 bytes for each key.
MAX_KEYS = 10_000


class Waiter:
    """One who may have to wait for a model."""

    __slots__ = (
        "coming_before",
        "future",
        "is_by_hand",
        "key",
        "model",
        "number",
        "priority",
        "since",
        "timer",
    )

    def __init__(
        self, model: str, key: str, priority: int, *, is_by_hand: bool = False
    ) -> None:
        self.model = model
        self.key = key
        self.priority = priority  # of the key and of the model together
        self.is_by_hand = is_by_hand  # nobody's request, so no bounds hold for it
        # From when it has to wait:
        self.number = 0  # in the order of coming
        self.since = 0.0  # on the scheduler's clock
        self.coming_before = 0.0  # ``Model.seconds_coming`` at that time
        self.future: asyncio.Future[Lease] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def is_there(self) -> bool:
        """Whether it still waits; not so from the moment its client has left."""
        return self.future is not None and not self.future.done()


class Line:
    """All that wait."""

    def __init__(
        self,
        queue: QueueConfig,
        clock: Callable[[], float],
        on_left: Callable[[], None],
    ) -> None:
        """Make an empty line.

        Args:
            queue: how many may wait, and for how long; may be changed at any time.
            clock: seconds that never go back.
            on_left: called when somebody's time was over.
        """
        self.queue = queue
        self._clock = clock
        self._on_left = on_left
        self._all: dict[Waiter, None] = {}
        self._for: dict[Model, dict[Waiter, None]] = {}
        self._came = 0
        # When each key had its last turn, in turns given so far; oldest first.
        self._last_turns: OrderedDict[str, int] = OrderedDict()
        self._turns = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._all)

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self._all

    @property
    def models(self) -> Collection[Model]:
        """Those that somebody waits for."""
        return self._for.keys()

    def count(self, model: Model) -> int:
        """How many wait for a model."""
        return len(self._for.get(model, ()))

    def is_wanted(self, model: Model) -> bool:
        """Whether anybody waits for a model who is still there."""
        return any(waiter.is_there for waiter in self._for.get(model, ()))

    def number(self, waiter: Waiter, model: Model) -> None:
        """Note that a request has come and has to wait."""
        self._came += 1
        waiter.number = self._came
        waiter.since = self._clock()
        waiter.coming_before = model.seconds_coming(waiter.since)

    def add(self, waiter: Waiter, model: Model) -> None:
        """Let a request stand in line; it has its number, and there is room."""
        self._all[waiter] = None
        self._for.setdefault(model, {})[waiter] = None
        if not model.is_coming:
            self._arm(waiter, model)

    def remove(self, waiter: Waiter, model: Model) -> None:
        """Take a request out of the line."""
        del self._all[waiter]
        waiters = self._for[model]
        del waiters[waiter]
        if not waiters:
            del self._for[model]
            model.passed_since = None
        if waiter.timer is not None:
            waiter.timer.cancel()
            waiter.timer = None

    def send_away(self, waiter: Waiter, model: Model, error: ApiError) -> None:
        """End a request's waiting with an error."""
        self.remove(waiter, model)
        if waiter.is_there and waiter.future is not None:
            waiter.future.set_exception(error)

    def send_all_away(self, model: Model, error: ApiError) -> None:
        """End the waiting of all who wait for a model."""
        for waiter in tuple(self._for.get(model, ())):
            self.send_away(waiter, model, error)

    # Turns.

    def take_next(self, model: Model) -> Waiter | None:
        """Take out who is next for a model, if anybody is still there."""
        while waiters := self._for.get(model):
            waiter = min(waiters, key=lambda w: rank(w, self._last_turns))
            self.remove(waiter, model)
            if waiter.is_there:
                self._note_turn(waiter.key)
                return waiter
        return None

    def stopped_models(self, newcomer: Waiter | None = None) -> list[str]:
        """Models that are wanted and not loaded, by id, in the order of their turns.

        Args:
            newcomer: one who is to be reckoned with as if it waited.
        """
        waiters = self._without_model()
        if newcomer is not None:
            waiters.append(newcomer)
        return list(dict.fromkeys(w.model for w in in_turn(waiters, self._last_turns)))

    def position(self, waiter: Waiter, model: Model) -> int:
        """A request's place, 1 if it is next; 0 if it does not wait for its turn."""
        if waiter not in self._all or model.is_coming:
            return 0
        if model.phase is None:
            waiters = self._without_model()
        else:
            waiters = [w for w in self._for[model] if w.is_there]
        if waiter not in waiters:
            return 0
        return in_turn(waiters, self._last_turns).index(waiter) + 1

    def _without_model(self) -> list[Waiter]:
        return [
            waiter
            for model, waiters in self._for.items()
            if model.phase is None
            for waiter in waiters
            if waiter.is_there
        ]

    def _note_turn(self, key: str) -> None:
        self._turns += 1
        self._last_turns[key] = self._turns
        self._last_turns.move_to_end(key)
        if len(self._last_turns) > MAX_KEYS:
            self._last_turns.popitem(last=False)

    # Bounds.

    def make_room(self, newcomer: Waiter, starts_load: Callable[[], bool]) -> None:
        """See that one more may wait.

        Of those who wait for a load one does not count, and neither does who starts
        one: even if nobody may wait, a model can be loaded.

        Args:
            newcomer: who has come.
            starts_load: tells whether its turn comes at once.

        Raises:
            QueueFull: nobody has to go for the newcomer's sake.
        """
        most = self.queue.max_waiting
        if len(self._all) < most:
            return
        waiters = [waiter for waiter in self._all if not waiter.is_by_hand]
        loads = sum(model.is_coming for model in self._for)
        if len(waiters) - loads < most or starts_load():
            return
        victim = who_makes_room(waiters, newcomer)
        if victim is None:
            raise self._full(newcomer)
        (model,) = (one for one, those in self._for.items() if victim in those)
        self.send_away(victim, model, self._full(victim))

    def _full(self, waiter: Waiter) -> QueueFull:
        return QueueFull(
            f'model "{waiter.model}" is not free, and {self.queue.max_waiting} '
            "requests wait already",
            retry_after=RETRY_SECONDS,
        )

    def run_clocks(self, model: Model) -> None:
        """Note that a model's load is over: who still waits for it waits for a turn."""
        for waiter in self._for.get(model, ()):
            self._arm(waiter, model)

    def _arm(self, waiter: Waiter, model: Model) -> None:
        if waiter.is_by_hand or not self.queue.timeout or waiter.timer is not None:
            return
        left = max(0.0, self.queue.timeout - self._waited(waiter, model))
        loop = asyncio.get_running_loop()
        waiter.timer = loop.call_later(left, self._time_over, waiter, model)

    def _waited(self, waiter: Waiter, model: Model) -> float:
        now = self._clock()
        coming = model.seconds_coming(now) - waiter.coming_before
        return now - waiter.since - coming

    def _time_over(self, waiter: Waiter, model: Model) -> None:
        waiter.timer = None
        if model.is_coming:
            return  # ``run_clocks`` follows
        timeout = self.queue.timeout
        if self._waited(waiter, model) < timeout - _SLACK_SECONDS or not timeout:
            self._arm(waiter, model)
            return
        reason = f'model "{waiter.model}" was not free for {timeout:g} s'
        error = QueueTimeout(reason, retry_after=RETRY_SECONDS)
        self.send_away(waiter, model, error)
        self._on_left()


def rank(waiter: Waiter, last_turns: Mapping[str, int]) -> tuple[int, int, int]:
    """What decides who is next; the smallest is.

    Args:
        waiter: one who waits.
        last_turns: when each key had its last turn, in turns given so far.
    """
    return -waiter.priority, last_turns.get(waiter.key, 0), waiter.number


def in_turn(waiters: Iterable[Waiter], last_turns: Mapping[str, int]) -> list[Waiter]:
    """Those who wait, in the order in which they will have their turns.

    In each round each key has one turn, and all rounds go in the same order.
    """
    waiters = sorted(waiters, key=lambda w: w.number)
    rounds: Counter[tuple[int, str]] = Counter()
    firsts: dict[tuple[int, str], tuple[int, int, int]] = {}
    ranks: dict[int, tuple[int, int, tuple[int, int, int]]] = {}
    for waiter in waiters:
        pair = (waiter.priority, waiter.key)
        first = firsts.setdefault(pair, rank(waiter, last_turns))
        ranks[waiter.number] = (-waiter.priority, rounds[pair], first)
        rounds[pair] += 1
    return sorted(waiters, key=lambda w: ranks[w.number])


def who_makes_room(waiters: Collection[Waiter], newcomer: Waiter) -> Waiter | None:
    """Who leaves a full line for a newcomer's sake; None if nobody has to.

    The lowest priority goes first; in it, the newest request of the key that has the
    most, if the newcomer's key has fewer.
    """
    groups = Counter((w.priority, w.key) for w in waiters)
    if not groups:
        return None
    group = min(groups, key=lambda g: (g[0], -groups[g]))
    own = groups[newcomer.priority, newcomer.key]
    is_fairer = group[0] == newcomer.priority and groups[group] > own + 1
    if group[0] >= newcomer.priority and not is_fairer:
        return None
    members = (w for w in waiters if (w.priority, w.key) == group)
    return max(members, key=lambda w: w.number)
