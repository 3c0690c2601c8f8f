"""Promises of tasks about the processes they start; the rest is in test_admin_models.

All processes are real, and each tells its number when it is ready to be ended.
"""

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from inferencia import tasks as module
from inferencia.models import groups
from inferencia.tasks import State, Tasks

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("setsid") is None,
    reason="only Linux tells who descends from whom; needs setsid (util-linux)",
)

SLEEPS = "echo pid $$; exec sleep 60"
STAYS = "trap '' TERM; echo pid $$; exec sleep 60"  # what is ignored stays so


def in_its_own_session(script: str) -> str:
    """A command whose child leaves its session, and which waits for it."""
    return f"sh -c {shlex.quote(f'setsid sh -c {shlex.quote(script)} & wait')}"


def tasks_of(command: str) -> Tasks:
    path = {"PATH": os.environ["PATH"]}
    return Tasks({"long": (command,)}, env={}, environment=lambda: path)


async def started(tasks: Tasks) -> int:
    """Start it; returns the number that is told."""
    tasks.start("long")
    told = ""
    async with asyncio.timeout(10):
        with tasks.log_of("long").follow() as follower:
            async for text in tasks.follow("long", follower):
                told += text
                if found := re.search(r"^pid (\d+)$", told, re.M):
                    return int(found[1])
    raise AssertionError(told)


def lives(pid: int) -> bool:
    found = groups.stat(pid)
    return found is not None and found.is_alive


async def test_a_child_with_a_session_of_its_own_is_ended_with_its_task() -> None:
    tasks = tasks_of(in_its_own_session(SLEEPS))
    pid = await started(tasks)
    assert os.getsid(pid) == pid
    assert (await tasks.cancel("long")).state is State.CANCELLED
    assert not lives(pid)


async def test_such_a_child_is_killed_if_it_does_not_end_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    tasks = tasks_of(in_its_own_session(STAYS))
    pid = await started(tasks)
    await tasks.cancel("long")
    assert not lives(pid) and not groups.lives(pid)


async def test_sessions_within_sessions_are_ended_as_well() -> None:
    tasks = tasks_of(in_its_own_session(in_its_own_session(SLEEPS)))
    pid = await started(tasks)
    await tasks.cancel("long")
    assert not lives(pid)


@pytest.fixture
def others() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes of ours that belong to no task, in a session of their own or not."""
    found = [
        subprocess.Popen(["sleep", "60"], start_new_session=is_apart)
        for is_apart in (True, False)
    ]
    yield found
    for process in found:
        process.kill()
        process.wait()


async def test_nobody_is_ended_who_does_not_descend_from_the_task(
    others: list["subprocess.Popen[bytes]"],
) -> None:
    tasks = tasks_of(in_its_own_session(SLEEPS))
    await started(tasks)
    await tasks.cancel("long")
    assert [process.poll() for process in others] == [None, None]
