"""What runs: models, their processes, and the leases that keep them from going.

These are the scheduler's records. It alone changes them (``scheduler.py``); others hold
a ``Lease`` or read a ``ModelState``. Times are those of the scheduler's clock.
"""

import asyncio
import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass

from inferencia.models.deciding import Phase
from inferencia.models.definitions import ModelDefinition
from inferencia.models.failures import Failures


class State(enum.StrEnum):
    """What a model is doing, in a word."""

    STOPPED = "stopped"
    QUEUED = "queued"  # requests wait for its turn
    LOADING = "loading"  # also while others make room for it
    READY = "ready"
    STOPPING = "stopping"  # also while it finishes what it serves before it goes
    FAILED = "failed"  # and it is too early for another attempt


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model as it is in this moment."""

    model: str
    state: State
    in_flight: int  # leases
    waiting: int  # requests
    loaded_since: float | None
    load_seconds: float | None  # from its start until it was ready
    last_used: float | None  # end of the last request; None if it does not run
    ttl_left: float | None  # seconds until it is unloaded; None while it serves
    memory_estimated: int | None  # bytes; None also if nobody had to know yet
    memory_measured: int | None  # bytes; of its last process if it does not run
    error: str  # why it failed last; "" since it was loaded again
    retry_after: float  # seconds until it may be tried again; 0 if at once


@dataclass(slots=True)
class Memory:
    """What is known of the memory that a model takes, in bytes."""

    is_estimated: bool = False  # the estimate is asked for when it is needed first
    estimate: int | None = None
    measured: int | None = None  # of a process, as soon as one is ready

    @property
    def size(self) -> int | None:
        """The best that is known; None if that is nothing."""
        return self.measured if self.measured is not None else self.estimate


class Process:
    """One process of a model, from the decision to start it until nothing is left."""

    __slots__ = (
        "definition",
        "drain_timer",
        "gone",
        "grace",
        "is_replaced",
        "is_starting",
        "is_unloaded",
        "leases",
        "lost",
        "memory",
        "model",
        "on_release",
        "ready_at",
        "served_at",
        "started_at",
        "stop_wanted",
        "task",
    )

    def __init__(
        self, model: "Model", now: float, on_release: "Callable[[Process, bool], None]"
    ) -> None:
        self.model = model
        self.definition = model.definition  # what it was started for
        # Shared with the model as long as that is the same one, which thus learns.
        self.memory = model.memory
        self.on_release = on_release
        self.leases = 0
        self.lost: str | None = None  # why its leases are worth nothing any more
        self.started_at = now
        self.ready_at: float | None = None
        self.served_at: float | None = None  # when the first request was served
        self.is_starting = False  # while the worker starts it
        self.is_unloaded = False  # somebody wants it to end
        self.is_replaced = False  # its definition has changed, or was removed
        self.drain_timer: asyncio.TimerHandle | None = None
        self.stop_wanted = asyncio.Event()
        self.grace: float | None = None  # seconds; with ``stop_wanted``
        self.gone = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def is_draining(self) -> bool:
        """Whether it only finishes what it serves."""
        return self.is_unloaded or self.is_replaced


class Lease:
    """A request's hold on a loaded model: it is not unloaded before the release."""

    __slots__ = ("_is_released", "_process")

    def __init__(self, process: Process) -> None:
        self._process = process
        self._is_released = False

    @property
    def model(self) -> str:
        """The id of the model."""
        return self._process.definition.id

    @property
    def lost(self) -> str | None:
        """Why the process is not there any more, in words; None while it is."""
        return self._process.lost

    def release(self, *, served: bool = True) -> None:
        """Give the lease back. Calling it again does nothing.

        Args:
            served: whether the model has answered. If it lives on, that ends the
                record of its failures.
        """
        if not self._is_released:
            self._is_released = True
            self._process.on_release(self._process, served)


class Model:
    """What the scheduler knows of one model."""

    __slots__ = (
        "coming_seconds",
        "coming_since",
        "definition",
        "error",
        "failures",
        "is_open",
        "is_removed",
        "last_used",
        "limit",
        "memory",
        "passed_since",
        "phase",
        "process",
        "ttl_timer",
    )

    def __init__(self, definition: ModelDefinition) -> None:
        self.phase: Phase | None = None  # None: stopped
        self.process: Process | None = None  # from LOADING until it is gone
        # Whether a request may have a lease without asking anybody: the hot path.
        self.is_open = False
        self.limit = 0  # leases at the same time
        self.last_used = 0.0
        self.ttl_timer: asyncio.TimerHandle | None = None
        self.failures = Failures()
        self.error = ""
        self.is_removed = False  # from the configuration, while a process is left
        # Since when it is passed over for the sake of loaded models; until its turn.
        self.passed_since: float | None = None
        # Time in ROOM and LOADING: up to now, and since when it is there again.
        self.coming_seconds = 0.0
        self.coming_since: float | None = None
        self.memory = Memory()
        self.define(definition)

    def define(self, definition: ModelDefinition) -> None:
        """Take over a definition; whether a process must go is not decided here."""
        self.definition = definition
        self.limit = definition.concurrency_limit or sys.maxsize

    def forget(self) -> None:
        """Note that it is another model now, though its name is the same."""
        self.failures.clear()
        self.error = ""
        self.memory = Memory()

    @property
    def id(self) -> str:
        """The name by which it is known."""
        return self.definition.id

    @property
    def is_coming(self) -> bool:
        """Whether it has had its turn and is not ready yet."""
        return self.phase is Phase.ROOM or self.phase is Phase.LOADING

    @property
    def in_flight(self) -> int:
        """How many leases there are."""
        return self.process.leases if self.process is not None else 0

    def seconds_coming(self, now: float) -> float:
        """How long it has been in ROOM and LOADING, all in all."""
        since = self.coming_since
        return self.coming_seconds + (now - since if since is not None else 0.0)

    def become(self, phase: Phase | None, now: float) -> None:
        """Pass on to another phase."""
        was_coming = self.is_coming
        self.phase = phase
        self.is_open = False
        if self.is_coming and not was_coming:
            self.coming_since = now
            self.passed_since = None
        elif was_coming and not self.is_coming:
            self.coming_seconds = self.seconds_coming(now)
            self.coming_since = None
        if phase is not Phase.READY and self.ttl_timer is not None:
            self.ttl_timer.cancel()
            self.ttl_timer = None
        if phase is None:
            self.process = None

    def state(self, now: float, waiting: int) -> ModelState:
        """A snapshot.

        Args:
            now: by the scheduler's clock.
            waiting: how many requests wait for it.
        """
        process = self.process
        memory = self.memory if process is None else process.memory
        ready_at = process.ready_at if process is not None else None
        return ModelState(
            model=self.id,
            state=self._word(now, waiting),
            in_flight=self.in_flight,
            waiting=waiting,
            loaded_since=ready_at,
            load_seconds=(
                ready_at - process.started_at
                if process is not None and ready_at is not None
                else None
            ),
            last_used=self.last_used if ready_at is not None else None,
            ttl_left=self._ttl_left(now),
            memory_estimated=memory.estimate,
            memory_measured=memory.measured,
            error=self.error,
            retry_after=self.failures.seconds_left(now),
        )

    def _word(self, now: float, waiting: int) -> State:
        if self.is_coming:
            return State.LOADING
        if self.phase is Phase.STOPPING:
            return State.STOPPING
        if self.process is not None:
            return State.STOPPING if self.process.is_draining else State.READY
        if self.failures.seconds_left(now) > 0:
            return State.FAILED
        return State.QUEUED if waiting else State.STOPPED

    def _ttl_left(self, now: float) -> float | None:
        ttl = self.definition.ttl
        if not ttl or self.phase is not Phase.READY or self.in_flight:
            return None
        return max(0.0, self.last_used + ttl - now)
