"""The journal: what has begun and what has ended, written down before it can be lost.

The event loop appends one line when a request has begun and one when it has ended,
each with a single ``write`` and no sync: what was written survives the end of this
process, however it comes. A thread folds the lines into the database (``usagewriter``)
and removes what is folded. What a process left behind, the next one folds at its start.

=======  =========================================================================
begun    ``[0, entry, id, started, key, model, backend, endpoint, stream, bytes_in]``
ended    ``[1, …the same…, ended, status, …]``, all columns of ``usagestore.COLUMNS``
=======  =========================================================================

A line is the CRC-32 of its JSON in eight hexadecimal digits, a space, the JSON (ASCII,
so no line break is in it), and a line feed. A line that was cut short does not fit its
checksum and is passed over; the next one begins after the next line feed.

A journal is a row of segments, files beside the database. A full segment is followed by
a new one that begins with the requests still open, so that a segment whose lines are
folded can go. Each is locked (flock(2)) as long as its process lives; the system gives
the lock back whatever ended the process, and so two daemons never take each other's
journal for one that was left behind.
"""

import contextlib
import enum
import errno
import fcntl
import itertools
import json
import logging
import os
import random
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

log = logging.getLogger(__name__)

BEGUN, ENDED = 0, 1

# About ten thousand requests. At a start after a kill so much is read again, in a few
# tens of milliseconds.
SEGMENT_BYTES = 4 << 20

# While the database cannot be written, so much waits here: 180,000 requests. What comes
# then is lost, and counted.
MAX_PENDING_BYTES = 64 << 20

# Lines kept in memory while not even a file can be written. About 5 MB.
MAX_KEPT_LINES = 10_000

# One read of the thread; its lines are decoded in one go, during which the loop waits.
_READ_BYTES = 64 << 10

_TAG_BITS = 11
TAGS = 1 << _TAG_BITS

_PREFIX = 9  # the checksum and the space
_SUFFIX = ".pending"
_NAME = re.compile(r"\.([0-9a-f]{3})-([0-9]{1,10})\.([0-9]{1,12})\.pending")

Line = Sequence[Any]


def framed(text: str) -> bytes:
    """One line of the journal.

    Args:
        text: a JSON list, in ASCII.
    """
    data = text.encode("ascii")
    return b"%08x %b\n" % (crc32(data), data)


def unframed(data: bytes) -> tuple[list[Line], int]:
    """The lines that are whole, and how many are not.

    An empty line is none: it ends one that was cut short.
    """
    lines: list[Line] = []
    damaged = 0
    for raw in data.split(b"\n"):
        if not raw:
            continue
        text = raw[_PREFIX:]
        try:
            if int(raw[: _PREFIX - 1], 16) != crc32(text):
                raise ValueError("the checksum differs")
            line = json.loads(text)
        except (ValueError, RecursionError):
            damaged += 1
            continue
        if isinstance(line, list) and len(line) > 1:
            lines.append(line)
    return lines, damaged


def ended_in(data: bytes, *, is_sound: bool) -> list[Line]:
    """The columns of the requests whose end is among these whole lines.

    Args:
        data: whole lines.
        is_sound: they were written by this process and no write failed, so that the
            checksums need not be looked at.
    """
    if is_sound:
        texts = [raw[_PREFIX:] for raw in data.split(b"\n") if raw[9:11] == b"[1"]
        with contextlib.suppress(ValueError):
            return [line[1:] for line in json.loads(b"[" + b",".join(texts) + b"]")]
    lines, _ = unframed(data)
    return [line[1:] for line in lines if line[0] == ENDED]


@dataclass(slots=True, eq=False)
class Segment:
    """One file of a journal."""

    path: Path
    fd: int
    size: int = 0  # bytes written; the loop's
    folded: int = 0  # bytes that are in the database; the thread's
    is_torn: bool = False  # a write failed half way; the loop's
    is_full: bool = False  # nothing more will be written; the loop's

    def read(self) -> bytes:
        """The next whole lines that are not folded yet, or nothing."""
        size = min(_READ_BYTES, self.size - self.folded)
        data = os.pread(self.fd, size, self.folded)
        return data[: data.rfind(b"\n") + 1]

    def remove(self) -> None:
        """Take the file away."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self.fd)


class Journal:
    """This process's own.

    ``begin`` and ``end`` belong to the event loop, ``open``, ``prepare``, ``pending``,
    ``remove_folded`` and ``close`` to the thread. Each attribute is written by one of
    the two; what they hand to each other are single assignments and deques.
    """

    def __init__(
        self,
        database: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        max_kept_lines: int = MAX_KEPT_LINES,
    ) -> None:
        """Make one beside ``database``; no file is made before ``open``."""
        self._database = database
        self._segment_bytes = segment_bytes
        self._max_pending = max_pending_bytes
        self._max_kept = max_kept_lines
        self._numbers = itertools.count(1)
        self._current: Segment | None = None
        self._next: Segment | None = None  # made by the thread, taken by the loop
        self._full: deque[Segment] = deque()
        self._open: dict[int, bytes] = {}  # the lines of requests that have not ended
        self._last = 0  # microseconds since 1970, of the last entry
        # Of this process, among those that use the database.
        self.tag = random.randrange(TAGS)
        # Lines for which there was no room on the disk; the thread takes them.
        self.kept: deque[bytes] = deque()
        self.lost = 0  # ends that could be kept nowhere
        self.failure: OSError | None = None  # of the last write, until one succeeds
        self.written = 0  # bytes so far; the loop's
        self.folded = 0  # of those, in the database; the thread's

    # --- in the loop -------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._open)

    @property
    def pending_bytes(self) -> int:
        """Bytes that are not in the database yet."""
        return self.written - self.folded

    @property
    def has_pending(self) -> bool:
        """Whether there is something to fold."""
        return self.written > self.folded or bool(self.kept)

    def entry(self, microseconds: int) -> int:
        """A number that no other request has: its time, and this process's tag.

        Args:
            microseconds: since 1970. A clock that was set back, or is too coarse, is
                helped on.
        """
        self._last = max(microseconds, self._last + 1)
        return self._last << _TAG_BITS | self.tag

    def begin(self, entry: int, line: bytes) -> None:
        """Note that a request has begun."""
        self._open[entry] = line
        self._append(line, is_end=False)

    def end(self, entry: int, line: bytes) -> None:
        """Note that a request has ended; its beginning may never have been noted."""
        self._open.pop(entry, None)
        self._append(line, is_end=True)

    def _append(self, line: bytes, *, is_end: bool) -> None:
        segment = self._current
        if segment is not None and segment.size >= self._segment_bytes:
            segment = self._turned(segment)
        if segment is None or self.written - self.folded > self._max_pending:
            self._keep(line, is_end=is_end)
            return
        self._write(segment, line, is_end=is_end)

    def _write(self, segment: Segment, line: bytes, *, is_end: bool) -> None:
        if segment.is_torn:
            line = b"\n" + line
        try:
            count = os.write(segment.fd, line)
        except OSError as error:
            self.failure = error
            self._keep(line, is_end=is_end)
            return
        segment.size += count
        self.written += count
        if count == len(line):
            self.failure = None
        else:
            segment.is_torn = True
            self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._keep(line, is_end=is_end)

    def _keep(self, line: bytes, *, is_end: bool) -> None:
        """Hold a line in memory; beginnings are held there anyhow."""
        if not is_end:
            return
        if len(self.kept) < self._max_kept:
            self.kept.append(line)
        else:
            self.lost += 1

    def _turned(self, full: Segment) -> Segment:
        """The next segment with the open requests in it, if there is one."""
        following, self._next = self._next, None
        if following is None:
            return full
        full.is_full = True
        self._full.append(full)
        self._current = following
        if self._open:
            self._write(following, b"".join(self._open.values()), is_end=False)
        return following

    # --- in the thread -----------------------------------------------------------

    def open(self) -> None:
        """Make the first segment, unless it is there.

        Raises:
            OSError: it cannot be made.
        """
        if self._current is not None:
            return
        taken = {tag for tag, _, _ in map(_parts, _segments(self._database))}
        tags = (number % TAGS for number in range(self.tag, self.tag + TAGS))
        self.tag = next((tag for tag in tags if f"{tag:03x}" not in taken), self.tag)
        segment = self._made()
        if self._open:  # they began while there was no file
            lines = b"".join(tuple(self._open.values()))
            segment.size = os.write(segment.fd, lines)
            segment.is_torn = segment.size < len(lines)
            segment.folded = segment.size  # nothing in it has ended
        self._current = segment

    def prepare(self) -> None:
        """Have the next segment at hand when the current one is half full.

        Raises:
            OSError: it cannot be made.
        """
        current = self._current
        if current is None or self._next is not None:
            return
        if current.size >= self._segment_bytes // 2:
            self._next = self._made()

    def pending(self) -> Iterator[Segment]:
        """Every segment that has something to fold, oldest first."""
        current = self._current
        for segment in (*self._full, *((current,) if current else ())):
            if segment.folded < segment.size:
                yield segment

    def note_folded(self, segment: Segment, size: int) -> None:
        """So many more bytes of a segment are in the database.

        0: nothing whole is left in it. A segment that gets no more lines is done then.
        """
        if not size and segment.is_full:
            size = segment.size - segment.folded
        segment.folded += size
        self.folded += size

    def remove_folded(self) -> None:
        """Remove the full segments that are folded to their end."""
        while self._full and self._full[0].folded >= self._full[0].size:
            self._full.popleft().remove()

    def close(self) -> None:
        """Leave behind only what somebody has to fold. The loop writes no more."""
        self.remove_folded()
        for spare in (self._next, self._current):
            if spare is None:
                continue
            if spare.folded >= spare.size and not (
                spare is self._current and self._open
            ):
                spare.remove()
            else:
                os.close(spare.fd)
        for segment in self._full:
            os.close(segment.fd)
        self._full.clear()
        self._current = self._next = None

    def _made(self) -> Segment:
        while True:
            number = next(self._numbers)
            name = f"{self._database.name}.{self.tag:03x}-{os.getpid()}.{number}"
            path = self._database.with_name(name + _SUFFIX)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
            try:
                fd = os.open(path, flags, 0o600)
            except FileExistsError:
                continue  # of a process that had our number before us
            if _lock(fd, path) is not Lock.ELSEWHERE:
                return Segment(path, fd)
            os.close(fd)


# --- what others left behind ---------------------------------------------------------


def _segments(database: Path) -> list[Path]:
    """The segments beside a database, whosever they are."""
    try:
        beside = list(database.parent.iterdir())
    except OSError:
        return []
    size = len(database.name)
    return [
        path
        for path in beside
        if path.name.startswith(database.name) and _NAME.fullmatch(path.name[size:])
    ]


def _parts(path: Path) -> tuple[str, str, int]:
    """Tag, process and number of a segment."""
    found = _NAME.search(path.name)
    assert found is not None
    return found[1], found[2], int(found[3])


def _journals(database: Path) -> list[list[Path]]:
    """The segments beside a database by journal, each in its order."""
    paths = sorted(_segments(database), key=_parts)
    return [
        list(group) for _, group in itertools.groupby(paths, lambda p: _parts(p)[:2])
    ]


class Lock(enum.Enum):
    """What became of the wish to lock a file."""

    OURS = enum.auto()
    ELSEWHERE = enum.auto()  # somebody else holds it, or has removed the file
    NONE = enum.auto()  # this file system has no locks, as some network ones


def _lock(fd: int, path: Path) -> Lock:
    """Lock a file that was opened, if it is still there and nobody else holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.stat(path).st_ino == os.fstat(fd).st_ino
    except (BlockingIOError, FileNotFoundError):
        return Lock.ELSEWHERE
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return Lock.NONE
    return Lock.OURS if is_there else Lock.ELSEWHERE


@dataclass(slots=True)
class Leftover:
    """The journal of a process that is no more; ours as long as it is not closed."""

    segments: list[tuple[Path, int]] = field(default_factory=list)  # with descriptors
    damaged: int = 0  # lines that were cut short
    _begun: dict[int, Line] = field(default_factory=dict)

    def ended(self) -> Iterator[list[Line]]:
        """The columns of the requests that have ended, a segment at a time."""
        for path, _ in self.segments:
            lines, damaged = unframed(path.read_bytes())
            self.damaged += damaged
            ended = [line[1:] for line in lines if line[0] == ENDED]
            self._begun |= {line[1]: line[1:] for line in lines if line[0] == BEGUN}
            for columns in ended:
                self._begun.pop(columns[0], None)
            yield ended

    def interrupted(self) -> list[Line]:
        """What is known of those that have not; once ``ended`` is through."""
        return list(self._begun.values())

    def remove(self) -> None:
        """Take its files away, oldest first: an end never stands before its beginning.

        What is left after a kill in between is folded again, which changes nothing.
        """
        for path, fd in self.segments:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(fd)
        self.segments.clear()

    def close(self) -> None:
        """Leave its files to the next who comes. Idempotent."""
        for _, fd in self.segments:
            os.close(fd)
        self.segments.clear()


def leftovers(database: Path) -> Generator[Leftover, None, None]:
    """The journals beside a database that no living process holds.

    One whose files cannot be opened is left alone.
    """
    for paths in _journals(database):
        try:
            leftover = _claimed(paths)
        except OSError as error:
            log.warning("the journal %s cannot be read: %s", paths[0], error)
            continue
        if leftover is not None:
            try:
                yield leftover
            finally:
                leftover.close()


def _claimed(paths: Iterable[Path]) -> Leftover | None:
    leftover = Leftover()
    try:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # somebody else has folded it
                fd = os.open(path, os.O_RDWR)
                leftover.segments.append((path, fd))
                if _lock(fd, path) is not Lock.OURS:
                    leftover.close()
                    return None
    except OSError:
        leftover.close()
        raise
    return leftover


@dataclass(frozen=True, slots=True)
class Pending:
    """What stands in all journals beside a database, folded or not."""

    ended: list[Line]  # the columns of requests that have ended
    running: int  # requests that have begun and not ended, or were interrupted


def read_pending(database: Path) -> Pending:
    """Read the journals beside a database, and change nothing.

    Raises:
        OSError: a file cannot be read.
    """
    begun: set[int] = set()
    ended: dict[int, Line] = {}
    for path in itertools.chain.from_iterable(_journals(database)):
        try:
            lines, _ = unframed(path.read_bytes())
        except FileNotFoundError:
            continue
        for line in lines:
            if line[0] == ENDED:
                ended[line[1]] = line[1:]
            else:
                begun.add(line[1])
    return Pending(list(ended.values()), len(begun - ended.keys()))
