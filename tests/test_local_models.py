"""Models that the gateway starts itself, asked for over HTTP.

The servers are real child processes (``fakeserver.py``); ``test_e2e_models.py`` does
the same with a real llama-server.
"""

import asyncio
import json
import logging
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from fakeserver import COMMAND
from gateway import USER, Gateway, error_of, eventually, running
from ggufs import write_gguf
from inferencia.config import load
from inferencia.models.offering import shipped_template
from inferencia.models.running import State
from inferencia.overlay import Flags
from localengine import llama_server, models

CHAT = "/v1/chat/completions"


def swap(*names: str, options: str = "", **keys: Any) -> str:
    """A configuration with models of these names; ``keys`` are llama-swap's."""
    command = f"{shlex.join(COMMAND)} --port ${{PORT}} {options} --model"
    more = keys.pop("each", {})
    written = {name: {"cmd": f"{command} {name}"} | more for name in names}
    limits = {"requests_per_second": 10000, "burst": 10000}
    keys.setdefault("startPort", 20000 + os.getpid() % 10000)
    return json.dumps({"swap": {"models": written} | keys, "ratelimit": limits})


def asked(model: str, **further: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "x"}]} | further


def state(gateway: Gateway, model: str) -> State:
    return gateway.parts.local.fleet.state(model).state


def pids(gateway: Gateway) -> list[int]:
    fleet = gateway.parts.local.fleet
    found = [fleet.child(name) for name in fleet.plan.models]
    return [child.pid for child in found if child is not None and child.pid is not None]


async def answer(gateway: Gateway, model: str, **further: Any) -> dict[str, Any]:
    reply = await gateway.post(CHAT, asked(model, **further), key=USER)
    assert reply.status == 200, await reply.text()
    said: dict[str, Any] = await reply.json()
    return said


async def test_a_model_is_started_when_it_is_asked_for_and_serves_on(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, swap("a", "b")) as gateway:
        assert not pids(gateway)
        first = await answer(gateway, "a")
        second = await answer(gateway, "a")
        assert first["fake"]["model"] == "a"
        assert first["fake"]["pid"] == second["fake"]["pid"]
        assert state(gateway, "b") is State.STOPPED


async def test_filters_change_what_the_model_is_sent_and_nothing_else(
    tmp_path: Path,
) -> None:
    filters = {
        "stripParams": "temperature, top_k",
        "setParams": {"seed": 7, "model": "x"},
        "setParamsByID": {"calm": {"seed": 8}},
    }
    config = swap("a", each={"filters": filters, "useModelName": "real"})
    async with running(tmp_path, config) as gateway:
        sent = (await answer(gateway, "a", temperature=1, n=1))["fake"]["request"]
        calm = (await answer(gateway, "calm", temperature=1))["fake"]["request"]
    assert sent == asked("real", n=1, seed=7)
    assert calm["seed"] == 8 and "temperature" not in calm


async def test_a_server_that_ends_while_loading_is_told_with_its_last_line(
    tmp_path: Path,
) -> None:
    options = "--crash-on-start 'out of memory: 7 GiB'"
    async with running(tmp_path, swap("a", options=options)) as gateway:
        several = await asyncio.gather(
            *(gateway.post(CHAT, asked("a"), key=USER) for _ in range(5))
        )
        for reply in several:
            assert reply.status == 503
            assert int(reply.headers["Retry-After"]) >= 1
            error = await error_of(reply)
            assert error["code"] == "model_load_failed"
            assert "out of memory: 7 GiB" in error["message"]


async def test_who_leaves_before_the_models_turn_causes_no_load(
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"
    groups = {"one": {"members": ["a", "b"]}}
    config = swap("a", "b", options=f"--chunk-until {go}", groups=groups)
    async with running(tmp_path, config) as gateway:
        fleet = gateway.parts.local.fleet
        held = asyncio.create_task(answer(gateway, "a"))
        await eventually(lambda: fleet.in_flight("a") == 1, "a serves")
        leaver = asyncio.create_task(answer(gateway, "b"))
        await eventually(lambda: state(gateway, "b") is State.QUEUED, "b is waited for")
        leaver.cancel()
        await eventually(lambda: state(gateway, "b") is State.STOPPED, "nobody waits")
        go.touch()
        assert (await held)["fake"]["model"] == "a"
        await asyncio.sleep(0)
        assert state(gateway, "b") is State.STOPPED
        assert state(gateway, "a") is State.READY
        starts = [line for line in gateway.log.lines if "starting model" in line["msg"]]
        assert len(starts) == 1


async def test_a_stream_that_waits_for_a_load_is_kept_alive_with_words(
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"
    config = json.loads(swap("a", options=f"--load-until {go}"))
    config["server"] = {"sse_keepalive": "20ms"}
    async with running(tmp_path, json.dumps(config)) as gateway:
        async with gateway.client.post(
            gateway.url + CHAT,
            json=asked("a", stream=True),
            headers={"Authorization": f"Bearer {USER}"},
        ) as reply:
            comment = await reply.content.readuntil(b"\n\n")
            while b"loading" not in comment:
                comment = await reply.content.readuntil(b"\n\n")
            go.touch()
            rest = await reply.content.read()
        assert comment.startswith(b": ")
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_a_child_that_is_killed_in_mid_answer_is_an_error_and_is_replaced(
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"
    async with running(tmp_path, swap("a", options=f"--chunk-until {go}")) as gateway:
        fleet = gateway.parts.local.fleet
        held = asyncio.create_task(gateway.post(CHAT, asked("a"), key=USER))
        await eventually(lambda: fleet.in_flight("a") == 1, "a serves")
        (pid,) = pids(gateway)
        os.kill(pid, signal.SIGKILL)
        reply = await held
        # 503 if the process was gone before the request had reached it.
        assert reply.status in (502, 503)
        error = await error_of(reply)
        assert error["code"] in ("backend_error", "backend_unavailable")
        assert 'the server of model "a" ' in error["message"]
        go.touch()
        await eventually(lambda: state(gateway, "a") is not State.READY, "it is noted")
        await gateway.parts.local.fleet.scheduler.load("a")
        assert (await answer(gateway, "a"))["fake"]["pid"] != pid


async def most_requests(gateway: Gateway, port: int | None) -> int:
    """How many requests a model's server has had at once."""
    url = f"http://127.0.0.1:{port}/fake/requests"
    async with gateway.client.get(url) as reply:
        return int((await reply.json())["most"])


async def test_who_is_cut_by_an_unloading_is_told_so(tmp_path: Path) -> None:
    config = swap("a", options=f"--chunk-until {tmp_path / 'never'}")
    async with running(tmp_path, config) as gateway:
        fleet = gateway.parts.local.fleet
        held = asyncio.create_task(gateway.post(CHAT, asked("a"), key=USER))
        await eventually(lambda: fleet.in_flight("a") == 1, "a serves")
        child = fleet.child("a")
        assert child is not None
        for _ in range(1000):
            if await most_requests(gateway, child.port):
                break
            await asyncio.sleep(0.01)
        await fleet.scheduler.unload("a", now=True)
        error = await error_of(await held)
        assert error["message"] == 'the server of model "a" was unloaded; ask again'


async def test_more_requests_than_the_limit_wait_and_are_all_answered(
    tmp_path: Path,
) -> None:
    config = swap("a", each={"concurrencyLimit": 2})
    async with running(tmp_path, config) as gateway:
        said = await asyncio.gather(*(answer(gateway, "a") for _ in range(12)))
        assert len(said) == 12
        assert len(pids(gateway)) == 1
        port = gateway.parts.local.fleet.child("a")
        assert port is not None
        assert await most_requests(gateway, port.port) <= 2


async def test_children_see_none_of_our_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = swap("a", apiKeys=["${env.SWAP_SECRET}"])
    monkeypatch.setenv("SWAP_SECRET", "swap-secret-0123456789")
    monkeypatch.setenv("INFERENCIA_API_KEY_ADMIN", "x" * 64)
    with pytest.raises(Exception, match="SWAP_SECRET"):
        async with running(tmp_path, config):
            pass
    plain = swap("a", each={"env": ["MINE=1"]})
    async with running(tmp_path, plain) as gateway:
        await answer(gateway, "a")
        child = gateway.parts.local.fleet.child("a")
        assert child is not None
        async with gateway.client.get(
            f"http://127.0.0.1:{child.port}/fake/process"
        ) as reply:
            seen = (await reply.json())["env"]
    assert seen["MINE"] == "1"
    assert not [name for name in seen if name.startswith(("INFERENCIA_", "GI_API"))]


async def test_a_selector_and_a_profile_choose_at_the_time_of_the_request(
    tmp_path: Path,
) -> None:
    config = swap(
        "a",
        "b",
        selectors={"any": {"strategy": "warm", "targets": ["a", "b"]}},
        profiles={"night": {"pins": {"a": "b", "b": None}}},
    )
    async with running(tmp_path, config) as gateway:
        await answer(gateway, "b")
        assert (await answer(gateway, "any"))["fake"]["model"] == "b"
        names = gateway.parts.local.names
        names.activate("night")
        assert (await answer(gateway, "a"))["fake"]["model"] == "b"
        assert (await gateway.post(CHAT, asked("b"), key=USER)).status == 404
        names.activate(None)
        assert (await answer(gateway, "a"))["fake"]["model"] == "a"


# --- files --------------------------------------------------------------------------


def folder_config(tmp_path: Path, *options: str) -> str:
    exe = llama_server(tmp_path, *options)
    limits = {"requests_per_second": 10000, "burst": 10000}
    llama = {"exe": str(exe)}
    folder = str(tmp_path / "models")
    return json.dumps({"models_dir": folder, "llama": llama, "ratelimit": limits})


async def test_files_are_models_and_have_a_second_name_for_goinfer(
    tmp_path: Path,
) -> None:
    models(tmp_path / "models", "small", "large")
    async with running(tmp_path, folder_config(tmp_path)) as gateway:
        listed = await (await gateway.get("/v1/models", key=USER)).json()
        assert [model["id"] for model in listed["data"]] == ["large", "small"]
        await answer(gateway, "GI_small")
        child = gateway.parts.local.fleet.child("GI_small")
        assert child is not None
        template = child.definition.command[
            child.definition.command.index("--chat-template-file") + 1
        ]
        assert template == str(shipped_template())


async def test_a_file_that_appears_is_offered_and_one_that_goes_is_not(
    tmp_path: Path,
) -> None:
    folder = models(tmp_path / "models", "one")
    async with running(tmp_path, folder_config(tmp_path)) as gateway:
        local = gateway.parts.local
        write_gguf(folder / "two.gguf", name="two")
        assert await local.look()
        await answer(gateway, "two")
        await answer(gateway, "one")
        kept = pids(gateway)
        (folder / "two.gguf").unlink()
        assert await local.look()
        assert (await gateway.post(CHAT, asked("two"), key=USER)).status == 404
        assert (await answer(gateway, "one"))["fake"]["pid"] in kept
        assert not await local.look()


async def test_a_usual_folder_that_is_made_later_is_searched_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first download or upload on a new machine makes it."""
    text = json.dumps({"llama": {"exe": str(llama_server(tmp_path))}})
    async with running(tmp_path, text, waits=False) as gateway:
        local = gateway.parts.local
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        monkeypatch.setattr(local, "_env", env)
        config = load(tmp_path / "config.yaml", {}, Flags()).config
        await local.configure(config, tmp_path)
        assert not await local.look() and local.budget is None
        models(tmp_path / "models", "late")
        assert await local.look() and local.budget
        assert (await answer(gateway, "late"))["fake"]["pid"] in pids(gateway)
        assert not await local.look()


async def test_a_file_that_cannot_be_served_is_told_once_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = models(tmp_path / "models", "one")
    (folder / "two.gguf").write_bytes((folder / "one.gguf").read_bytes()[:-9])
    async with running(tmp_path, folder_config(tmp_path)) as gateway:
        told = f'model "two" cannot be served: {folder / "two.gguf"} has '
        assert caplog.text.count(told) == 1
        (folder / "one.gguf").unlink()
        assert await gateway.parts.local.look()
        assert caplog.text.count(told) == 1
        write_gguf(folder / "two.gguf", name="two")
        assert await gateway.parts.local.look()
        assert f'found model "two" at {folder / "two.gguf"}' in caplog.text


async def test_who_asks_for_a_broken_file_is_told_what_is_wrong_if_he_may_see_it(
    tmp_path: Path,
) -> None:
    folder = models(tmp_path / "models", "one")
    whole = (folder / "one.gguf").read_bytes()
    (folder / "two.gguf").write_bytes(whole[:-9])
    keys = f"{USER} name=alice\nsk-only-one-93dd0c2b name=bob models=one\n"
    config = json.loads(folder_config(tmp_path))
    config["routing"] = {"aliases": {"second": "two"}}
    async with running(tmp_path, json.dumps(config), keys=keys) as gateway:
        for name in ("two", "GI_two", "second"):
            reply = await gateway.post(CHAT, asked(name), key=USER)
            error = await error_of(reply)
            assert (reply.status, error["code"]) == (404, "model_not_found")
            assert " cannot be served: two.gguf " in error["message"], name
            reply = await gateway.post(CHAT, asked(name), key="sk-only-one-93dd0c2b")
            assert "is not known" in (await error_of(reply))["message"], name
        reply = await gateway.get("/v1/models/two", key=USER)
        assert "two.gguf" in (await error_of(reply))["message"]
        (folder / "one.gguf").unlink()
        await gateway.parts.local.look()
        reply = await gateway.post(CHAT, asked("two"), key=USER)
        assert reply.status == 404, "it is all that there is"


async def test_the_log_says_that_an_idle_model_has_died_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, swap("a")) as gateway:
        await gateway.parts.local.fleet.scheduler.load("a")
        os.kill(pids(gateway)[0], signal.SIGKILL)
        await eventually(lambda: 'model "a" has died\n' in caplog.text, "it is told")


async def test_infer_completes_a_prompt_and_can_be_aborted(tmp_path: Path) -> None:
    go = tmp_path / "go"
    models(tmp_path / "models", "m")
    config = folder_config(tmp_path, "--chunk-until", str(go))
    async with running(tmp_path, config) as gateway:
        fleet = gateway.parts.local.fleet
        nobody = await gateway.post("/infer/abort", {}, key=USER)
        assert nobody.status == 202
        held = asyncio.create_task(
            gateway.post("/infer", {"prompt": "x", "stream": False}, key=USER)
        )
        await eventually(
            lambda: any(fleet.in_flight(m) for m in fleet.plan.models), "it runs"
        )
        assert (await gateway.post("/infer/abort", {}, key=USER)).status == 204
        aborted = await held
        assert aborted.status == 409
        assert (await error_of(aborted))["code"] == "request_aborted"
        late = await gateway.post("/infer", {"prompt": "x", "timeout": 0.05}, key=USER)
        assert late.status == 504
        go.touch()
        done = await gateway.post("/infer", {"prompt": "x"}, key=USER)
        assert done.status == 200
        assert (await done.json())["stop"] is True
