"""The service ``openai``: read what is asked for, have it answered.

Of a request only a few members are understood: ``model``, ``stream``,
``stream_options``, and those that name further models. Everything else goes on as it
came. ``ENDPOINTS`` is the table of what differs between paths.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from inferencia.api.route import Route
from inferencia.backends.listing import MAX_ID_LENGTH
from inferencia.bodies import Bodies
from inferencia.catalogue.choosing import Catalogue
from inferencia.context import CONTEXT
from inferencia.errors import InvalidRequest, ModelNotFound
from inferencia.keys import Key, Role
from inferencia.members import Members
from inferencia.multipart import Form, is_form
from inferencia.relaying import LARGE_BYTES, Call, Relay
from inferencia.usage import UsageBook


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is particular about one path."""

    path: str
    method: str = "POST"
    required: str | None = None  # a member that must be there and not be empty
    usage_option: bool = False  # streams tell their usage only if asked
    must_finish: bool = False  # its streams say when they are finished
    takes_form: bool = False  # multipart bodies are understood
    json_answer: bool = True  # white space may go before the answer
    anthropic: bool = False
    behind: str = ""  # the path at the backend, if it is another one there

    @property
    def backend_path(self) -> str:
        """Where a backend has it."""
        return self.behind or self.path


ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions",
        required="messages",
        usage_option=True,
        must_finish=True,
    ),
    Endpoint("/v1/completions", usage_option=True, must_finish=True),
    Endpoint("/v1/embeddings", required="input"),
    Endpoint("/v1/responses", must_finish=True),
    Endpoint("/v1/messages", required="messages", must_finish=True, anthropic=True),
    Endpoint("/v1/messages/count_tokens", required="messages", anthropic=True),
    Endpoint("/v1/rerank"),
    Endpoint("/v1/reranking"),
    Endpoint("/v1/moderations"),
    Endpoint("/v1/audio/speech", json_answer=False),
    Endpoint("/v1/audio/transcriptions", takes_form=True, json_answer=False),
    Endpoint("/v1/audio/translations", takes_form=True, json_answer=False),
    Endpoint("/v1/audio/voices", takes_form=True),
    Endpoint("/v1/audio/voices", method="GET"),
    Endpoint("/v1/images/generations"),
    Endpoint("/v1/images/edits", takes_form=True),
    Endpoint("/v1/images/variations", takes_form=True),
    # llama.cpp's own, without /v1
    Endpoint("/completion", must_finish=True),
    Endpoint("/infill", must_finish=True),
    Endpoint("/tokenize"),
    Endpoint("/detokenize"),
    Endpoint("/apply-template"),
    Endpoint("/rerank"),
    Endpoint("/reranking"),
)

# In a query they could make a backend use another model than the one that was checked.
_MODEL_PARAMETERS = frozenset({"model", "models", "route", "autoload"})
# Where some clients put their key; it is ours, and no backend's business.
_KEY_PARAMETERS = frozenset({"key", "api_key", "api-key", "apikey", "access_token"})
_DROPPED_PARAMETERS = _MODEL_PARAMETERS | _KEY_PARAMETERS

# Further models of one request: three at OpenRouter. Each is held against all globs.
_MAX_NAMED_MODELS = 64


class OpenAi:
    """The service ``openai``."""

    def __init__(
        self, relay: Relay, catalogue: Catalogue, bodies: Bodies, usage: UsageBook
    ) -> None:
        self._relay = relay
        self._catalogue = catalogue
        self._bodies = bodies
        self._usage = usage

    def routes(self) -> tuple[Route, ...]:
        listing = (
            Route("openai", "GET", "/v1/models", Role.USER, self.models),
            Route("openai", "GET", "/v1/", Role.USER, self.models),
            Route("openai", "GET", "/v1/models/{id:.+}", Role.USER, self.model),
            Route("openai", "GET", "/v1/usage", Role.USER, self.usage),
        )
        relayed = (
            relayed_route("openai", endpoint, self._relay, self._bodies)
            for endpoint in ENDPOINTS
        )
        return (*listing, *relayed)

    async def models(self, request: web.Request) -> web.Response:
        """List what this key may use."""
        data = self._catalogue.listing(_key_of(request).may_see)
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        """One entry of the list."""
        wanted = request.match_info["id"]
        entry = self._catalogue.entry(wanted, _key_of(request).may_see)
        return web.json_response(entry)

    async def usage(self, request: web.Request) -> web.Response:
        """What this key has used."""
        return web.json_response(await self._usage.of(_key_of(request).name))


def relayed_route(
    service: str, endpoint: Endpoint, relay: Relay, bodies: Bodies
) -> Route:
    """The route of an endpoint whose requests go to whichever backend has the model.

    Args:
        service: as ``server.listen`` names it.
        endpoint: what is particular about it.
        relay: takes the requests there.
        bodies: reads them.
    """

    async def handler(request: web.Request) -> web.StreamResponse:
        if endpoint.method == "GET":
            return await relay.answer(request, _call_of_query(request, endpoint))
        body = await bodies.read(request)
        try:
            call = _call_of_body(request, endpoint, body)
        except BaseException:
            bodies.release(body)
            raise
        call.held = len(body)
        if call.held >= LARGE_BYTES:
            call.release = bodies.release_bytes
        del body  # it is the call's, which may let go of it early
        try:
            return await relay.answer(request, call)
        finally:
            bodies.release_bytes(call.held)

    return Route(
        service, endpoint.method, endpoint.path, Role.USER, handler, is_relayed=True
    )


def _key_of(request: web.Request) -> Key:
    key = request[CONTEXT].key
    assert key is not None  # the role USER was checked
    return key


def _call_of_query(request: web.Request, endpoint: Endpoint) -> Call:
    """A call whose model stands in the query, if anywhere."""
    return Call(
        method=endpoint.method,
        path=endpoint.backend_path,
        query=_query(request),
        content_type=None,
        body=b"",
        model=request.query.get("model") or None,
        values={},
        rewrite=lambda changes: b"",
        wants_stream=False,
        pads=endpoint.json_answer,
    )


def _call_of_body(request: web.Request, endpoint: Endpoint, body: bytes) -> Call:
    """Read what has to be known of a body, and check nothing else.

    Raises:
        InvalidRequest: it cannot be understood.
        ModelNotFound: it names a further model that this key may not use.
    """
    content_type = request.headers.get("Content-Type", "")
    if endpoint.takes_form and is_form(content_type):
        return _call_of_form(request, endpoint, body, content_type)
    members = Members.parse(body)
    values = members.values
    _check_required(endpoint, values)
    _check_named_models(values, _key_of(request))
    wants_stream = _flag(values, "stream")
    asks_for_usage = _asks_for_usage(values)
    return Call(
        method=endpoint.method,
        path=endpoint.backend_path,
        query=_query(request),
        content_type="application/json",
        body=body,
        model=_model(values.get("model")),
        values=values,
        rewrite=lambda changes: members.replaced(changes) if changes else body,
        wants_stream=wants_stream,
        hides_usage=wants_stream and endpoint.usage_option and not asks_for_usage,
        must_finish=endpoint.must_finish,
        pads=endpoint.json_answer,
        anthropic=endpoint.anthropic,
    )


def _call_of_form(
    request: web.Request, endpoint: Endpoint, body: bytes, content_type: str
) -> Call:
    form = Form.parse(body, content_type)
    stream = form.get("stream") or ""
    return Call(
        method=endpoint.method,
        path=endpoint.backend_path,
        query=_query(request),
        content_type=content_type,
        body=body,
        model=_model(form.model or None),
        values={},
        rewrite=lambda changes: form.replaced(changes["model"]) if changes else body,
        wants_stream=stream.strip().lower() in ("true", "1"),
        pads=endpoint.json_answer,
    )


def _query(request: web.Request) -> str:
    if not request.query_string:
        return ""
    kept = [
        (name, value)
        for name, value in request.query.items()
        if name.lower() not in _DROPPED_PARAMETERS
    ]
    return urlencode(kept)


def _model(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise InvalidRequest('"model" must be the name of a model', param="model")
    return value


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequest(f'"{name}" must be true or false', param=name)


def _asks_for_usage(values: Mapping[str, Any]) -> bool:
    options = values.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest(
            '"stream_options" must be an object', param="stream_options"
        )
    return options.get("include_usage") is True


def _check_required(endpoint: Endpoint, values: Mapping[str, Any]) -> None:
    name = endpoint.required
    if name is None:
        return
    value = values.get(name)
    if name == "messages" and value is not None and not isinstance(value, list):
        raise InvalidRequest('"messages" must be an array', param=name)
    if name == "input" and value is not None and not isinstance(value, str | list):
        raise InvalidRequest('"input" must be a string or an array', param=name)
    if not value:
        raise InvalidRequest(f'"{name}" is missing or empty', param=name)


def _check_named_models(values: Mapping[str, Any], key: Key) -> None:
    """Hold further models (OpenRouter's fallback lists) against the key's globs."""
    if "models" not in values and "route" not in values:
        return
    named = values.get("models")
    listed = named if isinstance(named, list) else [named]
    if len(listed) > _MAX_NAMED_MODELS:
        raise InvalidRequest(
            f'"models" may name {_MAX_NAMED_MODELS} models at most', param="models"
        )
    route = values.get("route")
    if route != "fallback":  # OpenRouter's word for: use what "models" lists
        listed = [*listed, route]
    for model in listed:
        if model is None:
            continue
        if not isinstance(model, str):
            raise InvalidRequest('"models" must be names of models', param="models")
        if len(model) > MAX_ID_LENGTH or not key.may_see(model):
            raise ModelNotFound(
                f'model "{model[:MAX_ID_LENGTH]}" is not known', param="models"
            )
