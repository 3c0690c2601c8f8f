"""The tables of the database of usage, as text for SQLite.

``requests`` has one row per request. ``sums`` has their sums by hour and by day, in
several views: by each of key, model and backend, and by all three. Each question is
answered from the smallest view that knows the answer (``view_for``), so that a year of
a million requests takes some thousand rows to read.

A request counts for the hour and the day (UTC) in which it ended, which is when its
tokens are charged to its key. Times are seconds since 1970, durations seconds. Costs
have the currency of the configuration's prices.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

HOUR_SECONDS: Final = 3600
DAY_SECONDS: Final = 86400
WEEK_SECONDS: Final = 7 * DAY_SECONDS

#: The columns of ``requests`` that are stored, in the order of the journal. Others are
#: computed from them when they are read.
COLUMNS: Final = (
    *("entry", "id", "started", "key", "model", "backend", "endpoint", "stream"),
    *("bytes_in", "status", "prompt_tokens", "completion_tokens", "cached_tokens"),
    *("estimated", "queued", "first_byte", "duration", "bytes_out", "outcome"),
    *("error", "cost", "billed"),
)
WIDTH: Final = len(COLUMNS)

#: How many columns are known when a request begins.
BEGUN_WIDTH: Final = 9

#: In SQLite's header of a file of ours: "infe".
APPLICATION_ID: Final = 0x696E6665

#: The columns of ``sums`` that are sums.
SUMMED: Final = (
    *("requests", "failed", "estimated", "prompt_tokens", "completion_tokens"),
    *("cached_tokens", "bytes_in", "bytes_out", "seconds", "spent", "saved"),
)

#: What requests are told apart by.
DIMENSIONS: Final = ("key", "model", "backend")

#: What identifies a row of ``sums``.
IDENTITY: Final = ("view", "began", *DIMENSIONS)


@dataclass(frozen=True, slots=True)
class View:
    """One way to sum up: for each so many seconds, by these dimensions."""

    number: int  # in the column ``view``; the other dimensions are "" there
    seconds: int
    by: tuple[str, ...]


#: Of those that answer a question the first is the smallest.
VIEWS: Final = (
    View(0, HOUR_SECONDS, ("backend",)),
    View(1, HOUR_SECONDS, ("model",)),
    View(2, HOUR_SECONDS, ("key",)),
    View(3, HOUR_SECONDS, DIMENSIONS),
    View(4, DAY_SECONDS, ("backend",)),
    View(5, DAY_SECONDS, ("model",)),
    View(6, DAY_SECONDS, ("key",)),
    View(7, DAY_SECONDS, DIMENSIONS),
)


def view_for(seconds: int, dimensions: Collection[str]) -> View:
    """The smallest view that tells these dimensions apart."""
    return next(
        view
        for view in VIEWS
        if view.seconds == seconds and set(dimensions) <= set(view.by)
    )


_FIRST_SCHEMA = """
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
    status INTEGER,             -- 499: the client left; 0: interrupted
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cached_tokens INTEGER,      -- part of prompt_tokens
    estimated INTEGER,          -- 1: the tokens were not counted by the backend
    queued REAL,                -- held back until a backend could take it
    first_byte REAL,            -- from the beginning
    duration REAL,              -- NULL: interrupted, nobody knows
    bytes_out INTEGER,
    outcome TEXT NOT NULL,      -- complete, cut, error, interrupted
    error TEXT,                 -- the code that the client was told
    cost REAL,                  -- NULL: there is no price
    billed INTEGER,             -- 1: cost was spent, 0: it was saved
    ended REAL GENERATED ALWAYS AS (started + duration) VIRTUAL,
    tokens_per_second REAL GENERATED ALWAYS AS (
        -- of a stream from its first byte on, unless it came all at once
        CASE WHEN completion_tokens > 0 AND duration > coalesce(queued, 0)
            THEN completion_tokens /
            CASE WHEN stream AND duration - first_byte >= 0.001
                THEN duration - first_byte ELSE duration - coalesce(queued, 0) END
        END
    ) VIRTUAL
);
CREATE TABLE sums (
    view INTEGER NOT NULL,      -- 0 to 3: by hour, 4 to 7: by day; of each by backend,
                                -- model, key, all three
    began INTEGER NOT NULL,     -- the hour or day
    key TEXT NOT NULL,          -- '' where the view does not tell it apart
    model TEXT NOT NULL,
    backend TEXT NOT NULL,
    requests INTEGER NOT NULL,
    failed INTEGER NOT NULL,    -- whose outcome was not complete
    estimated INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    bytes_in INTEGER NOT NULL,
    bytes_out INTEGER NOT NULL,
    seconds REAL NOT NULL,      -- durations
    spent REAL NOT NULL,
    saved REAL NOT NULL,
    PRIMARY KEY (view, began, key, model, backend)
) WITHOUT ROWID;
"""

#: What makes a file of one version into one of the next; the first makes a new file.
MIGRATIONS: Final = (_FIRST_SCHEMA,)


def adding_rows(schema: str, count: int, common: Sequence[int] = ()) -> str:
    """The statement that adds so many requests.

    Its parameters have no numbers: some versions of Python warn of each that has one,
    and all from 3.12 on search for its name among the others (a row took ten times as
    long).

    Args:
        schema: of the table.
        count: how many.
        common: places of the columns in which all have the same. Their values come
            before those of the rows, which are without them.
    """
    adding = f"INSERT INTO {schema}.requests ({', '.join(COLUMNS)})"
    row = f"({','.join('?' * (WIDTH - len(common)))})"
    rows = f"VALUES {','.join([row] * count)}"
    if not common:
        return f"{adding} {rows}"
    shared = ", ".join(COLUMNS[place] for place in common)
    own = ", ".join(n for place, n in enumerate(COLUMNS) if place not in common)
    return (
        f"WITH common({shared}) AS (VALUES ({','.join('?' * len(common))})), "
        f"own({own}) AS ({rows}) "
        f"{adding} SELECT {', '.join(COLUMNS)} FROM own CROSS JOIN common"
    )


def adding_sums(schema: str, count: int) -> str:
    """The statement that adds to all sums so many sums of an hour.

    Args:
        schema: of the table.
        count: how many; of each, when the hour began, ``DIMENSIONS`` and ``SUMMED``.
    """
    hourly = ("began", *DIMENSIONS, *SUMMED)
    row = f"({','.join('?' * len(hourly))})"
    views = ", ".join(
        str((view.number, view.seconds, *(int(d in view.by) for d in DIMENSIONS)))
        for view in VIEWS
    )
    return f"""
WITH hourly({", ".join(hourly)}) AS (
    VALUES {", ".join([row] * count)}
), views(view, unit, {", ".join(f"by_{name}" for name in DIMENSIONS)}) AS (
    VALUES {views}
)
INSERT INTO {schema}.sums
SELECT view, began / unit * unit,
    {", ".join(f"CASE WHEN by_{name} THEN {name} ELSE '' END" for name in DIMENSIONS)},
    {", ".join(f"sum({name})" for name in SUMMED)}
FROM hourly CROSS JOIN views WHERE true GROUP BY 1, 2, 3, 4, 5
ON CONFLICT DO UPDATE SET
    {", ".join(f"{name} = {name} + excluded.{name}" for name in SUMMED)}
"""
