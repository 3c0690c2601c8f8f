"""A stranger's first minute: no configuration, a real engine, the printed line."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.real import (
    Engine,
    Installed,
    chat_engine,
    clean_environment,
    free_port,
    is_free,
    until,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on PATH"),
]

# Where a start without configuration looks for llama-server.
LOOKED_AT = (8081, 10240, 8000)


@pytest.fixture
def well_known(
    installed: Installed, llama_server: Path, tmp_path: Path
) -> Iterator[Engine]:
    """A llama-server at a port where it is looked for."""
    engine = chat_engine(installed, llama_server, tmp_path / "engine.log")
    port = next((port for port in LOOKED_AT if is_free(port)), None)
    if port is None:
        pytest.skip(f"the ports {LOOKED_AT} are taken")
    engine.command[engine.command.index(str(engine.port))] = str(port)
    engine.port = port
    with engine.running():
        yield engine


def test_a_start_without_configuration_serves_what_runs_here(
    well_known: Engine, tmp_path: Path
) -> None:
    port = free_port()
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": "", "XDG_CONFIG_HOME": ""}
    command = [sys.executable, "-m", "inferencia", "--port", str(port)]
    gateway = Engine(port, command=command, log=tmp_path / "out", env=home)
    with gateway.running():
        until(lambda: "curl -N " in printed(gateway), 15, "the line is printed")
        assert "gemma-270m" in printed(gateway)
        (line,) = re.findall(r"curl -N .*", printed(gateway))
        line = re.sub(r'"model":"[^"]*"', '"model":"gemma-270m"', line)
        # The model seldom stops by itself; what is read of it is enough.
        streamed = subprocess.run(
            ["bash", "-c", f"{line} | head -n 20"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**clean_environment(), **home},
        ).stdout
        assert streamed.count("data: {") >= 5, streamed
        assert '"delta":{"content":' in streamed
        until(lambda: well_known.busy_slots() == 0, 1.0, "curl's leaving ended it")


def printed(gateway: Engine) -> str:
    return gateway.log.read_text(encoding="utf-8")
