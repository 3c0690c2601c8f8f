"""The downloads of a daemon: several at once, each looked at and cancelled by its id.

A download that has ended stays in the list until there are too many of them, or until
somebody takes it off. What is half done when one is cancelled, or when the daemon ends,
is kept; the same download goes on from it.
"""

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from inferencia.models.choice import DownloadError, Reference
from inferencia.models.download import Download, Endpoint, Progress
from inferencia.models.quota import Quota

log = logging.getLogger(__name__)

# A disk and a line are shared by them; each is hashed by a thread of its own.
MAX_RUNNING = 4
# Ended ones that are remembered.
MAX_ENDED = 20


class AlreadyRunning(Exception):
    """That model is being fetched."""


class TooMany(Exception):
    """As many downloads run as may."""


class UnknownDownload(Exception):
    """There is none of this id."""


class State(enum.StrEnum):
    """What became of a download."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Entry:
    """One download."""

    id: str
    download: Download
    began: float  # seconds since 1970
    state: State = State.RUNNING
    ended: float | None = None
    error: str | None = None  # why it has failed
    path: Path | None = None  # of the model, when it is done
    task: "asyncio.Task[None] | None" = field(default=None, repr=False)

    @property
    def reference(self) -> Reference:
        """What is fetched."""
        return self.download.reference

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self.download.progress


class Downloads:
    """All downloads."""

    def __init__(
        self,
        arrived: Callable[[], Awaitable[object]],
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin with none.

        Args:
            arrived: awaited when a model has come, so that it is offered.
            wall_clock: seconds since 1970.
        """
        self._arrived = arrived
        self._wall_clock = wall_clock
        self._entries: dict[str, Entry] = {}  # oldest first
        self._count = 0

    @property
    def entries(self) -> list[Entry]:
        """All of them, newest first."""
        return list(reversed(self._entries.values()))

    def start(
        self,
        reference: Reference,
        *,
        into: Path,
        endpoint: Endpoint,
        quota: Quota | None = None,
    ) -> Entry:
        """Begin to fetch a model.

        Args:
            reference: which one.
            into: the folder for models.
            endpoint: from where.
            quota: what the folder may hold; None: what its disk has room for.

        Raises:
            AlreadyRunning, TooMany: it cannot begin now.
        """
        running = [e for e in self._entries.values() if e.state is State.RUNNING]
        if any(entry.reference == reference for entry in running):
            raise AlreadyRunning(str(reference))
        if len(running) >= MAX_RUNNING:
            raise TooMany(str(reference))
        self._count += 1
        download = Download(reference, into=into, endpoint=endpoint, quota=quota)
        entry = Entry(f"d{self._count}", download, self._wall_clock())
        self._entries[entry.id] = entry
        self._forget_old()
        entry.task = asyncio.get_running_loop().create_task(self._run(entry))
        log.info('download of "%s" begins', reference)
        return entry

    async def remove(self, id: str) -> Entry:
        """Cancel a download that runs, or take one that has ended off the list.

        Raises:
            UnknownDownload: there is none of this id.
        """
        entry = self._entries.get(id)
        if entry is None:
            raise UnknownDownload(id)
        if entry.state is State.RUNNING:
            await _cancelled(entry)
        else:
            del self._entries[id]
        return entry

    async def aclose(self) -> None:
        """Cancel all that run."""
        await asyncio.gather(*map(_cancelled, self._entries.values()))

    async def _run(self, entry: Entry) -> None:
        try:
            done = await entry.download.run()
        except asyncio.CancelledError:
            entry.state = State.CANCELLED
            raise
        except DownloadError as error:
            entry.state, entry.error = State.FAILED, str(error)
        except Exception as error:
            log.exception("a download failed by our own fault")
            entry.state, entry.error = State.FAILED, type(error).__name__
        else:
            entry.state, entry.path = State.DONE, done.model
        finally:
            entry.ended = self._wall_clock()
            log.info(
                'download of "%s": %s', entry.reference, entry.error or entry.state
            )
        if entry.state is State.DONE:
            await self._arrived()

    def _forget_old(self) -> None:
        ended = [e for e in self._entries.values() if e.state is not State.RUNNING]
        for entry in ended[: max(0, len(ended) - MAX_ENDED)]:
            del self._entries[entry.id]


async def _cancelled(entry: Entry) -> None:
    task = entry.task
    if task is not None and not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
