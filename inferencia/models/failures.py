"""How often a model has failed lately, and when it may be tried again.

Plain data; the times come in as arguments, seconds on any clock that does not go back.
"""

from collections import deque

# 1, 2, 4 ... seconds: short enough for a port that was still taken, and a model that
# never loads costs one attempt a minute.
_FIRST_WAIT_SECONDS = 1.0
_MAX_WAIT_SECONDS = 60.0

# As many failures in such a time are a crash loop: it will not get better by itself.
_LOOP_FAILURES = 5
_LOOP_SECONDS = 600.0


class Failures:
    """The failures of one model since it last served well."""

    __slots__ = ("_retry_at", "_times")

    def __init__(self) -> None:
        # At one attempt a minute no more than these are within ``_LOOP_SECONDS``.
        self._times: deque[float] = deque(maxlen=16)
        self._retry_at: float | None = None

    def add(self, now: float) -> None:
        """Note a failure; the next attempt has to wait, each time twice as long."""
        while self._times and self._times[0] <= now - _LOOP_SECONDS:
            self._times.popleft()
        wait = _FIRST_WAIT_SECONDS * 2 ** len(self._times)
        self._times.append(now)
        self._retry_at = now + min(wait, _MAX_WAIT_SECONDS)

    def clear(self) -> None:
        """Note that the model served well, or is another one now."""
        self._times.clear()
        self._retry_at = None

    def seconds_left(self, now: float) -> float:
        """Until the next attempt may be made; 0.0 if it may be made now."""
        return 0.0 if self._retry_at is None else max(0.0, self._retry_at - now)

    def is_crash_loop(self, now: float) -> bool:
        """Whether who asks for it is refused at once, instead of waiting for a try."""
        return len(self._times) >= _LOOP_FAILURES and self.seconds_left(now) > 0
