"""The admin API: the state, its events, requests, usage, logs, and who may ask."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from administering import API, administering, next_event
from gateway import (
    ADMIN,
    CHAT,
    DONE,
    FINISH,
    METRICS,
    SSE_HEAD,
    USER,
    Exchange,
    FakeEngine,
    behind,
    chunk,
    event,
    eventually,
)
from inferencia.api.admin.events import MAX_BEHIND, Watcher
from inferencia.api.admin.rates import Rates
from inferencia.api.admin.state import joined
from inferencia.context import Context
from inferencia.measurement import Measurement

ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ECHO = {"backends": [{"name": "echo", "type": "echo"}]}


# --- who may ask -----------------------------------------------------------------


async def test_only_a_key_of_the_role_admin_opens(tmp_path: Path) -> None:
    async with administering(tmp_path, ECHO) as admin:
        for key, status in ((USER, 403), (METRICS, 403), ("sk-unknown", 401)):
            assert (await admin.refused("GET", "state", key=key))[0] == status


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_a_page_of_another_site_changes_nothing(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async with administering(tmp_path, ECHO) as admin:
        before = (tmp_path / "keys.txt").read_text()
        status, _ = await admin.refused("POST", "keys", {"name": "x"}, headers=headers)
        assert status == 403
        assert (await admin.refused("POST", "reload", headers=headers))[0] == 403
        assert (await admin.refused("DELETE", "keys/alice", headers=headers))[0] == 403
        assert (tmp_path / "keys.txt").read_text() == before
        assert admin.life.reloads == 0


async def test_our_own_page_may_change_things(tmp_path: Path) -> None:
    async with administering(tmp_path, ECHO) as admin:
        headers = {"Origin": admin.gateway.url, "Sec-Fetch-Site": "same-origin"}
        assert (await admin.ask("POST", "reload", headers=headers))[0] == 200


async def test_what_came_through_a_proxy_is_refused_unless_that_is_allowed(
    tmp_path: Path,
) -> None:
    headers = {"X-Forwarded-For": "203.0.113.9"}
    async with administering(tmp_path, ECHO) as admin:
        assert (await admin.refused("GET", "state", headers=headers))[0] == 403
    async with administering(tmp_path, ECHO | {"admin": {"remote": True}}) as admin:
        assert (await admin.ask("GET", "state", headers=headers))[0] == 200


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"name": "x"}', "text/plain", 415),
        (b'{"name": "x"}', "multipart/form-data; boundary=x", 415),
        (b"name=x", "application/x-www-form-urlencoded", 415),
        (b"not json", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"name": 7}', "application/json", 400),
        (b'{"nmae": "x"}', "application/json", 400),
        (b'{"name": "a", "name": "b"}', "application/json", 400),
        (b'{"name": "x", "rps": "5"}', "application/json", 400),
        (b'{"name": "x", "rps": true}', "application/json", 400),
        (b'{"name": "x", "models": 5}', "application/json", 400),
        (b'{"name": "x", "models": [1]}', "application/json", 400),
        (b"{}", "application/json", 400),
    ],
)
async def test_what_is_no_json_object_of_known_members_is_refused(
    tmp_path: Path, body: bytes, kind: str, status: int
) -> None:
    async with administering(tmp_path, ECHO) as admin:
        headers = {"Content-Type": kind}
        found, _ = await admin.refused("POST", "keys", body, headers=headers)
        assert found == status
        assert "name=x" not in (tmp_path / "keys.txt").read_text()


async def test_what_curl_sends_is_understood(tmp_path: Path) -> None:
    async with administering(tmp_path, ECHO) as admin:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        status, _ = await admin.ask("POST", "keys", b'{"name":"x"}', headers=headers)
        assert status == 201


# --- state and events ------------------------------------------------------------


async def test_the_state_has_all_that_the_page_shows(tmp_path: Path) -> None:
    async with FakeEngine("m", "<b>&amp;'") as engine:
        async with administering(tmp_path, behind(engine)) as admin:
            async with admin.gateway.chat() as answer:
                assert answer.status == 200
            state = await admin.get("state")
    assert state["health"] == "ready"
    assert state["totals"]["requests"] == 1
    assert state["totals"]["completion_tokens"] == 2
    assert {model["id"] for model in state["models"]} == {"m", "<b>&amp;'"}
    assert all(m["state"] == "remote" for m in state["models"])
    (backend,) = state["backends"]
    assert (backend["name"], backend["state"], backend["models"]) == ("b0", "up", 2)
    assert state["config"]["path"] == str(tmp_path / "config.yaml")
    assert state["host"]["memory_total"] > state["host"]["memory_used"] > 0
    assert set(state["history"]) == {"interval", "prompt", "completion"}
    assert state["usage"]["is_on"] is False


async def test_events_bring_the_state_and_then_what_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferencia.api.admin.events.SECONDS", 0.1)
    release = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("a")) + chunk(event("b")))
        await release.wait()
        await exchange.write(chunk(FINISH + DONE) + b"0\r\n\r\n")

    async with FakeEngine(behave=slow) as engine:
        async with administering(tmp_path, behind(engine)) as admin:
            async with admin.stream("events") as stream:
                name, state = await next_event(stream)
                assert name == "state" and state["requests"] == []
                async with admin.gateway.chat(stream=True) as answer:
                    await answer.content.readline()
                    name, change = "", dict[str, Any]()
                    async with asyncio.timeout(10):
                        while not change.get("rates", {}).get("completion"):
                            name, change = await next_event(stream)
                    assert name == "change"
                    # What does not change is not told again.
                    assert "models" not in change and "version" not in change
                    (request,) = change["requests"]
                    assert request["state"] == "answering"
                    assert (request["key"], request["model"]) == ("alice", "m")
                    assert request["completion_tokens"] >= 1
                    release.set()
                    await answer.read()
                async with asyncio.timeout(10):
                    while change.get("requests") != []:
                        _, change = await next_event(stream)
                assert change["totals"]["requests"] == 1
            await eventually(
                lambda: admin.gateway.parts.admin.events.watchers == 0,
                "nobody is kept who has left",
            )


async def test_all_watchers_get_the_same_bytes_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0

    def counted(texts: dict[str, str]) -> str:
        nonlocal made
        made += 1
        return joined(texts)

    monkeypatch.setattr("inferencia.api.admin.events.joined", counted)
    async with administering(tmp_path, ECHO) as admin:
        events = admin.gateway.parts.admin.events
        watchers = [Watcher() for _ in range(20)]
        events._watchers.update(watchers)
        before = made
        events.tick()
        assert made == before + 1
        for watcher in watchers:
            assert b"event: state" in await watcher.next(lambda: b"event: state")
        events.tick()
        found = {await watcher.next(lambda: b"") for watcher in watchers}
        assert len(found) == 1 and found.pop().startswith(b"event: change\n")
        events._watchers.clear()


async def test_who_reads_too_slowly_gets_a_new_state_and_no_queue_grows() -> None:
    watcher = Watcher()

    async def next_one() -> bytes:
        return await watcher.next(lambda: b"whole")

    assert await next_one() == b"whole"
    for number in range(MAX_BEHIND):
        watcher.push(b"%d," % number)
    assert await next_one() == b"0,1,2,3,4,5,6,7,"
    for number in range(100):
        watcher.push(b"%d," % number)
    assert len(watcher._events) <= MAX_BEHIND
    assert (await next_one()).startswith(b"whole")
    watcher.close()
    assert await next_one() == b""


async def test_streams_end_when_the_daemon_does(tmp_path: Path) -> None:
    async with administering(tmp_path, ECHO) as admin:
        async with (
            admin.stream("events") as events,
            admin.stream("logs?follow=1") as log,
        ):
            await next_event(events)
            await admin.get("agents")
            await log.readline()
            admin.gateway.parts.admin.end_streams()
            async with asyncio.timeout(5):
                await events.read()
                await log.read()


async def test_rates_are_tokens_of_each_second() -> None:
    now, totals = 100.0, (0, 0, 0)
    m = Measurement("r", "POST")
    task = asyncio.current_task()
    assert task is not None
    rates = Rates(
        lambda: [Context("r", m, task, [])], lambda: totals, clock=lambda: now
    )
    m.completion_tokens = 40
    now += 1
    rates.sample()
    assert rates.now == {"prompt": 0.0, "completion": 40.0}
    m.completion_tokens, m.prompt_tokens = 50, 1000
    now += 2
    rates.sample()
    assert rates.now == {"prompt": 500.0, "completion": 5.0}
    # Once it is booked it counts there, and not twice.
    m.is_booked, totals = True, (1, 1000, 48)
    now += 1
    rates.sample()
    assert rates.now == {"prompt": 0.0, "completion": 0.0}
    for _ in range(1000):
        rates.sample()
    assert len(rates.completion) == 300


# --- requests --------------------------------------------------------------------


async def test_a_request_is_ended_by_its_id(tmp_path: Path) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.gone.wait()

    async with FakeEngine(behave=silent) as engine:
        async with administering(tmp_path, behind(engine)) as admin:
            name = "mine/with:signs@1"
            chat = asyncio.create_task(
                admin.ask(
                    *("POST", CHAT, ASKED),
                    key=USER,
                    headers={"X-Request-Id": name},
                )
            )
            exchange = await engine.next()
            (request,) = (await admin.get("requests"))["requests"]
            assert (request["id"], request["state"]) == (name, "waiting")
            assert await admin.ask("DELETE", f"requests/{name}") == (
                *(200, {"cancelled": 1}),
            )
            status, answer = await chat
            assert (status, answer["error"]["code"]) == (409, "request_aborted")
            async with asyncio.timeout(5):
                await exchange.gone.wait()
            assert (await admin.refused("DELETE", f"requests/{name}"))[0] == 404
            assert (await admin.get("requests")) == {"requests": []}


async def test_agents_are_told(tmp_path: Path) -> None:
    async with administering(tmp_path, ECHO) as admin:
        expected = {"accepts": False, "agents": [], "relays": []}
        assert await admin.get("agents") == expected


# --- usage and logs --------------------------------------------------------------


async def test_usage_is_summed_up_as_asked(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        async with administering(tmp_path, behind(engine)) as admin:
            usage = admin.gateway.parts.usage
            await usage.open(tmp_path / "usage.sqlite3", 86400.0)
            try:
                async with admin.gateway.chat() as answer:
                    await answer.read()
                found = await admin.get("usage?by=day,key,model&since=1d")
                (row,) = found["rows"]
                assert (row["key"], row["model"], row["total_tokens"]) == (
                    *("alice", "m", 9),
                )
                assert found["by"] == ["day", "key", "model"]
                assert found["total"]["requests"] == 1
                record = found["usage"]
                assert record["is_on"] is True
                assert (record["rows"], record["pending_bytes"]) == (1, 0)
                none = await admin.get("usage?by=key&key=nobody")
                assert none["rows"] == [] and none["total"]["requests"] == 0
                text = await admin.get("usage?by=key&format=csv")
                assert text.splitlines()[0].startswith("key,requests,")
                assert text.splitlines()[1].startswith("alice,1,")
            finally:
                await usage.close()


@pytest.mark.parametrize(
    "query", ["by=colour", "by=", "by=key,key", "since=soon", "until=x", "format=xml"]
)
async def test_usage_that_makes_no_sense_is_refused(tmp_path: Path, query: str) -> None:
    async with administering(tmp_path, ECHO) as admin:
        assert (await admin.refused("GET", f"usage?{query}"))[0] == 400


async def test_usage_that_is_not_recorded_is_empty_and_says_so(tmp_path: Path) -> None:
    async with administering(tmp_path, ECHO) as admin:
        found = await admin.get("usage")
        assert (found["rows"], found["usage"]["is_on"]) == ([], False)


async def test_the_gateways_lines_can_be_read_and_followed(tmp_path: Path) -> None:
    async with administering(tmp_path, ECHO) as admin:
        await admin.get("state")
        assert f"{API}state" in await admin.get("logs")
        assert await admin.get("logs?source=gateway") != ""
        async with admin.stream("logs?follow=1", Accept="text/event-stream") as stream:
            while f"{API}agents" not in await _data(stream):
                await admin.get("agents")
        assert (await admin.refused("GET", "logs?source=nobody"))[0] == 404


async def _data(stream: Any) -> str:
    async with asyncio.timeout(10):
        text = (await stream.readuntil(b"\n\n")).decode()
    assert text.startswith("data: ")
    found: str = json.loads(text.removeprefix("data: "))
    return found


# --- the page's files ------------------------------------------------------------


async def test_the_page_is_open_strict_and_not_cached_blindly(tmp_path: Path) -> None:
    async with administering(tmp_path, ECHO) as admin:
        url, client = admin.gateway.url, admin.gateway.client
        async with client.get(f"{url}/admin", allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (308, "admin/")
        async with client.get(f"{url}/admin/") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-cache"
            etag = answer.headers["ETag"]
        headers = {"If-None-Match": etag}
        async with client.get(f"{url}/admin/", headers=headers) as answer:
            assert (answer.status, await answer.read()) == (304, b"")
            assert answer.headers["Content-Security-Policy"] == policy


async def test_an_opened_page_is_one_line_of_the_log(tmp_path: Path) -> None:
    names = ("", "main.js", "style.css", "views/now.js", "main.js", "nothing.js")
    async with administering(tmp_path, ECHO) as admin:
        for name in names:
            await admin.ask("GET", f"/admin/{name}")
        told = admin.gateway.log.requests
        shown = [(line["path"], line["level"]) for line in told]
        files = [("/admin/{file}", "DEBUG")] * 4
        assert shown == [("/admin/", "INFO"), *files, ("/admin/{file}", "WARN")]


@pytest.mark.parametrize(
    "path",
    [
        *("nothing.js", "%2e%2e/page.py", "..%2fpage.py", "views", "views/"),
        *(".hidden", "index.html/", "index.html%00", "INDEX.HTML", "%2fetc%2fpasswd"),
    ],
)
async def test_files_that_are_not_the_pages_are_not_there(
    tmp_path: Path, path: str
) -> None:
    async with administering(tmp_path, ECHO) as admin:
        data = f"GET /admin/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = await admin.gateway.raw(data.encode())
        assert answer.startswith(b"HTTP/1.1 404 "), answer[:300]
        assert ADMIN.encode() not in answer
