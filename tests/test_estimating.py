"""Promises of the guess at tokens that nobody has counted."""

from typing import Any

import pytest

from inferencia.estimating import completion_tokens, prompt_tokens

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "asked", "tokens"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 41}]}, 11),
        (CHAT, {"messages": [{"content": [{"type": "text", "text": "ü" * 4}]}]}, 2),
        (CHAT, {"messages": [{"content": [{"image_url": {"url": "x" * 99}}]}]}, None),
        (CHAT, {"messages": "nonsense"}, 2),
        ("/v1/messages", {"system": "x" * 8, "messages": [{"content": "y" * 8}]}, 4),
        ("/v1/completions", {"prompt": ["x" * 8, "y" * 8]}, 4),
        ("/v1/completions", {"prompt": [1, 2, 3]}, None),
        ("/rerank", {"query": "x" * 4, "documents": ["y" * 4, {"text": "z" * 4}]}, 3),
        ("/infill", {"input_prefix": "x" * 4, "input_suffix": "y" * 4}, 2),
        ("/v1/audio/speech", {"input": "x" * 40}, None),
        (CHAT, {}, None),
    ],
)
def test_the_texts_of_a_request_are_counted(
    path: str, asked: dict[str, Any], tokens: int | None
) -> None:
    assert prompt_tokens(path, asked) == tokens


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ({"choices": [{"message": {"content": "x" * 8, "role": "assistant"}}]}, 2),
        ({"choices": [{"message": {"reasoning_content": "x" * 8}}]}, 2),
        ({"choices": [{"text": "x" * 8}, {"text": "y" * 8}]}, 4),
        ({"content": [{"type": "text", "text": "x" * 8}]}, 2),
        ({"content": "x" * 8}, 2),
        ({"object": "list", "data": [{"embedding": [0.1] * 99}]}, 0),
        ([1], None),
        (None, None),
    ],
)
def test_the_texts_of_an_answer_are_counted(answer: Any, tokens: int | None) -> None:
    assert completion_tokens(CHAT, answer) == tokens


def test_a_text_that_is_nested_without_end_ends() -> None:
    nested: Any = "x" * 400
    for _ in range(500):
        nested = {"content": [nested]}
    assert prompt_tokens(CHAT, {"messages": nested}) is None


def test_half_a_character_is_counted_like_any() -> None:
    assert prompt_tokens("/v1/completions", {"prompt": "\ud800" * 8}) == 2
