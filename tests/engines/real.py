"""Real engines and the gateway as child processes on loopback ports.

Everything here is synchronous and speaks HTTP by ``http.client``, so that what is under
test is never also what tests. ``tests/conftest.py`` makes fixtures of it.
"""

import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

# Two busy cores load the chat model in under 2 s; this is for the bad day.
START_SECONDS = 60.0
# How often the state of a foreign process is looked at; it cannot tell us by itself.
LOOK_SECONDS = 0.02

HERE = Path(__file__).resolve().parent
LOCAL = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Installed:
    """A folder that ``install.py`` has filled."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def node(self) -> str | None:
        beside = self.folder / "venv" / "bin" / "node"
        return shutil.which("node") or (str(beside) if beside.exists() else None)

    def has_package(self, name: str) -> bool:
        return any(self.folder.glob(f"venv/lib/python*/site-packages/{name}"))

    def llama_server(self) -> Path | None:
        """The executable from PyPI, else the one on PATH."""
        found = next(
            self.folder.glob("venv/lib/*/site-packages/skulk*/bin/llama-server"), None
        )
        on_path = shutil.which("llama-server")
        return found or (Path(on_path) if on_path else None)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[bytes]:
        """The data of each server-sent event, comments left out."""
        blocks = self.body.replace(b"\r\n", b"\n").split(b"\n\n")
        return [
            b"\n".join(
                line.removeprefix(b"data:").removeprefix(b" ")
                for line in block.split(b"\n")
                if line.startswith(b"data:")
            )
            for block in blocks
            if b"data:" in block
        ]

    def chunks(self) -> list[Any]:
        """The decoded events of a finished stream, ``[DONE]`` checked and left out."""
        *events, last = self.events()
        assert last == b"[DONE]", last
        return [json.loads(event) for event in events]


@dataclass(slots=True)
class Server:
    """An HTTP server at a loopback port, and how a test talks to it."""

    port: int
    headers: Mapping[str, str] = field(default_factory=dict)  # sent with each request

    @property
    def url(self) -> str:
        return f"http://{LOCAL}:{self.port}"

    def connect(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(LOCAL, self.port, timeout=timeout)

    def send(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> http.client.HTTPConnection:
        """Send a request and return its connection, the answer still unread."""
        connection = self.connect()
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        everything = {**self.headers, **extra}
        if body is not None:
            everything.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, everything)
        return connection

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> Reply:
        with contextlib.closing(self.send(method, path, body, **headers)) as connection:
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, None, **headers)

    def post(self, path: str, value: Any, **headers: str) -> Reply:
        return self.request("POST", path, json.dumps(value).encode(), **headers)


class Process:
    """A child process with its output in a file; leaving the context ends it."""

    def __init__(
        self, command: list[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                command,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**clean_environment(), **(env or {})},
            )

    @property
    def is_running(self) -> bool:
        return self._child.poll() is None

    @property
    def pid(self) -> int:
        return self._child.pid

    def signal(self, number: int) -> None:
        self._child.send_signal(number)

    def wait(self, timeout: float) -> int:
        return self._child.wait(timeout)

    def stop(self) -> None:
        """TERM, then KILL: a llama-server with an open stream lingers for 30 s."""
        if self.is_running:
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(3)
        if self.is_running:
            self._child.kill()
        self._child.wait(10)

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def clean_environment() -> dict[str, str]:
    """What children inherit: this checkout, nothing that configures a gateway."""
    ours = ("INFERENCIA_", "GI_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {**kept, "PYTHONPATH": str(HERE.parent.parent)}


def free_port() -> int:
    """A port for a child that starts later.

    Below the range that the system itself gives to outgoing connections: one of those
    could else take the port in the meantime.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        if is_free(port):
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCAL, port))
        except OSError:
            return False
        return True


def until(true: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until ``true()``, and return how long that took."""
    started = time.monotonic()
    while not true():
        passed = time.monotonic() - started
        assert passed < seconds, f"not within {seconds} s: {what}"
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - started


def is_healthy(server: Server, path: str = "/health") -> bool:
    try:
        return server.get(path).status == 200
    except (OSError, http.client.HTTPException):
        return False


@dataclass(slots=True)
class Engine(Server):
    """An engine that a test may stop and start again at the same port."""

    command: list[str] = field(default_factory=list)
    log: Path = Path(os.devnull)
    env: Mapping[str, str] = field(default_factory=dict)
    process: Process | None = None  # None while it is stopped

    def begin(self) -> None:
        """Start without waiting: it may still be loading afterwards."""
        self.process = Process(self.command, self.log, self.env)

    def start(self) -> None:
        self.begin()
        self.wait_until_healthy()

    def wait_until_healthy(self) -> None:
        process = self.process
        assert process is not None

        def is_up() -> bool:
            assert process.is_running, process.last_words()
            return is_healthy(self)

        until(is_up, START_SECONDS, f"{self.command[0]} is healthy")

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        try:
            self.start()
            yield self
        finally:
            self.stop()

    def busy_slots(self) -> int:
        """How many requests a llama-server is working on right now."""
        return sum(bool(s["is_processing"]) for s in self.get("/slots").json())


def llama_command(program: Path, port: int) -> list[str]:
    return [str(program), "--host", LOCAL, "--port", str(port)]


def chat_engine(installed: Installed, program: Path, log: Path) -> Engine:
    """A llama-server with the chat model, two slots and our template for tools."""
    port = free_port()
    command = llama_command(program, port)
    command += ["-m", str(installed.folder / "chat.gguf"), "--alias", "gemma-270m"]
    command += ["-c", "16384", "-np", "2", "-t", "2", "--metrics"]
    command += ["--jinja", "--chat-template-file", str(HERE / "tools.jinja")]
    return Engine(port, command=command, log=log)


def embedding_engine(installed: Installed, program: Path, log: Path) -> Engine:
    port = free_port()
    command = llama_command(program, port)
    command += ["-m", str(installed.folder / "minilm.gguf"), "--alias", "minilm"]
    command += ["--embeddings", "-t", "1"]
    return Engine(port, command=command, log=log)


def mlx_engine(installed: Installed, log: Path) -> Engine:
    port = free_port()
    command = [str(installed.python), "-m", "mlx_lm", "server", "--host", LOCAL]
    command += ["--port", str(port), "--model", str(installed.folder / "mlx-a")]
    env = {"HF_HUB_CACHE": str(installed.folder / "hub"), "HF_HUB_OFFLINE": "1"}
    return Engine(port, command=command, log=log, env=env)


def gateway_engine(config: Path, port: int, key: str, log: Path) -> Engine:
    """The gateway itself, from the ``inferencia`` that these tests can import."""
    command = [sys.executable, "-m", "inferencia", "serve", "-c", str(config)]
    headers = {"Authorization": f"Bearer {key}"}
    env = {"INFERENCIA_STATE": str(config.parent / "state")}
    return Engine(port, headers=headers, command=command, log=log, env=env)
