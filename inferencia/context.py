"""What is known of one request while it is handled."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from inferencia.errors import ApiError
from inferencia.keys import Key
from inferencia.limits import Grant
from inferencia.measurement import Measurement


@dataclass(slots=True, eq=False)
class Context:
    """Travels with a request from its first link of the chain to its last byte."""

    id: str
    measurement: Measurement
    task: asyncio.Task[object]
    # Our own for whatever answer there will be; those of the key's limits come later.
    headers: list[tuple[str, str]]
    key: Key | None = None  # once it is authenticated
    is_users_work: bool = False  # the route counts against the key's limits
    is_active: bool = False  # it counts as in flight: a drain waits for it
    grant: Grant | None = None  # the place that it holds among its key's requests
    # Says what it waits for, while it does: a place in line, a model, a machine.
    waits_for: Callable[[], str] | None = None
    # Why the request is being ended by us, set before its task is cancelled.
    interruption: ApiError | None = None

    def interrupt(self, error: ApiError) -> None:
        """End the request from outside; its client gets ``error``."""
        if self.interruption is None:
            self.interruption = error
            self.task.cancel()

    def interrupted(self) -> ApiError | None:
        """The error of an interruption, once; the cancelled task goes on living."""
        error = self.interruption
        if error is not None:
            self.task.uncancel()
        return error


CONTEXT = web.RequestKey("context", Context)
