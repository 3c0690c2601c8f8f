"""What is done together when a turn of the event loop ends: writing, mostly.

A process that waits for bytes is woken by the first that come. If they come one by one
while it sleeps again in between, each has to wake it, and waking costs the sender more
than sending: on a virtual machine with 32 requests in flight some 8 us of 150 for the
engine, and as much for the client. What one turn of the loop has to say is therefore
said at its end, all at once. uvloop does so by itself; asyncio writes at once.

What has to be noted before anything is said (``usage``) is noted first, together as
well: the same few lines for ten requests cost a third of what they cost ten times in
between other work. Who writes without waiting for the end calls ``hurry`` before.

Nothing is delayed by more than the rest of the turn.
"""

import asyncio
import logging
from collections.abc import Callable
from weakref import WeakKeyDictionary

log = logging.getLogger(__name__)


class EndOfTurn:
    """Calls that wait for the end of the present turn of an event loop."""

    __slots__ = ("_calls", "_first_calls", "_is_due")

    def __init__(self) -> None:
        """Use ``of``, so that all who work on a loop have the same."""
        self._calls: list[Callable[[], None]] = []
        self._first_calls: list[Callable[[], None]] = []
        self._is_due = False

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> "EndOfTurn":
        """The one of this loop."""
        found = _OF_LOOPS.get(loop)
        if found is None:
            found = _OF_LOOPS[loop] = EndOfTurn()
        return found

    def call(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Make this call when the turn is over, in the order of asking."""
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._make_calls)
        self._calls.append(call)

    def call_first(
        self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]
    ) -> None:
        """Make this call when the turn is over, before those of ``call``."""
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._make_calls)
        self._first_calls.append(call)

    def hurry(self) -> None:
        """Make the calls of ``call_first`` now."""
        while self._first_calls:
            calls, self._first_calls = self._first_calls, []
            for call in calls:
                _make(call)

    def _make_calls(self) -> None:
        self._is_due = False
        calls, self._calls = self._calls, []
        self.hurry()
        for call in calls:
            _make(call)
            if self._first_calls:
                self.hurry()


_OF_LOOPS: "WeakKeyDictionary[asyncio.AbstractEventLoop, EndOfTurn]" = (
    WeakKeyDictionary()
)


def _make(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:  # the others wait for theirs
        log.exception("a call at the end of a turn of the loop failed by our own fault")
