"""One connection to an engine; it carries one exchange at a time.

    dial -> begin -> (head) -> (body) -> finish -> idle -> begin ...
                                           |         +---> closed: too long idle, or
                                           |               the peer sent or ended
                                           +-> closed: everything that is not clean

A connection goes back to its pool only if the answer is complete, the request was
written to its end, both sides keep it alive and not one byte came beyond the end. So
nothing of one answer can reach another. In every other case it is aborted at once;
closing is also how a request is cancelled, since HTTP/1.1 has no other way.
"""

import asyncio
import contextlib
import os
import select
import ssl
from typing import Any, Protocol, cast

from inferencia.endofturn import EndOfTurn
from inferencia.http1 import AnswerParser
from inferencia.upstream.answer import (
    BadAnswer,
    Disconnected,
    Silent,
    Truncated,
    UpstreamError,
)
from inferencia.upstream.origin import Origin
from inferencia.upstream.socketanswer import MAX_HELD_BYTES, SocketAnswer

# What is taken from the kernel at a time. For each read asyncio asks for that much
# memory first; its own 256 KiB come from the system and go back there each time.
_READ_BYTES = 64 * 1024
# After a larger read a connection rests until the pool lets it go on. uvloop reads
# 250 KiB at a time, up to 32 times from one socket before it looks at the next: with 30
# streams of 5 MiB each, everybody else waited for more than a second (measured).
_LARGE_READ_BYTES = 128 * 1024
# Small bodies travel with the head in one segment; copying them costs less than a call.
_JOINED_BODY_BYTES = 64 * 1024
# Larger ones go in slices, and other connections get their turn after a few of them.
_SLICE_BYTES = 256 * 1024
_SLICES_PER_TURN = 4
# An answer that a broken connection left behind is small; this is a megabyte.
_LAST_READS = 16
# Peers close an idle connection after exactly what they announce; leave a second for
# the request to travel.
_KEEP_ALIVE_MARGIN_SECONDS = 1
# uvloop's clock counts milliseconds; a shorter timer would fire at once, in a circle.
SHORTEST_TIMER_SECONDS = 0.001


class Keeper(Protocol):
    """What a connection asks and tells the pool that it belongs to."""

    origin: Origin
    keepalive: float  # seconds that it may be idle at most

    def rest(self, connection: "Connection", loop: asyncio.AbstractEventLoop) -> None:
        """A large read is done: call ``read_on`` when others had their turn."""

    def give_back(self, connection: "Connection") -> None:
        """An exchange is complete, and the connection may serve more."""

    def discard(self, connection: "Connection") -> None:
        """It is about to close: do not give it to anybody."""

    def lost(self, connection: "Connection") -> None:
        """It is closed."""


class Connection(asyncio.Protocol):
    """One connection to the origin, with at most one exchange on it."""

    __slots__ = (
        "_answer",
        "_end_of_turn",
        "_is_reading",
        "_is_resting",
        "_is_write_paused",
        "_loop",
        "_outstanding",
        "_parser",
        "_poll",
        "_pool",
        "_timer",
        "_timer_due",
        "_transport",
        "_unsent",
        "_unwritten",
        "idle_until",
        "is_lost",
        "now",
        "served",
    )

    _transport: asyncio.Transport

    def __init__(self, pool: Keeper, loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time
        self.served = 0  # requests begun
        self.idle_until = 0.0  # while idle: when it is too old to be used again
        self.is_lost = False  # the transport has said its last
        self._pool = pool
        self._loop = loop
        self._end_of_turn = EndOfTurn.of(loop)  # when requests are written
        self._poll: select.poll | None = None  # tells whether unread bytes wait
        self._answer: SocketAnswer | None = None  # of the exchange that is going on
        self._parser = AnswerParser("")
        self._unwritten = b""  # a request that leaves at the end of this turn
        self._unsent: memoryview | None = None  # of a large request body
        self._is_write_paused = False
        self._is_reading = True
        self._is_resting = False  # paused until the end of this turn only
        # One timer for all exchanges, never moved by bytes: when it fires, it looks at
        # when the last ones came and sleeps for the rest.
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._outstanding = 0  # bytes of the request not yet taken, at the last look

    # One exchange

    def new_future(self) -> "asyncio.Future[Any]":
        """A future of the pool's loop. (get_running_loop() makes a system call.)"""
        return self._loop.create_future()

    def begin(
        self, method: str, head: bytes, body: bytes, silence_seconds: float
    ) -> SocketAnswer:
        """Write a request; its answer begins to wait for its head."""
        answer = SocketAnswer(self, self.now(), silence_seconds)
        self._answer = answer
        self._parser = AnswerParser(method)
        self.served += 1
        if self.is_lost:  # a fresh one that the peer closed before its first turn
            self._parser.eof(clean=False)
            self._finish(answer)
            return answer
        self.watch_silence()
        if len(body) <= _JOINED_BODY_BYTES:
            self._unwritten = head + body if body else head
            self._end_of_turn.call(self._loop, self.write_now)
        else:
            self._end_of_turn.hurry()
            self._unsent = memoryview(body)
            self._transport.write(head)
            self._write_on()
            self._outstanding = self._count_outstanding()
        return answer

    def write_now(self) -> None:
        """Write the request that waits for the end of the turn, if it still does."""
        request = self._unwritten
        if not request:
            return  # it was given up
        if self.served > 1 and not self.is_quiet:
            self._fail_unwritten()
            return
        self._unwritten = b""
        self._transport.write(request)
        self._outstanding = self._count_outstanding()

    def _fail_unwritten(self) -> None:
        authority = self._pool.origin.authority
        self.fail(Disconnected(f"{authority} spoke or left before it was asked"))

    def data_received(self, data: bytes) -> None:
        # The hot path: everything that a token costs us between two sockets.
        answer = self._answer
        if answer is None:
            self.close()  # nobody asked for anything
            return
        answer.last_byte = self.now()
        parser = self._parser
        body = parser.feed(data)
        sink = answer.live
        if sink is None:
            if self._unwritten and self.served > 1:
                self._fail_unwritten()
                return
            if not answer.status and parser.status:
                self._take_head(answer)
            if body:
                answer.hold(body)
        elif body:
            try:
                sink.data(body)
            except Exception as error:
                answer.break_off(error)
        if parser.is_over and self._answer is answer:
            self._finish(answer)
        elif len(data) > _LARGE_READ_BYTES and self._is_reading:
            self.pause_reading()
            self._is_resting = not self._is_reading
            self._pool.rest(self, self._loop)

    def read_on(self) -> None:
        """Go on after a rest, unless something else was decided meanwhile."""
        if self._is_resting:
            self.resume_reading()

    def _take_head(self, answer: SocketAnswer) -> None:
        if self._unsent is not None and self._parser.status >= 300:
            # It has decided without the rest of the body and will not read it. Never
            # fully written, so this connection closes after the answer.
            self._unsent = memoryview(b"")
        answer.take_head(self._parser)

    def _finish(self, answer: SocketAnswer) -> None:
        parser = self._parser
        self._detach()
        error = self._failure(parser)
        if error is None and self._is_reusable(parser):
            self.resume_reading()
            self._pool.give_back(self)
        else:
            self.close()
        answer.settle(error)

    def _detach(self) -> None:
        if self._answer is not None:
            self._answer.let_go()
            self._answer = None

    def _failure(self, parser: AnswerParser) -> UpstreamError | None:
        if parser.fault is None:
            return None
        authority = self._pool.origin.authority
        if not parser.has_begun:
            return Disconnected(f"{authority} closed the connection without an answer")
        kind = Truncated if parser.is_cut else BadAnswer
        return kind(f"bad answer from {authority}: {parser.fault}")

    def _is_reusable(self, parser: AnswerParser) -> bool:
        """Whether the next request may go here; sets ``idle_until``."""
        keepalive = self._pool.keepalive
        if parser.keep_alive_seconds is not None:
            announced = parser.keep_alive_seconds - _KEEP_ALIVE_MARGIN_SECONDS
            keepalive = min(keepalive, announced)
        self.idle_until = self.now() + keepalive
        most = parser.keep_alive_requests
        return (
            parser.keep_alive
            and not parser.has_surplus
            and not self._unwritten
            and self._unsent is None
            and keepalive > 0
            and (most is None or self.served < most)
            and not self._transport.is_closing()
            and not self._transport.get_write_buffer_size()
        )

    def close(self) -> None:
        """Close at once, whatever is going on; its answer gets nothing more."""
        self._detach()
        self._unwritten = b""
        self._unsent = None
        self._pool.discard(self)
        if not self.is_lost:  # asyncio's transports cannot bear it afterwards
            self._transport.abort()

    def shut(self) -> None:
        """Close at once because the pool closes; an answer under way fails."""
        error: UpstreamError = Disconnected("the connection is being closed by us")
        if self._answer is not None and self._answer.status:
            error = Truncated("the connection is being closed by us")
        self.fail(error)

    def fail(self, error: UpstreamError) -> None:
        """Close at once and tell the answer why."""
        answer = self._answer
        self.close()
        if answer is not None:
            answer.settle(error)

    @property
    def is_quiet(self) -> bool:
        """Whether it is open and nothing waits to be read.

        Bytes or an end that came in this very turn of the loop are not reported yet. A
        request sent now would take them for its answer.
        """
        return self.is_open and (self._poll is None or not self._poll.poll(0))

    @property
    def is_open(self) -> bool:
        """Whether it can be written to, as far as is known."""
        return not self._transport.is_closing()

    # Silence

    def watch_silence(self) -> None:
        """See to it that the timer fires no later than silence could be too long."""
        answer = self._answer
        if answer is None or answer.silence_seconds <= 0:
            return
        self._arm_timer(answer.quiet_since + answer.silence_seconds)

    def _arm_timer(self, due: float) -> None:
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        delay = max(due - self.now(), SHORTEST_TIMER_SECONDS)
        self._timer = self._loop.call_later(delay, self._look_at_silence)

    def _look_at_silence(self) -> None:
        self._timer = None
        answer = self._answer
        if answer is None or answer.silence_seconds <= 0:
            return
        now = self.now()
        if answer.is_held_back or self._request_moves():
            answer.quiet_since = now
        allowed = answer.silence_seconds
        due = max(answer.last_byte, answer.quiet_since) + allowed
        if now < due:
            self._arm_timer(due)
            return
        authority = self._pool.origin.authority
        self.fail(Silent(allowed, f"{authority} was silent for {allowed:g} seconds"))

    def _request_moves(self) -> bool:
        """Whether a request that is on its way came further since the last look.

        When the whole is gone, ``_write_on`` has left the moment in ``quiet_since``.
        """
        before = self._outstanding
        self._outstanding = self._count_outstanding()
        return 0 < self._outstanding != before

    def _count_outstanding(self) -> int:
        unsent = 0 if self._unsent is None else len(self._unsent)
        return unsent + self._transport.get_write_buffer_size()

    # Writing a large body

    def _write_on(self) -> None:
        for _ in range(_SLICES_PER_TURN):
            if not self._unsent or self._is_write_paused:
                return
            part = self._unsent[:_SLICE_BYTES]
            self._unsent = self._unsent[_SLICE_BYTES:] or None
            if self._answer is not None:
                self._answer.quiet_since = self.now()
            self._transport.write(part)
        self._loop.call_soon(self._write_on)

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._write_on()

    # Reading

    def pause_reading(self) -> None:
        self._is_resting = False  # what is paused now is not resumed by itself
        if self._is_reading and not self._transport.is_closing():
            self._is_reading = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._is_resting = False
        if not self._is_reading and not self._transport.is_closing():
            self._is_reading = True
            self._transport.resume_reading()

    # What else the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # (uvloop's transports are none by inheritance.)
        self._transport = cast(asyncio.Transport, transport)
        with contextlib.suppress(AttributeError):  # uvloop has a buffer of its own
            self._transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        fd = _descriptor(self._transport)
        if fd >= 0:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)

    def eof_received(self) -> None:
        answer = self._answer
        if answer is None:
            self.close()
            return
        self._parser.eof(clean=_has_ended_in_order(self._transport))
        self._finish(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._answer is not None:
            self._read_last_words()
            answer = self._answer
            if answer is not None:
                self._parser.eof(clean=False)
                self._finish(answer)
        self._unsent = None
        self._pool.lost(self)

    def _read_last_words(self) -> None:
        """Read what the kernel still has of an answer.

        A server that refuses a large body answers and closes. Our next write then
        fails, and the transport closes without reading that answer (a 413, say),
        though it came before. Other clients look for it too, as Go does in
        ``persistConn.roundTrip``. An end that shows here is no clean one: the error
        that would tell was already taken by the write.
        """
        if self._transport.get_extra_info("ssl_object") is not None:
            return  # what is left is encrypted
        for _ in range(_LAST_READS):
            fd = _descriptor(self._transport)
            if fd < 0 or self._answer is None:
                return
            try:
                data = os.read(fd, MAX_HELD_BYTES)
            except OSError:
                return
            if not data:
                return
            self.data_received(data)


def _has_ended_in_order(transport: asyncio.Transport) -> bool:
    """Whether the end of a stream comes from the peer.

    Anybody on the way can end a TCP connection, so under TLS only the peer's own
    ``close_notify`` counts (RFC 9112, 9.8). asyncio reports both alike.
    """
    tls = transport.get_extra_info("ssl_object")
    try:
        return tls is None or tls.read(1) == b""
    except ssl.SSLError:
        return False


def _descriptor(transport: asyncio.Transport) -> int:
    """The number of the socket, or -1 if there is none or it is closed."""
    sock = transport.get_extra_info("socket")
    return -1 if sock is None else int(sock.fileno())
