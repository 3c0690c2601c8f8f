"""What is done together when a turn of the event loop ends: writing, mostly.

A process that waits for bytes is woken by the first that come. If they come one by one
while it sleeps again in between, each has to wake it, and waking costs the sender more
than sending: on a virtual machine with 32 requests in flight some 8 us of 150 for the
engine, and as much for the client. What one turn of the loop has to say is therefore
said at its end, all at once. uvloop does so by itself; asyncio writes at once.

Nothing is delayed by more than the rest of the turn.
"""

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class EndOfTurn:
    """Calls that wait for the end of the present turn of an event loop."""

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def call(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Make this call when the turn is over, in the order of asking."""
        if not self._calls:
            loop.call_soon(self._make_calls)
        self._calls.append(call)

    def _make_calls(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            try:
                call()
            except Exception:  # the others wait for theirs
                log.exception(
                    "a call at the end of a turn of the loop failed by our own fault"
                )
