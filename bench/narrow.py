"""A way from home to the relay that is as narrow as an uplink.

As root on Linux it is a cable: a network namespace for the home, one for the modem,
which passes packets on at a bounded rate from a short queue (``tc tbf``), and veth
pairs between them. Elsewhere ``python -m bench.narrow BYTES_PER_SECOND PORT...`` stands
in: it listens on a port for each of those, passes connections on to it, and holds what
comes from the dialing side to the rate, all connections through one queue.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.children import Children, read_port

#: 32 Mbit/s, an ordinary uplink.
BYTES_PER_SECOND = 4_000_000
#: What the modem's queue holds, in time. Many hold far more, which is nobody's merit.
#: With 20 ms it dropped 2 % of the packets, and of a token's that costs 50 to 90 ms.
_QUEUE_MILLISECONDS = 40

_SLICE_BYTES = 4096
_SLICES = BYTES_PER_SECOND * _QUEUE_MILLISECONDS // 1000 // _SLICE_BYTES


@dataclass(frozen=True, slots=True)
class Way:
    """How home reaches the relay's machine."""

    kind: str
    relay: str = "127.0.0.1"  # the relay's address, as home dials it
    home: Sequence[str] = ()  # put before a command to run it at home


@contextlib.contextmanager
def cable() -> Iterator[Way | None]:
    """Namespaces and a narrow cable, or None where that cannot be had."""
    if sys.platform != "linux" or os.geteuid() or not _has("ip", "tc"):
        yield None
        return
    number = os.getpid()
    home, modem = f"bench-home-{number}", f"bench-modem-{number}"
    near, far = f"bn{number}", f"bf{number}"
    net = f"10.214.{number % 250}"
    rate = f"{BYTES_PER_SECOND * 8}bit"
    steps = f"""
        ip netns add {home}
        ip netns add {modem}
        ip link add {near} type veth peer outer netns {modem}
        ip -n {home} link add {far} type veth peer inner netns {modem}
        ip addr add {net}.1/24 dev {near}
        ip -n {home} addr add {net}.2/24 dev {far}
        ip -n {modem} link add bridge type bridge
        ip -n {modem} link set outer master bridge
        ip -n {modem} link set inner master bridge
        ip link set {near} up
        ip -n {home} link set {far} up
        ip -n {home} link set lo up
        ip -n {modem} link set outer up
        ip -n {modem} link set inner up
        ip -n {modem} link set bridge up
        tc -n {modem} qdisc add dev outer root tbf rate {rate} burst 16kb latency \
{_QUEUE_MILLISECONDS}ms
    """
    try:
        made = all(_run(step) for step in steps.strip().splitlines())
        way = Way(
            f"cable of {BYTES_PER_SECOND * 8 / 1e6:g} Mbit/s, queue of"
            f" {_QUEUE_MILLISECONDS} ms, {_congestion()}",
            f"{net}.1",
            ("ip", "netns", "exec", home),
        )
        yield way if made else None
    finally:
        for step in (f"link del {near}", f"netns del {home}", f"netns del {modem}"):
            _run(f"ip {step}")


def stand_in(children: Children, ports: Sequence[int], log: Path) -> list[int]:
    """The ports at which these can be reached through a narrow way of our own."""
    arguments = [str(BYTES_PER_SECOND), *map(str, ports)]
    child = children.start("bench.narrow", *arguments, core=None, log=log)
    return [read_port(child, log) for _ in ports]


def _has(*programs: str) -> bool:
    return all(shutil.which(program) for program in programs)


def _run(step: str) -> bool:
    done = subprocess.run(step.split(), capture_output=True, timeout=30)
    return not done.returncode


def _congestion() -> str:
    path = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return f"TCP {path.read_text().strip()}"


class _Queue:
    """What all connections share: slices leave it at the rate, in order."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._slices: asyncio.Queue[tuple[asyncio.StreamWriter, bytes]] = asyncio.Queue(
            _SLICES
        )

    async def put(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        await self._slices.put((writer, data))

    async def run(self) -> None:
        free = time.monotonic()  # when the way is
        while True:
            writer, data = await self._slices.get()
            now = time.monotonic()
            free = max(free, now) + len(data) / self._rate
            if free - now > 0.002:  # timers are not finer
                await asyncio.sleep(free - now)
            if not writer.is_closing():  # else its client has left meanwhile
                writer.write(data)


async def _serve(queue: _Queue, port: int) -> asyncio.Server:
    async def pass_on(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        down = asyncio.ensure_future(_copy(far_reader, writer))
        try:
            while data := await reader.read(_SLICE_BYTES):
                await queue.put(far, data)
        except OSError:
            pass
        finally:
            down.cancel()
            far.transport.abort()
            writer.transport.abort()

    return await asyncio.start_server(pass_on, "127.0.0.1", 0)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


async def _main(rate: float, ports: Sequence[int]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    queue = _Queue(rate)
    running = asyncio.ensure_future(queue.run())
    servers = [await _serve(queue, port) for port in ports]
    for server in servers:
        print(server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    for server in servers:
        server.close()
    running.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.narrow", description=__doc__)
    parser.add_argument("rate", type=float, metavar="BYTES_PER_SECOND")
    parser.add_argument("ports", type=int, nargs="+", metavar="PORT")
    options = parser.parse_args()
    machine.run(_main(options.rate, options.ports), fast_loop=True)
