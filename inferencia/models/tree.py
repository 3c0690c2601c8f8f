"""The files in the models' folders: which there are, by name, size and time.

Only looks at folders and file status, never into a file, so that a thousand files can
be looked at every few seconds. Links to folders are followed, each folder is visited
once. Nothing here raises; what went wrong is in ``problems``.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .naming import SUFFIX

# A folder that holds more is no models' folder: somebody named their whole disk.
MAX_ENTRIES = 200_000
MAX_DEPTH = 32

# goinfer's limit: what is smaller is a pointer or a leftover.
LEAST_BYTES = 1000

SIDECARS = (".sh", ".args")
PARAMS = frozenset({"params.yml", "templates.yml"})
# What programs call a file that they are still fetching.
_PARTIAL = re.compile(
    r"(?P<whole>.+\.gguf)\.(?:partial|part|incomplete|download|downloadInProgress"
    r"|crdownload|aria2|tmp)",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class File:
    """One file, as its folder and its status describe it."""

    folder: str
    name: str
    group: str  # the folder's name; "" if it is one that is searched itself
    size: int
    mtime_ns: int
    identity: tuple[int, int]  # device and inode

    @property
    def path(self) -> str:
        return os.path.join(self.folder, self.name)

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return os.path.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1].lower()

    @property
    def whole_name(self) -> str:
        """What the file will be called when it is complete; "" if it is."""
        match = _PARTIAL.fullmatch(self.name)
        return match["whole"] if match else ""


@dataclass(frozen=True, slots=True)
class Tree:
    """All files that matter, in the order of the folders and of their names."""

    files: tuple[File, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(slots=True)
class _Walk:
    """One pass through the folders."""

    files: list[File] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    visited: set[tuple[int, int]] = field(default_factory=set)
    entries: int = 0
    gave_up: bool = False  # set where the first folder was too much


def look(folders: Sequence[Path]) -> Tree:
    """Look at everything below ``folders``."""
    walk = _Walk()
    for folder in folders:
        if not folder.is_dir():
            walk.problems.append(f"{folder}: no such folder")
            continue
        # Links come last, so that a file is known by its own path.
        links = list(_visit(walk, str(folder), "", 0))
        while links:
            path, depth = links.pop(0)
            links += _visit(walk, path, os.path.basename(path), depth)
    return Tree(tuple(walk.files), tuple(walk.problems))


def status(path: str) -> tuple[str, int, int]:
    """Path, size and time of a file; size -1 if there is none by this path."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return path, -1, 0
    if not stat.S_ISREG(found.st_mode):
        return path, -1, 0  # opening a pipe would wait for whoever writes to it
    return path, found.st_size, found.st_mtime_ns


def _visit(walk: _Walk, path: str, group: str, depth: int) -> Iterator[tuple[str, int]]:
    """Note the files in a folder and below it; gives the links to other folders."""
    try:
        here = os.stat(path)
        if (here.st_dev, here.st_ino) in walk.visited:
            return
        walk.visited.add((here.st_dev, here.st_ino))
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        walk.problems.append(f"{path}: {error.strerror}")
        return
    walk.entries += len(entries)
    if walk.entries > MAX_ENTRIES or depth > MAX_DEPTH:
        if not walk.gave_up:
            walk.problems.append(f"{path}: not searched, the folders hold too much")
        walk.gave_up = True
        return
    for entry in entries:
        try:
            if entry.is_dir():
                if entry.is_symlink():
                    yield entry.path, depth + 1
                else:
                    yield from _visit(walk, entry.path, entry.name, depth + 1)
            elif _matters(entry.name):
                _note(walk, entry, path, group)
        except OSError as error:
            walk.problems.append(f"{_shown(entry.path)}: {error.strerror}")


def _matters(name: str) -> bool:
    if name.startswith("._"):  # what macOS leaves on other file systems
        return False
    lower = name.lower()
    return (
        lower.endswith((SUFFIX, *SIDECARS))
        or lower in PARAMS
        or _PARTIAL.fullmatch(name) is not None
    )


def _note(walk: _Walk, entry: os.DirEntry[str], folder: str, group: str) -> None:
    shown = _shown(entry.path)
    if shown != entry.path:
        walk.problems.append(f"{shown}: a name that is no text")
        return
    found = entry.stat()
    if not stat.S_ISREG(found.st_mode):
        return
    identity = (found.st_dev, found.st_ino)
    walk.files.append(
        File(folder, entry.name, group, found.st_size, found.st_mtime_ns, identity)
    )


def _shown(path: str) -> str:
    """The path, or what of it can be shown."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return ascii(path)
    return ascii(path) if _CONTROL.search(path) else path
