"""The journal: what has begun and what has ended, written down before it can be lost.

The event loop appends what has begun and what has ended in one of its turns
(``usagerecords``), without a sync: what was written is the system's, and survives the
end of this process, however it comes. The rows of what has ended also wait in memory
for the thread that puts them into the database (``usagewriter``); the files
(``usagesegments``) are for when it cannot, and for the process that is killed. What a
process left behind, the next one folds at its start (``usageleftovers``).

A full segment is followed by another that begins with the requests still open, so that
a segment whose rows are in the database can be used again.
"""

import contextlib
import itertools
import random
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inferencia.usagerecords import framed
from inferencia.usagesegments import Segment, made, name_of, tags

# About three thousand requests. Two such are in use, and fit into a processor's cache.
SEGMENT_BYTES = 1 << 20

# While the database cannot be written, so much waits in files, to a segment: 180,000
# requests. What comes then is lost, and counted.
MAX_PENDING_BYTES = 64 << 20

# Rows that wait in memory; beyond them the thread has to read the files. About 8 MB.
MAX_ROWS = 10_000

_TAG_BITS = 11
TAGS = 1 << _TAG_BITS

Record = tuple[Any, ...]


class Journal:
    """This process's own.

    ``entries`` and ``note`` belong to the event loop, ``open``, ``begin_anew``,
    ``prepare``, ``marks``, ``note_folded`` and ``close`` to the thread. Each attribute
    is written by one of the two, but ``rows``, at whose two ends they work, ``_next``,
    which each writes only where the other does not, and ``is_behind``.
    """

    def __init__(
        self,
        database: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        max_rows: int = MAX_ROWS,
        may_map: bool = True,
    ) -> None:
        """Make one beside ``database``; no file is made before ``open``.

        Args:
            database: the file whose name those of the journal begin with.
            segment_bytes: how large a segment becomes.
            max_pending_bytes: how much may wait in files.
            max_rows: how many rows may wait in memory.
            may_map: whether files are mapped where that is safe.
        """
        self._database = database
        self._may_map = may_map
        self._segment_bytes = segment_bytes
        self._max_pending = max_pending_bytes
        self._max_rows = max_rows
        self._numbers = itertools.count(1)
        self._current: Segment | None = None
        self._next: Segment | None = None  # made by the thread, taken by the loop
        self._full: deque[Segment] = deque()
        self._open: dict[int, Record] = {}  # of requests that have not ended
        self._last = 0  # microseconds since 1970, of the last entry
        # Of this process, among those that use the database.
        self.tag = random.randrange(TAGS)
        # What has ended, until the thread has put it into the database.
        self.rows: deque[Record] = deque()
        self.is_behind = False  # some of it is only in the files
        self.lost = 0  # ends that could be kept nowhere
        self.failure: OSError | None = None  # of the last write, until one succeeds
        self._turned_bytes = 0  # in segments before the current one; the loop's
        self._folded = 0  # bytes that are in the database; the thread's

    # --- in the loop -------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._open)

    @property
    def pending_bytes(self) -> int:
        """Bytes in files that are not in the database yet."""
        current = self._current
        written = self._turned_bytes + (current.size if current else 0)
        return written - self._folded

    @property
    def has_pending(self) -> bool:
        """Whether there is something to fold."""
        return bool(self.rows) or self.is_behind

    def entries(self, now: float, count: int) -> range:
        """Numbers that no other request has: their time, and this process's tag.

        Args:
            now: seconds since 1970. A clock that was set back, or is too coarse, is
                helped on.
            count: how many.
        """
        first = max(int(now * 1e6), self._last + 1)
        self._last = first + count - 1
        step = 1 << _TAG_BITS
        begin = first << _TAG_BITS | self.tag
        return range(begin, begin + count * step, step)

    def note(self, begun: Sequence[Record], ended: Sequence[Record]) -> None:
        """Note that requests have begun, and that others have ended.

        Args:
            begun: what is known of each by then; the first is its entry.
            ended: all columns of each; its beginning may never have been noted.
        """
        still_open = self._open
        for columns in begun:
            still_open[columns[0]] = columns
        for columns in ended:
            still_open.pop(columns[0], None)
        records = [*begun, *ended]
        if len(self.rows) < self._max_rows:
            # Before the file has it: what the thread takes for folded, it must find.
            self.rows.extend(ended)
            self._write(records)
            return
        # The thread may look at any moment: between the two it sees no mark that is
        # behind these records, afterwards it is told again.
        self.is_behind = True
        if not self._write(records):
            self.lost += len(ended)
        self.is_behind = True

    def _write(self, records: list[Record]) -> bool:
        """Append to the current segment; tell whether that was done."""
        segment = self._current
        if segment is None:
            return False
        at = segment.size
        if at >= segment.quick or segment.view is None:
            return self._write_slowly(segment, records)
        data = framed(records, segment.number)
        end = at + len(data)
        if end > segment.room:
            return self._write_slowly(segment, records)
        segment.view[at:end] = data
        segment.size = end
        return True

    def _write_slowly(self, segment: Segment, records: list[Record]) -> bool:
        """Do the work of ``_write`` where there is something to look after first."""
        if self.pending_bytes > self._max_pending:
            return False
        try:
            if segment.size >= self._segment_bytes or segment.is_over:
                segment = self._turned(segment)
            segment.append(framed(records, segment.number))
        except OSError as error:
            self.failure = error
            return False
        self.failure = None
        return True

    def _turned(self, full: Segment) -> Segment:
        """The next segment with the open requests in it, if there is one.

        Raises:
            OSError: they have no place in it.
        """
        following = self._next
        if following is None:
            return full
        if self._open:
            # Now: once the thread knows the full one, it may be folded and gone.
            try:
                following.append(framed(list(self._open.values()), following.number))
            except OSError:
                following.size = 0  # it is still the next one
                raise
        self._next = None
        # Before the thread knows it, who may use it again at once: then it has no size.
        self._turned_bytes += full.size
        self._full.append(full)
        self._current = following
        return following

    # --- in the thread -----------------------------------------------------------

    def open(self) -> None:
        """Make the first segment, unless it is there.

        Raises:
            OSError: it cannot be made.
        """
        if self._current is not None:
            return
        taken = tags(self._database)
        following = (number % TAGS for number in range(self.tag, self.tag + TAGS))
        self.tag = next((tag for tag in following if tag not in taken), self.tag)
        segment = self._made()
        began = list(self._open.values())  # while there was no file
        if began:
            try:
                segment.append(framed(began, segment.number))
            except OSError:
                segment.remove()
                raise
            segment.folded = segment.size
            self._folded += segment.size
        self._current = segment

    def begin_anew(self) -> None:
        """Have the next record go into another segment.

        So those of before can go as soon as they are folded.
        """
        if self._current is not None:
            self._current.end()

    def prepare(self) -> None:
        """Have the next segment at hand when the current one is half full, or over.

        Raises:
            OSError: it cannot be made.
        """
        current = self._current
        if current is None or self._next is not None:
            return
        if current.is_over or current.size >= self._segment_bytes // 2:
            self._next = self._made()

    def marks(self) -> list[tuple[Segment, int]]:
        """Each segment, oldest first, with its size now.

        The rows of all ends before these marks are in ``rows`` as of now, or were taken
        from there, unless ``is_behind`` has been set.
        """
        current = self._current
        segments = dict.fromkeys((*self._full, *((current,) if current else ())))
        return [(segment, segment.size) for segment in segments]

    def note_folded(self, marks: Iterable[tuple[Segment, int]]) -> None:
        """The ends before these marks are in the database."""
        for segment, size in marks:
            if size > segment.folded:
                self._folded += size - segment.folded
                segment.folded = size
        while self._full and self._full[0].folded >= self._full[0].size:
            self._give_back(self._full.popleft())

    def _give_back(self, segment: Segment) -> None:
        """Use a segment again whose rows are in the database, or remove it."""
        if self._next is None and segment.size < 2 * self._segment_bytes:
            with contextlib.suppress(OSError):
                number = next(self._numbers)
                segment.use_again(name_of(self._database, self.tag, number), number)
                self._next = segment
                return
        segment.remove()

    def close(self) -> None:
        """Leave behind only what somebody has to fold. The loop writes no more."""
        self.note_folded(())
        for segment in (*self._full, self._next, self._current):
            if segment is None:
                continue
            is_open = segment is self._current and self._open
            if segment.folded >= segment.size and not is_open:
                segment.remove()
            else:
                segment.close()
        self._full.clear()
        self._current = self._next = None

    def _made(self) -> Segment:
        # Less than a segment's bytes if fewer may wait: then each write asks.
        quick = min(self._segment_bytes, self._max_pending)
        while True:
            number = next(self._numbers)
            path = name_of(self._database, self.tag, number)
            try:
                segment = made(path, number, quick, may_map=self._may_map)
            except FileExistsError:
                continue  # of a process that had our number before us
            if segment is not None:
                return segment
