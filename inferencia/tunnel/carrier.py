"""WebSockets over sockets: one that carries a connection, one that carries messages.

Both begin when the handshake is over (who asked and who answered is told) and know
nothing of HTTP. There is no task and no queue: bytes go from the socket's callback to
whoever stands behind.

``Carrier``  is an ``asyncio.Transport`` whose bytes travel as binary messages. An
             HTTP connection, client or server, stands behind it and takes it for a
             socket. What is written in one turn of the loop goes out as one frame.
             Between the bytes, text may say what becomes of the connection.
``Channel``  carries text messages, each handed on whole.

Both ends ping each beat. A peer that has not been heard for 2.5 beats is gone, which
is counted only while we read: a full buffer on our side stops our reading, pongs
included, and says nothing about the peer. (aiohttp's own heartbeat cuts such streams.)

However a connection ends, ``connection_lost`` or ``on_lost`` is called once.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

from inferencia.tunnel.frames import (
    MAX_WRITTEN_BYTES,
    CloseCode,
    FrameReader,
    Opcode,
    close_payload,
    frame,
)
from inferencia.tunnel.wire import DEAD_BEATS, MAX_MESSAGE_BYTES, MAX_NOTE_BYTES

log = logging.getLogger(__name__)

# What the socket's buffer may hold before whoever writes is asked to stop.
_HIGH_WATER_BYTES = 256 * 1024
_LOW_WATER_BYTES = 64 * 1024
# What is taken from the kernel at a time; see upstream/connection.py.
_READ_BYTES = 64 * 1024
# A peer that takes nothing more cannot keep a connection that we have closed.
_CLOSE_SECONDS = 10.0
# What the pings of each beat hold, to tell their pongs from others.
_BEAT = b"beat"

# The kernel's own ways to find a dead peer; a second line, since they see one hop.
_KEEP_IDLE_SECONDS, _KEEP_INTERVAL_SECONDS, _KEEP_PROBES = 30, 10, 3
_USER_TIMEOUT_MILLISECONDS = 30_000


class PeerLost(ConnectionError):
    """The other end is gone, or does not speak as it should. ``str()`` says what."""


class WebSocket(asyncio.Protocol, ABC):
    """What both kinds share: frames, pings, and the end."""

    _wire: asyncio.Transport

    def __init__(self, *, is_client: bool, beat: float) -> None:
        """Make one end.

        Args:
            is_client: whether we dialed.
            beat: seconds between two pings.
        """
        self._is_client = is_client
        self._beat = beat
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(expects_masked=not is_client)
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # when it fires, on the loop's clock
        self._is_made = False  # there is a socket, or was
        self._is_reading = True
        self._is_closing = False
        self._is_lost = False
        self._error: Exception | None = None  # why we end it
        self._pings = itertools.count()
        self._probes: dict[bytes, tuple[float, asyncio.Future[float]]] = {}
        self._beat_sent: float | None = None  # the first ping that has no pong yet
        self.heard = self._loop.time()  # when the last bytes came
        self.round_trip: float | None = None  # seconds, of the last ping

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._is_closing

    def ping(self) -> asyncio.Future[float]:
        """Ask for a sign of life.

        Returns:
            What becomes the round trip in seconds; cancelled if the connection ends.
        """
        future: asyncio.Future[float] = self._loop.create_future()
        if self._is_closing:
            future.cancel()
            return future
        payload = b"%d" % next(self._pings)
        self._probes[payload] = (self._loop.time(), future)
        self._send(Opcode.PING, payload)
        return future

    def fail(self, error: Exception) -> None:
        """Cut the connection; whoever stands behind is told ``error``."""
        if self._error is None:
            self._error = error
        self._is_closing = True
        if not self._is_made:
            self.connection_lost(None)  # the handshake never came to its end
        elif not self._is_lost:
            self._wire.abort()

    def finish(self, code: CloseCode = CloseCode.NORMAL, reason: str = "") -> None:
        """Close in good order: what was written still goes out."""
        if self._is_closing:
            return
        if not self._is_made:
            self.fail(ConnectionAbortedError("closed by us"))
            return
        self._send(Opcode.CLOSE, close_payload(code, reason))
        self._is_closing = True
        self._wire.close()
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_lost:
            self._timer = self._loop.call_later(_CLOSE_SECONDS, self._give_up)

    # What the kinds do.

    @abstractmethod
    def _take(self, opcode: int, data: bytes, is_last: bool) -> None:
        """A part of a message: text or bytes (``opcode``), and whether it ends here."""

    @abstractmethod
    def _ended(self, error: Exception | None) -> None:
        """Nothing more comes. Called once."""

    # What the socket says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.Transport, transport)
        self._is_made = True
        if self._is_closing:
            self._wire.abort()
            return
        with contextlib.suppress(AttributeError):  # uvloop has a buffer of its own
            self._wire.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self._wire.set_write_buffer_limits(_HIGH_WATER_BYTES, _LOW_WATER_BYTES)
        watch_peer(self._wire)
        self.heard = self._loop.time()
        self._wait_a_beat()

    def data_received(self, data: bytes) -> None:
        self.heard = self._loop.time()
        for opcode, payload, is_last in self._reader.feed(data):
            if self._is_closing:
                return
            if opcode < Opcode.CLOSE:
                self._take(opcode, payload, is_last)
            elif opcode == Opcode.PING:
                # Not for somebody who pings on and on and takes nothing.
                if self._wire.get_write_buffer_size() < _HIGH_WATER_BYTES:
                    self._send(Opcode.PONG, payload)
            elif opcode == Opcode.PONG:
                self._answered(payload)
            else:
                self._is_closing = True
                self._wire.close()
        if self._reader.fault is not None and not self._is_closing:
            fault = self._reader.fault
            self._send(Opcode.CLOSE, close_payload(CloseCode.PROTOCOL_ERROR, fault))
            self.fail(PeerLost(f"the other end sent {fault}"))

    def eof_received(self) -> None:
        self._is_closing = True  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_lost:
            return
        self._is_lost = self._is_closing = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        probes, self._probes = self._probes, {}
        for _, future in probes.values():
            future.cancel()
        self._ended(self._error or exc)

    # The beat.

    def _wait_a_beat(self) -> None:
        self._due = self._loop.time() + self._beat
        self._timer = self._loop.call_at(self._due, self._on_beat)

    def _on_beat(self) -> None:
        now = self._loop.time()
        # While this machine slept or stood still, nobody could be heard.
        self.heard += max(0.0, now - self._due - self._beat / 2)
        silent = now - self.heard
        if self._is_reading and silent > DEAD_BEATS * self._beat:
            self.fail(PeerLost(f"the other end was silent for {silent:.1f} s"))
            return
        if self._beat_sent is None:
            self._beat_sent = self._loop.time()
        self._send(Opcode.PING, _BEAT)
        self._wait_a_beat()

    def _answered(self, payload: bytes) -> None:
        if payload == _BEAT and self._beat_sent is not None:
            self.round_trip = self._loop.time() - self._beat_sent
            self._beat_sent = None
            return
        sent, future = self._probes.pop(payload, (0.0, None))
        if future is None:
            return  # a pong that nobody asked for is allowed (RFC 6455, 5.5.3)
        self.round_trip = self._loop.time() - sent
        if not future.done():
            future.set_result(self.round_trip)

    def _send(self, opcode: Opcode, payload: bytes) -> None:
        if not self._is_closing:
            self._wire.write(frame(opcode, payload, is_masked=self._is_client))

    def _give_up(self) -> None:
        if not self._is_lost:
            self._wire.abort()


class Carrier(WebSocket, asyncio.Transport):
    """A transport for a protocol that takes it for a socket's."""

    def __init__(
        self,
        protocol: asyncio.Protocol,
        *,
        is_client: bool,
        beat: float,
        peer: str,
        on_lost: Callable[["Carrier"], None] | None = None,
    ) -> None:
        """Make one end; ``protocol`` is told when the socket is there.

        Args:
            protocol: what stands behind.
            is_client: whether we dialed.
            beat: seconds between two pings.
            peer: who is at the other end, told as its address.
            on_lost: called after ``protocol.connection_lost``.
        """
        WebSocket.__init__(self, is_client=is_client, beat=beat)
        asyncio.Transport.__init__(self, {"peername": (peer, 0)})
        self._protocol: asyncio.Protocol | None = protocol
        self._on_lost = on_lost
        self._parts: list[bytes] = []  # written in this turn of the loop
        self._parts_bytes = 0
        # Takes what the other end says by ``tell``; without it that ends all.
        self.on_note: Callable[[bytes], None] | None = None
        self._note = b""  # of a note that is not whole

    def tell(self, note: str) -> None:
        """Say something, behind the bytes written so far. After the end: nothing."""
        self._flush()
        self._send(Opcode.TEXT, note.encode())

    # The socket's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._is_closing and self._protocol is not None:
            self._protocol.connection_made(self)

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()

    def _take(self, opcode: int, data: bytes, is_last: bool) -> None:
        if opcode != Opcode.BINARY:
            self._take_note(data, is_last)
        elif data and self._protocol is not None:
            self._protocol.data_received(data)

    def _take_note(self, data: bytes, is_last: bool) -> None:
        self._note += data
        if self.on_note is None:
            self.fail(PeerLost("the other end sent text where bytes belong"))
        elif len(self._note) > MAX_NOTE_BYTES:
            self.fail(PeerLost("the other end sent a note that is too long"))
        elif is_last:
            note, self._note = self._note, b""
            self.on_note(note)

    def _ended(self, error: Exception | None) -> None:
        # The protocol refers to us and we to it; cut the circle, so that no memory
        # waits for the collector.
        protocol, self._protocol = self._protocol, None
        on_lost, self._on_lost = self._on_lost, None
        self.on_note = None
        self._parts.clear()
        if protocol is not None:
            protocol.connection_lost(error)
        if on_lost is not None:
            on_lost(self)

    # The protocol's side: what ``asyncio.Transport`` promises.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_closing or not data:
            return
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(bytes(data))
        self._parts_bytes += len(data)
        if self._parts_bytes >= MAX_WRITTEN_BYTES:
            self._flush()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        for data in list_of_data:
            self.write(data)

    def _flush(self) -> None:
        """Send what was written, in as few frames as possible."""
        if not self._parts:
            return
        parts, self._parts = self._parts, []
        self._parts_bytes = 0
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(data) <= MAX_WRITTEN_BYTES:
            self._send(Opcode.BINARY, data)
            return
        for at in range(0, len(data), MAX_WRITTEN_BYTES):
            self._send(Opcode.BINARY, data[at : at + MAX_WRITTEN_BYTES])

    def close(self) -> None:
        self._flush()
        self.finish()

    def abort(self) -> None:
        self.fail(ConnectionAbortedError("cut by us"))

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self._parts_bytes + self._wire.get_write_buffer_size()

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        self._wire.set_write_buffer_limits(high, low)

    def is_reading(self) -> bool:
        return self._is_reading

    def pause_reading(self) -> None:
        if self._is_reading and not self._is_closing:
            self._is_reading = False
            self._wire.pause_reading()

    def resume_reading(self) -> None:
        if not self._is_reading and not self._is_closing:
            self._is_reading = True
            self.heard = self._loop.time()
            self._wire.resume_reading()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol or asyncio.Protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)


class Channel(WebSocket):
    """Text messages, each handed on whole."""

    def __init__(
        self,
        *,
        is_client: bool,
        beat: float,
        on_message: Callable[[str], None],
        on_lost: Callable[[Exception | None], None],
    ) -> None:
        """Make one end.

        Args:
            is_client: whether we dialed.
            beat: seconds between two pings.
            on_message: called with each message; must not raise.
            on_lost: called once, when it has ended, with the reason if there is one.
        """
        super().__init__(is_client=is_client, beat=beat)
        self._on_message = on_message
        self._on_lost = on_lost
        self._parts: list[bytes] = []
        self._size = 0

    def send(self, text: str) -> None:
        """Send one message. After the end this does nothing."""
        self._send(Opcode.TEXT, text.encode())

    def _take(self, opcode: int, data: bytes, is_last: bool) -> None:
        self._parts.append(data)
        self._size += len(data)
        if opcode != Opcode.TEXT:
            self.fail(PeerLost("the other end sent bytes where text belongs"))
        elif self._size > MAX_MESSAGE_BYTES:
            self._send(Opcode.CLOSE, close_payload(CloseCode.TOO_BIG))
            self.fail(PeerLost("the other end sent a message that is too long"))
        elif is_last:
            whole = b"".join(self._parts)
            self._parts.clear()
            self._size = 0
            try:
                text = whole.decode()
            except UnicodeDecodeError:
                self.fail(PeerLost("the other end sent text that is not UTF-8"))
            else:
                self._on_message(text)

    def _ended(self, error: Exception | None) -> None:
        self._on_lost(error)


def watch_peer(transport: asyncio.Transport) -> None:
    """Have the kernel look after a silent peer too, as far as it can."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if sys.platform == "linux":
        tcp = socket.IPPROTO_TCP
        options += [
            (tcp, socket.TCP_KEEPIDLE, _KEEP_IDLE_SECONDS),
            (tcp, socket.TCP_KEEPINTVL, _KEEP_INTERVAL_SECONDS),
            (tcp, socket.TCP_KEEPCNT, _KEEP_PROBES),
            (tcp, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MILLISECONDS),
        ]
    with contextlib.suppress(OSError):
        for level, name, value in options:
            sock.setsockopt(level, name, value)
