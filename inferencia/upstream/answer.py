"""What a request comes to: an answer, whoever gives it, or an error that says why not.

Everybody who relays sees an engine through these. An ``Answer`` is a head and then a
body, which goes to a ``Sink`` as it comes and at the pace that the sink's owner sets;
``UpstreamError`` is how it fails. No socket is known here.
"""

import asyncio
from abc import ABC, abstractmethod
from typing import Protocol

from inferencia.http1 import Fields


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


class Untrusted(ConnectFailed):
    """The server's certificate is not one that we trust for its name."""

    def __init__(self, message: str, problem: str) -> None:
        """Keep why.

        Args:
            message: for the log.
            problem: what OpenSSL has against it.
        """
        super().__init__("tls", message)
        self.problem = problem


class NoDescriptors(ConnectFailed):
    """There is no connection, and it is not the engine's fault: we have no socket."""

    def __init__(self) -> None:
        super().__init__(
            "descriptors",
            "this server has no file descriptors left for a connection to a backend; "
            "raise its limit (LimitNOFILE of the service, ulimit -n), or lower "
            "server.max_connections",
        )


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
