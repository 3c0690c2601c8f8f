"""A real llama-server behind the gateway answers as it does directly.

``cache_prompt`` is off wherever answers are compared: with a warm cache the engine
counts other tokens and may round differently.
"""

import base64
import json
import math
import struct
from typing import Any

import pytest

from engines.real import Engine, Reply

pytestmark = pytest.mark.e2e

# What may differ between two runs of the same request.
FLEETING = {"id", "created", "created_at", "completed_at", "timings"}
FLEETING |= {"system_fingerprint", "item_id", "call_id"}

CHAT = {
    "model": "gemma-270m",
    "messages": [{"role": "user", "content": "The capital of France is"}],
    "max_tokens": 24,
    "temperature": 0,
    "cache_prompt": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def steady(value: Any) -> Any:
    """A decoded answer without what differs from run to run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in FLEETING}
    if isinstance(value, list):
        return [steady(item) for item in value]
    return value


def same_answer(ours: Reply, direct: Reply) -> Any:
    """Hold our answer against the direct one, and return it decoded."""
    assert ours.status == direct.status, ours.body
    assert steady(ours.json()) == steady(direct.json())
    return ours.json()


def same_stream(ours: Reply, direct: Reply) -> list[Any]:
    assert ours.status == direct.status == 200, ours.body
    assert steady(ours.chunks()) == steady(direct.chunks())
    return ours.chunks()


def worked_history() -> list[dict[str, Any]]:
    """Three finished tool calls and a fourth question.

    The base model calls a tool only when it has seen how that is done.
    """
    messages: list[dict[str, Any]] = []
    for city, weather in (("Rome", "sunny"), ("Oslo", "snow"), ("Lima", "fog")):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        call = {"id": f"call-{city}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": weather},
            {"role": "assistant", "content": f"It is {weather}."},
        ]
    return [*messages, {"role": "user", "content": "What is the weather in Paris?"}]


def cosine(a: list[float], b: list[float]) -> float:
    def dot(x: list[float], y: list[float]) -> float:
        return sum(i * j for i, j in zip(x, y, strict=True))

    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


# Chat


def test_a_chat_equals_the_direct_one(gateway: Engine, llama: Engine) -> None:
    path = "/v1/chat/completions"
    answer = same_answer(gateway.post(path, CHAT), llama.post(path, CHAT))
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == CHAT["max_tokens"]


def test_several_choices_equal_the_direct_ones(gateway: Engine, llama: Engine) -> None:
    path, body = "/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True}
    answer = same_answer(gateway.post(path, body), llama.post(path, body))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_the_answers_headers_are_ours(gateway: Engine) -> None:
    headers = gateway.post("/v1/chat/completions", CHAT).headers
    assert headers["Content-Type"].partition(";")[0] == "application/json"
    assert headers["X-Request-Id"]
    assert headers["Server"].startswith("inferencia")
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["X-RateLimit-Limit"] and headers["x-ratelimit-limit-requests"]


def test_a_stream_equals_the_direct_one_and_hides_the_usage_nobody_asked_for(
    gateway: Engine, llama: Engine
) -> None:
    path, body = "/v1/chat/completions", {**CHAT, "stream": True}
    ours = gateway.post(path, body)
    chunks = same_stream(ours, llama.post(path, body))
    assert not any("usage" in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)
    assert ours.headers["Content-Type"].partition(";")[0] == "text/event-stream"
    assert ours.headers["Cache-Control"] == "no-cache, no-transform"
    assert ours.headers["X-Accel-Buffering"] == "no"


def test_a_stream_shows_the_usage_to_those_who_ask(
    gateway: Engine, llama: Engine
) -> None:
    path = "/v1/chat/completions"
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *_, last = same_stream(gateway.post(path, body), llama.post(path, body))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == CHAT["max_tokens"]


def test_text_arrives_while_the_engine_is_still_writing(gateway: Engine) -> None:
    body = json.dumps({**CHAT, "stream": True, "max_tokens": 200}).encode()
    connection = gateway.send("POST", "/v1/chat/completions", body)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    assert not answer.isclosed()
    connection.close()


def test_tool_calls_equal_the_direct_ones(gateway: Engine, llama: Engine) -> None:
    path = "/v1/chat/completions"
    body = {**CHAT, "messages": worked_history(), "tools": [WEATHER], "max_tokens": 64}
    answer = same_answer(gateway.post(path, body), llama.post(path, body))
    calls = answer["choices"][0]["message"]["tool_calls"]
    assert calls[0]["id"]
    assert calls[0]["function"]["name"] == "get_weather"
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Paris"}


def test_streamed_tool_calls_equal_the_direct_ones(
    gateway: Engine, llama: Engine
) -> None:
    path = "/v1/chat/completions"
    body = {**CHAT, "messages": worked_history(), "tools": [WEATHER], "max_tokens": 64}
    body["stream"] = True
    chunks = same_stream(gateway.post(path, body), llama.post(path, body))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    first = "".join(c["function"]["arguments"] for c in calls if c["index"] == 0)
    assert json.loads(first) == {"city": "Paris"}


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output_keeps_to_its_schema(
    gateway: Engine, llama: Engine, stream: bool
) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "rivers": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "rivers"],
        "additionalProperties": False,
    }
    wanted = {"name": "place", "strict": True, "schema": schema}
    shape = {"type": "json_schema", "json_schema": wanted}
    path = "/v1/chat/completions"
    body = {**CHAT, "response_format": shape, "max_tokens": 64, "stream": stream}
    ours, direct = gateway.post(path, body), llama.post(path, body)
    if stream:
        deltas = [c["choices"][0]["delta"] for c in same_stream(ours, direct)]
        text = "".join(delta.get("content") or "" for delta in deltas)
    else:
        text = same_answer(ours, direct)["choices"][0]["message"]["content"]
    place = json.loads(text)
    assert place["city"] in ("Paris", "Rome") and 1 <= place["rivers"] <= 9


# The other endpoints


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Once upon", "max_tokens": 8}),
        ("/v1/responses", {"input": "Once upon", "max_output_tokens": 8}),
        ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 8}),
        ("/v1/messages/count_tokens", {"messages": CHAT["messages"]}),
        ("/completion", {"prompt": "Once upon", "n_predict": 8}),
        ("/tokenize", {"content": "Once upon a time"}),
        ("/detokenize", {"tokens": [14946, 3324]}),
        ("/apply-template", {"messages": CHAT["messages"]}),
    ],
)
def test_every_endpoint_answers_as_the_engine_does(
    gateway: Engine, llama: Engine, path: str, body: dict[str, Any]
) -> None:
    body = {"model": "gemma-270m", "temperature": 0, "cache_prompt": False, **body}
    ours, direct = gateway.post(path, body), llama.post(path, body)
    assert direct.status == 200, direct.body
    same_answer(ours, direct)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Once upon", "max_tokens": 8}),
        ("/v1/responses", {"input": "Once upon", "max_output_tokens": 8}),
        ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 8}),
        ("/completion", {"prompt": "Once upon", "n_predict": 8}),
    ],
)
def test_every_stream_passes_as_the_engine_sends_it(
    gateway: Engine, llama: Engine, path: str, body: dict[str, Any]
) -> None:
    body = {"model": "gemma-270m", "temperature": 0, "cache_prompt": False, **body}
    body["stream"] = True
    ours, direct = gateway.post(path, body), llama.post(path, body)
    assert ours.status == direct.status == 200, ours.body

    def decoded(reply: Reply) -> list[Any]:
        done = b"[DONE]"
        return [steady(json.loads(e)) if e != done else e for e in reply.events()]

    assert decoded(ours) == decoded(direct)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
    ],
)
def test_what_the_engine_was_not_started_for_is_refused_in_its_words(
    gateway: Engine, llama: Engine, path: str, body: dict[str, Any]
) -> None:
    body = {"model": "gemma-270m", **body}
    ours, direct = gateway.post(path, body), llama.post(path, body)
    assert ours.status == direct.status == 501
    assert ours.json()["error"]["message"] == direct.json()["error"]["message"]


# Embeddings


def test_embeddings_equal_the_direct_ones_and_mean_something(
    gateway: Engine, embedder: Engine
) -> None:
    body = {
        "model": "minilm",
        "input": [
            "a cat sat on the mat",
            "a kitten on the rug",
            "quarterly tax filing",
        ],
    }
    path = "/v1/embeddings"
    answer = same_answer(gateway.post(path, body), embedder.post(path, body))
    cat, kitten, tax = (item["embedding"] for item in answer["data"])
    assert len(cat) == 384
    assert cosine(cat, kitten) > cosine(cat, tax) + 0.2
    assert answer["usage"]["prompt_tokens"] > 0


def test_base64_embeddings_hold_the_same_numbers(
    gateway: Engine, embedder: Engine
) -> None:
    path, body = "/v1/embeddings", {"model": "minilm", "input": "a cat"}
    packed = {**body, "encoding_format": "base64"}
    answer = same_answer(gateway.post(path, packed), embedder.post(path, packed))
    raw = base64.b64decode(answer["data"][0]["embedding"])
    numbers = struct.unpack(f"<{len(raw) // 4}f", raw)
    plain = gateway.post(path, body).json()["data"][0]["embedding"]
    assert numbers == pytest.approx(plain, abs=1e-6)


# Listing


def test_the_list_merges_the_models_of_all_engines(gateway: Engine) -> None:
    answer = gateway.get("/v1/models").json()
    assert answer["object"] == "list"
    listed = [model["id"] for model in answer["data"]]
    assert listed == ["gemma-270m", "minilm", "mlx-a"]
    assert all(model["object"] == "model" for model in answer["data"])


def test_one_model_can_be_asked_about(gateway: Engine) -> None:
    assert gateway.get("/v1/models/minilm").json()["id"] == "minilm"
    assert gateway.get("/v1/models/nope").status == 404


# Errors


def test_an_unknown_model_is_not_found_although_the_engine_would_take_it(
    gateway: Engine, llama: Engine
) -> None:
    path, body = "/v1/chat/completions", {**CHAT, "model": "gemma-270n"}
    assert llama.post(path, body).status == 200
    ours = gateway.post(path, body)
    assert ours.status == 404
    error = ours.json()["error"]
    assert error["code"] == "model_not_found"
    assert "gemma-270m" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_in_the_engines_words(
    gateway: Engine, llama: Engine, stream: bool
) -> None:
    messages = [{"role": "user", "content": "word " * 20_000}]
    path, body = "/v1/chat/completions", {**CHAT, "messages": messages}
    body["stream"] = stream
    ours, direct = gateway.post(path, body), llama.post(path, body)
    assert ours.status == direct.status == 400
    error, theirs = ours.json()["error"], direct.json()["error"]
    for member in ("message", "type", "n_prompt_tokens", "n_ctx"):
        assert error[member] == theirs[member]
    assert error["type"] == "exceed_context_size_error"
    assert isinstance(error["code"], str)  # the engine's is the number of the status


@pytest.mark.parametrize("stream", [False, True])
def test_a_value_that_the_engine_refuses_is_refused_in_its_words(
    gateway: Engine, llama: Engine, stream: bool
) -> None:
    messages = [{"role": "user", "content": [{"type": "telepathy"}]}]
    path, body = "/v1/chat/completions", {**CHAT, "messages": messages}
    body["stream"] = stream
    ours, direct = gateway.post(path, body), llama.post(path, body)
    assert ours.status == direct.status == 400
    assert ours.json()["error"]["message"] == direct.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_without_messages_is_refused_as_the_engine_would(
    gateway: Engine, llama: Engine, stream: bool
) -> None:
    path, body = "/v1/chat/completions", {"model": "gemma-270m", "stream": stream}
    ours, direct = gateway.post(path, body), llama.post(path, body)
    assert ours.status == direct.status == 400
    assert ours.json()["error"]["type"] == direct.json()["error"]["type"]
    assert ours.json()["error"]["param"] == "messages"


def test_broken_json_is_the_clients_fault_although_the_engine_takes_the_blame(
    gateway: Engine, llama: Engine
) -> None:
    path, body = "/v1/chat/completions", b'{"model": "gemma-270m", '
    assert llama.request("POST", path, body).status == 500
    ours = gateway.request("POST", path, body)
    assert ours.status == 400
    assert ours.json()["error"]["code"] == "invalid_json"


def test_a_stranger_and_a_narrow_key_are_refused(gateway: Engine) -> None:
    path = "/v1/chat/completions"
    stranger = gateway.post(path, CHAT, Authorization="Bearer sk-nobody")
    assert stranger.status == 401
    assert stranger.json()["error"]["code"] == "invalid_api_key"
    narrow = "Bearer sk-e2e-narrow-9c1e44f7b3"
    assert gateway.post(path, CHAT, Authorization=narrow).status == 404
    listed = gateway.get("/v1/models", Authorization=narrow).json()["data"]
    assert [model["id"] for model in listed] == ["minilm"]


def test_metrics_and_log_know_the_requests_but_no_secret(gateway: Engine) -> None:
    word = "zanzibar"
    messages = [{"role": "user", "content": f"Say {word}"}]
    request_id = "e2e-log-line-1"
    body = {**CHAT, "messages": messages}
    path = "/v1/chat/completions"
    assert gateway.post(path, body, X_Request_Id=request_id).status == 200
    metrics = gateway.get(
        "/metrics", Authorization="Bearer sk-e2e-metrics-5b8d02e6a1"
    ).body.decode()
    assert 'model="gemma-270m"' in metrics and 'backend="chat"' in metrics
    written = gateway.log.read_text()
    (line,) = [row for row in written.splitlines() if request_id in row]
    record = json.loads(line)
    assert "alice" in record.values() and "gemma-270m" in record.values()
    for secret in (word, "sk-e2e", "sk-nobody"):
        assert secret not in written and secret not in metrics
