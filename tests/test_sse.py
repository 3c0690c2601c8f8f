"""Event streams are cut at the same places however they arrive."""

import random
import re

import pytest

from inferencia.sse import Event, EventSplitter, EventTooLarge, event_end, parse

STREAMS = [
    b'data: {"a":1}\n\ndata: [DONE]\n\n',
    b"event: x\r\ndata: 1\r\n\r\ndata: 2\r\n\r\n",
    b"data: 1\r\rdata: 2\r\r: note\r\r",
    b"data: 1\r\r\ndata: 2\n\r\ndata: 3\n\n\n\n",
    b"\xef\xbb\xbfdata: 1\n\n:\n\nevent: end\ndata\n\ndata: unfinished\n",
    "data: größer ≥ 3\n\n".encode(),
    b"data: 1\n\n\n",
    b"x\n",
    b"",
]


def split(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = EventSplitter()
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return events, splitter.pending


@pytest.mark.parametrize("stream", STREAMS)
def test_every_cut_and_single_bytes_give_the_same_events(stream: bytes) -> None:
    whole = split([stream])
    assert b"".join(whole[0]) + whole[1] == stream
    for cut in range(len(stream) + 1):
        assert split([stream[:cut], stream[cut:]]) == whole, f"cut at {cut}"
    assert split([stream[i : i + 1] for i in range(len(stream))]) == whole


@pytest.mark.parametrize("seed", range(50))
def test_seeded_garbage_is_cut_the_same_in_any_pieces(seed: int) -> None:
    rng = random.Random(seed)
    stream = bytes(rng.choice(b"\n\n\r\r:ab \xff") for _ in range(400))
    pieces = []
    at = 0
    while at < len(stream):
        size = rng.randint(1, 9)
        pieces.append(stream[at : at + size])
        at += size
    events, pending = split(pieces)
    assert (events, pending) == split([stream])
    assert b"".join(events) + pending == stream
    for event in events:
        parse(event)


def test_each_kind_of_line_end_closes_an_event() -> None:
    stream = b"data: 1\n\ndata: 2\r\n\r\ndata: 3\r\rdata: 4\n\r\n"
    events, pending = split([stream])
    assert [parse(event).data for event in events] == [b"1", b"2", b"3", b"4"]
    assert pending == b""


def test_an_event_of_many_megabytes_in_small_reads_comes_out_whole() -> None:
    splitter = EventSplitter()
    piece = b"x" * 4096
    assert splitter.feed(b"data: ") == []
    # Searching or copying all of it again for every read would take minutes here.
    for _ in range(8 * 256):
        assert splitter.feed(piece) == []
    (event,) = splitter.feed(b"\n\n")
    assert len(event) == 6 + 8 * 1024 * 1024 + 2
    assert splitter.pending == b""


def test_an_event_without_an_end_is_refused_at_the_limit() -> None:
    splitter = EventSplitter(limit=100)
    splitter.feed(b"data: 1\n\ndata: " + b"x" * 90)
    with pytest.raises(EventTooLarge):
        splitter.feed(b"x" * 10)


def test_whole_events_may_exceed_the_limit_together() -> None:
    splitter = EventSplitter(limit=100)
    assert len(splitter.feed(b"data: 12345\n\n" * 100)) == 100


@pytest.mark.parametrize(
    ("raw", "event"),
    [
        (b"data: x\n\n", Event("", b"x", False)),
        (b"data:x\n\n", Event("", b"x", False)),
        (b"data:  x\n\n", Event("", b" x", False)),
        (b"data: a\ndata: b\n\n", Event("", b"a\nb", False)),
        (b"data: a\rdata: b\r\r", Event("", b"a\nb", False)),
        (b"event: e\r\ndata: a\r\n\r\n", Event("e", b"a", False)),
        (b"data: a\nevent: late\n\n", Event("late", b"a", False)),
        (b"\xef\xbb\xbfdata: a\n\n", Event("", b"a", False)),
        (b"\ndata: a\n\n", Event("", b"a", False)),
        (b"data: a\nb", Event("", b"a", False)),
        (b"data\n\n", Event("", b"", False)),
        (b"id: 7\nretry: 1\n\n", Event("", b"", False)),
        (b": waiting\n\n", Event("", b"", True)),
        (b"\n\n", Event("", b"", True)),
        (b'error: {"code":500}\n\n', Event("error", b'{"code":500}', False)),
        (b"event: \xff\ndata: a\n\n", Event("\ufffd", b"a", False)),
    ],
)
def test_parse_reads_fields_as_the_standard_says(raw: bytes, event: Event) -> None:
    assert parse(raw) == event


@pytest.mark.parametrize("seed", range(20))
def test_the_end_of_an_event_is_where_the_expression_finds_it(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        data = bytes(rng.choices(b"\n\r\nx", k=rng.randrange(12)))
        start = rng.randrange(len(data) + 1)
        found = re.compile(rb"\n\n|\r\r|\n\r\n").search(data, start)
        assert event_end(data, start) == (found.end() if found else -1), (data, start)
