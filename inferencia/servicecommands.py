"""``inferencia service install|uninstall|print``: this program as a service.

``install`` writes a unit for systemd (this user's or the machine's) or an agent for
launchd, which starts the ``inferencia`` of this very Python with the configuration that
it would find now, and says the next command. It starts nothing by itself and asks
nobody for a password. What somebody has changed since it was written is neither
overwritten nor removed without ``--force``: the first lines of the file hold a digest
of the rest.

The files are made from the templates in ``service_files/``; ``inferencia.service`` at
the top of the repository is the machine's one, filled in for ``/opt/inferencia``.
"""

import argparse
import hashlib
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from inferencia.folders import find_config, home
from inferencia.keycommands import BAD_USAGE, DONE, FAILED, Outcome

UNIT = "inferencia.service"
LABEL = "local.inferencia"

# Folders that the machine's service cannot see into (ProtectHome=, PrivateTmp=).
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")

# Where services find other programs. macOS: with Homebrew's two places.
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_MAC_PATH = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"

# What the unit at the top of the repository is filled in with. env(1) is everywhere,
# so "systemd-analyze verify" is content on a machine without /opt/inferencia.
SHIPPED_COMMAND = ("/usr/bin/env", "inferencia", "serve")
SHIPPED_PATH = f"/opt/inferencia/bin:{_SYSTEM_PATH}"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and as whom this runs, as far as services are concerned."""

    platform: str  # as sys.platform
    is_root: bool
    python: Path  # this interpreter; in a venv the venv's
    prefixes: tuple[Path, ...]  # where it and its library really are
    is_installed: bool  # the package is found whatever the current folder is
    system_units: Path = Path("/etc/systemd/system")

    @classmethod
    def here(cls) -> "Machine":
        """The one that we are on. Starts Python once."""
        python = Path(sys.executable)
        real = (python, python.resolve(), Path(sys.prefix), Path(sys.base_prefix))
        return cls(
            platform=sys.platform,
            is_root=os.geteuid() == 0,
            python=python,
            prefixes=real,
            is_installed=_is_installed(sys.executable),
        )


def _is_installed(python: str) -> bool:
    """Whether a service could import us: from elsewhere, without PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [python, "-P", "-c", "import inferencia"]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, check=False)
    return done.returncode == 0


@dataclass(frozen=True, slots=True)
class Service:
    """One service file: where it goes, what is in it, and what to type next."""

    path: Path
    text: str
    config: Path | None  # what it will be started with, if that is a file
    to_start: str
    to_restart: str
    to_stop: str
    links: tuple[Path, ...] = ()  # what "enable" has made
    notes: tuple[str, ...] = ()


class Refused(Exception):
    """The command is not carried out; ``str()`` says why and what to do."""

    def __init__(self, message: str, *, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def register(
    subparsers: "argparse._SubParsersAction[Any]",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Add ``service`` and its commands to the program's parser.

    Args:
        parents: what every command takes, such as ``-c FILE``.
    """
    about = "run inferencia as a service (systemd or launchd)"
    service = subparsers.add_parser("service", help=about, description=f"{about}.")
    commands = service.add_subparsers(
        dest="service_command", metavar="COMMAND", required=True
    )
    for name, meaning in (
        ("install", "write the service file and say how to start it"),
        ("uninstall", "remove the service file"),
        ("print", "show the service file"),
    ):
        command = commands.add_parser(
            name, help=meaning, description=f"{meaning}.", parents=parents
        )
        scope = command.add_mutually_exclusive_group()
        scope.add_argument(
            "--user",
            dest="scope",
            action="store_const",
            const="user",
            help="this user's service (what it is unless you are root)",
        )
        scope.add_argument(
            "--system",
            dest="scope",
            action="store_const",
            const="system",
            help="the machine's service, for root",
        )
        if name != "print":
            command.add_argument(
                "--force",
                action="store_true",
                help="even if somebody has changed the file",
            )


def run(
    options: argparse.Namespace, env: Mapping[str, str], machine: Machine
) -> Outcome:
    """Carry out one command.

    Args:
        options: as parsed by what ``register`` added, and ``config``.
        env: the environment; tells where home and the configuration are.
        machine: usually ``Machine.here()``.
    """
    command = _COMMANDS[options.service_command]
    try:
        return command(options, env, machine)
    except Refused as refusal:
        return Outcome(refusal.code, err=_lines(str(refusal)))
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return Outcome(FAILED, err=_lines(what))


def _install(
    options: argparse.Namespace, env: Mapping[str, str], machine: Machine
) -> Outcome:
    service = service_for(options.scope, options.config, env, machine)
    _refuse_what_cannot_start(service, machine)
    old = _read(service.path)
    new = sealed(service.text)
    if old == new:
        told = f"{service.path} is up to date; start it with:"
        return Outcome(DONE, f"{service.to_start}\n", _lines(told, *service.notes))
    if old is not None and not is_untouched(old) and not options.force:
        raise Refused(
            f"{service.path} was changed since inferencia wrote it, or somebody else "
            "wrote it; keep it, or replace it with --force"
        )
    _write(service.path, new)
    next_command = service.to_start if old is None else service.to_restart
    told = f"{service.path} is written; next:"
    return Outcome(DONE, f"{next_command}\n", _lines(told, *service.notes))


def _uninstall(
    options: argparse.Namespace, env: Mapping[str, str], machine: Machine
) -> Outcome:
    service = service_for(options.scope, None, env, machine)
    old = _read(service.path)
    if old is None:
        return Outcome(DONE, err=_lines(f"{service.path} is not there"))
    if not is_untouched(old) and not options.force:
        raise Refused(
            f"{service.path} was changed since inferencia wrote it, or somebody else "
            "wrote it; remove it with --force"
        )
    for link in service.links:
        if link.is_symlink():
            link.unlink()
    service.path.unlink()
    told = f"{service.path} is removed; if it runs still:"
    return Outcome(DONE, f"{service.to_stop}\n", _lines(told))


def _print(
    options: argparse.Namespace, env: Mapping[str, str], machine: Machine
) -> Outcome:
    service = service_for(options.scope, options.config, env, machine)
    return Outcome(DONE, service.text, _lines(*service.notes))


_COMMANDS: dict[
    str, Callable[[argparse.Namespace, Mapping[str, str], Machine], Outcome]
] = {"install": _install, "uninstall": _uninstall, "print": _print}


def _lines(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


# --- which service ---------------------------------------------------------------


def service_for(
    scope: str | None, config: Path | None, env: Mapping[str, str], machine: Machine
) -> Service:
    """The service that belongs to this machine.

    Args:
        scope: ``user`` or ``system``; None: the machine's for root, else the user's.
        config: what ``-c`` says.
        env: the environment.
        machine: where it will run.

    Raises:
        Refused: this kind of machine has no such service.
    """
    # As a start by hand here and now would find it. A relative name is for this folder
    # only, and a service starts in another one.
    found = find_config(config, env)
    found = None if found is None else found.absolute()
    if machine.platform == "darwin":
        if scope == "system":
            raise Refused(
                "on macOS there is only an agent for this user", code=BAD_USAGE
            )
        return _launchd_agent(found, env, machine)
    if scope is None:
        scope = "system" if machine.is_root else "user"
    if scope == "system":
        return _system_unit(found, env, machine)
    return _user_unit(found, env, machine)


def _system_unit(
    config: Path | None, env: Mapping[str, str], machine: Machine
) -> Service:
    search = f"{machine.python.parent}:{_SYSTEM_PATH}"
    return Service(
        path=machine.system_units / UNIT,
        text=unit_text("system", _command(machine, config), search),
        config=config,
        to_start="systemctl daemon-reload && systemctl enable --now inferencia",
        to_restart="systemctl daemon-reload && systemctl restart inferencia",
        to_stop="systemctl stop inferencia; systemctl daemon-reload",
        links=(machine.system_units / "multi-user.target.wants" / UNIT,),
        notes=(
            *_about_variables(env, "/etc/inferencia/env"),
            *_about_reading(config),
        ),
    )


def _user_unit(
    config: Path | None, env: Mapping[str, str], machine: Machine
) -> Service:
    base = env.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else home(env) / ".config"
    units = folder / "systemd" / "user"
    search = f"{machine.python.parent}:{home(env)}/.local/bin:{_SYSTEM_PATH}"
    reload = "systemctl --user daemon-reload"
    return Service(
        path=units / UNIT,
        text=unit_text("user", _command(machine, config), search),
        config=config,
        to_start=f"{reload} && systemctl --user enable --now inferencia",
        to_restart=f"{reload} && systemctl --user restart inferencia",
        to_stop=f"systemctl --user stop inferencia; {reload}",
        links=(units / "default.target.wants" / UNIT,),
        notes=(
            *_about_variables(env, "~/.config/inferencia/env"),
            "(to have it run while you are not logged in: loginctl enable-linger)",
        ),
    )


def _launchd_agent(
    config: Path | None, env: Mapping[str, str], machine: Machine
) -> Service:
    folder = home(env)
    path = folder / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    search = f"{machine.python.parent}:{_MAC_PATH}"
    start = f"launchctl bootstrap gui/$(id -u) {shlex.quote(str(path))}"
    stop = f"launchctl bootout gui/$(id -u)/{LABEL}"
    return Service(
        path=path,
        text=plist_text(_command(machine, config), search, folder),
        config=config,
        to_start=start,
        to_restart=f"{stop}; {start}",
        to_stop=stop,
        notes=_about_variables(env, "EnvironmentVariables of the file"),
    )


def _command(machine: Machine, config: Path | None) -> list[str]:
    # -P: a folder "inferencia" where the service starts is not what is meant.
    command = [str(machine.python), "-P", "-m", "inferencia", "serve"]
    return command if config is None else [*command, "-c", str(config)]


def _about_variables(env: Mapping[str, str], place: str) -> tuple[str, ...]:
    """A hint that the service will not see what is set in this shell."""
    ours = sorted(n for n in env if n.startswith(("INFERENCIA_", "GI_")))
    # Its file name is part of the command already.
    names = ", ".join(name for name in ours if name != "INFERENCIA_CONFIG")
    return (
        (f"(the service does not see {names}: put it into {place})",) if names else ()
    )


def _about_reading(config: Path | None) -> tuple[str, ...]:
    """A hint that the service's own user may not read the configuration."""
    try:
        if config is None or config.stat().st_mode & stat.S_IROTH:
            return ()
    except OSError:
        return ()
    return (
        f"(the service's user cannot read {config}: chmod o+r, and put secrets into "
        "/etc/inferencia/env as variables)",
    )


def _refuse_what_cannot_start(service: Service, machine: Machine) -> None:
    """Say now what would else be a line in the journal.

    Raises:
        Refused: the service would not start.
    """
    if not machine.is_installed:
        raise Refused(
            "this inferencia runs from its sources; install it first: "
            "python3 -m venv .venv && .venv/bin/pip install ."
        )
    if service.path.parent != machine.system_units:
        return
    if not machine.is_root:
        raise Refused(f"only root may write {service.path}; or use --user")
    hidden = next((p for p in machine.prefixes if is_hidden(p)), None)
    if hidden is not None:
        raise Refused(
            f"the machine's service cannot see {hidden}; install inferencia for it "
            "(python3 -m venv /opt/inferencia && /opt/inferencia/bin/pip install .) "
            "and call /opt/inferencia/bin/inferencia service install, or use --user"
        )
    if service.config is not None and is_hidden(service.config):
        raise Refused(
            f"the machine's service cannot see {service.config}; move it to "
            "/etc/inferencia/config.yaml, or use --user"
        )


def is_hidden(path: Path) -> bool:
    """Whether the machine's service has an empty folder there."""
    return any(path.is_relative_to(folder) for folder in _HIDDEN)


# --- the texts -------------------------------------------------------------------


def unit_text(kind: str, command: Sequence[str], search: str) -> str:
    """A unit of systemd.

    Args:
        kind: ``system`` or ``user``.
        command: what it runs.
        search: its ``PATH``.
    """
    program, *arguments = command
    if set(program) & set("\"'\\"):
        raise Refused(f"systemd starts no program with such a name: {program}")
    words = [quoted(program, expands=False), *(quoted(word) for word in arguments)]
    search_path = quoted(f"PATH={search}", expands=False)
    return _filled(f"{kind}.service", COMMAND=" ".join(words), PATH=search_path)


def plist_text(command: Sequence[str], search: str, folder: Path) -> str:
    """An agent for launchd.

    Args:
        command: what it runs.
        search: its ``PATH``.
        folder: the user's home.
    """
    return _filled(
        "launchd.plist",
        COMMAND="\n".join(f"    <string>{escape(word)}</string>" for word in command),
        PATH=escape(search),
        HOME=escape(str(folder)),
        LOG=escape(str(folder / "Library" / "Logs" / "inferencia.log")),
    )


def _filled(template: str, **values: str) -> str:
    files = resources.files("inferencia") / "service_files"
    text = files.joinpath(template).read_text("utf-8")
    return re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], text)


_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)


def quoted(word: str, *, expands: bool = True) -> str:
    """A word as systemd reads it back (systemd.service(5), "Command lines").

    Args:
        word: any text.
        expands: whether ``$`` begins a variable there, as in a command's arguments.

    Raises:
        Refused: there is a control character in it.
    """
    if not word.isprintable():
        raise Refused(f"cannot be written into a unit: {word!r}")
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if expands:
        text = text.replace("$", "$$")
    return text if _PLAIN.fullmatch(word) else f'"{text}"'


# --- files -----------------------------------------------------------------------

# In a comment of the file: the digest of everything else.
_SEAL = re.compile(r"written by inferencia service install, sha256:([0-9a-f]{64})")


def sealed(text: str) -> str:
    """``text`` with a comment by which a later change is noticed."""
    words = f"written by inferencia service install, sha256:{_digest(text)}"
    if text.startswith("<?xml"):
        head, tag, rest = text.partition('<plist version="1.0">\n')
        return f"{head}{tag}<!-- {words} -->\n{rest}"
    return f"# {words}\n{text}"


def is_untouched(text: str) -> bool:
    """Whether a file is exactly as ``sealed`` made it."""
    seal = _SEAL.search(text)
    if seal is None:
        return False
    lines = text.splitlines(keepends=True)
    rest = "".join(line for line in lines if _SEAL.search(line) is None)
    return _digest(rest) == seal[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Replace the file as a whole; there is no secret in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(text, "utf-8")
    unfinished.chmod(0o644)
    unfinished.replace(path)
