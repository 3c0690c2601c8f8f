"""``python -m bench.tunnel``: the tunnel beside ``ssh -R``, and beside no tunnel.

Three ways from one gateway to another one, on one machine and in one run:

direct   the relay's backend is the agent's own address
ssh      it is a port that OpenSSH forwards (``ssh -R``, an sshd of this run's own)
tunnel   the agent has dialed the relay, with TLS and a certificate of this run's own

Before each way stands a relay (``python -m inferencia serve``), behind all of them the
same agent and the same mock engine. So rows differ in nothing but how bytes get from
relay to agent. Clients speak TLS to all of them, because a relay's certificate counts
for all its addresses. On Linux the public machine (relay, sshd, and here the client)
has one core, and home (agent, ssh, engine) the other one.

Goals, each on the median of rounds in which the ways take turns:

first byte    what the tunnel adds to ``direct``, request by request in turns: at most
              1.2 times what ssh adds
flood         events a second, 8 streams as fast as they go: at least ssh's
CPU           us of CPU for each paced event (64 streams, one event each 40 ms), of all
              processes on the way (relay and agent; with ssh, sshd and all that it has
              forked, and ssh): at most 1.1 times ssh's. The same for the public machine
              alone: the relay, against relay and sshd
beside        p99 of what a token takes from engine to client while one bulk answer
              fills a link of 32 Mbit/s (``narrow``): under 50 ms
memory        KiB of the relay for each idle data connection, TLS included: at most what
              the prototype took (48 on uvloop, 307 on asyncio's own loop)

With ssh straight to the engine there would be no second gateway, and so no agent's CPU;
that is another service (no models, no queue, no cancellation by request), not measured.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import machine, narrow, openssh
from bench.children import Children, exit_code
from bench.figure import Figure
from bench.load import Job
from bench.site import DIRECT, LOOPBACK, SSH, TUNNEL, WAYS, Run, Site

#: Goals; see the module's header.
MOST_ADDED: Final = 1.2
LEAST_FLOOD: Final = 1.0
MOST_CPU: Final = 1.1
MOST_LAG_MS: Final = 50.0
MOST_KIB: Final = {"uvloop": 48.0, "asyncio": 307.0}

# The one cell in which a single job asks by all ways.
_TURNS: Final = "turns"
_FLOOD: Final = "flood"
_FLOODS = 8
_PACED, _PACED_US = 64, 40_000
_TOKENS = 10  # streams beside the bulk


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is done."""

    rounds: int
    first_bytes: int
    seconds: float  # of paced streams
    floods: int  # a round, since they are what a busy machine disturbs most
    flood: float
    beside: float
    warm: float


FULL: Final = Pace(
    rounds=7,
    first_bytes=200,
    seconds=3.0,
    floods=3,
    flood=1.2,
    beside=5.0,
    warm=0.6,
)
QUICK: Final = Pace(
    rounds=2,
    first_bytes=100,
    seconds=1.0,
    floods=2,
    flood=0.6,
    beside=2.0,
    warm=0.4,
)


@dataclass(slots=True)
class Samples:
    """What was measured: by cell and way, one entry a round."""

    rounds: list[dict[tuple[str, str], dict[str, float]]]

    def all(self, cell: str, way: str, value: str) -> list[float]:
        """One value in every round, of every cell whose name begins like this."""
        return [
            values[value]
            for found in self.rounds
            for (name, by), values in found.items()
            if name.startswith(cell) and by == way
        ]

    def mid(self, cell: str, way: str, value: str) -> float:
        """Its median."""
        return median(self.all(cell, way, value))


def collect(
    site: Site,
    cells: Mapping[str, Job],
    ways: Sequence[str],
    rounds: int,
) -> Samples:
    """Each cell by each way in turns, so that a mood of the machine meets all."""
    samples = Samples([])
    for number in range(rounds):
        found: dict[tuple[str, str], dict[str, float]] = {}
        turn = number % len(ways)
        for cell, job in cells.items():
            if cell == _TURNS:
                found |= _by_way(site.measure(DIRECT, job))
                continue
            for way in [*ways[turn:], *ways[:turn]]:
                found[cell, way] = site.measure(way, job)
        samples.rounds.append(found)
    return samples


def _by_way(values: Mapping[str, float]) -> dict[tuple[str, str], dict[str, float]]:
    """Values that are named by way and meaning, as if each way had had its own job."""
    return {
        (_TURNS, way): {
            name.removeprefix(f"{way}_"): value
            for name, value in values.items()
            if name.startswith(f"{way}_")
        }
        for way in WAYS
    }


def cells(pace: Pace) -> dict[str, Job]:
    """What is measured without a narrow link."""
    common: dict[str, Any] = {"port": 0, "key": "", "warm_seconds": pace.warm}
    count = pace.first_bytes
    flood = Job("flood", connections=_FLOODS, seconds=pace.flood, **common)
    return {
        **{f"{_FLOOD} {number}": flood for number in range(pace.floods)},
        _TURNS: Job("turns", 0, "", seconds=count * 0.1, count=count),
        "paced": Job(
            "paced",
            connections=_PACED,
            interval_us=_PACED_US,
            seconds=pace.seconds,
            **common,
        ),
    }


def beside(pace: Pace) -> dict[str, Job]:
    """What is measured with one."""
    job = Job(
        "beside",
        0,
        "",
        connections=_TOKENS,
        interval_us=_PACED_US,
        warm_seconds=2 * pace.warm,
        seconds=pace.beside,
    )
    return {"beside": job}


def cpu_us(values: Mapping[str, float], *names: str) -> float:
    """CPU of these processes for each event; of all if none is named."""
    parts = [
        seconds
        for name, seconds in values.items()
        if name.endswith("_cpu_s") and (not names or name[:-6] in names)
    ]
    return sum(parts) / values["events"] * 1e6


def table(samples: Samples, narrowed: Samples) -> str:
    """Medians of all rounds."""

    def cpu(way: str, *names: str) -> float:
        return median(cpu_us(found["paced", way], *names) for found in samples.rounds)

    def row(title: str, value: Callable[[str], float]) -> str:
        return _line(title, [f"{value(way):,.0f}" for way in WAYS])

    def of(cell: str, value: str) -> Callable[[str], float]:
        return lambda way: samples.mid(cell, way, value)

    lines = [
        _line("", WAYS),
        row("us to the first byte, p50", of(_TURNS, "first_byte_p50_us")),
        row("   more than direct, within a turn", of(_TURNS, "added_p50_us")),
        row("us to the first byte, p99", of(_TURNS, "first_byte_p99_us")),
        row(f"events/s, {_FLOODS} streams", of(_FLOOD, "per_second")),
        row("CPU us per paced event, all", cpu),
        row("   relay", lambda way: cpu(way, "relay")),
        row("   agent", lambda way: cpu(way, "agent")),
        row("   sshd, ssh", lambda way: cpu(way, "sshd", "ssh")),
        row("us from engine to client, paced, p50", of("paced", "lag_p50_us")),
        row("us from engine to client, paced, p99", of("paced", "lag_p99_us")),
    ]
    for title, value, unit in (
        ("ms beside a bulk answer, p50", "lag_p50_us", 1e3),
        ("ms beside a bulk answer, p99", "lag_p99_us", 1e3),
        ("   MB/s of the bulk answer", "bulk_bytes_s", 1e6),
    ):
        shown = [narrowed.mid("beside", way, value) / unit for way in (SSH, TUNNEL)]
        lines.append(_line(title, ["-", *(f"{number:,.1f}" for number in shown)]))
    return "\n".join(lines)


def _line(title: str, texts: Sequence[str]) -> str:
    """A line of the table: a text for each way."""
    return f"{title:<46}" + "".join(f"{text:>10}" for text in texts)


def verdicts(
    samples: Samples, narrowed: Samples, kib: float, loop: str
) -> list[Figure]:
    """Each goal and what came of it."""

    ours, theirs = (samples.mid(_TURNS, way, "added_p50_us") for way in (TUNNEL, SSH))
    floods = zip(
        samples.all(_FLOOD, TUNNEL, "per_second"),
        samples.all(_FLOOD, SSH, "per_second"),
        strict=True,
    )
    flood = [one / other for one, other in floods]
    whole = [_ratio(found) for found in samples.rounds]
    public = [_ratio(found, "relay", "sshd") for found in samples.rounds]
    lag = narrowed.mid("beside", TUNNEL, "lag_p99_us") / 1e3
    ssh_lag = narrowed.mid("beside", SSH, "lag_p99_us") / 1e3
    most_kib = MOST_KIB[loop]
    return [
        Figure(
            "first byte: us added, tunnel and ssh",
            f"{ours:+.0f} and {theirs:+.0f}",
            f"<= {MOST_ADDED:g} x ssh",
            ours <= MOST_ADDED * theirs,
        ),
        _judged("flood: events/s, tunnel / ssh", flood, LEAST_FLOOD, is_least=True),
        _judged("CPU per paced event, tunnel / ssh", whole, MOST_CPU),
        _judged("the same, the public machine alone", public, MOST_CPU),
        Figure(
            "beside a bulk answer: p99 ms, tunnel and ssh",
            f"{lag:.1f} and {ssh_lag:.1f}",
            f"< {MOST_LAG_MS:g} ms",
            lag < MOST_LAG_MS,
        ),
        Figure(
            "KiB of the relay per idle connection",
            f"{kib:.1f}",
            f"<= {most_kib:g} KiB",
            kib <= most_kib,
        ),
    ]


def _ratio(found: Mapping[tuple[str, str], Mapping[str, float]], *who: str) -> float:
    return cpu_us(found["paced", TUNNEL], *who) / cpu_us(found["paced", SSH], *who)


def _judged(
    title: str, ratios: Sequence[float], limit: float, *, is_least: bool = False
) -> Figure:
    ratio = median(ratios)
    return Figure(
        title,
        f"{ratio:.2f} ({min(ratios):.2f}..{max(ratios):.2f})",
        f"{'>=' if is_least else '<='} {limit:g}",
        ratio >= limit if is_least else ratio <= limit,
    )


def _measure(options: argparse.Namespace) -> int:
    pace = QUICK if options.quick else FULL
    rounds = options.rounds or pace.rounds
    loop = "uvloop" if options.uvloop else "asyncio"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.keep:
            stack.callback(_keep_logs, folder, options.keep)
        stack.enter_context(openssh.privilege_folder())
        cable = stack.enter_context(narrow.cable())
        children = stack.enter_context(Children())
        run = Run(children, folder, uvloop=options.uvloop)
        site = Site(run, LOOPBACK, WAYS, "near")
        kib = site.kib_per_idle_connection()
        samples = collect(site, cells(pace), WAYS, rounds)
        far = cable or narrow.Way(
            f"stand-in of {narrow.BYTES_PER_SECOND / 1e6:g} MB/s in this run's own code"
        )
        apart = Site(run, far, (SSH, TUNNEL), "far")
        narrowed = collect(apart, beside(pace), (SSH, TUNNEL), max(2, rounds // 2))
    found = verdicts(samples, narrowed, kib, loop)
    load = " ".join(f"{number:.1f}" for number in os.getloadavg())
    others = median(
        values.get("foreign_share", 0.0)
        for one in samples.rounds
        for (cell, _), values in one.items()
        if cell != _TURNS
    )
    print(
        f"Python {platform.python_version()} on {platform.system()}"
        f" {platform.machine()}, gateways on {loop}, {rounds} rounds; medians\n"
        f"narrow link: {far.kind}\n{table(samples, narrowed)}\n"
        f"note: other programs took {others:.0%} of the machine (median); load {load}"
    )
    for verdict in found:
        print(verdict)
    if options.json:
        written = {
            "rounds": [
                {f"{cell}, {way}": values for (cell, way), values in one.items()}
                for one in [*samples.rounds, *narrowed.rounds]
            ],
            "goals": [asdict(verdict) for verdict in found],
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if options.check and not all(one.passed for one in found) else 0


def _keep_logs(folder: Path, where: Path) -> None:
    for log in folder.rglob("log"):
        name = "-".join(log.relative_to(folder).parts)
        where.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, where / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured; 1 with ``--check`` if a goal is missed; 2 could not."""
    parser = argparse.ArgumentParser(prog="python -m bench.tunnel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="less certain")
    parser.add_argument("--check", action="store_true", help="exit 1 on a missed goal")
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--uvloop", action="store_true", help="gateways use uvloop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples, too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the logs there")
    options = parser.parse_args(argv)
    if options.uvloop and not machine.has_uvloop():
        parser.error("--uvloop: uvloop is not installed")
    if (program := openssh.missing()) is not None:
        print(
            f"bench.tunnel: no {program} here ({openssh.HOW_TO_INSTALL})",
            file=sys.stderr,
        )
        return 2
    return exit_code("bench.tunnel", lambda: _measure(options))


if __name__ == "__main__":
    sys.exit(main())
