"""The service ``llama-swap``: what its clients and its page ask, and goinfer's list.

Models are asked for what they do by the routes of ``openai``, and by ``ENDPOINTS``
here. The rest shows and steers the models of this machine. In llama-swap each key may
do all of it; here what looks into other people's requests, or stops or bypasses
anything, needs an administrator's (and ``admin.remote``).
"""

import re
import shlex
from collections.abc import Callable, Collection, Sequence
from typing import Any

from aiohttp import web

from inferencia import __version__
from inferencia.addresses import Address
from inferencia.api.openai import Endpoint, relayed_route
from inferencia.api.route import Handler, Route
from inferencia.api.swapactivity import activity
from inferencia.api.swapevents import SwapEvents, word_of
from inferencia.api.swaplogs import SwapLogs
from inferencia.api.swapupstream import PREFIX, UpstreamDoor, model_named
from inferencia.bodies import Bodies
from inferencia.catalogue.choosing import Catalogue
from inferencia.context import CONTEXT, Context
from inferencia.downstream.connection import Connection
from inferencia.errors import InvalidRequest, ModelNotFound, NotFound, RequestAborted
from inferencia.keys import Key, Role
from inferencia.members import Members
from inferencia.models.definitions import ModelDefinition, SwapConfig
from inferencia.models.fleet import Fleet
from inferencia.models.running import State
from inferencia.models.swapfile import IGNORED_PATHS
from inferencia.models.virtual import VirtualNames
from inferencia.relaying import Relay
from inferencia.usage import UsageBook

_SERVICE = "llama-swap"

# Servers whose API lies at another place than /v1: "/v" is taken off, and the rest is
# their path.
_VERSIONLESS = (
    Endpoint(
        "/chat/completions", required="messages", usage_option=True, must_finish=True
    ),
    Endpoint("/responses", must_finish=True),
    Endpoint("/completions", usage_option=True, must_finish=True),
    Endpoint("/messages", required="messages", must_finish=True, anthropic=True),
    Endpoint("/messages/count_tokens", required="messages", anthropic=True),
    Endpoint("/embeddings", required="input"),
    Endpoint("/rerank"),
    Endpoint("/reranking"),
)
ENDPOINTS = (
    *(
        Endpoint(
            f"/v{one.path}",
            required=one.required,
            usage_option=one.usage_option,
            must_finish=one.must_finish,
            anthropic=one.anthropic,
            behind=one.path,
        )
        for one in _VERSIONLESS
    ),
    Endpoint("/sdapi/v1/txt2img"),
    Endpoint("/sdapi/v1/img2img"),
    Endpoint("/sdapi/v1/loras", method="GET"),
    Endpoint("/audioapi/v1/tasks/run", behind="/v1/tasks/run", json_answer=False),
    Endpoint("/props", method="GET"),
)

_SECRET_OPTION = re.compile(
    r"--?[\w-]*(?:key|token(?!iz)|secret|password)[\w-]*", re.ASCII
)
_STARS = "***"


class LlamaSwap:
    """The service ``llama-swap``, and ``GET /models`` of ``models`` and ``goinfer``."""

    def __init__(
        self,
        fleet: Fleet,
        names: VirtualNames,
        catalogue: Catalogue,
        relay: Relay,
        bodies: Bodies,
        usage: UsageBook,
        *,
        swap: Callable[[], SwapConfig | None],
        found: Callable[[], dict[str, Any]],
        active: Collection[Context],
        instance: str,
    ) -> None:
        """Make the service.

        Args:
            fleet: the models of this machine.
            names: knows the profiles.
            catalogue: knows all models.
            relay: takes requests to them.
            bodies: reads requests.
            usage: knows which requests there were.
            swap: the configuration in llama-swap's words, if there is one.
            found: goinfer's list of models.
            active: the requests in flight.
            instance: this process's name in ``Via``.
        """
        self._fleet = fleet
        self._names = names
        self._catalogue = catalogue
        self._relay = relay
        self._bodies = bodies
        self._usage = usage
        self._swap = swap
        self._found = found
        self._active = active
        self._door = UpstreamDoor(fleet, bodies, instance=instance)
        self._logs = SwapLogs(fleet, swap)
        self._events = SwapEvents(fleet, names, swap, active)

    def routes(self) -> tuple[Route, ...]:
        def admin(method: str, path: str, handler: Handler) -> Route:
            return Route(_SERVICE, method, path, Role.ADMIN, handler)

        def endless(path: str, handler: Handler) -> Route:
            return Route(_SERVICE, "GET", path, Role.ADMIN, handler, is_relayed=True)

        def changing(method: str, path: str, handler: Handler) -> Route:
            return Route(
                *(_SERVICE, method, path, Role.ADMIN, handler),
                is_relayed=True,
                changes=True,
            )

        relayed = (
            relayed_route(_SERVICE, endpoint, self._relay, self._bodies)
            for endpoint in ENDPOINTS
        )
        return (
            *relayed,
            Route(
                *("models", "GET", "/models", Role.USER, self.models),
                further=("goinfer", _SERVICE),
            ),
            Route(
                *(_SERVICE, "GET", "/api/version", Role.USER, version),
                further=("ollama",),
            ),
            Route(_SERVICE, "GET", "/wol-health", None, alive),
            Route(_SERVICE, "GET", "/running", Role.USER, self.running),
            changing("GET", "/unload", self.unload_all),
            admin("POST", "/api/models/unload", self.unload_all_as_json),
            admin("POST", "/api/models/unload/{id:.+}", self.unload),
            Route(
                *(_SERVICE, "*", PREFIX + "{path:.*}", Role.ADMIN, self.upstream),
                is_relayed=True,
                changes=True,
                is_transfer=True,
            ),
            admin("GET", "/logs", self._logs.history),
            endless("/logs/stream", self._logs.stream),
            endless("/logs/stream/{id:.+}", self._logs.stream),
            endless("/api/events", self._events.follow),
            admin("GET", "/api/profiles", self.profiles),
            admin("PUT", "/api/profiles/active", self.activate),
            admin("POST", "/api/inflight/{id:.+}/cancel", self.cancel),
            admin("GET", "/api/metrics/activity", self.activity),
        )

    def end_streams(self) -> None:
        """End what would go on for ever: the daemon is about to end."""
        self._logs.end_streams()
        self._events.end_streams()

    # Models.

    async def models(self, request: web.Request) -> web.Response:
        """goinfer's list of the GGUF files, or llama-swap's list of all models."""
        may_see = _key_of(request).may_see
        connection = request.protocol
        assert isinstance(connection, Connection)
        address = connection.address
        if isinstance(address, Address) and not (
            address.offers("models") or address.offers("goinfer")
        ):
            data = self._catalogue.listing(may_see)
            return web.json_response({"object": "list", "data": data})
        found = self._found()["models"]
        models = {name: entry for name, entry in found.items() if may_see(name)}
        return web.json_response({"count": len(models), "models": models})

    async def running(self, request: web.Request) -> web.Response:
        """The models that are not stopped."""
        may_see = _key_of(request).may_see
        running = [
            self._shown(definition, word_of(state))
            for state in self._fleet.states()
            if state.state in (State.LOADING, State.READY, State.STOPPING)
            and may_see(state.model)
            and (definition := self._fleet.plan.models.get(state.model)) is not None
        ]
        running.sort(key=lambda one: str(one["model"]))
        return web.json_response({"running": running})

    def _shown(self, definition: ModelDefinition, state: str) -> dict[str, Any]:
        child = self._fleet.child(definition.id)
        planned = definition.at_port(definition.port)
        here = planned if child is None else child.definition
        return {
            "model": definition.id,
            "state": state,
            "cmd": without_secrets(here.command),
            "proxy": here.proxy,
            "ttl": int(definition.ttl),
            "name": definition.name,
            "description": definition.description,
        }

    async def unload_all(self, request: web.Request) -> web.Response:
        """Unload all models; answers when they are gone."""
        await self._fleet.scheduler.unload_all()
        return web.Response(text="OK")

    async def unload_all_as_json(self, request: web.Request) -> web.Response:
        """The same, with the answer that the page's API gives."""
        await self._fleet.scheduler.unload_all()
        return web.json_response({"msg": "ok"})

    async def unload(self, request: web.Request) -> web.Response:
        """Unload one model; answers when it is gone."""
        named = request.match_info["id"]
        model = model_named(self._fleet, named)
        if model is None or not _key_of(request).may_see(model):
            raise ModelNotFound(f'model "{named[:256]}" is not on this machine')
        await self._fleet.scheduler.unload(model)
        return web.Response(text="OK")

    async def upstream(self, request: web.Request) -> web.StreamResponse:
        """Whatever the model's own server answers."""
        swap = self._swap()
        self._door.ignore(swap.ignore_paths if swap is not None else IGNORED_PATHS)
        return await self._door.answer(request)

    # Profiles.

    async def profiles(self, request: web.Request) -> web.Response:
        """All profiles, and which one is active."""
        profiles = [
            {
                "name": profile.name,
                "description": profile.description,
                "pins": dict(profile.pins),
            }
            for profile in self._names.profiles.values()
        ]
        return web.json_response({"active": self._active_name(), "profiles": profiles})

    async def activate(self, request: web.Request) -> web.Response:
        """Switch to a profile, ``{"name": "..."}``, or to none, ``{"name": null}``."""
        body = await self._bodies.read(request)
        try:
            values = Members.parse(body).values
        finally:
            self._bodies.release(body)
        name = values.get("name", "")
        if name is not None and (not isinstance(name, str) or not name):
            raise InvalidRequest(
                '"name" must be the name of a profile, or null', param="name"
            )
        try:
            self._names.activate(name)
        except KeyError:
            raise NotFound(f'there is no profile "{str(name)[:64]}"') from None
        return web.json_response({"active": self._active_name()})

    def _active_name(self) -> str | None:
        active = self._names.active
        return None if active is None else active.name

    # Requests.

    async def cancel(self, request: web.Request) -> web.Response:
        """End a request that is in flight."""
        wanted = request.match_info["id"]
        running = [one for one in self._active if one.id == wanted]
        for context in running:
            context.interrupt(RequestAborted("the request was ended by an admin"))
        if not running:
            raise NotFound("no request with this id is in flight")
        return web.json_response({"msg": "ok"})

    async def activity(self, request: web.Request) -> web.Response:
        """Requests that have ended, page by page."""
        return await activity(request, self._usage)


async def version(request: web.Request) -> web.Response:
    """The version, for llama-swap's page and for Ollama's clients."""
    return web.json_response(
        {"version": __version__, "commit": "unknown", "build_date": "unknown"}
    )


async def alive(request: web.Request) -> web.Response:
    """What a wake-on-LAN proxy asks of the machine behind it."""
    return web.Response(text="OK")


def without_secrets(command: Sequence[str]) -> str:
    """A command as it would be typed, less the values that look secret."""
    shown, hides = [], False
    for part in command:
        option, equals, _ = part.partition("=")
        is_secret = _SECRET_OPTION.fullmatch(option) is not None
        if hides and not part.startswith("-"):
            shown.append(_STARS)
        elif is_secret and equals:
            shown.append(f"{option}={_STARS}")
        else:
            shown.append(shlex.quote(part))
        hides = is_secret and not equals
    return " ".join(shown)


def _key_of(request: web.Request) -> Key:
    key = request[CONTEXT].key
    assert key is not None  # a role was checked
    return key
