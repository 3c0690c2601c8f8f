"""Promises of ``breaker.py``."""

import random

import pytest

from inferencia.breaker import (
    FAILURES,
    OPEN_SECONDS,
    PROBE_SECONDS,
    WINDOW_SECONDS,
    Breaker,
    State,
    Verdict,
    verdict_of,
)


def opened_breaker(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES):
        breaker.failed(now)
    return breaker


def test_a_new_breaker_admits_everybody() -> None:
    breaker = Breaker()
    assert breaker.state(0.0) is State.CLOSED
    assert breaker.admits(0.0)
    assert breaker.retry_after(0.0) == 0.0
    assert not breaker.begin(0.0)


def test_one_failure_less_than_the_limit_leaves_it_closed() -> None:
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        breaker.failed(1.0)
    assert breaker.state(1.0) is State.CLOSED


def test_failures_in_a_row_open_it() -> None:
    breaker = opened_breaker(5.0)
    assert breaker.state(5.0) is State.OPEN
    assert not breaker.admits(5.0)
    assert breaker.retry_after(5.0) == OPEN_SECONDS
    assert breaker.retry_after(8.0) == OPEN_SECONDS - 3.0


def test_a_success_between_failures_starts_the_count_again() -> None:
    breaker = Breaker()
    for _ in range(10):
        for _ in range(FAILURES - 1):
            breaker.failed(1.0)
        breaker.succeeded()
    assert breaker.state(1.0) is State.CLOSED


def test_failures_that_are_spread_out_do_not_open_it() -> None:
    breaker = Breaker()
    apart = WINDOW_SECONDS / (FAILURES - 1) + 0.01
    for number in range(50):
        breaker.failed(number * apart)
        assert breaker.state(number * apart) is State.CLOSED


def test_failures_that_just_fit_into_the_window_open_it() -> None:
    breaker = Breaker()
    for number in range(FAILURES):
        breaker.failed(number * WINDOW_SECONDS / (FAILURES - 1))
    assert breaker.state(WINDOW_SECONDS) is State.OPEN


def test_half_open_lets_exactly_one_probe_through() -> None:
    breaker = opened_breaker()
    assert breaker.state(OPEN_SECONDS) is State.HALF_OPEN
    assert breaker.admits(OPEN_SECONDS)
    assert breaker.begin(OPEN_SECONDS)
    assert not breaker.admits(OPEN_SECONDS)
    assert breaker.retry_after(OPEN_SECONDS) == PROBE_SECONDS


def test_asking_whether_it_admits_takes_no_probe() -> None:
    breaker = opened_breaker()
    assert all(breaker.admits(OPEN_SECONDS) for _ in range(5))


def test_a_probe_that_succeeds_closes_it() -> None:
    breaker = opened_breaker()
    breaker.begin(OPEN_SECONDS)
    breaker.succeeded()
    assert breaker.state(OPEN_SECONDS) is State.CLOSED
    for _ in range(FAILURES - 1):
        breaker.failed(OPEN_SECONDS + 1)
    assert breaker.state(OPEN_SECONDS + 1) is State.CLOSED


def test_a_probe_that_fails_opens_it_again_for_the_whole_time() -> None:
    breaker = opened_breaker()
    breaker.begin(OPEN_SECONDS)
    breaker.failed(OPEN_SECONDS + 1)
    assert breaker.state(OPEN_SECONDS + 1) is State.OPEN
    assert breaker.retry_after(OPEN_SECONDS + 1) == OPEN_SECONDS


def test_an_abandoned_probe_lets_the_next_request_be_the_probe() -> None:
    breaker = opened_breaker()
    was_probe = breaker.begin(OPEN_SECONDS)
    breaker.abandoned(was_probe=was_probe)
    assert breaker.admits(OPEN_SECONDS)
    assert breaker.begin(OPEN_SECONDS)


def test_an_older_request_that_is_abandoned_does_not_free_the_probes_place() -> None:
    breaker = Breaker()
    older = breaker.begin(0.0)
    for _ in range(FAILURES):
        breaker.failed(0.0)
    breaker.begin(OPEN_SECONDS)
    breaker.abandoned(was_probe=older)
    assert not breaker.admits(OPEN_SECONDS)


def test_a_probe_that_says_nothing_does_not_lock_the_backend_up() -> None:
    breaker = opened_breaker()
    breaker.begin(OPEN_SECONDS)
    later = OPEN_SECONDS + PROBE_SECONDS
    assert breaker.admits(later)
    assert breaker.begin(later)
    assert not breaker.admits(later)


def test_failures_of_older_requests_do_not_prolong_the_open_time() -> None:
    breaker = opened_breaker()
    breaker.failed(OPEN_SECONDS / 2)
    assert breaker.state(OPEN_SECONDS) is State.HALF_OPEN


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_statuses_of_a_broken_backend_are_failures(status: int) -> None:
    assert verdict_of(status) is Verdict.FAILURE


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 429, 499, 501])
def test_refusals_say_nothing_about_the_backend(status: int) -> None:
    assert verdict_of(status) is Verdict.NEITHER


@pytest.mark.parametrize("status", [200, 201, 204, 302, 505, 529])
def test_other_answers_are_successes(status: int) -> None:
    assert verdict_of(status) is Verdict.SUCCESS


def test_loading_is_no_failure() -> None:
    assert verdict_of(503, is_loading=True) is Verdict.NEITHER


@pytest.mark.parametrize("seed", range(20))
def test_waiting_as_long_as_advised_is_always_enough(seed: int) -> None:
    rng = random.Random(seed)
    breaker = Breaker()
    now = rng.uniform(0, 1e9)
    for _ in range(500):
        now += rng.uniform(0, 3)
        wait = breaker.retry_after(now)
        assert wait <= max(OPEN_SECONDS, PROBE_SECONDS) + 1e-6
        if wait:
            now += wait + 1e-6  # a clock is read a moment later, never earlier
            assert breaker.admits(now)
        was_probe = breaker.begin(now)
        ending = rng.randrange(4)
        if ending == 0:
            breaker.succeeded()
        elif ending == 1:
            breaker.abandoned(was_probe=was_probe)
        else:
            breaker.failed(now)
