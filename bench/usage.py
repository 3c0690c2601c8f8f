"""``python -m bench.usage``: what the record of usage costs, and what its views do.

1. Two gateways, one that records usage and one that does not, take turns at 32
   connections. Goal: at most 8 % fewer requests a second. A thread of its own puts
   rows into the database, so the gateways may use every core, unlike in the other
   cells; with ``--one-core`` they may not, and its work is seen as well.
2. A database with a million requests is made, and every view is read from it three
   times. Goal: none takes longer than 200 ms.

The first needs as quiet a machine as ``python -m bench`` does; both goals are held with
``--check``.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.__main__ import Bench, Target
from bench.cells import CELLS, QUICK
from bench.children import Children, exit_code
from bench.gateway import WITHOUT_USAGE
from bench.report import GATEWAY
from inferencia.usagereport import BY, By, report
from inferencia.usageschema import COLUMNS, DAY_SECONDS
from inferencia.usagestore import Store, entry_of

#: Of the requests a second without the record.
LEAST_RATIO: Final = 0.92
#: Seconds that a view may take.
LONGEST_VIEW: Final = 0.2

# Many short ones: what is looked for is smaller than what the machine does by itself
# from one second to the next.
_ROUNDS = 60
_QUICK_ROUNDS = 8

_ROWS = 1_000_000
_QUICK_ROWS = 100_000
_DAYS = 400
_ROWS_AT_ONCE = 2000

# The end of the days that are made up: 2027-01-01.
_NOW = 1_798_761_600.0


def rates(bench: Bench, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Requests a second with and without the record, and CPU us per request more."""
    cell = next(cell for cell in CELLS if cell.name == "rps32")
    targets = [bench.start(name)[0] for name in (GATEWAY, WITHOUT_USAGE)]
    found: dict[str, list[float]] = {target.name: [] for target in targets}
    cpu: dict[str, list[float]] = {target.name: [] for target in targets}
    for number in range(rounds):
        for target in targets if number % 2 else targets[::-1]:
            values = _measured(bench, target, cell)
            found[target.name].append(values["per_second"])
            cpu[target.name].append(values["cpu_us"])
    more = [a - b for a, b in zip(cpu[GATEWAY], cpu[WITHOUT_USAGE], strict=True)]
    return found[GATEWAY], found[WITHOUT_USAGE], more


def _measured(bench: Bench, target: Target, cell: Any) -> dict[str, float]:
    result = bench.measure(cell, target)
    if result.errors:
        raise SystemExit(f"{target.name}: {result.errors}")
    return result.values


def made_up(count: int, now: float) -> Iterator[list[Any]]:
    """Requests of the days before, by any of 20 keys, 10 models and 3 backends.

    No real gateway has as many combinations in each hour; there the sums are smaller.
    """
    rng = random.Random(1)
    places = {name: place for place, name in enumerate(COLUMNS)}
    for number in range(count):
        began = now - _DAYS * DAY_SECONDS * (1 - number / count)
        duration = rng.uniform(0.1, 30)
        row: list[Any] = [None] * len(COLUMNS)
        for name, value in {
            "entry": entry_of(began) + number % 2048,
            "id": f"req-{rng.getrandbits(96):024x}",
            "started": began,
            "key": f"key-{rng.randrange(20)}",
            "model": f"model-{rng.randrange(10)}",
            "backend": f"backend-{rng.randrange(3)}",
            "endpoint": "/v1/chat/completions",
            "stream": 1,
            "bytes_in": rng.randrange(9000),
            "status": 200,
            "prompt_tokens": rng.randrange(3000),
            "completion_tokens": rng.randrange(900),
            "estimated": 0,
            "first_byte": duration / 5,
            "duration": duration,
            "bytes_out": rng.randrange(40_000),
            "outcome": "complete",
            "cost": 0.001,
            "billed": 0,
        }.items():
            row[places[name]] = value
        yield row


def filled(path: Path, count: int, now: float = _NOW) -> Store:
    """A database with so many requests, the last of them ``now``."""
    store = Store(path)
    some: list[list[Any]] = []
    for row in made_up(count, now):
        some.append(row)
        if len(some) == _ROWS_AT_ONCE:
            store.add(some)
            some.clear()
    store.add(some)
    return store


def views(store: Store) -> dict[str, float]:
    """Seconds that each view takes, by its name; the median of three."""
    asked: dict[str, Callable[[], object]] = {}
    groups: list[tuple[By, ...]] = [(one,) for one in BY]
    groups += [("day", "key"), ("day", "model")]
    spans = {"all": None, "30 days": 30.0, "36 hours": 1.5}
    for by in groups:
        for words, days in spans.items():
            since = None if days is None else _NOW - days * DAY_SECONDS
            asked[f"{' and '.join(by)}, {words}"] = _view(store, by, since)
    return {name: median(_timed(ask) for _ in range(3)) for name, ask in asked.items()}


def _view(store: Store, by: Sequence[By], since: float | None) -> Callable[[], object]:
    return lambda: report(store.connection, by, since=since)


def _timed(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return time.perf_counter() - began


def _measure(options: argparse.Namespace) -> int:
    rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    with tempfile.TemporaryDirectory() as name, Children() as children:
        bench = Bench(
            children,
            Path(name),
            QUICK,
            uvloop=options.uvloop,
            holds_gateway=options.one_core,
        )
        with_it, without, more = rates(bench, rounds)
    ratios = [a / b for a, b in zip(with_it, without, strict=True)]
    ratio = median(ratios)
    print(
        f"requests/s, 32 connections: {median(with_it):,.0f} with usage, "
        f"{median(without):,.0f} without; ratio {ratio:.3f} "
        f"({min(ratios):.3f}..{max(ratios):.3f} in {rounds} rounds); "
        f"{median(more):+.1f} us of CPU per request"
    )
    count = _QUICK_ROWS if options.quick else _ROWS
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        store = filled(Path(name) / "usage.sqlite3", count)
        each = (time.perf_counter() - began) / count * 1e6
        size = store.path.stat().st_size / 2**20
        print(f"{count:,} requests: {size:,.0f} MiB, {each:.1f} us to add each")
        taken = views(store)
        store.close()
    for view, seconds in sorted(taken.items(), key=lambda one: -one[1]):
        print(f"{seconds * 1e3:8.1f} ms  by {view}")
    is_good = ratio >= LEAST_RATIO and max(taken.values()) <= LONGEST_VIEW
    print("goals:", "pass" if is_good else "FAIL")
    return 1 if options.check and not is_good else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured; 1 with ``--check`` if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.usage", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="less certain")
    parser.add_argument("--rounds", type=int, default=None, metavar="N")
    parser.add_argument("--one-core", action="store_true", help="hold gateways to one")
    parser.add_argument("--uvloop", action="store_true", help="gateways use uvloop")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a goal is missed"
    )
    options = parser.parse_args(argv)
    return exit_code("bench.usage", lambda: _measure(options))


if __name__ == "__main__":
    sys.exit(main())
