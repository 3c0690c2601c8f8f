"""The headers that a backend is sent, built from nothing but an allowlist.

Pure. What a client says about itself, about others, or about the connection never goes
up: keys, cookies, forwarding and framing headers all stay with us. (RFC 9110, 7.6)
"""

import functools
import re
from collections.abc import Container, Iterable, Sequence

from inferencia import __version__

# The longest header value of a client that we pass on. Anthropic's beta lists and W3C
# trace states (at most 512 characters by the standard) stay far below.
MAX_VALUE_LENGTH = 4096

# What a client may say to a backend, and what it takes to be believed. Names that are
# absent here stay with us: credentials, cookies, addresses, framing, and everything
# that Connection names. (RFC 9110 7.6.1)
_PASSED_HEADERS = (
    "content-type",
    "accept",
    "traceparent",
    "tracestate",
    "anthropic-version",
    "anthropic-beta",
    "openai-beta",
)
# These are lists by their definition, so that several fields are one.
_LIST_HEADERS = frozenset({"accept", "tracestate", "anthropic-beta", "openai-beta"})
_WANTED = frozenset({*_PASSED_HEADERS, "via"})
_NOTED = _WANTED | {"connection"}  # which names what must not be passed on
_VISIBLE = re.compile(r"[\t\x20-\x7e]*")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def upstream_headers(
    client_headers: Iterable[tuple[str, str]],
    *,
    config_headers: Sequence[tuple[str, str]] = (),
    api_key: str = "",
    via: str = "",
    request_id: str = "",
    content_type: str | None = None,
    further: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """Build the headers of one request.

    Args:
        client_headers: as received. Names that are not allowed, that ``Connection``
            names, or whose value is long or holds anything but visible ASCII, are left
            out. Of a repeated field that is no list, the first counts.
        config_headers: ``backends[].headers``; they replace ours of the same name.
        api_key: ours for this backend.
        via: our own entry, appended to an incoming ``Via``. (RFC 9110 7.6.3)
        request_id: our id of the request.
        content_type: replaces the client's.
        further: more names that this backend has a use for, in lower case.
    """
    wanted = _NOTED.union(further) if further else _NOTED
    noted = [pair for pair in client_headers if pair[0].lower() in wanted]
    headers = _without_id(
        tuple(noted), tuple(config_headers), api_key, via, content_type, tuple(further)
    )
    if not request_id or (
        config_headers and any(n.lower() == "x-request-id" for n, _ in config_headers)
    ):
        return list(headers)
    return [*headers, ("X-Request-Id", request_id)]


# A client sends the same headers each time; only those of its tracing differ.
@functools.lru_cache(maxsize=256)
def _without_id(
    client_headers: tuple[tuple[str, str], ...],
    config_headers: tuple[tuple[str, str], ...],
    api_key: str,
    via: str,
    content_type: str | None,
    further: tuple[str, ...],
) -> tuple[tuple[str, str], ...]:
    """All that is sent but our id of the request."""
    headers = _by_name(client_headers, _WANTED.union(further))
    traced = headers.get("traceparent")
    if traced is None or not _TRACEPARENT.fullmatch(traced):
        headers.pop("traceparent", None)
        headers.pop("tracestate", None)
    passed = headers.pop("via", "")
    if content_type is not None:
        headers["content-type"] = content_type
    if via:
        headers["via"] = f"{passed}, {via}" if passed else via
    headers["user-agent"] = f"inferencia/{__version__}"
    # The answer's bytes are passed on as they are, and looked at for usage.
    headers["accept-encoding"] = "identity"
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    for name, value in config_headers:
        headers[name.lower()] = value
    return tuple([(_canonical(name), value) for name, value in headers.items()])


def via_name(instance: str) -> str:
    """Our entry in ``Via``: the protocol's version and a pseudonym."""
    return f"1.1 inferencia-{instance}" if instance else "1.1 inferencia"


def has_met_us(client_headers: Iterable[tuple[str, str]], instance: str) -> bool:
    """Whether a request has passed this very process before: a loop."""
    ours = via_name(instance).lower()
    return any(
        entry.strip().lower() == ours
        for name, value in client_headers
        if name.lower() == "via"
        for entry in value.split(",")
    )


def _by_name(
    headers: Iterable[tuple[str, str]], wanted: Container[str]
) -> dict[str, str]:
    """Well-formed fields by lower-case name, less those that Connection names."""
    received: dict[str, str] = {}
    hop_by_hop: set[str] = set()
    for raw_name, value in headers:
        name = raw_name.lower()
        if name == "connection":
            hop_by_hop.update(option.strip().lower() for option in value.split(","))
        if name not in wanted:
            continue
        if len(value) > MAX_VALUE_LENGTH or not _VISIBLE.fullmatch(value):
            continue
        value = value.strip(" \t")
        if name not in received:
            received[name] = value
        elif name in _LIST_HEADERS or name == "via":
            received[name] = f"{received[name]}, {value}"
    return {name: v for name, v in received.items() if v and name not in hop_by_hop}


def _canonical(name: str) -> str:
    return "-".join(part.capitalize() for part in name.split("-"))
