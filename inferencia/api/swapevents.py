"""``/api/events``: what happens here, told to llama-swap's own page and its like.

Server-sent events, each ``{"type": T, "data": TEXT}`` where TEXT is JSON once more:

==============  ==================================================================
modelStatus     all models with their states
logData         ``{"source": "proxy" or "upstream", "data": lines}``
inflight        ``{"operation": "snapshot", "requests": [...]}``
activity        ``{}``: requests have ended, ``/api/metrics/activity`` has more
uiConfig        what the page may show
profileChanged  ``{"active": name or null}``
==============  ==================================================================

Who reads too slowly misses states in between and the oldest lines, and never the last
state: nothing is queued but log lines, which are bounded. Requests are looked at only
while somebody follows, and cost nothing to be followed.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from inferencia.api.streams import begin
from inferencia.context import Context
from inferencia.models.childlog import Log
from inferencia.models.definitions import SwapConfig
from inferencia.models.fleet import Fleet
from inferencia.models.running import ModelState, State
from inferencia.models.virtual import VirtualNames

# How often the requests in flight are looked at. llama-swap tells of each at most
# every 250 ms; this is a snapshot of all.
SAMPLE_SECONDS = 0.5
KEEPALIVE_SECONDS = 15.0

_HEADERS = (
    ("Content-Type", "text/event-stream"),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)

_WORDS = {
    State.LOADING: "starting",
    State.READY: "ready",
    State.STOPPING: "stopping",
}


def word_of(state: ModelState) -> str:
    """llama-swap's word for what a model is doing."""
    return _WORDS.get(state.state, "stopped")


class SwapEvents:
    """Tells those who follow."""

    def __init__(
        self,
        fleet: Fleet,
        names: VirtualNames,
        swap: Callable[[], SwapConfig | None],
        active: Collection[Context],
    ) -> None:
        """Make it.

        Args:
            fleet: whose models and logs are told of.
            names: knows the active profile.
            swap: the configuration.
            active: the requests in flight.
        """
        self._fleet = fleet
        self._names = names
        self._swap = swap
        self._active = active
        self._endings: set[asyncio.Event] = set()  # one for each that follows

    async def follow(self, request: web.Request) -> web.StreamResponse:
        """The stream of one that follows; it ends with the daemon."""
        response = await begin(request, _HEADERS)
        ending = asyncio.Event()
        self._endings.add(ending)
        telling = _Telling(response)
        tasks = [
            asyncio.create_task(told)
            for told in (
                ending.wait(),
                self._tell_models(telling),
                self._tell_log(telling, "proxy", self._fleet.logs.proxy),
                self._tell_log(telling, "upstream", self._fleet.logs.upstream),
                self._tell_requests(telling),
                telling.keep_alive(),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                with contextlib.suppress(ConnectionError):
                    task.result()
        finally:
            self._endings.discard(ending)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    def end_streams(self) -> None:
        """End all streams."""
        for ending in self._endings:
            ending.set()

    def models(self) -> list[dict[str, Any]]:
        """All models, and those of peers, as the page shows them."""
        shown = []
        for state in self._fleet.states():
            definition = self._fleet.plan.models.get(state.model)
            if definition is None:
                continue  # it is on its way out
            one = _shown(state.model, word_of(state))
            one["name"], one["description"] = definition.name, definition.description
            one["unlisted"] = definition.unlisted
            if definition.aliases:
                one["aliases"] = list(definition.aliases)
            shown.append(one)
        swap = self._swap()
        for peer in swap.peers if swap is not None else ():
            for model in peer.models:
                shown.append(_shown(model, "unknown") | {"peerID": peer.id})
        return shown

    def requests(self) -> list[dict[str, Any]]:
        """The requests in flight that a model was asked."""
        now, wall = time.monotonic(), time.time()
        found = []
        for context in tuple(self._active):
            m = context.measurement
            if not m.is_work:
                continue
            began = datetime.fromtimestamp(wall - (now - m.started), UTC)
            found.append(
                {
                    "id": m.id,
                    "timestamp": began.isoformat(timespec="milliseconds"),
                    "model": m.model or "",
                    "req_path": m.path,
                    "method": m.method,
                    "req_headers": {},
                    "remote_ip": m.client or "",
                    "resp_headers": {},
                    "resp_bytes": m.bytes_out,
                    "elapsed_ms": int((now - m.started) * 1000),
                    "metadata": {"key": m.key or ""},
                }
            )
        return sorted(found, key=lambda one: (one["timestamp"], one["id"]))

    async def _tell_models(self, telling: "_Telling") -> None:
        news = asyncio.Event()
        end = self._fleet.follow(lambda model: news.set())
        try:
            before: list[dict[str, Any]] | None = None
            while True:
                news.clear()
                models = self.models()
                if models != before:
                    before = models
                    await telling.tell("modelStatus", models)
                await news.wait()
        finally:
            end()

    async def _tell_log(self, telling: "_Telling", source: str, log: Log) -> None:
        with log.follow() as follower:
            async for text in follower:
                await telling.tell("logData", {"source": source, "data": text})

    async def _tell_requests(self, telling: "_Telling") -> None:
        """Look at what goes on, and tell what is different from before."""
        await telling.tell("uiConfig", {"activity": {"session_id": []}})
        profile, plan = self._active_profile(), self._fleet.plan
        before: list[tuple[Any, ...]] | None = None
        while True:
            requests = self.requests()
            seen = [(r["id"], r["model"], r["resp_bytes"]) for r in requests]
            if seen != before:
                told = {"operation": "snapshot", "requests": requests}
                await telling.tell("inflight", told)
            ids = {one[0] for one in seen}
            if any(one[0] not in ids for one in before or ()):
                await telling.tell("activity", {})
            before = seen
            if (now := self._active_profile()) != profile:
                profile = now
                await telling.tell("profileChanged", {"active": profile})
            if self._fleet.plan is not plan:  # models have come, gone, or are others
                plan = self._fleet.plan
                await telling.tell("modelStatus", self.models())
            await asyncio.sleep(SAMPLE_SECONDS)

    def _active_profile(self) -> str | None:
        active = self._names.active
        return None if active is None else active.name


class _Telling:
    """Writes events to one that follows."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response
        self._last = asyncio.get_running_loop().time()

    async def tell(self, kind: str, data: Any) -> None:
        """Write one event; returns when there is room for more."""
        message = json.dumps({"type": kind, "data": json.dumps(data)})
        await self._write(f"event: message\ndata: {message}\n\n")

    async def keep_alive(self) -> None:
        """Write a comment whenever there was nothing else for a while."""
        loop = asyncio.get_running_loop()
        while True:
            quiet = loop.time() - self._last
            if quiet >= KEEPALIVE_SECONDS:
                await self._write(": nothing new\n\n")
                quiet = 0.0
            await asyncio.sleep(KEEPALIVE_SECONDS - quiet)

    async def _write(self, text: str) -> None:
        self._last = asyncio.get_running_loop().time()
        await self._response.write(text.encode())


def _shown(model: str, state: str) -> dict[str, Any]:
    return {
        "id": model,
        "name": "",
        "description": "",
        "state": state,
        "unlisted": False,
        "peerID": "",
    }
