"""Assembles the streams of OpenAI's chat and text completions.

https://platform.openai.com/docs/api-reference/chat/streaming
"""

from typing import Any, ClassVar

from inferencia.translate.pieces import Assembler, Text, index_of

# Members of a chunk that are not members of the answer, or that are made anew.
# ``obfuscation`` is padding against eavesdroppers who measure the chunks.
_NOT_KEPT = frozenset(
    ("choices", "usage", "object", "prompt_progress", "obfuscation", "error")
)


class ChoicesAssembler(Assembler):
    """What both endpoints have in common: choices that grow side by side."""

    asks_usage = True
    object_name: ClassVar[str]

    def __init__(self, values: Any = None) -> None:
        super().__init__(values)
        self._members: dict[str, Any] = {}  # of the chunks; the last value counts
        self._choices: dict[int, dict[str, Any]] = {}
        self._usages: dict[int, Any] = {}  # by the choice that they came with
        self._last_finished = 0  # index of the choice that ended last

    def _has_all(self) -> bool:
        """Every choice has ended, and so has the stream, or its usage has come.

        With several choices only the end of the stream tells that there is none left:
        one that waits for a free slot has sent nothing yet.
        """
        values = self._values
        is_one = values.get("n") in (None, 1) and not isinstance(
            values.get("prompt"), list
        )
        has_end = self.is_ended or (is_one and bool(self._usages))
        return (
            has_end
            and bool(self._choices)
            and all(map(_reason, self._choices.values()))
        )

    def _take(self, content: dict[str, Any]) -> None:
        for name, value in content.items():
            if name not in _NOT_KEPT and value is not None:
                self._members[name] = value
        choices = content.get("choices")
        choices = choices if isinstance(choices, list) else []
        for choice in choices:
            if isinstance(choice, dict):
                self._take_choice(choice)
        if isinstance(content.get("usage"), dict):
            index = index_of(choices[0]) if choices else self._last_finished
            self._usages[index or 0] = content["usage"]

    def _take_choice(self, piece: dict[str, Any]) -> None:
        index = index_of(piece) or 0
        choice = self._choices.setdefault(index, {"index": index})
        for name, value in piece.items():
            if name in ("delta", "text", "logprobs") or isinstance(value, list):
                self._merge(choice, {name: value})
            elif name != "index":
                choice[name] = choice.get(name) if value is None else value
        if _reason(piece):
            self._last_finished = index

    def _answer(self) -> dict[str, Any]:
        choices = [self._finished(self._choices[i]) for i in sorted(self._choices)]
        answer = {"choices": choices, **self._members, "object": self.object_name}
        if self._usages:
            # llama-server counts each choice apart and answers with the first's.
            answer["usage"] = self._usages[min(self._usages)]
        return answer

    def _finished(self, choice: dict[str, Any]) -> dict[str, Any]:
        return choice


class TextAssembler(ChoicesAssembler):
    """``/v1/completions``."""

    object_name = "text_completion"


class ChatAssembler(ChoicesAssembler):
    """``/v1/chat/completions``."""

    object_name = "chat.completion"

    def _take_choice(self, piece: dict[str, Any]) -> None:
        delta = piece.get("delta")
        if isinstance(delta, dict) and isinstance(delta.get("tool_calls"), list):
            calls = self._indexed(index_of(piece) or 0, delta["tool_calls"])
            piece = piece | {"delta": delta | {"tool_calls": calls}}
        super()._take_choice(piece)

    def _indexed(self, choice: int, calls: list[Any]) -> list[Any]:
        """Give an index to calls that came without: a named one opens a new call."""
        delta = self._choices.get(choice, {}).get("delta") or {}
        last = len(delta.get("tool_calls") or ()) - 1
        indexed = []
        for call in calls:
            if isinstance(call, dict) and index_of(call) is None:
                function = call.get("function")
                named = isinstance(function, dict) and function.get("name")
                last = last + 1 if named or last < 0 else last
                call = call | {"index": last}
            indexed.append(call)
        return indexed

    def _finished(self, choice: dict[str, Any]) -> dict[str, Any]:
        delta = dict(choice.get("delta") or {})
        message: dict[str, Any] = {"role": delta.pop("role", None) or "assistant"}
        message["content"] = self._content(delta)
        delta.pop("content", None)
        calls = delta.pop("tool_calls", None)
        message |= delta
        if calls:
            calls = sorted(calls, key=lambda call: index_of(call) or 0)
            message["tool_calls"] = [_without_index(call) for call in calls]
        finished = {"message": message}
        return finished | {n: v for n, v in choice.items() if n != "delta"}

    def _content(self, delta: dict[str, Any]) -> Any:
        """The content; where none came, what the engine's direct answer has instead.

        llama-server (known by its ``timings``) answers with an empty string, always.
        The others say null, except after an explicitly empty text without tool calls.
        """
        content = delta.get("content")
        if content is None:
            return "" if "timings" in self._members else None
        if isinstance(content, Text) and not any(content) and delta.get("tool_calls"):
            return "" if "timings" in self._members else None
        return content


def _reason(choice: dict[str, Any]) -> bool:
    return choice.get("finish_reason") is not None


def _without_index(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    return {name: value for name, value in call.items() if name != "index"}
