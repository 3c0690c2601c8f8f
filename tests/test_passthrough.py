"""TLS through a relay that cannot read it: from a client to an agent's own application.

Both daemons are in the test's event loop; between them and around them is real TCP.
"""

import asyncio
import contextlib
import io
import json
import logging
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import pytest

from certificates import make_pair
from gateway import (
    CHAT,
    LAST_CHUNK,
    PATIENCE,
    SSE_HEAD,
    USER,
    Exchange,
    FakeEngine,
    chunk,
    error_of,
    event,
    eventually,
)
from inferencia.app import make_parts
from inferencia.config import ConfigErrors, load
from inferencia.keys import Key, KeyRing
from inferencia.overlay import Flags
from inferencia.settings import Config, TlsConfig
from inferencia.summary import summary
from inferencia.tunnel import passthrough, wire
from inferencia.tunnel.clienthello import (
    DECODE_ERROR,
    INTERNAL_ERROR,
    UNRECOGNIZED_NAME,
)
from inferencia.tunnel.session import may_pass
from inferencia.upstream.answer import ConnectFailed
from test_clienthello import real_hello
from tunnels import (
    BEAT,
    OTHER_TOKEN,
    RELAY_KEYS,
    TOKEN,
    End,
    Puppet,
    arrives_word_by_word,
    at_home,
    at_relay,
    engine_at,
    gone,
)

GPU, OFFICE = "gpu1.example.com", "office.example.com"
KEYS = RELAY_KEYS.replace("models=m*,echo", f"models=m*,host:{GPU}").replace(
    "role=agent models=m*\n", "role=agent models=m*,host:off*.example.com\n"
)
CANARY = "canary-4f1d9c7e"
ADMIN = "sk-test-admin-2b7d9e"


@dataclass(slots=True)
class Pair:
    """A certificate, as an agent and as a client needs it."""

    host: str
    cert: Path
    key: Path
    trust: ssl.SSLContext

    @property
    def config(self) -> dict[str, dict[str, str]]:
        return {self.host: {"cert": str(self.cert), "key": str(self.key)}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    found = {}
    for host in (GPU, OFFICE):
        folder = tmp_path_factory.mktemp("tls")
        cert, key = make_pair(folder, host)
        found[host] = Pair(host, cert, key, ssl.create_default_context(cafile=cert))
    return found


@dataclass(slots=True)
class Way:
    """The way in from outside: through the relay's port, to a name."""

    relay: End
    home: End
    pair: Pair
    port: int = 0

    def post(self, path: str, body: Any, key: str = USER, **further: Any) -> Any:
        return self.ask(
            "POST", path, key, data=io.BytesIO(json.dumps(body).encode()), **further
        )

    def ask(self, method: str, path: str, key: str | None, **further: Any) -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.relay.client.request(
            method,
            f"https://127.0.0.1:{self.port or port_of(self.relay).port}{path}",
            ssl=self.pair.trust,
            server_hostname=self.pair.host,
            headers=headers | further.pop("headers", {}),
            **further,
        )

    def chat(self, *, stream: bool = False, words: str = "hello") -> Any:
        messages = [{"role": "user", "content": words}]
        return self.post(CHAT, {"model": "m", "messages": messages, "stream": stream})

    async def empty(self) -> None:
        """Wait until nothing passes through, and nobody counts anything any more."""
        port, visitors = port_of(self.relay), self.home.parts.tunnel.visitors
        assert visitors is not None

        def is_empty() -> bool:
            states = self.relay.relay.states
            return not (
                port.clients or visitors.end.visitors or any(s.passing for s in states)
            )

        await eventually(is_empty, f"nothing is left: {port.clients}")
        await eventually(
            lambda: not self.relay.parts.guard.open_connections, "no place is taken"
        )
        await eventually(
            lambda: not self.home.parts.guard.open_connections, "nobody is served"
        )


def port_of(relay: End) -> passthrough.PassthroughPort:
    port = relay.parts.tunnel.port
    assert port is not None
    return port


@contextlib.asynccontextmanager
async def passing_relay(folder: Path, keys: str = KEYS) -> AsyncIterator[End]:
    tunnel = {"accept": {"enabled": True, "passthrough": ":0"}, "beat": BEAT}
    async with at_relay(folder, keys=keys, tunnel=tunnel) as relay:
        yield relay


@contextlib.asynccontextmanager
async def home_of(
    pair: Pair,
    folder: Path,
    relay: End,
    engine: FakeEngine,
    url: str | None = None,
    **further: Any,
) -> AsyncIterator[Way]:
    async with at_home(
        folder,
        url or relay.url,
        backends=[engine_at(engine.url)],
        dial={"passthrough": pair.config},
        **further,
    ) as home:
        name = "office" if further.get("token") == OTHER_TOKEN else "gpu-home"
        await relay.has(name, parked=4)
        yield Way(relay, home, pair)


@contextlib.asynccontextmanager
async def passing(
    folder: Path, pairs: dict[str, Pair], engine: FakeEngine, **further: Any
) -> AsyncIterator[Way]:
    """A relay, and an agent that ends TLS for one name."""
    async with (
        passing_relay(folder) as relay,
        home_of(pairs[GPU], folder, relay, engine, **further) as way,
    ):
        yield way


@dataclass(slots=True)
class Tap:
    """Forwards TCP, and remembers every byte of it."""

    port: int = 0
    forth: bytearray = field(default_factory=bytearray)  # from who has connected
    back: bytearray = field(default_factory=bytearray)

    @contextlib.asynccontextmanager
    async def to(self, port: int) -> AsyncIterator["Tap"]:
        tasks = set()

        async def copy(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray
        ) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    seen += data
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def forward(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(
                    copy(reader, far_writer, self.forth),
                    copy(far_reader, writer, self.back),
                )

        server = await asyncio.start_server(forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)


def answers(words: str) -> Any:
    """An engine that streams these words, and asks nobody why."""

    async def behave(exchange: Exchange) -> None:
        last = chunk(event(None, finish_reason="stop"))
        await exchange.write(SSE_HEAD + chunk(event(words)) + last + LAST_CHUNK)

    return behave


async def test_a_chat_reaches_the_agents_own_application(
    tmp_path: Path, pairs: dict[str, Pair], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        async with way.chat() as answer:
            assert answer.status == 200
            body = await answer.json()
        assert body["choices"][0]["message"]["content"] == "hi"
        # The agent's key, the agent's line in the log; the relay knows of no request.
        lines = [r for r in caplog.records if r.getMessage() == "request"]
        (line,) = [r.__dict__ for r in lines if r.__dict__.get("path") == CHAT]
        assert line["key"] == "me"
        assert line["client"].startswith("127.0.0.1 by 127.0.0.1:")
        state = way.relay.state_of()
        assert state is not None and state.hosts == (GPU,)
        await way.empty()


async def test_the_relay_forwards_nothing_that_it_can_read(
    tmp_path: Path, pairs: dict[str, Pair], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    out, home = Tap(), Tap()
    async with (
        FakeEngine(behave=answers(CANARY)) as engine,
        passing_relay(tmp_path) as relay,
        home.to(relay.port),
        out.to(port_of(relay).port),
        home_of(
            pairs[GPU], tmp_path, relay, engine, f"http://127.0.0.1:{home.port}"
        ) as way,
    ):
        way.port = out.port
        async with way.chat(words=CANARY, stream=True) as answer:
            assert CANARY in await answer.text()
        canary = CANARY.encode()
        assert canary in (await engine.next()).request.body
        assert len(out.forth) > 500 and len(out.back) > 500
        for seen in (out.forth, out.back, home.forth, home.back):
            assert canary not in seen and USER.encode() not in seen
        assert GPU.encode() in out.forth  # what it may see, and needs to
        assert CANARY not in caplog.text and USER not in caplog.text
        # The same words on the ordinary way through the same tap: they can be read.
        messages = [{"role": "user", "content": CANARY}]
        async with relay.chat(messages=messages) as answer:
            await answer.read()
        assert canary in home.back


async def test_every_event_comes_before_the_next_is_made(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        await arrives_word_by_word(engine, way.chat(stream=True))
        await way.empty()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_client_that_leaves_ends_the_work_at_the_engine(
    tmp_path: Path, pairs: dict[str, Pair], has_begun: bool
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:

        async def endless(exchange: Exchange) -> None:
            if has_begun:
                await exchange.write(SSE_HEAD + chunk(event("a")))
            await exchange.gone.wait()

        engine.behave = endless

        async def ask() -> None:
            async with way.chat(stream=True) as answer:
                await answer.read()

        asking = asyncio.create_task(ask())
        exchange = await engine.next()
        left = asyncio.get_running_loop().time()
        asking.cancel()
        await gone(exchange.gone)
        assert asyncio.get_running_loop().time() - left < 1
        await way.empty()
        await way.relay.has(parked=4)  # what was used up is dialed again


async def test_a_large_upload_passes_whole(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        async with way.chat(words="x" * 20_000_000) as answer:
            assert answer.status == 200
        assert len((await engine.next()).request.body) > 20_000_000
        await way.empty()


async def test_a_client_that_does_not_read_stops_the_engine(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        part = chunk(event("y" * 60_000))
        written = 0

        async def torrent(exchange: Exchange) -> None:
            nonlocal written
            await exchange.write(SSE_HEAD)
            for _ in range(600):
                await exchange.write(part)
                written += len(part)
            last = chunk(event(None, finish_reason="stop"))
            await exchange.write(last + LAST_CHUNK)

        engine.behave = torrent
        async with way.chat(stream=True) as answer:
            await answer.content.readline()
            before = -1

            async def stands_still() -> None:
                nonlocal before
                while before != written:
                    before = written
                    await asyncio.sleep(0.1)  # so long nothing moves

            async with asyncio.timeout(PATIENCE):
                await stands_still()
            # The rest is in kernels' buffers, which are as many as there are hops.
            assert written < 30_000_000
            for client in port_of(way.relay)._clients:
                for side in (client._near, client._far):
                    assert side is not None and side.wire is not None
                    assert side.wire.get_write_buffer_size() < 1_000_000
            # Others are not held up, and then it gets all of it.
            async with way.ask("GET", "/v1/models", USER) as other:
                assert other.status == 200
            size = 0
            async for data, _ in answer.content.iter_chunks():
                size += len(data)
        assert size > 599 * 60_000  # all but the line that was read before
        await way.empty()


async def test_a_slow_client_gets_all_of_an_answer_whose_server_has_closed(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        engine.behave = answers("z" * 3_000_000)
        headers = {"Connection": "close"}
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "m", "messages": messages, "stream": True}
        async with way.post(CHAT, body, headers=headers) as answer:
            await eventually(
                lambda: not way.home.parts.doors.active, "the server has done its part"
            )
            await asyncio.sleep(2 * BEAT)  # pings go to and fro meanwhile
            assert len(await answer.read()) > 3_000_000
        await way.empty()


async def test_keys_limits_and_the_owners_doors_are_the_agents(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    further = {"metrics": {"public": True}, "admin": {"remote": True}}
    async with (
        FakeEngine() as engine,
        passing(tmp_path, pairs, engine, **further) as way,
    ):
        keys = f"{USER} name=me rps=0.001 burst=1\n{ADMIN} name=boss role=admin\n"
        way.home.write_keys(keys)
        for key in (None, "sk-unknown-1", TOKEN):
            async with way.ask("GET", "/v1/models", key) as answer:
                assert answer.status == 401
        async with way.chat() as answer:
            assert answer.status == 200
        async with way.chat() as answer:
            assert answer.status == 429
            assert (await error_of(answer))["code"] == "rate_limit_exceeded"
        # Its owner's doors stay closed, whatever is allowed at other addresses.
        async with way.ask("GET", "/metrics", ADMIN) as answer:
            assert answer.status == 404
        for path in ("/logs", "/unload"):
            async with way.ask("GET", path, ADMIN) as answer:
                assert answer.status in (403, 404), path
        for path in ("/tunnel/v1/control", "/admin/api/agents"):
            async with way.ask("GET", path, ADMIN) as answer:
                assert answer.status == 404, path
        async with way.ask("GET", "/health", None) as answer:
            assert answer.status == 200


async def test_other_keys_after_a_reload_hold_for_visitors_too(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        async with way.chat() as answer:
            assert answer.status == 200
        way.home.parts.doors.ring = KeyRing(listed=["sk-another-7d0c2e"])
        async with way.chat() as answer:
            assert answer.status == 401


async def test_a_header_about_the_client_is_not_believed(
    tmp_path: Path, pairs: dict[str, Pair], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    proxies = {"server": {"trusted_proxies": ["0.0.0.0/0", "::/0"]}}
    async with (
        FakeEngine() as engine,
        passing(tmp_path, pairs, engine, **proxies) as way,
    ):
        headers = {"X-Forwarded-For": "10.9.8.7", "CF-Connecting-IP": "10.9.8.7"}
        async with way.ask("GET", "/v1/models", USER, headers=headers) as answer:
            assert answer.status == 200
        assert "10.9.8.7" not in str([r.__dict__ for r in caplog.records])


async def test_wrong_keys_are_counted_by_relay_whatever_it_says_of_clients(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        for _ in range(200):
            async with way.ask("GET", "/v1/models", "sk-guess") as answer:
                if answer.status == 429:
                    break
                assert answer.status == 401
        else:
            pytest.fail("guesses are not slowed down")
        async with way.chat() as answer:  # a good key still works
            assert answer.status == 200


# --- what the configuration says ---------------------------------------------------

RELAYS = "relays: [https://r.example.com], token: t"


def read(folder: Path, text: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load(path, {"HOME": "/nowhere"}, Flags()).config


def test_the_configuration_names_hosts_and_their_certificates(tmp_path: Path) -> None:
    pair = "{cert: c.pem, key: /k.pem}"
    text = f"tunnel: {{dial: {{{RELAYS}, passthrough: {{GPU1.example.com: {pair}}}}}}}"
    config = read(tmp_path, text)
    tls = TlsConfig(cert=tmp_path / "c.pem", key=Path("/k.pem"))
    assert config.tunnel.dial.passthrough == {GPU: tls}
    assert f"tunnel    TLS for {GPU} ends here, by {tmp_path}/c.pem" in summary(
        config, tmp_path
    )
    config = read(tmp_path, "tunnel: {accept: {enabled: true, passthrough: ':8443'}}")
    assert config.tunnel.accept.passthrough == ":8443"
    assert "tunnel    TLS is passed on by name at :8443" in summary(config, tmp_path)


@pytest.mark.parametrize(
    ("tunnel", "error"),
    [
        (f"dial: {{{RELAYS}, passthrough: {{a.b: x}}}}",
         "tunnel.dial.passthrough.a.b: expected a group with cert, key"),
        (f"dial: {{{RELAYS}, passthrough: {{a.b: {{cert: c}}}}}}",
         "tunnel.dial.passthrough.a.b: expected {cert: FILE, key: FILE}"),
        (f"dial: {{{RELAYS}, passthrough: {{a.b: {{cert: c, key: null}}}}}}",
         "tunnel.dial.passthrough.a.b: expected {cert: FILE, key: FILE}"),
        (f"dial: {{{RELAYS}, passthrough: {{1.2.3.4: {{cert: c, key: k}}}}}}",
         'tunnel.dial.passthrough: "1.2.3.4" cannot be the name of a host'),
        ("accept: {enabled: true, passthrough: '8443'}",
         'tunnel.accept.passthrough: expected HOST:PORT or :PORT, got "8443"'),
        ("accept: {passthrough: ':8443'}",
         "tunnel.accept.passthrough: needs tunnel.accept.enabled"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_configuration_is_said(
    tmp_path: Path, tunnel: str, error: str
) -> None:
    with pytest.raises(ConfigErrors) as caught:
        read(tmp_path, f"tunnel: {{{tunnel}}}")
    assert str(caught.value.errors[0]).startswith(error)


def test_a_certificate_that_cannot_be_used_is_named_at_the_start(
    tmp_path: Path,
) -> None:
    (tmp_path / "c").write_text("no certificate")
    pair = "{cert: c, key: c}"
    text = f"tunnel: {{dial: {{{RELAYS}, passthrough: {{{GPU}: {pair}}}}}}}"
    ring = KeyRing(listed=[USER])
    with pytest.raises(ValueError, match=rf"^tunnel\.dial\.passthrough\.{GPU}: "):
        make_parts(read(tmp_path, text), ring, None)


def test_nothing_of_it_is_imported_unless_it_is_asked_for() -> None:
    code = "import inferencia.cli, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "inferencia.tunnelling" in loaded
    ours = {"visitors", "tunnel.passthrough", "tunnel.tlsend", "tunnel.splice"}
    assert not loaded & {f"inferencia.{name}" for name in ours}


# --- who is let through ----------------------------------------------------------


async def said_to(port: int, data: bytes) -> bytes:
    """All that a port answers to these bytes until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(PATIENCE):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_each_name_goes_to_its_own_agent_and_others_to_nobody(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with (
        FakeEngine() as first,
        FakeEngine(behave=answers("office")) as second,
        passing_relay(tmp_path) as relay,
        home_of(pairs[GPU], tmp_path, relay, first) as gpu,
        home_of(pairs[OFFICE], tmp_path, relay, second, token=OTHER_TOKEN) as office,
    ):
        for way, engine in ((gpu, first), (office, second), (gpu, first)):
            async with way.chat(stream=True) as answer:
                assert answer.status == 200
            await engine.next()
        port = port_of(relay).port
        for name in ("relay.example.com", "gpu1.example.org", "example.com", None):
            assert await said_to(port, real_hello(name)) == UNRECOGNIZED_NAME
        assert await said_to(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        assert await said_to(port, b"\x16\3\1\0\4\2\0\0\0") == DECODE_ERROR
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            # Whoever is sent astray notices, since only the agent has the certificate.
            async with relay.client.get(
                f"https://127.0.0.1:{port}/",
                ssl=pairs[OFFICE].trust,
                server_hostname=GPU,
            ):
                pass
        assert first.asked.empty() and second.asked.empty()


async def test_agents_that_have_the_same_name_share_its_clients_and_stand_in(
    tmp_path: Path, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def holds(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("hi")))
        await go_on.wait()
        await exchange.write(LAST_CHUNK)

    keys = KEYS.replace("host:off*.example.com", f"host:{GPU}")
    (tmp_path / "other").mkdir()
    async with (
        FakeEngine(behave=holds) as first,
        FakeEngine(behave=holds) as second,
        passing_relay(tmp_path, keys) as relay,
        home_of(pairs[GPU], tmp_path, relay, first) as way,
    ):
        other = home_of(
            pairs[GPU], tmp_path / "other", relay, second, token=OTHER_TOKEN
        )
        async with other, contextlib.AsyncExitStack() as streams:
            for engine in (first, second):
                asked = await streams.enter_async_context(way.chat(stream=True))
                assert b"hi" in await asked.content.readline()
                assert len(engine.exchanges) == 1, "each has one"
            busy, *_ = port_of(relay).sessions_for(GPU)
            refused = AsyncMock(side_effect=ConnectFailed("unreachable", "gone"))
            monkeypatch.setattr(busy.pool, "take_out", refused)
            asked = await streams.enter_async_context(way.chat(stream=True))
            assert b"hi" in await asked.content.readline()
            refused.assert_awaited_once()
            go_on.set()
        monkeypatch.undo()
        port = port_of(relay)
        await eventually(lambda: len(port.sessions_for(GPU)) == 1, "it has left")
        async with way.chat(stream=True) as asked:
            assert b"hi" in await asked.content.read()


async def test_metrics_tell_what_passes_through_and_who_was_refused(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        port = port_of(way.relay)

        async def shown() -> dict[str, float]:
            text = way.relay.parts.metrics.render().decode()
            found = re.findall(r"^inferencia_passthrough_(\S+) (\S+)$", text, re.M)
            return {name: float(value) for name, value in found}

        assert await shown() == {}
        async with way.chat() as answer:
            assert answer.status == 200
            here = await shown()
            assert here['connections{agent="gpu-home"}'] == 1
            assert here['bytes_total{agent="gpu-home",direction="in"}'] > 500
        await way.relay.client.close()
        await way.empty()
        assert await said_to(port.port, real_hello("nobody.example.com"))
        assert await said_to(port.port, b"GET / HTTP/1.1\r\n\r\n") == b""
        after = await shown()
        assert after['connections{agent="gpu-home"}'] == 0
        assert after['connections_total{agent="gpu-home"}'] == 1
        for way_of_bytes in ("in", "out"):
            name = f'bytes_total{{agent="gpu-home",direction="{way_of_bytes}"}}'
            assert after[name] >= here[name] > 500
        assert after['refused_total{reason="no_agent"}'] == 1
        assert after['refused_total{reason="bad_hello"}'] == 1


@pytest.mark.parametrize(
    ("models", "is_allowed"),
    [
        ((), False),
        (("*",), False),
        (("m*", GPU), False),
        (("host:other.example.com",), False),
        (("m*", f"xhost:{GPU}"), False),
        (("host:",), False),
        (("m*", f"host:{GPU}"), True),
        (("host:*.example.com",), True),
    ],
)
def test_only_a_key_that_lists_a_host_is_given_its_clients(
    models: tuple[str, ...], is_allowed: bool
) -> None:
    assert may_pass(Key("gpu-home", models=models), GPU) is is_allowed


async def test_a_name_that_an_agents_key_does_not_list_is_not_given_to_it(
    tmp_path: Path, pairs: dict[str, Pair], caplog: pytest.LogCaptureFixture
) -> None:
    keys = f"{USER} name=alice\n{TOKEN} name=gpu-home role=agent\n"
    async with (
        FakeEngine() as engine,
        passing_relay(tmp_path, keys) as relay,
        home_of(pairs[GPU], tmp_path, relay, engine),
    ):
        said = await said_to(port_of(relay).port, real_hello(GPU))
        assert said == UNRECOGNIZED_NAME
        state = relay.state_of()
        assert state is not None and state.hosts == ()
        assert f"passes no TLS on for {GPU}" in caplog.text  # the agent is told


async def test_a_key_that_loses_a_name_gets_no_more_clients(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        async with way.chat() as answer:
            assert answer.status == 200
        way.relay.write_keys(KEYS.replace(f",host:{GPU}", ""))
        said = await said_to(port_of(way.relay).port, real_hello(GPU))
        assert said == UNRECOGNIZED_NAME


async def test_when_the_agent_is_gone_connections_close_and_new_ones_are_refused(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with (
        FakeEngine() as engine,
        passing_relay(tmp_path) as relay,
        contextlib.AsyncExitStack() as stack,
    ):
        way = await stack.enter_async_context(
            home_of(pairs[GPU], tmp_path, relay, engine)
        )

        async def endless(exchange: Exchange) -> None:
            await exchange.write(SSE_HEAD + chunk(event("a")))
            await exchange.gone.wait()

        engine.behave = endless
        async with way.chat(stream=True) as answer:
            await answer.content.readline()
            relay.write_keys(f"{USER} name=alice\n")  # its key is revoked
            with pytest.raises(aiohttp.ClientError):
                async with asyncio.timeout(PATIENCE):
                    await answer.read()
        exchange = await engine.next()
        await gone(exchange.gone)
        said = await said_to(port_of(relay).port, real_hello(GPU))
        assert said == UNRECOGNIZED_NAME


async def test_what_a_client_gets_when_the_agent_freezes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody can wait for the seconds that it takes.
    monkeypatch.setattr("inferencia.tunnel.pool.FRESH_SECONDS", -1)
    monkeypatch.setattr("inferencia.tunnel.pool.PROBE_SECONDS", 0.1)
    async with passing_relay(tmp_path) as relay:
        puppet = await Puppet(relay).join(passthrough=(GPU,))
        silent = await puppet.park(asyncio.Protocol())
        await relay.has()
        silent._wire.pause_reading()
        said = await said_to(port_of(relay).port, real_hello(GPU))
        assert said == INTERNAL_ERROR
        puppet.leave()


# --- hostile ends ----------------------------------------------------------------


class Far(asyncio.Protocol):
    """An agent's end of a data connection, with its hands on everything."""

    def __init__(self) -> None:
        self.received = b""
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        pass

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


async def test_the_agent_is_told_whose_tls_it_is_and_gets_it_from_the_first_byte(
    tmp_path: Path,
) -> None:
    async with passing_relay(tmp_path) as relay:
        puppet = await Puppet(relay).join(passthrough=(GPU,))
        far = Far()
        carrier = await puppet.park(far)
        notes: list[bytes] = []
        carrier.on_note = notes.append
        await relay.has()
        hello = real_hello(GPU)
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(relay).port)
        for byte in hello:
            writer.write(bytes((byte,)))
        await eventually(lambda: far.received == hello, "the whole ClientHello is here")
        assert wire.decode(notes[0]) == wire.Passthrough(GPU, "127.0.0.1")
        carrier.write(b"an answer")
        carrier.tell(wire.encode(wire.Passed()))
        assert await reader.read() == b"an answer"
        await gone(far.lost)  # the relay closes it when the client has all
        writer.close()
        puppet.leave()


@pytest.mark.parametrize("note", ["not JSON", '{"t": "passed"', "x" * 4096])
async def test_a_note_that_is_not_understood_ends_the_connection(
    tmp_path: Path, note: str
) -> None:
    async with passing_relay(tmp_path) as relay:
        puppet = await Puppet(relay).join(passthrough=(GPU,))
        far = Far()
        carrier = await puppet.park(far)
        carrier.on_note = lambda note: None
        await relay.has()
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(relay).port)
        writer.write(real_hello(GPU))
        await eventually(lambda: bool(far.received), "it is given to the agent")
        carrier.tell(note)
        assert await reader.read() == b""
        writer.close()
        puppet.leave()
        await eventually(lambda: not port_of(relay).clients, "nobody is left")


async def test_an_agent_without_names_that_speaks_of_tls_is_cut(tmp_path: Path) -> None:
    async with passing_relay(tmp_path) as relay:
        puppet = await Puppet(relay).join()
        far = Far()
        carrier = await puppet.park(far)
        carrier.tell(wire.encode(wire.Passed()))
        await gone(far.lost)
        puppet.leave()


async def test_a_relay_that_passes_on_a_name_that_is_not_here_is_cut(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        (session,) = way.relay.relay.sessions
        for note in (wire.encode(wire.Passthrough("other.example.com", "")), "[]"):
            carrier, lost = await session.pool.take_out()
            far = Far()
            carrier.set_protocol(far)
            carrier.tell(note)
            await gone(far.lost)
            lost()
        async with way.chat() as answer:
            assert answer.status == 200


async def test_a_relay_may_lie_about_the_client_and_nothing_follows_from_it(
    tmp_path: Path, pairs: dict[str, Pair], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        way.home.write_keys(f"{USER} name=me\n{ADMIN} name=boss role=admin\n")
        (session,) = way.relay.relay.sessions
        for client in ("127.0.0.1", "::1", "nonsense"):
            carrier, lost = await session.pool.take_out()
            carrier.tell(wire.encode(wire.Passthrough(GPU, client)))
            status = await status_over(
                carrier, lost, pairs[GPU].trust, "/logs", key=ADMIN
            )
            assert status == 403
        told = {r.__dict__.get("client", "") for r in caplog.records}
        assert {one.partition(" by ")[0] for one in told if " by " in one} == {
            "127.0.0.1",
            "::1",
            "unknown",
        }


async def status_over(
    carrier: Any, lost: Any, trust: ssl.SSLContext, path: str, *, key: str
) -> int:
    """The status of an answer by TLS over a carrier, as a relay could ask."""
    arriving, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trust.wrap_bio(arriving, leaving, server_hostname=GPU)
    came = asyncio.Event()

    class Client(Far):
        def data_received(self, data: bytes) -> None:
            arriving.write(data)
            came.set()

    carrier.set_protocol(Client())
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}"
    steps: list[Callable[[], object]] = [
        tls.do_handshake,
        lambda: tls.write(f"{request}\r\n\r\n".encode()),
    ]
    said = b""
    async with asyncio.timeout(PATIENCE):
        while b"\r\n" not in said:
            came.clear()
            try:
                while steps:
                    steps[0]()
                    del steps[0]
                said += tls.read()
            except ssl.SSLWantReadError:
                carrier.write(leaving.read())
                await came.wait()
    carrier.abort()
    lost()
    return int(said.split()[1])


async def test_strangers_at_the_port_are_bounded_in_time_and_number(
    tmp_path: Path, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passthrough, "HELLO_SECONDS", 0.2)
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        port = port_of(way.relay)
        way.relay.parts.guard.max_connections = 3
        open_ones = [
            await asyncio.open_connection("127.0.0.1", port.port) for _ in range(3)
        ]
        await eventually(lambda: port.clients == 3, "three are here")
        assert await said_to(port.port, real_hello(GPU)) == b""  # no room
        assert way.relay.parts.guard.refused == 1
        for reader, writer in open_ones:  # none of them has said what it wants
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        await eventually(lambda: not port.clients, "they were sent away")
        way.relay.parts.guard.max_connections = 100
        async with way.chat() as answer:
            assert answer.status == 200


async def test_an_agent_has_so_many_clients_and_no_more(
    tmp_path: Path, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passthrough, "MAX_PASSING", 2)
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        port = port_of(way.relay).port
        open_ones = [await asyncio.open_connection("127.0.0.1", port) for _ in "ab"]
        for _, writer in open_ones:
            writer.write(real_hello(GPU))
        for reader, _ in open_ones:
            await reader.readexactly(5)  # the agent answers
        assert await said_to(port, real_hello(GPU)) == INTERNAL_ERROR
        # Requests on the ordinary way have places of their own.
        await asyncio.gather(*(plain(way.relay) for _ in range(20)))
        for _, writer in open_ones:
            writer.close()
        await way.empty()


async def plain(relay: End) -> None:
    async with relay.chat() as answer:
        assert answer.status == 200


async def test_what_stands_still_is_cut(
    tmp_path: Path, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        port = port_of(way.relay)
        reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
        writer.write(real_hello(GPU))
        await reader.readexactly(5)
        (client,) = port._clients
        now = asyncio.get_running_loop().time()
        client.check(now + passthrough._IDLE_SECONDS - 5)
        assert not writer.is_closing() and port.clients == 1
        client.check(now + passthrough._IDLE_SECONDS + 5)
        await eventually(lambda: not port.clients, "it was cut")
        writer.close()
        await way.empty()


# --- the end ---------------------------------------------------------------------


async def test_a_relay_that_ends_lets_streams_finish_and_cuts_what_is_idle(
    tmp_path: Path, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passthrough, "_IDLE_AT_END_SECONDS", 0.25)
    async with FakeEngine() as engine, passing(tmp_path, pairs, engine) as way:
        port = port_of(way.relay)
        may_end = asyncio.Event()

        async def slow(exchange: Exchange) -> None:
            await exchange.write(SSE_HEAD)
            while not may_end.is_set():
                await exchange.write(chunk(event("a")))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await may_end.wait()
            last = chunk(event(None, finish_reason="stop"))
            await exchange.write(last + LAST_CHUNK)

        engine.behave = slow
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", port.port)
        idle_writer.write(real_hello(GPU))
        await idle_reader.readexactly(5)
        async with way.chat(stream=True) as answer:
            await answer.content.readline()
            draining = asyncio.ensure_future(way.relay.parts.tunnel.drain(10))
            with contextlib.suppress(ConnectionResetError):
                await idle_reader.read()  # until it is cut
            assert not draining.done()
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", port.port)
            may_end.set()
            assert b"stop" in await answer.read()
        async with asyncio.timeout(PATIENCE):
            await draining
        idle_writer.close()


async def test_an_agent_that_ends_lets_its_last_words_reach_the_client(
    tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    async with (
        FakeEngine() as engine,
        passing_relay(tmp_path) as relay,
        contextlib.AsyncExitStack() as stack,
    ):
        way = await stack.enter_async_context(
            home_of(pairs[GPU], tmp_path, relay, engine)
        )
        async with way.chat() as answer:
            assert answer.status == 200
        way.home.parts.doors.draining = True
        async with way.chat() as answer:
            assert answer.status == 503
            assert answer.headers["Connection"] == "close"
        await stack.aclose()
        said = await said_to(port_of(relay).port, real_hello(GPU))
        assert said in (UNRECOGNIZED_NAME, INTERNAL_ERROR)


async def test_a_changed_certificate_is_shown_to_the_next_client(
    tmp_path: Path,
) -> None:
    cert, key = make_pair(tmp_path, GPU)
    old = Pair(GPU, cert, key, ssl.create_default_context(cafile=cert))
    async with FakeEngine() as engine, passing(tmp_path, {GPU: old}, engine) as way:
        async with way.chat() as answer:
            assert answer.status == 200
        make_pair(tmp_path, GPU)
        way.pair = Pair(GPU, cert, key, ssl.create_default_context(cafile=cert))
        visitors = way.home.parts.tunnel.visitors
        assert visitors is not None
        visitors.end.poll()
        async with way.chat() as answer:
            assert answer.status == 200


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        tunnel = {"accept": {"enabled": True, "passthrough": address}}
        with pytest.raises(Exception, match="cannot listen on 127"):
            async with at_relay(tmp_path, tunnel=tunnel):
                pass
