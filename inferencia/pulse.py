"""The event loop's pulse: notices when it stops, and tells systemd while it beats.

Everything here runs on one event loop, so a single call that does not return stops all
requests at once. Two sides watch for that:

- a timer **in the loop** notes the time at each of its turns, and sends systemd a sign
  of life now and then. When the loop is stuck for good these cease, and systemd starts
  the service again (``WatchdogSec=``);
- a **thread** looks at the noted time. If it is older than a second, the loop is stuck
  right now, and the thread logs where: the places in our own code that the loop's
  thread is in. Only places; nothing of what is being worked on.

Each stall is logged once, and once more with its length when it is over. Code that
keeps Python's global lock stops the thread, too; then only systemd's side works.
"""

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self

log = logging.getLogger(__name__)

# A loop that has not turned for so long is worth a line in the log: a client notices.
STALL_SECONDS = 1.0

# How often the loop's timer goes off, and how often the thread looks at it. Four
# wake-ups a second cost nothing that can be measured (0.02 % of a core).
_TURN_SECONDS = 0.25

MAX_PLACES = 12

_OUR_CODE = Path(__file__).resolve().parent


class Stalls:
    """Decides what is a stall and whether it was told already. Reads no clock."""

    def __init__(self, seconds: float) -> None:
        """Make one for which a loop that has not turned for ``seconds`` is stuck."""
        self._seconds = seconds
        self._looked: float | None = None  # when the thread last had a look
        self._told: float | None = None  # the turn after which a told stall began

    def is_new(self, turned: float, now: float) -> bool:
        """Whether the loop is stuck and that is news.

        Args:
            turned: when the loop last turned.
            now: when the thread looks; both on the same clock.
        """
        looked, self._looked = self._looked, now
        if looked is None or now - looked > self._seconds:
            # The thread itself has not run for as long: the whole process was stopped
            # or starved. What the loop does will be seen at the next look.
            return False
        if now - turned < self._seconds or turned == self._told:
            return False
        self._told = turned
        return True


class Pulse:
    """Watches the event loop in which it is entered, until it is left."""

    def __init__(
        self,
        *,
        beat: Callable[[], None] | None = None,
        beat_seconds: float = 0.0,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        """Make one; nothing runs yet.

        Args:
            beat: the sign of life, called from the loop while it turns.
            beat_seconds: how often, half of what systemd waits for it; 0: never.
            stall_seconds: after which a loop that does not turn is told to the log.
        """
        self.stalls = 0  # so far
        self._beat = beat if beat_seconds > 0 else None
        self._beat_seconds = beat_seconds
        self._stall_seconds = stall_seconds
        self._turn_seconds = min(_TURN_SECONDS, stall_seconds / 4)
        if self._beat is not None:
            self._turn_seconds = min(self._turn_seconds, beat_seconds / 2)
        # Written by the loop, read by the thread; a float is never seen half written.
        self._turned = 0.0  # on time.monotonic, as are all times here
        self._beaten = 0.0  # when the last sign of life was due
        self._stalled_since: float | None = None  # written by the thread
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._turned = self._beaten = time.monotonic()
        if self._beat is not None:
            self._beat()
        self._timer = loop.call_later(self._turn_seconds, self._turn, loop)
        # A daemon: if the log itself is what is stuck, the process can still end.
        self._thread = threading.Thread(
            target=self._watch, args=(threading.get_ident(),), name="pulse", daemon=True
        )
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop watching. The thread is gone within a look of its own."""
        self._is_over.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.join(self._stall_seconds)

    # --- in the loop -------------------------------------------------------------

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        self._turned = now
        self._timer = loop.call_later(self._turn_seconds, self._turn, loop)
        if self._beat is not None and now - self._beaten >= self._beat_seconds:
            self._beaten = now
            self._beat()
        if (since := self._stalled_since) is not None:
            self._stalled_since = None
            log.warning("the event loop turns again, after %.1f s", now - since)

    # --- in the thread -----------------------------------------------------------

    def _watch(self, loop_thread: int) -> None:
        stalls = Stalls(self._stall_seconds)
        while not self._is_over.wait(self._turn_seconds):
            turned = self._turned
            if not stalls.is_new(turned, time.monotonic()):
                continue
            frame = sys._current_frames().get(loop_thread)
            if turned != self._turned:
                continue  # it went on just now; this would show the wrong place
            self.stalls += 1
            self._stalled_since = turned
            self._tell(time.monotonic() - turned, frame)

    def _tell(self, seconds: float, frame: FrameType | None) -> None:
        log.warning(
            "the event loop has been stuck for more than %g s; all requests wait",
            self._stall_seconds,
            extra={
                "seconds": round(seconds, 1),
                "in": innermost(frame),
                "at": " < ".join(places(frame)),
            },
        )


def places(frame: FrameType | None) -> list[str]:
    """The places in our own code on a thread's stack, innermost first."""
    found: list[str] = []
    while frame is not None and len(found) < MAX_PLACES:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_OUR_CODE):
            found.append(f"{path.relative_to(_OUR_CODE)}:{frame.f_lineno}")
        frame = frame.f_back
    return found


def innermost(frame: FrameType | None) -> str:
    """The function that runs, by its module's name: often not one of ours."""
    if frame is None:
        return ""
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}"
