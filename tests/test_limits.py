"""Limits: buckets, accounts of keys, failed logins. The clock is an argument."""

import dataclasses
import random
from dataclasses import dataclass

import pytest

from inferencia.limits import (
    UNLIMITED,
    Allowances,
    FailedLogins,
    Grant,
    Refusal,
    TokenBucket,
    go_duration,
)

DAY = 86400
NOON = 20_000 * DAY + DAY / 2  # some day in 2024


@dataclass(frozen=True)
class Alice:
    """A key, as far as limits know it."""

    name: str = "alice"
    rps: float | None = None
    burst: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    daily_tokens: int | None = None


def full_bucket(rate: float, burst: float) -> TokenBucket:
    return TokenBucket(rate=rate, burst=burst, tokens=burst, updated=0.0)


def allowances() -> Allowances:
    return Allowances(requests_per_second=10, burst=20)


def granted(answer: Grant | Refusal) -> Grant:
    assert isinstance(answer, Grant), answer
    return answer


def refused(answer: Grant | Refusal) -> Refusal:
    assert isinstance(answer, Refusal), "granted, though a refusal was expected"
    return answer


def headers_of(book: Allowances, key: Alice, now: float, wall: float) -> dict[str, str]:
    return dict(book.headers(key, now, wall))


# Buckets


def test_a_full_bucket_gives_its_burst_at_once_and_then_refuses() -> None:
    bucket = full_bucket(rate=2, burst=3)
    assert [bucket.take(1, 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_a_bucket_never_holds_more_than_its_burst() -> None:
    bucket = full_bucket(rate=10, burst=3)
    bucket.take(1, 1000.0)
    assert bucket.tokens == 2


def test_asking_for_more_than_the_burst_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="burst is 3"):
        full_bucket(rate=1, burst=3).take(3.5, 0.0)


def test_a_charge_may_exceed_what_is_there_and_is_repaid_at_the_rate() -> None:
    bucket = full_bucket(rate=2, burst=10)
    bucket.charge(15, 0.0)
    assert bucket.take(1, 0.0) == 3.0
    assert bucket.take(1, 3.0) == 0.0


def test_an_earlier_now_neither_adds_nor_takes_anything() -> None:
    bucket = full_bucket(rate=1, burst=10)
    bucket.take(5, 100.0)
    bucket.refill(50.0)
    assert (bucket.tokens, bucket.updated) == (5, 100.0)


@pytest.mark.parametrize("seed", range(50))
def test_waiting_as_long_as_advised_is_always_enough(seed: int) -> None:
    rng = random.Random(seed)
    bucket = full_bucket(rate=rng.uniform(0.01, 500), burst=rng.uniform(1, 1000))
    now = rng.uniform(0, 1e9)
    for _ in range(500):
        amount = rng.uniform(0, bucket.burst)
        wait = bucket.take(amount, now)
        if wait:
            now += wait
            assert bucket.take(amount, now) == 0.0


@pytest.mark.parametrize("seed", range(50))
def test_no_stretch_of_time_yields_more_than_burst_and_rate_allow(seed: int) -> None:
    rng = random.Random(seed)
    bucket = full_bucket(rate=rng.uniform(0.1, 50), burst=rng.randint(1, 40))
    now = start = rng.uniform(0, 1e6)
    bucket.updated = now
    taken = 0
    for _ in range(500):
        now += rng.choice([0.0, rng.expovariate(bucket.rate), rng.uniform(0, 0.01)])
        taken += bucket.take(1, now) == 0.0
        assert taken <= bucket.burst + bucket.rate * (now - start) + 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_changing_rates_never_gives_tokens_away(seed: int) -> None:
    rng = random.Random(seed)
    bucket = full_bucket(rate=5, burst=20)
    now = 0.0
    for _ in range(200):
        now += rng.uniform(0, 2)
        bucket.refill(now)
        before = bucket.tokens
        bucket.change(rng.uniform(0.1, 50), rng.randint(1, 40), now)
        assert bucket.tokens <= min(before, bucket.burst)


# Requests


def test_a_key_without_rates_of_its_own_has_the_default_ones() -> None:
    book = allowances()
    for _ in range(20):
        granted(book.take(Alice(), 0.0, NOON))
    assert refused(book.take(Alice(), 0.0, NOON)).retry_after == pytest.approx(0.1)


def test_a_refusal_names_the_key_its_limit_and_the_wait() -> None:
    book, key = allowances(), Alice(rps=5, burst=2)
    for _ in range(2):
        granted(book.take(key, 0.0, NOON))
    assert refused(book.take(key, 0.0, NOON)) == Refusal(
        "requests",
        0.2,
        'key "alice" may send 5 requests a second; try again in 0.2 s',
    )


def test_one_request_a_second_is_told_in_the_singular() -> None:
    book, key = allowances(), Alice(rps=1, burst=1)
    granted(book.take(key, 0.0, NOON))
    message = refused(book.take(key, 0.0, NOON)).message
    assert message == 'key "alice" may send 1 request a second; try again in 1 s'


def test_a_rate_below_one_a_second_works() -> None:
    book, key = allowances(), Alice(rps=0.05, burst=1)
    granted(book.take(key, 0.0, NOON))
    refusal = refused(book.take(key, 0.0, NOON))
    assert refusal.retry_after == pytest.approx(20)
    assert refusal.message.endswith("0.05 requests a second; try again in 20 s")
    granted(book.take(key, 20.0, NOON))


def test_one_key_spends_nothing_of_another() -> None:
    book = allowances()
    for _ in range(20):
        granted(book.take(Alice(), 0.0, NOON))
    granted(book.take(Alice("bob"), 0.0, NOON))


def test_a_refusal_spends_nothing() -> None:
    book, key = allowances(), Alice(rps=1, burst=1, concurrency=1)
    grant = granted(book.take(key, 0.0, NOON))
    for _ in range(100):
        refused(book.take(key, 0.5, NOON))
    book.give_back(grant)
    granted(book.take(key, 1.0, NOON))


def test_rates_changed_in_the_file_count_at_once_and_buckets_stay() -> None:
    book, slow = allowances(), Alice(rps=1, burst=5)
    for _ in range(5):
        granted(book.take(slow, 0.0, NOON))
    fast = dataclasses.replace(slow, rps=100, burst=50)
    assert refused(book.take(fast, 0.0, NOON)).retry_after == pytest.approx(0.01)
    granted(book.take(fast, 0.01, NOON))


def test_the_same_name_with_another_secret_has_the_same_account() -> None:
    book = allowances()
    for _ in range(20):
        granted(book.take(Alice(), 0.0, NOON))
    refused(book.take(Alice(), 0.0, NOON))


# Concurrency


def test_concurrency_counts_requests_between_take_and_give_back() -> None:
    book, key = allowances(), Alice(concurrency=2)
    first = granted(book.take(key, 0.0, NOON))
    granted(book.take(key, 0.0, NOON))
    assert refused(book.take(key, 0.0, NOON)) == Refusal(
        "concurrency",
        1.0,
        'key "alice" may have 2 requests running at a time; '
        "try again when one has ended",
    )
    book.give_back(first)
    granted(book.take(key, 0.0, NOON))


def test_giving_back_twice_frees_one_place() -> None:
    book, key = allowances(), Alice(concurrency=2)
    first = granted(book.take(key, 0.0, NOON))
    granted(book.take(key, 0.0, NOON))
    book.give_back(first)
    book.give_back(first)
    assert book.in_flight("alice") == 1


def test_a_lowered_concurrency_refuses_until_enough_have_ended() -> None:
    book = allowances()
    grants = [granted(book.take(Alice(), 0.0, NOON)) for _ in range(3)]
    strict = Alice(concurrency=1)
    refused(book.take(strict, 1.0, NOON))
    for grant in grants:
        book.give_back(grant)
    granted(book.take(strict, 1.0, NOON))


@pytest.mark.parametrize("seed", range(20))
def test_requests_in_flight_never_exceed_the_limit_and_end_at_zero(seed: int) -> None:
    rng = random.Random(seed)
    book, key = allowances(), Alice(rps=1000, burst=1000, concurrency=rng.randint(1, 5))
    held: list[Grant] = []
    now = 0.0
    for _ in range(500):
        now += 0.001
        if held and rng.random() < 0.5:
            book.give_back(held.pop(rng.randrange(len(held))))
        else:
            answer = book.take(key, now, NOON)
            if isinstance(answer, Grant):
                held.append(answer)
        assert book.in_flight("alice") == len(held) <= (key.concurrency or 0)
    for grant in held + held:
        book.give_back(grant)
    assert book.in_flight("alice") == 0


# Tokens


def test_tokens_a_minute_are_charged_after_the_fact_and_repaid() -> None:
    book, key = allowances(), Alice(tpm=600)
    granted(book.take(key, 0.0, NOON))
    book.charge("alice", 650, 0.0, NOON)
    refusal = refused(book.take(key, 0.0, NOON))
    assert refusal.kind == "tokens"
    assert refusal.retry_after == pytest.approx(5.1)  # 50 of debt and one, ten a second
    assert refusal.message == (
        'key "alice" may use 600 tokens a minute; try again in 5.1 s'
    )
    granted(book.take(key, refusal.retry_after, NOON))


def test_an_exactly_used_up_minute_refuses() -> None:
    book, key = allowances(), Alice(tpm=60)
    granted(book.take(key, 0.0, NOON))
    book.charge("alice", 60, 0.0, NOON)
    assert refused(book.take(key, 0.0, NOON)).retry_after == pytest.approx(1)


def test_a_key_without_token_limits_is_never_refused_for_tokens() -> None:
    book = allowances()
    granted(book.take(Alice(), 0.0, NOON))
    book.charge("alice", 10**12, 0.0, NOON)
    granted(book.take(Alice(), 1.0, NOON))


def test_a_token_limit_that_appears_disappears_or_grows_is_followed() -> None:
    book = allowances()
    granted(book.take(Alice(), 0.0, NOON))
    granted(book.take(Alice(tpm=60), 1.0, NOON))
    book.charge("alice", 100, 1.0, NOON)
    refused(book.take(Alice(tpm=60), 1.0, NOON))
    assert refused(book.take(Alice(tpm=6000), 1.0, NOON)).retry_after < 1
    granted(book.take(Alice(), 1.0, NOON))


def test_charging_a_name_that_nobody_has_leaves_no_account() -> None:
    book = allowances()
    book.charge("mallory", 100, 0.0, NOON)
    assert len(book) == 0


def test_charging_nothing_or_less_changes_nothing() -> None:
    book, key = allowances(), Alice(tpm=60, daily_tokens=10)
    granted(book.take(key, 0.0, NOON))
    book.charge("alice", 0, 0.0, NOON)
    book.charge("alice", -50, 0.0, NOON)
    assert headers_of(book, key, 0.0, NOON)["x-ratelimit-remaining-tokens"] == "60"


# Tokens a day


def test_used_up_daily_tokens_refuse_until_midnight_utc() -> None:
    book, key = allowances(), Alice(daily_tokens=500_000)
    granted(book.take(key, 0.0, NOON))
    book.charge("alice", 500_000, 0.0, NOON)
    refusal = refused(book.take(key, 10.0, NOON + 10))
    assert refusal == Refusal(
        "daily_tokens",
        DAY / 2 - 10,
        'key "alice" has used its 500000 tokens for today; more from 00:00 UTC on',
    )
    granted(book.take(key, 10 + refusal.retry_after, NOON + 10 + refusal.retry_after))


def test_what_ends_after_midnight_is_charged_to_the_new_day() -> None:
    book, key = allowances(), Alice(daily_tokens=100)
    granted(book.take(key, 0.0, NOON))
    book.charge("alice", 99, 0.0, NOON)
    book.charge("alice", 99, DAY / 2, NOON + DAY / 2)
    granted(book.take(key, DAY / 2, NOON + DAY / 2))


def test_a_clock_set_back_by_a_day_does_not_lock_a_key_out_for_longer() -> None:
    book, key = allowances(), Alice(daily_tokens=100)
    granted(book.take(key, 0.0, NOON + 365 * DAY))
    book.charge("alice", 100, 0.0, NOON + 365 * DAY)
    granted(book.take(key, 1.0, NOON))


def test_of_several_limits_the_slower_kind_is_told() -> None:
    book, key = allowances(), Alice(rps=1, burst=1, tpm=10, daily_tokens=5)
    granted(book.take(key, 0.0, NOON))
    book.charge("alice", 10, 0.0, NOON)
    assert refused(book.take(key, 0.0, NOON)).kind == "daily_tokens"
    without_day = dataclasses.replace(key, daily_tokens=None)
    assert refused(book.take(without_day, 0.0, NOON)).kind == "tokens"
    without_tokens = dataclasses.replace(without_day, tpm=None)
    assert refused(book.take(without_tokens, 0.0, NOON)).kind == "requests"


@pytest.mark.parametrize("seed", range(30))
def test_a_key_that_waits_as_told_is_let_in(seed: int) -> None:
    rng = random.Random(seed)
    book = allowances()
    key = Alice(
        rps=rng.uniform(0.01, 20),
        burst=rng.randint(1, 5),
        tpm=rng.choice([None, rng.randint(1, 5000)]),
        daily_tokens=rng.choice([None, rng.randint(1, 5000)]),
    )
    now, offset = rng.uniform(0, 1e6), NOON
    for _ in range(200):
        answer = book.take(key, now, now + offset)
        waits = 0
        while isinstance(answer, Refusal):
            waits += 1
            assert waits <= 3, f"still refused after three waits: {answer}"
            now += answer.retry_after
            answer = book.take(key, now, now + offset)
        book.give_back(answer)
        book.charge("alice", rng.randint(0, 2000), now, now + offset)


# Headers


def test_headers_of_a_fresh_key_without_a_token_limit() -> None:
    assert allowances().headers(Alice(), 0.0, NOON) == (
        ("X-RateLimit-Limit", "20"),
        ("X-RateLimit-Remaining", "20"),
        ("x-ratelimit-limit-requests", "20"),
        ("x-ratelimit-remaining-requests", "20"),
        ("x-ratelimit-reset-requests", "0s"),
        ("x-ratelimit-limit-tokens", str(UNLIMITED)),
        ("x-ratelimit-remaining-tokens", str(UNLIMITED)),
        ("x-ratelimit-reset-tokens", "0s"),
    )


def test_headers_after_some_use() -> None:
    book, key = allowances(), Alice(rps=2, burst=5, tpm=600)
    granted(book.take(key, 0.0, NOON))
    granted(book.take(key, 0.0, NOON))
    book.charge("alice", 900, 0.0, NOON)
    told = headers_of(book, key, 0.25, NOON)
    assert told["X-RateLimit-Limit"] == told["x-ratelimit-limit-requests"] == "5"
    assert told["X-RateLimit-Remaining"] == "3"
    assert told["x-ratelimit-remaining-requests"] == "3"
    assert told["x-ratelimit-reset-requests"] == "750ms"
    assert told["x-ratelimit-limit-tokens"] == "600"
    assert told["x-ratelimit-remaining-tokens"] == "0"
    assert told["x-ratelimit-reset-tokens"] == "1m29.75s"


def test_a_key_with_daily_tokens_only_is_told_about_the_day() -> None:
    book, key = allowances(), Alice(daily_tokens=1000)
    assert headers_of(book, key, 0.0, NOON)["x-ratelimit-reset-tokens"] == "0s"
    book.charge("alice", 1500, 0.0, NOON)
    told = headers_of(book, key, 0.0, NOON)
    assert told["x-ratelimit-limit-tokens"] == "1000"
    assert told["x-ratelimit-remaining-tokens"] == "0"
    assert told["x-ratelimit-reset-tokens"] == "12h0m0s"


@pytest.mark.parametrize("seed", range(20))
def test_remaining_requests_are_exactly_those_that_are_granted(seed: int) -> None:
    rng = random.Random(seed)
    book = allowances()
    key = Alice(rps=rng.uniform(0.1, 30), burst=rng.randint(1, 30))
    now = rng.uniform(0, 1e6)
    for _ in range(300):
        now += rng.expovariate(key.rps or 1)
        remaining = int(headers_of(book, key, now, NOON)["X-RateLimit-Remaining"])
        answer = book.take(key, now, NOON)
        assert isinstance(answer, Grant) == (remaining >= 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_request_that_is_let_in_after_its_wait_was_announced(seed: int) -> None:
    rng = random.Random(seed)
    book, key = allowances(), Alice(rps=rng.uniform(0.01, 500), burst=1)
    now = rng.uniform(0, 1e9)
    granted(book.take(key, now, NOON))
    for _ in range(100):
        now += refused(book.take(key, now, NOON)).retry_after
        assert headers_of(book, key, now, NOON)["X-RateLimit-Remaining"] == "1"
        granted(book.take(key, now, NOON))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-1, "0s"),
        (0.0000001, "1ms"),
        (0.017, "17ms"),
        (0.12, "120ms"),
        (2.007, "2.007s"),  # times 1000 it is a trifle above 2007
        (0.9999, "1s"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9995, "1m0s"),
        (90.5, "1m30.5s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (86399, "23h59m59s"),
    ],
)
def test_durations_read_as_go_prints_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


# Accounts of keys that are gone


def test_an_idle_account_of_a_removed_key_is_dropped() -> None:
    book = allowances()
    book.give_back(granted(book.take(Alice("gone"), 0.0, NOON)))
    book.give_back(granted(book.take(Alice("here"), 0.0, NOON)))
    assert book.drop_idle({"here"}, 60.0, NOON) == 1
    assert len(book) == 1


def test_removing_and_adding_a_key_wins_nothing() -> None:
    book, key = allowances(), Alice(daily_tokens=10)
    book.give_back(granted(book.take(key, 0.0, NOON)))
    book.charge("alice", 10, 0.0, NOON)
    assert book.drop_idle(set(), 60.0, NOON + 60) == 0
    refused(book.take(key, 60.0, NOON + 60))
    assert book.drop_idle(set(), DAY, NOON + DAY) == 1


def test_an_account_with_a_request_in_flight_is_kept() -> None:
    book = allowances()
    grant = granted(book.take(Alice(), 0.0, NOON))
    assert book.drop_idle(set(), 60.0, NOON) == 0
    book.give_back(grant)
    assert book.drop_idle(set(), 60.0, NOON) == 1


# Failed logins


def test_twenty_failures_are_answered_and_then_ten_a_minute() -> None:
    logins = FailedLogins()
    assert [logins.failed("192.0.2.1", 0.0) for _ in range(20)] == [0.0] * 20
    assert logins.failed("192.0.2.1", 0.0) == pytest.approx(6)
    assert not logins.allowed("192.0.2.1", 5.9)
    assert logins.allowed("192.0.2.1", 6.0)
    assert logins.failed("192.0.2.1", 6.0) == 0.0
    assert logins.failed("192.0.2.1", 6.0) == pytest.approx(6)


def test_asking_is_not_counted_and_leaves_no_trace() -> None:
    logins = FailedLogins()
    for _ in range(1000):
        assert logins.allowed("192.0.2.1", 0.0)
    assert len(logins) == 0


def test_a_minute_admits_ten_more_however_often_it_is_tried() -> None:
    logins = FailedLogins()
    answered = sum(
        logins.failed("192.0.2.1", tenth / 10) == 0.0 for tenth in range(600)
    )
    assert answered == 20 + 9  # the tenth comes with the end of the minute
    assert logins.failed("192.0.2.1", 60.0) == 0.0


def test_addresses_do_not_share_their_failures() -> None:
    logins = FailedLogins()
    for _ in range(25):
        logins.failed("192.0.2.1", 0.0)
    assert logins.allowed("192.0.2.2", 0.0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "", True),
        ("unix:", "", False),
        ("not an address", "not an address", True),
    ],
)
def test_ipv6_counts_by_its_64_and_mapped_addresses_as_ipv4(
    one: str, other: str, same: bool
) -> None:
    logins = FailedLogins()
    for _ in range(20):
        logins.failed(one, 0.0)
    assert logins.allowed(other, 0.0) is not same


def test_a_flood_of_addresses_is_forgotten_oldest_first() -> None:
    logins = FailedLogins(max_addresses=100)
    for _ in range(21):
        logins.failed("192.0.2.1", 0.0)
    rng = random.Random(1)
    for _ in range(5000):
        logins.failed(str(rng.getrandbits(128)), 0.0)
        logins.failed("192.0.2.1", 0.0)
        assert len(logins) <= 100
    assert not logins.allowed("192.0.2.1", 0.0)


def test_an_overlong_address_is_cut() -> None:
    logins = FailedLogins()
    for number in range(20):
        logins.failed("x" * 64 + str(number), 0.0)
    assert not logins.allowed("x" * 10_000, 0.0)
