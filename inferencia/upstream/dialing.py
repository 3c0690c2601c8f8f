"""Making connections to one origin: look-up, addresses in turn, TLS.

The addresses of a name are tried one after the other, the one that worked last first.
Whatever goes wrong is a ``ConnectFailed`` with the reason.
"""

import asyncio
import errno
import ipaddress
import socket
import ssl
from collections.abc import Callable
from typing import Any, TypeVar

from inferencia.trust import trusting
from inferencia.upstream.answer import ConnectFailed, NoDescriptors, Untrusted
from inferencia.upstream.origin import Origin

# How long resolved addresses are used again. mlx_lm wants a connection per request, and
# a look-up of "localhost" costs more than the connection.
_ADDRESS_SECONDS = 10.0

# How a handshake fails besides in time. (Refused is none of them.)
_HANDSHAKE_FAILURES = (
    ssl.SSLError,
    ssl.CertificateError,
    ConnectionResetError,
    ConnectionAbortedError,
)

# What the system says to whoever has, or all together have, too many files open.
OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})

_Made = TypeVar("_Made", bound=asyncio.BaseProtocol)


class Dialer:
    """What knows the ways to one origin."""

    def __init__(
        self,
        origin: Origin,
        *,
        connect_timeout: float,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Dial nothing yet.

        Args:
            origin: where to connect.
            connect_timeout: seconds for look-up, connection and TLS together.
            ssl_context: instead of the system's trust, for ``https`` origins.
        """
        self._origin = origin
        self._connect_timeout = connect_timeout
        self._ssl_context: ssl.SSLContext | None = None
        if origin.tls:
            self._ssl_context = ssl_context or trusting()
        self._addresses = [origin.host]  # until a look-up
        self._is_numeric = _is_numeric(origin.host)
        self._addresses_until = 0.0  # when a look-up is too old

    async def dial(self, make: Callable[[], _Made]) -> _Made:
        """Connect, and have the connection speak the protocol that ``make`` makes.

        Raises:
            ConnectFailed: always that, whatever went wrong.
        """
        try:
            async with asyncio.timeout(self._connect_timeout) as limit:
                return await self._connect(make, limit.when() or 0.0)
        except TimeoutError as error:
            self._addresses_until = 0.0
            raise ConnectFailed(
                "timeout",
                f"{self._origin.authority} did not take a connection within"
                f" {self._connect_timeout:g} seconds",
            ) from error
        except ConnectFailed:
            self._addresses_until = 0.0
            raise

    async def _connect(self, make: Callable[[], _Made], deadline: float) -> _Made:
        """Connect to the first address that answers, the last good one first."""
        loop = asyncio.get_running_loop()
        if not self._is_numeric and loop.time() >= self._addresses_until:
            self._addresses = await self._look_up()
            self._addresses_until = loop.time() + _ADDRESS_SECONDS
        addresses = self._addresses
        failure: OSError | None = None
        in_order = tuple(addresses)  # whoever succeeds meanwhile changes the order
        for address in in_order:
            # An address that says nothing may use half of the time that is left.
            now = loop.time()
            share = 1.0 if address is in_order[-1] else 0.5
            try:
                async with asyncio.timeout_at(now + (deadline - now) * share):
                    made = await self._connect_to(address, make)
            except OSError as error:  # TimeoutError is one
                if error.errno in OUT_OF_DESCRIPTORS:
                    raise NoDescriptors from error
                failure = error
                continue
            if address is not addresses[0]:
                addresses.remove(address)
                addresses.insert(0, address)
            return made
        if failure is None or isinstance(failure, TimeoutError):
            raise TimeoutError
        is_refused = isinstance(failure, ConnectionRefusedError)
        raise ConnectFailed(
            "refused" if is_refused else "unreachable",
            f"cannot connect to {self._origin.authority}: {_told(failure)}",
        ) from failure

    async def _connect_to(self, address: str, make: Callable[[], _Made]) -> _Made:
        try:
            _, made = await asyncio.get_running_loop().create_connection(
                make,
                address,
                self._origin.port,
                ssl=self._ssl_context,
                server_hostname=self._origin.host if self._ssl_context else None,
            )
        except _HANDSHAKE_FAILURES as error:
            if self._ssl_context is None:
                raise
            # Another address would show the same certificate.
            message = f"no TLS with {self._origin.authority}: {_told(error)}"
            if isinstance(error, ssl.SSLCertVerificationError):
                raise Untrusted(message, error.verify_message.rstrip(".")) from error
            raise ConnectFailed("tls", message) from error
        return made

    async def _look_up(self) -> list[str]:
        """The origin's addresses, as numbers.

        Raises:
            ConnectFailed: there are none.
        """
        host, port = self._origin.host, self._origin.port
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(
                "dns", f'cannot look up "{host}": {_told(error)}'
            ) from error
        return [_numeric(address) for _, _, _, _, address in found]


def _numeric(address: tuple[Any, ...]) -> str:
    """A socket address as text, with the scope that a link-local one needs."""
    if len(address) == 4 and address[3]:
        return f"{address[0]}%{address[3]}"
    return str(address[0])


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _told(error: Exception) -> str:
    """What the system says about a failure, or at least its kind."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
