"""Daemons as people start them: real processes in environments that hold nothing.

A process looks for servers at the ports that its test names, so that what runs on the
machine of whoever tests does not matter; all else is as ``python -m inferencia``.
Commands that end at once can be run in this process instead (``Ran``).
"""

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

import inferencia
from gateway import (
    CHAT,
    PATIENCE,
    FakeEngine,
)
from inferencia import cli

CODE = str(Path(inferencia.__file__).parent.parent)

KEY = "sk-serving-user-5d1c7e9f02"
OTHER = "sk-serving-other-88b1c3d5e7"

# As ``python -m inferencia``, but for the ports that are looked at, and how often files
# are.
MAIN = """
import gc, json, sys
gc.disable()
from inferencia import discovery, serving
discovery.PORTS = {int(p): t for p, t in json.loads(sys.argv.pop(1)).items()}
serving._FILES_POLL_SECONDS = 0.1
from inferencia.__main__ import main
sys.exit(main())
"""

Ports = Mapping[int, str]


def environment(folder: Path, **further: str) -> dict[str, str]:
    """What a process sees of this machine: programs, a home of its own, our code."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    kept = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": CODE}
    return kept | further


def state_of(folder: Path) -> Path:
    return folder / "home" / ".local" / "state" / "inferencia"


@dataclass(eq=False)
class Daemon:
    """A running ``inferencia`` and what it has printed so far."""

    process: asyncio.subprocess.Process
    out: str = ""
    err: str = ""
    client: aiohttp.ClientSession = field(init=False)
    key: str = KEY
    _more: asyncio.Event = field(default_factory=asyncio.Event)
    _readers: list[asyncio.Task[None]] = field(default_factory=list)

    def read(self) -> None:
        for name in ("out", "err"):
            stream = getattr(self.process, f"std{name}")
            if stream is not None:
                self._readers.append(asyncio.create_task(self._read(stream, name)))

    async def _read(self, stream: asyncio.StreamReader, name: str) -> None:
        while line := await stream.readline():
            setattr(self, name, getattr(self, name) + line.decode())
            self._more.set()
        self._more.set()

    async def says(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until it has printed this, and how often."""
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    found = [*re.finditer(pattern, self.out + self.err)]
                    if len(found) >= times:
                        return found[-1]
                    if all(reader.done() for reader in self._readers):
                        raise AssertionError(f"it ended: {self.out}{self.err}")
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            text = f"{pattern!r} was not said:\n{self.out}{self.err}"
            raise AssertionError(text) from None

    @property
    def url(self) -> str:
        found = re.search(r"listens on (http://[^\s\"]+)", self.err)
        assert found, self.err
        return found[1]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """The exit code; waited for."""
        async with asyncio.timeout(PATIENCE):
            code = await self.process.wait()
            await asyncio.gather(*self._readers)
        return code

    def post(self, body: Any, key: str | None = None, **further: Any) -> Any:
        headers = further.pop("headers", {})
        headers = {"Authorization": f"Bearer {key or self.key}"} | headers
        return self.client.post(self.url + CHAT, json=body, headers=headers, **further)

    def get(self, path: str, key: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return self.client.get(self.url + path, headers=headers)

    async def chat(self, model: str = "m", key: str | None = None) -> int:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        async with self.post(body, key) as answer:
            await answer.read()
            status: int = answer.status
            return status

    async def models(self, key: str | None = None) -> list[str]:
        async with self.get("/v1/models", key) as answer:
            assert answer.status == 200, await answer.text()
            return [entry["id"] for entry in (await answer.json())["data"]]

    async def lists(self, models: list[str]) -> None:
        """Wait until these are its models."""
        async with asyncio.timeout(PATIENCE):
            while await self.models() != models:  # noqa: ASYNC110 -- in another process
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def starting(
    folder: Path,
    *arguments: str,
    ports: Ports | None = None,
    env: Mapping[str, str] | None = None,
    stdout: int = asyncio.subprocess.PIPE,
    before: Sequence[str] = (),
) -> AsyncIterator[Daemon]:
    """A daemon of which nothing is known yet; ended with the block."""
    process = await asyncio.create_subprocess_exec(
        *(*before, sys.executable, "-c", MAIN, json.dumps(ports or {}), *arguments),
        cwd=folder,
        env=environment(folder, **(env or {})),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )
    daemon = Daemon(process)
    daemon.read()
    try:
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(PATIENCE)
        ) as daemon.client:
            yield daemon
    finally:
        if process.returncode is None:
            process.kill()
        await daemon.ended()


@contextlib.asynccontextmanager
async def running(
    folder: Path, *arguments: str, **options: Any
) -> AsyncIterator[Daemon]:
    """A daemon that listens."""
    async with starting(folder, *arguments, **options) as daemon:
        await daemon.says("listens on")
        yield daemon


async def result(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command that ends by itself."""
    async with starting(folder, *arguments, env=env) as daemon:
        return await daemon.ended(), daemon.out, daemon.err


def write_config(folder: Path, *engines: FakeEngine, **parts: Any) -> Path:
    """A configuration with its keys file, of which only ``KEY`` opens."""
    backends = [
        {"name": f"b{number}", "type": "openai", "url": engine.url}
        for number, engine in enumerate(engines)
    ]
    keys = folder / "keys.txt"
    if not keys.exists():
        keys.touch(mode=0o600)
        keys.write_text(f"{KEY} name=alice\n")
    path = folder / "config.yaml"
    server = {"port": 0} | parts.pop("server", {})
    text = json.dumps({"server": server, "backends": backends} | parts)
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)
    return path


STREAM = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}


SWAP = """\
models:
  one: {{cmd: "{exe} --port ${{PORT}} --model one", aliases: [uno]}}
  two: {{cmd: "{exe} --port ${{PORT}} --model two"}}
"""


# --- commands in this process ----------------------------------------------------


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @classmethod
    def of(cls, capsys: pytest.CaptureFixture[str], *arguments: str) -> Self:
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        said = capsys.readouterr()
        return cls(code, said.out, said.err)

    @property
    def line(self) -> str:
        """What it says is wrong: one line."""
        (line,) = self.err.splitlines()
        assert line.startswith("inferencia: "), line
        return line
