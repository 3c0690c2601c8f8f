"""What goes over a tunnel's sockets: frames of WebSocket, messages, and the carrier."""

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gateway import PATIENCE, eventually
from inferencia.tunnel import frames, wire
from inferencia.tunnel.carrier import Carrier, Channel, PeerLost, WebSocket
from inferencia.tunnel.frames import FrameReader, Opcode, Piece, frame
from inferencia.tunnel.session import wanted

MODEL = wire.Model("m", {"id": "m", "context_length": 8192})
MESSAGES: tuple[wire.Message, ...] = (
    wire.Register(1, "gpu-home", "i" * 36, None, "inferencia/1", 16, 4, (MODEL,)),
    wire.Registered("s", True, "gpu-home", "r", ("m",), ("x",), 15.0, 30.0),
    wire.Pool(7, 3),
    wire.Status(4, 1, 2, 3),
    wire.Models((MODEL,)),
    wire.ModelsOk(("m",), ()),
    wire.Drain(30.0, "it is shutting down", (0.0, 5.0)),
    wire.Drained(),
    wire.Bye("unauthorized", "the key was revoked", 300.0),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.kind)
def test_a_message_arrives_as_it_was_sent(message: wire.Message) -> None:
    assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.kind)
def test_a_member_that_a_newer_peer_added_is_ignored(message: wire.Message) -> None:
    members = json.loads(wire.encode(message)) | {"colour": "green"}
    assert wire.decode(json.dumps(members)) == message


def test_an_unknown_kind_of_message_is_ignored() -> None:
    assert wire.decode('{"t": "dance", "steps": 3}') is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"t": 1}',
        "[" * 100_000,
        '{"t":"pool"',
        '{"t":"pool","target":-1}',
        '{"t":"pool","target":1e9}',
        '{"t":"pool","target":true}',
        '{"t":"pool","target":5000}',
        '{"t":"status","live":"4"}',
        '{"t":"register","instance":5}',
        '{"t":"register","instance":"a\\nb"}',
        '{"t":"register","instance":"' + "x" * 501 + '"}',
        '{"t":"register","instance":"a","models":{}}',
        '{"t":"register","instance":"a","models":[{"id":""}]}',
        '{"t":"register","instance":"a","models":[{"id":"' + "x" * 257 + '"}]}',
        '{"t":"register","instance":"a","models":[{"id":"a","x":NaN}]}',
        '{"t":"models","models":[' + ",".join(['{"id":"a"}'] * 1001) + "]}",
        '{"t":"drain","deadline":-1}',
        '{"t":"drain","deadline":1,"reconnect_after":[1,2,3]}',
        '{"t":"bye","retry_after":"soon"}',
    ],
)
def test_what_is_no_proper_message_is_refused(text: str) -> None:
    with pytest.raises(wire.BadMessage):
        wire.decode(text)


def test_a_model_list_is_cut_to_what_a_message_holds() -> None:
    many = tuple(
        wire.Model(f"m{i}", {"id": f"m{i}", "x": "y" * 900}) for i in range(999)
    )
    kept = wire.fitting(many)
    assert 200 < len(kept) < 300
    assert len(wire.encode(wire.Models(kept))) <= wire.MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("in_use", "waiting", "expected"),
    [(0, 0, 4), (1, 0, 5), (10, 3, 16), (16, 0, 16), (16, 9, 16), (0, 2, 6)],
)
def test_the_target_is_what_is_in_use_and_wanted_and_some_to_spare(
    in_use: int, waiting: int, expected: int
) -> None:
    assert wanted(in_use=in_use, waiting=waiting, spare=4, most=16) == expected


def test_no_more_are_spared_than_there_may_be() -> None:
    assert wanted(in_use=0, waiting=0, spare=4, most=2) == 2


# --- frames ----------------------------------------------------------------------

SIZES = (0, 1, 125, 126, 127, 65_535, 65_536, 100_000)


def read(reader: FrameReader, data: bytes, cuts: list[int]) -> list[Piece]:
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        pieces += reader.feed(data[start:end])
    return pieces


def joined(pieces: list[Piece]) -> list[tuple[int, bytes]]:
    """Whole messages and control frames, in the order in which they ended."""
    found, parts = [], []
    for opcode, data, is_last in pieces:
        if opcode >= Opcode.CLOSE:
            found.append((opcode, data))
            continue
        parts.append(data)
        if is_last:
            found.append((opcode, b"".join(parts)))
            parts = []
    return found


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_frame_is_read_as_it_was_written(size: int, is_masked: bool) -> None:
    payload = random.Random(size).randbytes(size)
    data = frame(Opcode.BINARY, payload, is_masked=is_masked)
    reader = FrameReader(expects_masked=is_masked)
    assert joined(reader.feed(data * 2)) == [(Opcode.BINARY, payload)] * 2
    assert reader.fault is None


@pytest.mark.parametrize("is_masked", [False, True])
def test_frames_mean_the_same_wherever_they_are_cut(is_masked: bool) -> None:
    def framed(opcode: Opcode, payload: bytes) -> bytes:
        return frame(opcode, payload, is_masked=is_masked)

    first = bytearray(framed(Opcode.BINARY, b"first half, "))
    first[0] &= 0x7F  # not the last of its message
    data = (
        bytes(first)
        + framed(Opcode.PING, b"are you there")
        + framed(Opcode.CONTINUATION, b"second half")
        + framed(Opcode.TEXT, "ü".encode())
        + framed(Opcode.BINARY, b"x" * 200)
        + framed(Opcode.CLOSE, frames.close_payload(frames.CloseCode.NORMAL, "bye"))
    )
    expected = [
        (Opcode.PING, b"are you there"),
        (Opcode.BINARY, b"first half, second half"),
        (Opcode.TEXT, "ü".encode()),
        (Opcode.BINARY, b"x" * 200),
        (Opcode.CLOSE, b"\x03\xe8bye"),
    ]
    cuts = [[at] for at in range(len(data))]
    cuts.append(list(range(1, len(data))))  # byte by byte
    for places in cuts:
        reader = FrameReader(expects_masked=is_masked)
        assert joined(read(reader, data, places)) == expected, places
        assert reader.fault is None


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\xc2\x00", "reserved bits"),
        (b"\x83\x00", "unknown opcode 3"),
        (b"\x8b\x00", "unknown opcode 11"),
        (b"\x82\x80", "a masked frame"),
        (b"\x09\x00", "control frame"),
        (b"\x89\x7e", "control frame"),
        (b"\x80\x00", "continuation of nothing"),
        (b"\x02\x01a\x82\x01b", "within another"),
        (b"\x82\x7e\x00\x05", "shortest form"),
        (b"\x82\x7f" + (5).to_bytes(8), "shortest form"),
        (b"\x82\x7f" + (2**20 + 1).to_bytes(8), "a frame of 1048577 bytes"),
        (b"\x82\x7f" + b"\xff" * 8, "a frame of"),
    ],
)
def test_what_is_no_proper_frame_is_a_fault(data: bytes, fault: str) -> None:
    for cuts in ([], list(range(1, len(data)))):
        reader = FrameReader(expects_masked=False)
        read(reader, data, cuts)
        assert fault in (reader.fault or "")
        assert reader.feed(frame(Opcode.BINARY, b"x", is_masked=False)) == []


def test_a_server_refuses_what_is_not_masked() -> None:
    reader = FrameReader(expects_masked=True)
    reader.feed(frame(Opcode.BINARY, b"x", is_masked=False))
    assert reader.fault == "an unmasked frame"


@pytest.mark.parametrize("seed", range(20))
def test_garbage_never_raises(seed: int) -> None:
    noise = random.Random(seed)
    reader = FrameReader(expects_masked=bool(seed % 2))
    for _ in range(50):
        reader.feed(noise.randbytes(noise.randrange(40)))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 1001])
def test_the_slow_way_to_mask_is_as_good_as_the_fast_one(size: int) -> None:
    data, mask = random.Random(size).randbytes(size), b"\x01\xfe\x80\x7f"
    slow = bytearray(data)
    frames.mask_in_python(mask, slow)
    assert bytes(slow) == frames.masked(data, mask)
    assert frames.masked(frames.masked(data, mask), mask) == data


def test_the_accept_value_is_that_of_the_standard() -> None:
    # RFC 6455, 1.3
    key, accept = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert frames.is_key(key)
    assert frames.accept_of(key) == accept
    assert not frames.is_key("c2hvcnQ=") and not frames.is_key("ü")


# --- the carrier -----------------------------------------------------------------


class Book(asyncio.Protocol):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.transport: Carrier | None = None
        self.received = bytearray()
        self.is_paused = False
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, Carrier)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


@contextlib.asynccontextmanager
async def joined_by_a_socket(
    agent: WebSocket, relay: WebSocket
) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """Both ends over one pair of sockets."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    one, _ = await loop.create_connection(lambda: agent, sock=ours)
    other, _ = await loop.create_connection(lambda: relay, sock=theirs)
    try:
        yield ours, theirs
    finally:
        one.abort()
        other.abort()
        for _ in range(3):
            await asyncio.sleep(0)


def carriers(beat: float = 60.0) -> tuple[Book, Carrier, Book, Carrier]:
    agent, relay = Book(), Book()
    return (
        agent,
        Carrier(agent, is_client=True, beat=beat, peer="relay"),
        relay,
        Carrier(relay, is_client=False, beat=beat, peer="agent"),
    )


async def test_bytes_arrive_in_order_in_both_directions() -> None:
    agent, at_agent, relay, at_relay = carriers()
    noise = random.Random(1)
    sent = [noise.randbytes(noise.choice((1, 10, 70_000))) for _ in range(200)]
    async with joined_by_a_socket(at_agent, at_relay):
        for part in sent:
            at_agent.write(part)
            at_relay.write(part)
            if noise.random() < 0.2:
                await asyncio.sleep(0)
        whole = b"".join(sent)
        await eventually(lambda: len(relay.received) == len(whole), "all went up")
        await eventually(lambda: len(agent.received) == len(whole), "all came down")
        assert relay.received == agent.received == whole


async def test_what_is_written_before_closing_still_arrives() -> None:
    _, at_agent, relay, at_relay = carriers()
    async with joined_by_a_socket(at_agent, at_relay):
        at_agent.write(b"last words")
        at_agent.close()
        at_agent.write(b"too late")
        await eventually(lambda: bool(relay.lost), "the other end is told")
        assert relay.received == b"last words"
        assert relay.lost == [None]


async def test_who_writes_is_paused_by_who_does_not_read() -> None:
    agent, at_agent, relay, at_relay = carriers()
    async with joined_by_a_socket(at_agent, at_relay):
        at_relay.pause_reading()
        total = 0
        while not agent.is_paused:
            at_agent.write(b"x" * 60_000)
            total += 60_000
            assert total < 50_000_000, "nobody says that it is enough"
            await asyncio.sleep(0)
        assert not relay.received
        at_relay.resume_reading()
        await eventually(lambda: len(relay.received) == total, "all of it arrives")
        assert not agent.is_paused


async def test_a_peer_that_is_silent_for_two_and_a_half_beats_is_gone() -> None:
    book = Book()
    end = Carrier(book, is_client=True, beat=0.02, peer="relay")
    silent = asyncio.Protocol()
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    one, _ = await loop.create_connection(lambda: end, sock=ours)
    other, _ = await loop.create_connection(lambda: silent, sock=theirs)
    await eventually(lambda: bool(book.lost), "it is noticed")
    assert isinstance(book.lost[0], PeerLost)
    assert "silent" in str(book.lost[0])
    other.abort()
    one.abort()
    await asyncio.sleep(0)


async def test_two_ends_that_only_ping_stay_together() -> None:
    agent, at_agent, relay, at_relay = carriers(beat=0.01)
    async with joined_by_a_socket(at_agent, at_relay):
        async with asyncio.timeout(PATIENCE):
            for _ in range(20):
                assert await at_agent.ping() < PATIENCE
        await eventually(lambda: at_relay.round_trip is not None, "it was answered")
        assert not agent.lost and not relay.lost


async def test_our_own_pause_is_not_the_peers_silence() -> None:
    """Neither for who does not read, nor for who cannot write."""
    agent, at_agent, relay, at_relay = carriers(beat=0.01)
    async with joined_by_a_socket(at_agent, at_relay):
        at_relay.pause_reading()
        while not agent.is_paused:
            at_agent.write(b"x" * 60_000)
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        over = loop.time() + 0.1  # ten beats
        await eventually(lambda: loop.time() > over, "time passes")
        assert not relay.lost and not agent.lost
        at_relay.resume_reading()
        await eventually(lambda: not agent.is_paused, "it goes on")


async def test_a_fault_cuts_the_connection_once() -> None:
    agent, at_agent, relay, at_relay = carriers()
    async with joined_by_a_socket(at_agent, at_relay) as (ours, _):
        ours.send(b"GET / HTTP/1.1\r\n\r\n")
        await eventually(lambda: bool(relay.lost), "it is cut")
        at_relay.abort()
        at_relay.close()
        await eventually(lambda: bool(agent.lost), "the other end is told")
        assert len(relay.lost) == len(agent.lost) == 1
        assert isinstance(relay.lost[0], PeerLost)


async def test_text_is_not_taken_for_bytes() -> None:
    agent, at_agent, relay, at_relay = carriers()
    async with joined_by_a_socket(at_agent, at_relay):
        at_agent._send(Opcode.TEXT, b"hello")
        await eventually(lambda: bool(relay.lost), "it is cut")
        assert not relay.received and not agent.received


async def test_a_ping_is_cancelled_when_the_connection_ends() -> None:
    _, at_agent, _, at_relay = carriers()
    async with joined_by_a_socket(at_agent, at_relay):
        at_relay.pause_reading()
        ping = at_agent.ping()
        at_agent.abort()
        with pytest.raises(asyncio.CancelledError):
            await ping
        assert at_agent.ping().cancelled()


def channels(
    on_agent: Callable[[str], None], on_relay: Callable[[str], None]
) -> tuple[Channel, Channel, list[Any]]:
    lost: list[Any] = []

    def end(is_client: bool, take: Callable[[str], None]) -> Channel:
        return Channel(
            is_client=is_client,
            beat=60.0,
            on_message=take,
            on_lost=lambda error: lost.append((is_client, error)),
        )

    return end(True, on_agent), end(False, on_relay), lost


async def test_messages_are_handed_on_whole() -> None:
    got: list[str] = []
    agent, relay, lost = channels(got.append, got.append)
    async with joined_by_a_socket(agent, relay):
        agent.send("hello")
        agent.send("ü" * 100_000)
        await eventually(lambda: len(got) == 2, "both arrive")
        assert got == ["hello", "ü" * 100_000]
        assert not lost


@pytest.mark.parametrize(
    ("opcode", "payload"),
    [
        (Opcode.BINARY, b"bytes"),
        (Opcode.TEXT, b"\xff"),
        (Opcode.TEXT, b"x" * (wire.MAX_MESSAGE_BYTES + 1)),
    ],
)
async def test_a_message_that_is_none_ends_the_channel(
    opcode: Opcode, payload: bytes
) -> None:
    got: list[str] = []
    agent, relay, lost = channels(got.append, got.append)
    async with joined_by_a_socket(agent, relay):
        agent._send(opcode, payload)
        await eventually(lambda: len(lost) == 2, "both ends are told")
        assert not got


async def test_what_ends_before_it_began_is_told_once() -> None:
    book = Book()
    carrier = Carrier(book, is_client=False, beat=60.0, peer="agent")
    carrier.abort()
    carrier.close()
    assert len(book.lost) == 1
