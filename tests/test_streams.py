"""What a client of a stream may rely on."""

import asyncio
import json
from pathlib import Path

import pytest

from gateway import (
    DONE,
    FINISH,
    LAST_CHUNK,
    SSE_HEAD,
    USAGE,
    Exchange,
    FakeEngine,
    behind,
    chunk,
    event,
    eventually,
    running,
)


async def test_the_first_byte_is_passed_on_the_moment_it_comes(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(b"d"))
        await go_on.wait()
        await exchange.write(chunk(event("hi")[1:] + FINISH + DONE) + LAST_CHUNK)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert await answer.content.readexactly(1) == b"d"
                go_on.set()
                rest = await answer.content.read()
                assert b"d" + rest == event("hi") + FINISH + DONE


async def test_a_stream_has_the_headers_that_keep_proxies_from_buffering(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with gateway.chat(stream=True) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
            assert answer.headers["Cache-Control"] == "no-cache, no-transform"
            assert answer.headers["X-Accel-Buffering"] == "no"
            assert answer.headers["X-Request-Id"]
            assert answer.headers["X-RateLimit-Limit"] == "10000"


async def test_the_usage_that_only_we_asked_for_is_not_shown(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with gateway.chat(stream=True) as answer:
            assert await answer.read() == event("hi") + FINISH + DONE
        options = engine.exchanges[0].json["stream_options"]
        assert options == {"include_usage": True}
        await eventually(lambda: bool(gateway.log.requests), "the request is logged")
        line = gateway.log.requests[0]
        assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 2)


async def test_a_client_that_asks_for_usage_gets_it(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        options = {"include_usage": True}
        async with gateway.chat(stream=True, stream_options=options) as answer:
            assert USAGE in await answer.read()


async def test_comments_come_while_the_engine_thinks(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await go_on.wait()
        await exchange.write(SSE_HEAD + chunk(event("hi") + FINISH + DONE) + LAST_CHUNK)

    async with FakeEngine(behave=behave) as engine:
        config = behind(engine).rstrip()[:-1] + ', "server": {"sse_keepalive": 0.02}}'
        async with running(tmp_path, config) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert answer.status == 200
                assert (await answer.content.readline()).startswith(b":")
                assert await answer.content.readline() == b"\n"
                assert (await answer.content.readline()).startswith(b":")
                go_on.set()
                assert (await answer.read()).endswith(event("hi") + FINISH + DONE)


async def test_a_failure_after_a_comment_is_an_event(tmp_path: Path) -> None:
    fail = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await fail.wait()
        exchange.cut()

    async with FakeEngine(behave=behave) as engine:
        config = behind(engine).rstrip()[:-1] + ', "server": {"sse_keepalive": 0.02}}'
        async with running(tmp_path, config) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert (await answer.content.readline()).startswith(b":")
                fail.set()
                text = (await answer.read()).decode()
            last = text.strip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == (
                "backend_error"
            )
            assert "[DONE]" not in text


@pytest.mark.parametrize("half", [b"", b'data: {"choi'])
async def test_a_stream_that_is_cut_ends_with_an_error_event_and_no_done(
    tmp_path: Path, half: bytes
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(
            SSE_HEAD + chunk(event("hi")) + (chunk(half) if half else b"")
        )
        exchange.cut()

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert answer.status == 200
                events = (await answer.read()).decode().split("\n\n")
            assert events[0] + "\n\n" == event("hi").decode()
            error = json.loads(events[1].removeprefix("data: "))["error"]
            assert (error["type"], error["code"]) == ("backend_error", "backend_error")
            assert events[2:] == [""]


async def test_a_stream_that_just_ends_without_finishing_is_an_error(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        await exchange.write(head + event("hi"))

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat(stream=True) as answer:
                text = await answer.read()
            assert text.startswith(event("hi"))
            assert b'"backend_error"' in text


async def test_silence_inside_an_answer_ends_it_after_stall_timeout(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("hi")))
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine, stall_timeout=0.05)) as gateway:
            async with gateway.chat(stream=True) as answer:
                text = await answer.read()
            assert b'"backend_timeout"' in text
            exchange = await engine.next()
            await asyncio.wait_for(exchange.gone.wait(), 1)


async def test_an_event_of_several_megabytes_passes(tmp_path: Path) -> None:
    large = event("x" * 5_000_000)

    async def behave(exchange: Exchange) -> None:
        body = event("a") + large + FINISH + DONE
        await exchange.write(SSE_HEAD)
        for at in range(0, len(body), 60_000):
            await exchange.write(chunk(body[at : at + 60_000]))
        await exchange.write(LAST_CHUNK)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert await answer.read() == event("a") + large + FINISH + DONE


async def test_a_client_that_leaves_before_the_first_byte_stops_the_engine(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            for stream in (True, False):
                task = asyncio.ensure_future(gateway.chat(stream=stream).__aenter__())
                exchange = await engine.next()
                task.cancel()
                await asyncio.wait_for(exchange.gone.wait(), 1)
            await eventually(lambda: not gateway.parts.doors.active, "all is over")
            assert gateway.parts.catalogue.backends[0].in_flight == 0
            await eventually(lambda: len(gateway.log.requests) == 2, "both are logged")
            assert {line["status"] for line in gateway.log.requests} == {499}


async def test_a_client_that_leaves_in_the_middle_stops_the_engine(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("hi")))
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat(stream=True) as answer:
                await answer.content.readline()
            exchange = await engine.next()
            await asyncio.wait_for(exchange.gone.wait(), 1)
            await eventually(lambda: not gateway.parts.doors.active, "all is over")
            key = gateway.parts.allowances
            assert key.in_flight("alice") == 0


async def test_a_client_that_takes_no_bytes_holds_the_engine_back_not_our_memory(
    tmp_path: Path,
) -> None:
    written = 0

    async def behave(exchange: Exchange) -> None:
        nonlocal written
        await exchange.write(SSE_HEAD)
        piece = chunk(event("x" * 60_000))
        while True:
            await exchange.write(piece)
            written += len(piece)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            reader, writer = await gateway.connect()
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            body = b'{"model":"m","stream":true,"messages":[1]}'
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Authorization: Bearer sk-test-user-1f5b7c3a9e\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            await engine.next()
            before = -1
            for _ in range(200):  # until nothing moves any more
                if written == before:
                    break
                before = written
                await asyncio.sleep(0.05)
            held = sum(
                c._wire.get_write_buffer_size()
                for c in gateway.parts.guard._connections
                if c._wire is not None
            )
            assert held < 1_000_000
            writer.transport.abort()
            await eventually(lambda: not gateway.parts.doors.active, "it is over")


async def test_a_client_that_takes_no_bytes_is_cut_after_write_timeout(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD)
        while not exchange.gone.is_set():
            await exchange.write(chunk(event("x" * 60_000)))

    async with FakeEngine(behave=behave) as engine:
        config = behind(engine).rstrip()[:-1] + ', "server": {"write_timeout": 0.1}}'
        async with running(tmp_path, config) as gateway:
            reader, writer = await gateway.connect()
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            body = b'{"model":"m","stream":true,"messages":[1]}'
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Authorization: Bearer sk-test-user-1f5b7c3a9e\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            exchange = await engine.next()
            await asyncio.wait_for(exchange.gone.wait(), 5)
            writer.close()


async def test_a_plain_answer_that_is_cut_is_not_ended_cleanly(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        await exchange.write(
            head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b'{"a')
        )
        exchange.cut()

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            body = b'{"model":"m","messages":[1]}'
            answer = await gateway.raw(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Authorization: Bearer sk-test-user-1f5b7c3a9e\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            assert not answer.endswith(b"0\r\n\r\n")


async def test_white_space_keeps_a_plain_answer_alive_where_that_is_wanted(
    tmp_path: Path,
) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await go_on.wait()
        await exchange.answer({"choices": [], "usage": {"total_tokens": 1}})

    async with FakeEngine(behave=behave) as engine:
        config = behind(engine, pad_nonstream=True).rstrip()[:-1]
        config += ', "server": {"sse_keepalive": 0.02}}'
        async with running(tmp_path, config) as gateway:
            async with gateway.chat() as answer:
                assert await answer.content.readexactly(2) == b"  "
                go_on.set()
                assert json.loads(await answer.read())["choices"] == []


async def test_a_client_of_http_1_0_gets_a_stream_that_ends_by_closing(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        body = b'{"model":"m","stream":true,"messages":[1]}'
        answer = await gateway.raw(
            b"POST /v1/chat/completions HTTP/1.0\r\n"
            b"Authorization: Bearer sk-test-user-1f5b7c3a9e\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert b"Transfer-Encoding" not in head
        assert rest == event("hi") + FINISH + DONE


async def test_what_breaks_after_the_last_word_is_of_no_account(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("hi") + FINISH + DONE))
        exchange.writer.close()  # without the last chunk

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat(stream=True) as answer:
                assert await answer.read() == event("hi") + FINISH + DONE


@pytest.mark.parametrize("counts", [True, False])
async def test_a_large_body_is_let_go_when_its_answer_has_begun(
    tmp_path: Path, counts: bool
) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        assert len(exchange.request.body) > 1_000_000
        await exchange.write(SSE_HEAD + chunk(event("hi")))
        await go_on.wait()
        usage = USAGE if counts else b""
        await exchange.write(chunk(FINISH + usage + DONE) + LAST_CHUNK)

    text = "four" * 250_000
    asked = {"messages": [{"role": "user", "content": text}]}
    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            bodies = gateway.parts.bodies
            async with gateway.chat(stream=True, **asked) as answer:
                assert b"hi" in await answer.content.readline()
                assert bodies.held_bytes == 0
                go_on.set()
                assert b"[DONE]" in await answer.read()
            assert bodies.held_bytes == 0
            await eventually(lambda: bool(gateway.log.requests), "it is over")
            counted = gateway.log.requests[0]["prompt_tokens"]
            assert counted == 7 if counts else counted >= 250_000
