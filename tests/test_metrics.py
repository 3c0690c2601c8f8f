"""Promises of ``metrics.py`` and ``measurement.py``: what is counted, and its name."""

import re

import pytest

from inferencia import __version__
from inferencia.measurement import Measurement
from inferencia.metering import Usage
from inferencia.metrics import BackendState, Metrics


def measured(
    *,
    status: int = 200,
    seconds: float = 2.0,
    first_byte: float | None = 0.5,
    **known: object,
) -> Measurement:
    m = Measurement(id="req-1", method="POST", started=100.0)
    m.path = "/v1/chat/completions"
    m.key, m.model, m.backend, m.stream = "alice", "qwen3", "mlx", True
    m.status = status
    if first_byte is not None:
        m.first_byte = 100.0 + first_byte
    for name, value in known.items():
        setattr(m, name, value)
    m.finish(100.0 + seconds)
    return m


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample line: ``name{labels}`` and its value."""
    lines = metrics.render().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    assert len({name for name, _ in pairs}) == len(pairs)
    return {name: float(value) for name, value in pairs}


WHOSE = 'model="qwen3",backend="mlx",key="alice"'


def test_a_request_is_counted_by_route_status_model_backend_and_key() -> None:
    metrics = Metrics()
    metrics.record(measured(prompt_tokens=7, completion_tokens=30, cached_tokens=5))
    metrics.record(measured(status=500, error_code="internal_error", first_byte=None))
    found = samples(metrics)
    route = 'method="POST",path="/v1/chat/completions"'
    total = "inferencia_http_requests_total"
    assert found[f'{total}{{{route},status="200",{WHOSE}}}'] == 1
    assert found[f'{total}{{{route},status="500",{WHOSE}}}'] == 1
    seconds = "inferencia_http_request_duration_seconds"
    assert found[f"{seconds}_count{{{route},{WHOSE}}}"] == 2
    assert found[f"{seconds}_sum{{{route},{WHOSE}}}"] == 4
    assert found[f'{seconds}_bucket{{{route},{WHOSE},le="1"}}'] == 0
    assert found[f'{seconds}_bucket{{{route},{WHOSE},le="2.5"}}'] == 2
    first = "inferencia_time_to_first_byte_seconds"
    assert found[f"{first}_count{{{WHOSE}}}"] == 1
    assert found[f"{first}_sum{{{WHOSE}}}"] == 0.5
    tokens = (
        'inferencia_tokens_total{model="qwen3",type="%s",backend="mlx",key="alice"}'
    )
    assert found[tokens % "prompt"] == 7
    assert found[tokens % "completion"] == 30
    assert found[f"inferencia_cached_prompt_tokens_total{{{WHOSE}}}"] == 5
    assert found[f"inferencia_tokens_per_second_sum{{{WHOSE}}}"] == 20
    assert found[f'inferencia_errors_total{{code="internal_error",{WHOSE}}}'] == 1


def test_a_request_without_a_backend_leaves_no_rows_about_work() -> None:
    metrics = Metrics()
    metrics.record(measured(model=None, backend=None, key=None, path="/other"))
    rows = [name for name in samples(metrics) if 'model=""' in name]
    assert rows
    assert all(name.startswith("inferencia_http_request") for name in rows)


def test_the_predecessors_names_are_kept() -> None:
    metrics = Metrics()
    metrics.follow_backends(lambda: [BackendState("mlx", True, "closed", 0, 0)])
    types = dict(re.findall(r"# TYPE (\S+) (\S+)", metrics.render().decode()))
    assert {
        "inferencia_http_requests_total": "counter",
        "inferencia_http_request_duration_seconds": "histogram",
        "inferencia_http_requests_in_flight": "gauge",
        "inferencia_tokens_total": "counter",
        "inferencia_backend_healthy": "gauge",
        "inferencia_ratelimit_rejections_total": "counter",
    }.items() <= types.items()
    for name, kind in types.items():
        assert name.startswith("inferencia_")
        assert name.endswith("_total") == (kind == "counter")


def test_methods_that_a_client_made_up_become_one_row() -> None:
    metrics = Metrics()
    for number in range(20):
        metrics.record(measured(method=f"M{number}", status=405))
    rows = [name for name in samples(metrics) if "requests_total" in name]
    assert len(rows) == 1
    assert 'method="other"' in rows[0]


def test_no_family_grows_without_bound() -> None:
    metrics = Metrics()
    for number in range(3000):
        m = measured(key=f"k{number}", completion_tokens=1, error_code="x")
        metrics.record(m)
        metrics.refused("requests", f"k{number}")
    found = samples(metrics)
    total = sum(v for n, v in found.items() if "http_requests_total" in n)
    assert total == 3000
    sizes: dict[str, int] = {}
    for name in found:
        family = name.partition("{")[0]
        sizes[family] = sizes.get(family, 0) + 1
    assert sizes["inferencia_http_requests_total"] == 2001
    assert sizes["inferencia_http_request_duration_seconds_count"] == 501
    assert sizes["inferencia_ratelimit_rejections_total"] == 2001
    assert max(sizes.values()) <= 501 * 20


def test_requests_in_flight_go_up_and_down() -> None:
    metrics = Metrics()
    metrics.begin()
    metrics.begin()
    metrics.end()
    assert samples(metrics)["inferencia_http_requests_in_flight"] == 1


def test_refusals_logins_comments_and_clients_that_leave_are_counted() -> None:
    metrics = Metrics()
    metrics.refused("daily_tokens", "alice")
    metrics.failed_login()
    metrics.record(measured(status=499, comments=3))
    found = samples(metrics)
    name = "inferencia_ratelimit_rejections_total"
    assert found[name + '{reason="daily_tokens",key="alice"}'] == 1
    assert found["inferencia_failed_logins_total"] == 1
    assert found["inferencia_stream_comments_total"] == 3
    assert found[f"inferencia_client_gone_total{{{WHOSE}}}"] == 1


def test_backends_are_asked_for_their_state_at_each_rendering() -> None:
    metrics = Metrics()
    assert 'backend="' not in metrics.render().decode()
    states = [
        BackendState("mlx", True, "closed", 2, 3),
        BackendState("old", False, "half-open", 0, 0),
    ]
    metrics.follow_backends(lambda: states)
    found = samples(metrics)
    assert found['inferencia_backend_healthy{backend="mlx"}'] == 1
    assert found['inferencia_backend_healthy{backend="old"}'] == 0
    breaker = "inferencia_backend_breaker_state"
    assert found[breaker + '{backend="mlx",state="closed"}'] == 1
    assert found[breaker + '{backend="old",state="closed"}'] == 0
    assert found[breaker + '{backend="old",state="half-open"}'] == 1
    assert found['inferencia_backend_requests_in_flight{backend="mlx"}'] == 2
    assert found['inferencia_upstream_connections{backend="mlx"}'] == 3
    del states[1]
    assert 'backend="old"' not in metrics.render().decode()


def test_the_program_tells_about_itself() -> None:
    dropped = 0
    metrics = Metrics(dropped_log_lines=lambda: dropped)
    assert samples(metrics)["inferencia_log_dropped_total"] == 0
    dropped = 4
    metrics.reloaded(ok=False)
    found = samples(metrics)
    assert found["inferencia_log_dropped_total"] == 4
    assert found["inferencia_config_last_reload_successful"] == 0
    assert found[f'inferencia_build_info{{version="{__version__}"}}'] == 1
    metrics.reloaded(ok=True)
    assert samples(metrics)["inferencia_config_last_reload_successful"] == 1


def test_a_measurement_knows_its_times() -> None:
    m = measured(seconds=3, first_byte=1, completion_tokens=10)
    assert m.duration == 3
    assert m.time_to_first_byte == 1
    assert m.tokens_per_second == 5  # a stream's speed counts from its first byte
    m.finish(500.0)
    assert m.duration == 3, "only the first end counts"
    whole = measured(seconds=4, first_byte=4, completion_tokens=10, stream=False)
    assert whole.tokens_per_second == 2.5
    at_once = measured(seconds=2, first_byte=2, completion_tokens=10)
    assert at_once.tokens_per_second == 5
    held = measured(seconds=4, completion_tokens=10, stream=False, queued=2.0)
    assert held.tokens_per_second == 5  # while its model was loaded, nothing was made
    assert measured(first_byte=-0.01).time_to_first_byte == 0
    none = measured(first_byte=None, seconds=0, completion_tokens=5)
    assert none.time_to_first_byte is None
    assert none.tokens_per_second is None
    assert Measurement(id="x", method="GET").duration < 60


def test_usage_adds_up_and_an_estimate_only_fills_a_gap() -> None:
    m = Measurement(id="x", method="POST")
    m.add_usage(None)
    assert (m.prompt_tokens, m.completion_tokens, m.total_tokens) == (None, None, 0)
    m.add_usage(Usage(prompt=5, completion=7, cached=2))
    m.add_usage(Usage(prompt=1, completion=0))
    assert (m.prompt_tokens, m.completion_tokens, m.cached_tokens) == (6, 7, 2)
    m.estimate_completion(99)
    assert m.total_tokens == 13
    assert not m.tokens_estimated

    cut = Measurement(id="x", method="POST")
    cut.estimate_completion(0)
    assert not cut.tokens_estimated
    cut.estimate_completion(12)
    assert cut.total_tokens == 12
    assert cut.tokens_estimated


@pytest.mark.parametrize(
    ("status", "error_code", "outcome"),
    [
        (200, None, "ok"),
        (204, None, "ok"),
        (404, "model_not_found", "refused"),
        (499, None, "gone"),
        (503, "backend_unavailable", "failed"),
        (200, "backend_timeout", "failed"),
        (0, None, "failed"),
    ],
)
def test_the_outcome_is_one_word(
    status: int, error_code: str | None, outcome: str
) -> None:
    assert measured(status=status, error_code=error_code).outcome == outcome
