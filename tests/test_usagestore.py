"""Promises of the database of usage: rows are added once, and sums agree with them."""

import math
import random
import re
import sqlite3
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from inferencia import usagereport, usagestore
from inferencia.usagereport import BY, MAX_ROWS, By, as_csv, report, standing
from inferencia.usagerows import add_sums
from inferencia.usageschema import (
    COLUMNS,
    DAY_SECONDS,
    MIGRATIONS,
    VIEWS,
    WIDTH,
    adding_rows,
)
from inferencia.usagestore import (
    Store,
    StoreCorrupt,
    StoreUnavailable,
    entry_of,
    interrupted,
    is_corrupt,
    moved_aside,
    reading,
)

NOON = datetime(2027, 3, 1, 12, tzinfo=UTC).timestamp()
HOUR = 3600.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
    yield store
    store.close()


def row(
    number: int = 0,
    *,
    when: float = NOON,
    key: str | None = "alice",
    model: str | None = "m",
    backend: str | None = "b",
    prompt: int | None = 10,
    completion: int | None = 5,
    cost: float | None = None,
    billed: int | None = None,
    outcome: str = "complete",
    seconds: float = 2.0,
) -> list[Any]:
    """A request that ended at ``when``."""
    values = dict.fromkeys(COLUMNS, None) | {
        "entry": entry_of(when - seconds) + number,
        "id": f"req-{number}",
        "started": when - seconds,
        "key": key,
        "model": model,
        "backend": backend,
        "endpoint": "/v1/chat/completions",
        "status": 200,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "estimated": 0,
        "duration": seconds,
        "bytes_out": 100,
        "outcome": outcome,
        "cost": cost,
        "billed": billed,
    }
    return list(values.values())


def names(store: Store, by: By, **given: Any) -> dict[str, int]:
    """The name and the number of requests of each row of a report."""
    return {
        found.group[0]: found.requests
        for found in report(store.connection, (by,), **given)
    }


# --- rows ------------------------------------------------------------------------


def test_a_row_is_kept_as_it_was(store: Store) -> None:
    store.add([row(1, cost=2.5, billed=1)])
    store.connection.row_factory = sqlite3.Row
    (found,) = store.connection.execute("SELECT * FROM requests").fetchall()
    kept = dict(found)
    assert kept["id"] == "req-1" and kept["key"] == "alice"
    assert (kept["started"], kept["ended"]) == (NOON - 2.0, NOON)
    assert (kept["duration"], kept["cost"], kept["billed"]) == (2.0, 2.5, 1)
    assert kept["queued"] is None


@pytest.mark.parametrize(
    ("members", "speed"),
    [
        ({"stream": 0, "first_byte": 1.9}, 2.5),
        ({"stream": 1, "first_byte": 1.0}, 5.0),
        ({"stream": 1, "first_byte": 2.0}, 2.5),
        ({"stream": 1, "first_byte": None}, 2.5),
        ({"stream": 1, "completion_tokens": None}, None),
        ({"duration": 0.0}, None),
        ({"stream": 0, "queued": 1.0}, 5.0),
        ({"stream": 1, "first_byte": 1.5, "queued": 1.5}, 10.0),
        ({"stream": 1, "first_byte": 2.0, "queued": 1.0}, 5.0),
        ({"stream": 0, "queued": 2.0}, None),
    ],
)
def test_the_speed_is_that_of_the_completion(
    store: Store, members: dict[str, Any], speed: float | None
) -> None:
    values = dict(zip(COLUMNS, row(1), strict=True)) | members
    store.add([list(values.values())])
    found = store.connection.execute("SELECT tokens_per_second FROM requests")
    assert found.fetchall() == [(speed,)]


def test_adding_again_changes_neither_rows_nor_sums(store: Store) -> None:
    rows = [row(number) for number in range(200)]
    assert store.add(rows) == 200
    assert store.add([*rows[50:], row(999)]) == 1
    assert names(store, "key") == {"alice": 201}
    count = store.connection.execute("SELECT count(*) FROM requests").fetchone()[0]
    assert count == 201


def test_an_interruption_never_replaces_an_end(store: Store) -> None:
    ended = row(1)
    store.add([ended])
    assert store.add([interrupted(ended), interrupted(row(2))]) == 1
    found = store.connection.execute("SELECT id, outcome, ended FROM requests")
    assert found.fetchall() == [
        ("req-1", "complete", NOON),
        ("req-2", "interrupted", None),
    ]


def test_one_request_may_repeat_the_id_of_another(store: Store) -> None:
    twins = [row(1), row(2)]
    twins[1][1] = twins[0][1]
    assert store.add(twins) == 2


@pytest.mark.parametrize(
    ("column", "value"),
    [("bytes_in", 2**70), ("model", "\ud800"), ("key", {"a": 1}), ("error", [1])],
)
def test_a_value_that_sqlite_refuses_keeps_out_nobody(
    store: Store, column: str, value: Any
) -> None:
    odd = row(1)
    odd[list(COLUMNS).index(column)] = value
    assert store.add([row(0), odd, row(2)]) == 3
    assert sum(found.requests for found in report(store.connection, ("key",))) == 3


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("cost", [math.nan]),
        ("cost", [math.inf]),
        ("duration", [math.nan, math.inf, -math.inf, "x"]),
        ("started", [1e300, -1e300, math.inf]),
        ("prompt_tokens", [2**63 - 1] * 1200),
        ("prompt_tokens", [-(2**63), -(2**63)]),
        ("bytes_out", [2**50 - 1] * 1200),
        ("estimated", [b"x", "y"]),
    ],
)
def test_a_number_beyond_all_reason_keeps_out_nobody(
    store: Store, column: str, values: list[Any]
) -> None:
    place, rows = COLUMNS.index(column), [row(n) for n in range(len(values))]
    for n, (odd, value) in enumerate(zip(rows, values, strict=True)):
        odd[0], odd[-1], odd[place] = n, 1, value
        odd[COLUMNS.index("key")] = ("alice", "bob")[n % 2]
    assert store.add([*rows, row(5000), row(5001, cost=2.0, billed=1)]) == len(rows) + 2
    (day,) = report(store.connection, (), since=NOON - HOUR, until=NOON + HOUR)
    assert day.requests >= 2 and day.spent == 2.0
    if column not in ("started", "duration"):
        assert day.requests == len(rows) + 2
        assert day.prompt_tokens % 10 == 0 and day.completion_tokens == 5 * day.requests
    summed = "SELECT DISTINCT total FROM (SELECT sum(requests) AS total FROM sums"
    found = store.connection.execute(f"{summed} GROUP BY view)").fetchall()
    assert found == [(len(rows) + 2,)]


def test_no_parameter_of_a_statement_has_a_number() -> None:
    for common in ((), (1, 3, WIDTH - 1)):
        statement = adding_rows("main", 3, common)
        assert "?" in statement and not re.search(r"\?\d", statement)


def test_of_many_only_those_are_added_that_are_not_there(store: Store) -> None:
    store.add([row(number) for number in range(10, 200, 7)])
    strangers = [row(n, key=f"key-{n}", model=f"m-{n % 3}") for n in range(200, 300)]
    assert store.add([row(n) for n in range(200)] + strangers) == 200 - 28 + 100
    assert store.add(strangers) == 0
    rows = store.connection.execute("SELECT count(*), sum(prompt_tokens) FROM requests")
    requests, tokens = rows.fetchone()
    (total,) = report(store.connection, ())
    assert (total.requests, total.prompt_tokens) == (requests, tokens)
    assert requests == 300


def test_rows_of_an_earlier_or_a_later_version_are_fitted(store: Store) -> None:
    assert store.add([row(1)[:-2], [*row(2), "more"], row(3)]) == 3


def test_the_file_is_for_this_user_alone(store: Store, path: Path) -> None:
    store.add([row(1)])
    for one in path.parent.iterdir():
        assert stat.S_IMODE(one.stat().st_mode) == 0o600, one


# --- sums ------------------------------------------------------------------------


def scattered(count: int) -> list[list[Any]]:
    rng = random.Random(11)
    return [
        row(
            number,
            when=NOON + rng.uniform(-40 * DAY_SECONDS, 40 * DAY_SECONDS),
            key=rng.choice(["alice", "bob", None]),
            model=rng.choice(["m", "n", None]),
            backend=rng.choice(["b", "c"]),
            prompt=rng.choice([None, 3, 70]),
            completion=rng.choice([None, 0, 9]),
            cost=rng.choice([None, 1.0]),
            billed=rng.choice([0, 1]),
            outcome=rng.choice(["complete", "cut", "error"]),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("by", [*((one,) for one in BY), (), ("day", "model")])
@pytest.mark.parametrize("key", [None, "alice"])
@pytest.mark.parametrize(
    ("since", "until"),
    [
        (None, None),
        (NOON - 30 * DAY_SECONDS, None),
        (None, NOON + 5 * HOUR),
        (NOON - 13 * DAY_SECONDS, NOON + 17 * DAY_SECONDS),
        (NOON - 2 * HOUR, NOON + 3 * HOUR),
        (NOON + 12 * HOUR, NOON + 36 * HOUR),
    ],
)
def test_sums_are_those_of_the_rows(
    scattered_store: Store,
    by: tuple[By, ...],
    key: str | None,
    since: float | None,
    until: float | None,
) -> None:
    groups = {
        "hour": "strftime('%Y-%m-%dT%H:00Z', ended, 'unixepoch')",
        "day": "strftime('%Y-%m-%d', ended, 'unixepoch')",
        # The Monday before the next Sunday.
        "week": "strftime('%Y-%m-%d', ended, 'unixepoch', 'weekday 0', '-6 days')",
    }
    columns = [groups.get(one, f"coalesce({one}, '')") for one in by] or ["''"]
    expected = scattered_store.connection.execute(
        f"""
        SELECT {", ".join(columns)}, count(*), sum(outcome <> 'complete'),
            sum(coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)),
            total(duration), total(cost * billed), total(cost * (1 - billed))
        FROM requests
        WHERE (:key IS NULL OR key = :key) AND (:since IS NULL OR ended >= :since)
            AND (:until IS NULL OR ended < :until)
        GROUP BY {", ".join(str(n + 1) for n in range(len(columns)))}
        """,
        {"key": key, "since": since, "until": until},
    ).fetchall()
    found = report(scattered_store.connection, by, key=key, since=since, until=until)
    assert sorted(
        (*(r.group or ("",)), r.requests, r.failed, r.total_tokens,
         round(r.seconds, 6), r.spent, r.saved)
        for r in found
    ) == sorted((*e[:-3], round(e[-3], 6), *e[-2:]) for e in expected)  # fmt: skip


@pytest.fixture(scope="module")
def scattered_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("sums") / "usage.sqlite3")
    rows = scattered(600)
    for at in range(0, len(rows), 97):
        store.add(rows[at : at + 97])
    yield store
    store.close()


def test_sums_that_are_kept_are_those_that_are_made_anew(store: Store) -> None:
    for at in range(5):
        store.add(scattered(100)[at * 20 : at * 20 + 20])
    connection = store.connection
    kept = connection.execute("SELECT * FROM sums ORDER BY 1, 2, 3, 4, 5").fetchall()
    connection.execute("DELETE FROM sums")
    columns = ", ".join(COLUMNS)
    add_sums(connection, "main", connection.execute(f"SELECT {columns} FROM requests"))
    made = connection.execute("SELECT * FROM sums ORDER BY 1, 2, 3, 4, 5").fetchall()
    assert kept == made and {line[0] for line in kept} == {v.number for v in VIEWS}


def test_rows_come_in_the_order_of_time_and_then_of_tokens(store: Store) -> None:
    store.add(
        [
            row(1, when=NOON + DAY_SECONDS, model="few"),
            row(2, when=NOON, model="few"),
            row(3, when=NOON, model="many", prompt=9000),
        ]
    )
    found = report(store.connection, ("day", "model"))
    assert [r.group for r in found] == [
        ("2027-03-01", "many"),
        ("2027-03-01", "few"),
        ("2027-03-02", "few"),
    ]
    assert [r.group[0] for r in report(store.connection, ("model",))] == ["many", "few"]


def test_a_request_counts_for_the_day_in_which_it_ended(store: Store) -> None:
    store.add([row(1, when=NOON + 13 * HOUR, seconds=5 * HOUR)])
    assert names(store, "day") == {"2027-03-02": 1}
    store.add([interrupted(row(2, when=NOON))])
    assert names(store, "day") == {"2027-03-01": 1, "2027-03-02": 1}


def test_money_is_spent_or_saved(store: Store) -> None:
    price = 2.0
    store.add([row(1, cost=price, billed=1), row(2, cost=price, billed=0), row(3)])
    (found,) = report(store.connection, ())
    assert (found.spent, found.saved) == (2.0, 2.0)


def test_a_clock_beyond_all_calendars_breaks_no_view(store: Store) -> None:
    far = row(1, when=1e13 / 4)
    far[0] = 12345
    store.add([far])
    assert [r.requests for r in report(store.connection, ("day",))] == [1]


def test_a_name_that_is_a_formula_is_no_formula_in_a_spreadsheet(store: Store) -> None:
    store.add([row(1, model='=HYPERLINK("x")'), row(2, model="plain, quoted")])
    lines = as_csv(report(store.connection, ("model",)), ("model",)).splitlines()
    assert lines[0].startswith("model,requests,failed,")
    assert sorted(line[:20] for line in lines[1:]) == [
        '"\'=HYPERLINK(""x"")"'[:20],
        '"plain, quoted",1,0,',
    ]


def test_the_number_of_rows_is_bounded(store: Store) -> None:
    store.add([row(n, model=f"m{n}") for n in range(20)])
    assert len(report(store.connection, ("model",), limit=7)) == 7
    assert MAX_ROWS == 100_000


# --- what limits go on from ------------------------------------------------------


def test_todays_tokens_and_costs_are_found_again(store: Store) -> None:
    store.add(
        [
            row(1, when=NOON, cost=3.0, billed=0),
            row(2, when=NOON - 600),
            row(3, when=NOON - DAY_SECONDS, prompt=1000),
            row(4, when=NOON - 10, key="bob", completion=None),
            row(5, when=NOON, key=None),
        ]
    )
    found = standing(store.connection, NOON + 60)
    assert found.tokens_today == {"alice": 30, "bob": 10}
    assert found.cost_today == {"b": 3.0}
    assert found.tokens_lately["alice"] == [(660.0, 15), (60.0, 15)]
    assert standing(store.connection, NOON + DAY_SECONDS).tokens_today == {}


# --- keeping, moving, refusing -----------------------------------------------------


def test_what_is_too_old_is_removed_and_the_rest_is_not(store: Store) -> None:
    old = [row(n, when=NOON - 10 * DAY_SECONDS - n) for n in range(2500)]
    store.add([*old, row(1, when=NOON)])
    removals = [store.remove_before(NOON - DAY_SECONDS)]
    assert 1000 <= removals[0] < 2000  # a batch
    while removals[-1]:
        removals.append(store.remove_before(NOON - DAY_SECONDS))
    assert names(store, "key") == {"alice": 1}
    assert names(store, "hour") == {"2027-03-01T12:00Z": 1}
    count = store.connection.execute("SELECT count(*) FROM requests").fetchone()[0]
    assert count == 1


def test_a_database_of_somebody_else_is_not_touched(path: Path) -> None:
    with sqlite3.connect(path) as theirs:
        theirs.execute("CREATE TABLE requests (mine)")
    theirs.close()
    before = path.read_bytes()
    with pytest.raises(StoreUnavailable, match="another program"):
        Store(path)
    assert not is_corrupt(path)
    with sqlite3.connect(path) as theirs:
        assert theirs.execute("SELECT count(*) FROM requests").fetchone() == (0,)
    theirs.close()
    assert len(before) == path.stat().st_size


def test_a_database_of_a_later_version_is_not_touched(path: Path) -> None:
    store = Store(path)
    store.connection.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(StoreUnavailable, match="later version"):
        Store(path)


def test_an_earlier_version_is_brought_up_to_date(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(path)
    store.add([row(1)])
    store.close()
    more = (*MIGRATIONS, "ALTER TABLE requests ADD COLUMN mood TEXT;\n")
    monkeypatch.setattr(usagestore, "MIGRATIONS", more)
    store = Store(path)
    assert store.connection.execute("SELECT mood FROM requests").fetchall() == [(None,)]
    store.close()
    Store(path).close()  # and only once


def test_a_migration_that_fails_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(path).close()
    more = (
        "ALTER TABLE requests ADD COLUMN mood TEXT;\nALTER TABLE nothing RENAME TO x;\n"
    )
    monkeypatch.setattr(usagestore, "MIGRATIONS", (*MIGRATIONS, more))
    with pytest.raises(StoreUnavailable):
        Store(path)
    monkeypatch.undo()
    store = Store(path)
    assert store.add([row(1)]) == 1
    store.close()


def test_a_corrupt_file_is_recognised_and_kept(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(StoreCorrupt):
        Store(path)
    assert is_corrupt(path)
    first = moved_aside(path, NOON)
    assert first.name == "usage.sqlite3.corrupt-20270301T120000Z"
    path.write_bytes(b"nor this" * 1000)
    assert moved_aside(path, NOON).name.endswith("Z-2")
    assert first.read_bytes().startswith(b"this is no")
    Store(path).close()


def test_a_spoilt_page_is_recognised(path: Path) -> None:
    store = Store(path)
    store.add([row(n) for n in range(2000)])
    store.close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 :] = b"\xff" * (len(data) - 4096 * 3)
    path.write_bytes(data)
    assert is_corrupt(path)


def test_two_writers_of_one_file_add_up(path: Path) -> None:
    one, other = Store(path), Store(path)
    for number in range(30):
        one.add([row(2 * number)])
        other.add([row(2 * number + 1)])
    assert names(one, "key") == names(other, "key") == {"alice": 60}
    one.close()
    other.close()


def test_rows_that_are_pending_count_once(path: Path) -> None:
    store = Store(path)
    store.add([row(1), row(2)])
    connection = reading(path, [row(2), row(3), row(3)])
    assert report(connection, ("key",))[0].requests == 3
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM main.requests")
    connection.close()
    store.close()


def test_what_is_folded_while_it_is_read_counts_once(path: Path) -> None:
    store = Store(path)
    store.add([row(1)])
    connection = reading(path, [row(1), row(2)])
    store.add([row(2), row(3)])
    assert [found.requests for found in report(connection, ())] == [2]
    connection.close()
    store.close()


def test_what_is_pending_counts_before_there_is_a_database(path: Path) -> None:
    connection = reading(path, [row(1)])
    assert report(connection, ("key",))[0].requests == 1
    connection.close()
    assert not path.exists()


def test_the_width_of_a_row_is_that_of_the_table(store: Store) -> None:
    found = store.connection.execute("SELECT * FROM requests")
    names = [column[0] for column in found.description]
    assert names[:WIDTH] == list(COLUMNS)
    assert names[WIDTH:] == ["ended", "tokens_per_second"]
    assert len(COLUMNS) == WIDTH
    assert usagereport.NOTHING.total_tokens == 0
