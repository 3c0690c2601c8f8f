"""What tells one conversation from others.

Whoever served a conversation last has its beginning in the prompt cache. So its turns
are recognised by what they have in common: their beginning.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

# A conversation is told from others by this many characters of each of its texts.
_AFFINITY_CHARACTERS = 2048
_AFFINITY_TEXTS = 256
_AFFINITY_PROMPT_CHARACTERS = 256


def affinity_key(
    key_name: str, model: str | None, values: Mapping[str, Any]
) -> bytes | None:
    """What tells one conversation from others, from its first turn to its last.

    It is made of the key, the model, and the messages up to the first of the user (or
    the beginning of ``prompt`` or ``input``), so later turns have the same one.

    Args:
        key_name: the name of the API key.
        model: the requested name.
        values: the top-level members of the request.

    Returns:
        16 bytes, or None if the request has no conversation.
    """
    texts: list[str] = []
    for value in _beginning(values):
        _gather(value, texts, depth=0)
    if not texts:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for text in (key_name, model or "", *texts):
        part = text[:_AFFINITY_CHARACTERS].encode("utf-8", "surrogatepass")
        digest.update(b"%d:%d:%b" % (len(text), len(part), part))
    return digest.digest()


def _beginning(values: Mapping[str, Any]) -> Iterator[Any]:
    """The parts of a request that its conversation's later turns repeat."""
    for name in ("messages", "input", "prompt"):
        value = values.get(name)
        if isinstance(value, str) and value:
            yield value[:_AFFINITY_PROMPT_CHARACTERS]
        elif isinstance(value, list) and value:
            yield values.get("system") or values.get("instructions")
            for item in value:
                yield item
                if not isinstance(item, dict) or item.get("role") == "user":
                    break
        else:
            continue
        return


def _gather(value: Any, texts: list[str], *, depth: int) -> None:
    """Collect the texts in a JSON value, in order; enough of them, not all."""
    if len(texts) >= _AFFINITY_TEXTS or depth > 8:
        return
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        for member in value.values():
            _gather(member, texts, depth=depth + 1)
    elif isinstance(value, list):
        for member in value:
            _gather(member, texts, depth=depth + 1)
