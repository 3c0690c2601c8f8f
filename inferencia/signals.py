"""What the outside asks of the process by signals, and by the page.

=================  ==============================================================
SIGTERM, SIGINT    end
the same again     end at once, whatever is open
SIGHUP             read configuration and keys again
=================  ==============================================================

An administrator may ask for a restart: an end behind which the program starts itself
anew, unless a signal to end comes meanwhile. What ending and reading again mean is the
work of ``serving`` and ``reloading``.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Signals:
    """What the outside asks of the process; caught from its start to its end."""

    def __init__(self) -> None:
        self.ending = asyncio.Event()
        self.ended_by = ""  # the signal's name
        self.is_restart = False  # unless a signal comes meanwhile
        self.reload = asyncio.Event()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    async def unless_ended(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """The result of ``work``; None if the end was asked for before it was there."""
        task = asyncio.create_task(work)
        ending = asyncio.create_task(self.ending.wait())
        try:
            await asyncio.wait((task, ending), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for one in (task, ending):
                one.cancel()
            await asyncio.wait((task, ending))

    def restart(self) -> None:
        """End, and start again."""
        if not self.ending.is_set():
            self.is_restart, self.ended_by = True, "restart"
            self.ending.set()

    def _end(self, number: signal.Signals) -> None:
        if self.is_restart:
            self.is_restart, self.ended_by = False, number.name
        elif self.ending.is_set():
            log.warning("%s again: ending at once", number.name)
            logging.shutdown()
            os._exit(1)
        self.ended_by = number.name
        self.ending.set()
