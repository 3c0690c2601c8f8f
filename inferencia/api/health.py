"""Whether the daemon is alive and of use. No key is needed, nothing inside is told."""

from collections.abc import Callable
from importlib import resources

from aiohttp import web

from inferencia import __version__
from inferencia.api.route import Route


class Health:
    """The service that is on every address."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        """Make the service.

        Args:
            is_ready: whether some model can be served and no shutdown has begun.
        """
        self._is_ready = is_ready

    def routes(self) -> tuple[Route, ...]:
        return (
            Route("health", "GET", "/health", None, self.alive),
            Route("health", "GET", "/health/ready", None, self.ready),
            Route("health", "GET", "/version", None, self.version),
            Route("health", "GET", "/openapi.yaml", None, self.openapi),
        )

    async def alive(self, request: web.Request) -> web.Response:
        return _fresh({"status": "ok", "version": __version__})

    async def ready(self, request: web.Request) -> web.Response:
        if self._is_ready():
            return _fresh({"status": "ready", "version": __version__})
        return _fresh({"status": "unavailable", "version": __version__}, status=503)

    async def version(self, request: web.Request) -> web.Response:
        return _fresh({"version": __version__})

    async def openapi(self, request: web.Request) -> web.Response:
        text = resources.files("inferencia").joinpath("openapi.yaml").read_text("utf-8")
        return web.Response(
            text=text,
            content_type="application/yaml",
            headers={"Cache-Control": "public, max-age=3600"},
        )


def _fresh(data: dict[str, str], *, status: int = 200) -> web.Response:
    """An answer that no proxy may keep: it would hide that we are down."""
    headers = {"Cache-Control": "no-store"}
    return web.json_response(data, status=status, headers=headers)
