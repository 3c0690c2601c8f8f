"""The sample files in ``deploy/`` in front of a real gateway, in the real programs.

nginx, Caddy and HAProxy come from Debian (``apt-get install nginx-light caddy
haproxy``); what is missing is skipped, and without ``INFERENCIA_E2E_DIR`` all of this.
Of a sample only names, ports and the place of the certificate are replaced.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
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

# Words at a speaker's pace, silences, drains: too long to wait for at every change.
takes_its_time = pytest.mark.skipif(
    not os.environ.get("INFERENCIA_E2E_DIR"),
    reason="INFERENCIA_E2E_DIR is not set (.ci/run sets it)",
)
pytestmark = [pytest.mark.e2e, takes_its_time]

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
KEY = "sk-proxies-7c1e90b2d5f3a8"
METRICS_KEY = "sk-proxies-metrics-51d0c3"
CHAT = "/v1/chat/completions"
PATIENCE = 15.0

CONFIG = """
server:
  trusted_proxies: [127.0.0.1, "::1"]
  shutdown_timeout: 2s
  sse_keepalive: 200ms
auth: {keys_file: keys.txt}
ratelimit: {requests_per_second: 1000, burst: 1000}
log: {level: info, format: json}
"""


@pytest.fixture(autouse=True)
def engine_address() -> None:
    """These tests need no language model, unlike the rest of the set."""


@dataclass(slots=True)
class Gateway(Engine):
    """A real ``inferencia --demo``."""

    def lines(self) -> list[dict[str, Any]]:
        """The log lines of requests so far."""
        found = []
        for line in self.log.read_text().splitlines():
            if line.startswith("{") and '"msg": "request"' in line:
                found.append(json.loads(line))
        return found

    def line_of(self, request_id: str) -> dict[str, Any]:
        """The log line of one request, once it is over."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [line for line in self.lines() if line["id"] == request_id]
            return bool(found)

        until(is_there, PATIENCE, f"the log has a line for {request_id}")
        return found[0]


@dataclass(slots=True)
class Proxied(Server):
    """The gateway as clients see it, through a proxy."""

    context: ssl.SSLContext | None = None
    plain_port: int = 0  # where plain HTTP is sent away

    def connect(self, timeout: float = PATIENCE) -> http.client.HTTPConnection:
        return http.client.HTTPSConnection(
            "localhost", self.port, timeout=timeout, context=self.context
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proxies")


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Gateway]:
    port = free_port()
    home = folder / "gateway"
    home.mkdir()
    keys = home / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text(f"{KEY} name=alice\n{METRICS_KEY} name=prom role=metrics\n")
    (home / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "inferencia", "serve", "--demo"]
    command += ["-c", str(home / "config.yaml"), "--port", str(port)]
    with Gateway(port, command=command, log=home / "log").running() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def certificate(folder: Path) -> Path:
    """One file with the chain and the key, for ``localhost``."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    chain, key = folder / "chain.pem", folder / "key.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-keyout", str(key), "-out", str(chain)]
    command = ["openssl", "req", "-x509", *kind, "-days", "2", *name, *files]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    both = folder / "both.pem"
    both.write_text(chain.read_text() + key.read_text())
    return both


@dataclass(frozen=True, slots=True)
class Ports:
    """What is put in place of 80, 443 and 8080."""

    plain: int
    tls: int
    gateway: int


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """Replace each pattern; one that is not there any more is a mistake here."""
    for pattern, new in pairs:
        text, count = re.subn(pattern, lambda match, new=new: new, text)  # type: ignore[misc]
        assert count, f"the sample has no {pattern}"
    return text


def nginx(folder: Path, ports: Ports, certificate: Path) -> list[str]:
    sample = replaced(
        (DEPLOY / "nginx.conf").read_text(),
        (r"listen \[::\]:\d+( ssl)?;\n", "\n"),  # a test machine may have no IPv6
        (r"listen 80;", f"listen {ports.plain};"),
        (r"listen 443 ssl;", f"listen {ports.tls} ssl;"),
        (r"127\.0\.0\.1:8080", f"127.0.0.1:{ports.gateway}"),
        (r"/etc/letsencrypt/live/llm\.example\.com/\w+\.pem", str(certificate)),
        (r"llm\.example\.com", "localhost"),
    )
    (folder / "inferencia.conf").write_text(sample)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = folder / "nginx.conf"
    main.write_text(
        f"daemon off; master_process off; worker_processes 1; pid {folder}/pid;\n"
        "error_log stderr; events {}\n"
        f"http {{ access_log off; {paths} include {folder}/inferencia.conf; }}\n"
    )
    return ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(main)]


def caddy(folder: Path, ports: Ports, certificate: Path) -> list[str]:
    sample = replaced(
        (DEPLOY / "Caddyfile").read_text(),
        (
            r"(?m)^llm\.example\.com \{",
            f"localhost {{\n\ttls {certificate} {certificate}",
        ),
        (r"127\.0\.0\.1:8080", f"127.0.0.1:{ports.gateway}"),
    )
    options = f"http_port {ports.plain}\nhttps_port {ports.tls}\nadmin off\n"
    path = folder / "Caddyfile"
    path.write_text(f"{{\n{options}skip_install_trust\n}}\n{sample}")
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(path)]


def haproxy(folder: Path, ports: Ports, certificate: Path) -> list[str]:
    sample = replaced(
        (DEPLOY / "haproxy.cfg").read_text(),
        (r"bind :80\b", f"bind :{ports.plain}"),
        (r"bind :443\b", f"bind :{ports.tls}"),
        (r"127\.0\.0\.1:8080", f"127.0.0.1:{ports.gateway}"),
        (r"/etc/haproxy/certs/llm\.example\.com\.pem", str(certificate)),
    )
    path = folder / "haproxy.cfg"
    path.write_text(sample)
    return ["haproxy", "-db", "-f", str(path)]


PROXIES: dict[str, Callable[[Path, Ports, Path], list[str]]] = {
    "nginx": nginx,
    "caddy": caddy,
    "haproxy": haproxy,
}


@pytest.fixture(scope="module", params=list(PROXIES))
def proxied(
    request: pytest.FixtureRequest, gateway: Gateway, certificate: Path, folder: Path
) -> Iterator[Proxied]:
    """The gateway through one of the proxies."""
    name = request.param
    program = shutil.which(
        name, path="/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin"
    )
    if program is None:
        pytest.skip(f"no {name} here (apt-get install nginx-light caddy haproxy)")
    home = folder / name
    home.mkdir()
    home.chmod(0o755)
    ports = Ports(free_port(), free_port(), gateway.port)
    command = [program, *PROXIES[name](home, ports, certificate)[1:]]
    env = {"HOME": str(home), "XDG_DATA_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    context = ssl.create_default_context(cafile=str(certificate))
    headers = {"Authorization": f"Bearer {KEY}"}
    with Process(command, home / "log", env) as process:

        def is_up() -> bool:
            assert process.is_running, process.last_words()
            return not is_free(ports.tls) and not is_free(ports.plain)

        until(is_up, PATIENCE, f"{name} listens")
        proxied = Proxied(ports.tls, headers, context, ports.plain)
        # HAProxy first wants to see by itself that the gateway is alive.
        until(lambda: proxied.get("/health").status == 200, PATIENCE, f"{name} serves")
        yield proxied


def chat(words: str, **echo: Any) -> bytes:
    message = {"role": "user", "content": words}
    body = {"model": "echo", "messages": [message], "stream": True, "echo": echo}
    return json.dumps(body).encode()


@contextlib.contextmanager
def streaming(proxied: Proxied, body: bytes) -> Iterator[http.client.HTTPResponse]:
    """A stream that has begun; leaving the context hangs up."""
    connection = proxied.send("POST", CHAT, body)
    with contextlib.closing(connection):
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        yield answer


def lines_of(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    while line := answer.readline():
        if line.strip():
            yield line.strip()


def words_in(event: bytes) -> str:
    choices = json.loads(event.removeprefix(b"data: "))["choices"]
    return str(choices[0]["delta"].get("content") or "") if choices else ""


def test_plain_http_is_sent_to_https(proxied: Proxied) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxied.plain_port, timeout=9)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models?x=1", headers={"Host": "localhost"})
        answer = connection.getresponse()
        assert answer.status in (301, 308)
        location = answer.headers["Location"]
        assert re.fullmatch(r"https://localhost(:\d+)?/v1/models\?x=1", location)


def test_an_event_comes_before_the_next_one_is_made(proxied: Proxied) -> None:
    """After its first word the model is silent for ever: nothing can push it out."""
    with streaming(proxied, chat("one two three", silence=1)) as answer:
        events = (line for line in lines_of(answer) if line.startswith(b"data:"))
        assert any(words_in(event) == "one" for event in events)


def test_words_come_at_the_pace_at_which_they_are_said(proxied: Proxied) -> None:
    with streaming(proxied, chat("a b c d", delay_ms=300)) as answer:
        times = {}
        for line in lines_of(answer):
            if line.startswith(b"data: {") and (word := words_in(line).strip()):
                times[word] = time.monotonic()
        assert list(times) == ["a", "b", "c", "d"]
        assert line == b"data: [DONE]"
    # Three pauses lie between; all at once it would be next to nothing.
    assert times["d"] - times["a"] > 0.6


def test_comments_come_through_while_the_engine_is_silent(proxied: Proxied) -> None:
    with streaming(proxied, chat("hello", silence=True)) as answer:
        comments = 0
        for line in lines_of(answer):
            comments += line.startswith(b":")
            if comments == 3:
                break
        assert comments == 3


def test_a_client_that_leaves_a_stream_ends_the_work(
    proxied: Proxied, gateway: Gateway
) -> None:
    body = chat("word " * 1000, delay_ms=20)
    with streaming(proxied, body) as answer:
        request_id = answer.headers["X-Request-Id"]
        assert answer.readline().startswith((b"data:", b":"))
    started = time.monotonic()
    line = gateway.line_of(request_id)
    assert line["status"] in (200, 499)
    assert line["completion_tokens"] is None or line["completion_tokens"] < 1000
    assert time.monotonic() - started < 15  # the whole answer takes 20 s


def test_a_client_that_leaves_before_the_answer_ends_the_work(
    proxied: Proxied, gateway: Gateway
) -> None:
    """Nothing is ever written, so the proxy must notice by itself that it is alone."""
    body = json.dumps(
        {
            "model": "echo",
            "messages": [{"role": "user", "content": "hello"}],
            "echo": {"head_delay_ms": 600_000},
        }
    ).encode()
    connection = proxied.send("POST", CHAT, body, X_Request_Id=f"gone-{proxied.port}")
    until(lambda: in_flight(gateway) == 1, PATIENCE, "the gateway has the request")
    connection.close()
    until(lambda: in_flight(gateway) == 0, PATIENCE, "the gateway has let it go")
    assert gateway.line_of(f"gone-{proxied.port}")["status"] == 499


def in_flight(gateway: Gateway) -> int:
    """What the model is working on, told by the gateway itself."""
    text = gateway.get("/metrics", Authorization=f"Bearer {METRICS_KEY}").body.decode()
    (value,) = re.findall(
        r'^inferencia_backend_requests_in_flight\{backend="echo"\} (\d+)', text, re.M
    )
    return int(value)


def test_errors_come_through_as_they_are(proxied: Proxied) -> None:
    stranger = proxied.get("/v1/models", Authorization="Bearer sk-nobody-0123456789")
    assert stranger.status == 401
    assert stranger.json()["error"]["code"] == "invalid_api_key"
    assert stranger.headers["X-Request-Id"]
    unknown = proxied.get("/v1/nothing")
    assert unknown.status == 404
    assert unknown.json()["error"]["code"] == "not_found"
    busy = chat("hello", status=503, error_type="server_error")
    refused = proxied.request("POST", CHAT, busy)
    assert refused.status == 503
    assert refused.json()["error"]["type"] == "server_error"


def test_an_error_in_the_middle_of_a_stream_comes_through(proxied: Proxied) -> None:
    with streaming(proxied, chat("a b c d e", fail_after=2)) as answer:
        lines = list(lines_of(answer))
    assert any(words_in(line) == "a" for line in lines if line.startswith(b"data: {"))
    assert b'"error"' in lines[-1]
    assert b"data: [DONE]" not in lines


def test_a_body_of_twenty_megabytes_passes(proxied: Proxied) -> None:
    body = json.dumps(
        {
            "model": "echo",
            "messages": [{"role": "user", "content": "hello"}],
            "padding": "x" * 20_000_000,
        }
    ).encode()
    reply = proxied.request("POST", CHAT, body)
    assert reply.status == 200, reply.body[:300]
    assert reply.json()["choices"][0]["message"]["content"] == "hello"


def test_a_long_stream_arrives_whole(proxied: Proxied) -> None:
    body = chat("word ", repeat=2000, event_bytes=4096)
    with streaming(proxied, body) as answer:
        *events, last = lines_of(answer)
    assert last == b"data: [DONE]"
    said = "".join(words_in(event) for event in events if event.startswith(b"data:"))
    assert said == "word " * 2000


def test_a_client_cannot_make_up_its_address(
    proxied: Proxied, gateway: Gateway
) -> None:
    spoofed = {
        "X-Forwarded-For": "203.0.113.7",
        "CF-Connecting-IP": "203.0.113.8",
        "X-Request-Id": f"spoofed-{proxied.port}",
    }
    assert proxied.get("/v1/models", **spoofed).status == 200
    line = gateway.line_of(f"spoofed-{proxied.port}")
    assert line["client"] in ("127.0.0.1", "::1")


def test_the_key_reaches_no_log_of_the_proxy(
    proxied: Proxied, folder: Path, gateway: Gateway
) -> None:
    assert proxied.get("/v1/models").status == 200
    logs = [path for path in folder.glob("*/log") if KEY in path.read_text()]
    assert logs == []
