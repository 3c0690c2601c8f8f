"""What strangers and accidents do to a daemon: a real process, many at once.

The unit set does each with few connections and looks at no clock. With
``INFERENCIA_SLOW=1`` (as ``.ci/full`` sets it) there are as many as issue 3 names, and
how quick others are served meanwhile is measured; that needs a quiet machine.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from certificates import make_pair, served_name
from daemons import MAIN
from engines.real import Engine, free_port
from gateway import CHAT, SSE_HEAD, Exchange, FakeEngine, chunk, event
from rawclient import CHAT_BODY, Reply, Wire, request

IS_SLOW = bool(os.environ.get("INFERENCIA_SLOW"))
slow = pytest.mark.skipif(
    not IS_SLOW, reason="INFERENCIA_SLOW is not set (.ci/full sets it)"
)

ALICE = "sk-faults-alice-2b7e151628aed2a6"
BOB = "sk-faults-bob-abf7158809cf4f3c76"
KEYS = f"{ALICE} name=alice\n{BOB} name=bob\n"

# Longer than anything here takes; a test that waits for so long has failed.
PATIENCE = 30.0
HEALTH = request("/health", method="GET", key=None)


@dataclass
class Daemon:
    """A running ``python -m inferencia`` and what it has logged."""

    engine: Engine
    wires: list[Wire] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.engine.port

    async def connect(self) -> Wire:
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        self.wires.append(wire)
        return wire

    async def ask(self, data: bytes) -> Reply:
        """One answer, on a connection of its own."""
        wire = await self.connect()
        await wire.send(data)
        reply = await wire.reply()
        wire.close()
        return reply

    def signal(self, number: int) -> None:
        assert self.engine.process is not None
        self.engine.process.signal(number)

    @property
    def log(self) -> list[dict[str, Any]]:
        text = self.engine.log.read_text()
        return [json.loads(line) for line in text.splitlines() if line[:1] == "{"]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.log if line["msg"] == "request"]

    @property
    def faults(self) -> list[dict[str, Any]]:
        """What was logged that should not have been."""
        # uvloop raises for a transport that is cut, a turn before that is told.
        known = ("request",)
        return [
            line
            for line in self.log
            if line["level"] == "ERROR" and line["msg"] not in known
        ]

    async def logs(self, is_it: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Wait until the log is as it should be."""
        async with asyncio.timeout(PATIENCE):
            while not is_it(self.log):
                process = self.engine.process
                assert process is not None and process.is_running, self.engine.log
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def daemon(
    folder: Path,
    engine: FakeEngine | None = None,
    *,
    descriptors: int | None = None,
    env: dict[str, str] | None = None,
    scheme: str = "http",
    **server: Any,
) -> AsyncIterator[Daemon]:
    """A daemon in front of an engine (or the built-in one), serving.

    Args:
        folder: where its files go.
        engine: what stands behind it.
        descriptors: how many files it may open.
        env: more variables of its environment.
        scheme: ``https`` if ``server`` says so.
        server: what stands under ``server`` in its configuration.
    """
    port = free_port()
    (folder / "keys.txt").touch(mode=0o600)
    (folder / "keys.txt").write_text(KEYS)
    config: dict[str, Any] = {
        "server": {"shutdown_timeout": 1} | server,
        "auth": {"keys_file": "keys.txt"},
        "ratelimit": {"requests_per_second": 100000, "burst": 100000},
        "log": {"format": "json"},
    }
    if engine is not None:
        config["backends"] = [{"name": "b", "type": "openai", "url": engine.url}]
    (folder / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-c", MAIN, "{}", "serve"]
    command += ["-c", str(folder / "config.yaml"), "--port", str(port)]
    if engine is None:
        command.append("--demo")
    if descriptors is not None:
        limited = f'ulimit -n {descriptors} && exec "$@"'
        command = ["sh", "-c", limited, "sh", *command]
    child = Engine(port, command=command, log=folder / "log", env=env or {})
    running = Daemon(child)
    try:
        child.begin()
        await running.logs(lambda log: any(" listens on " in x["msg"] for x in log))
        if engine is not None:
            async with asyncio.timeout(PATIENCE):
                while not (await running.ask(models())).json["data"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        yield running
    finally:
        for wire in running.wires:
            wire.close()
        await asyncio.to_thread(child.stop)


def models() -> bytes:
    return request("/v1/models", method="GET", key=ALICE)


def chat(key: str = ALICE, **further: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | further
    return request(CHAT, json.dumps(body).encode(), key=key)


# --- slow clients --------------------------------------------------------------------


async def slow_head(daemon: Daemon) -> None:
    """Bytes of a head keep coming, one now and then."""
    wire = await daemon.connect()
    await drip(wire, b"GET /health HTTP/1.1\r\nHost: x\r\nA: ", b"b")


async def no_head(daemon: Daemon) -> None:
    wire = await daemon.connect()
    assert await wire.rest() == b""


async def slow_body(daemon: Daemon) -> None:
    """A body begins and does not go on."""
    wire = await daemon.connect()
    await wire.send(request(CHAT, b"{" * 10, key=ALICE, length=1000))
    assert (await wire.reply()).error["code"] == "request_timeout"
    assert await wire.rest() == b""


async def slow_reader(daemon: Daemon) -> None:
    """A stream without an end is asked for and not read."""
    wire = await daemon.connect()
    await wire.send(chat(stream=True))
    async with asyncio.timeout(PATIENCE):
        await wire.reader.readuntil(b"\r\n\r\n")
    wire.stop_reading()


async def drip(wire: Wire, head: bytes, more: bytes) -> None:
    """Send a byte every now and then until the daemon cuts."""
    ended = asyncio.ensure_future(wire.rest())
    at = 0
    async with asyncio.timeout(PATIENCE):
        while not ended.done():
            await wire.send(head[at : at + 1] or more)
            at += 1
            await asyncio.wait([ended], timeout=0.05)
    assert ended.result() == b""


async def endless(exchange: Exchange) -> None:
    """Stream for ever, or answer."""
    if not exchange.json.get("stream"):
        await exchange.answer({"choices": []})
        return
    await exchange.write(SSE_HEAD)
    words = chunk(event("x" * 50_000))
    with contextlib.suppress(ConnectionError):
        while not exchange.gone.is_set():
            await exchange.write(words)


SLOW_CLIENTS: tuple[Callable[[Daemon], Coroutine[Any, Any, None]], ...] = (
    slow_head,
    no_head,
    slow_body,
    slow_reader,
)
DEADLINES: dict[str, Any] = {"header_timeout": 1, "read_timeout": 1, "write_timeout": 1}


# A process of its own, or this one's work would count as waiting. Until its input
# ends it asks again and again, and then prints how long each answer took.
GOOD_CLIENT = """
import http.client, select, sys, time
port, *asked = sys.argv[1:]
while not select.select([sys.stdin], [], [], 0.05)[0]:
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
    for _ in range(10):
        began = time.perf_counter()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read(), answer.status
        print(time.perf_counter() - began, flush=True)
    connection.close()
"""


@contextlib.asynccontextmanager
async def good_client(daemon: Daemon) -> AsyncIterator[list[float]]:
    """A client that goes on asking; afterwards, the seconds that it waited."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GOOD_CLIENT, str(daemon.port), stdin=pipe, stdout=pipe
    )
    assert child.stdin is not None
    assert child.stdout is not None
    async with asyncio.timeout(PATIENCE):
        found = [float(await child.stdout.readline())]
    reading = asyncio.ensure_future(child.stdout.read())
    try:
        yield found
        child.stdin.close()
        async with asyncio.timeout(PATIENCE):
            found += map(float, (await reading).split())
            assert await child.wait() == 0
    finally:
        reading.cancel()
        if child.returncode is None:
            child.kill()
            await child.wait()


def p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


async def with_slow_clients(folder: Path, each: int) -> list[float]:
    """Have them all at once; the latencies of a good client meanwhile."""
    async with FakeEngine(behave=endless) as engine:
        async with daemon(folder, engine, **DEADLINES) as running:
            async with good_client(running) as waits:
                async with asyncio.TaskGroup() as group:
                    for client in SLOW_CLIENTS:
                        for _ in range(each):
                            group.create_task(client(running))
                # Nobody tells the readers of their end, since they do not read.
                streams = [x for x in engine.exchanges if x.json.get("stream")]
                assert len(streams) == each
                async with asyncio.timeout(PATIENCE):
                    for exchange in streams:
                        await exchange.gone.wait()
            assert running.faults == []
            return waits


async def test_slow_clients_are_cut_while_others_are_served(tmp_path: Path) -> None:
    assert len(await with_slow_clients(tmp_path, 10)) > 10


@slow
async def test_200_slow_clients_of_each_kind_do_not_keep_others_waiting(
    tmp_path: Path,
) -> None:
    found = await with_slow_clients(tmp_path, 200)
    print(f"p99 {p99(found) * 1000:.0f} ms of {len(found)}, worst {max(found):.3f} s")
    assert p99(found) < 0.25


# --- more connections than there is room for -----------------------------------------


async def flooded(folder: Path, connections: int) -> None:
    """Have many idle connections at a limit of 256 files, then serve."""
    async with daemon(folder, descriptors=256, header_timeout=PATIENCE) as running:

        async def stays() -> bool:
            """Whether this one was let in; the others are closed at once."""
            wire = await running.connect()
            await wire.send(HEALTH)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                return (await wire.reply()).status == 200
            return False

        before = len(running.log)
        let_in = sum(await asyncio.gather(*(stays() for _ in range(connections))))
        assert 50 < let_in < 200
        for wire in running.wires:
            wire.close()
        async with asyncio.timeout(PATIENCE):
            while not await is_served(running):  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.02)
        told = [line for line in running.log[before:] if line["msg"] != "request"]
        assert len(told) <= 60, f"{len(told)} lines: {told[:3]}"
        assert any("max_connections" in line["msg"] for line in told)
        assert running.faults == []


async def is_served(daemon: Daemon, what: bytes = HEALTH) -> bool:
    try:
        return (await daemon.ask(what)).status == 200
    except (OSError, asyncio.IncompleteReadError):
        return False


async def test_more_connections_than_files_are_survived_and_little_is_logged(
    tmp_path: Path,
) -> None:
    await flooded(tmp_path, 600)


@slow
async def test_1500_connections_at_a_limit_of_256_files_are_survived(
    tmp_path: Path,
) -> None:
    await flooded(tmp_path, 1500)


async def test_files_that_run_out_at_a_backend_are_told_and_come_back(
    tmp_path: Path,
) -> None:
    """Each client needs two: here the cap is set so high that they do run out."""

    async def silent(exchange: Exchange) -> None:
        await exchange.gone.wait()

    async with FakeEngine(behave=silent) as engine:
        async with daemon(
            tmp_path, engine, descriptors=64, max_connections=1000
        ) as running:
            before = len(running.log)
            wires = [await running.connect() for _ in range(100)]
            for wire in wires:
                await wire.send(chat())
            await running.logs(
                lambda log: any(x.get("error") == "overloaded" for x in log[before:])
            )
            for wire in wires:
                wire.close()
            async with asyncio.timeout(PATIENCE):
                for what in (HEALTH, models()):
                    while not await is_served(running, what):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            # Each request has its line and its reason. (asyncio tells besides that it
            # cannot accept; uvloop does not.)
            told = [x for x in running.log[before:] if not x["msg"].startswith("req")]
            assert len(told) <= 60, told[:5]
            assert any("no file descriptors left" in x["msg"] for x in told)
            blamed = [x for x in running.requests if "unavailable" in str(x)]
            assert not blamed, "it is no fault of the backend's"


# --- clients that leave --------------------------------------------------------------


async def test_many_that_leave_in_mid_stream_do_not_keep_others_waiting(
    tmp_path: Path,
) -> None:
    """30 streams of 5 MiB, all left at once; the engine stops working for them."""
    event_bytes, events, clients = 50_000, 105, 30

    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD)
        words = chunk(event("x" * event_bytes))
        with contextlib.suppress(ConnectionError):
            for _ in range(events):
                await exchange.write(words)
            await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        async with daemon(tmp_path, engine) as running:
            async with good_client(running) as waits:
                wires = [await running.connect() for _ in range(clients)]
                for wire in wires:
                    await wire.send(chat(stream=True))
                async with asyncio.timeout(PATIENCE):
                    for wire in wires:
                        await wire.reader.readexactly(3 * event_bytes)
                for wire in wires:
                    wire.close()
                async with asyncio.timeout(PATIENCE):
                    for exchange in engine.exchanges:
                        await exchange.gone.wait()
                await running.logs(
                    lambda log: sum(x.get("status") == 499 for x in log) == clients
                )
            assert running.faults == []
            if IS_SLOW:
                print(f"p99 {p99(waits) * 1000:.0f} ms, worst {max(waits) * 1000:.0f}")
                assert p99(waits) < 0.1


# --- forwarding headers --------------------------------------------------------------

SPOOFED = [
    ("X-Forwarded-For", "203.0.113.7"),
    ("X-Forwarded-For", "203.0.113.7, 127.0.0.1"),
    ("CF-Connecting-IP", "203.0.113.7"),
    ("X-Real-IP", "203.0.113.7"),
    ("Forwarded", "for=203.0.113.7;proto=https"),
    ("True-Client-IP", "203.0.113.7"),
    ("X-Client-IP", "203.0.113.7"),
    ("X-Forwarded-Host", "203.0.113.7"),
    ("X-Original-Forwarded-For", "203.0.113.7"),
    ("X_Forwarded_For", "203.0.113.7"),
]


async def test_who_says_it_comes_from_elsewhere_is_not_believed(tmp_path: Path) -> None:
    async with daemon(tmp_path) as running:
        for spoofed in SPOOFED:
            data = request("/health", method="GET", key=None, headers=[spoofed])
            assert (await running.ask(data)).status == 200
        # Another address each time would make guessing free.
        statuses = []
        for number in range(40):
            address = f"198.51.100.{number}"
            headers = [("X-Forwarded-For", address), ("CF-Connecting-IP", address)]
            guess = request(CHAT, key=f"sk-guess-{number:032}", headers=headers)
            statuses.append((await running.ask(guess)).status)
        assert statuses[:20] == [401] * 20
        assert statuses[-10:] == [429] * 10
        assert {line["client"] for line in running.requests} == {"127.0.0.1"}


async def test_a_trusted_proxy_is_believed(tmp_path: Path) -> None:
    async with daemon(tmp_path, trusted_proxies=["127.0.0.0/8"]) as running:
        headers = [("X-Forwarded-For", "198.51.100.1, 203.0.113.7")]
        await running.ask(request("/health", method="GET", key=None, headers=headers))
        await running.logs(
            lambda log: any(x.get("client") == "203.0.113.7" for x in log)
        )


# --- certificates --------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
async def test_broken_certificate_files_keep_the_old_certificate(
    tmp_path: Path,
) -> None:
    cert, key = make_pair(tmp_path, "old.example")
    tls = {"cert": str(cert), "key": str(key)}
    async with daemon(tmp_path, tls=tls) as running:

        async def served() -> str:
            async with asyncio.timeout(PATIENCE):
                return await served_name(running.port)

        assert await served() == "old"
        texts = (b"-----BEGIN CERTIFICATE-----\nxx\n", b"", b"\x00\xff")
        for number, broken in enumerate(texts if IS_SLOW else texts[:1]):
            cert.write_bytes(broken)
            before = len(running.log)
            running.signal(signal.SIGHUP)
            # The files are looked at by the clock; the signal is about the rest.
            await running.logs(
                lambda log, before=before: any(  # type: ignore[misc]
                    "certificate" in x["msg"] or "cert.pem" in x["msg"]
                    for x in log[before:]
                )
            )
            assert await served() == "old", number
        make_pair(tmp_path, "new.example")
        async with asyncio.timeout(PATIENCE):
            while await served() == "old":  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.05)
        assert running.engine.process is not None
        assert running.engine.process.is_running


# --- request smuggling ---------------------------------------------------------------
#
# Each vector is what one client sends through a proxy that sees fewer requests in it
# (or other ones) than we may see; the next bytes on that connection are another
# client's request. ``{body}`` is a chat request of the first client.

ATTACK = b'{"model":"m","messages":[{"role":"user","content":"a"}],"user":"alice"}'
HIDDEN = b'{"model":"m","messages":[{"role":"user","content":"a"}],"user":"hidden"}'


def framed(*fields: bytes, body: bytes, start: bytes = b"") -> bytes:
    """A chat request of the first client with these fields about its framing."""
    start = start or b"POST /v1/chat/completions HTTP/1.1"
    known = [b"Host: x", b"Authorization: Bearer " + ALICE.encode()]
    return b"\r\n".join([start, *known, *fields, b"", body])


def hidden() -> bytes:
    """A request that a proxy takes for a body, without a key."""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    )
    return head % len(HIDDEN) + HIDDEN


def pieces(body: bytes = ATTACK, size: bytes = b"", end: bytes = b"0\r\n\r\n") -> bytes:
    return b"%b\r\n%b\r\n%b" % (size or b"%x" % len(body), body, end)


def length(value: object) -> bytes:
    return f"Content-Length: {value}".encode()


N = len(ATTACK)
CL, TE = length(N), b"Transfer-Encoding: chunked"
SIZE = b"%x" % N

# Both say where the body ends, or one says it in a way that others read otherwise.
REFUSED_VECTORS: dict[str, bytes] = {
    "CL.TE": framed(length(4), TE, body=pieces() + hidden()),
    "CL.TE of nothing": framed(length(5), TE, body=b"0\r\n\r\n" + hidden()),
    "TE.CL": framed(TE, length(4), body=pieces() + hidden()),
    "TE.CL of all": framed(TE, CL, body=ATTACK),
    "TE and CL that agree": framed(TE, length(len(pieces())), body=pieces()),
    "CL 0 and TE": framed(length(0), TE, body=pieces()),
    **{
        f"TE written as {value!r}": framed(
            b"Transfer-Encoding:" + value, body=pieces() + hidden()
        )
        for value in (
            b" xchunked",
            b" chunked, identity",
            b" identity, chunked",
            b" identity",
            b" chunked, chunked",
            b" chunked,",
            b" ,chunked",
            b" chunked;q=1",
            b' "chunked"',
            b" chunked\x0b",
            b" \x0bchunked",
            b" chunked\x00",
            b" chunke\x64\x01",
            b" ch\xc3\xbcnked",
            b" gzip, chunked",
            b" chunked gzip",
            b" cow",
            b"",
        )
    },
    "TE with a space before the colon": framed(
        b"Transfer-Encoding : chunked", body=pieces() + hidden()
    ),
    "TE with a tab before the colon": framed(
        b"Transfer-Encoding\t: chunked", body=pieces() + hidden()
    ),
    "TE after a space": framed(b" Transfer-Encoding: chunked", body=pieces()),
    "TE folded": framed(b"Transfer-Encoding:\r\n chunked", body=pieces() + hidden()),
    "TE folded by a tab": framed(b"Transfer-Encoding:\r\n\tchunked", body=pieces()),
    "TE behind a folded field": framed(
        b"X: y\r\n Transfer-Encoding: chunked", CL, body=ATTACK
    ),
    "TE behind a bare CR": framed(b"X: y\rTransfer-Encoding: chunked", CL, body=ATTACK),
    "TE behind a bare LF": framed(b"X: y\nTransfer-Encoding: chunked", CL, body=ATTACK),
    "TE behind NUL": framed(b"X: y\x00\r\nTransfer-Encoding: chunked", body=pieces()),
    "TE with NUL in its name": framed(
        b"Transfer\x00-Encoding: chunked", CL, body=ATTACK
    ),
    "TE twice": framed(TE, TE, body=pieces() + hidden()),
    "TE twice, once nonsense": framed(TE, b"Transfer-Encoding: cow", body=pieces()),
    "TE twice, first nonsense": framed(b"Transfer-Encoding: cow", TE, body=pieces()),
    "TE without a colon": framed(b"Transfer-Encoding chunked", CL, body=ATTACK),
    "TE in HTTP/1.0": framed(
        TE, body=pieces() + hidden(), start=b"POST /v1/chat/completions HTTP/1.0"
    ),
    "CL twice, different": framed(CL, length(0), body=ATTACK),
    "CL twice, first shorter": framed(length(1), CL, body=ATTACK + hidden()),
    "CL twice, equal": framed(CL, CL, body=ATTACK),
    **{
        f"CL written as {value!r}": framed(b"Content-Length:" + value, body=ATTACK)
        for value in (
            b" +%d" % N,
            b" -%d" % N,
            b" -0",
            b" 0x%x" % N,
            b" 0o%o" % N,
            b" %d.0" % N,
            b" %de0" % N,
            b" %d, %d" % (N, N),
            b" %d, 0" % N,
            b" %d %d" % (N, N),
            b" %d;" % N,
            b' "%d"' % N,
            b" 1_0",
            b" %d\x00" % N,
            b" \x0b%d" % N,
            b" %d\x0c" % N,
            b" \xd9\xa2",
            b" \xc2\xb2",
            b"",
            b" ,%d" % N,
        )
    },
    "CL with a space before the colon": framed(
        b"Content-Length : %d" % N, body=ATTACK + hidden()
    ),
    "CL folded": framed(b"Content-Length:\r\n %d" % N, body=ATTACK),
    "CL behind a bare CR": framed(b"X: y\rContent-Length: 0", CL, body=ATTACK),
    **{
        f"a chunk's size written as {size!r}": framed(
            TE, body=pieces(size=size) + hidden()
        )
        for size in (
            b"0x" + SIZE,
            b"+" + SIZE,
            b"-" + SIZE,
            b"_" + SIZE,
            b" " + SIZE,
            SIZE + b"\x00",
            SIZE + b"\x0b",
            SIZE + b"h",
            SIZE + b"," + SIZE,
            SIZE + b"\n",
            SIZE + b"\r",
            b"g",
            b"\xd9\xa2",
            SIZE + b";a\nb",
        )
    },
    "a chunk without a size": framed(TE, body=b"\r\n" + pieces()),
    "a chunk that ends in LF": framed(TE, body=SIZE + b"\n" + ATTACK + b"\n0\n\n"),
    "a chunk that is longer": framed(TE, body=pieces(ATTACK + b"XX", size=SIZE)),
    "a chunk that is shorter": framed(TE, body=pieces(size=b"%x" % (N + 2))),
    "a last chunk of LF": framed(TE, body=pieces(end=b"0\n\n") + hidden()),
    "line feeds only": framed(CL, body=ATTACK).replace(b"\r\n", b"\n"),
    "carriage returns only": framed(CL, body=ATTACK).replace(b"\r\n", b"\r"),
    "CR CR LF": framed(b"X: y\r", CL, body=ATTACK),
    "a folded first field": framed(
        CL, body=ATTACK, start=b"POST /v1/chat/completions HTTP/1.1\r\n X: y"
    ),
    "two Hosts": framed(b"Host: y", CL, body=ATTACK),
    "a field without a name": framed(b": y", CL, body=ATTACK),
    "a name with a space": framed(b"X Y: z", CL, body=ATTACK),
    "a name in brackets": framed(b"X[y]: z", CL, body=ATTACK),
    "a second version": framed(
        CL, body=ATTACK, start=b"POST /v1/chat/completions HTTP/1.1 HTTP/1.1"
    ),
    "no version": framed(CL, body=ATTACK, start=b"POST /v1/chat/completions"),
    "HTTP/2.0": framed(CL, body=ATTACK, start=b"POST /v1/chat/completions HTTP/2.0"),
    "a space in the target": framed(
        CL, body=ATTACK, start=b"POST /v1/chat /completions HTTP/1.1"
    ),
    "NUL in the target": framed(
        CL, body=ATTACK, start=b"POST /v1/chat/completions\x00 HTTP/1.1"
    ),
}

# One parser or the other takes them for too much, or for something that is to come.
UNANSWERED_VECTORS: dict[str, bytes] = {
    "an endless length": framed(length(2**64 + 1), body=ATTACK),
    "a longer length": framed(length("9" * 32), body=ATTACK),
    "a chunk's size beyond 64 bits": framed(TE, body=pieces(size=b"f" * 17)),
    "a size beyond 64 bits that wraps": framed(
        TE, body=pieces(size=b"10000000000000000" + SIZE)
    ),
}

# How often the first client's own request is answered; -1: one parser takes it.
SERVED_VECTORS: dict[str, tuple[bytes, int]] = {
    "one request": (framed(CL, body=ATTACK), 1),
    "chunks": (framed(TE, body=pieces()), 1),
    "three requests at once": (framed(CL, body=ATTACK) * 3, 3),
    "chunks, then a length": (framed(TE, body=pieces()) + framed(CL, body=ATTACK), 1),
    "Chunked": (framed(b"Transfer-Encoding: Chunked", body=pieces()), 1),
    "a size with zeros": (framed(TE, body=pieces(size=b"000" + SIZE)), 1),
    "a size with an extension": (framed(TE, body=pieces(size=SIZE + b";a=b")), 1),
    "a length with zeros": (framed(length(f"00{N}"), body=ATTACK), 1),
    "another absolute form": (
        framed(CL, body=ATTACK, start=b"POST http://evil/v1/chat/completions HTTP/1.1"),
        1,
    ),
    "a request inside a body": (framed(length(len(hidden())), body=hidden()), 0),
    "a request behind one without a key": (hidden() + framed(CL, body=ATTACK), 1),
    "a request behind a GET's body": (
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
        % (len(hidden()), hidden()),
        0,
    ),
    "a key in a trailer": (
        framed(
            TE,
            body=pieces(end=b"0\r\nAuthorization: Bearer %b\r\n\r\n" % ALICE.encode()),
        ),
        1,
    ),
    "another's address in a trailer": (
        framed(TE, body=pieces(end=b"0\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n")),
        1,
    ),
    "CR in an extension": (framed(TE, body=pieces(size=SIZE + b";a\rb")), -1),
    "Content_Length": (framed(b"Content_Length: 3", CL, body=ATTACK), 1),
    "Transfer_Encoding": (framed(b"Transfer_Encoding: chunked", CL, body=ATTACK), 1),
    "Content-Length in Connection": (
        framed(b"Connection: Content-Length", CL, body=ATTACK),
        1,
    ),
}


PARSERS = {"C": "", "Python": "1"}  # AIOHTTP_NO_EXTENSIONS


@pytest.mark.parametrize("parser", PARSERS)
async def test_smuggled_requests_reach_no_backend_nor_take_another_name(
    tmp_path: Path, parser: str
) -> None:
    """What reaches the engine is in the log, once, and under the key that sent it."""
    served = {name: data for name, (data, _) in SERVED_VECTORS.items()}
    vectors = REFUSED_VECTORS | UNANSWERED_VECTORS | served
    assert len(vectors) >= 60
    body = CHAT_BODY.replace(b"}]", b'}],"user":"bob"')
    innocent = request(CHAT, body, key=BOB, headers=[("Connection", "close")])
    statuses: dict[str, list[int]] = {}

    async with FakeEngine() as engine:
        env = {"AIOHTTP_NO_EXTENSIONS": PARSERS[parser]}
        short: dict[str, Any] = {"header_timeout": 1, "read_timeout": 0.5}
        async with daemon(tmp_path, engine, env=env, **short) as running:

            async def attack(name: str) -> None:
                wire = await running.connect()
                # The innocent one's request follows on the same connection, at once
                # and after a while, as proxies share theirs.
                await wire.send(vectors[name] + innocent)
                found = statuses[name] = []
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    while True:
                        found.append((await wire.reply()).status)

            names = list(vectors)
            for at in range(0, len(names), 16):
                await asyncio.gather(*map(attack, names[at : at + 16]))
            reached = [json.loads(x.request.body).get("user") for x in engine.exchanges]
            await running.logs(
                lambda log: sum("backend" in x for x in log) == len(reached)
            )

            for name in REFUSED_VECTORS:
                assert statuses[name] == [400], (name, statuses[name])
            for name in UNANSWERED_VECTORS:
                assert statuses[name] in ([400], [408], [413]), (name, statuses[name])
            for name, (_, count) in SERVED_VECTORS.items():
                assert statuses[name].count(200) >= count, (name, statuses[name])
            own = reached.count("alice")
            most = sum(abs(count) for _, count in SERVED_VECTORS.values())
            assert most - 1 <= own <= most
            assert reached.count("hidden") == 0
            assert reached.count("bob") + own == len(reached)
            keys = {x["id"]: x["key"] for x in running.log if "backend" in x}
            for exchange in engine.exchanges:
                key = keys.pop(exchange.request.header("x-request-id"))
                assert key == exchange.json["user"]
            assert keys == {}
            assert running.faults == []
