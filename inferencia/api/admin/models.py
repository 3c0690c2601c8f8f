"""``/admin/api/models``: list, load, unload, upload, delete."""

import asyncio
import contextlib
import dataclasses
import shlex
from collections.abc import Collection, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import HttpVersion11, hdrs, web

from inferencia.api.admin.asking import asked, flag_in_query, member, told
from inferencia.api.admin.inside import Inside
from inferencia.api.admin.state import Sections
from inferencia.api.route import Route
from inferencia.bodies import refuse_encoding
from inferencia.errors import (
    ApiError,
    Conflict,
    InsufficientStorage,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    RequestTimeout,
    UnsupportedMediaType,
)
from inferencia.keys import Role
from inferencia.models.finding import FoundModel, is_arriving
from inferencia.models.gguf import Header
from inferencia.models.removing import (
    Removal,
    describes_another,
    parts_of,
    removal,
)
from inferencia.models.running import State
from inferencia.models.uploading import (
    BadName,
    Full,
    NoModel,
    Taken,
    Upload,
    UploadError,
    target_of,
)
from inferencia.secret import starred

_UPLOADS = "application/octet-stream"
_IDLE = (State.STOPPED, State.FAILED, State.QUEUED)


class Models:
    """The models of this machine, and those that others serve."""

    def __init__(self, inside: Inside, sections: Sections) -> None:
        self._inside = inside
        self._sections = sections
        self._working: set[asyncio.Task[None]] = set()  # loads and unloads
        self._deleting = asyncio.Lock()

    def routes(self) -> tuple[Route, ...]:
        def route(method: str, path: str, handler: Any) -> Route:
            return Route("admin", method, f"/admin/api{path}", Role.ADMIN, handler)

        return (
            route("GET", "/models", self.list),
            route("POST", "/models/{id:.+}/load", self.load),
            route("POST", "/models/{id:.+}/unload", self.unload),
            dataclasses.replace(
                route("PUT", "/models/{id:.+}", self.upload), is_transfer=True
            ),
            route("DELETE", "/models/{id:.+}", self.delete),
        )

    async def list(self, request: web.Request) -> web.Response:
        local = self._inside.local
        findings = local.findings
        found = {model.name: model for model in findings.models}
        plan = local.fleet.plan.models
        entries = self._sections.models()
        for entry in entries:
            if entry["backend"] != "local":
                continue
            definition = plan.get(entry["id"])
            if definition is not None:
                entry["command"] = starred(shlex.join(definition.command))
            model = found.get(entry["id"])
            is_files = definition is None or (
                model is not None and definition.path == str(model.path)
            )
            entry["can_delete"] = model is not None and is_files
            if model is not None and is_files:
                entry |= _file(model)
        return told(
            {
                "models": entries,
                "problems": list(findings.problems),
                "folders": [str(folder) for folder in local.folders],
            }
        )

    # Load and unload.

    async def load(self, request: web.Request) -> web.Response:
        name, waits = await self._named(request)
        scheduler = self._inside.local.fleet.scheduler
        return await self._done(name, scheduler.load(name), waits=waits)

    async def unload(self, request: web.Request) -> web.Response:
        values = await asked(request, self._inside.bodies, ("wait", "now"))
        name = self._known(request.match_info["id"])
        waits = member(values, "wait", bool) is not False
        now = bool(member(values, "now", bool))
        scheduler = self._inside.local.fleet.scheduler
        return await self._done(name, scheduler.unload(name, now=now), waits=waits)

    async def _named(self, request: web.Request) -> tuple[str, bool]:
        values = await asked(request, self._inside.bodies, ("wait",))
        name = self._known(request.match_info["id"])
        return name, member(values, "wait", bool) is not False

    def _known(self, name: str) -> str:
        """The name of a model that this gateway starts itself.

        Raises:
            ApiError: it is not one.
        """
        inside = self._inside
        if name in inside.local.fleet.plan.models:
            return name
        broken = inside.local.findings.named(name)
        if broken is not None:
            raise Conflict(f'model "{name}" cannot be served: {broken.error}')
        for backend in inside.catalogue.backends:
            if name in inside.catalogue.models_of(backend):
                raise Conflict(
                    f'model "{name}" is served by "{backend.name}", which loads it '
                    "itself"
                )
        raise ModelNotFound(
            f'model "{name[:256]}" is not known; GET /admin/api/models lists all'
        )

    async def _done(
        self, name: str, work: Coroutine[Any, Any, None], *, waits: bool
    ) -> web.Response:
        """Do something to a model, whoever leaves meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._working.add(task)
        task.add_done_callback(self._over)
        if waits:
            await asyncio.shield(task)
        else:
            await asyncio.sleep(0)  # so that it has begun
            if task.done():
                task.result()
        return told(self._sections.model(name), status=200 if waits else 202)

    def _over(self, task: "asyncio.Task[None]") -> None:
        self._working.discard(task)
        if not task.cancelled():
            task.exception()  # the model's state tells it, if nobody waits

    async def aclose(self) -> None:
        """Break off what is under way."""
        for task in self._working:
            task.cancel()
        if self._working:
            await asyncio.wait(tuple(self._working))

    # Upload.

    async def upload(self, request: web.Request) -> web.Response:
        refuse_encoding(request)
        if request.content_type != _UPLOADS:
            raise UnsupportedMediaType(
                f'send the file itself, with the header "Content-Type: {_UPLOADS}"'
            )
        folder = self._inside.models_folder
        if folder is None:
            raise Conflict("there is no folder for models; set models_dir")
        name, replace = request.match_info["id"], flag_in_query(request, "replace")
        try:
            target = target_of(folder, name)
            path, header = await self._receive(request, target, replace=replace)
        except UploadError as error:
            raise _refusal(error) from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise Conflict(f"{folder} cannot be written: {reason}") from error
        await self._inside.local.look()
        size = await asyncio.to_thread(_size, path)
        return told(
            {
                "file": name,
                "path": str(path),
                "size": size,
                "model": self._model_at(path),
                "gguf": None if header is None else _header(header),
                "note": self._note_on(folder),
            },
            status=201,
        )

    def _note_on(self, folder: Path) -> str | None:
        """Why what lies in the folder for uploads is not served, if it is not."""
        if folder in self._inside.local.folders:
            return None
        return f"{folder} is not searched for models; name it in models_dir"

    async def _receive(
        self, request: web.Request, target: Path, *, replace: bool
    ) -> tuple[Path, Header | None]:
        """Take the body into the file.

        Raises:
            UploadError, OSError: see ``Upload``.
            ApiError: it does not come, or the file is in use.
        """
        self._refuse_if_loaded((target,))
        length = request.content_length
        upload = await Upload.open(
            target, size=length, replace=replace, quota=self._inside.models_quota
        )
        try:
            await _say_continue(request)
            seconds = self._inside.config.server.read_timeout
            while True:
                try:
                    async with asyncio.timeout(seconds):
                        data = await request.content.readany()
                except TimeoutError:
                    raise RequestTimeout(
                        f"no byte of the upload came for {seconds:g} seconds"
                    ) from None
                if not data:
                    break
                await upload.write(data)
            if length is not None and upload.received != length:
                raise InvalidRequest("the upload broke off")
            self._refuse_if_loaded((target,))
            return await upload.finish(), upload.header
        finally:
            await upload.abandon()

    def _refuse_if_loaded(self, paths: Collection[Path]) -> None:
        """See that no loaded model uses one of these files.

        Raises:
            Conflict: one does.
        """
        fleet = self._inside.local.fleet
        wanted = set(map(str, paths))
        for state in fleet.states():
            if state.state in _IDLE:
                continue
            definition = fleet.plan.models.get(state.model)
            if definition is None:
                continue
            used = {definition.path, *definition.command}
            found = self._inside.local.findings.named(definition.upstream_id)
            if found is not None and str(found.path) == definition.path:
                used |= set(map(str, parts_of(found)))
            if used & wanted:
                raise Conflict(
                    f'model "{state.model}" is {state.state} and uses it; unload it '
                    "first"
                )

    def _model_at(self, path: Path) -> str | None:
        for model in self._inside.local.findings.models:
            if model.path == path and model.is_usable:
                return model.name
        return None

    # Delete.

    async def delete(self, request: web.Request) -> web.Response:
        values = await asked(request, self._inside.bodies, ())
        assert not values
        local, name = self._inside.local, request.match_info["id"]
        async with self._deleting:
            model = self._deletable(name)
            searched = local.folders
            # The disk may be slow, and so may be whoever else holds a file.
            if await asyncio.to_thread(is_arriving, model.path):
                raise Conflict(f'"{name}" is just being fetched; cancel that first')
            doomed = await asyncio.to_thread(removal, model, local.findings, searched)
            self._refuse_if_loaded(doomed.paths)
            try:
                await asyncio.to_thread(doomed.carry_out, searched)
            except OSError as error:
                raise Conflict(
                    f"{error.filename} cannot be deleted: {error.strerror}"
                ) from error
            finally:
                await local.look()
        return told(_removed(doomed))

    def _deletable(self, name: str) -> FoundModel:
        local = self._inside.local
        model, definition = (
            local.findings.named(name),
            local.fleet.plan.models.get(name),
        )
        if model is None:
            self._known(name)
            raise Conflict(f'model "{name}" is described by the configuration')
        if definition is not None and definition.path != str(model.path):
            raise Conflict(f'model "{name}" is described by the configuration')
        if describes_another(model):
            raise Conflict(
                f"{name} is what {model.origin} describes; delete that file by hand"
            )
        return model


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _removed(doomed: Removal) -> dict[str, Any]:
    return {"deleted": [str(path) for path in doomed.paths], "size": doomed.size}


def _refusal(error: UploadError) -> ApiError:
    kinds: dict[type[UploadError], type[ApiError]] = {
        BadName: InvalidRequest,
        NoModel: InvalidRequest,
        Taken: Conflict,
        Full: InsufficientStorage,
    }
    return kinds.get(type(error), NotFound)(str(error))


async def _say_continue(request: web.Request) -> None:
    """Ask for the body of a client that waits to be asked (RFC 9110, 10.1.1)."""
    expects = request.headers.get(hdrs.EXPECT, "").strip().lower() == "100-continue"
    if expects and request.version >= HttpVersion11 and not request.content.is_eof():
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # aiohttp takes any output for the beginning of the answer.
        request.writer.output_size = 0


def _file(model: FoundModel) -> dict[str, Any]:
    """What is known of a model from its file."""
    return {
        "path": str(model.path),
        "size": model.size,
        "flags": starred(shlex.join(model.flags)),
        "origin": model.origin,
        "mmproj": None if model.mmproj is None else str(model.mmproj),
        "gguf": None if model.params is None else _header(model.params),
    }


def _header(header: Header) -> dict[str, Any]:
    kind = "text"
    if header.is_reranker:
        kind = "reranker"
    elif header.is_embedding:
        kind = "embedding"
    elif header.is_projector:
        kind = "projector"
    return {
        "architecture": header.architecture,
        "name": header.name,
        "kind": kind,
        "parameters": header.parameters,
        "quantisation": header.quantisation,
        "context_length": header.context_length,
        "block_count": header.block_count,
        "embedding_length": header.embedding_length,
        "vocabulary": header.vocabulary,
        "has_template": header.has_template,
    }
