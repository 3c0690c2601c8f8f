"""A strict reading of YAML: text in, a tree of what was written out.

PyYAML reads YAML 1.1, where ``1:30`` is 90, ``on`` and ``no`` are booleans, ``010`` is
8 and of two equal keys the last one wins. A configuration that silently means
something else than it says is worse than an error, so PyYAML's parser is used only for
its events, and this module makes of them what YAML 1.2's core schema would:

    null        ``null``, ``~``, nothing
    true/false  ``true`` and ``false``, also capitalised; nothing else
    numbers     decimal, with or without fraction and exponent; no leading zero, no
                ``_``, no ``0x`` or ``0o``, no ``.inf``
    text        everything else, and whatever stands in quotes

A scalar keeps its text: the reader of a field decides what the field needs, and an
error can show what was really written.

Not supported, and refused with the line: merge keys (``<<``; unless the caller wants
them), tags other than ``!!str``, several documents, keys that are no scalars. Aliases
work within bounds.

``${env.NAME}`` may stand in any value, quoted or not, also inside ``{...}`` where a
bare ``{`` is YAML's own; see ``Scalar.variables`` and ``Scalar.substituted``.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

import yaml

# A hundred times the complete example file. PyYAML reads about 200 KB/s.
MAX_BYTES = 512 * 1024
# Values in the tree, those behind an alias counted each time. This and the next two
# stop "billion laughs": a few lines of aliases to aliases that expand to gigabytes.
MAX_NODES = 20_000
MAX_ALIASES = 200
# The deepest known key has five levels.
MAX_DEPTH = 32
# A model's name may be a key. What is longer would drown the message it stands in.
MAX_SHOWN_KEY = 100

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{0,17})?|\.[0-9]{1,17})"
    r"(?:[eE][-+]?[0-9]{1,2})?"
)
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True}
_BOOLEANS |= {"false": False, "False": False, "FALSE": False}

# While PyYAML looks at the text, ${env.NAME} is hidden between two characters from
# Unicode's private use area, since a bare "{" means something inside {...}.
_OPEN, _CLOSE = "\ue000", "\ue001"
_VARIABLE = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")
_HIDDEN = re.compile(f"{_OPEN}([A-Za-z0-9_]+){_CLOSE}")


class Style(Enum):
    """How a scalar was written, which decides what it may mean."""

    PLAIN = "plain"  # without quotes: a number, true, null, or text
    QUOTED = "quoted"  # in quotes or as a block: text
    FILLED_IN = "filled in"  # holds a variable's value: whatever the field needs


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value. ``label`` names its origin if that is not its place in the file."""

    text: str
    style: Style = Style.PLAIN
    line: int = 0  # from 1; 0 for what comes from no file
    label: str | None = None

    @property
    def is_null(self) -> bool:
        return self.style is Style.PLAIN and self.text in _NULLS

    @property
    def number(self) -> int | float | None:
        """The number it stands for, or None."""
        if self.style is Style.QUOTED:
            return None
        if _INTEGER.fullmatch(self.text):
            return int(self.text)
        return float(self.text) if _FLOAT.fullmatch(self.text) else None

    @property
    def boolean(self) -> bool | None:
        """The truth value it stands for, or None."""
        return None if self.style is Style.QUOTED else _BOOLEANS.get(self.text)

    @property
    def is_text(self) -> bool:
        """Whether it can only be text: no number, no truth value, not nothing."""
        if self.style is not Style.PLAIN:
            return True
        return not self.is_null and self.number is None and self.boolean is None

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that it refers to."""
        return tuple(_VARIABLE.findall(self.text))

    def substituted(self, value_of: Callable[[str], str]) -> "Scalar":
        """With each ``${env.NAME}`` replaced by ``value_of(NAME)``."""
        text = _VARIABLE.sub(lambda match: value_of(match[1]), self.text)
        return replace(self, text=text, style=Style.FILLED_IN)


@dataclass(frozen=True, slots=True)
class Mapping:
    items: dict[str, "Node"] = field(default_factory=dict)
    line: int = 0
    # On which line each key stands, those of ``<<`` left out; of two, the second.
    lines: dict[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Sequence:
    items: tuple["Node", ...] = ()
    line: int = 0


Node = Scalar | Mapping | Sequence


@dataclass(frozen=True, slots=True)
class Document:
    """What a file holds, and what is wrong with it that did not stop the reading."""

    root: Node
    problems: tuple[str, ...] = ()  # each "path: message"
    has_merge_keys: bool = False


class YamlError(Exception):
    """The text is not YAML, or goes beyond a bound; the message says where."""


def below(path: str, key: str) -> str:
    """The path of ``key`` in the mapping at ``path``, fit for one line."""
    if not key.isprintable() or len(key) > MAX_SHOWN_KEY:
        key = ascii(key[:MAX_SHOWN_KEY])
    return f"{path}.{key}" if path else key


def line_of(root: Node, path: str) -> int | None:
    """The line of what a path means, or of the nearest thing around it; from 1.

    Args:
        root: of the document.
        path: as in messages: ``backends[1].timeout``, or with the item's name.
    """
    found = None
    at = 0  # so much of the path leads to ``root``
    while at < len(path):
        step = _step(root, path, at)
        if step is None:
            break
        root, at, line = step
        found = line or found
    return found


def _step(node: Node, path: str, at: int) -> tuple[Node, int, int] | None:
    """One level down: what is there, the path's length so far, and the line."""
    rest = path[at:].removeprefix(".")
    at = len(path) - len(rest)
    if isinstance(node, Mapping):
        # Names may have dots; of two that fit, the longer one is meant.
        for key in sorted(node.items, key=len, reverse=True):
            name = below("", key)
            if rest.startswith(name) and rest[len(name) :][:1] in ("", ".", "["):
                inner = node.items[key]
                return inner, at + len(name), node.lines.get(key, inner.line)
    elif isinstance(node, Sequence) and rest.startswith("["):
        for index, inner in enumerate(node.items):
            own = inner.items.get("name") if isinstance(inner, Mapping) else None
            for called in (str(index), own.text if isinstance(own, Scalar) else ""):
                if rest.startswith(f"[{called}]"):
                    return inner, at + len(called) + 2, inner.line
    return None


def parse(content: bytes, *, merge_keys: bool = False) -> Document:
    """Read one YAML document; an empty one is an empty mapping.

    Args:
        content: the file's bytes.
        merge_keys: take ``<<: *name`` as YAML 1.1 does: the keys of that mapping are
            in this one too, unless it has them itself.

    Raises:
        YamlError: it cannot be read at all. Keys that stand twice are reported as
            problems instead, so that they come together with other errors.
    """
    if len(content) > MAX_BYTES:
        raise YamlError(f"larger than {MAX_BYTES // 1024} KiB")
    text = _VARIABLE.sub(f"{_OPEN}\\1{_CLOSE}", _decoded(content))
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        return _Composer(events, merge_keys).document()
    except yaml.MarkedYAMLError as error:
        raise YamlError(_explained(error)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            f"line {line}: the character U+{ord(text[error.position]):04X} cannot be"
            " in a YAML file"
        ) from None


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise YamlError("saved as UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise YamlError(f"line {line}: not UTF-8 (byte 0x{byte:02x})") from None
    if _OPEN in text or _CLOSE in text:
        raise YamlError("holds U+E000 or U+E001, which are reserved here")
    return text


def _explained(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        problem = "a tab where YAML wants spaces"
    elif problem == "mapping values are not allowed here":
        problem = 'a ":" that is out of place; is the line indented right?'
    elif any(sign in problem for sign in ("'%'", "'@'", "'`'")) or (
        error.context == "while scanning an alias"
    ):
        problem += "; put the value in quotes"
    if error.context and error.context_mark and mark:
        begun = error.context_mark.line
        opened = f" (begun on line {begun + 1})" if begun != mark.line else ""
        return f"{where}{error.context}{opened}: {problem}"
    return where + problem


def _shown(text: str) -> str:
    return _HIDDEN.sub(r"${env.\1}", text)


class _Composer:
    """Makes the tree of the events. It recurses, at most MAX_DEPTH deep."""

    def __init__(self, events: Iterator[yaml.Event], merge_keys: bool) -> None:
        self._events = events
        self._merge_keys = merge_keys
        self._has_merge_keys = False
        self._anchors: dict[str, tuple[Node, int]] = {}  # with its count of values
        self._problems: list[str] = []
        self._nodes = 0
        self._aliases = 0

    def document(self) -> Document:
        root: Node = Mapping()
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _refused(event, "a second document begins; one is allowed")
                root = self._node(next(self._events), "", 0)
        if isinstance(root, Scalar) and root.is_null:
            root = Mapping()
        return Document(root, tuple(self._problems), self._has_merge_keys)

    def _node(self, event: yaml.Event, path: str, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise _refused(event, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            return self._aliased(event)
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise _refused(
                event, "tags (!name) are not supported; put the value in quotes"
            )
        before = self._nodes
        self._count(event, 1)
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event)
        elif isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(event, path, depth)
        else:
            node = self._sequence(event, path, depth)
        # An anchor is known from here on, so that nothing can hold itself.
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, self._nodes - before)
        return node

    def _aliased(self, event: yaml.AliasEvent) -> Node:
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise _refused(event, f"more than {MAX_ALIASES} aliases")
        if event.anchor not in self._anchors:
            # Not repeating the name: a password may begin with "*", too.
            raise _refused(
                event,
                "an alias (*name) without its anchor (&name) above;"
                " put the value in quotes if it is no alias",
            )
        node, count = self._anchors[event.anchor]
        self._count(event, count)
        return node

    def _count(self, event: yaml.Event, count: int) -> None:
        self._nodes += count
        if self._nodes > MAX_NODES:
            raise _refused(event, f"more than {MAX_NODES} values")

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        is_plain = event.implicit[0] and not event.style
        style = Style.PLAIN if is_plain else Style.QUOTED
        return Scalar(_shown(event.value), style, _line(event))

    def _mapping(self, start: yaml.MappingStartEvent, path: str, depth: int) -> Mapping:
        items: dict[str, Node] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Node] = {}
        for event in self._until(yaml.MappingEndEvent):
            if self._merge_keys and _is_merge_key(event):
                for key, value in self._merged(event, path, depth).items():
                    merged.setdefault(key, value)
                continue
            key = self._key(event)
            here = below(path, key)
            value = self._node(next(self._events), here, depth + 1)
            first, lines[key] = lines.get(key, 0), _line(event)
            if key in items:
                second = lines[key]
                where = f"s {first} and {second}" if first != second else f" {first}"
                self._problems.append(f"{here}: given twice, on line{where}")
                continue
            items[key] = value
        for key, value in merged.items():
            items.setdefault(key, value)
        return Mapping(items, _line(start), lines)

    def _merged(self, event: yaml.Event, path: str, depth: int) -> dict[str, Node]:
        """The keys behind ``<<``: a mapping's, or several mappings', first one wins."""
        self._has_merge_keys = True
        node = self._node(next(self._events), path, depth + 1)
        found: dict[str, Node] = {}
        for one in node.items if isinstance(node, Sequence) else (node,):
            if not isinstance(one, Mapping):
                raise _refused(event, "a merge key (<<) needs a mapping, or several")
            for key, value in one.items.items():
                found.setdefault(key, value)
        return found

    def _key(self, event: yaml.Event) -> str:
        if isinstance(event, yaml.AliasEvent):
            node = self._aliased(event)
            if isinstance(node, Scalar):
                return node.text
        if not isinstance(event, yaml.ScalarEvent):
            raise _refused(event, "a key must be a single value")
        if _is_merge_key(event):
            raise _refused(event, "merge keys (<<) are not supported")
        self._node(event, "", 0)  # counts it and keeps its anchor
        return _shown(event.value)

    def _sequence(self, start: yaml.Event, path: str, depth: int) -> Sequence:
        events = self._until(yaml.SequenceEndEvent)
        items = tuple(
            self._node(event, f"{path}[{index}]", depth + 1)
            for index, event in enumerate(events)
        )
        return Sequence(items, _line(start))

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event


def _is_merge_key(event: yaml.Event) -> bool:
    if not isinstance(event, yaml.ScalarEvent):
        return False
    return event.value == "<<" and not event.style


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _refused(event: yaml.Event, message: str) -> YamlError:
    return YamlError(f"line {_line(event)}: {message}")
