"""``inferencia usage``: what was used, as a table or as CSV.

Reads the database of the configuration, and the journals beside it, whether a daemon
runs or not; changes neither.
"""

import argparse
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from inferencia.keycommands import BAD_USAGE, DONE, FAILED, Outcome
from inferencia.quantities import moment
from inferencia.usageleftovers import Pending, read_pending
from inferencia.usagereport import BY, By, UsageRow, as_csv, report
from inferencia.usageschema import DIMENSIONS
from inferencia.usagestore import StoreCorrupt, StoreUnavailable, reading


def register(
    subparsers: "argparse._SubParsersAction[Any]",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Add ``usage`` to the program's parser.

    Args:
        parents: what every command takes, such as ``-c FILE``.
    """
    about = "show what was used, by key, model, backend or time"
    usage = subparsers.add_parser(
        "usage", help=about, description=f"{about}.", parents=parents
    )
    usage.add_argument(
        "--by", choices=BY, default="key", help="what to sum up by (default: key)"
    )
    usage.add_argument(
        "--since",
        metavar="D",
        help="a date such as 2027-01-31 (UTC), or how long ago, such as 30d or 12h "
        "(default: everything that is kept); its hour counts as a whole",
    )
    usage.add_argument("--csv", action="store_true", help="write CSV, with all sums")


def run(options: argparse.Namespace, database: Path | None, now: float) -> Outcome:
    """Carry out the command.

    Args:
        options: as parsed by what ``register`` added.
        database: the file; None: nothing is written down.
        now: seconds since 1970.
    """
    by: By = options.by
    try:
        since = None if options.since is None else moment(options.since, now)
    except ValueError as error:
        return Outcome(BAD_USAGE, err=f"inferencia: --since: {error}\n")
    if database is None:
        note = "inferencia: usage is not written down (usage.path is off)\n"
        return Outcome(FAILED, err=note)
    try:
        pending = read_pending(database)
        connection = reading(database, pending.ended)
        try:
            rows = report(connection, (by,), since=since)
            running = _running(connection, pending)
        finally:
            connection.close()
    except (StoreUnavailable, StoreCorrupt) as error:
        return Outcome(FAILED, err=f"inferencia: {database}: {error}\n")
    note = _note(rows, running, database)
    if options.csv:
        return Outcome(DONE, out=as_csv(rows, (by,)), err=note)
    return Outcome(DONE, out=table(rows, by) if rows else "", err=note)


def _running(connection: sqlite3.Connection, pending: Pending) -> int:
    """How many go on: an end that found no room in a journal is in the database."""
    query = "SELECT 1 FROM main.requests WHERE entry = ?"
    found = (connection.execute(query, (entry,)) for entry in pending.begun)
    return sum(cursor.fetchone() is None for cursor in found)


def _note(rows: Sequence[UsageRow], running: int, database: Path) -> str:
    lines = []
    if not rows:
        lines.append(f"nothing was used in that time, says {database}")
    if running == 1:
        lines.append("1 request has begun and not ended; it is not counted")
    elif running:
        lines.append(
            f"{running} requests have begun and not ended; they are not counted"
        )
    return "".join(f"{line}\n" for line in lines)


# Heading, and what stands below it. A column in which nothing stands is left out.
_COLUMNS: Mapping[str, Callable[[UsageRow], str]] = {
    "REQUESTS": lambda row: f"{row.requests:,}",
    "FAILED": lambda row: f"{row.failed:,}" if row.failed else "",
    "PROMPT": lambda row: f"{row.prompt_tokens:,}",
    "COMPLETION": lambda row: f"{row.completion_tokens:,}",
    "CACHED": lambda row: f"{row.cached_tokens:,}" if row.cached_tokens else "",
    "TOTAL": lambda row: f"{row.total_tokens:,}",
    "ESTIMATED": lambda row: f"{row.estimated:,}" if row.estimated else "",
    "SPENT": lambda row: f"{row.spent:,.4f}" if row.spent else "",
    "SAVED": lambda row: f"{row.saved:,.4f}" if row.saved else "",
}


def table(rows: Sequence[UsageRow], by: By) -> str:
    """Aligned columns with their sums below; no line ends with blanks."""
    kind = by.upper() if by in DIMENSIONS else f"{by.upper()} (UTC)"
    names = [kind, *(row.group[0] or "-" for row in rows), "all"]
    counted = [*rows, _together(rows)]
    columns = [_aligned([_shown(name) for name in names], str.ljust)]
    for heading, cell in _COLUMNS.items():
        cells = [cell(row) for row in counted]
        if any(cells):
            columns.append(_aligned([heading, *cells], str.rjust))
    return "".join(f"{'  '.join(row).rstrip()}\n" for row in zip(*columns, strict=True))


def _aligned(cells: Sequence[str], align: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, cells))
    return [align(cell, width) for cell in cells]


def _shown(name: str) -> str:
    """A name without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def _together(rows: Sequence[UsageRow]) -> UsageRow:
    names = [field.name for field in fields(UsageRow) if field.name != "group"]
    return UsageRow(("",), **{n: sum(getattr(row, n) for row in rows) for n in names})
