"""Promises of ``models/process.py``, kept by real processes (``fakeserver.py``)."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fakeserver import COMMAND
from inferencia.models import groups
from inferencia.models.childlog import ChildLog
from inferencia.models.definitions import ModelDefinition
from inferencia.models.orphans import OrphanBook
from inferencia.models.process import (
    Child,
    Exit,
    LoadFailed,
    LoadStopped,
    PortTaken,
    Probe,
    State,
)

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="only /proc tells"
)
GRACE = 10.0  # never waited for, unless the promise is that it is
NEVER = "/nonexistent/file"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as trial:
        return int(trial.getsockname()[1])


async def get(url: str) -> tuple[int, dict[str, Any]]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(f"GET {parts.path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int(head.split()[1]), json.loads(body)


async def probe(url: str) -> Probe:
    try:
        return Probe((await get(url))[0])
    except (OSError, IndexError) as error:
        return Probe(None, type(error).__name__)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does; nobody tells us of it."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    found = groups.stat(pid)
    return found is None or found.is_alive


class Scene:
    """Children with all that they need, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.book = OrphanBook(folder / "children")
        self.log = ChildLog()
        self.exits: list[tuple[Child, Exit]] = []
        self.children: list[Child] = []
        self.signs = folder / "signs"
        self.pid_file = folder / "pids"

    def child(self, *options: str, **changes: Any) -> Child:
        """A child that runs the fake server with these options."""
        changes.setdefault("command", (*COMMAND, "--port", "${PORT}", *options))
        changes.setdefault("proxy", "http://127.0.0.1:${PORT}")
        definition = ModelDefinition("fake", **changes)
        child = Child(
            definition.at_port(free_port()),
            env={"PATH": os.environ["PATH"], "GIVEN": "yes"},
            probe=probe,
            log=self.log,
            orphans=self.book,
            on_exit=lambda child, exit: self.exits.append((child, exit)),
        )
        self.children.append(child)
        return child

    async def started(self, *options: str, **changes: Any) -> Child:
        child = self.child(*options, **changes)
        async with asyncio.timeout(10):
            await child.start()
        return child

    async def begun(self, child: Child) -> "asyncio.Task[None]":
        """Start it in a task, and wait until it runs and prints."""
        starting = asyncio.create_task(child.start())
        await until(lambda: "loading model" in self.log.history())
        return starting

    async def failure(self, child: Child) -> LoadFailed:
        with pytest.raises(LoadFailed) as caught:
            async with asyncio.timeout(10):
                await child.start()
        return caught.value

    def pid(self, what: str) -> int:
        """Of the process that the fake server has started."""
        lines = self.pid_file.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what))

    def sign(self) -> None:
        self.signs.touch()


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    for child in scene.children:
        await child.stop(0)
    await scene.book.aclose()
    for line in scene.pid_file.read_text().split() if scene.pid_file.exists() else ():
        if line.isdecimal():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)


def nothing_is_left_of(child: Child, scene: Scene) -> None:
    assert child.pid is not None
    assert not groups.lives(child.pid)
    with pytest.raises(ChildProcessError):  # it is no zombie
        os.waitpid(child.pid, os.WNOHANG)
    assert not list(scene.book._folder.glob("*")) and not scene.book._guards
    assert [one for one, _ in scene.exits].count(child) == 1


# --- a good life ------------------------------------------------------------------


async def test_a_child_starts_serves_and_stops(scene: Scene) -> None:
    child = scene.child()
    assert child.state.value == "stopped"
    await child.start()
    assert child.state.value == "ready" and child.progress == 1.0
    assert (await get(f"{child.definition.proxy}/v1/models"))[1]["fake"]["pid"] == (
        child.pid
    )
    assert child.began_at is not None and child.ready_at is not None
    assert child.began_at < child.ready_at
    assert "model loaded: fake" in scene.log.history()

    await child.stop(GRACE)
    assert child.state is State.STOPPED
    assert child.exit == Exit(-signal.SIGTERM, child.log.last_line, was_asked=True)
    assert scene.exits == [(child, child.exit)]
    assert child.port is not None and not await groups.is_taken(child.port)
    nothing_is_left_of(child, scene)


async def test_a_child_is_not_ready_before_its_check_answers_200(scene: Scene) -> None:
    child = scene.child("--load-until", str(scene.signs))
    starting = await scene.begun(child)
    await until(lambda: child._last_probe.status == 503)
    assert child.state.value == "starting" and not starting.done()
    scene.sign()
    await starting
    assert child.state.value == "ready"


async def test_a_server_may_open_its_port_late(scene: Scene) -> None:
    child = scene.child("--listen-late", "--load-until", str(scene.signs))
    starting = await scene.begun(child)
    await until(lambda: child._last_probe.problem == "ConnectionRefusedError")
    scene.sign()
    await starting


async def test_a_slow_answer_is_waited_for(scene: Scene) -> None:
    await scene.started("--answer-late", "0.1")


async def test_without_a_check_a_child_is_ready_when_it_runs(scene: Scene) -> None:
    child = await scene.started("--load-until", NEVER, check_endpoint="none")
    assert child.state is State.READY and child.check_url == ""


async def test_without_a_check_a_child_that_ends_at_once_has_failed(
    scene: Scene,
) -> None:
    failure = await scene.failure(
        scene.child(command=("false",), check_endpoint="none")
    )
    assert str(failure) == "false exited with code 1 and printed nothing"


@pytest.mark.parametrize(
    ("proxy", "endpoint", "url"),
    [
        ("http://localhost:1", "/health", "http://localhost:1/health"),
        ("http://localhost:1/v1/", "health", "http://localhost:1/v1/health"),
        ("http://localhost:1", "/", "http://localhost:1/"),
    ],
)
async def test_the_check_is_below_the_proxys_path(
    scene: Scene, proxy: str, endpoint: str, url: str
) -> None:
    assert scene.child(proxy=proxy, check_endpoint=endpoint).check_url == url


async def test_a_child_gets_the_environment_it_was_given_and_no_other(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    child = await scene.started(env=(("MINE", "${PORT}"), ("GIVEN", "over")))
    told = (await get(f"{child.definition.proxy}/fake/process"))[1]
    assert set(told["env"]) - {"LC_CTYPE"} == {"PATH", "GIVEN", "MINE"}
    assert (told["env"]["GIVEN"], told["env"]["MINE"]) == ("over", str(child.port))
    assert told["cwd"] == os.getcwd()


@needs_proc
async def test_a_child_has_no_file_of_ours_and_no_input(
    scene: Scene, tmp_path: Path
) -> None:
    with (tmp_path / "ours").open("wb") as ours:
        os.set_inheritable(ours.fileno(), True)
        child = await scene.started()
        names = os.listdir(f"/proc/{child.pid}/fd")
        files = {n: os.readlink(f"/proc/{child.pid}/fd/{n}") for n in names}
    assert files["0"] == "/dev/null"
    assert files["1"] == files["2"] and files["1"].startswith("pipe:")
    assert not any("ours" in file for file in files.values())


@needs_proc
async def test_memory_is_that_of_the_whole_group(scene: Scene) -> None:
    options = ("--memory", "40", "--grandchild-holds-pipe")
    child = await scene.started(*options, "--pid-file", str(scene.pid_file))
    assert child.pid is not None
    assert groups.family(child.pid) == frozenset((child.pid, scene.pid("grandchild")))
    memory = child.memory()
    assert memory is not None and 40 << 20 < memory < 120 << 20


async def test_a_child_starts_only_once(scene: Scene) -> None:
    child = await scene.started()
    await child.stop(GRACE)
    with pytest.raises(RuntimeError):
        await child.start()


async def test_output_without_end_stops_neither_the_child_nor_us(scene: Scene) -> None:
    child = await scene.started("--flood")
    began = len(scene.log.history())
    status, _ = await get(child.check_url)
    assert status == 200 and began < 200_000


# --- it cannot be started ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "mode", "reason"),
    [
        ("nowhere", None, 0, "there is no such file"),
        ("plain", "#!/bin/sh\n", 0o644, "it is not executable; chmod +x may help"),
        ("folder", "", -1, "that is a folder"),
        ("noshebang", "echo hello\n", 0o755, "it is no program for this machine"),
        ("noshell", "#!/no/sh\n", 0o755, "not the interpreter or loader it names"),
    ],
)
async def test_what_keeps_a_program_from_starting_is_said(
    scene: Scene, name: str, content: str | None, mode: int, reason: str
) -> None:
    file = scene.folder / name
    if mode == -1:
        file.mkdir()
    elif content is not None:
        file.write_text(content)
        file.chmod(mode)
    child = scene.child(command=(str(file), "--port", "1"))
    message = str(await scene.failure(child))
    assert message.startswith(f'cannot start "{file}": ') and reason in message
    assert (child.state, child.pid, scene.exits) == (State.FAILED, None, [])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("no-such-program",),
            "no such program on the PATH; install it, or give its full path",
        ),
        (("sh", "a\0b"), "its command or env is malformed"),
        ((), "there is no command; set cmd"),
    ],
)
async def test_a_command_that_is_none_is_said_to_be(
    scene: Scene, command: tuple[str, ...], message: str
) -> None:
    assert message in str(await scene.failure(scene.child(command=command)))


# --- it fails to load -------------------------------------------------------------


async def test_a_child_that_ends_early_fails_with_its_last_words(scene: Scene) -> None:
    child = scene.child("--crash-on-start", "error loading model: bad magic")
    failure = await scene.failure(child)
    assert str(failure).endswith('exited with code 1: "error loading model: bad magic"')
    assert failure.exit is not None and failure.exit.status == 1
    assert child.state is State.FAILED and not failure.exit.was_asked
    assert child.exit is failure.exit
    nothing_is_left_of(child, scene)


async def test_a_crash_is_told_at_once_and_not_at_the_next_probe(scene: Scene) -> None:
    child = scene.child("--answer-late", "60", "--crash-when", str(scene.signs))
    starting = await scene.begun(child)
    scene.sign()
    with pytest.raises(LoadFailed, match="exited with code 3"):
        async with asyncio.timeout(4):  # a probe may take five seconds
            await starting


async def test_a_child_that_a_signal_ended_says_which(scene: Scene) -> None:
    child = scene.child("--load-until", NEVER)
    starting = await scene.begun(child)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(LoadFailed, match=r"was ended by SIGKILL \(if nobody"):
        await starting


async def test_a_child_that_is_late_is_ended(scene: Scene) -> None:
    child = scene.child("--load-until", NEVER, health_check_timeout=0.2)
    message = str(await scene.failure(child))
    assert "was not ready within 0.2 s (last, /health: status 503)" in message
    assert "healthCheckTimeout" in message
    assert child.state is State.FAILED
    nothing_is_left_of(child, scene)


async def test_whoever_cancels_a_start_ends_the_child(scene: Scene) -> None:
    child = scene.child("--load-until", NEVER, "--ignore-term")
    starting = await scene.begun(child)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await until(lambda: child.exit is not None)
    assert child.exit is not None and child.exit.was_asked
    await child.stop(GRACE)
    nothing_is_left_of(child, scene)


# --- the port ---------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0"])
async def test_a_port_that_is_taken_keeps_a_child_from_starting(
    scene: Scene, host: str
) -> None:
    child = scene.child()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, child.port), family=family):
        failure = await scene.failure(child)
    assert isinstance(failure, PortTaken) and failure.port == child.port
    assert str(child.port) in str(failure) and child.pid is None


async def test_a_port_that_is_taken_during_the_start_is_named(scene: Scene) -> None:
    child = scene.child("--listen-late", "--load-until", str(scene.signs))
    starting = await scene.begun(child)
    with socket.create_server(("127.0.0.1", child.port)):
        scene.sign()
        with pytest.raises(PortTaken):
            await starting
    nothing_is_left_of(child, scene)


@needs_proc
async def test_a_foreign_server_is_not_taken_for_the_child(scene: Scene) -> None:
    child = scene.child("--steal-port", "--pid-file", str(scene.pid_file))
    failure = await scene.failure(child)
    assert isinstance(failure, PortTaken)
    assert child.state is State.FAILED and is_alive(scene.pid("thief"))
    nothing_is_left_of(child, scene)


@needs_proc
async def test_a_server_behind_docker_listens_for_the_child(scene: Scene) -> None:
    script = scene.folder / "docker"
    script.write_text('#!/bin/sh\n"$@"\n')
    script.chmod(0o755)
    options = ("--port", "${PORT}", "--steal-port", "--pid-file", str(scene.pid_file))
    child = await scene.started(command=(str(script), *COMMAND, *options))
    assert child.state is State.READY


async def test_only_ports_of_this_machine_are_looked_at(scene: Scene) -> None:
    assert scene.child(proxy="http://gpu.lan:9000").port is None
    assert scene.child(proxy="http://localhost").port == 80
    assert scene.child(proxy="http://[::1]:9000/v1").port == 9000


# --- its end ----------------------------------------------------------------------


async def test_a_crash_is_told_once_and_takes_the_group_along(scene: Scene) -> None:
    options = ("--grandchild-holds-pipe", "--pid-file", str(scene.pid_file))
    child = await scene.started(*options)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: bool(scene.exits))
    assert child.state is State.FAILED and child.exit is not None
    assert child.exit.status == -signal.SIGKILL and not child.exit.was_asked
    await until(lambda: not is_alive(scene.pid("grandchild")))
    await child.stop(GRACE)
    assert child.state is State.FAILED
    nothing_is_left_of(child, scene)


async def test_who_ignores_sigterm_is_killed_after_the_grace(scene: Scene) -> None:
    child = await scene.started("--ignore-term")
    stopping = asyncio.create_task(child.stop(0.1))
    await asyncio.sleep(0)
    assert child.state is State.STOPPING
    await stopping
    assert child.exit is not None and child.exit.status == -signal.SIGKILL
    assert child.exit.was_asked
    nothing_is_left_of(child, scene)


async def test_a_grandchild_has_the_rest_of_the_grace_and_is_killed(
    scene: Scene,
) -> None:
    options = ("--grandchild-holds-pipe", "--pid-file", str(scene.pid_file))
    child = await scene.started(*options)
    await child.stop(0.1)
    assert child.exit is not None and child.exit.status == -signal.SIGTERM
    assert not is_alive(scene.pid("grandchild"))
    nothing_is_left_of(child, scene)


async def test_who_left_the_group_and_holds_the_pipe_keeps_nobody_waiting(
    scene: Scene,
) -> None:
    options = ("--stray-holds-pipe", "--pid-file", str(scene.pid_file))
    child = await scene.started(*options)
    async with asyncio.timeout(5):
        await child.stop(GRACE)
    assert is_alive(scene.pid("stray"))
    nothing_is_left_of(child, scene)


async def test_stopping_is_done_once_however_often_it_is_asked_for(
    scene: Scene,
) -> None:
    child = await scene.started("--ignore-term")
    first, second = (asyncio.create_task(child.stop(30)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not second.done()
    await child.stop(0)  # now
    await second
    await child.stop(GRACE)
    nothing_is_left_of(child, scene)


async def test_a_child_can_be_stopped_while_it_loads(scene: Scene) -> None:
    child = scene.child("--load-until", NEVER)
    starting = await scene.begun(child)
    await child.stop(GRACE)
    with pytest.raises(LoadStopped):
        await starting
    assert child.state is State.STOPPED
    nothing_is_left_of(child, scene)


async def test_a_child_that_was_stopped_first_never_starts(scene: Scene) -> None:
    child = scene.child()
    starting = asyncio.create_task(child.start())
    await asyncio.sleep(0)  # it looks at the port
    await child.stop(GRACE)
    with pytest.raises(LoadStopped):
        await starting
    assert (child.state, child.pid) == (State.STOPPED, None)


async def test_killing_waits_for_nothing(scene: Scene) -> None:
    child = await scene.started("--ignore-term")
    child.kill()
    child.kill()
    assert child.state.value == "stopping"
    await until(lambda: child.exit is not None)
    assert child.exit is not None and child.exit.was_asked
    child.kill()
    assert child.state.value == "stopped"
    await scene.book.aclose()
    nothing_is_left_of(child, scene)


# --- cmdStop ----------------------------------------------------------------------


async def test_a_stop_command_is_run_with_the_childs_number(scene: Scene) -> None:
    script = f'echo "stopping $1 $GIVEN"; kill -TERM "$1"; touch {scene.signs}'
    command = ("sh", "-c", script, "sh", "${PID}")
    child = await scene.started(stop_command=command)
    await child.stop(GRACE)
    assert scene.signs.exists()
    assert f"stopping {child.pid} yes\n" in scene.log.history()
    nothing_is_left_of(child, scene)


@pytest.mark.parametrize("command", [("false",), ("no-such-program",)])
async def test_sigterm_stands_in_for_a_stop_command_that_fails(
    scene: Scene, command: tuple[str, ...]
) -> None:
    child = await scene.started(stop_command=command)
    async with asyncio.timeout(5):
        await child.stop(GRACE)
    assert child.exit is not None and child.exit.status == -signal.SIGTERM


async def test_a_stop_command_that_hangs_has_the_grace(scene: Scene) -> None:
    command = ("sh", "-c", f"echo $$ > {scene.signs}; sleep 1000")
    child = await scene.started(stop_command=command)
    await child.stop(0.1)
    assert child.exit is not None and child.exit.status == -signal.SIGKILL
    assert not is_alive(int(scene.signs.read_text()))
    nothing_is_left_of(child, scene)


# --- other systems ----------------------------------------------------------------


async def test_the_end_is_noticed_without_pidfds(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_here(pid: int, flags: int = 0) -> int:
        raise OSError("no such call")

    # As on macOS and in sandboxes; this machine cannot be made to refuse it.
    monkeypatch.setattr(os, "pidfd_open", not_here, raising=False)
    child = await scene.started()
    await child.stop(GRACE)
    nothing_is_left_of(child, scene)
    failure = await scene.failure(scene.child("--crash-on-start", "error: so it is"))
    assert str(failure).endswith('exited with code 1: "error: so it is"')


async def test_nothing_is_known_of_groups_without_proc(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_PROC", Path("/no/proc"))
    child = await scene.started()
    assert child.memory() is None
    assert child.pid is not None and child.port is not None
    assert groups.family(child.pid) is None
    assert groups.owns_port(child.pid, child.port) is None
    await child.stop(GRACE)
    nothing_is_left_of(child, scene)


@needs_proc
async def test_a_shared_port_is_not_the_childs_alone(scene: Scene) -> None:
    with contextlib.ExitStack() as open_ones:
        port = 0
        for _ in range(2):
            listener = open_ones.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen()
            port = listener.getsockname()[1]
        own = os.getpgrp()
        assert groups.owns_port(own, port) is True
        child = await scene.started()
        assert child.pid is not None and child.port is not None
        assert groups.owns_port(child.pid, child.port) is True
        assert groups.owns_port(child.pid, port) is False
        # Whoever started it has it among its descendants.
        assert groups.owns_port(own, child.port) is True


def test_how_a_process_ended_is_said_in_words() -> None:
    said = {status: str(Exit(status, "", False)) for status in (0, 127, -11, -4, -64)}
    assert said[0] == "exited with code 0"
    assert said[127] == "exited with code 127"
    assert said[-11] == "was ended by SIGSEGV"
    assert said[-4].startswith("was ended by SIGILL (it was built for another")
    assert str(Exit(-9, "", was_asked=True)) == "was ended by SIGKILL"
    assert said[-64] in ("was ended by SIGRTMAX", "was ended by signal 64")
