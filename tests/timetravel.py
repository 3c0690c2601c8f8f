"""An event loop whose clock jumps to the next thing to do, so that nobody waits.

Hours pass in milliseconds, always in the same order. A loop in which nothing will ever
happen again, because everybody waits for somebody else, raises ``NothingHappens``
instead of standing still.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class NothingHappens(Exception):
    """All tasks wait, and there is no timer."""


class _Jumping(selectors.SelectSelector):
    """Instead of waiting it lets the time pass."""

    now = 1000.0

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if found:
            return found
        if timeout is None:
            raise NothingHappens
        self.now += max(0.0, timeout)
        return []


class JumpingLoop(asyncio.SelectorEventLoop):
    """The loop; ``time`` is seconds, beginning at 1000."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on such a loop, and end what it left behind."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main)
