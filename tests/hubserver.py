"""A server of the Hugging Face layout on 127.0.0.1, with the faults that a test wants.

As the real one: a listing in pages with a ``Link`` to the next, large files described
by ``lfs`` with their SHA-256, and ``resolve`` that redirects to a store at another
address with a signed query, where ``Range`` and ``If-Range`` work. It runs in a thread
of its own, so that a test may be a plain function.
"""

import asyncio
import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

from aiohttp import web

REPOSITORY = "acme/tiny-GGUF"
SIGNED = "X-Signature=a%2Fb%3D&id=1"

# What a request for bytes meets instead of the usual answer.
Fault = Callable[["Hub", web.Request, bytes], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, and at which of the two addresses."""

    place: str  # hub or store
    path: str
    headers: dict[str, str]  # names in lower case


@dataclass(eq=False)
class Hub:
    """What it holds and how it behaves; a test changes it while it runs."""

    files: dict[str, bytes] = field(default_factory=dict)  # of REPOSITORY, by path
    small: set[str] = field(default_factory=set)  # paths that are not in large storage
    said: dict[str, dict[str, object]] = field(default_factory=dict)  # wrong entries
    token: str | None = None  # without which nothing is given
    is_gated: bool = False
    page_size: int = 1000
    ranges: bool = True  # whether the store knows Range
    has_checksums: bool = True
    link_host: str = ""  # of the address of the next page
    listing: deque[int] = field(default_factory=deque)  # statuses in place of a list
    retry_after: str = ""
    faults: deque[Fault] = field(default_factory=deque)  # for requests to the store
    redirect_to: str | None = None  # instead of the store
    asked: list[Asked] = field(default_factory=list)
    arrived: Callable[[int], bool] = lambda end: True  # see ``cut_at``
    port: int = 0
    store_port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, path: str, data: bytes) -> str:
        """Put a file there; returns its SHA-256."""
        self.files[path] = data
        return hashlib.sha256(data).hexdigest()

    def ranges_asked(self) -> list[str | None]:
        """The ``Range`` of each request to the store, in order."""
        return [a.headers.get("range") for a in self.asked if a.place == "store"]

    # --- the hub -----------------------------------------------------------------

    async def list_files(self, request: web.Request) -> web.StreamResponse:
        self._note("hub", request)
        if refusal := self._refusal(request):
            return refusal
        if self.listing:
            headers = {"Retry-After": self.retry_after} if self.retry_after else {}
            return web.Response(status=self.listing.popleft(), headers=headers)
        first = int(request.query.get("cursor", "0"))
        entries = [self._entry(path) for path in self.files]
        headers = {}
        if first + self.page_size < len(entries):
            base = self.link_host or self.url
            query = f"recursive=true&cursor={first + self.page_size}"
            headers["Link"] = f'<{base}{request.path}?{query}>; rel="next"'
        page = entries[first : first + self.page_size]
        return web.json_response(page, headers=headers)

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        self._note("hub", request)
        if refusal := self._refusal(request):
            return refusal
        path = request.match_info["path"]
        if path not in self.files:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        commit = hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()
        store = f"http://127.0.0.1:{self.store_port}"
        where = f"{store}/{quote(path)}?{SIGNED}"
        headers = {
            "Location": self.redirect_to or where,
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(self.files[path])),
            "X-Linked-Etag": f'"{hashlib.sha256(self.files[path]).hexdigest()}"',
        }
        return web.Response(status=302, headers=headers)

    def _refusal(self, request: web.Request) -> web.Response | None:
        is_known = REPOSITORY in request.path
        sent = request.headers.get("Authorization")
        if is_known and (self.token is None or sent == f"Bearer {self.token}"):
            return None
        code = "GatedRepo" if self.is_gated else "RepoNotFound"
        return web.Response(status=401, headers={"X-Error-Code": code})

    def _entry(self, path: str) -> dict[str, object]:
        data = self.files[path]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data)}
        if path not in self.small:
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
        entry["oid"] = git
        entry |= self.said.get(path, {})
        if not self.has_checksums:
            entry.pop("lfs", None)
            del entry["oid"]
        return entry

    # --- the store ---------------------------------------------------------------

    async def fetch(self, request: web.Request) -> web.StreamResponse:
        self._note("store", request)
        if not request.raw_path.endswith(f"?{SIGNED}"):
            return web.Response(status=403)  # written in another way, it is void
        data = self.files[request.match_info["path"]]
        if self.faults:
            return await self.faults.popleft()(self, request, data)
        return await self.give(request, data, len(data))

    async def give(
        self, request: web.Request, data: bytes, end: int, *, cut: bool = False
    ) -> web.StreamResponse:
        """The bytes up to ``end``; with ``cut`` the connection breaks there."""
        response = await self.begin(request, data, end)
        if cut:
            # The client may throw away what it has not read when the end comes. No
            # event tells what it has read: it runs in another thread or process.
            async with asyncio.timeout(10):
                while not self.arrived(end):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            assert request.transport is not None
            request.transport.close()
        return response

    async def begin(
        self, request: web.Request, data: bytes, end: int
    ) -> web.StreamResponse:
        """Send the head, and the bytes up to ``end``."""
        first, status = self._first(request, data)
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        response = web.StreamResponse(status=status, headers={"ETag": etag})
        response.content_length = len(data) - first
        if status == 206:
            span = f"bytes {first}-{len(data) - 1}/{len(data)}"
            response.headers["Content-Range"] = span
        await response.prepare(request)
        await response.write(data[first:end])
        return response

    def _first(self, request: web.Request, data: bytes) -> tuple[int, int]:
        asked = request.headers.get("Range")
        condition = request.headers.get("If-Range")
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        if asked is None or not self.ranges or condition not in (None, etag):
            return 0, 200
        return int(asked.removeprefix("bytes=").removesuffix("-")), 206

    def _note(self, place: str, request: web.Request) -> None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append(Asked(place, request.path_qs, headers))


def cut_at(end: int) -> Fault:
    """The connection breaks when the file has arrived up to ``end``.

    Whether it has, ``hub.arrived`` knows, which a test sets.
    """

    async def fault(hub: Hub, request: web.Request, data: bytes) -> web.StreamResponse:
        return await hub.give(request, data, end, cut=True)

    return fault


def stall_at(end: int) -> Fault:
    """Nothing comes behind ``end``; the connection stays."""

    async def fault(hub: Hub, request: web.Request, data: bytes) -> web.StreamResponse:
        response = await hub.begin(request, data, end)
        await asyncio.sleep(3600)  # ended when the client leaves, or with the server
        return response

    return fault


def answer(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Another answer; ``Retry_After="1"`` gives a header."""

    async def fault(hub: Hub, request: web.Request, data: bytes) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=body, headers=named)

    return fault


@contextlib.contextmanager
def hub_running() -> Iterator[Hub]:
    """The server, until the end of the block."""
    hub = Hub()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="hub")
    thread.start()

    def call(work: Awaitable[None]) -> None:
        async def done() -> None:
            await work

        asyncio.run_coroutine_threadsafe(done(), loop).result(10)

    runners: list[web.AppRunner] = []
    try:
        call(_start(hub, runners))
        yield hub
    finally:
        call(_stop(runners))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _start(hub: Hub, runners: list[web.AppRunner]) -> None:
    front, store = web.Application(), web.Application()
    front.router.add_get("/api/models/{owner}/{name}/tree/main", hub.list_files)
    front.router.add_get("/{owner}/{name}/resolve/main/{path:.+}", hub.resolve)
    store.router.add_get("/{path:.+}", hub.fetch)
    ports = []
    for app in (front, store):
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
    hub.port, hub.store_port = ports


async def _stop(runners: list[web.AppRunner]) -> None:
    for runner in runners:
        await runner.cleanup()
