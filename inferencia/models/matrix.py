"""llama-swap's matrix: which models may be loaded at the same time.

Each set is an expression over names of models:

    a & b       both together
    a | b       one or the other; ``&`` binds closer
    ( )         grouping
    +name       what the set ``name`` says, wherever that is defined

and stands for combinations: ``(a | b) & c`` is ``a, c`` and ``b, c``. They are worked
out here, in the order of definition, because ties between them are broken by it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

# llama-swap's own bound for one set.
MAX_COMBINATIONS = 1000
# For all sets together; and names put into combinations on the way there.
MAX_IN_ALL = 5000
MAX_STEPS = 1_000_000
# Parentheses in parentheses, and sets that refer to sets. Each is a call.
MAX_DEPTH = 50

Combination = frozenset[str]
Combinations = tuple[Combination, ...]

_TOKEN = re.compile(r"\s*(?:(?P<sign>[&|()])|(?P<name>\+?[\w.:/@-]+)|(?P<wrong>\S))")


class MatrixError(Exception):
    """A set cannot be worked out.

    ``set_name`` is the one to blame, or None if it is all of them together.
    """

    def __init__(self, set_name: str | None, message: str) -> None:
        super().__init__(message)
        self.set_name = set_name
        self.message = message


def worked_out(
    sets: Mapping[str, str], model_of: Callable[[str], str | None]
) -> Combinations:
    """All combinations of all sets, each once, in the order of definition.

    Args:
        sets: expressions by name, in their order.
        model_of: the model that a name in an expression means; None if none is.

    Raises:
        MatrixError: an expression is wrong, goes round in a circle, or there would be
            too many combinations.
    """
    expansion = _Expansion(sets, model_of)
    found: dict[Combination, None] = {}
    for name in sets:
        found |= dict.fromkeys(expansion.of(name))
        if len(found) > MAX_IN_ALL:
            raise MatrixError(None, f"more than {MAX_IN_ALL} combinations in all")
    return tuple(found)


@dataclass(slots=True)
class _Expansion:
    sets: Mapping[str, str]
    model_of: Callable[[str], str | None]
    done: dict[str, Combinations] = field(default_factory=dict)
    within: list[str] = field(default_factory=list)  # sets being worked out now
    depth: int = 0
    steps: int = 0

    def of(self, name: str) -> Combinations:
        if name in self.done:
            return self.done[name]
        if name in self.within:
            circle = " -> ".join([*self.within[self.within.index(name) :], name])
            raise MatrixError(name, f"leads back to itself: {circle}")
        self.within.append(name)
        combinations = _Parser(self, name).all()
        self.within.pop()
        self.done[name] = combinations
        return combinations

    def joined(self, left: Combinations, right: Combinations) -> Combinations:
        """Each of ``left`` together with each of ``right``."""
        self.check(len(left) * len(right))
        found: dict[Combination, None] = {}
        for one in left:
            for other in right:
                both = one | other
                self.steps += len(both) + 1
                found[both] = None
            self.check(len(found))
        return tuple(found)

    def check(self, combinations: int) -> None:
        name = self.within[-1]
        if combinations > MAX_COMBINATIONS:
            raise MatrixError(name, f"more than {MAX_COMBINATIONS} combinations")
        if self.steps > MAX_STEPS:
            raise MatrixError(name, "too large to be worked out")


class _Parser:
    """Reads one expression, from left to right, and works it out on the way."""

    def __init__(self, expansion: _Expansion, name: str) -> None:
        self._expansion = expansion
        self._name = name
        self._tokens = self._split(expansion.sets[name])
        self._next = next(self._tokens)

    def all(self) -> Combinations:
        found = self._alternatives()
        if self._next:
            raise self._wrong(f'"{self._next}" is out of place')
        return found

    def _split(self, text: str) -> Iterator[str]:
        """Signs and names, and "" for ever after."""
        for token in _TOKEN.finditer(text):
            if token["wrong"] or token["name"] == "+":
                sign = token["wrong"] or "+"
                raise self._wrong(f'"{sign}" is no sign of this language')
            yield token["sign"] or token["name"]
        while True:
            yield ""

    def _wrong(self, message: str) -> MatrixError:
        return MatrixError(self._name, message)

    def _take(self) -> str:
        token, self._next = self._next, next(self._tokens)
        return token

    def _alternatives(self) -> Combinations:
        found = dict.fromkeys(self._together())
        while self._next == "|":
            self._take()
            found |= dict.fromkeys(self._together())
            self._expansion.check(len(found))
        return tuple(found)

    def _together(self) -> Combinations:
        found = self._atom()
        while self._next == "&":
            self._take()
            found = self._expansion.joined(found, self._atom())
        return found

    def _atom(self) -> Combinations:
        token = self._take()
        if token == "(":
            return self._inner()
        if not token:
            raise self._wrong("the name of a model is missing at the end")
        if token in "&|)":
            raise self._wrong(f'the name of a model is missing before "{token}"')
        if token.startswith("+"):
            return self._reference(token[1:])
        model = self._expansion.model_of(token)
        if model is None:
            raise self._wrong(f'"{token}" is neither a model nor one of vars')
        return (frozenset({model}),)

    def _inner(self) -> Combinations:
        self._deeper()
        found = self._alternatives()
        if self._take() != ")":
            raise self._wrong('a "(" is not closed')
        self._expansion.depth -= 1
        return found

    def _reference(self, name: str) -> Combinations:
        if name not in self._expansion.sets:
            raise self._wrong(f'"+{name}": there is no set of this name')
        self._deeper()
        found = self._expansion.of(name)
        self._expansion.depth -= 1
        # Taking over a set costs what is in it, however often it is done.
        self._expansion.steps += sum(map(len, found)) + len(found)
        self._expansion.check(len(found))
        return found

    def _deeper(self) -> None:
        self._expansion.depth += 1
        if self._expansion.depth > MAX_DEPTH:
            raise self._wrong(f"nested more than {MAX_DEPTH} deep")
