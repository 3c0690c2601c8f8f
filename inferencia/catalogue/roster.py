"""Which backends there are; what they list is one snapshot that is swapped whole.

**Backends come in groups**: those of the configuration, and those that other parts of
the program bring and take away while it runs (the models on this machine, the machines
behind a tunnel). Each group is swapped by itself. What stays in a group keeps its list,
its counts and its connections; what goes is closed when its last request has ended.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Self

from inferencia.backends.base import Backend
from inferencia.catalogue.snapshot import Snapshot, snapshot_of
from inferencia.catalogue.watching import Seat
from inferencia.errors import BackendUnavailable
from inferencia.settings import WatchdogConfig
from inferencia.wake import StillAsleep

# The group of the backends that the configuration names.
CONFIGURED = "configured"

# How long a 404 is held back for the sake of a model that appeared just now.
_REFRESH_WAIT_SECONDS = 2.0

# What clients are advised when a backend is down: a request for one of its models has
# it probed at once, so the next one may find it back.
DOWN_RETRY_SECONDS = 5.0


class Roster:
    """All backends, each followed. It owns them: ``aclose`` closes them too."""

    def __init__(
        self,
        backends: Sequence[Backend],
        watchdog: WatchdogConfig,
        *,
        on_change: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a roster; nothing is asked before ``start``.

        Args:
            backends: of the configuration, with names of their own.
            watchdog: how often to probe, and how patiently.
            on_change: called when models, a backend's being up, or the backends
                themselves have changed.
            clock: what breakers are asked with.
        """
        self.watchdog = watchdog
        self.clock = clock
        self._on_change = on_change
        self._created = int(time.time())  # for models whose record does not say when
        self._seats = [Seat(backend, CONFIGURED, self) for backend in backends]
        self._wakeable = self._with_wakers()
        self._snapshot: Snapshot
        self.merge()
        self._is_started = False
        self._leaving: set[asyncio.Task[None]] = set()

    # Its life.

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def start(self) -> None:
        """Begin to ask the backends, each at once."""
        self._is_started = True
        for seat in self._seats:
            seat.follow()

    async def aclose(self) -> None:
        """Stop asking and close the backends. Calling it again does nothing."""
        self._is_started = False
        seats, self._seats = self._seats, []
        leaving, self._leaving = self._leaving, set()
        await _cancelled([*(seat.task for seat in seats), *leaving])
        for seat in seats:
            if seat.waker is not None:
                await seat.waker.aclose()
            await seat.backend.aclose()

    async def replace_group(self, group: str, backends: Sequence[Backend]) -> None:
        """Swap the backends of one group; those of other groups stay.

        Backends among ``backends`` that are here already (the same objects; see
        ``Backend.same_as``) keep their list, breaker and requests. One that is the same
        server with other settings takes over the list. Those that go are closed when
        their last request has ended.

        Args:
            group: ``CONFIGURED``, or a name of the caller's.
            backends: all that the group has from now on, with names of their own.
        """
        here = {id(seat.backend): seat for seat in self._seats}
        members = [here.get(id(b)) or Seat(b, group, self) for b in backends]
        others = [seat for seat in self._seats if seat.group != group]
        # What is configured comes first, wherever the order decides.
        staying = members + others if group == CONFIGURED else others + members
        kept = set(map(id, staying))
        going = [seat for seat in self._seats if id(seat) not in kept]
        before = {_what_is_listed(seat.backend): seat for seat in going}
        for seat in members:
            if seat.backend.lists_itself:
                continue
            old = before.get(_what_is_listed(seat.backend))
            if seat.task is None and old is not None:
                seat.take_over(old)
        self._seats = staying
        self._wakeable = self._with_wakers()
        self.merge()
        for seat in members:
            if self._is_started and seat.task is None:
                seat.follow()
        for seat in going:
            self._see_off(seat.backend)
        self.changed()
        await _cancelled([seat.task for seat in going])
        for seat in going:
            if seat.waker is not None:
                await seat.waker.aclose()

    def relist(self, backend: Backend) -> None:
        """Take note that a backend that lists itself has other models now."""
        for seat in self._seats:
            if seat.backend is backend:
                seat.models = backend.own_models
        self.merge()
        self.changed()

    def _with_wakers(self) -> dict[Backend, Seat]:
        return {s.backend: s for s in self._seats if s.waker is not None}

    def _see_off(self, backend: Backend) -> None:
        async def close_when_idle() -> None:
            try:
                await backend.wait_until_idle()
            finally:
                await backend.aclose()

        task = asyncio.get_running_loop().create_task(close_when_idle())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    # Who is there.

    @property
    def backends(self) -> tuple[Backend, ...]:
        """In the order of the configuration."""
        return tuple([seat.backend for seat in self._seats])

    @property
    def has_choice(self) -> bool:
        """Whether there is more than one backend."""
        return len(self._seats) > 1

    def models_of(self, backend: Backend) -> tuple[str, ...]:
        """The names that a backend offers, as it last listed them."""
        return tuple(
            model.id
            for seat in self._seats
            if seat.backend is backend
            for model in seat.offered
        )

    def can_wake(self, backend: Backend) -> bool:
        """Whether there is a way to wake its machine."""
        return backend in self._wakeable

    def wakings(self, backend: Backend) -> int:
        """How often its machine was to be woken so far."""
        seat = self._wakeable.get(backend)
        return 0 if seat is None or seat.waker is None else seat.waker.wakings

    async def wake(self, backend: Backend) -> None:
        """Wake a backend's machine, and return when its server answers.

        Raises:
            BackendUnavailable: it did not within ``wake.timeout``, now or just before.
        """
        seat = self._wakeable.get(backend)
        if seat is None or seat.waker is None:
            raise BackendUnavailable(
                f'backend "{backend.name}" is gone', retry_after=DOWN_RETRY_SECONDS
            )
        try:
            await seat.waker.wake()
        except StillAsleep as error:
            raise BackendUnavailable(
                f'the machine of backend "{backend.name}" {error}',
                retry_after=error.retry_after,
            ) from error
        # What failed while it slept says nothing about it.
        backend.breaker.succeeded()

    async def refresh(self) -> None:
        """Ask the reachable backends again, for a model that appeared just now.

        Each is asked at most every ``REFRESH_SECONDS``, and one that is slow is not
        waited for long. Backends that are down are asked too, but not waited for.
        """
        waiting = []
        for seat in self._seats:
            if seat.task is None or not seat.ask():
                continue
            if not seat.backend.is_down:
                waiting.append(seat.next_probe())
        if waiting:
            await asyncio.wait(waiting, timeout=_REFRESH_WAIT_SECONDS)

    # What the seats tell (``watching.Keeper``).

    def merge(self) -> None:
        """Make a new snapshot of what all offer now."""
        offers = [(seat.backend, seat.offered) for seat in self._seats]
        self._snapshot = snapshot_of(offers, self._created)

    def changed(self) -> None:
        """Tell whoever wants to know that something has changed."""
        if self._on_change is not None:
            self._on_change()


def _what_is_listed(backend: Backend) -> tuple[object, ...]:
    """What decides which models a backend lists, and under which names."""
    config = backend.config
    return (config.type, config.url, config.prefix, config.models)


async def _cancelled(tasks: Sequence[asyncio.Task[None] | None]) -> None:
    """Cancel tasks and wait until they have ended."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
