"""What clumsy and hostile clients send: each gets an answer or an end, and no harm."""

import asyncio
import contextlib
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import http_parser, web_protocol

from gateway import (
    ADMIN,
    CHAT,
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
from rawclient import (
    CHAT_BODY,
    CHUNKED,
    ask,
    chunked,
    connected,
    request,
    with_server,
)

# Stands wherever a request can hold something; it must not come out anywhere.
CANARY = b"cAnArY7f3b"

BRISK = {"header_timeout": 0.2, "read_timeout": 0.2, "write_timeout": 0.2}
PARSERS = ("HttpRequestParserC", "HttpRequestParserPy")


@pytest.fixture(params=PARSERS)
def parser(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Each of aiohttp's two parsers; the slow one is for machines without wheels."""
    chosen = getattr(http_parser, request.param, None)
    if chosen is None:
        pytest.skip(f"this aiohttp has no {request.param}")
    # What AIOHTTP_NO_EXTENSIONS decides when aiohttp is imported.
    monkeypatch.setattr(web_protocol, "HttpRequestParser", chosen)
    yield request.param


def get(*lines: bytes, start: bytes = b"GET /health HTTP/1.1") -> bytes:
    """A request without a body, of these lines."""
    return b"\r\n".join([start, b"Host: x", *lines, b"", b""])


def post(*lines: bytes, body: bytes = b"") -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1"
    key = b"Authorization: Bearer " + USER.encode()
    return b"\r\n".join([head, b"Host: x", key, *lines, b"", body])


def posted_chunks(body: bytes, coding: bytes = b"chunked") -> bytes:
    return post(b"Transfer-Encoding: " + coding, body=body)


# Each is answered with 400, and the connection is closed.
MALFORMED = {
    "garbage": CANARY + b"\r\n\r\n",
    "binary": b"\x00\x01\xff\xfe" + CANARY + b"\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03" + b"\r\n" * 2,
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2.0": get(start=b"GET /health HTTP/2.0"),
    "HTTP/0.9": get(start=b"GET /health HTTP/0.9"),
    "HTTP/1.2": get(start=b"GET /health HTTP/1.2"),
    "HTTP/1.10": get(start=b"GET /health HTTP/1.10"),
    "HTTP/11": get(start=b"GET /health HTTP/11"),
    "http/1.1": get(start=b"GET /health http/1.1"),
    "no version": b"GET /health\r\n\r\n",
    "a tab": get(start=b"GET\t/health HTTP/1.1"),
    "no target": get(start=b"GET HTTP/1.1"),
    "a target without a slash": get(start=b"GET health HTTP/1.1"),
    "a control character in the target": get(start=b"GET /he\x01alth HTTP/1.1"),
    "NUL in the target": get(start=b"GET /he\x00alth HTTP/1.1"),
    "a broken address": get(start=b"GET http://[::1/health HTTP/1.1"),
    "an impossible port": get(start=b"GET http://a:99999999/health HTTP/1.1"),
    "a method of brackets": get(start=b"G{}T /health HTTP/1.1"),
    "no Host": b"GET /health HTTP/1.1\r\nX: " + CANARY + b"\r\n\r\n",
    "two Hosts": get(b"Host: y"),
    "the same Host twice": get(b"Host: x"),
    "a Host with a space": b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n",
    "a Host with a path": b"GET /health HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "a Host with a tag": b"GET /health HTTP/1.1\r\nHost: <script>\r\n\r\n",
    "a Host with a user": b"GET /health HTTP/1.1\r\nHost: u:p@a\r\n\r\n",
    "a Host with an odd port": b"GET /health HTTP/1.1\r\nHost: a:b\r\n\r\n",
    "a folded header": get(b"A: b", b" " + CANARY),
    "a space before the colon": get(b"A : " + CANARY),
    "a header without a name": get(b": " + CANARY),
    "a header without a colon": get(CANARY),
    "a header's name beyond ASCII": get(b"\xc3\xa4: " + CANARY),
    "a space before the first header": b"GET /health HTTP/1.1\r\n Host: x\r\n\r\n",
    "bare line feeds": b"GET /health HTTP/1.1\nHost: x\nA: " + CANARY + b"\n\n",
    "a bare line feed in a value": get(b"A: b\nC: " + CANARY),
    "a bare carriage return": get(b"A: b\r" + CANARY),
    "NUL in a value": get(b"A: \x00" + CANARY),
    "a control character in a value": get(b"A: \x01" + CANARY),
    "DEL in a value": get(b"A: \x7f" + CANARY),
    "an escape sequence": get(b"A: \x1b[31m" + CANARY),
    "a long request line": get(start=b"GET /" + b"a" * 9000 + b" HTTP/1.1"),
    "a long header": get(b"A: " + b"b" * 9000),
    "a long header's name": get(b"A" * 9000 + b": b"),
    "200 headers": get(*(b"A%d: b" % number for number in range(200))),
    "chunks on HTTP/1.0": b"POST /v1/chat/completions HTTP/1.0\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a length and chunks": post(
        b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"
    ),
    "chunks and a length": post(
        b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n"
    ),
    "two lengths": post(b"Content-Length: 2", b"Content-Length: 3", body=b"{}"),
    "the same length twice": post(
        b"Content-Length: 2", b"Content-Length: 2", body=b"{}"
    ),
    "a list of lengths": post(b"Content-Length: 2, 2", body=b"{}"),
    "a length with a sign": post(b"Content-Length: +2", body=b"{}"),
    "a negative length": post(b"Content-Length: -2", body=b"{}"),
    "a length in hex": post(b"Content-Length: 0x2", body=b"{}"),
    "a length with underscores": post(b"Content-Length: 1_0", body=b"{}"),
    "a length of other digits": post("Content-Length: ٢".encode(), body=b"{}"),
    "an empty length": post(b"Content-Length:", body=b"{}"),
    "a length that is no number": post(b"Content-Length: two", body=b"{}"),
    "an unknown coding": posted_chunks(b"0\r\n\r\n", b"xchunked"),
    "gzip and chunks": posted_chunks(b"0\r\n\r\n", b"gzip, chunked"),
    "chunks, then gzip": posted_chunks(b"0\r\n\r\n", b"chunked, gzip"),
    "chunks twice": posted_chunks(b"0\r\n\r\n", b"chunked, chunked"),
    "two codings": post(
        b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"
    ),
    "the identity coding": posted_chunks(b"0\r\n\r\n", b"identity"),
    "a chunk's size that is no number": posted_chunks(b"zz\r\nhello\r\n0\r\n\r\n"),
    "a chunk's size with a sign": posted_chunks(b"+5\r\nhello\r\n0\r\n\r\n"),
    "a chunk's size with 0x": posted_chunks(b"0x5\r\nhello\r\n0\r\n\r\n"),
    "a chunk's size with underscores": posted_chunks(b"0_5\r\nhello\r\n0\r\n\r\n"),
    "a negative chunk": posted_chunks(b"-5\r\nhello\r\n0\r\n\r\n"),
    "line feeds between chunks": posted_chunks(b"5\nhello\n0\n\n"),
    "a line feed in an extension": posted_chunks(b"5;a\nb\r\nhello\r\n0\r\n\r\n"),
    "a chunk that is too long": posted_chunks(b"5\r\nhelloXX0\r\n\r\n"),
}


async def test_what_is_no_http_gets_a_400_of_our_shape_and_an_end(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), **BRISK)
        async with running(tmp_path, config) as gateway:
            for what, data in MALFORMED.items():
                async with connected(gateway) as wire:
                    await wire.send(data)
                    reply = await wire.reply()
                    assert reply.status == 400, (what, reply)
                    assert reply.version in ("HTTP/1.1", "HTTP/1.0"), what
                    assert reply.error["code"] == "invalid_request", what
                    assert reply.header("x-request-id"), what
                    if reply.version == "HTTP/1.1":
                        assert reply.header("connection") == "close", what
                    assert CANARY not in reply.body, what
                    # One answer and no second one to whatever was left over.
                    assert await wire.rest() == b"", what
            assert engine.exchanges == []
            assert len(gateway.log.requests) == len(MALFORMED)
            assert {line["level"] for line in gateway.log.requests} == {"WARN"}
            quiet(gateway)


def quiet(gateway: Gateway) -> None:
    """Nothing went wrong on our side, and nothing of what was sent was logged."""
    wrong = [line for line in gateway.log.lines if line["level"] == "ERROR"]
    assert wrong == []
    for text in (gateway.log.text, gateway.parts.metrics.render().decode()):
        assert CANARY.decode() not in text
        assert "Traceback" not in text
        assert USER not in text
    assert gateway.parts.bodies.held_bytes == 0


async def test_a_megabyte_of_head_is_answered_although_it_is_not_read(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        for data in (
            get(b"A: " + b"b" * 1_000_000),
            get(*(b"A%d: b" % number for number in range(100_000))),
            b"GET /" + b"a" * 1_000_000,
            b"x" * 1_000_000,
        ):
            assert (await ask(gateway, data)).status == 400


async def test_odd_but_lawful_requests_are_served(tmp_path: Path, parser: str) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        for data in (
            b"\r\n\r\n" + get(),
            get(start=b"GET http://elsewhere.example/health HTTP/1.1"),
            get(start=b"GET /%68ealth HTTP/1.1"),
            get(start=b"GET /health?a=%ff&b=%00&c=%ud800 HTTP/1.1"),
            b"GET /health HTTP/1.0\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: xn--bcher-kva.example\r\n\r\n",
            get(b"A: \xff\xfe\xc3\xa4"),
            get(b"A:", b"B:\t c \t"),
            get(b"Connection: Upgrade", b"Upgrade: websocket"),
            get(b"Connection: close, keep-alive, te"),
            get(b"Content-Length: 5") + b"hello",
            request(headers=[("Content-Type", "application/x-www-form-urlencoded")]),
            request(headers=[("Content-Type", "text/plain; charset=utf-16")]),
            request(headers=[("Content-Type", "")]),
            request(headers=[("Content-Encoding", "identity")]),
            request(body=b"\xef\xbb\xbf \r\n\t" + CHAT_BODY + b"\n"),
            request(body=chunked(*_bytes_of(CHAT_BODY)), headers=CHUNKED, length=-1),
            # curl offers this with --http2.
            request(
                headers=[
                    ("Connection", "Upgrade, HTTP2-Settings"),
                    ("Upgrade", "h2c"),
                    ("HTTP2-Settings", "AAMAAABkAAQAoAAAAAIAAAAA"),
                ]
            ),
            request(headers=[("Expect", "200-maybe")]),
        ):
            reply = await ask(gateway, data)
            assert reply.status == 200, (data, reply)
        quiet(gateway)


def _bytes_of(body: bytes) -> list[bytes]:
    return [body[at : at + 1] for at in range(len(body))]


@pytest.mark.parametrize("seed", range(4))
async def test_mutated_requests_never_break_anything(
    tmp_path: Path, parser: str, seed: int
) -> None:
    rng = random.Random(seed)
    good = [
        request(),
        request(body=chunked(CHAT_BODY), headers=CHUNKED, length=-1),
        request("/v1/models?a=b", method="GET"),
        b"GET /health HTTP/1.0\r\n\r\n",
    ]
    odd = [*b'\x00\r\n :;,\t\x7f\xff%/?#\\"{}[]0123456789', 0x80]
    async with FakeEngine() as engine:
        config = with_server(behind(engine), **(BRISK | {"read_timeout": 0.05}))
        async with running(tmp_path, config) as gateway:
            answered = 0
            for _ in range(60):
                data = bytearray(rng.choice(good))
                for _ in range(rng.choice((1, 1, 2, 5, 40))):
                    at = rng.randrange(len(data) + 1)
                    match rng.randrange(4):
                        case 0:
                            data[at : at + 1] = bytes([rng.choice(odd)])
                        case 1:
                            data.insert(at, rng.choice(odd))
                        case 2:
                            del data[at : at + rng.randrange(1, 20)]
                        case _:
                            data[at:at] = data[at : at + rng.randrange(1, 60)]
                answered += await _survives(gateway, bytes(data))
            assert answered > 30
            # (A mutated name of a model may be quoted in its own answer, not here.)
            assert not [x for x in gateway.log.lines if x["level"] == "ERROR"]
            await eventually(lambda: not gateway.parts.doors.active, "all have ended")
            assert gateway.parts.bodies.held_bytes == 0
            assert (await ask(gateway, request())).status == 200


async def _survives(gateway: Gateway, data: bytes) -> bool:
    """Whether there was an answer; if so none that says that we are broken."""
    async with connected(gateway) as wire:
        # A request that goes on asking for more is closed within its deadline.
        await wire.send(data + b"\r\n\r\n")
        try:
            reply = await asyncio.wait_for(wire.reply(), 2)
        except (asyncio.IncompleteReadError, ConnectionError):
            return False
        assert reply.status not in (500, 501), (data, reply)
        assert reply.header("x-request-id"), (data, reply)
        if reply.status >= 400:
            assert reply.error
        return True


# --- bodies --------------------------------------------------------------------------

BAD_JSON = {
    "nothing": b"",
    "white space": b" \r\n\t",
    "a mark alone": b"\xef\xbb\xbf",
    "two marks": b"\xef\xbb\xbf\xef\xbb\xbf" + CHAT_BODY,
    "NUL": b"\x00",
    "half": CHAT_BODY[:-1],
    "more than one": CHAT_BODY + b"{}",
    "a list": b"[" + CHAT_BODY + b"]",
    "a string": b'"model"',
    "a number": b"5",
    "null": b"null",
    "a form": b"model=m&messages=hello",
    "XML": b"<model>m</model>",
    "NaN": b'{"model":"m","messages":[1],"temperature":NaN}',
    "Infinity": b'{"model":"m","messages":[1],"temperature":Infinity}',
    "-Infinity": b'{"model":"m","messages":[1],"temperature":-Infinity}',
    "NaN deep inside": b'{"model":"m","messages":[{"a":[NaN]}]}',
    "a comma too many": b'{"model":"m","messages":[1],}',
    "single quotes": b"{'model':'m','messages':[1]}",
    "a name without quotes": b'{model:"m","messages":[1]}',
    "a comment": b'{"model":"m","messages":[1] /* hi */}',
    "a control character": b'{"model":"m\n","messages":[1]}',
    "a bad escape": b'{"model":"\\x6d","messages":[1]}',
    "a leading zero": b'{"model":"m","messages":[01]}',
    "a number of 5000 digits": b'{"model":"m","messages":[' + b"9" * 5000 + b"]}",
    "UTF-16": CHAT_BODY.decode().encode("utf-16"),
    "UTF-16 without a mark": CHAT_BODY.decode().encode("utf-16-le"),
    "UTF-32": CHAT_BODY.decode().encode("utf-32"),
    "Latin-1": '{"model":"m","messages":["é"]}'.encode("latin-1"),
    "overlong UTF-8": b'{"model":"m","messages":["\xc0\xaf"]}',
    "a surrogate in UTF-8": b'{"model":"m","messages":["\xed\xa0\x80"]}',
    "beyond Unicode": b'{"model":"m","messages":["\xf5\x80\x80\x80"]}',
    "UTF-8 that is cut": b'{"model":"m","messages":["\xe2\x82',
    "100,000 brackets": b"[" * 100_000,
    "100,000 brackets inside": b'{"model":"m","messages":' + b"[" * 100_000,
    "100,000 closed ones": b'{"m":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects": b'{"a":' * 100_000,
    "100,000 closed objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "100,000 members": b"{" + b",".join(b'"%d":0' % n for n in range(10**5)) + b"}",
    "model twice": b'{"model":"m","messages":[1],"model":"n"}',
    "model twice and equal": b'{"model":"m","messages":[1],"model":"m"}',
    "model twice, once escaped": b'{"model":"m","messages":[1],"mod\\u0065l":"n"}',
    "messages twice": b'{"model":"m","messages":[1],"messages":[2]}',
    "an empty name twice": b'{"":1,"":2,"model":"m","messages":[1]}',
    "compressed": gzip.compress(CHAT_BODY),
}


async def test_what_is_no_json_object_is_a_400_and_goes_nowhere(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            for what, body in BAD_JSON.items():
                await wire.send(request(body=body))
                reply = await wire.reply()
                assert reply.status == 400, (what, reply)
                error = reply.error
                assert error["code"] == "invalid_json", (what, error)
                assert len(error["message"]) < 200, (what, error)
        # All of it on one connection: what was wrong inside does not end it.
        assert engine.exchanges == []
        quiet(gateway)


# What stands at which member of which endpoint.
BAD_MEMBERS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    (CHAT, "model", (5, True, [], {}, ["m"], "", 0)),
    (CHAT, "messages", ("hi", {}, 5, [], None, "")),
    (CHAT, "stream", ("true", 1, [], {}, "", 0)),
    (CHAT, "stream_options", (True, [], "x", 1)),
    (CHAT, "models", (5, [5], [["m"]], {"a": 1}, ["m"] * 65)),
    ("/v1/embeddings", "input", (None, "", [], 5, {}, True)),
    ("/v1/messages", "messages", ("hi", {}, [], None)),
    ("/v1/responses", "stream", ("yes", 2)),
    ("/completion", "model", (5, [])),
)


async def test_members_of_the_wrong_type_are_named(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        for path, name, values in BAD_MEMBERS:
            for value in values:
                good = {"model": "m", "messages": [1], "input": "x", "stream": True}
                body = json.dumps(good | {name: value}).encode()
                reply = await ask(gateway, request(path, body))
                assert reply.status == 400, (name, value, reply)
                assert reply.error["code"] == "invalid_request", (name, value)
                assert reply.error["param"] == name, (name, value, reply)
                body = json.dumps(good | {"stream": False, name: value}).encode()
                assert (await ask(gateway, request(path, body))).status == 400
        assert engine.exchanges == []
        quiet(gateway)


async def test_null_is_as_good_as_absent(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        body = (
            b'{"model":null,"messages":[1],"stream":null,"stream_options":null,'
            b'"models":null,"route":null}'
        )
        reply = await ask(gateway, request(body=body))
        assert reply.status == 200
        assert engine.exchanges[0].json["messages"] == [1]


@pytest.mark.parametrize(
    "name",
    [
        *("nope", "M", "m ", " m", "m\\u0000", "\\ud800", "\\udfff\\ud800", "\\n\\r"),
        *("../../etc/passwd", "\\u2028", "\\u001b[31m", "m:latest:latest", "*", "?"),
        *("[m]", "${env.HOME}", "' OR 1=1 --", "\\ufeff", "\\uffff", "🦙", "m/../m"),
        "x" * 100_000,
    ],
)
async def test_an_unknown_model_is_a_404_whatever_it_is_called(
    tmp_path: Path, name: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        body = f'{{"model":"{name}","messages":[1]}}'.encode()
        reply = await ask(gateway, request(body=body))
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        assert reply.error["param"] == "model"
        assert len(reply.body) < 4000
        for line in gateway.log.requests:
            assert line.get("model") is None
        assert engine.exchanges == []
        quiet(gateway)


async def test_lone_surrogates_in_a_message_pass_as_they_are(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        body = b'{"model":"m","messages":[{"role":"user","content":"\\ud83d \\udc00"}]}'
        assert (await ask(gateway, request(body=body))).status == 200
        assert engine.exchanges[0].request.body == body


async def test_a_compressed_request_is_never_inflated(
    tmp_path: Path, parser: str
) -> None:
    bomb = gzip.compress(b'{"model":"m","messages":[' + b" " * 20_000_000 + b"1]}")
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        for headers in (
            [("Content-Encoding", "gzip")],
            [("Content-Encoding", "GZIP ")],
            [("Content-Encoding", "deflate")],
            [("Content-Encoding", "br")],
            [("Content-Encoding", "zstd")],
            [("Content-Encoding", "identity, gzip")],
            [("Content-Encoding", "identity"), ("Content-Encoding", "gzip")],
            [("Content-Encoding", "gzip"), ("Content-Encoding", "identity")],
            [("Content-Encoding", "nonsense")],
        ):
            reply = await ask(gateway, request(body=bomb, headers=headers))
            assert reply.status == 415, (headers, reply)
            assert reply.error["code"] == "unsupported_encoding"
        assert engine.exchanges == []


SMALL = {"max_body": 100_000, "max_body_total": 250_000, "read_timeout": 5}


async def test_a_body_that_is_too_large_is_refused_by_its_announcement(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine:
        async with running(tmp_path, with_server(behind(engine), **SMALL)) as gateway:
            for length in (100_001, 10**9, 2**63 - 1):
                async with connected(gateway) as wire:
                    await wire.send(request(body=b"", length=length))
                    reply = await wire.reply()
                    assert reply.status == 413
                    assert reply.header("connection") == "close"
                    assert await wire.rest() == b""
            body = CHAT_BODY + b" " * (100_000 - len(CHAT_BODY))
            assert (await ask(gateway, request(body=body))).status == 200
            assert (await ask(gateway, request(body=body + b" "))).status == 413
            quiet(gateway)


async def test_a_body_in_chunks_is_refused_when_it_becomes_too_large(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine:
        async with running(tmp_path, with_server(behind(engine), **SMALL)) as gateway:
            async with connected(gateway) as wire:
                await wire.send(request(body=b"", headers=CHUNKED, length=-1))
                sending = asyncio.create_task(_flood(wire, chunk(b" " * 50_000)))
                reply = await wire.reply()
                assert (reply.status, reply.error["code"]) == (413, "request_too_large")
                assert await wire.rest() == b""
                await sending
            # The last byte of the last chunk may be the one too many.
            body = chunked(b" " * 100_000, b" ")
            data = request(body=body, headers=CHUNKED, length=-1)
            assert (await ask(gateway, data)).status == 413
            quiet(gateway)


async def _flood(wire: Any, piece: bytes) -> None:
    """Send until nobody takes it any more."""
    while not wire.writer.transport.is_closing():
        await wire.send(piece)
        await asyncio.sleep(0)


async def test_all_bodies_together_have_a_limit_in_chunks_too(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        async with running(tmp_path, with_server(behind(engine), **SMALL)) as gateway:
            bodies = gateway.parts.bodies
            first = chunk(b" " * 90_000)
            async with (
                connected(gateway) as one,
                connected(gateway) as two,
                connected(gateway) as three,
            ):
                head = request(body=b"", headers=CHUNKED, length=-1)
                for held, wire in ((90_000, one), (180_000, two)):
                    await wire.send(head + first)
                    await eventually(
                        lambda held=held: bodies.held_bytes == held,  # type: ignore[misc]
                        f"{held} bytes are held",
                    )
                await three.send(head + first)
                reply = await three.reply()
                assert (reply.status, reply.error["code"]) == (503, "overloaded")
                await one.send(chunked(CHAT_BODY))
                assert (await one.reply()).status == 200
                await eventually(lambda: bodies.held_bytes == 90_000, "one is over")
            await eventually(lambda: bodies.held_bytes == 0, "two has left")


async def test_what_is_only_announced_keeps_nobody_out(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        async with running(tmp_path, with_server(behind(engine), **SMALL)) as gateway:
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(5):
                    wire = await stack.enter_async_context(connected(gateway))
                    await wire.send(request(body=b"{", length=100_000))
                await eventually(
                    lambda: len(gateway.parts.doors.active) == 5, "all have come"
                )
                assert (await ask(gateway, request())).status == 200


# --- clients that are slow, silent or gone -------------------------------------------


async def test_a_body_that_never_comes_is_answered_and_ended(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), **BRISK)
        async with running(tmp_path, config) as gateway:
            cases = (
                request(body=b"", length=1000),
                request(body=b'{"model"', length=1000),
                request(body=b"", headers=CHUNKED, length=-1),
                request(body=chunk(b"{"), headers=CHUNKED, length=-1),
                request(body=b"5", headers=CHUNKED, length=-1),
                request(body=chunked(CHAT_BODY)[:-2], headers=CHUNKED, length=-1),
            )

            async def try_one(data: bytes) -> None:
                async with connected(gateway) as wire:
                    await wire.send(data)
                    reply = await wire.reply()
                    said = (reply.status, reply.error["code"])
                    assert said == (408, "request_timeout"), data
                    assert await wire.rest() == b""

            await asyncio.gather(*map(try_one, cases))
            assert engine.exchanges == []
            quiet(gateway)


async def test_a_head_that_never_ends_is_ended(tmp_path: Path, parser: str) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), **BRISK)
        async with running(tmp_path, config) as gateway:
            heads = (
                b"",
                b"G",
                b"GET /health HTTP/1.1",
                b"GET /health HTTP/1.1\r\n",
                b"GET /health HTTP/1.1\r\nHost: x\r\n",
                b"GET /health HTTP/1.1\r\nHost: x\r\n\r",
                b"\r\n\r\n",
            )

            async def try_one(head: bytes) -> None:
                async with connected(gateway) as wire:
                    await wire.send(head)
                    assert await wire.rest() == b""

            await asyncio.gather(*map(try_one, heads))
            await eventually(
                lambda: gateway.parts.guard.open_connections == 0, "all are closed"
            )
            quiet(gateway)


async def test_a_client_that_asks_a_lot_and_reads_nothing_is_cut(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), **BRISK)
        async with running(tmp_path, config) as gateway:
            async with connected(gateway) as wire:
                wire.stop_reading()
                data = request("/openapi.yaml", method="GET", key=None) * 2000
                wire.writer.write(data)
                await eventually(
                    lambda: gateway.parts.guard.open_connections == 0, "it is cut"
                )
            assert (await ask(gateway, request())).status == 200


async def test_clients_that_hang_up_at_any_moment_leave_nothing_behind(
    tmp_path: Path, parser: str
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("hi")))
        await chats(exchange)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            whole = request(body=b'{"model":"m","stream":true,"messages":[1]}')
            for cut in range(0, len(whole) + 1, 7):
                async with connected(gateway) as wire:
                    await wire.send(whole[:cut])
            parts = gateway.parts
            await eventually(
                lambda: parts.guard.open_connections == 0, "all are closed"
            )
            await eventually(lambda: not parts.doors.active, "all have ended")
            assert parts.allowances.in_flight("alice") == 0
            assert parts.catalogue.backends[0].in_flight == 0
            quiet(gateway)


async def test_requests_that_come_at_once_are_answered_in_order(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            stream = b'{"model":"m","stream":true,"messages":[1]}'
            data = [
                request("/health", method="GET", key=None),
                request(),
                request("/nowhere", method="GET"),
                request(body=stream),
                request(body=b"{"),
                request(),
                request("/v1/models", method="GET"),
                b"garbage\r\n\r\n",
            ]
            # (aiohttp drops what came in one piece with garbage.)
            await wire.send(b"".join(data[:-1]))
            statuses = [(await wire.reply()).status for _ in data[:-1]]
            assert statuses == [200, 200, 404, 200, 400, 200, 200]
            await wire.send(data[-1])
            assert (await wire.reply()).status == 400
            assert await wire.rest() == b""
        assert len(engine.exchanges) == 3


async def test_a_request_in_chunks_is_the_last_one_on_its_connection(
    tmp_path: Path, parser: str
) -> None:
    """A trailer of it must not become a header of somebody else's request."""
    stream = b'{"model":"m","stream":true,"messages":[1]}'
    trailer = b"0\r\nAuthorization: Bearer " + ADMIN.encode() + b"\r\n\r\n"
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        for body in (CHAT_BODY, stream):
            for end in (b"0\r\n\r\n", trailer):
                sent = request(
                    body=chunked(body, ends=False) + end, headers=CHUNKED, length=-1
                )
                async with connected(gateway) as wire:
                    await wire.send(sent + request())
                    reply = await wire.reply()
                    assert reply.status == 200
                    assert reply.header("connection") == "close"
                    assert await wire.rest() == b""
                async with connected(gateway) as wire:
                    await wire.send(request() + sent[:-3])
                    assert (await wire.reply()).status == 200
                    await wire.send(sent[-3:] + request())
                    assert (await wire.reply()).status == 200
                    assert await wire.rest() == b""
        assert {line["key"] for line in gateway.log.requests} == {"alice"}
        assert len(engine.exchanges) == len(gateway.log.requests) == 12


async def test_100_pipelined_requests_are_all_answered(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            await wire.send(request("/health", method="GET", key=None) * 100)
            for _ in range(100):
                assert (await wire.reply()).status == 200


async def test_pipelined_answers_keep_their_order_whoever_writes_them(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            await wire.send((request() + request(key=None)) * 20)
            got = [(await wire.reply()).status for _ in range(40)]
        assert got == [200, 401] * 20


async def test_a_request_after_a_declined_upgrade_is_answered(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
            await wire.send(request(headers=upgrade) + request())
            assert (await wire.reply()).status == 200
            assert (await wire.reply()).status == 200
            await wire.send(request("/v1/nothing", method="GET", headers=upgrade))
            reply = await wire.reply()
            assert (reply.status, reply.error["code"]) == (404, "not_found")
            await wire.send(request())
            assert (await wire.reply()).status == 200


# --- Expect --------------------------------------------------------------------------

EXPECT = (("Expect", "100-continue"),)


async def test_a_client_that_waits_is_asked_for_its_body_once_its_key_is_good(
    tmp_path: Path, parser: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            for _ in range(2):
                data = request(headers=EXPECT)
                head, body = data[: -len(CHAT_BODY)], data[-len(CHAT_BODY) :]
                await wire.send(head)
                assert (await wire.reply()).status == 100
                await wire.send(body)
                assert (await wire.reply()).status == 200
        async with connected(gateway) as wire:
            # The body does not wait: then nobody needs to be asked.
            await wire.send(request(headers=EXPECT))
            assert (await wire.reply()).status == 200
    assert len(engine.exchanges) == 3


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request(body=b"", key=None, headers=EXPECT, length=1000), 401),
        (request(body=b"", key="sk-wrong", headers=EXPECT, length=1000), 401),
        (request("/nowhere", b"", headers=EXPECT, length=1000), 404),
        (request(CHAT, b"", method="PUT", headers=EXPECT, length=1000), 405),
        (request(body=b"", headers=EXPECT, length=10**9), 413),
        (
            request(
                body=b"",
                headers=[*EXPECT, ("Content-Encoding", "gzip")],
                length=1000,
            ),
            415,
        ),
    ],
)
async def test_a_body_that_nobody_wants_is_not_asked_for(
    tmp_path: Path, parser: str, data: bytes, status: int
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            await wire.send(data)
            reply = await wire.reply()
            assert reply.status == status
            assert reply.error
            assert reply.header("connection") == "close"
            assert await wire.rest() == b""


async def test_http_1_0_is_never_sent_a_100(tmp_path: Path, parser: str) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            data = request(headers=EXPECT, version="1.0")
            await wire.send(data[: -len(CHAT_BODY)])
            await eventually(lambda: bool(gateway.parts.doors.active), "it has come")
            await wire.send(CHAT_BODY)
            assert (await wire.reply()).status == 200


async def test_the_answer_to_head_has_no_body(tmp_path: Path, parser: str) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:
            for path, status in (
                ("/health", 200),
                ("/v1/models", 200),
                ("/v1/models/nope", 404),
                ("/nowhere", 404),
                ("/v1/audio/voices", 405),
                (CHAT, 405),
            ):
                await wire.send(request(path, method="HEAD"))
                assert (await wire.reply(to_head=True)).status == status
            await wire.send(request("/version", method="GET"))
            assert "version" in (await wire.reply()).json
