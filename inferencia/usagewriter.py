"""The thread that owns the database of usage.

It folds the journal into the database a few times a second, answers questions, and
removes what is older than ``usage.keep``. Nothing that happens here fails or delays a
request: while the database cannot be written, the journal holds what has ended, and
then memory, both up to a limit.

=============================  ======================================================
locked, full, read-only disk   tried again, at growing intervals of up to 30 seconds
corrupt                        kept under another name; a new one is begun
moved, replaced or removed     opened again under its name, or made anew
of a later version, another's  left alone, and tried again in case it is replaced
=============================  ======================================================

In each of these cases ``degraded`` says what is wrong, and the log does so once a
minute.
"""

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from inferencia.folders import make_private
from inferencia.usagejournal import SEGMENT_BYTES, Journal
from inferencia.usageleftovers import Leftover, leftovers
from inferencia.usagestore import (
    Store,
    StoreCorrupt,
    StoreUnavailable,
    interrupted,
    is_corrupt,
    moved_aside,
    translated,
)

log = logging.getLogger(__name__)

# What ends within so many seconds shares a transaction. A commit costs as much as
# twenty rows; nobody reads sums that are fresher than this without asking, and who
# asks is not kept waiting.
_GATHER_SECONDS = 0.25

_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 30.0
_TELL_AGAIN_SECONDS = 60.0

# Retention need not be exact, and its first look must not delay a start.
_CLEANING_SECONDS = 3600.0
_FIRST_CLEANING_SECONDS = 60.0
# Between two batches of what is removed, so that others can write.
_CLEANING_PAUSE_SECONDS = 0.05

# A question that nobody waits for any more; there is a bound for everything.
MAX_JOBS = 1000

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]


class UsageUnavailable(Exception):
    """The database cannot be asked now; the message says why."""


class Writer:
    """One thread, one database. ``start`` and ``close`` are called once each."""

    def __init__(
        self,
        path: Path,
        journal: Journal,
        *,
        keep_seconds: float,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Make one; nothing is opened yet.

        Args:
            path: the database.
            journal: where the loop writes.
            keep_seconds: how long a request is kept.
            wall_clock: seconds since 1970.
        """
        self.path = path
        self.keep_seconds = keep_seconds  # may be changed at any time
        self.degraded: str | None = None  # why nothing is written now; the thread's
        self.rows = 0  # written so far
        self.is_idle = False  # the thread sleeps until ``wake``
        self._journal = journal
        self._wall_clock = wall_clock
        self._store: Store | None = None
        self._jobs: deque[tuple[Job[Any], Future[Any]]] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._is_closing = False
        self._retry_seconds = _FIRST_RETRY_SECONDS
        self._next_try = 0.0  # time.monotonic
        self._next_cleaning = time.monotonic() + _FIRST_CLEANING_SECONDS
        self._told = -_TELL_AGAIN_SECONDS  # when the log heard of it
        self._has_adopted = False  # what other processes left is folded
        self._lost = 0  # of the journal's, as last told
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        """Open everything, in the thread."""
        self._thread.start()

    def wake(self) -> None:
        """There is something to fold, and the thread was idle."""
        self.is_idle = False
        self._wake.set()

    def submit(self, job: Job[T]) -> Future[T]:
        """Have a question answered, after everything has been folded that is there.

        Returns:
            Its answer, or ``UsageUnavailable``.
        """
        future: Future[T] = Future()
        if self._is_closing or len(self._jobs) >= MAX_JOBS:
            future.set_exception(UsageUnavailable("too many ask at once"))
            return future
        self._jobs.append((job, future))
        self._hurry.set()
        self._wake.set()
        return future

    def close(self, within_seconds: float) -> bool:
        """Fold what is there, close the files, and end.

        Returns:
            Whether it was done in time. What is not folded stays in the journal.
        """
        self._is_closing = True
        self._hurry.set()
        self._wake.set()
        self._thread.join(within_seconds)
        return not self._thread.is_alive()

    # --- the thread --------------------------------------------------------------

    def _run(self) -> None:
        while True:
            is_last = self._is_closing
            asked = self._taken_jobs()  # before the fold: they want what is there now
            try:
                self._round()
            except Exception:
                log.exception("the record of usage failed by our own fault")
                self._degrade("an error of this program; see the log")
            self._answer(asked)
            if is_last:
                break
            self._wait()
        self._journal.close()
        self._close_store()
        self._answer(self._taken_jobs())  # whoever asked in the last moment

    def _wait(self) -> None:
        """Sleep until there is something to do, and then let it become more."""
        now = time.monotonic()
        seconds = self._next_cleaning - now
        if self.degraded is not None:
            # Nothing is cleaned either before the next try; a cleaning that is due
            # must not wake this thread again and again.
            seconds = max(_GATHER_SECONDS, self._next_try - now)
        self._wake.clear()
        self.is_idle = self.degraded is None
        if self._jobs or self._is_closing:
            pass
        elif self.degraded is not None or not self._journal.has_pending:
            self._wake.wait(max(0.0, seconds))
        self.is_idle = False
        self._hurry.clear()
        if not self._jobs and not self._is_closing and self.degraded is None:
            self._hurry.wait(_GATHER_SECONDS)

    def _round(self) -> None:
        now = time.monotonic()
        if self.degraded is not None and now < self._next_try and not self._is_closing:
            return
        try:
            self._open()
            self._fold()
            self._clean(now)
        except StoreCorrupt as error:
            self._replace(error)
        except StoreUnavailable as error:
            self._degrade(f"{self.path}: {error}")
        except OSError as error:
            self._degrade(f"the journal beside {self.path}: {error.strerror or error}")
        else:
            self._look_after_journal()

    def _open(self) -> None:
        if self._store is not None and not self._store.is_there:
            log.warning("%s was moved or removed; it is opened anew", self.path)
            self._close_store()
            # What was in the old one shall not come back in the new one after a kill.
            self._journal.begin_anew()
        if self._store is None:
            with translated():
                make_private(self.path.parent)
            self._store = Store(self.path)
        self._store.check()
        self._journal.open()
        if not self._has_adopted:
            self._adopt(self._store)
            self._has_adopted = True
        self._journal.prepare()

    def _adopt(self, store: Store) -> None:
        """Fold what processes left behind that are no more."""
        with contextlib.closing(leftovers(self.path)) as found:
            for leftover in found:
                try:
                    self._adopt_one(store, leftover)
                except OSError as error:
                    # Its files stay, and whoever is started next tries again.
                    log.warning("a journal beside %s: %s", self.path, error)

    def _adopt_one(self, store: Store, leftover: Leftover) -> None:
        closed = sum(store.add(ended) for ended in leftover.ended())
        cut = store.add(list(map(interrupted, leftover.interrupted())))
        self.rows += closed + cut
        leftover.remove()
        if closed or cut or leftover.damaged:
            log.info(
                "usage of an earlier process: %d requests had ended, %d were "
                "interrupted, %d records were torn",
                closed,
                cut,
                leftover.damaged,
            )

    def _fold(self) -> None:
        """Put what has ended into the database, from memory, else from the files."""
        store, journal = self._store, self._journal
        assert store is not None
        was_behind, journal.is_behind = journal.is_behind, False
        try:
            marks = journal.marks()
            ended = tuple(journal.rows)
            if ended:
                self.rows += store.add(ended)
            if was_behind:
                # What is read twice is added once.
                for segment, size in marks:
                    if size > segment.folded:
                        self.rows += store.add(segment.rows(size))
        except BaseException:
            journal.is_behind = journal.is_behind or was_behind
            raise
        for _ in ended:
            journal.rows.popleft()
        journal.note_folded(marks)

    def _clean(self, now: float) -> None:
        """Remove what is too old, a batch at a time."""
        if now < self._next_cleaning or self._store is None:
            return
        when = self._wall_clock() - self.keep_seconds
        if self._store.remove_before(when):
            self._next_cleaning = now + _CLEANING_PAUSE_SECONDS
            # A journal that fills slowly may hold them, too.
            self._journal.begin_anew()
        else:
            self._next_cleaning = now + _CLEANING_SECONDS

    def _look_after_journal(self) -> None:
        journal = self._journal
        if journal.failure is not None and self._disk_has_room(journal.failure):
            # The loop clears it when it writes again, which may be tomorrow.
            journal.failure = None
        failure, lost = journal.failure, journal.lost
        if failure is None and lost == self._lost:
            if self.degraded is not None:
                log.info("usage is written down again, in %s", self.path)
            self.degraded = None
            self._retry_seconds = _FIRST_RETRY_SECONDS
            return
        self._lost = lost
        reason = failure.strerror if failure else "more ended than could be kept"
        self._degrade(f"the journal beside {self.path}: {reason}")
        # The database takes rows; those in memory shall not wait.
        self._next_try = 0.0

    def _disk_has_room(self, failure: OSError) -> bool:
        """Whether the journal's disk was full and is no longer."""
        if failure.errno != errno.ENOSPC:
            return False
        disk = os.statvfs(self.path.parent)
        return disk.f_bavail * disk.f_frsize >= 2 * SEGMENT_BYTES

    def _replace(self, error: StoreCorrupt) -> None:
        """Put a corrupt database aside; the next round makes a new one."""
        self._close_store()
        self._degrade(f"{self.path}: {error}")
        try:
            if not is_corrupt(self.path):
                return
            aside = moved_aside(self.path, self._wall_clock())
        except OSError as failure:
            self._degrade(f"{self.path} is corrupt and cannot be moved: {failure}")
            return
        log.error("%s was corrupt (%s); it is kept as %s", self.path, error, aside.name)
        self._next_try = 0.0

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def _degrade(self, reason: str) -> None:
        now = time.monotonic()
        self.degraded = reason
        self._next_try = now + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _LAST_RETRY_SECONDS)
        if now - self._told >= _TELL_AGAIN_SECONDS:
            self._told = now
            log.warning(
                "usage cannot be written down now: %s; requests go on",
                reason,
                extra={
                    "pending": self._journal.pending_bytes,
                    "lost": self._journal.lost,
                },
            )

    def _taken_jobs(self) -> list[tuple[Job[Any], Future[Any]]]:
        return [self._jobs.popleft() for _ in range(len(self._jobs))]

    def _answer(self, asked: Iterable[tuple[Job[Any], Future[Any]]]) -> None:
        for job, future in asked:
            if not future.set_running_or_notify_cancel():
                continue
            if self._store is None:
                future.set_exception(UsageUnavailable(self.degraded or "closed"))
                continue
            try:
                future.set_result(job(self._store.connection))
            except (StoreUnavailable, StoreCorrupt, sqlite3.Error) as error:
                future.set_exception(UsageUnavailable(str(error)))
            except Exception as error:
                future.set_exception(error)
