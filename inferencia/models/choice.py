"""Which files of a repository are meant by ``OWNER/NAME:QUANT``.

Pure decisions on a list of files. A model is one GGUF file or a complete set of parts
(``-00001-of-00003.gguf``); a projector (``mmproj``) in the repository comes with it.
Names come from a server and are not trusted: what could leave its folder, hide, or
mean options (in a file name ``&key=value`` becomes an argument of llama-server) is no
choice at all.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What most people want: a quarter of the size at little loss.
DEFAULT_QUANT = "Q4_K_M"

# File systems take 255 bytes; ours get a suffix while they are being loaded.
MAX_NAME_BYTES = 230

# No model has as many parts; the largest have some sixty.
MAX_PARTS = 1000

# No file is larger than a petabyte; a size beyond that is a mistake or a trick.
MAX_FILE_BYTES = 2**50

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_QUANT_ASKED = re.compile(r"[\w][\w.+/-]{0,199}", re.ASCII)
_HOSTS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://|hf:", re.I
)
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})", re.DOTALL)
_LABEL = re.compile(
    r"(?<![A-Za-z0-9])"
    r"((?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[1-2]_[0-9]|MXFP4(?:_[A-Z0-9]+)?|NVFP4"
    r"|BF16|FP?16|FP?32))"
    r"(?![A-Za-z0-9])",
    re.I,
)
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_GIT_OID = re.compile(r"[0-9a-f]{40}")

# Projectors are small; F16 is what llama.cpp's own downloads prefer.
_PROJECTORS = ("F16", "FP16", "BF16", "Q8_0", "F32", "FP32")


class DownloadError(Exception):
    """A download that cannot be, or has failed; ``str()`` is a line for a person."""


class BadReference(DownloadError):
    """What was asked for is no name of a repository."""


class NoSuchModel(DownloadError):
    """The repository has no such model, or several.

    ``choices`` are those that can be had: what to ask for, and its size in bytes.
    """

    def __init__(self, message: str, choices: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(message)
        self.choices = tuple(choices)


@dataclass(frozen=True, slots=True)
class Reference:
    """What somebody asks for."""

    repository: str  # OWNER/NAME
    quant: str | None = None  # such as Q4_K_M, or a file's name; None: the usual one

    def __str__(self) -> str:
        return f"{self.repository}:{self.quant}" if self.quant else self.repository


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository, as its listing describes it."""

    path: str
    size: int  # bytes
    sha256: str | None = None  # of a file in large-file storage, where models are
    git_oid: str | None = None  # SHA-1 of any other file, as git computes it

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """Its path without the name."""
        return self.path.rpartition("/")[0]

    @property
    def checksum(self) -> str | None:
        """What tells its content from any other; None if the server does not say."""
        return self.sha256 or self.git_oid


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a repository: its parts in order, or its only file."""

    path: str  # without the part's number and ``.gguf``
    files: tuple[RemoteFile, ...]
    missing: int = 0  # how many parts the repository lacks

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(file.size for file in self.files)

    @property
    def label(self) -> str:
        """Its quantisation in capitals, from its name or else its folder; "" if none"""
        folder, _, stem = self.path.rpartition("/")
        for text in (stem, folder):
            if found := _LABEL.findall(text):
                return str(found[-1]).upper()
        return ""

    @property
    def asked_by(self) -> str:
        """What to write behind the colon to get it."""
        return self.label or self.path

    def names(self) -> set[str]:
        """What it may be called outright, in lower case."""
        folder, _, stem = self.path.rpartition("/")
        texts = {self.path, stem, folder.rpartition("/")[2], folder}
        texts |= {f"{self.path}.gguf", f"{stem}.gguf"}
        for file in self.files:
            texts |= {file.path, file.name}
        return {text.lower() for text in texts if text}


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be fetched."""

    model: Model
    projector: RemoteFile | None

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """All of it; the file by which a model is found comes last."""
        first, *others = self.model.files
        projector = () if self.projector is None else (self.projector,)
        return (*projector, *others, first)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def parse_reference(text: str) -> Reference:
    """``OWNER/NAME[:QUANT]``, also as the address of its page.

    Raises:
        BadReference: it is something else.
    """
    text = text.strip()
    rest = _HOSTS.sub("", text, count=1) if _HOSTS.match(text) else text
    repository, colon, quant = rest.partition(":")
    repository = repository.removesuffix("/")
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise BadReference(
            f"expected OWNER/NAME or OWNER/NAME:QUANT, such as "
            f'unsloth/Qwen3-8B-GGUF:Q4_K_M, got "{text[:200]}"'
        )
    if colon and not _QUANT_ASKED.fullmatch(quant):
        raise BadReference(f'expected a quantisation such as Q4_K_M, got "{quant}"')
    return Reference(repository, quant or None)


def remote_file(entry: object) -> RemoteFile | None:
    """One entry of a listing; None if it is no GGUF file that could be kept."""
    if not isinstance(entry, dict) or entry.get("type", "file") != "file":
        return None
    path, size = entry.get("path"), entry.get("size")
    lfs = entry.get("lfs")
    sha256 = None
    if isinstance(lfs, dict):
        size = lfs.get("size", size)
        if found := _SHA256.fullmatch(str(lfs.get("oid") or lfs.get("sha256"))):
            sha256 = found[1]
    if not isinstance(path, str) or not is_safe(path) or not _is_gguf(path):
        return None
    if not isinstance(size, int) or not 0 <= size <= MAX_FILE_BYTES:
        return None
    oid = None if lfs else entry.get("oid")
    is_oid = isinstance(oid, str) and _GIT_OID.fullmatch(oid)
    return RemoteFile(path, size, sha256, oid if is_oid else None)


def is_safe(path: str) -> bool:
    """Whether a path from a server can be asked for, and its name be used here."""
    parts = path.split("/")
    return (
        0 < len(path) <= 1000
        and all(part and not part.startswith(".") for part in parts)
        and not any(bad in path for bad in ("\\", "&", "$", ":"))
        and not any(map(_is_invisible, path))
        and len(parts[-1].encode("utf-8")) <= MAX_NAME_BYTES
        and not parts[-1].startswith("-")
    )


def _is_invisible(char: str) -> bool:
    """Control and format characters, and all blanks but the usual one."""
    return char != " " and unicodedata.category(char)[0] in "CZ"


def _is_gguf(path: str) -> bool:
    return path.lower().endswith(".gguf")


def choose(files: Iterable[RemoteFile], reference: Reference) -> Choice:
    """The files that are meant.

    Without a quantisation it is Q4_K_M, else the only model. With one, a model of
    exactly this quantisation comes before one that merely is called so (a folder or a
    file), and that before one of Unsloth's dynamic kind (``UD-``).

    Raises:
        NoSuchModel: none is meant, several are, or a part of it is missing.
    """
    listed = list({file.path: file for file in files}.values())
    models = _models(listed)
    if not models:
        raise NoSuchModel(f"{reference.repository} has no GGUF files")
    meant = _meant(models, reference.quant)
    if len(meant) != 1:
        raise _unclear(meant, models, reference)
    (model,) = meant
    if model.missing:
        raise NoSuchModel(
            f"{reference.repository} lacks {model.missing} of the parts of {model.path}"
        )
    return Choice(model, _projector(listed, model))


def _models(files: Sequence[RemoteFile]) -> list[Model]:
    """All models, those of many parts put together, in the order of the listing."""
    sets: dict[str, list[RemoteFile]] = {}
    for file in files:
        if _is_projector(file) or file.name.lower().startswith("imatrix"):
            continue
        stem = file.path[: -len(".gguf")]
        part = _PART.fullmatch(stem)
        sets.setdefault(f"{part[1]} of {part[3]}" if part else stem, []).append(file)
    return [_model(members) for members in sets.values()]


def _model(members: Sequence[RemoteFile]) -> Model:
    stem = members[0].path[: -len(".gguf")]
    part = _PART.fullmatch(stem)
    if part is None:
        return Model(stem, (members[0],))
    ordered = tuple(sorted(members, key=lambda file: file.path))
    count = int(part[3])
    numbers = {int(file.path[-len("00001-of-00003.gguf") :][:5]) for file in ordered}
    if count > MAX_PARTS:
        return Model(part[1], ordered, missing=count)
    missing = len(set(range(1, count + 1)) - numbers)
    return Model(part[1], ordered, missing)


def _meant(models: Sequence[Model], quant: str | None) -> list[Model]:
    asked = (quant or DEFAULT_QUANT).lower()
    tiers = (
        [model for model in models if model.label.lower() == asked],
        [model for model in models if asked in model.names()],
        [model for model in models if model.path.lower().endswith(f"-{asked}")],
        [model for model in models if model.label.lower() == f"ud-{asked}"],
    )
    if quant is None:
        return tiers[0] or (list(models) if len(models) == 1 else [])
    return next((tier for tier in tiers if tier), [])


def _unclear(
    meant: Sequence[Model], models: Sequence[Model], reference: Reference
) -> NoSuchModel:
    where, quant = reference.repository, reference.quant
    if meant:
        # Their labels are the same; only names tell them apart.
        return NoSuchModel(
            f'{where} has {len(meant)} models "{quant or DEFAULT_QUANT}"; '
            "name one behind the colon",
            [(model.path, model.size) for model in meant],
        )
    said = f'no "{quant}"' if quant else f"several models and no {DEFAULT_QUANT}"
    choices = [(model.asked_by, model.size) for model in models]
    return NoSuchModel(f"{where} has {said}; name another behind the colon", choices)


def _is_projector(file: RemoteFile) -> bool:
    return "mmproj" in file.name.lower()


def _projector(files: Sequence[RemoteFile], model: Model) -> RemoteFile | None:
    """The projector to use: in the model's folder or at the top, best kind first."""
    folder = model.path.rpartition("/")[0]
    near = [
        file
        for file in files
        if _is_projector(file)
        and f"{folder}/".startswith(f"{file.folder}/".lstrip("/"))
    ]

    def rank(file: RemoteFile) -> tuple[int, int]:
        found = [label.upper() for label in _LABEL.findall(file.name)]
        kinds = [_PROJECTORS.index(label) for label in found if label in _PROJECTORS]
        return (-len(file.folder), kinds[-1] if kinds else len(_PROJECTORS))

    return min(near, key=rank, default=None)
