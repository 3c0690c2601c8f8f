"""The files of a journal of usage: their names, their locks, and how they are mapped.

A journal is a row of segments beside the database, named after it: the process's tag
and number, and the segment's own. Each is locked (flock(2)) as long as its process
lives; the system gives the lock back whatever ended the process, and so two daemons
never take each other's journal for one that was left behind.

Where that is safe a segment is mapped, with room reserved for all that it will hold:
what is copied into it is the system's at once, as what ``write`` has written is, for a
twentieth of the time (3 % of a request's). A segment that is in the database is used
again, under its next name: its pages are there already, and getting new ones takes
longer than filling them.
"""

import contextlib
import enum
import errno
import fcntl
import itertools
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from inferencia.usagerecords import Record, unframed
from inferencia.usageschema import BEGUN_WIDTH

# File systems on which room that was reserved is there when it is written. On others
# (those that copy on write) a full disk could end the process by SIGBUS.
_MAPPABLE = frozenset({b"ext2", b"ext3", b"ext4", b"xfs", b"tmpfs"})

# Behind a segment's end, for the requests that are open when it turns. What has no
# place there is written behind it.
_SLACK_BYTES = 64 << 10

_SUFFIX = ".pending"
_NAME = re.compile(r"\.([0-9a-f]{3})-([0-9]{1,10})\.([0-9]{1,12})\.pending")


@dataclass(slots=True, eq=False)
class Segment:
    """One file of a journal."""

    path: Path
    number: int  # of this use
    fd: int
    size: int = 0  # bytes written; the loop's
    folded: int = 0  # of those, in the database; the thread's
    view: mmap.mmap | None = None  # the file, if it is mapped
    room: int = 0  # bytes of it
    # Up to this size the loop may copy into ``view`` and ask nobody.
    quick: int = 0
    is_over: bool = False  # nothing more shall be written into it; the thread's

    def append(self, data: bytes) -> None:
        """Write behind what is there.

        Raises:
            OSError: not all of it was written.
        """
        at = self.size
        end = at + len(data)
        if end <= self.room and self.view is not None:
            self.view[at:end] = data
            self.size = end
            return
        count = os.pwrite(self.fd, data, at)
        self.size += count
        if count < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rows(self, size: int) -> list[Record]:
        """What has ended between what is folded and ``size``.

        Raises:
            OSError: it cannot be read.
        """
        data = os.pread(self.fd, size - self.folded, self.folded)
        records, _ = unframed(data, self.number)
        return [record for record in records if len(record) > BEGUN_WIDTH]

    @property
    def is_there(self) -> bool:
        """Whether the file still has its name; nobody has moved or removed it."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except OSError:
            return False

    def use_again(self, path: Path, number: int) -> None:
        """Begin anew, under another name.

        Raises:
            OSError: it cannot be renamed, that name is taken, or its own by another
                file (of a folder that was copied, and put in the place of ours).
        """
        if os.path.lexists(path) or not self.is_there:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.path.rename(path)
        self.path, self.number = path, number
        self.size = self.folded = 0
        self.quick, self.is_over = max(0, self.room - _SLACK_BYTES), False

    def end(self) -> None:
        """Ask that nothing more be written into it, where another can be had."""
        self.is_over = True
        self.quick = 0  # so that the loop looks

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


def made(path: Path, number: int, quick: int, *, may_map: bool) -> Segment | None:
    """A new segment, locked.

    Args:
        path: see ``name_of``.
        number: see there.
        quick: how much will be copied into it without asking, where it can be mapped.
        may_map: whether it is mapped where that is safe.

    Returns:
        None if somebody else has taken it for one that was left behind.

    Raises:
        FileExistsError: that name is taken.
        OSError: it cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    if lock(fd, path) is Lock.ELSEWHERE:
        os.close(fd)
        return None
    segment = Segment(path, number, fd)
    if may_map and _is_mappable(path.parent):
        _map(segment, quick)
    return segment


def _map(segment: Segment, quick: int) -> None:
    """Reserve room for a segment and map it, if that can be done."""
    room = quick + _SLACK_BYTES
    try:
        os.posix_fallocate(segment.fd, 0, room)
        segment.view = mmap.mmap(segment.fd, room)
    except (OSError, ValueError):  # a full disk, an address space that is limited
        with contextlib.suppress(OSError):
            os.ftruncate(segment.fd, 0)
        return
    segment.room, segment.quick = room, quick


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


def name_of(database: Path, tag: int, number: int) -> Path:
    """The file of a segment of this process."""
    name = f"{database.name}.{tag:03x}-{os.getpid()}.{number}"
    return database.with_name(name + _SUFFIX)


def number_of(path: Path) -> int:
    """The number of the segment in this file."""
    return _parts(path)[2]


def tags(database: Path) -> set[int]:
    """The tags of all journals beside a database."""
    return {int(tag, 16) for tag, _, _ in map(_parts, _segments(database))}


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


def journals(database: Path) -> list[list[Path]]:
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


def lock(fd: int, path: Path) -> Lock:
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
