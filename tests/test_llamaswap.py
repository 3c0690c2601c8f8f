"""llama-swap's service: what runs, unloading, lists, profiles, requests in flight."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gateway import ADMIN, USER, eventually
from inferencia.addresses import Address
from inferencia.api import swapevents
from inferencia.api.llamaswap import without_secrets
from inferencia.sse import EventSplitter, parse
from swapping import got, in_flight, is_loaded, load_model, server, state, swapping

pytestmark = pytest.mark.usefixtures("state")
assert state  # the fixture

CHAT = "/v1/chat/completions"
QUESTION = {"model": "a", "messages": [{"role": "user", "content": "hello"}]}
AS_ADMIN = {"Authorization": f"Bearer {ADMIN}"}


# --- what runs -----------------------------------------------------------------------


async def test_running_shows_what_is_not_stopped_in_llama_swaps_words(
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"
    models = {
        "a": server("a", "--load-until", str(go), name="A", description="first", ttl=9),
        "b": server("b"),
    }
    async with swapping(tmp_path, models) as gateway:
        assert await got(gateway, "/running", USER) == (200, {"running": []})
        loading = asyncio.create_task(load_model(gateway, "a"))
        await eventually(
            lambda: gateway.parts.local.fleet.child("a") is not None, "it starts"
        )
        _, said = await got(gateway, "/running", USER)
        (one,) = said["running"]
        assert (one["model"], one["state"]) == ("a", "starting")
        go.touch()
        await loading
        _, said = await got(gateway, "/running", USER)
        (one,) = said["running"]
        assert list(one) == [
            *("model", "state", "cmd", "proxy", "ttl", "name", "description")
        ]
        assert (one["state"], one["ttl"]) == ("ready", 9)
        assert (one["name"], one["description"]) == ("A", "first")
        port = one["proxy"].rpartition(":")[2]
        assert one["cmd"].endswith(f"--port {port}")


async def test_running_shows_a_key_only_models_that_it_may_use(tmp_path: Path) -> None:
    narrow = "sk-test-narrow-33333"
    keys = f"{narrow} name=narrow models=b\n"
    async with swapping(tmp_path, {"a": server("a")}, keys=keys) as gateway:
        await load_model(gateway, "a")
        assert await got(gateway, "/running", narrow) == (200, {"running": []})


def test_a_command_is_shown_without_its_secrets() -> None:
    command = ("srv", "--api-key", "hunter2", "--hf-token=abc", "-m", "a b", "--key")
    shown = "srv --api-key *** --hf-token=*** -m 'a b' --key"
    assert without_secrets(command) == shown
    assert without_secrets(("s", "--tokenizer", "x")) == "s --tokenizer x"


async def test_models_are_unloaded_one_or_all(tmp_path: Path) -> None:
    models = {"x/a": server("a", aliases=["alias"]), "b": server("b")}
    groups = {"g": {"swap": False, "members": ["x/a", "b"]}}
    async with swapping(tmp_path, models, groups=groups) as gateway:
        await load_model(gateway, "x/a")
        await load_model(gateway, "b")
        unload = "/api/models/unload"
        assert await got(gateway, f"{unload}/alias", method="POST") == (200, "OK")
        assert (is_loaded(gateway, "x/a"), is_loaded(gateway, "b")) == (False, True)
        assert await got(gateway, f"{unload}/x/a", method="POST") == (200, "OK")
        assert await got(gateway, unload, method="POST") == (200, {"msg": "ok"})
        assert not is_loaded(gateway, "b")
        await load_model(gateway, "b")
        assert await got(gateway, "/unload") == (200, "OK")
        assert not is_loaded(gateway, "b")
        status, said = await got(gateway, f"{unload}/nobody", method="POST")
        assert (status, said["error"]["code"]) == (404, "model_not_found")


# --- lists ---------------------------------------------------------------------------


async def test_the_list_of_models_is_goinfers_where_that_service_is_and_else_ours(
    tmp_path: Path,
) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        goinfers: dict[str, Any] = {"count": 0, "models": {}}
        assert await got(gateway, "/models", USER) == (200, goinfers)
        for services, shape in (
            ({"models"}, goinfers),
            ({"goinfer"}, goinfers),
            ({"llama-swap", "goinfer"}, goinfers),
            ({"llama-swap"}, None),
        ):
            address = Address("127.0.0.1", 0, frozenset(services))
            _, gateway.port = await gateway.parts.listener.open(
                "127.0.0.1", 0, address=address
            )
            status, said = await got(gateway, "/models", USER)
            assert status == 200
            if shape is None:
                assert [entry["id"] for entry in said["data"]] == ["a"]
            else:
                assert said == shape
        address = Address("127.0.0.1", 0, frozenset({"openai"}))
        _, gateway.port = await gateway.parts.listener.open(
            "127.0.0.1", 0, address=address
        )
        assert (await got(gateway, "/models", USER))[0] == 404
        assert (await got(gateway, "/unload"))[0] == 404


async def test_the_version_serves_clients_of_both(tmp_path: Path) -> None:
    async with swapping(tmp_path, {}) as gateway:
        status, said = await got(gateway, "/api/version", USER)
        assert status == 200
        assert set(said) == {"version", "commit", "build_date"}
        async with gateway.client.get(gateway.url + "/wol-health") as answer:
            assert await answer.text() == "OK"


@pytest.mark.parametrize(
    "path",
    ["/api/captures/1", "/api/performance", "/api/hardware", "/ui/models", "/comfyui/"],
)
async def test_what_is_left_out_says_why(tmp_path: Path, path: str) -> None:
    async with swapping(tmp_path, {}) as gateway:
        status, said = await got(gateway, path)
        assert status == 404
        assert "is not offered here: " in said["error"]["message"]


# --- model routes --------------------------------------------------------------------


async def test_paths_without_a_version_reach_the_server_without_it(
    tmp_path: Path,
) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        for path, behind in (
            ("/v/completions", "/completions"),
            ("/sdapi/v1/txt2img", "/sdapi/v1/txt2img"),
            ("/audioapi/v1/tasks/run", "/v1/tasks/run"),
        ):
            # The fake server has none of them; that it was asked shows in its answer.
            status, said = await got(
                gateway, path, USER, "POST", json=QUESTION, data=None
            )
            assert (status, said["error"]["message"]) == (404, "File Not Found")
            assert gateway.log.requests[-1]["model"] == "a", behind
        status, said = await got(gateway, "/props?model=a", USER)
        assert (status, said["model_path"]) == (200, "a")


# --- profiles ------------------------------------------------------------------------


async def test_a_profile_can_be_switched_on_and_off(tmp_path: Path) -> None:
    models = {"a": server("a"), "b": server("b")}
    profiles = {"night": {"description": "small", "pins": {"a": "b", "c": None}}}
    async with swapping(tmp_path, models, profiles=profiles) as gateway:
        pins = {"a": "b", "c": None}
        shown = [{"name": "night", "description": "small", "pins": pins}]
        listed = {"active": None, "profiles": shown}
        assert await got(gateway, "/api/profiles") == (200, listed)

        async def put(body: Any) -> tuple[int, Any]:
            return await got(gateway, "/api/profiles/active", method="PUT", json=body)

        assert await put({"name": "night"}) == (200, {"active": "night"})
        _, said = await got(gateway, CHAT, USER, "POST", json=QUESTION)
        assert said["fake"]["model"] == "b"
        assert (await got(gateway, "/api/profiles"))[1]["active"] == "night"
        assert await put({"name": None}) == (200, {"active": None})
        assert (await put({"name": "day"}))[0] == 404
        for wrong in ({}, {"name": 1}, {"name": ""}):
            assert (await put(wrong))[0] == 400


# --- requests ------------------------------------------------------------------------


async def test_an_administrator_can_end_a_request_in_flight(tmp_path: Path) -> None:
    models = {"a": server("a", "--chunk-until", str(tmp_path / "never"))}
    async with swapping(tmp_path, models) as gateway:
        headers = {"X-Request-Id": "req/1"}
        asked = gateway.post(CHAT, QUESTION | {"stream": True}, headers=headers)
        async with asked as answer:
            assert b"word0" in await answer.content.readany()
            cancel = "/api/inflight/req/1/cancel"
            assert (await got(gateway, cancel, USER, "POST"))[0] == 403
            assert (await got(gateway, cancel, method="POST"))[0] == 200
            rest = (await answer.content.read()).decode()
            assert "request_aborted" in rest
            assert "[DONE]" not in rest
        await eventually(lambda: in_flight(gateway, "a") == 0, "the lease is back")
        assert (await got(gateway, cancel, method="POST"))[0] == 404


async def test_requests_that_have_ended_are_shown_page_by_page(tmp_path: Path) -> None:
    models = {"a": server("a", aliases=["b"])}
    async with swapping(tmp_path, models) as gateway:
        path = "/api/metrics/activity"
        status, said = await got(gateway, path)
        assert (status, said["error"]["code"]) == (404, "not_found")
        await gateway.parts.usage.open(tmp_path / "usage.sqlite3", 1e6)
        try:
            for _ in range(3):
                async with gateway.chat(model="a") as answer:
                    assert answer.status == 200
            async with gateway.chat(model="nobody") as answer:
                assert answer.status == 404
            status, page = await got(gateway, f"{path}?limit=2&page=2&model=a")
            assert status == 200
            assert [
                page[name] for name in ("page", "limit", "total", "total_pages")
            ] == [*(2, 2, 3, 2)]
            (one,) = page["data"]
            assert (one["model"], one["req_path"]) == ("a", CHAT)
            assert one["resp_status_code"] == 200
            assert one["tokens"]["input_tokens"] == 5
            assert one["tokens"]["output_tokens"] == 3
            assert one["metadata"]["key"] == "alice"
            _, page = await got(gateway, f"{path}?sort=id&order=asc")
            ids = [one["id"] for one in page["data"]]
            assert ids == sorted(ids) and len(ids) == 4
            _, later = await got(gateway, f"{path}?min_id={ids[2]}")
            assert later["total"] == 2
            _, none = await got(gateway, f"{path}?end=2020-01-01T00:00:00Z")
            assert (none["total"], none["data"]) == (0, [])
            for wrong in ("limit=0", "page=x", "sort=key;--", "order=up", "start=now"):
                assert (await got(gateway, f"{path}?{wrong}"))[0] == 400, wrong
        finally:
            await gateway.parts.usage.close()


# --- events --------------------------------------------------------------------------


class Events:
    """The events of one stream, as they come."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self._splitter = EventSplitter()
        self.seen: list[tuple[str, Any]] = []

    async def next(self, kind: str, good: Any = lambda data: True) -> Any:
        """The next event of a kind that is good."""
        async with asyncio.timeout(10):
            while True:
                while self.seen:
                    name, data = self.seen.pop(0)
                    if name == kind and good(data):
                        return data
                piece = await self._answer.content.readany()
                assert piece, f"the stream ended before {kind}"
                for raw in self._splitter.feed(piece):
                    event = parse(raw)
                    if event.is_comment:
                        continue
                    message = json.loads(event.data)
                    self.seen.append((message["type"], json.loads(message["data"])))


async def test_events_tell_of_models_logs_requests_and_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swapevents, "SAMPLE_SECONDS", 0.02)
    go = tmp_path / "go"
    models = {
        "a": server("a", "--chunk-until", str(go), name="A", aliases=["x"]),
        "b": server("b", unlisted=True),
    }
    peers = {"far": {"proxy": "http://127.0.0.1:9", "models": ["big"]}}
    profiles = {"p": {"pins": {"z": "a"}}}
    async with swapping(tmp_path, models, peers=peers, profiles=profiles) as gateway:
        url = gateway.url + "/api/events"
        async with gateway.client.get(url, headers=AS_ADMIN) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
            assert answer.headers["X-Accel-Buffering"] == "no"
            events = Events(answer)
            first = {one["id"]: one for one in await events.next("modelStatus")}
            assert set(first) == {"a", "b", "big"}
            assert first["a"]["aliases"] == ["x"]
            assert (first["a"]["name"], first["a"]["state"]) == ("A", "stopped")
            assert first["b"]["unlisted"] is True
            assert first["big"]["peerID"] == "far"

            asked = asyncio.create_task(
                _read(gateway.post(CHAT, QUESTION | {"stream": True}))
            )

            def is_ready(data: Any) -> bool:
                return any(one["state"] == "ready" for one in data)

            def is_running(data: Any) -> bool:
                return any(one["model"] == "a" for one in data["requests"])

            def is_printed(data: Any) -> bool:
                return data["source"] == "upstream" and "model loaded" in data["data"]

            await events.next("modelStatus", is_ready)
            running = await events.next("inflight", is_running)
            (one,) = running["requests"]
            assert (one["req_path"], one["method"]) == (CHAT, "POST")
            assert one["metadata"] == {"key": "alice"}
            go.touch()
            await asked
            await events.next("activity")
            put = got(gateway, "/api/profiles/active", method="PUT", json={"name": "p"})
            assert (await put)[0] == 200
            assert await events.next("profileChanged") == {"active": "p"}

            second = gateway.client.get(url, headers=AS_ADMIN)
            async with second as late:
                assert is_printed(await Events(late).next("logData", is_printed))

            gateway.parts.swap.end_streams()
            async with asyncio.timeout(5):
                await answer.content.read()


async def _read(asked: Any) -> bytes:
    async with asked as answer:
        return bytes(await answer.read())


async def test_who_stops_to_follow_leaves_nothing_behind(tmp_path: Path) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        fleet = gateway.parts.local.fleet
        url = gateway.url + "/api/events"
        async with gateway.client.get(url, headers=AS_ADMIN) as answer:
            await Events(answer).next("modelStatus")
            assert fleet.logs.proxy.followers == 1
            answer.close()
        await eventually(lambda: fleet.logs.proxy.followers == 0, "nobody follows")
        await eventually(lambda: not fleet._followers, "nobody follows")


# --- logs ----------------------------------------------------------------------------


async def test_logs_hold_what_log_to_stdout_says(tmp_path: Path) -> None:
    for log_to, ours, models in (
        ("proxy", True, False),
        ("upstream", False, True),
        ("both", True, True),
        ("none", False, False),
    ):
        folder = tmp_path / log_to
        folder.mkdir()
        async with swapping(folder, {"a": server("a")}, logToStdout=log_to) as gateway:
            await load_model(gateway, "a")
            _, text = await got(gateway, "/logs")
            assert ("is ready after" in text) == ours, log_to
            assert ("model loaded: a" in text) == models, log_to
            own = gateway.log.text
            assert ("model loaded: a" in own) == (log_to in ("upstream", "both"))
            # Whatever it says, each has a log of its own, and nothing is there twice.
            _, text = await got(gateway, "/api/version")
            everything = gateway.parts.local.fleet.logs.everything.history()
            assert everything.count("model loaded: a") == 1


async def test_a_log_is_streamed_as_it_comes(tmp_path: Path) -> None:
    models = {"x/a": server("a", aliases=["alias"]), "b": server("b")}
    async with swapping(tmp_path, models) as gateway:
        await load_model(gateway, "b")

        def stream(path: str) -> Any:
            return gateway.client.get(gateway.url + path, headers=AS_ADMIN)

        async with (
            stream("/logs/stream/alias") as one,
            stream("/logs/stream/upstream") as both,
            stream("/logs/stream/upstream?no-history") as news,
            stream("/logs/stream/proxy") as own,
            stream("/logs/stream") as main,
        ):
            assert one.headers["Content-Type"] == "text/plain; charset=utf-8"
            await load_model(gateway, "x/a")
            assert "loaded: b" not in await _until(one, "model loaded: a")
            assert "loaded: b" in await _until(both, "model loaded: a")
            assert "loaded: b" not in await _until(news, "model loaded: a")
            await _until(own, 'model \\"x/a\\" is ready')
            await _until(main, 'model \\"x/a\\" is ready')
            gateway.parts.swap.end_streams()
            async with asyncio.timeout(5):
                await one.content.read()
        status, said = await got(gateway, "/logs/stream/nobody")
        assert (status, said["error"]["code"]) == (404, "not_found")


async def _until(answer: Any, wanted: str) -> str:
    text = ""
    async with asyncio.timeout(10):
        while wanted not in text:
            piece = await answer.content.readany()
            assert piece, f"it ended before {wanted}"
            text += piece.decode()
    return text


async def test_no_secret_gets_into_a_log(tmp_path: Path) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        async with gateway.get(f"/nowhere?key={USER}") as answer:
            assert answer.status == 404
        _, text = await got(gateway, "/logs")
        assert '"status": 404' in text
        assert USER not in text
