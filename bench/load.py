"""The load generator: one job, one process, one line of JSON as the result.

``python -m bench.load JOB`` where JOB is the JSON of ``Job``. Connections are raw
protocols on the event loop that hold one request each (a closed loop), so the cost of
asking is small beside the cost of proxying. Everything that comes back is checked: an
answer must be the mock's to the byte, a stream must have every event in order, its
``[DONE]`` and its last chunk. What is not so is counted under ``errors``, by kind.

Every job ends by itself: each has a time, a count, or both as its limit.
"""

import argparse
import asyncio
import gc
import json
import os
import ssl
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final, TypeVar, cast

from bench import machine, wire

HOST: Final = "127.0.0.1"

#: Heads of answers are well below 1 KiB; a proxy may add some.
MAX_HEAD_BYTES: Final = 65536

#: How much longer than planned a job may take before it counts as stuck.
GRACE_SECONDS: Final = 15.0

#: No job sends more requests than this, whatever its time allows.
MAX_REQUESTS: Final = 5_000_000

#: Events of one stream that is not paced: 5 MB.
FLOOD_CHUNKS: Final = 20_000


class Malformed(Exception):
    """The answer is not the HTTP/1.1 that was expected."""


class AnswerParser:
    """One HTTP/1.1 answer: bytes in, body bytes out. Trailers are not accepted."""

    __slots__ = ("_chunked", "_left", "_rest", "complete", "status")

    def __init__(self) -> None:
        self.status = 0  # 0 until the head is there
        self.complete = False  # the framing says that nothing more will come
        self._chunked = False
        self._left = 0  # bytes of the body or chunk still to come
        self._rest = b""  # an incomplete head or chunk line

    def feed(self, data: bytes) -> bytes:
        """The body bytes in ``data``.

        Raises:
            Malformed: broken framing, or bytes beyond the end of the answer.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at = 0
        if not self.status:
            at = self._head(data)
            if not at:
                self._rest = data
                return b""
        if self._chunked:
            return self._chunks(data, at)
        body = data[at:] if at else data
        if len(body) > self._left:
            raise Malformed("bytes beyond the end")
        self._left -= len(body)
        self.complete = not self._left
        return body

    def _head(self, data: bytes) -> int:
        """Read the head; how long it is, or 0 if it is not complete."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise Malformed("endless head")
            return 0
        head = data[: end + 2].lower()
        if not head.startswith(b"http/1.1 "):
            raise Malformed("not HTTP/1.1")
        self.status = int(head[9:12])
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            self._left = int(head[at + 17 : head.index(b"\r\n", at + 17)])
        elif b"\r\ntransfer-encoding: chunked\r\n" in head:
            self._chunked = True
        else:
            raise Malformed("no framing")
        return end + 4

    def _chunks(self, data: bytes, at: int) -> bytes:
        pieces = []
        while at < len(data):
            if self.complete:
                raise Malformed("bytes beyond the end")
            # ``_left`` includes the line end behind the chunk.
            if self._left > 2:
                piece = data[at : at + self._left - 2]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                self._rest = data[at:]
                break
            if self._left:
                if line_end != at:
                    raise Malformed("chunk longer than announced")
                self._left = 0
                at += 2
                continue
            size = int(data[at:line_end], 16)
            at = line_end + 2
            if size:
                self._left = size + 2
            elif len(data) < at + 2:
                self._rest = data[line_end - 1 :]  # "0\r\n": seen again with the rest
                break
            else:
                if data[at : at + 2] != b"\r\n":
                    raise Malformed("trailers")
                at += 2
                self.complete = True
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class StreamReader:
    """The events of one streamed answer: are they all there, and how late were they."""

    __slots__ = ("_expected", "_next", "_tail", "errors", "is_done")

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._next = 0
        self._tail = b""
        self.is_done = False  # [DONE] was seen
        self.errors: list[str] = []

    @property
    def events(self) -> int:
        """Content events that came so far."""
        return self._next

    @property
    def is_whole(self) -> bool:
        """Every event in its order, then ``[DONE]``, then nothing."""
        return (
            self.is_done
            and not self.errors
            and not self._tail
            and self._next == self._expected
        )

    def feed(self, data: bytes) -> list[int]:
        """The sending times (ns, monotonic) of the content events that are complete."""
        if self._tail:
            data = self._tail + data
        lines = data.split(b"\n\n")
        self._tail = lines.pop()
        sent = []
        for line in lines:
            found = wire.read_event(line)
            if found is None:
                self._other(line)
                continue
            number, sent_ns = found
            if number != self._next:
                self.errors.append("event out of order")
            self._next = number + 1
            sent.append(sent_ns)
        return sent

    def _other(self, line: bytes) -> None:
        if line.startswith(b":") or line + b"\n\n" == wire.FINISH:
            return
        if line + b"\n\n" == wire.DONE:
            self.is_done = True
        elif line.startswith(b'data: {"error"'):
            self.errors.append("error event")
        elif b'"usage"' in line:
            # Nobody asked for it here; a proxy that did has to take it out again.
            self.errors.append("usage that was not asked for")
        else:
            self.errors.append("foreign event")


@dataclass(frozen=True, slots=True)
class Job:
    """What to do, to whom, for how long."""

    kind: str  # one of KINDS
    port: int
    key: str
    connections: int = 1
    warm_seconds: float = 0.0  # not measured
    seconds: float = 1.0  # measured
    count: int = MAX_REQUESTS  # at most that many requests
    body_bytes: int = 1024
    interval_us: int = 7000  # between two events of a paced stream
    proxy_pid: int | None = None  # whose CPU and memory are read
    mock_pid: int | None = None
    ca_file: str | None = None  # TLS, with certificates that these have signed
    # Ports that are asked in turns, by name; the first is what others are held against.
    ports: dict[str, int] = field(default_factory=dict)
    # Further processes whose CPU is read, together under each name.
    pids: dict[str, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class Result:
    """What came of a job; numbers are absent where they were not measured."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """What the connections of one job report, while ``is_counting``."""

    is_counting: bool = False
    is_over: bool = False  # no further requests
    started: int = 0  # requests sent, warm-up included
    answers: int = 0  # whole answers or streams
    events: int = 0
    latencies_ns: "array[int]" = field(default_factory=lambda: array("q"))
    lags_ns: "array[int]" = field(default_factory=lambda: array("q"))
    errors: Counter[str] = field(default_factory=Counter)


class Connection(asyncio.Protocol):
    """One keep-alive connection that asks again as soon as it has its answer."""

    def __init__(
        self, tally: Tally, request: bytes, limit: int, *, chunks: int = 0
    ) -> None:
        self._tally = tally
        self._request = request
        self._limit = limit  # requests of the whole job
        self._chunks = chunks  # events in each answer; 0: a plain answer
        self._transport: asyncio.Transport | None = None
        self._parser = AnswerParser()
        self._reader = StreamReader(chunks)
        self._body = b""
        self._asked_ns = 0
        self._is_waiting = False  # a request is out
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_event: asyncio.Future[None] = (
            asyncio.get_running_loop().create_future()
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's, but do the same.
        self._transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        """Send the next request, or close if the job is over."""
        tally = self._tally
        if tally.is_over or tally.started >= self._limit:
            self.close()
            return
        assert self._transport is not None
        tally.started += 1
        self._parser = AnswerParser()
        self._reader = StreamReader(self._chunks)
        self._body = b""
        self._is_waiting = True
        self._asked_ns = time.monotonic_ns()
        self._transport.write(self._request)

    def leave(self) -> None:
        """Take no more of this answer."""
        self._is_waiting = False
        self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if not self.finished.done():
            self.finished.set_result(None)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        try:
            body = self._parser.feed(data)
        except (Malformed, ValueError) as error:
            self._fail(str(error))
            return
        if self._parser.status not in (0, 200):
            self._fail(f"status {self._parser.status}")
            return
        if self._chunks:
            self._stream(body, now)
        else:
            self._plain(body, now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._is_waiting:
            self._fail("connection cut")
        self.close()

    def _plain(self, body: bytes, now: int) -> None:
        self._body = self._body + body if self._body else body
        if not self._parser.complete:
            return
        if self._body != wire.ANSWER:
            self._fail("answer differs")
            return
        tally = self._tally
        if tally.is_counting:
            tally.answers += 1
            tally.latencies_ns.append(now - self._asked_ns)
        self._is_waiting = False
        self.ask()

    def _stream(self, body: bytes, now: int) -> None:
        reader, tally = self._reader, self._tally
        is_first = not reader.events
        sent = reader.feed(body)
        if sent and is_first:
            if tally.is_counting:
                tally.latencies_ns.append(now - self._asked_ns)
            if not self.first_event.done():
                self.first_event.set_result(None)
        if tally.is_counting:
            tally.events += len(sent)
            for sent_ns in sent:
                tally.lags_ns.append(now - sent_ns)
        if not self._parser.complete:
            return
        self._is_waiting = False
        if not reader.is_whole:
            self._fail(reader.errors[0] if reader.errors else "stream incomplete")
            return
        tally.answers += 1
        self.ask()

    def _fail(self, why: str) -> None:
        """Count what went wrong; this connection does no more."""
        self._is_waiting = False
        self._tally.errors[why] += 1
        self.close()


class Turned(Connection):
    """One that asks only when it is told to."""

    _answered: "asyncio.Future[None] | None" = None

    async def ask_once(self) -> None:
        """Ask, and wait for the whole answer or the end of the connection."""
        self._answered = asyncio.get_running_loop().create_future()
        super().ask()
        await self._answered

    def ask(self) -> None:
        """The answer is whole."""
        self._over()

    def close(self) -> None:
        super().close()
        self._over()

    def _over(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)


@dataclass(slots=True)
class Gauge:
    """Clock and CPU at one moment; two of them make a window."""

    wall: float
    proxy: float | None
    load: float  # this process and the mock
    busy: float | None  # the whole machine
    parts: dict[str, float]  # the further processes, by name

    @classmethod
    def read(cls, job: Job) -> "Gauge":
        own = time.process_time()
        if job.mock_pid is not None:
            own += machine.cpu_seconds(job.mock_pid)
        proxy = None
        if job.proxy_pid is not None:
            proxy = machine.cpu_seconds(job.proxy_pid)
        parts = {
            name: sum(map(machine.cpu_seconds, pids)) for name, pids in job.pids.items()
        }
        return cls(time.monotonic(), proxy, own, machine.busy_seconds(), parts)

    def values_since(self, start: "Gauge") -> dict[str, float]:
        """Seconds, the load side's share of a core, and what others took of all."""
        seconds = self.wall - start.wall
        values = {"seconds": seconds, "load_share": (self.load - start.load) / seconds}
        ours = self.load - start.load
        if self.proxy is not None and start.proxy is not None:
            values["proxy_cpu_s"] = self.proxy - start.proxy
            ours += values["proxy_cpu_s"]
        for name, cpu in self.parts.items():
            values[f"{name}_cpu_s"] = cpu - start.parts[name]
            ours += values[f"{name}_cpu_s"]
        if self.busy is not None and start.busy is not None:
            others = max(0.0, self.busy - start.busy - ours)
            values["foreign_share"] = others / seconds / (os.cpu_count() or 1)
        return values


_Kind = TypeVar("_Kind", bound=Connection)


async def connect(job: Job, tally: Tally, order: wire.Order) -> list[Connection]:
    """The connections of a job, open and ready to ask for what the order says."""
    return await connect_as(Connection, job, tally, order)


async def connect_as(
    kind: type[_Kind], job: Job, tally: Tally, order: wire.Order
) -> list[_Kind]:
    """The same, of this class."""
    loop = asyncio.get_running_loop()
    body = wire.body(order, job.body_bytes)
    request = wire.request(body, job.key, f"{HOST}:{job.port}")
    context = ssl.create_default_context(cafile=job.ca_file) if job.ca_file else None
    connections = []
    for _ in range(job.connections):
        _, connection = await loop.create_connection(
            lambda: kind(tally, request, job.count, chunks=order.chunks),
            HOST,
            job.port,
            ssl=context,
        )
        connections.append(connection)
    return connections


async def _window(job: Job, tally: Tally, *, until: Sequence[Connection] = ()) -> Gauge:
    """Count for the job's time, or until these connections are finished."""
    await asyncio.sleep(job.warm_seconds)
    start = Gauge.read(job)
    tally.is_counting = True
    if until:
        await asyncio.wait([c.finished for c in until], timeout=job.seconds)
    else:
        await asyncio.sleep(job.seconds)
    tally.is_counting = False
    return start


async def _finish(connections: Sequence[Connection]) -> None:
    for connection in connections:
        await connection.finished


def _percentiles(name: str, values: "array[int]") -> dict[str, float]:
    """Median and 99th percentile, from nanoseconds to microseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        f"{name}_p50_us": ordered[last // 2] / 1000,
        f"{name}_p99_us": ordered[last * 99 // 100] / 1000,
    }


async def requests(job: Job) -> Result:
    """Plain answers, one after another on every connection."""
    tally = Tally()
    connections = await connect(job, tally, wire.Order())
    for connection in connections:
        connection.ask()
    start = await _window(job, tally, until=connections)
    values = Gauge.read(job).values_since(start)
    tally.is_over = True
    await _finish(connections)
    values["answers"] = tally.answers
    values["per_second"] = tally.answers / values["seconds"]
    if tally.answers and "proxy_cpu_s" in values:
        values["cpu_us"] = values["proxy_cpu_s"] / tally.answers * 1e6
    values |= _percentiles("latency", tally.latencies_ns)
    return Result(values, dict(tally.errors))


async def first_byte(job: Job) -> Result:
    """Short streams, one after another: the time from asking to the first event."""
    tally = Tally(is_counting=True)
    # The second event comes a moment later, so that work on it is not in the way.
    connections = await connect(job, tally, wire.Order(chunks=2, interval_us=1000))
    for connection in connections:
        connection.ask()
    await asyncio.wait([c.finished for c in connections], timeout=job.seconds)
    tally.is_over = True
    await _finish(connections)
    values = {"answers": float(tally.answers)}
    values |= _percentiles("first_byte", tally.latencies_ns)
    return Result(values, dict(tally.errors))


async def turns(job: Job) -> Result:
    """As ``first_byte``, by several ways in turns: a mood of the machine meets all.

    ``added`` is the median of the differences within each turn.
    """
    order = wire.Order(chunks=2, interval_us=1000)
    tallies = {name: Tally(is_counting=True) for name in job.ports}
    ways = [
        way
        for name, port in job.ports.items()
        for way in await connect_as(
            Turned, replace(job, port=port), tallies[name], order
        )
    ]
    for number in range(job.count):
        first = number % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            if not way.finished.done():  # else it has failed
                await way.ask_once()
    _leave(ways)
    values = {"answers": float(sum(tally.answers for tally in tallies.values()))}
    base, *_ = tallies.values()
    for name, tally in tallies.items():
        values |= _percentiles(f"{name}_first_byte", tally.latencies_ns)
        pairs = zip(tally.latencies_ns, base.latencies_ns, strict=False)
        added = array("q", (one - other for one, other in pairs))
        values |= _percentiles(f"{name}_added", added)
    errors = sum((tally.errors for tally in tallies.values()), Counter[str]())
    return Result(values, dict(errors))


async def paced(job: Job) -> Result:
    """Streams side by side, each event at its time: CPU per event, and lateness."""
    tally = Tally()
    connections = await _begin_paced(job, tally)
    start = await _window(job, tally)
    values = Gauge.read(job).values_since(start)
    await _finish(connections)
    values["events"] = tally.events
    values["answers"] = tally.answers
    offered = job.connections * values["seconds"] / (job.interval_us / 1e6)
    values["offered_share"] = tally.events / offered
    if tally.events and "proxy_cpu_s" in values:
        values["cpu_us"] = values["proxy_cpu_s"] / tally.events * 1e6
    values |= _percentiles("lag", tally.lags_ns)
    return Result(values, dict(tally.errors))


async def _begin_paced(job: Job, tally: Tally) -> list[Connection]:
    """Paced streams, each of them about to begin."""
    interval = job.interval_us / 1e6
    # Enough for all streams to be running from before the window until after it.
    total = job.warm_seconds + job.seconds + 0.3
    order = wire.Order(int(total / interval) + 1, job.interval_us)
    connections = await connect(replace(job, count=job.connections), tally, order)
    loop = asyncio.get_running_loop()
    for index, connection in enumerate(connections):
        # Spread over one interval: tokens of different streams do not come together.
        loop.call_later(index * interval / len(connections), connection.ask)
    return connections


async def flood(job: Job) -> Result:
    """Streams side by side, as fast as everything on the way takes them."""
    tally = Tally()
    connections = await connect(job, tally, wire.Order(FLOOD_CHUNKS))
    for connection in connections:
        connection.ask()
    start = await _window(job, tally)
    values = Gauge.read(job).values_since(start)
    _leave(connections)
    values["events"] = tally.events
    values["per_second"] = tally.events / values["seconds"]
    return Result(values, dict(tally.errors))


async def beside(job: Job) -> Result:
    """Paced streams beside one that is not: how late are their events."""
    tally, bulk = Tally(), Tally()
    alone = replace(job, connections=1)
    floods = await connect(alone, bulk, wire.Order(wire.MAX_CHUNKS))
    floods[0].ask()
    connections = await _begin_paced(job, tally)
    bulk.is_counting = True
    began = time.monotonic()
    await _window(job, tally)
    tally.is_counting = False
    seconds = time.monotonic() - began
    _leave(floods)
    await _finish(connections)
    values = {"bulk_bytes_s": bulk.events * wire.EVENT_BYTES / seconds}
    values["events"] = tally.events
    values |= _percentiles("lag", tally.lags_ns)
    return Result(values, dict(tally.errors + bulk.errors))


def _leave(connections: Sequence[Connection]) -> None:
    """Go in the middle of the streams; that is no error."""
    for connection in connections:
        connection.leave()


async def hold(job: Job) -> Result:
    """Streams that wait for their second event: what an open one costs in memory."""
    tally = Tally()
    values: dict[str, float] = {}
    order = wire.Order(chunks=2, interval_us=int(job.seconds * 1e6))
    limited = Job(**{**asdict(job), "count": job.connections})
    before = machine.rss_bytes(job.proxy_pid) if job.proxy_pid else 0
    connections = await connect(limited, tally, order)
    for connection in connections:
        connection.ask()
    _, late = await asyncio.wait(
        [c.first_event for c in connections], timeout=GRACE_SECONDS
    )
    if late:
        tally.errors["stream did not begin"] += len(late)
    elif job.proxy_pid:
        grown = machine.rss_bytes(job.proxy_pid) - before
        values["kib_per_stream"] = grown / 1024 / job.connections
    await _finish(connections)
    values["answers"] = tally.answers
    return Result(values, dict(tally.errors))


KINDS: Final[dict[str, Callable[[Job], Coroutine[None, None, Result]]]] = {
    "requests": requests,
    "first_byte": first_byte,
    "turns": turns,
    "paced": paced,
    "flood": flood,
    "beside": beside,
    "hold": hold,
}


async def carry_out(job: Job) -> Result:
    """Do the job; one that is stuck ends with the error ``stuck``."""
    limit = job.warm_seconds + job.seconds + GRACE_SECONDS
    try:
        async with asyncio.timeout(limit):
            return await KINDS[job.kind](job)
    except TimeoutError:
        return Result(errors={"stuck": 1})
    except OSError as error:
        return Result(errors={f"cannot connect: {error.strerror}": 1})


async def _main(job: Job) -> None:
    gc.freeze()
    result = await carry_out(job)
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.load", description=__doc__)
    parser.add_argument("job", help="the JSON of a Job")
    job = Job(**json.loads(parser.parse_args().job))
    machine.run(_main(job), fast_loop=True)
