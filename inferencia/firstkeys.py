"""The two keys of a machine where nothing was configured.

``key`` (role user) and ``admin-key`` lie in the state folder, mode 0600, and hold the
secret alone, without even a line end, so that a command line can read one by
``$(cat .../key)`` and a program as it is. They are made once and found again at the
next start.
"""

import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from inferencia.folders import make_private

# 256 bits, and a prefix by which people and secret scanners know a key.
_RANDOM_BYTES = 32
_PREFIX = "sk-"
_SECRET = re.compile(rb"[!-~]+")  # printable ASCII without the space

# Further keys, made by ``inferencia keys add``, lie beside them.
KEYS_FILE = "keys.txt"


@dataclass(frozen=True, slots=True)
class FirstKeys:
    """Where the two keys are; each property reads the file."""

    user_file: Path
    admin_file: Path

    @property
    def user(self) -> str:
        """The secret of role user."""
        return _secret_in(self.user_file)

    @property
    def admin(self) -> str:
        """The secret of role admin."""
        return _secret_in(self.admin_file)


def first_keys(folder: Path) -> FirstKeys:
    """Find or make the two keys in ``folder``, which is made if need be.

    Raises:
        OSError: the folder or a file cannot be written or read.
        ValueError: a file is there and holds something else than one key.
    """
    make_private(folder)
    keys = FirstKeys(folder / "key", folder / "admin-key")
    for path in (keys.user_file, keys.admin_file):
        _make_unless_there(path)
        _secret_in(path)
    return keys


def _secret_in(path: Path) -> str:
    content = path.read_bytes().strip()
    if not _SECRET.fullmatch(content):
        raise ValueError(
            f"{path} holds something else than one key; "
            "remove it, and the next start makes a new one"
        )
    return content.decode("ascii")


def _make_unless_there(path: Path) -> None:
    if path.exists() and path.read_bytes().strip():
        _close_to_others(path)
        return
    # Written aside and linked into place: two daemons that start at once agree on one
    # secret, and no other user can read it at any moment.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(_PREFIX + secrets.token_urlsafe(_RANDOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():  # an empty one is worth nothing
            os.replace(aside, path)
            return
        try:
            os.link(aside, path)
        except FileExistsError:
            return
    finally:
        aside.unlink(missing_ok=True)


def _close_to_others(path: Path) -> None:
    """Take back what a backup or a copy has opened: only its owner may read a key."""
    status = path.stat()
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) and status.st_uid == os.geteuid():
        path.chmod(0o600)
