"""The daemon as systemd runs it: told over a socket, reloaded, watched, stopped."""

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.real import Engine, free_port

PATIENCE = 20.0


class Manager:
    """The service manager's end of ``$NOTIFY_SOCKET``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(PATIENCE)
        self._socket.bind(path)

    def hears(self, *, watchdog: bool = False) -> dict[str, str]:
        """The next message; signs of life only if they are asked for."""
        while True:
            text = self._socket.recv(4096).decode()
            message = dict(line.split("=", 1) for line in text.splitlines())
            if watchdog == ("WATCHDOG" in message):
                return message

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "n")
    if len(path) > 100:
        pytest.skip(f"too long for the name of a socket: {path}")
    with contextlib.closing(Manager(path)) as manager:
        yield manager


@pytest.fixture
def daemon(manager: Manager, tmp_path: Path) -> Iterator[Engine]:
    config = tmp_path / "config.yaml"
    config.write_text("server: {shutdown_timeout: 7s}\nauth: {keys_file: keys.txt}\n")
    keys = tmp_path / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text("sk-service-life-0123456789abcdef\n")
    port = free_port()
    command = [sys.executable, "-m", "inferencia", "serve", "--demo"]
    command += ["-c", str(config), "--port", str(port)]
    env = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "200000"}
    engine = Engine(port, command=command, log=tmp_path / "log", env=env)
    engine.begin()
    yield engine
    engine.stop()


def test_systemd_is_told_of_start_reload_life_and_end(
    manager: Manager, daemon: Engine, tmp_path: Path
) -> None:
    assert manager.hears() == {
        "READY": "1",
        "STATUS": f"listens on http://127.0.0.1:{daemon.port}",
    }
    assert daemon.get("/health").status == 200, "READY came before the socket was open"
    for _ in range(2):
        assert manager.hears(watchdog=True) == {"WATCHDOG": "1"}

    assert daemon.process is not None
    daemon.process.signal(signal.SIGHUP)
    reloading = manager.hears()
    assert set(reloading) == {"RELOADING", "MONOTONIC_USEC"}
    assert manager.hears() == {"READY": "1"}

    # A broken file changes nothing, and the reload is over all the same.
    (tmp_path / "config.yaml").write_text("server: [")
    daemon.process.signal(signal.SIGHUP)
    assert "RELOADING" in manager.hears()
    assert manager.hears() == {"READY": "1"}

    daemon.process.signal(signal.SIGTERM)
    stopping = manager.hears()
    assert stopping["STOPPING"] == "1"
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 7_000_000
    assert daemon.process.wait(PATIENCE) == 0, daemon.process.last_words()
