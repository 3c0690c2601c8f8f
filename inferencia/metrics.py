"""What ``GET /metrics`` shows.

Names that the Go gateway of the same name used are kept where they mean the same, so
that its dashboards and alerts live on; ours only have more labels. Label values come
from routes, the configuration, the keys' names and the models that were resolved;
nothing that a client made up becomes one.

What others already know (which backend is up, how busy it is) is not counted a second
time: ``follow_backends`` takes a function that is asked at each rendering.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from inferencia import __version__
from inferencia.exposition import (
    CounterChild,
    Exposition,
    HistogramChild,
)
from inferencia.measurement import CLIENT_GONE, Measurement
from inferencia.spending import Spent
from inferencia.tunnelmetrics import TunnelMetrics

# The Go gateway's buckets went from 5 ms to 120 s; models that think take longer.
DURATION_BOUNDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
SPEED_BOUNDS = (1, 2, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200, 400, 1000, 5000)

# A histogram's child has about 18 lines, so there are fewer of them.
MAX_HISTOGRAM_CHILDREN = 500
# Remembered look-ups; beyond them each request looks its counters up again.
_MAX_ROWS = 4000

BREAKER_STATES = ("closed", "half-open", "open")

# RFC 9110, 9, and PATCH: a client may write anything there.
METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"}
)

_Whose = tuple[str, str, str]  # model, backend, key


@dataclass(frozen=True, slots=True)
class BackendState:
    """What is known of one backend at this moment."""

    name: str
    is_up: bool
    breaker: str  # one of BREAKER_STATES
    in_flight: int
    open_connections: int
    waiting: int = 0  # requests that would take a place there
    wakings: int = 0  # how often its machine was to be woken so far


class UsageCounts(Protocol):
    """What is shown of the record of usage."""

    @property
    def is_on(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def pending_bytes(self) -> int: ...
    @property
    def lost(self) -> int: ...
    @property
    def degraded(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class _Work:
    """The children in which one key's work for one model on one backend counts."""

    first_byte: HistogramChild
    speed: HistogramChild
    prompt: CounterChild
    completion: CounterChild
    cached: CounterChild


class Metrics:
    """The families, and who counts what."""

    def __init__(self, *, dropped_log_lines: Callable[[], int] = lambda: 0) -> None:
        """Start at zero.

        Args:
            dropped_log_lines: how many log lines could not be written so far.
        """
        book = self._book = Exposition()
        self._answers: dict[
            tuple[str, str, int, _Whose], tuple[CounterChild, HistogramChild]
        ] = {}
        self._works: dict[_Whose, _Work] = {}
        self._backends: Callable[[], Iterable[BackendState]] = tuple
        self._spending: Callable[[], Iterable[Spent]] = tuple
        self._line: Callable[[], Mapping[str, int]] = dict
        self._usage: Callable[[], UsageCounts] | None = None
        self._connections: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.tunnel = TunnelMetrics()  # asks who is told it by ``follow``
        whose = ("model", "backend", "key")
        self._requests = book.counter(
            "inferencia_http_requests_total",
            "Requests that were answered; status 499: the client left.",
            ("method", "path", "status", *whose),
        )
        self._seconds = book.histogram(
            "inferencia_http_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("method", "path", *whose),
            bounds=DURATION_BOUNDS,
            max_children=MAX_HISTOGRAM_CHILDREN,
        )
        self._first_byte = book.histogram(
            "inferencia_time_to_first_byte_seconds",
            "Time from a request's head to the first byte of a model's answer.",
            whose,
            bounds=DURATION_BOUNDS,
            max_children=MAX_HISTOGRAM_CHILDREN,
        )
        self._queued = book.histogram(
            "inferencia_queue_wait_seconds",
            "Time that requests were held back until a backend could take them.",
            whose,
            bounds=DURATION_BOUNDS,
            max_children=MAX_HISTOGRAM_CHILDREN,
        )
        self._in_flight = book.gauge(
            "inferencia_http_requests_in_flight", "Requests that are being handled."
        ).labels()
        self._tokens = book.counter(
            "inferencia_tokens_total",
            "Tokens that backends have counted, or that we have where they do not.",
            ("model", "type", "backend", "key"),
        )
        self._cached = book.counter(
            "inferencia_cached_prompt_tokens_total",
            "Prompt tokens that backends took from a cache; part of type=prompt.",
            whose,
        )
        self._speed = book.histogram(
            "inferencia_tokens_per_second",
            "Speed of completions.",
            whose,
            bounds=SPEED_BOUNDS,
            max_children=MAX_HISTOGRAM_CHILDREN,
        )
        self._errors = book.counter(
            "inferencia_errors_total",
            "Errors that clients were told, in the middle of a stream too.",
            ("code", *whose),
        )
        self._gone = book.counter(
            "inferencia_client_gone_total",
            "Clients that left before their answer was whole.",
            whose,
        )
        self._comments = book.counter(
            "inferencia_stream_comments_total",
            "Signs of life sent to clients while they waited.",
        ).labels()
        self._rejections = book.counter(
            "inferencia_ratelimit_rejections_total",
            "Requests refused by a limit of their key.",
            ("reason", "key"),
        )
        self._failed_logins = book.counter(
            "inferencia_failed_logins_total", "Requests without a valid key."
        ).labels()
        self._reload_ok = book.gauge(
            "inferencia_config_last_reload_successful",
            "Whether the configuration and keys that were last read are in force.",
        ).labels()
        self._reload_ok.set(1)
        self._add_backend_families()
        book.sampled(
            "inferencia_connections",
            "Open connections of clients.",
            (),
            lambda: [((), self._connections()[0])],
        )
        book.sampled(
            "inferencia_connections_refused_total",
            "Connections closed at once because there were too many.",
            (),
            lambda: [((), self._connections()[1])],
            kind="counter",
        )
        self._add_line_families()
        self.tunnel.add_to(book)
        self._add_spending_families()
        self._add_usage_families()
        book.sampled(
            "inferencia_log_dropped_total",
            "Log lines that could not be written.",
            (),
            lambda: [((), dropped_log_lines())],
            kind="counter",
        )
        book.gauge(
            "inferencia_build_info", "Always 1; says what is running.", ("version",)
        ).labels(__version__).set(1)

    def follow_backends(self, read: Callable[[], Iterable[BackendState]]) -> None:
        """From now on ask ``read`` for the state of all backends."""
        self._backends = read

    def follow_line(self, read: Callable[[], Mapping[str, int]]) -> None:
        """From now on ask ``read`` how many requests wait for each model."""
        self._line = read

    def follow_connections(self, read: Callable[[], tuple[int, int]]) -> None:
        """From now on ask ``read`` how many clients are connected, and were refused."""
        self._connections = read

    def follow_spending(self, read: Callable[[], Iterable[Spent]]) -> None:
        """From now on ask ``read`` what backends have cost."""
        self._spending = read

    def follow_usage(self, read: Callable[[], UsageCounts]) -> None:
        """From now on ask ``read`` how the record of usage is doing."""
        self._usage = read

    def begin(self) -> None:
        """A request has come."""
        self._in_flight.inc()

    def end(self) -> None:
        """It is over; ``record`` tells the rest."""
        self._in_flight.dec()

    def record(self, m: Measurement) -> None:
        """Count a request that is over."""
        whose = (m.model or "", m.backend or "", m.key or "")
        method = m.method if m.method in METHODS else "other"
        kind = (method, m.path, m.status, whose)
        requests, seconds = self._answers.get(kind) or self._new_answers(*kind)
        requests.inc()
        seconds.observe(m.duration)
        if m.backend is not None:
            self._record_work(m, self._works.get(whose) or self._new_work(whose))
        if m.queued is not None:
            self._queued.labels(*whose).observe(m.queued)
        if m.comments:
            self._comments.inc(m.comments)
        if m.error_code is not None:
            self._errors.labels(m.error_code, *whose).inc()
        if m.status == CLIENT_GONE:
            self._gone.labels(*whose).inc()

    def refused(self, reason: str, key: str) -> None:
        """A limit of this key has refused a request."""
        self._rejections.labels(reason, key).inc()

    def failed_login(self) -> None:
        """A request came without a valid key."""
        self._failed_logins.inc()

    def reloaded(self, *, ok: bool) -> None:
        """Configuration or keys were read again; a broken file changes nothing."""
        self._reload_ok.set(1 if ok else 0)

    def render(self) -> bytes:
        """Everything, as ``exposition.CONTENT_TYPE`` says."""
        return self._book.render()

    def _record_work(self, m: Measurement, work: _Work) -> None:
        first_byte = m.time_to_first_byte
        if first_byte is not None:
            work.first_byte.observe(first_byte)
        if m.prompt_tokens:
            work.prompt.inc(m.prompt_tokens)
        if m.cached_tokens:
            work.cached.inc(m.cached_tokens)
        if m.completion_tokens:
            work.completion.inc(m.completion_tokens)
            speed = m.tokens_per_second
            if speed is not None:
                work.speed.observe(speed)

    def _new_answers(
        self, method: str, path: str, status: int, whose: _Whose
    ) -> tuple[CounterChild, HistogramChild]:
        found = (
            self._requests.labels(method, path, str(status), *whose),
            self._seconds.labels(method, path, *whose),
        )
        if len(self._answers) < _MAX_ROWS:
            self._answers[method, path, status, whose] = found
        return found

    def _new_work(self, whose: _Whose) -> _Work:
        model, backend, key = whose
        work = _Work(
            first_byte=self._first_byte.labels(*whose),
            speed=self._speed.labels(*whose),
            prompt=self._tokens.labels(model, "prompt", backend, key),
            completion=self._tokens.labels(model, "completion", backend, key),
            cached=self._cached.labels(*whose),
        )
        if len(self._works) < _MAX_ROWS:
            self._works[whose] = work
        return work

    def _add_backend_families(self) -> None:
        book = self._book
        book.sampled(
            "inferencia_backend_healthy",
            "Whether the watchdog finds a backend up.",
            ("backend",),
            lambda: [((b.name,), int(b.is_up)) for b in self._backends()],
        )
        book.sampled(
            "inferencia_backend_breaker_state",
            "1 for the state that a backend's circuit breaker is in.",
            ("backend", "state"),
            lambda: [
                ((b.name, state), int(b.breaker == state))
                for b in self._backends()
                for state in BREAKER_STATES
            ],
        )
        book.sampled(
            "inferencia_backend_requests_in_flight",
            "Requests that a backend is working on for us.",
            ("backend",),
            lambda: [((b.name,), b.in_flight) for b in self._backends()],
        )
        book.sampled(
            "inferencia_upstream_connections",
            "Open connections to a backend.",
            ("backend",),
            lambda: [((b.name,), b.open_connections) for b in self._backends()],
        )
        book.sampled(
            "inferencia_backend_requests_waiting",
            "Requests that wait for a place at a backend; some wait at several.",
            ("backend",),
            lambda: [((b.name,), b.waiting) for b in self._backends()],
        )
        book.sampled(
            "inferencia_backend_wakes_total",
            "Times that a backend's machine was to be woken by network.",
            ("backend",),
            lambda: [((b.name,), b.wakings) for b in self._backends()],
            kind="counter",
        )

    def _add_line_families(self) -> None:
        self._book.sampled(
            "inferencia_queue_waiting",
            "Requests that wait because every backend that serves them is busy.",
            ("model",),
            lambda: [((model,), count) for model, count in self._line().items()],
        )

    def _add_spending_families(self) -> None:
        book = self._book
        book.sampled(
            "inferencia_backend_spend_total",
            "What a backend has cost, in the currency of its prices.",
            ("backend",),
            lambda: [((s.backend,), s.total) for s in self._spending()],
            kind="counter",
        )
        book.sampled(
            "inferencia_backend_spend_today",
            "What a backend has cost since 00:00 UTC.",
            ("backend",),
            lambda: [((s.backend,), s.today) for s in self._spending()],
        )
        book.sampled(
            "inferencia_backend_spend_limit",
            "What a backend may cost in a day.",
            ("backend",),
            lambda: [
                ((s.backend,), s.limit) for s in self._spending() if s.limit is not None
            ],
        )

    def _add_usage_families(self) -> None:
        self._sample_usage(
            "inferencia_usage_rows_total",
            "Requests that were written into the database of usage.",
            lambda usage: usage.rows,
            kind="counter",
        )
        self._sample_usage(
            "inferencia_usage_pending_bytes",
            "What is in the journal of usage and not in its database yet.",
            lambda usage: usage.pending_bytes,
        )
        self._sample_usage(
            "inferencia_usage_lost_total",
            "Requests that could not be written down anywhere.",
            lambda usage: usage.lost,
            kind="counter",
        )
        self._sample_usage(
            "inferencia_usage_degraded",
            "1 while the database of usage cannot be written; requests go on.",
            lambda usage: int(usage.degraded is not None),
        )

    def _sample_usage(
        self,
        name: str,
        about: str,
        value: Callable[[UsageCounts], int],
        kind: Literal["gauge", "counter"] = "gauge",
    ) -> None:
        def samples() -> list[tuple[tuple[str, ...], int]]:
            usage = None if self._usage is None else self._usage()
            return [] if usage is None or not usage.is_on else [((), value(usage))]

        self._book.sampled(name, about, (), samples, kind=kind)
