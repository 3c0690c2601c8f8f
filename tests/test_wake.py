"""Promises of ``wake.py``: one waking for all who ask, and none without end."""

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest

from gateway import (
    DONE,
    FINISH,
    METRICS,
    FakeEngine,
    Gateway,
    event,
    eventually,
    running,
)
from inferencia.settings import RoutingConfig, WakeConfig
from inferencia.wake import (
    PACKETS,
    PORT,
    StillAsleep,
    Waker,
    magic_packet,
    send,
    target_of,
)

MAC = "00:1a:2B:3c:4d:5E"
PACKET = bytes.fromhex("ff" * 6 + "001a2b3c4d5e" * 16)


class Ear(asyncio.DatagramProtocol):
    """What a network card would hear."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.heard.put_nowait(data)

    async def hear(self, count: int = 1) -> list[bytes]:
        async with asyncio.timeout(5):
            return [await self.heard.get() for _ in range(count)]


@contextlib.asynccontextmanager
async def listening(address: str = "127.0.0.1") -> AsyncIterator[tuple[Ear, int]]:
    loop = asyncio.get_running_loop()
    transport, ear = await loop.create_datagram_endpoint(Ear, local_addr=(address, 0))
    try:
        yield ear, transport.get_extra_info("sockname")[1]
    finally:
        transport.close()
        await asyncio.sleep(0)


class Machine:
    """A server that answers probes once it is up."""

    def __init__(self) -> None:
        self.is_up = False
        self.probes = 0
        self.probed = asyncio.Event()

    async def probe(self) -> bool:
        self.probes += 1
        self.probed.set()
        return self.is_up


def waker_for(machine: Machine, port: int, **further: Any) -> Waker:
    config = WakeConfig(
        mac=MAC,
        broadcast=f"127.0.0.1:{port}",
        timeout=further.pop("timeout", 5.0),
    )
    times = {"burst_seconds": 0.02, "probe_seconds": 0.005} | further
    return Waker(config, "gpu", machine.probe, **times)


async def settled() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


# --- packets ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "mac", [MAC, MAC.lower(), MAC.upper(), MAC.replace(":", "-"), "001a2b3c4d5e"]
)
def test_a_magic_packet_is_six_ff_and_sixteen_times_the_address(mac: str) -> None:
    assert magic_packet(mac) == PACKET
    assert len(PACKET) == 102


@pytest.mark.parametrize(
    "mac", ["", "00:11", MAC + ":00", "gg:11:22:33:44:55", "x" * 12]
)
def test_what_is_no_hardware_address_is_refused_by_name(mac: str) -> None:
    with pytest.raises(ValueError, match="is not a hardware address"):
        magic_packet(mac)


@pytest.mark.parametrize(
    ("broadcast", "target"),
    [
        ("255.255.255.255", ("255.255.255.255", PORT)),
        ("192.168.1.255:7", ("192.168.1.255", 7)),
        ("gpu.lan", ("gpu.lan", PORT)),
        ("gpu.lan:40000", ("gpu.lan", 40000)),
        ("fe80::1", ("fe80::1", PORT)),
        ("[fe80::1]:7", ("fe80::1", 7)),
    ],
)
def test_packets_go_to_port_9_unless_told_otherwise(
    broadcast: str, target: tuple[str, int]
) -> None:
    assert target_of(broadcast) == target


async def test_a_burst_arrives_at_one_address() -> None:
    async with listening() as (ear, port):
        await send(PACKET, ("127.0.0.1", port))
        assert await ear.hear(PACKETS) == [PACKET] * PACKETS


async def test_a_burst_may_go_to_a_broadcast_address() -> None:
    async with listening("0.0.0.0") as (ear, port):
        try:
            await send(PACKET, ("127.255.255.255", port))
        except PermissionError:  # what a socket without SO_BROADCAST would get
            pytest.fail("the socket may not broadcast")
        except OSError as error:
            pytest.skip(f"no broadcast on this machine's loopback: {error}")
        assert await ear.hear() == [PACKET]


# --- waking ----------------------------------------------------------------------


async def test_waking_ends_when_the_server_answers() -> None:
    machine = Machine()
    async with listening() as (ear, port):
        waker = waker_for(machine, port)
        task = asyncio.ensure_future(waker.wake())
        assert await ear.hear(PACKETS) == [PACKET] * PACKETS
        assert waker.is_waking
        machine.is_up = True
        await asyncio.wait_for(task, 5)
        assert not waker.is_waking
        assert (waker.wakings, waker.waiting) == (1, 0)


async def test_packets_are_sent_again_until_there_is_an_answer() -> None:
    machine = Machine()
    async with listening() as (ear, port):
        task = asyncio.ensure_future(waker_for(machine, port).wake())
        await ear.hear(3 * PACKETS)
        machine.is_up = True
        await asyncio.wait_for(task, 5)
        await settled()
        while not ear.heard.empty():
            ear.heard.get_nowait()
        probes = machine.probes
        await asyncio.sleep(0.05)
        assert ear.heard.empty()
        assert machine.probes == probes


async def test_several_requests_wake_once() -> None:
    machine = Machine()
    async with listening() as (ear, port):
        waker = waker_for(machine, port, burst_seconds=60)
        tasks = [asyncio.ensure_future(waker.wake()) for _ in range(10)]
        await ear.hear(PACKETS)
        await settled()
        assert waker.waiting == 10
        machine.is_up = True
        await asyncio.gather(*tasks)
        assert waker.wakings == 1
        assert ear.heard.empty()


async def test_a_waiter_that_leaves_does_not_stop_the_others() -> None:
    machine = Machine()
    async with listening() as (ear, port):
        waker = waker_for(machine, port)
        first, second = (asyncio.ensure_future(waker.wake()) for _ in range(2))
        await ear.hear()
        first.cancel()
        await settled()
        assert first.cancelled()
        assert waker.is_waking
        machine.is_up = True
        await asyncio.wait_for(second, 5)


async def test_when_the_last_waiter_leaves_the_waking_ends() -> None:
    machine = Machine()
    async with listening() as (ear, port):
        waker = waker_for(machine, port)
        task = asyncio.ensure_future(waker.wake())
        await ear.hear()
        task.cancel()
        await settled()
        assert not waker.is_waking
        assert waker.waiting == 0
        await asyncio.wait_for(waker.aclose(), 5)
        probes = machine.probes
        await asyncio.sleep(0.03)
        assert machine.probes == probes


async def test_who_comes_while_a_waking_is_being_ended_begins_another() -> None:
    machine = Machine()
    async with listening() as (ear, port):
        waker = waker_for(machine, port)
        first = asyncio.ensure_future(waker.wake())
        await ear.hear()
        first.cancel()
        await asyncio.sleep(0)  # the waking has not noticed yet
        second = asyncio.ensure_future(waker.wake())
        machine.is_up = True
        await asyncio.wait_for(second, 5)
        assert waker.wakings == 2


async def test_a_machine_that_does_not_wake_is_given_up_and_left_alone_a_while() -> (
    None
):
    machine = Machine()
    async with listening() as (_, port):
        waker = waker_for(machine, port, timeout=0.05, rest_seconds=0.2)
        tasks = [asyncio.ensure_future(waker.wake()) for _ in range(3)]
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, StillAsleep)
            assert str(outcome) == "did not wake within 0.05 s"
        with pytest.raises(StillAsleep) as refused:
            await waker.wake()
        # (uvloop's clock counts milliseconds, so that no time may have passed at all.)
        assert 0 < refused.value.retry_after < 0.201
        assert waker.wakings == 1
        await asyncio.sleep(refused.value.retry_after)
        machine.is_up = True
        await asyncio.wait_for(waker.wake(), 5)
        assert waker.wakings == 2


async def test_a_probe_that_hangs_does_not_hold_the_deadline_up() -> None:
    async def hang() -> bool:
        await asyncio.get_running_loop().create_future()
        return True

    async with listening() as (_, port):
        config = WakeConfig(mac=MAC, broadcast=f"127.0.0.1:{port}", timeout=0.02)
        with pytest.raises(StillAsleep):
            await asyncio.wait_for(Waker(config, "gpu", hang).wake(), 5)


async def test_closing_ends_a_waking_and_fails_those_who_wait() -> None:
    machine = Machine()
    async with listening() as (ear, port):
        waker = waker_for(machine, port)
        task = asyncio.ensure_future(waker.wake())
        await ear.hear()
        await waker.aclose()
        with pytest.raises(StillAsleep):
            await task
        await waker.aclose()


async def test_a_network_that_takes_no_packets_is_logged_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = Machine()
    config = WakeConfig(mac=MAC, broadcast="no-such-host.invalid", timeout=5.0)
    waker = Waker(config, "gpu", machine.probe, probe_seconds=0.005)

    def refuse(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    loop = asyncio.get_running_loop()
    original = loop.getaddrinfo
    loop.getaddrinfo = refuse  # type: ignore[method-assign]  # no resolver in tests
    try:
        with caplog.at_level(logging.WARNING):
            task = asyncio.ensure_future(waker.wake())
            await settled()
            machine.is_up = True
            await asyncio.wait_for(task, 5)
    finally:
        loop.getaddrinfo = original  # type: ignore[method-assign]
    assert 'cannot send a magic packet for backend "gpu"' in caplog.text


# --- through the gateway ---------------------------------------------------------


class Sleeper(FakeEngine):
    """An engine on a machine that is off until a magic packet comes."""

    def __init__(self, *, wakes: bool = True) -> None:
        super().__init__("m")
        self.wakes = wakes
        self.ear_port = 0
        self.packets = 0
        self._starting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.stop()  # its port is known now
        return self

    def heard(self, packet: bytes) -> None:
        assert packet == PACKET
        self.packets += 1
        if self.wakes and self._starting is None:
            self._starting = asyncio.ensure_future(self.start())


class SleepersEar(asyncio.DatagramProtocol):
    def __init__(self, sleeper: Sleeper) -> None:
        self.sleeper = sleeper

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.sleeper.heard(data)


@contextlib.asynccontextmanager
async def asleep(
    folder: Path,
    *others: FakeEngine,
    wakes: bool = True,
    fail_threshold: int = 1,
    patience: float = 10.0,
    further: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Gateway, Sleeper]]:
    """A gateway in front of a machine that sleeps, and of others that do not.

    Args:
        wakes: whether it wakes when it hears a packet.
        fail_threshold: 1: the watchdog knows that it is down; more: not yet.
        patience: ``wake.timeout``.
        further: other parts of the configuration.
        options: of the sleeping backend.
    """
    loop = asyncio.get_running_loop()
    async with Sleeper(wakes=wakes) as sleeper:
        transport, _ = await loop.create_datagram_endpoint(
            lambda: SleepersEar(sleeper), local_addr=("127.0.0.1", 0)
        )
        port = transport.get_extra_info("sockname")[1]
        wake = {"mac": MAC, "broadcast": f"127.0.0.1:{port}", "timeout": patience}
        backend = {"name": "gpu", "type": "openai", "url": sleeper.url, "wake": wake}
        backends = [backend | {"models": ["m"]} | options]
        for number, engine in enumerate(others):
            backends.append({"name": f"b{number}", "type": "openai", "url": engine.url})
        config = {
            "backends": backends,
            "watchdog": {"interval": "1h", "fail_threshold": fail_threshold},
        } | (further or {})
        try:
            async with running(folder, json.dumps(config)) as gateway:
                (seat,) = gateway.parts.catalogue._wakeable.values()
                assert seat.waker is not None
                seat.waker._probe_seconds = 0.01
                yield gateway, sleeper
        finally:
            transport.close()


@pytest.mark.parametrize("fail_threshold", [1, 3])
async def test_a_request_for_a_sleeping_machine_wakes_it_and_is_answered(
    tmp_path: Path, fail_threshold: int
) -> None:
    async with asleep(tmp_path, fail_threshold=fail_threshold) as (gateway, sleeper):
        gpu = gateway.parts.catalogue.backends[0]
        assert gpu.is_down is (fail_threshold == 1)
        async with gateway.chat() as answer:
            assert answer.status == 200
        assert sleeper.packets
        assert len(sleeper.exchanges) == 1
        assert not gpu.is_down
        await eventually(lambda: bool(gateway.log.requests), "it is logged")
        assert gateway.log.requests[0]["queued_ms"] > 0
        before = sleeper.packets
        async with gateway.chat() as answer:  # it is awake now
            assert answer.status == 200
        assert sleeper.packets == before
        assert gateway.parts.catalogue.wakings(gpu) == 1


async def test_several_requests_for_a_sleeping_machine_wake_it_once(
    tmp_path: Path,
) -> None:
    async with asleep(tmp_path, max_concurrency=2) as (gateway, sleeper):

        async def ask() -> int:
            async with gateway.chat() as answer:
                await answer.read()
                status: int = answer.status
                return status

        assert await asyncio.gather(*(ask() for _ in range(8))) == [200] * 8
        assert len(sleeper.exchanges) == 8
        async with gateway.get("/metrics", METRICS) as answer:
            text = await answer.text()
        assert 'inferencia_backend_wakes_total{backend="gpu"} 1' in text


async def test_a_stream_gets_comments_while_a_machine_wakes_up(tmp_path: Path) -> None:
    server = {"server": {"sse_keepalive": 0.01}}
    async with asleep(tmp_path, wakes=False, further=server) as (gateway, sleeper):
        async with gateway.chat(stream=True) as answer:
            line = await answer.content.readline()
            assert line == b": waiting, a machine wakes up\n"
            await sleeper.start()
            assert (await answer.read()).endswith(event("hi") + FINISH + DONE)


async def test_a_machine_that_does_not_wake_is_503_and_then_503_at_once(
    tmp_path: Path,
) -> None:
    async with asleep(tmp_path, wakes=False, patience=0.1) as (gateway, sleeper):
        for _ in range(2):
            async with gateway.chat() as answer:
                assert answer.status == 503
                assert 1 <= int(answer.headers["Retry-After"]) <= 30
                error = (await answer.json())["error"]
            assert error["code"] == "backend_unavailable"
            assert 'machine of backend "gpu" did not wake' in error["message"]
        gpu = gateway.parts.catalogue.backends[0]
        assert gateway.parts.catalogue.wakings(gpu) == 1
        assert not sleeper.exchanges


async def test_fallbacks_are_used_when_a_machine_does_not_wake(tmp_path: Path) -> None:
    routing = {"routing": {"fallbacks": {"m": ["spare"]}}}
    async with FakeEngine("spare") as spare:
        async with asleep(
            tmp_path, spare, wakes=False, patience=0.05, further=routing
        ) as (gateway, _):
            async with gateway.chat() as answer:
                assert answer.status == 200
            assert (await spare.next()).json["model"] == "spare"


async def test_nobody_is_woken_while_another_serves_the_model(tmp_path: Path) -> None:
    async with FakeEngine("m") as other:
        async with asleep(tmp_path, other, priority=5) as (gateway, sleeper):
            async with gateway.chat() as answer:
                assert answer.status == 200
            assert len(other.exchanges) == 1
            assert not sleeper.packets


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_while_a_machine_wakes_up_ends_the_waking(
    tmp_path: Path, stream: bool
) -> None:
    async with asleep(tmp_path, wakes=False) as (gateway, sleeper):
        task = asyncio.ensure_future(gateway.chat(stream=stream).__aenter__())
        await eventually(lambda: sleeper.packets > 0, "a packet comes")
        task.cancel()
        await eventually(lambda: not gateway.parts.doors.active, "all is over")
        (seat,) = gateway.parts.catalogue._wakeable.values()
        assert seat.waker is not None
        assert not seat.waker.is_waking
        await sleeper.start()
        assert not sleeper.exchanges


async def test_a_gateway_whose_only_machine_sleeps_is_ready_once_it_was_seen(
    tmp_path: Path,
) -> None:
    async with asleep(tmp_path) as (gateway, sleeper):
        async with gateway.chat() as answer:
            assert answer.status == 200
        await sleeper.stop()
        gateway.parts.catalogue.backends[0].is_down = True
        async with gateway.get("/health/ready", None) as answer:
            assert answer.status == 200


async def test_a_reload_that_drops_a_waking_machine_ends_the_waking(
    tmp_path: Path,
) -> None:
    async with asleep(tmp_path, wakes=False) as (gateway, sleeper):
        task = asyncio.ensure_future(gateway.chat().__aenter__())
        await eventually(lambda: sleeper.packets > 0, "a packet comes")
        await gateway.parts.catalogue.replace([], RoutingConfig())
        answer = await task
        assert answer.status == 503
        answer.release()


async def test_what_failed_while_it_slept_does_not_count_against_a_machine(
    tmp_path: Path,
) -> None:
    async with asleep(tmp_path, fail_threshold=100) as (gateway, sleeper):
        gpu = gateway.parts.catalogue.backends[0]
        for _ in range(5):
            gpu.breaker.failed(time.monotonic())
        assert not gpu.is_down
        async with gateway.chat() as answer:
            assert answer.status == 200
        assert sleeper.packets


async def test_who_waits_for_a_machine_that_falls_asleep_wakes_it(
    tmp_path: Path,
) -> None:
    async with asleep(tmp_path, max_concurrency=1) as (gateway, sleeper):
        async with gateway.chat() as answer:
            assert answer.status == 200
        gpu = gateway.parts.catalogue.backends[0]
        turn = gpu.begin(time.monotonic())
        task = asyncio.ensure_future(gateway.chat().__aenter__())
        await eventually(lambda: len(gateway.parts.line) == 1, "one waits")
        await sleeper.stop()
        sleeper._starting = None
        gpu.is_down = True
        gateway.parts.line.look_again()  # as the watchdog's finding does
        turn.end()
        answer = await task
        assert answer.status == 200
        answer.release()
        assert gateway.parts.catalogue.wakings(gpu) == 2
