"""The relay's port for TLS that it passes on unread, by the name that is asked for.

A client asks for a host in its ClientHello. The relay reads that name and nothing else,
takes a data connection of an agent that may serve it, says so there by a note
(``wire.Passthrough``), and from then on copies bytes. The agent has the certificate of
that name, ends TLS (``tlsend.py``) and serves its own application::

    client ==TLS== PassthroughPort ~~carrier~~ TlsEnd ==TLS== server of connections
                       (relay)                 (agent)

How it ends: when a client is gone its carrier is closed, at once, and with it the
agent's work for it. When the agent's server closes, the agent says ``wire.Passed``
behind the last byte; the relay closes the client's connection when the client has
taken all, and then the carrier. (An agent that closed the carrier itself could cut off
bytes that a slow client has not taken yet.)
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

from inferencia.downstream.connection import Guard
from inferencia.downstream.listener import open_server
from inferencia.tunnel.carrier import Carrier, PeerLost, watch_peer
from inferencia.tunnel.clienthello import (
    INTERNAL_ERROR,
    UNRECOGNIZED_NAME,
    BadHello,
    HelloReader,
)
from inferencia.tunnel.session import Session
from inferencia.tunnel.splice import READ_BYTES, Side, pair, report
from inferencia.tunnel.wire import (
    MAX_PASSING,
    BadMessage,
    Passed,
    Passthrough,
    decode,
    encode,
)
from inferencia.tunnelmetrics import PassedState, PassthroughState
from inferencia.upstream.answer import ConnectFailed

log = logging.getLogger(__name__)

# In this time the whole ClientHello must be there.
HELLO_SECONDS = 10.0
# A client that takes no bytes for so long, though some wait for it, is cut. (The
# agent's own ``server.write_timeout`` is as long.)
_STALL_SECONDS = 120.0
# Nothing in either direction: longer than an engine may be silent by default, since
# nobody here sees whether an answer is still to come.
_IDLE_SECONDS = 900.0
# When the relay ends, what was silent for longer than agents leave a stream without a
# comment is taken for idle.
_IDLE_AT_END_SECONDS = 20.0
_SWEEP_SECONDS = 5.0
_SWEEP_AT_END_SECONDS = 0.25


# Why a client is refused, as metrics name it.
_BAD_HELLO, _NO_AGENT, _FULL, _NO_CARRIER = (
    "bad_hello",
    "no_agent",
    "too_many",
    "no_connection",
)


@dataclass(slots=True)
class _Tally:
    """What one agent has been given by clients that are gone, and how many came."""

    total: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class PassthroughPort:
    """The relay's port for TLS that is not ended here."""

    def __init__(
        self, sessions: Callable[[], Iterable[Session]], guard: Guard | None = None
    ) -> None:
        """Make a port; ``open`` listens.

        Args:
            sessions: the agents that are here.
            guard: counts our clients among its connections.
        """
        self.port = 0  # once it is open
        self._sessions = sessions
        self._guard = guard
        self._server: asyncio.Server | None = None
        self._is_accepting = False
        self._clients: set[_Client] = set()
        self._tallies: dict[str, _Tally] = {}  # by agent
        self._refused: Counter[str] = Counter()  # by reason
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def clients(self) -> int:
        """Connections of clients that are open."""
        return len(self._clients)

    @property
    def state(self) -> PassthroughState:
        """What passes through and has done so, and who was refused."""
        passed = []
        for agent, tally in self._tallies.items():
            here = [one.moved_bytes for one in self._clients if one.agent == agent]
            passed.append(
                PassedState(
                    agent,
                    connections=len(here),
                    total=tally.total,
                    bytes_in=tally.bytes_in + sum(bytes_in for bytes_in, _ in here),
                    bytes_out=tally.bytes_out + sum(bytes_out for _, bytes_out in here),
                )
            )
        return PassthroughState(tuple(passed), dict(self._refused))

    async def open(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be bound.
        """
        self._is_accepting = True
        self._server = await open_server(lambda: _Client(self), host, port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._sweeper = asyncio.create_task(self._sweep(), name="passthrough")

    def stop_accepting(self) -> None:
        """Close the listening socket; what is open goes on."""
        self._is_accepting = False
        if self._server is not None:
            self._server.close()

    async def quiet(self) -> None:
        """Wait until nothing passes through, but for what seems to be idle."""
        loop = asyncio.get_running_loop()
        while self._clients:
            self._each(lambda one: one.end_if_idle(loop.time(), _IDLE_AT_END_SECONDS))
            await asyncio.sleep(_SWEEP_AT_END_SECONDS)

    async def aclose(self) -> None:
        """Close everything. Safe to call twice."""
        self.stop_accepting()
        sweeper, self._sweeper = self._sweeper, None
        tasks = [client.end() for client in tuple(self._clients)]
        waiting = [task for task in (sweeper, *tasks) if task is not None]
        if sweeper is not None:
            sweeper.cancel()
        if waiting:
            await asyncio.wait(waiting)

    def admit(self, client: "_Client") -> bool:
        """Whether there is room for one more; if so it is counted."""
        if not self._is_accepting:
            return False
        if self._guard is not None and not self._guard.take_place():
            self.note_refused(_FULL)
            return False
        self._clients.add(client)
        return True

    def forget(self, client: "_Client") -> None:
        """A client is gone. Safe for one that was never admitted."""
        if client in self._clients:
            self._clients.remove(client)
            if self._guard is not None:
                self._guard.give_place_back()
            if client.agent:
                tally = self._tallies[client.agent]
                bytes_in, bytes_out = client.moved_bytes
                tally.bytes_in += bytes_in
                tally.bytes_out += bytes_out

    def sessions_for(self, host: str) -> list[Session]:
        """The agents that this client's TLS may go to, the least busy one first."""
        able = [session for session in self._sessions() if session.passes(host)]
        return sorted(able, key=lambda session: session.pool.passing)

    def note_given(self, agent: str) -> None:
        """A client goes to this agent from now on."""
        self._tallies.setdefault(agent, _Tally()).total += 1

    def note_refused(self, reason: str) -> None:
        """A client is sent away."""
        self._refused[reason] += 1

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self._each(lambda one: one.check(loop.time()))

    def _each(self, look: Callable[["_Client"], None]) -> None:
        for client in tuple(self._clients):
            look(client)


class _Client(asyncio.Protocol):
    """One client of the port, from its first byte to its end.

    It is the socket's protocol until the name is known; then a ``Side`` is.
    """

    def __init__(self, port: PassthroughPort) -> None:
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._reader: HelloReader | None = HelloReader()  # until the name is known
        self._host = ""  # the name, from then on
        self.agent = ""  # whose client it is, once it is known
        self._hello = b""  # what came with it, until it is on its way
        self._wire: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None  # until the name is known
        self._task: asyncio.Task[None] | None = None  # finds a carrier
        self._near = Side(self._client_ended)
        self._far: Side | None = None  # the carrier's, once there is one
        self._carrier: Carrier | None = None
        self._lost_carrier: Callable[[], None] | None = None
        self._began = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.Transport, transport)
        if not self._port.admit(self):
            self._wire.abort()
            return
        with contextlib.suppress(AttributeError):
            self._wire.max_size = READ_BYTES  # type: ignore[attr-defined]
        watch_peer(self._wire)
        self._timer = self._loop.call_later(HELLO_SECONDS, self._is_late)

    def data_received(self, data: bytes) -> None:
        if self._wire is None or self._wire.is_closing():
            return
        if self._reader is None:
            self._hello += data  # it came before reading had stopped
            return
        try:
            if not self._reader.feed(data):
                return
        except BadHello as error:
            log.debug("a client at the port for TLS sent %s", error)
            self._refuse(_BAD_HELLO, error.alert)
            return
        assert self._reader.name is not None
        self._host, self._hello = self._reader.name, self._reader.received
        self._reader = None
        self._stop_timer()
        self._wire.pause_reading()
        self._task = self._loop.create_task(self._connect())
        self._task.add_done_callback(report)

    def eof_received(self) -> None:
        """Let the transport close itself: half a ClientHello has no answer."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()
        self._port.forget(self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_late(self) -> None:
        self._port.note_refused(_BAD_HELLO)
        if self._wire is not None:
            self._wire.abort()

    def _refuse(self, reason: str, alert: bytes) -> None:
        self._port.note_refused(reason)
        if self._wire is not None and not self._wire.is_closing():
            if alert:
                self._wire.write(alert)
            self._wire.close()

    async def _connect(self) -> None:
        """Find an agent that takes the client, the least busy one first."""
        host = self._host
        sessions = self._port.sessions_for(host)
        if not sessions:
            log.debug("no agent here is given TLS for %s", host)
            self._refuse(_NO_AGENT, UNRECOGNIZED_NAME)
            return
        reason = _NO_CARRIER
        for session in sessions:
            if session.pool.passing >= MAX_PASSING:
                log.warning(
                    'agent "%s": %d clients are connected by TLS; it gets no more',
                    session.agent,
                    MAX_PASSING,
                )
                reason = _FULL
                continue
            try:
                carrier, lost = await session.pool.take_out()
            except ConnectFailed as error:
                log.info("TLS for %s: %s", host, error)
                continue
            self._splice(session.agent, carrier, lost)
            return
        self._refuse(reason, INTERNAL_ERROR)

    def _splice(self, agent: str, carrier: Carrier, lost: Callable[[], None]) -> None:
        self.agent = agent
        self._port.note_given(agent)
        wire, self._wire = self._wire, None
        assert wire is not None
        self._carrier, self._lost_carrier = carrier, lost
        self._far = far = Side(self._carrier_ended)
        pair(self._near, far)
        carrier.set_protocol(far)
        carrier.on_note = self._noted
        carrier.tell(encode(Passthrough(self._host, _address_of(wire))))
        far.connection_made(carrier)
        far.write(self._hello)
        self._near.bytes_in, self._hello = len(self._hello), b""
        wire.set_protocol(self._near)
        self._near.connection_made(wire)
        if wire.is_closing():  # it went in this very turn of the loop
            self._near.connection_lost(None)
        else:
            wire.resume_reading()

    def _noted(self, note: bytes) -> None:
        """The agent says that all was sent."""
        carrier = self._carrier
        assert carrier is not None
        try:
            message = decode(note)
        except BadMessage as error:
            carrier.fail(PeerLost(f"its note is not understood: {error}"))
            return
        if isinstance(message, Passed):
            self._near.close()  # the carrier is closed when the client has it all

    def _client_ended(self, near: Side) -> None:
        """The client is gone: end the agent's work for it."""
        carrier, far = self._carrier, self._far
        assert carrier is not None and far is not None
        self._report()
        self._port.forget(self)
        near.abort()
        if far.is_full:
            carrier.abort()  # nobody waits for what it still has to take
        else:
            carrier.close()

    def _carrier_ended(self, far: Side) -> None:
        lost, self._lost_carrier = self._lost_carrier, None
        assert lost is not None
        lost()
        self._near.close()

    def _report(self) -> None:
        assert self._far is not None
        log.info(
            "TLS for %s passed through: %d bytes in, %d out, %.1f s",
            self._host,
            self._near.bytes_in,
            self._far.bytes_in,
            self._loop.time() - self._began,
        )

    # What the port does.

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes that came from the client, and that went to it, so far."""
        return self._near.bytes_in, 0 if self._far is None else self._far.bytes_in

    def check(self, now: float) -> None:
        """Cut what has stood still for too long."""
        is_stuck = self._near.is_stuck(now)
        self.end_if_idle(now, _STALL_SECONDS if is_stuck else _IDLE_SECONDS)

    def end_if_idle(self, now: float, seconds: float) -> None:
        """Close the connection if nothing went through for so long."""
        if self._far is None:
            return  # there is another timer for this
        if now - max(self._near.moved, self._far.moved) >= seconds:
            self._near.abort()

    def end(self) -> asyncio.Task[None] | None:
        """Cut it; the task that has still to end."""
        if self._wire is not None:
            self._wire.abort()
        self._near.abort()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            return self._task
        return None


def _address_of(wire: asyncio.Transport) -> str:
    peer = wire.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) and peer else ""
