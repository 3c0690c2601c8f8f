"""TLS through a relay that cannot read it, between real daemons, asked by real curl."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from certificates import make_pair
from engines.real import free_port, is_free, until
from test_proxies import chat, takes_its_time
from test_tunnel_processes import (
    BEAT,
    CHAT,
    KEY,
    PATIENCE,
    TOKEN,
    Daemon,
    daemon,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here"),
]

GPU = "gpu1.example.com"
CANARY = "canary-77c0ffee"


@pytest.fixture(autouse=True)
def engine_address() -> None:
    """These tests need no language model, unlike the rest of the set."""


@dataclass(slots=True)
class Way:
    """A relay, an agent that ends TLS, and the way to it from outside."""

    relay: Daemon
    agent: Daemon
    port: int
    cert: Path

    def curl(self, words: str, *further: str, **echo: object) -> subprocess.Popen[str]:
        command = [
            *(
                "curl",
                "-sS",
                "-N",
                "-i",
                "--cacert",
                str(self.cert),
                "--max-time",
                "60",
            ),
            *("--resolve", f"{GPU}:{self.port}:127.0.0.1"),
            *("-H", f"Authorization: Bearer {KEY}", "-d", chat(words, **echo).decode()),
            f"https://{GPU}:{self.port}{CHAT}",
            *further,
        ]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    @contextlib.contextmanager
    def stream(self, words: str) -> Iterator[subprocess.Popen[str]]:
        """A stream that has begun; leaving the context hangs up."""
        with self.curl(words, delay_ms=50) as asking:
            try:
                assert asking.stdout is not None
                for line in asking.stdout:
                    if "content" in line and "data: {" in line:
                        break
                yield asking
            finally:
                asking.kill()

    def says(self, words: str) -> str:
        """The whole answer to some words."""
        with self.curl(words) as asking:
            said, error = asking.communicate(timeout=PATIENCE)
            assert asking.returncode == 0, error + self.relay.words + self.agent.words
        return said


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("tls"), GPU)


def relay_at(home: Path, port: int, number: int = 0) -> Daemon:
    accept = {"enabled": True, "passthrough": f":{port}"}
    tunnel = json.dumps({"accept": accept, "beat": BEAT})
    nothing = "backends: [{name: nothing, url: 'http://127.0.0.1:9'}]\n"
    made = daemon(home, f"{nothing}tunnel: {tunnel}\n", port=number)
    made.headers = {}  # else it would get the key, whenever it is asked for its health
    keys = home / "keys.txt"
    keys.write_text(
        f"sk-of-the-relay-0d1f5a name=bob\n{TOKEN} name=gpu-home role=agent "
        f"models=echo,host:{GPU}\n"
    )
    return made


@pytest.fixture
def way(tmp_path: Path, pair: tuple[Path, Path]) -> Iterator[Way]:
    with built(tmp_path, pair) as way:
        yield way


@pytest.fixture(scope="module")
def shared_way(
    tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, Path]
) -> Iterator[Way]:
    """For those who leave it as it was."""
    with built(tmp_path_factory.mktemp("shared"), pair) as way:
        yield way


@contextlib.contextmanager
def built(folder: Path, pair: tuple[Path, Path]) -> Iterator[Way]:
    cert, key = pair
    port = free_port()
    with relay_at(folder / "relay", port).running() as relay:
        passthrough = {GPU: {"cert": str(cert), "key": str(key)}}
        dial = {"relays": [relay.url], "token": TOKEN, "passthrough": passthrough}
        tunnel = json.dumps({"dial": dial, "beat": BEAT})
        agent = daemon(folder / "agent", f"tunnel: {tunnel}\n", "--demo")
        with agent.running():
            way = Way(relay, agent, port, cert)
            agent.says("connected as gpu-home")
            yield way


def memory_of(daemon: Daemon) -> bytes:
    """All that a process may write to, as far as it lets itself be read."""
    assert daemon.process is not None
    number = daemon.process._child.pid
    found = []
    try:
        with open(f"/proc/{number}/mem", "rb", buffering=0) as memory:
            for line in Path(f"/proc/{number}/maps").read_text().splitlines():
                place = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                if place is None:
                    continue
                begin, end = (int(one, 16) for one in place.groups())
                with contextlib.suppress(OSError):
                    memory.seek(begin)
                    found.append(memory.read(end - begin))
    except PermissionError:
        pytest.skip("this system does not let a process read its child's memory")
    return b"".join(found)


def resident_bytes(daemon: Daemon) -> int:
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process._child.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def test_curl_gets_a_stream_by_the_name_of_the_machine_at_home(shared_way: Way) -> None:
    said = shared_way.says("one two three")
    assert said.startswith("HTTP/1.1 200")
    assert "data: [DONE]" in said
    shared_way.relay.says(f"TLS for {GPU} passed through")
    shared_way.agent.says('"client": "127.0.0.1 by 127.0.0.1:')
    assert f'"path": "{CHAT}"' in shared_way.agent.words
    assert f'"path": "{CHAT}"' not in shared_way.relay.words
    assert "Traceback" not in shared_way.relay.words + shared_way.agent.words


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_neither_words_nor_keys_are_in_the_relays_memory(shared_way: Way) -> None:
    with shared_way.stream(f"{CANARY} " * 200):
        seen_at_home = memory_of(shared_way.agent)
        seen_by_relay = memory_of(shared_way.relay)
    # (What is looked for could be found, if it were there.)
    assert CANARY.encode() in seen_at_home and KEY.encode() in seen_at_home
    assert GPU.encode() in seen_by_relay
    assert CANARY.encode() not in seen_by_relay
    assert KEY.encode() not in seen_by_relay
    assert CANARY not in shared_way.relay.words


@takes_its_time
def test_who_hangs_up_ends_the_work_at_home(way: Way) -> None:
    with way.stream("word " * 1000):
        assert way.agent.busy("echo") == 1
    until(lambda: way.agent.busy("echo") == 0, 1, "the model has stopped")


@takes_its_time
def test_an_agent_that_is_killed_ends_its_clients_connections(way: Way) -> None:
    with way.stream("word " * 1000) as asking:
        began = time.monotonic()
        way.agent.signal(signal.SIGKILL)
        asking.communicate(timeout=PATIENCE)
        assert time.monotonic() - began < 2
        assert asking.returncode != 0
    with way.curl("hello") as asking:
        _, error = asking.communicate(timeout=PATIENCE)
        assert asking.returncode == 35, error  # the handshake failed
        assert "unrecognized name" in error.lower()


@takes_its_time
def test_a_relay_that_is_killed_ends_the_work_at_home(way: Way) -> None:
    with way.stream("word " * 1000):
        way.relay.signal(signal.SIGKILL)
        until(lambda: way.agent.busy("echo") == 0, 2, "the model has stopped")
    way.relay.stop()
    again = relay_at(way.relay.log.parent, way.port, way.relay.port)
    with again.running():
        is_back = 'gpu-home\\" is connected'
        until(lambda: way.relay.words.count(is_back) > 1, PATIENCE, "it is back")
        began = time.monotonic()
        assert "data: [DONE]" in way.says("hello")
        # The dialing that failed while the relay was away delays nothing.
        assert time.monotonic() - began < 5


@takes_its_time
@pytest.mark.parametrize("who", ["agent", "relay"])
def test_who_is_told_to_end_finishes_what_it_has_begun(way: Way, who: str) -> None:
    ending = way.agent if who == "agent" else way.relay
    with way.stream("word " * 20) as asking:
        ending.signal(signal.SIGTERM)
        said, _ = asking.communicate(timeout=PATIENCE)
        assert "data: [DONE]" in said
    assert ending.process is not None
    assert ending.process.wait(PATIENCE) == 0
    assert "Traceback" not in way.relay.words + way.agent.words


@takes_its_time
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_slow_client_and_a_large_upload_leave_the_memory_flat(way: Way) -> None:
    way.says("hello")
    before = resident_bytes(way.relay)
    words = way.cert.parent / "words.json"
    body = json.loads(chat("x" * 7_000_000)) | {"metadata": {"pad": "y" * 13_000_000}}
    words.write_text(json.dumps(body))
    command = [
        "curl",
        "-sS",
        "-N",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} %{size_download}",
    ]
    command += ["--cacert", str(way.cert), "--limit-rate", "4M", "-d", f"@{words}"]
    command += ["--resolve", f"{GPU}:{way.port}:127.0.0.1"]
    command += ["-H", f"Authorization: Bearer {KEY}"]
    command += [f"https://{GPU}:{way.port}{CHAT}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        most = before
        while asking.poll() is None:
            most = max(most, resident_bytes(way.relay))
            time.sleep(0.05)
        assert asking.stdout is not None
        status, size = asking.stdout.read().split()
    assert (status, int(size) >= 7_000_000) == ("200", True)
    assert most - before < 12_000_000


@takes_its_time
def test_everything_is_closed_at_the_end(way: Way) -> None:
    way.says("hello")
    way.relay.stop()
    assert is_free(way.port)
