"""``/admin/api/tasks``: the owner's named commands."""

from aiohttp import web

from inferencia.api.admin.asking import asked, flag_in_query, follow, told
from inferencia.api.admin.inside import Inside
from inferencia.api.admin.logs import text
from inferencia.api.admin.state import task
from inferencia.api.route import Route
from inferencia.errors import Conflict, NotFound
from inferencia.keys import Role
from inferencia.models.childlog import Follower
from inferencia.tasks import IsRunning, NotRunning, Tasks, UnknownTask


class TasksApi:
    """Tasks: list, start, read, end."""

    def __init__(self, inside: Inside, tasks: Tasks) -> None:
        self._inside = inside
        self._tasks = tasks
        self._followers: set[Follower] = set()

    def routes(self) -> tuple[Route, ...]:
        path = "/admin/api/tasks"
        one = f"{path}/{{name:.+}}"
        output = f"{one}/output"
        return (
            Route("admin", "GET", path, Role.ADMIN, self.list),
            Route("admin", "POST", one, Role.ADMIN, self.start),
            Route("admin", "DELETE", one, Role.ADMIN, self.cancel),
            Route("admin", "GET", output, Role.ADMIN, self.output, is_relayed=True),
        )

    async def list(self, request: web.Request) -> web.Response:
        return told({"tasks": [task(state) for state in self._tasks.states()]})

    async def start(self, request: web.Request) -> web.Response:
        await asked(request, self._inside.bodies, ())
        name = request.match_info["name"]
        try:
            return told(task(self._tasks.start(name)), status=202)
        except UnknownTask as error:
            raise _unknown(name) from error
        except IsRunning as error:
            raise Conflict(f'task "{name}" runs already') from error

    async def cancel(self, request: web.Request) -> web.Response:
        await asked(request, self._inside.bodies, ())
        name = request.match_info["name"]
        try:
            return told(task(await self._tasks.cancel(name)))
        except UnknownTask as error:
            raise _unknown(name) from error
        except NotRunning as error:
            raise Conflict(f'task "{name}" does not run') from error

    async def output(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        try:
            log = self._tasks.log_of(name)
        except UnknownTask as error:
            raise _unknown(name) from error
        if not flag_in_query(request, "follow"):
            return text(log.history())
        with log.follow() as follower:
            self._followers.add(follower)
            try:
                return await follow(request, self._tasks.follow(name, follower))
            finally:
                self._followers.discard(follower)

    def end_streams(self) -> None:
        """End all streams."""
        for follower in tuple(self._followers):
            follower.close()


def _unknown(name: str) -> NotFound:
    return NotFound(f'there is no task "{name[:64]}" in admin.tasks')
