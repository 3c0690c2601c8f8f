"""Both ends of the tunnel, as far as this daemon is one: made, started, drained, ended.

What comes through a tunnel to this machine meets an application of its own: the routes
that ask a model for work, and nothing else. Who sent it was checked by the relay, whose
word is taken for that and for nothing more: its requests are those of one internal
user, who has no other way in.

Clients whose TLS a relay only passes on are another matter: they are users of this
machine (``visitors``). Neither that nor the relay's port for it is imported unless the
configuration asks for it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from aiohttp import web

from inferencia.addresses import split_address
from inferencia.admission import StartFailed
from inferencia.api.missing import Missing
from inferencia.api.route import Route
from inferencia.api.tunnel import TunnelDoor
from inferencia.catalogue.choosing import Catalogue
from inferencia.cors import Cors
from inferencia.downstream.connection import Guard
from inferencia.downstream.listener import Listener
from inferencia.keys import Key, Role
from inferencia.middleware import Doors, malformed_response, today
from inferencia.settings import Config, TunnelConfig, TunnelDialConfig
from inferencia.shortcuts import Shortcuts
from inferencia.trust import trusting
from inferencia.tunnel.agent import Agent
from inferencia.tunnel.dialing import relay_origin
from inferencia.tunnel.relay import TunnelRelay
from inferencia.tunnel.wire import DEFAULT_STREAMS, MAX_STREAMS, Model
from inferencia.tunnelmetrics import PassthroughState, PeerState

if TYPE_CHECKING:
    from inferencia.tunnel.passthrough import PassthroughPort
    from inferencia.visitors import Visitors

log = logging.getLogger(__name__)

Application = Callable[[Doors, Iterable[Route]], web.Application]

# Only the relay closes what is idle: when both may, a request can meet the closing.
_KEEPALIVE_SECONDS = 30 * 86400.0
# Above what all relays together may dial.
_MAX_CONNECTIONS = 16 * MAX_STREAMS
# After a start of the relay, agents are not back yet: for so long their models, which
# nobody has listed, are 503 and not 404.
_EXPECTING_SECONDS = 120.0
# How long an idle machine waits for its relays to say that nothing more comes.
_FAREWELL_SECONDS = 2.0
# Certificates are looked at as often.
_FILES_POLL_SECONDS = 1.0

# Who asks through the tunnel. The relay has held its own users to their limits.
PRINCIPAL = Key(name="tunnel", role=Role.USER, rps=1e6, burst=10**6)


class Tunnel:
    """The ends of the tunnel that are here; either may be missing."""

    def __init__(
        self,
        doors: Doors,
        relay: TunnelRelay | None,
        agent: Agent | None = None,
        listener: Listener | None = None,
        shortcuts: Shortcuts | None = None,
        entrance: Doors | None = None,
        visitors: "Visitors | None" = None,
    ) -> None:
        self.relay = relay
        self.agent = agent
        # The relay's port for TLS that it passes on, and where it is to be opened; the
        # agent's application for those whose TLS was passed on.
        self.port: PassthroughPort | None = None
        self._port_address = ("", 0)
        self.visitors = visitors
        self._doors = doors
        # Of what comes through the tunnel to this machine:
        self._listener = listener
        self._shortcuts = shortcuts
        self._entrance = entrance
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        await self._open_port()
        if self._listener is not None:
            await self._listener.start(self._shortcuts)
        if self.visitors is not None:
            await self.visitors.start()
            self._tasks.append(loop.create_task(self._follow_certificates()))
        if self.relay is not None:
            self._tasks.append(loop.create_task(self.relay.run(), name="relay"))
        if self.agent is not None:
            self._tasks.append(loop.create_task(self.agent.run(), name="agent"))
        return self

    async def _open_port(self) -> None:
        if self.port is None:
            return
        host, port = self._port_address
        try:
            await self.port.open(host, port)
        except OSError as error:
            raise StartFailed(
                f"tunnel.accept.passthrough: cannot listen on {host}:{port}: "
                f"{error.strerror or error}"
            ) from error
        log.info("TLS is passed on by name at %s:%d", host, self.port.port)

    async def _follow_certificates(self) -> None:
        assert self.visitors is not None
        while True:
            await asyncio.sleep(_FILES_POLL_SECONDS)
            self.visitors.end.poll()

    async def __aexit__(self, *_: object) -> None:
        if self.port is not None:
            await self.port.aclose()
        if self.visitors is not None:
            await self.visitors.aclose()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self.relay is not None:
            await self.relay.aclose()
        if self._listener is not None:
            await self._listener.close()

    def pass_on(self, port: "PassthroughPort", host: str, number: int) -> None:
        """Have a port for TLS that is passed on, at this address."""
        self.port = port
        self._port_address = (host, number)

    async def drain(self, seconds: float) -> None:
        """Ask agents and relays for nothing new; return when nothing is in flight.

        Args:
            seconds: how long what has begun may take.
        """
        if self.port is not None:
            self.port.stop_accepting()
        if self.relay is not None:
            self.relay.drain(seconds)
        leaving = None
        if self.agent is not None:
            leave = self.agent.leave(seconds, "it is shutting down")
            leaving = asyncio.ensure_future(leave)
            await asyncio.wait((leaving,), timeout=min(_FAREWELL_SECONDS, seconds))
        try:
            await self._doors.quiet()
            if self.port is not None:
                await self.port.quiet()
            if leaving is not None:
                await asyncio.wait((leaving,), timeout=_FAREWELL_SECONDS)
        finally:
            if self._entrance is not None:
                self._entrance.draining = True
            if leaving is not None:
                leaving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await leaving

    def keys_changed(self) -> None:
        """Other keys are in force."""
        if self.relay is not None:
            self.relay.check_keys()

    def reload(self, old: TunnelConfig, new: TunnelConfig) -> None:
        """Take over what can be changed while it runs: the token."""
        token = new.dial.token
        if self.agent is not None and token is not None:
            self.agent.change_token(token.reveal())
        if replace(new, dial=replace(new.dial, token=old.dial.token)) != old:
            log.warning(
                "tunnel was changed: all but its token takes effect at the next start"
            )

    def agents(self) -> tuple[PeerState, ...]:
        """Who has dialed in, for ``/metrics``."""
        states = () if self.relay is None else self.relay.states
        return tuple(
            PeerState(
                name=state.name,
                is_up=state.state == "active",
                connections=state.connections,
                streams=state.streams,
                reconnects=state.reconnects,
                round_trip=state.round_trip,
            )
            for state in states
        )

    def relays(self) -> tuple[PeerState, ...]:
        """Whom we have dialed, for ``/metrics``: each relay once."""
        found: dict[str, PeerState] = {}
        for state in () if self.agent is None else self.agent.states:
            before = found.get(state.relay)
            is_up = state.state == "active"
            found[state.relay] = PeerState(
                name=state.relay,
                is_up=is_up or (before is not None and before.is_up),
                connections=state.connections + (before.connections if before else 0),
                streams=0,
                reconnects=state.reconnects + (before.reconnects if before else 0),
                round_trip=state.round_trip,
            )
        return tuple(found.values())

    def passed(self) -> PassthroughState:
        """What passes through the port for TLS, for ``/metrics``."""
        return PassthroughState() if self.port is None else self.port.state

    def models_changed(self) -> None:
        """Other models are served here."""
        if self.agent is not None:
            self.agent.models_changed()


def make_relay(
    config: Config, catalogue: Catalogue, doors: Doors, instance: str
) -> TunnelRelay | None:
    """The public end, if it is asked for."""
    if not config.tunnel.accept.enabled:
        return None

    until = time.monotonic() + _EXPECTING_SECONDS

    def key_of(name: str) -> Key | None:
        day = today()
        found = (key for key in doors.ring.keys if key.name == name)
        return next((key for key in found if not key.has_expired(day)), None)

    def expected(model: str) -> str | None:
        if time.monotonic() > until:
            return None
        for key in doors.ring.keys:
            is_absent = key.role is Role.AGENT and not relay.knows(key.name)
            if is_absent and key.models and key.may_see(model):
                return (
                    f'agent "{key.name}", which may serve "{model}", has not '
                    "connected yet"
                )
        return None

    catalogue.expected = expected
    relay = TunnelRelay(
        catalogue,
        key_of,
        instance=instance,
        beat=config.tunnel.beat,
        passes=config.tunnel.accept.passthrough is not None,
    )
    return relay


def relay_routes(relay: TunnelRelay | None) -> tuple[Route, ...]:
    """Where agents come in."""
    return () if relay is None else TunnelDoor(relay).routes()


def make_tunnel(
    config: Config,
    relay: TunnelRelay | None,
    catalogue: Catalogue,
    doors: Doors,
    routes: Iterable[Route],
    guard: Guard,
    application: Application,
) -> Tunnel:
    """Both ends.

    Args:
        config: the whole configuration.
        relay: see ``make_relay``.
        catalogue: what is served here.
        doors: the chain, whose links are used again.
        routes: all that there are; those that ask a model for work are offered.
        guard: the rules for the connections of clients.
        application: puts routes behind a chain, for clients.

    Raises:
        ValueError: the configuration cannot be used; the text begins with its key.
    """
    tunnel = _make_agents_end(
        config, relay, catalogue, doors, routes, guard, application
    )
    passthrough = config.tunnel.accept.passthrough
    if relay is not None and passthrough is not None:
        from inferencia.tunnel.passthrough import PassthroughPort

        host, port = split_address(passthrough, config.server)
        tunnel.pass_on(PassthroughPort(lambda: relay.sessions, guard), host, port)
    return tunnel


def _make_agents_end(
    config: Config,
    relay: TunnelRelay | None,
    catalogue: Catalogue,
    doors: Doors,
    routes: Iterable[Route],
    guard: Guard,
    application: Application,
) -> Tunnel:
    dial = config.tunnel.dial
    if not dial.relays:
        return Tunnel(doors, relay)
    visitors = None
    if dial.passthrough:
        from inferencia.visitors import Visitors

        visitors = Visitors(config, doors, guard, routes, application)
    guard = Guard(
        header_timeout=config.server.header_timeout,
        write_timeout=config.server.write_timeout,
        max_connections=_MAX_CONNECTIONS,
        error_response=malformed_response,
        on_malformed=doors.note_malformed,
        parks=True,
    )
    entrance = _Entrance(doors)
    app = _application(entrance, routes)
    listener = Listener(app, guard, keepalive_seconds=_KEEPALIVE_SECONDS)
    agent = _make_agent(
        dial, config.tunnel.beat, catalogue, doors, visitors, serve=listener.connection
    )
    shortcuts = Shortcuts(app, entrance.roles, entrance.links)
    return Tunnel(doors, relay, agent, listener, shortcuts, entrance, visitors)


def _make_agent(
    dial: TunnelDialConfig,
    beat: float,
    catalogue: Catalogue,
    doors: Doors,
    visitors: "Visitors | None",
    serve: Callable[[], asyncio.Protocol],
) -> Agent:
    if dial.token is None:
        raise ValueError("tunnel.dial.token: missing; a relay lets nobody in without")
    origins = []
    for number, url in enumerate(dial.relays):
        try:
            origins.append(relay_origin(url))
        except ValueError as error:
            raise ValueError(f"tunnel.dial.relays[{number}]: {error}") from error
    try:
        context = trusting(dial.ca_file)
    except OSError as error:
        raise ValueError(
            f"tunnel.dial.ca_file: {dial.ca_file}: {error.strerror or error}"
        ) from error

    def everything(model: str) -> bool:
        return True

    def models() -> tuple[Model, ...]:
        listing = catalogue.listing(everything)
        return tuple(Model(entry["id"], entry) for entry in listing)

    def max_streams() -> int:
        limits = (b.config.max_concurrency for b in catalogue.backends)
        most = sum(limit or DEFAULT_STREAMS for limit in limits)
        return max(DEFAULT_STREAMS, min(most, MAX_STREAMS))

    return Agent(
        tuple(origins),
        name=dial.name,
        token=dial.token.reveal(),
        context=context,
        beat=beat,
        max_streams=max_streams,
        models=models,
        active=lambda: len(doors.active),
        serve=serve,
        hosts=() if visitors is None else visitors.end.hosts,
        take_over=None if visitors is None else visitors.end.take_over,
    )


class _Entrance(Doors):
    """The chain of what comes through the tunnel: everybody there is one user.

    Work that it lets in counts as the whole daemon's. It goes on letting work in while
    the daemon drains, until the relays know that.
    """

    def __init__(self, doors: Doors) -> None:
        super().__init__(
            ring=doors.ring,
            allowances=doors.allowances,
            failed_logins=doors.failed_logins,
            metrics=doors.metrics,
            usage=doors.usage,
            cors=Cors(()),
        )
        self.active = doors.active
        self._is_quiet = doors._is_quiet

    def _identify_key(self, request: web.Request) -> Key:
        return PRINCIPAL


def _application(doors: Doors, routes: Iterable[Route]) -> web.Application:
    """The application of what comes through the tunnel: work for models, no more."""
    app = web.Application(middlewares=doors.links, client_max_size=0)
    missing = Missing()
    for route in routes:
        if route.is_relayed and route.role is Role.USER:
            added = app.router.add_route(route.method, route.path, route.handler)
            doors.roles[added] = route.role
            doors.services[added] = route.service
            missing.note(route)
    rest = app.router.add_route("*", "/{path:.*}", missing.answer)
    doors.roles[rest] = None
    doors.services[rest] = "health"
    return app
