"""Streams are put together to the answers that they would have been.

What real engines say is compared in test_e2e_assembly.py; the streams here are short
ones of the same shapes, and broken ones.
"""

import contextlib
import json
from typing import Any

import pytest

from inferencia.metering import Usage
from inferencia.translate import pieces
from inferencia.translate.assembly import (
    Assembler,
    AssemblyError,
    assembler_for,
    request_changes,
    what_a_stream_lacks,
)

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
NATIVE = "/completion"
DONE = b"data: [DONE]\n\n"

USAGE = {"completion_tokens": 3, "prompt_tokens": 26, "total_tokens": 29}
TIMINGS = {"cache_n": 21, "prompt_n": 5, "predicted_n": 3}


def event(content: Any, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content)}\n\n".encode()


def chunk(delta: Any, reason: Any = None, index: int = 0, **more: Any) -> bytes:
    choice = {"finish_reason": reason, "index": index, "delta": delta}
    return event(
        {
            "choices": [choice],
            "created": 1795308191,
            "id": "chatcmpl-1",
            "model": "m",
            "system_fingerprint": "b1",
            "object": "chat.completion.chunk",
            **more,
        }
    )


def text_chunk(text: str, reason: Any = None, index: int = 0, **more: Any) -> bytes:
    logprobs = more.pop("logprobs", None)
    choice = {
        "text": text,
        "index": index,
        "logprobs": logprobs,
        "finish_reason": reason,
    }
    return event({"choices": [choice], "object": "text_completion", **more})


def usage_chunk(**usage: Any) -> bytes:
    return event({"choices": [], "object": "chat.completion.chunk", "usage": usage})


def typed(kind: str, **members: Any) -> bytes:
    return event({"type": kind, **members}, kind)


def assemble(path: str, stream: list[bytes], **values: Any) -> Any:
    return json.loads(fed(path, stream, **values).result())


def fed(path: str, stream: list[bytes], **values: Any) -> Assembler:
    kind = assembler_for(path)
    assert kind is not None
    assembler = kind(values)
    for piece in stream:
        assembler.feed(piece)
    return assembler


def message_of(*stream: bytes) -> Any:
    return assemble(CHAT, [*stream, usage_chunk(**USAGE), DONE])["choices"][0][
        "message"
    ]


LLAMACPP_CHAT = [
    chunk({"role": "assistant", "content": None}),
    chunk({"content": "Say"}),
    chunk({"content": " hi"}),
    chunk({}, "length"),
    event(
        {
            "choices": [],
            "object": "chat.completion.chunk",
            "usage": USAGE,
            "timings": TIMINGS,
        }
    ),
    DONE,
]

MESSAGE = [
    typed(
        "message_start",
        message={
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "m",
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "cache_read_input_tokens": 21,
                "input_tokens": 5,
                "output_tokens": 0,
            },
        },
    ),
    typed("ping"),
    typed(
        "content_block_start",
        index=0,
        content_block={"type": "thinking", "thinking": ""},
    ),
    typed(
        "content_block_delta",
        index=0,
        delta={"type": "thinking_delta", "thinking": "Hm"},
    ),
    typed(
        "content_block_delta",
        index=0,
        delta={"type": "signature_delta", "signature": "abc"},
    ),
    typed("content_block_stop", index=0),
    typed("content_block_start", index=1, content_block={"type": "text", "text": ""}),
    typed("content_block_delta", index=1, delta={"type": "text_delta", "text": "Say"}),
    typed("content_block_delta", index=1, delta={"type": "text_delta", "text": " hi"}),
    typed("content_block_stop", index=1),
    typed(
        "message_delta",
        delta={"stop_reason": "max_tokens", "stop_sequence": None},
        usage={"output_tokens": 3},
    ),
    typed("message_stop"),
]

RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 7,
    "status": "completed",
    "model": "m",
    "output": [
        {
            "type": "message",
            "status": "completed",
            "id": "msg_1",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Say hi", "annotations": []}],
        }
    ],
    "usage": {"input_tokens": 26, "output_tokens": 3, "total_tokens": 29},
}
RESPONSE_STREAM = [
    typed("response.created", response={"id": "resp_1", "status": "in_progress"}),
    typed("response.output_text.delta", item_id="msg_1", delta="Say hi"),
    typed("response.output_item.done", item=RESPONSE["output"][0]),  # type: ignore[index]
    typed("response.completed", response=RESPONSE),
]

NATIVE_STREAM = [
    event({"index": 0, "content": " a", "tokens": [496], "stop": False}),
    event({"index": 0, "content": " time", "tokens": [990], "stop": False}),
    event(
        {
            "index": 0,
            "content": "",
            "tokens": [],
            "stop": True,
            "model": "m",
            "tokens_predicted": 3,
            "tokens_evaluated": 26,
            "generation_settings": {"seed": 1, "stream": True},
            "stop_type": "limit",
            "timings": TIMINGS,
        }
    ),
]

STREAMS: dict[str, tuple[str, list[bytes]]] = {
    "chat": (CHAT, LLAMACPP_CHAT),
    "text": (TEXT, [text_chunk(" a"), text_chunk("", "stop", usage=USAGE), DONE]),
    "messages": (MESSAGES, MESSAGE),
    "responses": (RESPONSES, RESPONSE_STREAM),
    "native": (NATIVE, NATIVE_STREAM),
}


def test_a_chat_is_put_together_as_llama_server_answers() -> None:
    assert assemble(CHAT, LLAMACPP_CHAT) == {
        "choices": [
            {
                "finish_reason": "length",
                "index": 0,
                "message": {"role": "assistant", "content": "Say hi"},
            }
        ],
        "created": 1795308191,
        "id": "chatcmpl-1",
        "model": "m",
        "system_fingerprint": "b1",
        "object": "chat.completion",
        "usage": USAGE,
        "timings": TIMINGS,
    }


def test_tool_calls_grow_by_index_and_lose_it() -> None:
    message = message_of(
        chunk({"role": "assistant", "content": None}),
        chunk({"tool_calls": [tool(0, '{"a', id="x", type="function", name="f")]}),
        chunk({"tool_calls": [tool(1, "{}", id="y", type="function", name="g")]}),
        chunk({"tool_calls": [tool(0, '":1}')]}),
        chunk({}, "tool_calls"),
    )
    assert message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "x",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a":1}'},
            },
            {
                "id": "y",
                "type": "function",
                "function": {"name": "g", "arguments": "{}"},
            },
        ],
    }


def tool(index: int | None, arguments: str, **members: Any) -> dict[str, Any]:
    function = {"arguments": arguments}
    if name := members.pop("name", None):
        function["name"] = name
    place = {} if index is None else {"index": index}
    return {**place, **members, "function": function}


def test_tool_calls_without_an_index_begin_with_a_name() -> None:
    message = message_of(
        chunk({"tool_calls": [tool(None, "{", name="f", id="x")]}),
        chunk({"tool_calls": [tool(None, "}")]}),
        chunk({"tool_calls": [tool(None, "[", name="g"), tool(None, "]")]}),
        chunk({}, "tool_calls"),
    )
    calls = [call["function"] for call in message["tool_calls"]]
    assert calls == [{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": "[]"}]


def test_a_name_that_comes_with_every_piece_is_not_repeated() -> None:
    message = message_of(
        chunk({"tool_calls": [tool(0, "{", name="f", id="x", type="function")]}),
        chunk({"tool_calls": [tool(0, "}", name="f", id="", type="function")]}),
        chunk({"role": "assistant"}, "tool_calls"),
    )
    (call,) = message["tool_calls"]
    assert (call["id"], call["type"], call["function"]["name"]) == (
        "x",
        "function",
        "f",
    )
    assert message["role"] == "assistant"


@pytest.mark.parametrize(
    ("deltas", "timings", "content"),
    [
        ([{"content": None}, {}], True, ""),
        ([{"content": None}, {"tool_calls": [tool(0, "{}", name="f")]}], True, ""),
        ([{"content": None}, {"tool_calls": [tool(0, "{}", name="f")]}], False, None),
        ([{"content": ""}, {"tool_calls": [tool(0, "{}", name="f")]}], False, None),
        ([{"content": ""}, {}], False, ""),
        ([{"role": "assistant"}, {"role": "assistant"}], False, None),
        ([{"content": None}, {"refusal": "No."}], False, None),
    ],
)
def test_where_no_text_came_the_content_is_what_the_engine_would_answer(
    deltas: list[Any], timings: bool, content: str | None
) -> None:
    last = chunk({}, "stop", timings=TIMINGS) if timings else chunk({}, "stop")
    assert message_of(*map(chunk, deltas), last)["content"] == content


def test_members_that_nobody_has_foreseen_survive() -> None:
    answer = assemble(
        CHAT,
        [
            chunk(
                {
                    "role": "assistant",
                    "content": "a",
                    "reasoning_content": "r1",
                    "refusal": None,
                    "sources": [1],
                    "audio": {"id": "au", "data": "AA", "transcript": "x"},
                },
                service_tier="default",
                provider="P",
            ),
            chunk(
                {
                    "content": "b",
                    "reasoning_content": "r2",
                    "sources": [2],
                    "audio": {"data": "BB", "expires_at": 9},
                    "score": 0.5,
                },
                service_tier="default",
                provider="P",
                obfuscation="zzz",
            ),
            event(
                {
                    "choices": [
                        {
                            "index": 0,
                            "delta": {"score": 0.75},
                            "finish_reason": "stop",
                            "stop_reason": 151645,
                            "token_ids": [4, 5],
                        }
                    ]
                }
            ),
            usage_chunk(**USAGE, completion_tokens_details={"reasoning_tokens": 2}),
            DONE,
        ],
    )
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "ab",
        "reasoning_content": "r1r2",
        "refusal": None,
        "sources": [1, 2],
        "audio": {"id": "au", "data": "AABB", "transcript": "x", "expires_at": 9},
        "score": 0.75,
    }
    assert (choice["stop_reason"], choice["token_ids"]) == (151645, [4, 5])
    assert (answer["service_tier"], answer["provider"]) == ("default", "P")
    assert "obfuscation" not in answer
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_log_probabilities_are_strung_together() -> None:
    def entry(token: str) -> dict[str, Any]:
        return {"token": token, "logprob": -0.5, "bytes": [1], "top_logprobs": []}

    def piece(token: str, reason: Any = None) -> bytes:
        choice = {
            "index": 0,
            "delta": {"content": token},
            "logprobs": {"content": [entry(token)], "refusal": None},
            "finish_reason": reason,
        }
        return event({"choices": [choice]})

    answer = assemble(CHAT, [piece("a"), piece("b", "stop"), DONE])
    expected = {"content": [entry("a"), entry("b")], "refusal": None}
    assert answer["choices"][0]["logprobs"] == expected

    def legacy(token: str, at: int) -> dict[str, Any]:
        return {"tokens": [token], "token_logprobs": [-0.5], "text_offset": [at]}

    stream = [
        text_chunk("a", logprobs=legacy("a", 0)),
        text_chunk("b", logprobs=legacy("b", 1)),
        text_chunk("", "stop"),
        DONE,
    ]
    assert assemble(TEXT, stream)["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "text_offset": [0, 1],
    }


def test_choices_grow_side_by_side_and_come_in_order() -> None:
    assembler = fed(
        CHAT,
        [
            chunk({"content": "x"}, index=1),
            chunk({"content": "a"}, index=0),
            chunk({"content": "y"}, index=1),
            chunk({}, "stop", index=1),
            usage_chunk(prompt_tokens=5, completion_tokens=2),
            chunk({}, "length", index=0),
            usage_chunk(prompt_tokens=5, completion_tokens=1),
            DONE,
        ],
        n=2,
    )
    answer = json.loads(assembler.result())
    told = [
        (c["index"], c["message"]["content"], c["finish_reason"])
        for c in answer["choices"]
    ]
    assert told == [(0, "a", "length"), (1, "xy", "stop")]
    # The direct answer names what the first choice cost; what counts is all of it.
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 1}
    assert assembler.usage == Usage(10, 3)


def test_texts_of_several_prompts_keep_their_own_usage() -> None:
    stream = [
        b"data: null\n\n",
        text_chunk("x", index=1),
        text_chunk("", "length", 1, usage={"prompt_tokens": 2, "completion_tokens": 1}),
        text_chunk("a", index=0),
        text_chunk("", "stop", 0, usage={"prompt_tokens": 3, "completion_tokens": 1}),
        DONE,
    ]
    answer = assemble(TEXT, stream, prompt=["a", "b"])
    assert [choice["text"] for choice in answer["choices"]] == ["a", "x"]
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == 3


def test_a_message_is_put_together_with_its_usage_from_both_ends() -> None:
    assert assemble(MESSAGES, MESSAGE) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "abc"},
            {"type": "text", "text": "Say hi"},
        ],
        "model": "m",
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "cache_read_input_tokens": 21,
            "input_tokens": 5,
            "output_tokens": 3,
        },
    }


@pytest.mark.parametrize(
    ("pieces_of_json", "start", "input"),
    [
        (['{"city"', ': "Paris"}'], {}, {"city": "Paris"}),
        (['{"city"', ': "Par'], {}, {}),
        ([], {}, {}),
        ([""], {"input": {}}, {}),
        ([], {"input": {"a": 1}}, {"a": 1}),
        (["[" * 100_000], {}, {}),
    ],
)
def test_the_input_of_a_tool_is_the_object_that_its_pieces_spell(
    pieces_of_json: list[str], start: dict[str, Any], input: Any
) -> None:
    block = {"type": "tool_use", "id": "t1", "name": "f", **start}
    deltas = [
        typed(
            "content_block_delta",
            index=0,
            delta={"type": "input_json_delta", "partial_json": piece},
        )
        for piece in pieces_of_json
    ]
    # llama-server opens a block before it closes the one in front of it.
    other = {"type": "tool_use", "id": "t2", "name": "g"}
    stream = [
        MESSAGE[0],
        typed("content_block_start", index=0, content_block=block),
        *deltas,
        typed("content_block_start", index=1, content_block=other),
        typed("content_block_stop", index=0),
        typed("content_block_stop", index=1),
        *MESSAGE[-2:],
    ]
    first, second = assemble(MESSAGES, stream)["content"]
    assert first == {"type": "tool_use", "id": "t1", "name": "f", "input": input}
    assert second == other | {"input": {}}


def test_citations_and_unknown_deltas_of_a_message_survive() -> None:
    stream = [
        MESSAGE[0],
        typed(
            "content_block_start", index=0, content_block={"type": "text", "text": "A"}
        ),
        typed(
            "content_block_delta", index=0, delta={"type": "text_delta", "text": "B"}
        ),
        typed(
            "content_block_delta",
            index=0,
            delta={"type": "citations_delta", "citation": {"cited_text": "c"}},
        ),
        typed(
            "content_block_delta", index=0, delta={"type": "new_delta", "extra": "d"}
        ),
        typed(
            "message_delta",
            delta={"stop_reason": "end_turn"},
            context_management={"applied_edits": []},
            usage={"output_tokens": 3, "input_tokens": None},
        ),
        MESSAGE[-1],
    ]
    answer = assemble(MESSAGES, stream)
    assert answer["content"] == [
        {
            "type": "text",
            "text": "AB",
            "citations": [{"cited_text": "c"}],
            "extra": "d",
        }
    ]
    assert answer["context_management"] == {"applied_edits": []}
    assert answer["usage"]["input_tokens"] == 5


def test_a_response_is_what_its_last_event_repeats() -> None:
    assert assemble(RESPONSES, RESPONSE_STREAM) == RESPONSE


@pytest.mark.parametrize("kind", ["response.incomplete", "response.failed"])
def test_a_response_that_ended_badly_is_the_answer_all_the_same(kind: str) -> None:
    response = RESPONSE | {"status": kind.removeprefix("response.")}
    stream = [*RESPONSE_STREAM[:-1], typed(kind, response=response)]
    assert assemble(RESPONSES, stream) == response


def test_a_response_without_its_output_is_filled_from_the_items() -> None:
    bare = RESPONSE | {"output": []}
    stream = [*RESPONSE_STREAM[:-1], typed("response.completed", response=bare)]
    assert assemble(RESPONSES, stream) == RESPONSE


def test_llama_server_leaves_two_things_out_of_a_streamed_response() -> None:
    item = {"type": "reasoning", "content": []}
    response = RESPONSE | {"output": [item]}
    stream = [typed("response.completed", response=response, timings=TIMINGS)]
    answer = assemble(RESPONSES, stream)
    assert answer["completed_at"] == 7
    assert answer["output"] == [item | {"status": "completed"}]


def test_a_native_answer_is_its_last_event_with_all_of_the_text() -> None:
    answer = assemble(NATIVE, NATIVE_STREAM)
    assert answer["content"] == " a time"
    assert answer["tokens"] == []
    assert answer["generation_settings"] == {"seed": 1, "stream": False}
    assert answer["stop"] is True and answer["stop_type"] == "limit"
    wanted = assemble(NATIVE, NATIVE_STREAM, return_tokens=True)
    assert wanted["tokens"] == [496, 990]


def test_native_progress_events_add_nothing() -> None:
    progress = {"index": 0, "content": "", "tokens": [0], "stop": False}
    first = event(progress | {"prompt_progress": {"total": 3}})
    answer = assemble(NATIVE, [first, *NATIVE_STREAM], return_tokens=True)
    assert answer["tokens"] == [496, 990]


def test_several_native_answers_make_a_list_in_order() -> None:
    def piece(index: int, text: str, stop: bool) -> bytes:
        return event({"index": index, "content": text, "tokens": [1], "stop": stop})

    stream = [
        piece(1, "x", False),
        piece(0, "a", False),
        piece(1, "", True),
        piece(0, "b", True),
    ]
    answer = assemble(NATIVE, stream)
    assert [(a["index"], a["content"]) for a in answer] == [(0, "ab"), (1, "x")]


def test_native_fields_that_the_client_left_out_stay_out() -> None:
    probability = [{"id": 1, "logprob": -0.5}]
    stream = [
        event(
            {
                "index": index,
                "content": "ab"[index],
                "stop": False,
                "tokens_predicted": 1,
                "tokens_evaluated": 3,
                "completion_probabilities": probability,
            }
        )
        for index in (0, 1)
    ]
    last = event({"content": "", "generation_settings/stream": True})
    pair = [stream[0], last, stream[1], last]
    fields = ["content", "generation_settings/stream"]
    assembler = fed(NATIVE, pair, response_fields=fields)
    assert json.loads(assembler.result()) == [
        {"content": "a", "generation_settings/stream": False},
        {"content": "b", "generation_settings/stream": False},
    ]
    assert assembler.usage == Usage(6, 2)
    fields.append("completion_probabilities")
    whole = assemble(NATIVE, pair, response_fields=fields)
    assert whole[0]["completion_probabilities"] == probability


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_and_single_bytes_give_the_same_answer(name: str) -> None:
    path, stream = STREAMS[name]
    whole = b"".join(stream)
    expected = assemble(path, [whole])
    for cut in range(0, len(whole), 3):
        assert assemble(path, [whole[:cut], whole[cut:]]) == expected
    single = [whole[at : at + 1] for at in range(len(whole))]
    assert assemble(path, single) == expected
    assert assemble(path, [whole.replace(b"\n", b"\r\n")]) == expected
    assert assemble(path, [b"\xef\xbb\xbf: keepalive 1/2\n\n" + whole]) == expected
    assembler = fed(path, [whole[:-2]])
    assembler.finish()
    assert assembler.complete, "without the last blank line"
    assert json.loads(assembler.result()) == expected


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_breaks_off_is_never_an_answer(name: str) -> None:
    path, stream = STREAMS[name]
    # What follows the last event that matters may be missing: the closing [DONE].
    needed = len(stream) - (1 if stream[-1] is DONE else 0)
    for size in range(needed):
        assembler = fed(path, stream[:size])
        assert not assembler.complete, f"{size} events"
        with pytest.raises(AssemblyError, match="before the answer was complete"):
            assembler.result()
    assert fed(path, stream[:needed]).complete


def test_one_unfinished_choice_makes_the_answer_incomplete() -> None:
    stream = [chunk({"content": "a"}), chunk({"content": "b"}, "stop", 1), DONE]
    assert not fed(CHAT, stream).complete


def test_a_prompt_that_has_not_begun_makes_the_answer_incomplete() -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 1}
    first = text_chunk("a", "stop", 0, usage=usage)
    second = text_chunk("b", "stop", 1, usage=usage)
    assembler = fed(TEXT, [first], prompt=["x", "y"])
    assert not assembler.complete
    for piece in (second, DONE):
        assembler.feed(piece)
    assert assembler.complete
    assembler = fed(NATIVE, NATIVE_STREAM, prompt=["x", [1, 2]])
    assert not assembler.complete
    assembler.feed(event({"index": 1, "content": "b", "stop": True}))
    assert assembler.complete
    assert fed(NATIVE, NATIVE_STREAM, prompt=[1, "x", 2]).complete


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (
            b'data: {"error":{"code":500,"message":"boom"}}\n\n',
            {"error": {"code": 500, "message": "boom"}},
        ),
        (b'data: {"error": "boom"}\n\n', {"error": "boom"}),
        (b'error: {"code":500}\n\n', {"error": {"code": 500}}),
        (
            b'event: error\ndata: {"code":500,"message":"boom"}\n\n',
            {"error": {"code": 500, "message": "boom"}},
        ),
        (
            b'event: error\ndata: {"type":"error","error":{"message":"x"}}\n\n',
            {"error": {"message": "x"}},
        ),
        (
            b'data: {"id":"1","choices":[],"error":{"code":502}}\n\n',
            {"error": {"code": 502}},
        ),
        (
            b'data: {"type":"error","code":"x","message":"y"}\n\n',
            {"error": {"type": "error", "code": "x", "message": "y"}},
        ),
    ],
)
@pytest.mark.parametrize("name", STREAMS)
def test_an_error_in_the_stream_is_handed_over(
    name: str, raw: bytes, body: Any
) -> None:
    path, stream = STREAMS[name]
    assembler = fed(path, [stream[0], raw, *stream[1:]])
    assert assembler.error is not None
    assert json.loads(assembler.error) == body
    with pytest.raises(AssemblyError, match="error"):
        assembler.result()


def test_a_member_named_error_that_is_null_is_no_error() -> None:
    stream = [chunk({"content": "a"}, "stop", error=None), DONE]
    assembler = fed(CHAT, stream)
    assert assembler.error is None
    assert "error" not in json.loads(assembler.result())


@pytest.mark.parametrize("junk", [b"{", b"hello", b"[" * 100_000, b"\xff\xfe"])
def test_events_that_are_not_json_are_refused(junk: bytes) -> None:
    assembler = fed(CHAT, [*LLAMACPP_CHAT, b"data: " + junk + b"\n\n"])
    assert assembler.broken == "an event of the stream is not JSON"
    with pytest.raises(AssemblyError, match="not JSON"):
        assembler.result()


@pytest.mark.parametrize(
    "junk",
    [
        {"choices": None},
        {"choices": [None, 3, "x", {}]},
        {"choices": [{"index": "a", "delta": 3}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [None, {"function": 1}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": {"a": 1}, "content": 3}}]},
        {"usage": 3, "response": 4, "message": 5, "content": 6, "index": None},
        {"type": "content_block_delta", "index": 0, "delta": {"type": ["x"]}},
        {"type": "content_block_delta", "index": True, "delta": {"text": []}},
        {"type": "message_delta", "delta": 3},
        {"type": "message_start", "message": 3},
        {"type": "response.completed", "response": 3},
        {"type": "response.output_item.done"},
        {"type": {"a": 1}},
        {"stop": False, "content": 3, "tokens": 4},
        {"stop": True, "content": None, "tokens": None, "generation_settings": 1},
    ],
)
@pytest.mark.parametrize("name", STREAMS)
def test_members_of_the_wrong_type_break_nothing(name: str, junk: Any) -> None:
    path, stream = STREAMS[name]
    assembler = fed(path, [*stream[:1], event(junk), *stream[1:]])
    if assembler.complete:
        assembler.result()


@pytest.mark.parametrize("name", ["chat", "text", "messages", "native"])
def test_an_answer_that_outgrows_the_limit_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "MAX_ANSWER_BYTES", 10_000)
    path, stream = STREAMS[name]
    more = {
        "chat": chunk({"content": "x" * 100}),
        "text": text_chunk("x" * 100),
        "messages": typed(
            "content_block_delta",
            index=0,
            delta={"type": "text_delta", "text": "x" * 100},
        ),
        "native": event({"index": 0, "content": "x" * 100, "stop": False}),
    }[name]
    assembler = fed(path, stream[:1])
    for _ in range(100):
        assembler.feed(more)
    assert assembler.broken == "the answer exceeds 10000 bytes"
    assert assembler._size < 10_300, "it went on collecting"
    with pytest.raises(AssemblyError, match="exceeds"):
        assembler.result()


def test_an_event_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_ANSWER_BYTES", 10_000)
    assembler = fed(CHAT, [b"data: " + b"x" * 10_000, b"x" * 10_000])
    assert assembler.broken == "an event is longer than 10000 bytes"
    assembler.finish()
    assert assembler.error is None and not assembler.complete


@pytest.mark.parametrize("name", ["chat", "messages", "responses", "native"])
def test_deeply_nested_members_break_nothing_but_the_answer(name: str) -> None:
    path, stream = STREAMS[name]
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = opening * 400 + "0" + closing * 400
        for junk in (
            f'{{"choices":[{{"index":0,"delta":{{"x":{deep}}}}}]}}',
            f'{{"content":{deep}}}',
            f'{{"type":"response.completed","response":{{"x":{deep}}}}}',
        ):
            event_of_it = f"data: {junk}\n\n".encode()
            assembler = fed(path, [*stream[:1], event_of_it, *stream[1:]])
            with contextlib.suppress(AssemblyError):
                json.loads(assembler.result())


def test_too_many_tool_calls_are_refused() -> None:
    calls = [tool(index, "") for index in range(2000)]
    broken = fed(CHAT, [chunk({"tool_calls": calls})]).broken
    assert broken == "too many pieces with an index of their own"


def test_a_long_answer_is_joined_once() -> None:
    # Adding to one string for every piece would copy some 20 GB here.
    piece = chunk({"content": "x" * 1000})
    assembler = fed(CHAT, [piece * 100] * 60 + [chunk({}, "stop"), DONE])
    content = json.loads(assembler.result())["choices"][0]["message"]["content"]
    assert len(content) == 6_000_000


def test_half_a_surrogate_pair_in_each_of_two_pieces_makes_a_character() -> None:
    stream = [
        b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"\\ude00"}}]}\n\n',
        chunk({}, "stop"),
        DONE,
    ]
    answer = assemble(CHAT, stream)
    assert answer["choices"][0]["message"]["content"] == "\U0001f600"


def test_endpoints_without_streams_have_no_assembler() -> None:
    for path in ("/v1/embeddings", "/v1/rerank", "/tokenize", "/v1/models", "/"):
        assert assembler_for(path) is None
        assert what_a_stream_lacks(path, {})
    for path in ("/infill", "/completions"):
        assert assembler_for(path) is assembler_for(NATIVE)


def test_a_request_is_changed_to_stream_with_usage() -> None:
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    assert request_changes(CHAT, {}) == asked
    assert request_changes(TEXT, {"stream": False, "stream_options": None}) == asked
    options = {"include_usage": False, "chunk_tokens": 4}
    assert request_changes(CHAT, {"stream_options": options})["stream_options"] == {
        "include_usage": True,
        "chunk_tokens": 4,
    }
    for path in (MESSAGES, RESPONSES, NATIVE, "/infill"):
        assert request_changes(path, {}) == {"stream": True}


@pytest.mark.parametrize(
    ("path", "values", "is_whole"),
    [
        (CHAT, {}, True),
        (CHAT, {"logprobs": False, "tools": [{}], "stop": ["x"], "n": 2}, True),
        (CHAT, {"logprobs": True}, False),
        (TEXT, {"logprobs": 2}, False),
        (TEXT, {"logprobs": 0}, True),
        (TEXT, {"logprobs": None}, True),
        (NATIVE, {"n_probs": 0}, True),
        (NATIVE, {"n_probs": 2}, False),
        (NATIVE, {"return_tokens": True}, False),
        (RESPONSES, {"top_logprobs": 2}, True),
        (MESSAGES, {}, True),
    ],
)
def test_requests_for_details_of_tokens_are_better_sent_as_they_are(
    path: str, values: dict[str, Any], is_whole: bool
) -> None:
    assert (what_a_stream_lacks(path, values) is None) == is_whole
