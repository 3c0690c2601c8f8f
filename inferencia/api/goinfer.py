"""The service ``goinfer``: ``/infer`` with goinfer's words, and its ``/completions``.

Answers have the shape of llama.cpp's ``/completion``, whichever engine gives them: one
that has that endpoint is asked there, any other by way of ``/v1/completions``.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from inferencia.api.route import Route
from inferencia.backends.base import Backend
from inferencia.bodies import Bodies
from inferencia.context import CONTEXT, Context
from inferencia.errors import BackendTimeout, InvalidRequest, RequestAborted
from inferencia.keys import Key, Role
from inferencia.members import Members
from inferencia.relaying import Call, Relay
from inferencia.translate.infer import (
    FromCompletions,
    Inference,
    for_completions,
    read,
    read_plain,
)

# goinfer's clients send this when they mean no model in particular.
_NO_MODEL = "default"


class GoInfer:
    """The service ``goinfer``."""

    def __init__(self, relay: Relay, bodies: Bodies) -> None:
        self._relay = relay
        self._bodies = bodies
        self._running: set[Context] = set()  # requests of /infer and /completions

    def routes(self) -> tuple[Route, ...]:
        def relayed(path: str, handler: Callable[..., Awaitable[Any]]) -> Route:
            return Route("goinfer", "POST", path, Role.USER, handler, is_relayed=True)

        return (
            relayed("/infer", self.infer),
            relayed("/completions", self.completions),
            Route("goinfer", "POST", "/infer/abort", Role.USER, self.abort),
            Route("goinfer", "GET", "/infer/abort", Role.USER, self.abort),
        )

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """Complete a prompt, with goinfer's defaults."""
        return await self._answer(request, read)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Complete a prompt, with the engine's defaults."""
        return await self._answer(request, read_plain)

    async def abort(self, request: web.Request) -> web.Response:
        """End the caller's running requests; an admin's call ends everybody's."""
        caller = request[CONTEXT].key
        assert caller is not None
        running = [one for one in self._running if _may_abort(caller, one.key)]
        for context in running:
            context.interrupt(RequestAborted("the request was aborted by /infer/abort"))
        return web.Response(status=204 if running else 202)

    async def _answer(
        self,
        request: web.Request,
        understand: Callable[[Mapping[str, Any]], Inference],
    ) -> web.StreamResponse:
        context = request[CONTEXT]
        body = await self._bodies.read(request)
        timer = None
        self._running.add(context)
        try:
            values = Members.parse(body).values
            asked = understand(values)
            if asked.timeout is not None:
                timer = asyncio.get_running_loop().call_later(
                    asked.timeout, context.interrupt, _timed_out(asked.timeout)
                )
            call = _call(_model(values), asked)
            context.measurement.bytes_in = len(body)
            return await self._relay.answer(request, call)
        finally:
            if timer is not None:
                timer.cancel()
            self._running.discard(context)
            self._bodies.release(body)


def _may_abort(caller: Key, owner: Key | None) -> bool:
    if caller.role is Role.ADMIN:
        return True
    return owner is not None and owner.name == caller.name


def _timed_out(seconds: float) -> BackendTimeout:
    return BackendTimeout(
        f'the request was not finished within its "timeout" of {seconds:g} s'
    )


def _model(values: Mapping[str, Any]) -> str | None:
    model = values.get("model")
    if model is None or model in ("", _NO_MODEL):
        return None
    if not isinstance(model, str):
        raise InvalidRequest('"model" must be the name of a model', param="model")
    return model


def _call(model: str | None, asked: Inference) -> Call:
    """The request for llama.cpp's endpoint, and what it is elsewhere."""

    def written(members: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], bytes]:
        named = dict(members) if model is None else {"model": model, **members}

        def rewrite(changes: Mapping[str, Any]) -> bytes:
            return json.dumps({**named, **changes}, ensure_ascii=False).encode()

        return rewrite

    def made(
        path: str,
        members: Mapping[str, Any],
        reshape: Callable[[str], FromCompletions] | None,
    ) -> Call:
        rewrite = written(members)
        return Call(
            method="POST",
            path=path,
            query="",
            content_type="application/json",
            body=b"",
            model=model,
            values=members,
            rewrite=rewrite,
            wants_stream=asked.wants_stream,
            must_finish=True,
            for_backend=at,
            reshape=reshape,
        )

    def at(backend: Backend) -> Call:
        if backend.has_completion or asked.has_media:
            return native
        members = for_completions(asked.members, is_local=not backend.is_cloud)
        return made("/v1/completions", members, reshaped)

    def reshaped(model: str) -> FromCompletions:
        return FromCompletions(is_stream=asked.wants_stream, model=model)

    native = made("/completion", asked.members, None)
    return native
