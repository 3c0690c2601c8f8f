"""Through a real tunnel: a relay, an agent behind it, an engine behind that."""

import asyncio
import json
from pathlib import Path

import pytest

from gateway import (
    SSE_HEAD,
    Exchange,
    FakeEngine,
    chunk,
    error_of,
    event,
    eventually,
)
from inferencia.tunnel import wire
from tunnels import (
    OTHER_TOKEN,
    TOKEN,
    Puppet,
    arrives_word_by_word,
    at_home,
    at_relay,
    chunks_of,
    engine_at,
    gone,
    tunnelled,
)


async def test_a_chat_goes_through_the_tunnel(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):
        async with relay.chat() as answer:
            assert answer.status == 200
            body = await answer.json()
        assert body["choices"][0]["message"]["content"] == "hi"
        async with relay.get("/v1/models") as answer:
            assert [m["id"] for m in (await answer.json())["data"]] == ["m"]


async def test_every_event_comes_before_the_next_is_made(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):
        await arrives_word_by_word(engine, relay.chat(stream=True))


async def test_a_client_that_leaves_ends_the_work_at_the_engine(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):

        async def endless(exchange: Exchange) -> None:
            await exchange.write(SSE_HEAD + chunk(event("a")))
            await exchange.gone.wait()

        engine.behave = endless
        async with relay.chat(stream=True) as answer:
            await answer.content.readline()
        exchange = await engine.next()
        await gone(exchange.gone)
        await relay.has(parked=4)  # the connection that was lost is dialed again
        assert not home.parts.doors.active


async def test_a_client_that_leaves_before_the_answer_ends_the_work(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):

        async def silent(exchange: Exchange) -> None:
            await exchange.gone.wait()

        engine.behave = silent
        task = asyncio.ensure_future(relay.chat().__aenter__())
        exchange = await engine.next()
        task.cancel()
        await gone(exchange.gone)
        state = await relay.has(parked=4)
        assert state.streams == 0


async def test_more_requests_than_connections_are_all_served(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):

        async def one() -> int:
            async with relay.chat(stream=True) as answer:
                await answer.read()
                return int(answer.status)

        statuses = await asyncio.gather(*(one() for _ in range(60)))
        assert statuses == [200] * 60
        state = await relay.has()
        assert state.connections <= state.max_streams == 16
        assert len(engine.exchanges) == 60


async def test_connections_are_used_again(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        await relay.has(parked=4)
        (link,) = home.agent._links.values()
        before = set(link._live)
        for _ in range(20):
            async with relay.chat() as answer:
                assert answer.status == 200
        assert before <= set(link._live)


async def test_nothing_but_work_for_models_goes_through(tmp_path: Path) -> None:
    """What the relay would never ask for is refused by the agent itself."""
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):
        (backend,) = (b for b in relay.parts.catalogue.backends if b.name == "gpu-home")
        for path in (
            "/metrics",
            "/v1/models",
            "/v1/usage",
            "/admin/api/state",
            "/logs",
        ):
            answer = await backend.carrier.send("GET", path, ())
            body = json.loads(await answer.read(10000))
            assert answer.status == 404, path
            assert body["error"]["code"] == "not_found"


async def test_an_agent_that_is_gone_is_503_and_comes_back(tmp_path: Path) -> None:
    async with FakeEngine() as engine, at_relay(tmp_path) as relay:
        backends = [engine_at(engine.url)]
        async with at_home(tmp_path, relay.url, backends=backends):
            await relay.has()
        async with relay.chat() as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"]
            error = await error_of(answer)
            assert 'agent "gpu-home" is not connected' in error["message"]
        async with relay.chat(model="other") as answer:
            assert answer.status == 404
        async with at_home(tmp_path, relay.url, backends=backends):
            state = await relay.has()
            assert state.reconnects == 1
            async with relay.chat() as answer:
                assert answer.status == 200


async def test_a_model_whose_agent_is_not_back_yet_is_503(tmp_path: Path) -> None:
    """After a restart of the relay nobody has listed it, but it is not unknown."""
    async with FakeEngine("m") as engine, at_relay(tmp_path) as relay:
        async with relay.chat(model="m7") as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"]
            assert "has not connected yet" in (await error_of(answer))["message"]
        backends = [engine_at(engine.url)]
        async with (
            at_home(tmp_path, relay.url, backends=backends),
            at_home(tmp_path, relay.url, backends=backends, token=OTHER_TOKEN),
        ):
            await relay.has("gpu-home")
            await relay.has("office")
            async with relay.chat(model="m7") as answer:
                assert answer.status == 404


async def test_what_is_loaded_at_home_is_shown_at_the_relay(tmp_path: Path) -> None:
    async with at_relay(tmp_path) as relay:
        puppet = await Puppet(relay).join(
            models=tuple(
                wire.Model(name, {"id": name, "status": {"value": value}})
                for name, value in (("m1", "loaded"), ("m2", "unloaded"))
            )
        )
        await relay.has(parked=0)
        async with relay.get("/v1/models") as answer:
            data = (await answer.json())["data"]
        assert {m["id"]: m["status"]["value"] for m in data} == {
            "m1": "loaded",
            "m2": "unloaded",
        }
        puppet.leave()


async def test_two_agents_share_the_work_and_one_may_go(tmp_path: Path) -> None:
    async with FakeEngine() as one, FakeEngine() as two, at_relay(tmp_path) as relay:
        async with at_home(tmp_path, relay.url, backends=[engine_at(one.url)]):
            other = [engine_at(two.url)]
            async with at_home(tmp_path, relay.url, backends=other, token=OTHER_TOKEN):
                await relay.has("gpu-home")
                await relay.has("office")

                async def ask(number: int) -> None:
                    # Conversations of their own; one would stay where it began.
                    messages = [{"role": "user", "content": f"hello {number}"}]
                    async with relay.chat(messages=messages) as answer:
                        assert answer.status == 200

                await asyncio.gather(*(ask(number) for number in range(10)))
                assert len(one.exchanges) == len(two.exchanges) == 5
            await eventually(
                lambda: relay.state_of("office").state == "ended",  # type: ignore[union-attr]
                "the relay has noticed that office is gone",
            )
            await ask(11)
            assert len(one.exchanges) == 6


async def test_only_models_of_the_keys_globs_are_taken(tmp_path: Path) -> None:
    async with FakeEngine("m1", "gpt-4o") as engine:
        async with tunnelled(tmp_path, engine) as (relay, _):
            state = await relay.has()
            assert state.models == ("m1",)
            assert state.rejected == ("gpt-4o",)
            async with relay.chat(model="gpt-4o") as answer:
                assert answer.status == 404


async def test_a_changed_model_list_reaches_the_relay(tmp_path: Path) -> None:
    async with FakeEngine("m1") as engine:
        watchdog = {"interval": 0.1}
        async with tunnelled(tmp_path, engine, watchdog=watchdog) as (relay, _):
            engine.models = ("m1", "m2")
            await eventually(
                lambda: relay.state_of().models == ("m1", "m2"),  # type: ignore[union-attr]
                "the relay knows both models",
            )
            async with relay.chat(model="m2") as answer:
                assert answer.status == 200


async def test_a_revoked_key_ends_the_session_at_once(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        relay.write_keys(
            "sk-test-user-1f5b7c3a9e name=alice\n"
            "sk-test-new-0123456789abcdef name=office role=agent\n"
        )
        assert relay.state_of() is None
        (link,) = home.agent._links.values()
        await eventually(lambda: link.live == 0, "its connections are closed")
        await eventually(
            lambda: home.agent.states[0].state == "fatal_wait", "it waits for a person"
        )
        assert "revoked" in home.agent.states[0].trouble


async def test_a_rotated_key_does_not_interrupt_a_session(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, home):
        new = "ia-test-gpu-home-rotated-99"
        text = (relay.folder / "keys.txt").read_text()
        relay.write_keys(text.replace(TOKEN, new))
        home.agent.change_token(new)
        async with relay.chat() as answer:
            assert answer.status == 200
        assert (await relay.has(parked=4)).reconnects == 0


@pytest.mark.parametrize("token", ["sk-test-user-1f5b7c3a9e", "sk-nobody-0123456789"])
async def test_a_token_that_is_refused_is_said_with_its_remedy(
    tmp_path: Path, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_relay(tmp_path) as relay:
        echo = [{"name": "echo", "type": "echo"}]
        async with at_home(tmp_path, relay.url, backends=echo, token=token) as home:
            await eventually(
                lambda: (
                    bool(home.agent.states)
                    and home.agent.states[0].state == "fatal_wait"
                ),
                "it waits for a person",
            )
            trouble = home.agent.states[0].trouble
            assert "refused this token (40" in trouble
            assert "inferencia keys add" in trouble and "--role agent" in trouble
            assert token not in caplog.text


async def test_bodies_of_all_sizes_arrive_whole(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):

        async def measure(exchange: Exchange) -> None:
            await exchange.answer({"size": len(exchange.json["padding"])})

        engine.behave = measure
        for size in (0, 60_000, 70_000, 20_000_000):
            async with relay.chat(padding="x" * size) as answer:
                assert await answer.json() == {"size": size}


async def test_an_error_of_the_engine_comes_through(tmp_path: Path) -> None:
    async with FakeEngine() as engine, tunnelled(tmp_path, engine) as (relay, _):

        async def refuse(exchange: Exchange) -> None:
            error = {"message": "too long", "type": "invalid_request_error"}
            await exchange.answer({"error": error}, status=400)

        engine.behave = refuse
        async with relay.chat() as answer:
            assert answer.status == 400
            assert (await error_of(answer))["message"] == "too long"


async def test_relays_can_be_chained(tmp_path: Path) -> None:
    async with FakeEngine() as engine, at_relay(tmp_path) as first:
        folder = tmp_path / "second"
        folder.mkdir()
        tunnel = {
            "accept": {"enabled": True},
            "dial": {"relays": [first.url], "token": TOKEN},
            "beat": 0.25,
        }
        async with at_relay(folder, tunnel=tunnel) as second:
            async with at_home(folder, second.url, backends=[engine_at(engine.url)]):
                await second.has()
                await eventually(
                    lambda: "m" in getattr(first.state_of(), "models", ()),
                    "the first relay knows the model",
                )
                async with first.chat(stream=True) as answer:
                    assert answer.status == 200
                    assert await chunks_of(answer)
                (exchange,) = engine.exchanges
                via = exchange.request.header("via") or ""
                assert via.count("inferencia") == 3
