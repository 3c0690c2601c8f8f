"""How many tokens a text may have, where the engine does not say.

Four bytes of UTF-8 are about one token of English, code or most European languages in
the vocabularies of today's models; it is what OpenAI's help pages say as well. Only
texts count: pictures and sounds inside a conversation are passed over. What comes from
here is always marked as estimated.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

BYTES_PER_TOKEN = 4

# Where text is asked for by text. Elsewhere (speech, pictures) tokens mean nothing.
_TEXT_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/rerank",
        "/v1/reranking",
        "/v1/moderations",
        "/chat/completions",
        "/completions",
        "/embeddings",
        "/responses",
        "/messages",
        "/completion",
        "/infill",
        "/rerank",
        "/reranking",
    }
)

# The members that hold the text of a request, whichever dialect it is in.
_ASKED = (
    *("system", "instructions", "messages", "prompt", "input"),
    *("query", "documents", "input_prefix", "input_suffix"),
)
# Inside of a message or a part of one, and inside of an answer.
_HOLDERS = ("content", "text", "message", "choices", "output", "reasoning_content")

# Nobody nests texts more deeply; a nasty body is not followed further.
_MAX_DEPTH = 8


def prompt_tokens(path: str, asked: Mapping[str, Any]) -> int | None:
    """About how many tokens a request has; None where that means nothing.

    Args:
        path: of the endpoint.
        asked: the members of the request.
    """
    if path not in _TEXT_PATHS:
        return None
    texts = (text for name in _ASKED for text in _texts(asked.get(name), 0))
    return _tokens(texts) or None


def completion_tokens(path: str, answer: Any) -> int | None:
    """About how many tokens an answer has; None where that means nothing.

    Args:
        path: of the endpoint.
        answer: decoded.
    """
    if path not in _TEXT_PATHS or not isinstance(answer, dict):
        return None
    return _tokens(_texts(answer, 0))


def _tokens(texts: Iterable[str]) -> int:
    size = sum(
        len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        for text in texts
    )
    return -(-size // BYTES_PER_TOKEN)


def _texts(value: Any, depth: int) -> Iterator[str]:
    """The texts in a value that is a text, or has some in the known members."""
    if isinstance(value, str):
        yield value
    elif depth >= _MAX_DEPTH:
        return
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, depth + 1)
    elif isinstance(value, dict):
        for name in _HOLDERS:
            if name in value:
                yield from _texts(value[name], depth + 1)
