"""A circuit breaker: stop asking a backend that keeps failing.

Nothing here reads a clock. The caller passes ``now`` (seconds, from
``time.monotonic``), and tells how each request ended.

    state      admits            leaves it when
    closed     everybody         FAILURES failures in a row within WINDOW_SECONDS: open
    open       nobody            OPEN_SECONDS have passed: half-open
    half-open  one probe at a    the probe succeeds: closed; it fails: open;
               time              it is abandoned: the next request is the probe

**What counts.** A failure is an answer that shows that the backend does not work:
no connection, a disconnect, bytes that are not HTTP, silence beyond the allowed time,
and the statuses 500, 502, 503 (unless it says that it is loading) and 504. Neither
good nor bad are 4xx (the client's fault, 429 included: a busy backend works) and 501
(it works, it just cannot do that). Everything else is a success. ``verdict_of`` is
that rule for a status; a raised ``UpstreamError`` is a failure; a client that leaves
is ``abandoned``.

The shape is Envoy's outlier detection and Caddy's ``max_fails``.
"""

import enum
from collections import deque
from dataclasses import dataclass, field

# Five failures in ten seconds is Envoy's default for consecutive 5xx answers.
FAILURES = 5
WINDOW_SECONDS = 10.0

# Long enough for a crashed engine to be restarted by its supervisor, short enough for
# a person to try again.
OPEN_SECONDS = 10.0

# A probe that says nothing (a long prompt may take minutes) must not lock the backend
# up meanwhile: after this time the next request is let through as a second probe.
PROBE_SECONDS = 10.0

_FAILURE_STATUSES = frozenset({500, 502, 503, 504})


class Verdict(enum.Enum):
    """What one answer says about the backend."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEITHER = "neither"


class State(enum.StrEnum):
    """The three positions, spelled as metrics and logs show them."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


def verdict_of(status: int, *, is_loading: bool = False) -> Verdict:
    """What an answer's status says; ``is_loading`` is ``Backend.is_loading``'s word."""
    if is_loading:
        return Verdict.NEITHER
    if status in _FAILURE_STATUSES:
        return Verdict.FAILURE
    if 400 <= status < 500 or status == 501:
        return Verdict.NEITHER
    return Verdict.SUCCESS


@dataclass(slots=True)
class Breaker:
    """The breaker of one backend."""

    # The times of the last failures with no success between them.
    _failures: deque[float] = field(default_factory=lambda: deque(maxlen=FAILURES))
    _opened: float | None = None  # since when it is open or half-open; None: closed
    _probe_began: float | None = None  # when the newest probe left; None: none is out

    def state(self, now: float) -> State:
        """The position at ``now``."""
        if self._opened is None:
            return State.CLOSED
        if now < self._opened + OPEN_SECONDS:
            return State.OPEN
        return State.HALF_OPEN

    def admits(self, now: float) -> bool:
        """Whether a request may be sent. A question only: it changes nothing."""
        return self.retry_after(now) == 0.0

    def retry_after(self, now: float) -> float:
        """Seconds until a request may be sent; 0.0 if it may be sent now."""
        if self._opened is None:
            return 0.0
        until = self._opened + OPEN_SECONDS
        if self._probe_began is not None:
            until = max(until, self._probe_began + PROBE_SECONDS)
        return max(0.0, until - now)

    def begin(self, now: float) -> bool:
        """Note that a request is sent.

        Returns:
            Whether it is the probe; to be handed to ``abandoned``.
        """
        if self.state(now) is not State.HALF_OPEN:
            return False
        self._probe_began = now
        return True

    def succeeded(self) -> None:
        """Note an answer that shows that the backend works: closes the breaker."""
        self._failures.clear()
        self._opened = None
        self._probe_began = None

    def failed(self, now: float) -> None:
        """Note a failure: opens the breaker if it is the probe's, or one too many."""
        self._failures.append(now)
        if self.state(now) is State.HALF_OPEN or self._too_many():
            self._opened = now
            self._probe_began = None

    def abandoned(self, *, was_probe: bool) -> None:
        """Note a request that ended without telling anything about the backend."""
        if was_probe:
            self._probe_began = None

    def _too_many(self) -> bool:
        if self._opened is not None or len(self._failures) < FAILURES:
            return False
        return self._failures[-1] - self._failures[0] <= WINDOW_SECONDS
