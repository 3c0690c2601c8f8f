"""The service ``admin``: the API under ``/admin/api/`` and the page at ``/admin/``.

One file for each subject; ``inside`` is what they are about. All of the API needs the
role admin, from where ``admin.remote`` allows it (``remote``), and a page of another
site changes nothing. docs/admin-api.md is its reference.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from inferencia.api.admin.config import ConfigApi
from inferencia.api.admin.downloads import DownloadsApi
from inferencia.api.admin.events import Events
from inferencia.api.admin.inside import Daemon, Inside
from inferencia.api.admin.keys import KeysApi
from inferencia.api.admin.logs import LogsApi
from inferencia.api.admin.models import Models
from inferencia.api.admin.page import Page
from inferencia.api.admin.rates import Rates
from inferencia.api.admin.requests import Requests
from inferencia.api.admin.state import Sections
from inferencia.api.admin.tasks import TasksApi
from inferencia.api.admin.usage import UsageApi
from inferencia.api.route import Route
from inferencia.folders import state_folder
from inferencia.host import Host
from inferencia.keys import Role
from inferencia.models.downloads import Downloads
from inferencia.settings import Config
from inferencia.taskrecord import FILE_NAME
from inferencia.tasks import Tasks


class Admin:
    """The service, and what lives as long as it does: downloads, tasks, samples."""

    def __init__(self, inside: Inside, *, host: Callable[[], Host] = Host) -> None:
        """Make the service.

        Args:
            inside: what it shows and steers.
            host: makes what looks at the machine.
        """
        self._inside = inside
        fleet = inside.local.fleet
        self._downloads = Downloads(inside.local.look)
        self._tasks = Tasks(
            inside.config.admin.tasks,
            env=inside.env,
            environment=fleet.environment,
            record=_in_state_folder(inside.env, FILE_NAME),
        )
        rates = Rates(lambda: inside.doors.active, lambda: inside.usage.totals)
        sections = Sections(inside, rates, self._downloads, self._tasks)
        self.events = Events(sections, rates, host(), lambda: inside.models_folder)
        self._models = Models(inside, sections)
        self._logs = LogsApi(inside)
        self._task_api = TasksApi(inside, self._tasks)

    def routes(self) -> tuple[Route, ...]:
        events = self.events
        path = "/admin/api/"
        return (
            Route("admin", "GET", f"{path}state", Role.ADMIN, events.state),
            Route(
                *("admin", "GET", f"{path}events", Role.ADMIN, events.stream),
                is_relayed=True,
            ),
            *self._models.routes(),
            *DownloadsApi(self._inside, self._downloads).routes(),
            *KeysApi(self._inside).routes(),
            *Requests(self._inside).routes(),
            *UsageApi(self._inside).routes(),
            *self._logs.routes(),
            *ConfigApi(self._inside).routes(),
            *self._task_api.routes(),
            *Page().routes(),
        )

    @property
    def daemon(self) -> Daemon | None:
        """The life of the daemon; set once it has one."""
        return self._inside.daemon

    @daemon.setter
    def daemon(self, daemon: Daemon) -> None:
        self._inside.daemon = daemon

    @property
    def endpoint(self) -> str | None:
        """The base URL that people are told; set once the addresses are open."""
        return self._inside.endpoint

    @endpoint.setter
    def endpoint(self, url: str) -> None:
        self._inside.endpoint = url

    def take(self, config: Config) -> None:
        """Another configuration is in force."""
        self._inside.config = config
        self._tasks.change(config.admin.tasks)

    async def follow(self) -> None:
        """Sample and tell what changes, until cancelled."""
        await self.events.follow()

    def end_streams(self) -> None:
        """End all streams, since the daemon ends."""
        self.events.end_streams()
        self._logs.end_streams()
        self._task_api.end_streams()

    async def aclose(self) -> None:
        """End downloads and tasks. What was fetched so far is kept."""
        await self._tasks.aclose()
        await self._downloads.aclose()
        await self._models.aclose()


def _in_state_folder(env: Mapping[str, str], name: str) -> Path | None:
    """A file there; None if nobody knows where that is."""
    try:
        return state_folder(env) / name
    except OSError:
        return None
