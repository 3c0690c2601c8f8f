"""GGUF files that are there, as models that can be offered.

A model is a file, or the parts of a split one; its name, flags and projector come from
what stands beside it (``naming``, ``presets``, ``projectors``). Files that cannot be
served are in the list with the reason, since somebody put them there and waits.

``Finder`` looks again as often as it is asked. As long as nothing has changed that
costs a look at the folders; a header is read once for each file, size and time. It
reads files and must not be used by two threads at once. Nothing here raises.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import gguf, presets, projectors
from .gguf import Header, NotGguf
from .naming import PARTIAL_SUFFIX, SUFFIX, Shard, model_name, name_and_flags, shard
from .projectors import Candidate
from .tree import LEAST_BYTES, PARAMS, SIDECARS, File, Tree, look, status

IN_FILE_NAME = "file name"

# Another program's file is on its way if something came within this time.
_ARRIVING_SECONDS = 60.0

# More headers than anybody has models; each is some hundred bytes.
_MAX_CACHED = 10_000

_OTHER_KINDS = {
    "adapter": "is a LoRA adapter, no model; name it by --lora in a model's flags",
    "imatrix": "is an importance matrix, no model",
}
_PROJECTOR_FLAGS = frozenset({"--mmproj", "-mm", "--no-mmproj", "--mmproj-url", "-mmu"})


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model on this machine's disk."""

    name: str
    path: Path  # of its first file
    size: int  # bytes, all of its files
    flags: tuple[str, ...] = ()  # for llama-server, beside those that all models get
    origin: str = ""  # of the flags: a file, or IN_FILE_NAME
    params: Header | None = None
    mmproj: Path | None = None  # the projector that goes with it
    error: str = ""  # what is wrong; with a usable model a warning
    is_usable: bool = True
    is_arriving: bool = False  # it is just being fetched or sent


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found; one model for each name, sorted by name."""

    models: tuple[FoundModel, ...] = ()
    problems: tuple[str, ...] = ()  # what concerns no model, such as a missing folder

    def named(self, name: str) -> FoundModel | None:
        return next((model for model in self.models if model.name == name), None)


class Headers:
    """Headers by path, each read again only when the file's size or time changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int, Header | NotGguf]] = {}

    def read(self, path: str) -> Header | None:
        """The header of a file; None if it cannot be read."""
        _, size, mtime_ns = status(path)
        if size < 0:
            return None
        try:
            return self.of(path, size, mtime_ns)
        except (NotGguf, OSError):
            return None

    def of(self, path: str, size: int, mtime_ns: int) -> Header:
        """The header of a file whose status is known.

        Raises:
            NotGguf: it has none.
            OSError: it cannot be opened or read.
        """
        known = self._known.get(path)
        if known is None or known[:2] != (size, mtime_ns):
            result: Header | NotGguf
            try:
                with open(path, "rb", buffering=0) as file:
                    result = gguf.read_header(file)
            except NotGguf as error:
                result = error
            if len(self._known) >= _MAX_CACHED:
                self._known.clear()
            known = self._known[path] = (size, mtime_ns, result)
        if isinstance(known[2], NotGguf):
            raise NotGguf(str(known[2]))
        return known[2]


@dataclass(slots=True)
class _Parts:
    """The files of one model."""

    stem: str  # without split suffix
    split: Shard | None
    files: list[File] = field(default_factory=list)
    header: Header | None = None  # of all parts together
    error: str = ""

    @property
    def first(self) -> File:
        return self.files[0]


class Finder:
    """Looks for models in folders, again and again."""

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        headers: Headers | None = None,
        wall_clock: Callable[[], float] = time.time,
    ):
        self._folders = tuple(folders)
        self.headers = headers or Headers()
        self._wall_clock = wall_clock
        self._findings = Findings()
        self._seen: (
            tuple[Tree, frozenset[str], tuple[tuple[str, int, int], ...]] | None
        ) = None
        self.changed = False  # whether the last scan found anything else than before

    def scan(self) -> Findings:
        """Look at the folders; the same object as before if nothing changed."""
        tree = look(self._folders)
        arriving = frozenset(_arriving(tree.files, self._wall_clock()))
        watched = self._seen[2] if self._seen else ()
        now = tuple(status(path) for path, _, _ in watched)
        if self._seen == (tree, arriving, now):
            self.changed = False
            return self._findings
        builder = _Builder(tree, self.headers, arriving)
        findings = builder.build()
        elsewhere = tuple(status(path) for path in builder.elsewhere)
        self._seen = (tree, arriving, elsewhere)
        self.changed = findings != self._findings
        if self.changed:
            self._findings = findings
        return self._findings


def find_models(folders: Sequence[Path]) -> Findings:
    """Look for models once."""
    return Finder(folders).scan()


def is_arriving(path: Path | str) -> bool:
    """Whether a download or upload of ours, in whatever process, fills this file."""
    if not str(path).endswith(PARTIAL_SUFFIX):
        return False
    with contextlib.suppress(OSError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _arriving(files: Iterable[File], now: float) -> Iterable[str]:
    """The paths of files that are just coming."""
    for file in files:
        if not file.whole_name:
            continue
        is_new = now - file.mtime_ns / 1e9 < _ARRIVING_SECONDS
        is_ours = file.suffix == PARTIAL_SUFFIX
        if is_arriving(file.path) or (is_new and not is_ours):
            yield file.path


class _Builder:
    """Makes models of what one look has found."""

    def __init__(self, tree: Tree, headers: Headers, arriving: frozenset[str]) -> None:
        self._headers = headers
        self._arriving = arriving
        self._problems = list(tree.problems)
        self._models: dict[str, FoundModel] = {}
        self._identities: dict[str, tuple[int, int]] = {}  # of the file, by name
        self._sidecars = {f.path: f for f in tree.files if f.suffix in SIDECARS}
        self._used_sidecars: set[str] = set()
        self._files = tree.files
        self._params = self._all_params()
        self.elsewhere: list[str] = []  # files that scripts name

    def build(self) -> Findings:
        folders: dict[str, list[File]] = {}
        for file in self._files:
            if file.suffix == SUFFIX and file.size >= LEAST_BYTES:
                folders.setdefault(file.folder, []).append(file)
        for files in folders.values():
            self._folder(files)
        for file in self._files:
            if file.whole_name:
                self._unfinished(file)
        for file in self._sidecars.values():
            if file.suffix == ".sh" and file.path not in self._used_sidecars:
                self._script(file)
        models = sorted(self._models.values(), key=lambda model: model.name)
        return Findings(tuple(models), tuple(self._problems))

    # One folder

    def _folder(self, files: Iterable[File]) -> None:
        """Make models of the GGUF files in one folder."""
        all_parts = [self._read(parts) for parts in _grouped(files)]
        seeing: list[Candidate] = []
        models: list[_Parts] = []
        for parts in all_parts:
            if not projectors.is_projector(parts.stem, parts.header):
                models.append(parts)
            elif parts.error or parts.header is None:
                self._problems.append(f"{parts.first.path}: {parts.error}")
            else:
                seeing.append(Candidate(parts.stem, parts.header))
        candidates = [
            Candidate(parts.stem, parts.header)
            for parts in models
            if parts.header is not None and not parts.error
        ]
        chosen = projectors.assign(candidates, seeing)
        paths = {parts.stem: Path(parts.first.path) for parts in all_parts}
        for parts in models:
            projector = chosen.get(parts.stem)
            found = self._model(parts, paths[projector] if projector else None)
            self._add(found, parts.first)
        for stem in projectors.unused(seeing, chosen):
            self._problems.append(f"{paths[stem]}: goes with no model in its folder")

    def _read(self, parts: _Parts) -> _Parts:
        """Read the headers of a model's files and see whether they are all there."""
        parts.error = _missing(parts)
        headers: list[Header] = []
        for file in parts.files:
            if file.size < 0:
                parts.error = parts.error or "is not there"
                continue
            try:
                header = self._headers.of(file.path, file.size, file.mtime_ns)
            except NotGguf as error:
                parts.error = parts.error or str(error)
                continue
            except OSError as error:
                parts.error = parts.error or f"cannot be read: {error.strerror}"
                continue
            headers.append(header)
            parts.error = parts.error or _incomplete(file, header)
        if headers:
            parts.header = replace(
                headers[0],
                parameters=sum(header.parameters for header in headers),
                tensor_bytes=sum(header.tensor_bytes for header in headers),
            )
            parts.error = parts.error or _unservable(parts.header)
        return parts

    def _model(self, parts: _Parts, projector: Path | None) -> FoundModel:
        file = parts.first
        stem, _ = name_and_flags(parts.stem)
        name = model_name(stem, file.group)
        error = parts.error
        flags: tuple[str, ...] = ()
        origin = ""
        try:
            flags, origin = self._flags(file.folder, parts.stem)
        except presets.BadPreset as problem:
            error = error or str(problem)
        for key in (name, stem):
            if params := self._params.get(key):
                added = params.added_to(flags)
                origin = origin or ("params.yml" if added != flags else "")
                flags = added
                break
        if _PROJECTOR_FLAGS & set(flags):
            projector = None
        return FoundModel(
            name=name,
            path=Path(file.path),
            size=sum(part.size for part in parts.files),
            flags=presets.in_folder(flags, file.folder),
            origin=origin,
            params=parts.header,
            mmproj=projector,
            error=error,
            is_usable=not error,
        )

    def _flags(self, folder: str, stem: str) -> tuple[tuple[str, ...], str]:
        """A model's flags and where they are from; the first place that has some."""
        for suffix in SIDECARS:
            path = os.path.join(folder, stem + suffix)
            if path in self._sidecars:
                self._used_sidecars.add(path)
                return presets.sidecar_flags(_text(path)), path
        _, flags = name_and_flags(stem)
        return presets.without_ours(flags), IN_FILE_NAME if flags else ""

    # Files that are no model by themselves

    def _unfinished(self, file: File) -> None:
        whole = os.path.join(file.folder, file.whole_name)
        if any(str(model.path) == whole for model in self._models.values()):
            return
        stem = file.whole_name.removesuffix(SUFFIX)
        part = shard(stem)
        stem, _ = name_and_flags(part.stem if part else stem)
        name = model_name(stem, file.group)
        if name not in self._models:
            is_arriving = file.path in self._arriving
            given_up = "is not whole: its download or upload was given up"
            self._models[name] = FoundModel(
                name=name,
                path=Path(file.path),
                size=file.size,
                error="is still being downloaded" if is_arriving else given_up,
                is_usable=False,
                is_arriving=is_arriving,
            )

    def _script(self, file: File) -> None:
        """Offer what a script runs under the script's name."""
        try:
            preset = presets.script_preset(_text(file.path))
        except presets.BadPreset as error:
            self._problems.append(f"{file.path}: {error}")
            return
        if preset is None:
            return
        (named,) = presets.in_folder((preset.model,), file.folder)
        named = os.path.expanduser(named)
        if "$" in named:
            self._problems.append(
                f"{file.path}: the model {named} is not a file's name"
            )
            return
        path = os.path.normpath(os.path.join(file.folder, named))
        self.elsewhere.append(path)
        parts = self._read(self._parts_at(path))
        flags = presets.in_folder(preset.flags, file.folder)
        known = next(
            (model for model in self._models.values() if str(model.path) == path), None
        )
        beside = known.mmproj if known and not _PROJECTOR_FLAGS & set(flags) else None
        model = FoundModel(
            name=file.stem,
            path=Path(path),
            size=sum(max(0, part.size) for part in parts.files),
            flags=flags,
            origin=file.path,
            params=parts.header,
            mmproj=beside,
            error=parts.error,
            is_usable=not parts.error,
        )
        self._add(model, file)

    def _parts_at(self, path: str) -> _Parts:
        """The files of a model that is named by its path."""
        folder, name = os.path.split(path)
        part = shard(name.removesuffix(SUFFIX))
        names = [name]
        if part:
            names = [part.file_name(number) for number in range(1, part.count + 1)]
        parts = _Parts(part.stem if part else name.removesuffix(SUFFIX), part)
        for one in names:
            _, size, mtime_ns = status(os.path.join(folder, one))
            if size >= 0 or one == name:
                parts.files.append(File(folder, one, "", size, mtime_ns, (0, 0)))
        return parts

    def _all_params(self) -> Mapping[str, presets.Params]:
        params: dict[str, presets.Params] = {}
        for file in self._files:
            if file.name.lower() not in PARAMS:
                continue
            try:
                found = presets.parse_params(_text(file.path).encode())
            except presets.BadPreset as error:
                self._problems.append(f"{file.path}: {error}")
                continue
            for name, entry in found.items():
                flags = presets.in_folder(entry.flags, file.folder)
                params[name] = replace(entry, flags=flags)
        return params

    # Names

    def _add(self, model: FoundModel, file: File) -> None:
        """Take a model into the list; of two with one name the later that is usable."""
        other = self._models.get(model.name)
        known = self._identities.setdefault(model.name, file.identity)
        if other is not None and known == file.identity:
            return  # one file, found by two paths
        if other is None:
            self._models[model.name] = model
            return
        kept, left = model, other
        if other.is_usable and not model.is_usable:
            kept, left = other, model
        error = kept.error or f"two files have this name; {left.path} is not offered"
        self._models[model.name] = replace(kept, error=error)


def _grouped(files: Iterable[File]) -> list[_Parts]:
    """Put the parts of split models together."""
    grouped: dict[tuple[str, int], _Parts] = {}
    for file in files:
        part = shard(file.stem)
        stem = part.stem if part else file.stem
        key = (stem, part.count if part else 0)
        grouped.setdefault(key, _Parts(stem, part)).files.append(file)
    return list(grouped.values())


def _missing(parts: _Parts) -> str:
    """What is wrong with the number of parts."""
    if parts.split is None or len(parts.files) == parts.split.count:
        return ""
    there = {file.name for file in parts.files}
    names = (parts.split.file_name(n) for n in range(1, parts.split.count + 1))
    first = next(name for name in names if name not in there)
    missing = parts.split.count - len(there)
    return f"lacks {missing} of its {parts.split.count} files: {first} is not there"


def _incomplete(file: File, header: Header) -> str:
    if file.size >= header.complete_bytes:
        return ""
    return (
        f"has {file.size} of {header.complete_bytes} bytes;"
        " it is cut off, or still being copied"
    )


def _unservable(header: Header) -> str:
    """Why llama-server would not take a whole file; "" if it would."""
    if header.is_foreign:
        return "has the byte order of another kind of machine"
    if header.kind in _OTHER_KINDS:
        return _OTHER_KINDS[header.kind]
    if not header.architecture:
        return "does not say which architecture it has"
    if not header.tensor_count:
        return "holds no weights"
    return ""


def _text(path: str) -> str:
    """What a small file holds; "" if it cannot be read or is not small."""
    try:
        with open(path, "rb") as file:
            content = file.read(presets.MAX_BYTES + 1)
    except OSError:
        return ""
    if len(content) > presets.MAX_BYTES:
        return ""
    return content.decode("utf-8", "replace")
