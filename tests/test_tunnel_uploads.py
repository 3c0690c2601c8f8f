"""What clients send through the tunnel, and what becomes of it when they leave.

The numbers in the titles are the rows of the failure matrix in docs/tunnel.md. The
largest body goes only with ``INFERENCIA_SLOW=1``, as in .ci/full.
"""

import asyncio
import hashlib
import io
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from gateway import CHAT, USER, Exchange, FakeEngine, eventually
from scripted import response
from tunnels import Answering, End, Puppet, at_relay, gone, tunnelled

slow = pytest.mark.skipif(
    not os.environ.get("INFERENCIA_SLOW"),
    reason="INFERENCIA_SLOW is not set (.ci/full sets it)",
)

PATIENCE = 60.0


def body_of(size: int) -> bytes:
    """A chat request of about that size, no part of it like another."""
    words = hashlib.shake_128(b"a long prompt").hexdigest(size // 2)
    messages = [{"role": "user", "content": words}]
    return json.dumps({"model": "m", "messages": messages}).encode()


async def begun_upload(relay: End, sent: bytes, size: int) -> asyncio.StreamWriter:
    """A client that has sent so much of a body."""
    _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {USER}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    )
    writer.write(head.encode() + sent)
    await writer.drain()
    return writer


async def test_a_client_that_leaves_in_its_upload_has_asked_nothing(
    tmp_path: Path,
) -> None:
    """2: the relay has the whole request before it looks for an agent."""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        await relay.has(parked=4)
        (way,) = home.agent._links.values()
        before = set(way._live)
        guard = relay.parts.guard
        connections = guard.open_connections
        writer = await begun_upload(relay, body_of(200_000)[:150_000], 200_000)
        await eventually(
            lambda: guard.open_connections > connections, "the client is there"
        )
        writer.transport.abort()
        await eventually(
            lambda: guard.open_connections <= connections, "the client is gone"
        )
        async with relay.chat() as answer:
            assert answer.status == 200
        assert len(engine.exchanges) == 1
        assert before <= set(way._live)  # no connection was used up by it
        assert not relay.parts.doors.active and not home.parts.doors.active


async def test_a_client_that_leaves_while_its_body_goes_to_the_agent_frees_it(
    tmp_path: Path,
) -> None:
    """2: the agent takes nothing, so most of the body is still at the relay."""
    async with at_relay(tmp_path) as relay:
        puppet = await Puppet(relay).join()
        server = Answering(response({"choices": []}))
        carrier = await puppet.park(server)
        await relay.has()
        carrier.pause_reading()
        body = body_of(12_000_000)
        writer = await begun_upload(relay, body, len(body))
        await eventually(
            lambda: relay.state_of().streams == 1,  # type: ignore[union-attr]
            "it is on its way",
        )
        writer.transport.abort()
        await eventually(
            lambda: relay.state_of().connections == 0,  # type: ignore[union-attr]
            "its connection is closed",
        )
        assert not relay.parts.doors.active
        carrier.resume_reading()
        await gone(server.lost)
        assert len(server.received) < len(body)
        puppet.leave()


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(body), size):
        yield body[at : at + size]


async def arrives_whole(folder: Path, body: bytes, *, chunk_bytes: int = 0) -> None:
    """Send it, in chunks or with its length, and look at what the engine got."""

    async def digest(exchange: Exchange) -> None:
        said = hashlib.sha256(exchange.json["messages"][0]["content"].encode())
        await exchange.answer({"digest": said.hexdigest()})

    expected = hashlib.sha256(json.loads(body)["messages"][0]["content"].encode())
    async with FakeEngine(behave=digest) as engine:
        async with tunnelled(folder, engine) as (relay, _):
            headers = {
                "Authorization": f"Bearer {USER}",
                "Content-Type": "application/json",
            }
            data = pieces(body, chunk_bytes) if chunk_bytes else io.BytesIO(body)
            limit = aiohttp.ClientTimeout(PATIENCE)
            async with relay.client.post(
                relay.url + CHAT, data=data, headers=headers, timeout=limit
            ) as answer:
                assert answer.status == 200, await answer.text()
                assert await answer.json() == {"digest": expected.hexdigest()}
            (exchange,) = engine.exchanges
            assert exchange.request.header("content-length")


@pytest.mark.parametrize("chunk_bytes", [1000, 70_000])
async def test_a_chunked_request_arrives_whole(
    tmp_path: Path, chunk_bytes: int
) -> None:
    """26"""
    await arrives_whole(tmp_path, body_of(300_000), chunk_bytes=chunk_bytes)


@slow
@pytest.mark.parametrize("chunk_bytes", [0, 100_000])
async def test_fifty_megabytes_arrive_whole(tmp_path: Path, chunk_bytes: int) -> None:
    """26"""
    await arrives_whole(tmp_path, body_of(50_000_000), chunk_bytes=chunk_bytes)
