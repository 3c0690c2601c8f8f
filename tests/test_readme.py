"""README.md tells the truth: its commands, examples and tables are tried."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines.real import Engine, clean_environment, free_port
from inferencia import cli, errors

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

FIRST = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/inferencia"
SECOND = ".venv/bin/pip install '.[test]' && .venv/bin/pytest"


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_two_commands_run_it_and_test_it() -> None:
    assert f"{FIRST}\n" in code_blocks("sh")
    assert f"{SECOND}\n" in code_blocks("sh")


def test_ci_runs_the_test_command_that_stands_here() -> None:
    script = REPOSITORY / ".ci" / "common.sh"
    if not script.exists():
        pytest.skip("not a checkout")
    ask = f"source {script}; readme_command \"pip install '.[test]'\""
    found = subprocess.run(
        ["bash", "-euc", ask], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert found.stdout == f"{SECOND}\n", found.stderr


def test_the_error_codes_are_the_real_ones() -> None:
    named = set(re.findall(r"`([a-z_]+)`", section("Errors"))) - {"code"}
    known = {
        value.code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.ApiError)
    }
    assert named <= known


def run(folder: Path, *command: str) -> int:
    """Run a command with the configuration and the keys file in ``folder``."""
    (folder / "keys.txt").chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - clean_environment().keys():
            patch.delenv(name)
        patch.setenv("OPENAI_API_KEY", "sk-upstream-0f1e2d3c")
        return cli.main([*command, "-c", str(folder / "config.yaml")])


def test_the_example_configuration_passes_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example, *_ = code_blocks("yaml")
    (tmp_path / "config.yaml").write_text(example)
    (tmp_path / "keys.txt").write_text("sk-4b1f0c9a7d2e8f63 name=alice\n")
    assert run(tmp_path, "check") == 0
    said = "".join(capsys.readouterr())
    assert "sk-upstream" not in said
    assert "warning" not in said.lower()


def test_the_example_line_of_the_keys_file_is_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = code_blocks("text")
    (tmp_path / "config.yaml").write_text("auth: {keys_file: keys.txt}\n")
    (tmp_path / "keys.txt").write_text(line)
    assert run(tmp_path, "keys", "list") == 0
    listed = capsys.readouterr().out
    assert "alice" in listed and "sk-secret" not in listed


@dataclass(frozen=True, slots=True)
class Demo:
    """A first start: no configuration, a home of its own, the model ``echo``."""

    engine: Engine
    env: dict[str, str]

    def shell(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            timeout=30,
            env=self.env,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    home = tmp_path_factory.mktemp("home")
    port = free_port()
    command = [sys.executable, "-m", "inferencia", "serve", "--demo"]
    env = {name: v for name, v in clean_environment().items() if name[:4] != "XDG_"}
    env = {**env, "HOME": str(home), "PYTHONIOENCODING": "utf-8"}
    env.pop("STATE_DIRECTORY", None)
    engine = Engine(
        port,
        command=[*command, "--port", str(port)],
        log=home / "log",
        env={"HOME": str(home), "XDG_STATE_HOME": "", "STATE_DIRECTORY": ""},
    )
    with engine.running():
        yield Demo(engine, env)


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on PATH")


@needs_curl
def test_the_curl_line_streams_an_answer(demo: Demo) -> None:
    (block,) = [block for block in code_blocks("sh") if block.startswith("curl")]
    assert "127.0.0.1:8080/" in block
    answer = demo.shell(block.replace(":8080/", f":{demo.engine.port}/"))
    assert answer.count("data: ") > 2
    assert "Hello!" in answer
    assert answer.rstrip().endswith("data: [DONE]")


@needs_curl
def test_the_printed_curl_line_streams_an_answer(demo: Demo) -> None:
    printed = demo.engine.log.read_text(encoding="utf-8")
    (line,) = re.findall(r"curl -N .*", printed)
    answer = demo.shell(line)
    assert "Hello!" in answer
    assert answer.rstrip().endswith("data: [DONE]")


def test_the_key_is_made_for_its_owner_alone_and_never_printed(demo: Demo) -> None:
    state = Path(demo.env["HOME"]) / ".local" / "state" / "inferencia"
    for name in ("key", "admin-key"):
        assert (state / name).stat().st_mode & 0o777 == 0o600
        secret = (state / name).read_text().strip()
        assert secret and secret not in demo.engine.log.read_text()


def test_every_listed_path_is_there(demo: Demo) -> None:
    """A wrong method is refused by 405 only where there is a path."""
    rows = [row for row in section("Endpoints").splitlines() if row[:1] == "|"]
    table = "\n".join(rows)
    paths = re.findall(r"`(?:(?:GET|POST) )?(/[^`]*)`", table)
    assert len(paths) > 25
    key = (Path(demo.env["HOME"]) / ".local/state/inferencia/admin-key").read_text()
    headers = {"Authorization": f"Bearer {key.strip()}"}
    missing = [
        path
        for path in paths
        if demo.engine.request(
            "DELETE", path.replace("{id}", "echo"), None, **headers
        ).status
        != 405
    ]
    assert missing == []


def test_the_variables_named_here_are_read() -> None:
    """Each stands in the text of the configuration's module."""
    text = section("Configuration").partition("In the environment:")[2]
    names = re.findall(r"`([A-Z_]+)`", text.partition("So this")[0])
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in (REPOSITORY / "inferencia").glob("*.py")
    )
    assert names[0] == "INFERENCIA_"
    assert [name for name in names if name not in source] == []
