"""``python -m bench.page``: what the page at /admin/ costs, in bytes and time.

Four questions, each with its goal:

size       all of the page's files, as they come over the wire: at most 150 KiB
views      what each view asks for when it is opened, with a million requests in the
           record of usage: answered within 200 ms
watchers   CPU that 20 readers of the event stream cost the gateway while four streams
           run, whose numbers change each second: at most 2 % of a core
paint      from the navigation to the first paint in a headless Chromium that has
           nothing in its cache, where there is one: within 1 s

The gateway is asked on 127.0.0.1, a call at a time; a view's calls count together. All
processes are ended by their pids.
"""

import argparse
import asyncio
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import gateway, machine
from bench.children import (
    ROOT,
    ChildFailed,
    Children,
    exit_code,
    read_port,
    tail,
)
from bench.figure import Figure
from bench.load import HOST, Job
from bench.usage import filled

#: Goals; see the module's header.
MOST_BYTES: Final = 150 * 1024
LONGEST_VIEW_SECONDS: Final = 0.2
WATCHERS: Final = 20
MOST_WATCHING: Final = 0.02
LONGEST_PAINT_SECONDS: Final = 1.0

#: What the page's views ask for when they are opened: see inferencia/web/views.
_SPANS: Final = ("24h", "7d", "30d", "90d", "400d")
_STEPS: Final = {"24h": "hour", "400d": "week"}
_BY: Final = ("key", "model", "backend")

_ROWS: Final = 1_000_000
_QUICK_ROWS: Final = 100_000
_OPENED: Final = 5  # times that each view is opened

_STREAMS: Final = 4
_INTERVAL_US: Final = 20_000
_WATCHED_SECONDS: Final = 15.0
_QUICK_WATCHED_SECONDS: Final = 5.0

_START_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway whose page is opened."""

    port: int
    pid: int
    admin: str
    user: str

    def get(self, path: str, key: str | None = None) -> tuple[bytes, float]:
        """An answer's body, and the seconds until it was whole.

        Raises:
            ChildFailed: it is no 200.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            began = time.perf_counter()
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
            seconds = time.perf_counter() - began
        finally:
            connection.close()
        if answer.status != 200:
            raise ChildFailed(f"GET {path}: {answer.status} {body[:200]!r}")
        return body, seconds


def started(children: Children, folder: Path, rows: int) -> Gateway:
    """A gateway in front of the mock engine, with so many requests in its record."""
    log = folder / "log"
    cores = machine.Cores.choose()
    mock = children.start("bench.mock", core=cores.mock, log=log)
    filled(folder / "usage.sqlite3", rows, now=time.time()).close()
    port, user, admin = gateway.free_port(), gateway.new_key(), gateway.new_key()
    config = gateway.write_config(
        folder, port=port, mock_port=read_port(mock, log), key=user
    )
    with (folder / "keys.txt").open("a") as keys:
        keys.write(f"{admin} name=owner role=admin\n")
    child = children.start(
        *("bench.gateway", "serve", "-c", str(config)),
        core=cores.proxy,
        log=log,
        env=gateway.environment(folder),
        speaks=False,
    )
    found = Gateway(port, child.pid, admin, user)
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            found.get("/health/ready")
            return found
        except (OSError, ChildFailed):
            if child.poll() is not None or time.monotonic() > deadline:
                raise ChildFailed(f"the gateway did not start\n{tail(log)}") from None
        time.sleep(0.05)


# --- size -----------------------------------------------------------------------------


def page_bytes(at: Gateway) -> int:
    """All files of the page together."""
    web = ROOT / "inferencia" / "web"
    names = [path.relative_to(web) for path in web.rglob("*") if path.is_file()]
    paths = [f"/admin/{name.as_posix()}" for name in names if name.name != "index.html"]
    return sum(len(at.get(path)[0]) for path in ["/admin/", *paths])


# --- views ----------------------------------------------------------------------------


def views() -> Iterator[tuple[str, Sequence[str]]]:
    """Each view of an admin, and the paths that it asks for."""
    api = "/admin/api"
    yield "now", [f"{api}/state"]
    yield "models", [f"{api}/state", f"{api}/models"]
    for by in _BY:
        for since in _SPANS:
            step = _STEPS.get(since, "day")
            yield (
                f"usage by {by}, {since}",
                [
                    f"{api}/usage?by={step},{by}&since={since}",
                    f"{api}/usage?by={by}&since={since}",
                ],
            )
    yield "keys", [f"{api}/keys"]
    yield "playground", ["/v1/models"]
    yield "logs", [f"{api}/logs?source=gateway"]
    yield "configuration", [f"{api}/config"]
    yield "tasks", [f"{api}/tasks"]


def view_seconds(at: Gateway) -> dict[str, float]:
    """How long each view's calls take one after the other, by its name."""

    def opened(paths: Sequence[str], key: str) -> float:
        return median(
            sum(at.get(path, key)[1] for path in paths) for _ in range(_OPENED)
        )

    taken = {name: opened(paths, at.admin) for name, paths in views()}
    return taken | {"a user's own usage": opened(["/v1/usage"], at.user)}


# --- watchers -------------------------------------------------------------------------


def watching_share(
    at: Gateway, children: Children, folder: Path, seconds: float
) -> tuple[float, int]:
    """What the watchers cost, as a share of a core, and how many events each got."""
    job = Job(
        "paced",
        at.port,
        at.user,
        connections=_STREAMS,
        interval_us=_INTERVAL_US,
        seconds=3 * seconds + 5,
    )
    load = children.start(
        *("bench.load", json.dumps(asdict(job))),
        core=machine.Cores.choose().load,
        log=folder / "log",
    )
    without = asyncio.run(_cpu_of(at, 0, seconds))[0]
    with_them, events = asyncio.run(_cpu_of(at, WATCHERS, seconds))
    without = (without + asyncio.run(_cpu_of(at, 0, seconds))[0]) / 2
    if load.poll() is not None:
        raise ChildFailed(f"the streams ended early\n{tail(folder / 'log')}")
    children.end(load)
    return (with_them - without) / seconds, events


async def _cpu_of(at: Gateway, watchers: int, seconds: float) -> tuple[float, int]:
    """CPU seconds of the gateway while so many watch; the fewest events of one."""
    counts = [0] * watchers
    began_to_watch = [asyncio.Event() for _ in counts]
    asked = (
        f"GET /admin/api/events HTTP/1.1\r\nHost: {HOST}:{at.port}\r\n"
        f"Authorization: Bearer {at.admin}\r\n\r\n"
    ).encode()

    async def watch(number: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, at.port, limit=1 << 24)
        try:
            writer.write(asked)
            while line := await reader.readline():
                if line.startswith(b"event: change"):
                    counts[number] += 1
                    began_to_watch[number].set()
        finally:
            writer.close()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(watch(number)) for number in range(watchers)]
        for one in began_to_watch:  # the first state is large, and sent once
            await one.wait()
        began, seen = machine.cpu_seconds(at.pid), list(counts)
        await asyncio.sleep(seconds)
        used = machine.cpu_seconds(at.pid) - began
        got = [now - then for now, then in zip(counts, seen, strict=True)]
        for task in tasks:
            task.cancel()
    return used, min(got, default=0)


# --- paint ----------------------------------------------------------------------------


def paint_seconds(at: Gateway, times: int) -> float | None:
    """The median of some first visits; None where no browser is installed."""
    sys.path.append(str(ROOT / "tests"))
    from browser import Browser, browsing, programs

    if programs() is None:
        return None

    def visited(browser: Browser) -> Any:
        browser.open(f"http://{HOST}:{at.port}/admin/")
        return browser.until(lambda: browser.script(_PAINTED), "the page is painted")

    taken: list[float] = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as name, browsing(Path(name)) as browser:
            taken.append(visited(browser) / 1e3)
    return median(taken)


_PAINTED: Final = (
    "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
)


def figures(children: Children, folder: Path, *, quick: bool) -> Iterator[Figure]:
    """All figures, as they are found."""
    at = started(children, folder, _QUICK_ROWS if quick else _ROWS)
    yield Figure.at_most(
        "size of the page", page_bytes(at) / 1024, MOST_BYTES / 1024, "KiB"
    )
    for name, seconds in sorted(view_seconds(at).items(), key=lambda one: -one[1]):
        yield Figure.at_most(
            f"view: {name}", seconds * 1e3, LONGEST_VIEW_SECONDS * 1e3, "ms"
        )
    seconds = _QUICK_WATCHED_SECONDS if quick else _WATCHED_SECONDS
    share, events = watching_share(at, children, folder, seconds)
    what = f"{WATCHERS} watchers, each with {events} events in {seconds:g} s"
    yield Figure.at_most(what, share * 100, MOST_WATCHING * 100, "%")
    painted = paint_seconds(at, 1 if quick else 5)
    if painted is None:
        print("first paint: not measured, chromium or chromedriver is missing")
    else:
        yield Figure.at_most(
            "first paint", painted * 1e3, LONGEST_PAINT_SECONDS * 1e3, "ms"
        )


def _measure(options: argparse.Namespace) -> int:
    are_reached = True
    with tempfile.TemporaryDirectory() as name, Children() as children:
        for figure in figures(children, Path(name), quick=options.quick):
            print(figure, flush=True)
            are_reached = are_reached and figure.passed
    return 1 if options.check and not are_reached else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured; 1 with ``--check`` if a goal is missed; 2 failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="fewer rows, less certain")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a goal is missed"
    )
    options = parser.parse_args(argv)
    return exit_code("bench.page", lambda: _measure(options))


if __name__ == "__main__":
    sys.exit(main())
