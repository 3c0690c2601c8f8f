"""The tunnel between real daemons, through real proxies, with real signals.

The numbers in the titles are the rows of the failure matrix in docs/tunnel.md. Most of
this is skipped without ``INFERENCIA_E2E_DIR``, as drains, silences and proxies take
their time; test_tunnel_faults.py shows the same in one process.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines.real import Engine, Process, Server, free_port, is_free, until
from test_proxies import (
    PROXIES,
    Ports,
    Proxied,
    chat,
    lines_of,
    replaced,
    takes_its_time,
    words_in,
)

pytestmark = pytest.mark.e2e

KEY = "sk-far-7c1e90b2d5f3a8"
METRICS_KEY = "sk-far-metrics-51d0c3"
TOKEN = "ia-far-gpu-home-c0ffee11"
CHAT = "/v1/chat/completions"
PATIENCE = 15.0
BEAT = 0.5

COMMON = """
server: {shutdown_timeout: 5s, sse_keepalive: 300ms}
auth: {keys_file: keys.txt}
ratelimit: {requests_per_second: 1000, burst: 1000}
usage: {path: usage.sqlite3}
log: {level: info, format: json}
"""


@pytest.fixture(autouse=True)
def engine_address() -> None:
    """These tests need no language model, unlike the rest of the set."""


@dataclass(slots=True)
class Daemon(Engine):
    """A gateway as a process."""

    @property
    def words(self) -> str:
        return self.log.read_text()

    def busy(self, name: str) -> int:
        """The requests in flight at a backend of it."""
        text = self.get("/metrics", Authorization=f"Bearer {METRICS_KEY}").body.decode()
        family = "inferencia_backend_requests_in_flight"
        found = re.findall(rf'^{family}\{{backend="{name}"\}} (\d+)', text, re.M)
        return int(found[0]) if found else 0

    def says(self, words: str) -> None:
        until(lambda: words in self.words, PATIENCE, f"it says {words!r}\n{self.words}")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.signal(number)


def daemon(home: Path, config: str, *arguments: str, port: int = 0) -> Daemon:
    home.mkdir(exist_ok=True)
    keys = home / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text(
        f"{KEY} name=alice\n{METRICS_KEY} name=prom role=metrics\n"
        f"{TOKEN} name=gpu-home role=agent models=echo\n"
    )
    (home / "config.yaml").write_text(COMMON + config)
    port = port or free_port()
    command = [sys.executable, "-m", "inferencia", "serve", *arguments]
    command += ["-c", str(home / "config.yaml"), "--port", str(port)]
    headers = {"Authorization": f"Bearer {KEY}"}
    env = {"INFERENCIA_STATE": str(home / "state")}
    return Daemon(port, headers, command=command, log=home / "log", env=env)


def relay_at(home: Path, port: int = 0, server: str = "") -> Daemon:
    accepting = f"tunnel: {{accept: {{enabled: true}}, beat: {BEAT}}}\n"
    nothing = "backends: [{name: nothing, url: 'http://127.0.0.1:9'}]\n"
    return daemon(home, accepting + nothing, port=port)


def agent_at(home: Path, url: str, ca_file: Path | None = None) -> Daemon:
    dial = {
        "relays": [url],
        "token": TOKEN,
        "ca_file": str(ca_file) if ca_file else None,
    }
    return daemon(
        home, f"tunnel: {json.dumps({'dial': dial, 'beat': BEAT})}\n", "--demo"
    )


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Daemon]:
    with relay_at(tmp_path / "relay").running() as relay:
        yield relay


@pytest.fixture
def agent(tmp_path: Path, relay: Daemon) -> Iterator[Daemon]:
    with agent_at(tmp_path / "agent", relay.url).running() as agent:
        is_served(relay)
        yield agent


def is_served(relay: Server) -> None:
    def answers() -> bool:
        return relay.request("POST", CHAT, chat("hello")).status == 200

    until(answers, PATIENCE, "the relay serves the agent's model")


@contextlib.contextmanager
def stream(far: Any, words: str, **echo: Any) -> Iterator[http.client.HTTPResponse]:
    connection = far.send("POST", CHAT, chat(words, **echo))
    with contextlib.closing(connection):
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        yield answer


def first_word(answer: http.client.HTTPResponse) -> str:
    for line in lines_of(answer):
        if line.startswith(b"data: {") and (word := words_in(line)):
            return word
    raise AssertionError("the stream ended without a word")


# --- signals ---------------------------------------------------------------------


def test_an_agent_that_is_killed_ends_its_streams_at_once(
    relay: Daemon, agent: Daemon
) -> None:
    """6"""
    with stream(relay, "word " * 1000, delay_ms=50) as answer:
        first_word(answer)
        began = time.monotonic()
        agent.signal(signal.SIGKILL)
        rest = answer.read()
        assert time.monotonic() - began < 2
        assert b'"error"' in rest and b"[DONE]" not in rest

    def is_missed() -> bool:
        reply = relay.request("POST", CHAT, chat("hello"))
        # 502 as long as a connection to it is only just being lost.
        assert reply.status in (502, 503)
        return "is not connected" in reply.json()["error"]["message"]

    until(is_missed, 2, "its models are known to be away")


@takes_its_time
def test_a_relay_that_is_killed_ends_the_work_at_home(
    relay: Daemon, agent: Daemon
) -> None:
    """6, 10"""
    with stream(relay, "word " * 1000, delay_ms=50) as answer:
        first_word(answer)
        until(lambda: agent.busy("echo") == 1, PATIENCE, "the model works")
        relay.signal(signal.SIGKILL)
        until(lambda: agent.busy("echo") == 0, 2, "the model has stopped")
    relay.stop()
    with relay_at(relay.log.parent, relay.port).running() as again:
        is_served(again)


@takes_its_time
def test_an_agent_that_is_frozen_is_found_and_comes_back(
    relay: Daemon, agent: Daemon
) -> None:
    """7, 31"""
    with stream(relay, "word " * 1000, delay_ms=50) as answer:
        first_word(answer)
        began = time.monotonic()
        agent.signal(signal.SIGSTOP)
        rest = answer.read()
        assert b'"error"' in rest
        assert time.monotonic() - began < 3.5 * BEAT + 1
    assert relay.request("POST", CHAT, chat("hello")).status == 503
    agent.signal(signal.SIGCONT)
    is_served(relay)


@takes_its_time
def test_a_relay_that_is_frozen_is_found_by_the_agent(
    relay: Daemon, agent: Daemon
) -> None:
    """7"""
    relay.signal(signal.SIGSTOP)
    agent.says("was silent")
    relay.signal(signal.SIGCONT)
    is_served(relay)


@takes_its_time
@pytest.mark.parametrize("who", ["agent", "relay"])
def test_who_is_told_to_end_finishes_what_it_has_begun(
    relay: Daemon, agent: Daemon, who: str
) -> None:
    """17, 18"""
    ending = agent if who == "agent" else relay
    with stream(relay, "word " * 20, delay_ms=50) as answer:
        first_word(answer)
        ending.signal(signal.SIGTERM)
        *_, last = lines_of(answer)
        assert last == b"data: [DONE]"
    assert ending.process is not None
    assert ending.process.wait(PATIENCE) == 0
    assert "Traceback" not in relay.words + agent.words


@takes_its_time
def test_what_lasts_longer_than_the_drain_gets_an_error(
    relay: Daemon, agent: Daemon
) -> None:
    """17: and the daemon ends within its time."""
    with stream(relay, "word " * 1000, delay_ms=50) as answer:
        first_word(answer)
        began = time.monotonic()
        agent.signal(signal.SIGTERM)
        rest = answer.read()
        assert b'"error"' in rest and b"[DONE]" not in rest
        assert time.monotonic() - began < 10
    assert agent.process is not None
    assert agent.process.wait(PATIENCE) == 0


@takes_its_time
def test_an_idle_agent_ends_within_a_second_or_two(
    relay: Daemon, agent: Daemon
) -> None:
    assert agent.process is not None
    began = time.monotonic()
    agent.signal(signal.SIGTERM)
    assert agent.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 2.5
    relay.says("drains")


# --- proxies and certificates ----------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("far")


@pytest.fixture(scope="module")
def certificate(folder: Path) -> Path:
    return made_certificate(folder / "good")


def made_certificate(home: Path, name: str = "localhost", *, kind: str = "DNS") -> Path:
    """One file with a self-signed chain and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    home.mkdir()
    chain, key = home / "chain.pem", home / "key.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-nodes"),
        *("-pkeyopt", "ec_paramgen_curve:P-256", "-subj", f"/CN={name}"),
        *("-addext", f"subjectAltName={kind}:{name}"),
        *("-keyout", str(key), "-out", str(chain), "-days", "2"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return joined(home)


def joined(home: Path) -> Path:
    both = home / "both.pem"
    both.write_text((home / "chain.pem").read_text() + (home / "key.pem").read_text())
    return both


def expired_certificate(home: Path) -> Path:
    """One that was good for a day in 2020. (``openssl req`` makes none like that.)"""
    made_certificate(home)
    (home / "index.txt").touch()
    (home / "serial").write_text("01\n")
    (home / "ca.conf").write_text(
        "[ca]\ndefault_ca=x\n[x]\ndatabase=index.txt\nserial=serial\n"
        "new_certs_dir=.\ndefault_md=sha256\npolicy=p\nx509_extensions=e\n"
        "[p]\ncommonName=supplied\n[e]\nsubjectAltName=DNS:localhost\n"
        "[req]\ndistinguished_name=d\n[d]\n"
    )
    subject = "openssl req -new -key key.pem -subj /CN=localhost -out c.csr"
    sign = (
        "openssl ca -batch -config ca.conf -selfsign -keyfile key.pem -in c.csr "
        "-out chain.pem -notext -startdate 20200101000000Z -enddate 20200102000000Z"
    )
    for command in (f"{subject} -config ca.conf", sign):
        subprocess.run(
            command.split(), check=True, capture_output=True, timeout=60, cwd=home
        )
    return joined(home)


@contextlib.contextmanager
def in_front(
    name: str,
    relay: Daemon,
    home: Path,
    certificate: Path,
    change: Callable[[str], str] = lambda text: text,
    *,
    waits: bool = True,
) -> Iterator[tuple[Proxied, Process]]:
    """A proxy with its sample configuration, perhaps changed.

    ``waits``: until it passes requests on, which takes a good certificate.
    """
    path = "/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin"
    program = shutil.which(name, path=path)
    if program is None:
        pytest.skip(f"no {name} here (apt-get install nginx-light caddy haproxy)")
    home.mkdir()
    home.chmod(0o755)
    ports = Ports(free_port(), free_port(), relay.port)
    command = [program, *PROXIES[name](home, ports, certificate)[1:]]
    for file in (home / "inferencia.conf",):
        if file.exists():
            file.write_text(change(file.read_text()))
    env = {"HOME": str(home), "XDG_DATA_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    context = ssl.create_default_context(cafile=str(certificate))
    headers = {"Authorization": f"Bearer {KEY}"}
    with Process(command, home / "log", env) as process:
        proxied = Proxied(ports.tls, headers, context, ports.plain)

        def is_up() -> bool:
            assert process.is_running, process.last_words()
            return not is_free(ports.tls)

        until(is_up, PATIENCE, f"{name} listens")
        if waits:
            is_serving = lambda: proxied.get("/health").status == 200  # noqa: E731
            until(is_serving, PATIENCE, f"{name} serves")
        yield proxied, process


@takes_its_time
@pytest.mark.parametrize("name", list(PROXIES))
def test_an_agent_dials_through_a_proxy_and_clients_come_through_it_too(
    name: str, relay: Daemon, tmp_path: Path, certificate: Path
) -> None:
    """19, 20, 1, 2"""
    with in_front(name, relay, tmp_path / name, certificate) as (proxied, _):
        url = f"https://localhost:{proxied.port}"
        with agent_at(tmp_path / "agent", url, certificate).running() as agent:
            is_served(relay)
            # After its first word the model is silent: nothing can push it out.
            with stream(proxied, "one two three", silence=1) as answer:
                assert first_word(answer) == "one"
            until(lambda: agent.busy("echo") == 0, 5, "the client's leaving came")
            with stream(proxied, "word ", repeat=500, event_bytes=4096) as answer:
                *_, last = lines_of(answer)
                assert last == b"data: [DONE]"


@takes_its_time
def test_nginx_without_its_recipe_is_explained(
    relay: Daemon, tmp_path: Path, certificate: Path
) -> None:
    """19"""

    def strip(text: str) -> str:
        return replaced(text, (r"proxy_set_header Upgrade \$http_upgrade;", ""))

    with in_front("nginx", relay, tmp_path / "nginx", certificate, strip) as (far, _):
        url = f"https://localhost:{far.port}"
        with agent_at(tmp_path / "agent", url, certificate).running() as agent:
            agent.says("no Upgrade header arrived")


@takes_its_time
def test_short_timeouts_and_a_reload_of_nginx_cut_nothing(
    relay: Daemon, tmp_path: Path, certificate: Path
) -> None:
    """19, 27"""

    def hurry(text: str) -> str:
        return replaced(
            text,
            (r"proxy_read_timeout \w+;", "proxy_read_timeout 2s;"),
            (r"proxy_send_timeout \w+;", "proxy_send_timeout 2s;"),
        )

    home = tmp_path / "nginx"
    with in_front("nginx", relay, home, certificate, hurry) as (proxied, process):
        url = f"https://localhost:{proxied.port}"
        with agent_at(tmp_path / "agent", url, certificate).running() as agent:
            is_served(relay)
            with stream(proxied, "a b", delay_ms=4000) as answer:  # past the timeout
                assert first_word(answer) == "a"
                assert [line for line in lines_of(answer)][-1] == b"data: [DONE]"
            with stream(relay, "word " * 40, delay_ms=50) as answer:
                first_word(answer)
                process.signal(signal.SIGHUP)
                *_, last = lines_of(answer)
                assert last == b"data: [DONE]"
            assert agent.words.count("connected as gpu-home") >= 1


@takes_its_time
@pytest.mark.parametrize(
    "case", ["another name", "expired", "no authority", "another authority"]
)
def test_a_certificate_that_is_not_the_relays_is_refused(
    case: str, relay: Daemon, tmp_path: Path, certificate: Path
) -> None:
    """20"""
    shown, ca_file = certificate, certificate
    if case == "another name":
        shown = ca_file = made_certificate(tmp_path / "other", "relay.example.com")
    elif case == "expired":
        shown = ca_file = expired_certificate(tmp_path / "old")
    elif case == "another authority":
        ca_file = made_certificate(tmp_path / "other")
    home = tmp_path / "nginx"
    with in_front("nginx", relay, home, shown, waits=False) as (proxied, _):
        url = f"https://localhost:{proxied.port}"
        trusted = None if case == "no authority" else ca_file
        with agent_at(tmp_path / "agent", url, trusted).running() as agent:
            agent.says("its certificate is not trusted")
            assert "gpu-home" not in relay.words.replace("name=gpu-home", "")


# --- a real engine ---------------------------------------------------------------


def test_a_real_engine_answers_through_the_tunnel(
    llama: Engine, relay: Daemon, tmp_path: Path
) -> None:
    keys = relay.log.parent / "keys.txt"
    keys.write_text(keys.read_text().replace("models=echo", "models=*"))
    dial = {"relays": [relay.url], "token": TOKEN}
    config = (
        f"tunnel: {json.dumps({'dial': dial, 'beat': BEAT})}\n"
        f"backends: [{{name: llama, type: llamacpp, url: '{llama.url}'}}]\n"
    )
    with daemon(tmp_path / "agent", config).running():
        until(
            lambda: "gemma-270m" in relay.get("/v1/models").body.decode(),
            PATIENCE,
            "the relay lists the model",
        )
        body = {
            "model": "gemma-270m",
            "messages": [{"role": "user", "content": "Say hello."}],
            "max_tokens": 16,
            "temperature": 0,
        }
        whole = relay.post(CHAT, body).json()
        streamed = relay.post(CHAT, body | {"stream": True}).chunks()
        said = "".join(
            choice["delta"].get("content") or ""
            for chunk in streamed
            for choice in chunk["choices"]
        )
        assert said == whole["choices"][0]["message"]["content"] != ""
        assert whole["usage"]["completion_tokens"] > 0


# --- a network of its own --------------------------------------------------------


class Wire:
    """A network namespace with one cable to this machine."""

    def __init__(self) -> None:
        number = os.getpid() % 250
        self.name = f"inferencia-{os.getpid()}"
        self.here, self.there = f"if{os.getpid()}a", f"if{os.getpid()}b"
        self.address = f"10.213.{number}.1"  # of this end
        self.far = f"10.213.{number}.2"

    def ip(self, *arguments: str) -> None:
        command = ["ip", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def inside(self, *arguments: str) -> None:
        self.ip("-n", self.name, *arguments)

    def __enter__(self) -> "Wire":
        try:
            self.ip("netns", "add", self.name)
            self.ip(
                *("link", "add", self.here, "type", "veth", "peer", self.there),
                *("netns", self.name),
            )
            self.ip("addr", "add", f"{self.address}/24", "dev", self.here)
            self.ip("link", "set", self.here, "up")
            self.inside("addr", "add", f"{self.far}/24", "dev", self.there)
            self.inside("link", "set", self.there, "up")
            self.inside("link", "set", "lo", "up")
        except OSError as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error}")
        return self

    def __exit__(self, *_: object) -> None:
        for command in (("link", "del", self.here), ("netns", "del", self.name)):
            with contextlib.suppress(OSError):
                self.ip(*command)

    def cut(self) -> None:
        """Packets vanish from now on; nobody is told."""
        self.inside("link", "set", self.there, "down")

    def mend(self) -> None:
        self.inside("link", "set", self.there, "up")

    def move(self) -> None:
        """Give the far end another address, as a router does that dialed anew."""
        self.inside("addr", "flush", "dev", self.there)
        far = self.far.rpartition(".")[0] + ".77"
        self.inside("addr", "add", f"{far}/24", "dev", self.there)


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[tuple[Wire, Proxied, Process]]:
    """A relay here, with TLS of its own, and an agent behind a cable."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and iproute2")
    with Wire() as wire:
        certificate = made_certificate(tmp_path / "tls", wire.address, kind="IP")
        relay = relay_at(tmp_path / "relay")
        config = (tmp_path / "relay" / "config.yaml").read_text()
        tls = f"host: 0.0.0.0, tls: {{cert: {certificate}, key: {certificate}}}"
        (tmp_path / "relay" / "config.yaml").write_text(
            config.replace("server: {", f"server: {{{tls}, ")
        )
        relay.begin()
        context = ssl.create_default_context(cafile=str(certificate))
        context.check_hostname = False
        headers = {"Authorization": f"Bearer {KEY}"}
        near = Near(relay.port, headers, context)
        agent = agent_at(
            tmp_path / "agent", f"https://{wire.address}:{relay.port}", certificate
        )
        command = ["ip", "netns", "exec", wire.name, *agent.command]
        try:
            with Process(command, agent.log, dict(agent.env)) as process:
                until(lambda: not is_free(relay.port), PATIENCE, "the relay listens")
                is_served(near)
                yield wire, near, process
        finally:
            relay.stop()


@dataclass(slots=True)
class Near(Proxied):
    """The relay by its own TLS."""

    def connect(self, timeout: float = PATIENCE) -> http.client.HTTPConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=timeout, context=self.context
        )


@takes_its_time
def test_a_cable_that_is_cut_is_noticed_and_what_is_mended_works(
    apart: tuple[Wire, Proxied, Process],
) -> None:
    """7, 31: dropped packets, and TLS of the relay's own."""
    wire, near, agent = apart
    with stream(near, "word " * 1000, delay_ms=50) as answer:
        first_word(answer)
        began = time.monotonic()
        wire.cut()
        rest = answer.read()
        assert b'"error"' in rest
        assert time.monotonic() - began < 3.5 * BEAT + 1
    assert near.request("POST", CHAT, chat("hello")).status == 503
    wire.mend()
    is_served(near)
    assert agent.is_running


@takes_its_time
def test_an_agent_with_another_address_is_back_soon(
    apart: tuple[Wire, Proxied, Process],
) -> None:
    """31"""
    wire, near, _ = apart
    began = time.monotonic()
    wire.move()
    # (Until then a request may be sent where nobody is any more.)
    time.sleep(0.1)
    is_served(near)
    assert time.monotonic() - began < 2.5 * BEAT + 4
