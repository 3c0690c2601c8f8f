"""The admin API: models are loaded, sent here, fetched and deleted; tasks run."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from administering import API, Administrator, administering
from gateway import ADMIN, eventually
from ggufs import gguf_bytes, write_gguf
from hubserver import REPOSITORY, hub_running, stall_at
from inferencia.models import groups
from inferencia.models.downloads import MAX_RUNNING
from localengine import llama_server, models
from swapping import START_PORT, server

TINY = gguf_bytes({"general.architecture": "llama", "general.name": "Tiny"})


@contextlib.asynccontextmanager
async def housing(
    folder: Path, *names: str, options: tuple[str, ...] = (), **ours: Any
) -> AsyncIterator[Administrator]:
    """A gateway with a folder of models and a false llama-server for them."""
    found = models(folder / "models", *names)
    exe = llama_server(folder, *options)
    config = {
        "models_dir": str(found),
        "llama": {"exe": str(exe), "memory": "1GiB"},
        "ratelimit": {"requests_per_second": 10000, "burst": 10000},
    } | ours
    async with administering(folder, config) as admin:
        yield admin


def at(name: str, action: str = "") -> str:
    return f"models/{quote(name)}{action}"


async def entry(admin: Administrator, name: str) -> dict[str, Any]:
    found = await admin.get("models")
    (one,) = [one for one in found["models"] if one["id"] == name]
    return dict(one)


# --- load and unload -------------------------------------------------------------


async def test_a_model_is_described_loaded_and_unloaded(tmp_path: Path) -> None:
    async with housing(tmp_path, "qwen") as admin:
        one = await entry(admin, "qwen")
        assert (one["state"], one["backend"], one["can_delete"]) == (
            *("stopped", "local", True),
        )
        assert one["gguf"]["architecture"] == "llama"
        assert one["path"] == str(tmp_path / "models/qwen.gguf")
        status, one = await admin.ask("POST", at("qwen", "/load"))
        assert (status, one["state"]) == (200, "ready")
        assert one["loaded_since"] > one["load_seconds"] > 0
        state = await admin.get("state")
        assert [m["state"] for m in state["models"]] == ["ready"]
        assert (await admin.ask("POST", at("qwen", "/load")))[0] == 200
        status, one = await admin.ask("POST", at("qwen", "/unload"), {"now": True})
        assert (status, one["state"], one["memory"]) == (200, "stopped", None)
        assert (await admin.ask("POST", at("qwen", "/unload")))[0] == 200


async def test_a_load_can_be_left_to_itself(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    options = ("--load-until", str(gate))
    async with housing(tmp_path, "qwen", options=options) as admin:
        status, one = await admin.ask("POST", at("qwen", "/load"), {"wait": False})
        assert (status, one["state"]) == (202, "loading")
        leaving = asyncio.create_task(admin.ask("POST", at("qwen", "/load")))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait((leaving,))
        gate.touch()
        fleet = admin.gateway.parts.local.fleet
        await eventually(lambda: fleet.is_ready("qwen"), "it is loaded all the same")


async def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    options = ("--crash-on-start", "error: no such tensor")
    async with housing(tmp_path, "qwen", options=options) as admin:
        status, found = await admin.ask("POST", at("qwen", "/load"))
        assert (status, found["error"]["code"]) == (503, "model_load_failed")
        assert "no such tensor" in found["error"]["message"]
        assert "no such tensor" in await admin.get("logs?source=qwen")
        one = await entry(admin, "qwen")
        assert (one["state"], one["retry_at"] > 0) == ("failed", True)


async def test_names_with_slashes_and_markup_are_names(tmp_path: Path) -> None:
    name = "org/<b>&\"'ü/load"
    config = {
        "swap": {"models": {name: server("x")}, "startPort": START_PORT},
        "llama": {"memory": "1GiB"},
    }
    async with administering(tmp_path, config) as admin:
        assert (await admin.ask("POST", at(name, "/load")))[1]["id"] == name
        assert (await admin.get(f"logs?source={quote(name, safe='')}")) != ""
        assert (await admin.ask("POST", at(name, "/unload")))[0] == 200
        status, message = await admin.refused("DELETE", at(name))
        assert (status, "configuration" in message) == (409, True)


async def test_only_models_of_this_machine_are_loaded(tmp_path: Path) -> None:
    async with housing(tmp_path, backends=[{"name": "echo", "type": "echo"}]) as admin:
        status, message = await admin.refused("POST", at("echo", "/load"))
        assert (status, "itself" in message) == (409, True)
        assert (await admin.refused("POST", at("nobody", "/load")))[0] == 404
        (tmp_path / "models/bad.gguf").write_bytes(b"GGUF" + bytes(2000))
        await admin.gateway.parts.local.look()
        one = await entry(admin, "bad")
        assert (one["state"], bool(one["error"])) == ("broken", True)
        assert (await admin.refused("POST", at("bad", "/load")))[0] == 409


# --- upload ----------------------------------------------------------------------


async def put(
    admin: Administrator, name: str, data: Any, query: str = "", **headers: str
) -> tuple[int, Any]:
    headers = {"Content-Type": "application/octet-stream"} | headers
    path = f"models/{quote(name)}{query}"
    return await admin.ask("PUT", path, None, data=data, headers=headers)


def left(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


async def test_a_file_that_was_sent_is_a_model(tmp_path: Path) -> None:
    async with housing(tmp_path) as admin:
        status, found = await put(admin, "new one.gguf", TINY)
        assert (status, found["model"], found["size"]) == (201, "new one", len(TINY))
        assert (await admin.ask("POST", at("new one", "/load")))[0] == 200
        status, found = await put(admin, "new one.gguf", TINY, "?replace=true")
        assert (status, "unload" in found["error"]["message"]) == (409, True)
        assert (await admin.refused("DELETE", at("new one")))[0] == 409
        await admin.ask("POST", at("new one", "/unload"))
        assert (await put(admin, "new one.gguf", TINY))[0] == 409
        assert (await put(admin, "new one.gguf", TINY, "?replace=true"))[0] == 201
        status, found = await admin.ask("DELETE", at("new one"))
        assert found["deleted"] == [str(tmp_path / "models/new one.gguf")]
        assert left(tmp_path / "models") == []
        assert (await admin.refused("DELETE", at("new one")))[0] == 404


@pytest.mark.parametrize(
    ("name", "data", "kind", "status"),
    [
        ("x.gguf", b"no gguf" * 100, "application/octet-stream", 400),
        ("x.gguf", TINY[:-1], "application/octet-stream", 400),
        ("x.gguf", b"", "application/octet-stream", 400),
        ("x.bin", TINY, "application/octet-stream", 400),
        ("a/b/c.gguf", TINY, "application/octet-stream", 400),
        ("..%2fx.gguf", TINY, "application/octet-stream", 400),
        (".x.gguf", TINY, "application/octet-stream", 400),
        ("x.gguf", TINY, "application/json", 415),
        ("x.gguf", TINY, "multipart/form-data; boundary=x", 415),
    ],
)
async def test_what_is_no_model_is_not_taken(
    tmp_path: Path, name: str, data: bytes, kind: str, status: int
) -> None:
    async with housing(tmp_path) as admin:
        found = await put(admin, name, data, **{"Content-Type": kind})
        assert found[0] == status, found
        assert left(tmp_path / "models") == []


async def test_an_upload_larger_than_any_body_may_be_is_taken(tmp_path: Path) -> None:
    async with housing(tmp_path, server={"max_body": 1000}) as admin:
        assert len(TINY) > 1000
        assert (await put(admin, "big.gguf", TINY))[0] == 201


async def test_a_video_is_refused_before_it_was_sent(tmp_path: Path) -> None:
    """And so is what no disk holds: the answer comes after the first bytes, or none."""
    async with housing(tmp_path) as admin:
        head = (
            f"PUT {API}models/x.gguf HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {ADMIN}\r\n"
            "Content-Type: application/octet-stream\r\n"
        )
        video = b"\0\0\0\x20ftypisom" * 10
        request = f"{head}Content-Length: 100000000\r\n\r\n".encode() + video
        assert (await admin.gateway.raw(request)).startswith(b"HTTP/1.1 400 ")
        request = f"{head}Content-Length: {2**60}\r\n\r\n".encode()
        answer = await admin.gateway.raw(request)
        assert answer.startswith(b"HTTP/1.1 507 "), answer
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"] == (
            "insufficient_storage"
        )
        assert left(tmp_path / "models") == []


async def test_an_upload_that_nobody_will_serve_says_so(tmp_path: Path) -> None:
    config = {"backends": [{"name": "words", "type": "echo"}]}
    async with administering(tmp_path, config) as admin:
        _set(admin, HOME=str(tmp_path))
        status, answer = await put(admin, "x.gguf", TINY)
        assert (status, answer["model"]) == (201, None)
        assert answer["note"].endswith(
            "is not searched for models; name it in models_dir"
        )
    async with housing(tmp_path) as admin:
        assert (await put(admin, "y.gguf", TINY))[1]["note"] is None


async def test_a_drain_waits_for_an_upload_and_takes_no_new_one(tmp_path: Path) -> None:
    async with housing(tmp_path) as admin:
        doors, go = admin.gateway.parts.doors, asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield TINY[:100]
            await go.wait()
            yield TINY[100:]

        headers = {"Content-Type": "application/octet-stream"}
        sending = asyncio.ensure_future(
            admin.ask("PUT", "models/x.gguf", data=slowly(), headers=headers)
        )
        await eventually(lambda: bool(doors.active), "it has begun")
        doors.draining = True
        quiet = asyncio.ensure_future(doors.quiet())
        status, answer = await put(admin, "y.gguf", TINY)
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert not quiet.done()
        go.set()
        assert (await sending)[0] == 201
        await asyncio.wait_for(quiet, 5)


async def test_an_upload_beyond_the_quota_is_507_and_says_whose(tmp_path: Path) -> None:
    async with housing(tmp_path, admin={"models_quota": len(TINY) - 1}) as admin:
        status, answer = await put(admin, "x.gguf", TINY)
        assert (status, answer["error"]["code"]) == (507, "insufficient_storage")
        assert "admin.models_quota" in answer["error"]["message"]


async def test_an_upload_whose_sender_leaves_or_falls_silent_leaves_nothing(
    tmp_path: Path,
) -> None:
    async with housing(tmp_path, server={"read_timeout": "200ms"}) as admin:
        head = (
            f"PUT {API}models/sub/x.gguf HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {ADMIN}\r\nContent-Length: {len(TINY)}\r\n"
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        folder = tmp_path / "models"
        _, writer = await admin.gateway.connect()
        writer.write(head + TINY[:1000])
        await eventually(lambda: left(folder) != [], "it has begun")
        writer.transport.abort()
        await eventually(lambda: left(folder) == [], "nothing is left of it")
        answer = await admin.gateway.raw(head + TINY[:1000])
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert left(folder) == []


async def test_a_loaded_models_parts_are_not_replaced(tmp_path: Path) -> None:
    async with housing(tmp_path) as admin:
        folder = tmp_path / "models"
        for number in (1, 2):
            keys = {"split.no": number - 1, "split.count": 2}
            write_gguf(folder / f"big-0000{number}-of-00002.gguf", keys=keys)
        await admin.gateway.parts.local.look()
        assert (await admin.ask("POST", at("big", "/load")))[0] == 200
        name = "big-00002-of-00002.gguf"
        status, found = await put(admin, name, TINY, "?replace=1")
        assert (status, "unload" in found["error"]["message"]) == (409, True)


# --- downloads -------------------------------------------------------------------


async def test_a_model_is_fetched_and_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_running() as hub:
        hub.add("Tiny-Q4_K_M.gguf", TINY)
        async with housing(tmp_path) as admin:
            _set(admin, HF_ENDPOINT=hub.url)
            status, one = await admin.ask("POST", "downloads", {"model": REPOSITORY})
            assert (status, one["state"], one["id"]) == (202, "running", "d1")

            fleet = admin.gateway.parts.local.fleet
            await eventually(lambda: "Tiny-Q4_K_M" in fleet.plan.models, "it is here")
            (one,) = (await admin.get("downloads"))["downloads"]
            assert (one["state"], one["done"], one["error"]) == (
                *("done", len(TINY), None),
            )
            assert one["path"] == str(tmp_path / "models/Tiny-Q4_K_M.gguf")
            assert (await admin.ask("DELETE", "downloads/d1"))[0] == 200
            assert await admin.get("downloads") == {"downloads": []}
            assert (await admin.refused("DELETE", "downloads/d1"))[0] == 404


async def test_a_download_is_cancelled_and_goes_on_later(tmp_path: Path) -> None:
    with hub_running() as hub:
        hub.add("Tiny-Q4_K_M.gguf", TINY)
        hub.faults.append(stall_at(1000))
        async with housing(tmp_path) as admin:
            _set(admin, HF_ENDPOINT=hub.url)
            body = {"model": REPOSITORY}
            await admin.ask("POST", "downloads", body)
            assert (await admin.refused("POST", "downloads", body))[0] == 409
            partial = tmp_path / "models/Tiny-Q4_K_M.gguf.partial"
            await eventually(
                lambda: partial.exists() and partial.stat().st_size == 1000,
                "a part of it is here",
            )
            await admin.gateway.parts.local.look()
            assert (await admin.get("state"))["models"] == []
            status, one = await admin.ask("DELETE", "downloads/d1")
            assert (status, one["state"]) == (200, "cancelled")
            # Nothing of it goes on changing; all who watch would be told each time.
            assert (one["rate"], one["seconds_left"]) == (0.0, None)
            await admin.gateway.parts.local.look()
            (given_up,) = (await admin.get("state"))["models"]
            assert (given_up["id"], given_up["state"]) == ("Tiny-Q4_K_M", "broken")
            await admin.ask("POST", "downloads", body)
            done = tmp_path / "models/Tiny-Q4_K_M.gguf"
            await eventually(done.exists, "all of it is here")
            assert hub.ranges_asked()[-1] == "bytes=1000-"


async def test_downloads_that_cannot_be_are_refused_or_fail_in_words(
    tmp_path: Path,
) -> None:
    with hub_running() as hub:
        async with housing(tmp_path) as admin:
            _set(admin, HF_ENDPOINT=hub.url)
            for model in ("", "../..", "a b", 7):
                body = {"model": model}
                assert (await admin.refused("POST", "downloads", body))[0] == 400
            await admin.ask("POST", "downloads", {"model": "acme/nothing"})
            downloads = admin.gateway.parts.admin._downloads
            await eventually(
                lambda: downloads.entries[0].state == "failed", "it has failed"
            )
            (one,) = (await admin.get("downloads"))["downloads"]
            assert "acme/nothing" in one["error"]


async def test_only_so_many_downloads_run(tmp_path: Path) -> None:
    quants = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
    with hub_running() as hub:
        for quant in quants:
            hub.add(f"Tiny-{quant}.gguf", TINY)
        hub.faults.extend([stall_at(10)] * MAX_RUNNING)
        async with housing(tmp_path) as admin:
            _set(admin, HF_ENDPOINT=hub.url)
            for quant in quants[:MAX_RUNNING]:
                body = {"model": f"{REPOSITORY}:{quant}"}
                assert (await admin.ask("POST", "downloads", body))[0] == 202
            body = {"model": f"{REPOSITORY}:{quants[MAX_RUNNING]}"}
            status, message = await admin.refused("POST", "downloads", body)
            assert (status, "too many" in message) == (409, True)


def _set(admin: Administrator, **variables: str) -> None:
    admin.gateway.parts.admin._inside.env = variables


# --- tasks -----------------------------------------------------------------------


async def test_a_task_runs_and_its_output_is_followed_to_its_end(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    wait = f"sh -c 'echo one; until [ -e {gate} ]; do sleep 0.01; done; echo two'"
    tasks = {"up date": [wait, "echo <b>three"], "off": "false"}
    async with housing(tmp_path, admin={"tasks": tasks}) as admin:
        listed = (await admin.get("tasks"))["tasks"]
        assert [(t["name"], t["state"]) for t in listed] == [
            *(("up date", "idle"), ("off", "idle")),
        ]
        path = f"tasks/{quote('up date')}"
        status, one = await admin.ask("POST", path)
        assert (status, one["state"], one["step"]) == (202, "running", 1)
        assert (await admin.refused("POST", path))[0] == 409
        async with admin.stream(f"{path}/output?follow=1") as output:
            while await output.readline() != b"one\n":
                pass
            gate.touch()
            rest = (await output.read()).decode()
        assert rest.splitlines()[0] == "two"
        assert "<b>three\n" in rest
        (one, _) = (await admin.get("tasks"))["tasks"]
        assert (one["state"], one["exit_status"], one["step"]) == ("done", 0, 2)
        assert one["ended"] > one["began"]
        assert "two" in await admin.get(f"{path}/output")
        assert (await admin.refused("DELETE", path))[0] == 409
        assert (await admin.refused("POST", "tasks/other"))[0] == 404
        assert (await admin.refused("GET", "tasks/other/output"))[0] == 404


def lives(pid: str) -> bool:
    found = groups.stat(int(pid))
    return found is not None and found.is_alive


async def test_commands_are_shown_without_the_secrets_in_them(tmp_path: Path) -> None:
    tasks = {"ask": "echo --token hidden-1"}
    (tmp_path / "models").mkdir()
    (tmp_path / "models/one.args").write_text("--hf-token hidden-2\n")
    async with housing(tmp_path, "one", admin={"tasks": tasks}) as admin:
        await admin.ask("POST", "tasks/ask")
        async with admin.stream("tasks/ask/output?follow=1") as output:
            told = (await output.read()).decode()
        assert "[inferencia] $ echo --token ***\n" in told
        for path in ("tasks", "state", "models"):
            shown = json.dumps(await admin.get(path))
            assert "hidden" not in shown and "***" in shown


async def test_a_task_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {pids}; wait"
    tasks = {"long": [f'sh -c "{script}"', "echo never"]}
    async with housing(tmp_path, admin={"tasks": tasks}) as admin:
        await admin.ask("POST", "tasks/long")
        await eventually(
            lambda: pids.exists() and len(pids.read_text().split()) == 2, "it runs"
        )
        status, one = await admin.ask("DELETE", "tasks/long")
        assert (status, one["state"], one["exit_status"]) == (200, "cancelled", -15)
        for pid in pids.read_text().split():
            assert not lives(pid)
        assert "never" not in await admin.get("tasks/long/output")


async def test_a_task_stops_at_the_first_command_that_fails(tmp_path: Path) -> None:
    tasks = {"a": ["sh -c 'exit 7'", "echo never"], "b/c": "no-such-program x"}
    async with housing(tmp_path, admin={"tasks": tasks}) as admin:
        for name in tasks:
            await admin.ask("POST", f"tasks/{name}")
            async with admin.stream(f"tasks/{name}/output?follow=1") as output:
                await output.read()
        first, second = (await admin.get("tasks"))["tasks"]
        assert (first["state"], first["exit_status"], first["step"]) == (
            *("failed", 7, 1),
        )
        assert (second["state"], second["exit_status"]) == ("failed", None)
        assert "no-such-program" in second["error"]


async def test_how_a_task_ended_is_known_after_a_restart(tmp_path: Path) -> None:
    config = {"tasks": {"a": "sh -c 'exit 7'", "b": "true", "gone": "true"}}
    async with housing(tmp_path, admin=config) as admin:
        for name in ("a", "gone"):
            await admin.ask("POST", f"tasks/{name}")
            async with admin.stream(f"tasks/{name}/output?follow=1") as output:
                await output.read()
        before = (await admin.get("tasks"))["tasks"]
    record = tmp_path / "state" / "tasks.json"
    assert record.stat().st_mode & 0o777 == 0o600
    # As a gateway leaves it that was killed while a task ran.
    entries = json.loads(record.read_text())
    entries["b"] = {**entries["a"], "state": "running", "exit_status": None}
    entries["x"] = {"state": "of another version"}
    record.write_text(json.dumps(entries))
    del config["tasks"]["gone"]
    async with housing(tmp_path, admin=config) as admin:
        a, b = (await admin.get("tasks"))["tasks"]
        assert a == before[0] and (a["state"], a["exit_status"]) == ("failed", 7)
        assert (b["state"], b["error"]) == ("failed", "the gateway ended before it")
        assert "output is gone" in await admin.get("tasks/a/output")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1}', "\xff" * 100])
async def test_a_record_of_tasks_that_makes_no_sense_is_no_obstacle(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "tasks.json").write_bytes(text.encode("latin-1"))
    async with housing(tmp_path, admin={"tasks": {"a": "true"}}) as admin:
        (a,) = (await admin.get("tasks"))["tasks"]
        assert a["state"] == "idle"


async def test_a_task_sees_no_secret_and_home_is_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"env": ["env", "echo ~/x ~"]}
    async with housing(tmp_path, admin={"tasks": tasks}) as admin:
        fleet = admin.gateway.parts.local.fleet
        fleet._env = {"PATH": "/usr/bin:/bin", "INFERENCIA_TUNNEL_TOKEN": "hush"}
        admin.gateway.parts.admin._tasks._env = {"HOME": "/home/me"}
        await admin.ask("POST", "tasks/env")
        async with admin.stream("tasks/env/output?follow=1") as output:
            text = (await output.read()).decode()
        assert "PATH=" in text and "hush" not in text
        assert "\n/home/me/x /home/me\n" in text


async def test_what_runs_is_ended_with_the_gateway(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    tasks = {"long": f'sh -c "echo $$ > {pid_file}; exec sleep 60"'}
    async with housing(tmp_path, admin={"tasks": tasks}) as admin:
        await admin.ask("POST", "tasks/long")
        await eventually(
            lambda: pid_file.exists() and pid_file.read_text() != "", "it runs"
        )
    assert not lives(pid_file.read_text())
