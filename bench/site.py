"""Two machines on one: an agent at home, and a relay for each way to it.

``tunnel`` measures with it. All gateways are ``python -m inferencia serve``; what they
are told is in here.
"""

import http.client
import json
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Any, Final

from bench import gateway, machine, narrow, openssh, parked, wire
from bench.children import ChildFailed, Children, read_port, tail
from bench.load import GRACE_SECONDS, HOST, Job

DIRECT, SSH, TUNNEL = "direct", "ssh", "tunnel"
WAYS: Final = (DIRECT, SSH, TUNNEL)
#: Home and relay on loopback, as fast as that is.
LOOPBACK: Final = narrow.Way("loopback")

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


class Run:
    """What all sites of one run share."""

    def __init__(self, children: Children, folder: Path, *, uvloop: bool) -> None:
        self.children = children
        self.folder = folder
        self.log = folder / "log"
        self.loop = ["--uvloop"] if uvloop else []
        self.secrets = Secrets.new()
        self.cores = Cores.choose()


@dataclass(frozen=True, slots=True)
class Cores:
    """Each of both machines has a core; None where processes cannot be held to one.

    Left to the system, it is luck which processes share a core, and a flood's ratios
    go from 0.7 to 1.6; so they go from 1.1 to 1.4.
    """

    public: int | None  # relays and sshd
    home: int | None  # agent, ssh and engine
    load: int | None  # a core of its own, else the relay's

    @classmethod
    def choose(cls) -> "Cores":
        """As the first cores of this machine allow."""
        cores = machine.Cores.choose()
        has_third = cores.load != cores.mock
        return cls(cores.proxy, cores.mock, cores.load if has_third else cores.proxy)


class Site:
    """An engine and an agent at home, and a relay for each way to them."""

    def __init__(
        self, run: Run, way: narrow.Way, ways: Sequence[str], name: str
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
            [*way.home, sys.executable, "-m", "bench.mock"],
            core=run.cores.home,
            log=run.log,
        )
        self.mock = mock.pid
        engine = f"http://{HOST}:{read_port(mock, run.log)}"
        self._agent_port, relay_port = gateway.free_port(), gateway.free_port()
        ssh_port = gateway.free_port()
        self.relay_port = relay_port
        if not way.home and way is not LOOPBACK:
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
            self._run.children,
            folder,
            address=self._way.relay,
            port=port,
            core=self._run.cores.public,
        )
        forwarded = server.forward(
            address=self._way.relay,
            port=dialed,
            to=self._agent_port,
            prefix=self._way.home,
            core=self._run.cores.home,
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
        return self._gateway(f"relay-{name}", config, self._run.cores.public)

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
        cores = self._run.cores
        return self._gateway("agent", config, cores.home, self._way.home)

    def _gateway(
        self,
        name: str,
        config: Mapping[str, Any],
        core: int | None,
        prefix: Sequence[str] = (),
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
            core=core,
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
            ports={way: self.ports[way] for way in WAYS if way in self.ports},
            key=self._run.secrets.user,
            ca_file=str(self.chain),
            mock_pid=self.mock,
            pids=self.pids[name],
        )
        output = self._run.children.result(
            "bench.load",
            json.dumps(asdict(whole)),
            core=self._run.cores.load,
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
            "bench.parked",
            json.dumps(asdict(job)),
            core=self._run.cores.home,
            log=log,
        )
        read_port(child, log)  # it has them all
        return child
