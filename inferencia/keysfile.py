"""The keys file, changed in place: add, change, revoke, rotate, list.

Comments, blank lines, order, owner, mode and extended attributes stay, and a reader
sees the old file or the new one whole (``rewriting``). Editors wait for each other by a
lock on the folder (the file itself is replaced; a lock on it would be left behind with
the old one). A link is followed, its target replaced.

A new secret is returned to the caller and kept nowhere; the file has its digest.
"""

import contextlib
import difflib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from inferencia.keylines import (
    Line,
    compose,
    digest_of,
    parse,
    with_digest,
    with_options,
)
from inferencia.keys import read_file
from inferencia.rewriting import OwnerLost, rewrite

# 256 bits, as OpenAI's keys look: 32 bytes are 43 characters of URL-safe base64.
_SECRET_BYTES = 32

# An edit takes milliseconds. Whoever holds the lock for this long has hung.
LOCK_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.02

_NEW_FILE = ["# Keys of inferencia, one a line; see: inferencia keys --help", ""]


class EditError(Exception):
    """The file could not be changed; it is as it was. One line for a person."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A keys file as read: its lines, byte for byte, and the keys in them."""

    lines: list[str]  # without their "\n"; the last is empty if the file ends with one
    keys: tuple[Line, ...]

    def find(self, name: str, path: Path) -> Line:
        for line in self.keys:
            if line.key.name == name:
                return line
        names = [line.key.name for line in self.keys]
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f'; nearest: "{nearest[0]}"' if nearest else ""
        raise EditError(f'no key "{name}" in {path}{hint}')

    def find_own(self, name: str, path: Path) -> Line:
        """One that is no example of ours."""
        line = self.find(name, path)
        if line.is_placeholder:
            raise EditError(f'"{name}" is an example; revoke it and add a key of yours')
        return line


def new_secret() -> str:
    """A fresh key: ``sk-`` and 43 random characters."""
    return "sk-" + secrets.token_urlsafe(_SECRET_BYTES)


def list_keys(path: Path) -> tuple[Line, ...]:
    """The keys of the file, in its order.

    Raises:
        EditError: it cannot be read.
        KeysError: something in it is wrong.
    """
    with _plain_errors(path):
        return _read(path, path).keys


def add_key(path: Path, name: str, options: Mapping[str, str]) -> str:
    """Append a key and return its secret; the file is made (mode 0600) if need be.

    Args:
        options: by the names and in the form of the file: ``{"rps": "5"}``.

    Raises:
        LineError: the name or an option is wrong.
        EditError: the name is taken, or the file cannot be changed.
        KeysError: something in the file is wrong already.
    """
    secret = new_secret()
    line = compose(digest_of(secret.encode()), {"name": name, **options})
    with _plain_errors(path), _locked(path) as real:
        text = _read(real, path) if real.exists() else _Text([*_NEW_FILE], ())
        if any(one.key.name == name for one in text.keys):
            raise EditError(
                f'key "{name}" is in {path} already; '
                f"a new secret for it: inferencia keys rotate {name}"
            )
        _append(text.lines, line)
        _write(real, text.lines)
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Remove a key with its whole line.

    Raises:
        EditError: there is no such key, or the file cannot be changed.
        KeysError: something in the file is wrong already.
    """
    with _plain_errors(path), _locked(path) as real:
        text = _read(real, path)
        del text.lines[text.find(name, path).number - 1]
        # A file of no bytes looks like one that is just being written, and a daemon
        # that follows it would wait; an empty line is believed at once.
        _write(real, text.lines if any(text.lines) else ["", ""])


def rotate_key(path: Path, name: str) -> str:
    """Give a key another secret, which is returned; all else about it stays.

    Raises:
        EditError: there is no such key, or the file cannot be changed.
        KeysError: something in the file is wrong already.
    """
    secret = new_secret()
    with _plain_errors(path), _locked(path) as real:
        text = _read(real, path)
        old = text.find_own(name, path)
        place = old.number - 1
        text.lines[place] = with_digest(
            text.lines[place], old, digest_of(secret.encode())
        )
        _write(real, text.lines)
    return secret


def change_key(path: Path, name: str, options: Mapping[str, str | None]) -> None:
    """Give a key other options; its secret and what is not named stay.

    Args:
        options: as ``add_key`` takes them, but for the name; None takes one away.

    Raises:
        LineError: an option is wrong.
        EditError: there is no such key, or the file cannot be changed.
        KeysError: something in the file is wrong already.
    """
    with _plain_errors(path), _locked(path) as real:
        text = _read(real, path)
        old = text.find_own(name, path)
        place = old.number - 1
        text.lines[place] = with_options(text.lines[place], old, options)
        _write(real, text.lines)


def _read(real: Path, path: Path) -> _Text:
    data, _ = read_file(real)
    # Comments may hold any bytes; surrogates bring them back as they were.
    text = data.decode("utf-8", "surrogateescape")
    return _Text(text.split("\n"), parse(text, str(path)))


def _append(lines: list[str], line: str) -> None:
    """Add a line at the end, with the line ends that the file has."""
    end = "\r" if lines[0].endswith("\r") else ""
    if lines[-1]:
        lines[-1] += end  # somebody's last line had no end
    else:
        lines.pop()
    lines += [line + end, ""]


def _write(real: Path, lines: list[str]) -> None:
    """Replace the file, or make it."""
    try:
        rewrite(real, "\n".join(lines).encode("utf-8", "surrogateescape"))
    except OwnerLost as error:
        raise EditError(str(error)) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """The file that is really meant, while no other editor may change it."""
    real = Path(os.path.realpath(path))
    folder = os.open(real.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(folder, real.parent)
        yield real
    finally:
        os.close(folder)  # which also unlocks it


def _lock(descriptor: int, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise EditError(f"another program keeps {folder} locked") from error
        time.sleep(_LOCK_POLL_SECONDS)


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Say in one line what the operating system refused."""
    try:
        yield
    except OSError as error:
        raise EditError(f"{path}: {error.strerror}") from error
