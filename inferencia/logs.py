"""What the daemon tells about itself: one line per event, as JSON or as text.

``setup`` puts one ``Output`` under all loggers, those of asyncio and aiohttp included.
Whatever passes through it

- is one line of plain ASCII, whatever a client wrote: no control character, line
  separator or terminal sequence gets out;
- shows no secret: what looks like a key is starred, and so is every text that was
  registered by ``redact``;
- is bounded: fields are cut, and a message that repeats is written ``REPEATS`` times a
  minute and then only counted (without that, running out of file descriptors fills a
  disk at 85 kB a second: measured);
- never raises and never stops a request: a line that cannot be written is dropped and
  counted.

An exception is told by its type, the places in our own code that it passed, and, if it
is one of ours or the operating system's, its message. Other messages (a ValueError's)
may quote what others sent, as a traceback would.

``request_line`` writes the line of one request. It is on the path of every request, so
it goes to the output directly and makes no ``LogRecord``; lines of requests that end
in the same turn of the event loop are written together, at its end or before any other.
"""

import asyncio
import functools
import itertools
import json
import logging
import operator
import os
import re
import time
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any, Literal, TextIO

from inferencia.measurement import Measurement

request_log = logging.getLogger("inferencia.request")

Format = Literal["json", "text"]

MAX_FIELD = 256  # characters; log shippers cut long lines at their own discretion
MAX_MESSAGE = 1024
MAX_FRAMES = 12
REPEATS = 10  # lines of equal text within a window
WINDOW_SECONDS = 60.0
MAX_TEXTS = 1000  # different texts that are remembered within a window

# Shorter texts are no secrets but placeholders such as "none" or "ollama", which some
# clients insist on; starring those would make the log unreadable.
MIN_SECRET = 8
STARS = "***"

# The names that slog, and so the Go gateway of the same name, writes.
_LEVEL_NAMES = {
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARN",
    logging.ERROR: "ERROR",
    logging.CRITICAL: "ERROR",
}
LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# What looks like a secret: an API key, credentials in a header or in a URL. The
# look-behind spares words such as "task-force".
_SECRETS = re.compile(
    r"(?<![a-z0-9])sk-[^\s\"'\\,;&<>)\]}]{3,}"
    r"|(?<![a-z0-9])((?:bearer|basic)\s+)[^\s\"'\\,;]+"
    r"|(x-api-key[\"']?\s*[:=,]\s*b?[\"']?)[^\s\"'\\,;]+"
    r"|(://)[^\s/@\"'\\]+(?=@)",
    re.IGNORECASE,
)
# The same keys, models, backends and clients come back in line after line; so many
# groups of them are remembered as they are written.
_REMEMBERED = 512
# Only so much of a text is looked at; far more than any limit lets through.
_MAX_SCANNED = 16 * 1024

# Attributes that every LogRecord has; whatever else there is came by ``extra``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

_PLAIN_VALUE = re.compile(r"[!#-<>-~]+")  # printable ASCII but space, quote and "="
_UNPRINTABLE = re.compile(r"[^ -~]")

_OUR_CODE = str(Path(__file__).resolve().parent) + os.sep


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
        self._format = _json_line if form == "json" else _text_line
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
            message = _message(record)
            # asyncio puts details that vary into further lines.
            text = (record.name, record.levelno, message.partition("\n")[0])
            if not self._repeats.admit(text, now):
                return
            fields = _fields(record)
            self._write(record.created, record.levelno, message, record.name, fields)
        except Exception:  # a log line is never worth a request
            self.dropped += 1

    def write_request(self, level: int, m: Measurement) -> None:
        """Write the line of one request; it is never held back."""
        try:
            if self._repeats.due <= (now := self._clock()):
                self._tell_repeats(now)
            stamp = self._stamp(self._wall_clock())
            line = _request_text(self._form, stamp, _LEVEL_NAMES[level], m)
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
        stamp, level_name = self._stamp(moment), _LEVEL_NAMES.get(level, "INFO")
        self.flush()
        self._put(self._format(stamp, level_name, message, name, _shown_fields(fields)))

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
_secrets: set[str] = set()


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


def redact(secret: str) -> None:
    """Star this text wherever it appears from now on.

    What is shorter than ``MIN_SECRET`` is no secret and stays.
    """
    if len(secret) >= MIN_SECRET:
        _secrets.update((secret, json.dumps(secret)[1:-1]))
        _group.cache_clear()


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
        request_log.log(level, "request", extra=_request_fields(m))
    else:
        _output.write_request(level, m)


_REQUEST_LEVELS = {
    "ok": logging.INFO,
    "gone": logging.INFO,
    "refused": logging.WARNING,
    "failed": logging.ERROR,
}


# The fields of a request's line, in their order: its id, then what it was about, then
# numbers, then who sent it. What is None is left out.
_WHAT = ("key", "model", "backend", "method", "path", "status", "error")
_NUMBERS = (
    "queued_ms",
    "queue_position",
    "ttfb_ms",
    "duration_ms",
    "prompt_tokens",
    "completion_tokens",
    "tokens_per_second",
    "bytes_in",
    "bytes_out",
)
_WHO = ("stream", "client")


def _what(m: Measurement) -> tuple[str | int | None, ...]:
    error = m.error_code
    return m.key, m.model, m.backend, m.method, m.path, m.status, error


def _numbers(m: Measurement) -> tuple[str | int | None, ...]:
    return (
        _milliseconds(m.queued),
        m.queue_position,
        _milliseconds(m.time_to_first_byte),
        _milliseconds(m.duration),
        m.prompt_tokens,
        m.completion_tokens,
        _rounded(m.tokens_per_second),
        m.bytes_in,
        m.bytes_out,
    )


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1000:.1f}"


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _request_fields(m: Measurement) -> dict[str, Any]:
    names = ("id", *_WHAT, *_NUMBERS, *_WHO)
    values = (m.id, *_what(m), *_numbers(m), m.stream, m.client)
    fields = dict(zip(names, values, strict=True))
    return {name: value for name, value in fields.items() if value is not None}


def _request_text(form: Format, stamp: str, level: str, m: Measurement) -> str:
    """A request's line."""
    values = _numbers(m)
    # (Nearly all lines lack the same ones. No turn of a loop in Python is made here.)
    known = tuple(map(operator.is_not, values, _NONE_KNOWN))
    numbers = _number_template(form, known) % tuple(itertools.compress(values, known))
    what = _group(form, _WHAT, *_what(m))
    who = _group(form, _WHO, m.stream, m.client)
    shown_id = _shown(m.id, MAX_FIELD)
    if form == "text":
        id_text = _text_value(shown_id)
        return f"{stamp} {level} request id={id_text}{what}{numbers}{who}\n"
    return (
        f'{{"time": "{stamp}", "level": "{level}", "msg": "request", '
        f'"logger": "{request_log.name}", "id": {encode_basestring_ascii(shown_id)}'
        f"{what}{numbers}{who}}}\n"
    )


def _field(form: Format, name: str, text: str) -> str:
    return f" {name}={text}" if form == "text" else f', "{name}": {text}'


_NONE_KNOWN = (None,) * len(_NUMBERS)


@functools.lru_cache(maxsize=_REMEMBERED)
def _number_template(form: Format, known: tuple[bool, ...]) -> str:
    """Those of the numbers that are known, with ``%s`` for each."""
    names = itertools.compress(_NUMBERS, known)
    return "".join(_field(form, name, "%s") for name in names)


@functools.lru_cache(maxsize=_REMEMBERED)
def _group(form: Format, names: tuple[str, ...], *values: str | int | None) -> str:
    """Several fields as they are written."""
    fields = dict(zip(names, values, strict=True))
    write = _text_value if form == "text" else json.dumps
    return "".join(
        _field(form, name, write(value))
        for name, value in _shown_fields(fields).items()
        if value is not None
    )


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except Exception:  # the arguments do not fit the template
        message = str(record.msg)
    return _shown(message, MAX_MESSAGE)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What came by ``extra``, and what is told of an exception."""
    fields = {
        name: value for name, value in vars(record).items() if name not in _STANDARD
    }
    if record.exc_info and record.exc_info[0] is not None:
        error = record.exc_info[1]
        traces = [record.exc_info[2]]
        while isinstance(error, BaseExceptionGroup):  # a TaskGroup says nothing itself
            error = error.exceptions[0]
            traces.append(error.__traceback__)
        fields["error"] = _told(error)
        if record.levelno >= logging.ERROR:
            fields["at"] = " < ".join(_our_places(traces))
    return fields


def _told(error: BaseException | None) -> str:
    """Its type, and its message if that cannot quote what a client has sent."""
    kind = type(error)
    if kind.__module__.startswith("inferencia.") or isinstance(error, OSError):
        return f"{kind.__name__}: {_safe_text(error)}"
    return kind.__name__


def _our_places(traces: list[TracebackType | None]) -> list[str]:
    """Places in our own code that an exception has passed, innermost first."""
    places = [
        f"{frame.f_code.co_filename.removeprefix(_OUR_CODE)}:{line}"
        for trace in traces
        for frame, line in walk_tb(trace)
        if frame.f_code.co_filename.startswith(_OUR_CODE)
    ]
    return places[: -MAX_FRAMES - 1 : -1]


def _safe_text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # a foreign __str__ may do anything
        return type(value).__name__


def _shown(text: str, limit: int) -> str:
    """The text without secrets, and cut; where it was cut it ends in "..."."""
    text = _redacted(text[:_MAX_SCANNED])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _redacted(text: str) -> str:
    if not _may_hold_secret(text):
        return text
    for secret in _secrets:
        text = text.replace(secret, STARS)
    return _SECRETS.sub(_starred, text)


def _may_hold_secret(text: str) -> bool:
    """Whether it is worth a closer look; one of these is in all that _SECRETS finds."""
    lower = text.lower()
    if "sk-" in lower or "@" in lower or "bearer" in lower:
        return True
    if "basic" in lower or "x-api-key" in lower:
        return True
    for secret in _secrets:
        if secret in text:
            return True
    return False


def _starred(match: re.Match[str]) -> str:
    return (match[1] or match[2] or match[3] or "") + STARS


def _shown_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they may be written: bounded texts and plain numbers."""
    return {
        name: value
        if value is None or type(value) in (bool, int, float)
        else _shown(value if isinstance(value, str) else _safe_text(value), MAX_FIELD)
        for name, value in fields.items()
    }


def _json_line(
    stamp: str, level: str, message: str, name: str, fields: Mapping[str, Any]
) -> str:
    line = {"time": stamp, "level": level, "msg": message, "logger": name, **fields}
    return json.dumps(line) + "\n"


def _text_line(
    stamp: str, level: str, message: str, name: str, fields: Mapping[str, Any]
) -> str:
    words = [stamp, level, _UNPRINTABLE.sub(_escape, message)]
    if name != request_log.name:
        words.append(f"logger={_text_value(name)}")
    for field_name, value in fields.items():
        words.append(f"{field_name}={_text_value(value)}")
    return " ".join(words) + "\n"


def _text_value(value: object) -> str:
    if isinstance(value, str) and _PLAIN_VALUE.fullmatch(value):
        return value
    if type(value) in (int, float):
        return str(value)
    return json.dumps(value)


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]
