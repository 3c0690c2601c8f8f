"""A whole gateway in the test's own event loop, and an engine that does as it is told.

Both speak over real sockets on 127.0.0.1. ``running`` gives a gateway in front of the
backends of a configuration text; ``FakeEngine`` is a server whose answers a test writes
byte by byte, and which notices when the gateway hangs up.
"""

import asyncio
import contextlib
import io
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from inferencia.app import Parts, make_parts
from inferencia.config import load
from inferencia.keys import KeyRing
from inferencia.logs import Output
from inferencia.middleware import Anonymous
from inferencia.overlay import Flags
from scripted import Received, Server, listed, read_request, response

USER = "sk-test-user-1f5b7c3a9e"
ADMIN = "sk-test-admin-77b0d2c4e8"
METRICS = "sk-test-metrics-0a9d8c7b6f"
KEYS = f"""
{USER} name=alice
{ADMIN} name=root role=admin
{METRICS} name=prom role=metrics
"""

CHAT = "/v1/chat/completions"
# Longer than anything here takes; a test that waits for so long has failed.
PATIENCE = 10.0

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    """``data`` as one chunk of HTTP/1.1."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def event(content: str | None = None, **further: Any) -> bytes:
    """One event of a chat stream."""
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": None} | further
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


FINISH = event(None, finish_reason="stop")
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


@dataclass(eq=False)
class Exchange:
    """One request at the fake engine, and the way back."""

    request: Received
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the gateway hung up

    @property
    def json(self) -> Any:
        return json.loads(self.request.body)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes | dict[str, Any], status: int = 200) -> None:
        await self.write(response(body, status=status))

    def cut(self) -> None:
        """End the connection with a reset."""
        self.writer.transport.abort()


Behaviour = Callable[[Exchange], Awaitable[None]]


async def chats(exchange: Exchange) -> None:
    """Answer a chat as an engine does: a word, a finish, the usage."""
    if exchange.json.get("stream"):
        usage = USAGE if "stream_options" in exchange.json else b""
        stream = event("hi") + FINISH + usage + DONE
        await exchange.write(SSE_HEAD + chunk(stream) + LAST_CHUNK)
    else:
        message = {"role": "assistant", "content": "hi"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        counted = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        await exchange.answer({"choices": [choice], "usage": counted})


@dataclass(eq=False)
class Slow:
    """A stream that goes on until it is let go."""

    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("one")))
        gone = asyncio.ensure_future(exchange.gone.wait())
        let_go = asyncio.ensure_future(self.go_on.wait())
        await asyncio.wait((gone, let_go), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        let_go.cancel()
        await exchange.write(chunk(event("two") + FINISH + DONE) + LAST_CHUNK)


class FakeEngine(Server):
    """Lists its models; everything else is up to ``behave``."""

    def __init__(self, *models: str, behave: Behaviour = chats) -> None:
        super().__init__()
        self.models = models or ("m",)
        self.behave = behave
        self.exchanges: list[Exchange] = []
        self.asked: asyncio.Queue[Exchange] = asyncio.Queue()

    async def next(self) -> Exchange:
        """The next request that is no model list."""
        async with asyncio.timeout(PATIENCE):
            return await self.asked.get()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        received = await read_request(reader)
        if received.method == "GET" and received.target == "/v1/models":
            writer.write(response(listed(*self.models)))
            await writer.drain()
            return
        exchange = Exchange(received, writer)
        self.exchanges.append(exchange)
        self.asked.put_nowait(exchange)
        watch = asyncio.ensure_future(_until_gone(reader, exchange))
        try:
            await self.behave(exchange)
        finally:
            writer.close()
            if not exchange.gone.is_set():
                watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)


async def _until_gone(reader: asyncio.StreamReader, exchange: Exchange) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read()
    exchange.gone.set()


@dataclass(slots=True)
class Front:
    """A daemon that runs in this process, and a client of it."""

    parts: Parts
    port: int
    client: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Any, key: str | None = USER, **further: Any) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(
            self.url + path,
            data=io.BytesIO(data),
            headers=_headers(key, further),
            **further,
        )

    def get(self, path: str, key: str | None = USER, **further: Any) -> Any:
        return self.client.get(
            self.url + path, headers=_headers(key, further), **further
        )

    def chat(self, stream: bool = False, **further: Any) -> Any:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "m", "messages": messages, "stream": stream} | further
        return self.post(CHAT, body)


@dataclass(slots=True)
class Gateway(Front):
    """A gateway, and what it has logged."""

    log: "LogLines"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def raw(self, data: bytes) -> bytes:
        """Send bytes and read until the gateway closes."""
        reader, writer = await self.connect()
        try:
            writer.write(data)
            async with asyncio.timeout(PATIENCE):
                return await reader.read()
        finally:
            writer.close()


def _headers(key: str | None, further: dict[str, Any]) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return headers | dict(further.pop("headers", {}))


class LogLines:
    """Everything that was logged, decoded."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["msg"] == "request"]


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    config: str,
    *,
    keys: str = KEYS,
    anonymous: Anonymous | None = None,
    waits: bool = True,
) -> AsyncIterator[Gateway]:
    """A gateway with this configuration, listening on a free port.

    Args:
        folder: where its files go.
        config: YAML; ``server.port`` and ``auth`` need not be given.
        keys: the keys file's text.
        anonymous: the terms of ``--no-api-key``.
        waits: until each backend was asked for its models once.
    """
    from inferencia import logs

    (folder / "keys.txt").write_text(keys)
    (folder / "keys.txt").chmod(0o600)
    (folder / "config.yaml").write_text(config)
    loaded = load(folder / "config.yaml", {}, Flags())
    ring = KeyRing(loaded.config.auth.keys_file)
    log = LogLines()
    output: Output = logs.setup("debug", "json", log)  # type: ignore[arg-type]
    env = {"PATH": os.environ["PATH"], "INFERENCIA_STATE": str(folder / "state")}
    parts = make_parts(loaded.config, ring, anonymous, env)
    try:
        if loaded.config.models_dir or loaded.config.swap_config is not None:
            await parts.local.configure(loaded.config, folder)
        await parts.listener.start(parts.shortcuts)
        parts.catalogue.start()
        if waits:
            await parts.catalogue.refresh()
        _, port = await parts.listener.open("127.0.0.1", 0)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(PATIENCE)
        ) as client:
            yield Gateway(parts, port, client, log)
    finally:
        await parts.listener.close()
        await parts.catalogue.aclose()
        await parts.local.aclose()
        logs.close()
        logging.getLogger().removeHandler(output)


def behind(*engines: FakeEngine, **options: Any) -> str:
    """A configuration with these engines as backends b0, b1, ..."""
    backends = [
        {"name": f"b{number}", "type": "openai", "url": engine.url} | options
        for number, engine in enumerate(engines)
    ]
    limits = {"requests_per_second": 10000, "burst": 10000}
    return json.dumps({"backends": backends, "ratelimit": limits}) + "\n"


async def error_of(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The error object of an answer, which must have exactly its four members."""
    body = await answer.json()
    error: dict[str, Any] = body["error"]
    assert set(error) >= {"message", "type", "param", "code"}, error
    return error


async def eventually(is_so: Callable[[], bool], what: str) -> None:
    """Wait until something holds."""
    for _ in range(int(PATIENCE / 0.005)):
        if is_so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"it never came true that {what}")
