"""The answer that comes from a connection, between its socket and its sink.

It delivers what arrives, or holds it while nobody takes it, and knows how silent the
engine may be meanwhile; the connection reads, parses and closes. Reading stops when
too much lies here, or when the sink's owner asks for a pause.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from inferencia.http1 import AnswerParser, Fields
from inferencia.upstream.answer import Answer, Sink, Truncated, UpstreamError

log = logging.getLogger(__name__)

# What may lie here for a sink that is not attached yet: a few hundred events, or the
# whole of an ordinary answer. Reading stops above it (one read may overshoot).
MAX_HELD_BYTES = 64 * 1024


class Source(Protocol):
    """What an answer asks of the connection that it comes from."""

    now: Callable[[], float]

    def new_future(self) -> "asyncio.Future[Any]": ...

    def watch_silence(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...


class SocketAnswer(Answer):
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

    def __init__(self, connection: Source, now: float, silence_seconds: float) -> None:
        self.status = 0  # until the head is there
        self.headers: Fields = ()
        self.length: int | None = None
        self.last_byte = now
        self.quiet_since = now  # silence does not count from before
        # What ends the wait for the head: None, or why there is none.
        self.head: asyncio.Future[UpstreamError | None] = connection.new_future()
        self.live: Sink | None = None  # takes what comes now; nothing is held before it
        self._silence_seconds = silence_seconds
        self._connection: Source | None = connection  # until the last byte
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
        log.error("passing on an answer failed by our own fault", exc_info=error)
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
        log.exception("ending an answer failed by our own fault")
