"""The top-level members of a JSON object, found without re-encoding anything.

A request body belongs to the client: it goes upstream byte for byte, and when the
model's name or ``stream`` has to change, only that member's bytes may. So parsing
keeps, beside the decoded values, where each member's value lies in the body.

The names are read by a regular expression and the values by the standard library's
scanner, one call per member, which takes hardly longer than ``json.loads``. What is
accepted is RFC 8259, strictly: UTF-8 only (with or without a byte order mark), no
``NaN`` or ``Infinity``, nothing after the object, and no top-level member twice,
because two parsers may disagree on which of the two counts (RFC 8259, 4) and ours
decides who may use which model.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from inferencia.errors import InvalidJson

# In place of a new value: the member goes.
REMOVED: Any = object()

# OpenAI's largest request has about 40 members. Each one costs a turn of a Python
# loop, so the bound keeps a hostile body from holding the event loop for seconds.
MAX_MEMBERS = 1000

# Decoding holds the event loop: 0.3 us for each empty array, 1.3 for a member's name,
# and collecting the garbage makes it worse (64 MiB of brackets: 20 s and 3 GB). So the
# signs that make values are counted in larger bodies, those in texts with the others.
# A prompt of a million tokens, all of it code, has some 200,000; an image has none.
MAX_VALUES = 500_000
_CHEAP_BYTES = 512 * 1024
_COMMAS_PER_VALUE = 4  # numbers are cheap, and batches of token numbers are long
# Escapes where one is half a surrogate, since then each one is looked at.
_MAX_ESCAPES = 1_000_000

# What stands before a value: after the opening brace or a comma, the member's name and
# a colon. A name that has to be decoded is not matched; nearly none has.
_PLAIN_NAME = r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*'
_FIRST = re.compile(_PLAIN_NAME)
_NEXT = re.compile(r"[ \t\n\r]*," + _PLAIN_NAME)
_QUOTE = re.compile(r'[ \t\n\r]*(?=")')
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_OPENING = re.compile(r"\ufeff?[ \t\n\r]*\{")
_OPENING_BYTES = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\n\r]*\{")
_CLOSING = re.compile(r"[ \t\n\r]*\}")
_SEPARATOR = re.compile(r"[ \t\n\r]*([,}])")
_END = re.compile(r"[ \t\n\r]*\Z")

# What has no such escape has no surrogates. This is five times as fast as looking for
# both spellings by ``in``, which took longer than all the rest with 8 MiB of prompt.
_SURROGATE = re.compile(r"\\u[dD]")
# Half of a surrogate pair without its other half, or what looks like it: behind an
# escaped backslash the look-arounds cannot tell.
_MAYBE_LONE = re.compile(
    r"\\(?:u[dD][89abAB]..(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB]..\\)u[dD][c-fC-F]"
    r"|\\u[dD])",
    re.DOTALL,
)
# Every escape in turn; group 1 is a half without its other half.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJson(f"the body is not valid JSON: {name} is not a JSON value")


# The scanner itself: ``raw_decode`` would be a call of it in Python. It raises
# StopIteration where a value should begin.
_scan: Callable[[str, int], tuple[Any, int]] = vars(
    json.JSONDecoder(parse_constant=_refuse_constant)
)["scan_once"]


@dataclass(frozen=True, slots=True)
class Members:
    """A JSON object's members, and the bytes that they were read from.

    Attributes:
        body: the object as it came.
        values: decoded values by decoded name, in the body's order. Half a surrogate
            pair, which cannot be encoded again, has become U+FFFD here (never in
            ``body``), so that every string can go into a message or a log.
    """

    # No field shows in repr(): they hold what people wrote.
    body: bytes = field(repr=False)
    values: dict[str, Any] = field(repr=False)
    # Where the values start and end, in characters.
    _spans: dict[str, tuple[int, int]] = field(repr=False)

    @classmethod
    def parse(cls, body: bytes) -> "Members":
        """Read ``body``, which must be one JSON object and nothing else.

        Raises:
            InvalidJson: it is not; the message says where, and quotes nothing of it
                but a member's name.
        """
        if len(body) > _CHEAP_BYTES and _count_values(body) > MAX_VALUES:
            raise InvalidJson("the body has too many values")
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            raise InvalidJson(
                f"the body is not UTF-8: byte {error.start} cannot be decoded"
            ) from None
        opening = _OPENING.match(text)
        if opening is None:
            problem = "not a JSON object" if text.strip() else "empty"
            raise InvalidJson(f"the body is {problem}; it must be a JSON object")
        return cls(body, *_read(_without_lone_surrogates(text), opening.end()))

    def get(self, name: str) -> Any:
        """The decoded value of a member; ``None`` if it is absent (or null)."""
        return self.values.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def raw(self, name: str) -> bytes:
        """The bytes of a member's value, as they came.

        Raises:
            KeyError: there is no such member.
        """
        start, end = self._in_bytes(name)
        return self.body[start:end]

    def replaced(self, changes: Mapping[str, Any]) -> bytes:
        """The body with the values of some members changed, and no other byte.

        A member that is absent is added right after the opening brace. One whose value
        is to be ``REMOVED`` goes with the comma that parted it from its neighbour.
        """
        edits = [
            self._without(name)
            if value is REMOVED
            else (*self._in_bytes(name), _written(value))
            for name, value in changes.items()
            if name in self._spans
        ]
        edits.sort(key=lambda edit: edit[:2])
        added = ",".join(
            json.dumps(name) + ":" + _written(value)
            for name, value in changes.items()
            if name not in self._spans and value is not REMOVED
        )
        leading = self._leading_removals(changes)
        if added and len(leading) < len(self._spans):
            added += ","
        done = self._opening_end()
        pieces = [self.body[:done], added.encode()]
        if leading and len(leading) < len(self._spans):
            # What was behind the last of them now comes first, without its comma.
            done = self.body.index(b",", self._in_bytes(leading[-1])[1]) + 1
        elif leading:
            done = self._in_bytes(leading[-1])[1]
        for start, end, value in edits:
            if start < done:
                continue
            pieces += (self.body[done:start], value.encode())
            done = end
        pieces.append(self.body[done:])
        return b"".join(pieces)

    def _leading_removals(self, changes: Mapping[str, Any]) -> list[str]:
        """The members to be removed before the first that stays, in their order."""
        leading = []
        for name in self._spans:
            if changes.get(name) is not REMOVED:
                break
            leading.append(name)
        return leading

    def _without(self, name: str) -> tuple[int, int, str]:
        """The edit that takes a member away: from behind the one before it."""
        names = list(self._spans)
        at = names.index(name)
        start = self._in_bytes(names[at - 1])[1] if at else self._opening_end()
        return start, self._in_bytes(name)[1], ""

    def _opening_end(self) -> int:
        opening = _OPENING_BYTES.match(self.body)
        assert opening is not None  # or there would be no members
        return opening.end()

    def _in_bytes(self, name: str) -> tuple[int, int]:
        """Where a member's value lies in ``body``."""
        start, end = self._spans[name]
        if self.body.isascii():
            return start, end
        text = self.body.decode()
        first = len(text[:start].encode())
        return first, first + len(text[start:end].encode())


def _count_values(body: bytes) -> int:
    """About how many values decoding would make, or more."""
    containers = body.count(b"[") + body.count(b"{") + body.count(b":")
    return containers + body.count(b",") // _COMMAS_PER_VALUE


def _written(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _read(text: str, at: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Values and their spans in ``text``, from just behind the opening brace."""
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    try:
        end = _read_members(text, at, values, spans)
    except json.JSONDecodeError as error:
        raise _misplaced(error.msg, error.pos) from None
    except StopIteration as stop:
        raise _misplaced("expected a value", stop.value) from None
    except RecursionError:
        raise InvalidJson("the body is nested too deeply") from None
    except ValueError:
        # CPython converts no integer of more than 4300 digits (CVE-2020-10735).
        raise InvalidJson("the body contains a number with too many digits") from None
    if _END.match(text, end) is None:
        raise _misplaced("nothing may follow the object", end)
    return values, spans


def _read_members(
    text: str, at: int, values: dict[str, Any], spans: dict[str, tuple[int, int]]
) -> int:
    """Fill ``values`` and ``spans``; returns where the object ends."""
    plain = _FIRST.match(text, at)
    if plain is None and (closing := _CLOSING.match(text, at)):
        return closing.end()
    for _ in range(MAX_MEMBERS):
        if plain is not None:
            name, start = plain[1], plain.end()
        else:
            name, start = _read_name(text, at)
        value, end = _scan(text, start)
        if name in values:
            raise InvalidJson(f"the body has the member {json.dumps(name[:64])} twice")
        values[name] = value
        spans[name] = (start, end)
        plain = _NEXT.match(text, end)
        if plain is None:
            separator = _SEPARATOR.match(text, end)
            if separator is None:
                raise _misplaced("expected ',' or '}'", end)
            at = separator.end()
            if separator[1] == "}":
                return at
    raise InvalidJson(f"the body has more than {MAX_MEMBERS} members")


def _read_name(text: str, at: int) -> tuple[str, int]:
    """A name with escapes, and where its value begins."""
    quote = _QUOTE.match(text, at)
    if quote is None:
        raise _misplaced("expected a member's name in double quotes", at)
    name, end = _scan(text, quote.end())
    colon = _COLON.match(text, end)
    if colon is None:
        raise _misplaced("expected ':'", end)
    return name, colon.end()


def _misplaced(problem: str, at: int) -> InvalidJson:
    return InvalidJson(f"the body is not valid JSON: {problem} at character {at}")


def _without_lone_surrogates(text: str) -> str:
    """The same text, as long as before, with U+FFFD for each lone surrogate.

    ``text`` may hold them as escapes only: UTF-8 has no surrogates.

    Raises:
        InvalidJson: there is one among very many escapes.
    """
    if "\\" in text and _SURROGATE.search(text) and _MAYBE_LONE.search(text):
        if text.count("\\") > _MAX_ESCAPES:
            raise InvalidJson("the body has half a surrogate pair and many escapes")
        return _ESCAPE.sub(lambda match: r"\ufffd" if match[1] else match[0], text)
    return text
