"""One client's connection, and the rules that all of them share.

aiohttp answers well-formed requests; ``Connection`` adds what it leaves out (measured
with aiohttp 3.14): a deadline for request heads, an end for clients that take no bytes,
a parting that lets the answer arrive, and an OpenAI-shaped answer to bytes that are not
HTTP, of which nothing is logged. ``Guard`` holds the rules: how many connections there
may be, and how long each may keep us waiting. Neither knows where a connection comes
from (a socket, TLS, a tunnel), nor of routes, keys or models.

Private names of aiohttp that are used here, all of ``web_protocol.RequestHandler``:
``_waiter`` (set while a connection waits for its next request), ``_close`` (it closes
after this answer), ``_messages`` (requests that are parsed and wait),
``_current_request``, ``_request_count``, ``_reading_paused`` and ``_task_handler``; and
``_cache`` of its requests. A test fails when one of them moves.
"""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any, Protocol, cast

from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestHandler

from inferencia.doorstep import Doorstep
from inferencia.endofturn import EndOfTurn
from inferencia.errors import ApiError, InternalError, InvalidRequest, Overloaded

log = logging.getLogger(__name__)

# How long a client that is still sending what nobody wants may take to read the
# answer, and how much of it is thrown away meanwhile. Closing with bytes unread would
# reset the connection and lose the answer on its way.
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 64 * 1024

# How long an answer may still take to a client that has closed its side of the
# connection. The same packet comes from clients that have closed both sides: while
# nothing is written to them they cannot be told apart, and most of them have left (of
# the usual clients none closes one side only). So what is answered at once reaches
# those who half-close, and what takes longer is cancelled, nearly as early as without
# this.
_HALF_CLOSED_SECONDS = 0.25

# What is advised when there is no room for a connection.
_FULL_RETRY_SECONDS = 2.0

# What is taken from the kernel at a time. asyncio's own 256 KiB would let strangers
# put as much into memory before their key is looked at; uvloop has a buffer of its own.
_READ_BYTES = 64 * 1024

# What is as large as this is not held until the end of a turn: next to the work of
# copying it, waking its reader is nothing.
_LARGE_BYTES = 16 * 1024

# How often connections that hold unsent bytes are looked at, at most and at least.
_SWEEP_MAX_SECONDS = 5.0
_SWEEP_MIN_SECONDS = 0.02

# Where Linux (4.1 and later) keeps tcpi_bytes_acked in its struct tcp_info.
_BYTES_ACKED = slice(120, 128)


class FlowObserver(Protocol):
    """Who wants to know that the client's side of a connection fills up or drains."""

    def client_paused(self) -> None:
        """Written bytes pile up: write no more."""

    def client_resumed(self) -> None:
        """The client has taken them."""


class Connection(RequestHandler):
    """One client connection, guarded by deadlines."""

    __slots__ = (
        "_end_of_turn",
        "_guard",
        "_half_closed_timer",
        "_head_timer",
        "_held",
        "_is_ending",
        "_is_malformed",
        "_parting",
        "_progress_at",
        "_successor",
        "_taken",
        "_taken_lately",
        "_unsent",
        "_wire",
        "address",
        "flow_observer",
    )

    def __init__(
        self, guard: "Guard", address: object, server: web.Server, **kwargs: Any
    ) -> None:
        super().__init__(server, **kwargs)
        self.address = address  # what ``Listener.open`` was told of where it came in
        self._guard = guard
        self._end_of_turn = EndOfTurn.of(self._loop)  # when answers are written
        self._head_timer: asyncio.TimerHandle | None = None
        # Runs while a client that has closed its side may get its answer.
        self._half_closed_timer: asyncio.TimerHandle | None = None
        # Kept apart from ``transport``, which aiohttp forgets before it is flushed.
        self._wire: asyncio.Transport | None = None
        self._held = b""  # of an answer, until the end of this turn
        self._unsent = 0  # bytes, at the last sweep
        self._taken = 0  # bytes that the client had received by then
        self._taken_lately = 0  # the same, since it has closed its side
        self._progress_at = 0.0  # loop time at which the client last took bytes
        self._is_malformed = False  # what came is no HTTP, and so has no end
        self._is_ending = False  # no request is taken after those that are here
        self._parting: int | None = None  # bytes that may still come, once it ends
        self._successor: asyncio.Protocol | None = None  # see ``hand_over``
        # Set while an answer is copied to this client, by the one who copies.
        self.flow_observer: FlowObserver | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._wire = cast(asyncio.Transport, transport)
        with contextlib.suppress(AttributeError):
            self._wire.max_size = _READ_BYTES  # type: ignore[attr-defined]
        if not self._guard.admit(self):
            self._guard.turn_away(self._wire)
            return
        super().connection_made(transport)
        if not self._guard.parks:
            self._arm_head_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._disarm_head_timer()
        if self._half_closed_timer is not None:
            self._half_closed_timer.cancel()
        self._guard.forget(self)
        super().connection_lost(exc)

    def write_soon(self, data: bytes) -> None:
        """Write at the end of this turn of the loop, with what others write then.

        Before anybody else writes here, or closes, it is written in any case. What is
        large is written at once, so that nothing piles up before ``pause_writing``.
        """
        if self._held:
            self._held += data
        else:
            self._held = data
            if len(data) <= _LARGE_BYTES:
                self._end_of_turn.call(self._loop, self._write_now)
        if len(self._held) > _LARGE_BYTES:
            self.write_held()

    def write_held(self) -> None:
        """Write now what waits for the end of the turn."""
        if self._held:
            self._end_of_turn.hurry()
            self._write_now()

    def _write_now(self) -> None:
        if not self._held:
            return
        data, self._held = self._held, b""
        # uvloop raises for a transport that is cut; our end is told a turn later.
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(data)

    def close(self) -> None:
        self.write_held()
        super().close()

    def force_close(self) -> None:
        self.write_held()
        super().force_close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed its side: answer what it has asked, and quickly.

        Returns:
            Whether our side stays open for now.
        """
        self.write_held()
        if self._half_closed_timer is None:
            if not self._may_half_close():
                return False
            if self._wire is not None:
                self._taken_lately = taken_bytes(self._wire)
            self._half_closed_timer = self._loop.call_later(
                _HALF_CLOSED_SECONDS, self._has_left
            )
        return True

    def data_received(self, data: bytes) -> None:
        if self._parting is not None:
            self._discard(len(data))
            return
        seen = self._request_count
        super().data_received(data)
        if self._request_count != seen:
            self._disarm_head_timer()
            self._end_after_chunks(self._request_count - seen)
        elif self._head_timer is None and self._waiter is not None:
            # The first bytes of a head on a connection that was idle.
            self._arm_head_timer()

    def _end_after_chunks(self, count: int) -> None:
        """Let a request in chunks be the last one on its connection.

        aiohttp's C parser gives the last trailer of a chunked body to the next request
        as a header (3.14.5, measured): ``Authorization``, say, or ``X-Forwarded-For``,
        to somebody else's request if a proxy shares its connections.

        Args:
            count: how many requests have just come.
        """
        if count == 1 and not self._is_ending and self._messages:  # the usual case
            if not getattr(self._messages[-1][0], "chunked", False):
                return
        new = [self._messages.pop() for _ in range(min(count, len(self._messages)))]
        for message, body in reversed(new):
            if self._is_ending:
                return  # it may not be what its sender wrote
            # (What is malformed is no message, and the last one anyway.)
            if getattr(message, "chunked", False):
                self._is_ending = True
                message = message._replace(should_close=True)  # type: ignore[union-attr]
            self._messages.append((message, body))

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp calls this with every piece of a body that is taken, and runs its
        # parser each time; without a pause there is nothing to resume.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.flow_observer is not None:
            self.flow_observer.client_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._progress_at = self._loop.time()
        if self.flow_observer is not None:
            self.flow_observer.client_resumed()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what never became a request, and say nothing of its content."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had already begun")
        if status >= 500:
            log.error("a request failed outside of the chain", exc_info=exc)
            return self._guard.failed()
        self._is_malformed = True
        request._cache["version"] = HttpVersion11  # ours; what came had none
        return self._guard.malformed(request.remote)

    @property
    def has_unsent(self) -> bool:
        """Whether bytes wait for this client to take them."""
        wire = self._wire
        return wire is not None and wire.get_write_buffer_size() > 0

    async def finish_response(
        self,
        request: web.BaseRequest,
        resp: web.StreamResponse,
        start_time: float | None,
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer; then part well from a client that may be sending still.

        Our side is closed, so that the client sees the end of the answer. A little of
        what it still sends is thrown away, the rest stays in the kernel; the socket is
        closed when the client closes its side, and soon in any case.
        """
        if self._messages or self._close or not resp.keep_alive:
            self.write_held()  # another answer or the end of all comes behind it
        answered = await super().finish_response(request, resp, start_time)
        if self._successor is not None:
            self._leave(self._successor)
            return answered
        wire = self._wire
        if self._half_closed_timer is not None and not self._messages:
            self.close()  # nothing more can come
        if (self._is_malformed or not request.content.is_eof()) and (
            wire is not None and not wire.is_closing()
        ):
            self.write_held()
            answered[0].force_close()
            self._parting = _LINGER_BYTES
            if wire.can_write_eof():
                wire.write_eof()
            await asyncio.sleep(_LINGER_SECONDS)
        return answered

    def hand_over(self, successor: asyncio.Protocol) -> None:
        """Give the socket to another protocol, as soon as the answer is finished.

        The answer must be a 101. Whoever asked waits for it before it says more; what
        came earlier is lost.
        """
        self._successor = successor

    def let_go(self) -> bool:
        """Leave the socket of an idle connection to whoever asks for it.

        Returns:
            Whether it was idle; otherwise nothing has changed.
        """
        if self._messages or self._current_request is not None or self._held:
            return False
        self._wire = self.transport = None
        self.connection_lost(None)
        return True

    def _leave(self, successor: asyncio.Protocol) -> None:
        """Let go of the socket; for aiohttp this connection has ended."""
        wire = self._wire
        if wire is None or wire.is_closing():
            successor.connection_lost(None)
            return
        self._wire = self.transport = None  # so that nobody here closes it
        self._task_handler = None  # nor cancels who calls this
        wire.set_protocol(successor)
        successor.connection_made(wire)
        wire.resume_reading()
        self.connection_lost(None)

    def _discard(self, size: int) -> None:
        assert self._parting is not None
        self._parting -= size
        if self._parting <= 0 and self._wire is not None:
            self._wire.pause_reading()

    def check_progress(self, now: float) -> None:
        """Cut the connection if its client takes no bytes for too long."""
        wire = self._wire
        if wire is None:
            return
        unsent = wire.get_write_buffer_size()
        # The kernel holds megabytes and asks for more only when a third of them is
        # gone: a slow client can be taking bytes all the time while ours stay.
        taken = taken_bytes(wire) if unsent else 0
        if (
            unsent == 0
            or self._unsent == 0
            or unsent < self._unsent
            or taken != self._taken
        ):
            self._progress_at = now
        elif now - self._progress_at >= self._guard.write_timeout:
            log.info("client took no bytes for %g s: cut", self._guard.write_timeout)
            wire.abort()
        self._unsent = unsent
        self._taken = taken

    def _may_half_close(self) -> bool:
        """Whether whole requests are here whose answers can still be sent."""
        if self._wire is None or self._parting is not None or not self._request_count:
            return False
        waiter, request = self._waiter, self._current_request
        if waiter is not None and not waiter.done():
            return False  # all is answered
        if request is not None and not request.content.is_eof():
            return False  # half a body
        return self._wire.can_write_eof()  # TLS cannot close one side only

    def _has_left(self) -> None:
        """Take a client for gone that has closed its side and has no answer yet."""
        if self._wire is None or self._wire.is_closing():
            return
        self.write_held()
        before, self._taken_lately = self._taken_lately, taken_bytes(self._wire)
        if self.has_unsent or self._taken_lately != before:
            # One that is gone would have reset the connection; this one reads.
            self._half_closed_timer = self._loop.call_later(
                _HALF_CLOSED_SECONDS, self._has_left
            )
        else:
            self._wire.abort()

    def _arm_head_timer(self) -> None:
        self._head_timer = self._loop.call_later(
            self._guard.header_timeout, self._head_is_late
        )

    def _disarm_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._wire is not None:
            self._wire.abort()


class Guard:
    """The rules that all connections of one daemon share."""

    def __init__(
        self,
        *,
        header_timeout: float,
        write_timeout: float,
        max_connections: int,
        error_response: Callable[[ApiError], web.Response],
        on_malformed: Callable[[str | None], None],
        parks: bool = False,
    ) -> None:
        """Set the rules.

        Args:
            header_timeout: seconds in which a request head must be complete.
            write_timeout: seconds for which a client may refuse to take bytes.
            max_connections: open connections; more are turned away.
            error_response: makes an answer outside of the chain, to what is no request.
            on_malformed: told the address of each malformed request's sender.
            parks: connections may wait for their first request, as long as they like.
        """
        self.header_timeout = header_timeout
        self.write_timeout = write_timeout
        self.max_connections = max_connections
        self.parks = parks
        self.refused = 0  # connections turned away because there were too many
        self._error_response = error_response
        self._on_malformed = on_malformed
        self._connections: set[Connection] = set()
        self._places = 0  # taken by connections of somebody else
        self._doorstep = Doorstep(self._no_room)

    @property
    def open_connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections) + self._places

    def admit(self, connection: Connection) -> bool:
        """Whether there is room for one more; if so it is counted."""
        if not self._has_room():
            return False
        self._connections.add(connection)
        return True

    def turn_away(self, wire: asyncio.Transport) -> None:
        """Close a connection that was not admitted; a few are told why."""
        if not self._doorstep.take(wire):
            wire.abort()

    def _no_room(self) -> bytes:
        error = Overloaded(
            "as many connections are open as may be (server.max_connections); "
            "try again shortly",
            retry_after=_FULL_RETRY_SECONDS,
        )
        return _whole(self._error_response(error))

    def take_place(self) -> bool:
        """Count a connection that is not served here; False if there is no room."""
        if not self._has_room():
            return False
        self._places += 1
        return True

    def give_place_back(self) -> None:
        """A connection that was counted by ``take_place`` is closed."""
        self._places -= 1

    def _has_room(self) -> bool:
        if self.open_connections < self.max_connections:
            return True
        self.refused += 1
        log.warning(
            "%d connections are open: more are turned away (server.max_connections)",
            self.max_connections,
        )
        return False

    def forget(self, connection: Connection) -> None:
        """A connection is closed. Safe for one that was never admitted."""
        self._connections.discard(connection)

    def malformed(self, address: str | None) -> web.Response:
        """The answer to bytes that are not a proper HTTP request."""
        self._on_malformed(address)
        response = self._error_response(
            InvalidRequest("this is not a well-formed HTTP/1.1 request")
        )
        response.force_close()
        return response

    def failed(self) -> web.Response:
        """The answer when even the chain has failed, which explains all else."""
        response = self._error_response(InternalError("something went wrong here"))
        response.force_close()
        return response

    def change(self, header_timeout: float, write_timeout: float) -> None:
        """Let other deadlines hold from now on."""
        self.header_timeout = header_timeout
        self.write_timeout = write_timeout

    async def flushed(self) -> None:
        """Wait until every client has taken all that was written for it."""
        for connection in self._connections:
            connection.write_held()
        # Transports don't tell when they become empty, only when they become emptier.
        while any(c.has_unsent for c in self._connections):  # noqa: ASYNC110
            await asyncio.sleep(_SWEEP_MIN_SECONDS)

    async def sweep(self) -> None:
        """Look after clients that take no bytes; runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            often = max(_SWEEP_MIN_SECONDS, self.write_timeout / 4)
            pause = min(_SWEEP_MAX_SECONDS, often)
            await asyncio.sleep(pause)
            now = loop.time()
            for connection in tuple(self._connections):
                connection.check_progress(now)


def _whole(response: web.Response) -> bytes:
    """An answer as it goes onto a connection that ends with it."""
    body = response.body
    assert isinstance(body, bytes)
    lines = [f"HTTP/1.1 {response.status} {response.reason}"]
    lines += (f"{name}: {value}" for name, value in response.headers.items())
    lines += (f"Content-Length: {len(body)}", "Connection: close", "\r\n")
    return "\r\n".join(lines).encode("latin-1") + body


def taken_bytes(wire: asyncio.Transport) -> int:
    """How many bytes the client has received; 0 where the kernel does not say."""
    sock: socket.socket | None = wire.get_extra_info("socket")
    if sys.platform != "linux" or sock is None:
        return 0
    with contextlib.suppress(OSError):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
        return int.from_bytes(info[_BYTES_ACKED], sys.byteorder)
    return 0
