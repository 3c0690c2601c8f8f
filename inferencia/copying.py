"""The hot path: an upstream answer on its way to one client.

A ``Delivery`` is the sink of an upstream ``Answer``. Its calls are plain functions run
from the upstream's ``data_received``; no task wakes up per chunk. It writes to the
client's transport itself: the response head, the framing of HTTP/1.1, and the body
bytes as they came. aiohttp, which parsed the request, is handed a ``Relayed`` response
that has nothing left to send.

States of one delivery, each entered at most once and in this order:

==========  =====================================================================
waiting     nothing was written; a failure can still become any answer
early       head and comments (or padding) were written; failures become events
copying     bytes of the answer were written
ended       the answer is whole, was cut, or the client is gone
==========  =====================================================================

While it waits, a stream gets a comment line after each ``keepalive`` seconds of
silence, by the clock. Comments go only between two events.
"""

import asyncio
import functools
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Protocol

from aiohttp import HttpVersion11, web

from inferencia.downstream.connection import Connection
from inferencia.errors import ApiError
from inferencia.measurement import Measurement
from inferencia.metering import BodyTap, StreamTap
from inferencia.upstream.answer import Answer, BadAnswer, Truncated, UpstreamError

COMMENT = b": waiting\n\n"
# JSON may begin with white space (RFC 8259, 2), so this keeps a plain answer alive.
PADDING = b" "

# What may come down from a backend. Everything else stays there: its cookies, its
# redirects, its CORS headers and its name are not ours to pass on.
ANSWER_HEADERS = frozenset(
    {
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-type",
        "openai-processing-ms",
        "retry-after",
    }
)
_CANONICAL = {name: name.title() for name in ANSWER_HEADERS}
_STREAM_HEADERS = (
    ("Content-Type", "text/event-stream"),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)
_STREAM_NAMES = frozenset(name for name, _ in _STREAM_HEADERS)
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}" for status in HTTPStatus
}


class Owner(Protocol):
    """Who has a ``Delivery`` and keeps the books of its request."""

    def answer_begins(self) -> None:
        """The first byte of an answer is about to be written; only if asked for."""

    def ended(self) -> None:
        """The answer is over; its last bytes go to the client next. Called once."""

    def guess_cost(self, answer: Callable[[], Any]) -> None:
        """The engine did not say what its answer cost.

        Args:
            answer: gives the decoded answer, or None if it cannot be had.
        """


@functools.lru_cache(maxsize=64)
def _is_event_stream(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "text/event-stream"


class Relayed(web.StreamResponse):
    """A response whose bytes have been written already.

    A ``StreamResponse`` would make headers, cookies and a body for itself; nobody asks
    this one for any of them, so only what aiohttp does ask for is there.
    """

    _eof_sent = True  # which also says that it is prepared

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        self._status = status
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to prepare."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


class Delivery:
    """One answer to one client."""

    __slots__ = (
        "_answer",
        "_answer_begun",
        "_anthropic",
        "_body_tap",
        "_carried_error",
        "_chunked",
        "_client_full",
        "_connection",
        "_content",
        "_done",
        "_head_sent",
        "_is_counted",
        "_keep_alive",
        "_keepalive",
        "_last_write",
        "_loop",
        "_m",
        "_must_finish",
        "_outcome",
        "_own_headers",
        "_owner",
        "_pads",
        "_rest",
        "_stall",
        "_status",
        "_stream_tap",
        "_tells_begin",
        "_timer",
        "_transport",
        "_version_10",
        "_waits_for",
        "_wants_stream",
    )

    def __init__(
        self,
        request: web.Request,
        measurement: Measurement,
        *,
        headers: Iterable[tuple[str, str]],
        wants_stream: bool,
        keepalive: float,
        anthropic: bool,
        owner: "Owner",
    ) -> None:
        """Get ready; nothing is written yet.

        Args:
            request: whose client the answer goes to.
            measurement: filled in as the answer passes.
            headers: of our own, for every answer (request id, limits).
            wants_stream: the client asked for server-sent events.
            keepalive: seconds of silence until a comment is sent; 0 = never.
            anthropic: failures take the shape of ``/v1/messages``.
            owner: told what happens to the answer.
        """
        transport, connection = request.transport, request.protocol
        if transport is None or not isinstance(connection, Connection):
            raise ConnectionResetError("the client is gone")
        self._transport = transport
        self._connection = connection
        # Not get_running_loop(), which makes a system call (getpid) each time.
        self._loop = connection._loop
        self._m = measurement
        self._own_headers = headers
        self._wants_stream = wants_stream
        self._waits_for: Callable[[], str] | None = None
        self._pads = False
        self._anthropic = anthropic
        # Until the end: they know each other, and a circle would be left to the garbage
        # collector (30 us of each request, measured).
        self._owner: Owner | None = owner
        self._is_counted = False  # the tokens are in the measurement
        self._version_10 = request.version < HttpVersion11
        self._keep_alive = request.keep_alive
        self._status = 200
        self._content: list[tuple[str, str]] = []
        self._rest: int | None = None  # body bytes still to come, when announced
        self._chunked = False
        self._head_sent = False
        self._answer: Answer | None = None
        self._answer_begun = False  # a byte that is no comment has come
        self._carried_error = False
        self._stream_tap: StreamTap | None = None
        self._body_tap: BodyTap | None = None
        self._must_finish = False
        self._tells_begin = False
        self._stall = 0.0
        # Of the answer that is being copied: True if it is whole, None until it ends.
        self._outcome: UpstreamError | bool | None = None
        self._done: asyncio.Future[None] | None = None  # while its end is waited for
        self._client_full = connection.writing_paused
        self._last_write = self._loop.time()
        self._keepalive = keepalive
        self._timer: asyncio.TimerHandle | None = None
        connection.flow_observer = self
        if wants_stream:
            self._arm()

    @property
    def has_begun(self) -> bool:
        """Whether something was written, if only a comment: the status is settled."""
        return self._head_sent

    @property
    def answer_begun(self) -> bool:
        """Whether something of an answer was written; comments don't count."""
        return self._answer_begun

    @property
    def carried_error(self) -> bool:
        """Whether a stream that ended well told of an error."""
        return self._carried_error

    def allow_padding(self) -> None:
        """Keep an answer that is no stream alive by white space before it.

        It is then sent with status 200 early, whatever becomes of it.
        """
        if not self._wants_stream and not self._pads:
            self._pads = True
            self._arm()

    def say_while_waiting(self, words: Callable[[], str] | None) -> None:
        """From now on let comments say what is waited for.

        Args:
            words: asked for one line of ASCII at each comment; None: nothing special.
        """
        self._waits_for = words

    def tell(self, event: bytes) -> None:
        """Write a whole event of our own to a stream whose answer has not begun.

        A client that takes nothing now misses it.
        """
        if self._client_full or self._answer_begun or self._transport.is_closing():
            return
        if not self._head_sent:
            self._announce_early()
        self._put(event)

    # --- what the request path does with it -------------------------------------

    async def copy(
        self,
        answer: Answer,
        *,
        stall_timeout: float,
        hide_usage: bool = False,
        must_finish: bool = False,
        tells_begin: bool = False,
    ) -> None:
        """Hand a good answer's bytes on until it ends.

        Args:
            answer: with its head read and a status of 2xx; cancelled on every way out.
            stall_timeout: seconds of silence allowed once the body has begun.
            hide_usage: drop the usage chunk that the client did not ask for.
            must_finish: an event stream that ends without saying so was cut.
            tells_begin: the owner wants to know when the answer begins.

        Raises:
            UpstreamError: the answer broke; ``fail`` decides what the client gets.
        """
        self._answer = answer
        self._stall = stall_timeout
        self._must_finish = must_finish
        self._tells_begin = tells_begin
        kind = answer.header("content-type") or ""
        is_stream = _is_event_stream(kind)
        if self._head_sent and self._wants_stream and not is_stream:
            answer.cancel()
            raise BadAnswer(f"a stream was asked for, the answer is {kind!r}")
        if is_stream:
            self._m.tap = self._stream_tap = StreamTap(hide_usage)
            self._must_finish = must_finish
        else:
            self._body_tap = BodyTap()
        if not self._head_sent:
            self._announce(answer, is_stream=is_stream)
        self._outcome = None
        if self._client_full:
            answer.pause()
        answer.attach(self)
        try:
            if self._outcome is None:  # not all of it was there already
                self._done = self._loop.create_future()
                await self._done
        finally:
            answer.cancel()
            self._answer = self._done = None
        if isinstance(self._outcome, UpstreamError):
            raise self._outcome

    def send(self, status: int, content_type: str, body: bytes) -> None:
        """Send a body that is there as a whole."""
        if not self._head_sent:
            self._status = status
            self._content = [("Content-Type", content_type)]
            self._rest = len(body)
        self._m.first_byte = self._loop.time()
        self._note_end()
        self._put(body)
        self._terminate()

    def fail(self, error: ApiError) -> None:
        """Tell the client in the way that is still possible, and end the answer.

        Raises:
            ApiError: ``error`` itself while nothing was written; it then becomes a
                plain answer.
        """
        self._m.error_code = error.code
        if not self._head_sent:
            raise error
        if self._wants_stream or self._stream_tap is not None:
            tap = self._stream_tap
            # An event that was cut in two is ended, so that the next one is read.
            lead = b"" if tap is None or tap.at_boundary else b"\n\n"
            self._note_end()
            self._put(lead + error.event(anthropic=self._anthropic))
            self._terminate()
        elif self._pads and not self._answer_begun:
            self._note_end()
            self._put(error.body(anthropic=self._anthropic))
            self._terminate()
        else:
            # Half an answer must not look whole, whatever its framing.
            self._keep_alive = False
            self._transport.abort()

    def close(self) -> Relayed:
        """Let go of client and backend. Idempotent; nothing is written after it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connection.flow_observer is self:
            self._connection.flow_observer = None
        if self._answer is not None:
            self._answer.cancel()
        if not self._is_counted:
            self._count_tokens()
        self._stream_tap = self._body_tap = self._owner = None
        return Relayed(self._status, keep_alive=self._keep_alive)

    # --- the sink: plain calls from the upstream's connection -------------------

    def data(self, data: bytes) -> None:
        """Body bytes came."""
        tap = self._stream_tap
        if tap is not None:
            data = tap.feed(data)
            if not self._answer_begun and tap.begun:
                self._begin_answer()
            if not data:
                return
            if tap.done and not self._is_counted:
                self._note_end()
        else:
            if not self._answer_begun:
                self._begin_answer()
            assert self._body_tap is not None
            self._body_tap.feed(data)
            if self._rest is not None and self._m.bytes_out + len(data) >= self._rest:
                self._note_end()
        self._put(data)

    def end(self) -> None:
        """The body is complete."""
        tap = self._stream_tap
        if tap is not None:
            if rest := tap.finish():
                if tap.done:
                    self._note_end()
                self._put(rest)
            if not tap.begun or (
                self._must_finish and not (tap.done or tap.finished or tap.failed)
            ):
                self._settle(Truncated("the stream ended before it was finished"))
                return
        elif not self._answer_begun and self._status == 200 and self._says_json():
            self._settle(BadAnswer("an empty body"))
            return
        self._carried_error = tap is not None and tap.failed
        self._note_end()
        self._terminate()
        self._settle(True)

    def failed(self, error: UpstreamError) -> None:
        """The answer broke; after its last word that is of no account."""
        tap = self._stream_tap
        if tap is not None:
            if tap.done:
                self.end()
                return
            tap.drop_held()
        self._settle(error)

    # --- the client's pace -------------------------------------------------------

    def client_paused(self) -> None:
        """Written bytes pile up at our side."""
        self._client_full = True
        if self._answer is not None:
            self._answer.pause()

    def client_resumed(self) -> None:
        """The client has taken them."""
        self._client_full = False
        if self._answer is not None:
            self._answer.resume()

    # --- inside ------------------------------------------------------------------

    def _begin_answer(self) -> None:
        self._answer_begun = True
        self._m.first_byte = self._loop.time()
        if self._answer is not None:
            self._answer.silence_seconds = self._stall
        if self._tells_begin and self._owner is not None:
            self._owner.answer_begins()

    def _settle(self, outcome: UpstreamError | bool) -> None:
        """Note how it went; only the first word counts."""
        if self._outcome is None:
            self._outcome = outcome
            if self._done is not None and not self._done.done():
                self._done.set_result(None)

    def _says_json(self) -> bool:
        return any(
            name == "Content-Type" and "json" in value for name, value in self._content
        )

    def _announce(self, answer: Answer, *, is_stream: bool) -> None:
        """Decide the head; it leaves together with the first byte of the body."""
        self._status = answer.status
        self._content = [
            (_CANONICAL[name], value)
            for name, value in answer.headers
            if name in _CANONICAL
        ]
        if is_stream:
            self._content = [
                pair for pair in self._content if pair[0] not in _STREAM_NAMES
            ]
            self._content += _STREAM_HEADERS
        elif answer.length is not None:
            self._rest = answer.length

    def _announce_early(self) -> None:
        if self._wants_stream:
            self._content = list(_STREAM_HEADERS)
        else:
            self._content = [("Content-Type", "application/json")]
        self._rest = None

    def _head(self) -> bytes:
        # (``map`` joins each pair without a turn of a loop in Python.)
        lines = [
            _STATUS_LINES.get(self._status) or f"HTTP/1.1 {self._status} OK",
            *map(": ".join, self._own_headers),
            *map(": ".join, self._content),
        ]
        if self._status == 204:
            pass  # has no body and no length (RFC 9110, 8.6)
        elif self._rest is not None:
            lines.append(f"Content-Length: {self._rest}")
        elif self._version_10:
            self._keep_alive = False
        else:
            self._chunked = True
            lines.append("Transfer-Encoding: chunked")
        if not self._keep_alive:
            lines.append("Connection: close")
        elif self._version_10:
            lines.append("Connection: keep-alive")
        lines.append("\r\n")
        self._head_sent = True
        self._m.status = self._status
        return "\r\n".join(lines).encode("latin-1")

    def _put(self, data: bytes) -> None:
        self._m.bytes_out += len(data)
        head = b"" if self._head_sent else self._head()
        if self._chunked:
            data = b"%b%x\r\n%b\r\n" % (head, len(data), data)
        elif head:
            data = head + data
        self._connection.write_soon(data)
        self._last_write = self._loop.time()

    def _terminate(self) -> None:
        if not self._head_sent:
            self._rest = 0
            self._connection.write_soon(self._head())
        elif self._chunked:
            self._connection.write_soon(b"0\r\n\r\n")
        self._answer_begun = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._keepalive > 0 and self._timer is None:
            self._timer = self._loop.call_later(self._keepalive, self._tick)

    def _tick(self) -> None:
        """Write a comment if it has been silent for long enough."""
        self._timer = None
        if self._transport.is_closing():
            return
        wait = self._last_write + self._keepalive - self._loop.time()
        if wait <= 0.001:
            self._keep_alive_now()
            wait = self._keepalive
        self._timer = self._loop.call_later(wait, self._tick)

    def _keep_alive_now(self) -> None:
        tap = self._stream_tap
        self._last_write = self._loop.time()
        if self._client_full:
            return
        if self._wants_stream:
            if tap is not None and (tap.done or not tap.at_boundary):
                return
        elif self._answer_begun:
            return
        if not self._head_sent:
            self._announce_early()
        self._put(self._comment() if self._wants_stream else PADDING)
        self._m.comments += 1

    def _comment(self) -> bytes:
        if self._waits_for is None:
            return COMMENT
        return b": waiting, %b\n\n" % self._waits_for().encode("ascii", "replace")

    def _note_end(self) -> None:
        """Have it noted how the request ended: now, before its last bytes leave."""
        if self._is_counted:
            return
        self._m.status = self._status
        self._count_tokens()
        if self._owner is not None:
            self._owner.ended()

    def _count_tokens(self) -> None:
        self._is_counted = True
        tap, body, owner = self._stream_tap, self._body_tap, self._owner
        if tap is not None:
            usage = tap.usage
            if usage is None and tap.begun and owner is not None:
                self._m.estimate_completion(tap.events)
                owner.guess_cost(lambda: None)
            self._m.add_usage(usage)
        elif body is not None:
            usage = body.usage()
            if usage is None and self._answer_begun and owner is not None:
                owner.guess_cost(body.answer)
            self._m.add_usage(usage)
