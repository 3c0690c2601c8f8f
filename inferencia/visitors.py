"""The clients of an agent whose TLS passes through a relay, and what they meet.

They are this machine's own users: its keys, its limits, its routing and its record of
usage hold for them as for those who come in at its own address. What they do not meet
is whatever belongs to this machine's owner alone: no administration, no metrics, no way
in for agents, and no ``--no-api-key``, since a relay lies between.

Where they come from only the relay knows. Its word goes into the log and nowhere else.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from aiohttp import web

from inferencia.addresses import BUILT, Address, addresses
from inferencia.api.route import Route
from inferencia.context import CONTEXT, Context
from inferencia.downstream.connection import Connection, Guard
from inferencia.downstream.listener import Listener
from inferencia.middleware import Doors
from inferencia.remote import RemoteAccess
from inferencia.settings import Config
from inferencia.shortcuts import Shortcuts
from inferencia.tls import Certificate, CertificateError
from inferencia.tunnel.tlsend import TlsEnd, Visit

# What is the owner's alone, or makes no sense behind a relay.
_OWNERS = frozenset({"admin", "metrics", "tunnel"})


@dataclass(frozen=True, slots=True)
class _Entrance(Address):
    """Where a visitor came in."""

    relay: str = ""
    client: str = ""


class Visitors:
    """The application of those whose TLS ends here, and its connections."""

    def __init__(
        self,
        config: Config,
        doors: Doors,
        guard: Guard,
        routes: Iterable[Route],
        application: Callable[[Doors, Iterable[Route]], web.Application],
    ) -> None:
        """Make it; ``start`` comes before the first visitor.

        Args:
            config: the whole configuration.
            doors: the chain of everybody else.
            guard: the rules for connections.
            routes: all that there are.
            application: puts routes behind a chain.

        Raises:
            ValueError: a certificate cannot be used; the text begins with its key.
        """
        entrance = _VisitorsDoors(doors)
        app = application(entrance, routes)
        self._services = _services(config)
        self._shortcuts = Shortcuts(app, entrance.roles, entrance.links)
        self._listener = Listener(app, guard)
        self.end = TlsEnd(
            _certificates(config), self._serve, lambda: guard.header_timeout
        )

    def _serve(self, visit: Visit) -> asyncio.Protocol:
        return self._listener.connection(
            _Entrance(visit.host, 0, self._services, visit.relay, visit.client)
        )

    async def start(self) -> None:
        """Be ready for visitors."""
        await self._listener.start(self._shortcuts)

    async def aclose(self) -> None:
        """Close every connection, and let the last bytes reach the relays."""
        await self._listener.close()
        await self.end.aclose()


class _VisitorsDoors(Doors):
    """The chain for visitors: the same, with the same books, but for its edges."""

    def __init__(self, doors: Doors) -> None:
        super().__init__(
            ring=doors.ring,
            allowances=doors.allowances,
            failed_logins=doors.failed_logins,
            metrics=doors.metrics,
            usage=doors.usage,
            cors=doors.cors,
            remote=RemoteAccess(False),
        )
        self._doors = doors
        self.active = doors.active
        self._is_quiet = doors._is_quiet

    def _identify(self, request: web.Request) -> Context:
        # These are replaced while the daemon runs.
        doors = self._doors
        self.ring, self.cors, self.draining = doors.ring, doors.cors, doors.draining
        context = super()._identify(request)
        entrance = _entrance_of(request)
        context.measurement.client = _told(entrance.client, entrance.relay)
        return context

    def _slow_down_guesses(self, request: web.Request) -> None:
        """Count wrong keys by relay: whatever it says of clients may be made up."""
        measurement = request[CONTEXT].measurement
        told, measurement.client = measurement.client, _entrance_of(request).relay
        try:
            super()._slow_down_guesses(request)
        finally:
            measurement.client = told


def _entrance_of(request: web.Request) -> _Entrance:
    connection = request.protocol
    assert isinstance(connection, Connection)
    entrance = connection.address
    assert isinstance(entrance, _Entrance)
    return entrance


def _told(client: str, relay: str) -> str:
    """A client's address for the log; it is never taken for one that is known."""
    try:
        return f"{ip_address(client)} by {relay}"
    except ValueError:
        return f"unknown by {relay}"


def _services(config: Config) -> frozenset[str]:
    """What visitors may use of what this machine offers at its own addresses."""
    offered = (one.services for one in addresses(config.server))
    services = frozenset[str]().union(*(one or BUILT for one in offered))
    return (services | {"health"}) - _OWNERS


def _certificates(config: Config) -> dict[str, Certificate]:
    found = {}
    for host, pair in config.tunnel.dial.passthrough.items():
        assert pair.cert is not None and pair.key is not None
        try:
            found[host] = Certificate(pair.cert, pair.key)
        except CertificateError as error:
            raise ValueError(f"tunnel.dial.passthrough.{host}: {error}") from error
    return found
