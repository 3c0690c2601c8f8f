"""The owner of one process: the only one that starts and stops it.

The scheduler decides and says so by ``begin`` and ``end``, both plain calls; a task
carries it out with the ``Worker`` and tells what came of it:

    begin -> ready -> (end) -> gone          as it should be
    begin -> failed -> gone                  it could not be loaded
    begin -> (end) -> gone                   the load was broken off

``gone`` is told exactly once, last, and when nothing is left of the process.
"""

import asyncio
import logging
from typing import Protocol

from inferencia.models.running import Process

log = logging.getLogger(__name__)


class LoadFailed(Exception):
    """The model could not be loaded; the message says why, for clients too."""


class Worker(Protocol):
    """Starts and stops processes; the scheduler decides when.

    For one model ``start`` and ``stop`` never overlap.
    """

    async def start(self, model: str) -> None:
        """Start a process and return when it can serve.

        If it is cancelled, ``stop`` is called next.

        Raises:
            LoadFailed: it could not, and nothing is left of it.
        """

    async def stop(self, model: str, *, grace: float | None) -> None:
        """End the process, and return when nothing is left of it.

        Called also after a death that was reported with ``Scheduler.exited``.

        Args:
            model: its id. The definition may have changed since it was started, or be
                gone.
            grace: seconds from asking to killing; None: as its definition said when it
                was started.
        """

    def memory(self, model: str) -> int | None:
        """Bytes that the process really uses; None if that cannot be told."""


class Listener(Protocol):
    """Who is told what became of a process."""

    def ready(self, process: Process) -> None: ...

    def failed(self, process: Process, message: str) -> None: ...

    def gone(self, process: Process) -> None: ...


class Owners:
    """All owners."""

    def __init__(self, worker: Worker, listener: Listener) -> None:
        self._worker = worker
        self._listener = listener
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, process: Process) -> None:
        """Start a process, from the next turn of the event loop on."""
        task = asyncio.get_running_loop().create_task(
            self._own(process), name=f"model {process.definition.id}"
        )
        process.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end(self, process: Process, grace: float | None = None) -> None:
        """Stop a process, or break its start off. Only the first call counts."""
        if process.stop_wanted.is_set():
            return
        process.grace = grace
        process.stop_wanted.set()
        # ``Worker.start`` itself may have brought the news; then it ends by itself.
        is_inside = process.task is asyncio.current_task()
        if process.is_starting and process.task is not None and not is_inside:
            process.task.cancel()

    async def wait(self) -> None:
        """Return when all are gone."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _own(self, process: Process) -> None:
        try:
            if await self._start(process):
                await process.stop_wanted.wait()
                await self._worker.stop(process.definition.id, grace=process.grace)
        except Exception:
            log.exception('stopping model "%s" went wrong', process.definition.id)
        finally:
            self._listener.gone(process)

    async def _start(self, process: Process) -> bool:
        """Start a process; tell whether anything may be there to be stopped."""
        if process.stop_wanted.is_set():
            return False
        process.is_starting = True
        failure = ""
        is_left = True
        try:
            await self._worker.start(process.definition.id)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not process.stop_wanted.is_set():
                raise  # not by ``end``: the event loop ends everything
            task.uncancel()
        except LoadFailed as error:
            failure = str(error)
            is_left = False
        except Exception as error:
            log.exception('starting model "%s" went wrong', process.definition.id)
            failure = f"starting it went wrong ({type(error).__name__})"
        process.is_starting = False
        if process.stop_wanted.is_set():
            return is_left
        if not failure:
            self._listener.ready(process)
            return True
        self._listener.failed(process, failure)
        self.end(process, grace=0.0)
        return is_left
