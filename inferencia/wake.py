"""Wake-on-LAN: a sleeping machine is woken when it is asked for.

A magic packet is six bytes FF and sixteen times the machine's hardware address, in a
UDP datagram to the broadcast address of its network (AMD, "Magic Packet Technology",
1995). It also works when it is sent to one address only, where a router or a neighbour
entry brings it to the right port; that is how it crosses networks.

Nothing answers to it. So a ``Waker`` goes on sending, and asks the machine's server for
a sign of life, until there is one or ``wake.timeout`` has passed:

=========  =========================================================================
asleep     nobody asks for the machine; nothing is sent
waking     one task sends and probes; whoever asks meanwhile waits for its outcome
awake      the probe was answered: all of them go on
resting    it did not wake in time: whoever asks is told so at once, for a while
=========  =========================================================================

A waiter that is cancelled leaves the others alone; when the last one is, the waking
ends.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from inferencia.settings import WakeConfig

log = logging.getLogger(__name__)

# The discard port, the usual one; any would do, since the network card looks only at
# the bytes.
PORT = 9

# Datagrams get lost, and nobody tells us.
PACKETS = 3
BURST_SECONDS = 3.0

# How soon after an unanswered probe the next one is sent. A probe of a sleeping machine
# takes as long as connecting may.
PROBE_SECONDS = 1.0

# After a machine did not wake, requests for it are refused at once for so long: waiting
# once more is as vain, and clients have waited for ``wake.timeout`` already.
REST_SECONDS = 30.0

Probe = Callable[[], Awaitable[bool]]


class StillAsleep(Exception):
    """The machine did not answer in time. ``str()`` completes "the machine ...".

    ``retry_after`` is the seconds until it is worth asking again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def magic_packet(mac: str) -> bytes:
    """The bytes that wake the machine with this hardware address.

    Raises:
        ValueError: it is neither ``aa:bb:cc:dd:ee:ff`` nor ``aa-bb-cc-dd-ee-ff``.
    """
    try:
        address = bytes.fromhex(mac.replace(":", "").replace("-", ""))
    except ValueError:
        address = b""
    if len(address) != 6:
        raise ValueError(f'"{mac}" is not a hardware address (aa:bb:cc:dd:ee:ff)')
    return b"\xff" * 6 + address * 16


def target_of(broadcast: str) -> tuple[str, int]:
    """Where packets go: ``192.168.1.255``, or with a port of its own, ``host:7``."""
    if broadcast.count(":") > 1 and not broadcast.startswith("["):
        return broadcast, PORT  # an IPv6 address
    parts = urlsplit(f"//{broadcast}")
    return parts.hostname or broadcast, parts.port or PORT


class Waker:
    """Wakes one machine, once for all who ask for it."""

    def __init__(
        self,
        config: WakeConfig,
        name: str,
        probe: Probe,
        *,
        burst_seconds: float = BURST_SECONDS,
        probe_seconds: float = PROBE_SECONDS,
        rest_seconds: float = REST_SECONDS,
    ) -> None:
        """Make a waker; nothing is sent before ``wake``.

        Args:
            config: hardware address, where to send, how long to wait.
            name: the backend's, for the log.
            probe: asks the server once; whether it answered. It may raise nothing.
            burst_seconds: time between two bursts of packets.
            probe_seconds: time between an unanswered probe and the next.
            rest_seconds: how long to refuse after a failure.

        Raises:
            ValueError: the hardware address is none.
        """
        assert config.mac is not None
        self.wakings = 0  # begun so far
        self.waiting = 0  # who waits for the machine now
        self._packet = magic_packet(config.mac)
        self._target = target_of(config.broadcast)
        self._timeout = config.timeout
        self._name = name
        self._probe = probe
        self._burst_seconds = burst_seconds
        self._probe_seconds = probe_seconds
        self._rest_seconds = rest_seconds
        self._task: asyncio.Task[bool] | None = None  # the one to wait for
        self._tasks: set[asyncio.Task[bool]] = set()  # and those that are ending
        self._rests_until = float("-inf")  # by the loop's clock

    @property
    def is_waking(self) -> bool:
        """Whether packets are being sent."""
        return self._task is not None and not self._task.done()

    async def wake(self) -> None:
        """Return when the machine answers.

        Raises:
            StillAsleep: it did not within ``wake.timeout``, now or just before.
        """
        loop = asyncio.get_running_loop()
        rest = self._rests_until - loop.time()
        if rest > 0:
            raise StillAsleep(
                f"did not wake within {self._timeout:g} s just now", retry_after=rest
            )
        task = self._task
        if task is None or task.done():
            self.wakings += 1
            task = self._task = loop.create_task(self._wake())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self.waiting += 1
        try:
            await asyncio.wait([task])
        finally:
            self.waiting -= 1
            if not self.waiting and not task.done():
                task.cancel()
                self._task = None
        if task.cancelled() or not task.result():
            raise StillAsleep(
                f"did not wake within {self._timeout:g} s",
                retry_after=self._rest_seconds,
            )

    async def aclose(self) -> None:
        """End a waking; for whoever waits it has failed. Idempotent."""
        ending = tuple(self._tasks)
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)

    async def _wake(self) -> bool:
        log.info('waking the machine of backend "%s"', self._name)
        loop = asyncio.get_running_loop()
        began = loop.time()
        sending = loop.create_task(self._keep_sending())
        try:
            async with asyncio.timeout(self._timeout):
                await self._answered()
        except TimeoutError:
            self._rests_until = loop.time() + self._rest_seconds
            log.warning(
                'the machine of backend "%s" did not wake within %g s',
                self._name,
                self._timeout,
            )
            return False
        finally:
            sending.cancel()
            await asyncio.wait([sending])
        seconds = loop.time() - began
        log.info('backend "%s" answers after %.1f s', self._name, seconds)
        return True

    async def _answered(self) -> None:
        while True:
            if await self._probe():
                return
            await asyncio.sleep(self._probe_seconds)

    async def _keep_sending(self) -> None:
        while True:
            try:
                await send(self._packet, self._target)
            except OSError as error:
                log.warning(
                    'cannot send a magic packet for backend "%s": %s', self._name, error
                )
            await asyncio.sleep(self._burst_seconds)


async def send(packet: bytes, target: tuple[str, int]) -> None:
    """Send a burst of datagrams to a host or a broadcast address.

    Raises:
        OSError: there is no such host, or no way there.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(*target, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    # A new socket each time: routes and addresses change when a laptop moves.
    with socket.socket(family, kind, protocol) as sender:
        sender.setblocking(False)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for _ in range(PACKETS):
            sender.sendto(packet, address)
