"""What the files beside a model say of how to run it.

    NAME.sh, NAME.args        flags for NAME.gguf: its lines that begin with ``-``
    any other *.sh            a command line with ``llama-server`` and ``-m``: one more
                              model, named after the script
    params.yml, templates.yml a mapping from a model's name to its ``ctx`` and ``flags``

A script is read, never run: its words become arguments as a shell would split them,
and nothing else of the shell is understood. ``$DIR`` is the folder of the file.

Options that would take the server away from us are left out: where it listens, which
model it serves, and its own key. Pure: texts come in as arguments.
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from .. import yamlfile

# A sidecar has some ten lines. What is longer is no such file.
MAX_BYTES = 64 * 1024

_SERVER = "llama-server"
_MODEL = frozenset({"-m", "--model"})
# Each has one value.
_OURS = _MODEL | {
    "--host",
    "--port",
    "--api-key",
    "--api-key-file",
    "--api-prefix",
    "--ssl-key-file",
    "--ssl-cert-file",
}
# Where a command ends: a pipe, a redirection, the next command.
_END_OF_COMMAND = re.compile(r"[0-9]*[<>|;&]")
_ALL_ARGUMENTS = frozenset({"$@", "$*", "${@}", "${*}"})
_CONTEXT = frozenset({"-c", "--ctx-size"})


class BadPreset(ValueError):
    """The text cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A model that a script describes."""

    model: str  # path as written, ``$DIR`` and ``~`` not yet replaced
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Params:
    """What ``params.yml`` says of one model."""

    context: int = 0  # tokens; 0: nothing
    flags: tuple[str, ...] = ()

    def added_to(self, flags: Sequence[str]) -> tuple[str, ...]:
        """``flags``, or ours where there are none, and the context if it is not set."""
        combined = tuple(flags) or self.flags
        if self.context and not _CONTEXT & set(combined):
            combined += ("-c", str(self.context))
        return combined


def sidecar_flags(text: str) -> tuple[str, ...]:
    """The flags in a ``NAME.sh`` or ``NAME.args``.

    Raises:
        BadPreset: a line has a quotation mark too many.
    """
    flags: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.rstrip().removesuffix("\\").strip()
        if stripped.startswith("-"):
            flags += _words(stripped, number)
    return without_ours(flags)


def script_preset(text: str) -> Preset | None:
    """The model that a script's llama-server command describes; None: it has none.

    goinfer keeps only the flags behind the model's; here those before it count too.

    Raises:
        BadPreset: there is such a command, but it cannot be split into words.
    """
    for number, line in _commands(text):
        if _SERVER not in line:
            continue
        words = _words(line, number)
        places = [i for i, word in enumerate(words) if PurePath(word).name == _SERVER]
        if not places:
            continue
        arguments = list(_until_end(words[places[0] + 1 :]))
        model = _value(arguments, _MODEL)
        if model:
            return Preset(model, without_ours(arguments))
    return None


def parse_params(content: bytes) -> dict[str, Params]:
    """What a ``params.yml`` or ``templates.yml`` says, by the model's name.

    Entries of another form are left out: such files hold more than is used here.

    Raises:
        BadPreset: it is no YAML (JSON is YAML).
    """
    try:
        root = yamlfile.parse(content).root
    except yamlfile.YamlError as error:
        raise BadPreset(str(error)) from None
    if not isinstance(root, yamlfile.Mapping):
        return {}
    return {
        name: _params(node.items)
        for name, node in root.items.items()
        if isinstance(node, yamlfile.Mapping)
    }


def without_ours(flags: Sequence[str]) -> tuple[str, ...]:
    """Leave out the options that are ours to set, with their values."""
    kept: list[str] = []
    skip = False
    for flag in flags:
        if skip:
            skip = False
        elif flag in _OURS:
            skip = True
        elif flag.partition("=")[0] not in _OURS:
            kept.append(flag)
    return tuple(kept)


def in_folder(flags: Sequence[str], folder: str) -> tuple[str, ...]:
    """Replace ``$DIR`` by the folder."""
    return tuple(
        flag.replace("${DIR}", folder).replace("$DIR", folder) for flag in flags
    )


def _words(line: str, number: int) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise BadPreset(f"line {number}: {str(error).lower()}") from None
    comments = [i for i, word in enumerate(words) if word.startswith("#")]
    return words[: comments[0]] if comments else words


def _commands(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their continuations joined; comments are left out.

    A first line ``#!/path/llama-server ...`` is a command, as it is for the system.
    """
    joined, begun = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if number == 1 and stripped.startswith("#!"):
            stripped = stripped.removeprefix("#!")
        elif stripped.startswith("#"):
            continue
        begun = begun or number
        joined += stripped.removesuffix("\\") + " "
        if not stripped.endswith("\\"):
            yield begun, joined
            joined, begun = "", 0
    if joined:
        yield begun, joined


def _until_end(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if _END_OF_COMMAND.match(word):
            return
        if word in _ALL_ARGUMENTS:
            continue
        if word.endswith(";"):
            yield word.removesuffix(";")
            return
        yield word


def _value(words: Sequence[str], names: frozenset[str]) -> str:
    for name, value in itertools.pairwise(words):
        if name in names:
            return value
    return ""


def _params(items: Mapping[str, yamlfile.Node]) -> Params:
    context, flags = items.get("ctx"), items.get("flags")
    number = context.number if isinstance(context, yamlfile.Scalar) else None
    tokens = number if isinstance(number, int) and number > 0 else 0
    words: list[str] = []
    if isinstance(flags, yamlfile.Scalar) and not flags.is_null:
        words = _words(flags.text, flags.line)
    elif isinstance(flags, yamlfile.Sequence):
        words = [item.text for item in flags.items if isinstance(item, yamlfile.Scalar)]
    return Params(tokens, without_ours(words))
