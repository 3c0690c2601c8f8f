"""The accepting side: deadlines, caps, partings, and what it needs of aiohttp."""

import asyncio
import contextlib
import functools
import inspect
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web, web_protocol, web_server
from aiohttp.web_protocol import RequestHandler

from gateway import (
    DONE,
    FINISH,
    LAST_CHUNK,
    PATIENCE,
    SSE_HEAD,
    Exchange,
    FakeEngine,
    Gateway,
    behind,
    chunk,
    event,
    eventually,
    running,
)
from inferencia import doorstep
from inferencia.app import connection_cap
from inferencia.downstream.connection import Connection, Guard
from inferencia.downstream.listener import is_loopback
from inferencia.middleware import malformed_response
from rawclient import CHAT_BODY, ask, connected, request, with_server

HEALTH = request("/health", method="GET", key=None)
STREAM = b'{"model":"m","stream":true,"messages":[1]}'


def are_closed(guard: Guard) -> bool:
    """Whether no client is connected any more."""
    return guard.open_connections == 0


@contextlib.asynccontextmanager
async def front(folder: Path, **server: Any) -> AsyncIterator[Gateway]:
    async with FakeEngine() as engine:
        async with running(folder, with_server(behind(engine), **server)) as gateway:
            yield gateway


# --- what is used of aiohttp that is not public --------------------------------------


def test_aiohttp_still_has_the_private_names_that_we_use() -> None:
    assert "_waiter" in RequestHandler.__slots__
    assert "_request_count" in RequestHandler.__slots__
    assert "_messages" in RequestHandler.__slots__
    assert "self._messages.append((msg, payload))" in inspect.getsource(
        RequestHandler.data_received
    )
    assert "self._current_request = None" in inspect.getsource(RequestHandler)
    assert "self._reading_paused = True" in inspect.getsource(
        RequestHandler.pause_reading
    )
    assert "self._waiter = loop.create_future()" in inspect.getsource(
        RequestHandler.start
    )
    assert "self._request_count += 1" in inspect.getsource(RequestHandler.data_received)
    assert "self._close = True" in inspect.getsource(RequestHandler.close)
    assert "_kwargs" in inspect.getsource(web_server.Server)
    assert "_ErrInfo(status=400" in inspect.getsource(web_protocol)


async def test_an_answer_is_in_our_version_of_http_whatever_was_asked(
    tmp_path: Path,
) -> None:
    """It rests on ``_cache`` of a request."""
    async with front(tmp_path) as gateway:
        for version in ("2.0", "0.9", "9.9", "1.1"):
            reply = await ask(
                gateway, HEALTH.replace(b"HTTP/1.1", b"HTTP/%b" % version.encode())
            )
            assert reply.version == "HTTP/1.1"


# --- deadlines -----------------------------------------------------------------------


async def test_a_head_must_be_complete_in_time_though_bytes_keep_coming(
    tmp_path: Path,
) -> None:
    async with front(tmp_path, header_timeout=0.2) as gateway:
        async with connected(gateway) as wire:
            began = time.monotonic()
            sending = asyncio.create_task(
                _drip(wire, b"GET /health HTTP/1.1\r\nA: bbb")
            )
            assert await wire.rest() == b""
            assert time.monotonic() - began < PATIENCE / 2
            sending.cancel()


async def _drip(wire: Any, data: bytes) -> None:
    """A byte now and then; the last one for ever."""
    for at in range(1000):
        await wire.send(data[at : at + 1] or b"b")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("first", [HEALTH, request(), request(body=STREAM)])
async def test_the_deadline_holds_for_the_second_head_of_a_connection_too(
    tmp_path: Path, first: bytes
) -> None:
    async with front(tmp_path, header_timeout=0.2) as gateway:
        async with connected(gateway) as wire:
            for _ in range(3):
                await wire.send(first)
                assert (await wire.reply()).status == 200
            await wire.send(b"GET /hea")
            assert await wire.rest() == b""


async def test_an_idle_connection_is_no_late_head(tmp_path: Path) -> None:
    async with front(tmp_path, header_timeout=0.1) as gateway:
        async with connected(gateway) as wire:
            for _ in range(3):
                await wire.send(HEALTH)
                assert (await wire.reply()).status == 200
                await asyncio.sleep(0.2)  # longer than a head may take


async def test_the_deadline_is_not_one_for_the_answer(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("hi")))
        await asyncio.sleep(0.3)  # longer than head and body may take
        await exchange.write(chunk(FINISH + DONE) + LAST_CHUNK)

    async with FakeEngine(behave=behave) as engine:
        config = with_server(behind(engine), header_timeout=0.1, read_timeout=0.1)
        async with running(tmp_path, config) as gateway:
            reply = await ask(gateway, request(body=STREAM))
            assert reply.body.endswith(DONE)


async def test_a_body_may_take_long_as_long_as_something_comes(tmp_path: Path) -> None:
    async with front(tmp_path, read_timeout=0.3, header_timeout=0.1) as gateway:
        async with connected(gateway) as wire:
            head, body = request()[: -len(CHAT_BODY)], CHAT_BODY
            await wire.send(head)
            for at in range(0, len(body), 8):  # 0.4 s in all
                await wire.send(body[at : at + 8])
                await asyncio.sleep(0.05)
            assert (await wire.reply()).status == 200


async def test_other_deadlines_hold_at_once(tmp_path: Path) -> None:
    async with front(tmp_path, header_timeout=600) as gateway:
        gateway.parts.guard.change(header_timeout=0.1, write_timeout=600)
        async with connected(gateway) as wire:
            await wire.send(b"GET")
            assert await wire.rest() == b""


async def test_a_client_that_reads_slowly_but_steadily_is_not_cut(
    tmp_path: Path,
) -> None:
    size = 6_000_000

    async def behave(exchange: Exchange) -> None:
        await exchange.answer({"choices": [], "text": "x" * size})

    async with FakeEngine(behave=behave) as engine:
        config = with_server(behind(engine), write_timeout=0.4)
        async with running(tmp_path, config) as gateway:
            async with connected(gateway) as wire:
                await wire.send(request())
                async with asyncio.timeout(PATIENCE):
                    await wire.reader.readuntil(b"\r\n\r\n")
                    got = 0
                    while got < size:
                        got += len(await wire.reader.read(400_000))
                        await asyncio.sleep(0.03)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what arrived")
async def test_a_client_that_takes_less_than_the_kernel_holds_is_not_cut(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.answer({"choices": [], "text": "x" * 20_000_000})

    async with FakeEngine(behave=behave) as engine:
        config = with_server(behind(engine), write_timeout=600)
        async with running(tmp_path, config) as gateway:
            loop = asyncio.get_running_loop()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", gateway.port))
                await loop.sock_sendall(client, request())
                guard = gateway.parts.guard

                def is_stuck() -> bool:
                    return any(c.has_unsent for c in guard._connections)

                await eventually(is_stuck, "the kernel takes no more")
                (connection,) = guard._connections
                assert connection._wire is not None
                now = loop.time()
                for _ in range(5):
                    got = 0
                    while got < 20_000:
                        got += len(await loop.sock_recv(client, 4096))
                    now += 500
                    connection.check_progress(now)
                assert not connection._wire.is_closing()
                for _ in range(2):
                    now += 601
                    connection.check_progress(now)
                assert connection._wire.is_closing()


# --- caps ----------------------------------------------------------------------------


async def test_more_connections_than_allowed_are_told_so(tmp_path: Path) -> None:
    async with front(tmp_path, max_connections=3) as gateway:
        guard = gateway.parts.guard
        async with contextlib.AsyncExitStack() as stack:
            wires = [
                await stack.enter_async_context(connected(gateway)) for _ in range(3)
            ]
            for wire in wires:
                await wire.send(HEALTH)
                assert (await wire.reply()).status == 200
            for _ in range(5):
                async with connected(gateway) as wire:
                    await wire.send(HEALTH)
                    reply = await wire.reply()
                    assert (reply.status, reply.error["code"]) == (503, "overloaded")
                    assert reply.header("Retry-After") and reply.header("X-Request-Id")
                    assert await wire.rest() == b""
            assert (guard.open_connections, guard.refused) == (3, 5)
            # Those that are in go on, and one that leaves makes room.
            await wires[0].send(HEALTH)
            assert (await wires[0].reply()).status == 200
            wires[0].close()
            await eventually(lambda: guard.open_connections == 2, "one has left")
            assert (await ask(gateway, HEALTH)).status == 200
        await eventually(lambda: guard.open_connections == 0, "all have left")
        assert all(line["level"] == "INFO" for line in gateway.log.requests)


async def test_a_flood_above_the_cap_is_reset_but_for_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorstep, "STANDING_SECONDS", 0.1)
    async with front(tmp_path, max_connections=1) as gateway:
        guard = gateway.parts.guard

        async def told(data: bytes) -> bytes:
            async with connected(gateway) as wire:
                with contextlib.suppress(ConnectionError):
                    await wire.send(data)
                    rest: bytes = await wire.rest()
                    return rest
            return b""

        async with connected(gateway) as first:
            await first.send(HEALTH)
            await first.reply()
            silent = [asyncio.ensure_future(told(b"")) for _ in range(40)]
            await eventually(lambda: guard.refused == 40, "all have come")
            assert len(guard._doorstep.standing) <= doorstep.MAX_STANDING
            assert set(await asyncio.gather(*silent)) == {b""}
            asked = [told(request(body=b"x" * 300_000)) for _ in range(40)]
            answers = await asyncio.gather(*asked)
            some = [answer for answer in answers if answer]
            assert len(some) <= doorstep.MAX_A_SECOND
            await eventually(lambda: not guard._doorstep.standing, "all are gone")
            assert guard.open_connections == 1


def test_without_a_number_the_cap_follows_the_descriptor_limit() -> None:
    assert connection_cap(7) == 7
    assert connection_cap(0) >= 1


# --- parting -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1_000, 60_000, 1_000_000])
async def test_who_sends_what_nobody_wants_reads_why_and_sees_the_end(
    tmp_path: Path, size: int
) -> None:
    async with front(tmp_path) as gateway:
        for data, status in (
            (request(body=b"x" * size, key=None, length=size + 1), 401),
            (request("/nowhere", b"x" * size, length=size + 1), 404),
            (request("/health", b"x" * size, method="PUT", length=size + 1), 405),
            (b"x" * size + b"\r\n\r\n", 400),
        ):
            async with connected(gateway) as wire:
                await wire.send(data[: size // 2])
                await wire.send(data[size // 2 :])
                assert (await wire.reply()).status == status
                assert await wire.rest() == b""


async def test_a_client_that_closes_after_a_refusal_is_let_go_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferencia.downstream.connection._LINGER_SECONDS", 600)
    async with front(tmp_path) as gateway:
        for data in (request(body=b"x", key=None, length=1000), b"garbage\r\n\r\n"):
            async with connected(gateway) as wire:
                await wire.send(data)
                await wire.reply()
                assert await wire.rest() == b""
                await wire.send(b"y" * 100)  # still on its way, and thrown away
            await eventually(
                lambda: gateway.parts.guard.open_connections == 0, "it is let go"
            )


async def test_a_client_that_never_closes_is_closed(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway, connected(gateway) as wire:
        await wire.send(request(body=b"x", key=None, length=10**9))
        await wire.reply()
        await eventually(
            lambda: gateway.parts.guard.open_connections == 0, "it is closed"
        )


async def test_closing_ends_every_connection_and_may_be_done_twice(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway:
        async with connected(gateway) as idle, connected(gateway) as half:
            await idle.send(HEALTH)
            await idle.reply()
            await half.send(b"GET /")
            await gateway.parts.listener.close()
            await gateway.parts.listener.close()
            assert await idle.rest() == b""
            assert await half.rest() == b""
            with pytest.raises(OSError):
                await gateway.connect()


# --- clients that close only their own side ------------------------------------------


async def _half_closed(gateway: Gateway, data: bytes) -> bytes:
    """All that comes to a client that closes its side after its request."""
    async with connected(gateway) as wire:
        await wire.send(data)
        wire.writer.write_eof()
        rest: bytes = await wire.rest()
        return rest


async def test_who_closes_only_its_own_side_gets_the_answers_to_what_it_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferencia.downstream.connection._HALF_CLOSED_SECONDS", 600)
    async with front(tmp_path) as gateway:
        for data, answers, end in (
            (HEALTH, 1, b"}"),
            (HEALTH * 3, 3, b"}"),
            (request("/nowhere"), 1, b"}"),
            (b"garbage\r\n\r\n", 1, b"}"),
            (request(), 1, b"}"),
            (request() * 2, 2, b"}"),
            (request(body=STREAM), 1, DONE + b"\r\n" + LAST_CHUNK),
        ):
            got = await _half_closed(gateway, data)
            assert got.count(b"HTTP/1.1 ") - got.count(b"-formed HTTP") == answers, got
            assert got.endswith(end), got
            closed = functools.partial(are_closed, gateway.parts.guard)
            await eventually(closed, "it is closed")


async def test_a_large_answer_reaches_a_client_that_closed_its_side_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it takes longer than a client may be silent that is perhaps gone."""
    monkeypatch.setattr("inferencia.downstream.connection._HALF_CLOSED_SECONDS", 0.02)
    size = 8_000_000

    async def behave(exchange: Exchange) -> None:
        await exchange.answer({"choices": [], "text": "x" * size})

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with connected(gateway) as wire:
                await wire.send(request())
                async with asyncio.timeout(PATIENCE):
                    await wire.reader.readuntil(b"\r\n\r\n")
                    wire.writer.write_eof()
                    got = 0
                    while piece := await wire.reader.read(400_000):
                        got += len(piece)
                        await asyncio.sleep(0.01)
                    assert got > size


async def test_a_client_that_closed_its_side_is_gone_if_nothing_can_be_sent_soon(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            for data in (request(), request(body=STREAM)):
                async with connected(gateway) as wire:
                    await wire.send(data)
                    exchange = await engine.asked.get()
                    began = time.monotonic()
                    wire.writer.write_eof()
                    async with asyncio.timeout(PATIENCE):
                        await exchange.gone.wait()
                    assert time.monotonic() - began < PATIENCE / 2
                    assert b"HTTP" not in await wire.rest()


async def test_half_a_request_and_then_an_end_is_no_request(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        for data in (b"", b"GET /hea", request()[:-1], HEALTH + b"GET"):
            got = await _half_closed(gateway, data)
            assert got.count(b"HTTP/1.1 200") == data.count(b"GET /health")


# --- alone ---------------------------------------------------------------------------


def test_a_guard_forgets_whom_it_never_admitted() -> None:
    guard = Guard(
        header_timeout=1,
        write_timeout=1,
        max_connections=1,
        error_response=malformed_response,
        on_malformed=lambda address: None,
    )
    one, two = object(), object()
    assert guard.admit(one)  # type: ignore[arg-type]
    assert not guard.admit(two)  # type: ignore[arg-type]
    guard.forget(two)  # type: ignore[arg-type]
    assert guard.open_connections == 1
    guard.forget(one)  # type: ignore[arg-type]
    assert (guard.open_connections, guard.refused) == (0, 1)
    assert issubclass(Connection, RequestHandler)


@pytest.mark.parametrize(
    ("host", "is_it"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.0.2.1", False),
        ("no-such-host.invalid", False),
    ],
)
def test_only_this_machine_reaches_a_loopback_address(host: str, is_it: bool) -> None:
    assert is_loopback(host) is is_it


async def test_open_and_refused_connections_are_counted(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), max_connections=1)
        async with running(tmp_path, config, waits=False) as gateway:
            _, writer = await gateway.connect()
            await eventually(
                lambda: gateway.parts.guard.open_connections == 1, "one is open"
            )
            refused_reader, refused = await gateway.connect()
            with contextlib.suppress(ConnectionError):
                assert await refused_reader.read() == b""
            shown = gateway.parts.metrics.render().decode()
            assert "inferencia_connections 1\n" in shown
            assert "inferencia_connections_refused_total 1\n" in shown
            for one in (writer, refused):
                one.close()


async def test_the_private_names_that_shortcuts_rest_on_are_still_there(
    tmp_path: Path,
) -> None:
    seen: list[object] = []

    async with front(tmp_path) as gateway:
        shortcuts = gateway.parts.shortcuts
        match, way = shortcuts._known["GET", "/health"]

        async def watching(request: web.Request) -> web.StreamResponse:
            seen.append(request.match_info)
            return await way(request)

        shortcuts._known["GET", "/health"] = (match, watching)
        async with gateway.get("/health") as answer:
            assert answer.status == 200
        assert seen == [match]
        async with gateway.get("/v1/models/m") as answer:  # has a variable part
            assert answer.status == 200
