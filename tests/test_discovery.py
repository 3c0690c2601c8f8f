"""Promises of ``discovery.py``: what runs here is found, and nothing else is."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

import pytest

from inferencia.discovery import PORTS, Found, State, find_servers
from scripted import Script, Scripted, always, listed, response

MLX = "BaseHTTP/0.6 Python/3.11.7"
ERROR = {"error": {"message": "no", "type": "authentication_error", "code": 401}}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error"}}


async def found_by(script: Script, guess: str = "llamacpp") -> Found:
    """What comes of one scripted server."""
    async with Scripted(script) as server:
        (found,) = await find_servers({server.port: guess})
    assert found.port == server.port
    return found


def test_the_ports_of_the_contract_are_looked_at() -> None:
    assert list(PORTS) == [11973, 11434, 1234, 8000, 8080, 8081, 10240]


@pytest.mark.parametrize("guess", ["mlx", "ollama", "lmstudio", "vllm", "llamacpp"])
async def test_a_server_with_a_list_is_what_usually_listens_there(guess: str) -> None:
    found = await found_by(always(response(listed("a", "/models/b"))), guess)
    assert (found.type, found.state) == (guess, State.SERVES)
    assert found.models == ("a", "b")
    assert found.url == f"http://127.0.0.1:{found.port}"
    assert found.is_usable


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (response(listed("a"), server="llama.cpp"), "llamacpp"),
        (response(listed("/m/a"), server=MLX, version="1.0", length=False), "mlx"),
        (response(listed("a", owned_by="llama-swap")), "openai"),
        (response(listed("a", owned_by="vllm"), server="uvicorn"), "vllm"),
        (response(listed("a"), server="uvicorn"), "lmstudio"),
    ],
)
async def test_what_the_answer_says_outweighs_the_port(
    answer: bytes, kind: str
) -> None:
    assert (await found_by(always(answer), "lmstudio")).type == kind


@pytest.mark.parametrize("body", [b"", b'{"object": "list", "data": []}'])
async def test_mlx_with_no_list_serves_its_loaded_model(body: bytes) -> None:
    found = await found_by(
        always(response(body, server=MLX, version="1.0", length=False))
    )
    assert (found.type, found.models) == ("mlx", ("default_model",))
    assert found.is_usable


async def test_an_empty_list_of_another_server_counts_and_shows_no_models() -> None:
    found = await found_by(always(response(listed())), "ollama")
    assert (found.state, found.models) == (State.SERVES, ())


@pytest.mark.parametrize(
    "answer",
    [
        response(b""),
        response(b"<html>hello</html>"),
        response({"models": []}),
        response([{"id": "a"}]),
        response(b"Not Found", status=404),
        response(b"", status=302),
        response(b"<html>log in</html>", status=401),
        response(b"{}", status=503),
        response(b'{"data": ' + b"[" * 100_000),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
        b"\x00" * 1000,
    ],
)
async def test_what_does_not_answer_with_a_list_is_missing(answer: bytes) -> None:
    found = await found_by(always(answer))
    assert found.state is State.MISSING
    assert not found.is_usable


@pytest.mark.parametrize("status", [200, 401])
async def test_another_inferencia_is_never_found(status: int) -> None:
    body = listed("a") if status == 200 else ERROR
    answer = response(body, status=status, server="inferencia/0.1.0")
    assert (await found_by(always(answer))).state is State.MISSING


async def test_a_server_that_wants_a_key_is_told_and_not_used() -> None:
    found = await found_by(always(response(ERROR, status=401, server="llama.cpp")))
    assert (found.state, found.type) == (State.NEEDS_A_KEY, "llamacpp")
    assert not found.is_usable


async def test_a_server_that_is_loading_is_told_and_not_used() -> None:
    found = await found_by(always(response(LOADING, status=503, server="llama.cpp")))
    assert (found.state, found.is_usable) == (State.IS_LOADING, False)


async def test_nothing_of_ours_is_sent_to_strangers() -> None:
    async with Scripted(always(response(listed("a")))) as server:
        await find_servers({server.port: "openai"})
    (received,) = server.received
    assert (received.method, received.target) == ("GET", "/v1/models")
    names = {name.lower() for name, _ in received.headers}
    assert not names & {"authorization", "x-api-key", "via", "cookie"}


@contextlib.asynccontextmanager
async def closed_port() -> AsyncIterator[int]:
    async with Scripted(always(None)) as server:
        port = server.port
    yield port


async def test_every_port_has_its_finding_in_the_given_order() -> None:
    async with (
        Scripted(always(response(listed("a")))) as one,
        closed_port() as nothing,
        Scripted(always(response(listed("b")))) as two,
    ):
        ports: Mapping[int, str] = {
            two.port: "ollama",
            nothing: "mlx",
            one.port: "vllm",
        }
        found = await find_servers(ports)
    assert [(f.port, f.type, f.state) for f in found] == [
        (two.port, "ollama", State.SERVES),
        (nothing, "mlx", State.MISSING),
        (one.port, "vllm", State.SERVES),
    ]


async def test_our_own_port_is_not_asked() -> None:
    async with Scripted(always(response(listed("a")))) as server:
        found = await find_servers({server.port: "openai"}, own_ports=[server.port])
        assert found == []
        assert server.received == []


async def test_servers_that_say_nothing_do_not_add_up_their_time() -> None:
    async with contextlib.AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(Scripted(always(None))) for _ in range(7)
        ]
        ports = {server.port: "openai" for server in servers}
        loop = asyncio.get_running_loop()
        begun = loop.time()
        found = await find_servers(ports, seconds=0.2)
        assert loop.time() - begun < 7 * 0.2
    assert {finding.state for finding in found} == {State.MISSING}


async def test_a_server_on_the_other_loopback_address_is_found_there() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(response(listed("a")))
        await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(serve, "::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback address")
    async with server:
        port = server.sockets[0].getsockname()[1]
        (found,) = await find_servers({port: "ollama"})
    assert (found.state, found.url) == (State.SERVES, f"http://[::1]:{port}")
