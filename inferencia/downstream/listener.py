"""The open sockets of a daemon, where its clients' connections come in.

``Listener`` serves one application on as many addresses as it is told to open, with a
``Connection`` for each client that comes. Connections that come in by another way, as
those through a tunnel do, get theirs from it too. ``open_server`` is for those who
listen for something else than requests.

Of aiohttp's private names ``Server._kwargs`` is used here, with which it would make
the connections itself. A test fails when it moves.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

from inferencia.downstream.connection import Connection, Guard

Answering = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

# Idle keep-alive connections. Longer than the usual 60 s of reverse proxies, so that it
# is the proxy which closes (nginx: keepalive_timeout 75s on its own client side).
KEEPALIVE_SECONDS = 75.0

# Pending connections in the kernel; the kernel clips it to somaxconn.
BACKLOG = 1024

# How many connections are taken from the kernel in one turn of the event loop. Each
# holds a descriptor for some turns even if there is no room for it. asyncio would take
# the whole backlog at once and, when the descriptors run out on the way, stop accepting
# for a second (measured: 1,500 connections at a limit of 256 kept all out for 2.7 s).
_ACCEPTS_PER_TURN = 16


class Listener:
    """The open sockets of one daemon, serving one application."""

    def __init__(
        self,
        app: web.Application,
        guard: Guard,
        *,
        keepalive_seconds: float = KEEPALIVE_SECONDS,
    ) -> None:
        """Serve an application; ``start`` comes first.

        Args:
            app: what answers.
            guard: the rules for its connections.
            keepalive_seconds: how long a connection may be idle.
        """
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            keepalive_timeout=keepalive_seconds,
            lingering_time=0,  # see Connection.finish_response
            # A compressed body is refused, never inflated.
            auto_decompress=False,
            # Whoever closes has waited for open requests already.
            shutdown_timeout=1.0,
        )
        self._guard = guard
        self._servers: list[asyncio.Server] = []
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, answer: Answering | None = None) -> None:
        """Run the application's start-up. No socket is open yet.

        Args:
            answer: takes the requests in place of the application itself.
        """
        await self._runner.setup()
        if answer is not None and self._runner.server is not None:
            self._runner.server.request_handler = answer
        self._sweeper = asyncio.create_task(self._guard.sweep(), name="sweep")

    async def open(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        address: object = None,
    ) -> tuple[str, int]:
        """Listen on one address.

        Args:
            host: a name or number; all its addresses are bound.
            port: 0 asks for a free one.
            tls: for connections that begin with a handshake.
            address: kept by every connection that comes in here.

        Returns:
            The address that is really bound (port 0 asks for a free one).

        Raises:
            OSError: the address cannot be bound.
        """
        opened = await open_server(
            lambda: self.connection(address),
            host,
            port,
            tls=tls,
            # A handshake is part of a request's head: it has the same time.
            handshake_seconds=self._guard.header_timeout,
        )
        self._servers.append(opened)
        bound = opened.sockets[0].getsockname()
        return bound[0], bound[1]

    def connection(self, address: object = None) -> Connection:
        """What serves one connection, wherever its transport comes from."""
        server = self._runner.server
        if server is None:
            raise RuntimeError("start() comes first")
        loop = asyncio.get_running_loop()
        return Connection(self._guard, address, server, loop=loop, **server._kwargs)

    def stop_accepting(self) -> None:
        """Close the listening sockets; open connections go on."""
        for server in self._servers:
            server.close()

    async def close(self) -> None:
        """Close everything. Safe to call twice."""
        self.stop_accepting()
        self._servers.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None
        await self._runner.cleanup()


async def open_server(
    make: Callable[[], asyncio.Protocol],
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    handshake_seconds: float | None = None,
) -> asyncio.Server:
    """Listen on all addresses of a host.

    Args:
        make: makes the protocol of one connection.
        host: a name or number.
        port: 0 asks for a free one.
        tls: for connections that begin with a handshake.
        handshake_seconds: how long that may take.

    Raises:
        OSError: an address cannot be bound.
    """
    server = await asyncio.get_running_loop().create_server(
        make,
        host,
        port,
        ssl=tls,
        backlog=_ACCEPTS_PER_TURN,
        reuse_address=True,
        ssl_handshake_timeout=handshake_seconds if tls else None,
    )
    for listening in server.sockets:
        # The loop has given its own number to the kernel, too.
        with listening.dup() as same:
            same.listen(BACKLOG)
    return server


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        infos = socket.getaddrinfo(host or "0.0.0.0", 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(_is_loopback_address(str(info[4][0])) for info in infos)


def _is_loopback_address(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
