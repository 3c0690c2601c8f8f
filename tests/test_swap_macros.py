"""llama-swap's macros: what stands for what, with which type, and what is refused."""

import random

import pytest

from inferencia.models import macros as rules
from inferencia.models.commandline import model_file, without_comments, words
from inferencia.models.macros import AlreadyReported, Budget, MacroError, Macros
from inferencia.yamlfile import Scalar, Style


def macros(**values: str) -> Macros:
    named = {name: Scalar(text) for name, text in values.items()}
    return Macros(named, Budget())


def expand(text: str, known: Macros) -> str:
    return known.expand(Scalar(text, Style.QUOTED)).text


# --- expansion -------------------------------------------------------------------


def test_a_macro_in_a_text_is_put_in_as_it_was_written() -> None:
    known = macros(a="x y", half="0.50", yes="True", none="")
    assert expand("<${a}|${a}|${half}|${yes}|${none}>", known) == "<x y|x y|0.50|true|>"


@pytest.mark.parametrize(
    "text", ["", "$", "${", "${}", "${a", "$a", "${a b}", "${a.b}"]
)
def test_what_only_looks_like_a_macro_is_text(text: str) -> None:
    assert expand(text, macros(a="x")) == text


def test_a_text_that_is_one_macro_keeps_the_type_of_its_value() -> None:
    known = macros(count="12", share="0.7", on="true", text="t", again="${count}")
    found = {name: known.expand(Scalar(f"${{{name}}}", Style.QUOTED)) for name in
             ("count", "share", "on", "text", "again")}  # fmt: skip
    assert (found["count"].number, found["share"].number) == (12, 0.7)
    assert found["on"].boolean is True
    assert found["text"].is_text
    assert found["again"].number == 12
    assert known.expand(Scalar("${count}0", Style.PLAIN)).number is None


def test_a_number_in_quotes_stays_text() -> None:
    known = Macros({"v": Scalar("1.10", Style.QUOTED)}, Budget())
    assert known.expand(Scalar("${v}")).is_text


def test_macros_use_those_that_are_defined_before_them() -> None:
    known = macros(a="1", b="${a}2", c="${b}3${a}")
    assert expand("${c}", known) == "1231"
    assert [known.problem_of(name) for name in "abc"] == [None, None, None]


def test_a_macro_that_is_replaced_changes_those_that_use_it() -> None:
    known = macros(size="1", line="--size ${size}")
    of_model = known.with_more({"size": Scalar("2"), "own": Scalar("${line}!")})
    assert expand("${own}", of_model) == "--size 2!"
    assert expand("${line}", known) == "--size 1"


def test_port_and_pid_stay_where_they_are() -> None:
    known = macros(serve="s --port ${PORT}")
    assert expand("${serve} ${PID}", known) == "s --port ${PORT} ${PID}"
    assert expand("${PORT}", known) == "${PORT}"


def test_the_id_of_a_model_is_known_only_in_it_and_in_all_its_macros() -> None:
    known = macros(name="<${MODEL_ID}>")
    assert expand("${name} ${MODEL_ID}", known.in_model("m:1")) == "<m:1> m:1"
    with pytest.raises(MacroError, match="known only within a model"):
        expand("${MODEL_ID}", known)


# --- what is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name", "problem"),
    [
        ({"a": "x${a}"}, "a", "it cannot use itself"),
        ({"a": "${b}", "b": "1"}, "a", "${b} is defined further down"),
        ({"a": "${nothing}"}, "a", "unknown macro ${nothing}"),
        ({"PORT": "1"}, "PORT", "the name PORT is reserved"),
        ({"PID": "1"}, "PID", "the name PID is reserved"),
        ({"MODEL_ID": "1"}, "MODEL_ID", "the name MODEL_ID is reserved"),
        ({"a.b": "1"}, "a.b", "a macro's name has up to 63"),
        ({"": "1"}, "", "a macro's name has up to 63"),
        ({"n" * 64: "1"}, "n" * 64, "a macro's name has up to 63"),
        ({"é": "1"}, "é", "a macro's name has up to 63"),
    ],
)
def test_a_wrong_definition_is_explained(
    values: dict[str, str], name: str, problem: str
) -> None:
    assert (macros(**values).problem_of(name) or "").startswith(problem)


def test_a_name_of_63_characters_is_fine() -> None:
    name = "aZ0_-" * 12 + "abc"
    assert macros(**{name: "x"}).problem_of(name) is None
    assert expand(f"${{{name}}}", macros(**{name: "x"})) == "x"


def test_an_unknown_macro_is_named() -> None:
    with pytest.raises(MacroError, match=r"unknown macro \$\{b\}"):
        expand("x ${b}", macros(a="1"))


def test_a_broken_macro_is_not_complained_of_again_where_it_is_used() -> None:
    broken = Macros({"a": Scalar("${b}")}, Budget(), frozenset({"a"}))
    with pytest.raises(AlreadyReported):
        expand("${a}", broken)
    assert expand("${a}", broken.with_more({"a": Scalar("mended")})) == "mended"


def test_macros_that_multiply_are_stopped_before_they_are_long() -> None:
    values = {"m0": "ha" * 10}
    for level in range(1, 40):
        values[f"m{level}"] = f"${{m{level - 1}}}" * 10
    with pytest.raises(MacroError, match="expand to more than 65536"):
        expand("${m39}", macros(**values))


def test_macros_may_nest_only_so_deep() -> None:
    values = {"m0": "x"} | {f"m{i}": f"-${{m{i - 1}}}" for i in range(1, 3000)}
    assert expand("${m49}", macros(**values)) == "-" * 49 + "x"
    with pytest.raises(MacroError, match="more than 50 deep"):
        expand("${m2999}", macros(**values))


def test_all_expansion_together_is_bounded_and_reported_once() -> None:
    known = macros(big="x" * 60_000)
    with pytest.raises(MacroError, match="all macros together") as raised:
        for _ in range(rules.MAX_IN_ALL // 60_000 + 1):
            expand("${big}!", known)
    assert not isinstance(raised.value, AlreadyReported)
    with pytest.raises(AlreadyReported):
        expand("${big}!", known)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_defined_expansion_ends(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"m{i}" for i in range(8)] + ["PORT", "MODEL_ID", "none"]
    parts = ["${", "}", "$", "x", " ", *(f"${{{name}}}" for name in names)]

    def text() -> str:
        return "".join(rng.choices(parts, k=rng.randrange(12)))

    known = macros(**{f"m{i}": text() for i in range(8)}).in_model("id")
    broken = frozenset(f"m{i}" for i in range(8) if known.problem_of(f"m{i}"))
    known = known.with_more({}, broken)
    for _ in range(50):
        try:
            found = expand(text(), known)
        except MacroError:
            continue
        assert "${m" not in found or "${m}" not in found
        assert len(found) <= rules.MAX_TEXT * 2


# --- commands --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("  \n\t ", ()),
        ("a  b\tc\n d ", ("a", "b", "c", "d")),
        ("a 'b c' \"d e\"", ("a", "b c", "d e")),
        ("a'b'\"c\"d", ("abcd",)),
        ("a '' \"\"", ("a", "", "")),
        (r"a\ b \'c \"d \\e", ("a b", "'c", '"d', r"\e")),
        (r"""'a\b"c'""", (r"""a\b"c""",)),
        (r'"a\"b\\c\$d\e"', (r'a"b\c$d\e',)),
        ("a | b > c; $HOME `d` *", ("a", "|", "b", ">", "c;", "$HOME", "`d`", "*")),
        ("a \\\n  b \\  \n c", ("a", "b", "c")),
        ("a b \\", ("a", "b")),
        ("a\n# b 'c\n  # d\n e", ("a", "e")),
        ("a # b", ("a", "#", "b")),
        ("a '# b'", ("a", "# b")),
        ("ä '日 本'", ("ä", "日 本")),
    ],
)
def test_commands_are_split_as_a_shell_would_and_nothing_is_done_to_them(
    text: str, expected: tuple[str, ...]
) -> None:
    assert words(text) == expected


@pytest.mark.parametrize("text", ["a 'b", 'a "b', 'a "b\\"', "it's", "'"])
def test_a_quote_that_is_not_closed_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"a quote ['\"] is not closed: ['\"]"):
        words(text)


def test_comments_are_whole_lines() -> None:
    assert without_comments("a\n # b\n#c\nd # e") == "a\nd # e"


@pytest.mark.parametrize(
    ("command", "path"),
    [
        ("llama-server -m /a/b.gguf", "/a/b.gguf"),
        ("llama-server --model=/a/b.GGUF -c 1", "/a/b.GGUF"),
        ("vllm serve --model org/name", ""),
        ("llama-server -m", ""),
        ("llama-server -hf org/name", ""),
        ("", ""),
    ],
)
def test_the_file_of_a_model_is_taken_from_its_command(command: str, path: str) -> None:
    assert model_file(words(command)) == path
