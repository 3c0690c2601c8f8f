"""An assembled answer of a real engine equals its direct answer.

``INFERENCIA_E2E_LLAMA_URL`` names the server: at least two slots, ``--jinja`` and
``tests/engines/tools.jinja``. What its model says does not matter; a base model repeats
the tool calls and the reasoning that the conversation has shown it.

A few cases run against a real mlx_lm, too.
"""

import http.client
import json
import os
from typing import Any
from urllib.parse import urlsplit

import pytest

from engines.real import Engine
from inferencia.metering import usage_of
from inferencia.translate.assembly import (
    assembler_for,
    request_changes,
    what_a_stream_lacks,
)

pytestmark = pytest.mark.e2e

# Random, measured, or the time of day.
DIFFERING = frozenset(
    (
        "id",
        "call_id",
        "created",
        "created_at",
        "completed_at",
        "timings",
        "system_fingerprint",
        "id_slot",
    )
)

ASK = [{"role": "user", "content": "Say hi"}]

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
WEATHER = {"name": "get_weather", "description": "Get the weather"}
TOOLS = [{"type": "function", "function": {**WEATHER, "parameters": CITY}}]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "mood": {"type": "string", "enum": ["good", "bad"]},
    },
    "required": ["name", "mood"],
    "additionalProperties": False,
}

# Takes several tokens for one character, so that characters are cut between tokens.
WIDE = 'root ::= "a\U00020000b\U0001f9ffc"'


def worked_tool_calls() -> list[dict[str, Any]]:
    """A conversation in which every question so far led to a call."""
    messages: list[dict[str, Any]] = []
    for number, city in enumerate(("Rome", "Paris", "Rome")):
        call = {
            "id": f"call{number}",
            "type": "function",
            "function": {
                "name": "get_weather",
                "arguments": json.dumps({"city": city}),
            },
        }
        messages += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call{number}", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ]
    return [*messages, {"role": "user", "content": "What is the weather in Paris?"}]


def worked_tool_uses() -> list[dict[str, Any]]:
    """The same in Anthropic's words."""
    messages: list[dict[str, Any]] = []
    for number, city in enumerate(("Rome", "Paris", "Rome")):
        use = {
            "type": "tool_use",
            "id": f"call{number}",
            "name": "get_weather",
            "input": {"city": city},
        }
        result = {
            "type": "tool_result",
            "tool_use_id": f"call{number}",
            "content": "sunny",
        }
        messages += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": "Sunny."},
        ]
    return [*messages, {"role": "user", "content": "What is the weather in Paris?"}]


def said(text: str) -> dict[str, Any]:
    """An assistant's turn in the words of Responses."""
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": "assistant", "content": content}


def worked_function_calls() -> list[dict[str, Any]]:
    """The same in the words of Responses."""
    items: list[dict[str, Any]] = []
    for number, city in enumerate(("Rome", "Paris", "Rome")):
        call = {
            "type": "function_call",
            "call_id": f"call{number}",
            "name": "get_weather",
            "arguments": json.dumps({"city": city}),
        }
        output = {
            "type": "function_call_output",
            "call_id": f"call{number}",
            "output": "sunny",
        }
        items += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            call,
            output,
            said("Sunny."),
        ]
    return [*items, {"role": "user", "content": "What is the weather in Paris?"}]


def worked_thinking() -> list[dict[str, Any]]:
    """``worked_reasoning`` in Anthropic's words."""
    messages: list[dict[str, Any]] = []
    for message in worked_reasoning():
        content: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}]
        if thinking := message.get("reasoning_content"):
            content.insert(
                0, {"type": "thinking", "thinking": thinking, "signature": ""}
            )
        messages.append({"role": message["role"], "content": content})
    return messages


def worked_reasoning_items() -> list[dict[str, Any]]:
    """``worked_reasoning`` in the words of Responses."""
    items: list[dict[str, Any]] = []
    for message in worked_reasoning():
        if thinking := message.get("reasoning_content"):
            text = {"type": "reasoning_text", "text": thinking}
            items.append({"type": "reasoning", "summary": [], "content": [text]})
            items.append(said(message["content"]))
        else:
            items.append(message)
    return items


def worked_reasoning() -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number in range(4):
        messages += [
            {"role": "user", "content": f"Say {number}"},
            {
                "role": "assistant",
                "reasoning_content": f"They want {number}.",
                "content": str(number),
            },
        ]
    return [*messages, {"role": "user", "content": "Say 4"}]


STOP = {"stop": ["<|im_end|>"]}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
NATIVE = "/completion"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": ASK, "max_tokens": 8}),
    "chat, stop string": (CHAT, {"messages": ASK, "max_tokens": 40, **STOP}),
    "chat, nothing before the stop string": (
        CHAT,
        {"messages": ASK, "max_tokens": 40, "stop": ["Say", "<"]},
    ),
    "chat, one token": (CHAT, {"messages": ASK, "max_tokens": 1}),
    "chat, two choices": (CHAT, {"messages": ASK, "max_tokens": 6, "n": 2}),
    "chat, two choices that differ": (
        CHAT,
        {"messages": ASK, "max_tokens": 6, "n": 2, "temperature": 2.0, "seed": 7},
    ),
    "chat, log probabilities": (
        CHAT,
        {"messages": ASK, "max_tokens": 6, "logprobs": True, "top_logprobs": 3},
    ),
    "chat, log probabilities of two choices": (
        CHAT,
        {"messages": ASK, "max_tokens": 4, "logprobs": True, "n": 2},
    ),
    "chat, tool call": (
        CHAT,
        {"messages": worked_tool_calls(), "tools": TOOLS, "max_tokens": 40, **STOP},
    ),
    "chat, several tool calls": (
        CHAT,
        {"messages": worked_tool_calls(), "tools": TOOLS, "max_tokens": 64},
    ),
    "chat, reasoning": (
        CHAT,
        {"messages": worked_reasoning(), "max_tokens": 40, **STOP},
    ),
    "chat, reasoning that the limit cuts": (
        CHAT,
        {"messages": worked_reasoning(), "max_tokens": 6},
    ),
    "chat, schema": (
        CHAT,
        {
            "messages": ASK,
            "max_tokens": 60,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "it", "strict": True, "schema": SCHEMA},
            },
        },
    ),
    "chat, wide characters": (
        CHAT,
        {"messages": ASK, "max_tokens": 40, "grammar": WIDE},
    ),
    "chat, progress and timings": (
        CHAT,
        {
            "messages": ASK,
            "max_tokens": 4,
            "return_progress": True,
            "timings_per_token": True,
        },
    ),
    "text": (TEXT, {"prompt": "Once upon", "max_tokens": 8}),
    "text, stop string": (
        TEXT,
        {"prompt": "Once upon", "max_tokens": 20, "stop": [" there"]},
    ),
    "text, two choices": (TEXT, {"prompt": "Once upon", "max_tokens": 6, "n": 2}),
    "text, two prompts": (
        TEXT,
        {"prompt": ["Once upon", "The sea is"], "max_tokens": 6},
    ),
    "text, three prompts on two slots": (
        TEXT,
        {"prompt": ["Once upon", "The sea is", "One two three"], "max_tokens": 3},
    ),
    "text, log probabilities": (
        TEXT,
        {"prompt": "Once upon", "max_tokens": 5, "logprobs": 3},
    ),
    "text, wide characters": (
        TEXT,
        {"prompt": "Once", "max_tokens": 40, "grammar": WIDE, "logprobs": 1},
    ),
    "messages": (MESSAGES, {"messages": ASK, "max_tokens": 8}),
    "messages, stop string": (
        MESSAGES,
        {"messages": ASK, "max_tokens": 40, "stop_sequences": ["<|im_end|>"]},
    ),
    "messages, nothing before the stop string": (
        MESSAGES,
        {"messages": ASK, "max_tokens": 40, "stop_sequences": ["Say", "<"]},
    ),
    "messages, tool use": (
        MESSAGES,
        {
            "messages": worked_tool_uses(),
            "max_tokens": 64,
            "tools": [{**WEATHER, "input_schema": CITY}],
        },
    ),
    "messages, thinking": (
        MESSAGES,
        {
            "messages": worked_thinking(),
            "max_tokens": 40,
            "stop_sequences": ["<|im_end|>"],
        },
    ),
    "responses": (RESPONSES, {"input": "Say hi", "max_output_tokens": 8}),
    "responses, tool call": (
        RESPONSES,
        {
            "input": worked_function_calls(),
            "max_output_tokens": 64,
            "tools": [{"type": "function", **WEATHER, "parameters": CITY}],
        },
    ),
    "responses, reasoning": (
        RESPONSES,
        {"input": worked_reasoning_items(), "max_output_tokens": 24},
    ),
    "native": (NATIVE, {"prompt": "Once upon", "n_predict": 8}),
    "native, stop string": (
        NATIVE,
        {"prompt": "Once upon", "n_predict": 20, "stop": [" there"]},
    ),
    "native, tokens": (
        NATIVE,
        {"prompt": "Once upon", "n_predict": 6, "return_tokens": True},
    ),
    "native, probabilities": (
        NATIVE,
        {"prompt": "Once upon", "n_predict": 5, "n_probs": 2},
    ),
    "native, probabilities after sampling": (
        NATIVE,
        {
            "prompt": "Once upon",
            "n_predict": 5,
            "n_probs": 2,
            "post_sampling_probs": True,
        },
    ),
    "native, two prompts": (
        NATIVE,
        {"prompt": ["Once upon", "The sea is"], "n_predict": 5},
    ),
    "native, one prompt in a list": (NATIVE, {"prompt": ["Once upon"], "n_predict": 5}),
    "native, two choices": (NATIVE, {"prompt": "Once upon", "n_predict": 5, "n": 2}),
    "native, some fields of two prompts": (
        NATIVE,
        {
            "prompt": ["Once upon", "The sea is"],
            "n_predict": 5,
            "response_fields": ["content", "generation_settings/stream"],
        },
    ),
    "native, progress": (
        NATIVE,
        {
            "prompt": "Once upon",
            "n_predict": 5,
            "return_progress": True,
            "timings_per_token": True,
        },
    ),
    "native, older name": ("/completions", {"prompt": "Once upon", "n_predict": 5}),
}

EXACT = {"temperature": 0, "seed": 1}


MLX_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": ASK, "max_tokens": 8}),
    "chat, one token": (CHAT, {"messages": ASK, "max_tokens": 1}),
    "chat, stop string": (CHAT, {"messages": ASK, "max_tokens": 40, "stop": ["\n"]}),
    "text": (TEXT, {"prompt": "the quick", "max_tokens": 8}),
    "text, stop string": (
        TEXT,
        {"prompt": "the quick", "max_tokens": 40, "stop": ["X"]},
    ),
}


@pytest.fixture
def url(engine_address: None) -> str:
    address = os.environ.get("INFERENCIA_E2E_LLAMA_URL")
    if not address:
        pytest.skip("INFERENCIA_E2E_LLAMA_URL is not set")
    return address


def post(url: str, path: str, values: dict[str, Any]) -> tuple[int, bytes]:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(
        where.hostname or "", where.port, timeout=120
    )
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", where.path + path, json.dumps(values), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {n: comparable(v) for n, v in value.items() if n not in DIFFERING}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def names(value: Any) -> Any:
    """All member names, also of what differs."""
    if isinstance(value, dict):
        return {n: names(v) for n, v in value.items() if n != "timings"}
    if isinstance(value, list):
        return [names(item) for item in value]
    return None


def assembled(url: str, path: str, values: dict[str, Any]) -> bytes:
    kind = assembler_for(path)
    assert kind is not None
    assembler = kind(values)
    status, stream = post(url, path, values | request_changes(path, values))
    assert status == 200, stream
    for at in range(0, len(stream), 777):
        assembler.feed(stream[at : at + 777])
    assert assembler.error is None
    assert assembler.complete
    assert assembler.usage is not None
    return assembler.result()


def assert_equal(url: str, path: str, values: dict[str, Any]) -> None:
    values = EXACT | values
    # What a slot has cached shows in the usage, so both must find the same there.
    post(url, path, values)
    status, raw = post(url, path, values)
    assert status == 200, raw
    direct = json.loads(raw)
    ours = json.loads(assembled(url, path, values))
    assert comparable(ours) == comparable(direct)
    assert names(ours) == names(direct)
    assert usage_of(ours) == usage_of(direct)


@pytest.mark.parametrize("case", CASES)
def test_the_assembled_answer_equals_the_direct_one(case: str, url: str) -> None:
    assert_equal(url, *CASES[case])


@pytest.mark.parametrize("case", MLX_CASES)
def test_the_assembled_answer_of_mlx_equals_the_direct_one(
    case: str, mlx: Engine
) -> None:
    assert_equal(mlx.url, *MLX_CASES[case])


@pytest.mark.parametrize("limit", [1, 5, 9, 13, 14, 20])
def test_a_tool_call_that_the_limit_cuts_loses_at_most_its_beginning(
    limit: int, url: str
) -> None:
    """The direct answer shows the raw text of a call that has no arguments yet."""
    values = EXACT | {
        "messages": worked_tool_calls(),
        "tools": TOOLS,
        "max_tokens": limit,
    }
    post(url, CHAT, values)
    direct = json.loads(post(url, CHAT, values)[1])
    ours = json.loads(assembled(url, CHAT, values))
    theirs = direct["choices"][0]["message"].pop("content")
    assert theirs.startswith(ours["choices"][0]["message"].pop("content"))
    assert comparable(ours) == comparable(direct)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (CHAT, {"messages": ASK, "tools": TOOLS, "logprobs": True}),
        (CHAT, {"messages": ASK, "logprobs": True, "grammar": WIDE}),
        (
            TEXT,
            {"prompt": "Once upon", "logprobs": 1, "stop": ["me, there"]},
        ),
        (NATIVE, {"prompt": "Once", "return_tokens": True, "grammar": WIDE}),
    ],
)
def test_what_a_stream_lacks_is_still_true(
    path: str, values: dict[str, Any], url: str
) -> None:
    """If this fails, the engine has learned something, and so may we."""
    assert what_a_stream_lacks(path, values)
    values = EXACT | values | {"max_tokens": 20}
    status, raw = post(url, path, values)
    assert status == 200
    status, stream = post(url, path, values | request_changes(path, values))
    if status != 200:
        assert json.loads(stream)["error"]["type"] == "invalid_request_error"
        return
    kind = assembler_for(path)
    assert kind is not None
    assembler = kind(values)
    assembler.feed(stream)
    assert comparable(json.loads(assembler.result())) != comparable(json.loads(raw))
