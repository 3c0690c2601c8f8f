"""What a model on this machine is: how its server is started, asked and stopped.

The one description of a model process, whoever wrote it: a llama-swap configuration
(``swapfile.py``) or a GGUF file that was found (``finding.py``). Everything above knows
only these classes. Pure data; the words are llama-swap's own.

``${PORT}`` stays in the texts until the process is started, because a port belongs to
a running process and not to a definition: a reload that hands out ports anew must not
make a loaded model look changed. ``${PID}`` stays in ``stop_command`` until it is run.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PORT_MACRO = "${PORT}"
PID_MACRO = "${PID}"

# llama-swap's defaults, seconds.
HEALTH_CHECK_TIMEOUT = 120.0
UNLOAD_TIMEOUT = 10.0
CONCURRENCY_LIMIT = 10


@dataclass(frozen=True, slots=True)
class Filters:
    """What is changed in a request's JSON before the model gets it; never ``model``."""

    strip_params: tuple[str, ...] = ()
    set_params: Mapping[str, Any] = field(default_factory=dict)
    # By the name that the client asked for; each of these is an alias.
    set_params_by_id: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; 0 is none. Those that have no counterpart here are kept and unused."""

    connect: float = 30.0
    keepalive: float = 30.0
    response_header: float = 0.0
    tls_handshake: float = 10.0
    expect_continue: float = 1.0
    idle_conn: float = 90.0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model takes and gives, as its owner declares it."""

    inputs: tuple[str, ...] = ()  # of text, audio, image
    outputs: tuple[str, ...] = ()
    tools: bool = False
    reranker: bool = False
    context: int = 0  # tokens; 0: not said


@dataclass(frozen=True, slots=True)
class ModelDefinition:
    """One model: a command that serves it, and how it is offered."""

    id: str
    command: tuple[str, ...]  # argv; ``${PORT}`` where the port goes; no shell
    proxy: str = f"http://localhost:{PORT_MACRO}"  # base URL of its server
    stop_command: tuple[str, ...] = ()  # argv with ``${PID}``; empty: SIGTERM
    env: tuple[tuple[str, str], ...] = ()  # beside the daemon's, without its secrets
    check_endpoint: str = "/health"  # "none": ready as soon as it has started
    health_check_timeout: float = HEALTH_CHECK_TIMEOUT
    ttl: float = 0.0  # seconds without a request until it is unloaded; 0: never
    unload_timeout: float = UNLOAD_TIMEOUT  # from SIGTERM to SIGKILL
    use_model_name: str = ""  # the name its server is sent; "" is ``id``
    concurrency_limit: int = CONCURRENCY_LIMIT
    filters: Filters = field(default_factory=Filters)
    timeouts: Timeouts = field(default_factory=Timeouts)
    ignore_websockets: bool = False
    name: str = ""
    description: str = ""
    aliases: tuple[str, ...] = ()  # those from ``filters.set_params_by_id`` too
    unlisted: bool = False
    send_loading_state: bool = False
    capabilities: Capabilities | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0  # scheduler's; higher first
    # Where the definition came from; only what was found on disk has these.
    path: str = ""  # of the GGUF file; also parsed from the command's ``-m`` if it can
    # The port of this load of the configuration; not part of what the model is.
    port: int | None = field(default=None, compare=False)

    @property
    def upstream_id(self) -> str:
        """The name its server is sent."""
        return self.use_model_name or self.id

    def runs_like(self, other: "ModelDefinition") -> bool:
        """Whether a process started for ``other`` serves for this one too."""
        return self.process_part == other.process_part

    @property
    def process_part(self) -> tuple[object, ...]:
        """What decides whether a running process must be replaced."""
        return (
            self.id,
            self.command,
            self.proxy,
            self.stop_command,
            self.env,
            self.check_endpoint,
        )

    def at_port(self, port: int | None) -> "ModelDefinition":
        """The definition with ``${PORT}`` filled in, ready to be started."""
        if port is None:
            return self

        def filled(text: str) -> str:
            return text.replace(PORT_MACRO, str(port))

        return replace(
            self,
            command=tuple(filled(part) for part in self.command),
            proxy=filled(self.proxy),
            stop_command=tuple(filled(part) for part in self.stop_command),
            env=tuple((name, filled(value)) for name, value in self.env),
            port=port,
        )

    @property
    def needs_port(self) -> bool:
        """Whether the command has a place for a port of ours."""
        return any(PORT_MACRO in part for part in self.command)


@dataclass(frozen=True, slots=True)
class Group:
    """Models and which of them may be loaded together (llama-swap's ``groups``)."""

    name: str
    members: tuple[str, ...]
    swap: bool = True  # one member at a time
    exclusive: bool = True  # loading a member unloads other, non-persistent groups
    persistent: bool = False  # never unloaded for the sake of other groups


@dataclass(frozen=True, slots=True)
class MatrixSets:
    """llama-swap's ``matrix``, its expressions worked out.

    ``sets`` are the allowed combinations, in the order of their definition; any subset
    of one is allowed. A model that is in none runs alone.
    """

    sets: tuple[frozenset[str], ...]
    evict_costs: Mapping[str, int] = field(default_factory=dict)  # default 1


@dataclass(frozen=True, slots=True)
class Selector:
    """A virtual model that chooses among others at the time of the request."""

    id: str
    strategy: str  # pin, warm, spillover
    targets: tuple[str, ...]
    spillover: int = 1  # in-flight requests until the next target is taken
    name: str = ""
    description: str = ""
    unlisted: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Profile:
    """A set of names that mean other models while the profile is active."""

    name: str
    description: str = ""
    pins: Mapping[str, str | None] = field(default_factory=dict)  # None: 404


@dataclass(frozen=True, slots=True)
class Peer:
    """A server elsewhere whose models are offered here."""

    id: str
    proxy: str
    models: tuple[str, ...]
    api_key: str = field(default="", repr=False)
    filters: Filters = field(default_factory=Filters)
    timeouts: Timeouts = field(default_factory=Timeouts)


class LogTo(enum.StrEnum):
    """``logToStdout``: what the daemon's own log and ``/logs`` hold."""

    PROXY = "proxy"
    UPSTREAM = "upstream"
    BOTH = "both"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SwapConfig:
    """Everything that a llama-swap configuration says."""

    models: tuple[ModelDefinition, ...] = ()  # sorted by id
    groups: tuple[Group, ...] = ()  # as written; models in none are "(default)"
    matrix: MatrixSets | None = None  # instead of groups
    selectors: tuple[Selector, ...] = ()
    profiles: tuple[Profile, ...] = ()
    peers: tuple[Peer, ...] = ()
    preload: tuple[str, ...] = ()  # ids; unknown names were warned of and dropped
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # become user keys
    ignore_paths: tuple[str, ...] = ()  # regular expressions
    include_aliases_in_list: bool = False
    start_port: int = 5800
    log_level: str = "info"
    log_to: LogTo = LogTo.PROXY
    log_time_format: str = ""
    has_groups: bool = False  # groups or matrix were written, so they are to be kept to
