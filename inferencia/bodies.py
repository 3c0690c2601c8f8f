"""Request bodies: read whole, within limits of size, silence and memory.

The key is checked before any of this runs. A body is needed whole, since the model's
name may stand at its end, and since a request may have to be sent a second time.
"""

import asyncio
from dataclasses import dataclass

from aiohttp import HttpVersion11, StreamReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

from inferencia.errors import (
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedEncoding,
)

# What to advise when memory for bodies is short; requests are done within seconds.
_OVERLOADED_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How large a body may be and how slowly it may come."""

    max_bytes: int
    max_total_bytes: int  # all bodies in memory together
    read_timeout: float  # seconds of silence


class Bodies:
    """Reads request bodies and knows how many bytes of them are in memory."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._held = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies that are in memory now."""
        return self._held

    def change_limits(self, limits: BodyLimits) -> None:
        """Let other limits hold from now on."""
        self._limits = limits

    async def read(self, request: web.Request) -> bytes:
        """The whole body, counted as held until it is given to ``release``.

        Raises:
            UnsupportedEncoding: it is compressed.
            RequestTooLarge: it exceeds ``max_body``; nothing more of it is read.
            Overloaded: all bodies together exceed ``max_body_total``.
            RequestTimeout: nothing came for ``read_timeout`` seconds.
            InvalidRequest: its framing is broken.
        """
        refuse_encoding(request)
        announced = request.content_length
        if announced is not None:
            self._check_size(announced)
        reader = request.content
        try:
            if not reader.is_eof():
                return await self._gather(request, announced)
            # Head and body came in one piece: the usual case.
            body = reader.read_nowait(-1) if announced != 0 else b""
        except (HttpProcessingError, RequestPayloadError) as error:
            raise InvalidRequest("the request body is not well-formed HTTP") from error
        self._check_size(len(body))
        self._hold(len(body))
        return body

    def release(self, body: bytes) -> None:
        """Count a body that ``read`` has returned no longer."""
        self._held -= len(body)

    def release_bytes(self, count: int) -> None:
        """The same, for whoever has let go of the body itself already."""
        self._held -= count

    async def _gather(self, request: web.Request, announced: int | None) -> bytes:
        """Put a body together that is still coming.

        What is announced must fit now, but only what has come is held: otherwise four
        clients that announce much and send nothing would keep everybody out.
        """
        # One buffer: a list of single bytes would take fifty times what is counted.
        body = bytearray()
        self._check_room(announced or 0)
        try:
            if hdrs.EXPECT in request.headers:
                await _say_continue(request)
            while piece := await self._next_piece(request.content):
                self._check_size(len(body) + len(piece))
                self._hold(len(piece))
                body += piece
        except BaseException:
            self._held -= len(body)
            raise
        return bytes(body)

    async def _next_piece(self, reader: StreamReader) -> bytes:
        seconds = self._limits.read_timeout
        try:
            async with asyncio.timeout(seconds):
                return await reader.readany()
        except TimeoutError:
            raise RequestTimeout(
                f"no byte of the request body came for {seconds:g} seconds"
            ) from None

    def _hold(self, size: int) -> None:
        self._check_room(size)
        self._held += size

    def _check_room(self, size: int) -> None:
        if self._held + size > self._limits.max_total_bytes:
            raise Overloaded(
                "too many request bodies are being handled; try again shortly",
                retry_after=_OVERLOADED_RETRY_SECONDS,
            )

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            raise RequestTooLarge(
                f"the request body is larger than {self._limits.max_bytes} bytes "
                "(server.max_body)"
            )


def refuse_encoding(request: web.Request) -> None:
    """Refuse a compressed body: a small one could fill the memory."""
    for encoding in request.headers.getall(hdrs.CONTENT_ENCODING, ()):
        if encoding.strip().lower() not in ("", "identity"):
            raise UnsupportedEncoding(
                "Content-Encoding is not supported on requests; send the body as it is"
            )


async def _say_continue(request: web.Request) -> None:
    """Ask for the body of a client that waits to be asked (RFC 9110, 10.1.1)."""
    expects = request.headers[hdrs.EXPECT].strip().lower() == "100-continue"
    if expects and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # aiohttp takes any output for the beginning of the answer.
        request.writer.output_size = 0
