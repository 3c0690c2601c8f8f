"""The program as people start it: real processes in environments that hold nothing.

A process looks for servers at the ports that its test names, so that what runs on the
machine of whoever tests does not matter; all else is as ``python -m inferencia``.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

import inferencia
from engines.real import free_port, is_free
from gateway import (
    CHAT,
    DONE,
    FINISH,
    PATIENCE,
    Exchange,
    FakeEngine,
    Slow,
    event,
)
from inferencia import cli, logs
from localengine import llama_server, models
from scripted import Scripted, always, listed, response

FIXTURES = Path(__file__).parent / "fixtures"
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


# --- with no configuration ---------------------------------------------------------


async def shell(folder: Path, line: str, **further: str) -> str:
    """Standard output of a command line, as a person would run it."""
    done = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", line),
        env=environment(folder, **further),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await done.communicate()
    assert done.returncode == 0, err
    return out.decode()


async def test_a_first_start_prints_all_that_is_needed_and_its_line_works_twice(
    tmp_path: Path,
) -> None:
    port = free_port()
    async with running(tmp_path, "--port", str(port)) as daemon:
        greeting = daemon.out
        assert "no config file" in greeting
        assert "http://127.0.0.1" in greeting and f":{port}/v1" in greeting
        assert re.search(r"models\s+echo", greeting)
        state = state_of(tmp_path)
        secrets = []
        for name in ("key", "admin-key"):
            assert str(state / name) in greeting
            assert stat.S_IMODE((state / name).stat().st_mode) == 0o600
            secrets.append((state / name).read_text())
            assert re.fullmatch(r"sk-[A-Za-z0-9_-]{40,}", secrets[-1])
            assert secrets[-1] not in greeting + daemon.err
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert secrets[0] != secrets[1]

        (line,) = re.findall(r"curl -N .*", greeting)
        assert f"$(cat {state / 'key'})" in line
        if shutil.which("curl") is not None:
            streamed = await shell(tmp_path, line)
            words = re.findall(r'"content": ?"([^"]*)"', streamed)
            assert "".join(words) == "Hello!"
            assert '"stop"' in streamed
            assert streamed.endswith("data: [DONE]\n\n")

        user, admin = secrets
        body = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}
        async with daemon.post(body, user) as answer:
            answered = await answer.json()
            assert answered["choices"][0]["message"]["content"] == "one two"
            assert answered["usage"]["completion_tokens"] == 2
        async with daemon.get("/metrics", admin) as answer:
            assert answer.status == 200
        async with daemon.get("/metrics", user) as answer:
            assert answer.status == 403
        assert await daemon.chat("echo", "sk-somebody-elses") == 401

        daemon.signal(signal.SIGINT)
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.err

    (state / "key").chmod(0o644)  # as a restored backup might leave it
    async with running(tmp_path, "serve", "--port", str(port)) as daemon:
        assert (state / "key").read_text() == secrets[0]
        assert stat.S_IMODE((state / "key").stat().st_mode) == 0o600
        assert line in daemon.out
        if shutil.which("curl") is not None:
            assert (await shell(tmp_path, line)).endswith("data: [DONE]\n\n")


async def test_what_runs_on_this_machine_is_served_and_another_inferencia_is_not(
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    off = free_port()
    wants_key = response({"error": {"message": "no"}}, status=401)
    web_page = response(b"<html>hello</html>")
    async with (
        running(other, "--demo", "--port", "0", "--no-api-key") as inferencia,
        FakeEngine("qwen3:8b", "llama3") as engine,
        Scripted(always(wants_key)) as keyed,
        Scripted(always(web_page)) as page,
    ):
        ports = {
            off: "mlx",
            engine.port: "lmstudio",
            inferencia.port: "llamacpp",
            keyed.port: "vllm",
            page.port: "ollama",
        }
        async with running(tmp_path, "--port", "0", ports=ports) as daemon:
            daemon.key = (state_of(tmp_path) / "key").read_text()
            assert await daemon.models() == ["llama3", "qwen3:8b"]
            assert await daemon.chat("qwen3:8b") == 200
            assert re.search(
                rf"found +lmstudio +{re.escape(engine.url)} +2 models", daemon.out
            )
            assert re.search(rf"missing +mlx +nothing on port {off}", daemon.out)
            assert re.search(r"vllm .*wants a key", daemon.out)
            assert str(inferencia.port) not in daemon.out
            assert '"model":"llama3"' in daemon.out


async def test_files_without_a_program_to_run_them_are_mentioned(
    tmp_path: Path,
) -> None:
    (tmp_path / "home").mkdir()
    files = models(tmp_path / "home" / "models", "qwen3")
    env = {"PATH": str(tmp_path)}
    async with running(tmp_path, "--port", "0", ports={}, env=env) as daemon:
        assert f"to run the GGUF files in {files}" in daemon.out


async def test_a_server_that_is_started_later_takes_the_place_of_echo(
    tmp_path: Path,
) -> None:
    late = FakeEngine("late")
    late.port = free_port()
    write_config(tmp_path, watchdog={"interval": "50ms"})
    async with running(tmp_path, ports={late.port: "lmstudio"}) as daemon:
        assert await daemon.models() == ["echo"]
        async with late:
            await daemon.says(f"found lmstudio at {late.url}")
            await daemon.lists(["late"])
            assert await daemon.chat("late") == 200


async def test_8080_taken_means_8088_and_that_is_remembered(tmp_path: Path) -> None:
    if not is_free(8080) or not is_free(8088):
        pytest.skip("something listens on 8080 or 8088")
    taken = await asyncio.start_server(lambda _, w: w.close(), "127.0.0.1", 8080)
    async with taken:
        async with running(tmp_path, "--demo") as daemon:
            assert daemon.port == 8088
            assert "http://127.0.0.1:8088/v1" in daemon.out
        code, out, err = await result(tmp_path, "--demo", "--port", "8080")
        assert (code, out) == (1, "")
        assert "port 8080 is taken" in err and "--port" in err
    async with running(tmp_path, "--demo") as daemon:
        assert daemon.port == 8088
        # Whoever comes second has the other one, instead of nothing.
        async with running(tmp_path, "--demo") as second:
            assert second.port == 8080


async def test_a_taken_port_that_was_asked_for_is_told_with_who_has_it(
    tmp_path: Path,
) -> None:
    async def said_of(port: int) -> str:
        code, _, err = await result(tmp_path, "--demo", "--port", str(port))
        assert code == 1
        (line,) = [li for li in err.splitlines() if li.startswith("inferencia: ")]
        return line

    llama = response(listed("m"), server="llama.cpp")
    async with running(tmp_path, "--demo", "--port", "0") as first:
        line = await said_of(first.port)
        assert f"port {first.port} is taken by another inferencia" in line
    async with Scripted(always(llama)) as engine:
        line = await said_of(engine.port)
        assert "is taken by llama-server (it looks like one of your backends)" in line
        assert "server.port or --port" in line


async def test_the_state_folder_is_where_it_is_wanted_and_keys_there_are_followed(
    alone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = tmp_path / "elsewhere" / "st ate"
    env = {"INFERENCIA_STATE": str(state), "XDG_STATE_HOME": "/nowhere"}
    for name, value in env.items():  # for the commands, which need no process each
        monkeypatch.setenv(name, value)
    async with running(tmp_path, "--demo", "--port", "0", env=env) as daemon:
        assert (state / "key").exists()
        assert not (tmp_path / "home" / ".local").exists()
        if shutil.which("curl") is not None:  # a path with a blank is quoted
            (line,) = re.findall(r"curl -N .*", daemon.out)
            assert "Hello!" in await shell(tmp_path, line)

        add = ("keys", "add", "bob", "--models", "echo", "--expires", "30d")
        added = Ran.of(capsys, *add)
        secret = added.out.removesuffix("\n")
        assert (added.code, secret in added.err) == (0, False)
        assert stat.S_IMODE((state / "keys.txt").stat().st_mode) == 0o600
        assert secret not in (state / "keys.txt").read_text()
        await daemon.says("keys read again")
        assert await daemon.chat("echo", secret) == 200

        table = Ran.of(capsys, "keys", "list")
        assert table.code == 0
        assert "bob" in table.out and secret not in table.out

        rotated = Ran.of(capsys, "keys", "rotate", "bob")
        fresh = rotated.out
        assert rotated.code == 0
        await daemon.says("keys read again", times=2)
        assert await daemon.chat("echo", secret) == 401
        assert await daemon.chat("echo", fresh.strip()) == 200

        assert Ran.of(capsys, "keys", "revoke", "bob").code == 0
        await daemon.says("keys read again", times=3)
        assert await daemon.chat("echo", fresh.strip()) == 401
        assert await daemon.chat("echo", (state / "key").read_text()) == 200
        for text in (daemon.out, daemon.err):
            assert secret not in text and fresh.strip() not in text


async def test_without_a_key_only_this_machine_itself_is_let_in(tmp_path: Path) -> None:
    open_terms = ("--demo", "--no-api-key", "--port", "0")
    async with running(tmp_path, *open_terms) as daemon:
        assert "none needed" in daemon.out
        body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}

        async def status(**headers: str) -> int:
            named = {name.replace("_", "-"): v for name, v in headers.items()}
            async with daemon.client.post(
                daemon.url + CHAT, json=body, headers=named
            ) as answer:
                return answer.status

        assert await status() == 200
        assert await status(Host=f"localhost:{daemon.port}") == 200
        assert await status(Authorization="Bearer unused") == 200
        for refused in (
            {"Host": "evil.example"},
            {"Host": "127.0.0.1.evil.example"},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"X_Forwarded_For": "1.2.3.4"},
            {"X_Forwarded_Host": "x"},
            {"Forwarded": "for=1.2.3.4"},
            {"CF_Connecting_IP": "1.2.3.4"},
            {"Cf_Ray": "1"},
            {"X_Real_IP": "1.2.3.4"},
            {"Via": "1.1 proxy"},
        ):
            assert await status(**refused) == 401, refused
        async with daemon.client.get(daemon.url + "/metrics") as answer:
            assert answer.status == 403  # everybody is user, nobody more


async def test_the_environment_alone_is_enough(tmp_path: Path) -> None:
    async with FakeEngine("m") as engine:
        env = {
            "INFERENCIA_API_KEYS": f"{KEY}, {OTHER}\n",
            "INFERENCIA_BACKEND_URL": f"{engine.url}/v1/",
            "INFERENCIA_HOST": "127.0.0.1",
            "INFERENCIA_PORT": "0",
            "INFERENCIA_LOG_FORMAT": "text",
            "INFERENCIA_RATELIMIT_RPS": "50",
            "INFERENCIA_RATELIMIT_BURST": "77",
        }
        async with running(tmp_path, env=env) as daemon:
            assert await daemon.chat(key=KEY) == 200
            assert await daemon.chat(key=OTHER) == 200
            async with daemon.get("/v1/models") as answer:
                assert answer.headers["X-RateLimit-Limit"] == "77"
            await daemon.says(r"INFO request .*backend=openai")
            assert "curl -N" in daemon.out and "INFERENCIA_KEY" in daemon.out
            assert KEY not in daemon.out + daemon.err
            assert not (state_of(tmp_path) / "key").exists()  # none had to be made
            code, _, err = await result(tmp_path, "keys", "add", "bob", env=env)
            assert code == 0
            assert "INFERENCIA_API_KEYS is set" in err


async def test_nobody_reads_what_is_printed_and_it_serves_all_the_same(
    tmp_path: Path,
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        async with running(tmp_path, "--demo", "--port", "0", stdout=writing) as daemon:
            await daemon.says("standard output is not written")
            key = (state_of(tmp_path) / "key").read_text()
            assert await daemon.chat("echo", key) == 200
            daemon.signal(signal.SIGTERM)
            assert await daemon.ended() == 0
            assert "BrokenPipe" not in daemon.err
    finally:
        os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
async def test_full_disks_behind_output_and_log_change_no_exit_code(
    tmp_path: Path,
) -> None:
    async def started(*arguments: str) -> asyncio.subprocess.Process:
        with Path("/dev/full").open("wb") as full:  # noqa: ASYNC230
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "inferencia",
                *arguments,
                env=environment(tmp_path),
                cwd=tmp_path,
                stdout=full,
                stderr=full,
            )

    port = free_port()
    daemon = await started("serve", "--demo", "--port", str(port))
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except OSError:
                await asyncio.sleep(0.05)
        writer.close()
        daemon.terminate()
        assert await daemon.wait() == 0
        assert await (await started("check")).wait() == 1


async def test_closed_standard_streams_do_not_become_sockets(tmp_path: Path) -> None:
    closing = ("/bin/sh", "-c", 'exec "$@" <&- >&-', "sh")
    demo = ("--demo", "--port", "0")
    async with running(tmp_path, *demo, before=closing) as daemon:
        key = (state_of(tmp_path) / "key").read_text()
        for number in ("0", "1"):
            with contextlib.suppress(FileNotFoundError):  # no such folder on a Mac
                link = f"/proc/{daemon.process.pid}/fd/{number}"
                assert os.readlink(link) == os.devnull
        assert await daemon.chat("echo", key) == 200
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0


# --- the predecessors --------------------------------------------------------------


async def test_go_inferencias_files_serve_as_they_are(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "go-inferencia" / "config.yaml", tmp_path)
    (tmp_path / "keys.txt").write_text(f"# keys\nsk-key1\n{KEY}\n")
    (tmp_path / "keys.txt").chmod(0o600)
    async with FakeEngine("/home/me/models/Qwen3-4B-4bit") as engine:
        env = {"INFERENCIA_BACKEND_URL": engine.url, "INFERENCIA_PORT": "0"}
        async with running(tmp_path, env=env) as daemon:
            assert await daemon.models() == ["Qwen3-4B-4bit"]
            assert await daemon.chat("Qwen3-4B-4bit") == 200
            assert await daemon.chat("Qwen3-4B-4bit", "sk-key1") == 401
            assert '"ERROR"' not in daemon.err


async def test_goinfers_file_serves_once_its_keys_are_set(tmp_path: Path) -> None:
    for name in ("goinfer.yml", "llama-swap.yml"):
        shutil.copy(FIXTURES / "goinfer" / name, tmp_path)
    code, _, err = await result(tmp_path, "-c", "goinfer.yml")
    assert code == 2
    assert "inferencia keys add" in err and "Traceback" not in err

    text = (tmp_path / "goinfer.yml").read_text()
    text = text.replace("PLEASE SET ADMIN API KEY", "a" * 8 + OTHER)
    text = text.replace("PLEASE SET USER API KEY", KEY)
    text = text.replace("/home/me/models", str(models(tmp_path / "models", "m")))
    exe = str(llama_server(tmp_path))
    text = text.replace("/home/me/llama.cpp/build/bin/llama-server", exe)
    (tmp_path / "goinfer.yml").write_text(text)
    arguments = ("-c", "goinfer.yml", "--port", "0")
    async with running(tmp_path, *arguments) as daemon:
        assert await daemon.models() == ["Qwen2.5-1.5B-Instruct-Q4_K_M", "m"]
        assert await daemon.chat("m") == 200
        assert "WARN" in daemon.err and '"ERROR"' not in daemon.err


SWAP = """\
models:
  one: {{cmd: "{exe} --port ${{PORT}} --model one", aliases: [uno]}}
  two: {{cmd: "{exe} --port ${{PORT}} --model two"}}
"""


async def test_a_llama_swap_file_serves_with_keys_that_are_made_for_it(
    tmp_path: Path,
) -> None:
    text = SWAP.format(exe=llama_server(tmp_path))
    (tmp_path / "llama-swap.yml").write_text(text)
    arguments = ("-c", "llama-swap.yml", "--port", "0")
    async with running(tmp_path, *arguments) as daemon:
        key = (state_of(tmp_path) / "key").read_text().strip()
        assert await daemon.models(key) == ["one", "two"]
        assert await daemon.chat("uno", key) == 200
        assert await daemon.chat("two", key) == 200
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0


async def test_the_api_keys_of_a_llama_swap_file_are_user_keys(tmp_path: Path) -> None:
    text = SWAP.format(exe=llama_server(tmp_path)) + f"apiKeys: [{KEY}]\n"
    (tmp_path / "llama-swap.yml").write_text(text)
    arguments = ("-c", "llama-swap.yml", "--port", "0")
    async with running(tmp_path, *arguments) as daemon:
        assert await daemon.chat("one", KEY) == 200
        assert await daemon.chat("one", OTHER) == 401
        assert not (state_of(tmp_path) / "key").exists()


# --- signals -----------------------------------------------------------------------


async def test_at_sigterm_open_requests_finish_and_new_work_is_refused(
    tmp_path: Path,
) -> None:
    slow = Slow()
    async with FakeEngine(behave=slow) as engine:
        write_config(tmp_path, engine)
        async with running(tmp_path) as daemon, daemon.post(STREAM) as answer:
            assert await answer.content.readuntil(b"\n\n") == event("one")
            async with daemon.client.get(daemon.url + "/health/ready") as ready:
                assert (ready.status, (await ready.json())["status"]) == (200, "ready")
            daemon.signal(signal.SIGTERM)
            await daemon.says("SIGTERM: 1 open requests may finish")
            async with daemon.client.get(daemon.url + "/health/ready") as ready:
                assert ready.status == 503
                assert (await ready.json())["status"] == "unavailable"
            async with daemon.client.get(daemon.url + "/health") as alive:
                assert alive.status == 200
            async with daemon.post(STREAM) as refused:
                error = (await refused.json())["error"]
                assert (refused.status, error["code"]) == (503, "shutting_down")
                assert refused.headers["Retry-After"]
                assert refused.headers["Connection"] == "close"
            slow.go_on.set()
            rest = await answer.read()
            assert rest == event("two") + FINISH + DONE
            assert await daemon.ended() == 0


async def test_what_does_not_finish_in_time_is_told_and_idle_connections_hold_nobody(
    tmp_path: Path,
) -> None:
    slow = Slow()

    async def behave(exchange: Exchange) -> None:
        if exchange.json["stream"]:
            await slow(exchange)
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        write_config(tmp_path, engine, server={"shutdown_timeout": "50ms"})
        async with running(tmp_path) as daemon, daemon.post(STREAM) as answer:
            assert await answer.content.readuntil(b"\n\n") == event("one")
            silent = await asyncio.open_connection("127.0.0.1", daemon.port)
            async with daemon.get("/v1/models") as kept:
                await kept.read()  # its connection stays open
            # One that has begun to ask, and one that waits for a whole answer.
            half = await asyncio.open_connection("127.0.0.1", daemon.port)
            half[1].write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
            whole = asyncio.ensure_future(
                daemon.post(STREAM | {"stream": False}).__aenter__()
            )
            await engine.next()
            await engine.next()
            loop = asyncio.get_running_loop()
            began = loop.time()
            daemon.signal(signal.SIGTERM)
            told = (await answer.read()).decode()
            error = json.loads(told.strip().removeprefix("data: "))["error"]
            assert error["code"] == "shutting_down"
            assert "[DONE]" not in told
            refused: aiohttp.ClientResponse = await whole
            assert refused.status == 503
            assert (await refused.json())["error"]["code"] == "shutting_down"
            assert await daemon.ended() == 0
            assert loop.time() - began < 3
            for _, writer in (silent, half):
                writer.close()


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    async with FakeEngine(behave=Slow()) as engine:
        write_config(tmp_path, engine)
        async with running(tmp_path) as daemon, daemon.post(STREAM) as answer:
            await answer.content.readuntil(b"\n\n")
            daemon.signal(signal.SIGTERM)
            await daemon.says("SIGTERM: 1 open")
            daemon.signal(signal.SIGINT)
            assert await daemon.ended() != 0
            assert "at once" in daemon.err
            answer.close()


async def test_a_signal_during_the_start_is_obeyed(tmp_path: Path) -> None:
    async with Scripted(always(None)) as silent:
        engine = FakeEngine()
        engine.port = silent.port
        write_config(tmp_path, engine)
        async with starting(tmp_path) as daemon:
            await asyncio.wait_for(silent.asked.wait(), PATIENCE)
            daemon.signal(signal.SIGHUP)  # is no reason to end
            daemon.signal(signal.SIGTERM)
            assert await daemon.ended() == 0
            assert "listens on" not in daemon.err


async def test_sighup_takes_over_what_is_new_and_cuts_nothing(tmp_path: Path) -> None:
    slow = Slow()
    async with FakeEngine("m", behave=slow) as old, FakeEngine("new") as new:
        write_config(tmp_path, old, server={"max_body": "1KiB"})
        async with running(tmp_path) as daemon, daemon.post(STREAM) as answer:
            assert await answer.content.readuntil(b"\n\n") == event("one")
            assert await daemon.chat("gpt") == 404
            with (tmp_path / "keys.txt").open("a") as keys:
                keys.write(f"{OTHER} name=bob\n")
            routing = {"aliases": {"gpt": "new"}}
            server = {"port": daemon.port + 1, "max_body": "2MiB"}
            write_config(tmp_path, new, routing=routing, server=server)
            daemon.signal(signal.SIGHUP)
            await daemon.says("configuration reloaded")
            await daemon.says(
                "server.port was changed: it takes effect at the next start"
            )
            await daemon.lists(["new"])
            assert await daemon.chat("gpt", OTHER) == 200
            big = {
                "model": "gpt",
                "messages": [{"role": "user", "content": "x" * 5000}],
            }
            async with daemon.post(big) as answered:
                assert answered.status == 200
            slow.go_on.set()  # a stream of the backend that is gone
            assert await answer.read() == event("two") + FINISH + DONE


async def test_a_configuration_may_appear_change_and_vanish(tmp_path: Path) -> None:
    async with FakeEngine("found") as here, FakeEngine("named") as there:
        ports = {here.port: "lmstudio"}
        async with running(tmp_path, "--port", "0", ports=ports) as daemon:

            async def reloaded(times: int) -> None:
                daemon.signal(signal.SIGHUP)
                await daemon.says("configuration reloaded", times)

            first_key = daemon.key = (state_of(tmp_path) / "key").read_text()
            assert await daemon.models() == ["found"]
            write_config(tmp_path, there)
            await reloaded(1)
            assert await daemon.chat("found") == 401
            daemon.key = KEY
            await daemon.lists(["named"])
            write_config(tmp_path, there, routing={"aliases": {"a": "named"}})
            await reloaded(2)
            assert await daemon.chat("a") == 200
            write_config(tmp_path)
            await reloaded(3)
            await daemon.lists(["found"])
            (tmp_path / "config.yaml").unlink()
            await reloaded(4)
            assert await daemon.chat("found", first_key) == 200


async def test_a_broken_configuration_changes_nothing(tmp_path: Path) -> None:
    said = 0
    async with FakeEngine("m") as engine:
        write_config(tmp_path, engine)
        async with running(tmp_path) as daemon:

            async def nothing_changes() -> None:
                nonlocal said
                said += 1
                daemon.signal(signal.SIGHUP)
                await daemon.says("nothing was reloaded", times=said)
                assert await daemon.chat() == 200

            for broken in (
                "server: {prot: 1}\n",
                "backends: [\n",
                "auth: {keys_file: nowhere.txt}\n",
                "backends: [{name: a, url: x}]\n",
            ):
                (tmp_path / "config.yaml").write_text(broken)
                await nothing_changes()
            (tmp_path / "keys.txt").write_text(f"{KEY} name=a\nsk-x rolle=user\n")
            write_config(tmp_path, engine, routing={"default_model": "x"})
            await nothing_changes()


# --- bad usage, bad configuration --------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This very process in an empty environment and folder."""
    for name in tuple(os.environ):
        if name.startswith(("INFERENCIA_", "GI_", "XDG_", "STATE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    # What the tests have in memory is much to look through, and none of its business.
    monkeypatch.setattr(cli, "_tune_collector", lambda: None)
    yield tmp_path
    logs.close()


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


Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("srve",), ('"srve"', "serve")),
        (("--port", "99999"), ("--port", "65535", "99999")),
        (("--port", "http"), ("--port", "http")),
        (("serve", "--prot", "1"), ("--prot",)),
        (("--no-api",), ("--no-api",)),  # nothing is guessed where doors open
        (("keys",), ("COMMAND",)),
        (("keys", "add"), ("NAME",)),
        (("keys", "rename", "x"), ("rename", "rotate")),
        (("check", "it"), ("it",)),
        (("-c",), ("-c", "argument")),
        (("--host", "a b"), ("--host", "127.0.0.1")),
        (("-c", "nope.yaml"), ("nope.yaml", "No such file")),
        (("check", "-c", "nope.yaml"), ("nope.yaml", "No such file")),
        (("--config=nope.yaml", "check"), ("nope.yaml", "No such file")),
        (("-c", "nope.yaml", "keys", "list"), ("nope.yaml", "No such file")),
        (("check", "-c", "."), ("directory",)),
    ],
)
def test_bad_usage_is_told_in_one_line(
    alone: Path, capsys: Capture, arguments: Sequence[str], words: Sequence[str]
) -> None:
    ran = Ran.of(capsys, *arguments)
    assert (ran.code, ran.out) == (2, "")
    for word in words:
        assert word in ran.line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_a_key_it_does_not_listen_for_others(
    alone: Path, capsys: Capture, host: str
) -> None:
    ran = Ran.of(capsys, "--no-api-key", "--host", host)
    assert (ran.code, ran.out) == (2, "")
    assert "--no-api-key" in ran.line and host in ran.line


def test_help_and_version_go_to_standard_output(alone: Path, capsys: Capture) -> None:
    ran = Ran.of(capsys, "--version")
    assert (ran.code, ran.out, ran.err) == (0, f"{inferencia.__version__}\n", "")
    for arguments in (("--help",), ("-h",), ("serve", "--help"), ("keys", "-h")):
        ran = Ran.of(capsys, *arguments)
        assert (ran.code, ran.err) == (0, "")
    whole = Ran.of(capsys, "--help").out
    for word in (*cli._BUILT, "INFERENCIA_CONFIG"):
        assert word in whole
    serve = Ran.of(capsys, "serve", "--help").out
    for option in ("--host", "--port", "--no-api-key", "--demo", "-c"):
        assert option in serve


def test_check_lists_every_error_by_its_path(alone: Path, capsys: Capture) -> None:
    (alone / "config.yaml").write_text(
        "server: {prot: 80}\n"
        "backends:\n"
        "  - {name: a, url: http://x, timeout: thirty}\n"
        "  - {name: a, url: http://y}\n"
    )
    ran = Ran.of(capsys, "check")
    assert (ran.code, ran.out) == (2, "")
    lines = ran.err.splitlines()
    assert len(lines) == 3
    assert any(
        "server.prot: unknown key; did you mean server.port" in li for li in lines
    )
    assert any("backends[0].timeout: expected a duration" in li for li in lines)
    assert any("backends[1].name:" in li for li in lines)
    served = Ran.of(capsys, "serve")
    assert (served.code, served.err) == (2, ran.err)  # check loads what serve would


def test_check_sums_up_without_a_secret(alone: Path, capsys: Capture) -> None:
    (alone / "config.yaml").write_text(
        "server: {api_key: {admin: sk-admin-0123456789abcdef}}\n"
        "backends:\n"
        "  - {name: cloud, url: https://api.example.com, api_key: sk-up-9876543210,"
        " headers: {X-Secret: hidden-value-1}}\n"
        "routing: {aliases: {gpt: qwen}}\n"
        "models_dir: /nowhere\n"
    )
    (alone / "keys.txt").write_text(f"{KEY} name=alice\nsk-key1\n")
    (alone / "keys.txt").chmod(0o644)
    ran = Ran.of(capsys, "check")
    assert (ran.code, ran.err) == (0, "")
    for word in (
        "cloud",
        "api.example.com",
        "gpt -> qwen",
        "2 usable",
        "127.0.0.1:8080",
    ):
        assert word in ran.out
    warnings = [li for li in ran.out.splitlines() if li.startswith("warning: ")]
    for word in ("models_dir", "chmod 600", "placeholder"):
        assert any(word in warning for warning in warnings), warnings
    for secret in ("sk-admin-0123", "sk-up-98", "hidden-value", KEY):
        assert secret not in ran.out


def test_check_without_a_configuration_makes_no_files(
    alone: Path, capsys: Capture
) -> None:
    ran = Ran.of(capsys, "check")
    assert (ran.code, ran.err) == (0, "")
    assert "none; defaults and environment" in ran.out
    assert not state_of(alone).exists()


@pytest.mark.parametrize(
    ("keys", "env", "words"),
    [
        (None, {}, ("keys.txt",)),
        ("", {}, ("keys.txt",)),
        ("sk-key1\nsk-your-key-here\n", {}, ("keys.txt", "placeholder")),
        (f"{KEY} expires=2020-01-01\n", {}, ("keys.txt",)),
        (None, {"INFERENCIA_API_KEYS": "sk-change-me"}, ("INFERENCIA_API_KEYS",)),
    ],
)
def test_without_a_usable_key_it_does_not_start_and_says_how_to_make_one(
    alone: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    keys: str | None,
    env: Mapping[str, str],
    words: Sequence[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    (alone / "config.yaml").write_text("backends: [{url: http://127.0.0.1:1}]\n")
    if keys is not None:
        (alone / "keys.txt").write_text(keys)
        (alone / "keys.txt").chmod(0o600)
    for command in ("serve", "check"):
        ran = Ran.of(capsys, command)
        assert (ran.code, ran.out) == (2, "")
        last = ran.err.splitlines()[-1]
        assert "inferencia keys add" in last
        for word in words:
            assert word in ran.err
        assert KEY not in ran.err


def test_the_remedy_names_the_configuration_that_was_asked_for(
    alone: Path, capsys: Capture
) -> None:
    (alone / "mine.yaml").write_text("backends: [{url: http://127.0.0.1:1}]\n")
    ran = Ran.of(capsys, "-c", "mine.yaml")
    assert "keys.txt, which does not exist; " in ran.line
    assert ran.line.endswith("inferencia keys add NAME -c mine.yaml")
    added = Ran.of(capsys, "keys", "add", "NAME", "-c", "mine.yaml")
    assert added.code == 0
    assert Ran.of(capsys, "check", "-c", "mine.yaml").code == 0


def test_an_admins_key_is_added_before_the_first_start_with_a_llama_swap_file(
    alone: Path, capsys: Capture
) -> None:
    text = SWAP.format(exe="llama-server") + f"apiKeys: [{KEY}]\n"
    (alone / "llama-swap.yml").write_text(text)
    add = ("keys", "add", "me", "--role", "admin", "-c", "llama-swap.yml")
    assert Ran.of(capsys, *add).code == 0
    assert (state_of(alone) / "keys.txt").exists()


@pytest.mark.parametrize(("name", "file"), [("user", "key"), ("admin", "admin-key")])
def test_the_first_keys_are_not_changed_by_command_but_it_is_told_where_they_are(
    alone: Path, capsys: Capture, name: str, file: str
) -> None:
    for command in ("add", "revoke", "rotate"):
        ran = Ran.of(capsys, "keys", command, name)
        assert (ran.code, ran.out) == (2, "")
        assert f'"{name}"' in ran.line and str(state_of(alone) / file) in ran.line
    assert str(state_of(alone) / file) in Ran.of(capsys, "keys", "list").err


def test_a_key_of_the_configuration_is_not_changed_by_command(
    alone: Path, capsys: Capture
) -> None:
    (alone / "config.yaml").write_text(f"server: {{api_key: {{admin: {KEY}}}}}\n")
    ran = Ran.of(capsys, "keys", "add", "admin")
    assert ran.code == 2 and "server.api_key.admin" in ran.line
    assert Ran.of(capsys, "keys", "add", "user").code == 0


def test_keys_set_in_the_environment_are_not_lost_by_those_added_later(
    alone: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCIA_API_KEY_USER", KEY)
    assert Ran.of(capsys, "keys", "add", "bob").code == 0
    ran = Ran.of(capsys, "check")
    assert "keys: 2 usable" in ran.out


@pytest.mark.parametrize("command", [("--demo",), ("keys", "add", "x")])
def test_a_state_folder_that_cannot_be_is_told_with_what_to_do(
    alone: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    command: Sequence[str],
) -> None:
    (alone / "file").write_text("")
    monkeypatch.setenv("INFERENCIA_STATE", str(alone / "file" / "state"))
    ran = Ran.of(capsys, *command)
    assert (ran.code, ran.out) == (1, "")
    assert str(alone / "file") in ran.line


def test_a_user_without_a_home_is_told_what_to_set(
    alone: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    ran = Ran.of(capsys, "--demo")
    assert (ran.code, ran.out) == (1, "")
    assert "INFERENCIA_STATE" in ran.line and "HOME" in ran.line


def test_a_key_file_that_holds_no_key_is_named(alone: Path, capsys: Capture) -> None:
    state = state_of(alone)
    state.mkdir(parents=True)
    (state / "key").write_bytes(b"two words\xff\n")
    ran = Ran.of(capsys, "--demo")
    assert (ran.code, ran.out) == (2, "")
    assert str(state / "key") in ran.line and "remove it" in ran.line


def test_an_address_that_is_not_ours_is_told(alone: Path, capsys: Capture) -> None:
    ran = Ran.of(capsys, "--demo", "--host", "192.0.2.1", "--port", "0")
    assert ran.code == 1
    last = ran.err.splitlines()[-1]
    assert "192.0.2.1" in last and "0.0.0.0" in last and "Traceback" not in ran.err
