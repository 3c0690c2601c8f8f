"""Who answers a request, what is sent up and what comes down: through HTTP, end to end.

Each test runs a whole gateway in front of engines that do as they are told.
"""

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway import (
    CHAT,
    DONE,
    FINISH,
    KEYS,
    LAST_CHUNK,
    SSE_HEAD,
    USER,
    Exchange,
    FakeEngine,
    Gateway,
    behind,
    chats,
    chunk,
    error_of,
    event,
    eventually,
    running,
)
from inferencia import errand, relaying
from inferencia.app import make_backends
from inferencia.backends.base import Backend
from inferencia.breaker import FAILURES, OPEN_SECONDS
from inferencia.catalogue import watching
from inferencia.config import load
from inferencia.overlay import Flags
from scripted import Received, Scripted, always, listed, response

NARROW = "sk-test-narrow-31aa7c90d1"
KEYS_WITH_NARROW = KEYS + f"{NARROW} name=narrow models=m,small*\n"

LOADING = {"message": "Loading model", "type": "unavailable_error", "code": 503}


def config(*backends: dict[str, Any], **parts: Any) -> str:
    """A configuration; backends are named b0, b1, ... and of type openai."""
    named = [
        {"name": f"b{number}", "type": "openai"} | backend
        for number, backend in enumerate(backends)
    ]
    limits = {"requests_per_second": 10000, "burst": 10000}
    return json.dumps({"backends": named, "ratelimit": limits} | parts)


def at(engine: FakeEngine, **options: Any) -> dict[str, Any]:
    return {"url": engine.url} | options


def backend(gateway: Gateway, number: int = 0) -> Backend:
    return gateway.parts.catalogue.backends[number]


def answers(
    body: bytes | dict[str, Any], status: int = 200, head: bytes = b""
) -> Callable[[Exchange], Awaitable[None]]:
    """A behaviour: always this answer, with these further header lines."""

    async def behave(exchange: Exchange) -> None:
        whole = response(body, status=status)
        await exchange.write(whole.replace(b"\r\n", b"\r\n" + head, 1))

    return behave


async def cuts(exchange: Exchange) -> None:
    """End the connection without a byte."""
    exchange.cut()


async def hangs(exchange: Exchange) -> None:
    """Say nothing until the gateway hangs up."""
    await exchange.gone.wait()


def served(gateway: Gateway) -> list[str]:
    """The backends that answered so far, as the log tells."""
    return [line["backend"] for line in gateway.log.requests if "backend" in line]


async def chat_ok(gateway: Gateway, **further: Any) -> dict[str, Any]:
    async with gateway.chat(**further) as answer:
        body: dict[str, Any] = await answer.json()
        assert answer.status == 200, body
        return body


async def refused_chat(
    gateway: Gateway, status: int, code: str, **further: Any
) -> dict[str, Any]:
    async with gateway.chat(**further) as answer:
        error = await error_of(answer)
        assert (answer.status, error["code"]) == (status, code), error
        return error


@asynccontextmanager
async def dead_after_listing(*models: str) -> AsyncIterator[FakeEngine]:
    """An engine whose models are known and whose port refuses connections."""
    engine = FakeEngine(*models)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


# --- failover ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refused_connection_is_tried_at_the_next_backend(
    tmp_path: Path, stream: bool
) -> None:
    async with dead_after_listing() as dead, FakeEngine() as alive:
        text = config(at(dead, priority=1), at(alive))
        async with running(tmp_path, text) as gateway:
            await dead.stop()
            async with gateway.chat(stream=stream) as answer:
                assert answer.status == 200
                assert b'"hi"' in await answer.read()
            assert len(alive.exchanges) == 1
            await eventually(lambda: served(gateway) == ["b1"], "it is logged")


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux fills its backlog")
async def test_a_machine_that_takes_no_connection_is_left_for_the_next_one(
    tmp_path: Path,
) -> None:
    with socket.socket() as full, socket.socket() as one, socket.socket() as two:
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # has room for one connection, or two
        for filler in (one, two):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        hole: dict[str, Any] = {"models": ["m"], "connect_timeout": "50ms"}
        hole |= {"url": f"http://127.0.0.1:{full.getsockname()[1]}", "priority": 1}
        async with FakeEngine() as engine:
            text = config(hole, at(engine, models=["m"]))
            async with running(tmp_path, text, waits=False) as gateway:
                await chat_ok(gateway)
                await eventually(lambda: served(gateway) == ["b1"], "it is logged")
        async with running(tmp_path, config(hole), waits=False) as gateway:
            await refused_chat(gateway, 504, "backend_timeout")


async def test_comments_do_not_count_as_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "_LOADING_POLL_SECONDS", 0.01)
    go_down = asyncio.Event()

    async def loads(exchange: Exchange) -> None:
        if go_down.is_set():
            assert first._server is not None
            first._server.close()  # so that nobody can connect any more
        await exchange.answer({"error": LOADING}, 503)

    async with FakeEngine(behave=loads) as first, FakeEngine() as second:
        text = config(at(first, priority=1), at(second), server={"sse_keepalive": 0.02})
        async with running(tmp_path, text) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert (await answer.content.readline()).startswith(b":")
                go_down.set()
                assert (await answer.read()).endswith(event("hi") + FINISH + DONE)
            assert len(second.exchanges) == 1


@pytest.mark.parametrize("behave", [cuts, hangs, answers(b"x", 500)])
async def test_a_request_that_reached_an_engine_is_never_sent_to_another(
    tmp_path: Path, behave: Callable[[Exchange], Awaitable[None]]
) -> None:
    async with FakeEngine(behave=behave) as bad, FakeEngine() as good:
        text = config(at(bad, priority=1, timeout=0.05), at(good))
        async with running(tmp_path, text) as gateway:
            async with gateway.chat() as answer:
                assert answer.status in (500, 502, 504)
            assert len(bad.exchanges) == 1
            assert not good.exchanges


class KeepsAlive:
    """A server that keeps connections, and closes each at its second request."""

    def __init__(self) -> None:
        self.heads: list[tuple[int, int]] = []  # connection, request of it
        self._connections = 0
        self._server: asyncio.Server | None = None
        self.url = ""

    async def __aenter__(self) -> "KeepsAlive":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._connections += 1
        me, count = self._connections, 0
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if b"/v1/models" in head:
                    body = json.dumps(listed("m")).encode()
                else:
                    body = b'{"choices":[{"message":{"content":"hi"}}]}'
                    count += 1
                    self.heads.append((me, count))
                    length = head.lower().partition(b"content-length:")[2]
                    await reader.readexactly(int(length.partition(b"\r")[0]))
                    if count == 2:
                        break
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
                )
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


async def test_a_kept_connection_that_closes_without_a_byte_costs_nobody_an_answer(
    tmp_path: Path,
) -> None:
    async with KeepsAlive() as engine:
        async with running(tmp_path, config({"url": engine.url})) as gateway:
            await chat_ok(gateway)
            await chat_ok(gateway)
        (one, _), (again, number), (fresh, first) = engine.heads
        assert (again, number, first) == (one, 2, 1)
        assert fresh != one


# --- fallbacks ---------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_fallback_answers_when_the_model_answers_429_or_5xx(
    tmp_path: Path, status: int
) -> None:
    async with (
        FakeEngine("m", behave=answers(b"busy", status)) as first,
        FakeEngine("small") as second,
    ):
        routing = {"fallbacks": {"m": ["missing", "small"]}}
        text = config(at(first), at(second), routing=routing)
        async with running(tmp_path, text) as gateway:
            await chat_ok(gateway)
            assert second.exchanges[0].json["model"] == "small"
            await eventually(lambda: bool(gateway.log.requests), "it is logged")
            line = gateway.log.requests[0]
            assert (line["model"], line["backend"]) == ("small", "b1")


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_the_clients_own_fault_is_no_reason_for_a_fallback(
    tmp_path: Path, status: int
) -> None:
    async with (
        FakeEngine("m", behave=answers(b"no", status)) as first,
        FakeEngine("small") as second,
    ):
        routing = {"fallbacks": {"m": ["small"]}}
        text = config(at(first), at(second), routing=routing)
        async with running(tmp_path, text) as gateway:
            async with gateway.chat() as answer:
                assert answer.status == status
            assert not second.exchanges


async def test_a_fallback_answers_when_the_machine_went_away(tmp_path: Path) -> None:
    async with dead_after_listing("m") as first, FakeEngine("small") as second:
        routing = {"fallbacks": {"m": ["small"]}}
        text = config(at(first), at(second), routing=routing)
        async with running(tmp_path, text) as gateway:
            await first.stop()
            await chat_ok(gateway)
            assert second.exchanges


async def test_a_fallback_answers_for_a_machine_that_was_never_up(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    async with FakeEngine("small") as second:
        routing = {"fallbacks": {"big": ["small"]}, "aliases": {"gpt": "big"}}
        off = {"url": f"http://127.0.0.1:{unused_tcp_port}"}
        async with running(
            tmp_path, config(off, at(second), routing=routing)
        ) as gateway:
            await chat_ok(gateway, model="big")


async def test_after_the_first_byte_there_is_no_fallback(tmp_path: Path) -> None:
    async def breaks(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("one")))
        exchange.cut()

    async with (
        FakeEngine("m", behave=breaks) as first,
        FakeEngine("small") as second,
    ):
        routing = {"fallbacks": {"m": ["small"]}}
        text = config(at(first), at(second), routing=routing)
        async with running(tmp_path, text) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert b'"backend_error"' in await answer.read()
            assert not second.exchanges


async def test_a_fallback_opens_nothing_that_the_key_may_not_see(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    async with (
        FakeEngine("m", behave=answers(b"x", 500)) as first,
        FakeEngine("secret") as second,
    ):
        routing = {"fallbacks": {"m": ["secret"], "hidden": ["m", "secret"]}}
        text = config(at(first), at(second), routing=routing)
        async with running(tmp_path, text, keys=KEYS_WITH_NARROW) as gateway:
            body = {"model": "m", "messages": [1]}
            async with gateway.post(CHAT, body, key=NARROW) as answer:
                assert answer.status == 500
            # Nor does a name that this key may not use, whatever its fallbacks.
            body = {"model": "hidden", "messages": [1]}
            async with gateway.post(CHAT, body, key=NARROW) as answer:
                assert answer.status == 404
            assert not second.exchanges


# --- names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "sent"),
    [
        ("qwen3:8b", "qwen3:8b"),
        ("llama3", "llama3:latest"),
        ("gpt-4o-mini", "qwen3:8b"),
        ("claude-opus-9", "llama3:latest"),
        (None, "qwen3:8b"),
        ("phi.gguf", "/models/phi.gguf"),
    ],
)
async def test_a_name_leads_to_the_model_that_is_meant(
    tmp_path: Path, requested: str | None, sent: str
) -> None:
    async with FakeEngine("qwen3:8b", "llama3:latest", "/models/phi.gguf") as engine:
        routing = {
            "aliases": {"gpt-4o-mini": "qwen3:8b", "claude-*": "llama3"},
            "default_model": "gpt-4o-mini",
        }
        async with running(tmp_path, config(at(engine), routing=routing)) as gateway:
            body: dict[str, Any] = {"messages": [1]}
            if requested is not None:
                body["model"] = requested
            async with gateway.post(CHAT, body) as answer:
                assert answer.status == 200
            assert engine.exchanges[0].json["model"] == sent


async def test_without_a_default_the_only_model_is_meant(tmp_path: Path) -> None:
    async with FakeEngine("only") as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            for body in ({"messages": [1]}, {"model": None, "messages": [1]}):
                async with gateway.post(CHAT, body) as answer:
                    assert answer.status == 200
                assert engine.exchanges[-1].json["model"] == "only"


async def test_without_a_default_the_loaded_model_goes_before_the_first(
    tmp_path: Path,
) -> None:
    def script(received: Received) -> bytes:
        if received.method == "POST":
            return response({"model": json.loads(received.body)["model"]})
        models = listed("a", "b", "c")
        for model in models["data"]:
            is_loaded = model["id"] == "b"
            model["status"] = {"value": "loaded" if is_loaded else "unloaded"}
        return response(models)

    async with Scripted(script) as router:
        async with running(tmp_path, config({"url": router.url})) as gateway:
            async with gateway.post(CHAT, {"messages": [1]}) as answer:
                assert await answer.json() == {"model": "b"}


async def test_a_prefix_is_part_of_the_name_here_and_not_there(tmp_path: Path) -> None:
    async with FakeEngine("m") as engine:
        text = config(at(engine, prefix="big/"))
        async with running(tmp_path, text) as gateway:
            await refused_chat(gateway, 404, "model_not_found", model="m")
            await chat_ok(gateway, model="big/m")
            assert engine.exchanges[0].json["model"] == "m"
            async with gateway.get("/v1/models/big/m") as answer:
                assert (await answer.json())["id"] == "big/m"


async def test_an_unknown_name_is_refused_with_the_nearest_and_where_to_look(
    tmp_path: Path,
) -> None:
    async with FakeEngine("qwen3:8b") as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            error = await refused_chat(gateway, 404, "model_not_found", model="qwen")
            assert error["type"] == "invalid_request_error"
            for word in ('"qwen"', '"qwen3:8b"', "GET /v1/models"):
                assert word in error["message"]


async def test_a_hidden_model_is_answered_as_an_unknown_one(tmp_path: Path) -> None:
    async with FakeEngine("m", "secret") as engine:
        routing = {"aliases": {"small-alias": "secret"}}
        text = config(at(engine), routing=routing)
        async with running(tmp_path, text, keys=KEYS_WITH_NARROW) as gateway:
            said = []
            for name in ("secret", "sicret", "small-alias"):
                body = {"model": name, "messages": [1]}
                async with gateway.post(CHAT, body, key=NARROW) as answer:
                    assert answer.status == 404
                    message = (await error_of(answer))["message"]
                    said.append(message.replace(name, "NAME"))
            assert len(set(said)) == 1
            async with gateway.get("/v1/models", key=NARROW) as answer:
                data = (await answer.json())["data"]
            assert [entry["id"] for entry in data] == ["m"]
            async with gateway.get("/v1/models/secret", key=NARROW) as answer:
                assert answer.status == 404


@pytest.mark.parametrize(
    "members",
    [
        {"models": ["m", "secret"]},
        {"models": "secret"},
        {"route": "secret"},
        {"models": ["m"], "route": "secret"},
    ],
)
async def test_members_that_name_further_models_are_held_against_the_key(
    tmp_path: Path, members: dict[str, Any]
) -> None:
    async with FakeEngine("m", "secret") as engine:
        async with running(tmp_path, behind(engine), keys=KEYS_WITH_NARROW) as gateway:
            body = {"model": "m", "messages": [1]} | members
            async with gateway.post(CHAT, body, key=NARROW) as answer:
                assert answer.status == 404
                assert (await error_of(answer))["code"] == "model_not_found"
            assert not engine.exchanges
            async with gateway.post(CHAT, body) as answer:  # of a key that may see all
                assert answer.status == 200
            for name, value in members.items():
                assert engine.exchanges[0].json[name] == value


async def test_the_list_is_merged_sorted_and_without_doubles(tmp_path: Path) -> None:
    async with FakeEngine("b", "a") as one, FakeEngine("b", "c") as two:
        async with running(tmp_path, config(at(one), at(two))) as gateway:
            for path in ("/v1/models", "/v1/"):
                async with gateway.get(path) as answer:
                    body = await answer.json()
                assert body["object"] == "list"
                assert [entry["id"] for entry in body["data"]] == ["a", "b", "c"]


async def test_the_list_does_not_wait_for_a_machine_that_is_off(tmp_path: Path) -> None:
    async with Scripted(always(None)) as silent, FakeEngine("m") as engine:
        text = config(
            {"url": silent.url},
            at(engine),
            watchdog={"request_timeout": "10s", "interval": "20ms"},
        )
        async with running(tmp_path, text, waits=False) as gateway:
            await eventually(
                lambda: backend(gateway, 1).is_listed, "the other one is listed"
            )
            times = []
            for _ in range(5):
                began = time.monotonic()
                async with gateway.get("/v1/models") as answer:
                    data = (await answer.json())["data"]
                times.append(time.monotonic() - began)
                assert [entry["id"] for entry in data] == ["m"]
            # A promise to users, not a measurement: the best of five on a busy machine.
            assert min(times) < 0.05


# --- choosing among backends -------------------------------------------------------


async def test_the_higher_priority_is_asked_as_long_as_it_is_up(tmp_path: Path) -> None:
    async with FakeEngine() as low, FakeEngine() as high:
        text = config(at(low), at(high, priority=5))
        async with running(tmp_path, text) as gateway:
            for _ in range(3):
                await chat_ok(gateway)
            assert (len(low.exchanges), len(high.exchanges)) == (0, 3)


async def test_a_conversation_stays_where_it_began(tmp_path: Path) -> None:
    async with FakeEngine() as one, FakeEngine() as two:
        async with running(tmp_path, config(at(one), at(two))) as gateway:
            for talk in range(4):
                turns: list[dict[str, str]] = []
                counts = set()
                for said in ("hello", "and?", "more"):
                    turns.append({"role": "user", "content": f"{said} {talk}"})
                    before = len(one.exchanges)
                    await chat_ok(gateway, messages=turns)
                    counts.add(len(one.exchanges) - before)
                    turns.append({"role": "assistant", "content": "hi"})
                assert len(counts) == 1
            assert one.exchanges
            assert two.exchanges


async def test_equal_backends_share_by_least_load(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def waits(exchange: Exchange) -> None:
        await go_on.wait()
        await chats(exchange)

    async with FakeEngine(behave=waits) as one, FakeEngine(behave=waits) as two:
        text = config(at(one), at(two), routing={"affinity": False})
        async with running(tmp_path, text) as gateway:
            asked = [asyncio.ensure_future(chat_ok(gateway)) for _ in range(6)]
            await eventually(
                lambda: len(one.exchanges) + len(two.exchanges) == 6,
                "all have arrived",
            )
            assert len(one.exchanges) == 3
            go_on.set()
            await asyncio.gather(*asked)


# --- what is down ------------------------------------------------------------------


async def test_a_machine_that_is_off_from_the_start_is_named_with_the_remedy(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    async with running(tmp_path, config({"url": f"http://{address}"})) as gateway:
        async with gateway.chat() as answer:
            error = await error_of(answer)
            assert (answer.status, error["code"]) == (503, "backend_unavailable")
            assert int(answer.headers["Retry-After"]) >= 1
        for word in ('"b0"', address, "refuses connections", "start it"):
            assert word in error["message"], error
        async with gateway.get("/health/ready", key=None) as answer:
            assert answer.status == 503
            assert address not in await answer.text()
        async with gateway.chat() as answer:  # and to a stranger nothing
            pass
        async with gateway.post(CHAT, {"model": "m", "messages": [1]}, None) as answer:
            assert answer.status == 401
            assert address not in await answer.text()


async def test_an_unknown_name_may_be_on_a_machine_that_is_off_and_that_is_said(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    async with FakeEngine("m") as engine:
        off = {"url": f"http://127.0.0.1:{unused_tcp_port}"}
        async with running(tmp_path, config(at(engine), off)) as gateway:
            error = await refused_chat(gateway, 404, "model_not_found", model="big")
            assert '"b1"' in error["message"]


async def test_a_known_model_whose_machine_is_down_is_unavailable_not_unknown(
    tmp_path: Path,
) -> None:
    async with dead_after_listing("m") as dead, FakeEngine("other") as alive:
        watchdog = {"interval": "20ms", "fail_threshold": 2}
        text = config(at(dead), at(alive), watchdog=watchdog)
        async with running(tmp_path, text) as gateway:
            await dead.stop()
            await eventually(lambda: backend(gateway).is_down, "it is taken down")
            async with gateway.chat() as answer:
                error = await error_of(answer)
                assert (answer.status, error["code"]) == (503, "backend_unavailable")
                assert answer.headers["Retry-After"]
            await refused_chat(gateway, 404, "model_not_found", model="nonsense")
            async with gateway.get("/v1/models") as answer:  # it is still known
                ids = [entry["id"] for entry in (await answer.json())["data"]]
            assert ids == ["m", "other"]
            await dead.start()
            await eventually(lambda: not backend(gateway).is_down, "it is back")
            await chat_ok(gateway)
            said = [line["msg"] for line in gateway.log.lines]
            assert sum("out of service" in text for text in said) == 1
            assert sum("back in service" in text for text in said) == 1


async def test_a_backend_that_keeps_failing_is_left_alone_until_one_probe_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = 0.0
    clock = time.monotonic

    class Clock:
        """The clock of breakers, which a test can put forward."""

        @staticmethod
        def monotonic() -> float:
            return clock() + late

    async with FakeEngine(behave=answers(b"broken", 500)) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            for module in (errand, relaying):
                monkeypatch.setattr(module, "time", Clock)
            monkeypatch.setattr(gateway.parts.catalogue, "clock", Clock.monotonic)
            for _ in range(FAILURES):
                async with gateway.chat() as answer:
                    assert answer.status == 500
            async with gateway.chat() as answer:
                error = await error_of(answer)
                assert (answer.status, error["code"]) == (503, "backend_unavailable")
                assert 1 <= int(answer.headers["Retry-After"]) <= OPEN_SECONDS
            assert len(engine.exchanges) == FAILURES
            async with gateway.get("/metrics", key="sk-test-admin-77b0d2c4e8") as page:
                assert 'state="open"' in await page.text()

            late = OPEN_SECONDS + 0.1
            async with gateway.chat() as answer:  # the probe fails: open again
                assert answer.status == 500
            await refused_chat(gateway, 503, "backend_unavailable")
            assert len(engine.exchanges) == FAILURES + 1

            late *= 2
            go_on = asyncio.Event()

            async def waits(exchange: Exchange) -> None:
                await go_on.wait()
                await chats(exchange)

            engine.behave = waits
            while not engine.asked.empty():
                engine.asked.get_nowait()
            probe = asyncio.ensure_future(chat_ok(gateway))
            await engine.next()
            await refused_chat(gateway, 503, "backend_unavailable")  # one at a time
            go_on.set()
            await probe
            await chat_ok(gateway)


async def test_429_and_the_clients_faults_do_not_open_the_breaker(
    tmp_path: Path,
) -> None:
    async with FakeEngine(behave=answers(b"slow down", 429)) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            for status in (429, 400) * FAILURES:
                engine.behave = answers(b"no", status)
                async with gateway.chat() as answer:
                    assert answer.status == status


# --- loading -----------------------------------------------------------------------


async def test_a_model_that_is_being_loaded_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "_LOADING_POLL_SECONDS", 0.01)
    is_loaded = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        if not is_loaded.is_set():
            await exchange.answer({"error": LOADING}, 503)
        else:
            await chats(exchange)

    async with FakeEngine(behave=behave) as engine:
        text = config(at(engine), server={"sse_keepalive": 0.02})
        async with running(tmp_path, text) as gateway:
            plain = asyncio.ensure_future(chat_ok(gateway))
            async with gateway.chat(stream=True) as answer:
                assert answer.status == 200
                assert (await answer.content.readline()).startswith(b":")
                is_loaded.set()
                assert (await answer.read()).endswith(event("hi") + FINISH + DONE)
            assert (await plain)["choices"]
            assert backend(gateway).breaker._opened is None


async def test_a_model_that_nobody_lists_before_it_is_loaded_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errand, "_LOADING_POLL_SECONDS", 0.01)
    monkeypatch.setattr(relaying, "_LOADING_POLL_SECONDS", 0.01)
    monkeypatch.setattr(watching, "LOADING_POLL_SECONDS", 0.01)
    async with Scripted(always(response({"error": LOADING}, status=503))) as server:
        text = config({"url": server.url}, server={"sse_keepalive": 0.02})
        async with running(tmp_path, text) as gateway:
            plain = asyncio.ensure_future(chat_ok(gateway))
            async with gateway.chat(stream=True) as answer:
                assert answer.status == 200
                assert (await answer.content.readline()).startswith(b":")
                assert not plain.done()
                server.script = always(response(listed("m")))
                assert (await plain)["data"]


async def test_a_model_that_nobody_lists_is_waited_for_within_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errand, "_LOADING_POLL_SECONDS", 0.01)
    async with Scripted(always(response({"error": LOADING}, status=503))) as server:
        text = config({"url": server.url, "timeout": 0.05})
        async with running(tmp_path, text) as gateway:
            async with gateway.chat() as answer:
                error = await error_of(answer)
                assert (answer.status, error["code"]) == (504, "backend_timeout")


async def test_a_model_that_is_still_being_loaded_after_timeout_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "_LOADING_POLL_SECONDS", 0.01)
    async with FakeEngine(behave=answers({"error": LOADING}, 503)) as engine:
        async with running(tmp_path, behind(engine, timeout=0.05)) as gateway:
            async with gateway.chat() as answer:
                error = await error_of(answer)
                assert (answer.status, error["code"]) == (504, "backend_timeout")
                assert "loading" in error["message"]
                assert answer.headers["Retry-After"]


# --- what goes up ------------------------------------------------------------------


async def test_what_goes_up_is_ours_or_on_the_list_and_never_the_clients_key(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine:
        text = config(at(engine, api_key="sk-upstream-3c1d9e", headers={"X-Team": "a"}))
        async with running(tmp_path, text) as gateway:
            hostile = {
                "Cookie": "a=b",
                "X-Api-Key": "sk-other-client-key",
                "X-Forwarded-For": "1.2.3.4",
                "Forwarded": "for=1.2.3.4",
                "X-Real-Ip": "1.2.3.4",
                "X-Whatever": "x",
                "Referer": "http://x",
                "User-Agent": "me/1",
                "Accept-Encoding": "gzip, br",
                "Traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
                "X-Request-Id": "mine-1",
                "Via": "1.0 fred",
            }
            async with gateway.post(
                CHAT, {"model": "m", "messages": [1]}, headers=hostile
            ) as answer:
                assert answer.status == 200
                assert answer.headers["X-Request-Id"] == "mine-1"
            sent = {n.lower(): v for n, v in engine.exchanges[0].request.headers}
            assert sent.pop("via").startswith("1.0 fred, 1.1 inferencia")
            assert sent.pop("authorization") == "Bearer sk-upstream-3c1d9e"
            assert sent.pop("traceparent").startswith("00-aaaa")
            assert sent.pop("x-request-id") == "mine-1"
            assert sent.pop("x-team") == "a"
            assert sent.pop("accept-encoding") == "identity"
            assert sent.pop("user-agent").startswith("inferencia/")
            assert sent.pop("content-type") == "application/json"
            allowed = {"accept", "host", "content-length", "connection"}
            assert not sent.keys() - allowed
            assert USER not in str(engine.exchanges[0].request)


async def test_without_a_key_for_the_backend_none_is_sent(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        await chat_ok(gateway)
        assert engine.exchanges[0].request.header("authorization") is None


ODD_BODY = (
    b'\n { "messages" : [ {"role":"user","content":"h\\u00e9\xc3\xa9"} ] ,'
    b'\t"x_unknown": {"deep":[1,2.50,1e3,null]}, "model":"m" , "temperature":0.10 } \n'
)


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/x-www-form-urlencoded", "text/plain", ""],
)
async def test_a_body_that_needs_no_change_goes_up_byte_for_byte(
    tmp_path: Path, content_type: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        headers = {"Content-Type": content_type}
        async with gateway.post(CHAT, ODD_BODY, headers=headers) as answer:
            assert answer.status == 200
        received = engine.exchanges[0].request
        assert received.body == ODD_BODY
        assert received.header("content-type") == "application/json"


async def test_only_the_members_that_must_change_do(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        routing = {"aliases": {"m": "n", "other": "m"}}
        text = config(at(engine), routing=routing)
        async with running(tmp_path, text) as gateway:
            asked = ODD_BODY.replace(b'"m"', b'"other"')
            async with gateway.post(CHAT, asked) as answer:
                assert answer.status == 200
            assert engine.exchanges[0].request.body == ODD_BODY
            streamed = asked.replace(b"0.10", b'0.10, "stream" : true')
            async with gateway.post(CHAT, streamed) as answer:
                await answer.read()
            sent = engine.exchanges[1]
            assert sent.json == json.loads(streamed) | {
                "model": "m",
                "stream_options": {"include_usage": True},
            }
            for kept in (b'h\\u00e9\xc3\xa9"', b"[1,2.50,1e3,null]", b"0.10"):
                assert kept in sent.request.body


def form(model: bytes | None) -> bytes:
    """A multipart body with a file of awkward bytes."""
    named = b""
    if model is not None:
        named = (
            b'--bOu\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
            + model
            + b"\r\n"
        )
    return (
        b'--bOu\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\nRIFF\x00\xff\r\n--bO\r\n\r\n"
        + named
        + b"--bOu"
        b'\r\nContent-Disposition: form-data; name="language"\r\n\r\nde\r\n--bOu--\r\n'
    )


@pytest.mark.parametrize(
    ("asked", "sent"), [(b"m", b"m"), (b"whisper", b"m"), (None, b"m")]
)
async def test_a_form_goes_up_byte_for_byte_but_for_the_model(
    tmp_path: Path, asked: bytes | None, sent: bytes
) -> None:
    async with FakeEngine(behave=answers({"text": "hallo"})) as engine:
        text = config(at(engine), routing={"aliases": {"whisper": "m"}})
        async with running(tmp_path, text) as gateway:
            headers = {"Content-Type": "multipart/form-data; boundary=bOu"}
            async with gateway.post(
                "/v1/audio/transcriptions", form(asked), headers=headers
            ) as answer:
                assert await answer.json() == {"text": "hallo"}
            received = engine.exchanges[0].request
            assert received.header("content-type") == headers["Content-Type"]
            if asked is None:
                assert b'name="model"' in received.body
                assert b"RIFF\x00\xff\r\n--bO\r\n" in received.body
            else:
                assert received.body == form(sent)


async def test_the_query_goes_up_without_what_names_a_model(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        path = CHAT + "?model=secret&autoload=1&beta=true"
        async with gateway.post(path, {"model": "m", "messages": [1]}) as answer:
            assert answer.status == 200
        assert engine.exchanges[0].request.target == CHAT + "?beta=true"


async def test_a_gateway_that_is_its_own_backend_notices(tmp_path: Path) -> None:
    async with running(tmp_path, config({"url": "http://127.0.0.1:1"})) as outer:
        # The port is known only now, so that the backend is set as a reload would.
        own = config({"url": outer.url, "api_key": USER, "models": ["m"]})
        (tmp_path / "own.yaml").write_text(own)
        loaded = load(tmp_path / "own.yaml", {}, Flags()).config
        made = make_backends(loaded.backends, outer.parts.instance)
        await outer.parts.catalogue.replace(made, loaded.routing)
        for stream in (False, True):
            await refused_chat(outer, 502, "loop_detected", stream=stream)


# --- what comes down ---------------------------------------------------------------


async def test_what_comes_down_is_on_the_list(tmp_path: Path) -> None:
    theirs = (
        b"Set-Cookie: a=b\r\nLocation: http://elsewhere/\r\nServer: engine/1\r\n"
        b"Access-Control-Allow-Origin: *\r\nX-Powered-By: PHP\r\n"
        b"X-Request-Id: theirs\r\nOpenAI-Processing-Ms: 12\r\n"
        b"X-RateLimit-Limit: 1\r\nDate: yesterday\r\nContent-Language: en\r\n"
    )
    async with FakeEngine(behave=answers(b'{"odd" :1}', head=theirs)) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat() as answer:
                assert await answer.read() == b'{"odd" :1}'
                headers = answer.headers
            for name in ("Set-Cookie", "Location", "X-Powered-By"):
                assert name not in headers
            assert not [name for name in headers if name.startswith("Access-Control")]
            assert headers.getall("Server")[0].startswith("inferencia/")
            assert headers.getall("X-RateLimit-Limit") == ["10000"]
            assert len(headers.getall("Date")) == 1
            assert headers["X-Request-Id"] != "theirs"
            assert headers["OpenAI-Processing-Ms"] == "12"
            assert headers["Content-Language"] == "en"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304, 204 + 96])
async def test_a_redirect_is_the_backends_failure_and_is_not_followed(
    tmp_path: Path, status: int
) -> None:
    async with FakeEngine(behave=chats) as elsewhere:
        location = f"Location: {elsewhere.url}{CHAT}\r\n".encode()
        behave = answers(b"", status, head=location)
        async with FakeEngine(behave=behave) as engine:
            async with running(tmp_path, behind(engine)) as gateway:
                async with gateway.chat() as answer:
                    error = await error_of(answer)
                    assert (answer.status, error["code"]) == (502, "backend_error")
                    assert "Location" not in answer.headers
                assert not elsewhere.exchanges


async def test_a_backend_that_refuses_our_key_is_our_fault_not_the_clients(
    tmp_path: Path,
) -> None:
    said = {"error": {"message": "bad key sk-upstream-3c1d9e", "type": "x"}}
    async with FakeEngine(behave=answers(said, 401)) as engine:
        text = config(at(engine, api_key="sk-upstream-3c1d9e"))
        async with running(tmp_path, text) as gateway:
            error = await refused_chat(gateway, 502, "backend_auth_failed")
            assert "sk-upstream" not in error["message"]
            assert '"b0"' in error["message"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"",
    ],
)
async def test_nonsense_instead_of_an_answer_is_a_bad_gateway(
    tmp_path: Path, garbage: bytes
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(garbage)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            for stream in (True, False):
                await refused_chat(gateway, 502, "backend_error", stream=stream)


async def test_a_first_byte_that_never_comes_ends_in_a_timeout(tmp_path: Path) -> None:
    async with FakeEngine(behave=hangs) as engine:
        async with running(tmp_path, behind(engine, timeout=0.05)) as gateway:
            for stream in (True, False):
                error = await refused_chat(
                    gateway, 504, "backend_timeout", stream=stream
                )
                assert error["type"] == "backend_error"
            for exchange in engine.exchanges:
                await asyncio.wait_for(exchange.gone.wait(), 1)


async def test_an_engine_that_comments_on_its_progress_is_not_silent(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD)
        for step in range(8):
            await exchange.write(chunk(b": keepalive %d/8\n\n" % step))
            await asyncio.sleep(0.05)
        await exchange.write(chunk(event("hi") + FINISH + DONE) + LAST_CHUNK)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine, timeout=0.2)) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert (await answer.read()).endswith(event("hi") + FINISH + DONE)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b'{"error":"no such thing"}', "no such thing"),
        (422, b'{"detail":"field required"}', "field required"),
        (422, b'{"detail":[{"loc":["body","n"],"msg":"too big"}]}', "too big"),
        (500, b"<html><body><h1>Oops</h1></body></html>", "b0"),
        (500, b"", "b0"),
        (500, b"plain words", "plain words"),
        (404, b"Not Found", "Not Found"),
        (400, b'{"object":"error","message":"old vllm","code":40001}', "old vllm"),
        (500, b'{"error":{"message":"x","type":7}}', "x"),
        (500, b"[1,2]", "b0"),
        (500, b"\xff\xfe\x00", "b0"),
        (
            529,
            b'{"type":"error","error":{"type":"overloaded_error","message":"o"}}',
            "o",
        ),
    ],
)
async def test_every_error_of_a_backend_comes_down_in_one_shape_with_its_status(
    tmp_path: Path, status: int, body: bytes, message: str
) -> None:
    async with FakeEngine(behave=answers(body, status)) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat() as answer:
                assert answer.status == status
                assert answer.content_type == "application/json"
                error = await error_of(answer)
            assert message in error["message"]
            assert isinstance(error["type"], str)
            assert error["code"] is None or isinstance(error["code"], str)


async def test_an_error_of_the_right_shape_comes_down_untouched(
    tmp_path: Path,
) -> None:
    body = (
        b'{ "error": {"type":"invalid_request_error", "message":"h\\u00e9",'
        b' "param":"n", "code":"too_big", "extra": 1.0}, "more": [] }'
    )
    async with FakeEngine(behave=answers(body, 400)) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            for stream in (True, False):
                async with gateway.chat(stream=stream) as answer:
                    assert await answer.read() == body


async def test_retry_after_of_a_backend_is_passed_on(tmp_path: Path) -> None:
    behave = answers(b'{"error":"busy"}', 429, head=b"Retry-After: 17\r\n")
    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat() as answer:
                assert answer.status == 429
                assert answer.headers["Retry-After"] == "17"
                assert (await error_of(answer))["type"] == "rate_limit_error"


async def test_errors_on_v1_messages_have_anthropics_shape_too(tmp_path: Path) -> None:
    async with FakeEngine(behave=answers(b'{"error":"bad"}', 400)) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            body = {"model": "m", "max_tokens": 1, "messages": [1]}
            async with gateway.post("/v1/messages", body) as answer:
                assert (await answer.json())["type"] == "error"


# --- assembly ----------------------------------------------------------------------


def streamed(*events: bytes) -> Callable[[Exchange], Awaitable[None]]:
    async def behave(exchange: Exchange) -> None:
        assert exchange.json["stream"] is True
        await exchange.write(SSE_HEAD + chunk(b"".join(events)) + LAST_CHUNK)

    return behave


def data(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def piece(**delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    head = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return data(head | {"choices": [choice]})


LAST = data(
    {
        "id": "c-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    }
)
COUNTED = data(
    {
        "id": "c-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v/chat/completions"])
async def test_llama_server_is_asked_for_a_stream_and_the_client_gets_one_answer(
    tmp_path: Path, path: str
) -> None:
    behave = streamed(
        piece(role="assistant", content=None),
        piece(content="Hel"),
        piece(content="lo"),
        LAST,
        COUNTED,
        DONE,
    )
    async with FakeEngine(behave=behave) as engine:
        text = config(at(engine, type="llamacpp"))
        async with running(tmp_path, text) as gateway:
            asked = {"model": "m", "messages": [{"role": "user"}], "seed": 7}
            async with gateway.post(path, asked) as answer:
                assert answer.content_type == "application/json"
                assert int(answer.headers["Content-Length"]) > 0
                body = await answer.json()
            assert body["object"] == "chat.completion"
            assert body["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello"},
                    "finish_reason": "stop",
                }
            ]
            assert body["usage"]["total_tokens"] == 5
            sent = engine.exchanges[0].json
            assert sent["stream_options"] == {"include_usage": True}
            assert sent["seed"] == 7
            await eventually(lambda: bool(gateway.log.requests), "it is logged")
            line = gateway.log.requests[0]
            assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 2)
            assert line["stream"] is False


async def test_an_error_inside_an_assembled_stream_becomes_an_error_answer(
    tmp_path: Path,
) -> None:
    failed = {
        "error": {"message": "out of memory", "type": "server_error", "code": 500}
    }
    async with FakeEngine(
        behave=streamed(piece(content="Hel"), data(failed))
    ) as engine:
        text = config(at(engine, type="llamacpp"))
        async with running(tmp_path, text) as gateway:
            async with gateway.chat() as answer:
                error = await error_of(answer)
                assert answer.status == 502
                assert "out of memory" in error["message"]
                assert "Hel" not in await answer.text()


async def test_comments_before_an_assembled_answer_do_not_begin_it(
    tmp_path: Path,
) -> None:
    """So ``timeout`` holds until its first event, and ``stall_timeout`` from then."""

    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(b": keepalive 1/2\n\n"))
        await asyncio.sleep(0.15)
        if exchange.json["model"] == "m":
            rest = piece(content="late") + LAST + DONE
            await exchange.write(chunk(rest) + LAST_CHUNK)
        else:
            await exchange.write(chunk(piece(content="late")))
            await exchange.gone.wait()

    async with FakeEngine("m", "stalls", behave=behave) as engine:
        options = {"type": "llamacpp", "timeout": 5, "stall_timeout": 0.05}
        async with running(tmp_path, config(at(engine, **options))) as gateway:
            body = await chat_ok(gateway)
            assert body["choices"][0]["message"]["content"] == "late"
            await refused_chat(gateway, 504, "backend_timeout", model="stalls")


@pytest.mark.parametrize("is_clean", [True, False])
async def test_half_a_stream_never_becomes_an_answer(
    tmp_path: Path, is_clean: bool
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(piece(content="Hel")))
        if is_clean:
            await exchange.write(LAST_CHUNK)
        else:
            exchange.cut()

    async with FakeEngine(behave=behave) as engine:
        text = config(at(engine, type="llamacpp"))
        async with running(tmp_path, text) as gateway:
            await refused_chat(gateway, 502, "backend_error")


async def test_a_stream_of_nonsense_never_becomes_an_answer(tmp_path: Path) -> None:
    behave = streamed(b"data: {not json}\n\n", LAST, DONE)
    async with FakeEngine(behave=behave) as engine:
        text = config(at(engine, type="llamacpp"))
        async with running(tmp_path, text) as gateway:
            await refused_chat(gateway, 502, "backend_error")


async def test_what_a_stream_could_not_carry_is_asked_for_directly(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine:
        text = config(at(engine, type="llamacpp"))
        async with running(tmp_path, text) as gateway:
            body = await chat_ok(gateway, logprobs=True)
            assert engine.exchanges[0].json["stream"] is False
            assert body["choices"][0]["message"]["content"] == "hi"


async def test_an_engine_that_answers_whole_although_asked_to_stream_is_passed_on(
    tmp_path: Path,
) -> None:
    async with FakeEngine(behave=answers({"choices": [], "odd": 1})) as engine:
        text = config(at(engine, type="llamacpp"))
        async with running(tmp_path, text) as gateway:
            assert await chat_ok(gateway) == {"choices": [], "odd": 1}


async def test_a_client_that_leaves_an_assembled_answer_stops_the_engine(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(piece(content="Hel")))
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        text = config(at(engine, type="llamacpp"))
        async with running(tmp_path, text) as gateway:
            asked = asyncio.ensure_future(chat_ok(gateway))
            exchange = await engine.next()
            asked.cancel()
            await asyncio.wait_for(exchange.gone.wait(), 1)
            await eventually(lambda: backend(gateway).in_flight == 0, "all is over")


# --- padding -----------------------------------------------------------------------


async def test_a_padded_answer_that_fails_tells_its_error_under_200(
    tmp_path: Path,
) -> None:
    fail = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await fail.wait()
        exchange.cut()

    async with FakeEngine(behave=behave) as engine:
        text = config(at(engine, pad_nonstream=True), server={"sse_keepalive": 0.02})
        async with running(tmp_path, text) as gateway:
            async with gateway.chat() as answer:
                assert answer.status == 200
                assert await answer.content.readexactly(1) == b" "
                fail.set()
                error = json.loads(await answer.read())["error"]
            assert error["code"] == "backend_error"


async def test_nothing_is_padded_that_is_not_asked_for(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await go_on.wait()
        await exchange.answer(b"{}", 500)

    async with FakeEngine(behave=behave) as engine:
        text = config(at(engine), server={"sse_keepalive": 0.01})
        async with running(tmp_path, text) as gateway:
            asked = asyncio.ensure_future(gateway.chat().__aenter__())
            await engine.next()
            await asyncio.sleep(0.05)  # several times as long as a comment would take
            go_on.set()
            answer: aiohttp.ClientResponse = await asked
            assert answer.status == 500
            answer.release()
