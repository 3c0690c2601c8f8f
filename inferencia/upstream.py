"""The client side of HTTP/1.1 that answers are relayed through.

An ``Upstream`` is the pool of connections to one origin. ``send`` writes one request
and returns its ``Answer`` as soon as the head is there; body bytes then go straight
from the socket's callback to the ``Sink`` that the caller attached: no task, no queue
and no copy in between, which is what makes relaying cheap.

One connection carries one exchange at a time:

    dial -> begin -> (head) -> (body) -> finish -> idle -> begin ...
                                           |         +---> closed: too long idle, or
                                           |               the peer sent or ended
                                           +-> closed: everything that is not clean

A connection goes back to the pool only if the answer is complete, the request was
written to its end, both sides keep it alive and not one byte came beyond the end. So
nothing of one answer can reach another. In every other case it is aborted at once;
closing is also how a request is cancelled, since HTTP/1.1 has no other way.

A reused connection that closes without one byte of an answer was closed by the peer
while idle (llama-server does so after 5 seconds or 100 requests). Then, and only then,
the request is sent once more on a fresh connection.

What an answer means, which headers pass and what is tried next is decided elsewhere.
"""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import os
import re
import select
import socket
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast
from urllib.parse import urlsplit

from inferencia.endofturn import EndOfTurn
from inferencia.http1 import AnswerParser, Fields, request_head

log = logging.getLogger(__name__)

# What may lie here for a sink that is not attached yet: a few hundred events, or the
# whole of an ordinary answer. Reading stops above it (one read may overshoot).
MAX_HELD_BYTES = 64 * 1024
# What is taken from the kernel at a time. For each read asyncio asks for that much
# memory first; its own 256 KiB come from the system and go back there each time.
_READ_BYTES = 64 * 1024
# After a larger read a connection rests, and so many of those that rest go on in each
# turn of the loop. uvloop reads 250 KiB at a time, up to 32 times from one socket
# before it looks at the next: with 30 streams of 5 MiB each, everybody else waited for
# more than a second (measured).
_LARGE_READ_BYTES = 128 * 1024
_LARGE_READS_PER_TURN = 8
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
# How long resolved addresses are used again. mlx_lm wants a connection per request, and
# a look-up of "localhost" costs more than the connection.
_ADDRESS_SECONDS = 10.0
# uvloop's clock counts milliseconds; a shorter timer would fire at once, in a circle.
_SHORTEST_TIMER_SECONDS = 0.001

# How a handshake fails besides in time. (Refused is none of them.)
_HANDSHAKE_FAILURES = (
    ssl.SSLError,
    ssl.CertificateError,
    ConnectionResetError,
    ConnectionAbortedError,
)

_HOST = re.compile(r"[A-Za-z0-9._-]+")
_URL = re.compile(r"[!-~]+")


class UpstreamError(Exception):
    """The engine's side failed. The text is fit for a log: no content, no secrets."""


class ConnectFailed(UpstreamError):
    """There is no connection; nothing was sent."""

    def __init__(self, reason: str, message: str) -> None:
        """Keep why.

        Args:
            reason: one of ``refused``, ``dns``, ``unreachable``, ``tls``, ``timeout``.
            message: for the log.
        """
        super().__init__(message)
        self.reason = reason


class Disconnected(UpstreamError):
    """The connection closed or was reset before the first byte of an answer."""


class BadAnswer(UpstreamError):
    """What came is not an HTTP answer, or is larger than it may be."""


class Truncated(UpstreamError):
    """The body ended before its framing said so."""


class Silent(UpstreamError):
    """Nothing came for longer than allowed."""

    def __init__(self, seconds: float, message: str) -> None:
        super().__init__(message)
        self.seconds = seconds  # the silence that was allowed


class Sink(Protocol):
    """Takes a body. All three are plain calls from the event loop and must not block.

    They may call the answer's ``pause``, ``resume`` and ``cancel``. After ``end`` or
    ``failed`` nothing more comes. A sink whose ``data`` raises is logged, its answer
    cancelled and its ``failed`` called.
    """

    def data(self, data: bytes) -> None:
        """More of the body, as it arrived, without chunk framing; never empty."""

    def end(self) -> None:
        """The body is complete, and the connection already given back."""

    def failed(self, error: UpstreamError) -> None:
        """No more will come, and what came is not the whole."""


class Answer(ABC):
    """The answer to one request, whoever gives it: a socket, or this process itself.

    Its owner attaches a sink, reads it whole or cancels it; an answer left alone keeps
    its connection.
    """

    status: int
    headers: Fields  # names in lower case, in the order in which they came
    length: int | None  # of the body in bytes, if announced
    last_byte: float  # ``loop.time()`` when the last bytes came
    # The longest silence allowed from now on, in seconds; 0 allows any. It counts from
    # the last byte or from the moment of setting, whichever is later.
    silence_seconds: float

    @abstractmethod
    def attach(self, sink: Sink) -> None:
        """Start delivery. What came before is delivered from inside this call."""

    @abstractmethod
    def pause(self) -> None:
        """Stop reading: the client takes no more. Paused time is never silence."""

    @abstractmethod
    def resume(self) -> None:
        """Read on. What was held back is delivered from inside this call."""

    @abstractmethod
    def cancel(self) -> None:
        """End the work upstream. The sink gets nothing more. May be called twice.

        A sink that is attached afterwards is told that it failed.
        """

    def header(self, name: str) -> str | None:
        """The first value of a header. ``name`` in lower case."""
        for candidate, value in self.headers:
            if candidate == name:
                return value
        return None

    async def read(self, limit: int) -> bytes:
        """The whole body. Cancelling this cancels the answer.

        Raises:
            BadAnswer: it exceeds ``limit`` bytes.
            UpstreamError: it failed on the way.
        """
        if self.length is not None and self.length > limit:
            self.cancel()
            raise BadAnswer(f"the body has {self.length} bytes, more than {limit}")
        whole = _Whole(self, limit)
        try:
            self.attach(whole)
            return await whole.body()
        finally:
            self.cancel()  # does nothing after the end


class _Whole:
    """A sink that puts a body together."""

    __slots__ = ("_answer", "_done", "_error", "_is_over", "_limit", "_parts", "_size")

    def __init__(self, answer: Answer, limit: int) -> None:
        self._answer = answer
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self._is_over = False
        self._error: UpstreamError | None = None
        self._done: asyncio.Future[None] | None = None  # only if there is to wait

    def data(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size > self._limit:
            self._answer.cancel()
            self._parts.clear()
            self.failed(BadAnswer(f"the body has more than {self._limit} bytes"))

    def end(self) -> None:
        self._is_over = True
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def failed(self, error: UpstreamError) -> None:
        self._error = error
        self.end()

    async def body(self) -> bytes:
        if not self._is_over:
            self._done = asyncio.get_running_loop().create_future()
            await self._done
        if self._error is not None:
            raise self._error
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an engine is: what a base URL says."""

    host: str  # a name or an address, without brackets
    port: int
    tls: bool
    base_path: str  # "" or "/x", put before every target

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``http[s]://host[:port][/path]``; a trailing slash is dropped.

        Raises:
            ValueError: it is something else. The text names the URL, except where
                that would show a password.
        """
        if "@" in url:
            raise ValueError("a URL with a user or password in it is not accepted")
        if not _URL.fullmatch(url):
            raise ValueError(f"URL {url!r} has characters other than printable ASCII")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ValueError(f"URL {url!r} is malformed: {error}") from error
        if parts.scheme not in ("http", "https"):
            raise ValueError(f"URL {url!r} does not begin with http:// or https://")
        if not (_HOST.fullmatch(host) or _is_ipv6(host)) or port == 0:
            raise ValueError(f"URL {url!r} has no usable host and port")
        if parts.query or parts.fragment or "?" in url or "#" in url:
            raise ValueError(f"URL {url!r} has a query or a fragment")
        tls = parts.scheme == "https"
        if port is None:
            port = 443 if tls else 80
        return cls(host, port, tls, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """What ``Host`` says: ``host:port``, without the scheme's own port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port == (443 if self.tls else 80):
            return host
        return f"{host}:{self.port}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6 and "%" not in host
    except ValueError:
        return False


class _SocketAnswer(Answer):
    """An answer that comes from a connection.

    It holds what came before a sink was attached, or what came while it was paused, and
    how it ended, so the connection is free as soon as the last byte is here. After
    that, nothing that is called here touches the connection, which may already serve
    somebody else.
    """

    __slots__ = (
        "_connection",
        "_held",
        "_held_bytes",
        "_is_cancelled",
        "_is_paused",
        "_outcome",
        "_silence_seconds",
        "_sink",
        "head",
        "headers",
        "last_byte",
        "length",
        "live",
        "quiet_since",
        "status",
    )

    def __init__(
        self, connection: "Connection", now: float, silence_seconds: float
    ) -> None:
        self.status = 0  # until the head is there
        self.headers: Fields = ()
        self.length: int | None = None
        self.last_byte = now
        self.quiet_since = now  # silence does not count from before
        # What ends the wait for the head: None, or why there is none.
        self.head: asyncio.Future[UpstreamError | None] = connection.new_future()
        self.live: Sink | None = None  # takes what comes now; nothing is held before it
        self._silence_seconds = silence_seconds
        self._connection: Connection | None = connection  # until the last byte
        self._sink: Sink | None = None  # from ``attach`` until it was told the end
        self._is_cancelled = False
        self._is_paused = False
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._outcome: UpstreamError | bool = False  # True: complete

    @property
    def silence_seconds(self) -> float:
        return self._silence_seconds

    @silence_seconds.setter
    def silence_seconds(self, seconds: float) -> None:
        self._silence_seconds = seconds
        self._restart_silence()

    def attach(self, sink: Sink) -> None:
        if self._sink is not None:
            raise RuntimeError("this answer has a sink already")
        if self._is_cancelled:  # nobody may wait for what never comes
            _tell_end(sink, Truncated("the answer was cancelled before"))
            return
        self._sink = sink
        if self.is_held_back:
            self._restart_silence()
        self._deliver_held()

    def pause(self) -> None:
        self._is_paused = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        if not self._is_paused:
            return
        self._is_paused = False
        self._restart_silence()
        self._deliver_held()
        if self._connection is not None and not self.is_held_back:
            self._connection.resume_reading()

    def cancel(self) -> None:
        self._is_cancelled = True
        self._sink = self.live = None
        self._held.clear()
        if self._connection is not None:
            self._connection.close()

    @property
    def is_held_back(self) -> bool:
        """Whether nothing can come because our side takes nothing."""
        return self._is_paused or self._held_bytes >= MAX_HELD_BYTES

    def _restart_silence(self) -> None:
        if self._connection is not None:
            self.quiet_since = self._connection.now()
            self._connection.watch_silence()

    # What the connection calls

    def take_head(self, parser: AnswerParser) -> None:
        self.status = parser.status
        self.headers = parser.headers
        self.length = parser.length
        if not self.head.done():
            self.head.set_result(None)

    def hold(self, data: bytes) -> None:
        """Keep what nobody takes yet."""
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes >= MAX_HELD_BYTES and self._connection is not None:
            self._connection.pause_reading()

    def let_go(self) -> None:
        """The connection is no longer ours."""
        self._connection = None

    def settle(self, error: UpstreamError | None) -> None:
        """Nothing more comes: the answer is complete, or failed."""
        self._outcome = error or True
        if not self.head.done():
            self.head.set_result(error)
        self._deliver_held()

    def break_off(self, error: Exception) -> None:
        """The sink raised: log it, end the work, and let its owner's wait end too."""
        log.error("the taker of an answer failed", exc_info=error)
        sink = self._sink
        self.cancel()
        if sink is not None:
            failure = UpstreamError(
                f"the taker of the answer raised {type(error).__name__}"
            )
            _tell_end(sink, failure)

    def _deliver_held(self) -> None:
        sink = self._sink
        if sink is None or (self._is_paused and self._held):
            return
        if self._held:
            data = b"".join(self._held)
            self._held.clear()
            self._held_bytes = 0
            try:
                sink.data(data)
            except Exception as error:
                self.break_off(error)
            if self._sink is None:  # cancelled from inside, or told the end
                return
        if self._outcome is not False:
            self._sink = self.live = None
            _tell_end(sink, None if self._outcome is True else self._outcome)
            return
        self.live = sink
        if self._connection is not None and not self._is_paused:
            self._connection.resume_reading()


def _tell_end(sink: Sink, error: UpstreamError | None) -> None:
    try:
        if error is None:
            sink.end()
        else:
            sink.failed(error)
    except Exception:
        log.exception("the taker of an answer failed at its end")


class Connection(asyncio.Protocol):
    """One connection to the origin, with at most one exchange on it."""

    __slots__ = (
        "_answer",
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

    def __init__(self, pool: "Pool", loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time
        self.served = 0  # requests begun
        self.idle_until = 0.0  # while idle: when it is too old to be used again
        self.is_lost = False  # the transport has said its last
        self._pool = pool
        self._loop = loop
        self._poll: select.poll | None = None  # tells whether unread bytes wait
        self._answer: _SocketAnswer | None = None  # of the exchange that is going on
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
    ) -> _SocketAnswer:
        """Write a request; its answer begins to wait for its head."""
        answer = _SocketAnswer(self, self.now(), silence_seconds)
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
            self._pool.end_of_turn.call(self._loop, self.write_now)
        else:
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

    def _take_head(self, answer: _SocketAnswer) -> None:
        if self._unsent is not None and self._parser.status >= 300:
            # It has decided without the rest of the body and will not read it. Never
            # fully written, so this connection closes after the answer.
            self._unsent = memoryview(b"")
        answer.take_head(self._parser)

    def _finish(self, answer: _SocketAnswer) -> None:
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
        delay = max(due - self.now(), _SHORTEST_TIMER_SECONDS)
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


class Pool(ABC):
    """The connections to one origin, however they come about.

    It belongs to the event loop that first uses it and is closed with ``aclose``.
    """

    def __init__(self, origin: Origin, *, keepalive: float) -> None:
        """Make an empty pool.

        Args:
            origin: where its connections lead.
            keepalive: seconds that an idle connection is used again; less if the
                peer announces less. 0 means a connection per request.
        """
        self.origin = origin
        self.keepalive = keepalive
        self.end_of_turn = EndOfTurn()  # when requests are written
        self._authority = origin.authority
        self._connections: set[Connection] = set()  # every open one
        self._idle: list[Connection] = []  # the last one given back is the last
        self._resting: deque[Connection] = deque()  # after a large read
        self._all_lost: asyncio.Event | None = None  # exists once we are closing

    @property
    def open_connections(self) -> int:
        """Connections that are open, in use or not."""
        return len(self._connections)

    @property
    def idle_connections(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    async def aclose(self) -> None:
        """Close every connection and wait until they are closed. May be called twice.

        Answers that are going on fail; later requests raise ``ConnectFailed``.
        """
        if self._all_lost is None:
            self._all_lost = asyncio.Event()
        for connection in list(self._connections):
            connection.shut()
        if self._connections:
            await self._all_lost.wait()

    def _take_idle(self) -> Connection | None:
        """The connection used last that is still good; closes those that are not."""
        while self._idle:
            connection = self._idle.pop()
            if connection.now() < connection.idle_until and connection.is_open:
                return connection
            connection.close()
        return None

    # What the connections tell

    @abstractmethod
    def give_back(self, connection: Connection) -> None:
        """Take back a connection that has completed an exchange and may serve more."""

    def discard(self, connection: Connection) -> None:
        """This connection is about to close: do not give it to anybody."""
        if connection in self._idle:
            self._idle.remove(connection)

    def lost(self, connection: Connection) -> None:
        """This connection is closed."""
        self.discard(connection)
        self._connections.discard(connection)
        if self._all_lost is not None and not self._connections:
            self._all_lost.set()

    def rest(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Let a connection read on when it is its turn."""
        if not self._resting:
            self.end_of_turn.call(loop, functools.partial(self._let_read_on, loop))
        self._resting.append(connection)

    def _let_read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(_LARGE_READS_PER_TURN, len(self._resting))):
            self._resting.popleft().read_on()
        if self._resting:
            self.end_of_turn.call(loop, functools.partial(self._let_read_on, loop))


class Upstream(Pool):
    """The connections to an origin that can be dialed."""

    def __init__(
        self,
        origin: Origin,
        *,
        connect_timeout: float = 5.0,
        keepalive: float = 4.0,
        max_idle: int = 256,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Make an empty pool; nothing is dialed before the first ``send``.

        Args:
            origin: where to connect.
            connect_timeout: seconds for look-up, connection and TLS together.
            keepalive: see ``Pool``.
            max_idle: idle connections kept; above it the oldest closes. Requests end
                in bursts, so that for a moment all that were in use are idle.
            ssl_context: instead of the system's trust, for ``https`` origins.
        """
        super().__init__(origin, keepalive=keepalive)
        self._max_idle = max_idle
        self._idle_timer: asyncio.TimerHandle | None = None
        self._connect_timeout = connect_timeout
        self._ssl_context: ssl.SSLContext | None = None
        if origin.tls:
            self._ssl_context = ssl_context or _default_ssl_context()
        self._addresses = [origin.host]  # until a look-up
        self._is_numeric = _is_numeric(origin.host)
        self._addresses_until = 0.0  # when a look-up is too old

    async def send(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]],
        body: bytes = b"",
        *,
        silence_seconds: float = 0,
        on_wire: Callable[[], None] | None = None,
    ) -> Answer:
        """Send one request; returns when the head of its answer is there.

        Cancelling this closes the connection at once. Interim answers are skipped. An
        answer may come while the body is still being written; if it is no success, the
        rest of the body is not sent.

        Args:
            method: in capitals, as it goes on the wire.
            target: path and query, without the origin's base path.
            headers: without ``Host``, ``Content-Length``, ``Connection`` and the like,
                which are added here.
            body: sent as it is, with its length.
            silence_seconds: the answer's ``silence_seconds`` from now on.
            on_wire: called once, when there is a connection and the request has begun
                to travel.

        Raises:
            ValueError: the request cannot be written as one HTTP message.
            ConnectFailed: nothing was sent. (After a reused connection had closed
                without a byte, this is about the second try.)
            Disconnected, BadAnswer, Silent: there is no head.
        """
        if self._all_lost is not None:
            raise ConnectFailed(
                "unreachable", f"the way to {self._authority} is closed"
            )
        target = self.origin.base_path + target
        head = request_head(method, target, self._authority, headers, len(body))
        connection = self._take_idle()
        while True:
            is_fresh = connection is None
            if connection is None:
                connection = await self._dial()
            answer = connection.begin(method, head, body, silence_seconds)
            try:
                if on_wire is not None:
                    on_wire()
                error = await answer.head
            except BaseException:
                answer.cancel()
                raise
            if error is None:
                return answer
            may_retry = isinstance(error, Disconnected) and not is_fresh
            if not may_retry or self._all_lost is not None:
                raise error
            log.debug("%s; the request goes out on a fresh connection", error)
            connection = on_wire = None

    async def aclose(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        await super().aclose()

    # Dialing

    async def _dial(self) -> Connection:
        """A fresh connection, ready for a request.

        Raises:
            ConnectFailed: always that, whatever went wrong.
        """
        authority = self.origin.authority
        try:
            async with asyncio.timeout(self._connect_timeout) as limit:
                connection = await self._connect(limit.when() or 0.0)
        except TimeoutError as error:
            self._addresses_until = 0.0
            raise ConnectFailed(
                "timeout",
                f"{authority} did not take a connection within"
                f" {self._connect_timeout:g} seconds",
            ) from error
        except ConnectFailed:
            self._addresses_until = 0.0
            raise
        if not connection.is_lost:
            self._connections.add(connection)
        if self._all_lost is not None:
            connection.close()
            raise ConnectFailed("unreachable", f"the way to {authority} is closed")
        return connection

    async def _connect(self, deadline: float) -> Connection:
        """Connect to the first address that answers, the last good one first."""
        addresses = await self._look_up()
        failure: OSError | None = None
        in_order = tuple(addresses)  # whoever succeeds meanwhile changes the order
        for address in in_order:
            # An address that says nothing may use half of the time that is left.
            now = asyncio.get_running_loop().time()
            share = 1.0 if address is in_order[-1] else 0.5
            try:
                async with asyncio.timeout_at(now + (deadline - now) * share):
                    connection = await self._connect_to(address)
            except OSError as error:  # TimeoutError is one
                failure = error
                continue
            if address is not addresses[0]:
                addresses.remove(address)
                addresses.insert(0, address)
            return connection
        if failure is None or isinstance(failure, TimeoutError):
            raise TimeoutError
        is_refused = isinstance(failure, ConnectionRefusedError)
        raise ConnectFailed(
            "refused" if is_refused else "unreachable",
            f"cannot connect to {self.origin.authority}: {_told(failure)}",
        ) from failure

    async def _connect_to(self, address: str) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(self, loop)
        try:
            await loop.create_connection(
                lambda: connection,
                address,
                self.origin.port,
                ssl=self._ssl_context,
                server_hostname=self.origin.host if self._ssl_context else None,
            )
        except _HANDSHAKE_FAILURES as error:
            if self._ssl_context is None:
                raise
            # Another address would show the same certificate.
            raise ConnectFailed(
                "tls", f"no TLS with {self.origin.authority}: {_told(error)}"
            ) from error
        return connection

    async def _look_up(self) -> list[str]:
        """The origin's addresses, as numbers."""
        loop = asyncio.get_running_loop()
        if self._is_numeric or loop.time() < self._addresses_until:
            return self._addresses
        host, port = self.origin.host, self.origin.port
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(
                "dns", f'cannot look up "{host}": {_told(error)}'
            ) from error
        self._addresses = [_numeric(address) for _, _, _, _, address in found]
        self._addresses_until = loop.time() + _ADDRESS_SECONDS
        return self._addresses

    # Idle connections

    def give_back(self, connection: Connection) -> None:
        self._idle.append(connection)
        if len(self._idle) > self._max_idle:
            self._idle[0].close()
        if self._idle_timer is None and self._idle:
            self._sweep_at(connection.idle_until)

    def _sweep_at(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        delay = max(due - loop.time(), _SHORTEST_TIMER_SECONDS)
        self._idle_timer = loop.call_later(delay, self._sweep)

    def _sweep(self) -> None:
        """Close what was idle for too long; look again when the next one is due."""
        self._idle_timer = None
        for connection in list(self._idle):
            if connection.idle_until <= connection.now():
                connection.close()
        if self._idle:
            self._sweep_at(min(connection.idle_until for connection in self._idle))


def _numeric(address: tuple[Any, ...]) -> str:
    """A socket address as text, with the scope that a link-local one needs."""
    if len(address) == 4 and address[3]:
        return f"{address[0]}%{address[3]}"
    return str(address[0])


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _default_ssl_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _told(error: Exception) -> str:
    """What the system says about a failure, or at least its kind."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
