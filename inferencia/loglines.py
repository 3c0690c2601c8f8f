"""What a line of the log says: records and requests as one harmless line of text.

Whatever a client wrote, a line

- is plain ASCII: no control character, line separator or terminal sequence gets out;
- shows no secret: what looks like a key is starred, and so is every text that was
  registered by ``redact``;
- is bounded: messages and fields are cut.

An exception is told by its type, the places in our own code that it passed, and, if it
is one of ours or the operating system's, its message. Other messages (a ValueError's)
may quote what others sent, as a traceback would.
"""

import functools
import itertools
import json
import logging
import operator
import os
import re
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any, Literal

from inferencia.measurement import Measurement

Format = Literal["json", "text"]

REQUESTS = "inferencia.request"  # the logger of requests

MAX_FIELD = 256  # characters; log shippers cut long lines at their own discretion
MAX_MESSAGE = 1024
MAX_FRAMES = 12

# Shorter texts are no secrets but placeholders such as "none" or "ollama", which some
# clients insist on; starring those would make the log unreadable.
MIN_SECRET = 8
STARS = "***"

# The names that slog, and so the Go gateway of the same name, writes.
LEVEL_NAMES = {
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARN",
    logging.ERROR: "ERROR",
    logging.CRITICAL: "ERROR",
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

_secrets: set[str] = set()  # what ``redact`` was told


def redact(secret: str) -> None:
    """Star this text wherever it appears from now on.

    What is shorter than ``MIN_SECRET`` is no secret and stays.
    """
    if len(secret) >= MIN_SECRET:
        _secrets.update((secret, json.dumps(secret)[1:-1]))
        _group.cache_clear()


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


def shown_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they may be written: bounded texts and plain numbers."""
    return {
        name: value
        if value is None or type(value) in (bool, int, float)
        else _shown(value if isinstance(value, str) else _safe_text(value), MAX_FIELD)
        for name, value in fields.items()
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


def request_fields(m: Measurement) -> dict[str, Any]:
    """The fields of a request's line, for a log that is not ours."""
    names = ("id", *_WHAT, *_NUMBERS, *_WHO)
    values = (m.id, *_what(m), *_numbers(m), m.stream, m.client)
    fields = dict(zip(names, values, strict=True))
    return {name: value for name, value in fields.items() if value is not None}


def request_text(form: Format, stamp: str, level: str, m: Measurement) -> str:
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
        f'"logger": "{REQUESTS}", "id": {encode_basestring_ascii(shown_id)}'
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
        for name, value in shown_fields(fields).items()
        if value is not None
    )


def message_of(record: logging.LogRecord) -> str:
    """What a record says, bounded and without secrets."""
    try:
        message = record.getMessage()
    except Exception:  # the arguments do not fit the template
        message = str(record.msg)
    return _shown(message, MAX_MESSAGE)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
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


def json_line(
    stamp: str, level: str, message: str, name: str, fields: Mapping[str, Any]
) -> str:
    """A line in the form JSON; ``fields`` are as ``shown_fields`` makes them."""
    line = {"time": stamp, "level": level, "msg": message, "logger": name, **fields}
    return json.dumps(line) + "\n"


def text_line(
    stamp: str, level: str, message: str, name: str, fields: Mapping[str, Any]
) -> str:
    """A line in the form text; ``fields`` are as ``shown_fields`` makes them."""
    words = [stamp, level, _UNPRINTABLE.sub(_escape, message)]
    if name != REQUESTS:
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
