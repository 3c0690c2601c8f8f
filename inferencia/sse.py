"""Server-sent events: where one ends, and what it says.

``EventSplitter`` cuts a stream of bytes into whole events and gives them back as they
came, terminator included; ``parse`` reads one of them. Both follow the event stream
format of the HTML standard (section 9.2.6, "Interpreting an event stream"), with these
deliberate differences:

- An event ends at ``\\n\\n``, ``\\r\\r``, or ``\\n\\r\\n``, which is also the end of
  ``\\r\\n\\r\\n``. An LF line followed by a lone CR does not end it.
- A line feed after ``\\r\\r`` opens the next event instead of closing this one, so
  that the cut never depends on how the bytes were split into reads.
- A byte order mark is skipped at the start of any event, not only of the first.
- ``error: {...}`` counts as an event named ``error``. Older llama-servers write it.
"""

import re
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"

# The most that is kept of an event whose end has not come yet. One event may be large:
# a finished Responses answer repeats everything that was said, images included.
MAX_EVENT_BYTES = 64 * 1024 * 1024

# Where an event ends. Each alternative is decided by the bytes up to its own end, hence
# a search that resumes two bytes before the news finds what a search of all would.
_EVENT_END = re.compile(rb"\n\n|\r\r|\n\r\n")
_LINE_END = re.compile(rb"\r\n|\n|\r")


def event_end(data: bytes | bytearray, start: int) -> int:
    """Where the first event that has not ended before ``start`` ends; -1: nowhere.

    ``_EVENT_END`` decides, but it takes 7 us for a kilobyte. The usual stream has no
    carriage return, so that looking for line feeds is enough: a hundredth of that.
    """
    at = data.find(b"\n", start)
    while at >= 0 and not data.startswith(b"\n", at + 1):
        at = data.find(b"\n", at + 1)
    stop = len(data) if at < 0 else at
    if data.find(b"\r", start, stop) < 0:
        return -1 if at < 0 else at + 2
    found = _EVENT_END.search(data, start)
    return found.end() if found else -1


class EventTooLarge(ValueError):
    """An event went on for longer than the splitter's limit."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event as its reader sees it."""

    name: str  # the value of its last ``event`` line; empty if it has none
    data: bytes  # its ``data`` lines, joined by line feeds
    is_comment: bool  # only comments and blank lines: nothing is dispatched


class EventSplitter:
    """Cuts a stream into events, whatever pieces it arrives in."""

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._rest = bytearray()  # begins with an event, holds no whole one

    @property
    def pending(self) -> bytes:
        """The beginning of an event whose end has not come yet."""
        return bytes(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes; return the events that they complete, in order.

        The events and ``pending``, put one after the other, are the stream.

        Raises:
            EventTooLarge: an unfinished event exceeds the limit.
        """
        if not self._rest and 2 < len(data) == 2 + data.find(b"\n\n"):
            if b"\r" not in data:
                return [data]  # the usual read: exactly one event
        unread = max(0, len(self._rest) - 2)  # before here there is no event's end
        self._rest += data
        events = []
        begin = 0
        while (end := event_end(self._rest, max(begin, unread))) >= 0:
            events.append(bytes(self._rest[begin:end]))
            begin = end
        del self._rest[:begin]
        if len(self._rest) > self._limit:
            raise EventTooLarge(f"an event is longer than {self._limit} bytes")
        return events


def parse(event: bytes) -> Event:
    """Read one event. Bytes that are not UTF-8 in its name are replaced."""
    if event.startswith(b"data: ") and event.find(b"\n\n") == len(event) - 2:
        if event.count(b"\n") == 2 and b"\r" not in event:
            return Event("", event[6:-2], False)  # by far the most common shape
    name = ""
    data: list[bytes] = []
    is_comment = True
    for line in _LINE_END.split(event.removeprefix(BOM)):
        if not line or line.startswith(b":"):
            continue
        is_comment = False
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value.decode("utf-8", "replace")
        elif field == b"data":
            data.append(value)
        elif field == b"error":
            name = "error"
            data.append(value)
    return Event(name, b"\n".join(data), is_comment)
