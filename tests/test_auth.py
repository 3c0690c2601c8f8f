"""Who may come in, what a key opens, and that nothing is read before that is known."""

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway import (
    ADMIN,
    CHAT,
    DONE,
    FINISH,
    KEYS,
    LAST_CHUNK,
    METRICS,
    PATIENCE,
    SSE_HEAD,
    USER,
    Exchange,
    FakeEngine,
    Gateway,
    behind,
    chunk,
    event,
    running,
)
from inferencia.downstream.connection import Connection
from inferencia.keys import Key, Role
from inferencia.middleware import Anonymous, may
from rawclient import CHUNKED, Headers, ask, bearer, connected, request

AGENT = "sk-test-agent-4d4d4d4d4d4d"
SIGNS = "sk-test:!$%&()*+,-./;<=>?@[]^_`{|}~:8c"


def basic(password: str | bytes, user: str = "anybody") -> bytes:
    raw = password if isinstance(password, bytes) else password.encode()
    return b"Basic " + base64.b64encode(user.encode() + b":" + raw)


@contextlib.asynccontextmanager
async def front(
    folder: Path,
    *,
    keys: str = "",
    config: dict[str, Any] | None = None,
    anonymous: Anonymous | None = None,
) -> AsyncIterator[Gateway]:
    async with FakeEngine("m", "other") as engine:
        text = json.dumps(json.loads(behind(engine)) | (config or {}))
        async with running(
            folder, text, keys=KEYS + keys, anonymous=anonymous
        ) as gateway:
            yield gateway


async def status_of(gateway: Gateway, headers: Headers, path: str = CHAT) -> int:
    return (await ask(gateway, request(path, key=None, headers=headers))).status


# --- how a key is shown --------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        bearer(USER),
        [("authorization", f"bearer {USER}")],
        [("AUTHORIZATION", f"BEARER   {USER}  ")],
        [("x-api-key", USER)],
        [("X-API-Key", f"  {USER} ")],
        [("Authorization", basic(USER))],
        [("Authorization", basic(USER, user=""))],
        [("Authorization", basic(USER)), ("Sec-Fetch-Site", "same-origin")],
        [("Authorization", basic(USER)), ("Sec-Fetch-Site", "none")],
        [("Authorization", "Negotiate abc"), ("x-api-key", USER)],
        [("Authorization", "Bearer "), ("x-api-key", USER)],
    ],
)
async def test_a_key_is_taken_from_each_header_that_clients_use(
    tmp_path: Path, headers: Headers
) -> None:
    async with front(tmp_path) as gateway:
        assert await status_of(gateway, headers) == 200
        assert gateway.log.requests[-1]["key"] == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", USER)],
        [("Authorization", f"Token {USER}")],
        [("Authorization", f"Bearer{USER}")],
        [("Authorization", f'Bearer "{USER}"')],
        bearer(USER[:-1]),
        bearer(USER + "0"),
        bearer(USER.upper()),
        bearer(f"{USER},{USER}"),
        bearer(f"{USER} {USER}"),
        [("x-api-key", "")],
        [("x-api-key", f"Bearer {USER}")],
        [("Api-Key", USER)],
        [("X-Api-Token", USER)],
        [("Proxy-Authorization", f"Bearer {USER}")],
        [("Cookie", f"key={USER}; Authorization=Bearer {USER}")],
        [("Authorization", "Basic")],
        [("Authorization", "Basic !!!")],
        [("Authorization", basic(""))],
        [("Authorization", b"Basic " + base64.b64encode(USER.encode()))],
        [("Authorization", basic("none", user=USER))],
        # What a browser remembers is not taken when another site made it send it.
        [("Authorization", basic(USER)), ("Sec-Fetch-Site", "cross-site")],
        [("Authorization", basic(USER)), ("Sec-Fetch-Site", "same-site")],
        [("Authorization", basic(USER)), ("Sec-Fetch-Site", "")],
        [("Authorization", basic(USER)), ("Sec-Fetch-Site", "nonsense")],
        # A wrong key is not mended by a second header.
        [*bearer("sk-wrong"), ("x-api-key", USER)],
    ],
)
async def test_anything_else_is_no_key(tmp_path: Path, headers: Headers) -> None:
    async with front(tmp_path) as gateway:
        assert await status_of(gateway, headers) == 401
        assert "key" not in gateway.log.requests[-1]


async def test_a_key_in_the_query_or_the_body_is_no_key(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        for query in ("key", "api_key", "access_token", "Authorization"):
            path = f"{CHAT}?{query}={USER}"
            assert await status_of(gateway, [], path) == 401
        body = json.dumps({"api_key": USER}).encode()
        assert (await ask(gateway, request(body=body, key=None))).status == 401


async def test_a_key_in_the_query_stays_here(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        names = ("key", "api_key", "API_KEY", "api-key", "apikey", "access_token")
        query = "&".join(f"{name}={USER}" for name in names)
        assert (await ask(gateway, request(f"{CHAT}?{query}&beta=1"))).status == 200
        assert engine.exchanges[0].request.target == f"{CHAT}?beta=1"


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"\xff\xfe",
            b"sk-\xed\xb3\xbf",
            "sk-schlüssel".encode(),
            b"\xc3",
            b"\x80" * 9,
        ),
        *("sk-ключ".encode(), "sk-\u2028".encode(), b"sk-\xa0", b"\xf0\x9f\x94\x91"),
        *(b"a" * 8000, b"' OR 1=1 --", b"%s%n", b"../../etc/passwd", b"${jndi:x}"),
    ],
)
async def test_a_key_of_any_bytes_is_just_unknown(tmp_path: Path, raw: bytes) -> None:
    async with front(tmp_path) as gateway:
        for headers in (
            bearer(raw),
            [("x-api-key", raw)],
            [("Authorization", basic(raw))],
            [("Authorization", b"Basic " + raw)],
            [("Authorization", raw)],
        ):
            reply = await ask(gateway, request(key=None, headers=headers))
            assert reply.error
            # (Basic makes more of 8000 bytes than a header may have.)
            assert reply.status == 401 or len(raw) > 5000
        assert "ERROR" not in {line["level"] for line in gateway.log.lines}


async def test_a_key_may_hold_any_visible_signs(tmp_path: Path) -> None:
    async with front(tmp_path, keys=f"{SIGNS} name=signs\n") as gateway:
        assert await status_of(gateway, bearer(SIGNS)) == 200
        assert await status_of(gateway, [("x-api-key", SIGNS)]) == 200
        assert await status_of(gateway, [("Authorization", basic(SIGNS))]) == 200


async def test_of_two_authorizations_the_first_counts(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        good, bad = bearer(USER), bearer("sk-wrong")
        assert await status_of(gateway, [*good, *bad]) == 200
        assert await status_of(gateway, [*bad, *good]) == 401


# --- what a role may do --------------------------------------------------------------

# Every route that is registered must stand here; None: no key is needed.
NEEDS: dict[str, Role | None] = {
    "/health": None,
    "/health/ready": None,
    "/version": None,
    "/openapi.yaml": None,
    "/{path}": None,
    "/metrics": Role.METRICS,
    "/wol-health": None,
    "/unload": Role.ADMIN,
    "/upstream/{path}": Role.ADMIN,
    "/logs": Role.ADMIN,
    "/logs/stream": Role.ADMIN,
    "/logs/stream/{id}": Role.ADMIN,
    "/api/events": Role.ADMIN,
    "/api/models/unload": Role.ADMIN,
    "/api/models/unload/{id}": Role.ADMIN,
    "/api/profiles": Role.ADMIN,
    "/api/profiles/active": Role.ADMIN,
    "/api/inflight/{id}/cancel": Role.ADMIN,
    "/api/metrics/activity": Role.ADMIN,
    "/admin": None,
    "/admin/": None,
    "/admin/{file}": None,
}
ENDLESS = {"/logs/stream", "/api/events", "/admin/api/events"}
MAY = {
    Role.USER: {Role.USER},
    Role.ADMIN: {Role.USER, Role.METRICS, Role.ADMIN},
    Role.METRICS: {Role.METRICS},
    Role.AGENT: {Role.AGENT},
}
KEY_OF = {
    Role.USER: USER,
    Role.ADMIN: ADMIN,
    Role.METRICS: METRICS,
    Role.AGENT: AGENT,
}


async def test_each_route_is_open_to_the_roles_that_it_declares_and_no_other(
    tmp_path: Path,
) -> None:
    async with front(tmp_path, keys=f"{AGENT} name=agent role=agent\n") as gateway:
        doors = gateway.parts.doors
        assert len(doors.roles) > 30
        for route, declared in doors.roles.items():
            assert route.resource is not None
            path = route.resource.canonical
            is_admins = path.startswith("/admin/api/")
            needed = NEEDS.get(path, Role.ADMIN if is_admins else Role.USER)
            assert declared is needed, path
            target = re.sub(r"\{\w+\}", "m", path.replace("{path}", "nowhere"))
            method = "GET" if route.method == "*" else route.method
            for role, key in KEY_OF.items():
                data = request(target, b"{}", method=method, key=key)
                is_let_in = needed is None or needed in MAY[role]
                to_head = method == "HEAD" or (is_let_in and path in ENDLESS)
                reply = await ask(gateway, data, to_head=to_head)
                assert (reply.status != 403) == is_let_in, (role, method, path, reply)
                assert may(role, needed or role) == is_let_in
            data = request(target, b"{}", method=method, key=None)
            reply = await ask(gateway, data, to_head=method == "HEAD")
            assert (reply.status == 401) == (needed is not None), (method, path)


async def test_a_route_without_a_declared_role_is_refused(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        roles = gateway.parts.doors.roles
        for route in tuple(roles):
            if route.resource is not None and route.resource.canonical == "/version":
                del roles[route]
        reply = await ask(gateway, request("/version", method="GET", key=ADMIN))
        assert (reply.status, reply.error["code"]) == (403, "forbidden")


async def test_metrics_are_open_where_they_are_public(tmp_path: Path) -> None:
    page = request("/metrics", method="GET", key=None)
    async with front(tmp_path) as gateway:
        assert (await ask(gateway, page)).status == 401
    async with front(tmp_path, config={"metrics": {"public": True}}) as gateway:
        assert (await ask(gateway, page)).status == 200


# --- nothing is read before ----------------------------------------------------------


async def test_a_gigabyte_from_a_stranger_is_not_read_and_he_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    original = Connection.data_received

    def counted(self: Connection, data: bytes) -> None:
        nonlocal taken
        taken += len(data)
        original(self, data)

    monkeypatch.setattr(Connection, "data_received", counted)
    async with front(tmp_path) as gateway:
        for key, status in ((None, 401), ("sk-wrong-wrong", 401), (METRICS, 403)):
            taken = 0
            async with connected(gateway) as wire:
                await wire.send(request(body=b"", length=10**9, key=key))
                sending = asyncio.create_task(_pour(wire.writer))
                assert (await wire.reply()).status == status
                assert await wire.rest() == b""
            await sending
            # 64 KiB at a time, and only those that came before the answer was written.
            assert taken < 512 * 1024
            assert gateway.parts.bodies.held_bytes == 0


async def _pour(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE):
            while not writer.transport.is_closing():
                writer.write(b"x" * 100_000)
                await writer.drain()
                await asyncio.sleep(0)


async def test_a_stranger_is_answered_before_his_body_has_come(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        for data in (
            request(body=b"", length=1000, key=None),
            request(body=b"", headers=CHUNKED, length=-1, key=None),
            request(body=b"5\r\nhel", headers=CHUNKED, length=-1, key="sk-wrong"),
        ):
            async with connected(gateway) as wire:
                await wire.send(data)
                assert (await wire.reply()).status == 401


async def test_a_refused_client_may_try_again_on_the_same_connection(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway, connected(gateway) as wire:
        for key, status in ((None, 401), (METRICS, 403), (USER, 200)):
            await wire.send(request(key=key))
            assert (await wire.reply()).status == status


# --- failed logins -------------------------------------------------------------------


async def test_guessing_is_slowed_down_and_a_valid_key_always_passes(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway, connected(gateway) as wire:
        statuses = []
        for number in range(60):
            await wire.send(request(key=f"sk-guess-{number:020d}"))
            reply = await wire.reply()
            statuses.append(reply.status)
            if reply.status == 429:
                error = reply.error
                assert error["type"] == "rate_limit_error"
                assert error["code"] == "rate_limit_exceeded"
                assert 1 <= int(reply.header("retry-after") or 0) <= 6
                assert reply.header("www-authenticate") is None
            await wire.send(request())
            assert (await wire.reply()).status == 200
        assert statuses[:20] == [401] * 20
        assert statuses[-30:] == [429] * 30
        # A stranger's answer takes nothing from anybody's budget.
        assert "x-ratelimit-limit" not in dict(reply.headers)
        # Who sends no key at all guesses none, and is told so each time.
        await wire.send(request(key=None))
        assert (await wire.reply()).status == 401
        # What needs no key is not slowed down.
        await wire.send(request("/health", method="GET", key=None))
        assert (await wire.reply()).status == 200
        text = gateway.parts.metrics.render().decode()
        assert "inferencia_failed_logins_total 61" in text


async def test_guesses_count_for_each_address_that_a_trusted_proxy_names(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as gateway:
        doors = gateway.parts.doors
        doors.trusted_proxies = (ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8"))

        async def guess(name: str, value: str) -> int:
            headers = [(name, value)]
            return (await ask(gateway, request(key="sk-no", headers=headers))).status

        for _ in range(20):
            assert await guess("X-Forwarded-For", "198.51.100.7") == 401
        assert await guess("X-Forwarded-For", "198.51.100.7") == 429
        assert await guess("X-Forwarded-For", "198.51.100.8") == 401
        # What stands before the last untrusted hop, anybody may have made up.
        assert await guess("X-Forwarded-For", "203.0.113.1, 198.51.100.7") == 429
        assert await guess("X-Forwarded-For", "198.51.100.7, 10.1.2.3") == 429
        assert await guess("CF-Connecting-IP", "198.51.100.7") == 429
        assert await guess("CF-Connecting-IP", "2001:db8::1") == 401
        clients = {line["client"] for line in gateway.log.requests}
        assert clients == {"198.51.100.7", "198.51.100.8", "2001:db8::1"}


async def test_an_address_is_only_believed_from_a_trusted_proxy(tmp_path: Path) -> None:
    async with front(tmp_path) as gateway:
        headers = [
            ("X-Forwarded-For", "198.51.100.7"),
            ("CF-Connecting-IP", "198.51.100.8"),
            ("X-Real-IP", "198.51.100.9"),
            ("Forwarded", "for=198.51.100.10"),
        ]
        for number in range(21):
            made_up = [("X-Forwarded-For", f"198.51.100.{number}"), *headers]
            reply = await ask(gateway, request(key="sk-no", headers=made_up))
            assert reply.status == (401 if number < 20 else 429)
        assert {line["client"] for line in gateway.log.requests} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-For", "nonsense"),
        ("X-Forwarded-For", ""),
        ("X-Forwarded-For", "1.2.3.4, nonsense"),
        ("X-Forwarded-For", "1.2.3.4:80"),
        ("X-Forwarded-For", "," * 100),
        ("CF-Connecting-IP", "a" * 200),
        ("CF-Connecting-IP", "1.2.3.4, 5.6.7.8"),
        ("CF-Connecting-IP", "fe80::1%" + "a" * 200),
        ("X-Forwarded-For", "fe80::1%<script>"),
    ],
)
async def test_nonsense_from_a_trusted_proxy_is_not_an_address(
    tmp_path: Path, name: str, value: str
) -> None:
    async with front(tmp_path) as gateway:
        gateway.parts.doors.trusted_proxies = (ip_network("127.0.0.0/8"),)
        assert (await ask(gateway, request(headers=[(name, value)]))).status == 200
        assert gateway.log.requests[-1]["client"] == "127.0.0.1"


# --- without keys --------------------------------------------------------------------

HOME = Anonymous(
    Key(name="anonymous", digest=b"", role=Role.USER),
    hosts=frozenset({"localhost", "127.0.0.1", "::1"}),
    origins=frozenset({"https://app.example"}),
)


async def test_without_keys_everybody_on_this_machine_is_a_user(tmp_path: Path) -> None:
    async with front(tmp_path, anonymous=HOME) as gateway:
        for headers in (
            [],
            bearer("whatever-my-client-insists-on"),
            [("x-api-key", "none")],
            [("Origin", "https://app.example")],
        ):
            assert await status_of(gateway, headers) == 200
        for host in ("localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080"):
            assert (await ask(gateway, request(key=None, host=host))).status == 200
        # More than a user nobody becomes without a key.
        page = request("/metrics", method="GET", key=None)
        assert (await ask(gateway, page)).status == 403
        page = request("/metrics", method="GET", key=METRICS)
        assert (await ask(gateway, page)).status == 200


@pytest.mark.parametrize(
    "header",
    [
        *(
            "X-Forwarded-For: 127.0.0.1",
            "X-Forwarded-Proto: https",
            "x-forwarded-foo: ",
        ),
        *("Forwarded: for=127.0.0.1", "Via: 1.1 proxy", "X-Real-IP: 127.0.0.1"),
        *(
            "CF-Connecting-IP: 127.0.0.1",
            "Cf-Ray: 8",
            "CF-Visitor: {}",
            "cf-warp-tag: 1",
        ),
        *("True-Client-IP: 127.0.0.1", "X-Client-IP: 127.0.0.1", "Fly-Client-IP: ::1"),
        *(
            "X-Original-Forwarded-For: ::1",
            "X-Original-Host: a",
            "Tailscale-User-Login: x",
        ),
        *(
            "Origin: https://evil.example",
            "Origin: null",
            "Origin: http://localhost:8080",
        ),
        *("Origin: https://app.example.evil.example", "Origin: https://app.example/"),
        *("Origin: HTTPS://APP.EXAMPLE", "Origin: "),
    ],
)
async def test_without_keys_what_came_from_elsewhere_still_needs_one(
    tmp_path: Path, header: str
) -> None:
    name, _, value = header.partition(": ")
    async with front(tmp_path, anonymous=HOME) as gateway:
        assert await status_of(gateway, [(name, value)]) == 401
        assert await status_of(gateway, [*bearer(USER), (name, value)]) == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[:::]"),
        *(
            "127.0.0.2",
            "0.0.0.0",
            "[::]",
            "192.168.1.5:8080",
            "localhost.",
            "2130706433",
        ),
        *("127.1", "[::ffff:127.0.0.1]", "[1.2.3.4]", "localhost%00", "-", "[]"),
    ],
)
async def test_without_keys_a_foreign_host_still_needs_one(
    tmp_path: Path, host: str
) -> None:
    async with front(tmp_path, anonymous=HOME) as gateway:
        reply = await ask(gateway, request(key=None, host=host))
        assert reply.status in (400, 401)
        assert reply.error
        assert "ERROR" not in {line["level"] for line in gateway.log.lines}


async def test_of_two_origins_both_must_be_allowed(tmp_path: Path) -> None:
    async with front(tmp_path, anonymous=HOME) as gateway:
        both = [("Origin", "https://app.example"), ("Origin", "https://evil.example")]
        for headers in (both, both[::-1]):
            assert await status_of(gateway, headers) == 401


# --- time and change -----------------------------------------------------------------


async def test_a_key_is_good_until_its_last_day_is_over(tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    keys = "".join(
        f"sk-test-day-{number}-0123456789 name=d{number} "
        f"expires={today + timedelta(days=number)}\n"
        for number in (-1, 0, 1)
    )
    async with front(tmp_path, keys=keys) as gateway:
        for number, status in ((-1, 401), (0, 200), (1, 200)):
            key = f"sk-test-day-{number}-0123456789"
            if datetime.now(UTC).date() == today:
                assert await status_of(gateway, bearer(key)) == status


async def test_a_change_of_the_keys_file_holds_at_the_next_request(
    tmp_path: Path,
) -> None:
    new = "sk-test-new-99999999999999"
    async with front(tmp_path) as gateway, connected(gateway) as wire:
        path, ring = tmp_path / "keys.txt", gateway.parts.doors.ring

        async def status(key: str) -> int:
            await wire.send(request(key=key))
            return int((await wire.reply()).status)

        assert (await status(USER), await status(new)) == (200, 401)
        path.write_text(KEYS.replace(USER, new))
        assert ring.poll()
        assert (await status(USER), await status(new)) == (401, 200)
        path.write_text(KEYS.replace(USER, new).replace("alice", "alice models=other"))
        assert ring.poll()
        assert await status(new) == 404
        path.write_text("sk-broken role=king\n")
        assert not ring.poll()
        assert await status(new) == 404  # as before
        path.write_text(f"{new} name=alice role=metrics\n")
        assert ring.poll()
        assert await status(new) == 403


async def test_a_stream_goes_on_when_its_key_is_taken_away(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("hi")))
        await go_on.wait()
        await exchange.write(chunk(FINISH + DONE) + LAST_CHUNK)

    async with FakeEngine(behave=behave) as engine:
        async with running(tmp_path, behind(engine)) as gateway:
            async with gateway.chat(stream=True) as answer:
                await answer.content.readline()
                (tmp_path / "keys.txt").write_text(KEYS.replace(USER, "sk-gone-123456"))
                assert gateway.parts.doors.ring.poll()
                go_on.set()
                assert (await answer.read()).endswith(DONE)
            async with gateway.chat() as answer:
                assert answer.status == 401


# --- models --------------------------------------------------------------------------

GLOBS = """
sk-test-glob-exact-111111 name=exact models=m
sk-test-glob-star-2222222 name=star models=o*,zz*
sk-test-glob-alias-333333 name=alias models=fast
sk-test-glob-none-4444444 name=none models=nothing
"""


@pytest.mark.parametrize(
    ("key", "seen"),
    [
        ("sk-test-glob-exact-111111", {"m"}),
        ("sk-test-glob-star-2222222", {"other"}),
        ("sk-test-glob-alias-333333", set()),  # "fast" is m, which it may not see
        ("sk-test-glob-none-4444444", set()),
        (USER, {"m", "other"}),
        (ADMIN, {"m", "other"}),
    ],
)
async def test_a_keys_globs_hold_for_the_model_that_a_name_leads_to(
    tmp_path: Path, key: str, seen: set[str]
) -> None:
    config = {"routing": {"aliases": {"fast": "m", "big-*": "other"}}}
    leads_to = {"m": "m", "other": "other", "fast": "m", "big-1": "other", "M": None}
    async with front(tmp_path, keys=GLOBS, config=config) as gateway:
        for path in ("/v1/models", "/v1/"):
            reply = await ask(gateway, request(path, method="GET", key=key))
            assert {entry["id"] for entry in reply.json["data"]} == seen
        for name, model in leads_to.items():
            may_use = model in seen
            for path in ("/v1/completions", CHAT, "/v1/messages", "/tokenize"):
                body = json.dumps({"model": name, "messages": [1]}).encode()
                reply = await ask(gateway, request(path, body, key=key))
                assert reply.status == (200 if may_use else 404), (name, reply)
            form = (
                b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
                + name.encode()
                + b"\r\n--b--\r\n"
            )
            headers = [("Content-Type", "multipart/form-data; boundary=b")]
            for path in ("/v1/audio/transcriptions", "/v1/images/edits"):
                reply = await ask(
                    gateway, request(path, form, key=key, headers=headers)
                )
                assert (reply.status != 404) == may_use, (path, name, reply)
            path = f"/v1/models/{name}"
            reply = await ask(gateway, request(path, method="GET", key=key))
            assert reply.status == (200 if may_use else 404)
            path = f"/v1/audio/voices?model={name}"
            reply = await ask(gateway, request(path, method="GET", key=key))
            assert (reply.status != 404) == may_use


async def test_a_default_model_that_a_key_may_not_see_is_not_used(
    tmp_path: Path,
) -> None:
    config = {"routing": {"default_model": "m"}}
    async with front(tmp_path, keys=GLOBS, config=config) as gateway:
        body = b'{"messages":[1]}'
        for key, status in ((USER, 200), ("sk-test-glob-star-2222222", 404)):
            assert (await ask(gateway, request(body=body, key=key))).status == status


async def test_with_no_model_named_a_key_gets_one_that_it_may_use(
    tmp_path: Path,
) -> None:
    async with FakeEngine("a", "b", "other") as engine:
        async with running(tmp_path, behind(engine), keys=KEYS + GLOBS) as gateway:
            body = b'{"messages":[1]}'
            key = "sk-test-glob-star-2222222"
            assert (await ask(gateway, request(body=body, key=key))).status == 200
            assert engine.exchanges[0].json["model"] == "other"


async def test_a_handler_is_never_reached_without_a_key(tmp_path: Path) -> None:
    """Whatever path leads to it: the key is looked at in one place before all."""
    async with front(tmp_path) as gateway:
        app = gateway.parts.listener._runner.app
        assert isinstance(app, web.Application)
        chain = [link.__name__ for link in app.middlewares]  # type: ignore[attr-defined]
        assert chain == ["enter"]
