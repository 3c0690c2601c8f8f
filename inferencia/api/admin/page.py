"""The page's files, at ``/admin/``: open to everybody, since they hold no secret.

They are part of the package and read once. Only names that were found then are served,
so no name that a client makes up reaches the disk. The page may load nothing from
elsewhere, and nobody may put it into a frame.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from aiohttp import hdrs, web

from inferencia.api.route import Route
from inferencia.context import CONTEXT
from inferencia.errors import NotFound

_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Where it is known, no text can become markup or a script.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Asked for again each time, and mostly answered by 304: an upgrade shows at once.
    "Cache-Control": "no-cache",
}

_INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class _File:
    """One file of the page."""

    content: bytes
    type: str
    etag: str


class Page:
    """Serves the files of ``inferencia/web``."""

    def routes(self) -> tuple[Route, ...]:
        return (
            Route("admin", "GET", "/admin", None, self.redirect),
            Route("admin", "GET", "/admin/", None, self.file),
            Route("admin", "GET", "/admin/{file:(?!api(?:/|$)).+}", None, self.file),
        )

    async def redirect(self, request: web.Request) -> web.Response:
        # Relative, for behind a proxy only it knows what stands before the path.
        return web.Response(status=308, headers={"Location": "admin/"})

    async def file(self, request: web.Request) -> web.Response:
        name = request.match_info.get("file", "") or _INDEX
        # An opened page is a line in the log, and not one for each of its files.
        request[CONTEXT].measurement.is_minor = name != _INDEX
        found = files().get(name)
        if found is None:
            raise NotFound(f"the page has no file {name[:64]!a}")
        headers = {**HEADERS, "ETag": found.etag}
        known = request.headers.get(hdrs.IF_NONE_MATCH, "")
        if found.etag in (one.strip().removeprefix("W/") for one in known.split(",")):
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = found.type
        return web.Response(body=found.content, headers=headers)


@functools.cache
def files() -> Mapping[str, _File]:
    """All files of the page, by their names."""
    folder = resources.files("inferencia") / "web"
    return dict(_found(folder, "")) if folder.is_dir() else {}


def _found(folder: Traversable, path: str) -> Iterator[tuple[str, _File]]:
    for entry in folder.iterdir():
        name = f"{path}{entry.name}"
        if entry.is_dir():
            yield from _found(entry, f"{name}/")
            continue
        kind = _TYPES.get("." + entry.name.rpartition(".")[2])
        if kind is None or entry.name.startswith("."):
            continue
        content = entry.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:32]
        yield name, _File(content, kind, f'"{digest}"')
