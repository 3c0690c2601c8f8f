"""Deleting a model: which files are its own, and who else needs them.

A model may have several parts, a file with its flags beside it, a projector that others
share, what is left of an unfinished download, and, in caches, links to files elsewhere.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inferencia.models.finding import Findings, FoundModel
from inferencia.models.naming import PARTIAL_SUFFIX, SUFFIX, shard

# Beside ``NAME.gguf``, with its flags; see ``presets``.
_SIDECARS = (".sh", ".args")


@dataclass(frozen=True, slots=True)
class Removal:
    """The files that would go with a model."""

    paths: tuple[Path, ...]
    size: int  # bytes

    def carry_out(self, searched: Sequence[Path]) -> None:
        """Delete them, and the folders that are empty then, up to those searched.

        Raises:
            OSError: one cannot be deleted; those before it are gone.
        """
        for path in self.paths:
            path.unlink(missing_ok=True)
        if self.paths:
            _remove_empty(self.paths[0].parent, searched)


def removal(model: FoundModel, findings: Findings, searched: Sequence[Path]) -> Removal:
    """What only this model needs; nothing is deleted yet.

    Args:
        model: one of ``findings``.
        findings: all models.
        searched: the folders of models, beyond which nothing is touched.
    """
    paths = tuple(_doomed(model, parts_of(model), findings, searched))
    return Removal(paths, sum(map(_size, paths)))


def describes_another(model: FoundModel) -> bool:
    """Whether a script elsewhere makes the model of a file that has its own name."""
    if not model.origin.endswith(".sh"):
        return False
    return Path(model.origin) not in _beside(parts_of(model))


def parts_of(model: FoundModel) -> list[Path]:
    """The files of a model that are there, of which a split one has several."""
    part = shard(model.path.name.removesuffix(SUFFIX))
    if part is None:
        return [model.path]
    names = (part.file_name(number) for number in range(1, part.count + 1))
    paths = [model.path.with_name(name) for name in names]
    return [path for path in paths if os.path.lexists(path)] or [model.path]


def _beside(parts: Sequence[Path]) -> list[Path]:
    """Where the files with a model's flags may be; see ``finding``."""
    stem = parts[0].name.removesuffix(SUFFIX)
    part = shard(stem)
    stems = {stem, part.stem if part else stem}
    return [parts[0].with_name(one + suffix) for one in stems for suffix in _SIDECARS]


def _doomed(
    model: FoundModel,
    parts: Sequence[Path],
    findings: Findings,
    searched: Sequence[Path],
) -> list[Path]:
    """All files to delete with a model: what only it needs."""
    others = [other for other in findings.models if other is not model]
    found = [*parts]
    found += [path for path in _beside(parts) if path.is_file()]
    if model.mmproj and not any(other.mmproj == model.mmproj for other in others):
        found.append(model.mmproj)
    for path in tuple(found):
        partial = path
        if path.suffix != PARTIAL_SUFFIX:  # of a download that was given up, perhaps
            partial = path.with_name(path.name + PARTIAL_SUFFIX)
        note = partial.with_name(partial.name + ".json")
        found += [left for left in (partial, note) if left.is_file()]
    # Caches keep links to files that are named by their checksum.
    targets = [Path(os.path.realpath(path)) for path in found if path.is_symlink()]
    roots = [Path(os.path.realpath(folder)) for folder in searched]
    found += [
        target
        for target in targets
        if target.is_file() and any(target.is_relative_to(root) for root in roots)
    ]
    return list(dict.fromkeys(found))


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def _remove_empty(folder: Path, searched: Sequence[Path]) -> None:
    """Remove folders that are empty now, up to those that are searched."""
    roots = {os.path.realpath(root) for root in searched}
    with contextlib.suppress(OSError):
        while os.path.realpath(folder) not in roots:
            folder.rmdir()
            folder = folder.parent
