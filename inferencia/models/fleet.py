"""The fleet: this machine's models, what is known of them, and what does the work.

It joins three things that know nothing of each other: the definitions of the models,
the scheduler that decides which of them run, and the child processes. Above it are the
backends that requests go to (``backends/managed.py``), one for each model, and the
services that show and steer what runs.

A child gets a free port if another program listens on its own. Its environment is ours
without what is secret: whatever belongs to this gateway, and every variable that the
configuration takes a secret from.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from inferencia.backends.managed import Lease, Managed
from inferencia.models.childlog import Logs
from inferencia.models.definitions import Group, MatrixSets, ModelDefinition
from inferencia.models.orphans import OrphanBook
from inferencia.models.process import (
    Child,
    Exit,
    LoadFailed,
    PortTaken,
    Probe,
)
from inferencia.models.running import ModelState, State
from inferencia.models.scheduler import LoadFailed as CannotLoad
from inferencia.models.scheduler import Scheduler
from inferencia.settings import QueueConfig
from inferencia.upstream.answer import UpstreamError
from inferencia.upstream.origin import Origin
from inferencia.upstream.pool import Upstream

log = logging.getLogger(__name__)

# A probe that hangs is cancelled by the child; an answer's text is of no interest.
_MAX_PROBE_BYTES = 64 * 1024

# How many further ports are tried if other programs listen on a model's own.
_MAX_PORTS = 20

# Variables of ours start with these; children see none of them. (A child that tells
# the service manager how it is would speak for us.)
_OWN_VARIABLES = ("INFERENCIA_", "GI_API_KEY", "NOTIFY_SOCKET", "WATCHDOG_")

_WAITING_WORDS = "waiting"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which models there are and what holds for all of them."""

    models: Mapping[str, ModelDefinition]
    rules: Sequence[Group] | MatrixSets | None = None  # None: nothing was written
    budget: int | None = None  # bytes
    start_port: int = 5800


class Fleet:
    """All models of this machine."""

    def __init__(
        self,
        *,
        env: Mapping[str, str],
        queue: QueueConfig,
        children: Path,
        estimate: Callable[[Sequence[str]], int | None],
        secret_variables: Iterable[str] = (),
        instance: str = "",
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        """Make a fleet without any model.

        Args:
            env: our environment.
            queue: how many requests may wait for models, and for how long.
            children: the folder where running children are noted.
            estimate: about how many bytes a command's process takes, if known.
            secret_variables: what no child may see, besides our own variables.
            instance: this process's name in ``Via``.
            on_change: told which model's state has changed, soon after.
        """
        self.logs = Logs()
        self._env = env
        self._secret_variables = frozenset(secret_variables)
        self._estimate = estimate
        self._instance = instance
        self._plan = Plan({})
        self._backends: dict[str, Managed] = {}
        self._children: dict[str, Child] = {}  # from start to the end of ``stop``
        self._ports: dict[str, int] = {}  # of children
        self._orphans = OrphanBook(children)
        self._followers: list[Callable[[str], None]] = [on_change] if on_change else []
        self._closing: set[asyncio.Task[None]] = set()  # pools of ended children
        self.scheduler = Scheduler(
            {},
            None,
            budget=None,
            estimate=self._estimated,
            worker=self,
            queue=queue,
            on_change=self._changed,
        )

    # Its life.

    async def open(self) -> None:
        """End what a gateway before us has left behind."""
        for model in await self._orphans.reap():
            log.warning('ended the server of model "%s" that was left behind', model)

    async def aclose(self) -> None:
        """Stop all models, and return when nothing is left of them."""
        await self.scheduler.aclose()
        for backend in self._backends.values():
            await backend.aclose()
        if self._closing:
            await asyncio.wait(tuple(self._closing))
        await self._orphans.aclose()

    def take(
        self,
        plan: Plan,
        *,
        queue: QueueConfig | None = None,
        secret_variables: Iterable[str] | None = None,
    ) -> tuple[Managed, ...]:
        """Have these models from now on.

        What runs and is not run differently now stays loaded.

        Returns:
            A backend for each model; the same as before where nothing has changed.
        """
        if secret_variables is not None:
            self._secret_variables = frozenset(secret_variables)
        gone = self._plan.models.keys() - plan.models.keys()
        self._plan = plan
        backends = {}
        for name, definition in plan.models.items():
            here = self._backends.get(name)
            if here is None or here.definition != definition:
                carrier = None if here is None else here.model_carrier
                here = Managed(
                    definition, self, carrier=carrier, instance=self._instance
                )
            backends[name] = here
        self._backends = backends
        self.scheduler.replace(plan.models, plan.rules, budget=plan.budget, queue=queue)
        for name in gone - self._children.keys():
            self.logs.forget(name)
        return tuple(backends.values())

    def follow(self, told: Callable[[str], None]) -> Callable[[], None]:
        """Have ``told`` called with each model whose state changes.

        Returns:
            What ends it.
        """
        self._followers.append(told)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._followers.remove(told)

        return end

    # What is known.

    @property
    def plan(self) -> Plan:
        """What ``take`` was given last."""
        return self._plan

    @property
    def backends(self) -> Mapping[str, Managed]:
        """By model."""
        return self._backends

    def states(self) -> list[ModelState]:
        """All models as they are now."""
        return self.scheduler.states()

    def state(self, model: str) -> ModelState:
        """One model as it is now.

        Raises:
            ModelNotFound: there is no such model.
        """
        return self.scheduler.state(model)

    def is_ready(self, model: str) -> bool:
        """Whether it is in memory and serves."""
        return self._word(model) is State.READY

    def is_starting(self, model: str) -> bool:
        """Whether it is being loaded."""
        return self._word(model) is State.LOADING

    def in_flight(self, model: str) -> int:
        """How many requests it works on."""
        return self.state(model).in_flight if model in self._plan.models else 0

    def progress(self, model: str) -> float | None:
        """How much of it is loaded, 0 to 1; None if that is not told."""
        child = self._children.get(model)
        return None if child is None else child.progress

    def child(self, model: str) -> Child | None:
        """Its process, while there is one."""
        return self._children.get(model)

    def _word(self, model: str) -> State:
        if model not in self._plan.models:
            return State.STOPPED
        return self.state(model).state

    # What requests need; see ``backends.managed.Host``.

    def why_it_died(self, model: str) -> str:
        """How its process has ended, or why it is being ended; "" while it lives."""
        child = self._children.get(model)
        exit = child.exit if child is not None else None
        if exit is None:
            return "was unloaded" if self._word(model) is State.STOPPING else ""
        if exit.was_asked:
            return "was unloaded"
        quoted = f': "{exit.last_line}"' if exit.last_line else ""
        return f"{exit}{quoted}"

    def try_lease(self, model: str) -> Lease | None:
        """A lease of a model that runs and has a free place."""
        return self.scheduler.try_lease(model)

    async def lease(
        self,
        model: str,
        *,
        key: str,
        priority: int,
        tell: Callable[[Callable[[], str]], None],
    ) -> Lease:
        """Wait for the model's turn and its load.

        Raises:
            ApiError: it cannot be had; see ``scheduler.LeaseRequest.wait``.
        """
        request = self.scheduler.lease(model, key=key, priority=priority)
        tell(lambda: self._words(model, request.status))
        return await request.wait()

    def _words(self, model: str, status: str) -> str:
        progress = self.progress(model)
        if progress is not None and self.is_starting(model):
            return f"{status}, {progress:.0%}"
        return status or _WAITING_WORDS

    # What the scheduler has done; see ``scheduler.Worker``.

    async def start(self, model: str) -> None:
        """Start its process, and return when it serves.

        Raises:
            CannotLoad: it does not.
        """
        definition = self._plan.models.get(model)
        if definition is None:
            raise CannotLoad(f'model "{model}" is gone')
        try:
            child = await self._started(definition)
        except LoadFailed as error:
            self._forget(model)
            raise CannotLoad(str(error)) from error
        backend = self._backends.get(model)
        if backend is not None:
            backend.model_carrier.upstream = self._pool(child)

    async def stop(self, model: str, *, grace: float | None) -> None:
        """End its process, and return when nothing is left of it."""
        child = self._children.get(model)
        self._close_pool(model)
        if child is None:
            return
        if grace is None:
            grace = child.definition.unload_timeout
        was_running = child.exit is None
        await child.stop(grace)
        self._forget(model)
        if was_running:
            log.info('model "%s" is unloaded', model)

    def memory(self, model: str) -> int | None:
        """Bytes that its process really uses."""
        child = self._children.get(model)
        return None if child is None else child.memory()

    async def _started(self, definition: ModelDefinition) -> Child:
        """A child that serves, at its own port or another one."""
        tried: set[int] = set()
        while True:
            port = self._free_port(definition, tried)
            child = self._made(definition, port)
            try:
                await child.start()
            except PortTaken as taken:
                tried.add(taken.port)
                if not definition.needs_port or len(tried) > _MAX_PORTS:
                    raise
                log.info('model "%s": %s; trying another', definition.id, taken)
            else:
                return child

    def _free_port(self, definition: ModelDefinition, tried: set[int]) -> int | None:
        if not definition.needs_port:
            return definition.port
        used = tried | {
            port for name, port in self._ports.items() if name != definition.id
        }
        if definition.port is not None and definition.port not in used:
            return definition.port
        reserved = {m.port for m in self._plan.models.values()}
        port = self._plan.start_port
        while port in used or port in reserved:
            port += 1
        return port

    def _made(self, definition: ModelDefinition, port: int | None) -> Child:
        child = Child(
            definition.at_port(port),
            env=self.environment(),
            probe=_probe,
            log=self.logs.model(definition.id),
            orphans=self._orphans,
            on_exit=self._exited,
        )
        self._children[definition.id] = child
        if port is not None:
            self._ports[definition.id] = port
        return child

    def environment(self) -> dict[str, str]:
        """The variables that whatever we start gets: ours, less what is secret."""
        return {
            name: value
            for name, value in self._env.items()
            if not name.startswith(_OWN_VARIABLES)
            and name not in self._secret_variables
        }

    def _exited(self, child: Child, exit: Exit) -> None:
        model = child.definition.id
        if self._children.get(model) is not child or exit.was_asked:
            return
        if child.ready_at is None:
            return  # ``start`` says so itself, or tries another port
        quoted = f': "{exit.last_line}"' if exit.last_line else ""
        program = Path(child.definition.command[0]).name
        self._close_pool(model)
        self.scheduler.exited(model, f"{program} {exit}{quoted}")

    def _forget(self, model: str) -> None:
        self._children.pop(model, None)
        self._ports.pop(model, None)

    def _pool(self, child: Child) -> Upstream:
        definition = child.definition
        return Upstream(
            Origin.from_url(definition.proxy),
            connect_timeout=definition.timeouts.connect or 30.0,
        )

    def _close_pool(self, model: str) -> None:
        backend = self._backends.get(model)
        if backend is None:
            return
        upstream, backend.model_carrier.upstream = backend.model_carrier.upstream, None
        if upstream is not None:
            task = asyncio.get_running_loop().create_task(upstream.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _estimated(self, model: str) -> int | None:
        definition = self._plan.models.get(model)
        return None if definition is None else self._estimate(definition.command)

    def _changed(self, model: str) -> None:
        for told in tuple(self._followers):
            told(model)


async def _probe(url: str) -> Probe:
    """Ask a server once whether it is there."""
    parts = urlsplit(url)
    try:
        origin = Origin.from_url(f"{parts.scheme}://{parts.netloc}")
    except ValueError as error:
        return Probe(None, str(error))
    path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    pool = Upstream(origin, connect_timeout=5.0)
    try:
        answer = await pool.send("GET", path, (("Accept", "*/*"),), silence_seconds=60)
        with contextlib.suppress(UpstreamError):
            await answer.read(_MAX_PROBE_BYTES)
        return Probe(answer.status)
    except UpstreamError as error:
        return Probe(None, str(error))
    finally:
        await pool.aclose()
