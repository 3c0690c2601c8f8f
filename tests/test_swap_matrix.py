"""The language of llama-swap's matrix: what may be loaded together."""

import itertools
import random

import pytest

from inferencia.models import matrix
from inferencia.models.matrix import MatrixError, worked_out

MODELS = {"a", "b", "c", "d", "e", "org/m:7b"}
VARIABLES = {"x": "a", "L": "org/m:7b"}


def model_of(name: str) -> str | None:
    return VARIABLES.get(name, name if name in MODELS else None)


def sets(*expressions: str, **named: str) -> list[str]:
    """Each combination as one text, the models in order."""
    given = {f"s{i}": text for i, text in enumerate(expressions)} | named
    return ["".join(sorted(one)) for one in worked_out(given, model_of)]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a", ["a"]),
        ("a & b", ["ab"]),
        ("a | b", ["a", "b"]),
        ("a|b&c", ["a", "bc"]),
        ("(a | b) & c", ["ac", "bc"]),
        ("(a | b) & (c | d)", ["ac", "ad", "bc", "bd"]),
        ("((a))", ["a"]),
        ("a & a", ["a"]),
        ("a | a", ["a"]),
        ("(a | b) & (a | b)", ["a", "ab", "b"]),
        ("x & b", ["ab"]),
        ("L", ["org/m:7b"]),
        ("org/m:7b", ["org/m:7b"]),
        (" \n a\n& b ", ["ab"]),
    ],
)
def test_an_expression_stands_for_its_combinations_in_order(
    expression: str, expected: list[str]
) -> None:
    assert sets(expression) == expected


def test_a_set_may_be_put_into_others_wherever_it_is_defined() -> None:
    found = sets(first="+chat & c", chat="a | b", last="+chat | +first")
    assert found == ["ac", "bc", "a", "b"]


def test_combinations_come_in_the_order_of_definition_and_once() -> None:
    assert sets("b", "a | b", "a & b", "a") == ["b", "a", "ab"]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "the name of a model is missing at the end"),
        ("a &", "the name of a model is missing at the end"),
        ("& a", 'the name of a model is missing before "&"'),
        ("a | | b", 'the name of a model is missing before "|"'),
        ("()", 'the name of a model is missing before ")"'),
        ("(a", 'a "(" is not closed'),
        ("a)", '")" is out of place'),
        ("a b", '"b" is out of place'),
        ("a, b", '"," is no sign of this language'),
        ("a + b", '"+" is no sign of this language'),
        ("nobody", '"nobody" is neither a model nor one of vars'),
        ("+nothing", '"+nothing": there is no set of this name'),
        ("+s0", "leads back to itself: s0 -> s0"),
        ("(" * 51 + "a" + ")" * 51, "nested more than 50 deep"),
        ("(" * 100_000, "nested more than 50 deep"),
    ],
)
def test_a_wrong_expression_is_explained(expression: str, message: str) -> None:
    with pytest.raises(MatrixError) as raised:
        sets(expression)
    assert raised.value.message == message
    assert raised.value.set_name == "s0"


def test_sets_that_go_round_in_a_circle_are_named() -> None:
    with pytest.raises(MatrixError, match="one -> two -> one"):
        sets(one="a & +two", two="b | (+one)")


def test_a_long_way_of_references_is_an_error_and_no_crash() -> None:
    names = {f"n{i}": f"(((+n{i + 1})))" for i in range(3000)} | {"n3000": "a"}
    with pytest.raises(MatrixError, match="nested more than 50 deep"):
        sets(**names)


def test_an_explosion_is_an_error_and_no_wait() -> None:
    assert len(sets("&".join(["(a|b|c|d|e)"] * 40))) == 31
    many = {f"m{i}" for i in range(64)}

    def any_of(name: str) -> str | None:
        return name if name in many else None

    given = {"s": " & ".join(f"(m{i}|m{i + 1})" for i in range(0, 64, 2))}
    with pytest.raises(MatrixError, match="more than 1000 combinations"):
        worked_out(given, any_of)


def test_all_combinations_together_are_bounded() -> None:
    names = [f"m{i}" for i in range(900)]
    given = {f"s{i}": f"k{i} & ({'|'.join(names)})" for i in range(6)}
    with pytest.raises(MatrixError, match="more than 5000 combinations in all"):
        worked_out(given, lambda name: name)


def test_much_work_for_few_combinations_is_bounded_too() -> None:
    names = "|".join(f"m{i}" for i in range(900))
    given = {"big": names, "s": "+big & a" + " & a" * 3000}
    with pytest.raises(MatrixError, match="too large"):
        worked_out(given, lambda name: name)
    given = {"big": names, "s": " | ".join(["+big"] * 2000)}
    with pytest.raises(MatrixError, match="too large"):
        worked_out(given, lambda name: name)


@pytest.mark.parametrize("seed", range(40))
def test_expressions_mean_what_logic_says(seed: int) -> None:
    """A set of models fits a combination just if the expression, read as logic, says
    that some models of the set are enough for it and all of them are used."""
    rng = random.Random(seed)

    def made(depth: int) -> tuple[str, set[frozenset[str]]]:
        kind = rng.random()
        if depth == 0 or kind < 0.3:
            one = rng.choice("abcde")
            return one, {frozenset(one)}
        parts = [made(depth - 1) for _ in range(rng.randrange(1, 4))]
        if kind < 0.65:
            text = f"({' | '.join(text for text, _ in parts)})"
            return text, set().union(*(found for _, found in parts))
        text = f"({' & '.join(text for text, _ in parts)})"
        together = itertools.product(*(found for _, found in parts))
        return text, {frozenset().union(*choice) for choice in together}

    text, expected = made(3)
    assert set(worked_out({"s": text}, model_of)) == expected


@pytest.mark.parametrize("seed", range(40))
def test_garbage_gives_combinations_or_an_error(seed: int) -> None:
    rng = random.Random(seed)
    parts = ["a", "b", "x", "+s0", "+s1", "&", "|", "(", ")", " ", "?", "+", "ä"]
    for _ in range(20):
        given = {
            f"s{i}": "".join(rng.choices(parts, k=rng.randrange(20))) for i in range(3)
        }
        try:
            found = worked_out(given, model_of)
        except MatrixError as error:
            assert error.set_name in given
            continue
        assert all(one <= MODELS for one in found)


def test_the_bounds_are_those_that_the_documentation_names() -> None:
    assert (matrix.MAX_COMBINATIONS, matrix.MAX_IN_ALL) == (1000, 5000)
