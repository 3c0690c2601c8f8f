"""What systemd hears, read from a real datagram socket."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferencia.notify import MAX_STATUS, Notifier

PATIENCE = 10.0


class Manager:
    """The service manager's end."""

    def __init__(self, name: str | bytes) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(name)

    def hears(self) -> list[str]:
        """The lines of the next message."""
        return self.socket.recv(4096).decode().split("\n")

    def hears_nothing(self) -> bool:
        self.socket.setblocking(False)
        try:
            return not self.socket.recv(4096)
        except BlockingIOError:
            return True


@pytest.fixture
def path(tmp_path: Path) -> str:
    # Names of sockets are short (108 bytes), pytest's folders are not always.
    name = str(tmp_path / "notify")
    if len(name) > 100:
        pytest.skip(f"too long for the name of a socket: {name}")
    return name


@pytest.fixture
def manager(path: str) -> Iterator[Manager]:
    manager = Manager(path)
    yield manager
    manager.socket.close()


@pytest.fixture
def notifier(manager: Manager, path: str) -> Iterator[Notifier]:
    notifier = Notifier(path)
    yield notifier
    notifier.close()


def test_the_manager_hears_of_a_whole_life(
    manager: Manager, notifier: Notifier
) -> None:
    notifier.ready("listens on http://127.0.0.1:8080")
    assert manager.hears() == ["READY=1", "STATUS=listens on http://127.0.0.1:8080"]
    notifier.watchdog()
    assert manager.hears() == ["WATCHDOG=1"]
    notifier.status("3 models")
    assert manager.hears() == ["STATUS=3 models"]
    notifier.stopping("2 requests are still open")
    assert manager.hears() == ["STOPPING=1", "STATUS=2 requests are still open"]


def test_a_reload_carries_the_time_that_systemd_compares_with_its_own(
    manager: Manager, notifier: Notifier
) -> None:
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    after = time.monotonic_ns() // 1000
    first, second = manager.hears()
    assert first == "RELOADING=1"
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= after


def test_a_drain_longer_than_the_unit_allows_is_announced(
    manager: Manager, notifier: Notifier
) -> None:
    notifier.stopping(within_seconds=330.5)
    assert manager.hears() == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=330500000"]


def test_a_status_cannot_smuggle_a_second_message_in(
    manager: Manager, notifier: Notifier
) -> None:
    notifier.status("one\nREADY=1\r\x00\u2028two")
    assert manager.hears() == ["STATUS=one READY=1   two"]
    notifier.status("x" * 10_000)
    assert manager.hears() == ["STATUS=" + "x" * MAX_STATUS]


def test_an_empty_status_is_no_message(manager: Manager, notifier: Notifier) -> None:
    notifier.status(" \n")
    assert manager.hears_nothing()


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_socket_in_the_abstract_namespace_is_reached() -> None:
    name = f"inferencia-test-{os.getpid()}"
    manager = Manager(b"\0" + name.encode())
    notifier = Notifier(f"@{name}")
    notifier.ready()
    assert manager.hears() == ["READY=1"]
    notifier.close()
    manager.socket.close()


def test_without_a_socket_nothing_happens() -> None:
    notifier = Notifier.take({}, os.getpid())
    assert not notifier.is_heard
    assert notifier.watchdog_seconds == 0
    notifier.ready("x")
    notifier.reloading()
    notifier.watchdog()
    notifier.stopping()
    notifier.close()


def test_an_address_of_another_kind_is_told_and_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notifier = Notifier("vsock:2:1234")
    notifier.ready()
    assert not notifier.is_heard
    assert "neither a path nor @name" in caplog.text


def test_a_manager_that_went_away_stops_nothing(
    manager: Manager,
    notifier: Notifier,
    path: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    manager.socket.close()
    notifier.ready()
    assert "did not hear READY" in caplog.text
    os.unlink(path)
    back = Manager(path)
    notifier.ready()
    assert back.hears() == ["READY=1"]
    back.socket.close()


def test_a_watchdog_message_never_waits(
    manager: Manager, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel's queue is full after some hundreds; nobody reads it here."""
    for _ in range(10_000):
        notifier.watchdog()
        if caplog.records:
            break
    assert "did not hear WATCHDOG" in caplog.text


def test_closing_twice_and_speaking_afterwards_is_harmless(
    manager: Manager, notifier: Notifier
) -> None:
    notifier.close()
    notifier.close()
    notifier.ready()
    assert manager.hears_nothing()


def test_children_hear_nothing_of_the_socket_and_the_watchdog(path: str) -> None:
    env = {
        "NOTIFY_SOCKET": path,
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": "4711",
        "PATH": "/bin",
    }
    notifier = Notifier.take(env, 4711)
    assert notifier.is_heard
    assert notifier.watchdog_seconds == 30
    assert env == {"PATH": "/bin"}
    notifier.close()


@pytest.mark.parametrize(
    ("interval", "meant_for", "seconds"),
    [
        ("30000000", "", 30.0),
        ("500000", "1", 0.5),
        ("30000000", "2", 0.0),  # for our parent
        ("", "", 0.0),
        ("soon", "", 0.0),
        ("-1", "", 0.0),
    ],
)
def test_the_watchdog_is_ours_only_if_we_are_meant(
    interval: str, meant_for: str, seconds: float
) -> None:
    env = {"WATCHDOG_USEC": interval, "WATCHDOG_PID": meant_for}
    assert Notifier.take(env, 1).watchdog_seconds == seconds
