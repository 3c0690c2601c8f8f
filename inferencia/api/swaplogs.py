"""``/logs`` and ``/logs/stream``: what the gateway and its models print, as it comes.

``logToStdout`` of a llama-swap configuration says what ``/logs`` holds; without such a
configuration it holds everything.
"""

from collections.abc import Callable

from aiohttp import web

from inferencia.api.streams import begin
from inferencia.api.swapupstream import model_named
from inferencia.errors import NotFound
from inferencia.models.childlog import Follower, Log
from inferencia.models.definitions import LogTo, SwapConfig
from inferencia.models.fleet import Fleet

_TEXT = (
    ("Content-Type", "text/plain; charset=utf-8"),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
    ("X-Content-Type-Options", "nosniff"),
)


class SwapLogs:
    """The logs of a fleet, as llama-swap shows them."""

    def __init__(self, fleet: Fleet, swap: Callable[[], SwapConfig | None]) -> None:
        self._fleet = fleet
        self._swap = swap
        self._followers: set[Follower] = set()

    async def history(self, request: web.Request) -> web.Response:
        """What is kept."""
        response = web.Response(text=self._main().history())
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """What is kept, unless ``?no-history``, and all that comes.

        Raises:
            NotFound: there is no such log.
        """
        log = self._named(request.match_info.get("id", ""))
        has_history = "no-history" not in request.query
        with log.follow(history=has_history) as follower:
            self._followers.add(follower)
            try:
                response = await begin(request, _TEXT)
                async for text in follower:
                    await response.write(text.encode())
            finally:
                self._followers.discard(follower)
        await response.write_eof()
        return response

    def end_streams(self) -> None:
        """End all streams."""
        for follower in tuple(self._followers):
            follower.close()

    def _named(self, name: str) -> Log:
        if name == "":
            return self._main()
        log = self._fleet.logs.find(name)  # a model's only if it has printed something
        model = None if log else model_named(self._fleet, name)
        if model is not None:
            return self._fleet.logs.model(model)
        if log is None:
            raise NotFound(
                f'there is no log "{name[:64]}"; there are proxy, upstream, and one '
                "of each model"
            )
        return log

    def _main(self) -> Log:
        swap, logs = self._swap(), self._fleet.logs
        if swap is None:
            return logs.everything
        return {
            LogTo.PROXY: logs.proxy,
            LogTo.UPSTREAM: logs.upstream,
            LogTo.BOTH: logs.everything,
            LogTo.NONE: Log(),
        }[swap.log_to]
