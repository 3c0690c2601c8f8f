"""The name in a ClientHello: read from whole, cut, fragmented and broken ones."""

import itertools
import random
import ssl

import pytest

from inferencia.tunnel.clienthello import (
    DECODE_ERROR,
    MAX_HELLO_BYTES,
    UNRECOGNIZED_NAME,
    BadHello,
    HelloReader,
)

NAME = "gpu1.example.com"


def real_hello(
    name: str | None = NAME, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> bytes:
    """What OpenSSL says first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    said = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), said, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return said.read()


def vector(size: int, content: bytes) -> bytes:
    return len(content).to_bytes(size) + content


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2) + vector(2, content)


def sni(name: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, bytes((kind,)) + vector(2, name)))


def made_hello(
    *extensions: bytes,
    session: bytes = b"",
    suites: bytes = b"\x13\x01",
    compression: bytes = b"\0",
    behind: bytes = b"",
) -> bytes:
    """A handshake message without its record."""
    body = b"\3\3" + bytes(32) + vector(1, session) + vector(2, suites)
    body += vector(1, compression) + vector(2, b"".join(extensions)) + behind
    return b"\1" + vector(3, body)


def record(*fragments: bytes, kind: int = 22) -> bytes:
    return b"".join(bytes((kind, 3, 1)) + vector(2, part) for part in fragments)


def name_in(data: bytes) -> str | None:
    reader = HelloReader()
    reader.feed(data)
    return reader.name


def refused(data: bytes) -> BadHello:
    with pytest.raises(BadHello) as caught:
        name_in(data)
    return caught.value


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_name_is_found_in_what_openssl_says(version: ssl.TLSVersion) -> None:
    assert name_in(real_hello(version=version)) == NAME


def test_at_every_cut_the_name_is_found_when_all_is_there_and_not_before() -> None:
    hello = real_hello()
    for cut in range(len(hello)):
        reader = HelloReader()
        assert not reader.feed(hello[:cut])
        assert reader.name is None
        assert reader.feed(hello[cut:])
        assert reader.name == NAME
        assert reader.received == hello


def test_byte_by_byte_gives_the_same_name() -> None:
    hello = real_hello()
    reader = HelloReader()
    known = [reader.feed(bytes((byte,))) for byte in hello]
    assert known == [False] * (len(hello) - 1) + [True]
    assert reader.name == NAME


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_a_message_may_be_spread_over_many_records(size: int) -> None:
    message = made_hello(extension(65535, bytes(50)), sni(NAME.encode()))
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    assert name_in(record(*parts)) == NAME


def test_what_comes_behind_the_message_is_kept_and_not_read() -> None:
    hello = real_hello()
    behind = record(b"early data", kind=23)
    reader = HelloReader()
    assert reader.feed(hello + behind)
    assert reader.received == hello + behind


def test_a_name_is_told_in_lower_case() -> None:
    assert name_in(record(made_hello(sni(b"GPU1.Example.COM")))) == NAME


@pytest.mark.parametrize(
    "message",
    [
        made_hello(sni(NAME.encode()), sni(NAME.encode())),
        made_hello(extension(10, b""), sni(NAME.encode()), extension(10, b"")),
        made_hello(extension(0, vector(2, b"\0" + vector(2, b"a.b")) + b"\0")),
        made_hello(
            extension(0, vector(2, (b"\0" + vector(2, b"a.b")) * 2))
        ),
        made_hello(extension(0, b"")),
        made_hello(extension(0, vector(2, b""))),
        made_hello(extension(0, b"\xff\xff\0\0\3a.b")),
        made_hello(sni(NAME.encode(), kind=1)),
        made_hello(sni("gpu1.exämple.com".encode())),
        made_hello(sni(NAME.encode()), session=bytes(33)),
        made_hello(sni(NAME.encode()), suites=b""),
        made_hello(sni(NAME.encode()), suites=b"\x13"),
        made_hello(sni(NAME.encode()), compression=b""),
        made_hello(sni(NAME.encode()), behind=b"\0"),
        made_hello(sni(NAME.encode()) + b"\0"),
        made_hello(sni(NAME.encode())) + b"\0",
        b"\1" + vector(3, b""),
        b"\2" + made_hello(sni(NAME.encode()))[1:],
        b"\1\xff\xff\xff",
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(message: bytes) -> None:
    assert refused(record(message)).alert == DECODE_ERROR


@pytest.mark.parametrize(
    "name", [b"", b"127.0.0.1", b"::1", b"gpu1.example.com.", b"-a.b", b"a..b", b"*.b",
             b"a b", b"a\0.example.com", b"a" * 64 + b".b", b"a." * 127 + b"b.c"]
)  # fmt: skip
def test_a_name_that_no_host_has_is_not_known(name: bytes) -> None:
    assert refused(record(made_hello(sni(name)))).alert == UNRECOGNIZED_NAME


def test_without_a_name_nobody_is_meant() -> None:
    assert refused(real_hello(None)).alert == UNRECOGNIZED_NAME
    assert refused(record(made_hello())).alert == UNRECOGNIZED_NAME
    without_extensions = b"\3\3" + bytes(32) + b"\0\0\2\x13\1\1\0"
    message = b"\1" + vector(3, without_extensions)
    assert refused(record(message)).alert == UNRECOGNIZED_NAME


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"SSH-2.0-x\r\n", bytes(5),
                                  b"\x80\x2e\1\0\2", b"\x16\2\0\0\1\1"])  # fmt: skip
def test_who_does_not_speak_tls_gets_no_alert(data: bytes) -> None:
    assert refused(data).alert == b""


@pytest.mark.parametrize("size", [0, (1 << 14) + 1])
def test_records_of_a_length_that_is_not_allowed_are_refused(size: int) -> None:
    assert refused(b"\x16\3\1" + size.to_bytes(2)).alert == DECODE_ERROR


def test_another_record_between_the_fragments_is_refused() -> None:
    message = made_hello(sni(NAME.encode()))
    broken = record(message[:9]) + record(b"\1\0", kind=21) + record(message[9:])
    assert refused(broken).alert == b""


def test_what_is_kept_of_a_stranger_is_bounded() -> None:
    reader = HelloReader()
    with pytest.raises(BadHello):
        for _ in range(MAX_HELLO_BYTES):
            reader.feed(record(b"\1\0\x3f" if not reader.received else b"\0"))
    assert len(reader.received) < MAX_HELLO_BYTES + 16
    padded = made_hello(extension(21, bytes(MAX_HELLO_BYTES - 200)))
    assert refused(record(padded[:9000], padded[9000:])).alert == UNRECOGNIZED_NAME


@pytest.mark.parametrize("seed", range(20))
def test_garbage_gives_a_name_or_a_refusal_however_it_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    hello = bytearray(real_hello())
    for _ in range(60):
        data = bytearray(hello)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        whole = outcome([bytes(data)])
        cuts = sorted(rng.randrange(len(data)) for _ in range(3))
        ends = [0, *cuts, len(data)]
        pieces = [bytes(data[a:b]) for a, b in itertools.pairwise(ends)]
        assert outcome(pieces) == whole
    for _ in range(200):
        outcome([rng.randbytes(rng.randrange(300))])
        outcome([b"\x16\3\1" + rng.randbytes(rng.randrange(300))])
        outcome([record(b"\1" + vector(3, rng.randbytes(rng.randrange(300))))])


def outcome(pieces: list[bytes]) -> str | None:
    """The name, None if there is more to come, or what is wrong."""
    reader = HelloReader()
    try:
        for piece in pieces:
            reader.feed(piece)
    except BadHello as error:
        return f"refused: {error}"
    return reader.name
