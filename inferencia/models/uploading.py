"""A GGUF file that somebody sends: checked while it comes, there only when it is whole.

``Upload`` takes the bytes as they come. They go into ``NAME.partial``, which appears
under its name at the end, or nothing of it stays:

    upload = await Upload.open(folder, name, size)
    await upload.write(...)         as often as bytes come
    path = await upload.finish()    or
    await upload.abandon()          in every other case

The header is looked at as soon as enough bytes have come, so that a video of ten
gigabytes is refused after a few. Disk and header are the work of a thread.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from inferencia.models import gguf
from inferencia.models.choice import MAX_NAME_BYTES, is_safe
from inferencia.models.download import DISK_RESERVE_BYTES, no_room, over
from inferencia.models.gguf import Header, NotGguf
from inferencia.models.naming import PARTIAL_SUFFIX, SUFFIX
from inferencia.models.quota import Quota

# The thread is handed so much at once, and no more is held.
BATCH_BYTES = 1024 * 1024

# Enough to know that it is a GGUF file at all. Later looks are each at twice as much:
# a header ends after some megabytes of words.
_FIRST_LOOK_BYTES = 24

_T = TypeVar("_T")


class UploadError(Exception):
    """It cannot be taken; ``str()`` is a sentence for a person."""


class BadName(UploadError):
    """No name for a model's file."""


class NoModel(UploadError):
    """What comes is no GGUF file, or not all of one."""


class Taken(UploadError):
    """The name belongs to another file, or to one that is just coming."""


class Full(UploadError):
    """The disk, or ``admin.models_quota``, has no room for it."""


def target_of(folder: Path, name: str) -> Path:
    """Where a file of this name belongs: ``NAME.gguf``, or ``FOLDER/NAME.gguf``.

    Args:
        folder: the folder for models.
        name: as it was sent.

    Raises:
        BadName: it is no such name, or leads elsewhere.
    """
    parts = name.split("/")
    if not name.endswith(SUFFIX) or len(parts) > 2 or not is_safe(name):
        raise BadName(
            f"a file for models is named NAME{SUFFIX} or FOLDER/NAME{SUFFIX}, in "
            "letters, digits and simple signs"
        )
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise BadName(f"a file's name has at most {MAX_NAME_BYTES} bytes")
    target = folder / name
    if target.parent.is_symlink() and target.parent != folder:
        raise BadName(f"{target.parent} is a link to elsewhere")
    return target


class Upload:
    """One file on its way here."""

    def __init__(
        self, target: Path, *, size: int | None, replace: bool, quota: Quota | None
    ) -> None:
        """Use ``open``."""
        self.target = target
        self.header: Header | None = None  # as soon as it has come
        self.received = 0  # bytes
        self._size = size
        self._replace = replace
        self._quota = quota
        self._allowed: int | None = None  # bytes, by the quota
        self._partial = target.with_name(target.name + PARTIAL_SUFFIX)
        self._file: BinaryIO | None = None
        self._next_look = _FIRST_LOOK_BYTES
        self._made_folder = False
        self._is_over = False
        self._batch = bytearray()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="upload")

    @classmethod
    async def open(
        cls,
        target: Path,
        *,
        size: int | None,
        replace: bool = False,
        quota: Quota | None = None,
    ) -> "Upload":
        """Begin.

        Args:
            target: of ``target_of``.
            size: how many bytes will come; None if that is not known.
            replace: whether the file may be there already.
            quota: what its folder may hold; None: what the disk has room for.

        Raises:
            Taken: it is there, or another upload or download fills it.
            Full: there is no room for it.
            OSError: the folder cannot be written.
        """
        upload = cls(target, size=size, replace=replace, quota=quota)
        try:
            await upload._in_thread(upload._begin)
        except BaseException:
            await upload.abandon()
            raise
        return upload

    async def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            NoModel: it is plain by now that this is no GGUF file.
            Full: the disk is full.
            OSError: it cannot be written.
        """
        self.received += len(data)
        self._batch += data
        if len(self._batch) >= BATCH_BYTES or self.received >= self._next_look:
            await self._flush()

    async def finish(self) -> Path:
        """All has come: check it and give it its name.

        Raises:
            NoModel: it is no GGUF file, or not all of one.
            Taken: the name was taken meanwhile.
            Full, OSError: it cannot be written.
        """
        await self._flush()
        await self._in_thread(self._end)
        self._is_over = True
        self._executor.shutdown(wait=False)
        return self.target

    async def abandon(self) -> None:
        """Leave nothing behind. Idempotent; does nothing after ``finish``."""
        if self._is_over:
            return
        self._is_over = True
        discarded = self._in_thread(self._discard)
        self._executor.shutdown(wait=False)
        # Also when we are being cancelled: the thread may still be writing.
        await asyncio.shield(discarded)

    async def _flush(self) -> None:
        batch, self._batch = bytes(self._batch), bytearray()
        await self._in_thread(lambda: self._put(batch))

    # In the thread.

    def _begin(self) -> None:
        folder = self.target.parent
        if not folder.exists():
            folder.mkdir(parents=True)
            self._made_folder = True
        self._check_target()
        needed = self._size or 0
        free = _free(folder)
        if needed + DISK_RESERVE_BYTES > free:
            raise Full(no_room(folder, needed, free))
        self._allowed = self._left()
        if self._allowed is not None and needed > self._allowed:
            raise self._over()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            handle = os.open(self._partial, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Taken(f"{self._partial} is a link to elsewhere") from error
            raise
        file = os.fdopen(handle, "r+b", buffering=0)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise Taken(f"{self.target.name} is just being sent or fetched") from None
        self._file = file
        os.ftruncate(handle, 0)

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if not self._replace:
            raise Taken(f"{self.target} is there already")
        if self.target.is_symlink() or not self.target.is_file():
            raise Taken(f"{self.target} is no plain file, and is not replaced")

    def _left(self) -> int | None:
        """What the quota allows for this file, if there is one."""
        if self._quota is None:
            return None
        replaced = self.target.stat().st_size if self.target.exists() else 0
        return self._quota.left() + replaced

    def _over(self) -> Full:
        assert self._quota is not None
        return Full(over(self._quota, self._allowed or 0))

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        if self._allowed is not None and self.received > self._allowed:
            raise self._over()
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
            if _free(self.target.parent) < DISK_RESERVE_BYTES:
                raise Full(f"the disk of {self.target.parent} is full")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Full(f"the disk of {self.target.parent} is full") from error
            raise
        if self.header is None and self.received >= self._next_look:
            self._look(is_all=False)

    def _look(self, *, is_all: bool) -> None:
        """Read the header as far as it has come."""
        assert self._file is not None
        self._next_look = 2 * max(self._next_look, self.received)
        self._file.seek(0)
        source = _Watched(self._file)
        try:
            self.header = gguf.read_header(source)
        except NotGguf as error:
            if is_all or not source.hit_end:
                raise NoModel(f"{self.target.name} {error}") from error
        finally:
            self._file.seek(0, os.SEEK_END)
        size = self._size
        if self.header is not None and size is not None:
            self._check_complete(self.header, size)

    def _check_complete(self, header: Header, size: int) -> None:
        if size < header.complete_bytes:
            raise NoModel(
                f"{self.target.name} is not complete: it has {size} bytes, and its "
                f"header announces {header.complete_bytes}"
            )

    def _end(self) -> None:
        assert self._file is not None
        if self.header is None:
            self._look(is_all=True)
        assert self.header is not None
        self._check_complete(self.header, self.received)
        os.fsync(self._file.fileno())
        # Others may have come at the same time; this file is among them by now.
        if (self._left() or 0) < 0:
            raise self._over()
        self._check_target()
        if self._replace:
            os.replace(self._partial, self.target)
        else:
            _rename_new(self._partial, self.target)
        # What belonged to a download that was given up.
        with contextlib.suppress(OSError):
            self._partial.with_name(self._partial.name + ".json").unlink()
        self._file.close()
        self._file = None
        handle = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _discard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                self._partial.unlink()
            file.close()
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.target.parent.rmdir()

    def _in_thread(self, work: Callable[[], _T]) -> "asyncio.Future[_T]":
        return asyncio.get_running_loop().run_in_executor(self._executor, work)


class _Watched:
    """A file that knows whether its end was met."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hit_end = False

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self.hit_end = self.hit_end or not data
        return data


def _rename_new(source: Path, target: Path) -> None:
    """Rename, unless somebody else has taken the name meanwhile."""
    try:
        os.link(source, target)
    except FileExistsError as error:
        raise Taken(f"{target} is there already") from error
    except OSError:  # a file system without links
        os.rename(source, target)
    else:
        os.unlink(source)


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
