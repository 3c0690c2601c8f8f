"""How the built-in model ``echo`` speaks: in words, and in OpenAI's objects for them.

A word, with the white space before it, is one token; the white space at the end belongs
to the last word, so that the pieces joined are exactly the message. A ``Choice`` is
what is said; a ``Shape`` makes of choices the plain answer, or the events of a stream,
as chat completions and text completions have them.

Pure: the events of a stream are made one by one, as they are asked for.
"""

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_COUNTED_AT_ONCE = 64 * 1024  # characters

_DONE = b"data: [DONE]\n\n"
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Choice:
    """What one choice says: a text, some times over, but only so many words of it."""

    text: str
    repeat: int
    words: int
    finish_reason: str

    @classmethod
    def of(cls, text: str, repeat: int, most: int) -> "Choice":
        """``text``, ``repeat`` times over, but at most ``most`` words of it."""
        wanted = repeat * count_words(text)
        reason = "length" if wanted > most else "stop"
        return cls(text, repeat, min(wanted, most), reason)

    def pieces(self) -> Iterator[str]:
        """Its words, as ``pieces_of`` has them."""
        again = itertools.repeat(self.text, self.repeat)
        pieces = itertools.chain.from_iterable(map(pieces_of, again))
        return itertools.islice(pieces, self.words)


def pieces_of(text: str) -> Iterator[str]:
    """The words of a text with the white space before them; joined they are the text.

    A text of white space only is one piece.
    """
    begin = 0
    word = None
    for match in _WORD.finditer(text):
        if word is not None:
            yield text[begin : word.end()]
            begin = word.end()
        word = match
    if text:
        yield text[begin:]


def count_words(text: str) -> int:
    """How many pieces ``pieces_of`` yields."""
    count = 0
    was_in_word = False  # at the end of the part before
    # In parts, since millions of words at once would take hundreds of MB.
    for begin in range(0, len(text), _COUNTED_AT_ONCE):
        part = text[begin : begin + _COUNTED_AT_ONCE]
        count += len(part.split()) - (was_in_word and not part[0].isspace())
        was_in_word = not part[-1].isspace()
    return count or int(bool(text))


@dataclass(frozen=True, slots=True)
class Shape(ABC):
    """The objects of one API; what chat and text completions share."""

    id: str
    model: str
    created: int

    def whole(self, choices: list[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The plain answer."""
        return self._object(
            [self._spoken(index, choice) for index, choice in enumerate(choices)],
            streamed=False,
            usage=usage,
        )

    def events(
        self, choices: list[Choice], wants_usage: bool, event_bytes: int
    ) -> Iterator[bytes]:
        """An event for each word, the choices in turn."""
        further: dict[str, Any] = {"usage": None} if wants_usage else {}
        speakers = [(i, choice.pieces()) for i, choice in enumerate(choices)]
        first = True
        while speakers:
            for speaker in tuple(speakers):
                index, pieces = speaker
                piece = next(pieces, None)
                if piece is None:
                    speakers.remove(speaker)
                    continue
                chunk = self._chunk(self._said(index, piece), further)
                opening = self._opening(choices, further) if first else b""
                first = False
                yield opening + _event(chunk, event_bytes)

    def ending(self, choices: list[Choice], usage: dict[str, int] | None) -> bytes:
        """What follows the words: why each choice ended, the usage, the end."""
        further: dict[str, Any] = {} if usage is None else {"usage": None}
        silent = not any(choice.words for choice in choices)
        opening = self._opening(choices, further) if silent else b""
        ends = b"".join(
            _event(self._chunk(self._ended(i, choice.finish_reason), further))
            for i, choice in enumerate(choices)
        )
        counted = b""
        if usage is not None:
            counted = _event(self._object([], streamed=True, usage=usage))
        return opening + ends + counted + _DONE

    def _chunk(
        self, choice: dict[str, Any], further: Mapping[str, Any]
    ) -> dict[str, Any]:
        return self._object([choice], streamed=True, **further)

    def _object(
        self, choices: list[dict[str, Any]], *, streamed: bool, **further: Any
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self._kind(streamed),
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **further,
        }

    def _opening(self, choices: list[Choice], further: Mapping[str, Any]) -> bytes:
        """What is streamed before the first word."""
        return b""

    @abstractmethod
    def _kind(self, streamed: bool) -> str:
        """What the member ``object`` says."""

    @abstractmethod
    def _spoken(self, index: int, choice: Choice) -> dict[str, Any]:
        """A whole choice, of a plain answer."""

    @abstractmethod
    def _said(self, index: int, piece: str) -> dict[str, Any]:
        """A choice that says one more word."""

    @abstractmethod
    def _ended(self, index: int, reason: str) -> dict[str, Any]:
        """A choice that has said all, and why it ends."""


class ChatShape(Shape):
    """``chat.completion``."""

    def _kind(self, streamed: bool) -> str:
        return "chat.completion.chunk" if streamed else "chat.completion"

    def _opening(self, choices: list[Choice], further: Mapping[str, Any]) -> bytes:
        """Each choice's role, in an event of its own, as OpenAI sends it."""
        delta = {"role": "assistant", "content": ""}
        return b"".join(
            _event(self._chunk(self._delta(index, delta, None), further))
            for index in range(len(choices))
        )

    def _spoken(self, index: int, choice: Choice) -> dict[str, Any]:
        content = "".join(choice.pieces())
        return {
            "index": index,
            "message": {"role": "assistant", "content": content},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }

    def _said(self, index: int, piece: str) -> dict[str, Any]:
        return self._delta(index, {"content": piece}, None)

    def _ended(self, index: int, reason: str) -> dict[str, Any]:
        return self._delta(index, {}, reason)

    def _delta(
        self, index: int, delta: dict[str, str], reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": reason,
        }


class TextShape(Shape):
    """``text_completion``."""

    def _kind(self, streamed: bool) -> str:
        return "text_completion"

    def _spoken(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._text(index, "".join(choice.pieces()), choice.finish_reason)

    def _said(self, index: int, piece: str) -> dict[str, Any]:
        return self._text(index, piece, None)

    def _ended(self, index: int, reason: str) -> dict[str, Any]:
        return self._text(index, "", reason)

    def _text(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
        }


def _event(document: dict[str, Any], size: int = 0) -> bytes:
    event = b"data: " + encoded(document) + b"\n\n"
    missing = size - len(event) - len(', "padding": ""')
    if missing < 0:
        return event
    return b"data: " + encoded({**document, "padding": "x" * missing}) + b"\n\n"


def encoded(document: object) -> bytes:
    """A document as JSON."""
    return json.dumps(document).encode()
