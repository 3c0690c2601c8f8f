"""Tokens per second of all requests together, now and in the last minutes."""

import time
from collections import deque
from collections.abc import Callable, Iterable

from inferencia.context import Context
from inferencia.measurement import Measurement

# Five minutes, a sample a second.
HISTORY = 300
SECONDS = 1.0


class Rates:
    """Samples what has been counted, once a second."""

    def __init__(
        self,
        active: Callable[[], Iterable[Context]],
        totals: Callable[[], tuple[int, int, int]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without history.

        Args:
            active: the requests in flight.
            totals: requests, prompt and completion tokens of those that are over.
            clock: seconds.
        """
        self._active = active
        self._totals = totals
        self._clock = clock
        self._before = (clock(), 0, 0)
        self.prompt: deque[float] = deque(maxlen=HISTORY)
        self.completion: deque[float] = deque(maxlen=HISTORY)

    def sample(self) -> None:
        """Note what has come since the last call."""
        _, prompt, completion = self._totals()
        for m in _running(self._active()):
            prompt += m.prompt_tokens or 0
            completion += m.completion_so_far
        now = self._clock()
        then, prompt_then, completion_then = self._before
        seconds = max(now - then, 1e-3)
        # Events of a stream are counted as tokens until the engine says how many they
        # were; where they were fewer the sum goes back a little.
        self.prompt.append(round(max(0, prompt - prompt_then) / seconds, 1))
        self.completion.append(round(max(0, completion - completion_then) / seconds, 1))
        self._before = (now, prompt, completion)

    @property
    def now(self) -> dict[str, float]:
        """The last sample."""
        return {
            "prompt": self.prompt[-1] if self.prompt else 0.0,
            "completion": self.completion[-1] if self.completion else 0.0,
        }

    @property
    def history(self) -> dict[str, object]:
        """All samples, oldest first."""
        return {
            "interval": SECONDS,
            "prompt": list(self.prompt),
            "completion": list(self.completion),
        }


def _running(active: Iterable[Context]) -> Iterable[Measurement]:
    """What is not in the totals yet."""
    measurements = (context.measurement for context in active)
    return (m for m in measurements if not m.is_booked)
