"""OpenAI's own clients, for Python and for Node, against the gateway."""

import subprocess
from pathlib import Path

import pytest

from conftest import USER_KEY
from engines.real import Engine, Installed, until

pytestmark = pytest.mark.e2e

ENGINES = Path(__file__).resolve().parent / "engines"


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all is well\n"


@pytest.fixture(scope="session")
def node(installed: Installed) -> list[str]:
    """The command that runs our script with OpenAI's client for Node."""
    if installed.node is None:
        pytest.skip("no node on PATH")
    folder = installed.folder / "node"
    if not (folder / "node_modules" / "openai").is_dir():
        pytest.skip(f"no openai package in {folder}")
    return [installed.node, str(ENGINES / "openai_node.mjs"), str(folder)]


def test_openais_python_client_works(gateway: Engine, installed: Installed) -> None:
    if not installed.has_package("openai"):
        pytest.skip(f"no openai package in {installed.folder}")
    script = str(ENGINES / "openai_python.py")
    run([str(installed.python), script, f"{gateway.url}/v1", USER_KEY])


def test_openais_node_client_works(gateway: Engine, node: list[str]) -> None:
    run([*node, f"{gateway.url}/v1", USER_KEY, "all"])


def test_a_node_client_that_breaks_out_of_a_stream_ends_the_engines_work(
    gateway: Engine, llama: Engine, node: list[str]
) -> None:
    until(lambda: llama.busy_slots() == 0, 30, "earlier work is done")
    command = [*node, f"{gateway.url}/v1", USER_KEY, "leave"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "left\n"
        until(lambda: llama.busy_slots() == 0, 1.0, "the slot is free")
        child.communicate()
    assert child.returncode == 0
