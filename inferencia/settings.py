"""Every key of the configuration, with its type, its default and its range.

One frozen dataclass for each group of keys; ``Config`` is the whole. This is what the
rest of the program works with: durations are seconds (float), sizes are bytes (int),
paths are absolute, secrets are ``Secret``. Each component gets its own group, never
the tree. What the keys mean to a user stands in ``config.example.yaml``, and a test
holds the two together.

Fields made by ``key`` and ``part`` can be written in the file. The few others are
filled in by ``config.py``, from the environment, the command line, or from whether a
key was given at all.
"""

# ruff: noqa: RUF009 -- ``key`` and ``part`` are calls that make dataclass fields.

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from inferencia.fields import (
    Place,
    Rejected,
    any_text,
    anything,
    bearer,
    duration,
    flag,
    hidden,
    key,
    list_of,
    mapping_of,
    number,
    one_of,
    optional,
    part,
    secret,
    section,
    size,
    text,
    tri_state,
    whole,
)
from inferencia.models.definitions import SwapConfig
from inferencia.secret import Secret
from inferencia.values import (
    Network,
    by_host_name,
    datagram_target,
    executable,
    file_path,
    file_path_or_off,
    hardware_address,
    headers,
    host,
    listen_address,
    listen_addresses,
    network,
    origins,
    prices,
    remote_access,
    search_path,
    task,
    url,
)
from inferencia.yamlfile import Mapping as Group
from inferencia.yamlfile import Node

BACKEND_TYPES = (
    "mlx",
    "ollama",
    "llamacpp",
    "lmstudio",
    "vllm",
    "openai",
    "openrouter",
    "anthropic",
    "echo",
)

MIB = 1024 * 1024
DAY = 86400.0

# MSTY's MLX server, the one backend of the predecessor, listens there.
MLX_PORT = 11973

Access = bool | tuple[Network, ...]  # everybody, nobody, or these networks
_NOBODY: Access = False


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """``server.tls``: certificate and key, both PEM files."""

    cert: Path | None = key(optional(file_path), None)
    key: Path | None = key(optional(file_path), None)


def certificate(place: Place) -> TlsConfig:
    """Certificate and key, both."""
    before = len(place.book.errors)
    found = section(TlsConfig)(place)
    if len(place.book.errors) == before and not (found.cert and found.key):
        raise Rejected("expected {cert: FILE, key: FILE}")
    return found


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """``server.api_key``: one key for each of two roles."""

    admin: Secret | None = key(secret, None)
    user: Secret | None = key(secret, None)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """``server``: addresses, limits and patience towards clients."""

    host: str = key(host, "127.0.0.1")
    port: int = key(whole(0, 65535), 8080)
    listen: Mapping[str, tuple[str, ...]] = key(listen_addresses, {})
    tls: TlsConfig = part(TlsConfig)
    api_key: RoleKeys = part(RoleKeys, is_secret=True)
    origins: tuple[str, ...] = key(origins, ())
    trusted_proxies: tuple[Network, ...] = key(list_of(network), ())
    header_timeout: float = key(duration(can_be_zero=False), 10.0)
    read_timeout: float = key(duration(can_be_zero=False), 30.0)
    write_timeout: float = key(duration(can_be_zero=False), 120.0)
    shutdown_timeout: float = key(duration(), 30.0)
    max_body: int = key(size(1), 64 * MIB)
    max_body_total: int = key(size(1), 256 * MIB)
    max_connections: int = key(whole(0), 0)
    sse_keepalive: float = key(duration(), 15.0)
    # Whether somebody asked for this port, so that another must not be taken instead.
    is_port_given: bool = False


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """``auth``: where the keys are."""

    keys_file: Path = key(file_path, Path("keys.txt"))
    # Whether the file or the environment named keys_file.
    is_keys_file_given: bool = False
    # From INFERENCIA_API_KEYS, in place of the file; None if that is not set.
    api_keys: tuple[Secret, ...] | None = None


@dataclass(frozen=True, slots=True)
class RateLimitConfig:
    """``ratelimit``: for every key that does not say otherwise."""

    requests_per_second: float = key(number(above=0), 10.0)
    burst: int = key(whole(1), 20)


@dataclass(frozen=True, slots=True)
class WakeConfig:
    """``backends[].wake``: Wake-on-LAN."""

    mac: str | None = key(optional(hardware_address), None)
    broadcast: str = key(datagram_target, "255.255.255.255")  # maybe with a port
    timeout: float = key(duration(can_be_zero=False), 90.0)


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """``backends[]``: one server that runs models."""

    name: str = key(text, "")
    type: str = key(one_of(*BACKEND_TYPES), "openai")
    url: str = key(url, "")
    connect_timeout: float = key(duration(can_be_zero=False), 5.0)
    timeout: float = key(duration(), 600.0)  # 0: none
    stall_timeout: float = key(duration(), 300.0)  # 0: none
    health_timeout: float = key(duration(can_be_zero=False), 5.0)
    api_key: Secret | None = key(bearer, None)
    headers: tuple[tuple[str, str], ...] = hidden(headers, ())
    models: tuple[str, ...] = key(list_of(text), ())  # globs; empty: all it lists
    prefix: str = key(any_text, "")
    priority: int = key(whole(-(10**9), 10**9), 0)
    max_concurrency: int = key(whole(0), 0)  # 0: no limit
    assemble: bool | None = key(tri_state, None)  # None: auto
    pad_nonstream: bool = key(flag, False)
    wake: WakeConfig = part(WakeConfig)
    prices: Mapping[str, Mapping[str, float]] = key(mapping_of(prices), {})
    daily_spend: float | None = key(optional(number(above=0)), None)


def type_for(url: str) -> str:
    """The type of a backend that does not name one."""
    return "mlx" if urlsplit(url).port == MLX_PORT else "openai"


def backend(place: Place) -> BackendConfig:
    """One of ``backends``. Its type follows from the URL, its name from the type."""
    found = section(BackendConfig)(place)
    keys = place.node.items if isinstance(place.node, Group) else {}
    if "type" not in keys and found.url:
        found = replace(found, type=type_for(found.url))
    if "url" not in keys and found.type != "echo":
        # Noted and not raised: the rest of it is worth checking, too.
        message = "url is missing; a backend needs one (only type echo does not)"
        place.book.error(place.name, message)
    return found if "name" in keys else replace(found, name=found.type)


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """``routing``: from the name in a request to the name of a model."""

    default_model: str | None = key(optional(text), None)
    aliases: Mapping[str, str] = key(mapping_of(text), {})  # names may be globs
    fallbacks: Mapping[str, tuple[str, ...]] = key(mapping_of(list_of(text)), {})
    affinity: bool = key(flag, True)


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """``queue``: the line in front of a busy backend."""

    max_waiting: int = key(whole(0), 100)  # 0: nobody waits
    timeout: float = key(duration(), 120.0)  # 0: none


@dataclass(frozen=True, slots=True)
class LlamaArgs:
    """``llama.args``: arguments of llama-server."""

    common: str = key(any_text, "--props --no-warmup")
    goinfer: str = key(any_text, "--jinja --chat-template-file template.jinja")


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """``llama``: how models on this machine are run."""

    exe: str = key(executable, "llama-server")
    args: LlamaArgs = part(LlamaArgs)
    memory: int | None = key(optional(size(1)), None)


@dataclass(frozen=True, slots=True)
class TunnelAcceptConfig:
    """``tunnel.accept``: the public end."""

    enabled: bool = key(flag, False)
    passthrough: str | None = key(optional(listen_address), None)


@dataclass(frozen=True, slots=True)
class TunnelDialConfig:
    """``tunnel.dial``: the private end."""

    relays: tuple[str, ...] = key(list_of(url), ())
    token: Secret | None = key(secret, None)
    name: str | None = key(optional(text), None)
    ca_file: Path | None = key(optional(file_path), None)
    passthrough: Mapping[str, TlsConfig] = key(by_host_name(certificate), {})


@dataclass(frozen=True, slots=True)
class TunnelConfig:
    """``tunnel``: machines behind a router that nobody can dial."""

    beat: float = key(duration(can_be_zero=False), 15.0)
    accept: TunnelAcceptConfig = part(TunnelAcceptConfig)
    dial: TunnelDialConfig = part(TunnelDialConfig)


@dataclass(frozen=True, slots=True)
class UsageConfig:
    """``usage``: the database of what was used."""

    # None: usage.sqlite3 in the state folder; False: nothing is written down.
    path: Path | Literal[False] | None = key(optional(file_path_or_off), None)
    keep: float = key(duration(can_be_zero=False), 400 * DAY)
    # What a million tokens are worth of models whose work costs nothing, by pattern.
    prices: Mapping[str, Mapping[str, float]] = key(mapping_of(prices), {})


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """``admin``: who may administer, and what."""

    remote: Access = key(remote_access, _NOBODY)
    tasks: Mapping[str, tuple[str, ...]] = key(mapping_of(task), {})
    edit_commands: bool = key(flag, False)
    models_quota: int | None = key(optional(size(1)), None)  # bytes


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """``metrics``."""

    public: bool = key(flag, False)


@dataclass(frozen=True, slots=True)
class WatchdogConfig:
    """``watchdog``: how backends are probed."""

    interval: float = key(duration(can_be_zero=False), 30.0)
    fail_threshold: int = key(whole(1), 3)
    request_timeout: float = key(duration(can_be_zero=False), 5.0)


@dataclass(frozen=True, slots=True)
class StateConfig:
    """``state``: what several relays share."""

    # The URL may hold a password.
    url: Secret | None = key(secret, None)
    on_failure: str = key(one_of("local", "refuse"), "local")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """``log``."""

    level: str = key(one_of("debug", "info", "warn", "error", warning="warn"), "info")
    format: str = key(one_of("json", "text"), "json")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration, checked."""

    server: ServerConfig = part(ServerConfig)
    auth: AuthConfig = part(AuthConfig)
    ratelimit: RateLimitConfig = part(RateLimitConfig)
    backends: tuple[BackendConfig, ...] = key(list_of(backend), ())
    routing: RoutingConfig = part(RoutingConfig)
    queue: QueueConfig = part(QueueConfig)
    models_dir: tuple[Path, ...] = key(search_path, ())
    llama: LlamaConfig = part(LlamaConfig)
    swap: Node | None = hidden(anything, None)  # a file's name, or its keys inline
    tunnel: TunnelConfig = part(TunnelConfig)
    usage: UsageConfig = part(UsageConfig)
    admin: AdminConfig = part(AdminConfig)
    metrics: MetricsConfig = part(MetricsConfig)
    watchdog: WatchdogConfig = part(WatchdogConfig)
    state: StateConfig = part(StateConfig)
    log: LogConfig = part(LogConfig)
    # Whether local servers are to be looked for: nobody configured a backend.
    discover: bool = True
    # --demo: only the built-in model; --no-api-key: everybody is a user.
    is_demo: bool = False
    is_open: bool = False
    # Environment variables that no child process may see.
    secret_variables: frozenset[str] = frozenset()
    # What ``swap`` says, or the llama-swap.yml beside a goinfer.yml.
    swap_config: SwapConfig | None = None
