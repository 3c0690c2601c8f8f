"""Assembles the streams of llama.cpp's own ``/completion`` and ``/infill``.

https://github.com/ggml-org/llama.cpp/tree/master/tools/server
"""

from typing import Any

from inferencia.metering import Usage, total, usage_of
from inferencia.translate.pieces import Assembler, Text, index_of


class NativeAssembler(Assembler):
    """One result for each prompt and choice; several of them make a list."""

    def __init__(self, values: Any = None) -> None:
        super().__init__(values)
        self._pieces: dict[int, dict[str, Any]] = {}
        self._results: dict[int, dict[str, Any]] = {}
        self._usages: dict[int, Usage] = {}  # so far; ``response_fields`` may hide it
        self._last = 0  # index of the piece that came last

    def _has_all(self) -> bool:
        """There is a result for each prompt, and each that has begun has ended."""
        prompt = self._values.get("prompt")
        expected = 1
        if isinstance(prompt, list) and not any(isinstance(p, int) for p in prompt):
            expected = max(1, len(prompt))  # else it is one prompt, given as tokens
        has_all = len(self._results) >= expected
        return has_all and self._pieces.keys() <= self._results.keys()

    @property
    def usage(self) -> Usage | None:
        """What the answer cost, all its results together."""
        return total(self._usages.values())

    def _take(self, content: dict[str, Any]) -> None:
        if "prompt_progress" in content:
            return  # asked for by ``return_progress``; its token is none
        index = index_of(content)
        if content.get("stop") is not False:
            # ``response_fields`` may have taken the index away (and ``stop``, hence
            # the comparison). The last event follows its result's last piece.
            index = self._last if index is None else index
            self._results[index] = content
        self._last = index or 0
        if usage := usage_of(content):
            self._usages[self._last] = usage
        pieces = self._pieces.setdefault(self._last, {})
        for name in ("content", "tokens", "completion_probabilities"):
            if name in content:
                self._merge(pieces, {name: content[name]})

    def _answer(self) -> Any:
        answers = [self._whole(i) for i in sorted(self._results)]
        return answers[0] if len(answers) == 1 else answers

    def _whole(self, index: int) -> dict[str, Any]:
        """The last event, with what the direct answer has in its place.

        A stream always carries the tokens and always says that it is one; it brings
        the probabilities with the pieces, and ``response_fields`` does not limit them.
        """
        answer = dict(self._results[index])
        pieces = self._pieces[index]
        if "content" in answer:
            answer["content"] = pieces.get("content", Text())
        if "tokens" in answer:
            wanted = bool(self._values.get("return_tokens"))
            answer["tokens"] = pieces.get("tokens", []) if wanted else []
        if isinstance(answer.get("generation_settings"), dict):
            answer["generation_settings"] = answer["generation_settings"] | {
                "stream": False
            }
        if "generation_settings/stream" in answer:
            answer["generation_settings/stream"] = False
        name = "completion_probabilities"
        fields = self._values.get("response_fields") or [name]
        if name in pieces and isinstance(fields, list) and name in fields:
            answer[name] = pieces[name]
        return answer
