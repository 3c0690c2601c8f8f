"""The words that the mock engine and the load generator share.

A request tells the mock how to answer by one member of its JSON body that a gateway
does not know and therefore must pass on:

    "bench":"CHUNKS.INTERVAL_US.CUT_AFTER"

    CHUNKS       0: answer with ``ANSWER``; n: stream n content events
    INTERVAL_US  microseconds between two events; 0: as fast as the socket takes them
    CUT_AFTER    0: finish properly; n: cut the connection after n events

Every content event is exactly ``EVENT_BYTES`` long and carries its number and the time
at which it was sent, both at fixed places, so that reading one costs two slices.
"""

import json
import re
from dataclasses import dataclass
from typing import Final

MODEL: Final = "bench-model"

#: What a streamed token costs on the wire with the usual engines (id, object, created,
#: model, choices, delta and a word).
EVENT_BYTES: Final = 250

#: One stream is at most 25 MB, whatever a request asks for.
MAX_CHUNKS: Final = 100_000

#: The order and any ``stream_options`` stand within this much of a request's body: the
#: bodies below put the order first and the prompt last.
ORDER_WITHIN: Final = 2048

_ORDER = re.compile(rb'"bench":"(\d{1,6})\.(\d{1,9})\.(\d{1,6})"')
_WANTS_USAGE = re.compile(rb'"include_usage"\s*:\s*true')

_EVENT_HEAD: Final = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk",'
    b'"created":1700000000,"model":"bench-model","choices":[{"index":0,'
    b'"delta":{"content":"'
)
_EVENT_TAIL: Final = b'"},"finish_reason":null}]}'
_NUMBERS: Final = b"%08d %019d "
_NUMBERS_BYTES: Final = 8 + 1 + 19 + 1
_NUMBER_AT: Final = len(_EVENT_HEAD)
_TIME_AT: Final = _NUMBER_AT + 9
_EVENT: Final = (
    _EVENT_HEAD.replace(b"%", b"%%")
    + _NUMBERS
    + b"." * (EVENT_BYTES - 2 - len(_EVENT_HEAD) - _NUMBERS_BYTES - len(_EVENT_TAIL))
    + _EVENT_TAIL
    + b"\n\n"
)

FINISH: Final = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk",'
    b'"created":1700000000,"model":"bench-model","choices":[{"index":0,'
    b'"delta":{},"finish_reason":"stop"}]}\n\n'
)
USAGE: Final = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk",'
    b'"created":1700000000,"model":"bench-model","choices":[],'
    b'"usage":{"prompt_tokens":200,"completion_tokens":%d,"total_tokens":%d}}\n\n'
)
DONE: Final = b"data: [DONE]\n\n"


def _answer() -> bytes:
    reply = {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ""},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 200,
            "completion_tokens": 120,
            "total_tokens": 320,
        },
    }
    filled = json.dumps(reply)
    words = "bench " * (1024 // 6 + 1)
    text = words[: 1024 - len(filled)]
    return filled.replace('"content": ""', f'"content": "{text}"').encode()


#: The one non-streamed answer: 1 KiB of JSON. A gateway must not change a byte of it.
ANSWER: Final = _answer()


@dataclass(frozen=True, slots=True)
class Order:
    """How the mock shall answer one request."""

    chunks: int = 0
    interval_us: int = 0
    cut_after: int = 0

    @classmethod
    def find(cls, body: bytes) -> "Order":
        """The order in the beginning of a request's body; a plain answer if none."""
        found = _ORDER.search(body)
        if found is None:
            return cls()
        chunks, interval_us, cut_after = map(int, found.groups())
        return cls(min(chunks, MAX_CHUNKS), interval_us, cut_after)


def wants_usage(body: bytes) -> bool:
    """Whether a streamed answer shall end with a chunk that counts tokens."""
    return _WANTS_USAGE.search(body) is not None


def body(order: Order, size: int = 1024) -> bytes:
    """A chat request of ``size`` bytes (more, if the rest alone is longer)."""
    head = (
        b'{"model":"%s","bench":"%d.%d.%d","stream":%s,"messages":'
        b'[{"role":"user","content":"'
    ) % (
        MODEL.encode(),
        order.chunks,
        order.interval_us,
        order.cut_after,
        b"true" if order.chunks else b"false",
    )
    tail = b'"}]}'
    words = b"tell me about it "
    room = max(size - len(head) - len(tail), 0)
    return head + (words * (room // len(words) + 1))[:room] + tail


def request(body: bytes, key: str, host: str) -> bytes:
    """The body as one HTTP/1.1 request with the headers that OpenAI's clients send."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\n"
        b"Host: %s\r\n"
        b"Authorization: Bearer %s\r\n"
        b"Accept: application/json\r\n"
        b"Content-Type: application/json\r\n"
        b"User-Agent: inferencia-bench\r\n"
        b"Content-Length: %d\r\n\r\n" % (host.encode(), key.encode(), len(body))
    ) + body


def event(number: int, sent_ns: int) -> bytes:
    """Content event ``number``, sent at ``sent_ns`` (``time.monotonic_ns``)."""
    return _EVENT % (number, sent_ns)


def read_event(raw: bytes) -> tuple[int, int] | None:
    """Number and sending time of a content event without its blank line, or None."""
    if len(raw) != EVENT_BYTES - 2 or not raw.startswith(_EVENT_HEAD):
        return None
    return (
        int(raw[_NUMBER_AT : _NUMBER_AT + 8]),
        int(raw[_TIME_AT : _TIME_AT + 19]),
    )
