"""The event loop's pulse, tried with a loop that is really stuck.

The loop is blocked by a ``threading.Event`` which the log line sets that is waited for,
so nothing here depends on how fast the machine is.
"""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inferencia.backends.echo_model import reply_to
from inferencia.notify import Notifier
from inferencia.pulse import Pulse, Stalls, innermost, places

PATIENCE = 10.0
STALL = 0.05
STUCK = "has been stuck"
AGAIN = "turns again"


class Lines(logging.Handler):
    """What the pulse logs; a test can wait for a line or have it call something."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.when: dict[str, Callable[[], object]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        for words, call in self.when.items():
            if words in record.getMessage():
                call()

    def count(self, words: str) -> int:
        return sum(words in record.getMessage() for record in self.records)


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    logger = logging.getLogger("inferencia.pulse")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


class Block:
    """Stops the event loop until it is released from another thread."""

    def __init__(self) -> None:
        self._released = threading.Event()

    def release(self) -> None:
        self._released.set()

    def until_released(self) -> None:
        assert self._released.wait(PATIENCE), "nobody noticed that the loop is stuck"


async def test_a_stuck_loop_is_told_while_it_is_stuck(lines: Lines) -> None:
    block = Block()
    lines.when[STUCK] = block.release
    async with Pulse(stall_seconds=STALL) as pulse:
        block.until_released()  # only the thread can release it, by its line
        assert pulse.stalls == 1
    (record,) = lines.records
    assert record.levelno == logging.WARNING
    assert vars(record)["seconds"] >= 0


async def test_every_stall_is_told_once_and_its_end_too(lines: Lines) -> None:
    ended = asyncio.Event()
    lines.when[AGAIN] = ended.set
    async with Pulse(stall_seconds=STALL) as pulse:
        for number in (1, 2):
            ended.clear()
            block = Block()
            lines.when[STUCK] = block.release
            block.until_released()
            async with asyncio.timeout(PATIENCE):
                await ended.wait()
            assert pulse.stalls == number
    assert (lines.count(STUCK), lines.count(AGAIN)) == (2, 2)


async def test_a_loop_that_turns_is_left_alone(lines: Lines) -> None:
    """Long waiting is not being stuck."""
    beats: asyncio.Queue[None] = asyncio.Queue()

    async with Pulse(
        beat=lambda: beats.put_nowait(None), beat_seconds=STALL, stall_seconds=PATIENCE
    ):
        async with asyncio.timeout(PATIENCE):
            for _ in range(4):
                await beats.get()
    assert lines.records == []


async def test_there_is_no_sign_of_life_while_the_loop_is_stuck(lines: Lines) -> None:
    beats: list[int] = []
    counts: list[int] = []
    block = Block()

    def told() -> None:
        counts.append(len(beats))
        block.release()

    lines.when[STUCK] = told
    async with Pulse(
        beat=lambda: beats.append(1), beat_seconds=0.001, stall_seconds=STALL
    ):
        before = len(beats)
        block.until_released()
        assert len(beats) == before == counts[0] == 1
    assert lines.count(STUCK) == 1


async def test_systemd_gets_a_sign_of_life_at_once_and_then_regularly(
    tmp_path: Path,
) -> None:
    name = str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setblocking(False)
        manager.bind(name)
        env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "40000"}
        notifier = Notifier.take(env, os.getpid())
        loop = asyncio.get_running_loop()

        async def hears() -> bytes:
            # sock_recv is not there for datagrams under every loop; add_reader is.
            readable = asyncio.Event()
            loop.add_reader(manager, readable.set)
            try:
                async with asyncio.timeout(PATIENCE):
                    await readable.wait()
            finally:
                loop.remove_reader(manager)
            return manager.recv(100)

        async with Pulse(
            beat=notifier.watchdog, beat_seconds=notifier.watchdog_seconds / 2
        ):
            for _ in range(3):
                assert await hears() == b"WATCHDOG=1"
        notifier.close()


async def test_no_thread_and_no_timer_is_left_behind() -> None:
    def watchers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "pulse"]

    async with Pulse() as pulse:
        assert len(watchers()) == 1
    assert watchers() == []
    assert pulse._timer is not None and pulse._timer.cancelled()


async def test_the_places_named_are_those_where_our_code_is(lines: Lines) -> None:
    """``reply_to`` is ours; what it stops in, deep in its argument, is not."""
    block = Block()
    lines.when[STUCK] = block.release

    class Stopping(str):
        def partition(self, *_: object) -> tuple[str, str, str]:
            block.until_released()
            return ("/v1/models", "", "")

    secret = b"sk-not-for-the-log"
    async with Pulse(stall_seconds=STALL):
        reply_to("GET", Stopping("/v1/models"), secret, 1)
    (record,) = lines.records
    told = vars(record)
    # The file and line of reply_to, and nothing of the tests nor of pytest.
    assert told["at"].startswith("backends/echo_model.py:")
    assert " < " not in told["at"]
    assert told["in"] == "threading.Condition.wait"
    assert secret.decode() not in repr(told)


def test_a_stack_without_our_code_has_no_places() -> None:
    assert places(None) == []
    assert innermost(None) == ""


# --- the decision ----------------------------------------------------------------


def test_a_stall_is_news_once() -> None:
    stalls = Stalls(1.0)
    looks = [stalls.is_new(10.0, 10.0 + 0.25 * n) for n in range(40)]
    assert looks.count(True) == 1
    assert looks.index(True) == 4  # at 11.0


def test_the_next_stall_is_news_again() -> None:
    stalls = Stalls(1.0)
    turned = [0.0] * 6 + [1.5] * 6
    looks = [stalls.is_new(t, 0.25 * n) for n, t in enumerate(turned)]
    assert [n for n, is_new in enumerate(looks) if is_new] == [4, 10]


def test_a_process_that_was_stopped_is_not_a_stuck_loop() -> None:
    """After SIGSTOP and SIGCONT, or a laptop's sleep, nothing has run for a while."""
    stalls = Stalls(1.0)
    assert not stalls.is_new(0.0, 0.1)
    assert not stalls.is_new(0.1, 3600.0)
    assert not stalls.is_new(3600.1, 3600.25)


def test_a_loop_that_stays_stuck_after_a_stop_is_still_told() -> None:
    stalls = Stalls(1.0)
    assert not stalls.is_new(0.0, 0.1)
    assert not stalls.is_new(0.1, 3600.0)
    assert stalls.is_new(0.1, 3600.25)
