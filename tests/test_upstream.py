"""Promises of the upstream client, kept against raw sockets that behave and misbehave.

The peer of every test is a script on a real socket: it sees the very bytes that were
sent and answers with bytes, good or bad.
"""

import asyncio
import contextlib
import logging
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from inferencia.upstream.answer import (
    Answer,
    BadAnswer,
    ConnectFailed,
    Disconnected,
    Silent,
    Truncated,
    Untrusted,
    UpstreamError,
)
from inferencia.upstream.connection import Connection
from inferencia.upstream.origin import Origin
from inferencia.upstream.pool import Upstream
from inferencia.upstream.socketanswer import MAX_HELD_BYTES
from seeds import seeds

# Longer than anything here takes; only a hang reaches it.
PATIENCE = 10.0
# A silence that is too long, where a test waits for one.
MOMENT = 0.05

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Wire:
    """The peer's end of one connection."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: "Writer"):
        self.number = number  # 1 for the first connection that the peer took
        self.reader = reader
        self.writer = writer
        self.gone = asyncio.Event()  # the client's side has closed

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self) -> bytes:
        """One request, head and body."""
        head = await self.head()
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name == b"Content-Length":
                return head + await self.reader.readexactly(int(value))
        return head

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def closed(self) -> None:
        """Wait until the client has closed; what it still sends is thrown away."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self.gone.set()

    def reset(self) -> None:
        """Close with a reset instead of an end."""
        sock = self.writer.get_extra_info("socket")
        linger = struct.pack("ii", 1, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


Writer = asyncio.StreamWriter
Script = Callable[[Wire], Awaitable[None]]


class Peer:
    """A server that runs a script on every connection and closes it afterwards."""

    def __init__(self, script: Script, context: ssl.SSLContext | None = None) -> None:
        self.wires: list[Wire] = []
        self._script = script
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", 0, ssl=self._context
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for wire in self.wires:
            # What is written to a client that never reads would hold the peer open;
            # a transport that is closed already raises.
            with contextlib.suppress(AttributeError):
                wire.writer.transport.abort()
        await asyncio.sleep(0)

    def _accept(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        wire = Wire(len(self.wires) + 1, reader, writer)
        self.wires.append(wire)
        task = asyncio.get_running_loop().create_task(self._run(wire))
        self._tasks.add(task)

    async def _run(self, wire: Wire) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._script(wire)
        wire.writer.close()

    @property
    def origin(self) -> Origin:
        return Origin("127.0.0.1", self.port, self._context is not None, "")


class Taker:
    """A sink that writes down what it was told."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.ends = 0
        self.error: UpstreamError | None = None
        self.over = asyncio.Event()
        self.some = asyncio.Event()  # data came; a test may clear it
        self.on_data: Callable[[], None] = lambda: None

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    def data(self, data: bytes) -> None:
        assert data, "a sink must never be given nothing"
        assert not self.over.is_set(), "data came after the end"
        self.parts.append(data)
        self.some.set()
        self.on_data()

    def end(self) -> None:
        assert not self.over.is_set(), "the end was told twice"
        self.ends += 1
        self.over.set()

    def failed(self, error: UpstreamError) -> None:
        assert not self.over.is_set(), "the end was told twice"
        self.error = error
        self.over.set()


@contextlib.asynccontextmanager
async def facing(
    script: Script,
    *,
    connect_timeout: float = 5.0,
    keepalive: float = 4.0,
    max_idle: int = 64,
) -> AsyncIterator[tuple[Upstream, Peer]]:
    """An upstream in front of a scripted peer; at the end nothing may be open."""
    async with asyncio.timeout(PATIENCE), Peer(script) as peer:
        upstream = Upstream(
            peer.origin,
            connect_timeout=connect_timeout,
            keepalive=keepalive,
            max_idle=max_idle,
        )
        try:
            yield upstream, peer
        finally:
            await upstream.aclose()
        assert upstream.open_connections == upstream.idle_connections == 0


async def get(upstream: Upstream, target: str = "/") -> bytes:
    answer = await upstream.send("GET", target, [])
    return await answer.read(1 << 20)


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop turn until something holds that no event tells."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def none_open(upstream: Upstream) -> None:
    """Wait until the last connection has closed."""
    await until(lambda: not upstream.open_connections)


async def closed_by_us(peer: Peer, number: int = 1) -> None:
    """Wait until the peer has seen the end of a connection."""
    await peer.wires[number - 1].gone.wait()


async def answer_ok_forever(wire: Wire) -> None:
    while True:
        await wire.request()
        await wire.send(OK)


def answering(data: bytes) -> Script:
    """A script that answers one request with these bytes and closes."""

    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(data)

    return script


def holding(data: bytes) -> Script:
    """A script that answers with these bytes and waits until we close."""

    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(data)
        await wire.closed()

    return script


# Origins


@pytest.mark.parametrize(
    ("url", "origin", "authority"),
    [
        ("http://localhost:11973", Origin("localhost", 11973, False, ""), None),
        ("http://LOCALHOST:1/", Origin("localhost", 1, False, ""), "localhost:1"),
        ("http://h/", Origin("h", 80, False, ""), "h"),
        ("https://h/a/b/", Origin("h", 443, True, "/a/b"), "h"),
        ("https://h:80/a", Origin("h", 80, True, "/a"), "h:80"),
        ("http://[::1]:8000", Origin("::1", 8000, False, ""), "[::1]:8000"),
        ("http://my_host.local:8", Origin("my_host.local", 8, False, ""), None),
    ],
)
def test_a_base_url_is_read(url: str, origin: Origin, authority: str | None) -> None:
    assert Origin.from_url(url) == origin
    assert origin.authority == (authority or f"{origin.host}:{origin.port}")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8080",
        "ftp://h/",
        "http://",
        "http://:80",
        "http://h:0",
        "http://h:99999",
        "http://h:x",
        "http://h/?q",
        "http://h/?",
        "http://h/#f",
        "http://h/a b",
        "http://h\n/",
        "http://\u00e9/",
        "http://[::1",
        "http://[fe80::1%25eth0]/",
        "http://h\\x/",
    ],
)
def test_a_base_url_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        Origin.from_url(url)
    assert repr(url) in str(caught.value)


def test_a_base_url_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError) as caught:
        Origin.from_url("http://me:secret@h/")
    assert "secret" not in str(caught.value)


# One exchange


async def test_a_request_is_written_as_given_and_its_answer_read() -> None:
    seen: list[bytes] = []

    async def script(wire: Wire) -> None:
        seen.append(await wire.request())
        await wire.send(
            b"HTTP/1.1 201 Created\r\nX-A: 1\r\nX-a: 2\r\nContent-Length: 2\r\n\r\nok"
        )

    async with facing(script) as (upstream, peer):
        headers = [("Content-Type", "application/json"), ("Authorization", "Bearer k")]
        answer = await upstream.send("POST", "/v1/x?y=1", headers, b'{"a":1}')
        assert answer.status == 201
        assert answer.headers == (("x-a", "1"), ("x-a", "2"), ("content-length", "2"))
        assert answer.header("x-a") == "1" and answer.header("x-b") is None
        assert answer.length == 2
        assert await answer.read(2) == b"ok"
        assert seen == [
            b"POST /v1/x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
            b"Connection: keep-alive\r\nContent-Length: 7\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer k\r\n\r\n"
            b'{"a":1}' % peer.port
        ]


async def test_the_base_path_goes_before_the_target() -> None:
    seen: list[bytes] = []

    async def script(wire: Wire) -> None:
        seen.append(await wire.request())
        await wire.send(OK)

    async with asyncio.timeout(PATIENCE), Peer(script) as peer:
        upstream = Upstream(Origin.from_url(f"http://127.0.0.1:{peer.port}/api/"))
        assert await get(upstream, "/v1/models") == b"ok"
        await upstream.aclose()
    assert seen[0].startswith(b"GET /api/v1/models HTTP/1.1\r\n")


async def test_a_bad_request_is_refused_before_anything_is_dialed() -> None:
    async with facing(answer_ok_forever) as (upstream, peer):
        with pytest.raises(ValueError):
            await upstream.send("GET", "/", [("A", "b\r\nC: d")])
        assert not peer.wires


async def test_a_llama_server_stream_comes_chunk_by_chunk_as_it_is_sent() -> None:
    taken = asyncio.Event()

    async def script(wire: Wire) -> None:
        while True:
            await wire.request()
            await wire.send(
                b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\n"
                b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
                b"Keep-Alive: timeout=5, max=100\r\n\r\n"
            )
            for event in (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"):
                await wire.send(chunk(event))
                await taken.wait()
                taken.clear()
            await wire.send(b"0\r\n\r\n")

    async with facing(script) as (upstream, peer):
        for _ in range(2):
            taker = Taker()
            taker.on_data = taken.set
            answer = await upstream.send("POST", "/", [], b"{}")
            assert answer.length is None
            answer.attach(taker)
            await taker.over.wait()
            assert taker.parts == [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]
            assert upstream.idle_connections == 1
        assert len(peer.wires) == 1


async def test_an_mlx_lm_stream_ends_with_its_connection() -> None:
    data = (
        b"HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\n: k\n\ndata: x\n\n"
    )
    async with facing(answering(data)) as (upstream, peer):
        for _ in range(2):
            answer = await upstream.send("POST", "/", [], b"{}")
            assert await answer.read(100) == b": k\n\ndata: x\n\n"
            assert upstream.idle_connections == 0
        await none_open(upstream)
        assert len(peer.wires) == 2


async def test_interim_answers_are_skipped() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nA: b\r\n\r\n"
    async with facing(answering(interim + OK)) as (upstream, _):
        assert await get(upstream) == b"ok"


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_content_ends_at_once(status: int) -> None:
    data = b"HTTP/1.1 %d x\r\n\r\n" % status
    async with facing(holding(data)) as (upstream, _):
        answer = await upstream.send("GET", "/", [])
        assert (answer.status, answer.length) == (status, 0)
        assert upstream.idle_connections == 1
        taker = Taker()
        answer.attach(taker)
        assert taker.ends == 1 and not taker.parts


async def test_the_answer_to_head_has_no_body() -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
    async with facing(holding(data)) as (upstream, _):
        answer = await upstream.send("HEAD", "/", [])
        assert await answer.read(0) == b""
        assert upstream.idle_connections == 1


async def test_on_wire_is_called_once_even_if_the_request_is_sent_twice() -> None:
    calls: list[str] = []

    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(OK)
        if wire.number == 1:
            await wire.request()

    async with facing(script) as (upstream, peer):
        await get(upstream)
        answer = await upstream.send("GET", "/", [], on_wire=lambda: calls.append("x"))
        assert await answer.read(2) == b"ok"
        assert (calls, len(peer.wires)) == (["x"], 2)


async def test_two_requests_at_the_same_time_use_two_connections() -> None:
    async def script(wire: Wire) -> None:
        while True:
            number = (await wire.request()).split()[1]
            await wire.send(CHUNKED)
            for _ in range(50):
                await wire.send(chunk(number * 20))
            await wire.send(b"0\r\n\r\n")

    async with facing(script) as (upstream, peer):
        for _ in range(5):
            bodies = await asyncio.gather(*[get(upstream, f"/{i}") for i in range(8)])
            assert bodies == [b"/%d" % i * 1000 for i in range(8)]
        assert len(peer.wires) == 8


# Reuse


async def test_the_connection_used_last_is_used_first() -> None:
    async def script(wire: Wire) -> None:
        while True:
            await wire.request()
            body = b"%d" % wire.number
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n" + body)

    async with facing(script) as (upstream, _):
        a, b = await asyncio.gather(
            upstream.send("GET", "/", []), upstream.send("GET", "/", [])
        )
        assert upstream.idle_connections == 2
        assert {await a.read(1), await b.read(1)} == {b"1", b"2"}
        first = await get(upstream)
        for _ in range(5):
            assert await get(upstream) == first


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(OK.replace(b"C", b"Connection: close\r\nC", 1), id="close"),
        pytest.param(OK.replace(b"1.1", b"1.0"), id="HTTP/1.0"),
        pytest.param(OK + b"x", id="one byte too many"),
        pytest.param(OK + OK, id="a second answer"),
        pytest.param(CHUNKED + b"0\r\n\r\n\r\n", id="line end too many"),
        pytest.param(b"HTTP/1.1 204 x\r\n\r\nbody", id="body of a 204"),
        pytest.param(
            OK.replace(b"C", b"Keep-Alive: timeout=1\r\nC", 1), id="announced too short"
        ),
        pytest.param(
            OK.replace(b"C", b"Keep-Alive: max=1\r\nC", 1), id="announced one"
        ),
    ],
)
async def test_a_connection_in_doubt_is_closed_after_its_answer(data: bytes) -> None:
    async with facing(holding(data)) as (upstream, peer):
        answer = await upstream.send("GET", "/", [])
        assert await answer.read(10) in (b"ok", b"")
        assert upstream.idle_connections == 0
        await closed_by_us(peer)
        await none_open(upstream)


async def test_http_10_is_reused_when_it_says_keep_alive() -> None:
    data = b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"

    async def script(wire: Wire) -> None:
        while True:
            await wire.request()
            await wire.send(data)

    async with facing(script) as (upstream, peer):
        for _ in range(3):
            assert await get(upstream) == b"ok"
        assert len(peer.wires) == 1


async def test_bytes_that_nobody_asked_for_close_an_idle_connection() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(OK)
        await go.wait()
        await wire.send(OK)
        await wire.closed()

    async with facing(script, keepalive=PATIENCE * 2) as (upstream, peer):
        await get(upstream)
        assert upstream.idle_connections == 1
        go.set()
        await closed_by_us(peer)
        assert upstream.idle_connections == 0


async def test_bytes_that_came_in_the_same_turn_are_no_answer_to_the_next() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(OK)
        if wire.number == 1:
            await wire.head()  # never comes

    async with facing(script) as (upstream, peer):
        await get(upstream)
        assert upstream.idle_connections == 1
        # Written and sent without a turn of the loop in which we could read it.
        forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
        sock = peer.wires[0].writer.get_extra_info("socket")
        assert os.write(sock.fileno(), forged)
        assert await get(upstream) == b"ok"
        assert len(peer.wires) == 2


async def test_an_idle_connection_that_the_peer_ends_is_dropped() -> None:
    async with facing(answering(OK)) as (upstream, _):
        await get(upstream)
        await none_open(upstream)
        assert upstream.idle_connections == 0
        assert await get(upstream) == b"ok"


async def test_an_idle_connection_is_closed_when_it_is_too_old() -> None:
    async with facing(holding(OK), keepalive=MOMENT) as (upstream, peer):
        await get(upstream)
        assert upstream.idle_connections == 1
        await closed_by_us(peer)
        assert upstream.idle_connections == 0


async def test_no_connection_is_kept_without_keepalive() -> None:
    async with facing(holding(OK), keepalive=0) as (upstream, _):
        await get(upstream)
        assert upstream.idle_connections == 0


async def test_above_the_limit_the_oldest_idle_connection_closes() -> None:
    both = asyncio.Barrier(2)

    async def script(wire: Wire) -> None:
        await wire.request()
        await both.wait()
        await wire.send(OK)
        await wire.closed()

    async with facing(script, max_idle=1) as (upstream, _):
        await asyncio.gather(get(upstream), get(upstream))
        assert upstream.idle_connections == 1


async def test_a_connection_serves_no_more_requests_than_the_peer_announces() -> None:
    served: list[int] = []

    async def script(wire: Wire) -> None:
        served.append(0)
        while True:
            await wire.request()
            served[wire.number - 1] += 1
            await wire.send(
                b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5, max=100\r\n"
                b"Content-Length: 2\r\n\r\nok"
            )

    async with facing(script) as (upstream, _):
        for _ in range(250):
            assert await get(upstream) == b"ok"
    assert served == [100, 100, 50]


async def test_an_announced_keep_alive_leaves_a_second_for_the_request() -> None:
    data = b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\nok"
    async with facing(holding(data), keepalive=60) as (upstream, _):
        loop = asyncio.get_running_loop()
        await get(upstream)
        (connection,) = upstream._idle  # no public way to see it without waiting
        assert 3.0 < connection.idle_until - loop.time() <= 4.0


# Stale connections


def closing_after(first: int, then: bytes = b"") -> Script:
    """The first connection serves ``first`` requests and closes on the next one."""

    async def script(wire: Wire) -> None:
        for _ in range(first if wire.number == 1 else 1000):
            await wire.request()
            await wire.send(OK)
        await wire.request()
        if then:
            await wire.send(then)

    return script


async def test_a_stale_connection_is_retried_on_a_fresh_one() -> None:
    async with facing(closing_after(2)) as (upstream, peer):
        for _ in range(4):
            answer = await upstream.send("POST", "/", [], b"{}")
            assert await answer.read(2) == b"ok"
        assert len(peer.wires) == 2


async def test_a_request_whose_connection_closes_in_the_same_turn_is_not_sent() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(OK)
        with pytest.raises(asyncio.IncompleteReadError) as cut:
            await wire.request()
        heard.set_result(cut.value.partial)

    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    async with facing(script) as (upstream, _):
        await get(upstream)
        request = asyncio.create_task(get(upstream))
        await asyncio.sleep(0)  # it has begun, and leaves when this turn ends
        await upstream.aclose()
        with pytest.raises(Disconnected):
            await request
        assert await heard == b""


async def test_bytes_that_come_in_the_turn_of_a_request_are_not_its_answer() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(OK)
        if wire.number == 1:
            await stray.wait()
            wire.writer.write(OK.replace(b"ok", b"no"))
            sent.set()
        await wire.request()
        await wire.send(OK)

    stray, sent = asyncio.Event(), asyncio.Event()
    async with facing(script) as (upstream, peer):
        await get(upstream)
        request = asyncio.create_task(get(upstream))
        stray.set()  # both run in the next turn; the request was begun before
        await sent.wait()
        assert await request == b"ok"
        assert len(peer.wires) == 2


async def test_a_reset_stale_connection_is_retried_too() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(OK)
        if wire.number == 1:
            await wire.request()
            wire.reset()

    async with facing(script) as (upstream, peer):
        assert [await get(upstream), await get(upstream)] == [b"ok", b"ok"]
        assert len(peer.wires) == 2


async def test_a_request_is_not_retried_twice() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        if wire.number <= 2:
            await both.wait()
            await wire.send(OK)
            await wire.request()

    both = asyncio.Barrier(2)
    async with facing(script) as (upstream, peer):
        await asyncio.gather(get(upstream), get(upstream))
        assert upstream.idle_connections == 2
        with pytest.raises(Disconnected):
            await get(upstream)
        assert len(peer.wires) == 3


async def test_a_fresh_connection_that_closes_is_not_retried() -> None:
    async with facing(answering(b"")) as (upstream, peer):
        with pytest.raises(Disconnected):
            await get(upstream)
        assert len(peer.wires) == 1


@pytest.mark.parametrize("beginning", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_nothing_is_retried_after_the_first_byte(beginning: bytes) -> None:
    async with facing(closing_after(1, beginning)) as (upstream, peer):
        await get(upstream)
        with pytest.raises(BadAnswer):
            await get(upstream)
        assert len(peer.wires) == 1


async def test_a_stale_connection_and_a_dead_server_are_a_failed_connect() -> None:
    async with facing(closing_after(1)) as (upstream, peer):
        await get(upstream)
        peer._server.close()
        with pytest.raises(ConnectFailed) as caught:
            await get(upstream)
        assert caught.value.reason == "refused"


# Failures to connect


async def test_a_refused_connection_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        origin = Origin("127.0.0.1", taken.getsockname()[1], False, "")
        upstream = Upstream(origin)
        with pytest.raises(ConnectFailed) as caught:
            await upstream.send("GET", "/", [])
    assert caught.value.reason == "refused"
    assert origin.authority in str(caught.value)
    assert upstream.open_connections == 0


async def test_a_name_that_is_not_known_says_so() -> None:
    upstream = Upstream(Origin("nowhere.invalid", 80, False, ""))
    with pytest.raises(ConnectFailed) as caught:
        await upstream.send("GET", "/", [])
    assert caught.value.reason == "dns"
    assert "nowhere.invalid" in str(caught.value)


async def test_an_address_without_a_way_says_so() -> None:
    upstream = Upstream(Origin("255.255.255.255", 80, False, ""))
    with pytest.raises(ConnectFailed) as caught:
        await upstream.send("GET", "/", [])
    assert caught.value.reason == "unreachable"


@contextlib.contextmanager
def black_hole() -> Iterator[Origin]:
    """An address that takes no connection and refuses none: its queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        yield Origin("127.0.0.1", address[1], False, "")


async def test_a_connection_that_takes_too_long_says_so() -> None:
    with black_hole() as origin:
        upstream = Upstream(origin, connect_timeout=MOMENT)
        with pytest.raises(ConnectFailed) as caught:
            await upstream.send("GET", "/", [])
    assert caught.value.reason == "timeout"


def have_two_addresses(
    monkeypatch: pytest.MonkeyPatch, dead: str, good: str
) -> list[str]:
    """Have each name mean these two, in that order; notes the names looked up.

    Names with a dead and a good address cannot be had on every machine.
    """
    looked_up: list[str] = []

    async def two_addresses(host: str, port: int, **_: object) -> list[object]:
        looked_up.append(host)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in (dead, good)
        ]

    try:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two_addresses)
    except AttributeError:
        pytest.skip("the look-up of this loop cannot be replaced")
    return looked_up


async def test_a_name_with_several_addresses_is_tried_until_one_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_up = have_two_addresses(monkeypatch, "127.0.0.9", "127.0.0.1")
    async with asyncio.timeout(PATIENCE), Peer(holding(OK)) as peer:
        upstream = Upstream(Origin("engine.local", peer.port, False, ""), keepalive=0)
        assert await get(upstream) == b"ok"
        assert await get(upstream) == b"ok"
        assert looked_up == ["engine.local"], "addresses are kept for a while"
        assert upstream._dialer._addresses[0] == "127.0.0.1", "the good one goes first"
        await upstream.aclose()


async def test_who_still_tries_a_dead_address_gets_to_the_good_one_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have_two_addresses(monkeypatch, "127.0.0.9", "127.0.0.1")
    loop = asyncio.get_running_loop()
    connect: Any = loop.create_connection
    refuse_again = asyncio.Event()
    refused = 0

    async def slowly_refused(make: object, host: str, *more: Any, **named: Any) -> Any:
        nonlocal refused
        if host != "127.0.0.9":
            return await connect(make, host, *more, **named)
        refused += 1
        if refused == 2:
            await refuse_again.wait()
        raise ConnectionRefusedError

    monkeypatch.setattr(loop, "create_connection", slowly_refused)
    async with asyncio.timeout(PATIENCE), Peer(holding(OK)) as peer:
        upstream = Upstream(Origin("engine.local", peer.port, False, ""), keepalive=0)
        first, second = (asyncio.create_task(get(upstream)) for _ in range(2))
        assert await first == b"ok"
        refuse_again.set()
        assert await second == b"ok"
        assert refused == 2
        await upstream.aclose()


# Bad answers


BAD_HEADS = {
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "large head": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
    "500 fields": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    "interim flood": b"HTTP/1.1 100 Continue\r\n\r\n" * 500,
    "101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "length and chunks": CHUNKED.replace(b"T", b"Content-Length: 2\r\nT", 1) + b"ok",
    "two lengths": OK.replace(b"C", b"Content-Length: 3\r\nC", 1),
    "cut head": b"HTTP/1.1 200 OK\r\nContent-Le",
}


@pytest.mark.parametrize("name", BAD_HEADS)
async def test_a_bad_head_fails_the_request_and_closes(name: str) -> None:
    async with facing(answering(BAD_HEADS[name])) as (upstream, _):
        with pytest.raises(BadAnswer) as caught:
            await get(upstream)
        assert upstream.origin.authority in str(caught.value)
        await none_open(upstream)


BAD_BODIES = {
    "bad chunk size": (CHUNKED + b"2\r\nok\r\nxyz\r\n", BadAnswer),
    "long chunk": (CHUNKED + b"2\r\nokay\r\n0\r\n\r\n", BadAnswer),
    "cut chunk": (CHUNKED + b"2\r\nok\r\n5\r\n", Truncated),
    "no last chunk": (CHUNKED + b"2\r\nok\r\n", Truncated),
    "short length": (OK.replace(b"h: 2", b"h: 3"), Truncated),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_body_is_handed_on_up_to_its_fault(name: str) -> None:
    data, kind = BAD_BODIES[name]
    async with facing(answering(data)) as (upstream, _):
        taker = Taker()
        answer = await upstream.send("GET", "/", [])
        answer.attach(taker)
        await taker.over.wait()
        assert taker.body == b"ok"
        assert type(taker.error) is kind and not taker.ends
        await none_open(upstream)


async def test_a_peer_that_closes_or_talks_at_once_fails_the_request() -> None:
    async def script(wire: Wire) -> None:
        if wire.number % 2:
            await wire.send(b"220 mail.example.com ESMTP\r\n")

    async with facing(script) as (upstream, _):
        for _ in range(50):
            with pytest.raises((Disconnected, BadAnswer)):
                await get(upstream)


async def test_a_connection_lost_before_its_first_request_fails_it() -> None:
    async def script(wire: Wire) -> None:
        wire.reset()

    async with facing(script) as (upstream, _):
        connection = await upstream._dial()  # the moment cannot be hit from outside
        await none_open(upstream)
        answer = connection.begin("GET", b"GET / HTTP/1.1\r\n\r\n", b"", 0)
        assert isinstance(await answer.head, Disconnected)


async def test_a_reset_before_the_first_byte_is_a_disconnect() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        wire.reset()

    async with facing(script) as (upstream, _):
        with pytest.raises(Disconnected):
            await get(upstream)


async def test_a_reset_inside_a_body_truncates_it_whatever_its_framing() -> None:
    for head in (CHUNKED, b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"):
        taker = Taker()

        async def script(wire: Wire, head: bytes = head, taker: Taker = taker) -> None:
            await wire.request()
            await wire.send(head + b"2\r\nok\r\n")
            await taker.some.wait()
            wire.reset()

        async with facing(script) as (upstream, _):
            answer = await upstream.send("GET", "/", [])
            answer.attach(taker)
            await taker.over.wait()
            assert isinstance(taker.error, Truncated)


async def test_a_failure_before_the_sink_is_attached_is_told_when_it_is() -> None:
    async with facing(answering(CHUNKED + chunk(b"ok"))) as (upstream, _):
        answer = await upstream.send("GET", "/", [])
        await none_open(upstream)
        taker = Taker()
        answer.attach(taker)
        assert taker.parts == [b"ok"] and isinstance(taker.error, Truncated)


# Cancelling


async def test_cancelling_while_connecting_leaves_nothing() -> None:
    with black_hole() as origin:
        upstream = Upstream(origin)
        task = asyncio.create_task(upstream.send("GET", "/", []))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert upstream.open_connections == 0


async def test_cancelling_while_waiting_for_the_head_closes_at_once() -> None:
    asked = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.request()
        asked.set()
        await wire.closed()

    async with facing(script) as (upstream, peer):
        task = asyncio.create_task(upstream.send("GET", "/", []))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await closed_by_us(peer)
        await none_open(upstream)


async def test_cancelling_in_the_middle_closes_at_once_and_ends_delivery() -> None:
    async with facing(holding(CHUNKED + chunk(b"ok"))) as (upstream, peer):
        taker = Taker()
        answer = await upstream.send("GET", "/", [])
        answer.attach(taker)
        await taker.some.wait()
        answer.cancel()
        answer.cancel()
        await closed_by_us(peer)
        await none_open(upstream)
        assert taker.parts == [b"ok"] and not taker.over.is_set()


async def test_cancelling_before_a_sink_is_attached_closes_too() -> None:
    async with facing(holding(CHUNKED + chunk(b"ok"))) as (upstream, peer):
        answer = await upstream.send("GET", "/", [])
        answer.cancel()
        await closed_by_us(peer)
        taker = Taker()
        answer.attach(taker)
        assert not taker.parts and isinstance(taker.error, Truncated)
        with pytest.raises(Truncated):
            await answer.read(10)


async def test_a_sink_may_cancel_from_inside() -> None:
    data = CHUNKED + chunk(b"ok")
    for whole in (data, data + b"0\r\n\r\n"):
        async with facing(holding(whole)) as (upstream, _):
            taker = Taker()
            answer = await upstream.send("GET", "/", [])
            taker.on_data = answer.cancel
            answer.attach(taker)
            await taker.some.wait()
            assert taker.parts == [b"ok"] and not taker.over.is_set()


async def test_a_sink_may_cancel_on_the_bytes_that_end_the_answer() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED)
        await go.wait()
        await wire.send(chunk(b"ok") + b"0\r\n\r\n")
        await wire.closed()

    async with facing(script) as (upstream, peer):
        taker = Taker()
        answer = await upstream.send("GET", "/", [])
        taker.on_data = answer.cancel
        answer.attach(taker)
        go.set()
        await closed_by_us(peer)
        assert taker.parts == [b"ok"] and not taker.over.is_set()
        assert upstream.idle_connections == 0


async def test_cancelling_after_the_end_does_not_touch_the_next_exchange() -> None:
    again = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(OK)
        await wire.request()
        await wire.send(CHUNKED + chunk(b"one"))
        await again.wait()
        await wire.send(chunk(b"two") + b"0\r\n\r\n")
        await wire.closed()

    async with facing(script) as (upstream, peer):
        first = await upstream.send("GET", "/", [])
        assert await first.read(2) == b"ok"
        taker = Taker()
        second = await upstream.send("GET", "/", [])
        second.attach(taker)
        first.pause()
        first.silence_seconds = MOMENT / 10
        first.cancel()
        again.set()
        await taker.over.wait()
        assert taker.body == b"onetwo" and taker.ends == 1
        assert len(peer.wires) == 1


async def test_cancelling_read_cancels_the_answer() -> None:
    async with facing(holding(CHUNKED + chunk(b"ok"))) as (upstream, peer):
        answer = await upstream.send("GET", "/", [])
        task = asyncio.create_task(answer.read(10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await closed_by_us(peer)


@pytest.mark.parametrize("turns", range(8))
async def test_cancelling_at_any_turn_of_the_loop_leaves_nothing(turns: int) -> None:
    async with facing(answer_ok_forever) as (upstream, _):
        for target in ("/a", "/b"):  # a fresh connection, then perhaps a reused one
            task = asyncio.create_task(get(upstream, target))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await until(lambda: upstream.open_connections == upstream.idle_connections)
        assert await get(upstream) == b"ok"


async def test_closing_the_pool_fails_what_is_going_on() -> None:
    asked = asyncio.Event()

    async def script(wire: Wire) -> None:
        target = (await wire.request()).split()[1]
        if target == b"/body":
            await wire.send(CHUNKED + chunk(b"ok"))
        elif target == b"/idle":
            await wire.send(OK)
        else:
            asked.set()
        await wire.closed()

    async with facing(script) as (upstream, peer):
        await get(upstream, "/idle")
        upstream._idle[0].idle_until = 0  # so that each gets its own connection
        taker = Taker()
        answer = await upstream.send("GET", "/body", [])
        answer.attach(taker)
        waiting = asyncio.create_task(upstream.send("GET", "/head", []))
        await asked.wait()
        await upstream.aclose()
        assert upstream.open_connections == 0
        assert isinstance(taker.error, Truncated)
        with pytest.raises(Disconnected):
            await waiting
        with pytest.raises(ConnectFailed):
            await get(upstream)
        for wire in peer.wires:
            await wire.gone.wait()


# Back-pressure


async def test_a_paused_answer_stops_the_peer_and_a_resumed_one_is_whole() -> None:
    total = 50 << 20
    block = bytes(1 << 20)
    written = 0
    stuck = asyncio.Event()

    async def script(wire: Wire) -> None:
        nonlocal written
        await wire.request()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        for _ in range(total // len(block)):
            wire.writer.write(block)
            try:
                async with asyncio.timeout(0.2):
                    await wire.writer.drain()
            except TimeoutError:
                stuck.set()
                await wire.writer.drain()
            written += len(block)

    async with facing(script) as (upstream, _):
        taker = Taker()
        size = 0

        def count() -> None:
            nonlocal size
            size += len(taker.parts.pop())

        taker.on_data = count
        answer = await upstream.send("GET", "/", [])
        answer.attach(taker)
        answer.pause()
        await stuck.wait()
        before = size
        assert written < total and before < total // 2
        await asyncio.sleep(0)
        assert size == before, "a paused answer delivers nothing"
        answer.resume()
        await taker.over.wait()
        assert size == total and taker.ends == 1


async def test_a_sink_that_pauses_at_every_piece_gets_everything() -> None:
    body = random.Random(1).randbytes(1 << 20)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with facing(holding(head + body)) as (upstream, _):
        loop = asyncio.get_running_loop()
        taker = Taker()
        answer = await upstream.send("GET", "/", [])

        def breathe() -> None:
            answer.pause()
            loop.call_soon(answer.resume)

        taker.on_data = breathe
        answer.attach(taker)
        await taker.over.wait()
        assert taker.body == body
        assert upstream.idle_connections == 1
        # The connection must read again, whatever the last pause left behind.
        assert upstream._idle[0]._transport.is_reading()


async def test_an_answer_without_a_sink_is_held_and_bounded() -> None:
    stuck = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (50 << 20))
        for _ in range(50):
            wire.writer.write(bytes(1 << 20))
            try:
                async with asyncio.timeout(0.2):
                    await wire.writer.drain()
            except TimeoutError:
                stuck.set()
                await wire.writer.drain()

    async with facing(script) as (upstream, _):
        answer = await upstream.send("GET", "/", [])
        await stuck.wait()
        taker = Taker()
        taker.on_data = answer.pause
        answer.attach(taker)
        one_read = 256 * 1024
        assert MAX_HELD_BYTES <= len(taker.body) < MAX_HELD_BYTES + one_read
        taker.on_data = lambda: None
        answer.resume()
        await taker.over.wait()
        assert len(taker.body) == 50 << 20


async def test_what_came_before_the_sink_is_delivered_first_and_in_one_piece() -> None:
    go = asyncio.Event()
    held = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.request()
        for part in (CHUNKED, chunk(b"a"), chunk(b"b")):
            await wire.send(part)
            await asyncio.sleep(0)
        held.set()
        await go.wait()
        await wire.send(chunk(b"c") + b"0\r\n\r\n")
        await wire.closed()

    async with facing(script) as (upstream, _):
        answer = await upstream.send("GET", "/", [])
        await held.wait()
        await until(lambda: answer._held_bytes == 2)  # type: ignore[attr-defined]
        taker = Taker()
        answer.attach(taker)
        assert taker.parts == [b"ab"]
        go.set()
        await taker.over.wait()
        assert taker.parts == [b"ab", b"c"]


async def test_an_answer_paused_before_its_sink_waits_to_be_resumed() -> None:
    async with facing(answering(OK)) as (upstream, _):
        answer = await upstream.send("GET", "/", [])
        answer.pause()
        taker = Taker()
        answer.attach(taker)
        assert not taker.parts and not taker.over.is_set()
        answer.resume()
        assert taker.parts == [b"ok"] and taker.ends == 1


async def test_a_second_sink_is_refused() -> None:
    async with facing(holding(CHUNKED)) as (upstream, _):
        answer = await upstream.send("GET", "/", [])
        answer.attach(Taker())
        with pytest.raises(RuntimeError):
            answer.attach(Taker())


async def test_a_large_request_is_written_at_the_pace_of_the_peer() -> None:
    body = random.Random(2).randbytes(20 << 20)
    go = asyncio.Event()
    seen: list[bytes] = []

    async def script(wire: Wire) -> None:
        await wire.head()
        await go.wait()
        seen.append(await wire.reader.readexactly(len(body)))
        await wire.send(OK)
        await wire.closed()

    async with facing(script) as (upstream, _):
        task = asyncio.create_task(upstream.send("POST", "/", [], body))
        await until(lambda: upstream.open_connections == 1)
        (connection,) = upstream._connections
        await until(lambda: connection._is_write_paused)
        assert connection._transport.get_write_buffer_size() < 1 << 20
        go.set()
        answer = await task
        assert await answer.read(2) == b"ok"
        assert seen == [body]
        assert upstream.idle_connections == 1


@pytest.mark.parametrize("attempt", range(5))
async def test_an_early_refusal_is_read_though_the_body_was_not(attempt: int) -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 9\r\n\r\ntoo large"

    async def script(wire: Wire) -> None:
        await wire.head()
        for _ in range(attempt):
            await wire.reader.read(65536)
        await wire.send(refusal)  # and close without reading the rest: a reset

    async with facing(script) as (upstream, _):
        for _ in range(10):
            answer = await upstream.send("POST", "/", [], bytes(20 << 20))
            assert answer.status == 413
            assert await answer.read(9) == b"too large"
            assert upstream.idle_connections == 0


async def test_an_answer_left_by_a_broken_connection_is_read() -> None:
    written = threading.Event()

    def refuse(listener: socket.socket) -> None:
        with listener.accept()[0] as sock:
            sock.recv(1000)
            sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        written.set()  # closed before the rest was read: a reset follows

    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = threading.Thread(target=refuse, args=[listener])
        peer.start()
        upstream = Upstream(Origin("127.0.0.1", listener.getsockname()[1], False, ""))
        connection = await upstream._dial()
        head = b"POST / HTTP/1.1\r\nContent-Length: 20971520\r\n\r\n"
        answer = connection.begin("POST", head, bytes(20 << 20), 0)
        # No turn of the loop from here on: what the peer does is not read. The
        # transport then does what it does when a write fails.
        assert written.wait(PATIENCE)
        connection._transport.abort()
        assert await answer.head is None and answer.status == 413
        assert await answer.read(2) == b"no"
        await none_open(upstream)
        peer.join()


async def test_an_early_refusal_stops_the_body_and_closes_afterwards() -> None:
    more = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nn")
        await more.wait()
        await wire.send(b"o")
        await wire.closed()

    async with facing(script) as (upstream, peer):
        answer = await upstream.send("POST", "/", [], bytes(64 << 20))
        (connection,) = upstream._connections
        assert connection._count_outstanding() < 1 << 20, "the rest is given up"
        more.set()
        assert (answer.status, await answer.read(2)) == (401, b"no")
        assert upstream.idle_connections == 0
        await closed_by_us(peer)


async def test_an_answer_to_half_a_request_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All of it is handed to the transport, but not taken by the peer.
    monkeypatch.setattr("inferencia.upstream.connection._SLICE_BYTES", 64 << 20)

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(OK)
        await wire.closed()

    async with facing(script) as (upstream, peer):
        answer = await upstream.send("POST", "/", [], bytes(20 << 20))
        assert await answer.read(2) == b"ok"
        assert upstream.idle_connections == 0
        await closed_by_us(peer)


async def test_an_early_success_does_not_stop_the_body() -> None:
    size = 20 << 20

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(CHUNKED + chunk(b"begin"))
        await wire.reader.readexactly(size)
        await wire.send(chunk(b"done") + b"0\r\n\r\n")
        await wire.closed()

    async with facing(script) as (upstream, _):
        answer = await upstream.send("POST", "/", [], bytes(size))
        assert await answer.read(100) == b"begindone"


# Silence


async def test_silence_before_the_head_fails_the_request() -> None:
    async with facing(holding(b"")) as (upstream, peer):
        with pytest.raises(Silent) as caught:
            await upstream.send("GET", "/", [], silence_seconds=MOMENT)
        assert caught.value.seconds == MOMENT
        await closed_by_us(peer)


async def test_silence_inside_a_body_fails_the_answer() -> None:
    async with facing(holding(CHUNKED + chunk(b"ok"))) as (upstream, peer):
        taker = Taker()
        answer = await upstream.send("GET", "/", [], silence_seconds=PATIENCE)
        answer.attach(taker)
        answer.silence_seconds = MOMENT
        await taker.over.wait()
        assert isinstance(taker.error, Silent) and taker.parts == [b"ok"]
        await closed_by_us(peer)


async def test_a_peer_that_says_a_little_is_not_silent() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        for byte in OK:
            await wire.send(bytes([byte]))
            await asyncio.sleep(MOMENT / 10)

    async with facing(script) as (upstream, _):
        start = asyncio.get_running_loop().time()
        answer = await upstream.send("GET", "/", [], silence_seconds=MOMENT * 2)
        assert await answer.read(2) == b"ok"
        assert answer.last_byte - start > MOMENT * 2


async def test_a_paused_answer_is_not_silent() -> None:
    async with facing(holding(CHUNKED + chunk(b"ok"))) as (upstream, _):
        taker = Taker()
        answer = await upstream.send("GET", "/", [], silence_seconds=MOMENT)
        answer.attach(taker)
        answer.pause()
        await asyncio.sleep(MOMENT * 3)
        assert not taker.over.is_set()
        answer.resume()
        await taker.over.wait()
        assert isinstance(taker.error, Silent)


async def test_no_silence_limit_is_no_limit() -> None:
    async with facing(holding(CHUNKED)) as (upstream, _):
        taker = Taker()
        answer = await upstream.send("GET", "/", [], silence_seconds=MOMENT)
        answer.attach(taker)
        answer.silence_seconds = 0
        await asyncio.sleep(MOMENT * 2)
        assert not taker.over.is_set()


async def test_silence_counts_anew_for_each_exchange_on_a_connection() -> None:
    async def script(wire: Wire) -> None:
        for _ in range(6):
            await wire.request()
            await asyncio.sleep(MOMENT / 2)
            await wire.send(OK)
        await wire.request()
        await wire.closed()

    async with facing(script) as (upstream, peer):
        for _ in range(6):
            answer = await upstream.send("GET", "/", [], silence_seconds=MOMENT * 2)
            assert await answer.read(2) == b"ok"
        with pytest.raises(Silent):
            await upstream.send("GET", "/", [], silence_seconds=MOMENT)
        assert len(peer.wires) == 1


@contextlib.asynccontextmanager
async def watched(
    script: Script, body: bytes, silence_seconds: float
) -> AsyncIterator[tuple["Clock", Connection]]:
    """An exchange whose clock stands still unless the test moves it."""
    async with facing(script) as (upstream, _):
        connection = await upstream._dial()
        connection.now = clock = Clock()
        head = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.begin("POST", head, body, silence_seconds)
        yield clock, connection


def is_alive(connection: Connection) -> bool:
    """Look at the silence as the timer would: is the exchange still going on?"""
    connection._look_at_silence()
    return connection._answer is not None


class Clock:
    """What ``loop.time`` would say."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize("slice_bytes", [256 << 10, 64 << 20])
async def test_a_request_that_is_still_being_taken_is_not_silence(
    slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferencia.upstream.connection._SLICE_BYTES", slice_bytes)
    reads = asyncio.Semaphore(0)

    async def script(wire: Wire) -> None:
        await wire.head()
        while True:
            await reads.acquire()
            await wire.reader.readexactly(4 << 20)

    async with watched(script, bytes(40 << 20), 100) as (clock, connection):

        def shrank(before: int) -> bool:
            return connection._count_outstanding() < before

        for _ in range(5):
            before = connection._count_outstanding()
            reads.release()
            await until(partial(shrank, before))
            clock.seconds += 90
            assert is_alive(connection)
        clock.seconds += 101  # and nothing moved
        await until(lambda: not is_alive(connection))


async def test_silence_counts_from_when_the_request_was_written() -> None:
    taken = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.request()
        taken.set()
        await wire.closed()

    async with watched(script, bytes(20 << 20), 100) as (clock, connection):
        clock.seconds += 90
        await taken.wait()
        clock.seconds += 99
        assert is_alive(connection)
        clock.seconds += 2
        assert not is_alive(connection)


async def test_silence_does_not_count_while_nobody_takes_the_answer() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED + chunk(bytes(MAX_HELD_BYTES)))
        await wire.closed()

    async with watched(script, b"", 100) as (clock, connection):
        answer = connection._answer
        assert answer is not None
        await until(lambda: answer.is_held_back)
        clock.seconds += 99
        answer.attach(Taker())
        clock.seconds += 99
        assert is_alive(connection)
        clock.seconds += 2
        assert not is_alive(connection)


async def test_a_request_that_nobody_takes_is_silence() -> None:
    async def script(wire: Wire) -> None:
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    async with facing(script) as (upstream, _):
        with pytest.raises(Silent):
            await upstream.send(
                "POST", "/", [], bytes(20 << 20), silence_seconds=MOMENT
            )


# Sinks that fail


async def test_a_sink_that_raises_is_logged_cancelled_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for data in (CHUNKED + chunk(b"ok"), OK):
        caplog.clear()
        async with facing(holding(data)) as (upstream, peer):
            taker = Taker()

            def fail() -> None:
                raise RuntimeError("broken")

            taker.on_data = fail
            answer = await upstream.send("GET", "/", [])
            answer.attach(taker)
            await taker.over.wait()
            assert type(taker.error) is UpstreamError
            assert [record.levelno for record in caplog.records] == [logging.ERROR]
            if data is not OK:
                await closed_by_us(peer)


async def test_a_sink_that_raises_at_the_end_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Taker):
        def end(self) -> None:
            super().end()
            raise RuntimeError("broken")

    async with facing(answer_ok_forever) as (upstream, peer):
        taker = Broken()
        answer = await upstream.send("GET", "/", [])
        answer.attach(taker)
        await taker.over.wait()
        assert await get(upstream) == b"ok"
        assert len(peer.wires) == 1
        assert "broken" in caplog.text


# Reading whole


async def test_read_refuses_a_body_above_the_limit() -> None:
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"
    for data in (large, CHUNKED + chunk(b"x" * 11)):
        async with facing(holding(data)) as (upstream, peer):
            answer = await upstream.send("GET", "/", [])
            with pytest.raises(BadAnswer):
                await answer.read(10)
            await closed_by_us(peer)


async def test_read_raises_what_failed() -> None:
    async with facing(answering(CHUNKED + chunk(b"ok"))) as (upstream, _):
        answer = await upstream.send("GET", "/", [])
        with pytest.raises(Truncated):
            await answer.read(10)


async def test_read_waits_for_a_body_that_comes_in_pieces() -> None:
    async def script(wire: Wire) -> None:
        await wire.request()
        for part in (CHUNKED, chunk(b"a"), chunk(b"b"), b"0\r\n\r\n"):
            await wire.send(part)
            await asyncio.sleep(0.001)

    async with facing(script) as (upstream, _):
        assert await get(upstream) == b"ab"


# Nonsense


async def outcome(upstream: Upstream, target: str) -> str:
    try:
        answer = await upstream.send("GET", target, [], silence_seconds=MOMENT)
        await answer.read(1 << 20)
    except UpstreamError as error:
        return type(error).__name__
    return "ok"


@pytest.mark.parametrize("seed", seeds(3, 10))
async def test_no_mutated_answer_reaches_another_request_or_hangs(seed: int) -> None:
    rng = random.Random(seed)
    answers = [OK, CHUNKED + chunk(b"ok") + b"0\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\nok"]

    async def script(wire: Wire) -> None:
        for _ in range(4):
            if b" /good" in await wire.head():
                await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
                continue
            data = bytearray(rng.choice(answers))
            for _ in range(rng.randint(0, 3)):
                place = rng.randrange(len(data))
                piece = rng.choice([b"", b"\r\n", b"0", b"\x00", b":", OK, b"9"])
                data[place : place + rng.randint(0, 3)] = piece
            for i in range(0, len(data), step := rng.randint(1, len(data))):
                await wire.send(bytes(data[i : i + step]))
                await asyncio.sleep(0)
            if rng.random() < 0.2:
                wire.reset()

    async with facing(script) as (upstream, _):
        for _ in range(6):
            await asyncio.gather(*[outcome(upstream, "/bad") for _ in range(16)])
        bodies = []
        for _ in range(40):
            with contextlib.suppress(UpstreamError):
                bodies.append(await get(upstream, "/good"))
        assert set(bodies) == {b"good"}


# TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that is its own authority, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed, so there is no certificate to test with")
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    command = (
        f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        f" -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
        f" -keyout {path} -out {path}.crt"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


async def over_tls(
    script: Script, certificate: Path, use: Callable[[Upstream], Awaitable[None]]
) -> None:
    async with (
        asyncio.timeout(PATIENCE),
        Peer(script, server_context(certificate)) as peer,
    ):
        origin = Origin("localhost", peer.port, True, "")
        upstream = Upstream(origin, ssl_context=trusting(certificate))
        await use(upstream)
        await upstream.aclose()
        assert upstream.open_connections == 0


async def test_tls_connections_are_checked_and_reused(certificate: Path) -> None:
    async def use(upstream: Upstream) -> None:
        for _ in range(3):
            assert await get(upstream) == b"ok"
        assert upstream.open_connections == 1

    await over_tls(answer_ok_forever, certificate, use)


async def test_a_large_answer_and_request_pass_through_tls(certificate: Path) -> None:
    async def script(wire: Wire) -> None:
        body = (await wire.request()).partition(b"\r\n\r\n")[2]
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        await wire.send(body)
        await wire.closed()

    async def use(upstream: Upstream) -> None:
        body = random.Random(3).randbytes(4 << 20)
        answer = await upstream.send("POST", "/", [], body)
        taker = Taker()
        loop = asyncio.get_running_loop()

        def breathe() -> None:
            answer.pause()
            loop.call_soon(answer.resume)

        taker.on_data = breathe
        answer.attach(taker)
        await taker.over.wait()
        assert taker.body == body

    await over_tls(script, certificate, use)


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    certificate: Path,
) -> None:
    async with Peer(answer_ok_forever, server_context(certificate)) as peer:
        upstream = Upstream(Origin("localhost", peer.port, True, ""))
        with pytest.raises(Untrusted, match="CERTIFICATE_VERIFY_FAILED") as caught:
            await get(upstream)
        assert caught.value.reason == "tls"
        assert caught.value.problem == "self-signed certificate"
        await none_open(upstream)


async def test_a_certificate_for_another_name_is_refused(certificate: Path) -> None:
    async with Peer(answer_ok_forever, server_context(certificate)) as peer:
        origin = Origin("127.0.0.1", peer.port, True, "")
        upstream = Upstream(origin, ssl_context=trusting(certificate))
        with pytest.raises(Untrusted) as caught:
            await get(upstream)
        assert "mismatch" in caught.value.problem


async def test_a_server_that_speaks_no_tls_is_a_tls_failure() -> None:
    async def script(wire: Wire) -> None:
        await wire.reader.read(10)
        await wire.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with Peer(script) as peer:
        upstream = Upstream(Origin("127.0.0.1", peer.port, True, ""))
        with pytest.raises(ConnectFailed) as caught:
            await get(upstream)
        assert caught.value.reason == "tls"


async def test_a_handshake_that_never_comes_is_a_timeout() -> None:
    async def script(wire: Wire) -> None:
        await wire.closed()

    async with asyncio.timeout(PATIENCE), Peer(script) as peer:
        origin = Origin("127.0.0.1", peer.port, True, "")
        upstream = Upstream(origin, connect_timeout=MOMENT)
        with pytest.raises(ConnectFailed) as caught:
            await get(upstream)
        assert caught.value.reason == "timeout"
        await closed_by_us(peer)
        assert upstream.open_connections == 0


async def test_a_tls_stream_without_a_proper_end_is_truncated(
    certificate: Path,
) -> None:
    # Anybody on the way can cut the connection; only TLS's own end is believed.
    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\nok")
        if wire.number == 1:
            wire.writer.transport.abort()

    async def use(upstream: Upstream) -> None:
        answer = await upstream.send("GET", "/", [])
        with pytest.raises(Truncated):
            await answer.read(10)
        assert await get(upstream) == b"ok"

    await over_tls(script, certificate, use)


async def test_cancelling_closes_a_tls_connection_too(certificate: Path) -> None:
    gone = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED + chunk(b"ok"))
        await wire.closed()
        gone.set()

    async def use(upstream: Upstream) -> None:
        answer = await upstream.send("GET", "/", [])
        answer.cancel()
        await gone.wait()
        await none_open(upstream)

    await over_tls(script, certificate, use)


# uvloop


async def exchanges_of_every_kind() -> None:
    """Streams, pauses, cancels and failures once more, for another event loop."""
    await test_a_llama_server_stream_comes_chunk_by_chunk_as_it_is_sent()
    await test_an_mlx_lm_stream_ends_with_its_connection()
    await test_a_stale_connection_is_retried_on_a_fresh_one()
    await test_bytes_that_came_in_the_same_turn_are_no_answer_to_the_next()
    await test_cancelling_in_the_middle_closes_at_once_and_ends_delivery()
    await test_a_paused_answer_stops_the_peer_and_a_resumed_one_is_whole()
    await test_an_early_refusal_is_read_though_the_body_was_not(1)
    await test_silence_inside_a_body_fails_the_answer()
    await test_a_paused_answer_is_not_silent()
    await test_a_connection_that_takes_too_long_says_so()


def test_the_same_holds_under_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(exchanges_of_every_kind())
    assert "uvloop" in sys.modules


def test_an_answer_can_be_given_by_other_means_than_a_socket() -> None:
    assert Answer.__abstractmethods__ == {"attach", "pause", "resume", "cancel"}


class StillTransport(asyncio.Transport):
    """Takes everything and only remembers whether it is read from."""

    reads = True

    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None: ...

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


async def test_after_large_reads_connections_go_on_in_turns() -> None:
    """uvloop would read the whole of one socket before it looks at the next."""
    upstream = Upstream(Origin("127.0.0.1", 9, False, ""))
    loop = asyncio.get_running_loop()
    transports, answers = list[StillTransport](), list[Answer]()
    for _ in range(20):
        transport, connection = StillTransport(), Connection(upstream, loop)
        connection.connection_made(transport)
        answer = connection.begin("GET", b"", b"", 0)
        connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n")
        answer.attach(Taker())
        connection.data_received(bytes(100_000))
        assert transport.reads
        connection.data_received(bytes(200_000))
        assert not transport.reads
        transports.append(transport)
        answers.append(answer)
    answers[0].pause()  # the client takes no more: that is another reason to wait
    answers[19].pause()
    answers[19].resume()
    reading = []
    for _ in range(4):
        reading.append(sum(transport.reads for transport in transports))
        await asyncio.sleep(0)
    assert reading == [1, 8, 16, 19]
    assert not transports[0].reads
    answers[0].resume()
    assert transports[0].reads
