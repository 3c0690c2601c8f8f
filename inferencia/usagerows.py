"""Adding requests to the database of usage, and to its sums.

Both are done for thousands of rows a second beside an event loop that wants the same
core, so they take as little as they can: what many rows have in common (who asked, what
for, how it ended) is given to SQLite once, and the sums are made in columns.

Everything here blocks, and goes into the transaction that is open.
"""

import contextlib
import itertools
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import add, itemgetter
from typing import Any, Final

from inferencia.usageschema import (
    COLUMNS,
    DIMENSIONS,
    HOUR_SECONDS,
    SUMMED,
    WIDTH,
    adding_rows,
    adding_sums,
)

Row = Sequence[Any]

# Rows of one statement. While a statement gets its values nothing else in the process
# runs, and while it works everything does: this many take at most 0.2 ms of the former.
_ROWS_AT_ONCE: Final = 64

# Rows whose columns are summed up at once, for the same reason.
_SUMMED_AT_ONCE: Final = 512

# Sums of one statement. The more, the more of them become one in the larger views.
_SUMS_AT_ONCE: Final = 512

_PLACES: Final = {name: place for place, name in enumerate(COLUMNS)}

# What many requests have in common.
_COMMON: Final = tuple(
    _PLACES[name]
    for name in (
        *("key", "model", "backend", "endpoint", "stream", "status", "cached_tokens"),
        *("estimated", "queued", "outcome", "error", "cost", "billed"),
    )
)
_OWN: Final = tuple(place for place in range(WIDTH) if place not in _COMMON)

# Values that are no number and no text are shown to adapters. Where there is none,
# Python makes and drops two exceptions for each, which took a quarter of a row's time.
# These are not written in Python, and cost little.
_AS_IT_IS: Callable[[Any], Any] = {}.get
sqlite3.register_adapter(type(None), _AS_IT_IS)
sqlite3.register_adapter(bool, (0).__add__)  # 0 or 1, as without

_LARGEST = 2**63 - 1

# Of some hundred requests no honest sum is larger (a petabyte), and all that are ever
# added together stay within what SQLite can count.
_MOST = 2**50


def add_rows(
    connection: sqlite3.Connection, schema: str, rows: Sequence[Row]
) -> list[Row]:
    """Add those requests that are not there yet.

    Args:
        connection: in a transaction.
        schema: of the table.
        rows: values in the order of ``COLUMNS``.

    Returns:
        Those that were added, as they were.
    """
    added: list[Row] = []
    for some in _parts(rows, _ROWS_AT_ONCE):
        added += _added(connection, schema, some)
    return added


def _parts(rows: Sequence[Row], most: int) -> Iterator[Sequence[Row]]:
    """All rows, of as few different numbers at once as possible: powers of two.

    The statements for each number are prepared once, and kept.
    """
    at = 0
    while at < len(rows):
        size = min(most, 1 << (len(rows) - at).bit_length() - 1)
        yield rows[at : at + size]
        at += size


def _added(
    connection: sqlite3.Connection, schema: str, rows: Sequence[Row]
) -> Sequence[Row]:
    """Those of some rows that were not there, and are now."""
    try:
        _insert(connection, schema, rows)
        return rows
    except (ValueError, OverflowError, sqlite3.ProgrammingError):
        pass  # one value that SQLite refuses must not keep out all others for ever
    except sqlite3.IntegrityError:
        pass  # one of them is there
    return [row for row in map(_fitted, rows) if _is_added(connection, schema, row)]


def _is_added(connection: sqlite3.Connection, schema: str, row: Row) -> bool:
    """Add a request, unless it is there."""
    try:
        connection.execute(_adding(schema, 1, has_common=False), row)
    except sqlite3.IntegrityError:
        return False
    return True


def _insert(connection: sqlite3.Connection, schema: str, rows: Sequence[Row]) -> None:
    """Add rows of which none is there yet.

    Raises:
        ValueError: they are of different widths.
        ValueError, OverflowError, sqlite3.ProgrammingError: a value cannot be stored.
        sqlite3.IntegrityError: one is there. None of them was added.
    """
    columns = list(zip(*rows, strict=True))
    if len(columns) != WIDTH:
        raise ValueError(f"{len(columns)} columns")
    common = [columns[place] for place in _COMMON]
    if all(column.count(column[0]) == len(rows) for column in common):
        statement = _adding(schema, len(rows), has_common=True)
        own = zip(*(columns[place] for place in _OWN), strict=True)
        values = [column[0] for column in common]
        values += itertools.chain.from_iterable(own)
    else:
        statement = _adding(schema, len(rows), has_common=False)
        values = list(itertools.chain.from_iterable(rows))
    connection.execute(statement, values)


@lru_cache
def _adding(schema: str, count: int, *, has_common: bool) -> str:
    return adding_rows(schema, count, _COMMON if has_common else ())


def _fitted(row: Row) -> list[Any]:
    """A row of exactly as many columns as there are, each one that SQLite takes."""
    return [*map(_storable, row[:WIDTH]), *[None] * (WIDTH - len(row))]


def _storable(value: Any) -> Any:
    """A value as it is, unless it is one that SQLite refuses for good."""
    if value.__class__ is str:
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value.__class__ is int:
        return value if -_LARGEST <= value <= _LARGEST else None
    return value if value is None or isinstance(value, bool | float) else str(value)


def add_sums(connection: sqlite3.Connection, schema: str, rows: Iterable[Row]) -> None:
    """Add requests to all sums; each must be given once.

    Args:
        connection: in a transaction.
        schema: of the table.
        rows: values in the order of ``COLUMNS``.
    """
    hourly = [(*group, *sums) for group, sums in _hourly(rows).items()]
    for some in _parts(hourly, _SUMS_AT_ONCE):
        values = list(itertools.chain.from_iterable(some))
        connection.execute(_adding_sums(schema, len(some)), values)


_adding_sums = lru_cache(adding_sums)


def _hourly(rows: Iterable[Row]) -> Mapping[tuple[Any, ...], list[Any]]:
    """``SUMMED`` of some requests, by hour, key, model and backend."""
    of_whom: defaultdict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        of_whom[_WHOSE(row)].append(row)
    found: dict[tuple[Any, ...], list[Any]] = {}
    for whose, theirs in of_whom.items():
        names = [name or "" for name in whose]
        for at in range(0, len(theirs), _SUMMED_AT_ONCE):
            for hour, columns in _by_hour(theirs[at : at + _SUMMED_AT_ONCE]):
                group = (hour, *names)
                sums = _summed(columns)
                before = found.get(group)
                found[group] = [*map(add, before, sums)] if before else sums
    return found


_WHOSE = itemgetter(*map(_PLACES.__getitem__, DIMENSIONS))


def _by_hour(rows: Sequence[Row]) -> Iterator[tuple[int, Sequence[Sequence[Any]]]]:
    """Requests by the hour in which each ended, as columns."""
    columns = tuple(zip(*rows, strict=True))
    started, durations = columns[_STARTED], columns[_DURATION]
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        first = _hour(min(started), 0.0)
        if first == _hour(max(started), max(durations)):
            yield first, columns
            return
    by_hour: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_hour[_hour_of(row)].append(row)
    for hour, some in by_hour.items():
        yield hour, tuple(zip(*some, strict=True))


def _hour_of(row: Row) -> int:
    try:
        # Nobody knows how long one took that was interrupted.
        return _hour(row[_STARTED], row[_DURATION] or 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0  # a time that is none must not keep out all others for ever


def _hour(started: float, duration: float) -> int:
    hour = int((started + duration) / HOUR_SECONDS) * HOUR_SECONDS
    return max(-_LARGEST, min(hour, _LARGEST))


_STARTED, _DURATION = _PLACES["started"], _PLACES["duration"]


def _summed(columns: Sequence[Sequence[Any]]) -> list[Any]:
    """``SUMMED`` of the requests with these columns."""
    count = len(columns[0])
    spent = saved = 0.0
    if any(columns[_COST]):
        for cost, is_billed in zip(columns[_COST], columns[_BILLED], strict=True):
            if _counts(cost) and _counts(is_billed):
                spent += cost * is_billed
                saved += cost * (1 - is_billed)
    return [
        count,
        count - columns[_OUTCOME].count("complete"),
        *[_sum(columns[place]) for place in _ADDED],
        spent,
        saved,
    ]


def _sum(column: Sequence[Any]) -> int | float:
    """The sum of those values that are known."""
    with contextlib.suppress(TypeError):  # not all are numbers
        total: int | float = sum(filter(None, column))
        if -_MOST < total < _MOST:
            return total
    total = sum(filter(_counts, column))
    return max(-_MOST, min(total, _MOST))


def _counts(value: Any) -> bool:
    """Whether a value is a number that can be added: not NaN, nor beyond all reason.

    One that cannot must not keep out all others for ever.
    """
    return isinstance(value, _NUMBERS) and -_MOST < value < _MOST


_NUMBERS = (int, float)
_OUTCOME, _COST, _BILLED = map(COLUMNS.index, ("outcome", "cost", "billed"))
# Those of the other sums, which are nothing but that.
_ADDED = tuple(COLUMNS.index({"seconds": "duration"}.get(n, n)) for n in SUMMED[2:-2])
