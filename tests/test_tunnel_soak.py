"""The tunnel for long and with many: only with ``INFERENCIA_SLOW=1``, as in .ci/full.

The numbers in the titles are the rows of the failure matrix in docs/tunnel.md.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import random
import re
import signal
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from engines.real import Engine, free_port
from gateway import (
    CHAT,
    LAST_CHUNK,
    SSE_HEAD,
    Exchange,
    FakeEngine,
    chats,
    chunk,
    event,
)
from inferencia.tunnel import link, wire
from inferencia.tunnel.agent import Agent
from inferencia.tunnel.carrier import Carrier
from inferencia.tunnel.dialing import relay_origin
from test_tunnel_processes import BEAT, Daemon, daemon, relay_at
from test_tunnel_processes import KEY as PROCESS_KEY
from test_tunnel_processes import TOKEN as PROCESS_TOKEN
from tunnels import Answering, End, Puppet, at_home, at_relay, tunnelled

IS_SLOW = bool(os.environ.get("INFERENCIA_SLOW"))
pytestmark = pytest.mark.skipif(
    not IS_SLOW, reason="INFERENCIA_SLOW is not set (.ci/full sets it)"
)

PATIENCE = 120.0
KEY = "sk-soak-user-1f5b7c3a9e"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def resident(pid: int | str = "self") -> int:
    """The memory of a process, in KiB; of this one unless told."""
    with open(f"/proc/{pid}/statm") as file:
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
    from tunnels import engine_at

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


# --- idle connections that close ---------------------------------------------------


async def ask_often(
    relay: End, count: int, at_once: int, between: Callable[[], None]
) -> dict[str, int]:
    """Ask with a name of its own each time; the status of each answer by name."""
    statuses: dict[str, int] = {}

    async def ask(first: int) -> None:
        for number in range(first, count, at_once):
            async with relay.chat(user=f"request-{number}") as answer:
                await answer.read()
                statuses[f"request-{number}"] = answer.status
            between()

    await asyncio.gather(*(ask(first) for first in range(at_once)))
    return statuses


def worked_on(engine: FakeEngine) -> Counter[str]:
    """How often the engine has seen each request."""
    return Counter(exchange.json["user"] for exchange in engine.exchanges)


async def test_of_480_requests_none_meets_a_connection_that_closes(
    tmp_path: Path, no_limits: None
) -> None:
    """9: while the relay closes idle ones, and dials of new ones go on."""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):
        pool = relay.relay._agents["gpu-home"].newest.pool
        closed = 0

        def close_some() -> None:
            nonlocal closed
            before = len(pool._idle)
            pool.close_idle(random.randint(1, 4))
            closed += before - len(pool._idle)

        statuses = await ask_often(relay, 480, 8, close_some)
        assert Counter(statuses.values()) == {200: 480}
        assert set(worked_on(engine).values()) == {1}
        assert len(engine.exchanges) == 480
        assert closed > 100, "nothing was raced"


async def test_what_is_cut_on_the_way_is_never_worked_on_twice(
    tmp_path: Path, no_limits: None
) -> None:
    """9: a proxy drops connections, whatever they carry; some requests fail then."""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        (way,) = home.agent._links.values()
        rng = random.Random(9)

        def cut_one() -> None:
            if way._live and rng.random() < 0.3:
                rng.choice(sorted(way._live, key=id)).abort()
            relay.backend().breaker.succeeded()

        statuses = await ask_often(relay, 480, 8, cut_one)
        times = worked_on(engine)
        assert max(times.values()) == 1
        for name, status in statuses.items():
            assert status in (200, 502, 503), (name, status)
            assert status != 200 or times[name] == 1
        assert Counter(statuses.values())[200] > 240


# --- a relay that is away ----------------------------------------------------------


async def test_a_relay_that_is_away_for_long_is_asked_seldom_and_found_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """11: with all times a hundredth, so that these 6 s are 10 minutes."""
    monkeypatch.setattr(link, "_FIRST_BACKOFF_SECONDS", 0.005)
    monkeypatch.setattr(link, "_LONGEST_BACKOFF_SECONDS", 0.3)
    caplog.set_level(logging.INFO)
    tries: list[float] = []

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.append(time.monotonic())
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    echo = [{"name": "echo", "type": "echo"}]
    async with at_home(tmp_path, f"http://127.0.0.1:{port}", backends=echo):
        await asyncio.sleep(6)
        server.close()
        await server.wait_closed()
        gaps = [late - early for early, late in itertools.pairwise(tries)]
        # Half of 0.3 s on average; 0.05 s are for a busy machine.
        assert len(tries) < 6 / 0.15 * 1.5 + 10
        assert max(gaps[8:]) < 0.35 and max(gaps[8:]) > 0.2, gaps
        assert min(gaps[8:]) < 0.1, "not spread"
        said = [r for r in caplog.records if "without an answer" in r.getMessage()]
        assert len(said) == 1
        began = time.monotonic()
        async with at_relay(tmp_path, port=port) as relay:
            await relay.has(parked=1)
            assert time.monotonic() - began < 2


# --- memory ------------------------------------------------------------------------


# KiB. It were 5,500 of 200 MB; what the allocator keeps is most of that.
MOST_GROWN = 16_000


async def test_memory_stays_flat_behind_a_client_that_stalls(tmp_path: Path) -> None:
    """3, 4: real daemons, 200 MB, a stall of eight beats; then it gets everything."""
    total, sent = 200_000_000, 0

    async def floods(exchange: Exchange) -> None:
        nonlocal sent
        if not exchange.json.get("stream"):
            await chats(exchange)
            return
        exchange.writer.transport.set_write_buffer_limits(65536)
        await exchange.write(SSE_HEAD)
        part = chunk(b"data: " + b"x" * 99_990 + b"\n\n")
        while sent < total:
            await exchange.write(part)
            sent += 100_000
        finish = event(None, finish_reason="stop") + b"data: [DONE]\n\n"
        await exchange.write(chunk(finish) + LAST_CHUNK)

    async with (
        FakeEngine("echo", behave=floods) as engine,
        pair(tmp_path, engine) as (relay, agent),
    ):
        pids = [one.process.pid for one in (relay, agent) if one.process]
        body = b'{"model":"echo","messages":[{"role":"user","content":"x"}]}'

        def other() -> float:
            began = time.monotonic()
            assert relay.request("POST", CHAT, body).status == 200
            return time.monotonic() - began

        await asyncio.to_thread(other)
        before = [resident(pid) for pid in pids]
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        asked = body.replace(b'"echo"', b'"echo","stream":true')
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {PROCESS_KEY}"
            f"\r\nContent-Length: {len(asked)}\r\n\r\n".encode()
            + asked
        )
        await reader.readline()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        grown = [0, 0]

        def look() -> None:
            for place, pid in enumerate(pids):
                grown[place] = max(grown[place], resident(pid) - before[place])

        over = time.monotonic() + 8 * BEAT
        then = -1
        while time.monotonic() < over:
            then = sent if time.monotonic() < over - 2 * BEAT else then
            assert await asyncio.to_thread(other) < 1
            look()
        assert sent == then < total, "the engine was never stopped"
        assert max(grown) < MOST_GROWN, grown
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        async with asyncio.timeout(PATIENCE):
            last = b""
            while not last.endswith(LAST_CHUNK):
                data = await reader.read(1 << 20)
                assert data, "it was cut"
                received += len(data)
                last = (last + data)[-100:]
                look()
        writer.close()
        assert received > total
        assert max(grown) < MOST_GROWN, grown


@contextlib.asynccontextmanager
async def pair(
    folder: Path, engine: FakeEngine
) -> AsyncIterator[tuple[Daemon, Daemon]]:
    """A relay and an agent as processes, the engine behind it in this one."""
    relay = relay_at(folder / "relay")
    dial = {"relays": [relay.url], "token": PROCESS_TOKEN}
    config = (
        f"tunnel: {json.dumps({'dial': dial, 'beat': BEAT})}\n"
        f"backends: [{{name: engine, type: openai, url: '{engine.url}'}}]\n"
    )
    agent = daemon(folder / "agent", config)
    try:
        await asyncio.to_thread(relay.begin)
        await asyncio.to_thread(agent.begin)
        await asyncio.to_thread(agent.says, "connected as gpu-home, offering 1")
        yield relay, agent
    finally:
        await asyncio.to_thread(agent.stop)
        await asyncio.to_thread(relay.stop)
