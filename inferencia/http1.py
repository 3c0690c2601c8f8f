"""The client half of HTTP/1.1 without a socket: a request head out, an answer in.

``request_head`` builds what is sent, ``AnswerParser`` reads what comes back. Neither
waits, reads a clock or raises on what a peer sent: bytes go in, body bytes and
attributes come out, and the outcome does not depend on where the input was cut. What
came before a fault is still handed on; a fault is kept in ``fault`` for the caller.

The parser is strict, because an answer whose end is in doubt could run into the next
one on the same connection (RFC 9112, 11.2). In the order in which they are met:

    HEAD ----+--> LENGTH ------------------------------+
             +--> UNTIL_EOF -- (clean end of stream) --+--> OVER
             +--> SIZE -> DATA -> DATA_END -> SIZE ... |
             |     +----> TRAILERS --------------------+
             +--> OVER (HEAD, 204, 304, length 0; or a fault, from every state)

- Status line ``HTTP/1.0`` or ``HTTP/1.1``, one space, 100 to 599. Lines end in CRLF; a
  bare LF or CR is a fault everywhere. No folded lines, no space before a colon.
- Content-Length and Transfer-Encoding together, a coding other than exactly
  ``chunked``, unequal lengths, chunks in HTTP/1.0: faults. Equal lengths are one.
- Without a length or chunks the body ends with the stream, and only a clean end counts.
- Interim answers (1xx) are skipped; 101 is a fault, since no upgrade was asked for.
- Chunk extensions and trailers are checked, bounded and dropped.
- Bytes after the end set ``has_surplus``; such a connection must not be used again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Fields = tuple[tuple[str, str], ...]

# Eight times what nginx and Go's common servers take, and still nothing next to a body.
MAX_HEAD_BYTES = 64 * 1024
# Twice what a chatty cloud sends behind its proxies (about 40 to 60).
MAX_FIELDS = 128
# 102 Processing and 103 Early Hints come once or twice; a flood is no sign of life.
MAX_INTERIM = 16
# A size has at most 15 digits; the rest is for extensions, which nobody uses.
MAX_CHUNK_LINE_BYTES = 1024
# Real trailers are a checksum or a timing line.
MAX_TRAILER_BYTES = 16 * 1024
# Longer lines (cookies, policies) are not worth a place in the cache of fields, nor
# longer heads, which clouds send, one in that of heads.
_MAX_CACHED_LINE_BYTES = 160
_MAX_CACHED_HEAD_BYTES = 512

(
    _HEAD,
    _LENGTH,
    _UNTIL_EOF,
    _OVER,
    _SIZE,
    _DATA,
    _DATA_END,
    _TRAILERS,
) = range(8)

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TEXT = r"[\t\x20-\x7e\x80-\xff]*"  # visible, blank and obs-text; no controls
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: %b)?" % _TEXT.encode())
_FIELD = re.compile(rf"({_TOKEN}):[ \t]*({_TEXT})".encode())
_BARE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH_VALUE = re.compile(r"[0-9]{1,15}")
_KEEP_ALIVE = re.compile(r"\s*(timeout|max)\s*=\s*([0-9]{1,9})\s*", re.IGNORECASE)
_EXTENSION = rf"[ \t]*;{_TEXT}"
_SIZE_LINE = re.compile(rf"([0-9A-Fa-f]{{1,15}})(?:{_EXTENSION})?\r\n".encode())
_SIZE_BEGINNING = re.compile(
    rf"[0-9A-Fa-f]{{1,15}}(?:{_EXTENSION}|[ \t]*)?\r?".encode()
)

_REQUEST_METHOD = re.compile(_TOKEN)
_REQUEST_TARGET = re.compile(r"/[!\"$-~]*")  # printable ASCII without "#"
_REQUEST_NAME = re.compile(_TOKEN)
_REQUEST_VALUE = re.compile(_TEXT)
# What decides where a message ends, or how long a connection lives, is ours to say.
_RESERVED_FIELDS = frozenset(
    "host content-length transfer-encoding connection keep-alive upgrade te trailer "
    "expect proxy-connection".split()
)
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


def request_head(
    method: str,
    target: str,
    host: str,
    headers: Sequence[tuple[str, str]],
    body_bytes: int,
) -> bytes:
    """The head of a request, blank line included.

    ``Host``, ``Connection`` and ``Content-Length`` are added. The length is there for
    every method that usually has a body, even if that is empty, and a request is never
    chunked: mlx_lm answers 411 to chunks.

    Raises:
        ValueError: something here would not survive as one message, such as a line
            break in a value or a field that frames the message. Values, which may be
            secrets, are not in the text.
    """
    fields = "".join(map(_request_field, headers))
    length = ""
    if body_bytes or method in _METHODS_WITH_BODY:
        length = f"Content-Length: {body_bytes}\r\n"
    lines = _first_lines(method, target, host)
    return f"{lines}{length}{fields}\r\n".encode("latin-1")


@lru_cache(maxsize=256)
def _first_lines(method: str, target: str, host: str) -> str:
    """What the head of every request begins with."""
    if not _REQUEST_METHOD.fullmatch(method):
        raise ValueError(f"method {method!r} is not a token")
    if not _REQUEST_TARGET.fullmatch(target):
        raise ValueError(f"target {target!r} is not a path of printable ASCII")
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive\r\n"


# Most fields say the same in every request.
@lru_cache(maxsize=512)
def _request_field(field: tuple[str, str]) -> str:
    """A field that callers may set, as one line."""
    name, value = field
    if name.lower() in _RESERVED_FIELDS:
        raise ValueError(f"header {name!r} is not the caller's to set")
    if not _REQUEST_NAME.fullmatch(name) or not _REQUEST_VALUE.fullmatch(value):
        raise ValueError(f"bad name or value in header {name!r}")
    return f"{name}: {value}\r\n"


class AnswerParser:
    """Reads the answer to one request.

    Feed it what arrives, in order, until ``is_over``. Body bytes are returned as they
    come, without their framing; a read that needs no unwrapping is returned as it is,
    not copied.
    """

    __slots__ = (
        "_gathered",
        "_interim",
        "_is_bodiless",
        "_left",
        "_state",
        "_trailers",
        "fault",
        "has_begun",
        "has_surplus",
        "headers",
        "is_cut",
        "is_over",
        "keep_alive",
        "keep_alive_requests",
        "keep_alive_seconds",
        "length",
        "status",
    )

    def __init__(self, method: str) -> None:
        self.status = 0  # of the final head, 0 until that is complete
        self.headers: Fields = ()  # names in lower case, values as latin-1
        self.length: int | None = None  # of the body, if the head says so
        self.keep_alive = False  # whether the peer lets us use the connection again
        self.keep_alive_seconds: int | None = None  # from Keep-Alive: timeout=
        self.keep_alive_requests: int | None = None  # from Keep-Alive: max=
        self.has_begun = False  # whether a byte came
        self.has_surplus = False  # whether bytes came after the end
        self.is_over = False  # complete, or at fault
        self.is_cut = False  # the fault is that the body stopped too early
        self.fault: str | None = None  # why no more of this can be believed
        self._is_bodiless = method == "HEAD"
        self._state = _HEAD
        self._gathered = bytearray()  # an unfinished head or line
        self._interim = 0  # 1xx heads skipped so far
        self._left = 0  # bytes to come, of the body or of the chunk
        self._trailers = 0  # bytes of trailers so far

    def feed(self, data: bytes) -> bytes:
        """Take what arrived; returns the body bytes in it, perhaps none."""
        state = self._state
        if state >= _SIZE:
            return self._feed_chunked(data)
        if state == _UNTIL_EOF:
            return data
        if state == _LENGTH:
            return self._feed_length(data)
        if state == _HEAD:
            self.has_begun = self.has_begun or bool(data)
            return self._feed_head(data)
        if data and self.fault is None:
            self.has_surplus = True
        return b""

    def eof(self, *, clean: bool = True) -> None:
        """Take note that no more comes.

        Args:
            clean: the peer ended its side in order. A reset is not an end.
        """
        if self.is_over:
            return
        if self._state == _UNTIL_EOF and clean:
            self._complete()
        elif self._state == _HEAD:
            self._fail("the connection closed inside the head")
        else:
            self.is_cut = True
            self._fail("the connection closed inside the body")

    def _complete(self) -> None:
        self._state = _OVER
        self.is_over = True

    def _fail(self, fault: str) -> None:
        self.fault = fault
        self.keep_alive = False
        self._complete()

    # The head

    def _feed_head(self, data: bytes) -> bytes:
        block: bytes | bytearray = data
        start = 0
        if self._gathered:
            start = max(0, len(self._gathered) - 3)
            self._gathered += data
            block = self._gathered
        while True:
            end = block.find(b"\r\n\r\n", start, MAX_HEAD_BYTES)
            if end < 0:
                self._keep_head(block, start)
                return b""
            rest = bytes(block[end + 4 :])
            self._read_head(bytes(block[:end]))
            if self.status or self.is_over:
                break
            block, start = rest, 0  # it was an interim one
        if self._gathered:
            self._gathered = bytearray()
        return self.feed(rest) if rest and self.fault is None else b""

    def _keep_head(self, block: bytes | bytearray, start: int) -> None:
        """Wait for more of a head, unless it can no longer become one."""
        if len(block) >= MAX_HEAD_BYTES:
            self._fail(f"the head exceeds {MAX_HEAD_BYTES} bytes")
        elif not b"HTTP/1.".startswith(bytes(block[:7])):
            self._fail("it does not begin as HTTP/1")
        elif _BARE_LF.search(block, start):
            self._fail("a line of the head does not end in CRLF")
        elif block is not self._gathered:
            self._gathered = bytearray(block)

    def _read_head(self, block: bytes) -> None:
        is_short = len(block) <= _MAX_CACHED_HEAD_BYTES
        head = _read_head_cached(block) if is_short else _read_head(block)
        if head.fault is not None:
            return self._fail(head.fault)
        if head.status < 200:
            return self._skip_interim(head.status)
        self.status = head.status
        self.headers = head.fields
        length = self.length = 0 if self._is_bodiless else head.length
        self.keep_alive = head.keep_alive
        self.keep_alive_seconds = head.keep_alive_seconds
        self.keep_alive_requests = head.keep_alive_requests
        if length:
            self._state = _LENGTH
            self._left = length
        elif length is not None:
            self._complete()
        elif head.is_chunked:
            self._state = _SIZE
        else:
            self._state = _UNTIL_EOF
            self.keep_alive = False
        return None

    def _skip_interim(self, status: int) -> None:
        self._interim += 1
        if status == 101:
            self._fail("it switches protocols (101), which nobody asked for")
        elif self._interim > MAX_INTERIM:
            self._fail(f"more than {MAX_INTERIM} interim answers")

    # The body

    def _feed_length(self, data: bytes) -> bytes:
        left = self._left - len(data)
        if left > 0:
            self._left = left
            return data
        self._complete()
        if left == 0:
            return data
        self.has_surplus = True
        return data[:left]

    def _feed_chunked(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        pos = 0
        if self._state == _SIZE and not self._gathered:
            pos = _take_whole_chunks(data, parts)
        end = len(data)
        while pos < end:
            state = self._state
            if state == _DATA:
                pos = self._take_chunk_data(data, pos, parts)
            elif state == _OVER:
                self.has_surplus = self.fault is None
                break
            else:
                pos = self._take_line(data, pos)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take_chunk_data(self, data: bytes, pos: int, parts: list[bytes]) -> int:
        stop = pos + self._left
        if stop > len(data):
            stop = len(data)
        # A slice from end to end is the object itself: nothing is copied.
        parts.append(data[pos:stop])
        self._left -= stop - pos
        if not self._left:
            self._state = _DATA_END
        return stop

    def _take_line(self, data: bytes, pos: int) -> int:
        """Gather one line of the framing and act on it when it is complete."""
        room = MAX_CHUNK_LINE_BYTES - len(self._gathered)
        if self._state == _TRAILERS:
            room = MAX_TRAILER_BYTES - self._trailers
        newline = data.find(b"\n", pos, pos + room)
        stop = min(len(data), pos + room) if newline < 0 else newline + 1
        self._gathered += data[pos:stop]
        line = bytes(self._gathered)
        if self._state == _TRAILERS:
            self._trailers += stop - pos
        if newline < 0:
            self._check_unfinished(line, is_full=stop - pos == room)
            return stop
        self._gathered.clear()
        if self._state == _SIZE:
            self._begin_chunk(line)
        elif self._state == _TRAILERS:
            self._read_trailer(line)
        elif line == b"\r\n":
            self._state = _SIZE
        else:
            self._fail("a chunk is longer than its size")
        return stop

    def _check_unfinished(self, line: bytes, *, is_full: bool) -> None:
        """Fail at the first byte that no continuation can mend."""
        if self._state == _DATA_END and line != b"\r":
            self._fail("a chunk is longer than its size")
        elif self._state == _SIZE and not _SIZE_BEGINNING.fullmatch(line):
            self._fail("a chunk size is malformed")
        elif is_full:
            self._fail("a chunk extension or the trailers are too long")

    def _begin_chunk(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            return self._fail("a chunk size is malformed")
        self._left = int(match[1], 16)
        self._state = _DATA if self._left else _TRAILERS
        return None

    def _read_trailer(self, line: bytes) -> None:
        if line == b"\r\n":
            self._complete()
        elif not line.endswith(b"\r\n") or _field(line[:-2]) is _MALFORMED:
            self._fail("a trailer is malformed")


def _take_whole_chunks(data: bytes, parts: list[bytes]) -> int:
    """Unwrap the whole chunks at the start of a read; returns where they end.

    This is nearly every read of a stream: one event is one chunk is one packet. What
    is not whole, not plain or the last is left to the careful way.
    """
    pos = 0
    end = len(data)
    while True:
        match = _SIZE_LINE.match(data, pos)
        if match is None:
            return pos
        start = match.end()
        size = int(match[1], 16)
        stop = start + size
        if not size or stop + 2 > end or start - pos > MAX_CHUNK_LINE_BYTES:
            return pos
        if not data.startswith(b"\r\n", stop):
            return pos
        parts.append(data[start:stop])
        pos = stop + 2
        if pos == end:
            return pos


@dataclass(slots=True)
class _Head:
    """What a head says, whatever the request was."""

    status: int = 0
    fields: Fields = ()
    length: int | None = None  # of the body, if it says so
    is_chunked: bool = False
    keep_alive: bool = False
    keep_alive_seconds: int | None = None
    keep_alive_requests: int | None = None
    fault: str | None = None  # if there is one, nothing else counts


def _read_head(block: bytes) -> _Head:
    """Read a head without its blank line; of an interim one only the fields."""
    status_line, *lines = block.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(status_line)
    if match is None:
        return _Head(fault="the status line is malformed")
    if len(lines) > MAX_FIELDS:
        return _Head(fault=f"the head has more than {MAX_FIELDS} fields")
    fields = tuple([_field(line) for line in lines])
    if _MALFORMED in fields:
        return _Head(fault="a header field is malformed")
    head = _Head(int(match[2]), fields)
    if head.status >= 200:
        _frame(head, is_http11=match[1] == b"1")
    return head


# An engine's answers have the same head again and again, but for a date that changes
# each second.
_read_head_cached = lru_cache(maxsize=256)(_read_head)


def _frame(head: _Head, *, is_http11: bool) -> None:
    """Decide how the body ends and what becomes of the connection (RFC 9112, 6)."""
    by_name = dict(head.fields)
    if len(by_name) != len(head.fields):
        by_name = _combined(head.fields)
    coding = by_name.get("transfer-encoding")
    length = by_name.get("content-length")
    _read_persistence(head, by_name, is_http11=is_http11)
    if coding is not None:
        head.is_chunked = True
        if length is not None:
            head.fault = "it has Content-Length and Transfer-Encoding"
        elif coding.lower() != "chunked" or not is_http11:
            head.fault = "its Transfer-Encoding is not chunked in HTTP/1.1"
    elif length is not None:
        head.length = _agreed_length(length)
        if head.length is None:
            head.fault = "its Content-Length is not one number"
    if head.status in (204, 304):
        head.length = 0


def _read_persistence(head: _Head, by_name: dict[str, str], *, is_http11: bool) -> None:
    connection = by_name.get("connection")
    if connection is None:
        head.keep_alive = is_http11
    else:
        options = {option.strip() for option in connection.lower().split(",")}
        head.keep_alive = "close" not in options and (
            is_http11 or "keep-alive" in options
        )
    hints = by_name.get("keep-alive")
    if hints is not None:
        head.keep_alive_seconds, head.keep_alive_requests = _keep_alive(hints)


_MALFORMED = ("", "")


def _field(line: bytes) -> tuple[str, str]:
    if len(line) <= _MAX_CACHED_LINE_BYTES:
        return _read_field_cached(line)
    return _read_field(line)


def _read_field(line: bytes) -> tuple[str, str]:
    """Name and value of one header line, or ``_MALFORMED``."""
    match = _FIELD.fullmatch(line)
    if match is None:
        return _MALFORMED
    name, value = match.groups()
    return name.lower().decode("latin-1"), value.rstrip(b" \t").decode("latin-1")


# An engine says the same few lines in every answer.
_read_field_cached = lru_cache(maxsize=1024)(_read_field)


def _combined(fields: Fields) -> dict[str, str]:
    """Fields by name; equal names become one list (RFC 9110, 5.3)."""
    by_name: dict[str, str] = {}
    for name, value in fields:
        by_name[name] = f"{by_name[name]}, {value}" if name in by_name else value
    return by_name


def _agreed_length(value: str) -> int | None:
    """The length that all members of a Content-Length list agree on, if they do."""
    if _LENGTH_VALUE.fullmatch(value):
        return int(value)
    members = {member.strip(" \t") for member in value.split(",")}
    only = members.pop()
    if members or not _LENGTH_VALUE.fullmatch(only):
        return None
    return int(only)


def _keep_alive(value: str) -> tuple[int | None, int | None]:
    """Seconds and requests from a ``Keep-Alive`` header; what is odd is ignored."""
    hints: dict[str, int] = {}
    for member in value.split(","):
        match = _KEEP_ALIVE.fullmatch(member)
        if match is not None:
            hints[match[1].lower()] = int(match[2])
    return hints.get("timeout"), hints.get("max")
