"""The database of what was used: one SQLite file with the tables of ``usageschema``.

A row is added once: its ``entry`` is a number that no other request has, and adding it
again changes nothing, neither the rows nor the sums. So a journal can be folded twice
without harm.

Everything here blocks and belongs to one thread, but ``reading``, which gives a
connection of its own.
"""

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from inferencia.usagerows import add_rows, add_sums
from inferencia.usageschema import (
    APPLICATION_ID,
    BEGUN_WIDTH,
    COLUMNS,
    IDENTITY,
    MIGRATIONS,
    VIEWS,
    WIDTH,
)

log = logging.getLogger(__name__)

# How long another process's transaction is waited for.
_BUSY_SECONDS = 2.0

# Rows that retention removes in one transaction: a few milliseconds.
DELETED_AT_ONCE: Final = 1000

# https://sqlite.org/fileformat2.html, 1.3.1
_MAGIC = b"SQLite format 3\0"

# Results of SQLite that mean: what is in the file is no database any more.
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class StoreUnavailable(Exception):
    """The database cannot be used now; perhaps later."""


class StoreCorrupt(Exception):
    """What is in the file is no database."""


class Store:
    """The open database, for writing."""

    def __init__(self, path: Path) -> None:
        """Open the database, and make or migrate it if need be.

        Raises:
            StoreUnavailable: it is locked, cannot be read or written, is not ours, or
                was made by a later version.
            StoreCorrupt: see there.
        """
        self.path = path
        with translated():
            self.connection = _connected(path)
            # Never closed while the connection is open: that would give back its locks
            # (https://sqlite.org/howtocorrupt.html, 2.2).
            self._file = os.open(path, os.O_RDONLY)
            try:
                _brought_up_to_date(self.connection)
                self._identity = _identity(path)
            except BaseException:
                self.close()
                raise

    def check(self) -> None:
        """See whether somebody has written over the beginning of the file.

        SQLite would not notice as long as it has the pages that it needs in memory.

        Raises:
            StoreCorrupt: somebody has.
        """
        with translated():
            if os.pread(self._file, len(_MAGIC), 0) != _MAGIC:
                raise StoreCorrupt("the beginning of the file was overwritten")

    @property
    def is_there(self) -> bool:
        """Whether the file still has its name; nobody has moved or replaced it."""
        return _identity(self.path) == self._identity

    def add(self, rows: Sequence[Sequence[Any]]) -> int:
        """Add requests in one transaction; those that are there already stay as is.

        Args:
            rows: values in the order of ``COLUMNS``.

        Returns:
            How many were new.

        Raises:
            StoreUnavailable: none was added.
            StoreCorrupt: none was added.
        """
        with translated(), self._transaction():
            added = add_rows(self.connection, "main", rows)
            add_sums(self.connection, "main", added)
            return len(added)

    def remove_before(self, when: float) -> int:
        """Remove some of what is older; to be called until it returns 0.

        Args:
            when: seconds since 1970.

        Raises:
            StoreUnavailable, StoreCorrupt: nothing was removed.
        """
        with translated(), self._transaction():
            removed = self.connection.execute(
                "DELETE FROM requests WHERE entry IN (SELECT entry FROM requests "
                "WHERE entry < ? AND started < ? LIMIT ?)",
                (entry_of(when), when, DELETED_AT_ONCE),
            ).rowcount
            for view in VIEWS:
                removed += self.connection.execute(
                    f"DELETE FROM sums WHERE ({', '.join(IDENTITY)}) IN "
                    f"(SELECT {', '.join(IDENTITY)} FROM sums "
                    "WHERE view = ? AND began < ? LIMIT ?)",
                    (view.number, when - view.seconds, DELETED_AT_ONCE),
                ).rowcount
        return removed

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close it; SQLite tidies up its own journal. Idempotent."""
        with contextlib.suppress(sqlite3.Error):
            self.connection.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def entry_of(when: float) -> int:
    """The least entry of a request that began then."""
    return int(when * 1e6) << 11


def interrupted(begun: Sequence[Any]) -> list[Any]:
    """The row of a request of which nothing but its beginning is known."""
    row = [*begun[:BEGUN_WIDTH], *[None] * (WIDTH - BEGUN_WIDTH)]
    row[COLUMNS.index("status")] = 0
    row[COLUMNS.index("outcome")] = "interrupted"
    return row


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Tell corruption from everything that may get better.

    Raises:
        StoreUnavailable: from any error of SQLite or the file system but corruption.
        StoreCorrupt: from that.
    """
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _CORRUPT:
            raise StoreCorrupt(str(error)) from error
        raise StoreUnavailable(str(error)) from error
    except OSError as error:
        raise StoreUnavailable(error.strerror or str(error)) from error


def _connected(path: Path) -> sqlite3.Connection:
    _make_private(path)
    connection = sqlite3.connect(
        path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # Without a sync at each commit. After a power cut the last seconds may be
        # missing, but the file is whole.
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _make_private(path: Path) -> None:
    """Make the file for this user alone; SQLite gives its other files the same mode."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _brought_up_to_date(connection: sqlite3.Connection) -> None:
    """Make the tables, or those changes that a file of an earlier version lacks."""
    version = _version(connection)
    if version == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")  # two daemons may come here at once
    try:
        for migration in MIGRATIONS[_version(connection) :]:
            for statement in _statements(migration):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    """The version of the file's tables; 0: there are none.

    Raises:
        StoreUnavailable: it is somebody else's, or of a version that we do not know.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    owner = int(connection.execute("PRAGMA application_id").fetchone()[0])
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and owner != APPLICATION_ID:
        raise StoreUnavailable("this is a database of another program")
    if version > len(MIGRATIONS):
        raise StoreUnavailable(
            f"the database was made by a later version (its tables have the number "
            f"{version}, {len(MIGRATIONS)} is known here)"
        )
    return version if tables else 0


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; ``executescript`` would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def moved_aside(path: Path, now: float | None = None) -> Path:
    """Give a corrupt database another name, so that a new one can be begun.

    Returns:
        Its new name.

    Raises:
        OSError: it cannot be renamed.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    names = (
        f"{path.name}.corrupt-{stamp}{n}"
        for n in ("", *map("-{}".format, range(2, 100)))
    )
    aside = next(a for a in map(path.with_name, names) if not os.path.lexists(a))
    path.rename(aside)
    for ending in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(
                aside.with_name(aside.name + ending)
            )
    return aside


def is_corrupt(path: Path) -> bool:
    """Whether the file that has this name now is really beyond use.

    Somebody else may have put a good one there already.
    """
    try:
        with translated(), contextlib.closing(_connected(path)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()
            return bool(found[0] != "ok")
    except StoreUnavailable:
        return False
    except StoreCorrupt:
        return True


#: The name of the second database of ``reading``.
PENDING: Final = "pending"


def reading(path: Path, pending: Sequence[Sequence[Any]]) -> sqlite3.Connection:
    """A connection that only reads; the daemon may be writing meanwhile.

    Args:
        path: of the database, which need not exist.
        pending: rows of the journals, which were read before. Those that are not in
            the database are in a second one, in memory, attached as ``pending``.

    Raises:
        StoreUnavailable, StoreCorrupt: it cannot be read.
    """
    with translated(), contextlib.ExitStack() as stack:
        is_there = path.exists()
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro" if is_there else ":memory:",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
        )
        stack.callback(connection.close)
        if not is_there:
            _brought_up_to_date(connection)
        if _version(connection) != len(MIGRATIONS):
            raise StoreUnavailable("the daemon has to be started once, to migrate it")
        connection.execute(f"ATTACH ':memory:' AS {PENDING}")
        for table, sql in connection.execute(
            "SELECT name, sql FROM main.sqlite_master WHERE type = 'table'"
        ).fetchall():
            created = sql.replace(f"TABLE {table}", f"TABLE {PENDING}.{table}", 1)
            connection.execute(created)
        # From here on the daemon's commits are not seen: what is pending now would
        # count twice.
        connection.execute("BEGIN")
        added = add_rows(connection, PENDING, pending)
        connection.execute(
            f"DELETE FROM {PENDING}.requests "
            "WHERE entry IN (SELECT entry FROM main.requests)"
        )
        left = connection.execute(f"SELECT entry FROM {PENDING}.requests").fetchall()
        entries = {entry for (entry,) in left}
        add_sums(connection, PENDING, (row for row in added if row[0] in entries))
        stack.pop_all()
    return connection
