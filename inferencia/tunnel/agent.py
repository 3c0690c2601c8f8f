"""The agent: keeps this machine connected to its relays.

Each relay is a URL; each address of its name gets a link of its own, so that several
machines behind one name are all reached, and names are looked up again now and then.
Two addresses that lead to the same relay (one machine with IPv4 and IPv6) are noticed
by the name that the relay tells, and only one of them is used.
"""

import asyncio
import logging
import ssl
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from inferencia.tunnel.carrier import Carrier
from inferencia.tunnel.dialing import DialFailed, look_up
from inferencia.tunnel.link import Link, LinkState, Terms
from inferencia.tunnel.wire import Model
from inferencia.upstream.origin import Origin

log = logging.getLogger(__name__)

# A relay that moves is found again after this time at the latest.
_LOOK_UP_SECONDS = 60.0
_LOOK_UP_AGAIN_SECONDS = 5.0
# A name with more addresses than this is no relay's.
_MAX_ADDRESSES = 16


@dataclass(frozen=True, slots=True)
class RelayState:
    """What is known of one address of one relay at this moment."""

    relay: str  # host:port of its URL
    address: str
    state: str
    connections: int  # data connections
    round_trip: float | None  # seconds
    reconnects: int
    trouble: str


class Agent:
    """All links of one daemon."""

    def __init__(
        self,
        relays: tuple[Origin, ...],
        *,
        name: str | None,
        token: str,
        context: ssl.SSLContext,
        beat: float,
        max_streams: Callable[[], int],
        models: Callable[[], tuple[Model, ...]],
        active: Callable[[], int],
        serve: Callable[[], asyncio.Protocol],
        hosts: tuple[str, ...] = (),
        take_over: Callable[[Carrier, bytes], None] | None = None,
    ) -> None:
        """Make an agent; ``run`` dials.

        Args:
            relays: see ``dialing.relay_origin``.
            name: what the key is expected to be named at the relay; None: anything.
            token: the key's secret.
            context: see ``inferencia.trust``.
            beat: ``tunnel.beat`` in seconds.
            max_streams: how many requests one relay may send at a time.
            models: what is served here.
            active: how many requests are being worked on, whoever sent them.
            serve: makes the HTTP server of one connection.
            hosts: whose TLS ends here.
            take_over: told of a data connection what the relay says that it is for.
        """
        self._relays = relays
        self._token = token
        self._terms = Terms(
            name=name,
            token=lambda: self._token,
            instance=str(uuid.uuid4()),
            context=context,
            beat=beat,
            max_streams=max_streams,
            models=models,
            active=active,
            serve=serve,
            hosts=hosts,
            take_over=take_over,
        )
        self._links: dict[tuple[Origin, str], Link] = {}
        self._tasks: dict[tuple[Origin, str], asyncio.Task[None]] = {}

    @property
    def states(self) -> tuple[RelayState, ...]:
        """All links, in the order in which they were found."""
        return tuple(
            RelayState(
                relay=link.origin.authority,
                address=link.address,
                state=link.state.value,
                connections=link.live,
                round_trip=link.round_trip,
                reconnects=max(0, link.joined - 1),
                trouble=link.trouble,
            )
            for link in self._links.values()
        )

    def change_token(self, token: str) -> None:
        """Show another token from the next connection on."""
        self._token = token

    def models_changed(self) -> None:
        """Have the relays told what is served now."""
        for link in self._links.values():
            link.models_changed()

    async def run(self) -> None:
        """Keep connected until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for origin in self._relays:
                    group.create_task(self._follow(origin))
        finally:
            await self._close()

    async def leave(self, seconds: float, reason: str) -> None:
        """Ask every relay for no new work, and wait until nothing is in flight.

        Args:
            seconds: how long at most.
            reason: for the relays' logs.
        """
        leaving = [
            asyncio.ensure_future(link.leave(seconds, reason))
            for link in self._links.values()
        ]
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=seconds)
            for task in late:
                task.cancel()

    async def _follow(self, origin: Origin) -> None:
        """Keep a link to each address of a relay."""
        while True:
            seconds = _LOOK_UP_SECONDS
            try:
                self._take_addresses(origin, (await look_up(origin))[:_MAX_ADDRESSES])
            except DialFailed as error:
                if not any(key[0] == origin for key in self._links):
                    log.warning("relay %s: %s", origin.authority, error)
                    seconds = _LOOK_UP_AGAIN_SECONDS
            await asyncio.sleep(seconds)

    def _take_addresses(self, origin: Origin, addresses: tuple[str, ...]) -> None:
        """Link to new addresses; leave those that are gone and lead nowhere."""
        loop = asyncio.get_running_loop()
        for address in addresses:
            key = (origin, address)
            if key not in self._links:
                link = Link(origin, address, self._terms, claim=self._claim)
                self._links[key] = link
                self._tasks[key] = loop.create_task(link.run())
        for key, link in tuple(self._links.items()):
            is_gone = key[0] == origin and key[1] not in addresses
            if is_gone and link.state is not LinkState.ACTIVE:
                self._tasks.pop(key).cancel()
                del self._links[key]

    def _claim(self, claimant: Link, relay: str) -> bool:
        """Whether no other link is connected to this relay."""
        return all(
            link is claimant or link.relay != relay for link in self._links.values()
        )

    async def _close(self) -> None:
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._links.clear()
