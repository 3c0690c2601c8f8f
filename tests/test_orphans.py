"""Promises of ``models/orphans.py``: nobody outlives us, and nobody else is harmed."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fakeserver import COMMAND
from inferencia.models import groups
from inferencia.models.orphans import Entry, OrphanBook

# A gateway with one child that is not going to be ready; it tells the numbers of its
# child and of its guard.
GATEWAY = """
import asyncio, os, sys
from pathlib import Path
from inferencia.models.childlog import ChildLog
from inferencia.models.definitions import ModelDefinition
from inferencia.models.orphans import OrphanBook
from inferencia.models.process import Child, Probe

async def main():
    async def probe(url):
        return Probe(None)
    book = OrphanBook(Path(sys.argv[1]))
    definition = ModelDefinition("qwen", tuple(sys.argv[2:]), proxy="http://localhost:1")
    child = Child(definition, env=os.environ, probe=probe, log=ChildLog(), orphans=book)
    starting = asyncio.create_task(child.start())
    while child.pid is None:
        await asyncio.sleep(0.001)
    print(child.pid, book._guards[child.pid]._process.pid, flush=True)
    await starting

asyncio.run(main())
"""

Started = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "children"


@pytest.fixture
def started() -> Iterator[Started]:
    """Starts processes, each in a group of its own; all end with the test."""
    all_started = []

    def start(*command: str, **options: object) -> "subprocess.Popen[bytes]":
        process: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
        all_started.append(process)
        return process

    yield start
    for process in all_started:
        process.kill()
        process.communicate()


@pytest.fixture
def sleeper(started: Started) -> "subprocess.Popen[bytes]":
    return started("sleep", "1000")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.005)


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def entry_of(pid: int, **changes: object) -> Entry:
    """An entry that a gateway which is gone has left."""
    mark = groups.mark(pid)
    assert mark is not None
    entry = Entry("qwen", pid, mark, gateway=pid, gateway_mark="of somebody else")
    return replace(entry, **changes)  # type: ignore[arg-type]


def leave(folder: Path, entry: Entry) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{entry.pid}.json"
    file.write_text(json.dumps(asdict(entry)))
    return file


class Gateway:
    """A gateway that was killed."""

    def __init__(self, folder: Path, start: Started, *options: str) -> None:
        command = (*COMMAND, "--port", "1", *options)
        arguments = [str(folder), *command]
        here = str(Path(__file__).parent.parent)
        self.process = start(sys.executable, "-c", GATEWAY, *arguments, cwd=here)
        assert self.process.stdout is not None
        self.child, self.guard = map(int, self.process.stdout.readline().split())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


# --- guards -----------------------------------------------------------------------


async def test_a_child_ends_when_the_gateway_is_killed(
    folder: Path, tmp_path: Path, started: Started
) -> None:
    pids = tmp_path / "pids"
    options = ("--listen-late", "--load-until", "/nowhere", "--pid-file", str(pids))
    gateway = Gateway(folder, started, *options)
    await until(pids.exists)
    assert groups.lives(gateway.child)
    gateway.kill()
    await until(lambda: not groups.lives(gateway.child))


async def test_those_who_ignore_sigterm_end_as_well(
    folder: Path, tmp_path: Path, started: Started
) -> None:
    pids = tmp_path / "pids"
    options = ("--grandchild-holds-pipe", "--ignore-term", "--listen-late")
    more = ("--load-until", "/nowhere", "--pid-file", str(pids))
    gateway = Gateway(folder, started, *options, *more)
    await until(lambda: pids.exists() and "grandchild" in pids.read_text())
    gateway.kill()
    await until(lambda: not groups.lives(gateway.child))


async def test_a_guard_goes_when_its_child_has_gone(
    folder: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    book = OrphanBook(folder)
    book.note(sleeper.pid, "qwen")
    guard = book._guards[sleeper.pid]._process.pid
    assert groups.lives(guard) and len(files(folder)) == 1
    book.forget(sleeper.pid)
    book.forget(sleeper.pid)
    await book.aclose()
    assert not groups.lives(guard) and not files(folder)
    assert sleeper.poll() is None  # it was dismissed, not provoked


async def test_a_guard_that_was_killed_is_no_trouble(
    folder: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    book = OrphanBook(folder)
    book.note(sleeper.pid, "qwen")
    guard = book._guards[sleeper.pid]
    os.kill(guard._process.pid, signal.SIGKILL)
    await guard.ended
    book.forget(sleeper.pid)
    await book.aclose()
    assert sleeper.poll() is None


async def test_a_folder_that_cannot_be_written_keeps_no_model_from_starting(
    tmp_path: Path,
    sleeper: "subprocess.Popen[bytes]",
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    book = OrphanBook(tmp_path / "file" / "children")
    book.note(sleeper.pid, "qwen")
    assert 'cannot note the server of model "qwen"' in caplog.text
    assert sleeper.pid in book._guards
    book.forget(sleeper.pid)
    await book.aclose()


async def test_without_a_shell_the_book_is_kept_all_the_same(
    folder: Path, sleeper: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferencia.models.orphans._SHELL", "/no/sh")
    book = OrphanBook(folder)
    book.note(sleeper.pid, "qwen")
    assert len(files(folder)) == 1
    book.forget(sleeper.pid)
    await book.aclose()


# --- the book ---------------------------------------------------------------------


async def test_what_another_run_has_left_is_ended_at_the_next_start(
    folder: Path, started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Gateway(folder, started, "--load-until", "/nowhere", "--listen-late")
    os.kill(gateway.guard, signal.SIGKILL)
    gateway.kill()
    assert groups.lives(gateway.child)
    caplog.set_level(logging.WARNING)
    assert await OrphanBook(folder).reap() == ["qwen"]
    assert not groups.lives(gateway.child) and not files(folder)
    assert f"model qwen (process {gateway.child}), left behind" in caplog.text


async def test_an_orphan_that_ignores_sigterm_is_killed(
    folder: Path, started: Started
) -> None:
    script = "trap '' TERM; echo; while :; do sleep 1000; done"
    orphan = started("sh", "-c", script)
    assert orphan.stdout is not None and orphan.stdout.readline()
    file = leave(folder, entry_of(orphan.pid))
    assert await OrphanBook(folder).reap(grace=0.05) == ["qwen"]
    assert orphan.wait() == -signal.SIGKILL and not file.exists()


async def test_a_number_that_has_gone_to_another_is_left_alone(
    folder: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    mark = groups.mark(sleeper.pid)
    assert mark is not None
    boot, _, ticks = mark.partition(" ")
    for other in (f"{boot} {int(ticks) - 1}", f"other-boot {ticks}", ""):
        file = leave(folder, entry_of(sleeper.pid, mark=other))
        assert await OrphanBook(folder).reap() == []
        assert not file.exists()
    assert sleeper.poll() is None


async def test_the_children_of_a_gateway_that_runs_are_left_alone(
    folder: Path, started: Started
) -> None:
    gateway = Gateway(folder, started, "--load-until", "/nowhere", "--listen-late")
    assert await OrphanBook(folder).reap() == []
    assert groups.lives(gateway.child) and len(files(folder)) == 1
    gateway.kill()
    await until(lambda: not groups.lives(gateway.child))


async def test_our_own_children_are_no_orphans(
    folder: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    book = OrphanBook(folder)
    book.note(sleeper.pid, "qwen")
    assert await book.reap() == []
    assert sleeper.poll() is None
    book.forget(sleeper.pid)
    await book.aclose()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_the_process_of_another_user_is_left_alone(
    folder: Path, started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    other = started("sleep", "1000", user=65534)
    file = leave(folder, entry_of(other.pid))
    assert await OrphanBook(folder).reap() == []
    assert other.poll() is None and file.exists()
    assert "belongs to another user" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "[" * 10_000,
        "{}",
        '{"model": "a"}',
        *(
            json.dumps(
                {
                    "model": "a",
                    "pid": 2**22 + 1,
                    "mark": "m",
                    "gateway": 5,
                    "gateway_mark": "g",
                }
                | change
            )
            for change in (
                {"pid": 0},
                {"pid": 1},
                {"pid": -5},
                {"pid": True},
                {"pid": "7"},
                {"mark": None},
                {"further": 1},
                {"gateway": 1.5},
            )
        ),
        "x" * 100_000,
    ],
)
def test_what_is_no_entry_ends_nobody(
    folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    (folder / "1.json").write_text(text)
    assert asyncio.run(OrphanBook(folder).reap()) == []
    assert "is not readable" in caplog.text


def test_without_a_book_there_is_nothing_to_do(folder: Path) -> None:
    assert asyncio.run(OrphanBook(folder).reap()) == []
    assert not folder.exists()


def test_a_mark_is_of_one_process_only(sleeper: "subprocess.Popen[bytes]") -> None:
    mark = groups.mark(sleeper.pid)
    assert mark == groups.mark(sleeper.pid) and mark != groups.mark(os.getpid())
    sleeper.kill()
    # Dead, though its number is not free before it is waited for.
    asyncio.run(until(lambda: groups.mark(sleeper.pid) is None))
    sleeper.wait()
    assert groups.mark(sleeper.pid) is None


def test_without_proc_ps_tells_when_a_process_started(
    sleeper: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(groups, "_PROC", tmp_path)
    mark = groups.mark(sleeper.pid)
    if mark is None:
        pytest.skip("there is no ps")
    # Such as "Sun Nov 22 05:49:37 2026".
    assert len(mark.split()) == 5 and mark.split()[3].count(":") == 2
    sleeper.kill()
    asyncio.run(until(lambda: groups.mark(sleeper.pid) is None))
    sleeper.wait()
    assert groups.mark(sleeper.pid) is None
