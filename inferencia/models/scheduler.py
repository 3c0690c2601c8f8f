"""The scheduler: which models run on this machine, and whose turn it is.

A request needs a ``Lease`` of its model: as long as it has one the model is not
unloaded. Who comes for a model that is loaded and free gets it at once, in a plain
call; else the request stands in one bounded, fair line (``turns.py``). Which model is
loaded and who makes room for it is decided in ``deciding.py`` and carried out in
``machine.py``; here is what requests, the machine's owner and the worker call.

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
import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from inferencia.errors import ModelLoadFailed, ModelNotFound, ShuttingDown
from inferencia.models.deciding import Phase
from inferencia.models.definitions import ModelDefinition
from inferencia.models.machine import PATIENCE_SECONDS, Machine, Written
from inferencia.models.owning import LoadFailed, Worker
from inferencia.models.running import Lease, Model, ModelState
from inferencia.models.turns import RETRY_SECONDS, Waiter
from inferencia.settings import QueueConfig

__all__ = [
    "PATIENCE_SECONDS",
    "LeaseRequest",
    "LoadFailed",
    "Scheduler",
    "Worker",
    "Written",
]


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
        self._machine = Machine(
            models,
            written,
            budget=budget,
            estimate=estimate,
            worker=worker,
            queue=queue,
            clock=clock,
            on_change=on_change,
        )
        self._clock = clock
        self._models = self._machine.models
        self._line = self._machine.line

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
        """All models as they are now, those too that have no definition any more."""
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
            self._machine.stop(known)
        elif process is not None and known.phase is Phase.READY:
            process.is_unloaded = True
            known.is_open = False
            if now or not process.leases:
                self._machine.stop(known)
            elif process.drain_timer is None:
                process.drain_timer = asyncio.get_running_loop().call_later(
                    process.definition.unload_timeout, self._machine.cut, process
                )
        self._machine.decide()
        if process is not None:
            await process.gone.wait()

    async def unload_all(self, *, now: bool = False) -> None:
        """Unload all models; see ``unload``."""
        await asyncio.gather(
            *(self.unload(m, now=now) for m in tuple(self._machine.up))
        )

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
        self._machine.keep_to(written, budget)
        self._line.queue = queue or self._line.queue
        for name in [name for name in self._models if name not in models]:
            self._remove(self._models[name])
        for name, definition in models.items():
            known = self._models.get(name)
            if known is None:
                self._models[name] = Model(definition)
            else:
                self._redefine(known, definition)
        self._machine.decide()

    def file_changed(self, model: str) -> None:
        """Note that what a model is loaded from has changed: all is to be found anew.

        A loaded one stays loaded.
        """
        known = self._models.get(model)
        if known is not None:
            known.forget()
            self._machine.decide()

    async def aclose(self) -> None:
        """Send all away, stop all processes, and return when nothing is left.

        Calling it again, also at the same time, does no harm.
        """
        self._machine.is_closing = True
        for known in tuple(self._line.models):
            self._line.send_all_away(known, self._shutting_down())
        await self._machine.aclose()

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
            self._machine.failed(process, message)
        else:
            self._machine.crashed(known, process, message)
        self._machine.stop(known, grace=0.0)
        self._machine.decide()

    # The line.

    def _enter(self, request: LeaseRequest) -> None:
        known = self._known(request.model)
        if self._machine.is_closing:
            raise self._shutting_down()
        self._line.number(request, known)
        if not request.is_by_hand:
            if known.failures.is_crash_loop(self._clock()):
                raise self._machine.load_failed(known)
            self._line.make_room(
                request, lambda: self._machine.would_load(known, request)
            )
        self._line.add(request, known)
        if known.phase is None:
            self._machine.decide()

    def _leave(self, request: LeaseRequest) -> None:
        if request in self._line:
            self._line.remove(request, self._models[request.model])
            self._machine.decide()

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
            return f"loading {known.id}"
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
            self._machine.stop(known)
        elif not process.leases and known.phase is Phase.READY:
            self._machine.arm_ttl(known)

    def _remove(self, known: Model) -> None:
        error = ModelNotFound(f'model "{known.id}" is not on this machine any more')
        self._line.send_all_away(known, error)
        known.is_removed = True
        if known.phase is None:
            del self._models[known.id]
        elif known.process is None or not known.process.leases:
            self._machine.stop(known)
        else:
            known.process.is_replaced = True
