"""What every assembler shares: reading the events, merging pieces, the limits.

A protocol's own assembler says in ``_take`` what one event adds and in ``_answer``
what all of them make. Growing strings are collected as ``Text`` and joined once at the
end; adding to a long string for each token would take quadratic time.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from inferencia.metering import Tally, Usage
from inferencia.sse import Event, EventSplitter, EventTooLarge, parse

# The most that one answer may take while it is put together: over a million tokens.
MAX_ANSWER_BYTES = 64 * 1024 * 1024

# Strings that name something. They are sent whole, by some engines with every piece.
_NAMES = frozenset(
    ("call_id", "format", "id", "model", "name", "object", "role", "status", "type")
)

# How many items of a list, such as tool calls, may grow side by side.
_MAX_INDEXED = 1024

# What a Python object takes beside its content, roughly.
_OBJECT_BYTES = 56


class AssemblyError(ValueError):
    """The stream does not make an answer. The text says why and fits a log."""


class Text(list[str]):
    """A string that is still growing, as its pieces."""


class Assembler(ABC):
    """Puts the events of one stream together to the answer without a stream.

    Feed it all bytes of the stream, and call ``finish`` at its end. Then one of four
    things is true: ``error`` is set; ``broken`` is set; ``complete``, and ``result`` is
    the answer; or none of these, because the stream broke off.
    """

    # Whether ``stream_options.include_usage`` makes this endpoint's streams complete.
    asks_usage: ClassVar[bool] = False

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        """Begin one answer.

        Args:
            values: the members of the request as the client sent it. Some of them
                decide what the direct answer contains and its stream does not.
        """
        self._values = values or {}
        self._splitter = EventSplitter(MAX_ANSWER_BYTES)
        self._tally = Tally()
        self._size = 0  # estimated bytes in memory
        self.is_ended = False  # the closing ``[DONE]`` came
        self.error: bytes | None = None  # the body of the error that the stream brought
        self.broken: str | None = None  # why the stream can be no answer; fits a log

    @property
    def complete(self) -> bool:
        """Whether all of the answer has come, and nothing was wrong with it."""
        return self.broken is None and self.error is None and self._has_all()

    @property
    def usage(self) -> Usage | None:
        """What the answer cost: of all its choices, even if it names but the first."""
        return self._tally.usage

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream. Raises nothing, see ``broken``.

        After an error or once it is broken, bytes are neither looked at nor kept.
        """
        try:
            if self.broken is None and self.error is None:
                for event in self._splitter.feed(data):
                    self._take_event(parse(event))
        except (AssemblyError, EventTooLarge) as error:
            self._break(str(error))
        except RecursionError:
            self._break("the answer is nested too deeply")

    def finish(self) -> None:
        """The stream has ended; its last event may lack the blank line. Idempotent."""
        if self._splitter.pending:
            self.feed(b"\n\n")

    def result(self) -> bytes:
        """The answer as a JSON body. Call it when the stream has ended.

        Raises:
            AssemblyError: the stream brought an error, or is broken, or broke off.
        """
        self.finish()
        if self.broken is not None:
            raise AssemblyError(self.broken)
        if self.error is not None:
            raise AssemblyError("the stream brought an error")
        if not self.complete:
            raise AssemblyError("the stream ended before the answer was complete")
        try:
            answer = plain(self._answer())
            return json.dumps(answer, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair; only ASCII can spell it
            return json.dumps(answer).encode()
        except RecursionError as error:
            raise AssemblyError("the answer is nested too deeply") from error

    @abstractmethod
    def _has_all(self) -> bool:
        """Whether the last event that matters has come."""

    @abstractmethod
    def _take(self, content: dict[str, Any]) -> None:
        """Add what one event says."""

    @abstractmethod
    def _answer(self) -> Any:
        """The answer, made of what was added. ``Text`` may still be in it."""

    def _take_event(self, event: Event) -> None:
        if self.error is not None or not event.data:
            return
        if event.data.strip() == b"[DONE]":
            self.is_ended = True
            return
        try:
            content = json.loads(event.data)
        except (ValueError, RecursionError) as error:
            raise AssemblyError("an event of the stream is not JSON") from error
        if not isinstance(content, dict):
            return  # llama-server begins a stream for several prompts with ``null``
        if event.name == "error" or content.get("type") == "error":
            content = {"error": content.get("error") or content}
        if content.get("error"):
            self.error = json.dumps({"error": content["error"]}).encode()
            return
        self._grow(_OBJECT_BYTES)
        self._tally.add(content)
        self._take(content)

    def _break(self, why: str) -> None:
        self.broken = why
        self._splitter = EventSplitter()  # lets go of what it held

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MAX_ANSWER_BYTES:
            raise AssemblyError(f"the answer exceeds {MAX_ANSWER_BYTES} bytes")

    def _merge(self, into: dict[str, Any], piece: Mapping[str, Any]) -> None:
        """Add one piece of an object to what there is of it already.

        Strings grow, unless they are names; lists grow, and their items that carry an
        ``index`` are merged with the one of the same index; of anything else the last
        value counts. ``null`` changes nothing, but a member that is there stays there.
        """
        for name, value in piece.items():
            into[name] = self._merged(into.get(name), value, name)

    def _merged(self, old: Any, new: Any, name: str) -> Any:
        if new is None:
            return old
        if isinstance(new, str):
            if name in _NAMES:
                return new or old
            self._grow(_OBJECT_BYTES + len(new))
            text = old if isinstance(old, Text) else Text()
            text.append(new)
            return text
        if isinstance(new, list):
            items = old if isinstance(old, list) and type(old) is list else []
            self._extend(items, new)
            return items
        if isinstance(new, dict):
            members = old if isinstance(old, dict) else {}
            self._merge(members, new)
            return members
        return new

    def _extend(self, items: list[Any], new: list[Any]) -> None:
        for item in new:
            index = index_of(item)
            known = index is not None and next(
                (old for old in items if index_of(old) == index), None
            )
            if isinstance(known, dict):
                self._merge(known, item)
            elif index is not None:
                if len(items) >= _MAX_INDEXED:
                    raise AssemblyError("too many pieces with an index of their own")
                items.append({})
                self._merge(items[-1], item)
            else:
                self._grow(weight(item))
                items.append(item)


def index_of(item: Any) -> int | None:
    """The ``index`` that says which item of a list a piece belongs to, if any."""
    index = item.get("index") if isinstance(item, dict) else None
    return index if isinstance(index, int) else None


def weight(value: Any) -> int:
    """Roughly the bytes that a decoded value takes in memory."""
    if isinstance(value, str):
        return _OBJECT_BYTES + len(value)
    if isinstance(value, list):
        return _OBJECT_BYTES + sum(map(weight, value))
    if isinstance(value, dict):
        return 2 * _OBJECT_BYTES + sum(map(weight, value.values()))
    return _OBJECT_BYTES // 2


def plain(value: Any) -> Any:
    """The value with every growing string joined."""
    if isinstance(value, Text):
        return "".join(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value
