"""Fetching a model from a server of the Hugging Face layout.

``Download`` is one fetch from the listing to the finished files, for a terminal or for
the daemon: it prints nothing, can be looked at any time (``progress``), and is ended by
cancelling ``run``. What is half done then stays as ``NAME.partial`` and is taken up
again by the next attempt.

    1. list the repository and choose the files            (hub, choice)
    2. look at what is here already; is there room for the rest?
    3. fetch one file after the other, going on after faults
    4. verify each; when all are right, give them their names

A model with a projector gets a folder of the repository's name, since it is by lying
beside it that a projector is found; any other model's files go straight into the folder
that was asked for. Disk and hashing are the work of one thread of this download.
"""

import asyncio
import contextlib
import enum
import os
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from inferencia.models.choice import (
    Choice,
    DownloadError,
    Reference,
    RemoteFile,
    choose,
)
from inferencia.models.hub import SILENCE_SECONDS, Body, Endpoint, Fault, Hub
from inferencia.models.partial import (
    Conflict,
    NoSpace,
    Partial,
    WrongContent,
)
from inferencia.models.quota import Quota

__all__ = [
    "Conflict",
    "Download",
    "DownloadError",
    "Downloaded",
    "Endpoint",
    "NoSpace",
    "Phase",
    "Progress",
    "WrongContent",
]

# So many attempts in a row may bring nothing; then it fails. The pauses between them
# add up to half a minute, which a router needs to come back.
MAX_ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 1.0

# An attempt that brought less than this has not shown that the line is good again.
GOOD_ATTEMPT_BYTES = 64 * 1024

# What the thread is handed at most: enough for it to keep up, and little in memory.
BATCH_BYTES = 1024 * 1024

# The rate that is shown is that of the last few seconds.
RATE_SECONDS = 8.0

# Left to the rest of the machine.
DISK_RESERVE_BYTES = 64 * 1024 * 1024

_Result = TypeVar("_Result")
Pause = Callable[[float], Awaitable[object]]


class Phase(enum.StrEnum):
    """What a download is doing."""

    LISTING = "listing"
    CHECKING = "checking"  # hashing what is here already
    LOADING = "loading"
    WAITING = "waiting"  # before another attempt
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is, at one moment."""

    phase: Phase
    file: str = ""  # in work; "" before the first
    number: int = 0  # of that file, from 1
    files: int = 0  # how many there are
    file_done: int = 0  # bytes on disk
    file_size: int = 0
    done: int = 0  # bytes of all files
    size: int = 0
    rate: float = 0.0  # bytes a second, lately
    seconds_left: float | None = None  # None: unknown
    note: str = ""  # why it waits


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What came of it."""

    paths: tuple[Path, ...]  # of all files; the model's own is the last
    size: int  # bytes of them
    fetched: int  # bytes that came over the network in this attempt
    is_verified: bool  # the server gave checksums for all of them

    @property
    def model(self) -> Path:
        """The file by which the model is started."""
        return self.paths[-1]


class Download:
    """One model on its way here. ``run`` once."""

    def __init__(
        self,
        reference: Reference,
        *,
        into: Path,
        endpoint: Endpoint,
        quota: Quota | None = None,
        pause: Pause = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        """
        Args:
            into: the folder for models; made if need be.
            quota: what it may hold; None: what the disk has room for.
            pause, clock: to wait, and to measure the rate by.
            silence: seconds without a byte until a connection counts as dead.
        """
        self.reference = reference
        self.into = into
        self._endpoint = endpoint
        self._quota = quota
        self._pause = pause
        self._clock = clock
        self._silence = silence
        self._stop = threading.Event()
        self._state = _State(clock)
        self._fetched = 0
        self._executor: Final = ThreadPoolExecutor(1, thread_name_prefix="download")

    @property
    def progress(self) -> Progress:
        """How far it is now."""
        return self._state.progress()

    async def run(self) -> Downloaded:
        """Fetch, verify, name.

        Raises:
            DownloadError: it cannot be, or has failed; ``str()`` says why. Its classes
                NoSuchModel, NoSpace, Conflict, WrongContent and Refused say more.
            asyncio.CancelledError: what is there is kept for the next attempt.
        """
        try:
            async with Hub(self._endpoint, silence=self._silence) as hub:
                return await self._run(hub)
        except OSError as error:
            where = error.filename or self.into
            raise DownloadError(f"{where}: {error.strerror}") from error
        finally:
            self._stop.set()
            self._executor.shutdown(wait=False)

    async def _run(self, hub: Hub) -> Downloaded:
        listed = await self._persistently(lambda: hub.files(self.reference))
        choice = choose(listed, self.reference)
        partials = self._places(choice)
        self._state.begin([partial.file for partial in partials])
        missing = []
        try:
            for partial in partials:
                if not await self._is_there(partial):
                    missing.append(partial)
            await self._in_thread(lambda: _make_room(missing, self._quota))
            for partial in missing:
                await self._fetch(hub, partial)
            await self._in_thread(lambda: _finish(missing))
        finally:
            await self._close(partials)
        self._state.phase = Phase.DONE
        return Downloaded(
            paths=tuple(partial.target for partial in partials),
            size=choice.size,
            fetched=self._fetched,
            is_verified=all(partial.file.checksum for partial in partials),
        )

    def _places(self, choice: Choice) -> list[Partial]:
        folder = self.into
        if choice.projector is not None:
            folder /= self.reference.repository.partition("/")[2]
        return [Partial(folder / file.name, file, self._stop) for file in choice.files]

    async def _is_there(self, partial: Partial) -> bool:
        self._state.turn_to(partial.file, Phase.CHECKING)
        count = self._state.count
        is_there = await self._in_thread(lambda: partial.is_there(count))
        if not is_there:
            self._state.forget()
        return is_there

    async def _close(self, partials: Sequence[Partial]) -> None:
        """Unlock all files, behind what the thread may still be doing."""
        self._stop.set()

        def close() -> None:
            for partial in partials:
                partial.close()

        # Also when we are being cancelled: the next attempt wants the locks.
        await asyncio.shield(self._in_thread(close))

    # --- one file ----------------------------------------------------------------

    async def _fetch(self, hub: Hub, partial: Partial) -> None:
        """Bring a file to its end, and see that it is right."""
        state = self._state
        state.turn_to(partial.file, Phase.CHECKING)
        await self._in_thread(lambda: partial.open(state.count))
        has_old = partial.size > 0
        while True:
            await self._persistently(lambda: self._load(hub, partial))
            try:
                return await self._in_thread(partial.verify)
            except WrongContent:
                if not has_old:
                    await self._in_thread(partial.discard)
                    raise
            # What was here before may have been spoiled: once more from the beginning.
            has_old = False
            state.forget()
            await self._in_thread(lambda: partial.restart(None))

    async def _load(self, hub: Hub, partial: Partial) -> None:
        """Ask for what is missing, and append it as it comes."""
        state = self._state
        if partial.size == partial.file.size:
            return
        state.turn_to(partial.file, Phase.LOADING, partial.size)
        # With a checksum the content is known, whatever name a server gives to it.
        etag = None if partial.file.checksum else partial.etag
        opened = hub.open(self.reference, partial.file, partial.size, etag)
        async with opened as body:
            if body.start != partial.size or not partial.size:
                state.forget()
                await self._in_thread(lambda: partial.restart(body.etag))
            await self._append(body, partial)
        if partial.size < partial.file.size:
            raise Fault("the connection ended too early")

    async def _append(self, body: Body, partial: Partial) -> None:
        """Write what comes; what comes while the thread is busy is its next batch."""
        writing: asyncio.Future[None] | None = None
        batch: list[bytes] = []
        size = 0
        try:
            async with contextlib.aclosing(body.chunks()) as chunks:
                async for data in chunks:
                    batch.append(data)
                    size += len(data)
                    self._arrived(len(data), partial)
                    if writing is None or writing.done() or size >= BATCH_BYTES:
                        if writing is not None:
                            await writing
                        writing = self._in_thread(_writer(partial, batch))
                        batch, size = [], 0
        finally:
            # Also behind a fault, or when we are being cancelled: it has come.
            if batch:
                writing = self._in_thread(_writer(partial, batch))
            if writing is not None:
                await asyncio.shield(writing)
        if partial.failure is not None:
            raise partial.failure

    def _arrived(self, size: int, partial: Partial) -> None:
        if partial.failure is not None:
            raise partial.failure
        self._fetched += size
        self._state.count(size)
        if self._state.file_done > partial.file.size:
            raise DownloadError(f"{partial.file.name} does not end")

    # --- attempts and threads ----------------------------------------------------

    async def _persistently(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        """Try until it works, as long as attempts that bring nothing are few."""
        failures, reached = 0, self._state.done
        while True:
            try:
                return await attempt()
            except Fault as fault:
                # How far it is, not how much came: a server that begins anew each time
                # and breaks at the same place must not keep us for ever.
                if self._state.done - reached >= GOOD_ATTEMPT_BYTES:
                    failures, reached = 0, self._state.done
                failures += 1
                if failures == MAX_ATTEMPTS:
                    raise DownloadError(
                        f"{fault}; gave up after {failures} attempts"
                    ) from fault
                seconds = FIRST_PAUSE_SECONDS * 2 ** (failures - 1)
                seconds = max(fault.wait, seconds * random.uniform(0.8, 1.2))
                self._state.wait(
                    f"{fault}; attempt {failures + 1} of {MAX_ATTEMPTS} "
                    f"in {seconds:.0f} s"
                )
            await self._pause(seconds)

    def _in_thread(self, work: Callable[[], _Result]) -> "asyncio.Future[_Result]":
        return asyncio.get_running_loop().run_in_executor(self._executor, work)


def _writer(partial: Partial, batch: Sequence[bytes]) -> Callable[[], None]:
    return lambda: partial.write(b"".join(batch))


def _make_room(partials: Sequence[Partial], quota: Quota | None) -> None:
    """Make the folder, and see whether there is room for what is missing.

    Raises:
        NoSpace: there is not.
    """
    if not partials:
        return
    folder = partials[0].target.parent
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(partial.file.size - partial.kept() for partial in partials)
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if needed + DISK_RESERVE_BYTES > free:
        raise NoSpace(no_room(folder, needed, free))
    if quota is not None and needed > quota.left():
        raise NoSpace(over(quota, quota.left()))


def over(quota: Quota, left: int) -> str:
    """Why something is not taken of which a quota allows only ``left`` bytes."""
    return (
        f"{quota.folder} may hold {size_text(quota.limit)} (admin.models_quota), of "
        f"which {size_text(max(0, left))} are left"
    )


def no_room(folder: Path, needed: int, free: int) -> str:
    """Why a file of ``needed`` bytes more is not begun, with ``free`` bytes there."""
    return (
        f"not enough room in {folder}: {size_text(needed)} are needed, "
        f"{size_text(free)} are free, and {size_text(DISK_RESERVE_BYTES)} shall stay so"
    )


def _finish(partials: Sequence[Partial]) -> None:
    """Name all of them or none; the one by which the model is found comes last."""
    named: list[Partial] = []
    try:
        for partial in partials:
            partial.finish()
            named.append(partial)
    except (OSError, DownloadError):
        for partial in named:
            partial.unfinish()
        raise
    for partial in partials:
        partial.tidy()
    for folder in {partial.target.parent for partial in partials}:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def size_text(size: float) -> str:
    """Bytes as people say them: ``4.7 GB``, in powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class _State:
    """Where a download stands.

    Written by its task, or by its thread while the task waits for that. The rate is
    measured from one look to the next.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.phase = Phase.LISTING
        self._clock = clock
        self._files: Sequence[RemoteFile] = ()
        self._file: RemoteFile | None = None
        self._have: dict[str, int] = {}  # bytes on disk, by path
        self._note = ""
        self._moved = 0  # bytes dealt with since the beginning
        self._looks: deque[tuple[float, int]] = deque()  # when, and ``_moved`` then

    @property
    def done(self) -> int:
        return sum(self._have.values())

    @property
    def file_done(self) -> int:
        return self._have.get(self._file.path, 0) if self._file else 0

    def begin(self, files: Sequence[RemoteFile]) -> None:
        """These are the files."""
        self._files = files

    def turn_to(self, file: RemoteFile, phase: Phase, done: int = 0) -> None:
        """Take up a file, of which so many bytes are here."""
        if phase != self.phase:
            self._looks.clear()
            self._looks.append((self._clock(), self._moved))
        self.phase, self._note, self._file = phase, "", file
        self._have[file.path] = done

    def count(self, size: int) -> None:
        """So many bytes more."""
        assert self._file is not None
        self._have[self._file.path] += size
        self._moved += size

    def forget(self) -> None:
        """The file is begun anew."""
        if self._file is not None:
            self._have[self._file.path] = 0

    def wait(self, note: str) -> None:
        """Nothing moves, and why."""
        self.phase, self._note = Phase.WAITING, note

    def progress(self) -> Progress:
        """All of it, for whoever looks."""
        size = sum(file.size for file in self._files)
        rate, done = self._rate(), self.done
        is_loading = self.phase is Phase.LOADING and rate > 0
        return Progress(
            phase=self.phase,
            file=self._file.name if self._file else "",
            number=self._files.index(self._file) + 1 if self._file else 0,
            files=len(self._files),
            file_done=self.file_done,
            file_size=self._file.size if self._file else 0,
            done=done,
            size=size,
            rate=rate,
            seconds_left=(size - done) / rate if is_loading else None,
            note=self._note,
        )

    def _rate(self) -> float:
        if self.phase not in (Phase.CHECKING, Phase.LOADING):
            return 0.0
        now = self._clock()
        self._looks.append((now, self._moved))
        while len(self._looks) > 2 and now - self._looks[1][0] >= RATE_SECONDS:
            self._looks.popleft()
        began, moved = self._looks[0]
        return (self._moved - moved) / (now - began) if now > began else 0.0
