"""The top-level members of a JSON object, found without re-encoding anything.

A request body belongs to the client: it goes upstream byte for byte, and when the
model's name or ``stream`` has to change, only that member's bytes may. So parsing
keeps, beside the decoded values, where each member's value lies in the body.

The names are read by a regular expression and the values by the standard library's
scanner, one call per member: 7 microseconds for a chat of 1 KiB, where ``json.loads``
takes 3. What is
accepted is RFC 8259, strictly: UTF-8 only (with or without a byte order mark), no
``NaN`` or ``Infinity``, nothing after the object, and no top-level member twice,
because two parsers may disagree on which of the two counts (RFC 8259, 4) and ours
decides who may use which model.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from inferencia.errors import InvalidJson

# OpenAI's largest request has about 40 members. Each one costs a turn of a Python
# loop, so the bound keeps a hostile body from holding the event loop for seconds.
MAX_MEMBERS = 1000

# One member up to its value, if its name needs no decoding; nearly all are like this.
_PLAIN_NAME = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
_QUOTE = re.compile(r'[ \t\n\r]*(?=")')
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_OPENING = re.compile(r"\ufeff?[ \t\n\r]*\{")
_OPENING_BYTES = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\n\r]*\{")
_CLOSING = re.compile(r"[ \t\n\r]*\}")
_SEPARATOR = re.compile(r"[ \t\n\r]*([,}])")
_END = re.compile(r"[ \t\n\r]*\Z")

# Half of a surrogate pair without its other half, or what looks like it: behind an
# escaped backslash the look-arounds cannot tell. Every alternative begins with the
# backslash so that the search runs at the speed of memchr.
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


_decode = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode


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
    _spans: dict[str, tuple[int, int]] = field(repr=False)  # of values: start, end
    _inside: int = field(repr=False)  # the byte after the opening brace

    @classmethod
    def parse(cls, body: bytes) -> "Members":
        """Read ``body``, which must be one JSON object and nothing else.

        Raises:
            InvalidJson: it is not; the message says where, and quotes nothing of it
                but a member's name.
        """
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
        values, spans = _read(_without_lone_surrogates(text), opening.end())
        if not text.isascii():
            spans = _in_bytes(text, spans)
        return cls(body, values, spans, len(text[: opening.end()].encode()))

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
        start, end = self._spans[name]
        return self.body[start:end]

    def replaced(self, changes: Mapping[str, Any]) -> bytes:
        """The body with the values of some members changed, and no other byte.

        A member that is absent is added right after the opening brace.
        """
        edits = [
            (self._spans[name], _written(value))
            for name, value in changes.items()
            if name in self._spans
        ]
        edits.sort()
        added = ",".join(
            json.dumps(name) + ":" + _written(value)
            for name, value in changes.items()
            if name not in self._spans
        )
        if added and self._spans:
            added += ","
        pieces = [self.body[: self._inside], added.encode()]
        done = self._inside
        for (start, end), value in edits:
            pieces += (self.body[done:start], value.encode())
            done = end
        pieces.append(self.body[done:])
        return b"".join(pieces)


def looks_like_json(body: bytes) -> bool:
    """Whether the first byte that is no white space opens an object.

    Such a body is JSON whatever its Content-Type says: curl's default is urlencoded.
    """
    return _OPENING_BYTES.match(body) is not None


def _written(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _read(text: str, at: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Values and their spans in ``text``, from just behind the opening brace."""
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    closing = _CLOSING.match(text, at)
    try:
        while closing is None:
            plain = _PLAIN_NAME.match(text, at)
            if plain is not None:
                name, start = plain[1], plain.end()
            else:
                name, start = _read_name(text, at)
            value, end = _decode(text, start)
            if name in values:
                raise InvalidJson(
                    f"the body has the member {json.dumps(name[:64])} twice"
                )
            values[name] = value
            spans[name] = (start, end)
            if len(values) > MAX_MEMBERS:
                raise InvalidJson(f"the body has more than {MAX_MEMBERS} members")
            separator = _SEPARATOR.match(text, end)
            if separator is None:
                raise _misplaced("expected ',' or '}'", end)
            at = separator.end()
            if separator[1] == "}":
                break
        else:
            at = closing.end()
    except json.JSONDecodeError as error:
        raise _misplaced(error.msg, error.pos) from None
    except RecursionError:
        raise InvalidJson("the body is nested too deeply") from None
    except ValueError:
        # CPython converts no integer of more than 4300 digits (CVE-2020-10735).
        raise InvalidJson("the body contains a number with too many digits") from None
    if _END.match(text, at) is None:
        raise _misplaced("nothing may follow the object", at)
    return values, spans


def _read_name(text: str, at: int) -> tuple[str, int]:
    """A name with escapes, and where its value begins."""
    quote = _QUOTE.match(text, at)
    if quote is None:
        raise _misplaced("expected a member's name in double quotes", at)
    name, end = _decode(text, quote.end())
    colon = _COLON.match(text, end)
    if colon is None:
        raise _misplaced("expected ':'", end)
    return name, colon.end()


def _misplaced(problem: str, at: int) -> InvalidJson:
    return InvalidJson(f"the body is not valid JSON: {problem} at character {at}")


def _in_bytes(
    text: str, spans: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """The same spans, counted in the bytes of UTF-8."""
    counted: dict[str, tuple[int, int]] = {}
    characters = octets = 0
    for name, (start, end) in spans.items():
        first = octets + len(text[characters:start].encode())
        octets = first + len(text[start:end].encode())
        characters = end
        counted[name] = (first, octets)
    return counted


def _without_lone_surrogates(text: str) -> str:
    """The same text, as long as before, with U+FFFD for each lone surrogate.

    ``text`` may hold them as escapes only: UTF-8 has no surrogates.
    """
    # The plain searches are for speed: hardly any body gets beyond them.
    if ("\\ud" in text or "\\uD" in text) and _MAYBE_LONE.search(text):
        return _ESCAPE.sub(lambda match: r"\ufffd" if match[1] else match[0], text)
    return text
