"""What is asked of the admin API, read strictly; and how it answers.

A request that changes something brings a JSON object, or nothing at all. A body of
another kind is refused: a page of another site can send such a one without asking.
"""

import json
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from aiohttp import hdrs, web

from inferencia.api.streams import begin
from inferencia.bodies import Bodies
from inferencia.errors import InvalidRequest, UnsupportedMediaType
from inferencia.members import Members

_JSON = ("application/json",)
# What curl says of a body if nobody tells it otherwise. No form of a page can make
# such a body begin with a brace.
_CURL = "application/x-www-form-urlencoded"

_FRESH = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
STREAMED = (
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
    ("X-Content-Type-Options", "nosniff"),
)
EVENTS = (("Content-Type", "text/event-stream"), *STREAMED)
TEXT = (("Content-Type", "text/plain; charset=utf-8"), *STREAMED)

_KINDS: Mapping[type[Any], str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
}


def told(data: object, *, status: int = 200) -> web.Response:
    """An answer that nobody keeps."""
    return told_text(json.dumps(data), status=status)


def told_text(text: str, *, status: int = 200) -> web.Response:
    """The same, of what is JSON already."""
    return web.Response(text=text, status=status, headers=_FRESH, content_type=_JSON[0])


async def asked(
    request: web.Request, bodies: Bodies, known: Collection[str]
) -> Mapping[str, Any]:
    """The members of the request's JSON object; none if there is no body.

    Args:
        request: to be read.
        bodies: who reads it.
        known: the members that mean something here.

    Raises:
        ApiError: it is of another kind, no JSON, or has members that mean nothing.
    """
    body = await bodies.read(request)
    try:
        if not body.strip():
            return {}
        kind = request.content_type if hdrs.CONTENT_TYPE in request.headers else None
        is_curls = kind == _CURL and body.lstrip().startswith(b"{")
        if kind is not None and kind not in _JSON and not is_curls:
            raise UnsupportedMediaType(
                "a JSON object is expected; send it with the header "
                '"Content-Type: application/json"'
            )
        values = Members.parse(body).values
    finally:
        bodies.release(body)
    for name in values:
        if name not in known:
            expected = ", ".join(known) or "none"
            raise InvalidRequest(
                f'"{name[:64]}" is not known here; the members are: {expected}',
                param=name[:64],
            )
    return values


def member(values: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """A member of this type; None if it is missing or null.

    Raises:
        InvalidRequest: it is something else.
    """
    value = values.get(name)
    is_number = type(value) in (int, float) and kind is float
    if value is None or type(value) is kind or is_number:
        return value
    raise InvalidRequest(f'"{name}" must be {_KINDS[kind]}', param=name)


def needed(values: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """A member that must be there.

    Raises:
        InvalidRequest: it is missing, or something else.
    """
    value = member(values, name, kind)
    if value is None:
        raise InvalidRequest(f'"{name}" is missing', param=name)
    return value


def flag_in_query(request: web.Request, name: str) -> bool:
    """Whether ``?name=1`` (or true, or nothing) was asked for."""
    return request.query.get(name, "0").lower() in ("1", "true", "yes", "")


async def follow(request: web.Request, texts: AsyncIterator[str]) -> web.StreamResponse:
    """Answer with text as it comes, as events if the client prefers them."""
    as_events = "text/event-stream" in request.headers.get("Accept", "")
    response = await begin(request, EVENTS if as_events else TEXT)
    async for text in texts:
        if as_events:
            text = f"data: {json.dumps(text)}\n\n"
        await response.write(text.encode())
    await response.write_eof()
    return response
