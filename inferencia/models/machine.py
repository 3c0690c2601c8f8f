"""The machine: what runs on it now, and the carrying out of what is decided.

It knows all models and the line. Whenever something has happened ``decide`` describes
the moment to ``deciding.py``, and does what comes back: models pass on to other phases,
leases are given away, owners (``owning.py``) are told to start and stop processes. All
of that are plain calls. What people ask for is in ``scheduler.py``.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from inferencia.errors import ModelLoadFailed
from inferencia.models.deciding import (
    Loaded,
    Phase,
    Situation,
    Wanted,
    decide,
    make_rules,
)
from inferencia.models.definitions import Group, MatrixSets, ModelDefinition
from inferencia.models.owning import Owners, Worker
from inferencia.models.running import Lease, Model, Process
from inferencia.models.turns import Line, Waiter
from inferencia.settings import QueueConfig

log = logging.getLogger(__name__)

# For how long a model may be passed over, once it is the first in line, by requests
# for the models that stand in its way. Long enough that a swap of some seconds does
# not eat up the machine's time, short enough for somebody who waits.
PATIENCE_SECONDS = 10.0

# A process that lived on for so long after its first request served it well. Who loses
# a request because the process dies may say so a moment before the death is known.
_SETTLED_SECONDS = 1.0

# How old a process's measured memory may be when room is looked for.
_MEASURE_SECONDS = 5.0

# Timers may come a little early by the clock that we are given.
_SLACK_SECONDS = 0.001

# What the configuration says about who may be loaded with whom; None: nothing.
Written = Sequence[Group] | MatrixSets | None


class Machine:
    """All models, who waits for them, and the processes."""

    def __init__(
        self,
        models: Mapping[str, ModelDefinition],
        written: Written,
        *,
        budget: int | None,
        estimate: Callable[[str], int | None],
        worker: Worker,
        queue: QueueConfig,
        clock: Callable[[], float],
        on_change: Callable[[str], None] | None,
    ) -> None:
        """Make a machine on which nothing runs; for the arguments see ``Scheduler``."""
        self.models = {name: Model(one) for name, one in models.items()}
        # Those in a phase, in the order of their turns.
        self.up: dict[str, Model] = {}
        self.line = Line(queue, clock, self.decide)
        self.is_closing = False  # no model is started any more
        self.keep_to(written, budget)
        self._estimate = estimate
        self._worker = worker
        self._clock = clock
        self._on_change = on_change
        self._held: frozenset[str] = frozenset()
        self._measured_at = -_MEASURE_SECONDS
        self._alarm: asyncio.TimerHandle | None = None
        self._owners = Owners(worker, self)

    def keep_to(self, written: Written, budget: int | None) -> None:
        """Decide by these rules from now on."""
        self._written = written
        self._budget = budget
        self._rules = make_rules(written, has_budget=budget is not None)

    async def aclose(self) -> None:
        """Stop all processes, and return when nothing is left."""
        self.is_closing = True
        for known in tuple(self.up.values()):
            self.stop(known)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        await self._owners.wait()

    # Leases.

    def _released(self, process: Process, served: bool) -> None:
        process.leases -= 1
        known = process.model
        if known.process is not process:
            return  # it was cut, and is gone by now
        now = self._clock()
        known.last_used = now
        if served and process.served_at is None:
            process.served_at = now
        if known.phase is not Phase.READY:
            return
        if known.is_open:
            self._grant(known)
        if not process.leases:
            self._became_idle(known, process)

    def _became_idle(self, known: Model, process: Process) -> None:
        if process.is_draining:
            self.stop(known)
            self.decide()
            return
        if known.ttl_timer is None:
            self.arm_ttl(known)
        if self.line:
            self.decide()

    def _grant(self, known: Model) -> None:
        """Give the free places of a loaded model to those who wait for it."""
        process = known.process
        while process is not None and process.leases < known.limit:
            waiter = self.line.take_next(known)
            if waiter is None or waiter.future is None:
                return
            process.leases += 1
            waiter.future.set_result(Lease(process))

    # Deciding, and carrying it out.

    def would_load(self, known: Model, newcomer: Waiter) -> bool:
        """Whether a model would have its turn at once if somebody waited for it."""
        return (
            known.phase is None
            and known.id in decide(self._situation(self._clock(), newcomer)).turns
        )

    def decide(self) -> None:
        """Do what is to be done in this moment."""
        if self.is_closing:
            return
        for known in tuple(self.up.values()):
            if known.phase is Phase.ROOM and not self.line.is_wanted(known):
                self._pass(known, None)  # all its clients have left
        self._measure_all()
        # One reading for the decision and the alarm: a time that came between two would
        # be missed by both.
        now = self._clock()
        done = decide(self._situation(now))
        for name in done.give_up:
            self._pass(self.up[name], None)
        for name in done.evict:
            self.stop(self.up[name])
        for name in done.turns:
            self._pass(self.models[name], Phase.ROOM)
        for name in done.start:
            self._start(self.up[name], is_too_big=name in done.too_big)
        self._held = done.hold
        head = self.models[done.head] if done.head is not None else None
        if head is not None and done.is_passed_over and head.passed_since is None:
            head.passed_since = now
        self._open_and_close()
        self._set_alarm(now, head)
        if done.give_up:
            self.decide()  # they stand in line again, which may start their patience

    def _situation(self, now: float, newcomer: Waiter | None = None) -> Situation:
        wanted = []
        for name in self.line.stopped_models(newcomer):
            known = self.models[name]
            if not known.failures.seconds_left(now):
                since = known.passed_since
                overdue = since is not None and (
                    now - since >= PATIENCE_SECONDS - _SLACK_SECONDS
                )
                wanted.append(Wanted(name, self._size(known), overdue))
        return Situation(
            rules=self._rules,
            budget=self._budget,
            loaded=tuple(self._loaded(known) for known in self.up.values()),
            wanted=tuple(wanted),
            held=self._held,
        )

    def _loaded(self, known: Model) -> Loaded:
        process = known.process
        is_draining = process is not None and process.is_draining
        assert known.phase is not None
        return Loaded(
            known.id,
            known.phase,
            size=self._size(known),
            is_busy=known.in_flight > 0 or is_draining,
            last_used=known.last_used,
        )

    def _size(self, known: Model) -> int:
        if self._budget is None:
            return 0
        memory = known.memory if known.process is None else known.process.memory
        if memory.size is None and not memory.is_estimated:
            memory.is_estimated = True
            memory.estimate = self._estimate(known.id)
        if memory.size is None:
            return self._budget if self._written is None else 0
        return memory.size

    def _measure_all(self) -> None:
        """Look how much memory is really used, if somebody needs room."""
        if self._budget is None or not self.line.models:
            return
        now = self._clock()
        if now - self._measured_at >= _MEASURE_SECONDS:
            self._measured_at = now
            for known in self.up.values():
                if known.phase is Phase.READY and known.process is not None:
                    self._measure(known.process)

    def _measure(self, process: Process) -> None:
        measured = self._worker.memory(process.definition.id)
        if measured is not None:
            process.memory.measured = measured

    def _open_and_close(self) -> None:
        """Let those serve that may, and hold the others."""
        for name, known in self.up.items():
            if known.phase is Phase.READY and known.process is not None:
                is_held = name in self._held or known.process.is_draining
                known.is_open = not is_held
                if known.is_open:
                    self._grant(known)

    def _set_alarm(self, now: float, head: Model | None) -> None:
        """See that the next decision that only time brings about is made."""
        waits = [
            left
            for known in self.line.models
            if known.phase is None and (left := known.failures.seconds_left(now))
        ]
        if head is not None and head.passed_since is not None:
            left = head.passed_since + PATIENCE_SECONDS - now
            if left > _SLACK_SECONDS:
                waits.append(left)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if waits:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(min(waits), self.decide)

    def _pass(self, known: Model, phase: Phase | None) -> None:
        """Let a model pass on to another phase; None is stopped."""
        was_coming = known.is_coming
        known.become(phase, self._clock())
        if phase is None:
            self.up.pop(known.id, None)
            if known.is_removed:
                del self.models[known.id]
        else:
            self.up[known.id] = known
        if was_coming and not known.is_coming:
            self.line.run_clocks(known)
        self._tell(known)

    def _tell(self, known: Model) -> None:
        if self._on_change is not None:
            asyncio.get_running_loop().call_soon(self._on_change, known.id)

    # One process, from its start to its end.

    def _start(self, known: Model, *, is_too_big: bool) -> None:
        if is_too_big:
            log.warning(
                'model "%s" needs about %d MiB and the budget is %d MiB; it runs alone',
                known.id,
                self._size(known) >> 20,
                (self._budget or 0) >> 20,
            )
        known.process = Process(known, self._clock(), self._released)
        self._pass(known, Phase.LOADING)
        self._owners.begin(known.process)

    def ready(self, process: Process) -> None:
        """A process can serve (told by its owner)."""
        known = process.model
        now = self._clock()
        process.ready_at = known.last_used = now
        known.error = ""
        self._measure(process)
        self._pass(known, Phase.READY)
        # Who waited for the load is served, whoever else may be overdue by now.
        known.is_open = True
        self._grant(known)
        if not process.leases:
            self.arm_ttl(known)
        self.decide()

    def failed(self, process: Process, message: str) -> None:
        """A load came to nothing (told by its owner): all who wait for it hear it."""
        known = process.model
        log.warning('model "%s" could not be loaded: %s', known.id, message)
        known.error = message
        known.failures.add(self._clock())
        self.line.send_all_away(known, self.load_failed(known))

    def crashed(self, known: Model, process: Process, message: str) -> None:
        """A process has died while it was ready."""
        # Without the message: what the process printed last may be part of a prompt.
        # (Requests that have noticed it already are not counted.)
        count = process.leases
        requests = "1 request" if count == 1 else f"{count} requests"
        busy = f" with {requests} in flight" if count else ""
        log.warning('model "%s" has died%s', known.id, busy)
        self._note_good_service(process)
        known.error = message
        known.failures.add(self._clock())
        process.lost = message

    def _note_good_service(self, process: Process) -> None:
        """Forget failures if the process served well for a while."""
        served_at = process.served_at
        if served_at is not None and self._clock() - served_at >= _SETTLED_SECONDS:
            process.model.failures.clear()

    def stop(self, known: Model, grace: float | None = None) -> None:
        """Let a model go; what it still serves is cut."""
        process = known.process
        if known.phase is Phase.STOPPING:
            return
        if process is None:
            self._pass(known, None)
            return
        if process.drain_timer is not None:
            process.drain_timer.cancel()
            process.drain_timer = None
        if process.leases and process.lost is None:
            process.lost = "it was unloaded"
        self._pass(known, Phase.STOPPING)
        self._owners.end(process, grace)

    def gone(self, process: Process) -> None:
        """Nothing is left of a process (told by its owner)."""
        known = process.model
        if process.lost is None:
            self._note_good_service(process)
        self._pass(known, None)
        process.gone.set()
        self.decide()

    def cut(self, process: Process) -> None:
        """What was being finished has taken too long."""
        process.drain_timer = None
        self.stop(process.model)
        self.decide()

    # Idle models.

    def arm_ttl(self, known: Model) -> None:
        """See that a model, idle now, goes when it has been so for long enough."""
        if known.ttl_timer is not None:
            known.ttl_timer.cancel()
            known.ttl_timer = None
        ttl = known.definition.ttl
        if ttl:
            left = max(0.0, known.last_used + ttl - self._clock())
            loop = asyncio.get_running_loop()
            known.ttl_timer = loop.call_later(left, self._ttl_over, known)

    def _ttl_over(self, known: Model) -> None:
        known.ttl_timer = None
        if known.phase is not Phase.READY or known.in_flight:
            return  # the end of its last request sets it again
        idle = self._clock() - known.last_used
        if idle < known.definition.ttl - _SLACK_SECONDS:
            self.arm_ttl(known)
        else:
            self.stop(known)
            self.decide()

    def load_failed(self, known: Model) -> ModelLoadFailed:
        """What those are told who want a model that has failed."""
        return ModelLoadFailed(
            f'model "{known.id}" could not be loaded: {known.error}',
            retry_after=known.failures.seconds_left(self._clock()),
        )
