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
from collections.abc import Callable, Iterable
from typing import cast

from inferencia.listener import Guard, open_server
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
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def clients(self) -> int:
        """Connections of clients that are open."""
        return len(self._clients)

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
            return False
        self._clients.add(client)
        return True

    def forget(self, client: "_Client") -> None:
        """A client is gone. Safe for one that was never admitted."""
        if client in self._clients:
            self._clients.remove(client)
            if self._guard is not None:
                self._guard.give_place_back()

    def session_for(self, host: str) -> Session | None:
        """The agent that this client's TLS goes to, the least busy one."""
        able = [session for session in self._sessions() if session.passes(host)]
        return min(able, key=lambda session: session.pool.passing, default=None)

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
        self._timer = self._loop.call_later(HELLO_SECONDS, self._wire.abort)

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
            self._refuse(error.alert)
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

    def _refuse(self, alert: bytes) -> None:
        if self._wire is not None and not self._wire.is_closing():
            if alert:
                self._wire.write(alert)
            self._wire.close()

    async def _connect(self) -> None:
        """Find the agent, and give it the client."""
        host = self._host
        session = self._port.session_for(host)
        if session is None:
            log.debug("no agent here is given TLS for %s", host)
            self._refuse(UNRECOGNIZED_NAME)
        elif session.pool.passing >= MAX_PASSING:
            log.warning(
                'agent "%s": %d clients are connected to it by TLS; more are sent away',
                session.agent,
                MAX_PASSING,
            )
            self._refuse(INTERNAL_ERROR)
        else:
            try:
                carrier, lost = await session.pool.take_out()
            except ConnectFailed as error:
                log.info("TLS for %s: %s", host, error)
                self._refuse(INTERNAL_ERROR)
            else:
                self._splice(carrier, lost)

    def _splice(self, carrier: Carrier, lost: Callable[[], None]) -> None:
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
