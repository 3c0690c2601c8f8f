"""How the configuration's tree becomes groups of values: readers, and what they read.

A reader is a function from a ``Place`` (a value, with its path) to what the program
works with: seconds, bytes, networks, secrets. It raises ``Rejected`` with a message
that says what was expected and shows what was found; secrets are never shown. Readers
of lists and groups note a rejection and go on, so that one run reports every error.

A group of keys is a frozen dataclass whose fields are made by ``key`` and ``part``:

    @dataclass(frozen=True, slots=True)
    class ServerConfig:
        port: int = key(whole(0, 65535), 8080)
        tls: TlsConfig = part(TlsConfig)

That declaration is all there is: the reading, the names of the known keys and the
defaults follow from it. Here are the readers of words, numbers, lists and groups; what
means something outside of the file (paths, addresses, headers) is read by ``values``.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from inferencia import quantities, yamlfile
from inferencia.secret import Secret
from inferencia.yamlfile import Mapping, Node, Scalar, Sequence, Style

T = TypeVar("T")

# Enough to recognise a value by, short enough to leave the message on one line.
MAX_SHOWN = 60

# What a secret that strayed into another field looks like.
_LOOKS_SECRET = re.compile(r"(?i)^\s*(?:sk-|hf_|sha256:|bearer\s|basic\s|gsk_|eyJ)")


class Rejected(Exception):
    """A value that cannot be taken; the message completes ``path: ``."""


@dataclass(slots=True)
class Book:
    """What one reading works with, and what it brings to light."""

    env: MappingABC[str, str]
    folder: Path  # relative paths from the file begin here
    # All keys that exist, as ``backends[].url``: to name the one that was meant.
    known: tuple[str, ...] = ()
    # Unknown keys that only cause a warning, with its text.
    tolerated: MappingABC[str, str] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    # Variables that secrets came from; child processes must not see them.
    secret_variables: set[str] = dataclasses.field(default_factory=set)

    def error(self, path: str, message: str) -> None:
        self.errors.append(f"{path}: {message}" if path else message)

    def warn(self, path: str, message: str) -> None:
        self.warnings.append(f"{path}: {message}" if path else message)


@dataclass(frozen=True, slots=True)
class Place:
    """One value, where it stands, and whether it may be shown."""

    node: Node
    path: str
    book: Book
    is_secret: bool = False

    @property
    def name(self) -> str:
        """What errors call it: its path, or the variable or flag it came from."""
        label = self.node.label if isinstance(self.node, Scalar) else None
        return label or self.path

    def below(self, key: str, node: Node) -> "Place":
        path = yamlfile.below(self.path, key)
        return Place(node, path, self.book, self.is_secret)

    def item(self, index: int, node: Node) -> "Place":
        return Place(node, f"{self.path}[{index}]", self.book, self.is_secret)

    def secret(self) -> "Place":
        return dataclasses.replace(self, is_secret=True)

    def rejected(self, expected: str) -> Rejected:
        """``expected …, got …``, for the caller to raise."""
        return Rejected(f"{expected}, got {self.shown()}")

    def shown(self) -> str:
        """The value as an error may show it."""
        if isinstance(self.node, Mapping):
            return "a group of keys"
        if isinstance(self.node, Sequence):
            return "a list"
        if self.is_secret or _LOOKS_SECRET.match(self.node.text):
            return "something else (not shown, it may be secret)"
        if self.node.is_null:
            return "nothing"
        if not self.node.is_text:
            return self.node.text
        filled = self.node.style is Style.FILLED_IN and not self.node.label
        return quoted(self.node.text) + (" from a variable" if filled else "")

    def scalar(self, expected: str) -> Scalar:
        """The single value here, with its variables filled in.

        Raises:
            Rejected: a group, a list or nothing is here, or a variable is not set.
        """
        if not isinstance(self.node, Scalar) or self.node.is_null:
            raise self.rejected(expected)
        if "${env." not in self.node.text or self.node.label:
            return self.node
        if self.is_secret:
            self.book.secret_variables.update(self.node.variables)
        if "${env." in self.node.substituted(lambda name: "").text:
            raise Rejected("expected ${env.NAME}, the name of an environment variable")
        return self.node.substituted(self._variable)

    def _variable(self, name: str) -> str:
        try:
            return self.book.env[name]
        except KeyError:
            raise Rejected(f"the environment variable {name} is not set") from None

    def filled(self, expected: str) -> "Place":
        """The same place holding ``scalar(expected)``."""
        return dataclasses.replace(self, node=self.scalar(expected))


Reader = Callable[[Place], T]

# Under this name a dataclass field keeps the reader of its key.
READER = "reader"


def key(read: Reader[T], default: T) -> T:
    """A field that is a key of the configuration."""
    metadata = {READER: read}
    if isinstance(default, dict):  # a mutable default needs a factory
        return cast(
            T,
            dataclasses.field(default_factory=lambda: dict(default), metadata=metadata),
        )
    return dataclasses.field(default=default, metadata=metadata)


def part(group: type[T], *, is_secret: bool = False) -> T:
    """A field that is a group of keys, declared by the dataclass ``group``."""
    read = section(group, is_secret=is_secret)
    return dataclasses.field(default_factory=group, metadata={READER: read})


def hidden(read: Reader[T], default: T) -> T:
    """A key whose value stays out of ``repr``."""
    return dataclasses.field(default=default, metadata={READER: read}, repr=False)


def readers(group: type[Any]) -> dict[str, Reader[Any]]:
    """The keys of a group and how each is read."""
    return {
        field.name: field.metadata[READER]
        for field in dataclasses.fields(group)
        if READER in field.metadata
    }


# --- single values ---------------------------------------------------------------


def text(place: Place) -> str:
    """One line of text that is not empty."""
    value = line(place, "expected text")
    if not value:
        raise Rejected("expected text, got nothing between the quotes")
    return value


def line(place: Place, expected: str) -> str:
    """One line of text, or nothing between quotes; ``expected`` begins the message."""
    place = place.filled(expected)
    node = cast(Scalar, place.node)
    if not node.is_text:
        raise Rejected(f"{expected}, got {place.shown()}; put it in quotes if meant so")
    value = node.text.strip()
    # Nothing here may hold a line end; in a header or a log it would do harm.
    if not value.isprintable():
        raise Rejected(f"{expected} on one line, without control characters")
    return value


def any_text(place: Place) -> str:
    """One line of text that may be empty; nothing is empty text."""
    if isinstance(place.node, Scalar) and place.node.is_null:
        return ""
    return line(place, "expected text")


def optional(read: Reader[T]) -> Reader[T | None]:
    """``null`` as well as what ``read`` takes; an empty text counts as ``null``."""

    def read_optional(place: Place) -> T | None:
        if isinstance(place.node, Scalar):
            if place.node.is_null:
                return None
            if not place.scalar("").text.strip():
                return None
        return read(place)

    return read_optional


def secret(place: Place) -> Secret | None:
    """A secret text; empty and ``null`` are none."""
    return optional(lambda here: Secret(text(here)))(place.secret())


def bearer(place: Place) -> Secret | None:
    """A secret that is sent as ``Authorization: Bearer``: visible ASCII."""
    value = secret(place)
    if value and not re.fullmatch(r"[!-~]+", value.reveal()):
        raise Rejected("expected a key without blanks and letters beyond ASCII")
    return value


def flag(place: Place) -> bool:
    place = place.filled("expected true or false")
    value = cast(Scalar, place.node).boolean
    if value is None:
        raise place.rejected("expected true or false")
    return value


def whole(low: int, high: int | None = None) -> Reader[int]:
    """A whole number from ``low`` to ``high``, both included."""
    bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
    if high is None and low == -(10**9):
        bounds = ""
    expected = f"expected a whole number {bounds}".rstrip()

    def read(place: Place) -> int:
        place = place.filled(expected)
        value = cast(Scalar, place.node).number
        if isinstance(value, float):
            raise place.rejected(expected)
        if value is None:
            raise Rejected(f"{expected}, got {place.shown()}{_number_hint(place)}")
        if value < low or (high is not None and value > high):
            raise place.rejected(expected)
        return value

    return read


def _number_hint(place: Place) -> str:
    node = cast(Scalar, place.node)
    digits = node.text.replace("_", "")
    if node.style is Style.QUOTED and re.fullmatch(r"[0-9.]+", digits):
        return "; write it without quotes"
    if re.fullmatch(r"0[0-9]+", digits):
        return "; write it without leading zeros"
    if digits != node.text and digits.isdigit():
        return "; write it without _"
    if node.label and node.text.startswith("tcp://"):
        # Kubernetes gives every container NAME_PORT=tcp://... for a service "name".
        return "; Kubernetes sets this for a service of that name"
    return ""


def number(*, above: float | None = None) -> Reader[float]:
    """A number with or without a fraction, greater than ``above``."""
    expected = "expected a number" + (f" above {above:g}" if above is not None else "")

    def read(place: Place) -> float:
        place = place.filled(expected)
        value = cast(Scalar, place.node).number
        if value is None:
            raise Rejected(f"{expected}, got {place.shown()}{_number_hint(place)}")
        if above is not None and value <= above:
            raise place.rejected(expected)
        return float(value)

    return read


def duration(*, can_be_zero: bool = True) -> Reader[float]:
    """Seconds, from ``30s``, ``1h30m``, ``0.5``."""

    def read(place: Place) -> float:
        place = place.filled(quantities.DURATION_EXPECTED)
        seconds = _quantity(place, quantities.parse_duration)
        if not seconds and not can_be_zero:
            raise place.rejected("expected a duration above zero")
        return seconds

    return read


def size(low: int = 0) -> Reader[int]:
    """Bytes, from ``64MiB`` or a bare number."""

    def read(place: Place) -> int:
        place = place.filled(quantities.SIZE_EXPECTED)
        bytes_ = _quantity(place, quantities.parse_size)
        if bytes_ < low:
            least = quantities.format_size(low)
            raise place.rejected(f"expected a size of at least {least}")
        return bytes_

    return read


def _quantity(place: Place, parse: Callable[[str], T]) -> T:
    try:
        return parse(cast(Scalar, place.node).text)
    except ValueError as error:
        raise place.rejected(str(error)) from None


def one_of(*names: str, **synonyms: str) -> Reader[str]:
    """One of ``names``, in any case."""
    expected = f"expected {_listed(names)}"

    def read(place: Place) -> str:
        place = place.filled(expected)
        value = cast(Scalar, place.node).text.strip().lower()
        value = synonyms.get(value, value)
        if value not in names:
            raise Rejected(f"{expected}, got {place.shown()}{nearest(value, names)}")
        return value

    return read


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def nearest(name: str, known: MappingABC[str, Any] | tuple[str, ...]) -> str:
    """``; did you mean X?`` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def anything(place: Place) -> Node | None:
    """Whatever is there, unread."""
    is_null = isinstance(place.node, Scalar) and place.node.is_null
    return None if is_null else place.node


def tri_state(place: Place) -> bool | None:
    """``true``, ``false``, or ``auto`` (None)."""
    place = place.filled("expected auto, true or false")
    node = cast(Scalar, place.node)
    if node.text.strip().lower() == "auto":
        return None
    if node.boolean is None:
        raise place.rejected("expected auto, true or false")
    return node.boolean


# --- several values --------------------------------------------------------------


def list_of(read: Reader[T]) -> Reader[tuple[T, ...]]:
    """A list; nothing is an empty one."""

    def read_list(place: Place) -> tuple[T, ...]:
        if isinstance(place.node, Scalar) and place.node.is_null:
            return ()
        if not isinstance(place.node, Sequence):
            raise place.rejected("expected a list")
        places = [place.item(i, node) for i, node in enumerate(place.node.items)]
        return tuple(value for here in places for value in _tried(read, here))

    return read_list


def mapping_of(read: Reader[T]) -> Reader[dict[str, T]]:
    """Names with values; nothing is an empty mapping."""

    def read_mapping(place: Place) -> dict[str, T]:
        if isinstance(place.node, Scalar) and place.node.is_null:
            return {}
        if not isinstance(place.node, Mapping):
            raise place.rejected("expected names with values")
        found = {}
        for name, node in place.node.items.items():
            here = place.below(name, node)
            if not name.strip() or not name.isprintable():
                here.book.error(here.path, "a name must be one line of text")
                continue
            for value in _tried(read, here):
                found[name] = value
        return found

    return read_mapping


def section(group: type[T], *, is_secret: bool = False) -> Reader[T]:
    """A group of keys, as the dataclass ``group`` declares them.

    ``is_secret``: what stands where the group should be may be a secret.
    """

    def read_section(place: Place) -> T:
        if isinstance(place.node, Scalar) and place.node.is_null:
            return group()
        known = readers(group)
        if not isinstance(place.node, Mapping):
            place = place.secret() if is_secret else place
            raise place.rejected(f"expected a group with {', '.join(known)}")
        values = {}
        for name, node in place.node.items.items():
            here = place.below(name, node)
            if name not in known:
                _unknown(here, name, known)
                continue
            for value in _tried(known[name], here):
                values[name] = value
        return group(**values)

    return read_section


def _tried(read: Reader[T], place: Place) -> Iterator[T]:
    """The value, or nothing once its rejection is noted."""
    try:
        yield read(place)
    except Rejected as rejected:
        place.book.error(place.name, str(rejected))


def _unknown(place: Place, name: str, known: MappingABC[str, Any]) -> None:
    general = general_path(place.path)
    if general in place.book.tolerated:
        place.book.warn(place.path, place.book.tolerated[general])
        return
    place.book.error(place.path, f"unknown key{_suggestion(place, name, known)}")


def general_path(path: str) -> str:
    """``backends[].url`` of ``backends[3].url``."""
    return re.sub(r"\[[0-9]+\]", "[]", path)


def _suggestion(place: Place, name: str, known: MappingABC[str, Any]) -> str:
    """The nearest known key: beside it, else one of that name elsewhere."""
    name_meant = name.lower().replace("-", "_")
    parent = place.path[: place.path.rfind(".") + 1]
    if close := difflib.get_close_matches(name_meant, known, n=1):
        return f"; did you mean {parent}{close[0]}?"
    leaves = {path.rpartition(".")[2]: path for path in reversed(place.book.known)}
    if close := difflib.get_close_matches(name_meant, leaves, n=1, cutoff=0.7):
        return f"; did you mean {leaves[close[0]]}?"
    return f"; known here: {', '.join(known)}"


def quoted(value: str) -> str:
    """A text as messages show it: between quotation marks, and not too long."""
    clipped = value if len(value) <= MAX_SHOWN else value[: MAX_SHOWN - 1] + "…"
    return json.dumps(clipped, ensure_ascii=not clipped.isprintable())
