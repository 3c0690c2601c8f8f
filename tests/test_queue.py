"""What clients may rely on while every backend is busy."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway import (
    ADMIN,
    CHAT,
    DONE,
    FINISH,
    LAST_CHUNK,
    SSE_HEAD,
    USER,
    Exchange,
    FakeEngine,
    Gateway,
    chats,
    chunk,
    error_of,
    event,
    eventually,
    running,
)
from inferencia.app import make_backends
from inferencia.config import load
from inferencia.overlay import Flags
from inferencia.settings import QueueConfig

METRICS_KEY = "sk-test-metrics-0a9d8c7b6f"


class Holding(FakeEngine):
    """An engine that answers a request when the test lets it."""

    def __init__(self, *models: str) -> None:
        super().__init__(*models, behave=self._hold)
        self._let_go: dict[Exchange, asyncio.Event] = {}

    async def _hold(self, exchange: Exchange) -> None:
        event = self._let_go.setdefault(exchange, asyncio.Event())
        gone = asyncio.ensure_future(exchange.gone.wait())
        let_go = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait([gone, let_go], return_when="FIRST_COMPLETED")
        finally:
            gone.cancel()
            let_go.cancel()
        if event.is_set():
            await chats(exchange)

    def finish(self, exchange: Exchange) -> None:
        """Let it be answered now."""
        self._let_go.setdefault(exchange, asyncio.Event()).set()


def before(*engines: FakeEngine, further: dict[str, Any] | None = None, **options: Any):  # type: ignore[no-untyped-def]
    """A configuration in which each engine takes one request at a time."""
    backends = [
        {"name": f"b{number}", "type": "openai", "url": engine.url}
        | {"max_concurrency": 1}
        | options
        for number, engine in enumerate(engines)
    ]
    limits = {"requests_per_second": 10000, "burst": 10000}
    config = {"backends": backends, "ratelimit": limits} | (further or {})
    return json.dumps(config)


def asks(
    gateway: Gateway, content: str, key: str = USER, **further: Any
) -> "asyncio.Task[aiohttp.ClientResponse]":
    """A request under way."""
    messages = [{"role": "user", "content": content}]
    body = {"model": "m", "messages": messages} | further

    async def post() -> aiohttp.ClientResponse:
        answer: aiohttp.ClientResponse = await gateway.post(CHAT, body, key)
        await answer.read()
        return answer

    return asyncio.ensure_future(post())


def waiting(gateway: Gateway) -> int:
    return len(gateway.parts.line)


async def queued(gateway: Gateway, count: int) -> None:
    await eventually(lambda: waiting(gateway) == count, f"{count} requests wait")


def asked_for(exchange: Exchange) -> str:
    content: str = exchange.json["messages"][0]["content"]
    return content


@asynccontextmanager
async def one_busy(
    tmp_path: Path, **further: Any
) -> AsyncIterator[tuple[Gateway, Holding, Exchange]]:
    """A gateway whose only place is taken by a request of the admin's."""
    async with Holding() as engine:
        async with running(tmp_path, before(engine, further=further)) as gateway:
            first = asks(gateway, "first", ADMIN)
            exchange = await engine.next()
            try:
                yield gateway, engine, exchange
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)


async def test_a_backend_gets_no_more_requests_at_once_than_it_may(
    tmp_path: Path,
) -> None:
    async with one_busy(tmp_path) as (gateway, engine, first):
        task = asks(gateway, "second")
        await queued(gateway, 1)
        assert len(engine.exchanges) == 1
        engine.finish(first)
        second = await engine.next()
        assert gateway.parts.catalogue.backends[0].in_flight == 1
        engine.finish(second)
        assert (await task).status == 200


async def test_a_key_with_many_waiting_does_not_delay_anothers_first(
    tmp_path: Path,
) -> None:
    async with one_busy(tmp_path) as (gateway, engine, exchange):
        tasks = []
        for number in range(30):
            tasks.append(asks(gateway, f"root {number}", ADMIN))
            await queued(gateway, number + 1)
        tasks.append(asks(gateway, "alice"))
        await queued(gateway, 31)
        served = []
        for _ in range(31):
            engine.finish(exchange)
            exchange = await engine.next()
            served.append(asked_for(exchange))
        engine.finish(exchange)
        assert served == ["alice", *(f"root {number}" for number in range(30))]
        assert {(await task).status for task in tasks} == {200}


async def test_a_request_goes_to_whichever_backend_is_free_first(
    tmp_path: Path,
) -> None:
    async with Holding() as one, Holding() as two:
        async with running(tmp_path, before(one, two)) as gateway:
            tasks = [asks(gateway, str(number)) for number in range(2)]
            held = [await one.next(), await two.next()]
            tasks.append(asks(gateway, "third"))
            await queued(gateway, 1)
            two.finish(held[1])
            third = await two.next()
            assert asked_for(third) == "third"
            one.finish(held[0])
            two.finish(third)
            assert {(await task).status for task in tasks} == {200}


async def test_a_free_backend_of_lower_priority_is_used_before_anybody_waits(
    tmp_path: Path,
) -> None:
    async with Holding() as home, FakeEngine() as cloud:
        config = json.loads(before(home, cloud))
        config["backends"][0]["priority"] = 10
        async with running(tmp_path, json.dumps(config)) as gateway:
            first = asks(gateway, "first")
            held = await home.next()
            assert (await asks(gateway, "second")).status == 200
            assert asked_for(await cloud.next()) == "second"
            home.finish(held)
            await first


async def test_a_full_line_answers_503_queue_full_at_once(tmp_path: Path) -> None:
    async with one_busy(tmp_path, queue={"max_waiting": 1}) as (gateway, engine, held):
        task = asks(gateway, "second")
        await queued(gateway, 1)
        async with gateway.chat() as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            error = await error_of(answer)
        assert (error["type"], error["code"]) == ("backend_error", "queue_full")
        engine.finish(held)
        engine.finish(await engine.next())
        assert (await task).status == 200
        assert len(engine.exchanges) == 2


async def test_who_waited_too_long_gets_503_queue_timeout(tmp_path: Path) -> None:
    async with one_busy(tmp_path, queue={"timeout": "50ms"}) as (gateway, engine, _):
        async with gateway.chat() as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert (await error_of(answer))["code"] == "queue_timeout"
        assert len(engine.exchanges) == 1
        await eventually(lambda: bool(gateway.log.requests), "it is logged")
        line = gateway.log.requests[0]
        assert line["error"] == "queue_timeout"
        assert line["queued_ms"] >= 40  # some event loops round deadlines down


async def test_a_stream_that_waited_too_long_ends_with_an_error_event(
    tmp_path: Path,
) -> None:
    further = {"queue": {"timeout": 0.1}, "server": {"sse_keepalive": 0.01}}
    async with one_busy(tmp_path, **further) as (gateway, _, _):
        async with gateway.chat(stream=True) as answer:
            assert answer.status == 200
            text = (await answer.read()).decode()
        *comments, last = text.strip().split("\n\n")
        assert comments
        assert set(comments) == {": waiting, position 1"}
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "queue_timeout"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_while_queued_frees_its_place_and_costs_nothing(
    tmp_path: Path, stream: bool
) -> None:
    async with one_busy(tmp_path, queue={"max_waiting": 1}) as (gateway, engine, held):
        leaver = asks(gateway, "leaves", stream=stream)
        await queued(gateway, 1)
        leaver.cancel()
        await queued(gateway, 0)
        stayer = asks(gateway, "stays")
        await queued(gateway, 1)
        engine.finish(held)
        exchange = await engine.next()
        assert asked_for(exchange) == "stays"
        engine.finish(exchange)
        assert (await stayer).status == 200
        assert len(engine.exchanges) == 2
        await eventually(lambda: len(gateway.log.requests) == 3, "all are logged")
        (line,) = (m for m in gateway.log.requests if m["status"] == 499)
        assert line["queued_ms"] > 0
        assert "backend" not in line
        await eventually(lambda: not gateway.parts.doors.active, "all is over")
        assert gateway.parts.allowances.in_flight("alice") == 0


async def test_a_waiting_stream_is_told_its_position(tmp_path: Path) -> None:
    further = {"server": {"sse_keepalive": 0.01}}
    async with one_busy(tmp_path, **further) as (gateway, engine, held):
        ahead = asks(gateway, "ahead")
        await queued(gateway, 1)
        async with gateway.chat(stream=True) as answer:
            assert await answer.content.readline() == b": waiting, position 2\n"
            assert await answer.content.readline() == b"\n"
            engine.finish(held)
            exchange = await engine.next()
            while (line := await answer.content.readline()) != (
                b": waiting, position 1\n"
            ):
                assert line in (b"\n", b": waiting, position 2\n")
            engine.finish(exchange)
            exchange = await engine.next()
            while (line := await answer.content.readline()) != b": waiting\n":
                assert line in (b"\n", b": waiting, position 1\n")
            engine.finish(exchange)
            assert (await answer.read()).endswith(event("hi") + FINISH + DONE)
        await ahead


async def test_white_space_keeps_a_queued_plain_request_alive_where_wanted(
    tmp_path: Path,
) -> None:
    async with Holding() as engine:
        further = {"server": {"sse_keepalive": 0.01}}
        config = before(engine, further=further, pad_nonstream=True)
        async with running(tmp_path, config) as gateway:
            first = asks(gateway, "first")
            held = await engine.next()
            async with gateway.chat() as answer:
                assert await answer.content.readexactly(2) == b"  "
                engine.finish(held)
                engine.finish(await engine.next())
                assert "choices" in json.loads(await answer.read())
            await first


async def test_the_log_line_tells_how_long_a_request_was_held_back(
    tmp_path: Path,
) -> None:
    async with one_busy(tmp_path) as (gateway, engine, held):
        task = asks(gateway, "second")
        await queued(gateway, 1)
        told = [c.waits_for() for c in gateway.parts.doors.active if c.waits_for]
        assert told == ["position 1"]
        engine.finish(held)
        engine.finish(await engine.next())
        await task
        await eventually(lambda: len(gateway.log.requests) == 2, "both are logged")
        first, second = gateway.log.requests
        assert "queued_ms" not in first
        assert second["queue_position"] == 1
        assert 0 < second["queued_ms"] < second["duration_ms"]


async def test_metrics_tell_who_waits(tmp_path: Path) -> None:
    async with one_busy(tmp_path) as (gateway, engine, held):
        task = asks(gateway, "second")
        await queued(gateway, 1)
        async with gateway.get("/metrics", METRICS_KEY) as answer:
            text = await answer.text()
        assert 'inferencia_backend_requests_waiting{backend="b0"} 1' in text
        assert 'inferencia_queue_waiting{model="m"} 1' in text
        engine.finish(held)
        engine.finish(await engine.next())
        await task
        async with gateway.get("/metrics", METRICS_KEY) as answer:
            text = await answer.text()
        assert 'inferencia_backend_requests_waiting{backend="b0"} 0' in text
        labels = 'model="m",backend="b0",key="alice"'
        assert f"inferencia_queue_wait_seconds_count{{{labels}}} 1" in text


async def test_timeout_counts_from_the_sending_not_from_the_waiting(
    tmp_path: Path,
) -> None:
    async with Holding() as engine:
        async with running(tmp_path, before(engine, timeout=0.2)) as gateway:
            backend = gateway.parts.catalogue.backends[0]
            turn = backend.begin(0.0)  # some request that takes longer than that
            task = asks(gateway, "second")
            await queued(gateway, 1)
            await asyncio.sleep(0.3)
            turn.end()
            engine.finish(await engine.next())
            assert (await task).status == 200


async def test_fallbacks_are_tried_when_the_line_is_full(tmp_path: Path) -> None:
    async with Holding("m") as busy, FakeEngine("spare") as spare:
        further = {
            "queue": {"max_waiting": 0},
            "routing": {"fallbacks": {"m": ["spare"]}},
        }
        async with running(tmp_path, before(busy, spare, further=further)) as gateway:
            first = asks(gateway, "first")
            held = await busy.next()
            assert (await asks(gateway, "second")).status == 200
            assert (await spare.next()).json["model"] == "spare"
            busy.finish(held)
            await first


async def test_waiters_whose_backend_cannot_be_connected_to_are_told(
    tmp_path: Path,
) -> None:
    async with one_busy(tmp_path) as (gateway, engine, _):
        task = asks(gateway, "second")
        await queued(gateway, 1)
        await engine.stop()
        answer = await task
        assert answer.status == 503
        assert (await error_of(answer))["code"] == "backend_unavailable"
        assert waiting(gateway) == 0


async def test_a_drain_lets_those_who_wait_finish(tmp_path: Path) -> None:
    async with one_busy(tmp_path) as (gateway, engine, held):
        task = asks(gateway, "second")
        await queued(gateway, 1)
        gateway.parts.doors.draining = True
        assert (await asks(gateway, "third")).status == 503
        engine.finish(held)
        engine.finish(await engine.next())
        assert (await task).status == 200


async def test_a_reload_that_allows_more_lets_waiters_go(tmp_path: Path) -> None:
    async with one_busy(tmp_path) as (gateway, engine, held):
        tasks = [asks(gateway, f"{number}") for number in range(2)]
        await queued(gateway, 2)
        text = before(engine, max_concurrency=3)
        (tmp_path / "new.yaml").write_text(text)
        config = load(tmp_path / "new.yaml", {}, Flags()).config
        parts = gateway.parts
        made = make_backends(config.backends, parts.instance)
        await parts.catalogue.replace(made, config.routing, config.watchdog)
        for _ in range(2):
            engine.finish(await engine.next())
        assert {(await task).status for task in tasks} == {200}
        assert len(engine.exchanges) == 3
        engine.finish(held)


async def test_a_reload_gives_no_place_away_twice(tmp_path: Path) -> None:
    async with one_busy(tmp_path) as (gateway, engine, held):
        parts = gateway.parts
        tasks = []
        for number in range(3):  # the second reload comes while the first still counts
            tasks.append(asks(gateway, f"{number}"))
            await queued(gateway, number + 1)
            text = before(engine, stall_timeout=100 + number)
            (tmp_path / "new.yaml").write_text(text)
            config = load(tmp_path / "new.yaml", {}, Flags()).config
            made = make_backends(config.backends, parts.instance)
            await parts.catalogue.replace(made, config.routing, config.watchdog)
            assert waiting(gateway) == number + 1
            (backend,) = parts.catalogue.backends
            assert backend.is_full
        assert len(engine.exchanges) == 1
        for _ in range(3):
            engine.finish(held)
            held = await engine.next()
            assert backend.held == 1
        engine.finish(held)
        assert {(await task).status for task in tasks} == {200}
        await eventually(lambda: not backend.held, "its places are free")
        assert backend._elder is None


async def test_smaller_bounds_cut_nobody_who_waits(tmp_path: Path) -> None:
    async with one_busy(tmp_path) as (gateway, engine, held):
        task = asks(gateway, "second")
        await queued(gateway, 1)
        gateway.parts.line.change(QueueConfig(max_waiting=0))
        assert (await asks(gateway, "third")).status == 503
        engine.finish(held)
        engine.finish(await engine.next())
        assert (await task).status == 200


async def test_many_clients_of_two_keys_share_two_backends_without_a_loss(
    tmp_path: Path,
) -> None:
    busiest = {"now": 0, "most": 0}

    async def behave(exchange: Exchange) -> None:
        busiest["now"] += 1
        busiest["most"] = max(busiest.values())
        await exchange.write(SSE_HEAD)
        await asyncio.sleep(0)
        await exchange.write(chunk(event("hi") + FINISH + DONE))
        busiest["now"] -= 1  # before the gateway can know that it is over
        await exchange.write(LAST_CHUNK)

    async with FakeEngine(behave=behave) as one, FakeEngine(behave=behave) as two:
        config = before(one, two, further={"queue": {"max_waiting": 1000}})
        async with running(tmp_path, config) as gateway:
            tasks = [
                asks(gateway, "x", (USER, ADMIN)[number % 2], stream=True)
                for number in range(120)
            ]
            for number in range(0, 120, 7):
                tasks[number].cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            for answer in answers:
                if not isinstance(answer, asyncio.CancelledError):
                    assert isinstance(answer, aiohttp.ClientResponse)
                    assert (await answer.read()).endswith(DONE)
            await eventually(lambda: not gateway.parts.doors.active, "all is over")
            assert waiting(gateway) == 0
            assert [b.in_flight for b in gateway.parts.catalogue.backends] == [0, 0]
            assert busiest["most"] <= 2


async def test_a_key_of_higher_priority_goes_first(tmp_path: Path) -> None:
    keys = f"{USER} name=alice\n{ADMIN} name=boss role=admin priority=5\n"
    async with Holding() as engine:
        async with running(tmp_path, before(engine), keys=keys) as gateway:
            first = asks(gateway, "first")
            exchange = await engine.next()
            tasks = [asks(gateway, "second")]
            await queued(gateway, 1)
            tasks.append(asks(gateway, "boss", ADMIN))
            await queued(gateway, 2)
            engine.finish(exchange)
            await first
            order = []
            for _ in range(2):
                exchange = await engine.next()
                order.append(asked_for(exchange))
                engine.finish(exchange)
            assert order == ["boss", "second"]
            await asyncio.gather(*tasks)
