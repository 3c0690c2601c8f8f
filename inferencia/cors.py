"""Which web pages may call this server from a browser (the Fetch standard's CORS).

Origins are compared as a whole and exactly: scheme, host and port. There is no ``*``,
an origin that is not listed is never repeated, ``null`` cannot be listed, and no
credentials of the browser's own are invited: keys come in a header that a page sets.
"""

from aiohttp import web

# How long a browser may remember a preflight; Chromium caps it at two hours.
_MAX_AGE_SECONDS = 7200

_METHODS = "GET, POST, OPTIONS"

# What OpenAI's and Anthropic's clients send from browsers. Others are taken from the
# preflight if they are plain names.
_EXPOSED = (
    "X-Request-Id, Retry-After, X-RateLimit-Limit, X-RateLimit-Remaining, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    "x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_MAX_REQUESTED = 1024  # characters of Access-Control-Request-Headers

Headers = tuple[tuple[str, str], ...]


class Cors:
    """The rules for pages."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origins)

    def headers(self, request: web.Request) -> Headers:
        """What an answer to ``request`` must say so that its page may read it."""
        if not self._origins:
            return ()
        # Shared caches must not give one origin's answer to another.
        vary = ("Vary", "Origin")
        origin = request.headers.get("Origin")
        if origin not in self._origins:
            return (vary,)
        return (
            vary,
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", _EXPOSED),
        )

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a preflight of a page that may call us, else ``None``.

        It needs no key: a browser sends none with it.
        """
        headers = request.headers
        if (
            request.method != "OPTIONS"
            or headers.get("Origin") not in self._origins
            or "Access-Control-Request-Method" not in headers
        ):
            return None
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": _METHODS,
                "Access-Control-Allow-Headers": _allowed(
                    headers.get("Access-Control-Request-Headers", "")
                ),
                "Access-Control-Max-Age": str(_MAX_AGE_SECONDS),
            },
        )


def _allowed(requested: str) -> str:
    """The requested header names, as far as they are names; never ``*``.

    ``*`` would not cover ``Authorization`` (Fetch, 4.9).
    """
    names = [name.strip().lower() for name in requested[:_MAX_REQUESTED].split(",")]
    named = [name for name in names if name and _is_token(name)]
    return ", ".join(dict.fromkeys(["authorization", "content-type", *named]))


def _is_token(name: str) -> bool:
    return name.isascii() and name.replace("-", "").replace("_", "").isalnum()
