"""Promises of ``wake.py``: one waking for all who ask, and none without end."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from inferencia.settings import WakeConfig
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
        assert 0 < refused.value.retry_after <= 0.2
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
