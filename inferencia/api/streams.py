"""Answers that are written piece by piece by a handler of our own."""

import asyncio
from collections import deque
from collections.abc import Iterable

from aiohttp import web

from inferencia.context import CONTEXT
from inferencia.upstream.answer import Answer, UpstreamError

# Of an upstream answer that its client does not take yet; above it the engine waits.
_MAX_HELD_BYTES = 256 * 1024


async def begin(
    request: web.Request,
    headers: Iterable[tuple[str, str]],
    *,
    status: int = 200,
    length: int | None = None,
) -> web.StreamResponse:
    """Write the head of an answer.

    Args:
        request: what is answered; its own headers (id, date) are added.
        headers: the answer's.
        status: the answer's.
        length: of its body, in bytes; None if that is not known.
    """
    response = web.StreamResponse(status=status)
    for name, value in headers:
        response.headers.add(name, value)
    for name, value in request[CONTEXT].headers:
        response.headers[name] = value
    if length is not None:
        response.content_length = length
    await response.prepare(request)
    request[CONTEXT].measurement.status = status
    return response


class Pieces:
    """The body of an upstream answer, for ``async for``; a sink of the answer.

    The answer is cancelled by whoever has it. Leaving the loop early leaves it alone.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._held: deque[bytes] = deque()
        self._bytes = 0
        self._is_paused = False
        self._is_over = False
        self._error: UpstreamError | None = None
        self._has_news = asyncio.Event()
        answer.attach(self)

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> bytes:
        while not self._held:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._has_news.clear()
            await self._has_news.wait()
        data = b"".join(self._held)
        self._held.clear()
        self._bytes = 0
        if self._is_paused:
            self._is_paused = False
            self._answer.resume()
        return data

    # What the answer calls; see ``upstream.Sink``.

    def data(self, data: bytes) -> None:
        self._held.append(data)
        self._bytes += len(data)
        if self._bytes > _MAX_HELD_BYTES and not self._is_paused:
            self._is_paused = True
            self._answer.pause()
        self._has_news.set()

    def end(self) -> None:
        self._is_over = True
        self._has_news.set()

    def failed(self, error: UpstreamError) -> None:
        self._error = error
        self._has_news.set()
