"""Where clients are told that there is no room for them.

A connection above ``server.max_connections`` would best be told so in words: one that
is only reset leaves its owner to guess. But whoever opens thousands must not keep us
busy with explanations. So a few are told, ``MAX_STANDING`` at a time and
``MAX_A_SECOND`` at most, and all others are reset.

Nothing of a request is read but that it has begun: an answer before it would meet
clients that do not expect one. Then the answer is written, our side is closed, and a
little of what still comes is thrown away, since closing with bytes unread would reset
the connection and lose the answer on its way.
"""

import asyncio
from collections.abc import Callable

from inferencia.limits import TokenBucket

# Each holds a file descriptor for as long as ``STANDING_SECONDS``.
MAX_STANDING = 16
# A person or a program that tries again is always told; a flood is mostly not.
MAX_A_SECOND = 20
# To begin a request in, and to take the answer.
STANDING_SECONDS = 1.0
# How much of a request is thrown away; the rest stays in the kernel.
_LINGER_BYTES = 64 * 1024


class Doorstep:
    """Those who are being told."""

    def __init__(self, answer: Callable[[], bytes]) -> None:
        """Nobody stands there yet.

        Args:
            answer: makes a whole HTTP/1.1 answer that says it.
        """
        self.answer = answer
        self.standing: set[_Standing] = set()
        self._bucket = TokenBucket(MAX_A_SECOND, MAX_A_SECOND, MAX_A_SECOND, 0.0)

    def take(self, wire: asyncio.Transport) -> bool:
        """Tell the client of a fresh connection, and close it.

        Returns:
            Whether it is done; False: there have been too many, and nothing was done.
        """
        loop = asyncio.get_running_loop()
        if len(self.standing) >= MAX_STANDING or self._bucket.take(1, loop.time()):
            return False
        one = _Standing(self, wire)
        self.standing.add(one)
        wire.set_protocol(one)
        return True


class _Standing(asyncio.Protocol):
    """One client on the doorstep."""

    def __init__(self, doorstep: Doorstep, wire: asyncio.Transport) -> None:
        self._doorstep = doorstep
        self._wire = wire
        self._left = _LINGER_BYTES  # may still come
        self._is_told = False
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STANDING_SECONDS, wire.abort)

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left <= 0:
            self._wire.pause_reading()
        if self._is_told:
            return
        self._is_told = True
        self._wire.write(self._doorstep.answer())
        if self._wire.can_write_eof():
            self._wire.write_eof()
        else:
            self._wire.close()  # TLS cannot close one side only

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._doorstep.standing.discard(self)
