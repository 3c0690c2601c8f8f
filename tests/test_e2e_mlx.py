"""A real mlx_lm server behind the gateway: HTTP/1.0, string errors, paths as names."""

import json
from typing import Any

import pytest

from engines.real import Engine, Installed, Reply

pytestmark = pytest.mark.e2e

PATH = "/v1/chat/completions"
CHAT = {
    "model": "mlx-a",
    "messages": [{"role": "user", "content": "hello world"}],
    "max_tokens": 12,
    "temperature": 0,
}
# It repeats the name by which it was asked.
FLEETING = ("id", "created", "system_fingerprint", "model")


def direct(mlx: Engine, body: dict[str, Any]) -> Reply:
    """Ask mlx_lm itself, by the only name that does not make it load something."""
    return mlx.post(PATH, {**body, "model": "default_model"})


def steady(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run; its prompt cache cannot be turned off."""
    kept = {k: v for k, v in answer.items() if k not in FLEETING}
    if kept.get("usage"):
        kept["usage"] = {**kept["usage"], "prompt_tokens_details": None}
    return kept


def test_a_chat_equals_the_direct_one(gateway: Engine, mlx: Engine) -> None:
    ours = gateway.post(PATH, CHAT)
    assert ours.status == 200, ours.body
    assert steady(ours.json()) == steady(direct(mlx, CHAT).json())
    assert ours.json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_a_stream_equals_the_direct_one(
    gateway: Engine, mlx: Engine, options: dict[str, Any]
) -> None:
    body = {**CHAT, "stream": True, **options}
    ours = gateway.post(PATH, body)
    assert ours.status == 200, ours.body
    theirs = [steady(chunk) for chunk in direct(mlx, body).chunks()]
    assert [steady(chunk) for chunk in ours.chunks()] == theirs
    has_usage = any(chunk.get("usage") for chunk in ours.chunks())
    assert has_usage == bool(options)


def test_the_model_is_offered_by_its_base_name(
    gateway: Engine, mlx: Engine, installed: Installed
) -> None:
    own = [model["id"] for model in mlx.get("/v1/models").json()["data"]]
    assert str(installed.folder / "mlx-a") in own
    listed = gateway.get("/v1/models").body.decode()
    assert '"mlx-a"' in listed and str(installed.folder) not in listed


def test_the_path_is_not_a_name_that_a_client_may_use(
    gateway: Engine, installed: Installed
) -> None:
    answer = gateway.post(PATH, {**CHAT, "model": str(installed.folder / "mlx-b")})
    assert answer.status == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_it_is_asked_by_the_only_name_that_does_not_make_it_load(
    gateway: Engine,
) -> None:
    """Any other may drop the loaded model first, or tell where its files lie."""
    assert gateway.post(PATH, CHAT).json()["model"] == "default_model"


def test_an_error_that_is_only_a_string_becomes_one_that_clients_can_read(
    gateway: Engine, mlx: Engine
) -> None:
    body = {**CHAT, "max_tokens": "three"}
    theirs = direct(mlx, body)
    assert isinstance(theirs.json()["error"], str)
    ours = gateway.post(PATH, body)
    assert ours.status == theirs.status == 400
    error = ours.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert theirs.json()["error"] in error["message"]


def test_a_path_it_does_not_have_is_an_error_that_clients_can_read(
    gateway: Engine,
) -> None:
    answer = gateway.post("/v1/embeddings", {"model": "mlx-a", "input": "a"})
    assert answer.status == 404
    assert answer.json()["error"]["message"]


def test_a_chunked_body_reaches_it_with_a_length(gateway: Engine) -> None:
    """mlx_lm answers 411 to a chunked request."""
    connection = gateway.connect()
    headers = {**gateway.headers, "Content-Type": "application/json"}
    pieces = iter([json.dumps(CHAT)[:20].encode(), json.dumps(CHAT)[20:].encode()])
    connection.request("POST", PATH, pieces, headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()


def test_it_answers_many_requests_one_after_another(gateway: Engine) -> None:
    """Each of its connections carries one answer; none may be used again."""
    for _ in range(20):
        assert gateway.post(PATH, {**CHAT, "max_tokens": 1}).status == 200
