"""Assembles the streams of Anthropic's messages.

https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

import json
from typing import Any

from inferencia.translate.pieces import Assembler, Text, plain, weight

# What each kind of delta adds to, and under which name it carries it.
_GROWING = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}


class MessageAssembler(Assembler):
    """``/v1/messages``."""

    def __init__(self, values: Any = None) -> None:
        super().__init__(values)
        self._message: dict[str, Any] | None = None
        self._usage: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._is_stopped = False

    def _has_all(self) -> bool:
        """The message has begun, and ``message_stop`` has come."""
        return self._message is not None and self._is_stopped

    def _take(self, content: dict[str, Any]) -> None:
        match content:
            case {"type": "message_start", "message": dict(message)}:
                self._message = message
                self._add_usage(message)
            case {
                "type": "content_block_start",
                "index": int(index),
                "content_block": dict(block),
            }:
                self._grow(weight(block))
                self._blocks[index] = dict(block)
            case {
                "type": "content_block_delta",
                "index": int(index),
                "delta": dict(delta),
            }:
                self._take_delta(self._blocks.setdefault(index, {}), delta)
            case {"type": "message_delta"} if self._message is not None:
                rest = {n: v for n, v in content.items() if n not in _NOT_KEPT}
                reasons = content.get("delta")
                self._message |= rest | (reasons if isinstance(reasons, dict) else {})
                self._add_usage(content)
            case {"type": "message_stop"}:
                self._is_stopped = True

    def _take_delta(self, block: dict[str, Any], delta: dict[str, Any]) -> None:
        kind = delta.get("type")
        name = _GROWING.get(kind) if isinstance(kind, str) else None
        if name:
            old = block.get(name)
            if isinstance(old, str):  # what the block began with
                block[name] = Text([old])
            self._merge(block, {name: delta.get(name)})
        elif kind == "citations_delta":
            self._merge(block, {"citations": [delta.get("citation")]})
        else:
            self._merge(block, {n: v for n, v in delta.items() if n != "type"})

    def _add_usage(self, holder: dict[str, Any]) -> None:
        usage = holder.get("usage")
        if isinstance(usage, dict):
            self._usage |= {n: v for n, v in usage.items() if v is not None}

    def _answer(self) -> dict[str, Any]:
        blocks = [_finished(self._blocks[index]) for index in sorted(self._blocks)]
        return (self._message or {}) | {"content": blocks, "usage": self._usage}


_NOT_KEPT = frozenset(("type", "delta", "usage"))


def _finished(block: dict[str, Any]) -> dict[str, Any]:
    """The block with a tool's input as the object that its pieces spell."""
    block = dict(block)
    pieces = block.pop("partial_json", None)
    if pieces is None and block.get("type") != "tool_use":
        return block
    text = plain(pieces) or ""
    try:
        block["input"] = json.loads(text) if text else block.get("input", {})
    except (ValueError, RecursionError):
        block["input"] = {}  # cut off by the token limit; llama-server does the same
    return block
