"""The watch over one backend: it is asked for its models, again and again.

``fail_threshold`` failed probes in a row take a backend down, one good one brings it
back; both are logged once. A server that is loading its model is not down. Clouds are
asked for their list every ten minutes, and never taken down by it: how requests end
tells more, through the breaker. A backend that lists its models without being asked
(``lists_itself``) is not watched.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Protocol

from inferencia.backends.base import (
    Backend,
    ListedModel,
    ListFailed,
    NotAsked,
    StillLoading,
)
from inferencia.settings import WatchdogConfig
from inferencia.wake import Waker

log = logging.getLogger(__name__)

# Probes that requests cause are at least so far apart: strangers to a name must not
# become a flood of them; and a cloud's list is asked for with our key.
REFRESH_SECONDS = 2.0
_CLOUD_REFRESH_SECONDS = 60.0

# A model that is being loaded shows up soon.
LOADING_POLL_SECONDS = 2.0
_LONGEST_POLL_SECONDS = 600.0


class Keeper(Protocol):
    """What a seat asks and tells the roster that it belongs to."""

    watchdog: WatchdogConfig  # as it is now
    clock: Callable[[], float]

    def merge(self) -> None:
        """A list has come: make a new snapshot."""

    def changed(self) -> None:
        """Models, or a backend's being up, have changed."""


class Seat:
    """One backend's place: what it listed, and the task that asks it."""

    __slots__ = (
        "_asked",
        "_is_loading",
        "_probed",
        "_roster",
        "_said",
        "_waiting",
        "backend",
        "failures",
        "group",
        "models",
        "task",
        "waker",
    )

    def __init__(self, backend: Backend, group: str, roster: Keeper) -> None:
        self.backend = backend
        self.group = group
        self.models: tuple[ListedModel, ...] = ()  # of the last list
        self.failures = 0  # failed probes in a row
        self.task: asyncio.Task[None] | None = None  # asks, from ``follow`` on
        self.waker: Waker | None = None  # only with ``wake.mac``
        self._roster = roster
        self._is_loading = False  # as of the last probe
        self._said = ""  # the trouble that was logged last
        self._probed: float | None = None  # when the last probe ended; None: none did
        self._asked = asyncio.Event()  # to probe now
        self._waiting: list[asyncio.Future[None]] = []  # for that probe
        if backend.lists_itself:
            backend.is_listed = True
            self.models = backend.own_models
        if backend.config.wake.mac is not None:
            self.waker = Waker(backend.config.wake, backend.name, self._answers)

    @property
    def offered(self) -> tuple[ListedModel, ...]:
        """What it lists; before it ever did, what is configured by its exact name."""
        return self.models or self.backend.exact_models

    @property
    def may_list_more(self) -> bool:
        """Whether it loads a model whose name nobody knows yet."""
        return self._is_loading and not self.offered

    def take_over(self, other: "Seat") -> None:
        """Know what was known of the same server, until it is asked again."""
        self.models = other.models
        self.failures = other.failures
        self._is_loading = other._is_loading
        self.backend.take_over(other.backend)

    def follow(self) -> None:
        """Begin to ask, now and from then on; whoever cancels ``task`` ends it."""
        if not self.backend.lists_itself:
            self.task = asyncio.get_running_loop().create_task(self._keep_asking())

    def ask(self) -> bool:
        """Have it probed now; False if that was done just before."""
        if self.backend.lists_itself:
            return False
        gap = _CLOUD_REFRESH_SECONDS if self.backend.is_cloud else REFRESH_SECONDS
        if self._probed is not None and self._roster.clock() - self._probed < gap:
            return False
        self._asked.set()
        return True

    def next_probe(self) -> "asyncio.Future[None]":
        """What is done when the next probe has ended."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    async def _keep_asking(self) -> None:
        while True:
            await self.probe()
            self._asked.clear()  # who asked meanwhile got this probe
            # Jitter, so that several gateways do not ask a machine in step.
            seconds = self._poll_seconds(self._roster.watchdog.interval)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * random.uniform(0.9, 1.1)):
                    await self._asked.wait()

    def _poll_seconds(self, interval: float) -> float:
        """The time until the next probe."""
        if self._is_loading:
            return min(interval, LOADING_POLL_SECONDS)
        if self.failures and self.backend.is_cloud:
            slower = interval * 2.0 ** min(self.failures - 1, 10)
            return min(slower, _LONGEST_POLL_SECONDS)
        if self.failures:
            return interval
        return self.backend.poll_seconds(interval)

    async def _answers(self) -> bool:
        await self.probe()
        return not self.failures

    async def probe(self) -> None:
        """Ask it once, now; what comes of it is noted, whatever it is."""
        try:
            await self._look()
        except Exception:
            # A fault of ours in one backend's code must not end its watch.
            log.exception("probing backend %s failed", self.backend.name)
            self._failed()
        finally:
            self._probed = self._roster.clock()
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def _look(self) -> None:
        seconds = self._roster.watchdog.request_timeout
        try:
            models = await self.backend.list_models(seconds)
        except StillLoading:
            self._answered(self.models, is_loading=True)
        except NotAsked as error:
            log.warning("%s", error)
        except ListFailed:
            self._failed()
        else:
            self.backend.is_listed = True
            self._answered(models, is_loading=False)

    def _answered(self, models: tuple[ListedModel, ...], *, is_loading: bool) -> None:
        backend = self.backend
        was_down = backend.is_down
        had = {(model.id, model.upstream_id) for model in self.offered}
        self.models = models
        self._is_loading = is_loading
        if self.failures or backend.is_unreachable:
            # It was gone and is back: what failed before says nothing about it now. One
            # that lists its models all along and fails requests stays shut out.
            backend.breaker.succeeded()
            backend.is_unreachable = False
        self.failures = 0
        backend.is_down = False
        if was_down:
            log.info('back in service: backend "%s"', backend.name)
        self._say()
        self._roster.merge()
        has = {(model.id, model.upstream_id) for model in self.offered}
        if was_down or had != has:
            self._roster.changed()

    def _failed(self) -> None:
        backend = self.backend
        self._is_loading = False
        self.failures += 1
        if backend.is_cloud or backend.is_down:
            return
        if self.failures >= self._roster.watchdog.fail_threshold:
            backend.is_down = True
            log.warning("out of service: %s", backend.trouble)
            self._roster.changed()
        else:
            self._say()

    def _say(self) -> None:
        """Log what is wrong with a backend that is not down, each thing once."""
        trouble = self.backend.trouble
        if trouble and trouble != self._said:
            log.info("%s", trouble)
        self._said = trouble
