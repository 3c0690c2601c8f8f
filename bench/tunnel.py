"""``python -m bench.tunnel``: the tunnel beside ``ssh -R``, and beside no tunnel.

Three ways from one gateway to another one, on one machine and in one run:

direct   the relay's backend is the agent's own address
ssh      it is a port that OpenSSH forwards (``ssh -R``, an sshd of this run's own)
tunnel   the agent has dialed the relay, with TLS and a certificate of this run's own

Before each way stands a relay (``python -m inferencia serve``), behind all of them the
same agent and the same mock engine. So rows differ in nothing but how bytes get from
relay to agent. Clients speak TLS to all of them, because a relay's certificate counts
for all its addresses.

Goals, each on the median of rounds in which the ways take turns:

first byte    what the tunnel adds to ``direct``: at most 1.2 times what ssh adds
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
import http.client
import json
import os
import platform
import shutil
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from subprocess import Popen
from typing import Any, Final

from bench import gateway, machine, narrow, openssh, parked, wire
from bench.children import ChildFailed, Children, read_port, tail
from bench.load import GRACE_SECONDS, HOST, Job

DIRECT, SSH, TUNNEL = "direct", "ssh", "tunnel"
WAYS: Final = (DIRECT, SSH, TUNNEL)

#: Goals; see the module's header.
MOST_ADDED: Final = 1.2
LEAST_FLOOD: Final = 1.0
MOST_CPU: Final = 1.1
MOST_LAG_MS: Final = 50.0
MOST_KIB: Final = {"uvloop": 48.0, "asyncio": 307.0}

_FLOODS = 8
_PACED, _PACED_US = 64, 40_000
_TOKENS = 10  # streams beside the bulk
# Idle connections that are there before memory is read, and those that it is read for.
_FIRST_PARKED, _PARKED = 32, 256
_PATIENCE_SECONDS = 30.0
_ASK_AGAIN_SECONDS = 0.05

_COMMON = """\
auth: {keys_file: ./keys.txt}
ratelimit: {requests_per_second: 1000000, burst: 1000000}
queue: {max_waiting: 1000, timeout: 60s}
watchdog: {interval: 5s}
log: {level: info, format: json}
"""


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is done."""

    rounds: int
    first_bytes: int
    seconds: float  # of floods and paced streams
    beside: float
    warm: float


FULL: Final = Pace(rounds=7, first_bytes=300, seconds=3.0, beside=5.0, warm=0.7)
QUICK: Final = Pace(rounds=2, first_bytes=120, seconds=1.0, beside=2.0, warm=0.4)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure and its goal."""

    title: str
    figure: str
    goal: str
    passed: bool

    def __str__(self) -> str:
        word = "pass" if self.passed else "FAIL"
        return f"{self.title:<46} {self.figure:>22}   {self.goal:<14} {word}"


@dataclass(frozen=True, slots=True)
class Secrets:
    """The keys of one run."""

    user: str  # at the relays
    home: str  # of the relays, at the agent's own address
    agents: Mapping[str, str]  # tokens by name

    @classmethod
    def new(cls) -> "Secrets":
        names = ("gpu-home", "first", "parked")
        return cls(
            gateway.new_key(),
            gateway.new_key(),
            {name: gateway.new_key() for name in names},
        )

    def lines(self) -> list[str]:
        """The keys file; the same for all gateways, since none is read by another."""
        agents = self.agents.items()
        return [
            f"{self.user} name=bench",
            f"{self.home} name=relay",
            *(f"{token} name={name} role=agent models=*" for name, token in agents),
        ]


class Site:
    """An engine and an agent at home, and a relay for each way to them."""

    def __init__(
        self, run: "Run", way: narrow.Way, ways: Sequence[str], name: str
    ) -> None:
        self._run = run
        self._way = way
        self._folder = run.folder / name
        self._folder.mkdir()
        addresses = sorted({HOST, way.relay})
        self.chain, self._key = openssh.make_certificate(self._folder, addresses)
        self.ports: dict[str, int] = {}
        self.pids: dict[str, dict[str, list[int]]] = {}  # of each way, by what it is
        mock = run.children.run(
            [*way.home, sys.executable, "-m", "bench.mock"], core=None, log=run.log
        )
        self.mock = mock.pid
        engine = f"http://{HOST}:{read_port(mock, run.log)}"
        self._agent_port, relay_port = gateway.free_port(), gateway.free_port()
        ssh_port = gateway.free_port()
        self.relay_port = relay_port
        if not way.home and way.kind != _PLAIN:
            narrowed = narrow.stand_in(run.children, (relay_port, ssh_port), run.log)
        else:
            narrowed = [relay_port, ssh_port]
        relay = self._relay(TUNNEL, [self._nothing()], relay_port)
        self._agent = self._start_agent(engine, narrowed[0])
        self.pids[TUNNEL] = {"relay": [relay.pid], "agent": [self._agent.pid]}
        if SSH in ways:
            self._add_ssh(ssh_port, narrowed[1])
        if DIRECT in ways:
            self._add(DIRECT, self._agent_port, {})
        for each in ways:
            self._await_answer(each)

    def _add_ssh(self, port: int, dialed: int) -> None:
        folder = self._folder / "openssh"
        folder.mkdir()
        server = openssh.Server(
            self._run.children, folder, address=self._way.relay, port=port
        )
        forwarded = server.forward(
            address=self._way.relay,
            port=dialed,
            to=self._agent_port,
            prefix=self._way.home,
        )
        helpers = {"sshd": forwarded.server, "ssh": [forwarded.client]}
        self._add(SSH, forwarded.port, helpers)

    def _add(self, name: str, port: int, helpers: dict[str, list[int]]) -> None:
        backend = {
            "name": "home",
            "type": "openai",
            "url": f"http://{HOST}:{port}",
            "api_key": self._run.secrets.home,
        }
        relay = self._relay(name, [backend])
        self.pids[name] = {"relay": [relay.pid], "agent": [self._agent.pid]} | helpers

    @staticmethod
    def _nothing() -> dict[str, Any]:
        """A backend that is not there: without any, others are looked for."""
        return {"name": "nothing", "type": "openai", "url": f"http://{HOST}:9"}

    def _relay(
        self, name: str, backends: Sequence[Mapping[str, Any]], tunnel: int = 0
    ) -> "Popen[str]":
        self.ports[name] = gateway.free_port()
        listen = {f"{HOST}:{self.ports[name]}": "openai"}
        if tunnel:
            listen[f"{self._way.relay}:{tunnel}"] = "tunnel"
        config: dict[str, Any] = {
            "server": {
                "listen": listen,
                "tls": {"cert": str(self.chain), "key": str(self._key)},
                "shutdown_timeout": "2s",
            },
            "backends": backends,
        }
        if tunnel:
            config["tunnel"] = {"accept": {"enabled": True}}
        return self._gateway(f"relay-{name}", config)

    def _start_agent(self, engine: str, relay_port: int) -> "Popen[str]":
        backend = {"name": "mock", "type": "openai", "url": engine}
        config = {
            "server": {
                "host": HOST,
                "port": self._agent_port,
                "shutdown_timeout": "2s",
            },
            "backends": [backend | {"max_concurrency": 256}],
            "tunnel": {
                "dial": {
                    "relays": [f"https://{self._way.relay}:{relay_port}"],
                    "token": self._run.secrets.agents["gpu-home"],
                    "ca_file": str(self.chain),
                }
            },
        }
        return self._gateway("agent", config, self._way.home)

    def _gateway(
        self, name: str, config: Mapping[str, Any], prefix: Sequence[str] = ()
    ) -> "Popen[str]":
        folder = self._folder / name
        folder.mkdir()
        keys = folder / "keys.txt"
        keys.touch(mode=0o600)
        keys.write_text("\n".join(self._run.secrets.lines()) + "\n")
        text = "".join(f"{key}: {json.dumps(config[key])}\n" for key in config)
        (folder / "config.yaml").write_text(_COMMON + text)
        command = [*prefix, sys.executable, "-m", "bench.gateway", *self._run.loop]
        command += ["serve", "-c", str(folder / "config.yaml")]
        return self._run.children.run(
            command,
            core=None,
            log=folder / "log",
            env=gateway.environment(folder),
            speaks=False,
        )

    def _await_answer(self, name: str) -> None:
        """Ask a relay until a chat request is answered."""
        context = ssl.create_default_context(cafile=str(self.chain))
        body = wire.body(wire.Order())
        headers = {"Authorization": f"Bearer {self._run.secrets.user}"}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        said = ""
        while time.monotonic() < deadline:
            asking = http.client.HTTPSConnection(
                HOST, self.ports[name], timeout=5, context=context
            )
            try:
                asking.request("POST", "/v1/chat/completions", body, headers)
                answer = asking.getresponse()
                if answer.status == 200:
                    return
                said = answer.read().decode()
            except (OSError, http.client.HTTPException) as error:
                said = str(error)
            finally:
                asking.close()
            time.sleep(_ASK_AGAIN_SECONDS)
        logs = "\n".join(tail(log) for log in sorted(self._folder.glob("*/log")))
        raise ChildFailed(f"{name}: no answer; last: {said}\n{logs}")

    def measure(self, name: str, job: Job) -> dict[str, float]:
        """Do a job by one of the ways.

        Raises:
            ChildFailed: an answer was not as it should be.
        """
        whole = replace(
            job,
            port=self.ports[name],
            key=self._run.secrets.user,
            ca_file=str(self.chain),
            mock_pid=self.mock,
            pids=self.pids[name],
        )
        output = self._run.children.result(
            "bench.load",
            json.dumps(asdict(whole)),
            core=None,
            log=self._run.log,
            seconds=job.warm_seconds + job.seconds + 2 * GRACE_SECONDS,
        )
        result = json.loads(output)
        if result["errors"]:
            raise ChildFailed(f"{job.kind}, {name}: {result['errors']}")
        values: dict[str, float] = result["values"]
        return values

    def kib_per_idle_connection(self) -> float:
        """How the relay grows by connections that carry nothing."""
        (relay,) = self.pids[TUNNEL]["relay"]
        self._park("first", _FIRST_PARKED)
        before = machine.rss_bytes(relay)
        child = self._park("parked", _PARKED)
        grown = machine.rss_bytes(relay) - before
        self._run.children.end(child)
        return grown / 1024 / _PARKED

    def _park(self, name: str, count: int) -> "Popen[str]":
        url = f"https://{self._way.relay}:{self.relay_port}"
        token = self._run.secrets.agents[name]
        job = parked.Job(url, token, str(self.chain), count)
        log = self._run.log
        child = self._run.children.start(
            "bench.parked", json.dumps(asdict(job)), core=None, log=log
        )
        read_port(child, log)  # it has them all
        return child


_PLAIN = "loopback"


class Run:
    """What all sites of one run share."""

    def __init__(self, children: Children, folder: Path, *, uvloop: bool) -> None:
        self.children = children
        self.folder = folder
        self.log = folder / "log"
        self.loop = ["--uvloop"] if uvloop else []
        self.secrets = Secrets.new()


@dataclass(slots=True)
class Samples:
    """What was measured: by cell and way, one entry a round."""

    rounds: list[dict[tuple[str, str], dict[str, float]]]

    def all(self, cell: str, way: str, value: str) -> list[float]:
        """One value in every round."""
        return [found[cell, way][value] for found in self.rounds]

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
        found = {}
        turn = number % len(ways)
        for cell, job in cells.items():
            for way in [*ways[turn:], *ways[:turn]]:
                found[cell, way] = site.measure(way, job)
        samples.rounds.append(found)
    return samples


def cells(pace: Pace) -> dict[str, Job]:
    """What is measured without a narrow link."""
    common: dict[str, Any] = {"port": 0, "key": "", "warm_seconds": pace.warm}
    count = pace.first_bytes
    return {
        "first byte": Job("first_byte", 0, "", seconds=count * 0.1, count=count),
        "flood": Job("flood", connections=_FLOODS, seconds=pace.seconds, **common),
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

    def row(title: str, value: Callable[[str], float], digits: int = 0) -> str:
        shown = [f"{value(way):,.{digits}f}" for way in WAYS]
        return f"{title:<46}" + "".join(f"{text:>10}" for text in shown)

    def of(cell: str, value: str) -> Callable[[str], float]:
        return lambda way: samples.mid(cell, way, value)

    lines = [
        f"{'':<46}" + "".join(f"{way:>10}" for way in WAYS),
        row("us to the first byte, p50", of("first byte", "first_byte_p50_us")),
        row("us to the first byte, p99", of("first byte", "first_byte_p99_us")),
        row(f"events/s, {_FLOODS} streams", of("flood", "per_second")),
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
        texts = ["-", *(f"{number:,.1f}" for number in shown)]
        lines.append(f"{title:<46}" + "".join(f"{text:>10}" for text in texts))
    return "\n".join(lines)


def verdicts(
    samples: Samples, narrowed: Samples, kib: float, loop: str
) -> list[Verdict]:
    """Each goal and what came of it."""

    def added(way: str) -> list[float]:
        value = "first_byte_p50_us"
        pairs = zip(
            samples.all("first byte", way, value),
            samples.all("first byte", DIRECT, value),
            strict=True,
        )
        return [one - other for one, other in pairs]

    ours, theirs = median(added(TUNNEL)), median(added(SSH))
    flood = [
        found["flood", TUNNEL]["per_second"] / found["flood", SSH]["per_second"]
        for found in samples.rounds
    ]
    whole = [_ratio(found) for found in samples.rounds]
    public = [_ratio(found, "relay", "sshd") for found in samples.rounds]
    lag = narrowed.mid("beside", TUNNEL, "lag_p99_us") / 1e3
    ssh_lag = narrowed.mid("beside", SSH, "lag_p99_us") / 1e3
    most_kib = MOST_KIB[loop]
    return [
        Verdict(
            "first byte: us added, tunnel and ssh",
            f"{ours:+.0f} and {theirs:+.0f}",
            f"<= {MOST_ADDED:g} x ssh",
            ours <= MOST_ADDED * theirs,
        ),
        _judged("flood: events/s, tunnel / ssh", flood, LEAST_FLOOD, is_least=True),
        _judged("CPU per paced event, tunnel / ssh", whole, MOST_CPU),
        _judged("the same, the public machine alone", public, MOST_CPU),
        Verdict(
            "beside a bulk answer: p99 ms, tunnel and ssh",
            f"{lag:.1f} and {ssh_lag:.1f}",
            f"< {MOST_LAG_MS:g} ms",
            lag < MOST_LAG_MS,
        ),
        Verdict(
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
) -> Verdict:
    ratio = median(ratios)
    return Verdict(
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
        site = Site(run, narrow.Way(_PLAIN), WAYS, "near")
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
        if cell != "first byte"
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
    try:
        return _measure(options)
    except ChildFailed as failure:
        print(f"bench.tunnel: {failure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
