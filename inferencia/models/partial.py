"""A file that is being fetched: ``NAME.partial``, until all of it is there and right.

    NAME.partial        the bytes so far
    NAME.partial.json   which content they are the beginning of
    NAME                appears at the end, by renaming

What an earlier attempt left is taken up again if it belongs to the same content. Its
bytes are hashed first, so that the checksum at the end covers every byte that is on
disk. A lock keeps two programs from filling one file. All of this blocks: it belongs
into a thread.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferencia.models.choice import DownloadError, RemoteFile
from inferencia.models.naming import PARTIAL_SUFFIX

_NOTE_SUFFIX = PARTIAL_SUFFIX + ".json"
_MAX_NOTE_BYTES = 4096

# Large enough that a thread's work is hashing, small enough to be stopped at once.
_READ_BYTES = 1024 * 1024

Counter = Callable[[int], None]  # told how many bytes were dealt with


class NoSpace(DownloadError):
    """The disk is full, or would be."""


class Conflict(DownloadError):
    """Something else has the place, or is at work there."""


class Stopped(Exception):
    """Somebody asked for the end."""


class WrongContent(DownloadError):
    """The bytes are not those that the checksum promises."""


class Partial:
    """One file on its way. Call ``open`` first and ``close`` in any case."""

    def __init__(self, target: Path, file: RemoteFile, stop: threading.Event) -> None:
        self.target = target
        self.file = file
        self.path = target.with_name(target.name + PARTIAL_SUFFIX)
        self.size = 0  # bytes on disk
        self.etag: str | None = None  # of what is on disk; needed without a checksum
        self._note = target.with_name(target.name + _NOTE_SUFFIX)
        self._stop = stop
        self._handle = -1
        self._hash = _Hash(file)
        self.failure: OSError | NoSpace | None = None  # of a write

    def kept(self) -> int:
        """How many bytes an earlier attempt has left; nothing is changed or locked."""
        try:
            status = os.lstat(self.path)
        except OSError:
            return 0
        is_ours = stat.S_ISREG(status.st_mode) and self._belongs()
        return min(status.st_size, self.file.size) if is_ours else 0

    def open(self, count: Counter) -> None:
        """Lock the file, and hash what it has.

        Raises:
            Conflict: another program is filling it.
            Stopped, OSError
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._handle = os.open(self.path, flags, 0o666)
        self._lock()
        if os.fstat(self._handle).st_size > self.file.size or not self._belongs():
            self.restart(None)
            return
        self._hash_all(self._handle, count)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"{self.target.name} is being downloaded already, by somebody else"
            ) from None
        except OSError as error:
            # Some network file systems have no locks; that is no reason to fail.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise

    def restart(self, etag: str | None) -> None:
        """Throw away what is there, to begin with the first byte."""
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        self.size, self.etag = 0, etag
        self._hash = _Hash(self.file)
        note = {"checksum": self.file.checksum, "etag": etag, "size": self.file.size}
        self._note.write_text(json.dumps(note), "utf-8")

    def write(self, data: bytes) -> None:
        """Append bytes, but none beyond the end that was listed.

        Raises nothing, because more may be on its way to the thread: ``failure`` says
        what went wrong, and nothing is written behind the gap.
        """
        view = memoryview(data)[: self.file.size - self.size]
        while view and self.failure is None:
            try:
                written = os.write(self._handle, view)
            except OSError as error:
                self.failure = error
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self.failure = NoSpace(
                        f"the disk of {self.target.parent} is full; what is there is "
                        "kept, and the same command goes on from it"
                    )
                return
            self._hash.update(view[:written])
            self.size += written
            view = view[written:]

    def verify(self) -> None:
        """Make sure that all is there and right, on disk too.

        Raises:
            WrongContent: it is not.
            OSError
        """
        if self.size != self.file.size:
            raise WrongContent(
                f"{self.target.name} has {self.size} bytes, not {self.file.size}"
            )
        if not self._hash.is_right:
            raise WrongContent(
                f"{self.target.name} is damaged: its checksum is not "
                f"{self._hash.wanted}"
            )
        os.fsync(self._handle)

    def finish(self) -> None:
        """Give it its name.

        Raises:
            Conflict: the name was taken meanwhile.
            OSError
        """
        if os.path.lexists(self.target):
            raise Conflict(f"{self.target} is there already")
        os.rename(self.path, self.target)

    def tidy(self) -> None:
        """Remove what only an unfinished file needs."""
        self._note.unlink(missing_ok=True)

    def unfinish(self) -> None:
        """Take the name back, because a file that belongs to it could not get its."""
        with contextlib.suppress(OSError):
            os.rename(self.target, self.path)

    def discard(self) -> None:
        """Remove it: there is nothing in it to go on from."""
        self.path.unlink(missing_ok=True)
        self.tidy()

    def close(self) -> None:
        """Unlock it; may be called twice."""
        if self._handle < 0:
            return
        # An empty file tells nothing and only puzzles people.
        with contextlib.suppress(OSError):
            if self.size == 0 and self.path.stat().st_size == 0:
                self.discard()
        os.close(self._handle)
        self._handle = -1

    def is_there(self, count: Counter) -> bool:
        """Whether the target exists, and is the very file.

        Raises:
            Conflict: it is another.
            Stopped, OSError
        """
        if not os.path.lexists(self.target):
            return False
        try:
            handle = os.open(self.target, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._taken() from None  # a link to nowhere
        try:
            status = os.fstat(handle)
            if stat.S_ISREG(status.st_mode) and status.st_size == self.file.size:
                self._hash_all(handle, count)
                if self._hash.is_right:
                    return True
        finally:
            os.close(handle)
            self._hash = _Hash(self.file)
            self.size = 0
        raise self._taken()

    def _taken(self) -> Conflict:
        return Conflict(
            f"{self.target} is there already and is another file; rename it, or remove "
            "it with: inferencia models rm"
        )

    def _hash_all(self, handle: int, count: Counter) -> None:
        while data := os.read(handle, _READ_BYTES):
            if self._stop.is_set():
                raise Stopped
            self._hash.update(data)
            self.size += len(data)
            count(len(data))

    def _belongs(self) -> bool:
        """Whether the bytes are the beginning of the content that is listed now."""
        note = self._read_note()
        if note.get("size") != self.file.size:
            return False
        if self.file.checksum is not None:
            return note.get("checksum") == self.file.checksum
        etag = note.get("etag")
        self.etag = etag if isinstance(etag, str) else None
        return self.etag is not None

    def _read_note(self) -> dict[str, Any]:
        try:
            with self._note.open("rb") as file:
                note = json.loads(file.read(_MAX_NOTE_BYTES))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}


class _Hash:
    """The checksum that a listing gives: SHA-256, or git's of a small file, or none."""

    def __init__(self, file: RemoteFile) -> None:
        self.wanted = file.checksum
        self._digest = hashlib.sha256()
        if file.sha256 is None and file.git_oid is not None:
            # git hash-object: SHA-1 of "blob SIZE\0" and the content.
            self._digest = hashlib.sha1(usedforsecurity=False)
            self._digest.update(b"blob %d\0" % file.size)

    def update(self, data: bytes | memoryview) -> None:
        if self.wanted is not None:
            self._digest.update(data)

    @property
    def is_right(self) -> bool:
        return self.wanted is None or self._digest.hexdigest() == self.wanted
