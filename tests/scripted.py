"""A small real server for tests: it answers as it is told and records what it is asked.

It speaks raw bytes, so that it can be as wrong as a test wants.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it came over the wire."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]  # names as they were written
    body: bytes

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name]
        return values[0] if values else None


# What a script answers: the raw bytes, after which the connection closes, or None to
# say nothing, ever.
Script = Callable[[Received], bytes | None]


def response(
    body: bytes | dict[str, Any] | list[Any],
    *,
    status: int = 200,
    server: str = "",
    version: str = "1.1",
    length: bool = True,
) -> bytes:
    """A whole answer as bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/{version} {status} Whatever", "Content-Type: application/json"]
    if server:
        lines.append(f"Server: {server}")
    if length:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + content


def listed(*names: str, **further: Any) -> dict[str, Any]:
    """A model list of OpenAI's shape."""
    data = [{"id": name, "object": "model", **further} for name in names]
    return {"object": "list", "data": data}


class Server:
    """A real server on 127.0.0.1; ``async with`` starts and stops it."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; after ``stop``, at the same port again."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection. Calling it again does nothing."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        except asyncio.CancelledError:
            pass  # the server stops
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """What it does with a connection, which is closed behind it."""
        raise NotImplementedError


class Scripted(Server):
    """Answers each request as its script says."""

    def __init__(self, script: Script, *, port: int = 0) -> None:
        super().__init__(port)
        self.script = script
        self.received: list[Received] = []
        self.asked = asyncio.Event()  # set at each request

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        received = await read_request(reader)
        self.received.append(received)
        answer = self.script(received)
        self.asked.set()
        if answer is None:
            await reader.read()  # until the client gives up
            return
        writer.write(answer)
        await writer.drain()


async def read_request(reader: asyncio.StreamReader) -> Received:
    """One request, head and body.

    Raises:
        asyncio.IncompleteReadError: the client has left before its end.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = []
    for line in lines:
        name, _, value = line.partition(":")
        headers.append((name, value.strip()))
    length = next((v for n, v in headers if n.lower() == "content-length"), "0")
    return Received(
        method, target, tuple(headers), await reader.readexactly(int(length))
    )


def always(answer: bytes | None) -> Script:
    """A script that gives one answer to everything."""
    return lambda received: answer
