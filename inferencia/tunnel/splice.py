"""Two connections of which each writes what the other receives.

A ``Side`` is the protocol of one of them. While it cannot write, the other one is not
read; so whoever is slow slows the other end down, and nothing is gathered here.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import cast

from inferencia.downstream.connection import taken_bytes

log = logging.getLogger(__name__)

# What a side may hold unsent before the other is not read any more.
_HIGH_WATER_BYTES = 256 * 1024
_LOW_WATER_BYTES = 64 * 1024
# What is taken from the kernel at a time; see upstream/connection.py.
READ_BYTES = 64 * 1024


class Side(asyncio.Protocol):
    """One of two connections: what it receives, the other one writes."""

    __slots__ = (
        "_is_lost",
        "_on_end",
        "_standing",
        "_unsent",
        "bytes_in",
        "is_full",
        "moved",
        "other",
        "wire",
    )

    other: "Side"

    def __init__(self, on_end: Callable[["Side"], None]) -> None:
        """Make a side without a connection.

        Args:
            on_end: called once, when nothing more comes from here.
        """
        self.wire: asyncio.Transport | None = None  # from ``connection_made`` on
        self.is_full = False  # more is unsent than should be
        self.bytes_in = 0
        self.moved = asyncio.get_running_loop().time()  # when bytes last came or went
        self._on_end = on_end
        self._unsent: list[bytes] = []  # what came before there was a connection
        self._standing = (0, 0)  # unsent and taken bytes, when they were last looked at
        self._is_lost = False

    def is_stuck(self, now: float) -> bool:
        """Whether bytes wait for the peer to take them; notes if it has taken some.

        Args:
            now: ``loop.time()``.
        """
        if self.wire is None or not (unsent := self.wire.get_write_buffer_size()):
            return False
        standing = (unsent, taken_bytes(self.wire))
        if standing != self._standing:
            self.moved = now
        self._standing = standing
        return True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = cast(asyncio.Transport, transport)
        with contextlib.suppress(AttributeError):  # uvloop has a buffer of its own
            self.wire.max_size = READ_BYTES  # type: ignore[attr-defined]
        self.wire.set_write_buffer_limits(_HIGH_WATER_BYTES, _LOW_WATER_BYTES)
        unsent, self._unsent = self._unsent, []
        for data in unsent:
            self.write(data)

    def data_received(self, data: bytes) -> None:
        self.bytes_in += len(data)
        self.moved = asyncio.get_running_loop().time()
        self.other.write(data)

    def write(self, data: bytes) -> None:
        if self.wire is None:
            self._unsent.append(data)
        elif not self.wire.is_closing():
            self.wire.write(data)

    def pause_writing(self) -> None:
        self.is_full = True
        self.other.pause_reading()

    def resume_writing(self) -> None:
        self.is_full = False
        self.moved = asyncio.get_running_loop().time()
        self.other.resume_reading()

    def pause_reading(self) -> None:
        if self.wire is not None and not self.wire.is_closing():
            self.wire.pause_reading()

    def resume_reading(self) -> None:
        if self.wire is not None and not self.wire.is_closing():
            self.wire.resume_reading()

    def eof_received(self) -> bool:
        self._end()
        return True  # whoever is told decides when it is closed

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def close(self) -> None:
        """Close it when all is sent."""
        if self.wire is not None:
            self.wire.close()

    def abort(self) -> None:
        """Close it now."""
        if self.wire is not None:
            self.wire.abort()

    def _end(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._on_end(self)


def pair(client: Side, far: Side) -> None:
    """Let each of them write what the other receives."""
    client.other, far.other = far, client


def report(task: "asyncio.Task[None]") -> None:
    """Log why a task failed, which nobody awaits."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("passing TLS on failed by our own fault", exc_info=error)
