"""Usage is found in every dialect, and the bytes pass as they came."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from inferencia.metering import (
    MAX_HELD_BYTES,
    BodyTap,
    StreamTap,
    Tally,
    Usage,
    usage_of,
)
from inferencia.sse import parse
from seeds import seeds

USAGE = {"prompt_tokens": 26, "completion_tokens": 4, "total_tokens": 30}


def event(content: Any, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def chunk(text: str | None = "hi", reason: str | None = None, **extra: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return event({"object": "chat.completion.chunk", "choices": [choice], **extra})


USAGE_CHUNK = event({"object": "chat.completion.chunk", "choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"

LLAMACPP_TIMINGS = {"cache_n": 21, "prompt_n": 5, "predicted_n": 4, "predicted_ms": 9.5}

ANTHROPIC = [
    event(
        {
            "type": "message_start",
            "message": {
                "content": [],
                "usage": {
                    "cache_read_input_tokens": 21,
                    "input_tokens": 5,
                    "output_tokens": 0,
                },
            },
        },
        "message_start",
    ),
    event(
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "Say"},
        },
        "content_block_delta",
    ),
    event(
        {
            "type": "message_delta",
            "delta": {"stop_reason": "max_tokens", "stop_sequence": None},
            "usage": {"output_tokens": 3},
        },
        "message_delta",
    ),
    event({"type": "message_stop"}, "message_stop"),
]


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        ({"usage": USAGE}, Usage(26, 4)),
        (
            {"usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 21}}},
            Usage(26, 4, 21),
        ),
        ({"usage": {"prompt_tokens": 8, "total_tokens": 8}}, Usage(8, 0)),
        ({"usage": {"total_tokens": 15}, "results": []}, Usage(15, 0)),
        (
            {
                "usage": {
                    "input_tokens": 26,
                    "output_tokens": 6,
                    "total_tokens": 32,
                    "input_tokens_details": {"cached_tokens": 21},
                }
            },
            Usage(26, 6, 21),
        ),
        (
            {
                "type": "response.completed",
                "response": {"usage": {"input_tokens": 3, "output_tokens": 1}},
            },
            Usage(3, 1),
        ),
        (
            {
                "usage": {
                    "input_tokens": 5,
                    "cache_read_input_tokens": 21,
                    "cache_creation_input_tokens": 100,
                    "output_tokens": 6,
                }
            },
            Usage(126, 6, 21),
        ),
        (
            {
                "type": "message_start",
                "message": {"usage": {"input_tokens": 5, "output_tokens": 1}},
            },
            Usage(5, 1),
        ),
        (
            {
                "content": "x",
                "tokens_evaluated": 26,
                "tokens_predicted": 4,
                "timings": LLAMACPP_TIMINGS,
            },
            Usage(26, 4, 21),
        ),
        ({"timings": LLAMACPP_TIMINGS}, Usage(26, 4, 21)),
        (
            [
                {"tokens_evaluated": 3, "tokens_predicted": 3},
                {"tokens_evaluated": 2, "tokens_predicted": 3},
            ],
            Usage(5, 6),
        ),
        ({"usage": None}, None),
        ({"usage": {}}, None),
        ({"usage": {"type": "duration", "seconds": 3}}, None),
        ({"usage": {"prompt_tokens": -1, "completion_tokens": True}}, None),
        ({"usage": {"prompt_tokens": 1e300, "completion_tokens": "9"}}, None),
        ({"usage": [1]}, None),
        ("usage", None),
        (None, None),
        ([], None),
    ],
)
def test_usage_is_read_in_every_dialect(answer: Any, usage: Usage | None) -> None:
    assert usage_of(answer) == usage


def feed(tap: StreamTap, pieces: list[bytes]) -> bytes:
    return b"".join([tap.feed(piece) for piece in pieces] + [tap.finish()])


def test_a_usual_read_is_passed_on_as_the_very_same_object() -> None:
    tap = StreamTap(hide_usage=True)
    for _ in range(3):
        data = chunk()
        assert tap.feed(data) is data
    assert tap.events == 3
    assert tap.begun and tap.at_boundary and not tap.finished and not tap.done


def test_the_usage_chunk_that_we_asked_for_is_counted_and_not_shown() -> None:
    tap = StreamTap(hide_usage=True)
    text = [chunk(), chunk("", "stop")]
    assert feed(tap, [*text, USAGE_CHUNK, DONE]) == b"".join([*text, DONE])
    assert tap.usage == Usage(26, 4)
    assert tap.finished and tap.done and not tap.failed


def test_the_usage_chunk_is_left_out_of_the_middle_of_a_read() -> None:
    tap = StreamTap(hide_usage=True)
    assert tap.feed(chunk() + USAGE_CHUNK + DONE) == chunk() + DONE


def test_the_usage_chunk_that_the_client_asked_for_is_shown() -> None:
    tap = StreamTap(hide_usage=False)
    stream = [chunk(), chunk("", "stop"), USAGE_CHUNK, DONE]
    assert feed(tap, stream) == b"".join(stream)
    assert tap.usage == Usage(26, 4)


def test_comments_in_front_change_nothing_about_the_usage_chunk() -> None:
    tap = StreamTap(hide_usage=True)
    stream = [b": keepalive 1/1\n\n", chunk(), USAGE_CHUNK, DONE]
    assert feed(tap, stream) == stream[0] + chunk() + DONE


@pytest.mark.parametrize("size", [1, 1000, 100_000])
@pytest.mark.parametrize("excess", [0, 1])
def test_a_usage_chunk_is_left_out_up_to_the_size_that_can_be_held(
    excess: int, size: int
) -> None:
    bare = event({"choices": [], "usage": USAGE, "pad": ""})
    pad = "y" * (MAX_HELD_BYTES - len(bare) + excess)
    last = event({"choices": [], "usage": USAGE, "pad": pad})
    tap = StreamTap(hide_usage=True)
    pieces = [chunk()] + [last[at : at + size] for at in range(0, len(last), size)]
    assert feed(tap, pieces) == chunk() + (last if excess else b"")


@pytest.mark.parametrize(
    "kept",
    [
        chunk("text", None, usage=USAGE),
        event({"choices": [], "usage": None}),
        event({"choices": [], "prompt_filter_results": []}),
        event({"usage": USAGE}),
        chunk('"usage": {"prompt_tokens": 9}, "choices": []'),
        b': {"choices":[],"usage":{}}\n\n',
    ],
)
def test_nothing_but_a_usage_chunk_is_left_out(kept: bytes) -> None:
    tap = StreamTap(hide_usage=True)
    assert feed(tap, [chunk(), kept, DONE]) == chunk() + kept + DONE


def test_usage_that_comes_with_every_chunk_counts_once() -> None:
    tap = StreamTap(hide_usage=True)
    for done in range(1, 5):
        data = chunk(usage={"prompt_tokens": 7, "completion_tokens": done})
        assert tap.feed(data) == data
    assert tap.usage == Usage(7, 4)


def test_usage_that_comes_once_for_each_choice_is_added_up() -> None:
    tap = StreamTap(hide_usage=True)
    feed(tap, [chunk(), USAGE_CHUNK, USAGE_CHUNK, DONE])
    assert tap.usage == Usage(52, 8)
    tally = Tally()
    for index in (1, 0):
        tally.add({"choices": [{"index": index, "text": ""}], "usage": USAGE})
    assert tally.usage == Usage(52, 8)


def test_llamacpp_timings_serve_where_no_usage_comes() -> None:
    tap = StreamTap(hide_usage=True)
    feed(tap, [chunk(), chunk(None, "stop", timings=LLAMACPP_TIMINGS), DONE])
    assert tap.usage == Usage(26, 4, 21)


def test_llamacpp_native_stream_is_understood() -> None:
    native = {"index": 0, "content": " a", "tokens": [496], "stop": False}
    last = native | {
        "content": "",
        "stop": True,
        "tokens_predicted": 4,
        "tokens_evaluated": 26,
        "timings": LLAMACPP_TIMINGS,
    }
    tap = StreamTap(hide_usage=True)
    stream = [event(native), event(native), event(last)]
    assert feed(tap, stream) == b"".join(stream)
    assert tap.usage == Usage(26, 4, 21)
    assert tap.done and tap.finished


@pytest.mark.parametrize("prompt", ["short", "long " * 5000])
def test_llamacpp_native_stream_that_repeats_a_long_prompt_is_understood(
    prompt: str,
) -> None:
    last = {
        "content": "",
        "stop": True,
        "prompt": prompt,
        "stop_type": "limit",
        "timings": LLAMACPP_TIMINGS,
    }
    tap = StreamTap(hide_usage=True)
    stream = event({"content": "a", "stop": False}) + event(last)
    feed(tap, [stream[at : at + 3000] for at in range(0, len(stream), 3000)])
    assert tap.usage == Usage(26, 4, 21)
    assert tap.done


def test_anthropic_usage_is_put_together_from_both_ends() -> None:
    tap = StreamTap(hide_usage=True)
    for part in ANTHROPIC[:2]:
        assert tap.feed(part) == part
    assert tap.usage == Usage(26, 0, 21) and not tap.finished
    tap.feed(ANTHROPIC[2])
    assert tap.usage == Usage(26, 3, 21) and tap.finished and not tap.done
    tap.feed(ANTHROPIC[3])
    assert tap.done and not tap.failed


@pytest.mark.parametrize("size", [10, 3_000_000])
@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_the_end_of_a_responses_stream_is_seen_however_large(
    kind: str, size: int
) -> None:
    name = f"response.{kind}"
    response = {
        "output": "x" * size,
        "usage": {"input_tokens": 26, "output_tokens": 4},
        "metadata": {},
    }
    stream = (
        event({"type": "response.created", "response": {}}, "response.created")
        + event({"type": "response.output_text.delta", "delta": "x"}, "d")
        + event({"type": name, "response": response}, name)
    )
    tap = StreamTap(hide_usage=True)
    pieces = [stream[at : at + 16000] for at in range(0, len(stream), 16000)]
    assert feed(tap, pieces) == stream
    assert tap.usage == Usage(26, 4)
    assert tap.done and tap.finished
    assert tap.failed == (kind == "failed")


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error":{"message":"out of memory","code":500}}\n\n',
        b'data: {"error":"out of memory"}\n\n',
        b'event: error\ndata: {"code":500,"message":"x"}\n\n',
        b'event: error\ndata: {"type":"error","error":{"message":"x"}}\n\n',
        b'error: {"code":500,"message":"x"}\n\n',
        b'data: {"error":"' + b"x" * 20_000 + b'"}\n\n',
    ],
)
@pytest.mark.parametrize("before", [b"", chunk(), ANTHROPIC[0]])
def test_an_error_event_is_noticed_and_passed(before: bytes, error: bytes) -> None:
    tap = StreamTap(hide_usage=True)
    tap.feed(before) if before else None
    assert tap.feed(error) == error
    assert tap.failed and tap.begun


def test_a_text_about_errors_and_ends_is_no_error_and_no_end() -> None:
    tap = StreamTap(hide_usage=True)
    text = 'data: [DONE] "error": {"x":1} message_stop response.completed'
    for _ in range(2):
        tap.feed(chunk(text))
    assert not (tap.failed or tap.done or tap.finished)


def test_an_unfinished_event_is_held_back_until_its_end_comes() -> None:
    tap = StreamTap(hide_usage=False)
    tap.feed(chunk())
    first, second = chunk("cut")[:30], chunk("cut")[30:]
    assert tap.feed(first) == b""
    assert tap.at_boundary
    assert tap.feed(second) == first + second


def test_the_first_bytes_go_on_the_moment_they_arrive() -> None:
    tap = StreamTap(hide_usage=True)
    assert tap.feed(b"da") == b"da"
    assert tap.begun and not tap.at_boundary
    assert tap.feed(b'ta: {"choices"') == b'ta: {"choices"'
    assert tap.feed(b":[]}\n\nda") == b":[]}\n\n"
    assert tap.at_boundary


def test_what_is_held_back_goes_out_at_the_end_but_not_after_a_failure() -> None:
    tap = StreamTap(hide_usage=True)
    tap.feed(chunk())
    assert tap.feed(b"data: [DONE]\n") == b""
    assert tap.finish() == b"data: [DONE]\n"
    assert tap.done and tap.finish() == b""
    tap = StreamTap(hide_usage=True)
    tap.feed(chunk())
    tap.feed(b"data: {")
    tap.drop_held()
    assert tap.finish() == b"" and tap.at_boundary


def test_a_usage_chunk_without_its_blank_line_is_left_out_too() -> None:
    tap = StreamTap(hide_usage=True)
    assert feed(tap, [chunk(), USAGE_CHUNK[:-1]]) == chunk()
    assert tap.usage == Usage(26, 4)


def test_a_large_last_event_without_its_blank_line_tells_its_usage() -> None:
    last = event({"type": "response.completed", "x": "y" * 40_000, "usage": USAGE})
    tap = StreamTap(hide_usage=True)
    feed(tap, [chunk(), last[:-2]])
    assert tap.usage == Usage(26, 4) and tap.done


def test_an_event_of_megabytes_flows_instead_of_being_collected() -> None:
    tap = StreamTap(hide_usage=True)
    tap.feed(chunk())
    tap.feed(b'data: {"x":"')
    waiting = 12
    for _ in range(1000):
        waiting += 4096 - len(tap.feed(b"y" * 4096))
        assert waiting <= MAX_HELD_BYTES
    assert waiting == 0 and not tap.at_boundary
    assert tap.feed(b'"}\n\n' + chunk()) == b'"}\n\n' + chunk()
    assert tap.at_boundary


@pytest.mark.parametrize("opening", [b"", b"\xef\xbb\xbf", b"\r\n", b"\n\n"])
def test_comments_and_blank_lines_do_not_begin_an_answer(opening: bytes) -> None:
    stream = opening + b": keepalive 1/2\n\n:\r\n\r\n\n"
    for size in (1, 3, 100):
        tap = StreamTap(hide_usage=True)
        for at in range(0, len(stream), size):
            assert tap.feed(stream[at : at + size]) == stream[at : at + size]
            assert not tap.begun
        tap.feed(b"d")
        assert tap.begun
        assert tap.events == 0


# One slow reading of the same rules: all at once, every event decoded.

_END = re.compile(rb"\n\n|\r\r|\n\r\n")


def read_slowly(stream: bytes, hide_usage: bool) -> tuple[bytes, Usage | None]:
    out = b""
    tally = Tally()
    is_first = True
    at = 0
    while at < len(stream):
        if stream[at : at + 1] in (b"\r", b"\n"):
            out += stream[at : at + 1]
            at += 1
            continue
        found = _END.search(stream, at)
        end = found.end() if found else len(stream)
        raw = stream[at:end]
        at = end
        data = parse(raw).data
        hidden = False
        if data:
            try:
                content = json.loads(data)
            except ValueError:
                content = None
            is_small = len(raw) <= MAX_HELD_BYTES
            if isinstance(content, dict):
                if is_small:
                    tally.add(content)
                elif isinstance(content.get("usage"), dict):
                    tally.add_whole(content)
                is_usage = isinstance(content.get("usage"), dict)
                hidden = (
                    hide_usage
                    and is_small
                    and not is_first
                    and is_usage
                    and content.get("choices") == []
                )
            is_first = False
        if not hidden:
            out += raw
    return out, tally.usage


def random_stream(rng: random.Random) -> bytes:
    texts = [
        "hi",
        'say "usage": {"prompt_tokens": 1}',
        "error [DONE] data: {",
        "\n\n\r\r\r\n",
        "ünï\u2028",
        "",
    ]
    makers: list[Callable[[], bytes]] = [
        lambda: chunk(rng.choice(texts)),
        lambda: chunk(rng.choice(texts)),
        lambda: chunk(rng.choice(texts), usage=None),
        lambda: chunk("x", rng.choice([None, "stop"]), timings=LLAMACPP_TIMINGS),
        lambda: chunk("x", usage={"prompt_tokens": 3, "completion_tokens": 1}),
        lambda: USAGE_CHUNK,
        lambda: USAGE_CHUNK.replace(b'":', b'": '),
        lambda: rng.choice(ANTHROPIC),
        lambda: event(
            {"choices": [], "pad": "y" * (MAX_HELD_BYTES + 9), "usage": USAGE}
        ),
        lambda: chunk("z" * rng.choice([MAX_HELD_BYTES - 100, 40_000])),
        lambda: b": comment\n\n",
        lambda: b"\n",
        lambda: b"retry: 1\n\n",
        lambda: b"data: [DONE]\n\n",
        lambda: b"data: {broken\n\n",
        lambda: b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":2}}\n\n',
    ]
    stream = b"".join(rng.choice(makers)() for _ in range(rng.randint(1, 25)))
    line_end = rng.choice([b"\n", b"\n", b"\r\n", b"\r"])
    stream = stream.replace(b"\n", line_end)
    if rng.random() < 0.2:
        stream = b"\xef\xbb\xbf" + stream
    if rng.random() < 0.3:
        stream = stream[: -rng.randint(1, 5)]
    return stream


def random_pieces(rng: random.Random, stream: bytes) -> list[bytes]:
    pieces = []
    at = 0
    most = max(rng.choice([1, 7, 300, 3000, 20_000]), len(stream) // 200)
    while at < len(stream):
        # Often exactly one event, as engines write them.
        end = at + rng.randint(1, most)
        boundary = stream.find(b"\n\n", at)
        if boundary >= 0 and rng.random() < 0.5:
            end = boundary + 2
        pieces.append(stream[at:end])
        at = end
    return pieces


@pytest.mark.parametrize("seed", seeds(30, 120))
def test_any_cut_gives_the_bytes_and_usage_of_a_slow_reading(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 2:  # whatever their size, the ends of reads are taken apart
        monkeypatch.setattr("inferencia.metering._SPLIT_BYTES", 0)
    rng = random.Random(seed)
    stream = random_stream(rng)
    for hide_usage in (True, False):
        expected = read_slowly(stream, hide_usage)
        for _ in range(3):
            tap = StreamTap(hide_usage)
            pieces = random_pieces(rng, stream)
            assert (feed(tap, pieces), tap.usage) == expected


@pytest.mark.parametrize("size", [4097, 16_384, 65_536])
def test_large_reads_count_the_same_events_wherever_they_are_cut(size: int) -> None:
    chunks = [chunk(f"word {number}") for number in range(2000)]
    chunks[1500] = chunk("", reason="stop")
    stream = b"".join([*chunks, USAGE_CHUNK, DONE])
    tap = StreamTap(hide_usage=True)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert feed(tap, pieces) == stream.replace(USAGE_CHUNK, b"")
    assert tap.usage == usage_of({"usage": USAGE})
    assert tap.finished and tap.done and not tap.failed
    assert tap.events == 2002


@pytest.mark.parametrize("seed", range(30))
def test_garbage_passes_unchanged_and_raises_nothing(seed: int) -> None:
    rng = random.Random(seed)
    words = [b"data:", b"event: ", b'{"usage":{', b"error", b"\n", b"\n\n", b"\xff"]
    words += [b"[" * 5000, b'"choices":[]', b"}}", b":", b"\r", b'"stop":true']
    stream = b"".join(rng.choice(words) for _ in range(200))
    tap = StreamTap(hide_usage=True)
    assert feed(tap, random_pieces(rng, stream)) == stream


@pytest.mark.parametrize(
    "junk",
    [
        {"choices": [], "usage": [1]},
        {"choices": {"a": 1}, "usage": USAGE},
        {"choices": [None], "usage": USAGE},
        {"choices": [{"index": [1]}], "usage": USAGE, "error": []},
        {"type": {"a": 1}, "usage": {"x": {}}, "error": 0},
        {"type": "message_start", "message": 3, "usage": 4},
        {"type": "message_delta", "delta": 3, "usage": {"output_tokens": []}},
        {"response": {"usage": {"input_tokens": "x"}}, "timings": 7},
        {"choices": 5, "timings": {"prompt_n": None}, "stop": 3},
        {"choices": "abc", "timings": LLAMACPP_TIMINGS},
        [{"usage": USAGE}],
    ],
)
def test_members_of_the_wrong_type_break_nothing(junk: Any) -> None:
    tap = StreamTap(hide_usage=True)
    stream = [chunk(), event(junk), chunk(), USAGE_CHUNK, DONE]
    assert feed(tap, stream) == b"".join([chunk(), event(junk), chunk(), DONE])
    assert tap.usage is not None


def test_deeply_nested_events_and_bodies_say_nothing() -> None:
    bomb = b'{"usage":{"a":' + b"[" * 100_000 + b"}}"
    tap = StreamTap(hide_usage=True)
    feed(tap, [chunk(), b"data: " + bomb[:10_000] + b"\n\n", b"data: " + bomb])
    assert tap.usage is None
    body = BodyTap()
    body.feed(bomb)
    assert body.usage() is None


BODIES = [
    {"choices": [{"message": {"content": "hi"}}], "usage": USAGE},
    {"choices": [{"message": {"content": "x" * 300_000}}], "usage": USAGE},
    {"usage": USAGE, "data": [{"embedding": [0.25] * 60_000}]},
    {"choices": "x" * 300_000, "usage": USAGE, "timings": LLAMACPP_TIMINGS},
    {"text": 'z "usage": {"prompt_tokens": 1} ' * 9000, "usage": USAGE},
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("size", [1000, 65_536, 10_000_000])
def test_a_body_of_any_size_tells_its_usage(
    body: dict[str, Any], indent: int | None, size: int
) -> None:
    raw = json.dumps(body, indent=indent).encode()
    tap = BodyTap()
    for at in range(0, len(raw), size):
        tap.feed(raw[at : at + size])
    assert tap.usage() == Usage(26, 4)


@pytest.mark.parametrize(
    "body",
    [
        {"usage": USAGE, "metadata": {"usage": {"prompt_tokens": 1}}},
        {"usage": USAGE, "metadata": [{"usage": {"prompt_tokens": 1}}]},
        {"usage": USAGE, "text": '"usage":{"prompt_tokens":1}}'},
        {"usage": USAGE, 'x"usage': {"prompt_tokens": 1}},
        {"usage": USAGE, "kind": "usage"},
        {"text": '"usage":{"prompt_tokens":1}}', "usage": USAGE, "id": "x"},
        {"response": {"usage": USAGE}},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_only_the_usage_of_the_answer_itself_counts(
    body: dict[str, Any], indent: int | None
) -> None:
    tap = BodyTap()
    tap.feed(json.dumps(body, indent=indent).encode() + b"\n")
    assert tap.usage() == Usage(26, 4)


def test_a_body_tap_keeps_no_more_than_both_ends() -> None:
    tap = BodyTap()
    for _ in range(100):
        tap.feed(b"x" * 100_000)
    assert len(tap._head) + len(tap._tail) <= 128 * 1024
    assert tap.usage() is None


@pytest.mark.parametrize("raw", [b"", b"not json", b"null", b'"usage"', b"\xff\xfe"])
def test_a_body_that_says_nothing_has_no_usage(raw: bytes) -> None:
    tap = BodyTap()
    tap.feed(raw)
    assert tap.usage() is None
