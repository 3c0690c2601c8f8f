"""``python -m bench.models``: what it costs that a model is started for you.

Three questions, each with its goal:

overhead     requests/s to a model that the gateway has started and that is loaded, and
             to the same server as a plain backend: at least 1 / 1.05 of it
cold start   from the request to the first byte while the model is not loaded, less the
             time that the server needs by itself: at most 150 ms
swaps        100 requests at once, alternating between two models of which one fits:
             2 loads

Servers are ``bench.mock``; with ``--llama-server EXE --model FILE`` the cold start is
measured with a real one as well. Load goes to 127.0.0.1 only, is bounded in time and
count, and every process is ended by its pid.
"""

import argparse
import json
import shlex
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from bench import gateway, machine, wire
from bench.children import (
    ROOT,
    ChildFailed,
    Children,
    exit_code,
    read_port,
    tail,
)
from bench.figure import Figure
from bench.load import GRACE_SECONDS, HOST, Job

#: Goals; see the module's header.
MOST_OVERHEAD = 1.05
MOST_COLD_MS = 150.0
LOADS = 2

ALTERNATING = 100
_CONNECTIONS = 32
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.001

_COMMON = """\
server: {{host: 127.0.0.1, port: {port}, shutdown_timeout: 2s}}
auth: {{keys_file: ./keys.txt}}
ratelimit: {{requests_per_second: 1000000, burst: 1000000}}
queue: {{max_waiting: 1000, timeout: 60s}}
log: {{level: info, format: json}}
"""


class Gateway:
    """One gateway with a configuration of its own."""

    def __init__(self, run: "Run", text: str) -> None:
        self.folder = run.folder / f"gateway-{len(run.gateways)}"
        self.folder.mkdir()
        self.port = gateway.free_port()
        self.key = gateway.new_key()
        keys = self.folder / "keys.txt"
        keys.touch(mode=0o600)
        keys.write_text(f"{self.key} name=bench\n")
        config = self.folder / "config.yaml"
        config.write_text(_COMMON.format(port=self.port) + text)
        self.log = self.folder / "log"
        self.child = run.children.start(
            "bench.gateway",
            "serve",
            "-c",
            str(config),
            core=run.cores.proxy,
            log=self.log,
            env=gateway.environment(self.folder),
            speaks=False,
        )
        run.gateways.append(self)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if self.child.poll() is not None:
                raise ChildFailed(f"the gateway ended\n{tail(self.log)}")
            if _answers(self.port):
                return
            time.sleep(_POLL_SECONDS)
        raise ChildFailed(f"the gateway does not listen\n{tail(self.log)}")

    def ask(self, model: str) -> float:
        """Seconds from sending a chat request to the first byte of its answer."""
        body = json.dumps(
            {
                "bench": "0.0.0",
                "model": model,
                "max_tokens": 1,
                "messages": [{"role": "user", "content": "Hello!"}],
            }
        ).encode()
        asked = wire.request(body, self.key, f"{HOST}:{self.port}")
        began = time.monotonic()
        with socket.create_connection((HOST, self.port), _PATIENCE_SECONDS) as asking:
            asking.sendall(asked)
            first = asking.recv(65536)
        seconds = time.monotonic() - began
        if not first.startswith(b"HTTP/1.1 200 "):
            raise ChildFailed(f"{model}: {first[:80]!r}\n{tail(self.log, 60)}")
        return seconds

    def starts(self) -> int:
        """How many processes it has started so far."""
        return self.log.read_text(errors="replace").count('"starting model')


class Run:
    """The processes of one run."""

    def __init__(self, children: Children, folder: Path) -> None:
        self.children = children
        self.folder = folder
        self.cores = machine.Cores.choose()
        self.gateways: list[Gateway] = []
        self.log = folder / "log"

    def load(self, target: Gateway, seconds: float) -> float:
        """Requests a second that one gateway answers."""
        job = Job(
            "requests",
            target.port,
            target.key,
            connections=_CONNECTIONS,
            warm_seconds=0.5,
            seconds=seconds,
            proxy_pid=target.child.pid,
        )
        output = self.children.result(
            "bench.load",
            json.dumps(asdict(job)),
            core=self.cores.load,
            log=self.log,
            seconds=seconds + 2 * GRACE_SECONDS,
        )
        result = json.loads(output)
        if result["errors"]:
            raise ChildFailed(f"errors under load: {result['errors']}")
        return float(result["values"]["per_second"])


def mock_command(load_seconds: float = 0.0) -> str:
    """A server that is ready after that time, as a command line for ``cmd``."""
    command = [sys.executable, "-m", "bench.mock", "--load-seconds", str(load_seconds)]
    return f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.join(command)} --port "


def swap(models: dict[str, str], **further: object) -> str:
    """Models by name and command, as the ``swap`` part of a configuration."""
    keys: dict[str, object] = {
        "models": {
            name: {
                "cmd": f"{command}${{PORT}}",
                "checkEndpoint": "/v1/models",
                "concurrencyLimit": 1000,
            }
            for name, command in models.items()
        },
        "startPort": 20000 + gateway.free_port() % 10000,
    }
    return "swap: " + json.dumps(keys | further) + "\n"


def overhead(run: Run, rounds: int, seconds: float) -> Figure:
    """A loaded managed model beside a plain backend, in turns."""
    mock = run.children.start("bench.mock", core=run.cores.mock, log=run.log)
    url = f"http://{HOST}:{read_port(mock, run.log)}"
    plain = Gateway(run, f"backends: [{{name: mock, type: openai, url: '{url}'}}]\n")
    managed = Gateway(run, swap({wire.MODEL: mock_command()}))
    managed.ask(wire.MODEL)
    _pin_servers(managed, run.cores.mock)
    ratios = []
    for number in range(rounds):
        pair = (plain, managed) if number % 2 else (managed, plain)
        rates = {id(one): run.load(one, seconds) for one in pair}
        ratios.append(rates[id(plain)] / rates[id(managed)])
    ratio = statistics.median(ratios)
    return Figure(
        "plain / managed requests a second",
        f"{ratio:.3f} ({min(ratios):.2f}..{max(ratios):.2f})",
        f"at most {MOST_OVERHEAD}",
        ratio <= MOST_OVERHEAD,
    )


def cold_start(run: Run, command: str, title: str, rounds: int) -> Figure:
    """What the gateway adds to a server's own start."""
    started = Gateway(run, swap({"cold": command}, globalTTL=1))
    added = []
    for _ in range(rounds):
        own = _own_start(run, command)
        waited = started.ask("cold")
        added.append(1000 * (waited - own))
        _until_unloaded(started)
    figure = statistics.median(added)
    return Figure(
        f"cold start, {title}",
        f"{figure:+.0f} ms ({min(added):+.0f}..{max(added):+.0f})",
        f"at most {MOST_COLD_MS:g} ms",
        figure <= MOST_COLD_MS,
    )


def swaps(run: Run) -> Figure:
    """Two models that do not fit together, asked for by turns, all at once."""
    models = {name: mock_command(0.2) for name in ("one", "two")}
    groups = {"both": {"swap": True, "members": list(models)}}
    one = Gateway(run, swap(models, groups=groups))
    asked = [list(models)[number % 2] for number in range(ALTERNATING)]
    with ThreadPoolExecutor(ALTERNATING) as pool:
        for answered in pool.map(one.ask, asked):
            assert answered > 0
    starts = one.starts()
    return Figure(
        f"loads for {ALTERNATING} alternating requests",
        str(starts),
        f"{LOADS}",
        starts == LOADS,
    )


def _own_start(run: Run, command: str) -> float:
    """Seconds from starting a server to its first answer, nobody in between."""
    port = gateway.free_port()
    began = time.monotonic()
    child = run.children.run(
        [*shlex.split(command), str(port)], core=None, log=run.log, speaks=False
    )
    try:
        while not _is_up(port):
            if child.poll() is not None or time.monotonic() - began > _PATIENCE_SECONDS:
                raise ChildFailed(f"{command} does not start\n{tail(run.log)}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - began
    finally:
        run.children.end(child)


def _is_up(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), 5) as asking:
            asking.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            return asking.recv(4096).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), 1):
            return True
    except OSError:
        return False


def _until_unloaded(target: Gateway) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while machine.children_of(target.child.pid):
        if time.monotonic() > deadline:
            raise ChildFailed("the model is not unloaded after its ttl")
        time.sleep(0.02)


def _pin_servers(target: Gateway, core: int | None) -> None:
    """Hold the gateway's own server where the plain backend's is held."""
    for pid in machine.children_of(target.child.pid):
        machine.pin(pid, core)


def _measure(options: argparse.Namespace) -> int:
    rounds, seconds = (2, 0.6) if options.quick else (6, 2.0)
    with tempfile.TemporaryDirectory() as name, Children() as children:
        run = Run(children, Path(name))
        found = [
            overhead(run, rounds, seconds),
            cold_start(run, mock_command(0.4), "0.4 s of loading", rounds),
            swaps(run),
        ]
        if options.llama_server and options.model:
            real = shlex.join(
                [options.llama_server, "-m", options.model, "-c", "1024", "--port"]
            )
            found.append(cold_start(run, f"{real} ", "llama-server", rounds))
    for figure in found:
        print(figure)
    return 1 if options.check and not all(one.passed for one in found) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured; 1 with ``--check`` if a goal is missed; 2 could not."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="less certain")
    parser.add_argument("--check", action="store_true", help="exit 1 on a missed goal")
    parser.add_argument("--llama-server", metavar="EXE", help="for a real cold start")
    parser.add_argument("--model", metavar="FILE", help="a GGUF file for it")
    options = parser.parse_args(argv)
    return exit_code("bench.models", lambda: _measure(options))


if __name__ == "__main__":
    sys.exit(main())
