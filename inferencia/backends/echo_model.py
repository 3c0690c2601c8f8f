"""What the built-in model ``echo`` answers: requests in, recipes for answers out.

Pure: nothing here waits; ``echo.py`` brings the words at the asked pace. It serves
``/v1/models``, ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/embeddings``,
streamed and not. What it says is the message it was given (``echo_speech.py``: in which
words and objects); an embedding is a fixed function of its text.

For tests a request may carry a member ``echo``, an object that only this model obeys:

    head_delay_ms   pause before the answer's head
    first_delay_ms  pause between the head and the first word
    delay_ms        pause between two words; a plain answer takes as long as a stream
    repeat          say the message this many times
    fail_after      break the answer off after this many words
    silence         true, or a number of words: say nothing more after them, for ever
    status          answer with this status and an error
    error_type      the type of that error, such as ``unavailable_error``
    event_bytes     make each streamed word's event this many bytes long, by a member
                    ``padding``

(``echo: true`` is a parameter of OpenAI's own completions; it means nothing here.)
"""

import base64
import hashlib
import math
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inferencia.backends.echo_speech import (
    ChatShape,
    Choice,
    Shape,
    TextShape,
    count_words,
    encoded,
)
from inferencia.backends.listing import parse_json
from inferencia.errors import (
    ApiError,
    InvalidJson,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
)

MODEL = "echo"
DIMENSIONS = 64

# Bounds of what one request may ask for, each far above what a test needs.
MAX_TEXT = 8 * 1024 * 1024  # characters, said or heard; counted in a tenth of a second
MAX_CHOICES = 128  # OpenAI's limit for n
MAX_INPUTS = 2048  # OpenAI's limit for the texts of one embeddings request
MAX_DIMENSIONS = 4096
MAX_REPEAT = 1_000_000
MAX_WORDS = 2**53  # where a request counts words; the largest exact JSON number
MAX_EVENT_BYTES = 16 * 1024 * 1024
MAX_DELAY_MS = 3_600_000

_JSON = "application/json"
_STREAM = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Pace:
    """The pauses and failures that a request asked for."""

    head_seconds: float = 0.0
    first_seconds: float = 0.0
    word_seconds: float = 0.0
    repeat: int = 1
    fail_after: int | None = None  # words
    silent_after: int | None = None  # words
    status: int = 0  # 0: answer properly
    error_type: str = "server_error"
    event_bytes: int = 0


AT_ONCE = Pace()


@dataclass(frozen=True, slots=True)
class Reply:
    """A recipe for an answer."""

    status: int
    headers: tuple[tuple[str, str], ...]
    words: Iterator[bytes]  # the bytes that belong to each word, made when it is due
    last: bytes  # what follows the last word; a plain answer is all here
    length: int | None = None  # of the whole body, where it is known
    pace: Pace = AT_ONCE


def reply_to(method: str, target: str, body: bytes, number: int) -> Reply:
    """Answer a request; a wrong one with the error that OpenAI's API gives.

    Args:
        method: of the request.
        target: its path; a query is ignored.
        body: its JSON.
        number: of this answer, for its id.
    """
    path = target.partition("?")[0]
    try:
        return _route(method, path, body, number)
    except ApiError as error:
        return _plain(error.body(), status=error.status)


def _route(method: str, path: str, body: bytes, number: int) -> Reply:
    if path in ("/v1/models", f"/v1/models/{MODEL}"):
        _expect("GET", method, path)
        whole = {"object": "list", "data": [_RECORD]}
        return _plain(encoded(whole if path == "/v1/models" else _RECORD))
    answer = {
        "/v1/chat/completions": _chat,
        "/v1/completions": _completion,
        "/v1/embeddings": _embeddings,
    }.get(path)
    if answer is None:
        raise NotFound(f"the echo model has no {path}")
    _expect("POST", method, path)
    request = _Request(body)
    pace = _pace_of(request)
    if pace.status:
        return _failure(pace)
    return answer(request, pace, number)


_RECORD = {"id": MODEL, "object": "model", "created": 0, "owned_by": "inferencia"}


def _expect(expected: str, method: str, path: str) -> None:
    if method != expected:
        raise MethodNotAllowed(f"{path} takes {expected}, not {method}")


class _Request:
    """The members of a request, read with their types checked."""

    def __init__(self, body: bytes) -> None:
        try:
            members = parse_json(body)
        except ValueError as error:
            raise InvalidJson("the body is not valid JSON") from error
        if not isinstance(members, dict):
            raise InvalidJson("the body is not a JSON object")
        self.members: Mapping[str, Any] = members

    def get(self, name: str) -> Any:
        return self.members.get(name)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number between ``low`` and ``high``."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{name} must be a whole number", param=name)
        if not low <= value <= high:
            raise InvalidRequest(f"{name} must be {low} to {high}", param=name)
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false", param=name)
        return bool(value)

    @property
    def model(self) -> str:
        value = self.get("model")
        return value if isinstance(value, str) and value else MODEL

    @property
    def max_words(self) -> int:
        """``max_completion_tokens``, or what it was called before."""
        older = self.whole("max_tokens", MAX_WORDS, 1, MAX_WORDS)
        return self.whole("max_completion_tokens", older, 1, MAX_WORDS)

    @property
    def wants_usage(self) -> bool:
        options = self.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


def _pace_of(request: _Request) -> Pace:
    """Read the member ``echo``."""
    asked = request.get("echo")
    if not isinstance(asked, dict):
        return AT_ONCE
    error_type = asked.get("error_type")

    def number(name: str, default: int, high: int) -> int:
        return _number(asked, name, default, high)

    return Pace(
        head_seconds=number("head_delay_ms", 0, MAX_DELAY_MS) / 1000,
        first_seconds=number("first_delay_ms", 0, MAX_DELAY_MS) / 1000,
        word_seconds=number("delay_ms", 0, MAX_DELAY_MS) / 1000,
        repeat=number("repeat", 1, MAX_REPEAT),
        fail_after=number("fail_after", 0, MAX_WORDS)
        if "fail_after" in asked
        else None,
        silent_after=_silent_after(asked),
        status=number("status", 0, 599),
        error_type=error_type if isinstance(error_type, str) else "server_error",
        event_bytes=number("event_bytes", 0, MAX_EVENT_BYTES),
    )


def _silent_after(asked: Mapping[str, Any]) -> int | None:
    silence = asked.get("silence", False)
    if isinstance(silence, bool):
        return 0 if silence else None
    return _number(asked, "silence", 0, MAX_WORDS)


def _number(asked: Mapping[str, Any], name: str, default: int, high: int) -> int:
    value = asked.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise InvalidRequest(f"echo.{name} must be 0 to {high}", param=f"echo.{name}")
    return value


def _failure(pace: Pace) -> Reply:
    message = f"echo was asked to answer with status {pace.status}"
    error = {"message": message, "type": pace.error_type, "code": pace.status}
    return _plain(encoded({"error": error}), status=max(pace.status, 200), pace=pace)


# Chat and text completions: one text or more, said word by word.


def _chat(request: _Request, pace: Pace, number: int) -> Reply:
    texts = [_text_of(message) for message in _messages(request)]
    if sum(map(len, texts)) > MAX_TEXT:
        raise _too_long()
    said = texts[_last_user_message(request)]
    shape = ChatShape(f"chatcmpl-echo-{number}", request.model, int(time.time()))
    return _said(request, pace, shape, [said], count_words("\n".join(texts)))


def _messages(request: _Request) -> list[Mapping[str, Any]]:
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(
            "messages must be a list that is not empty", param="messages"
        )
    if not all(isinstance(message, dict) for message in messages):
        raise InvalidRequest("each of messages must be an object", param="messages")
    return messages


def _last_user_message(request: _Request) -> int:
    """Its index; where there is none, the last message's."""
    messages = _messages(request)
    users = [i for i, m in enumerate(messages) if m.get("role") == "user"]
    return users[-1] if users else len(messages) - 1


def _text_of(message: Mapping[str, Any]) -> str:
    """A message's text: its content, or the text parts of it joined."""
    content = message.get("content")
    if content is None:  # an assistant's message with tool calls only
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("content must be a string or a list", param="messages")
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _completion(request: _Request, pace: Pace, number: int) -> Reply:
    prompt = request.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(prompts, list)
        or not 0 < len(prompts) <= MAX_CHOICES
        or not all(isinstance(text, str) for text in prompts)
    ):
        raise InvalidRequest("prompt must be a string or strings", param="prompt")
    shape = TextShape(f"cmpl-echo-{number}", request.model, int(time.time()))
    if sum(map(len, prompts)) > MAX_TEXT:
        raise _too_long()
    return _said(request, pace, shape, prompts, sum(map(count_words, prompts)))


def _said(
    request: _Request,
    pace: Pace,
    shape: Shape,
    texts: list[str],
    prompt_words: int,
) -> Reply:
    """The answer that says ``texts``, each ``n`` times as choices of their own."""
    most = request.max_words
    times = request.whole("n", 1, 1, MAX_CHOICES)
    is_streamed = request.flag("stream")
    # A stream is made word by word and may go on; a plain answer is made as a whole.
    length = sum(map(len, texts)) * (1 if is_streamed else times * pace.repeat)
    if length > MAX_TEXT:
        raise _too_long()
    choices = [
        Choice.of(text, pace.repeat, most) for text in texts for _ in range(times)
    ]
    usage = _usage(prompt_words, sum(choice.words for choice in choices))
    if not is_streamed:
        whole = encoded(shape.whole(choices, usage))
        return _plain(whole, words=_ticks(choices), pace=pace)
    wants_usage = request.wants_usage
    return Reply(
        200,
        (("content-type", _STREAM),),
        shape.events(choices, wants_usage, pace.event_bytes),
        shape.ending(choices, usage if wants_usage else None),
        pace=pace,
    )


def _too_long() -> InvalidRequest:
    return InvalidRequest(f"echo takes and says at most {MAX_TEXT} characters")


def _ticks(choices: list[Choice]) -> Iterator[bytes]:
    """A plain answer takes the time of its words, but they bring no bytes."""
    return (b"" for choice in choices for _ in range(choice.words))


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


# Embeddings.


def _embeddings(request: _Request, pace: Pace, number: int) -> Reply:
    texts = _inputs(request.get("input"))
    size = request.whole("dimensions", DIMENSIONS, 1, MAX_DIMENSIONS)
    encoding = request.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise InvalidRequest(
            "encoding_format must be float or base64", param="encoding_format"
        )
    data = []
    for index, text in enumerate(texts):
        packed = embedding_of(text, size)
        data.append(
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(packed).decode()
                if encoding == "base64"
                else list(struct.unpack(f"<{size}f", packed)),
            }
        )
    words = sum(map(count_words, texts))
    usage = {"prompt_tokens": words, "total_tokens": words}
    whole = {"object": "list", "model": request.model, "data": data, "usage": usage}
    return _plain(encoded(whole), words=(b"" for _ in texts), pace=pace)


def _inputs(value: Any) -> list[str]:
    """The texts to embed: a string, strings, tokens, or lists of tokens."""
    if _are_tokens(value) or isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_INPUTS:
        raise InvalidRequest(
            f"input must be a string or 1 to {MAX_INPUTS} strings", param="input"
        )
    texts = [" ".join(map(str, v)) if _are_tokens(v) else v for v in value]
    if not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequest(
            "input must hold strings that are not empty", param="input"
        )
    if sum(map(len, texts)) > MAX_TEXT:
        raise _too_long()
    return texts


def _are_tokens(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(type(v) is int for v in value)
    )


def embedding_of(text: str, size: int = DIMENSIONS) -> bytes:
    """A unit vector that depends on nothing but the text, as little-endian float32."""
    seed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    stream = hashlib.shake_256(seed).digest(4 * size)
    # Centred whole numbers, so that the vectors of two texts are nearly orthogonal.
    raw = [value - 2**31 + 0.5 for value in struct.unpack(f"<{size}I", stream)]
    norm = math.sqrt(math.fsum(value * value for value in raw))
    return struct.pack(f"<{size}f", *(value / norm for value in raw))


def _plain(
    body: bytes,
    *,
    status: int = 200,
    words: Iterator[bytes] | None = None,
    pace: Pace = AT_ONCE,
) -> Reply:
    headers = (("content-type", _JSON),)
    return Reply(status, headers, words or iter(()), body, len(body), pace)
