"""What is said where there is nothing: unknown paths, wrong methods."""

import difflib
import re
from typing import NoReturn

from aiohttp import web

from inferencia.api.route import Route
from inferencia.errors import MethodNotAllowed, NotFound

# Parts of OpenAI's API that keep things on the server; nothing is kept here.
_STORED = {
    "/v1/files": "files",
    "/v1/uploads": "uploads",
    "/v1/batches": "batches",
    "/v1/messages/batches": "batches",
    "/v1/assistants": "assistants",
    "/v1/threads": "assistants",
    "/v1/vector_stores": "vector stores",
    "/v1/fine_tuning": "fine-tuning",
    "/v1/responses": "stored responses",
    "/v1/chat/completions": "stored chat completions",
    "/v1/conversations": "stored conversations",
    "/v1/evals": "evaluations",
}

# What llama-swap has and this server has not.
_SWAPS = {
    "/api/captures": "requests and answers are not kept: they are nobody else's",
    "/api/performance": "the machine is measured by others; /metrics has what is ours",
    "/api/hardware": "the machine is described by others; /running tells what runs",
    "/api/metrics/stats": "sums are in /v1/usage and in /admin/api/usage",
    "/comfyui": "it is at /upstream/MODEL/, as every model's own server",
    "/ui": "llama-swap's page is not here; /admin/ is this server's own",
}

_VARIABLE = re.compile(r"\{\w+(?::([^{}]+))?\}")

# A path longer than this is not shown in full.
_SHOWN_CHARACTERS = 100


class Missing:
    """Answers whatever no route takes."""

    def __init__(self) -> None:
        self._methods: dict[str, set[str]] = {}  # by path as declared
        self._patterns: list[tuple[re.Pattern[str], str]] = []

    def note(self, route: Route) -> None:
        """Learn of a route, for ``Allow`` and for suggestions."""
        if route.path not in self._methods and "{" in route.path:
            self._patterns.append((_pattern(route.path), route.path))
        self._methods.setdefault(route.path, set()).update(route.methods)

    async def answer(self, request: web.Request) -> NoReturn:
        """Refuse with 405 if only the method is wrong, else with 404."""
        # As routes are matched, where "%2F" is no "/".
        path = request.rel_url.raw_path
        methods = self._methods_at(path)
        if methods:
            allowed = ", ".join(sorted(methods))
            raise MethodNotAllowed(
                f"{request.method} is not possible at {_shown(path)}; use {allowed}",
                headers={"Allow": allowed},
            )
        raise NotFound(self._explanation(path))

    def _methods_at(self, path: str) -> set[str]:
        if path in self._methods:
            return self._methods[path]
        found: set[str] = set()
        for pattern, declared in self._patterns:
            if pattern.fullmatch(path):
                found |= self._methods[declared]
        return found

    def _explanation(self, path: str) -> str:
        whole = path.rstrip("/")
        for place, what in _STORED.items():
            is_it = whole == place and place not in self._methods
            if is_it or whole.startswith(f"{place}/"):
                return f"{what} are not offered here: this server keeps nothing"
        for place, why in _SWAPS.items():
            if whole == place or whole.startswith(f"{place}/"):
                return f"{place} is not offered here: {why}"
        text = f"there is nothing at {_shown(path)}"
        plain = [known for known in self._methods if "{" not in known]
        if f"/v1{path}" in plain:
            return f"{text}; did you mean /v1{path}? (a base URL ends with /v1)"
        near = difflib.get_close_matches(path[:_SHOWN_CHARACTERS], plain, n=1)
        return f"{text}; did you mean {near[0]}?" if near else text


def _pattern(path: str) -> re.Pattern[str]:
    """What a path with variable parts takes: ``{name}`` or ``{name:PATTERN}``."""
    parts = _VARIABLE.split(path)
    plain, variable = parts[::2], [part or "[^/]+" for part in parts[1::2]]
    found = [re.escape(plain[0])]
    for inner, after in zip(variable, plain[1:], strict=True):
        found += [f"(?:{inner})", re.escape(after)]
    return re.compile("".join(found))


def _shown(path: str) -> str:
    shown = path if len(path) <= _SHOWN_CHARACTERS else path[:_SHOWN_CHARACTERS] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)
