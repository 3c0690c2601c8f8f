"""What ``GET /metrics`` shows of the tunnel, at both of its ends.

Nothing is counted here: whoever has an end of the tunnel is asked at each rendering.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from inferencia.exposition import Exposition


@dataclass(frozen=True, slots=True)
class PeerState:
    """What is known at this moment of who is at the other end of a tunnel."""

    name: str  # an agent's, or a relay's host and port
    is_up: bool
    connections: int  # that carry requests, or could
    streams: int  # requests that they carry
    reconnects: int
    round_trip: float | None  # seconds


@dataclass(frozen=True, slots=True)
class PassedState:
    """What has passed through to one agent, as TLS that is not ended here."""

    agent: str
    connections: int  # that are open
    total: int  # that there were, the open ones too
    bytes_in: int  # from clients
    bytes_out: int  # to clients


@dataclass(frozen=True, slots=True)
class PassthroughState:
    """The state of the port for TLS that is passed on by name."""

    passed: tuple[PassedState, ...] = ()
    refused: Mapping[str, int] = field(default_factory=dict)  # clients, by reason


class TunnelMetrics:
    """The families of the tunnel."""

    def __init__(self) -> None:
        """Show nothing before ``follow``."""
        self._agents: Callable[[], Iterable[PeerState]] = tuple
        self._relays: Callable[[], Iterable[PeerState]] = tuple
        self._passthrough: Callable[[], PassthroughState] = PassthroughState

    def follow(
        self,
        agents: Callable[[], Iterable[PeerState]],
        relays: Callable[[], Iterable[PeerState]],
        passthrough: Callable[[], PassthroughState],
    ) -> None:
        """From now on ask these for who dialed in, whom we dialed, what passes."""
        self._agents = agents
        self._relays = relays
        self._passthrough = passthrough

    def add_to(self, book: Exposition) -> None:
        """Show all of it there."""
        book.sampled(
            "inferencia_agent_up",
            "Whether an agent is connected and takes requests.",
            ("agent",),
            lambda: [((a.name,), int(a.is_up)) for a in self._agents()],
        )
        book.sampled(
            "inferencia_agent_connections",
            "Connections that an agent has dialed for requests.",
            ("agent",),
            lambda: [((a.name,), a.connections) for a in self._agents()],
        )
        book.sampled(
            "inferencia_agent_streams",
            "Requests that go through an agent's connections.",
            ("agent",),
            lambda: [((a.name,), a.streams) for a in self._agents()],
        )
        book.sampled(
            "inferencia_agent_reconnects_total",
            "Times that an agent has come back.",
            ("agent",),
            lambda: [((a.name,), a.reconnects) for a in self._agents()],
            kind="counter",
        )
        book.sampled(
            "inferencia_agent_round_trip_seconds",
            "Round trip of the last ping to an agent.",
            ("agent",),
            lambda: [
                ((a.name,), a.round_trip)
                for a in self._agents()
                if a.round_trip is not None
            ],
        )
        book.sampled(
            "inferencia_relay_up",
            "Whether this machine is connected to a relay, as an agent.",
            ("relay",),
            lambda: [((r.name,), int(r.is_up)) for r in self._relays()],
        )
        book.sampled(
            "inferencia_relay_connections",
            "Connections for requests that this machine has dialed to a relay.",
            ("relay",),
            lambda: [((r.name,), r.connections) for r in self._relays()],
        )
        book.sampled(
            "inferencia_relay_reconnects_total",
            "Times that this machine has come back to a relay.",
            ("relay",),
            lambda: [((r.name,), r.reconnects) for r in self._relays()],
            kind="counter",
        )
        self._add_passthrough(book)

    def _add_passthrough(self, book: Exposition) -> None:
        book.sampled(
            "inferencia_passthrough_connections",
            "Clients whose TLS passes through to an agent now.",
            ("agent",),
            lambda: [((p.agent,), p.connections) for p in self._passthrough().passed],
        )
        book.sampled(
            "inferencia_passthrough_connections_total",
            "Clients whose TLS has been passed on to an agent.",
            ("agent",),
            lambda: [((p.agent,), p.total) for p in self._passthrough().passed],
            kind="counter",
        )
        book.sampled(
            "inferencia_passthrough_bytes_total",
            "Bytes that have passed through; in: from clients to an agent.",
            ("agent", "direction"),
            lambda: [
                ((p.agent, direction), count)
                for p in self._passthrough().passed
                for direction, count in (("in", p.bytes_in), ("out", p.bytes_out))
            ],
            kind="counter",
        )
        book.sampled(
            "inferencia_passthrough_refused_total",
            "Clients at the port for passing TLS on that were given to no agent.",
            ("reason",),
            lambda: [((why,), n) for why, n in self._passthrough().refused.items()],
            kind="counter",
        )
