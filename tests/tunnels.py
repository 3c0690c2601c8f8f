"""Relays and agents in the test's own event loop, over real sockets on 127.0.0.1.

``at_relay`` gives a gateway that lets agents in, ``at_home`` one that dials. Both are
whole daemons but for their signals; between them lies nothing but TCP.
"""

import asyncio
import contextlib
import itertools
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import aiohttp

from gateway import (
    DONE,
    FINISH,
    LAST_CHUNK,
    PATIENCE,
    SSE_HEAD,
    USER,
    Exchange,
    FakeEngine,
    Front,
    chunk,
    event,
    eventually,
)
from inferencia.app import make_parts
from inferencia.backends.base import Backend
from inferencia.config import load
from inferencia.keys import KeyRing
from inferencia.overlay import Flags
from inferencia.tunnel import wire
from inferencia.tunnel.agent import Agent
from inferencia.tunnel.carrier import Carrier, Channel, WebSocket
from inferencia.tunnel.dialing import dial, relay_origin
from inferencia.tunnel.relay import AgentState, TunnelRelay

TOKEN = "ia-test-gpu-home-5c1d9e8f7a"
OTHER_TOKEN = "ia-test-office-0b2f4d6a8c"
RELAY_KEYS = f"""
{USER} name=alice
{TOKEN} name=gpu-home role=agent models=m*,echo
{OTHER_TOKEN} name=office role=agent models=m*
"""
# Long enough for a busy machine, short enough for a test.
BEAT = 0.25

_NUMBERS = itertools.count()
# Made once: it reads the system's certificates, and plain HTTP needs none.
_CONTEXT = ssl.create_default_context()


@dataclass(slots=True)
class End(Front):
    """A daemon at one end of a tunnel."""

    folder: Path

    @property
    def relay(self) -> TunnelRelay:
        assert self.parts.tunnel.relay is not None
        return self.parts.tunnel.relay

    @property
    def agent(self) -> Agent:
        assert self.parts.tunnel.agent is not None
        return self.parts.tunnel.agent

    def state_of(self, name: str = "gpu-home") -> AgentState | None:
        return next((s for s in self.relay.states if s.name == name), None)

    def backend(self, name: str = "gpu-home") -> Backend:
        """An agent, as the catalogue has it."""
        return next(b for b in self.parts.catalogue.backends if b.name == name)

    async def has(self, name: str = "gpu-home", *, parked: int = 1) -> AgentState:
        """Wait until an agent is there and can be sent requests."""

        def is_there() -> bool:
            state = self.state_of(name)
            return (
                state is not None
                and state.state == "active"
                and state.connections - state.streams >= parked
                and any(
                    b.name == name and not b.is_down
                    for b in self.parts.catalogue.backends
                )
            )

        await eventually(is_there, f"{name} is there: {self.relay.states}")
        state = self.state_of(name)
        assert state is not None
        return state

    def write_keys(self, text: str) -> None:
        """Change the keys file, and have that noticed."""
        (self.folder / "keys.txt").write_text(text)
        self.parts.doors.ring.reload()
        self.parts.tunnel.keys_changed()


@contextlib.asynccontextmanager
async def _running(
    folder: Path, config: dict[str, Any], keys: str, port: int = 0
) -> AsyncIterator[End]:
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240
    limits = {"requests_per_second": 100000, "burst": 100000}
    whole = {"ratelimit": limits, "usage": {"path": str(folder / "usage.sqlite3")}}
    (folder / "config.yaml").write_text(json.dumps(whole | config))
    (folder / "keys.txt").touch(mode=0o600)
    (folder / "keys.txt").write_text(keys)
    loaded = load(folder / "config.yaml", {}, Flags())
    ring = KeyRing(loaded.config.auth.keys_file)
    parts = make_parts(loaded.config, ring, None)
    async with contextlib.AsyncExitStack() as stack:
        await parts.listener.start(parts.shortcuts)
        stack.push_async_callback(parts.listener.close)
        parts.catalogue.start()
        stack.push_async_callback(parts.catalogue.aclose)
        if parts.catalogue.backends:
            await parts.catalogue.refresh()
        _, bound = await parts.listener.open("127.0.0.1", port)
        await stack.enter_async_context(parts.tunnel)
        client = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(PATIENCE),
            )
        )
        yield End(parts, bound, client, folder)


@contextlib.asynccontextmanager
async def at_relay(
    folder: Path, *, keys: str = RELAY_KEYS, port: int = 0, **further: Any
) -> AsyncIterator[End]:
    """A relay on a free port."""
    tunnel = {"accept": {"enabled": True}, "beat": BEAT}
    config = {"tunnel": tunnel} | further
    async with _running(folder / f"relay{port}", config, keys, port) as end:
        yield end


@contextlib.asynccontextmanager
async def at_home(
    folder: Path,
    *relays: str,
    backends: list[dict[str, Any]],
    token: str = TOKEN,
    dial: dict[str, Any] | None = None,
    **further: Any,
) -> AsyncIterator[End]:
    """An agent with these backends; its own door is open too."""
    dialing = {"relays": list(relays), "token": token} | (dial or {})
    config = {"backends": backends, "tunnel": {"dial": dialing, "beat": BEAT}} | further
    name = f"home-{next(_NUMBERS)}"
    async with _running(folder / name, config, f"{USER} name=me") as end:
        yield end


def engine_at(url: str, **further: Any) -> dict[str, Any]:
    """A backend of an agent's configuration."""
    return {"name": "engine", "type": "openai", "url": url} | further


@contextlib.asynccontextmanager
async def tunnelled(
    folder: Path, engine: FakeEngine, **further: Any
) -> AsyncIterator[tuple[End, End]]:
    """A relay, and an agent with one engine."""
    async with (
        at_relay(folder) as relay,
        at_home(folder, relay.url, backends=[engine_at(engine.url)], **further) as home,
    ):
        await relay.has()
        yield relay, home


async def arrives_word_by_word(engine: FakeEngine, asked: Any) -> None:
    """Have a stream made a word at a time, each when the one before it is here.

    Args:
        engine: makes it.
        asked: the request for it, not sent yet.
    """
    may_go_on: asyncio.Queue[None] = asyncio.Queue()

    async def word_by_word(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD)
        for number in range(5):
            await may_go_on.get()
            await exchange.write(chunk(event(str(number))))
        await exchange.write(chunk(FINISH + DONE) + LAST_CHUNK)

    engine.behave = word_by_word
    may_go_on.put_nowait(None)
    async with asked as answer:
        for number in range(5):
            async with asyncio.timeout(PATIENCE):
                while f'"{number}"'.encode() not in await answer.content.readline():
                    pass
            may_go_on.put_nowait(None)
        assert (await answer.read()).endswith(DONE)


async def chunks_of(answer: aiohttp.ClientResponse) -> list[bytes]:
    """The data events of a stream, to its end."""
    text = await answer.read()
    return [line for line in text.split(b"\n\n") if line.startswith(b"data: ")]


async def gone(what: asyncio.Event) -> None:
    """Wait for something with patience."""
    async with asyncio.timeout(PATIENCE):
        await what.wait()


class Puppet:
    """An agent of which a test pulls every string, down to the bytes."""

    def __init__(
        self,
        relay: End,
        *,
        token: str = TOKEN,
        instance: str = "puppet-1",
        models: tuple[str, ...] = ("m",),
        spare: int = 2,
    ) -> None:
        self.origin = relay_origin(relay.url)
        self.token = token
        self.instance = instance
        self.models = models
        self.spare = spare
        self.said: list[wire.Message] = []  # by the relay
        self.lost = asyncio.Event()
        self.session = ""
        self.channel: Channel | None = None
        self.carriers: list[Carrier] = []

    async def join(self, *, resume: str | None = None, **further: Any) -> Self:
        """Register; ``session`` is known then."""
        self.lost.clear()
        channel = await self.dial(
            wire.CONTROL_PATH, wire.CONTROL_PROTOCOL, self._new_channel
        )
        assert isinstance(channel, Channel)
        self.channel = channel
        models = tuple(wire.Model(name, {"id": name}) for name in self.models)
        register: dict[str, Any] = {
            "version": wire.VERSION,
            "agent": None,
            "instance": self.instance,
            "resume": resume,
            "software": "puppet",
            "max_streams": 8,
            "spare": self.spare,
            "models": models,
        }
        self.send(wire.Register(**(register | further)))
        answer = await self.hears(wire.Registered, wire.Bye)
        if isinstance(answer, wire.Registered):
            self.session = answer.session
        return self

    def _new_channel(self, headers: object) -> Channel:
        return Channel(
            is_client=True, beat=BEAT, on_message=self._take, on_lost=self._lost
        )

    def _take(self, text: str) -> None:
        message = wire.decode(text)
        assert message is not None
        self.said.append(message)

    def _lost(self, error: Exception | None) -> None:
        self.lost.set()

    def send(self, message: wire.Message) -> None:
        assert self.channel is not None
        self.channel.send(wire.encode(message))

    async def hears(self, *kinds: type[wire.Message]) -> wire.Message:
        """The newest message of these kinds, once there is one."""

        def heard() -> list[wire.Message]:
            return [message for message in self.said if isinstance(message, kinds)]

        await eventually(lambda: bool(heard()), f"it hears {kinds}, not {self.said}")
        return heard()[-1]

    async def park(
        self, protocol: asyncio.Protocol, *, session: str | None = None
    ) -> Carrier:
        """Dial a data connection whose server is ``protocol``."""

        def make(headers: object) -> Carrier:
            carrier = Carrier(protocol, is_client=True, beat=BEAT, peer="relay")
            self.carriers.append(carrier)
            return carrier

        name = self.session if session is None else session
        headers = {wire.SESSION_HEADER: name}
        carrier = await self.dial(wire.DATA_PATH, wire.DATA_PROTOCOL, make, headers)
        assert isinstance(carrier, Carrier)
        return carrier

    async def dial(
        self,
        path: str,
        protocol: str,
        make: Callable[[Mapping[str, str]], WebSocket],
        headers: Mapping[str, str] | None = None,
    ) -> WebSocket:
        """One handshake of an honest agent, but for ``headers``."""
        whole = {
            "Authorization": f"Bearer {self.token}",
            wire.INSTANCE_HEADER: self.instance,
        } | dict(headers or {})
        return await dial(
            self.origin, "127.0.0.1", path, protocol, whole, _CONTEXT, make
        )

    def leave(self) -> None:
        """Cut everything."""
        if self.channel is not None:
            self.channel.fail(ConnectionAbortedError("the test is over"))
        for carrier in self.carriers:
            carrier.abort()


class Answering(asyncio.Protocol):
    """A server that answers each request with these very bytes."""

    def __init__(self, answer: bytes, *, greeting: bytes = b"") -> None:
        self.answer = answer
        self.greeting = greeting  # said before anybody has asked
        self.received = b""
        self.asked = asyncio.Event()
        self.lost = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.greeting:
            self.transport.write(self.greeting)

    def data_received(self, data: bytes) -> None:
        assert self.transport is not None
        self.received += data
        if b"\r\n\r\n" in self.received and not self.asked.is_set():
            self.asked.set()
            self.transport.write(self.answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
