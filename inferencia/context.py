"""What is known of one request while it is handled."""

import asyncio
from dataclasses import dataclass, field

from aiohttp import web

from inferencia.errors import ApiError
from inferencia.keys import Key
from inferencia.measurement import Measurement


@dataclass(slots=True, eq=False)
class Context:
    """Travels with a request from ``identify`` to its last byte."""

    id: str
    measurement: Measurement
    task: asyncio.Task[object]
    key: Key | None = None  # set by ``authenticate``
    # Headers of our own for whatever answer there will be; ``throttle`` adds to them.
    headers: list[tuple[str, str]] = field(default_factory=list)
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
