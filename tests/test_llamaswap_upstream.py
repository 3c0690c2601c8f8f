"""/upstream: a model's own server, by plain requests and by WebSocket."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway import ADMIN, USER, eventually
from inferencia.api import swapupstream
from inferencia.errors import ShuttingDown
from rawclient import ask, bearer, request
from swapping import (
    got,
    in_flight,
    is_loaded,
    load_model,
    server,
    state,
    swapping,
)

pytestmark = pytest.mark.usefixtures("state")
assert state  # the fixture

AS_ADMIN = {"Authorization": f"Bearer {ADMIN}"}


async def test_a_request_loads_the_model_and_passes_as_it_is(tmp_path: Path) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        headers: list[tuple[str, str | bytes]] = [
            *bearer(ADMIN),
            *(("X-Api-Key", ADMIN), ("Cookie", "c=1"), ("X-Custom", "kept")),
            *(("Connection", "x-hop"), ("X-Hop", "1")),
        ]
        target = "/fake/echo/x%20y/%2F?q=1&q=%2F&r"
        data = request(
            "/upstream/a" + target, b"\x00no", method="PUT", key=None, headers=headers
        )
        reply = await ask(gateway, data)
        assert reply.status == 200
        seen = reply.json
        assert (seen["method"], seen["body"]) == ("PUT", "\x00no")
        assert seen["target"] == target
        up = seen["headers"]
        assert up["x-custom"] == "kept"
        assert not {"authorization", "x-api-key", "cookie", "x-hop"} & set(up)
        assert "inferencia" in up["via"]
        assert is_loaded(gateway, "a")
        assert in_flight(gateway, "a") == 0
        line = gateway.log.requests[-1]
        assert (line["model"], line["path"]) == ("a", "/upstream/{path}")


async def test_a_head_tells_the_length_and_has_no_body(tmp_path: Path) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        path = gateway.url + "/upstream/a/health"
        async with gateway.client.get(path, headers=AS_ADMIN) as answer:
            length = len(await answer.read())
        async with gateway.client.head(path, headers=AS_ADMIN) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Length"] == str(length)


async def test_the_longest_beginning_that_names_a_model_is_taken(
    tmp_path: Path,
) -> None:
    models = {
        "a": server("short"),
        "a/fake": server("long", aliases=["other/name", "x y"]),
    }
    async with swapping(tmp_path, models) as gateway:
        for path, model in (
            ("/upstream/a/v1/models", "short"),
            ("/upstream/a/fake/v1/models", "long"),
            ("/upstream/other/name/v1/models", "long"),
            ("/upstream/x%20y/v1/models", "long"),
        ):
            status, seen = await got(gateway, path)
            assert (status, seen["fake"]["model"]) == (200, model), path
        for path in ("/upstream/b/x", "/upstream/other/x", "/upstream/", "/upstream//"):
            status, seen = await got(gateway, path)
            assert (status, seen["error"]["code"]) == (404, "model_not_found"), path


async def test_a_bare_model_is_redirected_to_where_relative_addresses_work(
    tmp_path: Path,
) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        for method, status in (("GET", 301), ("POST", 308)):
            data = request("/upstream/a?x=1", method=method, key=ADMIN)
            reply = await ask(gateway, data)
            assert reply.status == status
            assert reply.header("location") == "/upstream/a/?x=1"
        assert not is_loaded(gateway, "a")


@pytest.mark.parametrize(
    ("location", "seen"),
    [
        ("/login?x=1", "/upstream/a/login?x=1"),
        ("http://127.0.0.1:5800/login", "/upstream/a/login"),
        ("http://127.0.0.1:5800", "/upstream/a/"),
        ("login", "login"),
        ("https://elsewhere.example/x", "https://elsewhere.example/x"),
        ("//elsewhere.example/x", "//elsewhere.example/x"),
        ("http://[::1", "http://[::1"),  # no address at all
    ],
)
def test_redirects_of_a_server_stay_below_its_name(location: str, seen: str) -> None:
    told = swapupstream._location(location, "http://127.0.0.1:5800", "/upstream/a")
    assert told == seen


async def test_what_a_browser_fetches_by_the_way_loads_no_model(tmp_path: Path) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        for path in ("/upstream/a/favicon.ico", "/upstream/a/x/app%2Ejs?v=1"):
            status, said = await got(gateway, path)
            assert (status, said["error"]["code"]) == (409, "conflict")
        assert not is_loaded(gateway, "a")
        await load_model(gateway, "a")
        assert (await got(gateway, "/upstream/a/favicon.ico"))[0] == 404  # the server's


async def test_a_streamed_answer_passes_as_it_comes_and_holds_the_model(
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"
    models = {"a": server("a", "--chunk-until", str(go))}
    async with swapping(tmp_path, models) as gateway:
        path = gateway.url + "/upstream/a/v1/chat/completions"
        body = {"stream": True, "messages": []}
        async with gateway.client.post(path, json=body, headers=AS_ADMIN) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
            assert b"word0" in await answer.content.readany()
            assert in_flight(gateway, "a") == 1
            go.touch()
            assert (await answer.content.read()).endswith(b"[DONE]\n\n")
        await eventually(lambda: in_flight(gateway, "a") == 0, "the lease is back")


async def test_who_leaves_in_the_middle_gives_the_model_back(tmp_path: Path) -> None:
    models = {"a": server("a", "--chunk-until", str(tmp_path / "never"))}
    async with swapping(tmp_path, models) as gateway:
        path = gateway.url + "/upstream/a/v1/chat/completions"
        body = {"stream": True, "messages": []}
        async with gateway.client.post(path, json=body, headers=AS_ADMIN) as answer:
            await answer.content.readany()
            answer.close()
        await eventually(lambda: in_flight(gateway, "a") == 0, "the lease is back")
        await eventually(lambda: gone(gateway) == 1, "the server was told")


def gone(gateway: Any) -> int:
    """Clients that left, as the model's server printed it."""
    log = gateway.parts.local.fleet.logs.upstream.history()
    return int(log.count("the client left"))


async def test_a_drain_waits_for_a_transfer_and_takes_no_new_one(
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"
    models = {"a": server("a", "--chunk-until", str(go))}
    async with swapping(tmp_path, models) as gateway:
        doors, path = (
            gateway.parts.doors,
            gateway.url + "/upstream/a/v1/chat/completions",
        )
        asked = gateway.client.post(path, headers=AS_ADMIN, json={"stream": True})
        async with asked as answer:
            first = await answer.content.readline()
            doors.draining = True
            quiet = asyncio.ensure_future(doors.quiet())
            status, said = await got(gateway, "/upstream/a/health")
            assert (status, said["error"]["code"]) == (503, "shutting_down")
            assert not quiet.done()
            go.touch()
            assert b"[DONE]" in first + await answer.read()
        await asyncio.wait_for(quiet, 5)


async def test_a_transfer_that_is_cut_does_not_look_whole(tmp_path: Path) -> None:
    never = str(tmp_path / "never")
    models = {"a": server("a", "--chunk-until", never)}
    async with swapping(tmp_path, models) as gateway:
        path = gateway.url + "/upstream/a/v1/chat/completions"
        asked = gateway.client.post(path, headers=AS_ADMIN, json={"stream": True})
        async with asked as answer:
            await answer.content.readline()
            (context,) = gateway.parts.doors.active
            context.interrupt(ShuttingDown("the server was shut down"))
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        await eventually(lambda: in_flight(gateway, "a") == 0, "it is given back")
        await eventually(lambda: not gateway.parts.doors.active, "it is over")
        assert gateway.log.requests[-1]["error"] == "shutting_down"


async def test_a_model_that_does_not_load_is_a_503_that_says_why(
    tmp_path: Path,
) -> None:
    models = {"a": server("a", "--crash-on-start", "error: no such file: m.gguf")}
    async with swapping(tmp_path, models) as gateway:
        status, said = await got(gateway, "/upstream/a/")
        assert (status, said["error"]["code"]) == (503, "model_load_failed")
        assert "no such file" in said["error"]["message"]


async def test_a_server_that_breaks_off_leaves_no_answer_that_looks_whole(
    tmp_path: Path,
) -> None:
    crash = tmp_path / "crash"
    never = str(tmp_path / "never")
    models = {"a": server("a", "--chunk-until", never, "--crash-when", str(crash))}
    async with swapping(tmp_path, models) as gateway:
        path = gateway.url + "/upstream/a/v1/chat/completions"
        body = {"stream": True, "messages": []}
        async with gateway.client.post(path, json=body, headers=AS_ADMIN) as answer:
            await answer.content.readany()
            crash.touch()
            with pytest.raises(aiohttp.ClientError):
                await answer.content.read()
        await eventually(lambda: in_flight(gateway, "a") == 0, "the lease is back")


@pytest.mark.parametrize("path", ["/upstream/a/health", "/logs", "/unload"])
async def test_it_takes_an_administrator_at_the_machine(
    tmp_path: Path, path: str
) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        data = request(path, method="GET", key=USER)
        assert (await ask(gateway, data)).status == 403
        via: list[tuple[str, str | bytes]]
        via = [*bearer(ADMIN), ("X-Forwarded-For", "127.0.0.1")]
        reply = await ask(gateway, request(path, method="GET", key=None, headers=via))
        assert reply.status == 403
        assert "admin.remote" in reply.error["message"]
        via = [*bearer(ADMIN), ("Origin", "https://evil.example")]
        reply = await ask(gateway, request(path, method="GET", key=None, headers=via))
        assert reply.status == (200 if path == "/logs" else 403)
        assert not is_loaded(gateway, "a")


async def test_a_narrow_administrator_reaches_its_own_models_only(
    tmp_path: Path,
) -> None:
    narrow = "sk-test-narrow-admin-11"
    keys = f"{narrow} name=narrow role=admin models=b\n"
    models = {"a": server("a"), "b": server("b")}
    async with swapping(tmp_path, models, keys=keys) as gateway:
        assert (await got(gateway, "/upstream/a/health", narrow))[0] == 404
        assert (await got(gateway, "/upstream/b/health", narrow))[0] == 200


# --- websockets ----------------------------------------------------------------------


async def test_a_websocket_passes_both_ways_and_holds_the_model(
    tmp_path: Path,
) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        path = gateway.url + "/upstream/a/fake/ws"
        async with gateway.client.ws_connect(path, headers=AS_ADMIN) as socket:
            assert in_flight(gateway, "a") == 1
            for text in ("hello", "x" * 60_000, ""):
                await socket.send_str(text)
                assert (await socket.receive()).data == text
            await socket.send_bytes(b"\x00\xff" * 10)
            assert (await socket.receive()).data == b"\x00\xff" * 10
            await socket.close()
            assert socket.close_code == 1000
        await eventually(lambda: in_flight(gateway, "a") == 0, "the lease is back")
        await eventually(
            lambda: gateway.log.requests[-1]["status"] == 101, "it is in the log"
        )
        assert gateway.log.requests[-1]["model"] == "a"


async def test_a_websocket_client_that_vanishes_gives_the_model_back(
    tmp_path: Path,
) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        path = gateway.url + "/upstream/a/fake/ws"
        socket = await gateway.client.ws_connect(path, headers=AS_ADMIN)
        assert in_flight(gateway, "a") == 1
        transport = socket.get_extra_info("socket")
        assert transport is not None
        assert socket._writer.transport is not None
        socket._writer.transport.abort()
        await eventually(lambda: in_flight(gateway, "a") == 0, "the lease is back")
        await socket.close()


async def test_the_end_of_the_server_ends_its_websockets(tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    models = {"a": server("a", "--crash-when", str(crash))}
    async with swapping(tmp_path, models) as gateway:
        path = gateway.url + "/upstream/a/fake/ws"
        async with gateway.client.ws_connect(path, headers=AS_ADMIN) as socket:
            crash.touch()
            async with asyncio.timeout(5):
                message = await socket.receive()
            closed = (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
            assert message.type in closed
        await eventually(lambda: in_flight(gateway, "a") == 0, "the lease is back")


async def test_a_server_that_speaks_no_websocket_says_so_itself(
    tmp_path: Path,
) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        path = gateway.url + "/upstream/a/nothing/here"
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await gateway.client.ws_connect(path, headers=AS_ADMIN)
        assert refused.value.status == 404
        assert in_flight(gateway, "a") == 0


async def test_a_model_can_be_kept_from_websockets(tmp_path: Path) -> None:
    models = {"a": server("a", compat={"ignoreWebsockets": True})}
    async with swapping(tmp_path, models) as gateway:
        path = gateway.url + "/upstream/a/fake/ws"
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await gateway.client.ws_connect(path, headers=AS_ADMIN)
        assert refused.value.status == 409
        assert not is_loaded(gateway, "a")


async def test_a_slow_side_holds_the_other_back(tmp_path: Path) -> None:
    async with swapping(tmp_path, {"a": server("a")}) as gateway:
        path = gateway.url + "/upstream/a/fake/ws"
        async with gateway.client.ws_connect(path, headers=AS_ADMIN) as socket:
            # Nobody reads what comes back meanwhile: both directions fill up.
            messages = 150
            sending = asyncio.create_task(_send(socket, "y" * 60_000, messages))
            for _ in range(messages):
                assert len((await socket.receive()).data) == 60_000
            await sending


async def _send(socket: Any, text: str, count: int) -> None:
    for _ in range(count):
        await socket.send_str(text)
