"""Where the log of the daemon goes: every line to one stream, within bounds.

``setup`` puts one ``Output`` under all loggers, those of asyncio and aiohttp included.
Whatever passes through it

- is a line of ``loglines``: plain, bounded, without secrets;
- is held back if it repeats: a message is written ``REPEATS`` times a minute and then
  only counted (without that, running out of file descriptors fills a disk at 85 kB a
  second: measured);
- never raises and never stops a request: a line that cannot be written is dropped and
  counted.

``request_line`` writes the line of one request. It is on the path of every request, so
it goes to the output directly and makes no ``LogRecord``; lines of requests that end
in the same turn of the event loop are written together, at its end or before any other.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from inferencia.loglines import (
    LEVEL_NAMES,
    REQUESTS,
    Format,
    fields_of,
    json_line,
    message_of,
    request_fields,
    request_text,
    shown_fields,
    text_line,
)
from inferencia.measurement import Measurement

request_log = logging.getLogger(REQUESTS)

REPEATS = 10  # lines of equal text within a window
WINDOW_SECONDS = 60.0
MAX_TEXTS = 1000  # different texts that are remembered within a window

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class Output(logging.Handler):
    """Writes records to one stream, within the bounds that this module promises."""

    def __init__(
        self,
        stream: TextIO,
        form: Format,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.dropped = 0  # lines that could not be written
        self._stream = stream
        self._format = json_line if form == "json" else text_line
        self._form: Format = form
        self._wall_clock = wall_clock
        self._clock = clock
        self._repeats = Repeats()
        self._pending: list[str] = []  # lines of requests, until this turn's end
        # Told each line as it is written; who shows our log while we run.
        self.listener: Callable[[str], None] | None = None
        self._second = -1  # the one that _stamp_second is the text of
        self._stamp_second = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record unless it repeats too often."""
        try:
            now = self._clock()
            self._tell_repeats(now)
            message = message_of(record)
            # asyncio puts details that vary into further lines.
            text = (record.name, record.levelno, message.partition("\n")[0])
            if not self._repeats.admit(text, now):
                return
            fields = fields_of(record)
            self._write(record.created, record.levelno, message, record.name, fields)
        except Exception:  # a log line is never worth a request
            self.dropped += 1

    def write_request(self, level: int, m: Measurement) -> None:
        """Write the line of one request; it is never held back."""
        try:
            if self._repeats.due <= (now := self._clock()):
                self._tell_repeats(now)
            stamp = self._stamp(self._wall_clock())
            line = request_text(self._form, stamp, LEVEL_NAMES[level], m)
        except Exception:
            self.dropped += 1
            return
        self._pending.append(line)
        if len(self._pending) == 1:
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:  # there is no loop
                self.flush()

    def write_foreign(self, name: str, message: str) -> None:
        """Write a line that another program has printed; no listener is told."""
        listener, self.listener = self.listener, None
        try:
            record = logging.LogRecord(name, logging.INFO, "", 0, message, (), None)
            self.emit(record)
        finally:
            self.listener = listener

    def flush(self) -> None:
        """Write the lines of requests that wait for the end of this turn."""
        if self._pending:
            lines, self._pending = self._pending, []
            self._put("".join(lines), len(lines))

    def finish(self) -> None:
        """Tell what has been held back so far."""
        self.flush()
        try:
            self._tell_repeats(float("inf"))
        except Exception:
            self.dropped += 1

    def _tell_repeats(self, now: float) -> None:
        for (name, level, message), count in self._repeats.expired(now):
            fields = {"repeated": count}
            self._write(self._wall_clock(), level, message, name, fields)

    def _write(
        self,
        moment: float,
        level: int,
        message: str,
        name: str,
        fields: Mapping[str, Any],
    ) -> None:
        stamp, level_name = self._stamp(moment), LEVEL_NAMES.get(level, "INFO")
        self.flush()
        self._put(self._format(stamp, level_name, message, name, shown_fields(fields)))

    def _put(self, text: str, lines: int = 1) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except Exception:  # a full disk, a closed pipe, a closed stream
            self.dropped += lines
        if self.listener is not None:
            self.listener(text)

    def _stamp(self, moment: float) -> str:
        """A moment as RFC 3339 writes it, in UTC, with milliseconds."""
        second = int(moment)
        if second != self._second:
            self._second = second
            self._stamp_second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._stamp_second}.{int((moment - second) * 1000):03d}Z"


Text = tuple[str, int, str]  # logger, level, message


class Repeats:
    """Decides which of many equal messages are written. Pure: time is passed in."""

    def __init__(self) -> None:
        # When each text's window began and how often it came since, oldest first.
        self._seen: dict[Text, tuple[float, int]] = {}
        self.due = float("inf")  # when ``expired`` will have something to tell

    def admit(self, text: Text, now: float) -> bool:
        """Whether this message is to be written; call ``expired`` before."""
        began, count = self._seen.get(text, (now, 0))
        if count == 0 and len(self._seen) >= MAX_TEXTS:
            return True  # so many different texts are no repetition
        self._seen[text] = (began, count + 1)
        if count >= REPEATS:
            self.due = min(self.due, began + WINDOW_SECONDS)
        return count < REPEATS

    def expired(self, now: float) -> list[tuple[Text, int]]:
        """Texts that were held back in windows that are over, and how often."""
        held_back = []
        while self._seen:
            text, (began, count) = next(iter(self._seen.items()))
            if now < began + WINDOW_SECONDS:
                break
            del self._seen[text]
            if count > REPEATS:
                held_back.append((text, count - REPEATS))
        if self.due <= now:
            self.due = min(
                (
                    began + WINDOW_SECONDS
                    for began, count in self._seen.values()
                    if count > REPEATS
                ),
                default=float("inf"),
            )
        return held_back


_output: Output | None = None


def setup(level: str, form: Format, stream: TextIO) -> Output:
    """Send the log to ``stream`` from now on, and nowhere else that we know of.

    Args:
        level: debug, info, warn (or warning), error.
        form: json or text.
        stream: each line is flushed.
    """
    global _output
    close()
    root = logging.getLogger()
    _output = Output(stream, form)
    root.addHandler(_output)
    root.setLevel(LEVELS[level.lower()])
    for library in ("asyncio", "aiohttp"):
        # Their debug lines show what peers have sent.
        logging.getLogger(library).setLevel(max(root.level, logging.INFO))
    return _output


def close() -> None:
    """Undo ``setup``; the stream stays open."""
    global _output
    if _output is not None:
        logging.getLogger().removeHandler(_output)
        _output.finish()
        _output = None


def listen(listener: Callable[[str], None] | None) -> None:
    """Have every line told to ``listener``, as it is written; None: no longer.

    It gets one line or more with their ends, at once, and must not raise or wait.
    """
    if _output is not None:
        _output.listener = listener


def foreign_line(name: str, message: str) -> None:
    """Write what another program has printed; those who ``listen`` are not told.

    Args:
        name: of a logger; whose line it is.
        message: the line.
    """
    if _output is not None and logging.getLogger(name).isEnabledFor(logging.INFO):
        _output.write_foreign(name, message)


def dropped() -> int:
    """How many lines could not be written since ``setup``."""
    return 0 if _output is None else _output.dropped


def request_line(m: Measurement) -> None:
    """Write the one line of a request that is over.

    The level is info for what went well and for clients that left (debug if it is a
    minor one), a warning for other refusals (4xx), an error for failures, those in
    mid-stream included.
    """
    level = _REQUEST_LEVELS[m.outcome]
    if m.is_minor and level == logging.INFO:
        level = logging.DEBUG
    if not request_log.isEnabledFor(level):
        return
    if _output is None:
        request_log.log(level, "request", extra=request_fields(m))
    else:
        _output.write_request(level, m)


_REQUEST_LEVELS = {
    "ok": logging.INFO,
    "gone": logging.INFO,
    "refused": logging.WARNING,
    "failed": logging.ERROR,
}
