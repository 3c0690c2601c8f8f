"""llama-swap's macros: ``${name}`` in a text, and what it stands for.

A macro is a single value under a name. Its text may use macros that are defined before
it. A model's macros come after the global ones, but one that has a global one's name
takes its place, so that the global macros between see the model's value.

A text that is one macro and nothing else becomes the macro's value with its type: a
number stays a number. Within other text it is put in as it was written.

``${PORT}`` and ``${PID}`` are no macros of ours: they stay where they stand, until a
process is started or stopped. ``${MODEL_ID}`` is a macro that every model has.

Expansion is bounded, since macros that use macros can grow without end.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from inferencia.yamlfile import Scalar, Style

# A longer name, or one of other characters, is not seen as a macro by llama-swap.
NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
MACRO = re.compile(r"\$\{([A-Za-z0-9_-]+)\}")

PORT, PID, MODEL_ID = "PORT", "PID", "MODEL_ID"
RESERVED = frozenset({PORT, PID, MODEL_ID})
_LATER = frozenset({PORT, PID})

# Linux allows 128 KiB for one argument; no command line comes near.
MAX_TEXT = 64 * 1024
# All that is made of macros in one configuration: 2000 models with long commands.
MAX_IN_ALL = 16 * 1024 * 1024
# Macros in macros in macros. Each level is a call on Python's stack.
MAX_DEPTH = 50


class MacroError(Exception):
    """A text cannot be expanded; the message completes ``path: ``."""


class AlreadyReported(MacroError):
    """It cannot be expanded for a reason that was told elsewhere."""


@dataclass(slots=True)
class Budget:
    """How many characters expansion may still make, in one configuration."""

    left: int = MAX_IN_ALL
    is_reported: bool = False

    def spend(self, characters: int) -> None:
        """
        Raises:
            MacroError: that was more than there was.
        """
        self.left -= characters
        if self.left >= 0:
            return
        if self.is_reported:
            raise AlreadyReported
        self.is_reported = True
        raise MacroError(f"all macros together expand to more than {MAX_IN_ALL} bytes")


class Macros:
    """The macros that are known in one place."""

    def __init__(
        self,
        values: Mapping[str, Scalar],
        budget: Budget,
        broken: frozenset[str] = frozenset(),
    ) -> None:
        """
        Args:
            values: by name, in the order of their definition.
            budget: shared by all macros of a configuration.
            broken: names of those whose own text was reported to be wrong.
        """
        self._values = dict(values)
        self._places = {name: place for place, name in enumerate(self._values)}
        self._budget = budget
        self._broken = broken
        self._expanded: dict[str, Scalar] = {}

    def with_more(
        self, values: Mapping[str, Scalar], broken: frozenset[str] = frozenset()
    ) -> "Macros":
        """These and ``values``, each in the place of one of its name, or behind."""
        together = {**self._values, **values}
        left = self._broken - values.keys()
        return Macros(together, self._budget, left | broken)

    def in_model(self, model_id: str) -> "Macros":
        """These, with ``MODEL_ID`` before them all."""
        values = {MODEL_ID: Scalar(model_id, Style.QUOTED), **self._values}
        return Macros(values, self._budget, self._broken)

    def problem_of(self, name: str) -> str | None:
        """What is wrong with the definition of ``name``, if anything is."""
        if not NAME.fullmatch(name):
            return "a macro's name has up to 63 letters, digits, - and _"
        if name in RESERVED:
            return f"the name {name} is reserved"
        for used in MACRO.findall(self._values[name].text):
            if used == name:
                return "it cannot use itself"
            if used in RESERVED:
                continue
            if used not in self._places:
                return f"unknown macro ${{{used}}}"
            if self._places[used] > self._places[name]:
                return f"${{{used}}} is defined further down; it has to come before"
        return None

    def expand(self, scalar: Scalar) -> Scalar:
        """``scalar`` with every macro replaced, except ``PORT`` and ``PID``.

        Raises:
            MacroError: a macro is not known, or the text becomes too long.
        """
        return self._filled(scalar, 0)

    def _filled(self, scalar: Scalar, depth: int) -> Scalar:
        text = scalar.text
        if "${" not in text:
            return scalar
        whole = MACRO.fullmatch(text)
        if whole and whole[1] not in _LATER:
            return replace(self._value(whole[1], depth), line=scalar.line)
        parts: list[str] = []
        length = at = 0
        for found in MACRO.finditer(text):
            if found[1] in _LATER:
                continue
            parts += (text[at : found.start()], _text(self._value(found[1], depth)))
            length += len(parts[-2]) + len(parts[-1])
            if length > MAX_TEXT:
                raise MacroError(f"its macros expand to more than {MAX_TEXT} bytes")
            at = found.end()
        if not parts:
            return scalar
        parts.append(text[at:])
        self._budget.spend(length + len(parts[-1]))
        return replace(scalar, text="".join(parts), style=Style.QUOTED)

    def _value(self, name: str, depth: int) -> Scalar:
        if name in self._expanded:
            return self._expanded[name]
        if name in self._broken:
            raise AlreadyReported
        if name not in self._values:
            hint = "; it is known only within a model" if name == MODEL_ID else ""
            raise MacroError(f"unknown macro ${{{name}}}{hint}")
        if depth >= MAX_DEPTH:
            raise MacroError(f"macros use macros, more than {MAX_DEPTH} deep")
        value = self._filled(self._values[name], depth + 1)
        self._expanded[name] = value
        return value


def _text(value: Scalar) -> str:
    """As it is put into other text: numbers as they are written."""
    truth = value.boolean
    return value.text if truth is None else str(truth).lower()
