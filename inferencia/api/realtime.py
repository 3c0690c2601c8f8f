"""``/v1/realtime``: OpenAI's WebSocket, passed on to a backend that has it.

The model stands in the query, as there. The session is one request for its key's
limits and for the model's process, however long it lasts; of what is said in it nothing
is understood, so its tokens are not counted.
"""

import time
from urllib.parse import urlencode

from aiohttp import web

from inferencia.api.route import Route
from inferencia.backends.base import Backend
from inferencia.backends.headers import has_met_us
from inferencia.backends.managed import ModelCarrier
from inferencia.catalogue import Candidate, Catalogue
from inferencia.context import CONTEXT
from inferencia.errors import (
    ApiError,
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    InvalidRequest,
    LoopDetected,
)
from inferencia.keys import Role
from inferencia.refusals import error_answer_of
from inferencia.upgrading import Declined, pass_on, wants_websocket
from inferencia.upstream.answer import ConnectFailed, Silent, UpstreamError
from inferencia.upstream.origin import Origin
from inferencia.upstream.pool import Upstream

PATH = "/v1/realtime"

_RETRY_SECONDS = 5.0
# Where some clients put their key; no backend's business.
_KEY_PARAMETERS = frozenset({"key", "api_key", "api-key", "apikey", "access_token"})


class Realtime:
    """The WebSocket of the service ``openai``."""

    def __init__(self, catalogue: Catalogue, *, instance: str) -> None:
        self._catalogue = catalogue
        self._instance = instance

    def routes(self) -> tuple[Route, ...]:
        return (Route("openai", "GET", PATH, Role.USER, self.answer, is_relayed=True),)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Be the wire between a client and the backend of its model.

        Raises:
            ApiError: no backend takes it.
        """
        if not wants_websocket(request):
            raise InvalidRequest(f"{PATH} is a WebSocket, and this is no handshake")
        if has_met_us(request.headers.items(), self._instance):
            raise LoopDetected("this request has been here before")
        context = request[CONTEXT]
        key = context.key
        assert key is not None
        wanted = request.query.get("model") or None
        resolution = self._catalogue.resolve(wanted, key.may_see)
        context.measurement.model = resolution.model
        context.measurement.is_work = context.measurement.stream = True
        failure: ApiError | None = None
        for candidate in resolution.candidates:
            backend = candidate.backend
            if backend.is_full or not backend.breaker.admits(time.monotonic()):
                continue
            try:
                return await self._pass_on(request, candidate)
            except _NotTaken as refused:
                failure = refused.error
        raise failure or BackendUnavailable(
            f'no backend that serves "{resolution.model}" takes requests now',
            retry_after=_RETRY_SECONDS,
        )

    async def _pass_on(
        self, request: web.Request, candidate: Candidate
    ) -> web.StreamResponse:
        backend, context = candidate.backend, request[CONTEXT]
        context.measurement.backend = backend.name
        key = context.key
        assert key is not None
        turn = backend.begin(time.monotonic())
        try:
            if not turn.is_ready:
                await turn.get_ready(
                    key=key.name, priority=key.priority, tell=lambda say: None
                )
            response = await pass_on(
                request,
                _origin_of(backend),
                _target(request, candidate.upstream_id),
                backend.request_headers(request.headers.items(), request_id=context.id),
                connect_timeout=backend.config.connect_timeout,
            )
            turn.succeeded()
            return response
        except Declined as error:
            raise error_answer_of(backend, error.status, error.body) from error
        except ConnectFailed as error:
            turn.failed(time.monotonic(), unreachable=True)
            why = BackendUnavailable(backend.why(error), retry_after=_RETRY_SECONDS)
            raise _NotTaken(why) from error
        except UpstreamError as error:
            turn.failed(time.monotonic())
            kind = BackendTimeout if isinstance(error, Silent) else BackendError
            raise kind(backend.why(error)) from error
        finally:
            turn.end()


class _NotTaken(Exception):
    """A backend cannot even be connected to; the next one may be tried."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def _origin_of(backend: Backend) -> Origin:
    """Where a backend's server is.

    Raises:
        _NotTaken: it is not reached by connections of our own.
        ConnectFailed: its process has just ended.
    """
    carrier = backend.carrier
    if isinstance(carrier, ModelCarrier):
        if carrier.upstream is None:
            raise ConnectFailed("refused", "its process has ended")
        return carrier.upstream.origin
    if isinstance(carrier, Upstream):
        return carrier.origin
    raise _NotTaken(InvalidRequest(f'backend "{backend.name}" takes no websockets'))


def _target(request: web.Request, model: str) -> str:
    dropped = {"model", *_KEY_PARAMETERS}
    kept = [(n, v) for n, v in request.query.items() if n.lower() not in dropped]
    return f"{PATH}?{urlencode([('model', model), *kept])}"
