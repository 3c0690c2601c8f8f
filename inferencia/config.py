"""The configuration: one file, the environment, the command line, and their rules.

Later ones win: defaults < file < environment < flags.

    1. the file becomes a tree (``yamlfile``)
    2. what variables and flags say is put into it (``overlay``)
    3. each value is read by the reader of its key (``settings``, ``fields``)
    4. all of it is held together (``configrules``)

Everything wrong is reported together, each as ``path.to.key: message``. What is only
odd is a warning. Whether a key is any good, and whether a usable one is left, is for
``keys`` to say: it alone knows them all. Whether ``--no-api-key`` is safe depends on
what a host's name resolves to, and is for ``admission`` to say.

The example files of both predecessors load as they are: Go-inferencia's ``config.yaml``
and goinfer's ``goinfer.yml``. What they can say and we do not do causes a warning.
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inferencia import configrules, fields, folders, values, yamlfile
from inferencia.fields import Book, Place, duration, key, list_of, section
from inferencia.models.definitions import SwapConfig
from inferencia.models.swapfile import read_swap, read_tree
from inferencia.overlay import Flags, api_keys, check_variables, has, overlaid
from inferencia.settings import BackendConfig, Config
from inferencia.yamlfile import Node

# Keys of the predecessors that mean nothing here, with the warning they cause.
PREDECESSORS_KEYS: Mapping[str, str] = {
    "observability": "ignored; there is no OpenTelemetry exporter (see docs/scope.md)",
    "log.cloud_format": "ignored; use log.format json",
}

# Only llama-swap's files have these at the top. ("routing" is in both.)
_LLAMA_SWAP_KEYS = frozenset(
    {"models", "groups", "matrix", "macros", "healthCheckTimeout", "startPort", "peers"}
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that can be run with."""

    config: Config
    warnings: tuple[str, ...]  # each "path.to.key: message"
    source: Path | None  # the file, or None if there is none
    is_foreign: bool = False  # whether it is llama-swap's or goinfer's own file
    is_swap: bool = False  # whether all of it is llama-swap's

    @property
    def folder(self) -> Path:
        """What relative paths in it are relative to."""
        return _folder(self.source)


class ConfigErrors(Exception):
    """Everything that is wrong, each as ``path.to.key: message``."""

    def __init__(self, errors: tuple[str, ...], source: Path | None) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors
        self.source = source

    def lines(self) -> list[str]:
        """One line for each error, with the file's name where it is from the file."""
        return [located(error, self.source) for error in self.errors]


def _folder(source: Path | None) -> Path:
    return source.absolute().parent if source else Path.cwd()


def located(message: str, source: Path | None) -> str:
    """``config.yaml: server.port: …``, unless a variable or a flag is meant."""
    is_from_file = not message.startswith(("INFERENCIA_", "GI_", "--"))
    return f"{source}: {message}" if source and is_from_file else message


def load(
    path: Path | None,
    env: Mapping[str, str],
    flags: Flags,
    content: bytes | None = None,
) -> Loaded:
    """Find, read and check the configuration.

    Args:
        path: the file that was asked for by ``-c``; None to look for one.
        env: the environment.
        flags: what ``serve`` was told on the command line.
        content: what would be in the file, to be checked; None: what is in it.

    Raises:
        ConfigErrors: with every error that was found.
    """
    source = folders.find_config(path, env)
    folder = _folder(source)
    book = Book(env, folder, known=all_keys(), tolerated=PREDECESSORS_KEYS)
    root: Node = yamlfile.Mapping()
    is_llama_swap = False
    if source:
        root, is_llama_swap = _read(source, book, content)
    if is_llama_swap and isinstance(root, yamlfile.Mapping):
        root = yamlfile.Mapping({"swap": root})
    if isinstance(root, yamlfile.Mapping):
        config = _interpreted(root, book, flags)
        swap = _swap_config(config.swap, source, book, is_whole_file=is_llama_swap)
        secret = frozenset(book.secret_variables)
        config = replace(config, swap_config=swap, secret_variables=secret)
    else:
        place = Place(root, "", book)
        book.error(
            "", f"expected keys such as server and backends, got {place.shown()}"
        )
        config = Config()
    check_variables(env, book)
    if book.errors:
        raise ConfigErrors(tuple(book.errors), source)
    is_goinfers = source is not None and source.stem.startswith("goinfer")
    is_foreign = is_llama_swap or is_goinfers
    warnings = tuple(book.warnings)
    return Loaded(config, warnings, source, is_foreign, is_swap=is_llama_swap)


@functools.cache
def all_keys() -> tuple[str, ...]:
    """Every key that there is: ``server``, ``server.host``, ``backends[].name``."""
    return tuple(_keys_of(Config, ""))


def _keys_of(group: type[Any], path: str) -> Iterator[str]:
    for name in fields.readers(group):
        here = f"{path}{name}"
        yield here
        if group is Config and name == "backends":
            yield from _keys_of(BackendConfig, "backends[].")
        elif dataclasses.is_dataclass(inner := _default(group, name)):
            yield from _keys_of(type(inner), f"{here}.")


def _default(group: type[Any], name: str) -> object:
    return getattr(group(), name)


# --- the file --------------------------------------------------------------------


def _read(source: Path, book: Book, content: bytes | None) -> tuple[Node, bool]:
    """The file's tree, and whether it is llama-swap's.

    What stops the reading is an error that stands alone.
    """
    try:
        if content is None:
            content = _content(source)
        document = yamlfile.parse(content, merge_keys=True)
        is_llama_swap = _is_llama_swap(source, document.root)
        if document.has_merge_keys and not is_llama_swap:
            document = yamlfile.parse(content)  # says where they are
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigErrors((f"cannot read it: {reason}",), source) from None
    except yamlfile.YamlError as error:
        hint = "; expected a YAML file" if source.suffix in (".ini", ".toml") else ""
        raise ConfigErrors((f"{error}{hint}",), source) from None
    book.errors.extend(document.problems)
    return document.root, is_llama_swap


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(yamlfile.MAX_BYTES + 1)


def _is_llama_swap(source: Path, root: Node) -> bool:
    if source.suffix in (".yml", ".yaml") and source.stem.startswith("llama-swap"):
        return True
    if not isinstance(root, yamlfile.Mapping):
        return False
    ours = fields.readers(Config).keys() - {"routing"}
    names = root.items.keys()
    return bool(names & _LLAMA_SWAP_KEYS) and not names & ours


def _swap_config(
    node: Node | None, source: Path | None, book: Book, *, is_whole_file: bool
) -> SwapConfig | None:
    """The llama-swap configuration: inline, the file that is named, or a neighbour.

    goinfer reads a llama-swap.yml that lies beside its goinfer.yml.
    """
    if isinstance(node, yamlfile.Mapping):
        root = "" if is_whole_file else "swap"
        swap = read_tree(node, book, root)
        _warn_of_programs(swap, f"{root}." if root else "", book)
        return swap
    if node is not None:
        try:
            path = values.file_path(Place(node, "swap", book))
        except fields.Rejected as rejected:
            book.error("swap", str(rejected))
            return None
        return _swap_file(path, f"swap: {path.name}: ", book)
    if source is None or not source.stem.startswith("goinfer"):
        return None
    neighbour = source.absolute().parent / "llama-swap.yml"
    if not neighbour.exists():
        return None
    return _swap_file(neighbour, f"{neighbour.name}: ", book)


def _swap_file(path: Path, label: str, book: Book) -> SwapConfig | None:
    """A file of llama-swap's; ``label`` begins every message about it."""
    try:
        content = _content(path)
    except OSError as error:
        book.error("", f"{label}cannot read {path}: {error.strerror or error}")
        return None
    reading = read_swap(content, book.env)
    book.errors.extend(f"{label}{error}" for error in reading.errors)
    book.warnings.extend(f"{label}{warning}" for warning in reading.warnings)
    book.secret_variables |= reading.secret_variables
    _warn_of_programs(reading.config, label, book)
    return reading.config


def _warn_of_programs(swap: SwapConfig, label: str, book: Book) -> None:
    """Models whose program is not there; the others are served nevertheless."""
    for model in swap.models:
        path = dict(model.env).get("PATH", book.env.get("PATH"))
        program = model.command[0] if model.command else ""
        if program and not shutil.which(program, path=path):
            place = yamlfile.below(yamlfile.below("models", model.id), "cmd")
            book.warn(f"{label}{place}", f"{program} is not there, or not executable")


# --- from the tree to the configuration ------------------------------------------


def _interpreted(root: yamlfile.Mapping, book: Book, flags: Flags) -> Config:
    """Read the whole tree and check what no single value can tell."""
    items = dict(root.items)
    speech = _speech_backends(items.pop("tts_backends", None), book)
    root = overlaid(replace(root, items=items), book, flags)
    config = section(Config)(Place(root, "", book))
    config = _completed(config, root, book)
    configrules.check_names(config.backends, speech, root, book)
    config = replace(config, backends=config.backends + speech)
    if flags.demo:
        echo = BackendConfig(name="echo", type="echo")
        config = replace(config, backends=(echo,), discover=False, is_demo=True)
    if flags.no_api_key:
        config = replace(config, is_open=True)
    if flags.port is not None:
        # One port was asked for, in place of several addresses.
        config = replace(config, server=replace(config.server, listen={}))
    configrules.check(config, book)
    return config


def _completed(config: Config, root: yamlfile.Mapping, book: Book) -> Config:
    """Fill in what depends on whether a key was given."""
    is_file_given = has(root, "auth.keys_file")
    auth = replace(
        config.auth,
        keys_file=book.folder / config.auth.keys_file,
        is_keys_file_given=is_file_given,
        api_keys=api_keys(book),
    )
    server = replace(config.server, is_port_given=has(root, "server.port"))
    return replace(config, auth=auth, server=server, discover=not config.backends)


@dataclass(frozen=True, slots=True)
class _SpeechBackend:
    """``tts_backends[]`` of Go-inferencia: a model is chosen by the backend's name."""

    name: str = key(fields.text, "")
    url: str = key(values.url, "")
    timeout: float = key(duration(), 30.0)


def _speech_backends(node: Node | None, book: Book) -> tuple[BackendConfig, ...]:
    """``tts_backends`` as backends that offer one model of their own name."""
    if node is None:
        return ()
    try:
        read = list_of(_speech_backend)(Place(node, "tts_backends", book))
    except fields.Rejected as rejected:
        book.error("tts_backends", str(rejected))
        return ()
    if read:
        book.warn("tts_backends", "taken as backends that offer a model of their name")
    return read


def _speech_backend(place: Place) -> BackendConfig:
    found = section(_SpeechBackend)(place)
    for name in ("name", "url"):
        if not has(place.node, name):
            raise fields.Rejected(f"{name} is missing")
    return BackendConfig(
        name=found.name, url=found.url, timeout=found.timeout, models=(found.name,)
    )
