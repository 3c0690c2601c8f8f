"""``/v1/realtime``: OpenAI's WebSocket, passed on to a backend that has it.

The model stands in the query, as there. Until a backend has answered the handshake a
session goes the way of any request: it waits in line, wakes, loads, and falls back. It
is one request for its key's limits, for ``max_concurrency`` and for the model's
process, however long it lasts; of what is said in it nothing is understood, so its
tokens are not counted.
"""

from collections.abc import Sequence
from urllib.parse import urlencode

from aiohttp import web

from inferencia.api.route import Route
from inferencia.backends.base import Backend, Turn
from inferencia.backends.headers import has_met_us
from inferencia.backends.managed import ModelCarrier
from inferencia.catalogue.snapshot import Candidate
from inferencia.context import CONTEXT
from inferencia.errand import Errand, NotTaken, Words, broke
from inferencia.errors import InvalidRequest, LoopDetected
from inferencia.keys import Role
from inferencia.refusals import error_answer_of
from inferencia.relaying import Relay
from inferencia.upgrading import Declined, pass_on, wants_websocket
from inferencia.upstream.answer import ConnectFailed, UpstreamError
from inferencia.upstream.origin import Origin
from inferencia.upstream.pool import Upstream

PATH = "/v1/realtime"

# Where some clients put their key; no backend's business.
_KEY_PARAMETERS = frozenset({"key", "api_key", "api-key", "apikey", "access_token"})


class Realtime:
    """The WebSocket of the service ``openai``."""

    def __init__(self, relay: Relay, *, instance: str) -> None:
        self._relay = relay
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
        measurement = request[CONTEXT].measurement
        measurement.is_work = measurement.stream = True
        return await _Session(self._relay, request).run()


class _Session(Errand):
    """One WebSocket on its way."""

    def __init__(self, relay: Relay, request: web.Request) -> None:
        model = request.query.get("model") or None
        context = request[CONTEXT]
        super().__init__(relay.catalogue, relay.line, relay.usage, context, model)
        self._request = request
        self._response: web.StreamResponse | None = None

    async def run(self) -> web.StreamResponse:
        await self._serve()
        assert self._response is not None
        return self._response

    def _say_while_waiting(self, words: Words | None) -> None:
        """Nothing: before the handshake's answer there is no way to say anything."""

    def _wait_for(self, backends: Sequence[Backend]) -> None:
        """Nothing, for the same reason."""

    async def _try(self, candidate: Candidate, turn: Turn) -> bool:
        backend, context = candidate.backend, self._context
        context.measurement.backend = backend.name
        headers = self._request.headers.items()
        try:
            if not turn.is_ready:
                await self._get_ready(turn)
            self._response = await pass_on(
                self._request,
                _origin_of(backend),
                _target(self._request, candidate.upstream_id),
                backend.request_headers(headers, request_id=context.id),
                connect_timeout=backend.config.connect_timeout,
            )
            turn.succeeded()
            return True
        except NotTaken as refusal:
            return self._pass_over(backend, refusal)
        except Declined as error:
            raise error_answer_of(backend, error.status, error.body) from error
        except UpstreamError as error:
            failure = broke(backend, turn, error)
            if isinstance(error, ConnectFailed):
                return self._pass_over(backend, NotTaken(failure))
            raise failure from error
        finally:
            turn.end()


def _origin_of(backend: Backend) -> Origin:
    """Where a backend's server is.

    Raises:
        NotTaken: it is not reached by connections of our own.
        ConnectFailed: its process has just ended.
    """
    carrier = backend.carrier
    if isinstance(carrier, ModelCarrier):
        if carrier.upstream is None:
            raise ConnectFailed("refused", "its process has ended")
        return carrier.upstream.origin
    if isinstance(carrier, Upstream):
        return carrier.origin
    raise NotTaken(InvalidRequest(f'backend "{backend.name}" takes no websockets'))


def _target(request: web.Request, model: str) -> str:
    dropped = {"model", *_KEY_PARAMETERS}
    kept = [(n, v) for n, v in request.query.items() if n.lower() not in dropped]
    return f"{PATH}?{urlencode([('model', model), *kept])}"
