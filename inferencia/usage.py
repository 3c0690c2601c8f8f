"""Who used what: the book that the request path writes and everybody else reads.

A request that is asked of a model is noted twice: ``begin`` before a backend gets it,
``end`` before its client gets the last bytes of the answer. Neither waits, fails or
raises. What was noted in one turn of the event loop is written into a file
(``usagejournal``) at its end, before anything is written to a socket (``endofturn``);
a thread makes rows of the database of it (``usagewriter``, ``usagestore``). A process
that is killed leaves the file behind, and the next one makes the rows: closed ones of
what had ended, others marked ``interrupted``.

The outcome of a request is one of:

===========  ======================================================================
complete     answered whole
cut          the answer had begun and was not whole, or the client left before it
error        an error was answered instead
interrupted  this process ended first
===========  ======================================================================

Without a database (``usage.path: off``), and while it cannot be written, the book
counts in memory what ends.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from inferencia.endofturn import EndOfTurn
from inferencia.folders import state_folder
from inferencia.measurement import Measurement
from inferencia.settings import UsageConfig
from inferencia.spending import UNITS, Cost
from inferencia.usagejournal import Journal
from inferencia.usagereport import (
    NOTHING,
    Standing,
    UsageRow,
    first_day,
    report,
    standing,
)
from inferencia.usageschema import DAY_SECONDS
from inferencia.usagewriter import Job, UsageUnavailable, Writer

log = logging.getLogger(__name__)

#: Days of which a key is told what it has used on each.
SHOWN_DAYS = 30

# A start waits so long for the database; then it goes on without what it says.
_OPEN_SECONDS = 10.0
# A view waits so long for its rows.
_ANSWER_SECONDS = 10.0
# What the last rows may take when the daemon ends. They are in the journal anyhow.
_CLOSE_SECONDS = 5.0

#: The file in the state folder, where the configuration names none.
FILE_NAME = "usage.sqlite3"

Outcome = Literal["complete", "cut", "error", "interrupted"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UsageState:
    """How the record of usage is doing."""

    is_on: bool
    rows: int = 0  # written since the start
    pending_bytes: int = 0  # in the journal and not in the database yet
    running: int = 0  # requests that have begun and not ended
    lost: int = 0  # requests of which there will be no row
    degraded: str | None = None  # why rows cannot be written now


@dataclass(slots=True)
class _Total:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class _Opened:
    """The parts of a book that has a database."""

    journal: Journal
    writer: Writer
    loop: asyncio.AbstractEventLoop
    end_of_turn: EndOfTurn


class UsageBook:
    """The record of usage. ``begin`` and ``end`` belong to the event loop."""

    def __init__(
        self,
        cost_of: Callable[[Measurement], Cost | None] = lambda m: None,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin a book in memory; ``open`` gives it a database.

        Args:
            cost_of: what a request costs by its backend's prices.
            wall_clock: seconds since 1970.
        """
        self._cost_of = cost_of
        self._wall_clock = wall_clock
        self._since = wall_clock()
        self._totals: dict[str, _Total] = {}
        self._ended = _Total()  # of all that have ended here
        self._opened: _Opened | None = None
        # Of this turn of the loop; with the backend that will get it.
        self._beginning: list[tuple[Measurement, str | None]] = []
        self._ending: list[Measurement] = []

    # --- the request path ----------------------------------------------------------

    def begin(self, m: Measurement, backend: str | None = None) -> None:
        """Note that a request goes to a backend now. Only the first call counts.

        Args:
            m: of which at least ``model`` is known.
            backend: the one that will get it, if that is certain.
        """
        opened = self._opened
        if opened is None or m.is_begun:
            return
        m.is_begun = True
        if not (self._beginning or self._ending):
            opened.end_of_turn.call_first(opened.loop, self.write_down)
        self._beginning.append((m, backend))

    def end(self, m: Measurement) -> None:
        """Note that a request has ended, and how. Only the first call counts.

        Args:
            m: with everything that is known; it may never have been begun.
        """
        if m.is_booked:
            return
        m.is_booked = True
        ended = self._ended
        ended.requests += 1
        ended.prompt_tokens += m.prompt_tokens or 0
        ended.completion_tokens += m.completion_tokens or 0
        opened = self._opened
        if opened is None:
            self._add_to_totals(m)
            return
        if opened.writer.degraded is not None:
            self._add_to_totals(m)
        if not (self._beginning or self._ending):
            opened.end_of_turn.call_first(opened.loop, self.write_down)
        self._ending.append(m)

    def record(self, m: Measurement) -> None:
        """Note a request that is over, if it was asked of a model and is not noted.

        Its answer may be written at once, by somebody who does not wait for the end of
        the turn.
        """
        if m.is_work and not m.is_booked:
            self.end(m)
            self.write_down()

    def write_down(self) -> None:
        """Give the journal what has begun and ended since the last call."""
        beginning, self._beginning = self._beginning, []
        ending, self._ending = self._ending, []
        opened = self._opened
        if opened is None or not (beginning or ending):
            return
        journal = opened.journal
        wall, now = self._wall_clock(), time.monotonic()
        begun = []
        entries = journal.entries(wall, len(beginning))
        for (m, backend), entry in zip(beginning, entries, strict=True):
            m.entry = entry
            m.began = wall - (now - m.started)
            begun.append(
                (
                    m.entry, m.id, m.began, m.key, m.model, backend, m.path,
                    1 if m.stream else 0, m.bytes_in,
                )
            )  # fmt: skip
        ended = []
        for m in ending:
            if not m.entry:
                (m.entry,) = journal.entries(wall, 1)
                m.began = wall - (now - m.started)
            ended.append(self._row(m, now))
        journal.note(begun, ended)
        if ended and opened.writer.is_idle:
            opened.writer.wake()

    def _row(self, m: Measurement, now: float) -> tuple[Any, ...]:
        """All columns of a request that has ended."""
        first, cost = m.first_byte, self._cost_of(m)
        is_good = m.error_code is None and 200 <= m.status < 400
        return (
            m.entry, m.id, m.began, m.key, m.model, m.backend, m.path,
            1 if m.stream else 0, m.bytes_in, m.status, m.prompt_tokens,
            m.completion_tokens, m.cached_tokens, 1 if m.tokens_estimated else 0,
            m.queued,
            # (The clock of a loop may lag behind by the length of a turn.)
            None if first is None else first - m.started if first > m.started else 0.0,
            (m.ended or now) - m.started, m.bytes_out,
            "complete" if is_good else outcome_of(m), m.error_code,
            None if cost is None else cost.units / UNITS,
            None if cost is None else cost.is_billed,
        )  # fmt: skip

    def _add_to_totals(self, m: Measurement) -> None:
        """Count what cannot be asked for elsewhere."""
        if m.key is None:
            return
        total = self._totals.setdefault(m.key, _Total())
        total.requests += 1
        total.prompt_tokens += m.prompt_tokens or 0
        total.completion_tokens += m.completion_tokens or 0

    # --- its life ------------------------------------------------------------------

    async def open(self, path: Path, keep_seconds: float) -> Standing | None:
        """Take up a database, and what earlier processes have not put into it.

        Args:
            path: of the file, which is made if it is not there.
            keep_seconds: how long a request is kept.

        Returns:
            What limits go on from; None if the database cannot be read now. Rows are
            written as soon as it can be.
        """
        journal = Journal(path)
        writer = Writer(
            path, journal, keep_seconds=keep_seconds, wall_clock=self._wall_clock
        )
        loop = asyncio.get_running_loop()
        self._opened = _Opened(journal, writer, loop, EndOfTurn.of(loop))
        writer.start()
        now = self._wall_clock()
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                return await self.ask(lambda connection: standing(connection, now))
        except TimeoutError:
            why = f"it takes longer than {_OPEN_SECONDS:g} s"
        except UsageUnavailable as error:
            why = str(error)
        log.warning("limits begin anew, for %s cannot be read: %s", path, why)
        return None

    def change_keep(self, keep_seconds: float) -> None:
        """Keep requests for another length of time from now on."""
        if self._opened is not None:
            self._opened.writer.keep_seconds = keep_seconds

    async def close(self) -> None:
        """Put what has ended into the database, and close it. Idempotent."""
        self.write_down()
        opened, self._opened = self._opened, None
        if opened is None:
            return
        is_done = await asyncio.to_thread(opened.writer.close, _CLOSE_SECONDS)
        if not is_done:
            log.warning("usage is not written down yet; the next start does it")

    # --- those who read it -----------------------------------------------------------

    @property
    def state(self) -> UsageState:
        """How it is doing."""
        opened = self._opened
        if opened is None:
            return UsageState(is_on=False)
        self.write_down()
        journal, writer = opened.journal, opened.writer
        return UsageState(
            is_on=True,
            rows=writer.rows,
            pending_bytes=max(0, journal.pending_bytes),
            running=journal.running,
            lost=journal.lost,
            degraded=writer.degraded,
        )

    @property
    def totals(self) -> tuple[int, int, int]:
        """Requests, prompt tokens and completion tokens since the daemon started."""
        ended = self._ended
        return ended.requests, ended.prompt_tokens, ended.completion_tokens

    async def ask(self, job: Job[T]) -> T:
        """Run ``job`` in the database's thread, after all that has ended is there.

        Raises:
            UsageUnavailable: there is no database, or it cannot be read now.
        """
        if self._opened is None:
            raise UsageUnavailable("usage is not recorded (usage.path is off)")
        self.write_down()
        future = self._opened.writer.submit(job)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise UsageUnavailable("the database takes too long") from None

    async def of(self, key: str) -> dict[str, Any]:
        """What one key has used, as ``GET /v1/usage`` answers it."""
        now = self._wall_clock()

        def job(connection: sqlite3.Connection) -> dict[str, Any]:
            return _told(key, _Read.of(connection, key, now))

        try:
            return await self.ask(job)
        except UsageUnavailable:
            return self._of_memory(key)

    def _of_memory(self, key: str) -> dict[str, Any]:
        """What is known without a database: since the daemon was started."""
        total = self._totals.get(key) or _Total()
        return {
            "object": "usage",
            "key": key,
            "since": _iso(self._since),
            "requests": total.requests,
            "prompt_tokens": total.prompt_tokens,
            "completion_tokens": total.completion_tokens,
            "total_tokens": total.prompt_tokens + total.completion_tokens,
        }


def usage_file(config: UsageConfig, env: Mapping[str, str]) -> Path | None:
    """The database that a configuration asks for; None: there shall be none.

    Raises:
        OSError: it belongs into the state folder, and nobody knows where that is.
    """
    if config.path is None:
        return state_folder(env) / FILE_NAME
    return config.path or None


def outcome_of(m: Measurement) -> Outcome:
    """How a request ended; see the module's text."""
    outcome = m.outcome
    if outcome == "ok":
        return "complete"
    if outcome == "gone" or (outcome == "failed" and m.first_byte is not None):
        return "cut"
    return "error"


@dataclass(frozen=True, slots=True)
class _Read:
    """What is read of one key."""

    total: list[UsageRow]
    today: list[UsageRow]
    days: list[UsageRow]
    models: list[UsageRow]
    since: float  # when the first day began that is known; now if there is none

    @classmethod
    def of(cls, connection: sqlite3.Connection, key: str, now: float) -> "_Read":
        today = now // DAY_SECONDS * DAY_SECONDS
        shown = today - (SHOWN_DAYS - 1) * DAY_SECONDS
        first = first_day(connection, key)
        return cls(
            report(connection, (), key=key),
            report(connection, (), key=key, since=today),
            report(connection, ("day",), key=key, since=shown),
            report(connection, ("model",), key=key, since=shown),
            now if first is None else first,
        )


def _told(key: str, read: _Read) -> dict[str, Any]:
    return {
        "object": "usage",
        "key": key,
        "since": _iso(read.since),
        **_sums(read.total),
        "today": _sums(read.today),
        "days": [row.as_dict(("day",)) for row in read.days],
        "models": [row.as_dict(("model",)) for row in read.models],
    }


def _sums(rows: list[UsageRow]) -> dict[str, Any]:
    """The one row that there is, or zeros."""
    return (rows[0] if rows else NOTHING).as_dict(())


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
