"""The configuration: one file, the environment, the command line, and their rules.

Later ones win: defaults < file < environment < flags. The file is read strictly
(``yamlfile``), each value by the reader of its key (``settings``, ``fields``); what
variables and flags say is put into the file's tree before it is read, so that one set
of rules and messages covers all three.

Everything wrong is reported together, each as ``path.to.key: message``. What is only
odd is a warning. Whether a key is any good, and whether a usable one is left, is for
``keys`` to say: it alone knows them all. Whether ``--no-api-key`` is safe depends on
what a host's name resolves to, and is for ``serving`` to say.

The example files of both predecessors load as they are: Go-inferencia's ``config.yaml``
and goinfer's ``goinfer.yml``. What they can say and we do not do causes a warning.
"""

import dataclasses
import difflib
import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from inferencia import fields, folders, values, yamlfile
from inferencia.addresses import unbuilt
from inferencia.fields import Book, Place, duration, key, list_of, section
from inferencia.models.definitions import SwapConfig
from inferencia.models.swapfile import read_swap, read_tree
from inferencia.quantities import format_size
from inferencia.secret import Secret
from inferencia.settings import (
    AdminConfig,
    AuthConfig,
    BackendConfig,
    Config,
    LlamaArgs,
    LlamaConfig,
    LogConfig,
    MetricsConfig,
    QueueConfig,
    RateLimitConfig,
    RoleKeys,
    RoutingConfig,
    ServerConfig,
    StateConfig,
    TlsConfig,
    TunnelAcceptConfig,
    TunnelConfig,
    TunnelDialConfig,
    UsageConfig,
    WakeConfig,
    WatchdogConfig,
)
from inferencia.yamlfile import Node, Scalar, Sequence, Style

__all__ = [
    "AdminConfig",
    "AuthConfig",
    "BackendConfig",
    "Config",
    "ConfigErrors",
    "Flags",
    "LlamaArgs",
    "LlamaConfig",
    "Loaded",
    "LogConfig",
    "MetricsConfig",
    "QueueConfig",
    "RateLimitConfig",
    "RoleKeys",
    "RoutingConfig",
    "Secret",
    "ServerConfig",
    "StateConfig",
    "TlsConfig",
    "TunnelAcceptConfig",
    "TunnelConfig",
    "TunnelDialConfig",
    "UsageConfig",
    "WakeConfig",
    "WatchdogConfig",
    "load",
    "located",
]

NOT_YET = "not in this version"

# What can be written in the file and is not built. A value that differs from its
# default is refused, or, where a predecessor's file may hold it, causes a warning with
# this text. Whoever builds one of these deletes its line.
UNBUILT: Mapping[str, str | None] = {
    "backends[].type=anthropic": None,
    "state": None,
}

# Keys of the predecessors that mean nothing here, with the warning they cause.
PREDECESSORS_KEYS: Mapping[str, str] = {
    "observability": "ignored; there is no OpenTelemetry exporter (see docs/scope.md)",
    "log.cloud_format": "ignored; use log.format json",
}

# Variable (after INFERENCIA_) -> key. INFERENCIA_X wins over GI_X.
VARIABLES: Mapping[str, str] = {
    "HOST": "server.host",
    "PORT": "server.port",
    "ORIGINS": "server.origins",
    "API_KEY_ADMIN": "server.api_key.admin",
    "API_KEY_USER": "server.api_key.user",
    "AUTH_KEYS_FILE": "auth.keys_file",
    "RATELIMIT_RPS": "ratelimit.requests_per_second",
    "RATELIMIT_BURST": "ratelimit.burst",
    "MODELS_DIR": "models_dir",
    "LLAMA_EXE": "llama.exe",
    "LOG_LEVEL": "log.level",
    "LOG_FORMAT": "log.format",
    "TUNNEL_TOKEN": "tunnel.dial.token",
}
GOINFER_VARIABLES = (
    "MODELS_DIR",
    "LLAMA_EXE",
    "HOST",
    "ORIGINS",
    "API_KEY_ADMIN",
    "API_KEY_USER",
)
# Set but empty, these mean "none"; all others mean "not set", because that is how
# compose files hand on a variable that nobody set.
EMPTY_MEANS_NONE = frozenset({"ORIGINS"})

# These are read elsewhere: here in other functions, or in folders.py and cli.py.
_OTHER_VARIABLES = (
    "API_KEYS",
    "BACKEND_URL",
    "BACKEND_TYPE",
    "CONFIG",
    "STATE",
)
# Of the predecessors, and not read here. What they set would be missed.
_PREDECESSORS_VARIABLES = (
    "INFERENCIA_LOG_CLOUD_FORMAT",
    "INFERENCIA_OTEL_ENABLED",
    "INFERENCIA_OTEL_ENDPOINT",
    "INFERENCIA_OTEL_SERVICE_NAME",
    "INFERENCIA_KOKORO_URL",
    "INFERENCIA_CHATTERBOX_URL",
    "INFERENCIA_MISOTTS_URL",
    "INFERENCIA_ELEVENLABS_URL",
    "INFERENCIA_WATCHDOG_INTERVAL",
    "INFERENCIA_WATCHDOG_FAIL_THRESHOLD",
    "INFERENCIA_WATCHDOG_TIMEOUT",
    "GI_API_KEY",
    "GI_DEFAULT_MODEL",
    "GI_EXTRA_MODELS",
)

# Only llama-swap's files have these at the top. ("routing" is in both.)
_LLAMA_SWAP_KEYS = frozenset(
    {"models", "groups", "matrix", "macros", "healthCheckTimeout", "startPort", "peers"}
)


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line says; None where it says nothing."""

    host: str | None = None
    port: int | None = None
    no_api_key: bool = False
    demo: bool = False
    # Of ``connect``: the relay's URL, which replaces those of the file.
    relay: str | None = None
    token: Secret | None = None
    name: str | None = None


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
    _check_variables(env, book)
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


# --- the environment and the command line ----------------------------------------


def _overlaid(root: yamlfile.Mapping, book: Book, flags: Flags) -> yamlfile.Mapping:
    """The file's tree with what variables and flags say put in its place."""
    for path, name in _variables():
        empty = name.partition("_")[2] in EMPTY_MEANS_NONE
        value = book.env.get(name, "").strip()
        if value:
            root = _with(root, path, _given(value, name))
        elif empty and name in book.env:
            root = _with(root, path, Sequence())
    root = _with_backend(root, book)
    if flags.host is not None:
        root = _with(root, "server.host", _given(flags.host, "--host"))
    if flags.port is not None:
        root = _with(root, "server.port", _given(str(flags.port), "--port"))
    return root if flags.relay is None else _with_relay(root, flags)


def _with_relay(root: yamlfile.Mapping, flags: Flags) -> yamlfile.Mapping:
    """What ``connect`` says. Its own door is at a free port if nobody named one."""
    assert flags.relay is not None
    relays = Sequence(items=(_given(flags.relay, "connect"),))
    root = _with(root, "tunnel.dial.relays", relays)
    if flags.token is not None:
        token = _given(flags.token.reveal(), "--token")
        root = _with(root, "tunnel.dial.token", token)
    if flags.name is not None:
        root = _with(root, "tunnel.dial.name", _given(flags.name, "--name"))
    if not _has(root, "server.port") and not _has(root, "server.listen"):
        root = _with(root, "server.port", _given("0", "--port"))
    return root


def _variables() -> Iterator[tuple[str, str]]:
    """Key and variable; of two for one key the later one wins."""
    for name in GOINFER_VARIABLES:
        yield VARIABLES[name], f"GI_{name}"
    for name, path in VARIABLES.items():
        yield path, f"INFERENCIA_{name}"


def _given(value: str, label: str) -> Scalar:
    return Scalar(value, Style.FILLED_IN, label=label)


def _with(root: yamlfile.Mapping, path: str, node: Node) -> yamlfile.Mapping:
    """``root`` with ``node`` at ``path``; groups on the way are made if need be."""
    name, dot, rest = path.partition(".")
    if not dot:
        return replace(root, items={**root.items, name: node})
    inner = root.items.get(name, yamlfile.Mapping())
    if isinstance(inner, Scalar) and inner.is_null:
        inner = yamlfile.Mapping()
    if not isinstance(inner, yamlfile.Mapping):
        return root  # the reading of it will say what is wrong
    return replace(root, items={**root.items, name: _with(inner, rest, node)})


def _with_backend(root: yamlfile.Mapping, book: Book) -> yamlfile.Mapping:
    """INFERENCIA_BACKEND_URL and _TYPE change the first backend, or make one."""
    changes: dict[str, Node] = {}
    for key_, name in (
        ("url", "INFERENCIA_BACKEND_URL"),
        ("type", "INFERENCIA_BACKEND_TYPE"),
    ):
        if value := book.env.get(name, "").strip():
            changes[key_] = _given(value, name)
    if not changes:
        return root
    backends = root.items.get("backends", Sequence())
    if isinstance(backends, Scalar) and backends.is_null:
        backends = Sequence()
    if not isinstance(backends, Sequence):
        return root
    first = backends.items[0] if backends.items else yamlfile.Mapping()
    if not isinstance(first, yamlfile.Mapping):
        return root
    if not backends.items and "url" not in changes and not _is_echo(changes["type"]):
        book.error("INFERENCIA_BACKEND_TYPE", "set INFERENCIA_BACKEND_URL as well")
        return root
    first = replace(first, items={**first.items, **changes})
    items = (first, *backends.items[1:])
    return _with(root, "backends", replace(backends, items=items))


def _is_echo(node: Node) -> bool:
    return isinstance(node, Scalar) and node.text.lower() == "echo"


def _api_keys(book: Book) -> tuple[Secret, ...] | None:
    """The keys of INFERENCIA_API_KEYS, None if it is not set."""
    value = book.env.get("INFERENCIA_API_KEYS")
    if value is None:
        return None
    keys = tuple(Secret(part) for item in value.split(",") if (part := item.strip()))
    if not keys:
        book.error(
            "INFERENCIA_API_KEYS",
            "set, but holds no key; write sk-...,sk-... or unset it",
        )
    return keys


def _check_variables(env: Mapping[str, str], book: Book) -> None:
    """Say which variables look meant for us and are not read."""
    known = [f"INFERENCIA_{name}" for name in (*VARIABLES, *_OTHER_VARIABLES)]
    for name in sorted(env):
        if name in _PREDECESSORS_VARIABLES:
            book.warn(name, "not read by this program; use the configuration file")
        elif name.startswith("INFERENCIA_") and name not in known:
            # A typo, not one of the many names that Kubernetes and our own tests set.
            if close := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
                book.warn(name, f"unknown variable; did you mean {close[0]}?")


# --- from the tree to the configuration ------------------------------------------


def _interpreted(root: yamlfile.Mapping, book: Book, flags: Flags) -> Config:
    """Read the whole tree and check what no single value can tell."""
    items = dict(root.items)
    speech = _speech_backends(items.pop("tts_backends", None), book)
    root = _overlaid(replace(root, items=items), book, flags)
    config = section(Config)(Place(root, "", book))
    config = _completed(config, root, book)
    _check_names(config.backends, speech, root, book)
    config = replace(config, backends=config.backends + speech)
    if flags.demo:
        echo = BackendConfig(name="echo", type="echo")
        config = replace(config, backends=(echo,), discover=False, is_demo=True)
    if flags.no_api_key:
        config = replace(config, is_open=True)
    if flags.port is not None:
        # One port was asked for, in place of several addresses.
        config = replace(config, server=replace(config.server, listen={}))
    _check_together(config, book)
    _check_unbuilt(config, book)
    _warn(config, book)
    return config


def _completed(config: Config, root: yamlfile.Mapping, book: Book) -> Config:
    """Fill in what depends on whether a key was given."""
    is_file_given = _has(root, "auth.keys_file")
    auth = replace(
        config.auth,
        keys_file=book.folder / config.auth.keys_file,
        is_keys_file_given=is_file_given,
        api_keys=_api_keys(book),
    )
    server = replace(config.server, is_port_given=_has(root, "server.port"))
    return replace(config, auth=auth, server=server, discover=not config.backends)


def _has(root: Node, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(root, yamlfile.Mapping) or name not in root.items:
            return False
        root = root.items[name]
    return True


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
        if not _has(place.node, name):
            raise fields.Rejected(f"{name} is missing")
    return BackendConfig(
        name=found.name, url=found.url, timeout=found.timeout, models=(found.name,)
    )


# --- checks ----------------------------------------------------------------------


def _check_together(config: Config, book: Book) -> None:
    """What is wrong only in combination."""
    _check_aliases(config.routing, book)
    server = config.server
    for name, other in (("cert", "key"), ("key", "cert")):
        if getattr(server.tls, name) is None and getattr(server.tls, other) is not None:
            book.error(f"server.tls.{name}", f"missing; {other} alone is of no use")
    for address, warning in unbuilt(server):
        book.warn(f"server.listen.{address}", warning)
    _check_tunnel(config, book)
    if server.max_body > server.max_body_total:
        book.warn(
            "server.max_body",
            f"{format_size(server.max_body)} is more than server.max_body_total,"
            f" so bodies above {format_size(server.max_body_total)} are refused",
        )


def _check_tunnel(config: Config, book: Book) -> None:
    dial = config.tunnel.dial
    if dial.relays and dial.token is None:
        book.error(
            "tunnel.dial.token",
            "missing; make one at the relay with: inferencia keys add NAME --role agent"
            " --models 'qwen*'",
        )
    for number, relay in enumerate(dial.relays):
        parts = urlsplit(relay)
        if parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
            book.error(
                f"tunnel.dial.relays[{number}]",
                f"{relay} would send the token in clear; use https:// (http:// is for"
                " 127.0.0.1 and localhost)",
            )
    if dial.passthrough and not dial.relays:
        book.warn("tunnel.dial.passthrough", "of no use without tunnel.dial.relays")
    accept = config.tunnel.accept
    if accept.passthrough is not None and not accept.enabled:
        book.error("tunnel.accept.passthrough", "needs tunnel.accept.enabled, too")
    offers = [service for given in config.server.listen.values() for service in given]
    if config.tunnel.accept.enabled and offers and "tunnel" not in offers:
        book.warn(
            "tunnel.accept.enabled", "no address of server.listen offers it (tunnel)"
        )


def _is_this_machine(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_names(
    backends: tuple[BackendConfig, ...],
    speech: tuple[BackendConfig, ...],
    root: yamlfile.Mapping,
    book: Book,
) -> None:
    nodes = root.items.get("backends")
    if isinstance(nodes, Sequence) and len(nodes.items) != len(backends):
        return  # one could not be read at all, so that no index can be told
    named = [(f"backends[{i}]", backend) for i, backend in enumerate(backends)]
    named += [(f"tts_backends[{i}]", backend) for i, backend in enumerate(speech)]
    first: dict[str, str] = {}
    for here, backend in named:
        if backend.name and backend.name in first:
            book.error(
                f"{here}.name",
                f'"{backend.name}" is the name of {first[backend.name]} too;'
                " every backend needs its own",
            )
        first.setdefault(backend.name, here)


def _check_aliases(routing: RoutingConfig, book: Book) -> None:
    """Refuse names that lead back to themselves.

    Only exact names are followed: ``"*": qwen`` is no circle, because the name of a
    model comes before any alias.
    """
    reported: set[str] = set()
    for alias in routing.aliases:
        chain = [alias]
        while (target := routing.aliases.get(chain[-1])) and target not in chain:
            chain.append(target)
        if target == alias and alias not in reported:
            reported.update(chain)
            circle = " -> ".join([*chain, alias])
            book.error(
                yamlfile.below("routing.aliases", alias),
                f"leads back to itself: {circle}",
            )
    for model, nexts in routing.fallbacks.items():
        if model in nexts:
            path = yamlfile.below("routing.fallbacks", model)
            book.error(path, "a model cannot be its own fallback")


def _check_unbuilt(config: Config, book: Book) -> None:
    for path, warning in UNBUILT.items():
        for here in _enabled(config, path):
            if warning is None:
                book.error(here, NOT_YET)
            else:
                book.warn(here, warning)


def _enabled(config: Config, path: str) -> Iterator[str]:
    """Where the keys at or below ``path`` differ from their defaults."""
    path, _, choice = path.partition("=")
    if path.startswith("backends[]."):
        rest = path.removeprefix("backends[].")
        for index, backend in enumerate(config.backends):
            here = f"backends[{index}].{rest}"
            yield from _differing(backend, BackendConfig(), rest, here, choice)
    else:
        yield from _differing(config, Config(), path, path, choice)


def _differing(
    value: object, default: object, names: str, path: str, choice: str
) -> Iterator[str]:
    for name in names.split("."):
        value, default = getattr(value, name), getattr(default, name)
    if choice:
        if value == choice:
            yield f"{path}: {choice}"
        return
    yield from _leaves(value, default, path)


def _leaves(value: Any, default: Any, path: str) -> Iterator[str]:
    if not dataclasses.is_dataclass(default):
        if value != default:
            yield path
        return
    for name in fields.readers(type(default)):
        inner = (getattr(value, name), getattr(default, name))
        yield from _leaves(*inner, f"{path}.{name}")


# --- warnings --------------------------------------------------------------------


def _warn(config: Config, book: Book) -> None:
    """What works and yet deserves a look."""
    for folder in config.models_dir:
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            book.warn("models_dir", f"{folder} {problem}")
    for number, backend in enumerate(config.backends):
        if backend.daily_spend is not None and not backend.prices:
            book.warn(
                f"backends[{number}].daily_spend",
                "never reached, because it has no prices",
            )
    _warn_of_llama_server(config, book)


def _warn_of_llama_server(config: Config, book: Book) -> None:
    exe = config.llama.exe
    if shutil.which(exe, path=book.env.get("PATH")):
        return
    if exe != LlamaConfig().exe:
        book.warn("llama.exe", f"{exe} is not there, or not executable")
    elif config.models_dir:  # else nobody has asked for it
        book.warn(
            "llama.exe",
            "there is no llama-server on the PATH, so no GGUF file can be served; "
            "install llama.cpp, or give the program's full path",
        )
