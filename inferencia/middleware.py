"""The chain that every request passes, outermost first.

1. ``identify``      gives it an id, and our headers to whatever answer comes back.
2. ``observe``       keeps the one measurement that becomes log line and metrics.
3. ``recover``       turns every exception into the error shape of our API.
4. ``authenticate``  finds the key and checks the role that the route declares.
5. ``throttle``      takes from the key's buckets, and gives its place back.

None of them reads the body. ``Doors.enter`` is the chain; the other methods of
``Doors`` are its links and what they share.
"""

import asyncio
import base64
import binascii
import email.utils
import functools
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from ipaddress import IPv4Network, IPv6Network
from urllib.parse import urlsplit

import aiohttp.typedefs
from aiohttp import HttpVersion10, HttpVersion11, web

from inferencia import __version__
from inferencia.addresses import Address
from inferencia.context import CONTEXT, Context
from inferencia.cors import Cors
from inferencia.downstream.connection import Connection
from inferencia.errors import (
    ApiError,
    Forbidden,
    InsufficientQuota,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    RateLimitExceeded,
    RequestTooLarge,
    ShuttingDown,
)
from inferencia.keys import Key, KeyRing, Role
from inferencia.limits import Allowances, FailedLogins, Refusal
from inferencia.logs import request_line
from inferencia.measurement import CLIENT_GONE, Measurement
from inferencia.metrics import METHODS, Metrics
from inferencia.remote import RemoteAccess, client_address, is_forwarded
from inferencia.usage import UsageBook

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SERVER = f"inferencia/{__version__}"

_READING = frozenset({"GET", "HEAD", "OPTIONS"})

# Limits that hold only for what may cost tokens; listing models goes on.
_TOKEN_LIMITS = frozenset({"tokens", "daily_tokens"})

# An id that a client or proxy made up is kept if it cannot hurt a log.
_SANE_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
# RFC 3986, 3.2.2, without userinfo: what a Host header may hold.
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")


@dataclass(frozen=True, slots=True)
class Anonymous:
    """The terms of ``--no-api-key``: who may come without a key."""

    key: Key
    hosts: frozenset[str]  # names in ``Host`` that are this machine's own
    origins: frozenset[str]


class Doors:
    """The chain, and what its links share."""

    def __init__(
        self,
        *,
        ring: KeyRing,
        allowances: Allowances,
        failed_logins: FailedLogins,
        metrics: Metrics,
        usage: UsageBook,
        cors: Cors,
        trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = (),
        anonymous: Anonymous | None = None,
        remote: RemoteAccess | None = None,
    ) -> None:
        self.ring = ring
        self.allowances = allowances
        self.failed_logins = failed_logins
        self.metrics = metrics
        self.usage = usage
        self.cors = cors
        self.trusted_proxies = trusted_proxies
        self.anonymous = anonymous
        self.remote = remote or RemoteAccess(False)
        # Filled by the application once its routes exist. A route that is not in it
        # is refused, so that a forgotten declaration cannot open a door.
        self.roles: dict[web.AbstractRoute, Role | None] = {}
        self.services: dict[web.AbstractRoute, str] = {}  # of the same routes
        # Routes that belong to further services, those that ask a model for work, GETs
        # that change something, and administrators' transfers.
        self.further: dict[web.AbstractRoute, tuple[str, ...]] = {}
        self.working: set[web.AbstractRoute] = set()
        self.changing: set[web.AbstractRoute] = set()
        self.transfers: set[web.AbstractRoute] = set()
        self.draining = False
        self.active: set[Context] = set()  # requests in flight that a drain waits for
        self.administering: set[Context] = set()  # administrators' requests in flight
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()

    @property
    def links(self) -> tuple[aiohttp.typedefs.Middleware, ...]:
        """What stands before every handler."""
        return (self.enter,)

    @web.middleware
    async def enter(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lead the request through the chain; the numbers are those of its links.

        One coroutine for all of them: each one more would cost every request a frame,
        and a look at it each time that the request goes on.
        """
        context = self._identify(request)  # 1
        request[CONTEXT] = context
        measurement = context.measurement
        route = request.match_info.route.resource
        measurement.path = "/other" if route is None else route.canonical
        self.metrics.begin()  # 2
        try:
            try:
                refuse_misshapen(request)
                preflight = self._authenticate(request, context)  # 4
                if preflight is None:
                    self._throttle(request, context)  # 5
                    response = await handler(request)
                else:
                    response = preflight
            except (Exception, asyncio.CancelledError) as error:
                answer = self._recovered(request, context, error)  # 3
                if answer is None:
                    raise
                response = answer
            measurement.status = response.status
            if not response.prepared:
                for name, value in context.headers:
                    response.headers[name] = value
                body = response.body if isinstance(response, web.Response) else None
                if isinstance(body, bytes):
                    measurement.bytes_out = len(body)
            return response
        except asyncio.CancelledError:
            measurement.status = CLIENT_GONE
            raise
        finally:
            self._give_back(context)  # 5
            self._report(context)  # 2

    def _identify(self, request: web.Request) -> Context:
        """Give the request an id, a measurement, and headers of ours for its answer."""
        headers = request.headers
        request_id = sane_id(headers.get("X-Request-Id"))
        # Told the loop, it need not look for it by a system call (getpid).
        task = asyncio.current_task(request.protocol._loop)
        assert task is not None
        method = request.method
        measurement = Measurement(
            request_id,
            method if method in METHODS else "other",
            client_address(request, self.trusted_proxies),
        )
        ours = own_headers(request_id)
        ours += self.cors.headers(request)
        return Context(request_id, measurement, task, ours)

    def _report(self, context: Context) -> None:
        """Tell of a request that is over, whatever became of it."""
        measurement = context.measurement
        self.metrics.end()
        measurement.finish()
        key, tokens = context.key, measurement.total_tokens
        if key is not None and tokens:
            self.allowances.charge(key.name, tokens, time.monotonic(), time.time())
        self.metrics.record(measurement)
        self.usage.record(measurement)
        request_line(measurement)

    def _recovered(
        self, request: web.Request, context: Context, error: BaseException
    ) -> web.Response | None:
        """An answer that explains what went wrong; None if nobody is there to read."""
        if isinstance(error, ApiError):
            answer = self._answer(request, error)
            if isinstance(error, _Misshapen):
                # Where such a request ends, its sender may see differently.
                answer.force_close()
            return answer
        if isinstance(error, asyncio.CancelledError):
            interruption = context.interrupted()
            if interruption is None:
                return None
            if not context.measurement.status:
                return self._answer(request, interruption)
            # Its answer has begun, and half an answer must not look whole.
            if request.transport is not None:
                request.transport.abort()
            return None
        if isinstance(error, web.HTTPRequestEntityTooLarge):
            return self._answer(request, RequestTooLarge("the body is too large"))
        if isinstance(error, web.HTTPException):
            return self._answer(request, InvalidRequest(error.reason))
        if isinstance(error, ConnectionError):
            return None  # the client went away while an answer was being written
        log.error("request %s failed by our own fault", context.id, exc_info=error)
        return self._answer(request, own_fault(context.id))

    def _authenticate(
        self, request: web.Request, context: Context
    ) -> web.Response | None:
        """Let only those in whose role may use the route.

        Returns:
            The answer to a page's preflight, which needs no key; mostly None.
        """
        match = request.match_info
        if match.http_exception is not None:
            # No path at all (CONNECT), "*", or one with a line feed in it.
            raise NotFound("there is nothing at this path")
        route = match.route
        if route not in self.roles:
            raise Forbidden("this route declares no role")
        if request.method == "OPTIONS":
            preflight = self.cors.preflight(request)
            if preflight is not None:
                return preflight
        self._check_service(request, route)
        role = self.roles[route]
        if role is None:
            return None
        key = self._identify_key(request)
        context.key = key
        context.measurement.key = key.name
        if not may(key.role, role):
            raise Forbidden(
                f'key "{key.name}" has the role {key.role.value}; '
                f"this needs the role {role.value}"
            )
        if role is Role.ADMIN:
            reads = request.method in _READING and route not in self.changing
            self.remote.check(request, changes=not reads)
            self.administering.add(context)
        context.is_users_work = role is Role.USER
        return None

    def _throttle(self, request: web.Request, context: Context) -> None:
        """Hold a user's request against the limits of its key."""
        key = context.key
        if key is None:
            return
        if not (context.is_users_work or request.match_info.route in self.transfers):
            return
        if self.draining:
            raise ShuttingDown(
                "the server is shutting down; try again shortly", retry_after=5
            )
        if context.is_users_work:
            now, wall = time.monotonic(), time.time()
            taken = self.allowances.take(key, now, wall)
            if isinstance(taken, Refusal) and taken.kind in _TOKEN_LIMITS:
                if request.match_info.route not in self.working:
                    taken = self.allowances.take(key, now, wall, costs_tokens=False)
            context.headers += self.allowances.headers(key, now, wall)
            if isinstance(taken, Refusal):
                raise self._refused(taken, key)
            context.grant = taken
        if not self.active:
            self._is_quiet.clear()
        context.is_active = True
        self.active.add(context)

    def _refused(self, refusal: Refusal, key: Key) -> RateLimitExceeded:
        """What the client of a request is told that a limit of its key refuses."""
        self.metrics.refused(refusal.kind, key.name)
        is_for_today = refusal.kind == "daily_tokens"
        error = InsufficientQuota if is_for_today else RateLimitExceeded
        return error(refusal.message, retry_after=refusal.retry_after)

    def _give_back(self, context: Context) -> None:
        """Free the place that ``_throttle`` has taken, if it has."""
        self.administering.discard(context)
        if not context.is_active:
            return
        context.is_active = False
        self.active.discard(context)
        if not self.active:
            self._is_quiet.set()
        if context.grant is not None:
            self.allowances.give_back(context.grant)

    def keys_changed(self) -> None:
        """End what administrators do and watch whose keys are void now.

        Events and logs go on for as long as somebody reads them; not so the right to.
        Whoever makes a key void, be it his own, still gets his answer.
        """
        good = {
            key.digest
            for key in self.ring.keys
            if key.role is Role.ADMIN and not key.has_expired(today())
        }
        for context in tuple(self.administering):
            is_void = context.key is not None and context.key.digest not in good
            if is_void and context.task is not asyncio.current_task():
                context.interrupt(InvalidApiKey("this API key is no longer in force"))

    def note_malformed(self, address: str | None) -> None:
        """Report bytes that were no request; nothing of them is kept."""
        measurement = Measurement(id=sane_id(None), method="other", client=address)
        measurement.path = "malformed"
        measurement.status = InvalidRequest.status
        measurement.error_code = InvalidRequest.code
        measurement.finish()
        self.metrics.record(measurement)
        request_line(measurement)

    async def quiet(self) -> None:
        """Wait until nothing is in flight that a user or a transfer waits for."""
        await self._is_quiet.wait()

    def _check_service(self, request: web.Request, route: web.AbstractRoute) -> None:
        """Refuse what is not offered at the address where the request came in."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        address = connection.address
        service = self.services[route]
        if isinstance(address, Address) and not address.offers(service):
            if any(map(address.offers, self.further.get(route, ()))):
                return
            raise NotFound(
                f"the service {service} is not offered at this address (server.listen)"
            )

    def _answer(self, request: web.Request, error: ApiError) -> web.Response:
        context = request[CONTEXT]
        if isinstance(error, ModelNotFound):
            error.at(_models_path(request))
        context.measurement.error_code = error.code
        response = error_response(error, anthropic=is_anthropic(request.path))
        if self.draining or not request.content.is_eof():
            response.force_close()
        return response

    def _identify_key(self, request: web.Request) -> Key:
        presented = presented_key(request)
        if presented is not None:
            key = self.ring.find(presented, today())
            if key is not None:
                return key
        if self.anonymous is not None and is_at_home(request, self.anonymous):
            return self.anonymous.key
        self.metrics.failed_login()
        if presented is None:
            # Who sends no key guesses none: a program that was set up wrongly gets the
            # same clear answer each time.
            raise InvalidApiKey(
                "no API key was sent; send one as the header "
                '"Authorization: Bearer YOUR_KEY"'
            )
        self._slow_down_guesses(request)
        raise InvalidApiKey("this API key is not known here, or it has expired")

    def _slow_down_guesses(self, request: web.Request) -> None:
        address = request[CONTEXT].measurement.client or ""
        wait = self.failed_logins.failed(address, time.monotonic())
        if wait > 0:
            raise RateLimitExceeded(
                "too many failed logins from this address; a valid key still works",
                retry_after=wait,
            )


def _models_path(request: web.Request) -> str:
    """Where the address that a request came in at lists its models."""
    connection = request.protocol
    assert isinstance(connection, Connection)
    address = connection.address
    is_openai = not isinstance(address, Address) or address.offers("openai")
    return "/v1/models" if is_openai else "/models"


def own_headers(request_id: str) -> list[tuple[str, str]]:
    """Headers that every answer carries."""
    return [("X-Request-Id", request_id), _SERVER, _date(int(time.time()))]


_SERVER = ("Server", SERVER)


@functools.lru_cache(maxsize=2)
def _date(second: int) -> tuple[str, str]:
    return "Date", email.utils.formatdate(second, usegmt=True)


def error_response(error: ApiError, *, anthropic: bool = False) -> web.Response:
    """An error as a plain answer."""
    return web.Response(
        status=error.status,
        body=error.body(anthropic=anthropic),
        content_type="application/json",
        headers=error.headers,
    )


def is_anthropic(path: str) -> bool:
    """Whether errors at this path take the shape that Anthropic's clients expect."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def malformed_response(error: ApiError) -> web.Response:
    """The answer to bytes that never became a request, and so never met the chain."""
    response = error_response(error)
    response.headers.update(own_headers(sane_id(None)))
    return response


def own_fault(request_id: str) -> InternalError:
    """What a client reads when the fault is ours."""
    return InternalError(
        f"something went wrong here; the server's log says more under {request_id}"
    )


def sane_id(given: str | None) -> str:
    """The id that came with the request if it is harmless, else a new one."""
    if given is not None and _SANE_ID.fullmatch(given):
        return given
    return f"req-{random.getrandbits(96):024x}"


def today() -> date:
    """The day that limits and expiry dates go by."""
    return datetime.now(UTC).date()


def may(has: Role, needs: Role) -> bool:
    """Whether a role may do what another may. Admin may do all that user may."""
    return has is needs or (has is Role.ADMIN and needs in (Role.USER, Role.METRICS))


class _Misshapen(InvalidRequest):
    """No HTTP as we take it; its connection is not used again."""


def refuse_misshapen(request: web.Request) -> None:
    """Refuse what aiohttp's parser lets through but HTTP/1.1 does not."""
    if request.version not in (HttpVersion10, HttpVersion11):
        # aiohttp answers in the version of the request (RFC 9112, 2.3: in ours).
        request._cache["version"] = HttpVersion11
        raise _Misshapen("only HTTP/1.0 and HTTP/1.1 are spoken here")
    headers = request.headers
    hosts = headers.getall("Host", ())
    if len(hosts) > 1 or (not hosts and request.version == HttpVersion11):
        raise _Misshapen("exactly one Host header is needed")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise _Misshapen("the Host header is malformed")
    if "Transfer-Encoding" in headers:
        if request.version == HttpVersion10:
            raise _Misshapen("HTTP/1.0 knows no Transfer-Encoding")
        # The parser also lets "gzip, chunked" through, without undoing the gzip.
        codings = ",".join(headers.getall("Transfer-Encoding"))
        if codings.strip(" \t").lower() != "chunked":
            raise _Misshapen("the only Transfer-Encoding understood is chunked")


def presented_key(request: web.Request) -> bytes | None:
    """The key that a request shows, from whichever header its client uses.

    A browser sends remembered Basic credentials on its own, also when another site
    made it send the request; those are not taken.
    """
    headers = request.headers
    authorization = headers.get("Authorization")
    if authorization is not None:
        scheme, _, value = authorization.strip().partition(" ")
        value = value.strip()
        if scheme.lower() == "bearer" and value:
            return _wire_bytes(value)
        if scheme.lower() == "basic":
            site = headers.get("Sec-Fetch-Site", "same-origin")
            if site in ("same-origin", "none"):
                return _basic_password(value)
    key = headers.get("x-api-key")
    return _wire_bytes(key.strip()) if key and key.strip() else None


def _wire_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _basic_password(value: str) -> bytes | None:
    try:
        pair = base64.b64decode(_wire_bytes(value), validate=True)
    except (binascii.Error, ValueError):
        return None
    return pair.partition(b":")[2] or None


def is_at_home(request: web.Request, terms: Anonymous) -> bool:
    """Whether a request without a key was plainly made on this very machine.

    A reverse proxy or tunnel in front would let strangers in, and a page in the
    owner's browser can send requests to loopback; both give themselves away.
    """
    headers = request.headers
    if is_forwarded(request):
        return False
    if any(origin not in terms.origins for origin in headers.getall("Origin", ())):
        return False
    try:
        host = urlsplit(f"//{headers.get('Host', '')}").hostname
    except ValueError:  # brackets with no address in them
        return False
    return host is not None and host in terms.hosts
