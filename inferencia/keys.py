"""Who may come in: the keys in force, found by the digest of what a client presents.

Keys come from the keys file, which is followed while the daemon runs; or, instead of
it, from ``INFERENCIA_API_KEYS``; and from ``server.api_key``. Only digests stay in
memory. What a line of the file says is decided in ``keylines.py``, how it is changed
by command in ``keysfile.py``, and what a role may do where routes are declared.
"""

import errno
import hmac
import logging
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from inferencia.keylines import (
    MIN_GOOD_LENGTH,
    Key,
    KeysError,
    Line,
    LineError,
    Role,
    bare_line,
    digest_of,
    parse,
    unique_name,
)

__all__ = ["Key", "KeyRing", "KeysError", "Role"]

log = logging.getLogger(__name__)

# 20,000 keys with every option. Above it somebody gave the wrong file.
MAX_FILE_BYTES = 4 * 1024 * 1024

# A file changed twice within one tick of the file system's clock can keep its times
# and its size. FAT's tick of two seconds is the coarsest; a younger file is read at
# each poll.
_TICK_NANOSECONDS = 2_000_000_000

# Stands in for a key that was not found, so that both cases do the same work.
_NOBODY = Key(name="", digest=bytes(32))

# Modified, changed (nanoseconds), bytes, inode. The second sees what a copying program
# hides that sets the first back, and a mode that lets us read again.
_Signature = tuple[int, int, int, int]
_Found = tuple[str, Line]  # where a key comes from, fit to begin a message; and the key


class KeyRing:
    """The keys in force."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        listed: Sequence[str] | None = None,
        admin: str | None = None,
        user: str | None = None,
        swap: Sequence[str] = (),
    ) -> None:
        """Read all keys.

        A keys file that is missing is no error: it is taken up when it appears.

        Args:
            path: the keys file.
            listed: the secrets of ``INFERENCIA_API_KEYS``; they replace the file.
            admin: the secret of ``server.api_key.admin``; the key is named ``admin``.
            user: the same for ``server.api_key.user``, named ``user``.
            swap: the secrets of a llama-swap configuration's ``apiKeys``.

        Raises:
            KeysError: the file cannot be read, or a key is wrong.
        """
        self._fixed = (
            _from_config(admin, user)
            + _from_list("INFERENCIA_API_KEYS: key", listed or ())
            + _from_list("swap.apiKeys: key", swap)
        )
        self._file = None
        if path is not None and listed is None:
            self._file = _FollowedFile(path)
        # Replaced as a whole when the file changes; never changed in place.
        self._keys: Mapping[bytes, Key] = {}
        self._warnings: tuple[str, ...] = ()
        self._has_read_file = False
        self._take_over([], [])
        self._problem = self._load()
        if self._problem and self._file and not self._file.is_missing:
            raise KeysError(tuple(self._problem.split("\n")))

    def find(self, presented: bytes, today: date) -> Key | None:
        """The key whose secret was presented, if it is good on that day (UTC).

        An unknown secret, a placeholder and an expired key take the same path and the
        same time. Any bytes may be presented.
        """
        digest = digest_of(presented)
        key = self._keys.get(digest, _NOBODY)
        is_known = hmac.compare_digest(digest, key.digest)
        has_expired = key.has_expired(today)
        return key if is_known and not has_expired else None

    @property
    def keys(self) -> tuple[Key, ...]:
        """All keys in force, expired ones too: configuration first, then the file."""
        return tuple(self._keys.values())

    @property
    def names(self) -> frozenset[str]:
        """The names of ``keys``."""
        return frozenset(key.name for key in self._keys.values())

    def usable(self, today: date) -> int:
        """How many keys would let somebody in on that day."""
        return sum(not key.has_expired(today) for key in self._keys.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What somebody should look at, one line each; no secrets."""
        return self._warnings + tuple((self._problem or "").splitlines())

    @property
    def problem(self) -> str | None:
        """Why the file as it is now is not in force; None if it is."""
        return self._problem

    def poll(self) -> bool:
        """Look whether the file has changed; to be called each second.

        Returns:
            True if other keys are in force now. If the file is gone or wrong, that is
            logged once, and the keys from before stay in force.
        """
        return self._file is not None and self._file.has_changed() and self._reread()

    def reload(self) -> tuple[str, ...]:
        """Read the file now, changed or not.

        Returns:
            What is wrong with it, one line each; then the keys from before stay.
        """
        self._reread()
        return tuple((self._problem or "").splitlines())

    def _reread(self) -> bool:
        """Load the file and tell the log; True if other keys are in force."""
        before, warned, old_problem = self._keys, self._warnings, self._problem
        self._problem = self._load()
        if self._problem is not None:
            if self._problem != old_problem:
                for line in self._problem.splitlines():
                    log.warning("%s", line)
                log.warning("keys: the %d from before stay in force", len(before))
            return False
        for warning in self._warnings:
            if warning not in warned:
                log.warning("%s", warning)
        is_new = self._keys != before
        if is_new or old_problem is not None:
            log.info("keys read again: %s", _changes(before, self._keys))
        return is_new

    def _load(self) -> str | None:
        """Take over what the file says, or say what is wrong with it."""
        if self._file is None:
            return None
        path = self._file.path
        try:
            data, mode = self._file.read()
            lines = parse(data.decode("utf-8", "surrogateescape"), str(path))
            self._take_over(
                [(f"{path}:{line.number}", line) for line in lines],
                _doubts_about_mode(path, mode),
            )
        except FileNotFoundError:
            if self._fixed and not self._has_read_file:
                return None  # nobody said that there would be one
            return f"{path}: no such file"
        except OSError as error:
            return f"{path}: {error.strerror}"
        except KeysError as error:
            return str(error)
        self._has_read_file = True
        return None

    def _take_over(self, from_file: list[_Found], warnings: list[str]) -> None:
        """Put the fixed keys and these into force.

        Raises:
            KeysError: two have the same name; then nothing has changed.
        """
        keys: dict[bytes, Key] = {}
        places: dict[str | bytes, str] = {}  # of names and digests
        problems = []
        for place, line in self._fixed + from_file:
            warnings += _doubts_about_secret(place, line)
            if line.is_placeholder:
                continue
            first = places.setdefault(line.key.digest, place)
            if first != place:
                warnings.append(f"{place}: the same secret as {first}, which counts")
                continue
            first = places.setdefault(line.key.name, place)
            if first != place:
                problems.append(f'{place}: name "{line.key.name}" is taken by {first}')
            keys[line.key.digest] = line.key
        if problems:
            raise KeysError(tuple(problems))
        self._keys = keys
        self._warnings = tuple(warnings)


class _FollowedFile:
    """A file that is read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_missing = False  # at the last read
        self._signature: _Signature | None = None  # as last seen; None: no file
        self._may_change_unseen = False

    def has_changed(self) -> bool:
        """Whether the file should be read, because it is new, gone, or doubtful."""
        try:
            signature = _signature(os.stat(self.path))
        except OSError:
            signature = None
        if signature == self._signature:
            return self._may_change_unseen
        self._signature = signature
        # An empty file may be one that is just being written (``> keys.txt``), and
        # would lock everybody out. Believed at the second look.
        is_empty = signature is not None and signature[2] == 0
        self._may_change_unseen = is_empty
        return not is_empty

    def read(self) -> tuple[bytes, int]:
        """All bytes, and the file's mode.

        Raises:
            OSError: it cannot be read; ``FileNotFoundError`` if it is missing.
        """
        self._may_change_unseen = True  # until it could be read
        try:
            data, status = read_file(self.path)
        except OSError as error:
            self.is_missing = isinstance(error, FileNotFoundError)
            raise
        self.is_missing = False
        self._signature = _signature(status)
        age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
        self._may_change_unseen = abs(age) < _TICK_NANOSECONDS
        return data, status.st_mode


def read_file(path: Path) -> tuple[bytes, os.stat_result]:
    """A whole keys file, of bounded size.

    Raises:
        OSError: it cannot be read, is no regular file, or is too large.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return data, status


def _signature(status: os.stat_result) -> _Signature:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _from_config(admin: str | None, user: str | None) -> list[_Found]:
    found = []
    for role, secret in ((Role.ADMIN, admin), (Role.USER, user)):
        if secret:
            place = f"server.api_key.{role.value}"
            line = _standing_alone(place, secret)
            key = replace(line.key, name=role.value, role=role)
            found.append((place, replace(line, key=key, is_bare=False)))
    return found


def _from_list(label: str, secrets: Iterable[str]) -> list[_Found]:
    """Keys that are only secrets; one that is listed twice counts once."""
    found: dict[bytes, _Found] = {}
    names: set[str] = set()
    for number, secret in enumerate(secrets, start=1):
        if not secret.strip():
            continue
        place = f"{label} {number}"
        line = _standing_alone(place, secret)
        if line.key.digest not in found:
            key = replace(line.key, name=unique_name(line.key.digest, names))
            names.add(key.name)
            found[key.digest] = place, replace(line, key=key)
    return list(found.values())


def _standing_alone(place: str, secret: str) -> Line:
    try:
        return bare_line(secret.strip())
    except LineError as error:
        raise KeysError((f"{place}: {error}",)) from None


def _doubts_about_secret(place: str, line: Line) -> list[str]:
    if line.is_placeholder:
        return [f"{place}: an example's placeholder, never accepted; replace it"]
    if line.is_short:
        return [
            f'{place}: key "{line.key.name}" has fewer than {MIN_GOOD_LENGTH} '
            "characters and may be guessed"
        ]
    return []


def _doubts_about_mode(path: Path, mode: int) -> list[str]:
    # A group that may read is somebody's intention (root:inferencia, 0640).
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        bits = stat.S_IMODE(mode)
        return [f"{path}: every user may read it (mode {bits:04o}); chmod 600 {path}"]
    return []


def _changes(before: Mapping[bytes, Key], after: Mapping[bytes, Key]) -> str:
    """``5 in force; added alice; removed bob``."""
    old = {key.name: key for key in before.values()}
    new = {key.name: key for key in after.values()}
    parts = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    told = [f"{what} {', '.join(names)}" for what, names in parts.items() if names]
    return "; ".join([f"{len(after)} in force", *told])
