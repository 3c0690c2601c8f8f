"""How the keys of a llama-swap configuration are read.

``fields`` reads our own configuration; this is the other dialect. What differs:

- A key without a value has its default.
- Where text is wanted, a number will do, as it was written: ``name: 7``.
- ``yes``, ``no``, ``on`` and ``off`` are truth values where one is wanted.
- A text may have several lines.

A group of keys is read through ``Keys``, which knows afterwards what nobody asked for.
"""

import difflib
import re
from types import TracebackType
from typing import Any, TypeVar

from inferencia import fields, values, yamlfile
from inferencia.fields import Place, Reader, Rejected, list_of, whole
from inferencia.models.definitions import PORT_MACRO, Filters, Timeouts
from inferencia.yamlfile import Mapping, Node, Scalar, Sequence, Style

T = TypeVar("T")

# Seconds. A century is long enough, and short enough for every timer.
SECONDS = whole(0, 100 * 366 * 86400)
# Of a request's JSON; changing it would send the request elsewhere.
PROTECTED = "model"
_NONE: tuple[str, ...] = ()

_WORDS = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}
# Tab and line end belong to text of several lines.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class Keys:
    """The keys of one group; those that were not taken are reported at the end."""

    def __init__(self, place: Place, *, extensible: bool = False) -> None:
        """
        Args:
            place: where the group stands.
            extensible: leave names alone that begin with ``x-``. As in compose files,
                they are where anchors are put.

        Raises:
            Rejected: there is something else in the place of a group.
        """
        node = place.node
        if isinstance(node, Scalar) and node.is_null:
            node = Mapping()
        if not isinstance(node, Mapping):
            raise place.rejected("expected a group of keys")
        self.place = place
        self._items = node.items
        self._extensible = extensible
        self._known: list[str] = []

    def __enter__(self) -> "Keys":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._report_unknown()

    def has(self, name: str) -> bool:
        """Whether the key was written, with a value."""
        node = self._items.get(name)
        return node is not None and not is_null(node)

    def take(self, name: str, read: Reader[T], default: T) -> T:
        """What ``name`` says; ``default`` where it says nothing or nothing usable."""
        self._known.append(name)
        if not self.has(name):
            return default
        here = self.place.below(name, self._items[name])
        try:
            return read(here)
        except Rejected as rejected:
            here.book.error(here.name, str(rejected))
            return default

    def several(self, name: str, read: Reader[T]) -> T:
        """What ``name`` says, by a reader that makes of nothing something empty."""
        return self.take(name, read, read(self.place.below(name, Scalar(""))))

    def without_effect(self, name: str, read: Reader[T], why: str) -> None:
        """Check what ``name`` says, and warn that nothing comes of it."""
        self.take(name, read, None)
        if self.has(name):
            self.place.book.warn(yamlfile.below(self.place.path, name), why)

    def _report_unknown(self) -> None:
        for name, node in self._items.items():
            if name in self._known or (self._extensible and name.startswith("x-")):
                continue
            here = self.place.below(name, node)
            here.book.error(here.path, f"unknown key{self._suggestion(name)}")

    def _suggestion(self, name: str) -> str:
        known = {_letters(key): key for key in self._known}
        if close := difflib.get_close_matches(_letters(name), known, n=1):
            meant = yamlfile.below(self.place.path, known[close[0]])
            return f"; did you mean {meant}?"
        return f"; known here: {', '.join(self._known)}"


def _letters(name: str) -> str:
    """The name whatever its case and punctuation: both dialects are about."""
    return name.lower().replace("_", "").replace("-", "")


def is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.is_null


# --- single values ---------------------------------------------------------------


def block(place: Place) -> str:
    """Text of one line or several, without what surrounds it."""
    value = place.scalar("expected text").text.strip()
    if _CONTROL.search(value):
        raise Rejected("expected text without control characters")
    return value


def line(place: Place) -> str:
    """One line of text, which may be empty."""
    value = block(place)
    if "\n" in value:
        raise Rejected("expected text on one line")
    return value


def name(place: Place) -> str:
    """One line of text that is not empty."""
    if value := line(place):
        return value
    raise Rejected("expected a name, got nothing between the quotes")


NAMES: Reader[tuple[str, ...]] = list_of(name)


def flag(place: Place) -> bool:
    """A truth value, in the words of YAML 1.1 too."""
    node = place.scalar("expected true or false")
    value = node.boolean
    if value is None and node.style is Style.PLAIN:
        value = _WORDS.get(node.text.lower())
    if value is None:
        raise place.rejected("expected true or false")
    return value


def proxy(place: Place) -> str:
    """A base URL; ``${PORT}`` may stand for its port."""
    value = line(place)
    tried = Scalar(value.replace(PORT_MACRO, "1"), Style.QUOTED)
    values.url(Place(tried, place.path, place.book))
    return value


def api_key(place: Place) -> str:
    """A key that clients send, or that is sent to a server; never shown."""
    value = line(place.secret())
    if not re.fullmatch(r"[!-~]+", value):
        raise Rejected("expected a key without blanks and letters beyond ASCII")
    return value


def seconds(place: Place) -> float:
    return float(SECONDS(place))


# --- values of any shape ---------------------------------------------------------


def plain(node: Node) -> Any:
    """What a JSON reader would have made of it."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items.items()}
    if isinstance(node, Sequence):
        return [plain(value) for value in node.items]
    if node.is_null:
        return None
    if node.boolean is not None:
        return node.boolean
    return node.text if node.number is None else node.number


def free(place: Place) -> dict[str, Any]:
    """A mapping of whatever its owner wants; nothing is an empty one."""
    if is_null(place.node):
        return {}
    if isinstance(place.node, Mapping):
        return {key: plain(value) for key, value in place.node.items.items()}
    raise place.rejected("expected names with values")


# --- what models and peers have in common ----------------------------------------


def _params(place: Place) -> dict[str, Any]:
    """JSON members to be set in a request; ``model`` is left out with a warning."""
    found = free(place)
    if PROTECTED in found:
        del found[PROTECTED]
        path = yamlfile.below(place.path, PROTECTED)
        place.book.warn(path, "never set: it says where the request goes")
    return found


def _stripped(place: Place) -> tuple[str, ...]:
    """Names with commas between them."""
    found = dict.fromkeys(part.strip() for part in line(place).split(","))
    found.pop("", None)
    if PROTECTED in found:
        del found[PROTECTED]
        place.book.warn(place.path, f"{PROTECTED} is never taken out")
    return tuple(found)


def filters(place: Place, *, by_id: bool = True) -> Filters:
    """``filters``; those of peers are not ``by_id``."""
    with Keys(place) as keys:
        strip = keys.take("stripParams", _stripped, _NONE)
        old = keys.take("strip_params", _stripped, _NONE)
        if keys.has("strip_params"):
            here = yamlfile.below(place.path, "strip_params")
            ignored = ", and ignored beside it" if keys.has("stripParams") else ""
            place.book.warn(here, f"deprecated; it is stripParams now{ignored}")
        params = keys.several("setParams", _params)
        of_ids = fields.mapping_of(_params)
        by_name = keys.several("setParamsByID", of_ids) if by_id else {}
        strip = strip if keys.has("stripParams") else old
        return Filters(strip, params, by_name)


def timeouts(place: Place) -> Timeouts:
    """``timeouts``: whole seconds."""
    usual = Timeouts()
    with Keys(place) as keys:
        found = Timeouts(
            connect=keys.take("connect", seconds, usual.connect),
            keepalive=keys.take("keepalive", seconds, usual.keepalive),
            response_header=keys.take("responseHeader", seconds, 0.0),
            tls_handshake=keys.take("tlsHandshake", seconds, usual.tls_handshake),
            expect_continue=keys.take("expectContinue", seconds, usual.expect_continue),
            idle_conn=keys.take("idleConn", seconds, usual.idle_conn),
        )
    for key, value, default in (
        ("keepalive", found.keepalive, usual.keepalive),
        ("tlsHandshake", found.tls_handshake, usual.tls_handshake),
        ("expectContinue", found.expect_continue, usual.expect_continue),
        ("idleConn", found.idle_conn, usual.idle_conn),
    ):
        if value != default:
            here = yamlfile.below(place.path, key)
            place.book.warn(here, "no effect here; see docs/llama-swap.md")
    return found
