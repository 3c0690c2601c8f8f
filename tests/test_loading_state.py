"""What a client learns while its model is loaded."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gateway import eventually
from inferencia import loadingstate
from swapping import load_model, server, state, swapping

pytestmark = pytest.mark.usefixtures("state")
assert state  # the fixture

BAR = "\u2501" * 5


def thoughts_and_words(body: bytes) -> tuple[str, str, list[Any]]:
    """All that was thought, all that was said, and the errors, of a stream."""
    thought, said, errors = "", "", []
    for line in body.decode().splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            errors.append(event["error"])
            continue
        for choice in event["choices"]:
            thought += choice["delta"].get("reasoning_content") or ""
            said += choice["delta"].get("content") or ""
    return thought, said, errors


async def test_a_chats_client_reads_how_the_load_goes_and_then_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadingstate, "TICK_SECONDS", 0.01)
    go = tmp_path / "go"
    models = {"a": server("a", "--load-until", str(go), sendLoadingState=True)}
    async with swapping(tmp_path, models) as gateway:
        async with gateway.chat(stream=True, model="a") as answer:
            assert answer.status == 200  # at once
            assert answer.headers["Content-Type"] == "text/event-stream"
            body = b""
            while b"loading a" not in body or body.count(b'"."') < 2:
                body += await answer.content.readany()
            go.touch()
            body += await answer.content.read()
        thought, said, errors = thoughts_and_words(body)
        assert thought.startswith(f"{BAR}\nllama-swap loading model: a\n")
        assert "\nloading a " in thought
        assert "\nDone! (" in thought
        assert thought.endswith(f"s)\n{BAR}\n \n")
        assert said == "word0 word1 word2 "
        assert errors == []
        assert body.endswith(b"data: [DONE]\n\n")
        assert gateway.log.requests[-1]["completion_tokens"] == 3


async def test_nobody_else_is_told_by_thoughts(tmp_path: Path) -> None:
    models = {"a": server("a", sendLoadingState=True), "b": server("b")}
    async with swapping(tmp_path, models) as gateway:
        await load_model(gateway, "a")
        for model, stream in (("a", True), ("b", True), ("a", False)):
            async with gateway.chat(stream=stream, model=model) as answer:
                assert b"llama-swap" not in await answer.read()
        body = {"model": "b", "prompt": "hi", "stream": True}
        async with gateway.post("/v1/completions", body) as answer:
            assert b"llama-swap" not in await answer.read()


async def test_a_load_that_fails_ends_the_stream_with_the_error(tmp_path: Path) -> None:
    broken = server("a", "--crash-on-start", "error: no such file: m.gguf")
    models = {"a": broken | {"sendLoadingState": True}}
    async with swapping(tmp_path, models) as gateway:
        async with gateway.chat(stream=True, model="a") as answer:
            assert answer.status == 200
            thought, said, errors = thoughts_and_words(await answer.read())
        assert "Done!" not in thought
        assert said == ""
        assert [error["code"] for error in errors] == ["model_load_failed"]
        assert "no such file" in errors[0]["message"]


async def test_who_leaves_while_it_loads_is_told_nothing_more(tmp_path: Path) -> None:
    go = tmp_path / "go"
    models = {"a": server("a", "--load-until", str(go), sendLoadingState=True)}
    async with swapping(tmp_path, models) as gateway:
        async with gateway.chat(stream=True, model="a") as answer:
            await answer.content.readany()
            answer.close()
        await eventually(lambda: len(gateway.log.requests) == 1, "it is over")
        assert gateway.log.requests[-1]["status"] == 499
        go.touch()
        await asyncio.wait_for(load_model(gateway, "a"), 10)


async def test_streams_of_all_kinds_get_comments_while_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"
    models = {"a": server("a", "--load-until", str(go), "--progress")}
    ours = {"server": {"sse_keepalive": 0.02}}
    async with swapping(tmp_path, models, ours=ours) as gateway:
        async with gateway.chat(stream=True, model="a") as answer:
            body = b""
            while b": waiting, loading a, 100%" not in body:
                assert not answer.content.at_eof(), body[-300:]
                body += await answer.content.readany()
            go.touch()
            body += await answer.content.read()
        assert body.endswith(b"data: [DONE]\n\n")
        assert b"llama-swap" not in body
