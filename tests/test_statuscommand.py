"""``inferencia status``: what runs now, in a terminal, in a pipe, as JSON."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from administering import Administrator, administering
from engines.real import free_port
from gateway import ADMIN, Exchange, FakeEngine
from inferencia import cli
from inferencia.config import load
from inferencia.overlay import Flags
from inferencia.statuscommand import NoAnswer, Screen, fetch, run, table

STATE: dict[str, Any] = {
    "time": 1000.0,
    "version": "9.9",
    "health": "ready",
    "rates": {"prompt": 812.4, "completion": 42.4},
    "in_flight": 2,
    "waiting": {"total": 1, "models": {}},
    "memory": {"budget": 20_000_000_000, "used": 9_000_000_000},
    "usage": {"degraded": None},
    "host": {
        "name": "attic",
        "cpus": 8,
        "cpu": 0.171,
        "memory_total": 32e9,
        "memory_used": 12e9,
        "gpus": [{"name": "RTX", "use": 0.93}],
    },
    "requests": [
        {
            "key": "alice",
            "model": "evil\x1b[2J\u202emodel",
            "state": "answering",
            "completion_tokens": 380,
            "tokens_per_second": 42.5,
            "began": 990.0,
            "client": "127.0.0.1",
        }
    ],
    "models": [
        {"id": "qwen", "backend": "local", "state": "loading", "listed": True}
        | {"progress": 0.4, "memory": 9e9, "in_flight": 1, "waiting": 2}
        | {"unloads_at": 1300.0, "error": None},
        {"id": "GI_qwen", "backend": "local", "state": "stopped", "listed": False},
        {"id": "far", "backend": "mlx", "state": "remote", "listed": True},
    ],
    "backends": [
        {"name": "mlx", "state": "down", "models": 7, "in_flight": 0, "waiting": 0}
        | {"trouble": "refuses connections"}
    ],
    "agents": [
        {"name": "gpu", "state": "active", "models": ["a"], "streams": 1, "waiting": 0}
        | {"round_trip": 0.031}
    ],
    "downloads": [
        {"model": "a/b", "phase": "loading", "done": 1e9, "size": 5e9, "rate": 3e7}
        | {"seconds_left": 7200.0, "state": "running"}
    ],
}


def test_all_is_on_the_table_and_nothing_moves_the_cursor() -> None:
    lines = table(STATE)
    text = "\n".join(lines)
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith("inferencia 9.9  ·  ready  ·  42 tok/s out, 812 in")
    assert "9 GB of 20 GB" in lines[0]
    assert lines[1] == "attic: 8 processors  ·  17% busy  ·  12 GB of 32 GB memory" + (
        "  ·  RTX 93%"
    )
    rows = [line.split() for line in lines]
    assert ["qwen", "loading", "40%", "9", "GB", "1", "2", "5", "min"] in rows
    assert any("evil\ufffd[2J\ufffdmodel" in line for line in lines)
    assert any(row[:2] == ["mlx", "down"] for row in rows)
    assert any("31 ms" in line for line in lines)
    assert any("2 h" in line and "30 MB/s" in line for line in lines)
    assert "GI_qwen" not in text and "far" not in text


def config_of(admin: Administrator, folder: Path) -> Path:
    """The configuration again, with the port where it really listens."""
    path = folder / "status.yaml"
    text = {"server": {"port": admin.gateway.port}, "auth": {"keys_file": "keys.txt"}}
    path.write_text(json.dumps(text))
    return path


async def status(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = await asyncio.to_thread(cli.main, ["status", *arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


async def test_a_pipe_gets_it_once_as_text_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.gone.wait()

    async with FakeEngine(behave=silent) as engine:
        config = {"backends": [{"name": "b", "type": "openai", "url": engine.url}]}
        async with administering(tmp_path, config) as admin:
            chat = asyncio.create_task(admin.gateway.chat())
            await engine.next()
            path = str(config_of(admin, tmp_path))
            code, out, err = await status(capsys, "-c", path)
            assert (code, err) == (0, "")
            assert "1 in flight" in out and "alice" in out and "\x1b" not in out
            code, out, _ = await status(capsys, "-c", path, "--json")
            assert json.loads(out)["requests"][0]["key"] == "alice"
            chat.cancel()


async def test_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with administering(tmp_path, {"backends": [{"type": "echo"}]}) as admin:
        path = str(config_of(admin, tmp_path))
        (tmp_path / "keys.txt").write_text("sk-user-0123456789abcdef\n")
        code, out, err = await status(capsys, "-c", path)
        assert (code, out) == (1, "") and "--key-file" in err
        key = tmp_path / "key"
        key.write_text(f"{ADMIN}\n")
        code, out, _ = await status(capsys, "-c", path, "--key-file", str(key))
        assert code == 0 and "echo" in out
        nowhere = str(tmp_path / "nowhere")
        code, out, err = await status(capsys, "-c", path, "--key-file", nowhere)
        assert (code, err) == (1, f"inferencia: {nowhere}: No such file or directory\n")
        (tmp_path / "status.yaml").write_text(f"server: {{port: {free_port()}}}")
        code, out, err = await status(capsys, "-c", path)
        assert (code, out) == (1, "") and "no gateway answers" in err


async def test_a_terminal_is_drawn_on_until_the_gateway_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = 0

    def pause(seconds: float) -> None:
        nonlocal drawn
        drawn += 1
        if drawn == 3:
            raise KeyboardInterrupt

    async with administering(tmp_path, {"backends": [{"type": "echo"}]}) as admin:
        loaded = load(config_of(admin, tmp_path), {}, Flags())
        out = io.StringIO()
        screen = Screen(out, is_terminal=True, pause=pause)
        options = cli._parser().parse_args(["status"])
        code = await asyncio.to_thread(run, options, loaded, {}, screen)
        assert (code, drawn) == (0, 3)
        text = out.getvalue()
        assert text.startswith("\x1b[?1049h") and text.endswith("\x1b[?1049l")
        assert text.count("echo") == 3
    with pytest.raises(NoAnswer):
        fetch(loaded, [ADMIN])
