"""``python -m bench``: start everything, measure in rounds, print one table.

Order of events:

1. Mock engine, yardstick and gateway start, each once, each held to its core.
2. Round by round, cell by cell, the targets take their turns; who goes first changes
   with the round. One load generator process does one cell against one target.
3. The cell ``start`` starts proxies of its own, beside the ones that wait.
4. All children are ended, the table is printed.

Load goes to 127.0.0.1 only and is bounded in time and count.
"""

import argparse
import json
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from subprocess import Popen

from bench import gateway, machine, peers, report, wire
from bench.cells import (
    CELLS,
    FULL,
    HELD_LAG_US,
    HELD_STEP,
    INTERVAL_US,
    MOST_HELD,
    QUICK,
    Cell,
    Pace,
)
from bench.children import (
    ChildFailed,
    Children,
    exit_code,
    read_port,
    tail,
)
from bench.load import GRACE_SECONDS, Job, Result

#: How long a proxy may take from its start to its first answer.
_START_SECONDS = 20.0

#: Between two tries; the start time is known only that exactly.
_ASK_AGAIN_SECONDS = 0.005

#: Prompts are large and few; this many seconds are plenty for each cell of them.
_PROMPT_SECONDS = 10.0

#: How long held streams stay open, enough to open them and read the memory.
_HOLD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """Somebody who answers chat requests on a port."""

    name: str
    port: int
    pid: int | None = None  # None: no proxy, the mock itself


class Bench:
    """The processes of one run, and how a cell is measured with them."""

    def __init__(
        self,
        children: Children,
        folder: Path,
        pace: Pace,
        *,
        uvloop: bool,
        holds_gateway: bool = True,
        usage: bool = True,
    ) -> None:
        """Start the mock engine.

        Args:
            children: what starts and ends processes.
            folder: for their files.
            pace: how long cells take.
            uvloop: whether proxies run on it.
            holds_gateway: whether the gateway is held to one core, as all proxies are.
            usage: whether gateways record usage, unless one is asked for without.
        """
        self._children = children
        self._folder = folder
        self._pace = pace
        self._loop = ["--uvloop"] if uvloop else []
        self._usage = usage  # whether gateways record it
        self._cores = machine.Cores.choose()
        self._gateway_core = self._cores.proxy if holds_gateway else None
        self._key = gateway.new_key()
        self._log = folder / "log"  # of all children but the gateways
        mock = children.start("bench.mock", core=self._cores.mock, log=self._log)
        self._mock_port = read_port(mock, self._log)
        self._mock_pid = mock.pid
        self._gateways = 0  # started so far
        self._peers = 0

    @property
    def cores(self) -> machine.Cores:
        return self._cores

    def direct(self) -> Target:
        return Target(report.DIRECT, self._mock_port)

    def start(self, name: str) -> tuple[Target, "Popen[str]", float]:
        """A fresh proxy, its process, and the seconds until its first answer."""
        began = time.monotonic()
        if name == report.YARDSTICK:
            child, port, log = self._start_yardstick()
        elif name in report.PEERS:
            child, port, log = self._start_peer(name)
        else:
            usage = self._usage and name != gateway.WITHOUT_USAGE
            child, port, log = self._start_gateway(usage=usage)
        try:
            self._await_answer(port, child)
        except ChildFailed as failure:
            raise ChildFailed(f"{name}: {failure}\n{tail(log)}") from None
        seconds = time.monotonic() - began
        return Target(name, port, child.pid), child, seconds

    def _start_yardstick(self) -> tuple["Popen[str]", int, Path]:
        child = self._children.start(
            "bench.plain",
            str(self._mock_port),
            self._key,
            *self._loop,
            core=self._cores.proxy,
            log=self._log,
        )
        return child, read_port(child, self._log), self._log

    def _start_peer(self, name: str) -> tuple["Popen[str]", int, Path]:
        self._peers += 1
        folder = self._folder / f"peer-{self._peers}"
        folder.mkdir()
        port = gateway.free_port()
        command = peers.command(name, folder, port=port, mock_port=self._mock_port)
        child = self._children.run(
            command, core=self._cores.proxy, log=self._log, speaks=False
        )
        return child, port, self._log

    def _start_gateway(self, *, usage: bool) -> tuple["Popen[str]", int, Path]:
        self._gateways += 1
        folder = self._folder / f"gateway-{self._gateways}"
        folder.mkdir()
        port = gateway.free_port()
        config = gateway.write_config(
            folder,
            port=port,
            mock_port=self._mock_port,
            key=self._key,
            usage=usage,
        )
        log = folder / "log"
        child = self._children.start(
            "bench.gateway",
            *self._loop,
            "serve",
            "-c",
            str(config),
            core=self._gateway_core,
            log=log,
            env=gateway.environment(folder),
            speaks=False,
        )
        return child, port, log

    def _await_answer(self, port: int, child: "Popen[str]") -> None:
        """Ask again and again until a chat request is answered."""
        asked = wire.request(wire.body(wire.Order()), self._key, f"127.0.0.1:{port}")
        deadline = time.monotonic() + _START_SECONDS
        said = "no connection"
        while time.monotonic() < deadline:
            if child.poll() is not None:
                raise ChildFailed(f"ended with {child.returncode} at its start")
            try:
                with socket.create_connection(("127.0.0.1", port), 5) as connection:
                    connection.sendall(asked)
                    said = connection.recv(65536).decode("latin-1")
            except OSError as error:
                said = str(error)
            if said.startswith("HTTP/1.1 200 "):
                return
            time.sleep(_ASK_AGAIN_SECONDS)
        raise ChildFailed(f"no answer after {_START_SECONDS:g} s; last: {said!r}")

    def measure(self, cell: Cell, target: Target) -> Result:
        """One cell against one target."""
        pace = self._pace
        match cell.kind:
            case "requests":
                job = self._job(cell, target, "requests", pace.requests, pace.warm)
            case "first_byte":
                count = pace.first_byte_count
                job = self._job(cell, target, "first_byte", count * 0.1, count=count)
            case "paced":
                job = self._job(cell, target, "paced", pace.paced, pace.warm)
            case "prompt":
                count = pace.prompts
                seconds = _PROMPT_SECONDS
                job = self._job(cell, target, "requests", seconds, count=count)
            case "held":
                return self._search_held(cell, target)
            case _:
                return self._measure_start(target.name)
        return self._run(job)

    def _search_held(self, cell: Cell, target: Target) -> Result:
        """How many paced streams pass before their events come late."""

        def holds(streams: int) -> bool:
            job = self._job(cell, target, "paced", self._pace.search, self._pace.warm)
            result = self._run(replace(job, connections=streams))
            return not result.errors and (
                result.values.get("lag_p99_us", HELD_LAG_US + 1) <= HELD_LAG_US
            )

        return Result({"streams": float(most_held(holds))})

    def _job(
        self,
        cell: Cell,
        target: Target,
        kind: str,
        seconds: float,
        warm: float = 0.0,
        *,
        count: int | None = None,
    ) -> Job:
        job = Job(
            kind,
            target.port,
            self._key,
            connections=cell.connections,
            warm_seconds=warm,
            seconds=seconds,
            body_bytes=cell.body_bytes,
            interval_us=INTERVAL_US,
            proxy_pid=target.pid,
            mock_pid=self._mock_pid,
        )
        return job if count is None else Job(**{**asdict(job), "count": count})

    def _run(self, job: Job) -> Result:
        limit = job.warm_seconds + job.seconds + 2 * GRACE_SECONDS
        output = self._children.result(
            "bench.load",
            json.dumps(asdict(job)),
            core=self._cores.load,
            log=self._log,
            seconds=limit,
        )
        return Result(**json.loads(output))

    def _measure_start(self, name: str) -> Result:
        """Start a proxy, look at its memory, open streams, look again, end it."""
        target, child, seconds = self.start(name)
        try:
            idle = machine.rss_bytes(child.pid)
            job = Job(
                "hold",
                target.port,
                self._key,
                connections=self._pace.held,
                seconds=_HOLD_SECONDS,
                proxy_pid=child.pid,
            )
            result = self._run(job)
        finally:
            self._children.end(child)
        result.values |= {"start_s": seconds, "idle_mib": idle / 2**20}
        return result


def most_held(holds: Callable[[int], bool]) -> int:
    """The most streams for which ``holds``; exact to a step, 0 if not even one step."""
    if holds(MOST_HELD):
        return MOST_HELD
    low, high = 0, MOST_HELD // HELD_STEP  # the first holds, the second doesn't
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle * HELD_STEP) else (low, middle)
    return low * HELD_STEP


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [cell.name for cell in CELLS]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="less than a minute")
    parser.add_argument("--rounds", type=int, metavar="N", help="at least 1")
    parser.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="CELL",
        help="this cell, may be repeated: " + ", ".join(names),
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=report.TARGETS,
        help="leave this target out, may be repeated",
    )
    parser.add_argument("--uvloop", action="store_true", help="both proxies use uvloop")
    parser.add_argument(
        "--usage", action="store_true", help="the gateway records usage, too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples, too")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 unless both goals are reached"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="copy the gateway's logs there"
    )
    options = parser.parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.uvloop and not machine.has_uvloop():
        parser.error("--uvloop: uvloop is not installed")
    return options


def _collect(
    bench: Bench, targets: Sequence[Target], cells: Sequence[Cell], rounds: int
) -> list[report.Sample]:
    samples = []
    for number in range(rounds):
        turn = number % len(targets)
        for cell in cells:
            for target in [*targets[turn:], *targets[:turn]]:
                if target.pid is None and not cell.is_for_direct:
                    continue
                _say(f"\rround {number + 1}/{rounds}: {cell.name} {target.name}")
                result = bench.measure(cell, target)
                samples.append(
                    report.Sample(
                        number, cell.name, target.name, result.values, result.errors
                    )
                )
    _say("\r")
    return samples


def _say(text: str) -> None:
    """Progress, only where somebody watches."""
    if sys.stderr.isatty():
        print(text.ljust(60), end="\r", file=sys.stderr, flush=True)


def _facts(
    bench: Bench, pace: Pace, rounds: int, *, uvloop: bool, usage: bool
) -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": asdict(bench.cores),
        "loop": "uvloop" if uvloop else "asyncio",
        "usage": usage,
        "load_loop": "uvloop" if machine.has_uvloop() else "asyncio",
        "rounds": rounds,
        "pace": asdict(pace),
    }


def _measure(options: argparse.Namespace) -> int:
    pace = QUICK if options.quick else FULL
    rounds = options.rounds or pace.rounds
    cells = [
        cell
        for cell in CELLS
        if (
            cell.name in options.only
            if options.only
            else pace.search or cell.name != "held"
        )
    ]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        children = stack.enter_context(Children())
        bench = Bench(
            children, folder, pace, uvloop=options.uvloop, usage=options.usage
        )
        targets = [bench.direct()]
        targets += [
            bench.start(name)[0]
            for name in report.TARGETS[1:]
            if name not in options.without
            and (
                name not in report.PEERS
                or (pace.search and peers.program(name) is not None)
            )
        ]
        if report.DIRECT in options.without:
            targets = targets[1:]
        for target in targets:
            print(
                f"{target.name}: port {target.port}, pid {target.pid or '-'}",
                file=sys.stderr,
            )
        taken = _collect(bench, targets, cells, rounds)
        facts = _facts(bench, pace, rounds, uvloop=options.uvloop, usage=options.usage)
        facts["logged_requests"] = gateway.logged_requests(folder)
        if options.keep:
            shutil.copytree(folder, options.keep, dirs_exist_ok=True)
    return _report(report.Samples(taken), facts, options)


def _report(
    samples: report.Samples, facts: dict[str, object], options: argparse.Namespace
) -> int:
    rows = report.lines(samples)
    found = report.verdicts(samples)
    print(
        f"Python {facts['python']} on {facts['system']}, proxies on {facts['loop']},"
        f" {facts['rounds']} rounds; ratio = inferencia / yardstick, median of rounds"
    )
    print(report.table(rows))
    for note in report.notes(samples):
        print("note:", note)
    if report.GATEWAY not in options.without and not facts["logged_requests"]:
        print("note: the gateway wrote no request log; it was measured without one")
    print(report.judgement(found))
    if options.json:
        written = {
            "facts": facts,
            "samples": [asdict(sample) for sample in samples.all],
            "lines": [asdict(line) for line in rows],
            "goals": [asdict(verdict) for verdict in found],
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    if options.check and not all(verdict.passed for verdict in found):
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured; 1 with ``--check`` if a goal is missed; 2 could not."""
    options = _arguments(argv)
    return exit_code("bench", lambda: _measure(options))


if __name__ == "__main__":
    sys.exit(main())
