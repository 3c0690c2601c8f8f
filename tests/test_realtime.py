"""/v1/realtime: a WebSocket between a client and the backend of its model."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from engines.real import free_port
from gateway import USER, FakeEngine, Gateway, behind, error_of, eventually, running
from inferencia.errors import ShuttingDown
from rawclient import ask, request
from scripted import listed
from tunnels import at_home, at_relay, engine_at

AS_ALICE = {"Authorization": f"Bearer {USER}"}


class Engine:
    """A server of one model that says what it was asked, then echoes."""

    def __init__(self) -> None:
        self.sockets: list[web.WebSocketResponse] = []
        self.port = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(listed("m", "deaf"))

    async def realtime(self, request: web.Request) -> web.StreamResponse:
        if request.query["model"] == "deaf":
            return web.json_response({"error": {"message": "no"}}, status=400)
        socket = web.WebSocketResponse(protocols=["realtime"])
        await socket.prepare(request)
        self.sockets.append(socket)
        await socket.send_json({"path": request.path_qs, **dict(request.headers)})
        async for message in socket:
            await socket.send_str(message.data)
        return socket


@contextlib.asynccontextmanager
async def speaking(
    folder: Path, *, further: Sequence[dict[str, Any]] = (), **options: Any
) -> AsyncIterator[tuple[Gateway, Engine]]:
    engine = Engine()
    app = web.Application()
    app.router.add_get("/v1/models", engine.models)
    app.router.add_get("/v1/realtime", engine.realtime)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine.port = runner.addresses[0][1]
    backend = {"name": "rt", "type": "openai", "url": f"http://127.0.0.1:{engine.port}"}
    config = {
        "backends": [
            backend | {"api_key": "sk-ours-1234567", "max_concurrency": 1},
            *further,
        ],
        "ratelimit": {"requests_per_second": 10000, "burst": 10000},
    }
    try:
        async with running(folder, json.dumps(config | options)) as gateway:
            yield gateway, engine
    finally:
        await runner.cleanup()


async def test_a_session_passes_both_ways_without_the_clients_key(
    tmp_path: Path,
) -> None:
    async with speaking(tmp_path) as (gateway, _):
        url = gateway.url + "/v1/realtime?model=m&key=sk-x&voice=a%20b"
        protocols = ("realtime", "openai-insecure-api-key.sk-x")
        async with gateway.client.ws_connect(
            url, headers=AS_ALICE | {"OpenAI-Beta": "realtime=v1"}, protocols=protocols
        ) as socket:
            assert socket.protocol == "realtime"
            seen = await socket.receive_json()
            assert seen["path"] == "/v1/realtime?model=m&voice=a+b"
            assert seen["Authorization"] == "Bearer sk-ours-1234567"
            assert seen["Sec-WebSocket-Protocol"] == "realtime"
            assert seen["Openai-Beta"] == "realtime=v1"
            assert USER not in json.dumps(seen) and "sk-x" not in json.dumps(seen)
            await socket.send_str("hello")
            assert await socket.receive_str() == "hello"
            (backend,) = gateway.parts.catalogue.backends
            assert backend.held == 1
        await eventually(lambda: len(gateway.log.requests) == 1, "it is over")
        line = gateway.log.requests[0]
        assert (line["status"], line["model"], line["backend"]) == (101, "m", "rt")
        assert backend.held == 0


async def test_a_session_needs_a_key_a_model_and_a_handshake(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (gateway, _):
        url = gateway.url + "/v1/realtime?model="
        for model, headers, status in (
            ("m", {}, 401),
            ("nobody", AS_ALICE, 404),
            ("deaf", AS_ALICE, 400),
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await gateway.client.ws_connect(url + model, headers=headers)
            assert refused.value.status == status
        async with gateway.get("/v1/realtime?model=m") as answer:
            assert answer.status == 400
            assert (await error_of(answer))["code"] == "invalid_request"


HANDSHAKE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Version", "13"),
]


async def test_a_backend_that_is_gone_is_a_503(tmp_path: Path) -> None:
    engine = FakeEngine("m")
    async with engine, running(tmp_path, behind(engine)) as gateway:
        await engine.stop()
        path = "/v1/realtime?model=m"
        reply = await ask(gateway, request(path, method="GET", headers=HANDSHAKE))
        assert (reply.status, reply.error["code"]) == (503, "backend_unavailable")


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("https://127.0.0.1:{port}", "does not complete the TLS handshake"),
        ("http://" + 64 * "a" + ".test", "its host name does not resolve"),
    ],
)
async def test_why_a_backend_cannot_be_connected_to_is_told(
    tmp_path: Path, place: str, why: str
) -> None:
    def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 no TLS here\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        url = place.format(port=server.sockets[0].getsockname()[1])
        backend = {"name": "b", "type": "openai", "url": url, "models": ["m"]}
        config = json.dumps({"backends": [backend]})
        async with running(tmp_path, config) as gateway:
            path = "/v1/realtime?model=m"
            reply = await ask(gateway, request(path, method="GET", headers=HANDSHAKE))
            assert reply.status == 503
            assert why in reply.error["message"]


async def test_the_end_of_the_daemon_is_told_in_a_close_frame(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (gateway, _):
        url = gateway.url + "/v1/realtime?model=m"
        async with gateway.client.ws_connect(url, headers=AS_ALICE) as socket:
            await socket.receive_json()
            (context,) = gateway.parts.doors.active
            context.interrupt(ShuttingDown("we are going"))
            async with asyncio.timeout(5):
                message = await socket.receive()
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert (message.data, message.extra) == (1001, "we are going")


async def test_the_server_hears_that_the_client_has_left(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (gateway, engine):
        url = gateway.url + "/v1/realtime?model=m"
        socket = await gateway.client.ws_connect(url, headers=AS_ALICE)
        await socket.receive_json()
        transport = socket._writer.transport
        assert transport is not None
        transport.abort()
        (there,) = engine.sockets
        await eventually(lambda: there.closed, "the server knows")
        await eventually(lambda: not gateway.parts.doors.active, "it is over")
        await socket.close()


async def test_a_session_waits_for_a_free_place(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (gateway, engine):
        line, url = gateway.parts.line, gateway.url + "/v1/realtime?model=m"
        async with gateway.client.ws_connect(url, headers=AS_ALICE) as first:
            await first.receive_json()
            waiting = [
                asyncio.ensure_future(gateway.client.ws_connect(url, headers=AS_ALICE))
                for _ in range(2)
            ]
            await eventually(lambda: len(line) == 2, "both wait")
            waiting[0].cancel()
            await eventually(lambda: len(line) == 1, "who leaves is forgotten")
            assert len(engine.sockets) == 1
        async with await waiting[1] as second:
            await second.receive_json()
        await eventually(lambda: not gateway.parts.doors.active, "it is over")


async def test_a_session_of_a_model_that_is_gone_goes_to_the_fallback(
    tmp_path: Path,
) -> None:
    gone = {"name": "gone", "type": "openai", "url": f"http://127.0.0.1:{free_port()}"}
    async with speaking(
        tmp_path,
        further=[gone | {"models": ["lost"]}],
        routing={"fallbacks": {"lost": ["m"]}},
    ) as (gateway, _):
        url = gateway.url + "/v1/realtime?model=lost"
        async with gateway.client.ws_connect(url, headers=AS_ALICE) as socket:
            assert (await socket.receive_json())["path"] == "/v1/realtime?model=m"
        await eventually(lambda: len(gateway.log.requests) == 1, "it is over")
        assert gateway.log.requests[0]["backend"] == "rt"


async def test_a_model_behind_a_tunnel_takes_no_websocket_and_keeps_its_backend(
    tmp_path: Path,
) -> None:
    async with (
        FakeEngine() as engine,
        at_relay(tmp_path) as relay,
        at_home(tmp_path, relay.url, backends=[engine_at(engine.url)]),
    ):
        await relay.has()
        url = relay.url + "/v1/realtime?model=m"
        for _ in range(10):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await relay.client.ws_connect(url, headers=AS_ALICE)
            assert refused.value.status == 400
        async with relay.chat() as answer:
            assert answer.status == 200, "nobody shuts a backend by asking so"
