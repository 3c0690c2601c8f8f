"""What a key may use, as its clients see it: headers, refusals, and one budget."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway import (
    ADMIN,
    CHAT,
    KEYS,
    LAST_CHUNK,
    METRICS,
    SSE_HEAD,
    USER,
    Exchange,
    FakeEngine,
    Gateway,
    behind,
    chats,
    chunk,
    event,
    eventually,
    running,
)
from inferencia.limits import UNLIMITED
from rawclient import Reply, ask, connected, request

FIVE = "sk-test-five-555555555555"
ONE = "sk-test-one-1111111111111"
TWO_AT_ONCE = "sk-test-two-2222222222222"
TPM = "sk-test-tpm-6666666666666"
DAILY = "sk-test-daily-7777777777777"
MORE_KEYS = f"""{KEYS}
{FIVE} name=five rps=0.01 burst=5
{ONE} name=one rps=0.01 burst=1
{TWO_AT_ONCE} name=two concurrency=2
{TPM} name=tpm tpm=10
{DAILY} name=daily daily_tokens=20
"""

STREAM = b'{"model":"m","stream":true,"messages":[1]}'
SIX = re.compile(r"x-ratelimit-(limit|remaining|reset)-(requests|tokens)")
GO_DURATION = re.compile(r"0s|\d+ms|(\d+h)?(\d+m)?\d+(\.\d{1,3})?s")


@contextlib.asynccontextmanager
async def front(
    folder: Path, engine: FakeEngine | None = None
) -> AsyncIterator[Gateway]:
    async with engine or FakeEngine() as there:
        async with running(folder, behind(there), keys=MORE_KEYS) as gateway:
            yield gateway


def limits_of(reply: Reply) -> dict[str, str]:
    """The eight headers, each there once and well-formed."""
    found = {
        name: value for name, value in reply.headers if name.startswith("x-ratelimit-")
    }
    assert len(found) == len([n for n, _ in reply.headers if n in found]) == 8, reply
    assert {"x-ratelimit-limit", "x-ratelimit-remaining"} < set(found)
    assert sum(bool(SIX.fullmatch(name)) for name in found) == 6
    for name, value in found.items():
        form = GO_DURATION if "reset" in name else re.compile(r"\d+")
        assert form.fullmatch(value), (name, value)
    return found


async def test_each_answer_to_a_request_that_counts_tells_where_the_key_stands(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway:
        answers = [
            (request(key=FIVE), 200),
            (request(key=FIVE, body=STREAM), 200),
            (request("/v1/models", method="GET", key=FIVE), 200),
            (request(key=FIVE, body=b"{"), 400),
            (request(key=FIVE, body=b'{"model":"nope","messages":[1]}'), 404),
            (request(key=FIVE), 429),
            (request(key=FIVE, body=STREAM), 429),
        ]
        left = 5
        for data, status in answers:
            reply = await ask(gateway, data)
            assert reply.status == status
            left = max(0, left - 1)
            told = limits_of(reply)
            assert told["x-ratelimit-limit"] == "5"
            assert told["x-ratelimit-limit-requests"] == "5"
            assert told["x-ratelimit-remaining"] == str(left)
            assert told["x-ratelimit-remaining-requests"] == str(left)
            assert told["x-ratelimit-limit-tokens"] == str(UNLIMITED)
        assert re.fullmatch(r"8m[0-9.]+s", told["x-ratelimit-reset-requests"])


async def test_what_does_not_count_tells_nothing_and_takes_nothing(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway:
        for data in (
            request("/health", method="GET", key=FIVE),
            request("/nowhere", method="GET", key=FIVE),
            request("/metrics", method="GET", key=FIVE),
            request("/metrics", method="GET", key=METRICS),
            request(CHAT, method="PUT", key=FIVE),
            request(key=METRICS),
            request(key=None),
            request(key="sk-wrong"),
        ):
            reply = await ask(gateway, data)
            assert not [name for name, _ in reply.headers if "ratelimit" in name]
        reply = await ask(gateway, request(key=FIVE))
        assert limits_of(reply)["x-ratelimit-remaining"] == "4"


async def test_a_key_has_one_budget_for_all_endpoints_and_addresses(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway:
        _, second_port = await gateway.parts.listener.open("127.0.0.1", 0)
        first_port = gateway.port
        for path, method, port in (
            (CHAT, "POST", first_port),
            ("/v1/models", "GET", second_port),
            ("/v1/messages", "POST", first_port),
            ("/v1/embeddings", "POST", second_port),
            ("/v1/usage", "GET", first_port),
        ):
            gateway.port = port
            body = b'{"model":"m","messages":[1],"input":"x"}'
            reply = await ask(gateway, request(path, body, method=method, key=FIVE))
            assert reply.status == 200
        for port in (first_port, second_port):
            gateway.port = port
            assert (await ask(gateway, request(key=FIVE))).status == 429
            assert (await ask(gateway, request(key=ONE))).status in (200, 429)
        assert (await ask(gateway, request(key=ADMIN))).status == 200


async def test_a_refusal_names_the_key_the_limit_and_when_again(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        assert (await ask(gateway, request(key=ONE))).status == 200
        reply = await ask(gateway, request(key=ONE))
        assert reply.status == 429
        assert re.fullmatch(
            r'key "one" may send 0\.01 requests a second; try again in \d+ s',
            reply.error["message"],
        )
        text = gateway.parts.metrics.render().decode()
        assert (
            'inferencia_ratelimit_rejections_total{reason="requests",key="one"} 1'
            in text
        )
        line = gateway.log.requests[-1]
        assert (line["key"], line["error"]) == ("one", "rate_limit_exceeded")


async def test_a_refused_request_reaches_no_engine_and_its_body_is_not_read(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine:
        async with running(tmp_path, behind(engine), keys=MORE_KEYS) as gateway:
            assert (await ask(gateway, request(key=ONE))).status == 200
            async with connected(gateway) as wire:
                await wire.send(request(body=b"", length=10**9, key=ONE))
                reply = await wire.reply()
                assert reply.status == 429
                assert reply.header("connection") == "close"
            assert len(engine.exchanges) == 1


async def test_as_many_as_allowed_run_at_once_and_no_more(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        if exchange.json.get("stream"):
            await exchange.write(SSE_HEAD + chunk(event("hi")))
        await go_on.wait()
        await exchange.write(LAST_CHUNK)

    engine = FakeEngine(behave=behave)
    async with front(tmp_path, engine) as gateway:
        data = request(key=TWO_AT_ONCE, body=STREAM)
        async with connected(gateway) as one, connected(gateway) as two:
            for wire in (one, two):
                await wire.send(data)
                await engine.next()
            for _ in range(3):
                reply = await ask(gateway, data)
                assert (reply.status, reply.header("retry-after")) == (429, "1")
                assert reply.error["code"] == "rate_limit_exceeded"
                assert "2 requests running at a time" in reply.error["message"]
                limits_of(reply)
            assert gateway.parts.allowances.in_flight("two") == 2
            # A client that leaves makes room.
            one.close()
            await eventually(
                lambda: gateway.parts.allowances.in_flight("two") == 1, "one has left"
            )
            async with connected(gateway) as three:
                await three.send(data)
                await engine.next()
                assert gateway.parts.allowances.in_flight("two") == 2
        await eventually(
            lambda: gateway.parts.allowances.in_flight("two") == 0, "all have left"
        )


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request(key=TWO_AT_ONCE, body=b"{"), 400),
        (request(key=TWO_AT_ONCE, body=b'{"model":"x","messages":[1]}'), 404),
        (request(key=TWO_AT_ONCE, body=b"", length=10**9), 413),
        (request(key=TWO_AT_ONCE, headers=[("Content-Encoding", "br")]), 415),
        (request(key=TWO_AT_ONCE), 200),
        (request(key=TWO_AT_ONCE, body=STREAM), 200),
        (request("/v1/usage", method="GET", key=TWO_AT_ONCE), 200),
    ],
)
async def test_a_place_is_given_back_however_a_request_ends(
    tmp_path: Path, data: bytes, status: int
) -> None:
    async with front(tmp_path) as gateway:
        for _ in range(5):
            assert (await ask(gateway, data)).status == status
        await eventually(
            lambda: gateway.parts.allowances.in_flight("two") == 0, "all are given back"
        )


@pytest.mark.parametrize("body", [STREAM, STREAM.replace(b"true", b"false")])
async def test_tokens_a_minute_are_a_debt_that_later_requests_pay(
    tmp_path: Path, body: bytes
) -> None:
    async with front(tmp_path) as gateway:  # each answer costs 9 tokens
        data = request(key=TPM, body=body)
        told = limits_of(await ask(gateway, data))
        assert told["x-ratelimit-limit-tokens"] == "10"
        assert told["x-ratelimit-remaining-tokens"] == "10"
        told = limits_of(await ask(gateway, data))
        assert told["x-ratelimit-remaining-tokens"] == "1"
        reply = await ask(gateway, data)
        assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
        # 8 tokens of debt and one to begin with, at 10 a minute.
        assert 50 <= int(reply.header("retry-after") or 0) <= 54
        told = limits_of(reply)
        assert told["x-ratelimit-remaining-tokens"] == "0"
        assert told["x-ratelimit-reset-tokens"].startswith("1m4")
        assert 'key "tpm" may use 10 tokens a minute' in reply.error["message"]


async def test_a_stream_that_broke_costs_what_had_come(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("a") + event("b") + event("c")))
        exchange.cut()

    async with front(tmp_path, FakeEngine(behave=behave)) as gateway:
        assert (await ask(gateway, request(key=TPM, body=STREAM))).status == 200
        told = limits_of(await ask(gateway, request(key=TPM, body=STREAM)))
        assert int(told["x-ratelimit-remaining-tokens"]) <= 7


async def test_tokens_a_day_are_counted_over_all_endpoints(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        if exchange.request.target == "/v1/embeddings":
            usage = {"prompt_tokens": 4, "total_tokens": 4}
            await exchange.answer({"object": "list", "data": [], "usage": usage})
        else:
            await chats(exchange)

    async with front(tmp_path, FakeEngine(behave=behave)) as gateway:
        left = []
        for path, body in (
            (CHAT, b'{"model":"m","messages":[1]}'),
            (CHAT, STREAM),
            ("/v1/embeddings", b'{"model":"m","input":"x"}'),
        ):
            told = limits_of(await ask(gateway, request(path, body, key=DAILY)))
            assert told["x-ratelimit-limit-tokens"] == "20"
            left.append(told["x-ratelimit-remaining-tokens"])
        assert left == ["20", "11", "2"]
        reply = await ask(gateway, request(key=DAILY))
        assert (reply.status, reply.error["code"]) == (429, "insufficient_quota")
        assert limits_of(reply)["x-ratelimit-remaining-tokens"] == "0"
        assert 'key "daily" has used its 20 tokens' in reply.error["message"]


@pytest.mark.parametrize("key", [DAILY, TPM])
async def test_what_costs_no_tokens_goes_on_when_all_tokens_are_used_up(
    tmp_path: Path, key: str
) -> None:
    async with front(tmp_path) as gateway:
        statuses = [(await ask(gateway, request(key=key))).status for _ in range(4)]
        assert statuses[-1] == 429
        for path in ("/v1/models", "/v1/models/m", "/v1/usage", "/models"):
            reply = await ask(gateway, request(path, method="GET", key=key))
            assert reply.status == 200, path
            left = limits_of(reply)["x-ratelimit-remaining-tokens"]
            assert left == "0", path
        reply = await ask(gateway, request("/infer/abort", method="GET", key=key))
        assert reply.status in (202, 204)


async def test_a_key_sees_its_own_use_and_nobody_elses(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        for key in (USER, USER, TWO_AT_ONCE):
            assert (await ask(gateway, request(key=key))).status == 200
        for key, tokens in ((USER, 18), (TWO_AT_ONCE, 9), (DAILY, 0)):
            reply = await ask(gateway, request("/v1/usage", method="GET", key=key))
            assert (reply.status, reply.json["total_tokens"]) == (200, tokens)


async def test_other_defaults_hold_for_keys_that_say_nothing(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        config = json.loads(behind(engine))
        config["ratelimit"] = {"requests_per_second": 0.01, "burst": 2}
        async with running(tmp_path, json.dumps(config), keys=MORE_KEYS) as gateway:
            statuses = [(await ask(gateway, request())).status for _ in range(3)]
            assert statuses == [200, 200, 429]
            # Keys do not share.
            assert (await ask(gateway, request(key=ADMIN))).status == 200
            assert (await ask(gateway, request(key=FIVE))).status == 200


async def test_strangers_get_no_account(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        async with connected(gateway) as wire:
            for number in range(50):
                headers = [("X-Forwarded-For", f"198.51.{number}.1")]
                await wire.send(request(key=f"sk-no-{number}", headers=headers))
                await wire.reply()
        assert len(gateway.parts.allowances) == 0
        assert len(gateway.parts.doors.failed_logins) == 1
