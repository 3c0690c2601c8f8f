"""A client that sends exactly the bytes that a test wants, however wrong they are."""

import asyncio
import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from gateway import CHAT, PATIENCE, USER, Gateway

CHAT_BODY = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'

Headers = Iterable[tuple[str, str | bytes]]


def bearer(key: str | bytes) -> tuple[tuple[str, bytes], ...]:
    """The usual header for a key."""
    return (("Authorization", b"Bearer " + _bytes(key)),)


def request(
    path: str = CHAT,
    body: bytes = CHAT_BODY,
    *,
    method: str = "POST",
    key: str | bytes | None = USER,
    headers: Headers = (),
    length: int | None = None,
    host: str = "127.0.0.1",
    version: str = "1.1",
) -> bytes:
    """A request as bytes.

    Args:
        path: the target as it stands in the request line.
        body: what is sent; a GET has none unless ``length`` is given.
        method: any word.
        key: goes into a Bearer header.
        headers: further ones, in this order; they may repeat.
        length: the announced length, if not that of ``body``; below zero: none.
        host: the Host header.
        version: of HTTP.
    """
    if method in ("GET", "HEAD") and length is None:
        body, length = b"", -1
    lines = [f"{method} {path} HTTP/{version}".encode(), f"Host: {host}".encode()]
    for name, value in (*(bearer(key) if key else ()), *headers):
        lines.append(name.encode() + b": " + _bytes(value))
    if length is None:
        length = len(body)
    if length >= 0:
        lines.append(f"Content-Length: {length}".encode())
    return b"\r\n".join([*lines, b"", body])


def chunked(*pieces: bytes, ends: bool = True) -> bytes:
    """A body in chunks."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return body + (b"0\r\n\r\n" if ends else b"")


CHUNKED = (("Transfer-Encoding", "chunked"),)


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, read to the end that its framing says."""

    version: str
    status: int
    headers: tuple[tuple[str, str], ...]  # names in lower case
    body: bytes

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key == name.lower()]
        assert len(found) < 2, f"{name} is there {len(found)} times"
        return found[0] if found else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which must have the shape that was promised."""
        assert self.header("content-type") == "application/json", self
        error = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"], error
        assert isinstance(error["message"], str)
        assert error["message"]
        return dict(error)


class Wire:
    """One connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def reply(self, *, to_head: bool = False) -> Reply:
        """The next answer; those with status 100 count."""
        async with asyncio.timeout(PATIENCE):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
            version, status, _ = first.split(" ", 2)
            headers = []
            for line in lines:
                name, _, value = line.partition(":")
                headers.append((name.lower(), value.strip()))
            code = int(status)
            bare = to_head or code in (100, 204, 304)
            body = b"" if bare else await self._body(dict(headers))
            return Reply(version, code, tuple(headers), body)

    async def _body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") != "chunked":
            return await self.reader.read()
        pieces = []
        while size := int(await self.reader.readline(), 16):
            pieces.append((await self.reader.readexactly(size + 2))[:-2])
        assert await self.reader.readline() == b"\r\n"
        return b"".join(pieces)

    async def rest(self) -> bytes:
        """What still comes until the gateway closes; a reset is an end, too."""
        pieces = []
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE):
                while piece := await self.reader.read(65536):
                    pieces.append(piece)
        return b"".join(pieces)

    def stop_reading(self) -> None:
        """Take no more bytes, as a client that hangs."""
        # (uvloop's transports are none by inheritance.)
        cast(asyncio.Transport, self.writer.transport).pause_reading()

    def close(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(gateway: Gateway) -> Any:
    """A connection that is closed in the end."""
    wire = Wire(*await gateway.connect())
    try:
        yield wire
    finally:
        wire.close()


async def ask(gateway: Gateway, data: bytes, *, to_head: bool = False) -> Reply:
    """Send bytes on a connection of their own and read one answer."""
    async with connected(gateway) as wire:
        await wire.send(data)
        reply: Reply = await wire.reply(to_head=to_head)
        return reply


def with_server(config: str, **server: Any) -> str:
    """A configuration of ``gateway.behind`` with these keys under ``server``."""
    return json.dumps(json.loads(config) | {"server": server})
