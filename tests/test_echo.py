"""Promises of the built-in model ``echo``."""

import asyncio
import base64
import json
import math
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

import timetravel
from inferencia.backends.brands import make_backend
from inferencia.backends.echo import Echo, EchoBackend
from inferencia.backends.echo_model import MAX_TEXT, embedding_of
from inferencia.backends.echo_speech import count_words, pieces_of
from inferencia.settings import BackendConfig
from inferencia.upstream.answer import (
    Answer,
    BadAnswer,
    Silent,
    Truncated,
    UpstreamError,
)

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

TEXTS = [
    "",
    " ",
    " \n\t ",
    "word",
    "two words",
    "  leading",
    "trailing \n",
    " both \u00a0 ends ",
    "日本語 текст 👩‍👩‍👧 e\u0301",
    "line\r\nfeeds\n\n\nand\ttabs",
    "\ud800 lone",
    "a" * 10_000,
    " " * 10_000,
    "x" * 200_000,
    "ab " * 22_000,
    "x" * 65_535 + " y",
    "x" * 65_536 + " y",
    "x" * 65_535 + "  " + "y" * 65_536 + "z",
    "\x00\x1f\x7f\u2028",
]


class Gathered:
    """A sink that keeps what came, and says when something did."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.error: UpstreamError | None = None
        self.is_over = False
        self.came = asyncio.Event()

    def data(self, data: bytes) -> None:
        assert data
        assert not self.is_over
        self.parts.append(data)
        self.came.set()

    def end(self) -> None:
        assert not self.is_over
        self.is_over = True
        self.came.set()

    def failed(self, error: UpstreamError) -> None:
        self.error = error
        self.end()

    async def until(self, parts: int) -> None:
        """Wait until so many parts have come, or the end."""
        while len(self.parts) < parts and not self.is_over:
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), 10)

    async def all(self) -> bytes:
        while not self.is_over:
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), 10)
        return b"".join(self.parts)


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    backend = make_backend(BackendConfig(name="echo", type="echo"))
    assert isinstance(backend, EchoBackend)
    yield backend.echo
    await backend.aclose()
    assert backend.running == 0


async def send(echo: Echo, path: str, body: Any, **further: Any) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await echo.send("POST", path, (), content, **further)


async def ask(echo: Echo, path: str, /, **body: Any) -> dict[str, Any]:
    """A plain answer, checked to be a success."""
    answer = await send(echo, path, body)
    content = await answer.read(2**26)
    assert answer.status == 200, content
    assert answer.header("content-type") == "application/json"
    assert answer.length == len(content)
    whole = json.loads(content)
    assert isinstance(whole, dict)
    return whole


async def refusal(echo: Echo, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    answer = await send(echo, path, body)
    error = json.loads(await answer.read(10_000))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status, error


async def stream(echo: Echo, path: str, /, **body: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer, each checked, without the last."""
    answer = await send(echo, path, {**body, "stream": True})
    assert answer.status == 200
    assert answer.header("content-type") == "text/event-stream"
    assert answer.length is None
    events = (await answer.read(2**26)).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all(
        event.startswith(b"data: ") and b"\n" not in event for event in events[:-2]
    )
    return [json.loads(event[6:]) for event in events[:-2]]


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def said_in(events: list[dict[str, Any]], index: int = 0) -> str:
    deltas = [
        choice.get("delta", {"content": choice.get("text")})
        for event in events
        for choice in event["choices"]
        if choice["index"] == index
    ]
    return "".join(delta.get("content", "") for delta in deltas)


def ends_of(events: list[dict[str, Any]]) -> list[str]:
    choices = [choice for event in events for choice in event["choices"]]
    return [c["finish_reason"] for c in choices if c["finish_reason"]]


# What it says.


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_joined_are_the_text_and_each_is_counted(text: str) -> None:
    pieces = list(pieces_of(text))
    assert "".join(pieces) == text
    assert len(pieces) == count_words(text)
    assert all(pieces)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("text", TEXTS)
async def test_the_text_comes_back_exactly_streamed_and_not(
    echo: Echo, path: str, text: str
) -> None:
    body = {"messages": user(text)} if path == CHAT else {"prompt": text}
    whole = await ask(echo, path, model="echo", **body)
    choice = whole["choices"][0]
    assert choice.get("text", choice.get("message", {}).get("content")) == text
    assert choice["finish_reason"] == "stop"
    assert said_in(await stream(echo, path, model="echo", **body)) == text


async def test_the_last_user_message_is_said(echo: Echo) -> None:
    whole = await ask(
        echo,
        CHAT,
        messages=[
            {"role": "system", "content": "be brief"},
            *user("first"),
            {"role": "assistant", "content": None, "tool_calls": []},
            *user("second one"),
            {"role": "tool", "content": "result"},
        ],
    )
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "second one",
    }
    assert whole["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 2,
        "total_tokens": 8,
    }


async def test_without_a_user_message_the_last_one_is_said(echo: Echo) -> None:
    whole = await ask(echo, CHAT, messages=[{"role": "system", "content": "hm"}])
    assert whole["choices"][0]["message"]["content"] == "hm"


async def test_the_text_parts_of_a_message_are_joined(echo: Echo) -> None:
    parts = [
        {"type": "text", "text": "one "},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "text", "text": "two"},
    ]
    whole = await ask(echo, CHAT, messages=user(parts))
    assert whole["choices"][0]["message"]["content"] == "one two"


async def test_a_chat_stream_has_the_events_of_openais(echo: Echo) -> None:
    events = await stream(echo, CHAT, model="x", messages=user("a b"))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": " b"},
        {},
    ]
    assert ends_of(events) == ["stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {event["model"] for event in events} == {"x"}
    assert len({event["id"] for event in events}) == 1
    assert not any("usage" in event for event in events)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_usage_comes_in_a_last_chunk_if_it_was_asked_for(
    echo: Echo, path: str
) -> None:
    events = await stream(
        echo,
        path,
        messages=user("a b c"),
        prompt="a b c",
        max_tokens=2,
        stream_options={"include_usage": True},
    )
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
    }


@pytest.mark.parametrize("member", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("most", "said", "reason"),
    [
        (1, "a", "length"),
        (2, "a b", "length"),
        (3, "a b c ", "stop"),
        (9, "a b c ", "stop"),
    ],
)
async def test_the_token_limit_is_honoured(
    echo: Echo, member: str, most: int, said: str, reason: str
) -> None:
    body = {"messages": user("a b c "), member: most}
    whole = await ask(echo, CHAT, **body)
    assert whole["choices"][0]["message"]["content"] == said
    assert whole["choices"][0]["finish_reason"] == reason
    assert whole["usage"]["completion_tokens"] == min(most, 3)
    events = await stream(echo, CHAT, **body)
    assert (said_in(events), ends_of(events)) == (said, [reason])


async def test_n_choices_say_the_same_and_are_all_counted(echo: Echo) -> None:
    body = {"messages": user("a b"), "n": 3}
    whole = await ask(echo, CHAT, **body)
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in whole["choices"]} == {"a b"}
    assert whole["usage"]["completion_tokens"] == 6
    events = await stream(echo, CHAT, **body)
    assert [said_in(events, index) for index in range(3)] == ["a b"] * 3
    assert ends_of(events) == ["stop"] * 3


async def test_several_prompts_are_choices_of_their_own(echo: Echo) -> None:
    whole = await ask(echo, TEXT, prompt=["a b", "c"], n=2, echo=True)
    assert [c["text"] for c in whole["choices"]] == ["a b", "a b", "c", "c"]
    assert whole["object"] == "text_completion"
    events = await stream(echo, TEXT, prompt=["a b", "c"])
    assert [said_in(events, 0), said_in(events, 1)] == ["a b", "c"]


async def test_equal_requests_get_equal_words(echo: Echo) -> None:
    answers = [await ask(echo, CHAT, messages=user("x y")) for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["id"] != answers[1]["id"]


async def test_models_are_listed(echo: Echo) -> None:
    answer = await echo.send("GET", "/v1/models?x=1", ())
    data = json.loads(await answer.read(1000))["data"]
    assert [model["id"] for model in data] == ["echo"]
    answer = await echo.send("GET", "/v1/models/echo", ())
    assert json.loads(await answer.read(1000)) == data[0]


async def test_the_backend_lists_it_like_any_other() -> None:
    backend = make_backend(BackendConfig(name="demo", type="echo", prefix="my-"))
    (model,) = await backend.list_models()
    assert (model.id, model.upstream_id) == ("my-echo", "echo")
    await backend.aclose()


# Embeddings.


@pytest.mark.parametrize("size", [1, 2, 64, 384, 4096])
def test_an_embedding_is_a_fixed_unit_vector(size: int) -> None:
    packed = embedding_of("a cat", size)
    vector = struct.unpack(f"<{size}f", packed)
    assert math.isclose(sum(value * value for value in vector), 1, abs_tol=1e-5)
    assert packed == embedding_of("a cat", size)
    assert packed != embedding_of("a dog", size) or size == 1


def test_the_embedding_of_a_text_never_changes() -> None:
    first = struct.unpack_from("<f", embedding_of("a cat"))[0]
    assert first == pytest.approx(FIRST_OF_A_CAT, abs=1e-6)


FIRST_OF_A_CAT = 0.18823147


async def test_embeddings_are_the_same_as_floats_and_as_base64(echo: Echo) -> None:
    floats = await ask(echo, "/v1/embeddings", input=["a cat", "tax"])
    coded = await ask(
        echo, "/v1/embeddings", input=["a cat", "tax"], encoding_format="base64"
    )
    for plain, packed in zip(floats["data"], coded["data"], strict=True):
        data = base64.b64decode(packed["embedding"])
        assert list(struct.unpack("<64f", data)) == plain["embedding"]
        assert packed["index"] == plain["index"]
    assert floats["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert floats["object"] == "list"


@pytest.mark.parametrize("text", ["a", ["a"], [1, 2], [[1, 2], [3]], ["\ud800"]])
async def test_every_form_of_input_is_embedded(echo: Echo, text: Any) -> None:
    whole = await ask(echo, "/v1/embeddings", input=text, dimensions=3)
    assert all(len(item["embedding"]) == 3 for item in whole["data"])


# What it refuses.


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b""),
        (CHAT, b"{"),
        (CHAT, b"[]"),
        (CHAT, b"null"),
        (CHAT, b"\xff"),
        (CHAT, b"[" * 100_000),
        (CHAT, b'{"messages": NaN}'),
        (CHAT, {}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": "hi"}),
        (CHAT, {"messages": ["hi"]}),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}),
        (CHAT, {"messages": user("a"), "n": 0}),
        (CHAT, {"messages": user("a"), "n": 1000}),
        (CHAT, {"messages": user("a"), "n": True}),
        (CHAT, {"messages": user("a"), "n": "2"}),
        (CHAT, {"messages": user("a"), "max_tokens": 0}),
        (CHAT, {"messages": user("a"), "max_tokens": 1.5}),
        (CHAT, {"messages": user("a"), "stream": "yes"}),
        (CHAT, {"messages": user("a"), "echo": {"delay_ms": -1}}),
        (CHAT, {"messages": user("a"), "echo": {"delay_ms": "1"}}),
        (CHAT, {"messages": user("a"), "echo": {"repeat": 10**9}}),
        (CHAT, {"messages": user("a"), "echo": {"silence": "yes"}}),
        (CHAT, {"messages": user("a" * 1000), "n": 100, "echo": {"repeat": 10**6}}),
        (CHAT, {"messages": user("a" * (MAX_TEXT + 1))}),
        (TEXT, {"prompt": "a" * (MAX_TEXT + 1)}),
        ("/v1/embeddings", {"input": "a" * (MAX_TEXT + 1)}),
        (TEXT, {}),
        (TEXT, {"prompt": []}),
        (TEXT, {"prompt": [1, 2]}),
        ("/v1/embeddings", {}),
        ("/v1/embeddings", {"input": ""}),
        ("/v1/embeddings", {"input": []}),
        ("/v1/embeddings", {"input": [""]}),
        ("/v1/embeddings", {"input": [1, "a"]}),
        ("/v1/embeddings", {"input": [True]}),
        ("/v1/embeddings", {"input": ["a"] * 3000}),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}),
    ],
)
async def test_a_wrong_request_is_refused_as_openai_does(
    echo: Echo, path: str, body: Any
) -> None:
    status, error = await refusal(echo, path, body)
    assert (status, error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("path", ["/", "/v1/responses", "/v1/audio/speech", "/props"])
async def test_an_unknown_path_is_not_found(echo: Echo, path: str) -> None:
    status, error = await refusal(echo, path, {})
    assert (status, error["code"]) == (404, "not_found")


async def test_a_wrong_method_is_refused(echo: Echo) -> None:
    answer = await echo.send("GET", CHAT, ())
    assert answer.status == 405
    answer.cancel()


# Pauses and failures on request.


def told(**asked: Any) -> dict[str, Any]:
    return {"messages": user("a b c d"), "stream": True, "echo": asked}


async def test_it_repeats_as_asked(echo: Echo) -> None:
    body = {"messages": user("a b "), "echo": {"repeat": 3}}
    whole = await ask(echo, CHAT, **body)
    assert whole["choices"][0]["message"]["content"] == "a b a b a b "
    assert said_in(await stream(echo, CHAT, **body)) == "a b a b a b "


@pytest.mark.parametrize("size", [1000, 3_000_000])
async def test_events_are_as_large_as_asked(echo: Echo, size: int) -> None:
    answer = await send(echo, CHAT, told(event_bytes=size))
    events = (await answer.read(2**26)).split(b"\n\n")
    sizes = [len(event) + 2 for event in events if b"padding" in event]
    assert sizes == [size] * 4


@pytest.mark.parametrize("status", [200, 400, 429, 500, 503])
async def test_it_fails_with_the_status_as_asked(echo: Echo, status: int) -> None:
    body = told(status=status, error_type="unavailable_error")
    answer = await send(echo, CHAT, body)
    assert answer.status == status
    assert json.loads(await answer.read(1000))["error"]["type"] == "unavailable_error"


async def test_it_breaks_a_stream_off_as_asked(echo: Echo) -> None:
    gathered = Gathered()
    (await send(echo, CHAT, told(fail_after=2))).attach(gathered)
    content = await gathered.all()
    assert isinstance(gathered.error, Truncated)
    assert content.count(b'"content"') == 3  # the opening and two words
    assert b"[DONE]" not in content


@pytest.mark.parametrize("words", [0, 4, 99])
async def test_it_breaks_a_plain_answer_off_as_asked(echo: Echo, words: int) -> None:
    gathered = Gathered()
    body = {"messages": user("a b c d"), "echo": {"fail_after": words}}
    answer = await send(echo, CHAT, body)
    answer.attach(gathered)
    content = await gathered.all()
    assert isinstance(gathered.error, Truncated)
    assert answer.length is not None and 0 < len(content) < answer.length


@pytest.mark.parametrize("silence", [True, 2, 99])
async def test_silence_is_noticed_after_the_allowed_time(
    echo: Echo, silence: bool | int
) -> None:
    answer = await send(echo, CHAT, told(silence=silence), silence_seconds=0.02)
    with pytest.raises(Silent) as failure:
        await answer.read(2**20)
    assert failure.value.seconds == 0.02
    assert echo.running == 0


async def test_silence_before_the_head_is_noticed(echo: Echo) -> None:
    with pytest.raises(Silent):
        await send(echo, CHAT, told(head_delay_ms=60_000), silence_seconds=0.01)
    assert echo.running == 0


async def test_the_allowed_silence_can_be_changed_while_it_runs(echo: Echo) -> None:
    answer = await send(echo, CHAT, told(silence=True), silence_seconds=60)
    gathered = Gathered()
    answer.attach(gathered)
    answer.silence_seconds = 0.01
    await gathered.all()
    assert isinstance(gathered.error, Silent)


def test_a_paused_answer_brings_nothing_and_is_never_silent() -> None:
    async def story() -> None:
        echo = Echo()
        answer = await send(echo, CHAT, told(), silence_seconds=60)
        gathered = Gathered()
        answer.attach(gathered)
        answer.pause()
        await asyncio.sleep(3600)  # on a clock that jumps
        assert not gathered.parts and not gathered.is_over
        answer.resume()
        assert b"[DONE]" in await gathered.all()
        assert gathered.error is None
        assert echo.running == 0

    timetravel.run(story())


async def test_it_can_be_paused_from_inside_the_sink(echo: Echo) -> None:
    answer = await send(echo, CHAT, told())

    class PausesAtOnce(Gathered):
        def data(self, data: bytes) -> None:
            answer.pause()
            super().data(data)

    gathered = PausesAtOnce()
    answer.attach(gathered)
    for parts in range(1, 6):
        await gathered.until(parts)
        assert len(gathered.parts) == parts
        answer.resume()
    await gathered.all()
    assert gathered.error is None


async def test_pauses_are_kept_one_task_at_a_time(echo: Echo) -> None:
    before = len(asyncio.all_tasks())
    answer = await send(echo, CHAT, told(first_delay_ms=1, delay_ms=1))
    gathered = Gathered()
    answer.attach(gathered)
    await gathered.until(1)
    assert len(asyncio.all_tasks()) == before + 1
    await gathered.all()


async def test_time_stands_in_the_last_byte(echo: Echo) -> None:
    answer = await send(echo, CHAT, told(delay_ms=5))
    gathered = Gathered()
    answer.attach(gathered)
    await gathered.until(1)
    first = answer.last_byte
    await gathered.all()
    assert answer.last_byte >= first + 0.01


# Cancelling.


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_cancelling_stops_the_work_at_once(echo: Echo, is_streamed: bool) -> None:
    body = told(delay_ms=60_000) | {"stream": is_streamed}
    answer = await send(echo, CHAT, body)
    gathered = Gathered()
    answer.attach(gathered)
    if is_streamed:
        await gathered.until(1)
    assert echo.running == 1
    count = len(gathered.parts)
    answer.cancel()
    answer.cancel()
    assert echo.running == 0
    await asyncio.sleep(0)
    assert len(gathered.parts) == count and not gathered.is_over


async def test_cancelling_from_inside_the_sink_stops_it(echo: Echo) -> None:
    before = asyncio.all_tasks()
    answer = await send(echo, CHAT, told())

    class Leaves(Gathered):
        def data(self, data: bytes) -> None:
            super().data(data)
            answer.cancel()

    gathered = Leaves()
    answer.attach(gathered)
    (bringing,) = asyncio.all_tasks() - before
    await asyncio.wait({bringing}, timeout=10)
    assert bringing.done()
    assert len(gathered.parts) == 1 and not gathered.is_over
    assert echo.running == 0


async def test_cancelling_before_it_is_attached_ends_it(echo: Echo) -> None:
    answer = await send(echo, CHAT, told())
    assert echo.running == 1
    answer.cancel()
    assert echo.running == 0
    with pytest.raises(Truncated):
        await answer.read(100)


async def test_a_request_that_is_cancelled_before_its_head_is_gone(echo: Echo) -> None:
    sending = asyncio.create_task(send(echo, CHAT, told(head_delay_ms=60_000)))
    await asyncio.sleep(0)  # until its first pause
    assert echo.running == 1
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert echo.running == 0


async def test_a_reader_that_is_cancelled_ends_the_answer(echo: Echo) -> None:
    answer = await send(echo, CHAT, told(silence=True))
    reading = asyncio.create_task(answer.read(1000))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert echo.running == 0


async def test_a_body_that_is_longer_than_the_reader_takes_is_refused(
    echo: Echo,
) -> None:
    answer = await send(echo, CHAT, told(repeat=1_000_000))
    with pytest.raises(BadAnswer):
        await answer.read(10_000)
    assert echo.running == 0


async def test_a_sink_that_breaks_is_told_and_the_work_ends(echo: Echo) -> None:
    class Breaks(Gathered):
        def data(self, data: bytes) -> None:
            raise RuntimeError("broken")

    gathered = Breaks()
    (await send(echo, CHAT, told())).attach(gathered)
    await gathered.all()
    assert "broken" in str(gathered.error)
    assert echo.running == 0


async def test_closing_cancels_what_runs() -> None:
    echo = Echo()
    (await send(echo, CHAT, told(silence=True))).attach(Gathered())
    await echo.aclose()
    await echo.aclose()
    assert echo.running == 0
