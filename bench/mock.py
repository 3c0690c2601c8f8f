"""An engine that costs next to nothing: the upstream of every measurement.

``python -m bench.mock`` listens on a free port of 127.0.0.1, prints the port on one
line and answers until it is told to stop. It reads requests by hand, which is enough
for the well-formed ones of a proxy under test and for nothing else.

    GET  /v1/models   a list with the one model
    POST anything     what the request's order says (see ``wire``)
"""

import argparse
import asyncio
import gc
import json
import signal
import time
from typing import cast

from bench import machine, wire

#: Heads of a bench request are well below 1 KiB; a proxy may add some.
MAX_HEAD_BYTES = 65536

#: Events written before others get their turn, when a stream is not paced.
_BURST = 16

_LIST = json.dumps(
    {
        "object": "list",
        "data": [
            {
                "id": wire.MODEL,
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "bench",
            }
        ],
    }
).encode()


def _whole(status: bytes, body: bytes) -> bytes:
    return (
        b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % (status, len(body))
    ) + body


_MODELS = _whole(b"200 OK", _LIST)
_ANSWER = _whole(b"200 OK", wire.ANSWER)
_NOT_FOUND = _whole(
    b"404 Not Found",
    b'{"error":{"message":"no such path","type":"invalid_request_error"}}',
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_LAST_CHUNK = b"0\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Engine(asyncio.Protocol):
    """One connection; one request at a time, as HTTP/1.1 without pipelining has it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._head = b""  # a request's head until it is complete
        self._path = b""
        self._seen = b""  # the first bytes of the body, where the order stands
        self._missing = 0  # bytes of the body still to come
        self._order = wire.Order()
        self._sent = 0  # events of the running stream
        self._due = 0.0  # when the next one is, on the loop's clock
        self._timer: asyncio.Handle | None = None
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's, but do the same.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._body(data)
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) > MAX_HEAD_BYTES and self._transport is not None:
                self._transport.abort()
            return
        head, rest = self._head[:end].lower(), self._head[end + 4 :]
        self._head = b""
        self._path = head[: head.find(b"\r\n")]
        self._seen = b""
        at = head.find(b"\r\ncontent-length:")
        self._missing = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if self._missing:
            self._body(rest)
        else:
            self._answer()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._timer is None and self._sent < self._order.chunks:
            self._flood()

    def _body(self, data: bytes) -> None:
        """Count a body; only its beginning is kept, so large prompts cost nothing."""
        self._missing -= len(data)
        if len(self._seen) < wire.ORDER_WITHIN:
            self._seen += data[: wire.ORDER_WITHIN]
        if self._missing <= 0:
            self._missing = 0
            self._answer()

    def _answer(self) -> None:
        if self._transport is None:
            return
        if self._path.startswith(b"get "):
            known = self._path.startswith(b"get /v1/models ")
            self._transport.write(_MODELS if known else _NOT_FOUND)
            return
        self._order = order = wire.Order.find(self._seen)
        if not order.chunks:
            self._transport.write(_ANSWER)
            return
        self._sent = 0
        if order.interval_us:
            self._due = self._loop.time()
            self._beat(_STREAM_HEAD)
        else:
            self._transport.write(_STREAM_HEAD)
            self._flood()

    def _beat(self, before: bytes = b"") -> None:
        """Send the next event of a paced stream and set the clock for the one after.

        The due times are absolute: a late event does not delay those behind it.
        """
        self._timer = None
        if self._transport is None:
            return
        self._transport.write(before + self._next())
        if self._is_over():
            return
        self._due += self._order.interval_us / 1e6
        self._timer = self._loop.call_at(self._due, self._beat)

    def _flood(self) -> None:
        """Send events as fast as the other side takes them."""
        self._timer = None
        for _ in range(_BURST):
            if self._paused or self._transport is None:
                return
            self._transport.write(self._next())
            if self._is_over():
                return
        self._timer = self._loop.call_soon(self._flood)

    def _next(self) -> bytes:
        chunk = _chunk(wire.event(self._sent, time.monotonic_ns()))
        self._sent += 1
        return chunk

    def _is_over(self) -> bool:
        """End the stream if it was the last event, properly or as ordered."""
        assert self._transport is not None
        if self._sent == self._order.cut_after:
            self._sent = self._order.chunks
            self._transport.close()
            return True
        if self._sent < self._order.chunks:
            return False
        end = wire.FINISH
        if wire.wants_usage(self._seen):
            end += wire.USAGE % (self._sent, 200 + self._sent)
        self._transport.write(_chunk(end + wire.DONE) + _LAST_CHUNK)
        return True


async def serve(port: int = 0) -> asyncio.Server:
    """Listen on 127.0.0.1; the caller closes the server."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(Engine, "127.0.0.1", port, backlog=4096)


async def _main(port: int, load_seconds: float) -> None:
    await asyncio.sleep(load_seconds)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await serve(port)
    print(server.sockets[0].getsockname()[1], flush=True)
    gc.freeze()
    await stop.wait()
    server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.mock", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--load-seconds", type=float, default=0.0)
    options = parser.parse_args()
    machine.run(_main(options.port, options.load_seconds), fast_loop=True)
