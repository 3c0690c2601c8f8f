"""What variables and flags say, put into the tree of the configuration's file.

They become values in the place where the file would have them, so that one set of
rules and messages covers all three; each is called by the name that it was given under.
``INFERENCIA_X`` wins over goinfer's ``GI_X``, and a flag wins over both.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from inferencia import yamlfile
from inferencia.fields import Book
from inferencia.secret import Secret
from inferencia.yamlfile import Node, Scalar, Sequence, Style

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


def overlaid(root: yamlfile.Mapping, book: Book, flags: Flags) -> yamlfile.Mapping:
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
    if not has(root, "server.port") and not has(root, "server.listen"):
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


def api_keys(book: Book) -> tuple[Secret, ...] | None:
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


def check_variables(env: Mapping[str, str], book: Book) -> None:
    """Say which variables look meant for us and are not read."""
    known = [f"INFERENCIA_{name}" for name in (*VARIABLES, *_OTHER_VARIABLES)]
    for name in sorted(env):
        if name in _PREDECESSORS_VARIABLES:
            book.warn(name, "not read by this program; use the configuration file")
        elif name.startswith("INFERENCIA_") and name not in known:
            # A typo, not one of the many names that Kubernetes and our own tests set.
            if close := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
                book.warn(name, f"unknown variable; did you mean {close[0]}?")


def has(root: Node, path: str) -> bool:
    """Whether there is something at a key: ``server.port``."""
    for name in path.split("."):
        if not isinstance(root, yamlfile.Mapping) or name not in root.items:
            return False
        root = root.items[name]
    return True
