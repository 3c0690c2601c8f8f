"""Answers put together from streams, for clients who did not ask for a stream.

llama-server and mlx_lm go on generating for a client who has left, unless the answer
is streamed. So we ask them for a stream, and make of it the answer that they would
have given: equal to the direct one in every field but id, created, timings and
fingerprint. ``tests/test_e2e_assembly.py`` holds that against a real llama-server.

Their streams carry less than their answers where a request asks for details of single
tokens; such a request is better sent as it is, see ``what_a_stream_lacks``. Two small
differences remain where the token limit cuts an answer off, for llama-server streams
nothing of what is cut: half a character (direct, it is U+FFFD), and a tool call whose
arguments have not begun (direct, its raw text is the content).
"""

from collections.abc import Mapping
from typing import Any

from inferencia.translate.assembly_anthropic import MessageAssembler
from inferencia.translate.assembly_llamacpp import NativeAssembler
from inferencia.translate.assembly_openai import ChatAssembler, TextAssembler
from inferencia.translate.assembly_responses import ResponseAssembler
from inferencia.translate.pieces import Assembler, AssemblyError

__all__ = [
    "Assembler",
    "AssemblyError",
    "assembler_for",
    "request_changes",
    "what_a_stream_lacks",
]

_ASSEMBLERS: dict[str, type[Assembler]] = {
    "/v1/chat/completions": ChatAssembler,
    "/v1/completions": TextAssembler,
    "/v1/messages": MessageAssembler,
    "/v1/responses": ResponseAssembler,
    # The same where a server's API is not at /v1 (llama-swap's prefix /v).
    "/chat/completions": ChatAssembler,
    "/messages": MessageAssembler,
    "/responses": ResponseAssembler,
    "/completion": NativeAssembler,
    "/completions": NativeAssembler,  # llama-server's older name for the same
    "/infill": NativeAssembler,
}


def assembler_for(path: str) -> type[Assembler] | None:
    """The assembler for an endpoint; None if it has no streams."""
    return _ASSEMBLERS.get(path)


def what_a_stream_lacks(path: str, values: Mapping[str, Any]) -> str | None:
    """Why the answer to this request cannot be made of a stream, or None.

    Measured with llama-server: a streamed chat leaves out the log probability of the
    end token; streams carry those of a stop string, which the direct answer drops, and
    only the last token of a character that took several; log probabilities together
    with tools are refused in a stream. mlx_lm streams no log probabilities at all.
    ``"logprobs": 0`` asks neither of them for any.

    Args:
        path: the endpoint.
        values: the members of the request.
    """
    if path not in _ASSEMBLERS:
        return "it has no streams"
    if path.endswith(("/messages", "/responses")):
        return None
    if values.get("logprobs") or values.get("n_probs"):
        return "streams do not carry all log probabilities"
    if values.get("return_tokens"):
        return "streams do not carry all tokens"
    return None


def request_changes(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The members that a request must have for a stream with usage.

    Args:
        path: the endpoint, one that ``assembler_for`` knows.
        values: the members of the request as the client sent it.
    """
    changes: dict[str, Any] = {"stream": True}
    if _ASSEMBLERS[path].asks_usage:
        options = values.get("stream_options")
        options = options if isinstance(options, dict) else {}
        changes["stream_options"] = options | {"include_usage": True}
    return changes
