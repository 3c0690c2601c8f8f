"""What was used, summed up: by key, model, backend or time, as rows or as CSV.

All sums come from the table ``sums`` of ``usageschema``; so a span of time begins
and ends with an hour.

Functions here take a connection and block; ``usage.UsageBook.ask`` runs them in the
database's thread, ``usagecommand`` on a connection of its own.
"""

import csv
import functools
import io
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Final, Literal, get_args

from inferencia.usageschema import (
    DAY_SECONDS,
    DIMENSIONS,
    HOUR_SECONDS,
    SUMMED,
    WEEK_SECONDS,
    view_for,
)
from inferencia.usagestore import PENDING, entry_of, translated

By = Literal["key", "model", "backend", "hour", "day", "week"]
BY: Final[tuple[By, ...]] = get_args(By)

#: More rows than any view shows: 400 days of 250 models, or all their hours.
MAX_ROWS: Final = 100_000

# Few requests go on for longer. Looking back a whole day would take a busy gateway's
# start a second.
_LONG_REQUEST_SECONDS = 3600

# How far back tokens per minute are looked at. A key that went further into debt than
# an hour of its rate is forgiven the rest by a restart.
LATELY_SECONDS: Final = 3600

# What makes a spreadsheet compute a cell (OWASP, CSV Injection).
_FORMULA_BEGINNINGS = ("=", "+", "-", "@", "\t", "\r")

# 1970-01-05, the first Monday: weeks begin with one (ISO 8601).
_FIRST_WEEK = 4 * DAY_SECONDS

# After every moment; a multiple of a day.
_FAR = float(DAY_SECONDS * 10**8)

# A clock may be set to moments beyond what Python's datetime has a name for.
_LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group of requests."""

    group: tuple[str, ...]  # a value for each of what it was grouped by
    requests: int
    failed: int  # those that were not answered whole: cut, error, interrupted
    estimated: int  # those whose tokens were not counted by the backend
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # part of prompt_tokens
    bytes_in: int
    bytes_out: int
    seconds: float  # all their durations together
    spent: float  # money, in the currency of the prices
    saved: float  # what the same tokens would have cost where they cost nothing

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self, by: Sequence[By]) -> dict[str, Any]:
        """The row as JSON shows it, with the group under its names."""
        row: dict[str, Any] = dict(zip(by, self.group, strict=True))
        for name in _SHOWN:
            value = getattr(self, name)
            row[name] = round(value, 9) if isinstance(value, float) else value
        return row


_SHOWN: Final = (
    *("requests", "failed", "estimated", "prompt_tokens", "completion_tokens"),
    *("total_tokens", "cached_tokens", "bytes_in", "bytes_out", "seconds"),
    *("spent", "saved"),
)

#: The sums of no requests.
NOTHING: Final = UsageRow((), 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0)

assert {f.name for f in fields(UsageRow)} - {"group"} == set(SUMMED)


def report(
    connection: sqlite3.Connection,
    by: Sequence[By],
    *,
    since: float | None = None,
    until: float | None = None,
    key: str | None = None,
    limit: int = MAX_ROWS,
) -> list[UsageRow]:
    """Sums of what was used.

    Args:
        connection: of the database; what is attached as ``pending`` counts as well.
        by: some of ``BY``, also a time and a name: ``("day", "model")``.
                None: one row with everything, or no row if there was nothing.
        since: seconds since 1970; it counts from the beginning of its hour.
        until: the same; up to the beginning of its hour, or of the next one.
        key: only what this key has used.
        limit: the most rows.

    Returns:
        Rows in the order of time, and then by tokens, most first. Hours have the form
        ``2027-01-31T13:00Z``, days ``2027-01-31``; weeks have that of their Monday.

    Raises:
        StoreUnavailable, StoreCorrupt: it cannot be read.
    """
    end = _FAR if until is None else -(-until // HOUR_SECONDS) * HOUR_SECONDS
    begin = 0.0 if since is None else since // HOUR_SECONDS * HOUR_SECONDS
    dimensions = {one for one in (*by, key and "key") if one in DIMENSIONS}
    whose = "" if key is None else " AND key = ?"
    parts: list[str] = []
    values: list[Any] = []
    for source in _sources(connection):
        for seconds, first, last in _spans(begin, end, is_hourly="hour" in by):
            where = f"view = ? AND began >= ? AND began < ?{whose}"
            parts.append(f"SELECT * FROM {source}.sums WHERE {where}")
            values += (view_for(seconds, dimensions).number, first, last)
            values += () if key is None else (key,)
    groups = [_GROUPS[one] for one in by] or ["''"]
    sums = [f"sum({name})" for name in SUMMED]
    numbers = [str(place + 1) for place in range(len(groups))]
    times = [n for n, one in zip(numbers, by, strict=False) if one in _SHOWN_AS]
    order = [*times, "sum(prompt_tokens + completion_tokens) DESC", *numbers]
    statement = (
        f"SELECT {', '.join(groups + sums)} FROM ({' UNION ALL '.join(parts)}) "
        f"GROUP BY {', '.join(numbers)} ORDER BY {', '.join(order)} LIMIT ?"
    )
    with translated():
        found = connection.execute(statement, (*values, limit)).fetchall()
    return [_row(by, columns) for columns in found]


def _spans(
    begin: float, end: float, *, is_hourly: bool
) -> Iterator[tuple[int, float, float]]:
    """The parts of a span, and whether sums by hour or by day are read of each."""
    first_day = -(-begin // DAY_SECONDS) * DAY_SECONDS
    last_day = end // DAY_SECONDS * DAY_SECONDS
    if is_hourly or first_day >= last_day:
        yield HOUR_SECONDS, begin, end
        return
    if begin < first_day:
        yield HOUR_SECONDS, begin, first_day
    yield DAY_SECONDS, first_day, last_day
    if last_day < end:
        yield HOUR_SECONDS, last_day, end


def _sources(connection: sqlite3.Connection) -> list[str]:
    with translated():
        attached = connection.execute("PRAGMA database_list").fetchall()
    return [name for _, name, _ in attached if name in ("main", PENDING)]


def _row(by: Sequence[By], columns: Sequence[Any]) -> UsageRow:
    width = max(1, len(by))
    group = tuple(
        _SHOWN_AS.get(one, str)(value)
        for one, value in zip(by, columns[:width], strict=False)
    )
    return UsageRow(group, **dict(zip(SUMMED, columns[width:], strict=True)))


def _moment(form: str) -> Callable[[Any], str]:
    """How a moment is written. A year by day and key has each of them many times."""

    @functools.lru_cache(maxsize=1024)
    def written(value: float) -> str:
        return datetime.fromtimestamp(min(value, _LATEST), UTC).strftime(form)

    return written


_GROUPS: Final[Mapping[By, str]] = {
    "key": "key",
    "model": "model",
    "backend": "backend",
    "hour": "began",
    "day": f"began / {DAY_SECONDS} * {DAY_SECONDS}",
    "week": f"(began - {_FIRST_WEEK}) / {WEEK_SECONDS} * {WEEK_SECONDS} "
    f"+ {_FIRST_WEEK}",
}
_SHOWN_AS: Final[Mapping[By, Callable[[Any], str]]] = {
    "hour": _moment("%Y-%m-%dT%H:%MZ"),
    "day": _moment("%Y-%m-%d"),
    "week": _moment("%Y-%m-%d"),
}


def as_csv(rows: Iterable[UsageRow], by: Sequence[By]) -> str:
    """Rows as CSV (RFC 4180) with a line of names.

    A name that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow((*by, *_SHOWN))
    for row in rows:
        cells = row.as_dict(by)
        names = [
            f"'{one}" if one.startswith(_FORMULA_BEGINNINGS) else one
            for one in row.group
        ]
        writer.writerow((*names, *(cells[name] for name in _SHOWN)))
    return text.getvalue()


@dataclass(frozen=True, slots=True)
class Standing:
    """What limits have to know at a start: they go on from it."""

    tokens_today: Mapping[str, int]  # by key
    # By key, oldest first: how many seconds ago, and how many tokens.
    tokens_lately: Mapping[str, Sequence[tuple[float, int]]]
    cost_today: Mapping[str, float]  # by backend, spent and saved together


def standing(connection: sqlite3.Connection, now: float) -> Standing:
    """What was used today and in the last hour.

    Args:
        connection: of the database.
        now: seconds since 1970.

    Raises:
        StoreUnavailable, StoreCorrupt: it cannot be read.
    """
    today = now // DAY_SECONDS * DAY_SECONDS
    since = now - LATELY_SECONDS
    with translated():
        tokens = connection.execute(
            "SELECT key, sum(prompt_tokens + completion_tokens) FROM sums "
            "WHERE view = ? AND began = ? AND key <> '' GROUP BY 1",
            (view_for(DAY_SECONDS, ("key",)).number, today),
        ).fetchall()
        costs = connection.execute(
            "SELECT backend, sum(spent + saved) FROM sums "
            "WHERE view = ? AND began = ? GROUP BY 1",
            (view_for(DAY_SECONDS, ("backend",)).number, today),
        ).fetchall()
        recent = connection.execute(
            "SELECT key, CAST(ended / 5 AS INTEGER) * 5 AS moment, "
            "sum(coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)) "
            "FROM requests WHERE entry >= ? AND ended > ? AND key IS NOT NULL "
            "GROUP BY 1, 2 ORDER BY 2",
            (entry_of(since - _LONG_REQUEST_SECONDS), since),
        ).fetchall()
    lately: dict[str, list[tuple[float, int]]] = {}
    for key, moment, amount in recent:
        if amount:
            lately.setdefault(key, []).append((max(0.0, now - moment), amount))
    return Standing(
        {key: amount for key, amount in tokens if amount},
        lately,
        {backend: cost for backend, cost in costs if cost},
    )


def first_day(connection: sqlite3.Connection, key: str) -> float | None:
    """When the first day began on which a key used something that is still known."""
    with translated():
        found = connection.execute(
            "SELECT min(began) FROM sums WHERE view = ? AND key = ?",
            (view_for(DAY_SECONDS, ("key",)).number, key),
        ).fetchone()
    return None if found[0] is None else float(found[0])
