"""The tunnel for long and with many: only with ``INFERENCIA_SLOW=1``, as in .ci/full.

The numbers in the titles are the rows of the failure matrix in docs/tunnel.md.
"""

import asyncio
import contextlib
import gc
import os
import re
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from engines.real import Engine, free_port
from gateway import CHAT, LAST_CHUNK, SSE_HEAD, Exchange, FakeEngine, chunk, event
from inferencia.tunnel import link, wire
from inferencia.tunnel.agent import Agent
from inferencia.tunnel.carrier import Carrier
from inferencia.tunnel.dialing import relay_origin
from test_tunnel import tunnelled
from tunnels import Answering, End, Puppet, at_relay

IS_SLOW = bool(os.environ.get("INFERENCIA_SLOW"))
pytestmark = pytest.mark.skipif(
    not IS_SLOW, reason="INFERENCIA_SLOW is not set (.ci/full sets it)"
)

PATIENCE = 120.0
KEY = "sk-soak-user-1f5b7c3a9e"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def resident() -> int:
    """The memory of this process, in KiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4


def carriers() -> int:
    gc.collect()
    return sum(isinstance(one, Carrier) for one in gc.get_objects())


async def until(is_so: Callable[[], bool], what: str) -> None:
    over = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < over, f"it never came true that {what}"
        await asyncio.sleep(0.02)


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one agent come as often as it likes."""
    for name in ("_HANDSHAKES", "_AGENTS", "_DATA"):
        monkeypatch.setattr(f"inferencia.tunnel.relay.{name}_PER_SECOND", 1e6)
        monkeypatch.setattr(f"inferencia.tunnel.relay.{name}_BURST", 1e6)


async def test_a_thousand_agents_that_come_and_go_leave_nothing(
    tmp_path: Path, no_limits: None
) -> None:
    """28"""
    async with at_relay(tmp_path) as relay:

        async def come_and_go(number: int) -> None:
            puppet = await Puppet(relay, instance=f"i{number}").join()
            await puppet.park(Answering(OK))
            if number % 3 == 0:
                puppet.leave()
            else:
                assert puppet.channel is not None
                puppet.channel.finish()
                puppet.carriers[0].close()
            await asyncio.wait_for(puppet.lost.wait(), PATIENCE)

        async def settled() -> tuple[int, int]:
            await until(lambda: not relay.relay._sessions, "no session is left")
            await until(lambda: len(asyncio.all_tasks()) < 40, "no task is left")
            return len(asyncio.all_tasks()), carriers()

        for number in range(100):
            await come_and_go(number)
        before = await settled()
        memory = resident()
        for number in range(100, 1100):
            await come_and_go(number)
        after = await settled()
        assert after[0] <= before[0] + 2, asyncio.all_tasks()
        assert after[1] <= before[1] + 4
        assert resident() - memory < 20_000
        assert relay.parts.guard.open_connections < 10


async def test_ten_thousand_cancelled_requests_leave_nothing(
    tmp_path: Path, no_limits: None
) -> None:
    """2, 28"""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):

        async def endless(exchange: Exchange) -> None:
            await exchange.write(SSE_HEAD + chunk(event("a")))
            await exchange.gone.wait()

        engine.behave = endless

        async def leave_early(number: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            body = b'{"model":"m","stream":true,"messages":[{"role":"user"}]}'
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n"
                "Authorization: Bearer sk-test-user-1f5b7c3a9e\r\n\r\n"
            )
            writer.write(head.encode() + body)
            if number % 2:  # the others leave before there is an answer
                await asyncio.wait_for(reader.readline(), PATIENCE)
            writer.transport.abort()

        async def many(count: int) -> None:
            for start in range(0, count, 20):
                await asyncio.gather(*(leave_early(start + i) for i in range(20)))

        async def settled() -> tuple[int, int]:
            def is_quiet() -> bool:
                state = relay.state_of()
                return (
                    state is not None
                    and state.streams == 0
                    and not home.parts.doors.active
                    and not relay.parts.doors.active
                    and not any(e for e in engine.exchanges if not e.gone.is_set())
                )

            await until(is_quiet, "nothing is in flight")
            engine.exchanges.clear()
            while not engine.asked.empty():
                engine.asked.get_nowait()
            await relay.has()
            return len(asyncio.all_tasks()), carriers()

        await many(1000)
        before = await settled()
        memory = resident()
        for _ in range(9):
            await many(1000)
            after = await settled()
        assert after[0] <= before[0] + 10
        assert after[1] <= before[1] + 40
        assert resident() - memory < 30_000
        state = await relay.has(parked=4)
        assert state.connections <= state.max_streams


async def test_two_hundred_streams_at_a_time(tmp_path: Path) -> None:
    """5"""
    async with FakeEngine() as engine:
        further = {"max_concurrency": 200}
        async with crowd(tmp_path, engine, **further) as relay:

            async def paced(exchange: Exchange) -> None:
                await exchange.write(SSE_HEAD)
                for number in range(20):
                    await exchange.write(chunk(event(str(number))))
                    await asyncio.sleep(0.05)
                finish = event(None, finish_reason="stop") + b"data: [DONE]\n\n"
                await exchange.write(chunk(finish) + LAST_CHUNK)

            engine.behave = paced

            async def one() -> bool:
                async with relay.chat(stream=True) as answer:
                    return b"[DONE]" in await answer.read()

            assert all(await asyncio.gather(*(one() for _ in range(200))))


@contextlib.asynccontextmanager
async def crowd(
    folder: Path, engine: FakeEngine, **further: object
) -> AsyncIterator[End]:
    from tunnels import at_home, engine_at

    async with at_relay(folder) as relay:
        backends = [engine_at(engine.url, **further)]
        async with at_home(folder, relay.url, backends=backends):
            await relay.has()
            yield relay


async def test_a_thousand_agents_are_back_soon_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10: 99 % within 90 s, and none is let in faster than the relay says."""
    monkeypatch.setattr(link, "SPARE_CONNECTIONS", 1)
    count, port = 1000, free_port()
    tokens = [f"ia-soak-{number:04d}-0123456789" for number in range(count)]
    lines = [f"{t} name=a{i} role=agent models=m" for i, t in enumerate(tokens)]
    metrics = "sk-soak-metrics-0123456789"
    (tmp_path / "keys.txt").touch(mode=0o600)
    (tmp_path / "keys.txt").write_text(
        "\n".join([f"{KEY} name=alice", f"{metrics} name=p role=metrics", *lines])
    )
    (tmp_path / "config.yaml").write_text(
        f"server: {{port: {port}}}\nauth: {{keys_file: keys.txt}}\n"
        "tunnel: {accept: {enabled: true}}\nlog: {level: warn}\n"
        "backends: [{name: nothing, url: 'http://127.0.0.1:9'}]\n"
        "usage: {path: usage.sqlite3}\n"
    )
    command = [sys.executable, "-m", "inferencia", "-c", str(tmp_path / "config.yaml")]
    engine = Engine(port, command=command, log=tmp_path / "log")
    origin = relay_origin(engine.url)
    context = ssl.create_default_context()
    agents = [
        Agent(
            (origin,),
            name=None,
            token=token,
            context=context,
            beat=15.0,
            max_streams=lambda: 4,
            models=lambda: (wire.Model("m", {"id": "m"}),),
            active=lambda: 0,
            serve=lambda: Answering(OK),
        )
        for token in tokens
    ]

    def connected() -> int:
        return sum(s.state == "active" for agent in agents for s in agent.states)

    def up() -> int:
        headers = {"Authorization": f"Bearer {metrics}"}
        text = engine.get("/metrics", **headers).body.decode()
        return len(re.findall(r"^inferencia_agent_up\{.*\} 1$", text, re.M))

    await asyncio.to_thread(engine.begin)
    tasks = [asyncio.ensure_future(agent.run()) for agent in agents]
    try:
        await until(lambda: connected() == count, "all are connected")
        assert await asyncio.to_thread(up) == count
        assert engine.process is not None
        engine.process.signal(signal.SIGKILL)
        await until(lambda: connected() == 0, "all have noticed")
        await asyncio.to_thread(engine.stop)
        began = time.monotonic()
        await asyncio.to_thread(engine.begin)
        await until(lambda: connected() >= 0.99 * count, "nearly all are back")
        seconds = time.monotonic() - began
        assert seconds < 90
        # Twenty a second, and forty at first: as bounded as it says.
        assert seconds > (0.99 * count - 40) / 20 - 5
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.to_thread(engine.stop)
