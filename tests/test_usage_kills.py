"""Whatever a client saw finished is written down once, however the daemon ended.

A real daemon is killed (SIGKILL) under load, again and again, each time at another
moment. ``INFERENCIA_KILLS`` says how often; ``.ci/run`` and ``.ci/full`` set it.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from engines.real import free_port
from gateway import CHAT

KILLS = int(os.environ.get("INFERENCIA_KILLS", "1"))

# Requests that are open at each moment; half of them are streams.
_CLIENTS = 8
_KEY = "sk-kills-5d41402abc4b2a76b9719d911017c592"
_PATIENCE = 60.0


@dataclass
class Seen:
    """What the clients know."""

    sent: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)


def write_config(folder: Path) -> Path:
    (folder / "keys.txt").touch(mode=0o600)
    (folder / "keys.txt").write_text(f"{_KEY} name=alice\n")
    config = {
        "auth": {"keys_file": "keys.txt"},
        "ratelimit": {"requests_per_second": 1e6, "burst": 1000000},
        "backends": [{"name": "echo", "type": "echo"}],
        "usage": {"path": "usage.sqlite3"},
        "server": {"shutdown_timeout": 5},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


@contextlib.asynccontextmanager
async def daemon(
    config: Path, port: int, how_it_ends: signal.Signals
) -> AsyncIterator[None]:
    command = [sys.executable, "-m", "inferencia", "-c", str(config)]
    with (config.parent / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, "--port", str(port), stdout=log, stderr=log
        )
    try:
        async with asyncio.timeout(_PATIENCE):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                assert process.returncode is None, (config.parent / "log").read_text()
                await asyncio.sleep(0.01)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how_it_ends)
        async with asyncio.timeout(_PATIENCE):
            await process.wait()


def chat(request_id: str, *, stream: bool) -> bytes:
    body = json.dumps(
        {
            "model": "echo",
            "stream": stream,
            "messages": [{"role": "user", "content": "one two three"}],
        }
    ).encode()
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {_KEY}\r\n"
        f"X-Request-Id: {request_id}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def client(port: int, seen: Seen, *, stream: bool) -> None:
    """Ask again and again, until the daemon is gone."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                request_id = f"kill-{next(seen.numbers)}"
                seen.sent.add(request_id)
                writer.write(chat(request_id, stream=stream))
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 "), head
                if stream:
                    await reader.readuntil(b"data: [DONE]\n\n")
                    seen.finished.add(request_id)
                    await reader.readuntil(b"0\r\n\r\n")
                else:
                    (length,) = (
                        int(line.partition(b":")[2])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length:")
                    )
                    await reader.readexactly(length)
                    seen.finished.add(request_id)
        finally:
            writer.close()


async def test_a_kill_loses_no_request_that_was_seen_to_be_finished(
    tmp_path: Path,
) -> None:
    rng = random.Random(os.environ.get("INFERENCIA_KILLS", ""))
    config = write_config(tmp_path)
    port = free_port()
    seen = Seen()
    for _ in range(KILLS):
        async with asyncio.timeout(_PATIENCE):
            async with daemon(config, port, signal.SIGKILL):
                clients = [
                    asyncio.create_task(client(port, seen, stream=bool(number % 2)))
                    for number in range(_CLIENTS)
                ]
                # Not a wait for something: the moment of the kill is what is tried.
                await asyncio.sleep(rng.uniform(0.02, 0.5))
            await asyncio.gather(*clients)
    async with daemon(config, port, signal.SIGTERM):
        pass
    connection = sqlite3.connect(tmp_path / "usage.sqlite3")
    rows = connection.execute("SELECT id, outcome FROM requests").fetchall()
    (summed,) = connection.execute(
        "SELECT sum(requests) FROM sums WHERE view = 4"
    ).fetchone()
    connection.close()

    times = Counter(request_id for request_id, _ in rows)
    outcomes = dict(rows)
    assert [one for one, count in times.items() if count > 1] == []
    assert seen.finished - outcomes.keys() == set(), "finished and not written down"
    assert {outcomes[one] for one in seen.finished} == {"complete"}
    assert outcomes.keys() <= seen.sent
    assert set(outcomes.values()) <= {"complete", "interrupted"}
    assert summed == len(rows) and len(seen.finished) > KILLS
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".pending")]
