"""Opening the addresses that the daemon listens on.

Nobody has to choose a port: when the usual one is taken and none was asked for, a
second one is used and remembered, so that commands which were printed go on working.
"""

import errno
import logging
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from inferencia.addresses import Address, addresses
from inferencia.discovery import who_listens
from inferencia.downstream.listener import Listener
from inferencia.folders import state_folder
from inferencia.greeting import base_url
from inferencia.settings import ServerConfig
from inferencia.tls import Certificate

log = logging.getLogger(__name__)

# Where to listen when 8080 is taken and nobody asked for it; remembered in this file.
SECOND_PORT = 8088
_PORT_FILE = "port"


class CannotListen(Exception):
    """An address cannot be used. ``str()`` says why and what to do."""


@dataclass(frozen=True, slots=True)
class Opened:
    """One address that is listened on."""

    host: str
    port: int
    is_tls: bool = False
    address: Address | None = None  # as configured by ``server.listen``

    @property
    def url(self) -> str:
        """Under which a client on this machine reaches it."""
        return base_url(self.host, self.port, is_tls=self.is_tls)

    def offers(self, service: str) -> bool:
        """Whether a service can be used here."""
        return self.address is None or self.address.offers(service)


async def open_sockets(
    listener: Listener,
    server: ServerConfig,
    certificate: Certificate | None,
    env: Mapping[str, str],
) -> tuple[Opened, ...]:
    """Listen on every configured address.

    Raises:
        CannotListen: one of them cannot be used.
    """
    context = None if certificate is None else certificate.context
    if not server.listen:
        return (await _open_first(listener, server, context, env),)
    opened = []
    for address in addresses(server):
        host, port = address.host, address.port
        try:
            bound = await listener.open(host, port, tls=context, address=address)
        except OSError as error:
            raise CannotListen(await _why(host, port, error)) from error
        opened.append(Opened(*bound, is_tls=context is not None, address=address))
    return tuple(opened)


async def _open_first(
    listener: Listener,
    server: ServerConfig,
    context: ssl.SSLContext | None,
    env: Mapping[str, str],
) -> Opened:
    """Listen, on the second port if the first is taken and nobody asked for it."""
    ports = [server.port]
    if not server.is_port_given:
        ports.append(SECOND_PORT)
        if _remembered_port(env) == SECOND_PORT:
            ports.reverse()  # whoever started it before expects it there
    for port in ports:
        try:
            bound = await listener.open(server.host, port, tls=context)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            if not is_taken or port == ports[-1]:
                message = await _why(server.host, port, error)
                raise CannotListen(message) from error
            log.warning("port %d is taken; trying %d", port, ports[-1])
            continue
        if port == SECOND_PORT and not server.is_port_given:
            _remember_port(port, env)
        return Opened(*bound, is_tls=context is not None)
    raise AssertionError("there is at least one port")


async def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        who = await who_listens(port) or "another program"
        return f"port {port} is taken by {who}; set server.port or --port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} may not be used by this user; choose one above 1023"
    # asyncio since Python 3.13 gives no number when there is none of the addresses.
    if error.errno in (errno.EADDRNOTAVAIL, None):
        return (
            f"this machine has no address {host}; 0.0.0.0 stands for all it has, "
            "127.0.0.1 for this machine only (server.host or --host)"
        )
    if isinstance(error, socket.gaierror):
        return f'the host name "{host}" cannot be found; set server.host or --host'
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def _remembered_port(env: Mapping[str, str]) -> int | None:
    try:
        port = int((state_folder(env) / _PORT_FILE).read_text("ascii"))
    except (OSError, ValueError):
        return None
    return port if port == SECOND_PORT else None


def _remember_port(port: int, env: Mapping[str, str]) -> None:
    """So that the command that was printed works after the next start, too."""
    folder = state_folder(env)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / _PORT_FILE).write_text(f"{port}\n", "ascii")
    except OSError as error:
        log.warning("cannot remember the port %d: %s", port, error)
