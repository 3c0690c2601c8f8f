"""The agent's end of TLS that passes through a relay (passthrough.py).

The relay says by a note that what follows on an idle data connection is a client's TLS,
and for which host. Here it ends, with the certificate of that host, and what comes out
of it goes to a server of connections.

It ends on one end of a socket pair, where the event loop does it as on any socket; no
other program of this machine can reach that. Bytes are copied between the other end and
the carrier. Neither asyncio nor uvloop could do TLS on a carrier itself.

What the relay says is not to be trusted: it could name any client's address.
"""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from inferencia.downstream.connection import Connection
from inferencia.tls import Certificate
from inferencia.tunnel.carrier import Carrier, PeerLost
from inferencia.tunnel.splice import Side, pair, report
from inferencia.tunnel.wire import BadMessage, Passed, Passthrough, decode, encode

log = logging.getLogger(__name__)

# How long an agent that ends waits for its last bytes to be taken over.
_LAST_WORDS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Visit:
    """One client whose TLS comes through a relay."""

    host: str  # that it has asked for
    relay: str  # host:port of its URL
    client: str  # its address as the relay says it, which may be anything; "" if none


class TlsEnd:
    """Where TLS ends that passes through relays."""

    def __init__(
        self,
        certificates: Mapping[str, Certificate],
        serve: Callable[[Visit], asyncio.Protocol],
        handshake_seconds: Callable[[], float],
    ) -> None:
        """Make an end without connections.

        Args:
            certificates: by host name, in lower case.
            serve: makes the server of one connection.
            handshake_seconds: how long a client may take for its part of TLS.
        """
        self._certificates = certificates
        self._serve = serve
        self._handshake_seconds = handshake_seconds
        self._visitors: dict[_Visitor, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # of those who come, or came
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names that it has certificates for."""
        return tuple(self._certificates)

    @property
    def visitors(self) -> int:
        """Clients that are here."""
        return len(self._visitors)

    def poll(self) -> None:
        """Take over changed certificates; to be called every few seconds."""
        for certificate in self._certificates.values():
            certificate.poll()

    def take_over(self, carrier: Carrier, note: bytes) -> None:
        """Do as a relay says with a data connection that was idle."""
        try:
            message = decode(note)
        except BadMessage as error:
            carrier.fail(PeerLost(f"its note is not understood: {error}"))
            return
        if not isinstance(message, Passthrough):
            return  # a newer relay's
        if message.host not in self._certificates:
            carrier.fail(PeerLost("it passes TLS on for a host that is not here"))
            return
        self._receive(carrier, message)

    def _receive(self, carrier: Carrier, message: Passthrough) -> None:
        server = carrier.get_protocol()
        if not isinstance(server, Connection) or not server.let_go():
            carrier.fail(PeerLost("it passes TLS on where a request is under way"))
            return
        carrier.on_note = None
        visitor = _Visitor(carrier, self._gone)
        visitor.begin()
        relay, _ = carrier.get_extra_info("peername")
        visit = Visit(message.host, relay, message.client)
        task = asyncio.get_running_loop().create_task(
            visitor.welcome(
                functools.partial(self._serve, visit),
                self._certificates[message.host],
                self._handshake_seconds(),
            )
        )
        self._visitors[visitor] = task
        self._is_empty.clear()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(report)

    def _gone(self, visitor: "_Visitor") -> None:
        task = self._visitors.pop(visitor, None)
        if task is not None:
            task.cancel()
        if not self._visitors:
            self._is_empty.set()

    async def aclose(self) -> None:
        """Wait a little for what is left to be taken over by the relays; then cut it.

        The servers of all connections have ended before.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self._is_empty.wait()
        for visitor in tuple(self._visitors):
            visitor.end()
        if self._tasks:
            await asyncio.wait(self._tasks)


class _Visitor:
    """A client at the agent: its carrier, and a socket pair on which its TLS ends."""

    def __init__(self, carrier: Carrier, on_gone: Callable[["_Visitor"], None]) -> None:
        self._carrier = carrier
        self._on_gone = on_gone
        self._far = Side(self._carrier_ended)
        self._near = Side(self._server_ended)
        pair(self._near, self._far)

    def begin(self) -> None:
        """Take the carrier; what comes is kept until there is a server."""
        self._carrier.set_protocol(self._far)
        self._far.connection_made(self._carrier)
        self._carrier.pause_reading()

    async def welcome(
        self,
        serve: Callable[[], asyncio.Protocol],
        certificate: Certificate,
        handshake_seconds: float,
    ) -> None:
        """Let TLS end here, and serve what comes out of it."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            theirs.setblocking(False)
            await loop.connect_accepted_socket(lambda: self._near, ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        if not self._near.is_full:
            self._carrier.resume_reading()
        try:
            await loop.connect_accepted_socket(
                serve,
                theirs,
                ssl=certificate.context,
                ssl_handshake_timeout=handshake_seconds,
            )
        except OSError as error:  # ssl.SSLError and TimeoutError are
            log.debug("a client's TLS failed: %s", type(error).__name__)

    def end(self) -> None:
        """Cut it."""
        self._carrier.abort()

    def _server_ended(self, near: Side) -> None:
        """The server has sent all: the relay may close when its client has it."""
        self._carrier.tell(encode(Passed()))

    def _carrier_ended(self, far: Side) -> None:
        self._near.abort()
        self._on_gone(self)
