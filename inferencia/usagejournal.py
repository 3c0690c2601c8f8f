"""The journal: what has begun and what has ended, written down before it can be lost.

The event loop appends one record when a request has begun and one when it has ended,
without a sync: what was written is the system's, and survives the end of this process,
however it comes. Where that is safe the file is mapped and a record is copied into it,
which takes a twentieth of a ``write``'s time (3 % of a request's); elsewhere it is one
``write``. The rows of what has ended also wait in memory for the thread
that puts them into the database (``usagewriter``); the files are for when it cannot,
and for the process that is killed. What a process left behind, the next one folds at
its start.

=======  =========================================================================
begun    the first ``BEGUN_WIDTH`` of ``usageschema.COLUMNS``
ended    all of them
=======  =========================================================================

A record is a mark, the length and the CRC-32 of what follows, and the tuple in
``marshal``'s form of version 2, which every Python since 2.5 reads and writes; it is
the cheapest there is, five times cheaper than JSON. A record that was cut short, or
does not fit its checksum, is passed over up to the next mark.

A journal is a row of segments, files beside the database. A full segment is followed by
a new one that begins with the requests still open, so that a segment whose rows are in
the database can go. Each is locked (flock(2)) as long as its process lives; the system
gives the lock back whatever ended the process, and so two daemons never take each
other's journal for one that was left behind.
"""

import contextlib
import enum
import errno
import fcntl
import itertools
import logging
import marshal
import mmap
import os
import random
import re
import struct
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from inferencia.usageschema import BEGUN_WIDTH

log = logging.getLogger(__name__)

# About ten thousand requests. At a start after a kill so much is read again, in a few
# tens of milliseconds.
SEGMENT_BYTES = 4 << 20

# While the database cannot be written, so much waits in files: 180,000 requests. What
# comes then is lost, and counted.
MAX_PENDING_BYTES = 64 << 20

# Behind a segment's end, for the requests that are open when it turns. What has no
# place there is written behind it.
_SLACK_BYTES = 64 << 10

# File systems on which room that was reserved is there when it is written. On others
# (those that copy on write) a full disk could end the process by SIGBUS.
_MAPPABLE = frozenset({b"ext2", b"ext3", b"ext4", b"xfs", b"tmpfs"})

# Rows that wait in memory; beyond them the thread has to read the files. About 8 MB.
MAX_ROWS = 10_000

_TAG_BITS = 11
TAGS = 1 << _TAG_BITS

_FORM = 2  # of marshal
_HEAD = struct.Struct("<4sII")  # mark, length, checksum
_MARK = b"\xf5use"  # no character of UTF-8 begins so

_SUFFIX = ".pending"
_NAME = re.compile(r"\.([0-9a-f]{3})-([0-9]{1,10})\.([0-9]{1,12})\.pending")

Record = Sequence[Any]

_dumps = marshal.dumps
_packed = _HEAD.pack


def framed(values: tuple[Any, ...]) -> bytes:
    """One record of the journal."""
    try:
        data = _dumps(values, _FORM)
    except ValueError:  # an heir of str or int is among them
        data = _dumps(tuple(map(_plain, values)), _FORM)
    return _packed(_MARK, len(data), crc32(data)) + data


def _plain(value: Any) -> int | float | str | None:
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else str(value)


def unframed(data: bytes) -> tuple[list[Record], int]:
    """The records that are whole, and how often some bytes were passed over."""
    records: list[Record] = []
    damaged = at = 0
    while at < len(data):
        if data.startswith(_MARK, at) and at + _HEAD.size <= len(data):
            _, length, checksum = _HEAD.unpack_from(data, at)
            body = data[at + _HEAD.size : at + _HEAD.size + length]
            if len(body) == length and crc32(body) == checksum:
                records.append(marshal.loads(body))
                at += _HEAD.size + length
                continue
        following = data.find(_MARK, at + 1)
        end = len(data) if following < 0 else following
        damaged += bool(data[at:end].strip(b"\0"))  # zeros: room not used yet
        at = end
    return records, damaged


@dataclass(slots=True, eq=False)
class Segment:
    """One file of a journal."""

    path: Path
    fd: int
    size: int = 0  # bytes written; the loop's
    folded: int = 0  # of those, in the database; the thread's
    view: mmap.mmap | None = None  # the file, if it is mapped
    room: int = 0  # bytes of it

    def rows(self, size: int) -> list[Record]:
        """What has ended between what is folded and ``size``.

        Raises:
            OSError: it cannot be read.
        """
        data = os.pread(self.fd, size - self.folded, self.folded)
        records, _ = unframed(data)
        return [record for record in records if len(record) > BEGUN_WIDTH]

    def remove(self) -> None:
        """Take the file away."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Leave the file to others, without the room that was not used."""
        if self.view is not None:
            self.view.close()
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.size)
        os.close(self.fd)


class Journal:
    """This process's own.

    ``begin`` and ``end`` belong to the event loop, ``open``, ``prepare``, ``marks``,
    ``note_folded`` and ``close`` to the thread. Each attribute is written by one of the
    two, but ``rows``, at whose two ends they work, and ``is_behind``.
    """

    def __init__(
        self,
        database: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        max_rows: int = MAX_ROWS,
        may_map: bool = True,
    ) -> None:
        """Make one beside ``database``; no file is made before ``open``.

        Args:
            database: the file whose name those of the journal begin with.
            segment_bytes: how large a segment becomes.
            max_pending_bytes: how much may wait in files.
            max_rows: how many rows may wait in memory.
            may_map: whether files are mapped where that is safe.
        """
        self._database = database
        self._may_map = may_map
        self._segment_bytes = segment_bytes
        self._max_pending = max_pending_bytes
        self._max_rows = max_rows
        self._numbers = itertools.count(1)
        self._current: Segment | None = None
        self._next: Segment | None = None  # made by the thread, taken by the loop
        self._full: deque[Segment] = deque()
        self._open: dict[int, bytes] = {}  # the records of requests that have not ended
        self._last = 0  # microseconds since 1970, of the last entry
        # Of this process, among those that use the database.
        self.tag = random.randrange(TAGS)
        # What has ended, until the thread has put it into the database.
        self.rows: deque[tuple[Any, ...]] = deque()
        self.is_behind = False  # some of it is only in the files
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
        """Bytes in files that are not in the database yet."""
        return self.written - self.folded

    @property
    def has_pending(self) -> bool:
        """Whether there is something to fold."""
        return bool(self.rows) or self.is_behind

    def entry(self, now: float) -> int:
        """A number that no other request has: its time, and this process's tag.

        Args:
            now: seconds since 1970. A clock that was set back, or is too coarse, is
                helped on.
        """
        last, new = self._last, int(now * 1e6)
        self._last = new if new > last else last + 1
        return self._last << _TAG_BITS | self.tag

    def begin(self, now: float, columns: tuple[Any, ...]) -> int:
        """Note that a request has begun.

        Args:
            now: see ``entry``.
            columns: that are known then, behind the entry.

        Returns:
            Its entry.
        """
        entry = self.entry(now)
        data = self._open[entry] = framed((entry, *columns))
        self._write(data)
        return entry

    def end(self, columns: tuple[Any, ...]) -> None:
        """Note that a request has ended; its beginning may never have been noted."""
        self._open.pop(columns[0], None)
        if len(self.rows) < self._max_rows:
            # Before the file has it: what the thread takes for folded, it must find.
            self.rows.append(columns)
            self._write(framed(columns))
            return
        # The thread may look at any moment: between the two it sees no mark that is
        # behind this record, afterwards it is told again.
        self.is_behind = True
        if not self._write(framed(columns)):
            self.lost += 1
        self.is_behind = True

    def _write(self, data: bytes) -> bool:
        """Append to the current segment; tell whether that was done."""
        segment = self._current
        if segment is None:
            return False
        if segment.size >= self._segment_bytes:
            segment = self._turned(segment)
        if self.written - self.folded > self._max_pending:
            return False
        at = segment.size
        end = at + len(data)
        if end <= segment.room and segment.view is not None:
            segment.view[at:end] = data
            segment.size = end
            self.written += len(data)
            self.failure = None
            return True
        try:
            count = os.pwrite(segment.fd, data, at)
        except OSError as error:
            self.failure = error
            return False
        segment.size += count
        self.written += count
        if count == len(data):
            self.failure = None
            return True
        self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return False

    def _turned(self, full: Segment) -> Segment:
        """The next segment with the open requests in it, if there is one."""
        following, self._next = self._next, None
        if following is None:
            return full
        self._full.append(full)
        self._current = following
        if self._open:
            self._write(b"".join(self._open.values()))
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
        began = tuple(self._open.values())  # while there was no file
        if began:
            data = b"".join(began)
            segment.size = segment.folded = os.pwrite(segment.fd, data, 0)
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

    def marks(self) -> list[tuple[Segment, int]]:
        """Each segment, oldest first, with its size now.

        The rows of all ends before these marks are in ``rows`` as of now, or were taken
        from there, unless ``is_behind`` has been set.
        """
        current = self._current
        segments = dict.fromkeys((*self._full, *((current,) if current else ())))
        return [(segment, segment.size) for segment in segments]

    def note_folded(self, marks: Iterable[tuple[Segment, int]]) -> None:
        """The ends before these marks are in the database."""
        for segment, size in marks:
            if size > segment.folded:
                self.folded += size - segment.folded
                segment.folded = size
        while self._full and self._full[0].folded >= self._full[0].size:
            self._full.popleft().remove()

    def close(self) -> None:
        """Leave behind only what somebody has to fold. The loop writes no more."""
        self.note_folded(())
        for segment in (*self._full, self._next, self._current):
            if segment is None:
                continue
            is_open = segment is self._current and self._open
            if segment.folded >= segment.size and not is_open:
                segment.remove()
            else:
                segment.close()
        self._full.clear()
        self._current = self._next = None

    def _made(self) -> Segment:
        while True:
            number = next(self._numbers)
            name = f"{self._database.name}.{self.tag:03x}-{os.getpid()}.{number}"
            path = self._database.with_name(name + _SUFFIX)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                continue  # of a process that had our number before us
            if _lock(fd, path) is not Lock.ELSEWHERE:
                segment = Segment(path, fd)
                if self._may_map and _is_mappable(path.parent):
                    _map(segment, self._segment_bytes + _SLACK_BYTES)
                return segment
            os.close(fd)


def _map(segment: Segment, room: int) -> None:
    """Reserve room for a segment and map it, if that can be done."""
    try:
        os.posix_fallocate(segment.fd, 0, room)
        segment.view = mmap.mmap(segment.fd, room)
    except (OSError, ValueError):  # a full disk, an address space that is limited
        with contextlib.suppress(OSError):
            os.ftruncate(segment.fd, 0)
        return
    segment.room = room


def _is_mappable(folder: Path) -> bool:
    """Whether files here may be mapped: only where it is known (proc(5), mountinfo)."""
    here = os.fsencode(folder.resolve())
    best, kind = b"", b""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    for line in mounts.splitlines():
        fields, _, rest = line.partition(b" - ")
        point = fields.split(b" ")[4].replace(b"\\040", b" ").rstrip(b"/")
        is_above = here == point or here.startswith(point + b"/")
        if is_above and len(point) >= len(best):  # of two at one point, the later
            best, kind = point, rest.split(b" ")[0]
    return kind in _MAPPABLE


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
    damaged: int = 0  # how often some bytes were no record
    _begun: dict[int, Record] = field(default_factory=dict)

    def ended(self) -> Iterator[list[Record]]:
        """The columns of the requests that have ended, a segment at a time."""
        for path, _ in self.segments:
            records, damaged = unframed(path.read_bytes())
            self.damaged += damaged
            ended = [one for one in records if len(one) > BEGUN_WIDTH]
            self._begun |= {one[0]: one for one in records if len(one) <= BEGUN_WIDTH}
            for columns in ended:
                self._begun.pop(columns[0], None)
            yield ended

    def interrupted(self) -> list[Record]:
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

    ended: list[Record]  # the columns of requests that have ended
    running: int  # requests that have begun and not ended, or were interrupted


def read_pending(database: Path) -> Pending:
    """Read the journals beside a database, and change nothing.

    Raises:
        OSError: a file cannot be read.
    """
    begun: set[int] = set()
    ended: dict[int, Record] = {}
    for path in itertools.chain.from_iterable(_journals(database)):
        try:
            records, _ = unframed(path.read_bytes())
        except FileNotFoundError:
            continue
        for record in records:
            if len(record) > BEGUN_WIDTH:
                ended[record[0]] = record
            else:
                begun.add(record[0])
    return Pending(list(ended.values()), len(begun - ended.keys()))
