"""Prometheus's view of the daemon."""

from aiohttp import web

from inferencia.api.route import Route
from inferencia.keys import Role
from inferencia.metrics import Metrics

# https://prometheus.io/docs/instrumenting/exposition_formats/
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsPage:
    """The service ``metrics``."""

    def __init__(self, metrics: Metrics, *, is_public: bool) -> None:
        """Make the service.

        Args:
            metrics: what is rendered.
            is_public: ``metrics.public``: nobody needs a key.
        """
        self._metrics = metrics
        self._role = None if is_public else Role.METRICS

    def routes(self) -> tuple[Route, ...]:
        return (Route("metrics", "GET", "/metrics", self._role, self.page),)

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(),
            headers={"Content-Type": _CONTENT_TYPE, "Cache-Control": "no-store"},
        )
