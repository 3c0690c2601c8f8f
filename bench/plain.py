"""The yardstick: what a pass-through proxy costs when aiohttp does all the work.

It checks the bearer key, parses the JSON, looks the model up and relays; it has no
logs, metrics, limits, deadlines, retries or accounting. It is written the way one
would write it who wants it fast: one client pool without a limit, no cookies, no
decompression, no access log.

``python -m bench.plain UPSTREAM_PORT KEY [--uvloop]`` prints its own port.
"""

import argparse
import asyncio
import json
import signal
from collections.abc import Iterable

from aiohttp import (
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
    web,
)

from bench import machine, wire

#: Headers of one connection, not of the message (RFC 9110, 7.6.1), and those that each
#: side writes itself.
_NOT_PASSED_ON = frozenset(
    {
        "authorization",
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class Plain:
    """One upstream, one key, one model."""

    def __init__(self, upstream_port: int, key: str, session: ClientSession) -> None:
        self._origin = f"http://127.0.0.1:{upstream_port}"
        self._keys = {key: "bench"}
        self._models = {wire.MODEL: self._origin}
        self._session = session

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": wire.MODEL}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        presented = request.headers.get("Authorization", "")[7:]
        if presented not in self._keys:
            return web.json_response({"error": "unauthorized"}, status=401)
        body = await request.read()
        order = json.loads(body)
        origin = self._models.get(order["model"])
        if origin is None:
            return web.json_response({"error": "no such model"}, status=404)
        headers = _passed_on(request.headers.items())
        url = origin + request.path
        async with self._session.post(url, data=body, headers=headers) as answer:
            if order.get("stream"):
                return await _relay(request, answer)
            return web.Response(
                body=await answer.read(),
                status=answer.status,
                headers=_passed_on(answer.headers.items()),
            )


async def _relay(request: web.Request, answer: ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(
        status=answer.status, headers=_passed_on(answer.headers.items())
    )
    await response.prepare(request)
    async for piece in answer.content.iter_any():
        await response.write(piece)
    await response.write_eof()
    return response


def _passed_on(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(k, v) for k, v in headers if k.lower() not in _NOT_PASSED_ON]


async def _main(upstream_port: int, key: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with ClientSession(
        connector=TCPConnector(limit=0),
        timeout=ClientTimeout(total=None),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
    ) as session:
        plain = Plain(upstream_port, key, session)
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", plain.models)
        app.router.add_post("/v1/chat/completions", plain.chat)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        print(runner.addresses[0][1], flush=True)
        await stop.wait()
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.plain", description=__doc__)
    parser.add_argument("upstream_port", type=int)
    parser.add_argument("key")
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    machine.run(_main(options.upstream_port, options.key), fast_loop=options.uvloop)
