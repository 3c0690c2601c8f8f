"""Commands that the owner has given a name (``admin.tasks``), started on demand.

A task is one command or several, one after the other until one fails. Each runs without
a shell, in a process group of its own, with the environment that models get: nothing
secret. What it prints is kept within bounds and can be followed. How it ended is kept
over restarts of the gateway (``taskrecord``).

========== ===========================================================================
idle       it was never started
running    a command runs; another start is refused
done       the last command ended with 0
failed     a command ended otherwise, or could not be started, or the gateway was killed
cancelled  somebody has ended it, with all that it had started
========== ===========================================================================

All, that is its process group and, on Linux, what descends from it in other groups and
sessions. A daemon that has let its parent end is nobody's any more, and goes on.
"""

import asyncio
import contextlib
import dataclasses
import enum
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferencia import folders, taskrecord
from inferencia.models import groups
from inferencia.models.childlog import ChildLog, Follower
from inferencia.models.launching import CannotStart, Output, launch
from inferencia.secret import starred

log = logging.getLogger(__name__)

# From SIGTERM to SIGKILL, for whoever was cancelled; and how often is looked.
GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.02

Commands = tuple[str, ...]


class UnknownTask(Exception):
    """There is no task of this name."""


class IsRunning(Exception):
    """The task runs already."""


class NotRunning(Exception):
    """The task does not run."""


class State(enum.StrEnum):
    """What a task is doing; see the module's text."""

    IDLE = "idle"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TaskState:
    """A task at one moment."""

    name: str
    commands: Commands  # as they are written
    state: State
    exit_status: int | None = None  # of the last command; negative: a signal's number
    step: int = 0  # the number of the command that runs, or ran last
    began: float | None = None  # seconds since 1970
    ended: float | None = None
    error: str | None = None  # why a command could not be started


@dataclass(slots=True, eq=False)
class _Run:
    """One run of a task."""

    commands: Commands
    began: float
    log: ChildLog = field(default_factory=ChildLog)
    state: State = State.RUNNING
    exit_status: int | None = None
    step: int = 1
    ended: float | None = None
    error: str | None = None
    is_cancelled: bool = False
    process: "subprocess.Popen[bytes] | None" = None  # while a command runs
    task: "asyncio.Task[None] | None" = None

    @property
    def is_over(self) -> bool:
        return self.state is not State.RUNNING

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> "_Run":
        """A run of an earlier gateway.

        Raises:
            KeyError, TypeError, ValueError: nobody can make sense of it.
        """
        run = cls(tuple(map(str, entry["commands"])), float(entry["began"]))
        run.state = State(entry["state"])
        run.step = int(entry["step"])
        run.exit_status, run.ended = entry["exit_status"], entry["ended"]
        run.error = entry["error"]
        if not run.is_over:
            run.state, run.error = State.FAILED, "the gateway ended before it"
        run.log.add(
            "[inferencia] it ran before the gateway was started; its output is gone"
        )
        return run


class Tasks:
    """All tasks."""

    def __init__(
        self,
        commands: Mapping[str, Commands],
        *,
        env: Mapping[str, str],
        environment: Callable[[], Mapping[str, str]],
        record: Path | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Make them; nothing is started.

        Args:
            commands: by name.
            env: our own environment, which says where home is.
            environment: what a command gets.
            record: where it is written down how they ended; None: nowhere.
            wall_clock: seconds since 1970.
        """
        self._commands = dict(commands)
        self._env = env
        self._environment = environment
        self._record = record
        self._writing = asyncio.Lock()
        self._wall_clock = wall_clock
        self._runs: dict[str, _Run] = {}
        if record is not None:
            for name, entry in taskrecord.read(record).items():
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    self._runs[name] = _Run.of_record(entry)
            self.change(commands)

    def change(self, commands: Mapping[str, Commands]) -> None:
        """Have these tasks from now on; what runs goes on as it was started."""
        self._commands = dict(commands)
        for name in self._runs.keys() - commands.keys():
            if self._runs[name].is_over:
                del self._runs[name]

    def states(self) -> list[TaskState]:
        """All tasks, in the order of the configuration, then those that still run."""
        gone = [name for name in self._runs if name not in self._commands]
        return [self.state(name) for name in (*self._commands, *gone)]

    def state(self, name: str) -> TaskState:
        """One task.

        Raises:
            UnknownTask: there is none of this name.
        """
        run = self._runs.get(name)
        if run is None:
            return TaskState(name, self._known(name), State.IDLE)
        return TaskState(
            name,
            run.commands,
            run.state,
            run.exit_status,
            run.step,
            run.began,
            run.ended,
            run.error,
        )

    def start(self, name: str) -> TaskState:
        """Start a task.

        Raises:
            UnknownTask: there is none of this name.
            IsRunning: it runs already.
        """
        commands = self._known(name)
        before = self._runs.get(name)
        if before is not None and not before.is_over:
            raise IsRunning(name)
        run = self._runs[name] = _Run(commands, self._wall_clock())
        run.task = asyncio.get_running_loop().create_task(self._work(name, run))
        log.info('task "%s" was started', name)
        return self.state(name)

    async def _write_down(self) -> None:
        """Keep the last state of each; a task may end us, so also of those that run."""
        if self._record is None:
            return
        async with self._writing:
            entries = {
                name: dataclasses.asdict(self.state(name)) for name in self._runs
            }
            await asyncio.to_thread(taskrecord.write, self._record, entries)

    async def cancel(self, name: str) -> TaskState:
        """End a task with all that it has started, and return when that is gone.

        Raises:
            UnknownTask: there is none of this name.
            NotRunning: it does not run.
        """
        self.state(name)
        run = self._runs.get(name)
        if run is None or run.is_over:
            raise NotRunning(name)
        run.is_cancelled = True
        process, task = run.process, run.task
        if process is not None:
            await _end(process.pid)
        if task is not None:
            await asyncio.wait((task,))
        return self.state(name)

    async def follow(self, name: str, follower: Follower) -> AsyncIterator[str]:
        """What the task prints, from the first line that is kept until it ends.

        Args:
            name: of the task.
            follower: of ``log_of``; closed by whoever made it.
        """
        run = self._runs.get(name)
        if run is None:
            return
        async for text in follower:
            yield text
            # Its last line comes when it is over, so nothing can be missed.
            if run.is_over:
                return

    def log_of(self, name: str) -> ChildLog:
        """The log of the last run; an empty one if there was none.

        Raises:
            UnknownTask: there is none of this name.
        """
        self.state(name)
        run = self._runs.get(name)
        return ChildLog() if run is None else run.log

    async def aclose(self) -> None:
        """End all that runs."""
        running = [name for name, run in self._runs.items() if not run.is_over]
        for name in running:
            log.warning('task "%s" is ended with the gateway', name)
        with contextlib.suppress(NotRunning):
            await asyncio.gather(*map(self.cancel, running))
        # What has ended may be about to be written down.
        if tasks := [run.task for run in self._runs.values() if run.task is not None]:
            await asyncio.wait(tasks)

    def _known(self, name: str) -> Commands:
        if name in self._commands:
            return self._commands[name]
        run = self._runs.get(name)
        if run is None:
            raise UnknownTask(name)
        return run.commands

    async def _work(self, name: str, run: _Run) -> None:
        """Run one command after the other."""
        await self._write_down()
        for step, command in enumerate(run.commands, start=1):
            run.step = step
            run.log.add(f"[inferencia] $ {starred(command)}")
            try:
                run.exit_status = await self._command(command, run)
            except (CannotStart, ValueError, OSError) as error:
                run.error, run.exit_status = str(error), None
            if run.exit_status != 0 or run.is_cancelled:
                break
        self._over(name, run)
        await self._write_down()

    async def _command(self, command: str, run: _Run) -> int:
        """Run one command to its end.

        Raises:
            CannotStart: it cannot be started.
            ValueError: its quotation marks do not match.
            OSError: it begins with ``~``, and nobody knows where that is.
        """
        argv = arguments(command, self._env)
        run.log.begin()
        run.process, output = launch(argv, self._environment(), None, run.log)
        ended = asyncio.Event()
        groups.watch_exit(run.process, ended.set)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            _signal(run.process.pid, signal.SIGKILL)
            raise
        finally:
            _finish(run, output)
        status: int = run.process.wait()
        run.process = None
        return status

    def _over(self, name: str, run: _Run) -> None:
        run.ended = self._wall_clock()
        if run.is_cancelled:
            run.state = State.CANCELLED
        elif run.exit_status == 0:
            run.state = State.DONE
        else:
            run.state = State.FAILED
        how = run.error or _ended_how(run.exit_status)
        log.info('task "%s" %s (%s)', name, run.state, how)
        run.log.add(f"[inferencia] {run.state}: {how}")


def arguments(command: str, env: Mapping[str, str]) -> list[str]:
    """A command's words, as a shell would split them; ``~`` in front is home.

    Raises:
        ValueError: its quotation marks do not match.
        OSError: nobody knows where home is.
    """
    return [str(folders.expand(word, env)) for word in shlex.split(command)]


def _finish(run: _Run, output: Output) -> None:
    output.drain()
    output.close()
    run.log.end()


def _ended_how(status: int | None) -> str:
    if status is None:
        return "it was not started"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"


async def _end(group: int) -> None:
    """End a process group and those that its descendants have made.

    Politely first; return when nobody is left.
    """
    loop = asyncio.get_running_loop()
    ours = frozenset({group})
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Before each signal: by what it ends, others lose their descent.
        ours = ours.union(*map(groups.with_departed, ours))
        for one in ours:
            _signal(one, number)
        deadline = loop.time() + GRACE_SECONDS
        while loop.time() < deadline:
            # A number that is free may be somebody else's next.
            ours = frozenset(filter(groups.lives, ours))
            if not ours:
                return
            await asyncio.sleep(_POLL_SECONDS)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
