"""The service ``tunnel``: where agents come in (tunnel/wire.py says what for).

The handshake of a WebSocket is checked here as HTTP, after the chain has found the key
and its role; then the socket leaves HTTP and goes to the relay's side of the tunnel.
"""

import re

from aiohttp import web

from inferencia.api.route import Handler, Route
from inferencia.context import CONTEXT
from inferencia.downstream.connection import Connection
from inferencia.errors import ApiError, InvalidRequest
from inferencia.keys import Key, Role
from inferencia.tunnel.carrier import WebSocket
from inferencia.tunnel.frames import accept_of, is_key
from inferencia.tunnel.relay import TunnelRelay
from inferencia.tunnel.wire import (
    CONTROL_PATH,
    CONTROL_PROTOCOL,
    DATA_PATH,
    DATA_PROTOCOL,
    INSTANCE_HEADER,
    RELAY_HEADER,
    SESSION_HEADER,
)

_SANE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WrongVersion(ApiError):
    """The agent speaks another version of the tunnel."""

    status = 426
    type = "invalid_request_error"
    code = "incompatible"


class TunnelDoor:
    """The service ``tunnel``."""

    def __init__(self, relay: TunnelRelay) -> None:
        self._relay = relay

    def routes(self) -> tuple[Route, ...]:
        return (
            self._route(CONTROL_PATH, self.control),
            self._route(DATA_PATH, self.data),
        )

    def _route(self, path: str, handler: Handler) -> Route:
        return Route("tunnel", "GET", path, Role.AGENT, handler, is_relayed=True)

    async def control(self, request: web.Request) -> web.StreamResponse:
        """Let an agent in."""
        accept = _checked(request, CONTROL_PROTOCOL)
        instance = _named(request, INSTANCE_HEADER)
        channel = self._relay.open_control(_key_of(request), instance, _peer(request))
        return await self._switched(request, accept, CONTROL_PROTOCOL, channel)

    async def data(self, request: web.Request) -> web.StreamResponse:
        """Take a connection that carries requests to an agent."""
        accept = _checked(request, DATA_PROTOCOL)
        instance = _named(request, INSTANCE_HEADER)
        session = _named(request, SESSION_HEADER)
        carrier = self._relay.open_data(
            _key_of(request), instance, session, _peer(request)
        )
        return await self._switched(request, accept, DATA_PROTOCOL, carrier)

    async def _switched(
        self, request: web.Request, accept: str, protocol: str, successor: WebSocket
    ) -> web.StreamResponse:
        """Answer 101 and hand the socket over."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        response = web.StreamResponse(
            status=101,
            reason="Switching Protocols",
            headers={
                "Connection": "Upgrade",
                "Upgrade": "websocket",
                "Sec-WebSocket-Accept": accept,
                "Sec-WebSocket-Protocol": protocol,
                RELAY_HEADER: self._relay.instance,
            },
        )
        for name, value in request[CONTEXT].headers:
            response.headers[name] = value
        await response.prepare(request)
        connection.hand_over(successor)
        return response


def _checked(request: web.Request, protocol: str) -> str:
    """Check the handshake (RFC 6455, 4.2.1); the accept value of its key.

    Raises:
        ApiError: it is none, or one of another version.
    """
    headers = request.headers
    tokens = {
        token.strip().lower() for token in headers.get("Connection", "").split(",")
    }
    if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in tokens:
        raise InvalidRequest(
            "this is where agents connect by WebSocket, and no Upgrade header arrived; "
            "if an agent sent this, the reverse proxy in front of the relay strips it "
            "(see docs/tunnel.md)"
        )
    if headers.get("Sec-WebSocket-Version") != "13":
        raise WrongVersion(
            "only version 13 of WebSocket is spoken here",
            headers={"Sec-WebSocket-Version": "13"},
        )
    key = headers.get("Sec-WebSocket-Key", "")
    if not is_key(key):
        raise InvalidRequest("Sec-WebSocket-Key is not 16 bytes in base64")
    offered = headers.get("Sec-WebSocket-Protocol", "").split(",")
    if protocol not in (one.strip() for one in offered):
        raise WrongVersion(f"this relay speaks {protocol}; update the older of the two")
    return accept_of(key)


def _named(request: web.Request, header: str) -> str:
    value = request.headers.get(header, "")
    if not _SANE_NAME.fullmatch(value):
        raise InvalidRequest(f"the header {header} is missing or malformed")
    return value


def _key_of(request: web.Request) -> Key:
    key = request[CONTEXT].key
    assert key is not None  # the role AGENT was checked
    return key


def _peer(request: web.Request) -> str:
    return request[CONTEXT].measurement.client or ""
