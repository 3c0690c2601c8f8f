"""``/admin/api/logs``: the gateway's own lines, and what each model prints."""

from aiohttp import web

from inferencia.api.admin.asking import TEXT, flag_in_query, follow
from inferencia.api.admin.inside import Inside
from inferencia.api.route import Route
from inferencia.errors import NotFound
from inferencia.keys import Role
from inferencia.models.childlog import Follower, Log

# As they are called here and in the fleet.
_SOURCES = {"": "proxy", "gateway": "proxy", "models": "upstream"}


class LogsApi:
    """Logs, as they are kept and as they come."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._followers: set[Follower] = set()

    def routes(self) -> tuple[Route, ...]:
        path = "/admin/api/logs"
        return (Route("admin", "GET", path, Role.ADMIN, self.logs, is_relayed=True),)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        log = self._named(request.query.get("source", ""))
        if not flag_in_query(request, "follow"):
            return text(log.history())
        with log.follow() as follower:
            self._followers.add(follower)
            try:
                return await follow(request, follower)
            finally:
                self._followers.discard(follower)

    def end_streams(self) -> None:
        """End all streams."""
        for follower in tuple(self._followers):
            follower.close()

    def _named(self, source: str) -> Log:
        fleet = self._inside.local.fleet
        if source in _SOURCES:
            name = _SOURCES[source]
            # A model may be called so, too; it is asked for by no other name.
            log = fleet.logs.find(name)
        elif source in fleet.plan.models:
            log = fleet.logs.model(source)
        else:
            log = None
        if log is None:
            raise NotFound(
                f'there is no log "{source[:128]}"; there are gateway, models, and one '
                "of each model on this machine"
            )
        return log


def text(history: str) -> web.Response:
    """Lines as they are kept."""
    return web.Response(text=history, headers=dict(TEXT))
