"""``/admin/api/requests`` and ``agents``: what is in flight, and with whom."""

import dataclasses

from aiohttp import web

from inferencia.api.admin.asking import asked, told
from inferencia.api.admin.inside import Inside
from inferencia.api.admin.state import requests
from inferencia.api.route import Route
from inferencia.errors import NotFound, RequestAborted
from inferencia.keys import Role


class Requests:
    """Requests in flight, and the ends of tunnels."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside

    def routes(self) -> tuple[Route, ...]:
        path = "/admin/api/requests"
        one = f"{path}/{{id:.+}}"
        return (
            Route("admin", "GET", path, Role.ADMIN, self.list),
            Route("admin", "DELETE", one, Role.ADMIN, self.cancel),
            Route("admin", "GET", "/admin/api/agents", Role.ADMIN, self.agents),
        )

    async def list(self, request: web.Request) -> web.Response:
        return told({"requests": requests(self._inside.doors.active)})

    async def cancel(self, request: web.Request) -> web.Response:
        await asked(request, self._inside.bodies, ())
        id = request.match_info["id"]
        # A client may have chosen it, and so may another.
        meant = [one for one in self._inside.doors.active if one.id == id]
        if not meant:
            raise NotFound(f'no request "{id[:128]}" is in flight')
        for context in meant:
            context.interrupt(
                RequestAborted("the request was ended by an administrator")
            )
        return told({"cancelled": len(meant)})

    async def agents(self, request: web.Request) -> web.Response:
        inside = self._inside
        return told(
            {
                "accepts": inside.accepts_agents,
                "agents": [dataclasses.asdict(agent) for agent in inside.agents()],
                "relays": [dataclasses.asdict(relay) for relay in inside.relays()],
            }
        )
