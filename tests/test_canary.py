"""What was entrusted to us comes out nowhere: not in logs, metrics, or others' errors.

A canary is put into every part of requests, good and bad ones, and must then not be
found in anything that somebody else could read.
"""

import base64
import json
from pathlib import Path

import pytest

from gateway import (
    CHAT,
    KEYS,
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
from inferencia.members import Members
from rawclient import CHUNKED, ask, bearer, chunked, connected, request, with_server

# One that looks like a key, and one that nobody could recognise.
KEY = "sk-cAnArY-4f0a7bd2c9e1"
WORD = "cAnArYzq7w3k9"
CANARIES = (KEY, WORD, KEY.removeprefix("sk-"))
RAW = WORD.encode()


def searched(gateway: Gateway) -> dict[str, str]:
    """Everything that somebody else than the sender could read."""
    texts = {
        "log": gateway.log.text,
        "metrics": gateway.parts.metrics.render().decode(),
    }
    assert texts["log"].isascii()
    for line in gateway.log.text.splitlines():
        json.loads(line)
    return texts


def assert_silent(gateway: Gateway) -> None:
    for place, text in searched(gateway).items():
        for canary in CANARIES:
            for form in (canary, canary.lower(), _base64(canary), canary[::-1]):
                assert form not in text, f"{form} is in the {place}"
        assert "Traceback" not in text


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode().rstrip("=")[1:-1]


def spread(canary: str) -> list[bytes]:
    """Requests with the canary in each part that can hold it."""
    raw = canary.encode()
    encoded = base64.b64encode(b"user:" + raw)
    text = json.dumps(canary).encode()
    chat = b'{"model":"m","messages":[{"role":"user","content":%b}]}' % text
    return [
        # keys, as they are sent and as they are mangled
        request(key=canary),
        request(key=None, headers=[("x-api-key", canary)]),
        request(key=None, headers=[("Authorization", b"Basic " + encoded)]),
        request(key=None, headers=[("Authorization", canary)]),
        request(key=None, headers=[("Authorization", f"Bearer  x {canary}")]),
        request(key=None, headers=[("Authorization", b"Bearer \xff" + raw)]),
        request(headers=[("Authorization", f"Bearer {canary}")]),
        request(headers=[("Cookie", f"session={canary}")]),
        # where clients put things
        request(f"{CHAT}?key={canary}&prompt={canary}"),
        request(f"/{canary}", method="GET"),
        request(f"/v1/{canary}/files", method="DELETE"),
        request(f"/v1/models/{canary}", method="GET"),
        request(f"http://{canary}@x/health", method="GET"),
        request(headers=[("User-Agent", canary), ("Referer", f"http://x/{canary}")]),
        request(headers=[(canary, canary)]),
        request(headers=[("X-Forwarded-For", canary), ("Via", canary)]),
        request(headers=[("traceparent", canary), ("Origin", canary)]),
        request(headers=[("Content-Type", f"text/{canary}")]),
        request(headers=[("Content-Encoding", canary)]),
        request(headers=[("Expect", canary), ("Upgrade", canary)]),
        request(host=canary),
        request(host=f"{canary}:{canary}"),
        request(method=canary.replace("-", "").upper()),
        request(method=canary.replace("-", "")),
        # bodies
        request(body=chat),
        request(body=chat.replace(b'"model"', b'"stream":true,"model"')),
        request(body=chat[:-1]),
        request(body=chat + raw),
        request(body=raw),
        request(body=b'{"model":%b,"messages":[1]}' % text),
        request(body=b'{"model":"m","messages":%b}' % text),
        request(body=b'{"model":"m","messages":[1],"stream":%b}' % text),
        request(body=b'{"model":"m","messages":[1],"models":[%b]}' % text),
        request(body=b'{"model":"m","messages":[1],"route":%b}' % text),
        request(body=b'{"model":"m","messages":[1],%b:1}' % text),
        request(body=b'{"model":"m","messages":[1],%b:1,%b:2}' % (text, text)),
        request(body=b'{"model":"m","messages":[1],"user":%b}' % text),
        request(body=b'{"model":"m","messages":[%b,NaN]}' % text),
        request(body=b'{"model":"m","x":"' + raw + b'\xff"}'),
        request(body=chunked(chat, b" "), headers=CHUNKED, length=-1),
        request(body=chunked(chat) + raw, headers=CHUNKED, length=-1),
        request(body=b"5\r\n" + raw, headers=CHUNKED, length=-1),
        request(
            "/v1/audio/transcriptions",
            b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b' % (raw, raw),
            headers=[("Content-Type", f"multipart/form-data; boundary=b; x={canary}")],
        ),
        request("/v1/embeddings", b'{"model":"m","input":%b}' % text),
        # what is no HTTP
        raw + b"\r\n\r\n",
        b"GET /" + raw + b"\r\n\r\n",
        b"GET / " + raw + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + raw + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \x01" + raw + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n " + raw + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA\x00" + raw + b": b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + raw * 1000 + b"\r\n\r\n",
        b"GET /" + raw * 1000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: " + raw + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + raw + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + raw,
    ]


@pytest.mark.parametrize("canary", [KEY, WORD])
async def test_whatever_is_sent_is_neither_logged_nor_counted(
    tmp_path: Path, canary: str
) -> None:
    async with FakeEngine() as engine:
        config = with_server(behind(engine), read_timeout=0.1, header_timeout=0.2)
        async with running(tmp_path, config) as gateway:
            sent = spread(canary)
            for data in sent:
                async with connected(gateway) as wire:
                    await wire.send(data)
                    assert (await wire.reply()).status < 500, data
            await eventually(
                lambda: len(gateway.log.requests) >= len(sent), "all are logged"
            )
            assert_silent(gateway)
            # And nobody else is told.
            for path in ("/health", "/v1/models", "/v1/usage", "/nowhere"):
                reply = await ask(gateway, request(path, method="GET"))
                assert canary.encode() not in reply.body


async def test_a_good_key_is_neither_logged_nor_sent_on(tmp_path: Path) -> None:
    key = "cAnArYzq7w3k9-a-key-without-a-prefix"
    keys = f"{KEYS}\n{key} name=carol\n"
    async with FakeEngine() as engine:
        async with running(tmp_path, behind(engine), keys=keys) as gateway:
            encoded = base64.b64encode(b"u:" + key.encode())
            for headers in (
                bearer(key),
                [("x-api-key", key)],
                [("Authorization", b"Basic " + encoded)],
            ):
                reply = await ask(gateway, request(key=None, headers=headers))
                assert reply.status == 200
                assert WORD.encode() not in reply.body
            assert_silent(gateway)
            assert {line["key"] for line in gateway.log.requests} == {"carol"}
            for exchange in engine.exchanges:
                whole = repr(exchange.request)
                assert WORD not in whole
                assert encoded.decode() not in whole
                assert exchange.request.header("authorization") is None
                assert exchange.request.header("x-api-key") is None


async def test_answers_are_neither_logged_nor_counted(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        match exchange.json["messages"][0]:
            case "stream":
                await exchange.write(SSE_HEAD + chunk(event(WORD)))
                exchange.cut()
            case "error":
                error = {"message": WORD, "type": WORD, "param": WORD, "code": WORD}
                await exchange.answer({"error": error}, 422)
            case "text":
                await exchange.answer(RAW, 500)
            case "nonsense":
                await exchange.write(RAW + b"\r\n\r\n")
            case "header":
                head = b"HTTP/1.1 200 OK\r\nX-A: \x01" + RAW + b"\r\n\r\n"
                await exchange.write(head)
            case "event":
                error = {"message": WORD, "code": WORD}
                data = json.dumps({"error": error}).encode()
                await exchange.write(SSE_HEAD + chunk(b"data: " + data + b"\n\n"))
            case "model":
                await exchange.answer(
                    {"model": WORD, "choices": [], "usage": {WORD: 1}}
                )
            case _:
                await chats(exchange)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            for what in (
                *("stream", "error", "text", "header", "event", "model"),
                *("fine", "nonsense"),
            ):
                for stream in (True, False):
                    body = {"model": "m", "messages": [what], "stream": stream}
                    await ask(gateway, request(body=json.dumps(body).encode()))
            await eventually(lambda: len(gateway.log.requests) == 16, "all are logged")
            assert_silent(gateway)


async def test_what_an_engine_says_when_it_fails_is_for_the_client_alone(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        error = {"message": f"cannot parse: {WORD}", "type": "x", "code": 500}
        await exchange.answer({"error": error}, 500)

    async with FakeEngine("m", "n", behave=behave) as engine:
        config = json.loads(behind(engine))
        config["routing"] = {"fallbacks": {"m": ["n"]}}
        async with running(tmp_path, json.dumps(config)) as gateway:
            reply = await ask(gateway, request())
            assert (reply.status, RAW in reply.body) == (500, True)
            assert len(engine.exchanges) == 2
            await eventually(lambda: len(gateway.log.requests) == 1, "it is logged")
            assert_silent(gateway)


async def test_a_line_of_the_log_is_one_line_whatever_a_request_holds(
    tmp_path: Path,
) -> None:
    odd = ("%0d%0aX", "%1b[31m", "%e2%80%a8", "%00", "%22%2c%22level%22:%22x")
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        for text in odd:
            await ask(gateway, request(f"/{text}", method="GET"))
            await ask(gateway, request(f"/v1/models/{text}", method="GET"))
        await eventually(lambda: len(gateway.log.requests) == 10, "all are logged")
        for line in gateway.log.text.splitlines():
            assert json.loads(line)["level"] in ("DEBUG", "INFO", "WARN")
            assert all(32 <= ord(sign) < 127 for sign in line)


async def test_our_own_fault_does_not_show_what_it_was_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Replaced, since no input is known that provokes it.
    def broken(body: bytes) -> Members:
        raise ValueError(f"cannot read {body.decode()}")

    monkeypatch.setattr(Members, "parse", broken)
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        body = f'{{"model":"m","messages":["{WORD}"]}}'.encode()
        reply = await ask(gateway, request(body=body))
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        assert RAW not in reply.body
        assert USER not in gateway.log.text
        assert WORD not in gateway.log.text
