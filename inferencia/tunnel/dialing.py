"""Dialing a relay: one socket, one handshake, and then a WebSocket (RFC 6455, 4.1).

The address is given as a number, so that all connections of a session reach the same
machine; the certificate is checked against the relay's name. Redirects are not
followed, and nothing but a 101 that answers our own key is taken.
"""

import asyncio
import ipaddress
import json
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import cast

from inferencia import __version__
from inferencia.tunnel.carrier import WebSocket
from inferencia.tunnel.frames import accept_of, new_key
from inferencia.tunnel.wire import HANDSHAKE_SECONDS
from inferencia.upstream.origin import Origin

# An answer's head; proxies add little to it.
_MAX_HEAD_BYTES = 16 * 1024
# What is read of an error's body, for its message.
_MAX_BODY_BYTES = 16 * 1024
_MAX_SHOWN = 200
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: .*)?")


class DialFailed(Exception):
    """There is no connection. ``str()`` says why, without secrets."""


class Refused(DialFailed):
    """Whoever answers there did so with something else than the tunnel."""

    def __init__(self, status: int, said: str, retry_after: float | None) -> None:
        """Keep the answer.

        Args:
            status: of the HTTP answer.
            said: its error's message, or "".
            retry_after: seconds, if it says so.
        """
        super().__init__(f"answered {status}" + (f": {said}" if said else ""))
        self.status = status
        self.said = said
        self.retry_after = retry_after


class Untrusted(DialFailed):
    """The certificate is not one that we trust for this name."""


def relay_origin(url: str) -> Origin:
    """Where a relay is. Plain HTTP is for this machine only: it would show the token.

    Raises:
        ValueError: it is no such URL. The text fits behind the name of a key.
    """
    origin = Origin.from_url(url)
    if not origin.tls and not _is_loopback(origin.host):
        raise ValueError(
            f"{url} would send the token in clear; use https:// (http:// is for "
            "127.0.0.1 and localhost)"
        )
    return origin


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def look_up(origin: Origin) -> tuple[str, ...]:
    """All addresses of a relay, as numbers.

    Raises:
        DialFailed: it has none.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            found = await loop.getaddrinfo(
                origin.host, origin.port, type=socket.SOCK_STREAM
            )
    except TimeoutError as error:
        raise DialFailed(f'looking up "{origin.host}" took too long') from error
    except (OSError, UnicodeError) as error:
        raise DialFailed(f'cannot look up "{origin.host}": {_told(error)}') from error
    addresses = [str(address[0]) for *_, address in found]
    return tuple(dict.fromkeys(addresses))


async def dial(
    origin: Origin,
    address: str,
    path: str,
    protocol: str,
    headers: Mapping[str, str],
    context: ssl.SSLContext,
    make: Callable[[Mapping[str, str]], WebSocket],
) -> WebSocket:
    """Connect, shake hands, and give the socket to what ``make`` makes.

    Args:
        origin: whose certificate it must be, and the port.
        address: the number to connect to.
        path: of the resource, below the origin's own.
        protocol: the subprotocol that must be agreed on.
        headers: further ones of the request.
        context: see ``inferencia.trust``.
        make: called with the answer's headers, names in lower case.

    Raises:
        DialFailed: there is no connection.
        Refused: there is something else.
    """
    loop = asyncio.get_running_loop()
    handshake = _Handshake(protocol, make)
    request = _request(origin, path, protocol, handshake.key, headers)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            transport, _ = await loop.create_connection(
                lambda: handshake,
                address,
                origin.port,
                ssl=context if origin.tls else None,
                server_hostname=origin.host if origin.tls else None,
            )
            transport.write(request)
            return await handshake.taken()
    except TimeoutError as error:
        raise DialFailed(f"no answer within {HANDSHAKE_SECONDS:g} s") from error
    except ssl.SSLCertVerificationError as error:
        raise Untrusted(
            f"its certificate is not trusted: {error.verify_message}"
        ) from (error)
    except (OSError, ssl.SSLError) as error:
        raise DialFailed(f"cannot connect: {_told(error)}") from error
    finally:
        handshake.give_up()


def _request(
    origin: Origin, path: str, protocol: str, key: str, headers: Mapping[str, str]
) -> bytes:
    lines = [
        f"GET {origin.base_path}{path} HTTP/1.1",
        f"Host: {origin.authority}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
        f"Sec-WebSocket-Protocol: {protocol}",
        f"User-Agent: inferencia/{__version__}",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Handshake(asyncio.Protocol):
    """Reads the answer; then the socket goes to somebody else."""

    def __init__(
        self, protocol: str, make: Callable[[Mapping[str, str]], WebSocket]
    ) -> None:
        self.key = new_key()
        self.done: asyncio.Future[WebSocket] = (
            asyncio.get_running_loop().create_future()
        )
        self._protocol = protocol
        self._make = make
        self._transport: asyncio.Transport | None = None  # while it is ours
        self._received = b""
        self._is_taken = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, rest = self._received.partition(b"\r\n\r\n")
        if not blank:
            if len(self._received) > _MAX_HEAD_BYTES:
                self._fail(DialFailed("answered with a head that is too long"))
            return
        try:
            status, headers = _parsed(head)
        except ValueError as error:
            self._fail(DialFailed(f"did not answer as HTTP: {error}"))
            return
        if status != 101:
            self._read_refusal(status, headers, rest)
            return
        problem = self._problem(headers)
        if problem:
            self._fail(DialFailed(problem))
        else:
            self._hand_over(headers, rest)

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        head, blank, rest = self._received.partition(b"\r\n\r\n")
        if blank and not self.done.done():
            try:
                status, headers = _parsed(head)
            except ValueError:
                pass
            else:
                self._fail(_refusal(status, headers, rest))
        self._fail(DialFailed("closed the connection without an answer"))

    async def taken(self) -> WebSocket:
        """What has taken over the socket."""
        made = await self.done
        self._is_taken = True
        return made

    def give_up(self) -> None:
        """Close what nobody has taken: the dialing was cancelled, or has failed."""
        if self._is_taken:
            return
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if not self.done.cancel() and not self.done.cancelled():
            if self.done.exception() is None:
                self.done.result().fail(ConnectionResetError("it came too late"))

    def _problem(self, headers: Mapping[str, str]) -> str | None:
        if headers.get("upgrade", "").lower() != "websocket":
            return "answered 101, but not with a WebSocket"
        if headers.get("sec-websocket-accept") != accept_of(self.key):
            return "answered somebody else's handshake; is a cache on the way?"
        if headers.get("sec-websocket-protocol") != self._protocol:
            return "speaks another version of the tunnel"
        if headers.get("sec-websocket-extensions"):
            return "wants an extension that nobody asked for"
        return None

    def _hand_over(self, headers: Mapping[str, str], rest: bytes) -> None:
        transport, self._transport = self._transport, None
        assert transport is not None
        if self.done.done():  # cancelled meanwhile
            transport.abort()
            return
        successor = self._make(headers)
        transport.set_protocol(successor)
        successor.connection_made(transport)
        self.done.set_result(successor)
        if rest:
            successor.data_received(rest)

    def _read_refusal(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> None:
        """Wait for the body that says why, as far as its length is known."""
        length = headers.get("content-length", "0")
        size = int(length) if length.isascii() and length.isdigit() else 0
        if len(body) >= min(size, _MAX_BODY_BYTES):
            self._fail(_refusal(status, headers, body))

    def _fail(self, error: DialFailed) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.split(b"\r\n")
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise ValueError("no status line")
    headers = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or not name or name != name.strip():
            raise ValueError("a malformed header")
        headers[name.lower()] = value.strip(" \t")
    return int(found[1]), headers


def _refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refused:
    after = headers.get("retry-after", "")
    is_number = after.isascii() and after.isdigit() and len(after) < 7
    return Refused(status, _said(body), float(after) if is_number else None)


def _said(body: bytes) -> str:
    """The message of an error of our shape."""
    try:
        message = json.loads(body[:_MAX_BODY_BYTES])["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    text = str(message)[:_MAX_SHOWN]
    return "".join(c if c.isprintable() else " " for c in text)


def _told(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
