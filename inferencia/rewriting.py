"""Replacing a file's content whole: who reads it sees the old text or the new one.

The new text is written beside the file, synced and renamed over it, so that this holds
after a power cut as well. Owner, mode and extended attributes (which hold access lists)
stay. A link must have been followed before.
"""

import os
import shutil
import tempfile
from pathlib import Path


class OwnerLost(Exception):
    """The file belongs to somebody else, and that could not be kept; nothing is done.

    Replaced under our name, it might be closed to whoever has to read it.
    """


def rewrite(real: Path, content: bytes, *, like: Path | None = None) -> None:
    """Replace a file, or make it (mode 0600, unless it shall be like another).

    Args:
        real: the file; no link.
        content: all of it.
        like: whose owner, mode and attributes it gets if it is not there.

    Raises:
        OwnerLost: its owner or group cannot be kept.
        OSError: it cannot be written.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
    try:
        with open(handle, "wb") as file:  # mkstemp's mode is 0600
            model = real if real.exists() else like
            if model is not None:
                _become(model, temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(real.parent)


def _become(real: Path, temporary: str) -> None:
    old, new = os.stat(real), os.stat(temporary)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        try:
            os.chown(temporary, old.st_uid, old.st_gid)
        except PermissionError as error:
            raise OwnerLost(
                f"{real} belongs to another user or group, and that cannot be kept; "
                "do this as its owner or as root"
            ) from error
    shutil.copystat(real, temporary)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
