"""The short way to a route whose path has no variable part.

aiohttp resolves every request anew: it walks its tables, makes a match object and
looks up the chain of middlewares for it. For a path that is always the same all of that
comes out the same, so it is done once here, at the start; a request then costs one look
into a dictionary. Whatever is not in it takes aiohttp's own way.

``Request._match_info`` is a private name of aiohttp; a test fails when it moves.
"""

import functools
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_urldispatcher import UrlMappingMatchInfo

Answering = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Shortcuts:
    """Hands a request to its handler, chain included."""

    def __init__(
        self,
        app: web.Application,
        routes: Iterable[web.AbstractRoute],
        links: Iterable[Middleware],
    ) -> None:
        """Prepare the ways.

        Args:
            app: takes what is not known here. It must be complete.
            routes: of ``app``; those with a variable part are left out.
            links: the middlewares of ``app``, outermost first.
        """
        self._other = app._handle
        self._known: dict[tuple[str, str], tuple[UrlMappingMatchInfo, Answering]] = {}
        chain = tuple(links)
        for route in routes:
            resource = route.resource
            if resource is None or "{" in resource.canonical or route.method == "*":
                continue
            match = UrlMappingMatchInfo({}, route)
            match.add_app(app)
            match.freeze()
            way = chained(route.handler, chain)
            self._known[route.method, resource.canonical] = (match, way)

    def __call__(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        """The answer to come."""
        assert isinstance(request, web.Request)
        found = self._known.get((request.method, request.rel_url.raw_path))
        if found is None:
            return self._other(request)
        request._match_info, way = found
        return way(request)


def chained(handler: Handler, links: tuple[Middleware, ...]) -> Answering:
    """``handler`` behind the middlewares, outermost first."""
    way: Answering = handler
    for link in reversed(links):
        way = functools.partial(link, handler=way)
    return way
