"""The answer parser: the same outcome however the input is cut, and no leniency."""

import random
from collections.abc import Iterable, Iterator

import pytest

from inferencia.http1 import (
    MAX_CHUNK_LINE_BYTES,
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    MAX_INTERIM,
    MAX_TRAILER_BYTES,
    AnswerParser,
    request_head,
)
from seeds import seeds

# As llama-server (cpp-httplib) sends a stream.
LLAMA_STREAM = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n"
    b"X-Accel-Buffering: no\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n"
    b'1b\r\ndata: {"choices":[{"delta":\r\n'
    b'16\r\n{"content":"Say"}}]}\n\n\r\n'
    b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)
LLAMA_BODY = b'data: {"choices":[{"delta":{"content":"Say"}}]}\n\ndata: [DONE]\n\n'
# As mlx_lm (Python's http.server) does: no length, the end of the stream is the end.
MLX_STREAM = (
    b"HTTP/1.0 200 OK\r\nServer: BaseHTTP/0.6 Python/3.11.7\r\n"
    b"Date: Sun, 22 Nov 2026 00:45:23 GMT\r\nContent-type: text/event-stream\r\n"
    b"Cache-Control: no-cache\r\n\r\n: keepalive 1/1\n\ndata: {}\n\ndata: [DONE]\n\n"
)
JSON = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}'

Outcome = tuple[object, ...]


def outcome_of(pieces: Iterable[bytes], *, method: str = "GET") -> Outcome:
    """Everything that a caller can learn, once the pieces and then the end came."""
    parser = AnswerParser(method)
    body = b"".join([parser.feed(piece) for piece in pieces])
    was_over = parser.is_over
    parser.eof()
    return (
        parser.status,
        parser.headers,
        parser.length,
        body,
        was_over,
        parser.fault is None,
        parser.is_cut,
        parser.has_surplus,
        parser.keep_alive,
    )


def bytewise(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def parsed(data: bytes, *, method: str = "GET", eof: bool = False) -> AnswerParser:
    """The parser after ``data``, having checked that bytes alone say the same."""
    assert outcome_of([data], method=method) == outcome_of(
        bytewise(data), method=method
    )
    parser = AnswerParser(method)
    parser.feed(data)
    if eof:
        parser.eof()
    return parser


def body_of(data: bytes) -> bytes:
    return AnswerParser("GET").feed(data)


def answer(*fields: str, body: bytes = b"", status: str = "HTTP/1.1 200 OK") -> bytes:
    return "\r\n".join([status, *fields, "", ""]).encode("latin-1") + body


def chunked(body: bytes) -> bytes:
    return answer("Transfer-Encoding: chunked", body=body)


WHOLE_ANSWERS = {
    "llama-server": LLAMA_STREAM,
    "mlx_lm": MLX_STREAM,
    "json": JSON,
    "interim": b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Hints\r\nA: b\r\n\r\n"
    + JSON,
    "trailers": chunked(b"3;a=b\r\nabc\r\n0\r\nDigest: x\r\nMore: y\r\n\r\n"),
    "no content": answer(status="HTTP/1.1 204 No Content"),
    "surplus": JSON + b"HTTP/1.1 200 OK\r\n\r\n",
    "surplus after chunks": LLAMA_STREAM + b"\r\n",
    "cut length": JSON[:-3],
    "cut chunk": LLAMA_STREAM[:-20],
    "cut head": JSON[:20],
    "bad size": chunked(b"3\r\nabc\r\nxyz\r\nabc\r\n0\r\n\r\n"),
    "chunk longer than its size": chunked(b"3\r\nabcd\r\n0\r\n\r\n"),
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n",
    "bare LF": JSON.replace(b"\r\n", b"\n"),
    "malformed field": answer("A : b", "Content-Length: 0"),
}


@pytest.mark.parametrize("name", WHOLE_ANSWERS)
def test_the_outcome_does_not_depend_on_where_the_input_is_cut(name: str) -> None:
    data = WHOLE_ANSWERS[name]
    whole = outcome_of([data])
    assert outcome_of(bytewise(data)) == whole
    for cut in range(len(data) + 1):
        assert outcome_of([data[:cut], data[cut:]]) == whole, f"cut at {cut}"


@pytest.mark.parametrize("seed", seeds(40, 200))
def test_mutated_answers_have_one_outcome_however_they_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(rng.choice(list(WHOLE_ANSWERS.values())))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        piece = rng.choice([b"\r", b"\n", b"\r\n", b"0", b"\x00", b":", b";", b"f"])
        data[place : place + rng.randint(0, 2)] = piece
    whole = outcome_of([bytes(data)])
    assert outcome_of(bytewise(bytes(data))) == whole, bytes(data)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(data) + 1), 3))
        starts, ends = [0, *cuts], [*cuts, len(data)]
        pieces = [bytes(data[a:b]) for a, b in zip(starts, ends, strict=True)]
        assert outcome_of(pieces) == whole, pieces


@pytest.mark.parametrize("seed", range(50))
def test_chunks_of_any_size_and_cut_give_back_the_body(seed: int) -> None:
    rng = random.Random(seed)
    chunks = [rng.randbytes(rng.randint(1, 600)) for _ in range(rng.randint(1, 30))]
    framed = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]
    data = chunked(b"".join(framed) + b"0\r\n\r\n")
    parser = AnswerParser("POST")
    body = b""
    while data:
        size = rng.randint(1, 900)
        body += parser.feed(data[:size])
        data = data[size:]
    assert body == b"".join(chunks)
    assert parser.is_over and parser.fault is None and parser.keep_alive


def test_a_llama_server_stream_is_unwrapped() -> None:
    parser = parsed(LLAMA_STREAM)
    assert parser.status == 200
    assert parser.headers == (
        ("server", "llama.cpp"),
        ("access-control-allow-origin", ""),
        ("x-accel-buffering", "no"),
        ("content-type", "text/event-stream"),
        ("transfer-encoding", "chunked"),
        ("keep-alive", "timeout=5, max=100"),
    )
    assert body_of(LLAMA_STREAM) == LLAMA_BODY
    assert parser.is_over and parser.keep_alive
    assert (parser.keep_alive_seconds, parser.keep_alive_requests) == (5, 100)


def test_an_mlx_lm_stream_ends_with_the_connection_and_is_not_kept_alive() -> None:
    parser = parsed(MLX_STREAM)
    assert not parser.is_over and parser.length is None and not parser.keep_alive
    parser.eof()
    assert parser.is_over and parser.fault is None


def test_a_reset_is_not_the_end_of_a_body() -> None:
    parser = parsed(MLX_STREAM)
    parser.eof(clean=False)
    assert parser.is_cut and parser.fault is not None


def test_a_read_of_plain_body_bytes_is_handed_on_without_a_copy() -> None:
    for head in (
        answer("Content-Length: 100000"),
        answer(status="HTTP/1.0 200 OK"),
        chunked(b"186a0\r\n"),
    ):
        parser = AnswerParser("GET")
        assert parser.feed(head) == b""
        data = bytes(50_000)
        assert parser.feed(data) is data


def test_a_read_of_several_chunks_comes_as_one_piece() -> None:
    parser = AnswerParser("GET")
    parser.feed(chunked(b""))
    assert parser.feed(b"3\r\nabc\r\n2\r\nde\r\n") == b"abcde"


@pytest.mark.parametrize(
    ("fields", "keep_alive"),
    [
        ([], True),
        (["Connection: close"], False),
        (["Connection: Close, x"], False),
        (["Connection: x", "Connection: CLOSE"], False),
        (["Connection: keep-alive"], True),
    ],
)
def test_http_11_is_kept_alive_unless_told_otherwise(
    fields: list[str], keep_alive: bool
) -> None:
    assert parsed(answer("Content-Length: 0", *fields)).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("fields", "keep_alive"),
    [
        ([], False),
        (["Connection: close"], False),
        (["Connection: Keep-Alive"], True),
        (["Connection: keep-alive, close"], False),
    ],
)
def test_http_10_is_kept_alive_only_when_told_so(
    fields: list[str], keep_alive: bool
) -> None:
    data = answer("Content-Length: 0", *fields, status="HTTP/1.0 200 OK")
    assert parsed(data).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("value", "seconds", "requests"),
    [
        ("timeout=5, max=100", 5, 100),
        ("Timeout = 7", 7, None),
        ("max=1", None, 1),
        ("timeout=x, max=-1", None, None),
        ("", None, None),
    ],
)
def test_keep_alive_hints_are_read_and_odd_ones_ignored(
    value: str, seconds: int | None, requests: int | None
) -> None:
    parser = parsed(answer("Content-Length: 0", f"Keep-Alive: {value}"))
    assert parser.keep_alive_seconds == seconds
    assert parser.keep_alive_requests == requests


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_content_end_with_their_head(status: int) -> None:
    data = answer("Content-Length: 5", status=f"HTTP/1.1 {status} x")
    parser = parsed(data)
    assert parser.is_over and parser.fault is None and parser.length == 0


def test_the_answer_to_head_ends_with_its_head() -> None:
    for framing in ("Content-Length: 5", "Transfer-Encoding: chunked"):
        parser = parsed(answer(framing), method="HEAD")
        assert parser.is_over and parser.fault is None and parser.keep_alive


def test_what_comes_after_the_end_is_surplus_and_no_body() -> None:
    for data in (JSON, LLAMA_STREAM, answer(status="HTTP/1.1 204 x")):
        assert not parsed(data).has_surplus
        parser = parsed(data + b"\n")
        assert parser.has_surplus and parser.fault is None
        assert body_of(data + b"\n") == body_of(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\r\n" + JSON, id="empty line first"),
        pytest.param(answer(status="HTTP/2.0 200 OK"), id="version 2"),
        pytest.param(answer(status="HTTP/0.9 200 OK"), id="version 0.9"),
        pytest.param(answer(status="HTTP/1.2 200 OK"), id="version 1.2"),
        pytest.param(answer(status="http/1.1 200 OK"), id="lower case"),
        pytest.param(answer(status="HTTP/1.1  200 OK"), id="two spaces"),
        pytest.param(answer(status="HTTP/1.1 20 OK"), id="two digits"),
        pytest.param(answer(status="HTTP/1.1 2000 OK"), id="four digits"),
        pytest.param(answer(status="HTTP/1.1 099 OK"), id="below 100"),
        pytest.param(answer(status="HTTP/1.1 600 OK"), id="above 599"),
        pytest.param(answer(status="HTTP/1.1 +20 OK"), id="sign"),
        pytest.param(answer(status="HTTP/1.1 200 O\x01K"), id="control in reason"),
        pytest.param(answer("A: b", " c", "Content-Length: 0"), id="folded line"),
        pytest.param(answer("A : b"), id="space before colon"),
        pytest.param(answer(": b"), id="no name"),
        pytest.param(answer("A b: c"), id="space in name"),
        pytest.param(answer("\xe9: b"), id="name not ASCII"),
        pytest.param(answer("A"), id="no colon"),
        pytest.param(answer("A: b\x00c"), id="NUL"),
        pytest.param(answer("A: b\rc"), id="bare CR"),
        pytest.param(answer("A: b\nc: d"), id="bare LF"),
        pytest.param(answer("A: b\x7f"), id="DEL"),
        pytest.param(
            answer("Content-Length: 5", "Transfer-Encoding: chunked"), id="both"
        ),
        pytest.param(answer("Content-Length: 5", "Content-Length: 6"), id="two"),
        pytest.param(answer("Content-Length: 5, 6"), id="unequal list"),
        pytest.param(answer("Content-Length: 5,"), id="half a list"),
        pytest.param(answer("Content-Length: +5"), id="signed length"),
        pytest.param(answer("Content-Length: -1"), id="negative length"),
        pytest.param(answer("Content-Length: 0x5"), id="hex length"),
        pytest.param(answer("Content-Length: 1_0"), id="underscored length"),
        pytest.param(answer("Content-Length: "), id="empty length"),
        pytest.param(answer("Content-Length: 1" + "0" * 15), id="huge length"),
        pytest.param(answer("Content-Length: \xb2"), id="superscript length"),
        pytest.param(answer("Transfer-Encoding: gzip, chunked"), id="gzip"),
        pytest.param(answer("Transfer-Encoding: identity"), id="identity"),
        pytest.param(answer("Transfer-Encoding: xchunked"), id="xchunked"),
        pytest.param(answer("Transfer-Encoding: "), id="empty coding"),
        pytest.param(
            answer("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
            id="chunked twice",
        ),
        pytest.param(
            answer("Transfer-Encoding: chunked", status="HTTP/1.0 200 OK"),
            id="chunks in HTTP/1.0",
        ),
        pytest.param(answer(status="HTTP/1.1 101 Switching"), id="101"),
    ],
)
def test_a_doubtful_head_is_a_fault(data: bytes) -> None:
    parser = parsed(data)
    assert parser.is_over and parser.fault and not parser.is_cut
    assert parser.status == 0 and not parser.keep_alive


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"x\r\nabc\r\n0\r\n\r\n", id="no digit"),
        pytest.param(b"\r\nabc\r\n0\r\n\r\n", id="empty size"),
        pytest.param(b"0x3\r\nabc\r\n0\r\n\r\n", id="0x"),
        pytest.param(b"+3\r\nabc\r\n0\r\n\r\n", id="plus"),
        pytest.param(b"-3\r\nabc\r\n0\r\n\r\n", id="minus"),
        pytest.param(b" 3\r\nabc\r\n0\r\n\r\n", id="blank before"),
        pytest.param(b"3 \r\nabc\r\n0\r\n\r\n", id="blank after"),
        pytest.param(b"0_3\r\nabc\r\n0\r\n\r\n", id="underscore"),
        pytest.param(b"3\nabc\r\n0\r\n\r\n", id="bare LF"),
        pytest.param(b"3;a\nabc\r\n0\r\n\r\n", id="bare LF after extension"),
        pytest.param(b"3;a\rb\r\nabc\r\n0\r\n\r\n", id="bare CR in extension"),
        pytest.param(b"3;a\x00\r\nabc\r\n0\r\n\r\n", id="NUL in extension"),
        pytest.param(b"0000000000000003\r\nabc\r\n0\r\n\r\n", id="16 digits"),
        pytest.param(b"3\r\nabc0\r\n\r\n", id="no line end after the data"),
        pytest.param(b"3\r\nabc\n0\r\n\r\n", id="bare LF after the data"),
        pytest.param(b"3\r\nabcd\r\n0\r\n\r\n", id="longer than its size"),
        pytest.param(b"0\r\nA\r\n\r\n", id="malformed trailer"),
        pytest.param(b"0\r\n a: b\r\n\r\n", id="folded trailer"),
        pytest.param(b"0\r\na: b\n\r\n", id="bare LF in trailers"),
        pytest.param(b"0\r\n\n", id="bare LF at the end"),
    ],
)
def test_a_doubtful_chunk_is_a_fault(data: bytes) -> None:
    parser = parsed(chunked(data))
    assert parser.status == 200
    assert parser.is_over and parser.fault and not parser.is_cut
    assert not parser.keep_alive and not parser.has_surplus


def test_what_came_before_a_fault_is_handed_on() -> None:
    parser = AnswerParser("GET")
    assert parser.feed(chunked(b"3\r\nabc\r\n2\r\ndeX")) == b"abcde"
    assert parser.fault


def test_a_hopeless_beginning_is_a_fault_at_once() -> None:
    for data in (b"S", b"HTTP/2", b"HTTP/1.1 200 OK\n"):
        assert parsed(data).fault, data
    for data in (b"z", b"3;\x01", b"3\r\nabcX"):
        assert parsed(chunked(data)).fault, data


def test_equal_lengths_count_as_one() -> None:
    for fields in (["Content-Length: 5, 5"], ["Content-Length: 5"] * 2):
        parser = parsed(answer(*fields, body=b"12345"))
        assert parser.is_over and parser.fault is None and parser.length == 5


def test_a_head_as_large_as_allowed_passes_and_one_byte_more_does_not() -> None:
    fixed = len(answer("Content-Length: 0", "A: "))
    for surplus in (0, 1):
        padding = "x" * (MAX_HEAD_BYTES - fixed + surplus)
        parser = parsed(answer("Content-Length: 0", f"A: {padding}"))
        assert (parser.fault is None) is (surplus == 0)


def test_a_head_without_end_is_a_fault() -> None:
    parser = parsed(b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000)
    assert parser.fault


def test_as_many_fields_as_allowed_pass_and_one_more_does_not() -> None:
    for surplus in (0, 1):
        fields = [f"X-{i}: {i}" for i in range(MAX_FIELDS - 1 + surplus)]
        parser = parsed(answer("Content-Length: 0", *fields))
        assert (parser.fault is None) is (surplus == 0)


def test_a_flood_of_interim_answers_is_a_fault() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert parsed(interim * MAX_INTERIM + JSON).status == 200
    assert parsed(interim * (MAX_INTERIM + 1) + JSON).fault


def test_an_interim_answer_says_nothing_about_the_final_one() -> None:
    parser = parsed(b"HTTP/1.1 103 Hints\r\nContent-Length: 3\r\nX: y\r\n\r\n" + JSON)
    assert parser.headers == (("content-length", "11"),)


def test_chunk_extensions_are_bounded() -> None:
    room = MAX_CHUNK_LINE_BYTES - len(b"3;\r\n")
    for surplus in (0, 1):
        extension = b"x" * (room + surplus)
        parser = parsed(chunked(b"3;%b\r\nabc\r\n0\r\n\r\n" % extension))
        assert (parser.fault is None) is (surplus == 0)


def test_trailers_are_bounded_and_dropped() -> None:
    room = MAX_TRAILER_BYTES - len(b"A: \r\n\r\n")
    for surplus in (0, 1):
        trailer = b"A: %b\r\n" % (b"x" * (room + surplus))
        parser = parsed(chunked(b"0\r\n%b\r\n" % trailer))
        assert (parser.fault is None) is (surplus == 0)
        assert parser.headers == (("transfer-encoding", "chunked"),)


def test_values_lose_the_blanks_around_them_and_keep_bytes_above_ascii() -> None:
    parser = parsed(answer("Content-Length: 0", "X-A:\t b c \t", "X-B: \xe9"))
    assert parser.headers[1:] == (("x-a", "b c"), ("x-b", "\xe9"))


def test_a_request_head_has_host_length_and_the_given_fields() -> None:
    head = request_head(
        "POST", "/v1/chat?x=1", "h:1", [("Accept", "*/*"), ("X-Empty", "")], 5
    )
    assert head == (
        b"POST /v1/chat?x=1 HTTP/1.1\r\nHost: h:1\r\nConnection: keep-alive\r\n"
        b"Content-Length: 5\r\nAccept: */*\r\nX-Empty: \r\n\r\n"
    )


def test_an_empty_post_says_its_length_and_an_empty_get_does_not() -> None:
    assert b"Content-Length: 0\r\n" in request_head("POST", "/", "h", [], 0)
    assert b"Content-Length" not in request_head("GET", "/", "h", [], 0)
    assert b"Content-Length: 2\r\n" in request_head("DELETE", "/", "h", [], 2)


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET /x", "/", []),
        ("", "/", []),
        ("GET", "x", []),
        ("GET", "http://h/", []),
        ("GET", "/a b", []),
        ("GET", "/a\r\nX: y", []),
        ("GET", "/a#b", []),
        ("GET", "/\xe9", []),
        ("GET", "/", [("A", "b\r\nC: d")]),
        ("GET", "/", [("A", "b\r\n")]),
        ("GET", "/", [("A", "b\nc")]),
        ("GET", "/", [("A", "b\x00")]),
        ("GET", "/", [("A", "\u20ac")]),
        ("GET", "/", [("A: b\r\nC", "d")]),
        ("GET", "/", [("A: b", "d")]),
        ("GET", "/", [("A ", "d")]),
        ("GET", "/", [("", "d")]),
        ("GET", "/", [("Host", "x")]),
        ("GET", "/", [("content-LENGTH", "1")]),
        ("GET", "/", [("Transfer-Encoding", "chunked")]),
        ("GET", "/", [("Connection", "close")]),
        ("GET", "/", [("Expect", "100-continue")]),
        ("GET", "/", [("Upgrade", "websocket")]),
    ],
)
def test_a_request_that_would_not_stay_one_message_is_refused(
    method: str, target: str, headers: list[tuple[str, str]]
) -> None:
    with pytest.raises(ValueError):
        request_head(method, target, "h", headers, 0)


def test_a_refused_value_is_not_in_the_message() -> None:
    with pytest.raises(ValueError) as caught:
        request_head("GET", "/", "h", [("Authorization", "Bearer sk-1\r\n")], 0)
    assert "Authorization" in str(caught.value)
    assert "sk-1" not in str(caught.value)
