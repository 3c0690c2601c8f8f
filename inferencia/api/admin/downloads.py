"""``/admin/api/downloads``: models fetched from a server of Hugging Face's layout."""

from aiohttp import web

from inferencia.api.admin.asking import asked, needed, told
from inferencia.api.admin.inside import Inside
from inferencia.api.admin.state import download
from inferencia.api.route import Route
from inferencia.errors import Conflict, InvalidRequest, NotFound
from inferencia.keys import Role
from inferencia.models.choice import BadReference, DownloadError, parse_reference
from inferencia.models.download import Endpoint
from inferencia.models.downloads import (
    AlreadyRunning,
    Downloads,
    TooMany,
    UnknownDownload,
)


class DownloadsApi:
    """Downloads: list, start, cancel."""

    def __init__(self, inside: Inside, downloads: Downloads) -> None:
        self._inside = inside
        self._downloads = downloads

    def routes(self) -> tuple[Route, ...]:
        path = "/admin/api/downloads"
        one = f"{path}/{{id}}"
        return (
            Route("admin", "GET", path, Role.ADMIN, self.list),
            Route("admin", "POST", path, Role.ADMIN, self.start),
            Route("admin", "DELETE", one, Role.ADMIN, self.remove),
        )

    async def list(self, request: web.Request) -> web.Response:
        return told({"downloads": [download(one) for one in self._downloads.entries]})

    async def start(self, request: web.Request) -> web.Response:
        values = await asked(request, self._inside.bodies, ("model",))
        text = needed(values, "model", str)
        folder = self._inside.models_folder
        if folder is None:
            raise Conflict("there is no folder for models; set models_dir")
        try:
            reference = parse_reference(text)
            endpoint = Endpoint.from_env(self._inside.env)
            entry = self._downloads.start(
                reference,
                into=folder,
                endpoint=endpoint,
                quota=self._inside.models_quota,
            )
        except BadReference as error:
            raise InvalidRequest(str(error), param="model") from error
        except DownloadError as error:
            raise Conflict(str(error)) from error
        except AlreadyRunning as error:
            raise Conflict(f'"{text}" is being fetched already') from error
        except TooMany as error:
            raise Conflict("too many downloads run; wait for one of them") from error
        return told(download(entry), status=202)

    async def remove(self, request: web.Request) -> web.Response:
        await asked(request, self._inside.bodies, ())
        id = request.match_info["id"]
        try:
            return told(download(await self._downloads.remove(id)))
        except UnknownDownload as error:
            raise NotFound(f'there is no download "{id[:64]}"') from error
