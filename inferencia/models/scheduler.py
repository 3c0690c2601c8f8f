"""The scheduler: which models run on this machine, and whose turn it is.

A request needs a ``Lease`` of its model: as long as it has one the model is not
unloaded. Who comes for a model that is loaded and free gets it at once, in a plain
call; else the request stands in one bounded, fair line. What is decided, and by which
rules, is in ``deciding.py``; this module knows the moment, asks there, and carries it
out: it gives leases away, and has one task for each process, the only one that calls
the ``Worker`` for it.

Everything is decided in plain calls, so that at each ``await`` all is consistent, and
there are no locks. Something is decided when something happens: a request comes or
leaves, a model becomes idle, ready or gone, a time is over.

**A request's way.** It waits for its model's turn; then for those that make room and
for the load; it has its lease; it releases it. Whoever is cancelled leaves the line at
once and causes no load; a load that has begun goes on.

**A process's way** is that of ``deciding.Phase``. It is *drained* before it goes if it
was unloaded by hand or its definition changed: new requests wait for the next process,
those it serves are finished.

**Failures.** If a load fails, all who wait for it are told in the same turn of the
event loop, and the next in line is considered. The model is then tried again only
after a while (``failures.py``); in a crash loop who asks for it is refused at once.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from inferencia.errors import ModelLoadFailed, ModelNotFound, ShuttingDown
from inferencia.models.deciding import (
    Loaded,
    Phase,
    Situation,
    Wanted,
    decide,
    make_rules,
)
from inferencia.models.definitions import Group, MatrixSets, ModelDefinition
from inferencia.models.owning import LoadFailed, Owners, Worker
from inferencia.models.running import Lease, Model, ModelState, Process
from inferencia.models.turns import RETRY_SECONDS, Line, Waiter
from inferencia.settings import QueueConfig

__all__ = ["LeaseRequest", "LoadFailed", "Scheduler", "Worker", "Written"]

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


class LeaseRequest(Waiter):
    """A request for a lease; made by ``Scheduler.lease``.

    Either ``async with`` it, which gives the lease and releases it at the end, or await
    ``wait`` and release the lease oneself.
    """

    __slots__ = ("_lease", "_scheduler")

    def __init__(
        self,
        scheduler: "Scheduler",
        model: str,
        key: str,
        priority: int,
        *,
        is_by_hand: bool = False,
    ) -> None:
        super().__init__(model, key, priority, is_by_hand=is_by_hand)
        self._scheduler = scheduler
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        self._lease = await self.wait()
        return self._lease

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            self._lease.release(served=error is None)

    async def wait(self) -> Lease:
        """Wait for the model's turn, its load, and a free place.

        Cancelling it leaves the line, and passes a lease on that was given meanwhile.

        Raises:
            ModelNotFound: there is no such model, or no more.
            ModelLoadFailed: it cannot be loaded now.
            QueueFull: as many wait as may, or it had to make room for another key's.
            QueueTimeout: its turn did not come within ``queue.timeout``.
            ShuttingDown: no more requests are taken.
        """
        lease = self._scheduler.try_lease(self.model)
        if lease is not None:
            return lease
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.future = future
        try:
            self._scheduler._enter(self)
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                future.result().release(served=False)
            raise
        finally:
            self._scheduler._leave(self)

    @property
    def position(self) -> int:
        """Its place in line, 1 if it is next; 0 if it does not wait for a turn."""
        return self._scheduler._position(self)

    @property
    def status(self) -> str:
        """What it waits for, in words; "" if it does not wait."""
        return self._scheduler._status(self)


class Scheduler:
    """All models of this machine, and the line of those who want one."""

    def __init__(
        self,
        models: Mapping[str, ModelDefinition],
        written: Written,
        *,
        budget: int | None,
        estimate: Callable[[str], int | None],
        worker: Worker,
        queue: QueueConfig,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        """Make a scheduler that runs nothing yet.

        Args:
            models: by id.
            written: the rules that were written; None if there are none. Then the
                budget decides alone, and without one a model replaces the other.
            budget: bytes for all models together; None if that is not known.
            estimate: about how many bytes a model takes, before it was measured; None
                if nobody knows. Then it counts as nothing if there are written rules
                to go by, else as much as there is.
            worker: does what is decided.
            queue: how many may wait, and for how long.
            clock: seconds that never go back.
            on_change: told, soon after, which model's state has changed.
        """
        self._models = {name: Model(one) for name, one in models.items()}
        self._written = written
        self._budget = budget
        self._rules = make_rules(written, has_budget=budget is not None)
        self._estimate = estimate
        self._worker = worker
        self._clock = clock
        self._on_change = on_change
        self._line = Line(queue, clock, self._decide)
        # Those in a phase, in the order of their turns.
        self._up: dict[str, Model] = {}
        self._held: frozenset[str] = frozenset()
        self._measured_at = -_MEASURE_SECONDS
        self._alarm: asyncio.TimerHandle | None = None
        self._owners = Owners(worker, self)
        self._is_closing = False

    # What requests call.

    def try_lease(self, model: str) -> Lease | None:
        """A lease, if the model is loaded and free; never waits."""
        known = self._models.get(model)
        if known is None or not known.is_open:
            return None
        process = known.process
        if process is None or process.leases >= known.limit:
            return None
        process.leases += 1
        return Lease(process)

    def lease(self, model: str, *, key: str, priority: int = 0) -> LeaseRequest:
        """A request for a lease, which may have to wait.

        Args:
            model: its id.
            key: the name of the client's key; keys take turns.
            priority: the key's; the model's own is added. Higher goes first.
        """
        known = self._models.get(model)
        own = known.definition.priority if known is not None else 0
        return LeaseRequest(self, model, key, priority + own)

    @property
    def waiting(self) -> int:
        """How many requests wait, for a turn or for a load."""
        return len(self._line)

    # What others may want to know.

    def states(self) -> list[ModelState]:
        """All models as they are now, in the order of their definition."""
        now = self._clock()
        return [
            model.state(now, self._line.count(model)) for model in self._models.values()
        ]

    def state(self, model: str) -> ModelState:
        """One model as it is now.

        Raises:
            ModelNotFound: there is no such model.
        """
        known = self._known(model)
        return known.state(self._clock(), self._line.count(known))

    # What the owner of the machine calls.

    async def load(self, model: str) -> None:
        """Load a model, and return when it is ready; it waits for its turn.

        Past failures do not matter: by hand it is always tried.

        Raises:
            ModelNotFound, ModelLoadFailed, ShuttingDown: as ``LeaseRequest.wait``.
        """
        known = self._known(model)
        if known.phase is Phase.READY and known.is_open:
            return
        known.failures.clear()
        request = LeaseRequest(
            self, model, "", known.definition.priority, is_by_hand=True
        )
        lease = await request.wait()
        lease.release(served=False)

    async def unload(self, model: str, *, now: bool = False) -> None:
        """Unload a model, and return when nothing is left of its process.

        New requests wait for the next process. What is being served is finished, for at
        most ``unload_timeout`` seconds, then it is cut. (llama-swap cuts at once.) A
        load is broken off, and who waits for it is told.

        Args:
            model: its id.
            now: cut what is being served at once.

        Raises:
            ModelNotFound: there is no such model.
        """
        known = self._known(model)
        process = known.process
        if known.is_coming:
            reason = f'model "{model}" was unloaded while it was loading'
            error = ModelLoadFailed(reason, retry_after=RETRY_SECONDS)
            self._line.send_all_away(known, error)
            self._stop(known)
        elif process is not None and known.phase is Phase.READY:
            process.is_unloaded = True
            known.is_open = False
            if now or not process.leases:
                self._stop(known)
            elif process.drain_timer is None:
                process.drain_timer = asyncio.get_running_loop().call_later(
                    process.definition.unload_timeout, self._cut, process
                )
        self._decide()
        if process is not None:
            await process.gone.wait()

    async def unload_all(self, *, now: bool = False) -> None:
        """Unload all models; see ``unload``."""
        await asyncio.gather(*(self.unload(m, now=now) for m in tuple(self._up)))

    def replace(
        self,
        models: Mapping[str, ModelDefinition],
        written: Written,
        *,
        budget: int | None,
        queue: QueueConfig | None = None,
    ) -> None:
        """Another configuration from now on.

        Models that run as they ran before stay loaded with their leases, whatever else
        has changed about them. Others finish what they serve, however long that takes,
        and go; requests wait for the new process meanwhile. Who waits keeps its place,
        unless its model is gone.
        """
        self._written, self._budget = written, budget
        self._rules = make_rules(written, has_budget=budget is not None)
        self._line.queue = queue or self._line.queue
        for name in [name for name in self._models if name not in models]:
            self._remove(self._models[name])
        for name, definition in models.items():
            known = self._models.get(name)
            if known is None:
                self._models[name] = Model(definition)
            else:
                self._redefine(known, definition)
        self._decide()

    def file_changed(self, model: str) -> None:
        """Note that what a model is loaded from has changed: all is to be found anew.

        A loaded one stays loaded.
        """
        known = self._models.get(model)
        if known is not None:
            known.forget()
            self._decide()

    async def aclose(self) -> None:
        """Send all away, stop all processes, and return when nothing is left.

        Calling it again, also at the same time, does no harm.
        """
        self._is_closing = True
        for known in tuple(self._line.models):
            self._line.send_all_away(known, self._shutting_down())
        for known in tuple(self._up.values()):
            self._stop(known)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        await self._owners.wait()

    # What the worker tells.

    def exited(self, model: str, message: str) -> None:
        """Note that a process has died by itself.

        Called at most once for each process, and before ``Worker.stop`` for it returns.

        Args:
            model: its id.
            message: why, as far as that is known, for clients too.
        """
        known = self._models.get(model)
        process = known.process if known is not None else None
        if known is None or process is None or known.phase is Phase.STOPPING:
            return
        if known.phase is Phase.LOADING:
            self.failed(process, message)
        else:
            self._crashed(known, process, message)
        self._stop(known, grace=0.0)
        self._decide()

    def note_progress(self, model: str, progress: float) -> None:
        """Note how far a load has got, 0 to 1."""
        known = self._models.get(model)
        if known is not None and known.phase is Phase.LOADING and known.process:
            known.process.progress = progress

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
            self._stop(known)
            self._decide()
            return
        if known.ttl_timer is None:
            self._arm_ttl(known)
        if self._line:
            self._decide()

    def _grant(self, known: Model) -> None:
        """Give the free places of a loaded model to those who wait for it."""
        process = known.process
        while process is not None and process.leases < known.limit:
            waiter = self._line.take_next(known)
            if waiter is None or waiter.future is None:
                return
            process.leases += 1
            waiter.future.set_result(Lease(process))

    # The line.

    def _enter(self, request: LeaseRequest) -> None:
        known = self._known(request.model)
        if self._is_closing:
            raise self._shutting_down()
        self._line.number(request, known)
        if not request.is_by_hand:
            if known.failures.is_crash_loop(self._clock()):
                raise self._load_failed(known)
            self._line.make_room(request, lambda: self._would_load(known, request))
        self._line.add(request, known)
        if known.phase is None:
            self._decide()

    def _leave(self, request: LeaseRequest) -> None:
        if request in self._line:
            self._line.remove(request, self._models[request.model])
            self._decide()

    def _would_load(self, known: Model, newcomer: LeaseRequest) -> bool:
        return (
            known.phase is None and known.id in decide(self._situation(newcomer)).turns
        )

    def _position(self, request: LeaseRequest) -> int:
        if request not in self._line:
            return 0
        return self._line.position(request, self._models[request.model])

    def _status(self, request: LeaseRequest) -> str:
        if request not in self._line:
            return ""
        known = self._models[request.model]
        if known.phase is Phase.ROOM:
            return f"making room for {known.id}"
        if known.phase is Phase.LOADING:
            progress = known.process.progress if known.process is not None else None
            percent = "" if progress is None else f", {progress * 100:.0f} %"
            return f"loading {known.id}{percent}"
        left = known.failures.seconds_left(self._clock())
        if known.phase is None and left:
            return f"{known.id} failed and is tried again in {math.ceil(left)} s"
        return f"position {self._position(request)} in line"

    def _known(self, model: str) -> Model:
        known = self._models.get(model)
        if known is None or known.is_removed:
            raise ModelNotFound(f'model "{model}" is not on this machine')
        return known

    def _shutting_down(self) -> ShuttingDown:
        return ShuttingDown("the daemon shuts down", retry_after=RETRY_SECONDS)

    def _load_failed(self, known: Model) -> ModelLoadFailed:
        return ModelLoadFailed(
            f'model "{known.id}" could not be loaded: {known.error}',
            retry_after=known.failures.seconds_left(self._clock()),
        )

    # Deciding, and carrying it out.

    def _decide(self) -> None:
        """Do what is to be done in this moment."""
        if self._is_closing:
            return
        for known in tuple(self._up.values()):
            if known.phase is Phase.ROOM and not self._line.is_wanted(known):
                self._pass(known, None)  # all its clients have left
        self._measure_all()
        done = decide(self._situation())
        for name in done.give_up:
            self._pass(self._up[name], None)
        for name in done.evict:
            self._stop(self._up[name])
        for name in done.turns:
            self._pass(self._models[name], Phase.ROOM)
        for name in done.start:
            self._start(self._up[name], is_too_big=name in done.too_big)
        self._held = done.hold
        head = self._models[done.head] if done.head is not None else None
        if head is not None and done.is_passed_over and head.passed_since is None:
            head.passed_since = self._clock()
        self._open_and_close()
        self._set_alarm(head)
        if done.give_up:
            self._decide()  # they stand in line again, and can only wait now

    def _situation(self, newcomer: Waiter | None = None) -> Situation:
        now = self._clock()
        wanted = []
        for name in self._line.stopped_models(newcomer):
            known = self._models[name]
            if not known.failures.seconds_left(now):
                since = known.passed_since
                overdue = since is not None and (
                    now - since >= PATIENCE_SECONDS - _SLACK_SECONDS
                )
                wanted.append(Wanted(name, self._size(known), overdue))
        return Situation(
            rules=self._rules,
            budget=self._budget,
            loaded=tuple(self._loaded(known) for known in self._up.values()),
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
        if self._budget is None or not self._line.models:
            return
        now = self._clock()
        if now - self._measured_at >= _MEASURE_SECONDS:
            self._measured_at = now
            for known in self._up.values():
                if known.phase is Phase.READY and known.process is not None:
                    self._measure(known.process)

    def _measure(self, process: Process) -> None:
        measured = self._worker.memory(process.definition.id)
        if measured is not None:
            process.memory.measured = measured

    def _open_and_close(self) -> None:
        """Let those serve that may, and hold the others."""
        for name, known in self._up.items():
            if known.phase is Phase.READY and known.process is not None:
                is_held = name in self._held or known.process.is_draining
                known.is_open = not is_held
                if known.is_open:
                    self._grant(known)

    def _set_alarm(self, head: Model | None) -> None:
        """See that the next decision that only time brings about is made."""
        now = self._clock()
        waits = [
            left
            for known in self._line.models
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
            self._alarm = loop.call_later(min(waits), self._decide)

    def _pass(self, known: Model, phase: Phase | None) -> None:
        """Let a model pass on to another phase; None is stopped."""
        was_coming = known.is_coming
        known.become(phase, self._clock())
        if phase is None:
            self._up.pop(known.id, None)
            if known.is_removed:
                del self._models[known.id]
        else:
            self._up[known.id] = known
        if was_coming and not known.is_coming:
            self._line.run_clocks(known)
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
        log.info(
            'model "%s" is loaded, after %.1f s', known.id, now - process.started_at
        )
        self._measure(process)
        self._pass(known, Phase.READY)
        # Who waited for the load is served, whoever else may be overdue by now.
        known.is_open = True
        self._grant(known)
        if not process.leases:
            self._arm_ttl(known)
        self._decide()

    def failed(self, process: Process, message: str) -> None:
        """A load came to nothing (told by its owner): all who wait for it hear it."""
        known = process.model
        log.warning('model "%s" could not be loaded: %s', known.id, message)
        known.error = message
        known.failures.add(self._clock())
        self._line.send_all_away(known, self._load_failed(known))

    def _crashed(self, known: Model, process: Process, message: str) -> None:
        log.warning(
            'model "%s" has died while it had %d requests: %s',
            known.id,
            process.leases,
            message,
        )
        self._note_good_service(process)
        known.error = message
        known.failures.add(self._clock())
        process.lost = message

    def _note_good_service(self, process: Process) -> None:
        """Forget failures if the process served well for a while."""
        served_at = process.served_at
        if served_at is not None and self._clock() - served_at >= _SETTLED_SECONDS:
            process.model.failures.clear()

    def _stop(self, known: Model, grace: float | None = None) -> None:
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
        if process.ready_at is not None:
            log.info('model "%s" is unloaded', known.id)
        self._pass(known, None)
        process.gone.set()
        self._decide()

    def _cut(self, process: Process) -> None:
        process.drain_timer = None
        self._stop(process.model)
        self._decide()

    # Idle models.

    def _arm_ttl(self, known: Model) -> None:
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
            self._arm_ttl(known)
        else:
            self._stop(known)
            self._decide()

    # Another configuration.

    def _redefine(self, known: Model, definition: ModelDefinition) -> None:
        known.is_removed = False
        if not definition.runs_like(known.definition):
            known.forget()
        known.define(definition)
        process = known.process
        if process is None:
            return
        process.is_replaced = not definition.runs_like(process.definition)
        if process.is_replaced and not process.leases:
            self._stop(known)
        elif not process.leases and known.phase is Phase.READY:
            if known.ttl_timer is not None:
                known.ttl_timer.cancel()
            self._arm_ttl(known)

    def _remove(self, known: Model) -> None:
        error = ModelNotFound(f'model "{known.id}" is not on this machine any more')
        self._line.send_all_away(known, error)
        known.is_removed = True
        if known.phase is None:
            del self._models[known.id]
        elif known.process is None or not known.process.leases:
            self._stop(known)
        else:
            known.process.is_replaced = True
