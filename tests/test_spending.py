"""Promises of ``spending.py``: every token is paid for exactly, and limits bind."""

import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from gateway import (
    METRICS,
    SSE_HEAD,
    Exchange,
    FakeEngine,
    Gateway,
    chunk,
    error_of,
    event,
    eventually,
    running,
)
from inferencia.measurement import Measurement
from inferencia.settings import BackendConfig
from inferencia.spending import UNITS, Spending, Spent, units

DAY = 86400


class Clock:
    """Wall-clock seconds; begins at noon of some day."""

    def __init__(self) -> None:
        self.now = 20_000 * DAY + DAY / 2

    def __call__(self) -> float:
        return self.now


def cloud(**config: Any) -> BackendConfig:
    prices = {"gpt-*": {"prompt": 0.15, "completion": 0.6}}
    given = {"url": "https://x", "prices": prices} | config
    return BackendConfig(name="cloud", **given)


def book(*configs: BackendConfig, clock: Clock | None = None) -> Spending:
    return Spending(configs or (cloud(),), wall_clock=clock or Clock())


def today(spending: Spending) -> float:
    (spent,) = spending.report()
    return spent.today


def paid(spending: Spending, model: str) -> float:
    """What a million tokens each of prompt and completion cost."""
    before = today(spending)
    spending.charge("cloud", model, prompt=1_000_000, completion=1_000_000)
    return today(spending) - before


def test_prompt_and_completion_have_their_own_prices() -> None:
    spending = book()
    spending.charge("cloud", "gpt-4o-mini", prompt=1000, completion=500)
    assert today(spending) == 0.00045


def test_a_model_without_a_price_costs_nothing() -> None:
    assert paid(book(), "qwen3") == 0


def test_an_exact_name_wins_over_a_pattern_and_earlier_patterns_over_later() -> None:
    prices = {
        "*": {"prompt": 9.0},
        "gpt-*": {"prompt": 8.0},
        "gpt-4o": {"prompt": 2.5},
    }
    spending = book(cloud(prices=prices))
    assert paid(spending, "gpt-4o") == 2.5
    assert paid(spending, "gpt-4") == 9.0


def test_prices_match_a_models_name_with_and_without_the_prefix() -> None:
    prices = {"gpt-*": {"prompt": 1.0}, "cloud/claude": {"prompt": 3.0}}
    spending = book(cloud(prices=prices, prefix="cloud/"))
    assert paid(spending, "cloud/gpt-4o") == 1.0
    assert paid(spending, "cloud/claude") == 3.0


def test_a_missing_half_of_a_price_is_nothing() -> None:
    assert paid(book(cloud(prices={"*": {"completion": 2.0}})), "m") == 2.0


def test_many_small_amounts_add_up_exactly() -> None:
    spending = book()
    for _ in range(1_000_000 // 1000):
        for _ in range(10):
            spending.charge("cloud", "gpt-4o-mini", prompt=100, completion=0)
    assert today(spending) == 0.15


@pytest.mark.parametrize("seed", range(20))
def test_what_is_spent_is_the_exact_sum_of_the_prices_as_written(seed: int) -> None:
    rng = random.Random(seed)
    price = {k: round(rng.uniform(0, 100), 6) for k in ("prompt", "completion")}
    spending = book(cloud(prices={"*": price}))
    exact = Fraction(0)
    for _ in range(200):
        tokens = {k: rng.randint(0, 10**6) for k in price}
        spending.charge("cloud", "m", **tokens)
        exact += sum(
            Fraction(repr(price[k])) * tokens[k] / 10**6
            for k in ("prompt", "completion")
        )
    account = spending._accounts["cloud"]
    assert Fraction(account.today, UNITS) == exact


@pytest.mark.parametrize(
    ("amount", "expected"),
    [(0.1, 10**11), (1, 10**12), (1e-12, 1), (2.5e-12, 3), (1e300, 10**312), (0.0, 0)],
)
def test_amounts_are_taken_as_written(amount: float, expected: int) -> None:
    assert units(amount) == expected


WORTH = {"qwen*": {"prompt": 0.1, "completion": 0.4}, "*": {"completion": 1.0}}


@pytest.mark.parametrize(
    ("backend", "model", "expected"),
    [
        ("qwen3", "qwen3", (0.5, False)),  # a model of this machine: its own backend
        ("attic", "llama", (1.0, False)),  # an agent's
        ("lan", "qwen3", (7.0, False)),  # a price of its own comes first
        ("lan", "gemma", (1.0, False)),
        ("cloud", "gpt-4o", (0.75, True)),
        ("cloud", "qwen3", (0.0, True)),  # what is paid for saves nothing
        ("bare", "qwen3", None),
    ],
)
def test_work_that_costs_nothing_is_worth_what_usage_prices_say(
    backend: str, model: str, expected: tuple[float, bool] | None
) -> None:
    configs = (
        cloud(url="https://api.example.com"),
        BackendConfig(name="bare", url="https://api.example.com"),
        BackendConfig(
            name="lan", url="http://192.168.1.2", prices={"qwen3": {"prompt": 7.0}}
        ),
    )
    spending = Spending(configs, WORTH, wall_clock=Clock())
    m = Measurement("id", "POST", model=model, backend=backend)
    m.prompt_tokens = m.completion_tokens = 1_000_000
    cost = spending.cost_of(m)
    assert (cost and (cost.units / UNITS, cost.is_billed)) == expected


def test_a_limit_binds_when_it_is_reached_and_not_before() -> None:
    spending = book(cloud(daily_spend=0.3))
    spending.charge("cloud", "gpt-4o-mini", prompt=1_999_999, completion=0)
    assert not spending.is_over("cloud")
    spending.charge("cloud", "gpt-4o-mini", prompt=1, completion=0)
    assert spending.is_over("cloud")


def test_a_new_day_begins_at_midnight_utc() -> None:
    clock = Clock()
    spending = book(cloud(daily_spend=0.1), clock=clock)
    spending.charge("cloud", "gpt-4o-mini", prompt=1_000_000, completion=0)
    assert spending.seconds_left_today == DAY / 2
    clock.now += DAY / 2 - 0.001
    assert spending.is_over("cloud")
    clock.now += 0.001
    assert not spending.is_over("cloud")
    assert spending.report() == [Spent("cloud", today=0, total=0.15, limit=0.1)]


def test_a_backend_without_a_limit_is_never_over_and_a_stranger_neither() -> None:
    spending = book()
    spending.charge("cloud", "gpt-4o-mini", prompt=10**12, completion=0)
    spending.charge("stranger", "gpt-4o-mini", prompt=10**12, completion=0)
    assert not spending.is_over("cloud")
    assert not spending.is_over("stranger")


def test_a_limit_without_prices_is_kept_and_never_reached() -> None:
    spending = book(cloud(prices={}, daily_spend=1.0))
    spending.charge("cloud", "gpt-4o-mini", prompt=10**9, completion=0)
    assert not spending.is_over("cloud")


def test_backends_without_prices_are_not_reported() -> None:
    assert book(BackendConfig(name="local", url="http://x")).report() == []


def test_a_change_of_prices_keeps_what_was_spent() -> None:
    spending = book(cloud(daily_spend=1.0))
    spending.charge("cloud", "gpt-4o-mini", prompt=2_000_000, completion=0)
    spending.change([cloud(daily_spend=0.3, prices={"*": {"prompt": 1.0}})])
    assert spending.is_over("cloud")
    assert spending.report() == [Spent("cloud", today=0.3, total=0.3, limit=0.3)]
    assert paid(spending, "gpt-4o-mini") == 1.0


def test_a_finished_request_is_charged_to_the_backend_that_served_it() -> None:
    spending = book()
    m = Measurement("id", "POST", model="gpt-4o-mini", backend="cloud")
    spending.record(m)  # nothing was counted
    assert today(spending) == 0
    m.prompt_tokens, m.completion_tokens = 1_000_000, None
    spending.record(m)
    assert today(spending) == 0.15
    m.backend = None
    spending.record(m)
    m.backend = "elsewhere"
    spending.record(m)
    assert today(spending) == 0.15


def test_remembered_prices_are_bounded() -> None:
    spending = book()
    for number in range(2000):
        spending.charge("cloud", f"gpt-{number}", prompt=1_000_000, completion=0)
    assert len(spending._accounts["cloud"].prices._found) == 1000
    assert today(spending) == 300.0


# --- through the gateway ---------------------------------------------------------

# An answer of FakeEngine has 7 and 2 tokens, so it costs a cent.
PRICES = {"m": {"prompt": 1000.0, "completion": 1500.0}}


def paid_backend(*engines: FakeEngine, limit: float, **further: Any) -> str:
    """A configuration whose first backend costs something."""
    backends: list[dict[str, Any]] = [
        {"name": f"b{number}", "type": "openai", "url": engine.url}
        for number, engine in enumerate(engines)
    ]
    backends[0] |= {"prices": PRICES, "daily_spend": limit, "priority": 1}
    return json.dumps({"backends": backends} | further)


async def chat(gateway: Gateway, stream: bool = False) -> None:
    async with gateway.chat(stream=stream) as answer:
        assert answer.status == 200
        await answer.read()


async def over(gateway: Gateway) -> None:
    await eventually(
        lambda: gateway.parts.spending.is_over("b0"), "it has spent enough"
    )


@pytest.mark.parametrize("stream", [True, False])
async def test_a_backend_that_has_spent_enough_gets_no_more_requests_today(
    tmp_path: Path, stream: bool
) -> None:
    async with FakeEngine() as engine:
        config = paid_backend(engine, limit=0.015)
        async with running(tmp_path, config) as gateway:
            await chat(gateway, stream)
            await chat(gateway, stream)
            await over(gateway)
            async with gateway.chat() as answer:
                assert answer.status == 503
                assert 1 <= int(answer.headers["Retry-After"]) <= DAY
                error = await error_of(answer)
            assert error["code"] == "backend_unavailable"
            assert "has spent its daily_spend of 0.015" in error["message"]
            assert len(engine.exchanges) == 2
            async with gateway.get("/health/ready", None) as answer:
                assert answer.status == 503


async def test_another_backend_takes_over_when_one_has_spent_enough(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as cloud, FakeEngine() as home:
        config = paid_backend(cloud, home, limit=0.001)
        async with running(tmp_path, config) as gateway:
            await chat(gateway)
            await over(gateway)
            await chat(gateway)
            assert (len(cloud.exchanges), len(home.exchanges)) == (1, 1)


async def test_a_fallback_is_used_when_a_backend_has_spent_enough(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as cloud, FakeEngine("small") as home:
        routing = {"fallbacks": {"m": ["small"]}}
        config = paid_backend(cloud, home, limit=0.001, routing=routing)
        async with running(tmp_path, config) as gateway:
            await chat(gateway)
            await over(gateway)
            await chat(gateway)
            assert (len(cloud.exchanges), len(home.exchanges)) == (1, 1)


async def test_what_a_client_that_leaves_has_been_sent_is_charged(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("hi") + event("ho")))
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, paid_backend(engine, limit=0.003)) as gateway:
            async with gateway.chat(stream=True) as answer:
                await answer.content.readexactly(len(event("hi") + event("ho")))
            await over(gateway)


async def test_metrics_tell_what_backends_have_cost(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        async with running(tmp_path, paid_backend(engine, limit=0.5)) as gateway:
            await chat(gateway)
            await eventually(lambda: bool(gateway.log.requests), "it is logged")
            async with gateway.get("/metrics", METRICS) as answer:
                text = await answer.text()
            for line in (
                'inferencia_backend_spend_total{backend="b0"} 0.01',
                'inferencia_backend_spend_today{backend="b0"} 0.01',
                'inferencia_backend_spend_limit{backend="b0"} 0.5',
            ):
                assert line in text
