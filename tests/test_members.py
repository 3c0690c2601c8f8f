"""Promises of ``members.py``: exact bytes, strict JSON, and no surprises later."""

import json
import random
import string
from typing import Any

import pytest

from inferencia.errors import InvalidJson
from inferencia.members import (
    MAX_MEMBERS,
    MAX_VALUES,
    REMOVED,
    Members,
)
from seeds import seeds

# Documents that https://github.com/nst/JSONTestSuite refuses, as members' values,
# and the ones of its list that are about objects and the whole text.
REFUSED_VALUES = [
    b"NaN",
    b"-NaN",
    b"nan",
    b"Infinity",
    b"-Infinity",
    b"+Inf",
    b"-",
    b"+1",
    b"++1234",
    b"-01",
    b"012",
    b"-012",
    b"1.",
    b"2.e3",
    b".123",
    b"-.5",
    b"0e",
    b"0e+",
    b"1.0e-",
    b"1eE2",
    b"1 000.0",
    b"0x1",
    b"0x42",
    b"1a",
    b"1_000",
    "\uff11".encode(),
    b"tru",
    b"nul",
    b"True",
    b"None",
    b"'single'",
    b"unquoted",
    b'"unclosed',
    b'"\t"',
    b'"\n"',
    b'"\x00"',
    b'"\\x00"',
    b'"\\a"',
    b'"\\"',
    b'"\\u00A"',
    b'"\\uqqqq"',
    b'"\\ud8z""',
    b'"\\ud834\\u"',
    b"[",
    b"[1",
    b"[1,]",
    b"[,1]",
    b"[1,,2]",
    b"[1 2]",
    b"[1:2]",
    b"[\x0b]",
    b"[1]]",
    b"]",
    b"{",
    b'{"b"}',
    b'{"b":}',
    b'{"b":1,}',
    b"{1:1}",
    b"",
    b"/**/1",
    b"1//",
    b"\xc2\xa01",
    b"\xe2\x81\xa01",
    b"\xef\xbb\xbf1",
]

REFUSED_BODIES = [
    b"",
    b" ",
    b"null",
    b"1",
    b'"model"',
    b"[]",
    b'["model"]',
    b"{",
    b"}",
    b"{{}",
    b"{,}",
    b'{"a"',
    b'{"a":',
    b'{"a":1',
    b'{"a":1,',
    b'{"a":1,}',
    b'{"a":1,,"b":2}',
    b'{,"a":1}',
    b'{"a" 1}',
    b'{"a"::1}',
    b'{"a":1 "b":2}',
    b"{a:1}",
    b"{'a':1}",
    b'{"a\n":1}',
    b'{"a\\q":1}',
    b'{"a":1}}',
    b'{"a":1}{"b":2}',
    b'{"a":1}#',
    b'{"a":1}\x00',
    b'{"a":1}\x0c',
    b'{"a":1}//',
    b'\x0c{"a":1}',
    b'\x00{"a":1}',
    b"{\x00}",
    b'{"a":1}\xef\xbb\xbf',
    b'\xef\xbb\xbf\xef\xbb\xbf{"a":1}',
    '{"a":1}'.encode("utf-16"),
    '{"a":1}'.encode("utf-16-le"),
    '{"a":1}'.encode("utf-32"),
    b'{"a":"\xff"}',
    b'{"a":"\xed\xa0\x80"}',  # a surrogate, spelled out
    b'{"a":"\xc0\xaf"}',  # overlong
    b'{"a":"\xf4\xbf\xbf\xbf"}',  # beyond U+10FFFF
    b'{"\xe9":1}',
]

ACCEPTED_VALUES = [
    b"null",
    b"true",
    b"false",
    b"0",
    b"-0",
    b"-0.0",
    b"1e1",
    b"1E+2",
    b"123.456e-78",
    b"1e9999",
    b"-9223372036854775809",
    b'""',
    b'"\\u0000"',
    b'"\\"\\\\\\/\\b\\f\\n\\r\\t"',
    b'"\\ud83d\\ude39\\u00e9"',
    b'"\x7f"',
    '"\u2028\u2029\ufeff\U0010ffff"'.encode(),
    b"[]",
    b"[[]  ,\n[ ]]",
    b"{}",
    b'{"b":1,"b":2}',
]


@pytest.mark.parametrize("value", REFUSED_VALUES)
def test_a_value_that_is_no_json_is_refused(value: bytes) -> None:
    for body in (b'{"a":' + value + b"}", b'{"b":1, "a": ' + value + b' , "c":[]}'):
        with pytest.raises(InvalidJson):
            Members.parse(body)


@pytest.mark.parametrize("body", REFUSED_BODIES)
def test_a_body_that_is_not_exactly_one_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson) as raised:
        Members.parse(body)
    raised.value.body()  # the message can be sent


@pytest.mark.parametrize("value", ACCEPTED_VALUES)
def test_every_json_value_is_accepted_and_keeps_its_bytes(value: bytes) -> None:
    members = Members.parse(b'\n{ "x" :1,"a"\t: ' + value + b" }\r\n ")
    assert members.raw("a") == value
    assert members.get("a") == json.loads(value)
    assert list(members.values) == ["x", "a"]


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_without_end_is_refused_and_no_crash(opening: bytes) -> None:
    for body in (b'{"a":' + opening * 100_000, b'{"a":' + opening * 100_000 + b"1"):
        with pytest.raises(InvalidJson, match="nested too deeply"):
            Members.parse(body)


def test_an_integer_with_too_many_digits_is_refused() -> None:
    with pytest.raises(InvalidJson, match="digits"):
        Members.parse(b'{"seed":' + b"9" * 5000 + b"}")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"mod\\u0065l":"a","stream":true,"model":"a"}',
        b'{"\\u006dodel":"a", "\\u006Dodel":"b"}',
    ],
)
def test_a_member_twice_is_refused_however_it_is_written(body: bytes) -> None:
    with pytest.raises(InvalidJson, match='"model" twice'):
        Members.parse(body)


def test_a_name_written_with_escapes_is_found() -> None:
    members = Members.parse(b'{"mod\\u0065l" : "a"}')
    assert members.get("model") == "a"
    assert "model" in members
    assert members.replaced({"model": "b"}) == b'{"mod\\u0065l" : "b"}'


def test_more_members_than_allowed_are_refused() -> None:
    def body(count: int) -> bytes:
        return json.dumps({f"m{number}": number for number in range(count)}).encode()

    assert len(Members.parse(body(MAX_MEMBERS)).values) == MAX_MEMBERS
    with pytest.raises(InvalidJson, match="members"):
        Members.parse(body(MAX_MEMBERS + 1))


def test_a_byte_order_mark_is_accepted_and_kept() -> None:
    body = b'\xef\xbb\xbf{"model":"a"}'
    members = Members.parse(body)
    assert members.get("model") == "a"
    assert members.replaced({}) == body
    assert members.replaced({"x": 1}) == b'\xef\xbb\xbf{"x":1,"model":"a"}'


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        (rb"\ud800", "\ufffd"),
        (rb"\uDFFF", "\ufffd"),
        (rb"\ud800\ud800\udc00", "\ufffd\U00010000"),
        (rb"\ud83d\ude39\ude39", "\U0001f639\ufffd"),
        (rb"\udc00\ud800", "\ufffd\ufffd"),
        (rb"\ud800\u0041", "\ufffdA"),
        (rb"\ud800\n", "\ufffd\n"),
        (rb"\\ud800", "\\ud800"),
        (rb"\\ud83d\udc00", "\\ud83d\ufffd"),
        (rb"\\\ud800", "\\\ufffd"),
        (b"\\ud800\xf0\x9f\x98\xb9", "\ufffd\U0001f639"),
    ],
)
def test_half_a_surrogate_pair_never_reaches_a_message(
    written: bytes, seen: str
) -> None:
    body = b'{"' + written + b'": "' + written + b'", "a": [{"b": "' + written + b'"}]}'
    members = Members.parse(body)
    assert members.values == {seen: seen, "a": [{"b": seen}]}
    str(members.values).encode()
    assert members.replaced({}) == body
    assert members.raw(seen) == b'"' + written + b'"'


def test_only_what_changes_is_touched() -> None:
    body = (
        '{ "stream" : false , "größe": 1.50,\n"model":"alt" , '
        '"metadata": {"model":"x"}, "z":1e2 }'
    ).encode()
    members = Members.parse(body)
    changed = members.replaced({"model": "neu", "stream": True})
    assert changed == body.replace(b'"alt"', b'"neu"').replace(b"false", b"true")
    added = members.replaced({"stream_options": {"include_usage": True}})
    assert added == body.replace(
        b"{ ", b'{"stream_options":{"include_usage":true}, ', 1
    )


def test_members_are_added_to_an_empty_object() -> None:
    assert Members.parse(b" { } ").replaced({"a": 1, "b": "é"}) == (
        b' {"a":1,"b":"\\u00e9" } '
    )


def test_what_people_wrote_is_not_in_the_representation() -> None:
    assert "canary" not in repr(Members.parse(b'{"prompt":"canary"}'))


def test_the_error_quotes_nothing_of_a_value() -> None:
    for body in (b'{"prompt":"canary" "x"}', b'{"prompt":"canary', b'{"a":[canary]}'):
        with pytest.raises(InvalidJson) as raised:
            Members.parse(body)
        assert "canary" not in raised.value.message


def random_text(rng: random.Random) -> str:
    alphabet = string.printable + 'äß語😹\u2028\x00\\"{}[]:,'
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {
            random_text(rng): random_value(rng, depth - 1)
            for _ in range(rng.randrange(4))
        }
    return [
        None,
        rng.random() < 0.5,
        rng.randrange(-(10**20), 10**20),
        rng.uniform(-1e9, 1e9),
        random_text(rng),
        "",
    ][kind]


def written(value: dict[str, Any], rng: random.Random) -> list[tuple[str, str | None]]:
    """The object as some client might write it, spaced and escaped at will.

    Comes in pieces: each a text, and the member's name if the text is its value.
    """

    def space() -> str:
        return rng.choice(["", "", " ", "\n\t", "\r\n  "])

    def dumped(part: Any) -> str:
        return json.dumps(
            part, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])
        )

    pieces: list[tuple[str, str | None]] = [(space() + "{", None)]
    for number, (name, member) in enumerate(value.items()):
        comma = "," if number else ""
        name_part = f"{comma}{space()}{dumped(name)}{space()}:{space()}"
        pieces += [(name_part, None), (dumped(member), name), (space(), None)]
    return [*pieces, (space() + "}" + space(), None)]


@pytest.mark.parametrize("seed", seeds(60, 300))
def test_any_object_changes_only_where_it_should(seed: int) -> None:
    rng = random.Random(seed)
    value = {random_text(rng): random_value(rng, 3) for _ in range(rng.randrange(8))}
    pieces = written(value, rng)
    body = "".join(text for text, _ in pieces).encode()
    members = Members.parse(body)

    assert members.values == value
    assert members.replaced({}) == body
    assert {name: members.raw(name).decode() for name in value} == {
        name: text for text, name in pieces if name is not None
    }

    names = sorted({*value, "absent", random_text(rng)})
    changes = {
        name: random_value(rng, 2) for name in rng.sample(names, rng.randint(1, 2))
    }
    changed = members.replaced(changes)
    assert json.loads(changed) == value | changes

    again = Members.parse(changed)
    added = [
        f"{json.dumps(name)}:{again.raw(name).decode()}"
        for name in changes
        if name not in value
    ]
    opening, *rest = [
        again.raw(name).decode() if name in changes else text for text, name in pieces
    ]
    comma = "," if added and value else ""
    assert changed.decode() == opening + ",".join(added) + comma + "".join(rest)


@pytest.mark.parametrize("seed", seeds(40, 200))
def test_members_are_taken_away_and_the_rest_is_still_the_same_object(
    seed: int,
) -> None:
    rng = random.Random(seed)
    value = {random_text(rng): random_value(rng, 3) for _ in range(rng.randrange(6))}
    body = "".join(text for text, _ in written(value, rng)).encode()
    gone = [name for name in (*value, "absent") if rng.random() < 0.5]
    changes = dict.fromkeys(gone, REMOVED) | ({"new": 1} if rng.random() < 0.5 else {})

    changed = Members.parse(Members.parse(body).replaced(changes))

    kept = {name: part for name, part in value.items() if name not in gone}
    assert changed.values == kept | ({"new": 1} if "new" in changes else {})
    for name in kept:
        if name != "new":
            assert changed.raw(name) == Members.parse(body).raw(name)


@pytest.mark.parametrize("seed", seeds(40, 100))
def test_damaged_bodies_are_accepted_exactly_when_they_are_json(seed: int) -> None:
    rng = random.Random(seed)
    body = bytearray(b'{"model":"q\\u0041\xc3\xa9","n":[1,-2.5e3,null],"s":{"a":true}}')
    for _ in range(rng.randint(1, 3)):
        body[rng.randrange(len(body))] = rng.choice(b'{}[]",:\\ \x00u1e-\xc3\xff')
    damaged = bytes(body)
    names: list[str] = []

    def top_level(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names[:] = [name for name, _ in pairs]  # the last call is the outermost
        return dict(pairs)

    try:
        expected = json.loads(damaged.decode(), object_pairs_hook=top_level)
    except ValueError:
        expected = None
    if not isinstance(expected, dict) or len(set(names)) < len(names):
        with pytest.raises(InvalidJson):
            Members.parse(damaged)
    else:
        assert Members.parse(damaged).values == expected


@pytest.mark.parametrize("cut", range(60))
def test_a_body_cut_anywhere_is_refused(cut: int) -> None:
    body = b'{"model":"q\\ud83d\\ude39\xc3\xa9","n":[1,-2.5e3,null],"s":{"a":true}}'
    with pytest.raises(InvalidJson):
        Members.parse(body[:cut])


@pytest.mark.parametrize(
    "piece", ["[],", "{},", "[" * 50 + "]" * 50 + ",", '{"":0},', "0,0,0,0,0,0,0,0,"]
)
def test_a_body_of_millions_of_values_is_refused_before_they_are_made(
    piece: str,
) -> None:
    times = 5 * MAX_VALUES // len(piece) * 4
    with pytest.raises(InvalidJson, match="too many values"):
        Members.parse(f'{{"messages":[{piece * times}0]}}'.encode())


def test_a_large_body_of_text_or_token_numbers_is_read() -> None:
    code = "def f(a: int) -> list[int]:\n    return [a, {a: (a, a)}[a]]\n"
    body = json.dumps({"messages": [{"content": code * 50_000}]}).encode()
    assert len(body) > 3_000_000
    assert Members.parse(body).values == json.loads(body)
    body = json.dumps({"input": [[50_000] * 8000] * 100}).encode()
    assert len(Members.parse(body).values["input"]) == 100
    body = json.dumps({"messages": ["é🦙" * 500_000]}).encode()
    assert Members.parse(body).values == json.loads(body)


def test_half_a_surrogate_pair_among_millions_of_escapes_is_refused() -> None:
    with pytest.raises(InvalidJson, match="half a surrogate pair"):
        Members.parse(b'{"m":"\\ud800' + b"\\n" * 1_100_000 + b'"}')
