"""Assembly: every component is made here, once, and handed what it needs.

``Parts`` is the list of what was made. Nothing below this floor knows it.
"""

import os
import resource
import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from inferencia.api.admin import Admin
from inferencia.api.admin.inside import Inside
from inferencia.api.goinfer import GoInfer
from inferencia.api.health import Health
from inferencia.api.llamaswap import LlamaSwap
from inferencia.api.metrics import MetricsPage
from inferencia.api.missing import Missing
from inferencia.api.openai import OpenAi
from inferencia.api.realtime import Realtime
from inferencia.api.route import Route
from inferencia.backends.base import Backend
from inferencia.backends.brands import make_backend
from inferencia.backends.managed import Managed
from inferencia.bodies import Bodies, BodyLimits
from inferencia.catalogue.choosing import Catalogue
from inferencia.cors import Cors
from inferencia.downstream.connection import Guard
from inferencia.downstream.listener import Listener
from inferencia.folders import state_folder
from inferencia.keys import KeyRing, Role
from inferencia.limits import Allowances, FailedLogins
from inferencia.localmodels import LocalModels, estimated
from inferencia.logs import dropped, listen
from inferencia.metrics import BackendState, Metrics
from inferencia.middleware import Anonymous, Doors, malformed_response
from inferencia.models.fleet import Fleet
from inferencia.models.virtual import VirtualNames
from inferencia.relaying import Relay
from inferencia.remote import RemoteAccess
from inferencia.settings import BackendConfig, Config, ServerConfig
from inferencia.shortcuts import Shortcuts
from inferencia.spending import Spending
from inferencia.tunnelling import Tunnel, make_relay, make_tunnel, relay_routes
from inferencia.usage import UsageBook
from inferencia.waiting import Line

# The share of file descriptors that clients may hold. Each may need a second one for
# its backend, and files, sockets of our own and child processes need some, too.
_CONNECTION_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Parts:
    """What one running daemon is made of."""

    instance: str  # this process's name in Via
    doors: Doors
    tunnel: Tunnel
    allowances: Allowances
    metrics: Metrics
    catalogue: Catalogue
    local: LocalModels
    swap: LlamaSwap
    admin: Admin
    line: Line
    spending: Spending
    usage: UsageBook
    relay: Relay
    bodies: Bodies
    guard: Guard
    listener: Listener
    shortcuts: Shortcuts


def make_parts(
    config: Config,
    ring: KeyRing,
    anonymous: Anonymous | None,
    env: Mapping[str, str] | None = None,
) -> Parts:
    """Make everything that ``config`` asks for; no socket is opened yet."""
    env = os.environ if env is None else env
    server = config.server
    instance = secrets.token_hex(8)
    metrics = Metrics(dropped_log_lines=dropped)
    spending = Spending(config.backends, config.usage.prices)
    usage = UsageBook(spending.cost_of)
    allowances = Allowances(
        config.ratelimit.requests_per_second, config.ratelimit.burst
    )
    doors = _make_doors(config, ring, anonymous, allowances, metrics, usage)
    fleet = Fleet(
        env=env,
        queue=config.queue,
        children=_children_folder(env),
        estimate=estimated,
        instance=instance,
    )
    listen(fleet.logs.proxy.add)
    names = VirtualNames(fleet)

    def changed() -> None:
        line.look_again()
        tunnel.models_changed()

    catalogue = Catalogue(
        make_backends(config.backends, instance),
        config.routing,
        config.watchdog,
        spending=spending,
        names=names,
        on_change=changed,
    )
    local = LocalModels(fleet, catalogue, names, env, instance=instance)
    line = Line(config.queue, admits=catalogue.admits)
    relay = Relay(
        catalogue,
        line,
        spending,
        usage,
        keepalive=server.sse_keepalive,
        instance=instance,
    )
    bodies = Bodies(body_limits(server))
    swap = LlamaSwap(
        fleet,
        names,
        catalogue,
        relay,
        bodies,
        usage,
        swap=lambda: local.swap,
        found=local.goinfer_listing,
        active=doors.active,
        instance=instance,
    )
    tunnel_relay = make_relay(config, catalogue, doors, instance)
    admin = Admin(
        Inside(
            doors=doors,
            bodies=bodies,
            allowances=allowances,
            catalogue=catalogue,
            local=local,
            line=line,
            usage=usage,
            agents=lambda: tunnel_relay.states if tunnel_relay else (),
            relays=lambda: tunnel.agent.states if tunnel.agent else (),
            accepts_agents=config.tunnel.accept.enabled,
            env=env,
            config=config,
        )
    )
    routes = (
        *relay_routes(tunnel_relay),
        *Health(lambda: catalogue.is_ready and not doors.draining).routes(),
        *MetricsPage(metrics, is_public=config.metrics.public).routes(),
        *OpenAi(relay, catalogue, bodies, usage).routes(),
        *Realtime(relay, instance=instance).routes(),
        *GoInfer(relay, bodies).routes(),
        *swap.routes(),
        *admin.routes(),
    )
    guard = _make_guard(server, doors)
    app = make_application(doors, routes)
    tunnel = make_tunnel(
        config, tunnel_relay, catalogue, doors, routes, guard, make_application
    )
    parts = Parts(
        instance=instance,
        doors=doors,
        tunnel=tunnel,
        allowances=allowances,
        metrics=metrics,
        catalogue=catalogue,
        local=local,
        swap=swap,
        admin=admin,
        line=line,
        spending=spending,
        usage=usage,
        relay=relay,
        bodies=bodies,
        guard=guard,
        listener=Listener(app, guard),
        shortcuts=Shortcuts(app, doors.roles, doors.links),
    )
    _follow(parts)
    return parts


def _make_doors(
    config: Config,
    ring: KeyRing,
    anonymous: Anonymous | None,
    allowances: Allowances,
    metrics: Metrics,
    usage: UsageBook,
) -> Doors:
    proxies = config.server.trusted_proxies
    return Doors(
        ring=ring,
        allowances=allowances,
        failed_logins=FailedLogins(),
        metrics=metrics,
        usage=usage,
        cors=Cors(config.server.origins),
        trusted_proxies=proxies,
        anonymous=anonymous,
        remote=RemoteAccess(config.admin.remote, proxies),
    )


def _make_guard(server: ServerConfig, doors: Doors) -> Guard:
    return Guard(
        header_timeout=server.header_timeout,
        write_timeout=server.write_timeout,
        max_connections=connection_cap(server.max_connections),
        error_response=malformed_response,
        on_malformed=doors.note_malformed,
    )


def _follow(parts: Parts) -> None:
    """Show the metrics what the other parts count themselves."""
    metrics, catalogue, guard = parts.metrics, parts.catalogue, parts.guard
    metrics.follow_backends(
        lambda: [
            state_of(backend, catalogue, parts.line)
            for backend in catalogue.backends
            # Of hundreds of files, those that are not loaded would only be noise.
            if backend.type != Managed.type or backend.has_loaded
        ]
    )
    metrics.follow_line(parts.line.waiting_by_model)
    metrics.follow_connections(lambda: (guard.open_connections, guard.refused))
    metrics.follow_spending(parts.spending.report)
    metrics.follow_usage(lambda: parts.usage.state)
    tunnel = parts.tunnel
    metrics.tunnel.follow(tunnel.agents, tunnel.relays, tunnel.passed)


def make_application(doors: Doors, routes: Iterable[Route]) -> web.Application:
    """One aiohttp application with these routes behind the chain."""
    app = web.Application(middlewares=doors.links, client_max_size=0)
    missing = Missing()
    for route in routes:
        for method in route.methods:
            added = app.router.add_route(
                method, route.path, route.handler, expect_handler=_no_hurry
            )
            doors.roles[added] = route.role
            doors.services[added] = route.service
            if route.further:
                doors.further[added] = route.further
            if route.is_relayed and route.role is Role.USER:
                doors.working.add(added)
            if route.is_transfer:
                doors.transfers.add(added)
            if route.changes:
                doors.changing.add(added)
        missing.note(route)
    added = app.router.add_route(
        "*", "/{path:.*}", missing.answer, expect_handler=_no_hurry
    )
    doors.roles[added] = None
    doors.services[added] = "health"
    return app


def _children_folder(env: Mapping[str, str]) -> Path:
    """Where running child processes are noted, for whoever comes after us."""
    try:
        return state_folder(env) / "children"
    except OSError:  # whoever has no home gets no orphans cleared away, but his models
        return Path(tempfile.gettempdir()) / f"inferencia-{os.getuid()}" / "children"


async def _no_hurry(request: web.Request) -> None:
    """Leave ``Expect: 100-continue`` to whoever reads the body, after the key check."""


def make_backends(configs: Iterable[BackendConfig], instance: str) -> list[Backend]:
    """A backend for each part of the configuration, in its order."""
    return [
        make_backend(config, instance=instance, place=f"backends[{number}]")
        for number, config in enumerate(configs)
    ]


def state_of(backend: Backend, catalogue: Catalogue, line: Line) -> BackendState:
    """What ``/metrics`` tells of one backend."""
    return BackendState(
        name=backend.name,
        is_up=not backend.is_down,
        breaker=backend.breaker.state(time.monotonic()),
        in_flight=backend.held,
        open_connections=backend.carrier.open_connections,
        waiting=line.waiting_at(backend),
        wakings=catalogue.wakings(backend),
    )


def body_limits(server: ServerConfig) -> BodyLimits:
    """What ``server`` says of request bodies."""
    return BodyLimits(server.max_body, server.max_body_total, server.read_timeout)


def connection_cap(configured: int) -> int:
    """``server.max_connections``; 0 stands for a share of the descriptor limit."""
    if configured:
        return configured
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 20
    return max(1, int(soft * _CONNECTION_SHARE))


def raise_descriptor_limit() -> None:
    """Raise the soft limit of file descriptors to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        # macOS refuses "infinity" although it is the hard limit it reports.
        return
