"""``/upstream/{model}/{path}``: a model's own server, whatever it serves there.

The model is loaded like for any other request, and kept while an answer or a WebSocket
lasts. Nothing is understood on the way: method, path, query, body and answer pass as
they are, but for what belongs to the connection, keys, cookies, and who asked.

A model's name may hold slashes; the longest beginning of the path that names one is
taken for it. What a browser fetches by the way (``upstream.ignorePaths``) loads no
model.
"""

import asyncio
import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from aiohttp import web

from inferencia.api.streams import Pieces, begin
from inferencia.backends.headers import has_met_us, via_name
from inferencia.backends.managed import Lease, Managed
from inferencia.bodies import Bodies
from inferencia.context import CONTEXT
from inferencia.errors import (
    ApiError,
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    Conflict,
    InvalidRequest,
    LoopDetected,
    ModelNotFound,
    Overloaded,
)
from inferencia.keys import Key
from inferencia.models.fleet import Fleet
from inferencia.refusals import error_answer_of
from inferencia.upgrading import Declined, pass_on, wants_websocket
from inferencia.upstream.answer import (
    Answer,
    ConnectFailed,
    NoDescriptors,
    Silent,
    UpstreamError,
)
from inferencia.upstream.origin import Origin

PREFIX = "/upstream/"

# Names have few slashes; each more would be looked up.
_MAX_SEGMENTS = 16
_RETRY_SECONDS = 2.0

# What belongs to one connection (RFC 9110, 7.6.1), is said anew, or says who asks.
_NOT_UP = frozenset(
    "connection keep-alive proxy-connection te trailer transfer-encoding upgrade host "
    "content-length expect authorization proxy-authorization x-api-key cookie via "
    "x-request-id forwarded origin referer".split()
)
_NOT_UP_BEGINNINGS = ("x-forwarded-", "x-real-", "cf-", "sec-websocket-", "tailscale-")
_NOT_DOWN = frozenset(
    "connection keep-alive proxy-connection te trailer transfer-encoding upgrade "
    "content-length server set-cookie date location x-request-id".split()
)
_NOT_DOWN_BEGINNINGS = ("access-control-", "x-ratelimit-")


class UpstreamDoor:
    """Leads requests to the servers of models on this machine."""

    def __init__(self, fleet: Fleet, bodies: Bodies, *, instance: str) -> None:
        self._fleet = fleet
        self._bodies = bodies
        self._instance = instance
        self._ignored: tuple[str, ...] = ()
        self._patterns: tuple[re.Pattern[str], ...] = ()

    def ignore(self, patterns: tuple[str, ...]) -> None:
        """Load no model for paths that one of these is found in."""
        if patterns != self._ignored:
            self._ignored = patterns
            self._patterns = tuple(re.compile(pattern) for pattern in patterns)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer as the model's server does.

        Raises:
            ApiError: it cannot be asked.
        """
        if has_met_us(request.headers.items(), self._instance):
            raise LoopDetected("this request has been here before")
        key = request[CONTEXT].key
        assert key is not None
        name, model, path = self._found(request, key)
        if path == "":
            return _with_slash(request)
        backend = self._fleet.backends[model]
        measurement = request[CONTEXT].measurement
        measurement.model, measurement.backend = model, backend.name
        is_websocket = wants_websocket(request)
        self._refuse_what_does_not_load(backend, path, is_websocket=is_websocket)
        body = await self._bodies.read(request)
        lease: Lease | None = None
        try:
            lease = await self._lease(backend, key)
            if is_websocket:
                return await self._pass_on(request, backend, path)
            return await self._copy(request, backend, path, body, f"{PREFIX}{name}")
        finally:
            if lease is not None:
                lease.release()
            self._bodies.release(body)

    def _found(self, request: web.Request, key: Key) -> tuple[str, str, str]:
        """The name as written, the model, and the path at its server ("" if bare)."""
        segments = request.rel_url.raw_path.removeprefix(PREFIX).split("/")
        for count in range(min(len(segments), _MAX_SEGMENTS), 0, -1):
            written = "/".join(segments[:count])
            model = model_named(self._fleet, unquote(written))
            if model is not None and key.may_see(model):
                is_bare = len(segments) == count
                rest = "" if is_bare else "/" + "/".join(segments[count:])
                return written, model, rest
        raise ModelNotFound(
            "the path names no model of this machine; it is "
            f"{PREFIX}MODEL/PATH, and /v1/models lists the models"
        )

    def _refuse_what_does_not_load(
        self, backend: Managed, path: str, *, is_websocket: bool
    ) -> None:
        definition = backend.definition
        if is_websocket and definition.ignore_websockets:
            raise Conflict(
                f'model "{definition.id}" takes no websockets (compat.ignoreWebsockets)'
            )
        if self._fleet.is_ready(definition.id):
            return
        plain = unquote(path)
        if any(pattern.search(plain) for pattern in self._patterns):
            raise Conflict(
                f'model "{definition.id}" is not loaded, and this path does not load '
                "it (upstream.ignorePaths)"
            )

    async def _lease(self, backend: Managed, key: Key) -> Lease:
        model = backend.definition.id
        lease = self._fleet.try_lease(model)
        if lease is not None:
            return lease
        return await self._fleet.lease(
            model, key=key.name, priority=key.priority, tell=lambda say: None
        )

    def _target(self, request: web.Request, path: str) -> str:
        query = request.rel_url.raw_query_string
        return f"{path}?{query}" if query else path

    def _headers_up(self, request: web.Request) -> list[tuple[str, str]]:
        named = ",".join(request.headers.getall("Connection", ())).split(",")
        dropped = _NOT_UP.union(option.strip().lower() for option in named)
        headers = _without(request.headers.items(), dropped, _NOT_UP_BEGINNINGS)
        passed = request.headers.getall("Via", ())
        headers.append(("Via", ", ".join((*passed, via_name(self._instance)))))
        headers.append(("X-Request-Id", request[CONTEXT].id))
        return headers

    async def _copy(
        self,
        request: web.Request,
        backend: Managed,
        path: str,
        body: bytes,
        prefix: str,
    ) -> web.StreamResponse:
        try:
            answer = await backend.carrier.send(
                request.method,
                self._target(request, path),
                self._headers_up(request),
                body,
                silence_seconds=backend.config.timeout,
            )
        except ValueError as error:
            raise InvalidRequest(f"this cannot be passed on: {error}") from error
        except UpstreamError as error:
            raise failure_of(backend, error) from error
        try:
            return await self._copy_answer(request, backend, answer, prefix)
        finally:
            answer.cancel()

    async def _copy_answer(
        self, request: web.Request, backend: Managed, answer: Answer, prefix: str
    ) -> web.StreamResponse:
        headers = _without(answer.headers, _NOT_DOWN, _NOT_DOWN_BEGINNINGS)
        location = answer.header("location")
        if location is not None:
            proxy = backend.definition.proxy
            headers.append(("Location", _location(location, proxy, prefix)))
        length = answer.length
        announced = answer.header("content-length") or ""
        if request.method == "HEAD" and announced.isdecimal():
            length = int(announced)  # of what a GET would get
        response = await begin(request, headers, status=answer.status, length=length)
        try:
            async for piece in Pieces(answer):
                await response.write(piece)
                request[CONTEXT].measurement.bytes_out += len(piece)
        except UpstreamError as error:
            # Half an answer must not look whole.
            request[CONTEXT].measurement.error_code = BackendError.code
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the model's server broke off") from error
        except asyncio.CancelledError:
            interruption = request[CONTEXT].interrupted()
            if interruption is None:
                raise
            request[CONTEXT].measurement.error_code = interruption.code
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError(interruption.message) from interruption
        await response.write_eof()
        return response

    async def _pass_on(
        self, request: web.Request, backend: Managed, path: str
    ) -> web.StreamResponse:
        child = self._fleet.child(backend.definition.id)
        proxy = backend.definition.proxy if child is None else child.definition.proxy
        try:
            return await pass_on(
                request,
                Origin.from_url(proxy),
                self._target(request, path),
                self._headers_up(request),
                connect_timeout=backend.config.connect_timeout,
            )
        except Declined as error:
            raise error_answer_of(backend, error.status, error.body) from error
        except UpstreamError as error:
            raise failure_of(backend, error) from error


def model_named(fleet: Fleet, name: str) -> str | None:
    """The model of this name or alias; None: there is none on this machine."""
    models = fleet.plan.models
    if name in models:
        return name
    return next((m.id for m in models.values() if name in m.aliases), None)


def failure_of(backend: Managed, error: UpstreamError) -> ApiError:
    """What it is to a client that a model's server did not answer."""
    if isinstance(error, NoDescriptors):
        return Overloaded(str(error), retry_after=_RETRY_SECONDS)
    if isinstance(error, Silent):
        return BackendTimeout(backend.why(error))
    if isinstance(error, ConnectFailed):
        return BackendUnavailable(backend.why(error), retry_after=_RETRY_SECONDS)
    return BackendError(backend.why(error))


def _with_slash(request: web.Request) -> web.Response:
    """Redirect, so that relative addresses in answers lead to the same server."""
    target = f"{request.rel_url.raw_path}/"
    if query := request.rel_url.raw_query_string:
        target += f"?{query}"
    status = 301 if request.method in ("GET", "HEAD") else 308
    return web.Response(status=status, headers={"Location": target})


def _location(location: str, proxy: str, prefix: str) -> str:
    """Where a redirect of the server at ``proxy`` leads, seen from the client."""
    try:
        parts = urlsplit(location)
    except ValueError:  # the client may make of it what it can
        return location
    if parts.netloc and parts.hostname == urlsplit(proxy).hostname:
        location = location.partition(parts.netloc)[2] or "/"
    if location.startswith("/") and not location.startswith("//"):
        return prefix + location
    return location


def _without(
    headers: Iterable[tuple[str, str]],
    names: Iterable[str],
    beginnings: tuple[str, ...],
) -> list[tuple[str, str]]:
    dropped = frozenset(names)
    return [
        (name, value)
        for name, value in headers
        if name.lower() not in dropped and not name.lower().startswith(beginnings)
    ]
