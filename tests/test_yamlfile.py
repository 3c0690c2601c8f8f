"""A strict reading of YAML: what is written is what it means."""

import random
from typing import Any

import pytest

from inferencia import yamlfile
from inferencia.yamlfile import (
    Mapping,
    Node,
    Scalar,
    Sequence,
    Style,
    YamlError,
    line_of,
    parse,
)


def plain(node: Node) -> Any:
    """The tree as Python values, each scalar as whatever it would be by itself."""
    if isinstance(node, Mapping):
        return {name: plain(inner) for name, inner in node.items.items()}
    if isinstance(node, Sequence):
        return [plain(inner) for inner in node.items]
    if node.is_null:
        return None
    if node.boolean is not None:
        return node.boolean
    return node.number if node.number is not None else node.text


def value(text: str) -> Any:
    """What ``text`` means as the value of a key."""
    return plain(parse(f"key: {text}\n".encode()).root)["key"]


def refusal(content: str | bytes) -> str:
    if isinstance(content, str):
        content = content.encode()
    with pytest.raises(YamlError) as raised:
        parse(content)
    return str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        *("1:30", "190:20:30", "12:30:45.6"),  # base 60
        *("on", "off", "yes", "no", "On", "NO", "y", "n", "tRUE"),  # booleans
        *("010", "0o10", "0x1F", "0b11", "1_000", "09", "1,000"),  # numbers
        *("2024-01-31", "2024-01-31T10:00:00Z"),  # dates
        *(".inf", "-.Inf", ".nan", "1e999", "1" * 5000),
        *("=", "nan", "None", "nil"),
    ],
)
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text: str) -> None:
    assert value(text) == text


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        *(("true", True), ("True", True), ("FALSE", False)),
        *(("null", None), ("~", None), ("", None), ("# comment", None)),
        *(("8080", 8080), ("-5", -5), ("0", 0), ("+3", 3)),
        *(("0.5", 0.5), (".5", 0.5), ("1e3", 1000.0), ("1.", 1.0)),
        *(("'8080'", "8080"), ('"true"', "true"), ("!!str 5", "5"), ("'null'", "null")),
    ],
)
def test_numbers_booleans_and_nothing_are_what_yaml_1_2_says(
    text: str, meaning: object
) -> None:
    found = value(text)
    assert found == meaning
    assert type(found) is type(meaning)


@pytest.mark.parametrize(
    "content", ["", "# nothing\n", "---\n", "null\n", "\ufeff", "\n\n"]
)
def test_an_empty_file_is_an_empty_mapping(content: str) -> None:
    assert plain(parse(content.encode()).root) == {}


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    assert plain(parse(b"\xef\xbb\xbfport: 1\n").root) == {"port": 1}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "a: given twice, on lines 1 and 3"),
        ("a:\n  b:\n    c: 1\n    'c': 2\n", "a.b.c: given twice, on lines 3 and 4"),
        ("a: [{b: 1}, {b: 1, b: 2}]\n", "a[1].b: given twice, on line 1"),
    ],
)
def test_a_key_that_stands_twice_is_reported_with_its_lines(
    content: str, problem: str
) -> None:
    document = parse(content.encode())
    assert document.problems == (problem,)


def test_the_first_of_two_equal_keys_is_the_one_that_is_read() -> None:
    assert plain(parse(b"a: 1\na: 2\n").root) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\n---\nb: 2\n", "line 2: a second document"),
        ("a:\n\t- b\n", "line 2, column 1: a tab where YAML wants spaces"),
        ("a: b: c\n", 'line 1, column 5: a ":" that is out of place'),
        ("x: 1\n<<: {a: 1}\n", "line 2: merge keys"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: tags"),
        ("a: !!int 5\n", "line 1: tags"),
        ("a: 1\n? [b]\n: c\n", "line 2: a key must be a single value"),
        ("a: *b\n", "line 1: an alias (*name) without its anchor"),
        ("a: &a [*a]\n", "line 1: an alias (*name) without its anchor"),
        ("a: [1, 2\n", "line 2, column 1: while parsing a flow sequence (begun on"),
        ("a: [*]\n", "put the value in quotes"),
        ("a: @b\n", "put the value in quotes"),
        ("a: \x00\n", "line 1: the character U+0000"),
        (b"a: 1\nb: \xff\n", "line 2: not UTF-8 (byte 0xff)"),
        ("a: 1".encode("utf-16"), "saved as UTF-16"),
        ("a: \ue000\n", "reserved"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_line(
    content: str | bytes, message: str
) -> None:
    assert message in refusal(content)


def test_no_refusal_repeats_a_value() -> None:
    for content in ("api_key: *hunter2", "api_key: !hunter2 x", "api_key: 'hunter2"):
        assert "hunter2" not in refusal(content)


def test_a_key_with_a_line_end_does_not_break_the_line_of_a_message() -> None:
    (problem,) = parse(b'"a\\nb": 1\n"a\\nb": 2\n').problems
    assert "\n" not in problem


def test_an_anchored_value_can_be_used_again() -> None:
    document = parse(b"a: &x {b: [1, 2]}\nc: *x\n&k d: 1\n*k : 2\n")
    assert plain(document.root) == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": 1}
    assert document.problems == ("d: given twice, on lines 3 and 4",)


def test_a_few_lines_of_aliases_cannot_expand_to_gigabytes() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for n in range(1, 10):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    assert "more than 20000 values" in refusal("\n".join(lines))


def test_the_number_of_aliases_is_bounded() -> None:
    count = yamlfile.MAX_ALIASES
    document = f"a: &a 1\nb: [{', '.join(['*a'] * count)}]\n"
    parse(document.encode())
    assert f"more than {count} aliases" in refusal(document + "c: *a\n")


def test_the_number_of_values_is_bounded() -> None:
    assert "more than 20000 values" in refusal("- 1\n" * 20_001)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_the_depth_is_bounded(opening: str) -> None:
    assert "levels deep" in refusal(opening * 5000)


def test_the_size_is_bounded() -> None:
    assert "larger than" in refusal(b"#" * (yamlfile.MAX_BYTES + 1))


def test_a_variable_may_stand_in_any_value_but_not_in_a_comment() -> None:
    document = parse(
        b"a: ${env.A} # ${env.NOT_THIS}\n"
        b"b: {c: ${env.B}, d: [${env.C}]}\n"
        b"e: 'x ${env.D} y ${env.E}'\n"
    )
    root = plain(document.root)
    assert root["a"] == "${env.A}"
    assert root["b"] == {"c": "${env.B}", "d": ["${env.C}"]}
    assert isinstance(document.root, Mapping)
    last = document.root.items["e"]
    assert isinstance(last, Scalar)
    assert last.variables == ("D", "E")
    assert last.substituted(str.lower).text == "x d y e"


def test_a_filled_in_scalar_is_what_the_field_needs() -> None:
    filled = Scalar("${env.A}", Style.QUOTED).substituted(lambda name: "8080")
    assert filled.is_text
    assert filled.number == 8080
    assert Scalar("8080", Style.QUOTED).number is None


@pytest.mark.parametrize("seed", range(30))
def test_garbage_is_read_or_refused_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = "ab: -[]{},&*!|>'\"%@`#\n\t\\\x00\x85\u2028é?~<$0.\ue000"
    for _ in range(150):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
        try:
            parse(text.encode())
        except YamlError as error:
            assert "\n" not in str(error), repr(text)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_at_random_are_read_or_refused_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        try:
            parse(rng.randbytes(rng.randrange(30)))
        except YamlError as error:
            assert "\n" not in str(error)


# --- merge keys, for those who want them -----------------------------------------


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("{<<: *x, c: 3}", {"a": 1, "b": 2, "c": 3}),
        ("{a: 9, <<: *x}", {"a": 9, "b": 2}),
        ("{<<: *x, a: 9}", {"a": 9, "b": 2}),
        ("{<<: [*x, *y]}", {"a": 1, "b": 2, "d": 4}),
        ("{<<: *y, e: {<<: *x}}", {"a": 8, "d": 4, "e": {"a": 1, "b": 2}}),
        ("{'<<': 1}", {"<<": 1}),
    ],
)
def test_a_merge_key_adds_what_is_not_there(text: str, meaning: object) -> None:
    above = "x: &x {a: 1, b: 2}\ny: &y {a: 8, d: 4}\n"
    document = parse(f"{above}key: {text}\n".encode(), merge_keys=True)
    assert plain(document.root)["key"] == meaning
    assert document.has_merge_keys == ("<<: " in text)
    assert document.problems == ()


@pytest.mark.parametrize("text", ["<<: 1", "<<: [1]", "<<: [[{}]]", "<<:"])
def test_a_merge_key_needs_mappings(text: str) -> None:
    with pytest.raises(YamlError, match="line 1: a merge key"):
        parse(text.encode(), merge_keys=True)


def test_merging_again_and_again_is_bounded() -> None:
    text = "m0: &m0 {" + ", ".join(f"k{i}: 1" for i in range(500)) + "}\n"
    text += "".join(f"m{i}: &m{i} {{<<: *m{i - 1}, n{i}: 1}}\n" for i in range(1, 190))
    with pytest.raises(YamlError, match="more than 20000 values"):
        parse(text.encode(), merge_keys=True)


PLACES = """\
server:
  port: 1

backends:
  - name: mlx
    models: [a,
      b]
  - {name: far, headers: {X.Y: z}}
routing: {aliases: {
  gpt-4.1: x,
  gpt-4: y}}
log: {}
log: {level: 1}
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("server", 1),
        ("server.port", 2),
        ("server.no.such.key", 1),
        ("backends[0].models", 6),
        ("backends[0].models[1]", 7),
        ("backends[mlx].url", 5),
        ("backends[1].headers.X.Y", 8),
        ("backends[far]", 8),
        ("backends[7].url", 4),
        ("routing.aliases.gpt-4.1", 10),
        ("routing.aliases.gpt-4", 11),
        ("log", 13),
        ("elsewhere", None),
        ("", None),
    ],
)
def test_a_path_leads_to_its_line_or_to_what_is_around_it(
    path: str, line: int | None
) -> None:
    assert line_of(parse(PLACES.encode()).root, path) == line
