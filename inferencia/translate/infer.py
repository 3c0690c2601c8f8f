"""goinfer's ``/infer`` in the words of the engines that answer it (pure).

A request names what it wants in goinfer's words and has goinfer's defaults; unknown
members go on as they are. llama.cpp's ``/completion`` takes it nearly as it is, and its
answer is the one that clients get. Engines without that endpoint are asked by way of
``/v1/completions``, and their answers are put into the shape of llama.cpp's:

    {"content": "…", "stop": true, "stop_type": "eos", "tokens_predicted": 7,
     "tokens_evaluated": 3, "timings": {…}}

streamed as ``data:`` events with ``"stop": false`` until the last one.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inferencia.errors import InvalidRequest
from inferencia.metering import Usage, usage_of
from inferencia.sse import EventSplitter, parse

# goinfer's defaults, under llama.cpp's names; goinfer's own names are in ``_NAMES``.
DEFAULTS: Mapping[str, Any] = {
    "stop": ["</s>"],
    "n_predict": 512,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "temperature": 0.2,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repeat_penalty": 1.0,
    "tfs_z": 1.0,
}
# goinfer's name -> llama.cpp's. ``ctx`` is the process's to decide, not a request's.
_NAMES = {"max_tokens": "n_predict", "tfs": "tfs_z"}
_NUMBERS = frozenset(DEFAULTS) - {"stop"} | frozenset(_NAMES)
_NOT_PASSED = frozenset({"prompt", "images", "audios", "timeout", "ctx", *_NAMES})

# llama.cpp's name -> that of /v1/completions, where they differ.
_OPENAI_NAMES = {"n_predict": "max_tokens"}
_OPENAI_MEMBERS = frozenset(
    (
        "model",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "stop",
        "seed",
        "logit_bias",
        "stream",
        "user",
    )
)
# Samplers that local engines take besides OpenAI's. "tfs" has gone from all of them.
_LOCAL_MEMBERS = frozenset(("top_k", "min_p", "repeat_penalty"))

# Where an image stands in a prompt, in llama.cpp's words.
MEDIA_MARKER = "<__media__>"

_MAX_MEDIA = 64


@dataclass(frozen=True, slots=True)
class Inference:
    """One ``/infer`` request."""

    members: Mapping[str, Any]  # for ``/completion``, without ``model``
    timeout: float | None  # seconds until it ends; None: no limit of its own
    wants_stream: bool
    has_media: bool


def read(values: Mapping[str, Any]) -> Inference:
    """Understand a request.

    Args:
        values: its top-level members.

    Raises:
        InvalidRequest: a member is missing or of the wrong kind.
    """
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise InvalidRequest('"prompt" must be a text and not empty', param="prompt")
    given = {name: value for name, value in values.items() if name not in _NOT_PASSED}
    for name, other in _NAMES.items():
        if values.get(name) is not None:
            given[other] = values[name]
    for name in _NUMBERS & values.keys():
        _check_number(name, values[name])
    stop = given.get("stop")
    if stop is not None and not _are_texts(stop):
        raise InvalidRequest('"stop" must be a text or a list of texts', param="stop")
    stream = given.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest('"stream" must be true or false', param="stream")
    given = {name: value for name, value in given.items() if value is not None}
    media = [*_media(values, "images"), *_media(values, "audios")]
    members = {**DEFAULTS, **given, "prompt": _prompt(prompt, media)}
    members.pop("model", None)
    return Inference(members, _timeout(values), bool(stream), bool(media))


def read_plain(values: Mapping[str, Any]) -> Inference:
    """Understand a request of ``/completions``: as ``read``, without the defaults.

    Raises:
        InvalidRequest: a member is missing or of the wrong kind.
    """
    asked = read(values)
    named = values.keys() | {_NAMES[name] for name in _NAMES if name in values}
    members = {
        name: value
        for name, value in asked.members.items()
        if name not in DEFAULTS or name in named
    }
    return replace(asked, members=members)


def for_completions(members: Mapping[str, Any], *, is_local: bool) -> dict[str, Any]:
    """The same request for ``/v1/completions``.

    Args:
        members: those of ``Inference``.
        is_local: whether it is a local engine, which may take more than OpenAI does.
    """
    allowed = _OPENAI_MEMBERS | _LOCAL_MEMBERS if is_local else _OPENAI_MEMBERS
    known = DEFAULTS.keys() | _OPENAI_MEMBERS
    renamed = {_OPENAI_NAMES.get(name, name): v for name, v in members.items()}
    request = {
        name: value
        for name, value in renamed.items()
        if name in allowed or (is_local and name not in known)
    }
    if request.get("stream"):
        request["stream_options"] = {"include_usage": True}
    return request


class FromCompletions:
    """Puts an answer of ``/v1/completions`` into the shape of ``/completion``.

    Feed it the body's bytes as they come; what it gives back is for the client.
    """

    def __init__(self, *, is_stream: bool, model: str) -> None:
        self._is_stream = is_stream
        self._model = model
        self._splitter = EventSplitter()
        self._whole = bytearray()
        self._usage: Usage | None = None
        self._reason: str | None = None
        self._pieces = 0
        self._has_ended = False

    def feed(self, data: bytes) -> bytes:
        """What the client gets for these bytes; perhaps nothing yet."""
        if not self._is_stream:
            self._whole += data
            return b""
        return b"".join(self._event(raw) for raw in self._splitter.feed(data))

    def finish(self) -> bytes:
        """What is left at the end of the answer.

        Raises:
            ValueError: a whole answer is none.
        """
        if self._is_stream:
            rest = self.feed(b"\n\n") if self._splitter.pending else b""
            return rest + self._last()
        return self._converted(bytes(self._whole))

    def _event(self, raw: bytes) -> bytes:
        event = parse(raw)
        if event.is_comment:
            return raw
        if event.data.strip() == b"[DONE]":
            return self._last()
        try:
            content = json.loads(event.data)
        except ValueError:
            return b""
        if not isinstance(content, dict):
            return b""
        if "error" in content:
            self._has_ended = True
            return raw
        self._usage = usage_of(content) or self._usage
        text = self._text_of(content)
        if not text:
            return b""
        self._pieces += 1
        return _as_event({"content": text, "stop": False})

    def _text_of(self, content: Mapping[str, Any]) -> str:
        choices = content.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else {}
        if not isinstance(choice, dict):
            return ""
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self._reason = reason
        text = choice.get("text")
        return text if isinstance(text, str) else ""

    def _last(self) -> bytes:
        if self._has_ended:
            return b""
        self._has_ended = True
        return _as_event(self._result(""))

    def _converted(self, body: bytes) -> bytes:
        content = json.loads(body)
        if not isinstance(content, dict) or "choices" not in content:
            raise ValueError("the engine's answer has no choices")
        self._usage = usage_of(content)
        text = self._text_of(content)
        return json.dumps(self._result(text), ensure_ascii=False).encode()

    def _result(self, text: str) -> dict[str, Any]:
        usage = self._usage or Usage(0, self._pieces)
        prompt, predicted = usage.prompt, usage.completion
        return {
            "index": 0,
            "content": text,
            "model": self._model,
            "stop": True,
            "stop_type": "limit" if self._reason == "length" else "eos",
            "stopping_word": "",
            "truncated": False,
            "tokens_predicted": predicted,
            "tokens_evaluated": prompt,
            "tokens_cached": usage.cached or 0,
            "timings": {"prompt_n": prompt, "predicted_n": predicted},
        }


def _as_event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _are_texts(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not is_number:
        raise InvalidRequest(f'"{name}" must be a number', param=name)


def _timeout(values: Mapping[str, Any]) -> float | None:
    value = values.get("timeout")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest('"timeout" must be a number of seconds', param="timeout")
    return float(value) if value > 0 else None


def _media(values: Mapping[str, Any], name: str) -> Sequence[str]:
    """Images or sounds as plain base64."""
    given = values.get(name)
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) > _MAX_MEDIA:
        raise InvalidRequest(
            f'"{name}" must be a list of {_MAX_MEDIA} at most', param=name
        )
    return [_base64(item, name) for item in given]


def _base64(item: object, name: str) -> str:
    if isinstance(item, str):
        text = item.partition(",")[2] if item.startswith("data:") else item
        try:
            if base64.b64decode(text, validate=True):
                return text
        except (binascii.Error, ValueError):
            pass
    raise InvalidRequest(f'"{name}" must hold base64 or data URLs', param=name)


def _prompt(prompt: str, media: Sequence[str]) -> Any:
    if not media:
        return prompt
    missing = len(media) - prompt.count(MEDIA_MARKER)
    marked = MEDIA_MARKER * max(0, missing) + prompt
    return {"prompt_string": marked, "multimodal_data": list(media)}
