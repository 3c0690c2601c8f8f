"""WebSockets that are passed on: a handshake on both sides, then bytes (RFC 6455).

The client's request has gone through the chain like any other. Its handshake is
repeated towards the server, and what that answers is the client's answer: keys,
protocols and extensions are between the two, and no frame is looked into. Afterwards
the handler stays with the connection until either side closes, so that the client's
leaving, a limit or the daemon's end find it where they find every other request.

Each side is read only as fast as the other takes it.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import cast

from aiohttp import web
from aiohttp.http_websocket import WebSocketReader

from inferencia.context import CONTEXT
from inferencia.copying import Relayed
from inferencia.downstream.connection import Connection
from inferencia.errors import InvalidRequest
from inferencia.http1 import AnswerParser, Fields
from inferencia.tunnel.frames import CloseCode, Opcode, close_payload, frame
from inferencia.upstream.answer import BadAnswer, Disconnected, Silent
from inferencia.upstream.dialing import Dialer
from inferencia.upstream.origin import Origin

# llama-server and its like answer at once; a start of the engine comes before this.
HANDSHAKE_SECONDS = 30.0
MAX_HEAD_BYTES = 64 * 1024
# What a server says that declines.
MAX_REFUSAL_BYTES = 64 * 1024

_PASSED_UP = (
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Version",
    "Sec-WebSocket-Extensions",
)
_PASSED_DOWN = (
    "sec-websocket-accept",
    "sec-websocket-protocol",
    "sec-websocket-extensions",
)
# In a browser OpenAI's clients cannot set headers and put their key here.
_KEY_PROTOCOL = "openai-insecure-api-key."
_TARGET = re.compile(r"/[!-~]*")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
_STATUS = re.compile(rb"HTTP/1\.[01] (\d\d\d)[ \r]")


class Declined(Exception):
    """The server has answered, but does not want to speak WebSocket."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"the server answered {status}")
        self.status = status
        self.body = body


def wants_websocket(request: web.Request) -> bool:
    """Whether a request is the opening handshake of a WebSocket."""
    if request.headers.get("Upgrade", "").lower() != "websocket":
        return False
    options = request.headers.get("Connection", "").split(",")
    return any(option.strip().lower() == "upgrade" for option in options)


async def pass_on(
    request: web.Request,
    origin: Origin,
    target: str,
    headers: Sequence[tuple[str, str]],
    *,
    connect_timeout: float,
) -> web.StreamResponse:
    """Open a WebSocket to a server and be the wire between it and the client.

    Args:
        request: the client's handshake; see ``wants_websocket``.
        origin: where the server is.
        target: path and query there, without the origin's base path.
        headers: further ones for the server; none that frame the message.
        connect_timeout: seconds.

    Returns:
        When both sides have closed.

    Raises:
        UpstreamError: there is no connection, or no answer.
        Declined: the server does not want to.
    """
    head = _request_head(request, origin, target, headers)
    loop = asyncio.get_running_loop()
    dialer = Dialer(origin, connect_timeout=connect_timeout)
    far = await dialer.dial(lambda: _Far(loop))
    try:
        far.transport.write(head)
        answer = await _handshake(far, origin)
        connection = request.protocol
        assert isinstance(connection, Connection)
        near = request.transport
        if near is None:
            raise ConnectionResetError("the client is gone")
        near.write(_answer_head(request, answer))
        far.join(connection, near)
        context = request[CONTEXT]
        context.measurement.status = 101
        try:
            await far.closed
        except asyncio.CancelledError:
            interruption = context.interrupted()
            if interruption is None:
                raise
            context.measurement.error_code = interruption.code
            reason = close_payload(CloseCode.GOING_AWAY, interruption.message)
            near.write(frame(Opcode.CLOSE, reason, is_masked=False))
    finally:
        far.leave()
    return Relayed(101, keep_alive=False)


class _Far(asyncio.Protocol):
    """The server's side: first it waits for an answer's head, then it is a pipe."""

    transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.head: asyncio.Future[bytes] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.has_news = asyncio.Event()  # while the answer is no 101
        self.held = bytearray()  # what came and was not passed on
        self._connection: Connection | None = None
        self._near: asyncio.WriteTransport | None = None

    def join(self, connection: Connection, near: asyncio.WriteTransport) -> None:
        """Pass everything on from now on, in both directions."""
        self._connection, self._near = connection, near
        if self.held:
            near.write(bytes(self.held))
            self.held.clear()
        connection.flow_observer = self
        if connection.writing_paused:
            self.client_paused()
        # (Its two methods are all that is asked of it.)
        connection.set_parser(cast(WebSocketReader, _FromClient(self.transport)))

    def leave(self) -> None:
        """Let go of both sides. Idempotent."""
        if self._connection is not None and self._connection.flow_observer is self:
            self._connection.flow_observer = None
        self._connection = self._near = None
        self.transport.abort()

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._near is not None:
            if not self._near.is_closing():
                self._near.write(data)
            return
        self.held += data
        self.has_news.set()
        if not self.head.done():
            end = self.held.find(b"\r\n\r\n")
            if end >= 0 or len(self.held) > MAX_HEAD_BYTES:
                self.head.set_result(bytes(self.held[: end + 4]) if end >= 0 else b"")

    def connection_lost(self, exc: Exception | None) -> None:
        self.has_news.set()
        if not self.head.done():
            self.head.set_result(b"")
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        if self._connection is not None:
            self._connection.pause_reading()

    def resume_writing(self) -> None:
        if self._connection is not None:
            self._connection.resume_reading()

    # What the client's connection says.

    def client_paused(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def client_resumed(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


class _FromClient:
    """Takes what comes from the client, in place of aiohttp's reader of frames."""

    def __init__(self, far: asyncio.WriteTransport) -> None:
        self._far = far

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        if not self._far.is_closing():
            self._far.write(data)
        return False, b""

    def feed_eof(self) -> None:
        """Nothing: the handler is cancelled when its client leaves."""


def _request_head(
    request: web.Request,
    origin: Origin,
    target: str,
    headers: Sequence[tuple[str, str]],
) -> bytes:
    target = origin.base_path + target
    if not _TARGET.fullmatch(target):
        raise InvalidRequest("the path holds something other than printable ASCII")
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {origin.authority}",
        "Connection: Upgrade",
        "Upgrade: websocket",
    ]
    own = [(name, request.headers.get(name)) for name in _PASSED_UP]
    offered = request.headers.getall("Sec-WebSocket-Protocol", ())
    protocols = [one.strip() for one in ",".join(offered).split(",")]
    kept = [one for one in protocols if one and not one.startswith(_KEY_PROTOCOL)]
    own.append(("Sec-WebSocket-Protocol", ", ".join(kept) or None))
    for name, value in (*own, *headers):
        if value is not None and _VALUE.fullmatch(value):
            lines.append(f"{name}: {value}")
    return "\r\n".join((*lines, "\r\n")).encode("latin-1")


async def _handshake(far: _Far, origin: Origin) -> Fields:
    """The headers of the server's 101."""
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            head = await far.head
            status = _STATUS.match(head)
            if status is None:
                if far.closed.done():
                    raise Disconnected(f"{origin.authority} closed the connection")
                raise BadAnswer(f"{origin.authority} does not speak HTTP")
            if status[1] != b"101":
                raise await _refusal(far)
    except TimeoutError as error:
        seconds = HANDSHAKE_SECONDS
        message = f"{origin.authority} did not answer for {seconds:g} seconds"
        raise Silent(seconds, message) from error
    del far.held[: len(head)]
    pairs = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    return tuple((name.strip().lower(), value.strip()) for name, _, value in pairs)


async def _refusal(far: _Far) -> Exception:
    """What the server says instead of a 101."""
    parser = AnswerParser("GET")
    body = b""
    while not parser.is_over and len(body) < MAX_REFUSAL_BYTES:
        if far.held:
            body += parser.feed(bytes(far.held))
            far.held.clear()
        elif far.closed.done():
            parser.eof(clean=True)
        else:
            far.has_news.clear()
            await far.has_news.wait()
    if not parser.status:
        return BadAnswer("no answer to the handshake")
    return Declined(parser.status, body)


def _answer_head(request: web.Request, headers: Fields) -> bytes:
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Connection: Upgrade",
        "Upgrade: websocket",
        *(f"{name}: {value}" for name, value in request[CONTEXT].headers),
    ]
    for name, value in headers:
        if name in _PASSED_DOWN and _VALUE.fullmatch(value):
            lines.append(f"{name.title()}: {value}")
    return "\r\n".join((*lines, "\r\n")).encode("latin-1")
