"""Several addresses with their services, TLS on them, and pages from browsers."""

import asyncio
import json
import socket
import ssl
from pathlib import Path

import aiohttp
import pytest

from certificates import make_pair
from gateway import USER, FakeEngine, behind, error_of, running
from inferencia.addresses import Address, addresses
from inferencia.settings import ServerConfig
from inferencia.sockets import CannotListen, open_sockets
from inferencia.tls import Certificate

PAGE = "https://app.example.com"
MODELS = "/v1/models"


def with_server(config: str, **server: object) -> str:
    return json.dumps(json.loads(config) | {"server": server})


def test_without_listen_there_is_one_address_for_everything() -> None:
    (address,) = addresses(ServerConfig(host="::1", port=7))
    assert (address.host, address.port) == ("::1", 7)
    assert address.offers("openai") and address.offers("metrics")


def test_an_address_without_a_host_is_on_the_servers_host() -> None:
    listen = {":1": ("openai",), "0.0.0.0:2": ("metrics",), "[::1]:3": ("llama-swap",)}
    found = addresses(ServerConfig(host="127.0.0.9", listen=listen))
    assert [(a.host, a.port) for a in found] == [
        ("127.0.0.9", 1),
        ("0.0.0.0", 2),
        ("::1", 3),
    ]
    assert [a.offers("openai") for a in found] == [True, False, True]
    assert all(a.offers("health") for a in found)


async def test_each_address_offers_its_services_and_health(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        open_at = gateway.parts.listener.open
        for services, expected in (
            ({"health", "openai"}, {MODELS: 200, "/metrics": 404, "/health": 200}),
            ({"health", "metrics"}, {MODELS: 404, "/metrics": 403, "/health": 200}),
        ):
            address = Address("127.0.0.1", 0, frozenset(services))
            _, gateway.port = await open_at("127.0.0.1", 0, address=address)
            for path, status in expected.items():
                async with gateway.get(path) as answer:
                    assert answer.status == status, (services, path)


async def test_who_asks_for_an_unknown_model_is_told_of_the_list_of_his_address(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        for service, path, listing in (
            ("openai", "/v1/chat/completions", MODELS),
            ("goinfer", "/infer", "/models"),
        ):
            address = Address("127.0.0.1", 0, frozenset({"health", service}))
            _, gateway.port = await gateway.parts.listener.open(
                "127.0.0.1", 0, address=address
            )
            asked = {"model": "nope", "prompt": "x", "messages": [{"role": "user"}]}
            async with gateway.post(path, asked) as answer:
                message = (await error_of(answer))["message"]
            assert f"GET {listing} lists all." in message


async def test_limits_are_one_budget_for_all_addresses(tmp_path: Path) -> None:
    keys = f"{USER} name=alice rps=0.001 burst=2\n"
    async with FakeEngine() as engine:
        async with running(tmp_path, behind(engine), keys=keys) as gateway:
            statuses = []
            for _ in range(3):
                _, gateway.port = await gateway.parts.listener.open("127.0.0.1", 0)
                async with gateway.get(MODELS) as answer:
                    statuses.append(answer.status)
            assert statuses == [200, 200, 429]


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        listen = {f"127.0.0.1:{engine.port}": ("openai",)}
        with pytest.raises(CannotListen, match=f"port {engine.port} is taken"):
            await open_sockets(
                gateway.parts.listener, ServerConfig(listen=listen), None, {}
            )


async def test_https_is_spoken_with_a_certificate_also_in_streams(
    tmp_path: Path,
) -> None:
    cert, key = make_pair(tmp_path, "localhost")
    certificate = Certificate(cert, key)
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        _, port = await gateway.parts.listener.open(
            "127.0.0.1", 0, tls=certificate.context
        )
        trusting = ssl.create_default_context(cafile=cert)
        url = f"https://localhost:{port}/v1/chat/completions"
        body = {"model": "m", "stream": True, "messages": [{"role": "user"}]}
        headers = {"Authorization": f"Bearer {USER}"}
        connector = aiohttp.TCPConnector(ssl=trusting, family=socket.AF_INET)
        async with aiohttp.ClientSession(connector=connector) as client:
            async with client.post(url, json=body, headers=headers) as answer:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_a_handshake_that_never_ends_is_cut(tmp_path: Path) -> None:
    certificate = Certificate(*make_pair(tmp_path, "localhost"))
    async with FakeEngine() as engine:
        config = with_server(behind(engine), header_timeout=0.1)
        async with running(tmp_path, config) as gateway:
            _, gateway.port = await gateway.parts.listener.open(
                "127.0.0.1", 0, tls=certificate.context
            )
            reader, writer = await gateway.connect()
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()


# --- pages from browsers ---------------------------------------------------------


async def test_a_preflight_of_a_listed_page_needs_no_key(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), origins=[PAGE])
        async with running(tmp_path, config) as gateway:
            asked = {
                "Origin": PAGE,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, x-stainless-os",
            }
            async with gateway.client.options(
                gateway.url + "/v1/chat/completions", headers=asked
            ) as answer:
                assert answer.status == 204
                got = answer.headers
                assert got["Access-Control-Allow-Origin"] == PAGE
                assert "POST" in got["Access-Control-Allow-Methods"]
                assert got["Access-Control-Allow-Headers"] == (
                    "authorization, content-type, x-stainless-os"
                )
                assert got["Vary"] == "Origin"
                assert "Access-Control-Allow-Credentials" not in got


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "*",
        "https://app.example.com.evil.example",
        "https://evil.example/https://app.example.com",
        "http://app.example.com",
        "https://app.example.com:8443",
        "https://APP.example.com",
        "https://app.example.co",
        "",
    ],
)
async def test_other_origins_are_never_repeated(tmp_path: Path, origin: str) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), origins=[PAGE])
        async with running(tmp_path, config) as gateway:
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            async with gateway.client.options(
                gateway.url + MODELS, headers=asked
            ) as answer:
                assert answer.status == 405
                assert "Access-Control-Allow-Origin" not in answer.headers
            async with gateway.get(MODELS, headers={"Origin": origin}) as answer:
                assert answer.status == 200
                assert "Access-Control-Allow-Origin" not in answer.headers
                assert answer.headers["Vary"] == "Origin"


async def test_streams_and_errors_can_be_read_by_a_listed_page(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), origins=[PAGE])
        async with running(tmp_path, config) as gateway:
            page = {"Origin": PAGE}
            body = {"model": "m", "stream": True, "messages": [{"role": "user"}]}
            path = "/v1/chat/completions"
            async with gateway.post(path, body, headers=page) as answer:
                assert answer.headers["Access-Control-Allow-Origin"] == PAGE
                exposed = answer.headers["Access-Control-Expose-Headers"]
                assert "X-Request-Id" in exposed
                await answer.read()
            async with gateway.post(path, body, key=None, headers=page) as answer:
                assert (await error_of(answer))["code"] == "invalid_api_key"
                assert answer.headers["Access-Control-Allow-Origin"] == PAGE


async def test_without_origins_nothing_is_said_about_them(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with gateway.get(MODELS, headers={"Origin": PAGE}) as answer:
            assert not [n for n in answer.headers if n.startswith("Access-Control")]
            assert "Vary" not in answer.headers
