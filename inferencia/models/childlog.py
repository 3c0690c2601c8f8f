"""What the models' servers print: kept within bounds, read by those who follow it.

A ``Log`` is a ring of lines. A ``ChildLog`` is the log of one model; it is fed the
bytes that come out of a process and outlives it, so that the last words of one that
crashed can be read while its successor starts. ``Logs`` has one for each model, one for
the gateway itself (``proxy``, as llama-swap calls it), and two in which they flow
together. What is promised:

- memory is bounded, whatever a server prints: lines without end are cut, old lines go;
- nothing here waits. Who follows too slowly loses the oldest text and is told how much;
- no control character gets out: neither a terminal's escape sequences nor those that
  turn the direction of writing.

Empty lines are left out. A carriage return writes over what stood on the line before,
as on a terminal, so that a progress bar does not push everything else out.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Self

# As much as llama-swap keeps for each of its logs.
MAX_BYTES = 100 * 1024
MAX_LINE = 4096  # bytes; llama-server's longest ordinary lines have some hundred

# A follower that is further behind than this has stopped to read.
MAX_BEHIND = 256 * 1024  # bytes

# A server says why it dies in its last words.
ERROR_LINES = 50
MAX_ERROR = 300  # characters of a line that becomes part of a message

_CUT = b"..."

_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # CSI, such as colours (ECMA-48, 5.4)
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, such as titles and links
    r"|.?)"
)
# C0 (but for the tab), DEL, C1, line and paragraph separators, marks of direction.
_CONTROL = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f"
    "\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)

# llama-server's "0.00.005.062 E ", Python's "2026-01-31 12:00:00,123 - ERROR - ".
_STAMP = re.compile(
    r"\d+\.\d\d\.\d{3}\.\d{3} [A-Z] +"
    r"|\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?Z?\]?[ -]*"
)
# From the surest to the vaguest. The first group of lines names a cause that the owner
# of the machine can do something about; those that come after it in a server's output
# often say no more than "failed".
_ERRORS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"no such file|permission denied|address already in use|couldn't bind"
        r"|out of memory|invalid magic|unknown model architecture"
        r"|invalid argument|unable to allocate|failed to allocate",
        r"\w*(?:error|exception)\b[^:]*: *\S|\bfatal\b",
        r"\b(?:error|exception|failed|failure|cannot|could not|couldn't|unable"
        r"|abort(?:ed|ing)?|panic(?:ked)?|assert(?:ion)?|terminate[sd]?|traceback)\b",
    )
)

# llama.cpp prints a dot for each per cent of the tensors (llama.cpp, src/llama.cpp,
# llama_model_load_from_file_impl); others a bar with a percentage.
_DOTS = re.compile(rb"\.{3,}$")
_PERCENT = re.compile(
    rb"(?:load|progress|fetch|shard|download)[^\n%]*?(\d{1,3}(?:\.\d+)?) ?%",
    re.IGNORECASE,
)


def harmless(line: str) -> str:
    """The line without what a terminal would obey."""
    if line.isprintable():
        return line
    return _CONTROL.sub("\ufffd", _ESCAPE.sub("", line))


class Log:
    """The last lines of one source, and those who follow it."""

    def __init__(self, *into: "Log", max_bytes: int = MAX_BYTES) -> None:
        """Make an empty one.

        Args:
            into: logs that get each of its lines as well.
            max_bytes: how much is kept, in UTF-8.
        """
        self._into = into
        self._max_bytes = max_bytes
        self._lines: deque[tuple[str, int]] = deque()  # with line end; its size
        self._bytes = 0
        self._followers: set[Follower] = set()

    def add(self, text: str) -> None:
        """Add one or more lines."""
        for line in text.splitlines():
            if clean := harmless(line[:MAX_LINE]).rstrip():
                self._keep(clean + "\n")

    def history(self) -> str:
        """All that is kept, oldest first; each line ends in a line feed."""
        return "".join(line for line, _ in self._lines)

    def follow(self, *, history: bool = True) -> "Follower":
        """Follow from now on, what is kept first if that is wanted.

        Returns:
            What is to be closed; best used as a context manager.
        """
        return Follower(self._followers, self.history() if history else "")

    @property
    def followers(self) -> int:
        """How many follow now."""
        return len(self._followers)

    def _keep(self, line: str) -> None:
        size = len(line) if line.isascii() else len(line.encode())
        self._lines.append((line, size))
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._bytes -= self._lines.popleft()[1]
        for follower in self._followers:
            follower.push(line, size)
        for log in self._into:
            log._keep(line)


class Follower:
    """The text of a log as it comes: ``async for text in follower``.

    Each turn yields all that has come since the last one, in whole lines. It ends when
    the follower is closed.
    """

    def __init__(self, followers: "set[Follower]", history: str) -> None:
        self._followers = followers
        self._history = history  # told first; outside the bound, it has its own
        self._waiting: deque[tuple[str, int]] = deque()
        self._bytes = 0
        self._lost = 0  # bytes that were dropped and have not been told of yet
        self._has_news = asyncio.Event()
        self._is_closed = False
        followers.add(self)
        if history:
            self._has_news.set()

    def push(self, line: str, size: int) -> None:
        """Take one line; the log's side."""
        self._waiting.append((line, size))
        self._bytes += size
        while self._bytes > MAX_BEHIND:
            lost = self._waiting.popleft()[1]
            self._bytes -= lost
            self._lost += lost
        self._has_news.set()

    def close(self) -> None:
        """Follow no longer. Idempotent."""
        self._is_closed = True
        self._followers.discard(self)
        self._has_news.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        await self._has_news.wait()
        if self._is_closed:
            raise StopAsyncIteration
        self._has_news.clear()
        notice = ""
        if self._lost:
            notice = f"[{self._lost} bytes are missing here: they came too fast]\n"
        text = self._history + notice + "".join(line for line, _ in self._waiting)
        self._history = ""
        self._lost = self._bytes = 0
        self._waiting.clear()
        return text


class ChildLog(Log):
    """The log of one model: what its processes print, one after another."""

    def __init__(self, *into: Log, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(*into, max_bytes=max_bytes)
        # How much of the model is loaded, 0 to 1, if the server tells; else None.
        self.progress: float | None = None
        self._partial = b""  # a line that has not ended yet, within MAX_LINE
        self._is_cutting = False  # the rest of a line that was too long is awaited
        self._recent: deque[str] = deque(maxlen=ERROR_LINES)  # of this process

    def begin(self) -> None:
        """A new process prints from here on."""
        self.end()
        self._recent.clear()
        self.progress = None

    def feed(self, data: bytes) -> None:
        """Take what the process has printed; any piece of any length."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._end_line(line)
        self._partial = self._overwritten(rest)
        if len(self._partial) > MAX_LINE:
            self._take(self._partial)
            self._partial, self._is_cutting = b"", True
        elif self._partial:
            self._look_for_progress(self._partial)

    def end(self) -> None:
        """The output is over; what stands on the last line becomes a line."""
        self._end_line(b"")

    @property
    def last_line(self) -> str:
        """The last line of the process that runs or ran last; "" if there is none."""
        return self._recent[-1] if self._recent else ""

    @property
    def last_error_line(self) -> str:
        """The line that says best why the process ended; "" if it printed nothing.

        Of its last ``ERROR_LINES`` lines the last one that names a cause, else one that
        looks like an error, else the very last. Without its time stamp, and cut.
        """
        for pattern in _ERRORS:
            for line in reversed(self._recent):
                if pattern.search(line):
                    return _as_message(line)
        return _as_message(self.last_line)

    def _end_line(self, line: bytes) -> None:
        whole = self._overwritten(line).rstrip(b"\r")
        self._partial = b""
        if self._is_cutting:
            self._is_cutting = False
        elif whole:
            self._look_for_progress(whole)
            self._take(whole)

    def _overwritten(self, more: bytes) -> bytes:
        """What stands on the line now; nothing while the rest of a cut one comes."""
        if self._is_cutting:
            return b""
        line = self._partial + more
        if b"\r" in line:
            shown = line.rstrip(b"\r").rpartition(b"\r")[2]
            # The cursor stands at its beginning; what comes will write over it.
            line = shown + b"\r" if line.endswith(b"\r") else shown
        return line

    def _take(self, line: bytes) -> None:
        if len(line) > MAX_LINE:
            line = line[:MAX_LINE] + _CUT
        clean = harmless(line.decode("utf-8", "replace")).rstrip()
        if clean:
            self._recent.append(clean)
            self._keep(clean + "\n")

    def _look_for_progress(self, line: bytes) -> None:
        if found := _PERCENT.search(line[-MAX_LINE:]):
            self.progress = min(1.0, float(found[1]) / 100)
        elif dots := _DOTS.fullmatch(line):
            self.progress = min(100, len(dots[0])) / 100


def _as_message(line: str) -> str:
    text = _STAMP.sub("", line, count=1).strip()
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."


class _Echoed(Log):
    """A log whose lines are told to somebody else as well."""

    echo: Callable[[str], None] | None = None

    def _keep(self, line: str) -> None:
        super()._keep(line)
        if self.echo is not None:
            self.echo(line.rstrip("\n"))


class Logs:
    """All logs of this gateway, and the two in which they flow together."""

    def __init__(self) -> None:
        self.everything = Log()
        self.upstream = _Echoed(self.everything)  # of all models
        self.proxy = Log(
            self.everything
        )  # our own lines; whoever writes them adds them
        self._models: dict[str, ChildLog] = {}

    def echo(self, echo: Callable[[str], None] | None) -> None:
        """Have each line of a model told to ``echo`` from now on; None: no longer."""
        self.upstream.echo = echo

    def model(self, name: str) -> ChildLog:
        """The log of a model; an empty one is made when it is first asked for."""
        if name not in self._models:
            self._models[name] = ChildLog(self.upstream)
        return self._models[name]

    def find(self, name: str) -> Log | None:
        """The log of this name: ``proxy``, ``upstream``, or a model that has one."""
        fixed = {"": self.everything, "proxy": self.proxy, "upstream": self.upstream}
        return fixed.get(name) or self._models.get(name)

    def forget(self, name: str) -> None:
        """Drop the log of a model that is no longer offered."""
        if log := self._models.pop(name, None):
            for follower in tuple(log._followers):
                follower.close()
