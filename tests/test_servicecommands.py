"""``inferencia service``, and the files that it writes, as systemd judges them."""

import argparse
import configparser
import os
import plistlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from inferencia import servicecommands
from inferencia.keycommands import BAD_USAGE, DONE, FAILED, Outcome
from inferencia.servicecommands import (
    SHIPPED_COMMAND,
    SHIPPED_PATH,
    Machine,
    Refused,
    is_untouched,
    plist_text,
    quoted,
    sealed,
    unit_text,
)
from inferencia.settings import ServerConfig

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = REPOSITORY / "inferencia.service"
DEPLOY = REPOSITORY / "deploy"

PYTHON = "/opt/inferencia/bin/python"
LINUX = Machine(
    platform="linux",
    is_root=False,
    python=Path(PYTHON),
    prefixes=(Path("/opt/inferencia"), Path("/usr")),
    is_installed=True,
)
ROOT = replace(LINUX, is_root=True)
MAC = replace(LINUX, platform="darwin")


class Place:
    """A home of one's own, and the command as it is typed there."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self.system_units = folder / "units"
        self.env = {"HOME": str(self.home)}
        self.user_unit = self.home / ".config/systemd/user/inferencia.service"
        self.system_unit = self.system_units / "inferencia.service"
        self.agent = self.home / "Library/LaunchAgents/local.inferencia.plist"

    def does(self, *words: str, machine: Machine = LINUX) -> Outcome:
        common = argparse.ArgumentParser(add_help=False)
        common.add_argument("-c", dest="config", type=Path, default=None)
        parser = argparse.ArgumentParser()
        servicecommands.register(parser.add_subparsers(), [common])
        options = parser.parse_args(["service", *words])
        there = replace(machine, system_units=self.system_units)
        return servicecommands.run(options, self.env, there)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)  # a config.yaml in the checkout is not what is meant
    return Place(tmp_path)


def exec_start(text: str) -> str:
    (line,) = [t for t in text.splitlines() if t.startswith("ExecStart=")]
    return line.removeprefix("ExecStart=")


# --- install ---------------------------------------------------------------------


def test_a_user_gets_a_unit_and_the_next_command(place: Place) -> None:
    outcome = place.does("install")
    assert outcome.code == DONE
    assert outcome.out == (
        "systemctl --user daemon-reload && systemctl --user enable --now inferencia\n"
    )
    assert str(place.user_unit) in outcome.err
    assert "enable-linger" in outcome.err
    text = place.user_unit.read_text()
    assert exec_start(text) == f"{PYTHON} -P -m inferencia serve"
    assert "WantedBy=default.target" in text
    assert place.user_unit.stat().st_mode & 0o777 == 0o644


def test_root_gets_the_machines_unit(place: Place) -> None:
    outcome = place.does("install", machine=ROOT)
    assert (
        outcome.out == "systemctl daemon-reload && systemctl enable --now inferencia\n"
    )
    text = place.system_unit.read_text()
    assert exec_start(text) == f"{PYTHON} -P -m inferencia serve"
    assert "DynamicUser=yes" in text


def test_root_may_ask_for_a_unit_of_its_own(place: Place) -> None:
    assert place.does("install", "--user", machine=ROOT).code == DONE
    assert place.user_unit.exists()


def test_a_mac_gets_an_agent(place: Place) -> None:
    outcome = place.does("install", machine=MAC)
    assert outcome.code == DONE
    assert outcome.out == f"launchctl bootstrap gui/$(id -u) {place.agent}\n"
    agent = plistlib.loads(place.agent.read_bytes())
    arguments = [PYTHON, "-P", "-m", "inferencia", "serve"]
    assert agent["ProgramArguments"] == arguments
    assert agent["StandardErrorPath"] == f"{place.home}/Library/Logs/inferencia.log"


def test_a_mac_has_no_service_of_the_machine(place: Place) -> None:
    outcome = place.does("install", "--system", machine=MAC)
    assert outcome.code == BAD_USAGE
    assert "agent" in outcome.err


def test_the_configuration_that_is_meant_here_is_meant_there(place: Place) -> None:
    Path("config.yaml").write_text("")
    expected = f"{PYTHON} -P -m inferencia serve -c {Path.cwd()}/config.yaml"
    assert exec_start(place.does("print").out) == expected
    assert exec_start(place.does("print", "-c", "config.yaml").out) == expected
    place.env["INFERENCIA_CONFIG"] = "/srv/other.yaml"
    assert exec_start(place.does("print").out).endswith("-c /srv/other.yaml")


def test_what_this_shell_sets_is_named_but_not_written(place: Place) -> None:
    place.env["INFERENCIA_API_KEYS"] = "sk-very-secret-0123456789"
    outcome = place.does("install")
    assert "INFERENCIA_API_KEYS" in outcome.err
    assert "sk-very" not in outcome.err + outcome.out + place.user_unit.read_text()


def test_xdg_config_home_is_honoured(place: Place, tmp_path: Path) -> None:
    place.env["XDG_CONFIG_HOME"] = str(tmp_path / "xdg")
    place.does("install")
    assert (tmp_path / "xdg/systemd/user/inferencia.service").exists()


def test_installing_again_changes_nothing(place: Place) -> None:
    place.does("install")
    before = place.user_unit.stat()
    outcome = place.does("install")
    assert outcome.code == DONE
    assert "up to date" in outcome.err
    assert place.user_unit.stat().st_ino == before.st_ino


def test_another_configuration_replaces_what_we_wrote(place: Place) -> None:
    place.does("install")
    outcome = place.does("install", "-c", "/srv/config.yaml")
    assert outcome.code == DONE
    assert "restart" in outcome.out
    assert exec_start(place.user_unit.read_text()).endswith("-c /srv/config.yaml")


@pytest.mark.parametrize("machine", [LINUX, MAC], ids=["systemd", "launchd"])
def test_what_somebody_changed_is_kept_without_force(
    place: Place, machine: Machine
) -> None:
    place.does("install", machine=machine)
    path = place.user_unit if machine is LINUX else place.agent
    changed = path.read_text().replace("90", "900")
    path.write_text(changed)
    for command in ("install", "uninstall"):
        refused = place.does(command, machine=machine)
        assert refused.code == FAILED
        assert "--force" in refused.err
        assert path.read_text() == changed
    assert place.does("install", "--force", machine=machine).code == DONE
    assert path.read_text() != changed


def test_a_unit_of_somebody_else_is_kept_without_force(place: Place) -> None:
    place.user_unit.parent.mkdir(parents=True)
    place.user_unit.write_text("[Service]\nExecStart=/usr/bin/true\n")
    assert place.does("install").code == FAILED
    assert place.does("uninstall").code == FAILED
    assert "usr/bin/true" in place.user_unit.read_text()
    assert place.does("uninstall", "--force").code == DONE
    assert not place.user_unit.exists()


# --- what would not start --------------------------------------------------------


def test_only_root_writes_the_machines_unit(place: Place) -> None:
    outcome = place.does("install", "--system")
    assert outcome.code == FAILED
    assert "root" in outcome.err
    assert not place.system_units.exists()


def test_sources_that_are_not_installed_are_no_service(place: Place) -> None:
    outcome = place.does("install", machine=replace(LINUX, is_installed=False))
    assert outcome.code == FAILED
    assert "pip install" in outcome.err
    assert not place.user_unit.exists()


def test_a_python_that_the_sandbox_hides_is_refused(place: Place) -> None:
    """A venv outside of home may still use a Python that pyenv keeps in there."""
    prefixes = (Path("/opt/inferencia"), Path("/root/.pyenv/versions/3.12"))
    machine = replace(ROOT, prefixes=prefixes)
    outcome = place.does("install", machine=machine)
    assert outcome.code == FAILED
    assert "/root/.pyenv/versions/3.12" in outcome.err
    assert place.does("install", "--user", machine=machine).code == DONE


def test_a_configuration_that_the_sandbox_hides_is_refused(place: Place) -> None:
    outcome = place.does("install", "-c", "/home/a/config.yaml", machine=ROOT)
    assert outcome.code == FAILED
    assert "/etc/inferencia/config.yaml" in outcome.err


def test_a_configuration_that_only_root_may_read_is_told(
    place: Place, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("")
    config.chmod(0o600)
    assert "cannot read" in place.does("print", "--system").err
    config.chmod(0o644)
    assert place.does("print", "--system").err == ""


def test_a_folder_that_cannot_be_made_is_a_failure_in_one_line(place: Place) -> None:
    (place.home / ".config").write_text("")
    outcome = place.does("install")
    assert outcome.code == FAILED
    assert outcome.err.count("\n") == 1


def test_this_python_is_described_as_it_is() -> None:
    machine = Machine.here()
    assert machine.python == Path(sys.executable)
    assert machine.platform == sys.platform
    assert machine.is_root == (os.geteuid() == 0)


# --- uninstall and print ---------------------------------------------------------


def test_uninstalling_leaves_nothing_behind(place: Place) -> None:
    place.does("install")
    link = place.user_unit.parent / "default.target.wants" / "inferencia.service"
    link.parent.mkdir()
    link.symlink_to(place.user_unit)  # as "systemctl enable" does
    outcome = place.does("uninstall")
    assert outcome.code == DONE
    assert outcome.out == (
        "systemctl --user stop inferencia; systemctl --user daemon-reload\n"
    )
    assert not place.user_unit.exists()
    assert not link.is_symlink()


def test_uninstalling_what_is_not_there_is_done(place: Place) -> None:
    outcome = place.does("uninstall")
    assert outcome.code == DONE
    assert "is not there" in outcome.err


def test_print_shows_and_writes_nothing(place: Place) -> None:
    outcome = place.does("print", "--system")
    assert outcome.code == DONE
    assert outcome.out.startswith("# inferencia as a service of the machine.")
    assert not place.system_units.exists()


def test_user_and_system_exclude_each_other(place: Place) -> None:
    with pytest.raises(SystemExit) as ended:
        place.does("print", "--user", "--system")
    assert ended.value.code == BAD_USAGE


# --- the texts -------------------------------------------------------------------


def test_the_shipped_unit_is_the_template() -> None:
    assert SHIPPED.read_text() == unit_text("system", SHIPPED_COMMAND, SHIPPED_PATH)


def test_the_shipped_agent_is_the_template() -> None:
    home = Path("/Users/YOU")
    command = [f"{home}/inferencia/.venv/bin/python", *"-P -m inferencia serve".split()]
    search = f"{home}/inferencia/.venv/bin:{servicecommands._MAC_PATH}"
    shipped = DEPLOY / "launchd" / "local.inferencia.plist"
    assert shipped.read_text() == plist_text(command, search, home)


def test_a_seal_breaks_with_any_change() -> None:
    for text in (SHIPPED.read_text(), plist_text(["a"], "/bin", Path("/Users/a"))):
        whole = sealed(text)
        assert is_untouched(whole)
        assert not is_untouched(text)
        assert not is_untouched(whole + "\n")
        assert not is_untouched(whole.replace("a", "b", 1))
        assert whole.splitlines()[0] == text.splitlines()[0] or whole.startswith("# ")


def test_an_agent_keeps_odd_names_whole() -> None:
    odd = ["/Users/a & b/<python>", "-c", "/Users/a & b/c.yaml"]
    text = sealed(plist_text(odd, "/a&b:/bin", Path("/Users/a & b")))
    agent = plistlib.loads(text.encode())
    assert agent["ProgramArguments"] == odd
    assert agent["EnvironmentVariables"]["PATH"] == "/a&b:/bin"


def test_a_name_that_systemd_cannot_start_is_refused() -> None:
    with pytest.raises(Refused):
        quoted("/srv/a\nExecStart=/bin/sh")
    for name in ('/srv/a "b"/python', "/srv/it's/python", "/srv/a\\b/python"):
        with pytest.raises(Refused):
            unit_text("system", [name], "/bin")


@pytest.mark.parametrize("kind", ["system", "user"])
def test_the_daemon_may_drain_before_systemd_kills_it(kind: str) -> None:
    unit = parsed(unit_text(kind, SHIPPED_COMMAND, SHIPPED_PATH))["Service"]
    assert int(unit["TimeoutStopSec"]) >= 2 * ServerConfig().shutdown_timeout + 10
    assert unit["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert (unit["Type"], unit["WatchdogSec"]) == ("notify", "30")
    assert unit["RestartPreventExitStatus"] == str(BAD_USAGE)


def test_launchd_lets_the_daemon_drain_too() -> None:
    agent = plistlib.loads(plist_text(["a"], "/bin", Path("/a")).encode())
    assert agent["ExitTimeOut"] >= 2 * ServerConfig().shutdown_timeout + 10
    assert agent["Umask"] == 0o077


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser


# --- as systemd sees it ----------------------------------------------------------

ANALYZE = shutil.which("systemd-analyze")
needs_analyze = pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here")


def analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    command = [ANALYZE, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def objections(*words: str | Path) -> str:
    """What ``verify`` says; its exit code is 0 even for keys that do not exist."""
    done = analyze(*words[:-1], "verify", words[-1])
    # Of machines with other units that are not right; ours has a name of its own.
    return "\n".join(
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "inferencia" in line
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(SHIPPED, tmp_path)
    return tmp_path


@needs_analyze
def test_systemd_finds_nothing_to_say_about_the_unit() -> None:
    done = analyze("verify", SHIPPED)
    assert (done.stdout, done.stderr) == ("", "")


@needs_analyze
def test_an_unknown_key_would_be_noticed(folder: Path) -> None:
    unit = folder / "inferencia.service"
    unit.write_text(unit.read_text().replace("KillMode=", "KilMode="))
    assert "KilMode" in objections(unit)


@needs_analyze
def test_the_sandbox_gets_good_marks() -> None:
    done = analyze("security", "--offline=true", "--threshold=25", SHIPPED)
    assert done.returncode == 0, done.stdout[-300:]


@needs_analyze
def test_with_room_for_engines_the_marks_are_still_good(folder: Path) -> None:
    unit, drop_ins = folder / "inferencia.service", folder / "inferencia.service.d"
    without = analyze("security", "--offline=true", unit).stdout.splitlines()[-1]
    drop_ins.mkdir()
    shutil.copy(DEPLOY / "systemd" / "engines.conf", drop_ins)
    assert objections(unit) == ""
    done = analyze("security", "--offline=true", "--threshold=25", unit)
    assert done.returncode == 0, done.stdout[-300:]
    assert done.stdout.splitlines()[-1] != without, "the drop-in was not read"


@needs_analyze
def test_with_room_for_tasks_the_unit_is_understood(folder: Path) -> None:
    unit, drop_ins = folder / "inferencia.service", folder / "inferencia.service.d"
    without = analyze("security", "--offline=true", unit).stdout.splitlines()[-1]
    drop_ins.mkdir()
    shutil.copy(DEPLOY / "systemd" / "tasks.conf", drop_ins)
    assert objections(unit) == ""
    done = analyze("security", "--offline=true", unit)
    assert done.stdout.splitlines()[-1] != without, "the drop-in was not read"


@needs_analyze
def test_systemd_understands_odd_names(tmp_path: Path) -> None:
    """It checks that the program is there, so it must have read its name as we did."""
    program = tmp_path / "a b 100%n $HOME é" / "python"
    program.parent.mkdir()
    program.symlink_to("/bin/true")
    unit = tmp_path / "inferencia-odd.service"
    command = [str(program), "-c", f'{tmp_path}/100%i "$PATH" \\n.yaml']
    unit.write_text(unit_text("system", command, "/a b:/bin"))
    assert objections(unit) == ""
    program.unlink()
    assert "not executable" in objections(unit)


@needs_analyze
def test_systemd_finds_nothing_to_say_about_a_users_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    unit = tmp_path / "inferencia.service"
    unit.write_text(sealed(unit_text("user", SHIPPED_COMMAND, SHIPPED_PATH)))
    assert objections("--user", unit) == ""
    unit.write_text(unit.read_text().replace("KillMode=", "KilMode="))
    assert "KilMode" in objections("--user", unit)
