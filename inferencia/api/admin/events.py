"""``GET events``: the state, and then each second what is different now.

One producer makes each event once, as bytes, for all who watch; while nobody does, it
makes none. Who reads too slowly loses what he has missed and gets a whole state in its
place, so that no queue grows.
"""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from inferencia.api.admin.asking import EVENTS
from inferencia.api.admin.rates import SECONDS, Rates
from inferencia.api.admin.state import Sections, joined
from inferencia.api.streams import begin
from inferencia.host import Figures, Host

# Events that wait for one watcher; behind that he gets a new state.
MAX_BEHIND = 8

# How often the machine is looked at while somebody watches; it takes a thread, and
# some cards are slow to tell.
_HOST_SECONDS = 2.0
# Figures of this age are still told, and a first look is waited for so long.
_HOST_STALE_SECONDS = 10.0
_HOST_PATIENCE_SECONDS = 1.5


class Watcher:
    """One who watches: the events that wait for him."""

    def __init__(self) -> None:
        self._events: deque[bytes] = deque()
        self._has_news = asyncio.Event()
        self._is_closed = False
        self._is_behind = True  # the first event is a whole state

    def push(self, event: bytes) -> None:
        """Take a change."""
        if len(self._events) >= MAX_BEHIND:
            self._events.clear()
            self._is_behind = True
        if not self._is_behind:
            self._events.append(event)
        self._has_news.set()

    def close(self) -> None:
        """Watch no longer."""
        self._is_closed = True
        self._has_news.set()

    async def next(self, whole: Callable[[], bytes]) -> bytes:
        """What is to be sent next; nothing when it is over.

        Args:
            whole: the state as an event.
        """
        while not self._is_closed:
            if self._is_behind:
                self._is_behind = False
                self._events.clear()
                return whole()
            if self._events:
                events = b"".join(self._events)
                self._events.clear()
                return events
            self._has_news.clear()
            await self._has_news.wait()
        return b""


class Events:
    """The producer, and those who watch."""

    def __init__(
        self,
        sections: Sections,
        rates: Rates,
        host: Host,
        disk: Callable[[], Path | None],
    ) -> None:
        """Make one without watchers.

        Args:
            sections: of the state.
            rates: sampled here.
            host: looked at while somebody watches.
            disk: the folder whose file system is of interest.
        """
        self._sections = sections
        self._rates = rates
        self._host = host
        self._disk = disk
        self._watchers: set[Watcher] = set()
        self._texts: dict[str, str] = {}  # as they were sent last
        self._looked = float("-inf")  # by the loop's clock
        self._looking: asyncio.Task[None] | None = None

    async def follow(self) -> None:
        """Produce until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        try:
            while True:
                # By the clock, so that a second is a second.
                due = max(due + SECONDS, loop.time())
                await asyncio.sleep(due - loop.time())
                self._rates.sample()
                if self._watchers:
                    self.tick()
        finally:
            if self._looking is not None:
                self._looking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._looking

    def tick(self) -> None:
        """Tell all watchers what is different since the last time."""
        if asyncio.get_running_loop().time() - self._looked >= _HOST_SECONDS:
            self._look()
        texts = self._sections.texts()
        always = ("time", "rates")
        changed = {
            name: text
            for name, text in texts.items()
            if name in always or self._texts.get(name) != text
        }
        self._texts = texts
        event = f"event: change\ndata: {joined(changed)}\n\n".encode()
        for watcher in self._watchers:
            watcher.push(event)

    async def state(self, request: web.Request) -> web.Response:
        """The state at this moment."""
        await self._have_looked()
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.Response(
            text=self._sections.whole(),
            headers=headers,
            content_type="application/json",
        )

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The state, and changes for as long as the client stays."""
        await self._have_looked()
        watcher = Watcher()
        response = await begin(request, EVENTS)
        self._watchers.add(watcher)
        try:
            while event := await watcher.next(self._whole):
                await response.write(event)
        finally:
            self._watchers.discard(watcher)
        await response.write_eof()
        return response

    def end_streams(self) -> None:
        """End all streams."""
        for watcher in tuple(self._watchers):
            watcher.close()

    @property
    def watchers(self) -> int:
        """How many watch now."""
        return len(self._watchers)

    def _whole(self) -> bytes:
        texts = self._sections.texts()
        if len(self._watchers) == 1:
            self._texts = dict(texts)
        for name, text in texts.items():
            # Should it be as before at the next tick, this watcher has to be told.
            if self._texts.get(name) != text:
                self._texts.pop(name, None)
        texts["history"] = json.dumps(self._rates.history)
        return f"event: state\ndata: {joined(texts)}\n\n".encode()

    def _look(self) -> asyncio.Task[None]:
        """Look at the machine in a thread, unless somebody does."""
        if self._looking is None or self._looking.done():
            loop = asyncio.get_running_loop()
            self._looked = loop.time()
            self._looking = loop.create_task(self._have_figures())
        return self._looking

    async def _have_figures(self) -> None:
        figures: Figures = await asyncio.to_thread(self._host.read, self._disk())
        self._sections.host = figures

    async def _have_looked(self) -> None:
        """See that the machine was looked at lately; do not wait for long."""
        age = asyncio.get_running_loop().time() - self._looked
        if age < _HOST_STALE_SECONDS and self._sections.host is not None:
            return
        await asyncio.wait((self._look(),), timeout=_HOST_PATIENCE_SECONDS)
