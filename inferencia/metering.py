"""How many tokens an answer cost, learned from its bytes while they pass.

``usage_of`` reads the usage out of one JSON object, whichever dialect it is in;
``Tally`` does so for the events of one stream. ``StreamTap`` and ``BodyTap`` stand
beside an answer on its way to the client: a stream of events, or one JSON body. They
never change a byte. The one thing that ``StreamTap`` may leave out is the usage chunk
that we asked the backend for and the client did not.

``StreamTap.feed`` runs once for every read of every stream, so its usual case (whole
events, nothing in them but text) is a handful of substring searches; JSON is decoded
only where such a search found something. What it does does not depend on how the bytes
were cut into reads:

- An unfinished event at the end of a read is held back until its end arrives, so that
  a comment or an error can be put in between two events at any time.
- Not the first event: the first bytes of an answer go on the moment they arrive.
- Nor one that exceeds ``MAX_HELD_BYTES``: the rest of it goes on as it comes.
- Only an event that could be held is ever left out; the first and a large one are not.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from inferencia.sse import BOM, event_end, parse

# An unfinished event up to this size is held back. A chunk with twenty alternatives
# for its token is about 2 KiB. A larger event is either a whole answer or a picture.
MAX_HELD_BYTES = 16 * 1024

# Of a large event that passes in pieces, this much of its beginning is kept to tell
# what it is. ``event: response.completed`` and the type stand in front of everything.
_HEAD_BYTES = 512

# A read of so many bytes holds a dozen events, which are not looked at one by one
# because it begins or ends inside an event. (Sockets, TLS and tunnels cut where they
# like; one by one takes nine times as long.)
_SPLIT_BYTES = 4096

# What is kept of each end of a JSON body. Engines put ``usage`` behind the text and in
# front of a list of embeddings.
_BODY_END_BYTES = 64 * 1024

# No usage object is longer; the search of a large event or body ends there.
_MAX_USAGE_BYTES = 4096

# No honest count of tokens is larger. Whatever is, must not reach budgets and charts.
_MAX_TOKENS = 1_000_000_000

_NUMBERS = frozenset({int, float})  # as JSON decodes to; bool is none

# How many choices of one answer are told apart; no engine offers that many.
_MAX_CHOICES = 1024

_DECODER = json.JSONDecoder()
_USAGE_OBJECT = re.compile(rb'"(?:usage|timings)"\s*:\s*\{')
_DATA_LINE = re.compile(rb"(?:^(?:\xef\xbb\xbf)?|[\r\n])data[:\r\n]")
_LINE_ENDS = re.compile(rb"[\r\n]*")

# What makes an event worth decoding. A word inside a text may do so too, which costs
# a few microseconds and no more: the decision is made on the decoded object.
_MARKS = (
    b'"usage"',
    b'"timings"',
    b"error",
    b'"stop":true',
    b'"stop": true',
    b"message_stop",
    b"response.completed",
    b"response.failed",
    b"response.incomplete",
)
_RESPONSE_ENDS = ("response.completed", "response.failed", "response.incomplete")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer cost, in tokens."""

    prompt: int  # all of the prompt, cached or not
    completion: int
    cached: int | None = None  # the part of the prompt that the engine had already

    def __add__(self, other: "Usage") -> "Usage":
        cached = None
        if self.cached is not None or other.cached is not None:
            cached = (self.cached or 0) + (other.cached or 0)
        return Usage(
            self.prompt + other.prompt, self.completion + other.completion, cached
        )


def usage_of(answer: Any) -> Usage | None:
    """The usage that one decoded answer or event names, or None.

    Understood are the ``usage`` of OpenAI's chat, completions, embeddings and rerank,
    that of Responses (also as an event, inside ``response``) and of Anthropic's
    messages (also as ``message_start``, inside ``message``), and the counts of
    llama.cpp's own endpoints. A list, llama.cpp's answer to several prompts, is summed.
    """
    if isinstance(answer, list):
        return total(filter(None, map(usage_of, answer)))
    if not isinstance(answer, dict):
        return None
    for holder in (answer, answer.get("response"), answer.get("message")):
        if isinstance(holder, dict):
            found = _from_usage(holder.get("usage"))
            if found:
                return found
    return _from_llamacpp(answer)


def total(usages: Iterable[Usage]) -> Usage | None:
    """All of them together, or None if there are none."""
    result = None
    for usage in usages:
        result = usage if result is None else result + usage
    return result


def _from_usage(usage: Any) -> Usage | None:
    """Read a ``usage`` object of OpenAI or Anthropic."""
    if not isinstance(usage, dict):
        return None
    completion = _count(usage, "completion_tokens", "output_tokens")
    prompt = _count(usage, "prompt_tokens")
    cached = _cached(usage)
    if prompt is None:
        prompt = _count(usage, "input_tokens")
        # Anthropic counts what came from or went into its cache beside the input,
        # OpenAI as a part of it.
        beside = [
            _count(usage, "cache_read_input_tokens"),
            _count(usage, "cache_creation_input_tokens"),
        ]
        if beside != [None, None]:
            prompt = (prompt or 0) + sum(filter(None, beside))
    if prompt is None:
        total = _count(usage, "total_tokens")  # some rerankers say no more than this
        if total is not None:
            prompt = max(0, total - (completion or 0))
    if prompt is None and completion is None:
        return None
    return Usage(prompt or 0, completion or 0, cached)


def _cached(usage: Mapping[str, Any]) -> int | None:
    for name in ("prompt_tokens_details", "input_tokens_details"):
        details = usage.get(name)
        if isinstance(details, dict):
            found = _count(details, "cached_tokens")
            if found is not None:
                return found
    return _count(usage, "cache_read_input_tokens", "prompt_cache_hit_tokens")


def _from_llamacpp(answer: Mapping[str, Any]) -> Usage | None:
    """Read the counts that llama.cpp's own endpoints and its streams carry."""
    timings = answer.get("timings")
    timings = timings if isinstance(timings, dict) else {}
    cached = _count(timings, "cache_n")
    prompt = _count(answer, "tokens_evaluated")
    completion = _count(answer, "tokens_predicted")
    if prompt is None and (read := _count(timings, "prompt_n")) is not None:
        prompt = read + (cached or 0)
    if completion is None:
        completion = _count(timings, "predicted_n")
    if prompt is None and completion is None:
        return None
    return Usage(prompt or 0, completion or 0, cached)


def _count(holder: Mapping[str, Any], *names: str) -> int | None:
    """The first of the members that is a believable number of tokens."""
    for name in names:
        if name in holder:
            value: Any = holder[name]
            if type(value) in _NUMBERS and 0 <= value <= _MAX_TOKENS:
                return int(value)
    return None


class Tally:
    """Adds up what the events of one stream say about usage.

    One stream may say it many times over: Anthropic at its beginning and its end, vLLM
    with every chunk (``continuous_usage_stats``), llama.cpp once for each choice.
    """

    def __init__(self) -> None:
        self._message: dict[str, Any] = {}  # Anthropic's counts, later ones win
        self._extra: Usage | None = None  # sum of the chunks without choices
        self._whole: Usage | None = None  # of an event that sums up the answer
        self._choices: dict[int, Usage] = {}  # the last that came with each choice
        self._native: dict[
            int, Usage
        ] = {}  # llama.cpp's own counts, at the end of each

    def add(self, event: Any) -> None:
        """Take note of one decoded event."""
        if not isinstance(event, dict):
            return
        kind = event.get("type")
        if kind == "message_start" or kind == "message_delta":
            holder = event.get("message") if kind == "message_start" else event
            usage = holder.get("usage") if isinstance(holder, dict) else None
            if isinstance(usage, dict):
                self._message.update((k, v) for k, v in usage.items() if v is not None)
            return
        usage = _from_usage(event.get("usage"))
        if usage is None:
            self._add_other(event)
        elif event.get("choices") == []:
            self._extra = usage if self._extra is None else self._extra + usage
        elif isinstance(event.get("choices"), list):
            self._put(self._choices, event["choices"][0], usage)
        else:
            self._whole = usage

    def add_whole(self, answer: dict[str, Any]) -> None:
        """Take note of an object that speaks for all of the answer."""
        self._whole = usage_of(answer) or self._whole

    def _add_other(self, event: dict[str, Any]) -> None:
        usage = usage_of(event)
        if usage is None:
            return
        if isinstance(event.get("response"), dict):
            self._whole = usage
            return
        choices = event.get("choices") or [event]
        choice = choices[0] if isinstance(choices, list) else None
        if isinstance(choice, dict):
            if choice.get("stop") is True or choice.get("finish_reason"):
                self._put(self._native, choice, usage)

    @staticmethod
    def _put(usages: dict[int, Usage], choice: Any, usage: Usage) -> None:
        index = choice.get("index", 0) if isinstance(choice, dict) else 0
        if isinstance(index, int) and (index in usages or len(usages) < _MAX_CHOICES):
            usages[index] = usage

    @property
    def usage(self) -> Usage | None:
        """What has been said so far, or None."""
        return (
            _from_usage(self._message)
            or self._extra
            or self._whole
            or total(self._choices.values())
            or total(self._native.values())
        )


class StreamTap:
    """Looks at a stream of events on its way to the client. See the module's text."""

    def __init__(self, hide_usage: bool) -> None:
        """Watch one stream.

        Args:
            hide_usage: leave out the chunk without choices that carries the usage,
                because we asked for it and the client did not.
        """
        self._hide_usage = hide_usage
        self._tally = Tally()
        self._quick = False  # at a boundary, and past the first event with data
        # What the first event with data tells about all: see ``_recognise``.
        self._start = b"data:"  # how an event begins
        self._reason = b'"finish_reason":"'  # how the reason for an end is written
        self._marks: tuple[bytes, ...] = ()  # further words that need a closer look
        self._part = b""  # the unfinished event; of a large one, its end
        self._part_head = b""  # the beginning of a large unfinished event
        self._part_passed = False  # whether the client has ``_part`` already
        self._had_event = False  # an event with data has passed whole
        self._bom = BOM  # what may still come of a byte order mark at the start
        self._in_comment = False  # before ``begun``: inside a comment line

        self.begun = False  # something came that is no comment and no blank line
        self.finished = False  # some choice said why it ended
        self.done = False  # the event came that ends such a stream
        self.failed = False  # an error event came
        self.events = 0  # events with data: roughly the tokens, if nothing says so

    @property
    def at_boundary(self) -> bool:
        """Whether the client stands between two events."""
        return not self._part_passed

    @property
    def usage(self) -> Usage | None:
        """What the stream has said of its cost so far, or None."""
        return self._tally.usage

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; return those to pass on now: mostly ``data`` itself."""
        if self._pass_quickly(data):
            return data
        if self._had_event and len(data) >= _SPLIT_BYTES:
            return self._feed_split(data)
        return self._feed_events(data)

    def _pass_quickly(self, data: bytes) -> bool:
        """Count these events if they are whole and none needs a closer look."""
        if (
            self._quick
            and data.endswith(b"}\n\n")
            and data.startswith(self._start)
            and self._reason not in data
            and b'"error"' not in data
            and (b'"usage"' not in data or not _USAGE_OBJECT.search(data))
            and not any(map(data.__contains__, self._marks))
        ):
            self.events += data.count(b"data:")
            return True
        return False

    def _feed_split(self, data: bytes) -> bytes:
        """Do the work of ``feed`` for a large read, which may be cut anywhere.

        The events at its ends are looked at, those between them counted if possible.
        """
        first, last = data.find(b"\n\n") + 2, data.rfind(b"\n\n") + 2
        if not 2 <= first < last:
            return self._feed_events(data)
        front, middle, back = data[:first], data[first:last], data[last:]
        passed = self._feed_events(front)
        passed += middle if self._pass_quickly(middle) else self._feed_events(middle)
        return passed + self._feed_events(back) if back else passed

    def finish(self) -> bytes:
        """The stream has ended as it should: return what is still held back."""
        part, passed = self._part, self._part_passed
        if part and self._study(part, self._part_head):
            part = b""
        self._forget_part()
        self._part_passed = passed or bool(part)
        return b"" if passed else part

    def drop_held(self) -> None:
        """The stream broke: the client shall not see what is held back."""
        passed = self._part_passed
        self._forget_part()
        self._part_passed = passed

    def _feed_events(self, data: bytes) -> bytes:
        """Do the work of ``feed`` event by event."""
        if not self.begun:
            self._look_for_beginning(data)
        work = self._part + data
        known = len(self._part)
        in_part = known > 0  # whether ``work`` begins inside an event
        unsent = known if self._part_passed else 0  # from here on nothing has gone out
        passed: list[bytes] = []
        begin = 0
        while True:
            if not in_part:  # blank lines between events belong to none
                begin = _line_ends_end(work, begin)
            end = event_end(work, max(begin, known - 2))
            if end < 0:
                break
            event = work[begin:end]
            if self._study(event, self._part_head):
                passed.append(work[unsent:begin])
                unsent = end
            begin = end
            in_part = False
            self._forget_part()
        passed.append(work[unsent : self._keep_part(work[begin:], begin)])
        self._quick = self._had_event and not self._part
        out = b"".join(passed)
        return data if len(out) == len(data) and unsent == known else out

    def _keep_part(self, rest: bytes, begin: int) -> int:
        """Keep the unfinished event; return where the bytes for the client end."""
        if not rest:
            return begin
        self._part = rest
        is_large = len(rest) > MAX_HELD_BYTES
        if self._had_event and not is_large and not self._part_passed:
            return begin
        self._part_passed = True
        if is_large:
            self._part_head = self._part_head or rest[:_HEAD_BYTES]
            self._part = rest[-MAX_HELD_BYTES:]
        return begin + len(rest)

    def _forget_part(self) -> None:
        self._part = self._part_head = b""
        self._part_passed = False

    def _study(self, event: bytes, head: bytes) -> bool:
        """Learn from one whole event; tell whether it shall be left out.

        Args:
            event: the event, or the last bytes of one that has passed in pieces.
            head: in the latter case, its first bytes.
        """
        is_large = bool(head) or len(event) > MAX_HELD_BYTES
        head = head or event[:_HEAD_BYTES]
        if not _DATA_LINE.search(head):
            # An error may stand alone in a line of its own, see ``sse``.
            self.failed = self.failed or parse(head).name == "error"
            return False
        is_first = not self._had_event
        if is_first:
            self._had_event = True
            self._recognise(head)
        self.events += 1
        if b'"finish_reason":"' in event or b'"finish_reason": "' in event:
            self.finished = True
        if is_large:
            self._study_large(event, head)
            return False
        if b"[DONE]" in event and parse(event).data.strip() == b"[DONE]":
            self.done = True
            return False
        if not any(mark in event for mark in _MARKS):
            return False
        return self._study_json(event) and not is_first

    def _recognise(self, head: bytes) -> None:
        """Choose what ``feed`` has to look for, from the first event with data."""
        if head.startswith(b"event:"):
            self._start = b"event:"
        if b'"finish_reason": ' in head:
            self._reason = b'"finish_reason": "'
        if b"message_start" in head:
            self._marks = (b"message_stop", b"event: error")
        elif b'"response' in head:
            self._marks = (b'"response"',)  # in the events about all of it
        elif b'"content"' in head and b'"choices"' not in head:  # llama.cpp's own
            self._marks = (b'"stop":true', b'"stop": true', b'"timings"')

    def _study_large(self, event: bytes, head: bytes) -> None:
        """Learn from the two ends of an event that is too large to decode here."""
        if any(name.encode() in head for name in _RESPONSE_ENDS):
            self.done = self.finished = True
        if b'data: {"error"' in head or b"response.failed" in head:
            self.failed = True
        end = event[-MAX_HELD_BYTES:]
        is_native_end = b'"stop_type"' in end  # llama.cpp's, with the prompt repeated
        if is_native_end:
            self.done = self.finished = True
        found = _find_usage(end)
        if found and (is_native_end or "usage" in found):
            self._tally.add_whole(found)

    def _study_json(self, event: bytes) -> bool:
        """Learn from an event with something in it; tell whether it is usage only."""
        parsed = parse(event)
        content = _decode(parsed.data)
        if parsed.name == "error":
            self.failed = True
        if not isinstance(content, dict):
            return False
        kind = content.get("type")
        if content.get("error") or kind == "error" or kind == "response.failed":
            self.failed = True
        if kind in _RESPONSE_ENDS or kind == "message_stop":
            self.done = self.finished = True
        elif kind == "message_delta":
            delta = content.get("delta")
            if isinstance(delta, dict) and delta.get("stop_reason"):
                self.finished = True
        elif content.get("stop") is True:
            self.done = self.finished = True  # llama.cpp's own streams end so
        self._tally.add(content)
        return (
            self._hide_usage
            and content.get("choices") == []
            and isinstance(content.get("usage"), dict)
        )

    def _look_for_beginning(self, data: bytes) -> None:
        """Set ``begun`` at the first byte that is neither comment nor blank line."""
        if self._bom:
            size = min(len(self._bom), len(data))
            if data[:size] == self._bom[:size]:
                self._bom = self._bom[size:]
                data = data[size:]
            else:
                self.begun = self._bom is not BOM  # half a mark is something else
                self._bom = b""
        at = 0
        while not self.begun:
            if self._in_comment:
                ends = [
                    e for e in (data.find(b"\n", at), data.find(b"\r", at)) if e >= 0
                ]
                if not ends:
                    return
                at = min(ends)
                self._in_comment = False
            at = _line_ends_end(data, at)
            if at == len(data):
                return
            self._in_comment = data[at] == 0x3A  # a colon
            self.begun = not self._in_comment


class BodyTap:
    """Looks at one JSON body on its way to the client."""

    def __init__(self) -> None:
        self._head = b""
        self._tail = bytearray()  # what followed the head; its beginning may be cut off
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Take note of the next bytes. No more than 128 KiB are kept of all."""
        if not self._size and len(data) <= _BODY_END_BYTES:  # often it is the whole
            self._head = data
            self._size = len(data)
            return
        self._size += len(data)
        room = _BODY_END_BYTES - len(self._head)
        if len(data) <= room:
            self._head += data
            return
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data[-_BODY_END_BYTES:]
        del self._tail[:-_BODY_END_BYTES]

    def answer(self) -> Any:
        """The decoded body; None if it is no JSON, or too large to have been kept."""
        whole = self._head + bytes(self._tail)
        return _decode(whole) if self._size == len(whole) else None

    def usage(self) -> Usage | None:
        """What the body says of its cost, or None. A large body is not decoded."""
        tail = bytes(self._tail)
        if self._size == len(self._head) + len(tail):
            body = self._head + tail if tail else self._head
            return _usage_at_end(body) or usage_of(_decode(body))
        return usage_of(_find_usage(tail) or _find_usage(self._head))


def _line_ends_end(data: bytes, begin: int) -> int:
    found = _LINE_ENDS.match(data, begin)
    return found.end() if found else begin


def _decode(data: bytes) -> Any:
    """The JSON value, or None if it is none. A nasty one is none, too."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _usage_at_end(body: bytes) -> Usage | None:
    """The usage of a body whose last members it is among; the rest is not decoded.

    What stands from a member of the outermost object to the end is an object again
    once it is given an opening brace. From a member further inside there would be a
    bracket too many at the end, and inside a text the quotation mark is escaped.
    """
    at = body.rfind(b'"usage"')
    if at < 1 or len(body) - at > _MAX_USAGE_BYTES or body.startswith(b"\\", at - 1):
        return None
    try:
        text = "{" + body[at:].decode()
        members, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return _from_usage(members.get("usage")) if not text[end:].strip() else None


def _find_usage(data: bytes) -> dict[str, Any] | None:
    """The last usage object in a piece of JSON, as if it stood alone.

    A text inside the JSON cannot pass for one, for its quotation marks are escaped.
    """
    best: dict[str, Any] | None = None
    for found in _USAGE_OBJECT.finditer(data):
        name = (
            "usage"
            if data[found.start() + 1 : found.start() + 2] == b"u"
            else "timings"
        )
        if best and name == "timings" and "usage" in best:
            continue  # llama.cpp writes both, and usage says more
        text = data[found.end() - 1 : found.end() - 1 + _MAX_USAGE_BYTES]
        try:
            value, _ = _DECODER.raw_decode(text.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if usage_of({name: value}):
            best = {name: value}
    return best
