"""What a GGUF file's name says: the model's name, its part of a split set, its flags.

The rules are goinfer's, so that its users find their models under the names they know:

    (a) ``group_model-GGUF_rest``, as llama-server's own downloads are called, where
        ``rest`` repeats the model: ``group/model``, and ``:quant`` if a quantisation
        stands before the repetition
    (b) else the first ``_`` becomes ``/`` if a group's name stands before it: 4 to 9
        small letters, or at least 4, a dash and 2 or 3 more (``mistral-ai_``)
    (c) else the folder's name goes before it, if that looks like a group's: at most 13
        small letters, or with a dash as above
    (d) ``-GGUF`` and ``_`` at the end go, ``-GGUF_`` and ``-GGUF:`` become ``:``

(b) takes ``model_name`` for the model ``name`` of ``model``. That is known, and kept.
"""

import re
from dataclasses import dataclass

SUFFIX = ".gguf"
# Behind the name of what our own downloads and uploads fill, and hold a lock on.
PARTIAL_SUFFIX = ".partial"

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
_GROUP = re.compile(r"(?=[^_]{4,11}_.)(?:[a-z]{4,9}|[a-z]{4,9}-[a-z]{2,3})_")
_FOLDER = re.compile(r"(?=.{1,13}\Z)(?:[a-z]+|[a-z]{4,}-[a-z]{2,3})")
_DOWNLOADED = "-GGUF_"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a model that is split into several."""

    stem: str  # what all of them share
    number: int  # from 1
    count: int

    def file_name(self, number: int) -> str:
        """The name of another file of the set."""
        return f"{self.stem}-{number:05}-of-{self.count:05}{SUFFIX}"


def shard(stem: str) -> Shard | None:
    """Which part of a split model ``stem`` (a file name without ``.gguf``) is."""
    match = _SPLIT.fullmatch(stem)
    if match is None:
        return None
    number, count = int(match["number"]), int(match["count"])
    return Shard(match["stem"], number, count) if 1 <= number <= count else None


def name_and_flags(stem: str) -> tuple[str, tuple[str, ...]]:
    """Cut ``name&key=value&key=value`` into the name and ``-key value ...``.

    What has no ``=`` says nothing, as in goinfer.
    """
    name, *pairs = stem.split("&")
    flags: list[str] = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key and equals:
            flags += [f"-{key}", value]
    return name, tuple(flags)


def model_name(stem: str, folder: str = "") -> str:
    """The name under which a model is offered.

    Args:
        stem: the file's name without ``.gguf``, split suffix and flags.
        folder: the name of the folder that holds it; empty for a folder that is
            searched itself, since that is the user's and no group's.
    """
    return _downloaded(stem) or _tidied(_grouped(stem, folder))


def _downloaded(stem: str) -> str:
    before, found, rest = stem.partition(_DOWNLOADED)
    group, underscore, model = before.partition("_")
    if not (found and group and underscore and model):
        return ""
    repeated = re.match(rf"(?:(.+?)_)?{re.escape(model)}(?![A-Za-z0-9])", rest)
    if repeated is None:
        return ""
    return f"{group}/{model}:{repeated[1]}" if repeated[1] else f"{group}/{model}"


def _grouped(stem: str, folder: str) -> str:
    if match := _GROUP.match(stem):
        return f"{match[0][:-1]}/{stem[match.end() :]}"
    return f"{folder}/{stem}" if _FOLDER.fullmatch(folder) else stem


def _tidied(name: str) -> str:
    name = name.removesuffix("_").removesuffix("-GGUF")
    return name.replace("-GGUF_", ":", 1).replace("-GGUF:", ":", 1)
