"""What goes wrong between an agent and a relay, and what an agent may not do.

The numbers in the titles are the rows of the failure matrix in docs/tunnel.md.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import (
    CHAT,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    Exchange,
    FakeEngine,
    Slow,
    chats,
    chunk,
    error_of,
    event,
    eventually,
)
from inferencia.tunnel import link, wire
from inferencia.tunnel.dialing import Refused
from scripted import response
from tunnels import (
    BEAT,
    OTHER_TOKEN,
    RELAY_KEYS,
    TOKEN,
    Answering,
    End,
    Puppet,
    at_home,
    at_relay,
    engine_at,
    gone,
    tunnelled,
)

OK = response({"choices": [{"message": {"content": "from the puppet"}}]}).replace(
    b"Connection: close\r\n", b""
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that dial again do so soon."""
    monkeypatch.setattr(link, "_FIRST_BACKOFF_SECONDS", 0.02)


@contextlib.asynccontextmanager
async def puppet_at(relay: End, **further: Any) -> AsyncIterator[Puppet]:
    puppet = await Puppet(relay, **further).join()
    try:
        yield puppet
    finally:
        puppet.leave()


# --- what an agent says ----------------------------------------------------------


async def test_bytes_that_nobody_asked_for_end_a_parked_connection(
    tmp_path: Path,
) -> None:
    """21: they must not become the answer to the next request."""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        greedy = Answering(OK, greeting=OK)
        await puppet.park(greedy)
        await gone(greedy.lost)
        honest = Answering(response({"choices": []}).replace(b"close", b"keep-alive"))
        await puppet.park(honest)
        async with relay.chat() as answer:
            assert await answer.json() == {"choices": []}


BAD_ANSWERS = {
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\n"
    b"Content-Length: 0\r\n\r\n",
    "a huge header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"
    b"hello",
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "smuggling": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}


async def test_an_answer_that_is_none_is_502_and_nothing_leaks(tmp_path: Path) -> None:
    """21"""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        for what, said in BAD_ANSWERS.items():
            await puppet.park(Answering(said))
            async with relay.chat() as answer:
                assert answer.status == 502, what
                assert (await error_of(answer))["code"] == "backend_error"
            relay.backend().breaker.succeeded()
            await puppet.park(Answering(response({"after": what})))
            async with relay.chat() as answer:
                assert await answer.json() == {"after": what}


async def test_what_comes_behind_an_answer_reaches_nobody(tmp_path: Path) -> None:
    """21"""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        chatty = Answering(OK + OK.replace(b"the puppet", b"yesterday!"))
        await puppet.park(chatty)
        async with relay.chat() as answer:
            assert b"from the puppet" in await answer.read()
        await gone(chatty.lost)


async def test_an_agents_cookies_and_redirects_stay_at_the_relay(
    tmp_path: Path,
) -> None:
    """23"""
    headers = (
        b"Set-Cookie: a=b\r\nLocation: http://evil/\r\nAlt-Svc: h3=':443'\r\n"
        b"Access-Control-Allow-Origin: *\r\nStrict-Transport-Security: max-age=1\r\n"
        b"Server: evil\r\n"
    )
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        first, _, rest = OK.partition(b"\r\n")
        await puppet.park(Answering(first + b"\r\n" + headers + rest))
        async with relay.chat() as answer:
            assert answer.status == 200
            for name in (
                "Set-Cookie",
                "Location",
                "Alt-Svc",
                "Access-Control-Allow-Origin",
                "Strict-Transport-Security",
            ):
                assert name not in answer.headers
            assert "evil" not in answer.headers["Server"]


async def test_the_clients_key_and_cookies_never_reach_an_agent(tmp_path: Path) -> None:
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        server = Answering(OK)
        await puppet.park(server)
        headers = {
            "Cookie": "secret=1",
            "X-Forwarded-For": "1.2.3.4",
            "X-Request-Id": "one-of-mine",
        }
        body = json.dumps({"model": "m", "messages": [{"role": "user"}]}).encode()
        async with relay.post(CHAT, body, headers=headers) as answer:
            assert answer.status == 200
        head = server.received.partition(b"\r\n\r\n")[0].lower()
        assert b"\r\nhost: agent.tunnel\r\n" in head
        assert b"\r\nx-request-id: one-of-mine" in head
        for word in (b"authorization", b"cookie", b"x-forwarded-for", b"sk-test"):
            assert word not in head


async def test_no_trick_with_the_path_reaches_an_agent(tmp_path: Path) -> None:
    """22"""
    targets = (
        "/tunnel/v1/control",
        "/v1/../tunnel/v1/data",
        "/v1/chat/completions/../../admin/api/state",
        "/v1%2fchat%2fcompletions",
        "//agent.tunnel/v1/chat/completions",
        "/v1/chat/completions%0d%0aX-Evil:%201",
    )
    key = RELAY_KEYS.split()[0]
    body = b'{"model":"m","messages":[{"role":"user"}]}'
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        server = Answering(OK)
        await puppet.park(server)
        for target in targets:
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            head = (
                f"POST {target} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {key}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            status = int((await reader.read()).split(b" ", 2)[1])
            writer.close()
            assert 400 <= status < 500, target
            assert not server.received, target


# --- who may dial, and what for --------------------------------------------------


async def refused(puppet: Puppet, session: str) -> Refused:
    with pytest.raises(Refused) as raised:
        await puppet.park(Answering(OK), session=session)
    return raised.value


async def test_a_session_is_only_its_own_agents(tmp_path: Path) -> None:
    """13"""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as mine:
        theirs = Puppet(relay, token=OTHER_TOKEN)
        assert (await refused(theirs, mine.session)).status == 410
        # Nor another process's with the same key.
        twin = Puppet(relay, instance="puppet-2")
        assert (await refused(twin, mine.session)).status == 410
        assert (await refused(mine, "never-heard-of")).status == 410
        user = Puppet(relay, token=RELAY_KEYS.split()[0])
        assert (await refused(user, mine.session)).status == 403
        nobody = Puppet(relay, token="sk-nobody-0123456789")
        assert (await refused(nobody, mine.session)).status == 401


async def test_a_key_that_is_revoked_opens_nothing_more(tmp_path: Path) -> None:
    """12, 13: the key is asked for each connection, not only at the first."""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        parked = Answering(OK)
        await puppet.park(parked)
        relay.write_keys("\n".join(x for x in RELAY_KEYS.split("\n") if TOKEN not in x))
        bye = await puppet.hears(wire.Bye)
        assert isinstance(bye, wire.Bye) and bye.code == "unauthorized"
        await gone(parked.lost)
        await gone(puppet.lost)
        assert (await refused(puppet, puppet.session)).status == 401


async def test_a_handshake_that_is_none_is_explained(tmp_path: Path) -> None:
    """19, for one: nginx without the two lines of its recipe strips Upgrade."""
    good = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol": wire.CONTROL_PROTOCOL,
        "Inferencia-Instance": "me",
    }
    cases: tuple[tuple[dict[str, str], int, str], ...] = (
        ({"Upgrade": "h2c"}, 400, "docs/tunnel.md"),
        ({"Connection": "close"}, 400, "reverse proxy"),
        ({"Sec-WebSocket-Version": "8"}, 426, "version 13"),
        ({"Sec-WebSocket-Key": "abc"}, 400, "16 bytes"),
        ({"Sec-WebSocket-Protocol": "inferencia.control.v9"}, 426, "update"),
        ({"Inferencia-Instance": "../.."}, 400, "Inferencia-Instance"),
    )
    async with at_relay(tmp_path) as relay:
        for headers, status, words in cases:
            sent = good | headers
            async with relay.get(wire.CONTROL_PATH, key=TOKEN, headers=sent) as answer:
                assert answer.status == status, headers
                assert words in (await error_of(answer))["message"]


async def test_a_flood_of_registrations_is_slowed_down(tmp_path: Path) -> None:
    async with at_relay(tmp_path) as relay:
        puppets = [Puppet(relay, instance=f"p{n}") for n in range(14)]
        outcomes = await asyncio.gather(
            *(puppet.join() for puppet in puppets), return_exceptions=True
        )
        late = [one for one in outcomes if isinstance(one, Refused)]
        assert 2 <= len(late) <= 6
        assert {one.status for one in late} == {429}
        assert all(one.retry_after for one in late)
        for puppet in puppets:
            puppet.leave()


async def test_no_more_connections_are_taken_than_the_agent_may_have(
    tmp_path: Path,
) -> None:
    async with at_relay(tmp_path) as relay:
        puppet = await Puppet(relay).join(max_streams=3)
        for _ in range(3):
            await puppet.park(Answering(OK))
        assert (await refused(puppet, puppet.session)).status == 429
        puppet.leave()


async def test_an_agent_is_who_its_key_says(tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"version": 9}, "incompatible"),
        ({"instance": "somebody-else"}, "incompatible"),
        ({"agent": "office"}, "unauthorized"),
    )
    async with at_relay(tmp_path) as relay:
        for further, code in cases:
            puppet = await Puppet(relay).join(**further)
            bye = puppet.said[-1]
            assert isinstance(bye, wire.Bye) and bye.code == code
            await gone(puppet.lost)
        assert relay.state_of() is None


async def test_who_does_not_register_is_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferencia.tunnel.relay.REGISTER_SECONDS", 0.05)
    async with at_relay(tmp_path) as relay:
        puppet = Puppet(relay)
        await puppet.dial(wire.CONTROL_PATH, wire.CONTROL_PROTOCOL, puppet._new_channel)
        await gone(puppet.lost)
        assert relay.state_of() is None


async def test_nonsense_on_the_control_connection_ends_it(tmp_path: Path) -> None:
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        assert puppet.channel is not None
        puppet.channel.send("{nonsense")
        bye = await puppet.hears(wire.Bye)
        assert isinstance(bye, wire.Bye) and bye.code == "incompatible"
        await gone(puppet.lost)


# --- how many connections there are ----------------------------------------------


async def test_a_pool_that_was_emptied_is_filled_again_without_a_request(
    tmp_path: Path,
) -> None:
    """25: a proxy on the way was started anew."""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        await relay.has(parked=4)
        (way,) = home.agent._links.values()
        before = set(way._live)
        for carrier in before:
            carrier.abort()
        await eventually(lambda: not before & way._live, "they are gone")
        await relay.has(parked=4)


async def test_the_target_is_told_again_to_who_has_not_heard_it(
    tmp_path: Path,
) -> None:
    """24: a message that is lost does no harm."""
    async with at_relay(tmp_path) as relay, puppet_at(relay, spare=3) as puppet:
        first = await puppet.hears(wire.Pool)
        assert isinstance(first, wire.Pool) and first.target == 3
        puppet.said.clear()
        puppet.send(wire.Status(live=0, dialing=0, active=0, seq=first.seq - 1))
        assert await puppet.hears(wire.Pool) == first


async def test_requests_that_wait_raise_the_target_and_are_served_in_order(
    tmp_path: Path,
) -> None:
    """5, 24"""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        asking = [asyncio.ensure_future(_content(relay)) for _ in range(3)]
        await eventually(
            lambda: puppet.said[-1] == wire.Pool(5, puppet.said[-1].seq),  # type: ignore[union-attr]
            f"three more are wanted: {puppet.said}",
        )
        for number in range(3):
            only_once = {"choices": [{"message": {"content": f"{number}"}}]}
            await puppet.park(Answering(response(only_once)))
            await eventually(asking[number].done, "the first in line is served")
        assert [task.result() for task in asking] == ["0", "1", "2"]


async def _content(relay: End) -> str:
    async with relay.chat() as answer:
        body = await answer.json()
        return str(body["choices"][0]["message"]["content"])


async def test_nobody_waits_for_ever_for_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5"""
    monkeypatch.setattr("inferencia.tunnel.pool.SLOT_SECONDS", 0.1)
    async with at_relay(tmp_path) as relay, puppet_at(relay):
        async with relay.chat() as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"]
            assert "no connection free" in (await error_of(answer))["message"]


async def test_connections_that_are_too_many_close_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24"""
    monkeypatch.setattr("inferencia.tunnel.session._SURPLUS_SECONDS", 0.0)
    monkeypatch.setattr("inferencia.tunnel.session._SHRINK_SECONDS", 0.0)
    monkeypatch.setattr("inferencia.tunnel.relay._TICK_SECONDS", 0.02)
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        servers = [Answering(OK) for _ in range(6)]
        for server in servers:
            await puppet.park(server)
        await eventually(
            lambda: sum(server.lost.is_set() for server in servers) == 4,
            "two are left",
        )
        state = await relay.has(parked=2)
        assert state.connections == 2


async def test_closing_idle_connections_fails_no_request(tmp_path: Path) -> None:
    """9: only the relay closes them, and it knows which are idle."""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):
        pool = relay.relay._agents["gpu-home"].newest.pool

        async def ask() -> None:
            for _ in range(20):
                async with relay.chat() as answer:
                    assert answer.status == 200, await answer.text()
                pool.close_idle(2)

        await asyncio.gather(*(ask() for _ in range(6)))
        assert len(engine.exchanges) == 120


# --- connections that are lost ---------------------------------------------------


async def endless(exchange: Exchange) -> None:
    await exchange.write(SSE_HEAD + chunk(event("a")))
    await exchange.gone.wait()


async def test_a_lost_control_connection_is_resumed_and_no_stream_is_cut(
    tmp_path: Path,
) -> None:
    """15"""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        engine.behave = slow = Slow()
        async with relay.chat(stream=True) as answer:
            await answer.content.readline()
            (way,) = home.agent._links.values()
            session = way._session
            assert way._channel is not None
            way._channel.fail(ConnectionResetError("a router was started anew"))
            await eventually(
                lambda: relay.state_of().reconnects == 1,  # type: ignore[union-attr]
                "it is back",
            )
            assert way._session == session
            slow.go_on.set()
            assert DONE.strip() in await answer.read()


async def test_no_new_work_goes_to_an_agent_without_control_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15"""
    monkeypatch.setattr("inferencia.tunnel.session.GRACE_SECONDS", 0.3)
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        busy = Answering(SSE_HEAD + chunk(event("a")))
        await puppet.park(busy)
        async with relay.chat(stream=True) as stream:
            await stream.content.readline()
            assert puppet.channel is not None
            puppet.channel.fail(ConnectionResetError("lost"))
            await eventually(
                lambda: relay.state_of().state == "suspect",  # type: ignore[union-attr]
                "the relay has noticed",
            )
            async with relay.chat() as answer:
                assert answer.status == 503
            # The stream goes on for the time of grace, and then ends with an error.
            rest = await stream.read()
            assert b'"error"' in rest and b"[DONE]" not in rest
        assert busy.lost.is_set()


async def test_a_session_is_resumed_by_its_own_process_only(tmp_path: Path) -> None:
    """15, 16"""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        old = puppet.session
        assert puppet.channel is not None
        puppet.channel.fail(ConnectionResetError("lost"))
        twin = await Puppet(relay, instance="puppet-2").join(resume=old)
        assert twin.session != old
        twin.leave()


async def test_a_process_that_comes_back_is_let_in_at_once(tmp_path: Path) -> None:
    """16: the old one may be half-open; nothing is waited for."""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as old:
        await old.park(Answering(OK.replace(b"the puppet", b"old puppet")))
        async with puppet_at(relay, instance="puppet-2") as new:
            await new.park(Answering(OK.replace(b"the puppet", b"new puppet")))
            await relay.has()
            assert await _content(relay) == "from new puppet"
            bye = await old.hears(wire.Bye)
            assert isinstance(bye, wire.Bye) and bye.code == "replaced"


async def test_a_frozen_agent_is_noticed_before_a_request_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8: another one serves it, and it is served once."""
    monkeypatch.setattr("inferencia.tunnel.pool.FRESH_SECONDS", 0.0)
    monkeypatch.setattr("inferencia.tunnel.pool.PROBE_SECONDS", 0.2)
    keys = RELAY_KEYS.replace("role=agent models=m*,echo", "role=agent priority=5")
    async with FakeEngine() as engine, at_relay(tmp_path, keys=keys) as relay:
        async with puppet_at(relay) as frozen:
            server = Answering(OK)
            carrier = await frozen.park(server)
            carrier._wire.pause_reading()  # as after SIGSTOP
            backends = [engine_at(engine.url)]
            async with at_home(
                tmp_path, relay.url, backends=backends, token=OTHER_TOKEN
            ):
                await relay.has("office")
                assert (await relay.has("gpu-home")).connections == 1
                async with relay.chat() as answer:
                    assert answer.status == 200
                assert len(engine.exchanges) == 1
                assert not server.received


async def test_half_open_connections_are_found_within_three_and_a_half_beats(
    tmp_path: Path,
) -> None:
    """7"""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        await puppet.park(Answering(SSE_HEAD + chunk(event("a"))))
        async with relay.chat(stream=True) as stream:
            await stream.content.readline()
            assert puppet.channel is not None
            for end in (puppet.channel, *puppet.carriers):
                end._wire.pause_reading()  # nothing is read or said any more
                assert end._timer is not None
                end._timer.cancel()
            loop = asyncio.get_running_loop()
            began = loop.time()
            rest = await stream.read()
            assert b'"error"' in rest
            assert loop.time() - began < 3.5 * BEAT + 1.0
        await eventually(
            lambda: relay.state_of().state == "ended",  # type: ignore[union-attr]
            "the agent is known to be gone",
        )


async def test_an_agent_that_dies_ends_its_streams_at_once(tmp_path: Path) -> None:
    """6"""
    async with at_relay(tmp_path) as relay, puppet_at(relay) as puppet:
        await puppet.park(Answering(b""))
        await puppet.park(Answering(SSE_HEAD + chunk(event("a"))))
        async with relay.chat(stream=True) as stream:
            await stream.content.readline()
            whole = asyncio.ensure_future(relay.chat().__aenter__())
            await eventually(
                lambda: relay.state_of().streams == 2,  # type: ignore[union-attr]
                "both are on their way",
            )
            puppet.leave()
            rest = await stream.read()
            assert b'"error"' in rest and b"[DONE]" not in rest
            answer = await whole
            assert answer.status == 502
            answer.close()


async def test_a_relay_that_dies_ends_the_work_at_home(tmp_path: Path) -> None:
    """6"""
    async with FakeEngine(behave=endless) as engine:
        async with tunnelled(tmp_path, engine) as (relay, _):
            async with relay.chat(stream=True) as answer:
                await answer.content.readline()
                exchange = await engine.next()
                for session in tuple(relay.relay._sessions.values()):
                    await session.pool.aclose()
                await gone(exchange.gone)


async def test_an_agent_is_back_soon_after_its_relay_was_restarted(
    tmp_path: Path,
) -> None:
    """10"""
    async with FakeEngine() as engine, contextlib.AsyncExitStack() as stack:
        async with at_relay(tmp_path) as first:
            port = first.port
            home = at_home(tmp_path, first.url, backends=[engine_at(engine.url)])
            await stack.enter_async_context(home)
            await first.has()
        async with at_relay(tmp_path, port=port) as second:
            await second.has()
            async with second.chat() as answer:
                assert answer.status == 200


async def test_of_two_relays_one_may_die(tmp_path: Path) -> None:
    """32"""
    async with FakeEngine() as engine, at_relay(tmp_path) as staying:
        async with contextlib.AsyncExitStack() as stack:
            (tmp_path / "other").mkdir()
            dying = await stack.enter_async_context(at_relay(tmp_path / "other"))
            async with at_home(
                tmp_path, staying.url, dying.url, backends=[engine_at(engine.url)]
            ):
                await staying.has()
                await dying.has()
                async with dying.chat() as answer:
                    assert answer.status == 200
                await stack.aclose()
                for _ in range(5):
                    async with staying.chat() as answer:
                        assert answer.status == 200


async def test_two_addresses_of_one_relay_make_one_session(tmp_path: Path) -> None:
    async with FakeEngine() as engine, at_relay(tmp_path) as relay:
        localhost = relay.url.replace("127.0.0.1", "localhost")
        async with at_home(
            tmp_path, relay.url, localhost, backends=[engine_at(engine.url)]
        ) as home:
            await relay.has()
            await eventually(
                lambda: (
                    sorted(s.state for s in home.agent.states)[-2:]
                    == ["backoff", "standby"]
                    or "standby" in [s.state for s in home.agent.states]
                ),
                f"one of them stands by: {home.agent.states}",
            )
            assert relay.state_of().reconnects == 0  # type: ignore[union-attr]


# --- going -----------------------------------------------------------------------


async def test_an_agent_that_ends_finishes_what_it_has_begun(tmp_path: Path) -> None:
    """17"""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        engine.behave = slow = Slow()
        async with relay.chat(stream=True) as answer:
            await answer.content.readline()
            home.parts.doors.draining = True
            leaving = asyncio.ensure_future(home.parts.tunnel.drain(10))
            await eventually(
                lambda: relay.state_of().state == "draining",  # type: ignore[union-attr]
                "the relay knows",
            )
            async with relay.chat() as refused_:
                assert refused_.status == 503
                message = (await error_of(refused_))["message"]
                assert "is shutting down" in message
            assert not leaving.done()
            slow.go_on.set()
            assert DONE.strip() in await answer.read()
        await asyncio.wait_for(leaving, 5)


async def test_a_relay_that_ends_finishes_what_it_has_begun(tmp_path: Path) -> None:
    """18"""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        engine.behave = slow = Slow()
        async with relay.chat(stream=True) as answer:
            await answer.content.readline()
            relay.parts.doors.draining = True
            leaving = asyncio.ensure_future(relay.parts.tunnel.drain(10))
            (way,) = home.agent._links.values()
            await eventually(lambda: bool(way._parting), "the agent knows")
            late = Puppet(relay, token=OTHER_TOKEN)
            with pytest.raises(Refused) as raised:
                await late.join()
            assert raised.value.status == 503
            slow.go_on.set()
            assert DONE.strip() in await answer.read()
        await asyncio.wait_for(leaving, 5)


async def test_a_model_that_is_taken_away_is_not_cut_off(tmp_path: Path) -> None:
    """14"""
    keys = "\n".join(RELAY_KEYS.split("\n")[:-2])  # nobody else is expected
    async with FakeEngine() as engine, at_relay(tmp_path, keys=keys) as relay:
        async with puppet_at(relay) as puppet:
            server = Answering(SSE_HEAD + chunk(event("a")))
            await puppet.park(server)
            async with relay.chat(stream=True) as answer:
                await answer.content.readline()
                puppet.send(wire.Models(()))
                await puppet.hears(wire.ModelsOk)
                async with relay.chat() as unknown:
                    assert unknown.status == 404
                assert server.transport is not None
                rest = event(None, finish_reason="stop") + DONE
                server.transport.write(chunk(rest) + LAST_CHUNK)
                assert DONE.strip() in await answer.read()
        assert not engine.exchanges


# --- long and large --------------------------------------------------------------


async def test_a_stream_that_is_silent_for_many_beats_is_not_cut(
    tmp_path: Path,
) -> None:
    """27: comments come meanwhile, from either end."""
    async with FakeEngine() as engine:
        quick: Any = {"server": {"sse_keepalive": "100ms"}}
        async with at_relay(tmp_path) as relay:
            async with at_home(
                tmp_path, relay.url, backends=[engine_at(engine.url)], **quick
            ):
                await relay.has()

                async def thinks(exchange: Exchange) -> None:
                    await exchange.write(SSE_HEAD)
                    await asyncio.sleep(4 * BEAT)  # more than makes a peer dead
                    body = event(None, finish_reason="stop") + DONE
                    await exchange.write(chunk(body) + LAST_CHUNK)

                engine.behave = thinks
                async with relay.chat(stream=True) as answer:
                    whole = await answer.read()
        assert whole.count(b": ") >= 4
        assert DONE.strip() in whole


async def test_a_body_that_is_too_large_is_refused_at_the_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """26"""
    monkeypatch.setattr("inferencia.downstream.connection._LINGER_SECONDS", 0.05)
    async with at_relay(tmp_path, server={"max_body": "1MiB"}) as relay:
        async with puppet_at(relay) as puppet:
            server = Answering(OK)
            await puppet.park(server)
            async with relay.chat(padding="x" * 1_100_000) as answer:
                assert answer.status == 413
            assert not server.received


async def test_a_slow_client_stops_the_engine_and_holds_up_nobody(
    tmp_path: Path,
) -> None:
    """3, 4: for longer than makes a peer dead, and then it gets everything."""
    total = 32_000_000
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):
        sent = 0

        async def floods(exchange: Exchange) -> None:
            nonlocal sent
            if not exchange.json.get("stream"):
                await chats(exchange)
                return
            exchange.writer.transport.set_write_buffer_limits(65536)
            await exchange.write(SSE_HEAD)
            part = b"data: " + b"x" * 99_990 + b"\n\n"
            while sent < total:
                await exchange.write(chunk(part))
                sent += len(part)
            body = event(None, finish_reason="stop") + DONE
            await exchange.write(chunk(body) + LAST_CHUNK)

        engine.behave = floods
        async with relay.chat(stream=True) as answer:
            await answer.content.readline()
            loop = asyncio.get_running_loop()
            over = loop.time() + 3 * BEAT
            while loop.time() < over:
                async with relay.chat() as other:  # it goes past the stalled one
                    assert other.status == 200
            assert sent < total, "the engine was never stopped"
            received = len(await answer.read())
        assert received >= total - 100_000


# --- trying again ----------------------------------------------------------------


def test_the_time_between_two_tries_is_random_and_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """11"""
    monkeypatch.undo()
    waits = [link._jittered(failures) for failures in range(60) for _ in range(50)]
    assert max(waits) <= 30.0
    assert max(link._jittered(1) for _ in range(200)) <= 1.0
    spread = [link._jittered(20) for _ in range(500)]
    assert min(spread) < 3 < 27 < max(spread)


async def test_a_relay_that_is_not_there_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11"""
    monkeypatch.setattr(link, "_jittered", lambda failures: 0.01)
    echo = [{"name": "echo", "type": "echo"}]
    async with at_home(tmp_path, "http://127.0.0.1:9", backends=echo) as home:
        await eventually(
            lambda: (
                home.agent._links[next(iter(home.agent._links))]._failures > 5
                if home.agent._links
                else False
            ),
            "it has tried again and again",
        )
        assert "cannot connect" in home.agent.states[0].trouble
    said = [r for r in caplog.records if "cannot connect" in r.getMessage()]
    assert len(said) == 1
