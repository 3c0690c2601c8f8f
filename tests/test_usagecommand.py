"""Promises of ``inferencia usage``: a table, CSV, and one line where it cannot."""

import argparse
import csv
import io
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from inferencia import cli, usagecommand
from inferencia.keycommands import BAD_USAGE, DONE, FAILED, Outcome
from inferencia.quantities import moment
from inferencia.usagejournal import Journal
from inferencia.usageschema import BEGUN_WIDTH
from inferencia.usagestore import Store
from test_usagestore import NOON, row

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "usage.sqlite3"
    store = Store(path)
    store.add(
        [
            row(1, prompt=1000, completion=500),
            row(2, key="bob", model="n", outcome="cut"),
            row(3, when=NOON - 40 * 86400, cost=2.5, billed=1),
        ]
    )
    store.close()
    return path


def ran(database: Path | None, *arguments: str, now: float = NOON) -> Outcome:
    parser = argparse.ArgumentParser()
    usagecommand.register(parser.add_subparsers())
    return usagecommand.run(parser.parse_args(["usage", *arguments]), database, now)


def lines(outcome: Outcome) -> list[list[str]]:
    assert outcome.code == DONE, outcome.err
    return [line.split() for line in outcome.out.splitlines()]


def test_a_table_has_a_line_for_each_and_one_for_all(database: Path) -> None:
    outcome = ran(database)
    assert lines(outcome) == [
        ["KEY", "REQUESTS", "FAILED", "PROMPT", "COMPLETION", "TOTAL", "SPENT"],
        ["alice", "2", "1,010", "505", "1,515", "2.5000"],
        ["bob", "1", "1", "10", "5", "15"],
        ["all", "3", "1", "1,020", "510", "1,530", "2.5000"],
    ]
    assert outcome.err == ""
    assert not any(line.endswith(" ") for line in outcome.out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--by", "model"), ["m", "n"]),
        (("--by", "day"), ["2027-01-20", "2027-03-01"]),
        (("--by", "backend"), ["b"]),
        (("--by", "hour", "--since", "30d"), ["2027-03-01T12:00Z"]),
        (("--by", "model", "--since", "2027-03-01"), ["m", "n"]),
        (("--by", "day", "--since", "41d"), ["2027-01-20", "2027-03-01"]),
    ],
)
def test_it_sums_up_by_what_is_asked_for(
    database: Path, arguments: Sequence[str], names: list[str]
) -> None:
    assert [line[0] for line in lines(ran(database, *arguments))[1:-1]] == names


@pytest.mark.parametrize("by", ["hour", "day", "week"])
def test_whose_hours_and_days_they_are_stands_above_them(
    database: Path, by: str
) -> None:
    head, *_ = ran(database, "--by", by).out.splitlines()
    assert head.startswith(f"{by.upper()} (UTC)  ")


def test_csv_has_every_sum(database: Path) -> None:
    outcome = ran(database, "--csv", "--by", "model")
    found = list(csv.DictReader(io.StringIO(outcome.out)))
    assert [one["model"] for one in found] == ["m", "n"]
    assert found[0]["prompt_tokens"] == "1010" and found[0]["spent"] == "2.5"
    assert found[1]["failed"] == "1"


def test_what_no_daemon_has_folded_yet_is_counted(database: Path) -> None:
    journal = Journal(database)
    journal.open()
    new = row(9, key="carol")
    journal.note([(1, *new[1:BEGUN_WIDTH])], [])
    journal.note([], [tuple(new)])
    journal.note([], [tuple(row(1))])  # which is there already
    found = ran(database)
    assert [line[:2] for line in lines(found)[1:]] == [
        ["alice", "2"],
        ["bob", "1"],
        ["carol", "1"],
        ["all", "4"],
    ]
    assert found.err == "1 request has begun and not ended; it is not counted\n"
    journal.close()


def test_what_ended_in_the_database_alone_does_not_go_on(database: Path) -> None:
    """A disk that was full for a moment took the beginning and not the end."""
    journal = Journal(database)
    journal.open()
    journal.note([tuple(row(1)[:BEGUN_WIDTH])], [])
    assert ran(database).err == ""
    journal.close()


def test_nothing_used_is_said(database: Path, tmp_path: Path) -> None:
    outcome = ran(database, "--since", "1d", now=NOON + 1e7)
    assert (outcome.code, outcome.out) == (DONE, "")
    assert "nothing was used" in outcome.err
    assert "nothing was used" in ran(tmp_path / "none.sqlite3").err
    assert not (tmp_path / "none.sqlite3").exists()


@pytest.mark.parametrize("since", ["yesterday", "2027-13-01", "1x", "-1d", ""])
def test_a_bad_since_is_bad_usage_in_one_line(database: Path, since: str) -> None:
    outcome = ran(database, f"--since={since}")
    assert (outcome.code, outcome.out) == (BAD_USAGE, "")
    assert outcome.err.startswith("inferencia: --since: ")
    assert outcome.err.count("\n") == 1


def test_moments_are_dates_or_lengths_of_time() -> None:
    noon = datetime(2027, 3, 1, 12, tzinfo=UTC).timestamp()
    assert moment("2027-03-01T12:00", NOON) == noon
    assert moment("2027-03-01 12", NOON) == noon
    assert moment("2027-03-01T12:00:00Z", NOON) == noon
    assert moment("12h", NOON) == NOON - 43200
    assert moment("43200", NOON) == NOON - 43200
    assert moment(f"{noon:.0f}", NOON) == noon


def test_a_record_that_is_off_says_so() -> None:
    outcome = ran(None)
    assert (outcome.code, outcome.out) == (FAILED, "")
    assert "usage.path is off" in outcome.err


def test_what_is_no_database_of_ours_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    path.write_bytes(b"no database" * 100)
    outcome = ran(path)
    assert (outcome.code, outcome.err.count("\n")) == (FAILED, 1)
    path.unlink()
    theirs = sqlite3.connect(path)
    theirs.execute("CREATE TABLE mine (x)")
    theirs.close()
    assert "another program" in ran(path).err


def test_names_cannot_move_the_cursor(database: Path) -> None:
    store = Store(database)
    store.add([row(7, model="\x1b[2Jm\u202e")])
    store.close()
    out = ran(database, "--by", "model").out
    assert "\x1b" not in out and "\u202e" not in out


def test_the_command_finds_the_database_of_the_configuration(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("INFERENCIA_STATE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("usage: {path: usage.sqlite3}\n")
    assert cli.main(["usage"]) == DONE
    named = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("log: {level: info}\n")
    assert cli.main(["usage"]) == DONE  # usage.sqlite3 in the state folder: the same
    assert capsys.readouterr().out == named != ""
    for off in ("off", "'off'", "false"):
        (tmp_path / "config.yaml").write_text(f"usage: {{path: {off}}}\n")
        assert cli.main(["usage"]) == FAILED
        assert "off" in capsys.readouterr().err
