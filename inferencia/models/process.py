"""One run of one model's server: a child process, from its start to its end.

=========  =========================================================================
stopped    before ``start``, and after an end that was asked for
starting   the process runs and does not answer yet
ready      it has answered 200 at its check endpoint, on a port that is its own
stopping   it was asked to end; SIGKILL follows after the grace
failed     it could not be started, was not ready in time, or ended unasked
=========  =========================================================================

A ``Child`` runs once: the next start of the model is a new one. It decides nothing;
when to start, stop and try again is the scheduler's business.

The process has a group of its own (``launching.py``), and everything that is done to it
is done to the whole group.

Readiness is asked for in short intervals that grow with the time it takes, and besides
whenever the server has printed something: engines say so when they are ready. A process
that ends is noticed by the event loop itself, not by asking.
"""

import asyncio
import contextlib
import enum
import logging
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from inferencia.models import groups
from inferencia.models.childlog import ChildLog
from inferencia.models.definitions import PID_MACRO, ModelDefinition
from inferencia.models.launching import CannotStart, Output, launch
from inferencia.models.orphans import OrphanBook

log = logging.getLogger(__name__)

# How long after an unanswered probe the next one is sent: a twentieth of the time that
# the server has taken so far, within these bounds. So asking adds 5 % at most to a long
# start and 20 ms to a short one. A probe of a port where nobody listens takes 0.1 ms.
_MIN_PAUSE_SECONDS = 0.02
_MAX_PAUSE_SECONDS = 0.1
# A server that binds its port, loads and only then answers keeps a probe waiting.
PROBE_SECONDS = 5.0
# ``checkEndpoint: none``: one that ends sooner was never up.
NO_CHECK_SECONDS = 0.1

# From SIGTERM to SIGKILL for a server that was not ready in time (llama-swap's).
LATE_GRACE_SECONDS = 5.0
# How long to wait for what was sent SIGKILL; only a driver that hangs takes longer.
KILL_SECONDS = 10.0
# How long to read on after the process has ended: a grandchild that has left the group
# can keep the pipe open for ever.
DRAIN_SECONDS = 2.0
_POLL_SECONDS = 0.02

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", "::"})


class State(enum.StrEnum):
    """Where a child stands; the words are those of ``/running``."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of asking a server once."""

    status: int | None  # None: there was no answer
    problem: str = ""  # why not; a part of a sentence


Prober = Callable[[str], Awaitable[Probe]]
"""Sends ``GET`` to a URL. Raises nothing; may take its time, it is cancelled then."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended."""

    status: int  # the exit code; below zero the number of the signal that ended it
    last_line: str  # that says best why; may be a server's ordinary last line
    was_asked: bool  # by ``stop`` or ``kill``

    def __str__(self) -> str:
        """What completes "llama-server ..."."""
        if self.status >= 0:
            return f"exited with code {self.status}"
        try:
            name = signal.Signals(-self.status).name
        except ValueError:
            name = f"signal {-self.status}"
        hint = "" if self.was_asked else _SIGNAL_HINTS.get(-self.status, "")
        return f"was ended by {name}{hint}"


_SIGNAL_HINTS: Mapping[int, str] = {
    signal.SIGKILL: " (if nobody did that, memory ran out)",
    signal.SIGILL: " (it was built for another processor)",
}


class LoadFailed(Exception):
    """The server did not get ready. ``str()`` is a sentence for the log and clients.

    It may quote a line that the server printed. ``exit`` is there if the process ended
    by itself.
    """

    def __init__(self, message: str, exit: Exit | None = None) -> None:
        super().__init__(message)
        self.exit = exit


class PortTaken(LoadFailed):
    """Another program listens where the server should; a free port would help."""

    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} is taken by another program")
        self.port = port


class LoadStopped(LoadFailed):
    """It was stopped while it was starting."""


class Child:
    """A process that serves one model."""

    def __init__(
        self,
        definition: ModelDefinition,
        *,
        env: Mapping[str, str],
        probe: Prober,
        log: ChildLog,
        orphans: OrphanBook,
        on_exit: "Callable[[Child, Exit], None] | None" = None,
        clock: Callable[[], float] = time.monotonic,
        cwd: Path | None = None,
    ) -> None:
        """Make one; nothing runs before ``start``.

        Args:
            definition: what to run, its port filled in (``at_port``).
            env: the process's environment, free of secrets; the definition's own
                variables are added.
            probe: asks its check endpoint.
            log: the model's; it goes on from the process before.
            orphans: is told of the process while it lives.
            on_exit: called once for each process that was started, in the same turn of
                the loop in which its end becomes known; ``state`` and ``exit`` are set.
            clock: for the times below.
            cwd: where the process starts; None: where we are.
        """
        self.definition = definition
        self.log = log
        self.state = State.STOPPED
        self.pid: int | None = None  # and the group's number; stays after the end
        self.exit: Exit | None = None  # set when the process has ended
        self.began_at: float | None = None  # on the clock, as is the next
        self.ready_at: float | None = None
        self._env = {**env, **dict(definition.env)}
        self._probe = probe
        self._orphans = orphans
        self._on_exit = on_exit
        self._clock = clock
        self._cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._output: Output | None = None
        self._ended = asyncio.Event()  # the process
        self._was_asked = False
        self._stopping: asyncio.Task[None] | None = None
        self._tidying: asyncio.TimerHandle | None = None  # after an end unasked for
        self._last_probe = Probe(None)

    @property
    def port(self) -> int | None:
        """Where the server listens on this machine; None if that is not known."""
        parts = urlsplit(self.definition.proxy)
        if parts.hostname not in _LOOPBACK:
            return None
        return parts.port or {"http": 80, "https": 443}.get(parts.scheme)

    @property
    def check_url(self) -> str:
        """What answers 200 once the server is ready; "" if it is not asked."""
        if self.definition.check_endpoint == "none":
            return ""
        base = self.definition.proxy.rstrip("/")
        return f"{base}/{self.definition.check_endpoint.lstrip('/')}"

    @property
    def progress(self) -> float | None:
        """How much is loaded, 0 to 1; None if the server does not tell."""
        return 1.0 if self.state is State.READY else self.log.progress

    def memory(self) -> int | None:
        """Bytes of system memory that the whole group has; None if unknown.

        Reads all of ``/proc``: some milliseconds.
        """
        return None if self.pid is None else groups.resident(self.pid)

    # --- start -------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and return when it is ready. Only once.

        Whoever cancels this kills the process.

        Raises:
            PortTaken: somebody else listens on its port.
            LoadStopped: ``stop`` or ``kill`` was called meanwhile.
            LoadFailed: it cannot be run, ended, or was not ready in time.
        """
        if self.state is not State.STOPPED or self._was_asked or self.began_at:
            raise RuntimeError("a child starts once")
        self.state = State.STARTING
        self.began_at = self._clock()
        try:
            await self._load()
        except LoadFailed as error:
            await self._give_up(error)
            raise
        except BaseException:
            self.kill()
            raise
        self.state = State.READY
        self.ready_at = self._clock()
        seconds = self.ready_at - self.began_at
        log.info('model "%s" is ready after %.1f s', self.definition.id, seconds)

    async def _load(self) -> None:
        if self.port is not None and await groups.is_taken(self.port):
            raise PortTaken(self.port)
        self._refuse_if_stopped()
        self._spawn()
        seconds = self.definition.health_check_timeout or None
        ready = asyncio.ensure_future(self._until_ready())
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait(
                (ready, ended), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()
            ended.cancel()
            await asyncio.wait((ready, ended))
        failure = None if ready.cancelled() else ready.exception()
        self._refuse_if_stopped()
        if self.exit is not None:
            raise await self._premature(self.exit)
        if failure is not None:
            raise failure
        if ready.cancelled():
            raise LoadFailed(self._lateness())

    def _refuse_if_stopped(self) -> None:
        if self._was_asked:
            raise LoadStopped(f"{self._program} was stopped while it was starting")

    async def _premature(self, exit: Exit) -> LoadFailed:
        # Nobody listened before the start: somebody was faster, and that is why.
        if exit.status and self.port is not None and await groups.is_taken(self.port):
            return PortTaken(self.port)
        quoted = f': "{exit.last_line}"' if exit.last_line else " and printed nothing"
        return LoadFailed(f"{self._program} {exit}{quoted}", exit)

    def _lateness(self) -> str:
        limit = self.definition.health_check_timeout
        said = self._last_probe.problem or "no answer"
        if self._last_probe.status is not None:
            said = f"status {self._last_probe.status}"
        return (
            f"{self._program} was not ready within {limit:g} s (last, "
            f"{self.definition.check_endpoint}: {said}); if it only needs longer, "
            "raise healthCheckTimeout"
        )

    async def _give_up(self, error: LoadFailed) -> None:
        """Leave nothing behind of a start that failed."""
        if isinstance(error, LoadStopped):
            if self._process is None:
                self.state = State.STOPPED
            return  # whoever stopped it sees to the rest
        log.warning('model "%s" failed to load: %s', self.definition.id, error)
        if self._process is not None:
            await self.stop(LATE_GRACE_SECONDS)
        self.state = State.FAILED

    async def _until_ready(self) -> None:
        if not self.check_url:
            await asyncio.sleep(NO_CHECK_SECONDS)
            return
        assert self._output is not None
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            self._output.has_news.clear()
            self._last_probe = await self._probe_once()
            if self._last_probe.status == 200:
                await self._check_port()
                return
            # Not more often than this, however much it prints.
            await asyncio.sleep(_MIN_PAUSE_SECONDS)
            pause = min(_MAX_PAUSE_SECONDS, (loop.time() - began) / 20)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause - _MIN_PAUSE_SECONDS):
                    await self._output.has_news.wait()

    async def _probe_once(self) -> Probe:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                return await self._probe(self.check_url)
        except TimeoutError:
            return Probe(None, f"no answer within {PROBE_SECONDS:g} s")

    async def _check_port(self) -> None:
        """Take no foreign server for the child.

        Raises:
            PortTaken: it was another that answered.
        """
        if self.port is None or self.definition.stop_command:
            return  # cmdStop: what is to be stopped is not this process
        assert self.pid is not None
        if await asyncio.to_thread(groups.owns_port, self.pid, self.port) is False:
            raise PortTaken(self.port)

    # --- the process -------------------------------------------------------------

    @property
    def _program(self) -> str:
        return os.path.basename("".join(self.definition.command[:1]))

    def _spawn(self) -> None:
        """Start the process.

        In the loop's own thread: the system copies nothing (vfork), it takes 0.2 ms,
        and a start that is cancelled cannot leave a process behind.

        Raises:
            LoadFailed: it cannot be run.
        """
        self.log.begin()
        try:
            launched = launch(self.definition.command, self._env, self._cwd, self.log)
        except CannotStart as error:
            raise LoadFailed(str(error)) from error
        self._process, self._output = launched
        self.pid = self._process.pid
        groups.watch_exit(self._process, self._on_end)
        self._orphans.note(self.pid, self.definition.id)
        self.log.add(f"[inferencia] {self._program} started, process {self.pid}")
        log.info('starting model "%s", process %d', self.definition.id, self.pid)

    def _on_end(self) -> None:
        """The process has ended; it is not reaped yet (on Linux)."""
        assert self._process is not None and self._output is not None
        if self._stopping is None:
            # Nobody waits for those whom it has started, and its number still belongs
            # to it, so that this can hit nobody else.
            self._signal(signal.SIGKILL)
        status = self._process.wait()
        self._output.drain()
        self.exit = Exit(status, self.log.last_error_line, self._was_asked)
        is_failure = not self._was_asked
        self.state = State.FAILED if is_failure else State.STOPPED
        self.log.end()
        self.log.add(f"[inferencia] {self._program} {self.exit}")
        self._ended.set()
        if self._stopping is None:
            self._orphans.forget(self._process.pid)
            loop = asyncio.get_running_loop()
            self._tidying = loop.call_later(DRAIN_SECONDS, self._tidy)
        if is_failure and self.ready_at is not None:
            # Without its last line: an engine in verbose mode prints prompts.
            log.warning('the server of model "%s" %s', self.definition.id, self.exit)
        if self._on_exit is not None:
            self._on_exit(self, self.exit)

    # --- stop --------------------------------------------------------------------

    async def stop(self, grace: float) -> None:
        """End the process group and return when it is gone. Idempotent.

        First the definition's ``stop_command``, if it has one, else SIGTERM; SIGKILL
        when the grace is over. Cancelling this does not stop the stopping; who calls it
        while it is under way waits for the same end.

        Args:
            grace: seconds; 0: SIGKILL at once, also for one that is being stopped.
        """
        if self._process is None:
            self._was_asked = True
            self.state = State.STOPPED
            return
        if self._stopping is None:
            if self.exit is None:
                self.state = State.STOPPING
                self._was_asked = True
            self._stopping = asyncio.create_task(self._stop(grace))
        elif grace <= 0:
            self._signal(signal.SIGKILL)
        await asyncio.shield(self._stopping)

    def kill(self) -> None:
        """Send SIGKILL to the whole group and wait for nothing. Idempotent."""
        self._was_asked = self._was_asked or self.exit is None
        if self._process is None:
            self.state = State.STOPPED
        elif self.exit is None:
            self.state = State.STOPPING
            self._signal(signal.SIGKILL)

    async def _stop(self, grace: float) -> None:
        assert self._process is not None
        deadline = asyncio.get_running_loop().time() + grace
        if self.exit is None:
            await self._ask(deadline)
            await self._has_ended(deadline)
        # What it has started gets the rest of the grace.
        if not await self._is_gone(deadline):
            self._signal(signal.SIGKILL)
            deadline = asyncio.get_running_loop().time() + KILL_SECONDS
            await self._has_ended(deadline)
            if not await self._is_gone(deadline):
                log.error(
                    'the server of model "%s" (process %d) cannot be killed',
                    self.definition.id,
                    self.pid,
                )
        if self.exit is not None:
            self._orphans.forget(self._process.pid)
        self._tidy()

    async def _ask(self, deadline: float) -> None:
        """Ask the process politely to end."""
        if command := self.definition.stop_command:
            filled = tuple(part.replace(PID_MACRO, str(self.pid)) for part in command)
            if await self._run_stop_command(filled, deadline):
                return
        self._signal(signal.SIGTERM)

    async def _run_stop_command(
        self, command: tuple[str, ...], deadline: float
    ) -> bool:
        """Run ``cmdStop`` until it ends or the time is over; whether not to help."""
        try:
            process, output = launch(command, self._env, self._cwd, self.log)
        except CannotStart as error:
            log.warning('cmdStop of model "%s": %s', self.definition.id, error)
            return False
        ended = asyncio.Event()
        groups.watch_exit(process, ended.set)
        in_time = await _within(ended, deadline)
        if not in_time:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await ended.wait()
        status = process.wait()
        output.drain()
        output.close()
        if status:
            said = f"exited with code {status}" if in_time else "did not end in time"
            log.warning('cmdStop of model "%s" %s', self.definition.id, said)
        return status == 0 or not in_time

    async def _has_ended(self, deadline: float) -> bool:
        return await _within(self._ended, deadline)

    async def _is_gone(self, deadline: float) -> bool:
        """Wait for everybody in the group; whether they are gone."""
        assert self.pid is not None
        loop = asyncio.get_running_loop()
        while self.exit is None or groups.lives(self.pid):
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def _tidy(self) -> None:
        """Let go of what is left when nobody of the group is."""
        assert self._process is not None and self._output is not None
        if self._tidying is not None:
            self._tidying.cancel()
        if self.exit is not None:
            groups.reap_adopted(self._process.pid)
        self._output.drain()
        self._output.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self.pid is not None
        # PermissionError: all of them belong to others (sudo), or, on macOS, are dead.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def _within(event: asyncio.Event, deadline: float) -> bool:
    """Wait for an event until a time on the loop's clock; whether it came."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            await event.wait()
    return event.is_set()
