"""The life of the program as people start it: from its greeting to its last words."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import stat
import sys
from pathlib import Path

import aiohttp
import pytest

from daemons import (
    KEY,
    OTHER,
    STREAM,
    SWAP,
    Ran,
    environment,
    result,
    running,
    starting,
    state_of,
    write_config,
)
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
from localengine import llama_server, models
from scripted import Scripted, always, listed, response

FIXTURES = Path(__file__).parent / "fixtures"


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
