"""The database of what was used: one SQLite file, one row per request.

``requests`` has the rows; ``hours`` and ``days`` have their sums by key, model and
backend, kept by a trigger and so by the very transaction that adds a row. A row is
added once: its ``entry`` is a number that no other request has, and adding it again
changes nothing. So a journal can be folded twice without harm.

A request counts for the hour and the day (UTC) in which it ended, which is when its
tokens are charged to its key. Times are seconds since 1970, durations seconds. Costs
have the currency of the configuration's prices.

Everything here blocks and belongs to one thread, but ``read_only``, which gives a
connection of its own.
"""

import contextlib
import itertools
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

HOUR_SECONDS: Final = 3600
DAY_SECONDS: Final = 86400

#: Columns of ``requests`` in the order of the journal, and how a value becomes one.
#: The journal has times in microseconds, speeds in thousandths and costs in 1e-12.
COLUMNS: Final[Mapping[str, str]] = {
    "entry": "?",
    "id": "?",
    "started": "?/1e6",
    "key": "?",
    "model": "?",
    "backend": "?",
    "endpoint": "?",
    "stream": "?",
    "bytes_in": "?",
    "ended": "?/1e6",
    "status": "?",
    "prompt_tokens": "?",
    "completion_tokens": "?",
    "cached_tokens": "?",
    "estimated": "?",
    "queued": "?/1e6",
    "first_byte": "?/1e6",
    "tokens_per_second": "?/1e3",
    "duration": "?/1e6",
    "bytes_out": "?",
    "outcome": "?",
    "error": "?",
    "cost": "?/1e12",
    "billed": "?",
}
WIDTH: Final = len(COLUMNS)

#: How many columns are known when a request begins.
BEGUN_WIDTH: Final = 9

# In SQLite's header of a file of ours: "infe".
APPLICATION_ID: Final = 0x696E6665

# Rows of one statement. While a statement gets its values nothing else in the process
# runs, and while it works everything does: this many take 0.2 ms of the former.
_ROWS_AT_ONCE = 64

# How long another process's transaction is waited for.
_BUSY_SECONDS = 2.0

# Rows that retention removes in one transaction: a few milliseconds.
DELETED_AT_ONCE: Final = 1000

_SUMS = """
    requests INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    estimated INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    bytes_in INTEGER NOT NULL,
    bytes_out INTEGER NOT NULL,
    seconds REAL NOT NULL,
    spent REAL NOT NULL,
    saved REAL NOT NULL
"""

#: The columns of ``hours`` and ``days`` that are sums.
SUMMED: Final = tuple(line.split()[0] for line in _SUMS.strip().splitlines())

_DIMENSIONS = "began, key, model, backend"


def _rollup(table: str, seconds: int) -> str:
    adds = ", ".join(f"{name} = {name} + excluded.{name}" for name in SUMMED)
    return f"""
CREATE TABLE {table} (
    began INTEGER NOT NULL,
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    backend TEXT NOT NULL,
    {_SUMS.strip()},
    PRIMARY KEY ({_DIMENSIONS})
) WITHOUT ROWID;
CREATE TRIGGER sum_{table} AFTER INSERT ON requests BEGIN
    INSERT INTO {table} VALUES (
        CAST(COALESCE(new.ended, new.started) / {seconds} AS INTEGER) * {seconds},
        COALESCE(new.key, ''), COALESCE(new.model, ''), COALESCE(new.backend, ''),
        1, new.outcome <> 'complete', COALESCE(new.estimated, 0),
        COALESCE(new.prompt_tokens, 0), COALESCE(new.completion_tokens, 0),
        COALESCE(new.cached_tokens, 0), COALESCE(new.bytes_in, 0),
        COALESCE(new.bytes_out, 0), COALESCE(new.duration, 0.0),
        CASE WHEN new.billed THEN COALESCE(new.cost, 0.0) ELSE 0.0 END,
        CASE WHEN new.billed THEN 0.0 ELSE COALESCE(new.cost, 0.0) END
    ) ON CONFLICT DO UPDATE SET {adds};
END;
"""


_FIRST_SCHEMA = f"""
CREATE TABLE requests (
    entry INTEGER PRIMARY KEY,  -- grows with the time of the beginning; unique
    id TEXT NOT NULL,           -- X-Request-Id; clients may choose and repeat it
    started REAL NOT NULL,
    key TEXT,
    model TEXT,
    backend TEXT,               -- or the agent
    endpoint TEXT,
    stream INTEGER,
    bytes_in INTEGER,
    ended REAL,                 -- NULL: interrupted, nobody knows when
    status INTEGER,             -- 499: the client left
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cached_tokens INTEGER,      -- part of prompt_tokens
    estimated INTEGER,          -- 1: the tokens were not counted by the backend
    queued REAL,                -- held back until a backend could take it
    first_byte REAL,            -- from the beginning
    tokens_per_second REAL,
    duration REAL,
    bytes_out INTEGER,
    outcome TEXT NOT NULL,      -- complete, cut, error, interrupted
    error TEXT,                 -- the code that the client was told
    cost REAL,                  -- NULL: there is no price
    billed INTEGER              -- 1: cost was spent, 0: it was saved
);
{_rollup("hours", HOUR_SECONDS)}
{_rollup("days", DAY_SECONDS)}
"""

# What makes a file of one version into one of the next; the first makes a new file.
MIGRATIONS: Final = (_FIRST_SCHEMA,)

_PLACES = {name: place for place, name in enumerate(COLUMNS)}
_ROW = f"({', '.join(COLUMNS.values())})"

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
            try:
                _brought_up_to_date(self.connection)
                self._identity = _identity(path)
            except BaseException:
                self.connection.close()
                raise

    @property
    def is_there(self) -> bool:
        """Whether the file still has its name; nobody has moved or replaced it."""
        return _identity(self.path) == self._identity

    def add(self, rows: Sequence[Sequence[Any]]) -> int:
        """Add requests in one transaction; those that are there already stay as is.

        Args:
            rows: values as in the journal, in the order of ``COLUMNS``.

        Returns:
            How many were new.

        Raises:
            StoreUnavailable: none was added.
            StoreCorrupt: none was added.
        """
        with translated(), self._transaction():
            return sum(
                self._add(rows[at : at + _ROWS_AT_ONCE])
                for at in range(0, len(rows), _ROWS_AT_ONCE)
            )

    def _add(self, rows: Sequence[Sequence[Any]]) -> int:
        values = ",".join([_ROW] * len(rows))
        statement = f"INSERT OR IGNORE INTO requests VALUES {values}"
        flat = list(itertools.chain.from_iterable(rows))
        try:
            if len(flat) == WIDTH * len(rows):
                return self.connection.execute(statement, flat).rowcount
        except (OverflowError, UnicodeError, sqlite3.ProgrammingError):
            pass  # one value that SQLite refuses must not keep out all others for ever
        flat = list(itertools.chain.from_iterable(map(_fitted, rows)))
        return self.connection.execute(statement, flat).rowcount

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
            for table, seconds in (("hours", HOUR_SECONDS), ("days", DAY_SECONDS)):
                removed += self.connection.execute(
                    f"DELETE FROM {table} WHERE ({_DIMENSIONS}) IN (SELECT "
                    f"{_DIMENSIONS} FROM {table} WHERE began < ? LIMIT ?)",
                    (when - seconds, DELETED_AT_ONCE),
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


def entry_of(when: float) -> int:
    """The least entry of a request that began then."""
    return int(when * 1e6) << 11


def interrupted(begun: Sequence[Any]) -> list[Any]:
    """The row of a request of which nothing but its beginning is known."""
    row = [*begun[:BEGUN_WIDTH], *[None] * (WIDTH - BEGUN_WIDTH)]
    row[_PLACES["status"]] = 0
    row[_PLACES["outcome"]] = "interrupted"
    return row


def _fitted(row: Sequence[Any]) -> list[Any]:
    """A row of exactly as many columns as there are, each one that SQLite takes."""
    return [*map(_storable, row[:WIDTH]), *[None] * (WIDTH - len(row))]


def _storable(value: Any) -> Any:
    """A value as it is, unless it is one that SQLite refuses for good."""
    if value.__class__ is str:
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value.__class__ is int:
        return value if -(2**63) <= value < 2**63 else None
    return value if value is None or isinstance(value, bool | float) else str(value)


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


def read_only(path: Path) -> sqlite3.Connection:
    """A connection that can read only; the daemon may be writing meanwhile.

    Raises:
        StoreUnavailable, StoreCorrupt: it cannot be read.
    """
    with translated():
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
        )
        try:
            _version(connection)
        except BaseException:
            connection.close()
            raise
    return connection
