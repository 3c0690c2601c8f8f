"""Durations and sizes as people write them."""

import random

import pytest

from inferencia.quantities import (
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("5m", 300),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("500ms", 0.5),
        ("1.5h", 5400),
        ("400d", 400 * 86400),
        ("100us", 0.0001),
        ("0.5", 0.5),
        (".5s", 0.5),
        ("0", 0),
        ("0s", 0),
        ("+5s", 5),
        (" 30 ", 30),
    ],
)
def test_a_duration_is_read_as_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "thirty", "1:30", "30 s", "5 m", "s", "1h30", "1e3", "0x10", "1_000s", "٣s"],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration such as 30s"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["-1", "-5s", "- 5s", "-1h30m"])
def test_a_negative_duration_is_called_negative(text: str) -> None:
    with pytest.raises(ValueError, match="negative"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["9" * 15, "99999d", "nan", "inf", "9" * 400 + "s"])
def test_no_duration_is_beyond_what_a_clock_can_hold(text: str) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 * 1024**2),
        ("1GiB", 1024**3),
        ("500KB", 500_000),
        ("20 gib", 20 * 1024**3),
        ("1.5KiB", 1536),
        ("4096", 4096),
        ("4096B", 4096),
        ("0", 0),
    ],
)
def test_a_size_is_read_as_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "64MiBs", "64 M i B", "MiB", "1e6", "1,5"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 64MiB"):
        parse_size(text)


def test_a_negative_size_is_called_negative() -> None:
    with pytest.raises(ValueError, match="negative"):
        parse_size("-64MiB")


def test_no_size_is_beyond_what_a_machine_can_hold() -> None:
    with pytest.raises(ValueError, match="mistake"):
        parse_size("999999999TiB")


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_out_reads_back_the_same(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        milliseconds = rng.randrange(10 ** rng.randrange(1, 11))
        seconds = milliseconds / 1000
        assert parse_duration(format_duration(seconds)) == pytest.approx(seconds)
        size = rng.randrange(2 ** rng.randrange(1, 49))
        assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (0.5, "500ms"),
        (5400, "1h30m"),
        (600, "10m"),
        (90, "1m30s"),
        (2.5, "2.5s"),
    ],
)
def test_a_duration_is_written_as_a_person_would(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
