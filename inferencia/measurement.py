"""What is measured of one request.

One ``Measurement`` is born with each request and filled in by whoever learns something;
when the request is over it becomes one log line and the metrics, and is not used again.
Nothing in it was written by a client unless it was checked first: ``model`` is a name
that was resolved, ``path`` a route of ours, ``key`` the name of a key.

Moments are seconds of ``time.monotonic``, which is also the clock of event loops.
"""

import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from inferencia.metering import Usage

# nginx's status for a client that closed the connection before its answer was whole.
CLIENT_GONE = 499

# A stream whose bytes all came within less has no meaningful speed of its own: they
# had been waiting for us (an engine that answers at once, or a cached answer).
_SHORTEST_STREAM_SECONDS = 0.001

# ok: answered; refused: 4xx, the client's side; gone: the client left; failed: 5xx, or
# an answer that broke after its status had been sent.
Outcome = Literal["ok", "refused", "gone", "failed"]


class Counting(Protocol):
    """Whoever sees an engine's stream pass."""

    events: int  # with data; about as many as tokens


@dataclass(slots=True)
class Measurement:
    """The numbers and names of one request."""

    id: str
    method: str
    client: str | None = None  # address, as far as it can be believed
    started: float = field(default_factory=time.monotonic)
    path: str = "/other"  # the route's pattern, never what the client wrote
    key: str | None = None  # name of the key, once it is known
    model: str | None = None  # as resolved, once it is
    backend: str | None = None  # name of the last one that was asked
    status: int = 0  # of the answer; 0 until there is one
    error_code: str | None = None  # of the error that the client was told
    stream: bool = False  # the client asked for a stream
    # Seconds it was held back, in the waiting line or while a machine woke up.
    queued: float | None = None
    queue_position: int | None = None  # where it joined the line; 1: next
    first_byte: float | None = None  # when the answer's first byte was passed on
    ended: float | None = None  # when all was over
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt's, those taken from a cache
    tokens_estimated: bool = False  # the backend did not count, we did
    bytes_in: int = 0  # of the request's body
    bytes_out: int = 0  # of the answer's body
    comments: int = 0  # written while a stream waited
    tap: Counting | None = None  # stands beside the engine's stream, once it has begun
    # The record of usage: it is asked of a model, and so gets a row there; that it has
    # begun is noted; its number and when it began (seconds since 1970) once that is
    # written down; that it has ended is noted.
    is_work: bool = False
    is_begun: bool = False
    entry: int = 0
    began: float = 0.0
    is_booked: bool = False
    is_minor: bool = False  # one of many of its kind; its line is for debugging only

    def finish(self, now: float | None = None) -> None:
        """Note that the request is over; only the first call counts."""
        if self.ended is None:
            self.ended = time.monotonic() if now is None else now

    def add_usage(self, usage: Usage | None) -> None:
        """Count what a backend says that it has used."""
        if usage is None:
            return
        if self.prompt_tokens is None and self.completion_tokens is None:
            self.prompt_tokens = usage.prompt
            self.completion_tokens = usage.completion
            self.cached_tokens = usage.cached
            return
        self.prompt_tokens = _sum(self.prompt_tokens, usage.prompt)
        self.completion_tokens = _sum(self.completion_tokens, usage.completion)
        self.cached_tokens = _sum(self.cached_tokens, usage.cached)

    def estimate_completion(self, events: int) -> None:
        """Count a stream's events as tokens, if nobody has counted better.

        Engines send about one event per token, so a broken stream is charged fairly.
        """
        if self.completion_tokens is None and events > 0:
            self.completion_tokens = events
            self.tokens_estimated = True

    def estimate(self, prompt: int | None, completion: int | None) -> None:
        """Take our own guess for whatever nobody has counted."""
        if self.prompt_tokens is None and prompt is not None:
            self.prompt_tokens = prompt
            self.tokens_estimated = True
        if self.completion_tokens is None and completion is not None:
            self.completion_tokens = completion
            self.tokens_estimated = True

    @property
    def completion_so_far(self) -> int:
        """Tokens of the completion while it is being made, if the engine streams."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return 0 if self.tap is None else self.tap.events

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together; what a key is charged."""
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)

    @property
    def duration(self) -> float:
        """Seconds from the request's head to the end of its answer, or until now."""
        end = time.monotonic() if self.ended is None else self.ended
        seconds = end - self.started
        return seconds if seconds > 0 else 0.0

    @property
    def time_to_first_byte(self) -> float | None:
        """Seconds until the answer began; ``None`` if it never did."""
        if self.first_byte is None:
            return None
        # An event loop's clock may lag behind by the length of one turn.
        seconds = self.first_byte - self.started
        return seconds if seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the completion; ``None`` without a completion.

        Measured from the first byte of a stream. An answer in one piece does not show
        when its first token was made, so there it includes reading the prompt, but
        not what it was held back: for its model's load, say.
        """
        if not self.completion_tokens:
            return None
        seconds = self.duration
        if self.stream and self.first_byte is not None:
            streamed = self.started + seconds - self.first_byte
            if streamed >= _SHORTEST_STREAM_SECONDS:
                return self.completion_tokens / streamed
        seconds -= self.queued or 0.0
        return self.completion_tokens / seconds if seconds > 0 else None

    @property
    def outcome(self) -> Outcome:
        """How it went, in one word."""
        if 0 < self.status < 400 and self.error_code is None:
            return "ok"
        if self.status == CLIENT_GONE:
            return "gone"
        if 400 <= self.status < 500:
            return "refused"
        return "failed"


def _sum(before: int | None, more: int | None) -> int | None:
    return before if more is None else (before or 0) + more
