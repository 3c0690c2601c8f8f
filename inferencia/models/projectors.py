"""Which projector (``mmproj``) goes with which model in the same folder.

A projector turns images or sound into input for one model. llama-server wants it named
beside the model, and a wrong one keeps the model from loading; so in doubt there is
none. In order:

    1. A projector whose name holds a model's name goes with the models that it fits
       best: ``mmproj-gemma-3-4b-it-f16`` with ``gemma-3-4b-it-Q4_K_M``.
    2. One without such a name (``mmproj-F16``) goes with all models in the folder that
       have no projector yet, if these are one model in several quantisations.
    3. So does one with another name, if its output has the size of the model's input.

Pure. Of several that fit a model, F16 is taken before BF16 (which older hardware
computes slowly), F32, and the quantised.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .gguf import Header

_WORDS = re.compile(r"[^a-z0-9.]+")
_PRECISION = re.compile(
    r"(?:\A|[-_.])(?:ud-)?(?:bf16|fp?16|fp?32|mxfp4|i?q[0-9](?:_[a-z0-9]+)*)(?=[-_.]|\Z)"
)
# What says nothing of the model.
_GENERIC = frozenset(
    "mmproj mm proj projector model ggml gguf clip vision audio encoder".split()
)
_PRECISIONS = ("f16", "bf16", "f32")
# Of the words in the projector's name, how many must be in the model's.
_ALIKE = 0.6


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file in the folder, model or projector."""

    stem: str  # name without ``.gguf`` and split suffix
    header: Header


def is_projector(stem: str, header: Header | None) -> bool:
    """Whether a file is a projector: its header decides, else its name."""
    if header is not None and (header.architecture or header.kind):
        return header.is_projector
    return "mmproj" in stem.lower()


def assign(
    models: Sequence[Candidate], projectors: Sequence[Candidate]
) -> dict[str, str]:
    """The projector's stem for each model's that has one, within one folder."""
    chosen: dict[str, str] = {}
    rest: list[Candidate] = []
    for projector in sorted(projectors, key=_preference):
        alike = _best_by_name(projector, models)
        for model in alike:
            chosen.setdefault(model.stem, projector.stem)
        if not alike:
            rest.append(projector)
    for projector in rest:
        left = [model for model in models if model.stem not in chosen]
        if _goes_with_all(projector, left):
            chosen.update({model.stem: projector.stem for model in left})
    return chosen


def unused(projectors: Sequence[Candidate], chosen: Mapping[str, str]) -> list[str]:
    """Stems of projectors where no projector in the folder found a model."""
    if chosen:
        return []  # others are the same one in another precision, more often than not
    return [projector.stem for projector in projectors]


def _words(stem: str) -> list[str]:
    words = _WORDS.split(_PRECISION.sub("", stem.lower()))
    return [word for word in words if word and word not in _GENERIC]


def _preference(projector: Candidate) -> tuple[int, str]:
    words = _WORDS.split(projector.stem.lower())
    for rank, precision in enumerate(_PRECISIONS):
        if precision in words:
            return rank, projector.stem
    return len(_PRECISIONS), projector.stem


def _best_by_name(projector: Candidate, models: Sequence[Candidate]) -> list[Candidate]:
    words = _words(projector.stem)
    if not words:
        return []
    scores = {model.stem: _likeness(words, _words(model.stem)) for model in models}
    best = max(scores.values(), default=0.0)
    if best < _ALIKE:
        return []
    return [model for model in models if scores[model.stem] == best]


def _likeness(words: Sequence[str], others: Sequence[str]) -> float:
    """The share of ``words`` that the other name has too.

    None, if a word with a digit is missing: ``4b`` is not ``12b``, nor 3 a 4.
    """
    missing = [word for word in words if word not in others]
    if any(character.isdigit() for word in missing for character in word):
        return 0.0
    return 1 - len(missing) / len(words)


def _goes_with_all(projector: Candidate, models: Sequence[Candidate]) -> bool:
    shapes = {_shape(model.header) for model in models}
    if len(shapes) != 1:
        return False
    if not _words(projector.stem):
        return True
    length = projector.header.projection_length
    return bool(length) and length == models[0].header.embedding_length


def _shape(header: Header) -> tuple[str, int, int, int]:
    """What all quantisations of one model have in common."""
    return (
        header.architecture,
        header.embedding_length,
        header.block_count,
        header.feed_forward_length,
    )
