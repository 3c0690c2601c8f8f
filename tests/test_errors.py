"""The table of errors: what a client is told, and how, when something is wrong."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import (
    ADMIN,
    CHAT,
    KEYS,
    METRICS,
    SSE_HEAD,
    USER,
    Exchange,
    FakeEngine,
    Gateway,
    behind,
    chats,
    chunk,
    eventually,
    running,
)
from inferencia import __version__
from inferencia.api.openai import ENDPOINTS
from inferencia.catalogue.choosing import Catalogue
from rawclient import (
    CHAT_BODY,
    CHUNKED,
    Reply,
    ask,
    chunked,
    connected,
    request,
    with_server,
)
from scripted import response

NARROW = "sk-test-narrow-83a1b0c7d2"
EXPIRED = "sk-test-expired-5c5c5c5c5c"
ONCE = "sk-test-once-e1e2e3e4e5e6"
ALONE = "sk-test-alone-a1a2a3a4a5a6"
SPENT = "sk-test-spent-d1d2d3d4d5d6"
MORE_KEYS = f"""{KEYS}
{NARROW} name=narrow models=other*
{EXPIRED} name=late expires=2020-01-31
{ONCE} name=once rps=0.01 burst=1
{ALONE} name=alone concurrency=1
{SPENT} name=spent daily_tokens=5
"""

# What the client reads it from, and what it must find there.
REFUSALS: dict[str, tuple[bytes, int, str, str, str | None]] = {
    "broken JSON": (
        request(body=b'{"model": "m",'),
        *(400, "invalid_request_error", "invalid_json", None),
    ),
    "not UTF-8": (
        request(body=b'{"model": "\xff"}'),
        *(400, "invalid_request_error", "invalid_json", None),
    ),
    "no body": (
        request(body=b""),
        *(400, "invalid_request_error", "invalid_json", None),
    ),
    "a member twice": (
        request(body=b'{"model": "m", "messages": [1], "model": "n"}'),
        *(400, "invalid_request_error", "invalid_json", None),
    ),
    "a member of the wrong type": (
        request(body=b'{"model": 5, "messages": [1]}'),
        *(400, "invalid_request_error", "invalid_request", "model"),
    ),
    "a missing member": (
        request(body=b'{"model": "m"}'),
        *(400, "invalid_request_error", "invalid_request", "messages"),
    ),
    "no HTTP": (
        b"how do you do?\r\n\r\n",
        *(400, "invalid_request_error", "invalid_request", None),
    ),
    "no key": (
        request(key=None),
        *(401, "authentication_error", "invalid_api_key", None),
    ),
    "an unknown key": (
        request(key="sk-never-seen-000000000"),
        *(401, "authentication_error", "invalid_api_key", None),
    ),
    "an expired key": (
        request(key=EXPIRED),
        *(401, "authentication_error", "invalid_api_key", None),
    ),
    "a role that may not": (
        request(key=METRICS),
        *(403, "permission_error", "forbidden", None),
    ),
    "a user at the metrics": (
        request("/metrics", method="GET"),
        *(403, "permission_error", "forbidden", None),
    ),
    "an unknown path": (
        request("/v1/chat", method="GET"),
        *(404, "invalid_request_error", "not_found", None),
    ),
    "an unknown path without a key": (
        request("/wp-login.php", key=None),
        *(404, "invalid_request_error", "not_found", None),
    ),
    "an unknown model": (
        request(body=b'{"model": "nope", "messages": [1]}'),
        *(404, "invalid_request_error", "model_not_found", "model"),
    ),
    "a hidden model": (
        request(key=NARROW),
        *(404, "invalid_request_error", "model_not_found", "model"),
    ),
    "an unknown model's record": (
        request("/v1/models/nope", method="GET"),
        *(404, "invalid_request_error", "model_not_found", "model"),
    ),
    "a wrong method": (
        request(CHAT, method="DELETE"),
        *(405, "invalid_request_error", "method_not_allowed", None),
    ),
    "too large a body": (
        request(body=b"", length=10_000_000),
        *(413, "invalid_request_error", "request_too_large", None),
    ),
    "too large a body in chunks": (
        request(body=chunked(b" " * 40_000, b" " * 40_000), headers=CHUNKED, length=-1),
        *(413, "invalid_request_error", "request_too_large", None),
    ),
    "a compressed body": (
        request(headers=[("Content-Encoding", "gzip")]),
        *(415, "invalid_request_error", "unsupported_encoding", None),
    ),
    "a body that stops coming": (
        request(length=len(CHAT_BODY) + 1),
        *(408, "invalid_request_error", "request_timeout", None),
    ),
    "a loop": (
        request(headers=[("Via", "1.1 inferencia-OURSELVES")]),
        *(502, "backend_error", "loop_detected", None),
    ),
}

SMALL = {"max_body": 65536, "max_body_total": 131072, "read_timeout": 0.1}


@contextlib.asynccontextmanager
async def front(folder: Path, **server: Any) -> AsyncIterator[Gateway]:
    """A gateway with small limits before a good engine."""
    async with FakeEngine("m") as engine:
        config = with_server(behind(engine), **(SMALL | server))
        async with running(folder, config, keys=MORE_KEYS) as gateway:
            yield gateway


def check_refusal(
    reply: Reply, status: int, kind: str, code: str | None, param: str | None = None
) -> None:
    error = reply.error
    found = (reply.status, error["type"], error["code"], error["param"])
    assert found == (status, kind, code, param), error
    assert reply.header("x-request-id")
    assert "Traceback" not in error["message"]


async def test_each_refusal_has_its_status_type_code_and_param(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        for what, (data, status, kind, code, param) in REFUSALS.items():
            ours = gateway.parts.instance.encode()
            reply = await ask(gateway, data.replace(b"OURSELVES", ours))
            try:
                check_refusal(reply, status, kind, code, param)
            except (AssertionError, KeyError, ValueError) as error:
                pytest.fail(f"{what}: {reply}: {error!r}")
        # What a refusal is worth to the operator: its code, in the log and counted.
        codes = {line.get("error") for line in gateway.log.requests}
        assert codes == {refusal[3] for refusal in REFUSALS.values()}
        metrics = gateway.parts.metrics.render().decode()
        for code in codes:
            assert f'inferencia_errors_total{{code="{code}"' in metrics


async def test_a_401_challenges_for_bearer_only(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        for key in (None, "sk-wrong-wrong-wrong"):
            reply = await ask(gateway, request(key=key))
            assert reply.header("www-authenticate") == "Bearer"


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        (CHAT, "GET", "POST"),
        (CHAT, "OPTIONS", "POST"),
        ("/v1/models", "POST", "GET, HEAD"),
        ("/v1/models/some/long/name", "DELETE", "GET, HEAD"),
        ("/v1/audio/voices", "HEAD", "GET, POST"),
        ("/v1/audio/voices", "PUT", "GET, POST"),
        ("/health", "TRACE", "GET, HEAD"),
        ("/metrics", "PATCH", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(
    tmp_path: Path, path: str, method: str, allowed: str
) -> None:
    async with front(tmp_path) as gateway:
        data = request(path, b"", method=method)
        reply = await ask(gateway, data, to_head=method == "HEAD")
        assert (reply.status, reply.header("allow")) == (405, allowed)
        if method != "HEAD":
            assert reply.error["code"] == "method_not_allowed"


async def test_every_answer_has_a_request_id_of_its_own(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        seen = []
        for data in (
            *(data for data, *_ in REFUSALS.values()),
            request(),
            request(body=b'{"model":"m","stream":true,"messages":[1]}'),
            request("/health", method="GET"),
            request("/health/ready", method="GET", key=None),
            request("/version", method="GET", key=None),
            request("/openapi.yaml", method="GET", key=None),
            request("/v1/models", method="GET"),
            request("/metrics", method="GET", key=ADMIN),
        ):
            seen.append((await ask(gateway, data)).header("x-request-id"))
        assert all(seen)
        assert len(set(seen)) == len(seen)


async def test_a_sane_request_id_is_kept_and_any_other_replaced(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        for sane in ("abc", "6f1c2d3e-9a8b-4c5d-8e7f-001122334455", "Root=1-67+/=@:."):
            for path in ("/health", "/v1/models", "/nowhere", "/v1/models/none"):
                headers = [("X-Request-Id", sane)]
                reply = await ask(gateway, request(path, method="GET", headers=headers))
                assert reply.header("x-request-id") == sane
        await eventually(lambda: len(gateway.log.requests) == 12, "all are logged")
        assert {line["id"] for line in gateway.log.requests} >= {"abc"}
        for odd in (b"", b"a b", b"a" * 129, b"a\tb", b"<script>", b"\xc3\xa4", b"a;b"):
            headers_odd = [("X-Request-Id", odd)]
            reply = await ask(
                gateway, request("/health", method="GET", headers=headers_odd)
            )
            given = reply.header("x-request-id") or ""
            assert re.fullmatch(r"req-[0-9a-f]{24}", given), (odd, given)


async def test_errors_on_v1_messages_also_say_that_they_are_errors(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            for data, status in (
                (request(path, b"{"), 400),
                (request(path, key=None), 401),
                (request(path, key=METRICS), 403),
                (request(path, b'{"model":"nope","messages":[1]}'), 404),
                (request(path, method="PUT"), 405),
                (request(path, b"", length=10_000_000), 413),
            ):
                reply = await ask(gateway, data)
                assert reply.status == status
                assert reply.error
                assert list(reply.json) == ["type", "error"]
                assert reply.json["type"] == "error"
        for path in ("/v1/messages/batches", "/v1/messages/batches/b1"):
            reply = await ask(gateway, request(path, method="GET"))
            assert reply.status == 404
            assert reply.json["type"] == "error"
            assert "keeps nothing" in reply.error["message"]
        for path in (CHAT, "/v1/messagesx", "/v1/responses"):
            reply = await ask(gateway, request(path, key=None))
            assert list(reply.json) == ["error"]


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/files", "/v1/files/f1/content", "/v1/uploads", "/v1/batches"),
        *("/v1/assistants", "/v1/threads/t1/runs", "/v1/vector_stores/"),
        *("/v1/responses/resp_1", "/v1/responses/resp_1/cancel", "/v1/conversations"),
        *("/v1/chat/completions/chatcmpl-1", "/v1/fine_tuning/jobs", "/v1/evals"),
    ],
)
async def test_what_would_have_to_be_stored_is_refused_saying_so(
    tmp_path: Path, path: str
) -> None:
    async with front(tmp_path) as gateway:
        for method in ("GET", "POST", "DELETE"):
            reply = await ask(gateway, request(path, method=method))
            assert (reply.status, reply.error["code"]) == (404, "not_found")
            assert "this server keeps nothing" in reply.error["message"]


async def test_an_unknown_path_is_answered_with_what_was_probably_meant(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway:
        for path, meant in (
            ("/chat/completions", "/v1/chat/completions"),
            ("/embeddings", "/v1/embeddings"),
            ("/v1/chat/completion", "/v1/chat/completions"),
            ("/v1/chat/completions/", "/v1/chat/completions"),
            ("/v1//models", "/v1/models"),
            ("/v1/v1/models", "/v1/models"),
            ("/v1", "/v1/"),
        ):
            reply = await ask(gateway, request(path))
            assert reply.status == 404
            assert f"did you mean {meant}" in reply.error["message"]


@pytest.mark.parametrize(
    "target",
    [
        *("/v1%2Fmodels", "//v1/models", "/v1/../health", "/v1/%2e%2e/health"),
        *("/health;x", "/./health", "/V1/models", "/v1/models%00", "/v1/models%0a"),
        *("/%0d%0aX:%20y", "/%ff%fe", "/%zz", "/v1\\models", "/v1/chat%20/completions"),
        *("/slots", "/lora-adapters", "/models/load", "/.env"),
        *("/internal", "/v1/engines", "/api/tags", "/tunnel/v1/control", "/upstream"),
        *("/%E2%80%A8", "/" + "a" * 8000, "/" + "../" * 500 + "etc/passwd"),
        *("/admin/api", "/admin/api/", "/admin/api/x", "/admin/api/../../etc/passwd"),
        *("/v1/load_lora_adapter", "/v1/audio", "/reset_prefix_cache", "/sleep"),
    ],
)
async def test_no_path_leads_anywhere_but_where_a_route_says(
    tmp_path: Path, target: str
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        for method in ("GET", "POST"):
            reply = await ask(gateway, request(target, method=method))
            known = "/v1/models%0", "/v1/models/"
            assert reply.status == 404, (target, reply)
            assert reply.error["code"] == "not_found" or target.startswith(known)
            assert len(reply.body) < 1000
        assert engine.exchanges == []
        paths = {line["path"] for line in gateway.log.requests}
        assert paths <= {"/{path}", "/other"}


async def test_our_own_fault_is_a_500_that_points_to_the_log_and_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Replaced, since no input is known that provokes it.
    def broken(*_: object) -> None:
        raise ZeroDivisionError("the secret of this bug")

    monkeypatch.setattr(Catalogue, "listing", broken)
    async with front(tmp_path) as gateway:
        reply = await ask(gateway, request("/v1/models", method="GET"))
        check_refusal(reply, 500, "server_error", "internal_error")
        assert str(reply.header("x-request-id")) in reply.error["message"]
        assert b"secret" not in reply.body
        assert b"ZeroDivision" not in reply.body
        told = [line for line in gateway.log.lines if line["level"] == "ERROR"]
        assert any("ZeroDivisionError" in line.get("error", "") for line in told)
        assert any("at" in line for line in told)
        assert "Traceback" not in gateway.log.text
        # The connection and the daemon go on.
        assert (await ask(gateway, request())).status == 200


async def test_even_a_fault_in_the_chain_itself_is_a_500_of_our_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(tmp_path) as gateway:
        # Replaced, since no input is known that provokes it.
        monkeypatch.setattr(gateway.parts.doors, "trusted_proxies", 5)
        reply = await ask(gateway, request())
        check_refusal(reply, 500, "server_error", "internal_error")
        assert "Traceback" not in gateway.log.text


async def test_no_proxy_may_keep_what_is_said_of_our_health(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        for path, said in (
            ("/health", {"status": "ok"}),
            ("/health/ready", {"status": "ready"}),
            ("/version", {}),
        ):
            reply = await ask(gateway, request(path, method="GET", key=None))
            assert reply.status == 200
            assert reply.json == said | {"version": __version__}
            assert reply.header("cache-control") == "no-store"


# --- limits --------------------------------------------------------------------------


def seconds_of(reply: Reply) -> int:
    value = reply.header("retry-after")
    assert value is not None
    assert re.fullmatch(r"[1-9][0-9]*", value)
    return int(value)


async def test_too_many_requests_are_told_when_to_come_back(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        assert (await ask(gateway, request(key=ONCE))).status == 200
        reply = await ask(gateway, request(key=ONCE))
        check_refusal(reply, 429, "rate_limit_error", "rate_limit_exceeded")
        assert 90 <= seconds_of(reply) <= 100  # one more each 100 s
        assert 'key "once"' in reply.error["message"]


async def test_too_many_at_once_are_told_to_come_back_in_a_second(
    tmp_path: Path,
) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await go_on.wait()
        await chats(exchange)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine), keys=MORE_KEYS) as gateway:
            first = asyncio.create_task(ask(gateway, request(key=ALONE)))
            await engine.next()
            reply = await ask(gateway, request(key=ALONE))
            check_refusal(reply, 429, "rate_limit_error", "rate_limit_exceeded")
            assert seconds_of(reply) == 1
            go_on.set()
            assert (await first).status == 200
            assert (await ask(gateway, request(key=ALONE))).status == 200


async def test_a_day_of_tokens_that_is_used_up_is_another_code(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        assert (await ask(gateway, request(key=SPENT))).status == 200  # 9 of 5 tokens
        reply = await ask(gateway, request(key=SPENT))
        check_refusal(reply, 429, "rate_limit_error", "insufficient_quota")
        assert 1 <= seconds_of(reply) <= 86400
        assert "00:00 UTC" in reply.error["message"]


async def test_while_the_daemon_drains_new_work_is_refused(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        gateway.parts.doors.draining = True
        reply = await ask(gateway, request())
        check_refusal(reply, 503, "backend_error", "shutting_down")
        assert seconds_of(reply)
        assert reply.header("connection") == "close"
        ready = await ask(gateway, request("/health/ready", method="GET", key=None))
        assert (ready.status, ready.json["status"]) == (503, "unavailable")
        alive = await ask(gateway, request("/health", method="GET", key=None))
        assert (alive.status, alive.json["status"]) == (200, "ok")
        # A stranger learns nothing more than before.
        assert (await ask(gateway, request(key=None))).status == 401


async def test_too_many_bodies_in_memory_are_told_to_come_back(tmp_path: Path) -> None:
    async with front(tmp_path, read_timeout=10) as gateway:
        async with connected(gateway) as one, connected(gateway) as two:
            for wire in (one, two):
                await wire.send(request(body=b" " * 65535, length=65536))
            bodies = gateway.parts.bodies
            await eventually(lambda: bodies.held_bytes == 131070, "both are counted")
            reply = await ask(gateway, request())
            check_refusal(reply, 503, "backend_error", "overloaded")
            assert seconds_of(reply)
        await eventually(lambda: bodies.held_bytes == 0, "both are forgotten")
        assert (await ask(gateway, request())).status == 200
        assert bodies.held_bytes == 0


# --- backends ------------------------------------------------------------------------


async def test_a_backend_that_is_off_is_a_503_that_says_when_to_try_again(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        await engine.stop()
        reply = await ask(gateway, request())
        check_refusal(reply, 503, "backend_error", "backend_unavailable")
        assert seconds_of(reply)


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (b"I am no web server\r\n\r\n", 502, "backend_error"),
        (b"", 502, "backend_error"),
        (response(b"", status=302), 502, "backend_error"),
        (response(b"not found", status=401), 502, "backend_auth_failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nX: a\x00b\r\n\r\n", 502, None),
        (None, 504, "backend_timeout"),
    ],
)
async def test_a_backend_that_fails_before_its_first_byte(
    tmp_path: Path, said: bytes | None, status: int, code: str | None
) -> None:
    async def behave(exchange: Exchange) -> None:
        if said is None:
            await exchange.gone.wait()
        else:
            await exchange.write(said)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine, timeout=0.1)) as gateway:
            for stream in (b"true", b"false"):
                body = b'{"model":"m","messages":[1],"stream":%b}' % stream
                reply = await ask(gateway, request(body=body))
                check_refusal(reply, status, "backend_error", code or "backend_error")


async def test_an_error_within_a_stream_of_messages_is_an_error_event(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(b"event: ping\ndata: {}\n\n"))
        exchange.cut()

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            body = b'{"model":"m","messages":[1],"stream":true,"max_tokens":5}'
            reply = await ask(gateway, request("/v1/messages", body))
            assert reply.status == 200
            last = reply.body.decode().strip().split("\n\n")[-1].split("\n")
            assert last[0] == "event: error"
            told = json.loads(last[1].removeprefix("data: "))
            assert told["type"] == "error"
            assert told["error"]["code"] == "backend_error"


async def test_an_error_never_names_what_is_inside_to_a_stranger(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        await engine.stop()
        for path in ("/health", "/health/ready", "/version", "/nowhere", CHAT):
            reply = await ask(gateway, request(path, method="GET", key=None))
            assert str(engine.port).encode() not in reply.body
            assert b"127.0.0.1" not in reply.body


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: f"{e.method} {e.path}")
async def test_every_endpoint_refuses_in_the_same_shape(
    tmp_path: Path, endpoint: Any
) -> None:
    async with FakeEngine(behave=_no) as engine:
        async with running(tmp_path, behind(engine), keys=MORE_KEYS) as gateway:
            path, method = endpoint.path, endpoint.method
            assert (await ask(gateway, request(path, key=None, method=method))).error
            assert (await ask(gateway, request(path, key=METRICS, method=method))).error
            body = b'{"model":"m","messages":[1],"input":"x"}'
            reply = await ask(gateway, request(path, body, method=method))
            assert (reply.status, reply.error["code"]) == (422, "no")
            if method == "POST":
                for bad in (b"[]", b"", b"{", b'{"model":[]}', b"\x00", b"model=m"):
                    reply = await ask(gateway, request(path, bad))
                    assert reply.status == 400, (bad, reply)
                    assert reply.error
                unknown = body.replace(b'"m"', b'"nope"')
                reply = await ask(gateway, request(path, unknown))
                assert (reply.status, reply.error["param"]) == (404, "model")
    assert USER not in gateway.log.text


async def _no(exchange: Exchange) -> None:
    error = {"message": "No.", "type": "t", "param": None, "code": "no"}
    await exchange.answer({"error": error}, 422)
