"""Assembles the streams of OpenAI's Responses.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from typing import Any

from inferencia.translate.pieces import Assembler, weight

_ENDS = ("response.completed", "response.incomplete", "response.failed")


class ResponseAssembler(Assembler):
    """``/v1/responses``. The last event repeats all of the answer."""

    def __init__(self, values: Any = None) -> None:
        super().__init__(values)
        self._response: dict[str, Any] | None = None
        self._items: list[Any] = []  # the finished items of the output
        self._is_llamacpp = False

    def _has_all(self) -> bool:
        """The event with the answer has come, be it a good one or not."""
        return self._response is not None

    def _take(self, content: dict[str, Any]) -> None:
        kind = content.get("type")
        response = content.get("response")
        if kind in _ENDS and isinstance(response, dict):
            self._response = response
            self._is_llamacpp = "timings" in content
        elif kind == "response.output_item.done":
            self._grow(weight(content.get("item")))
            self._items.append(content.get("item"))

    def _answer(self) -> dict[str, Any]:
        answer = dict(self._response or {})
        if not answer.get("output") and self._items:
            answer["output"] = self._items
        if self._is_llamacpp:
            # Two things that llama-server says in its direct answer only.
            answer.setdefault("completed_at", answer.get("created_at"))
            for item in answer.get("output") or ():
                if isinstance(item, dict) and item.get("type") == "reasoning":
                    item.setdefault("status", "completed")
        return answer
