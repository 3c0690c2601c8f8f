"""Durations and sizes as people write them: ``1h30m``, ``500ms``, ``64MiB``.

Durations are those of Go's ``time.ParseDuration`` (so a predecessor's file keeps its
meaning), plus days, plus a bare number of seconds. Sizes tell 1000 from 1024 as the
standards do: ``KB`` is 1000 bytes, ``KiB`` is 1024 (IEC 80000-13).

A ``ValueError`` from here says what is wrong and ends well after "``path``: ".
"""

import re
from datetime import UTC, datetime

_SECONDS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}

_BYTES = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "t": 1000**4,
    "tb": 1000**4,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "tib": 1024**4,
}

# Fifteen digits are exact in a float, and stop a line of nines from becoming
# a number that no clock can hold.
_NUMBER = r"(?:[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})"
_PLAIN = re.compile(_NUMBER)
_PART = re.compile(rf"({_NUMBER})(ns|us|µs|ms|s|m|h|d)\s*")
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)")

# A hundred years: longer than anything here can mean, short enough for every timer.
MAX_SECONDS = 100 * 366 * 86400.0
MAX_BYTES = 2**60

DURATION_EXPECTED = "expected a duration such as 30s"
SIZE_EXPECTED = "expected a size such as 64MiB"


def parse_duration(text: str) -> float:
    """Seconds: ``30s``, ``5m``, ``1h30m``, ``500ms``, ``400d``, ``0.5``, ``0``.

    Raises:
        ValueError: the text is no duration, is negative, or longer than a century.
    """
    text = text.strip()
    if text.startswith("-") and _duration(text[1:].lstrip()) is not None:
        raise ValueError("a duration cannot be negative")
    seconds = _duration(text.removeprefix("+"))
    if seconds is None:
        raise ValueError(DURATION_EXPECTED)
    if seconds > MAX_SECONDS:
        raise ValueError("a duration of more than a century is a mistake")
    return seconds


def _duration(text: str) -> float | None:
    if _PLAIN.fullmatch(text):
        return float(text)
    seconds, at = 0.0, 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            return None
        seconds += float(part[1]) * _SECONDS[part[2]]
        at = part.end()
    return seconds if at else None


def parse_size(text: str) -> int:
    """Bytes: ``64MiB``, ``1.5 GB``, ``500KB``, ``4096``. Case does not matter.

    Raises:
        ValueError: the text is no size, is negative, or above an exbibyte.
    """
    text = text.strip()
    if text.startswith("-") and _SIZE.fullmatch(text[1:]):
        raise ValueError("a size cannot be negative")
    match = _SIZE.fullmatch(text)
    unit = _BYTES.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(SIZE_EXPECTED)
    size = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if size > MAX_BYTES:
        raise ValueError("a size above 1024 PiB is a mistake")
    return round(size)


def format_duration(seconds: float) -> str:
    """The shortest way to write it: ``1h30m``, ``90ms``, ``0``."""
    if seconds == 0:
        return "0"
    if seconds < 1:
        return f"{seconds * 1000:g}ms"
    parts = []
    whole, fraction = divmod(seconds, 60)
    minutes = int(whole)
    for unit, size in (("d", 1440), ("h", 60), ("m", 1)):
        count, minutes = divmod(minutes, size)
        if count:
            parts.append(f"{count}{unit}")
    if fraction or not parts:
        parts.append(f"{fraction:g}s")
    return "".join(parts)


def format_size(size: int) -> str:
    """With the largest unit that leaves a whole number: ``64MiB``, ``1000B``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _BYTES[unit.lower()] == 0:
            return f"{size // _BYTES[unit.lower()]}{unit}"
    return f"{size}B"


_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}(?::\d{2}(?::\d{2})?)?Z?)?")


_LEAST_MOMENT = 1e9  # in 2001; as a length more than thirty years


def moment(text: str, now: float) -> float:
    """A date (its beginning, UTC), a length of time before ``now``, or a moment.

    A number of seconds is a length, unless it is so large that it must be a moment:
    such as this returns, and answers tell.

    Returns:
        Seconds since 1970.

    Raises:
        ValueError: it is neither.
    """
    text = text.strip()
    if not _DATE.fullmatch(text):
        try:
            seconds = parse_duration(text)
        except ValueError:
            raise ValueError(
                f"expected a date such as 2027-01-31 or a duration such as 30d, "
                f'got "{text}"'
            ) from None
        return seconds if text.isdigit() and seconds >= _LEAST_MOMENT else now - seconds
    return datetime.fromisoformat(text.rstrip("Z")).replace(tzinfo=UTC).timestamp()
