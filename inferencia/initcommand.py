"""``inferencia init``: a configuration of what this machine has.

    1. look for servers of language models, llama-server, and GGUF files
    2. write the configuration beside where it will be, and load it as ``serve`` would
    3. make the keys file with one key for each of two roles
    4. give the configuration its name, and say what to type next

Nothing that exists is overwritten unless that is asked for, and then it is kept as
``FILE.old``. Both secrets are printed once; the keys file holds their digests.
"""

import argparse
import asyncio
import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferencia import folders
from inferencia.config import load
from inferencia.discovery import Found, State, find_servers
from inferencia.firstkeys import KEYS_FILE
from inferencia.greeting import Greeting, base_url
from inferencia.keycommands import BAD_USAGE, DONE, Outcome
from inferencia.keysfile import add_key
from inferencia.models.finding import find_models
from inferencia.neighbours import backends_of
from inferencia.overlay import Flags
from inferencia.settings import BackendConfig
from inferencia.sockets import SECOND_PORT

# The usual port, the one that is taken instead of it, and what follows that.
_PORTS: tuple[int, ...] = (8080, SECOND_PORT, *range(SECOND_PORT + 1, SECOND_PORT + 12))
_HOST = "127.0.0.1"

# Roles have these names as keys: "admin" and "user" are those of server.api_key.
_USER, _ADMIN = "me", "owner"

_OLD = ".old"

# As many models of a server are named in the comment beside it.
_NAMED_MODELS = 4


class Refused(Exception):
    """It cannot be done as it was asked for; a line for a person."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found."""

    servers: Sequence[Found] = ()
    folders: Sequence[Path] = ()  # with GGUF files, or as they were asked for
    models: Sequence[str] = ()  # names of the GGUF files that can be served
    exe: str | None = None  # llama-server
    port: int = _PORTS[0]  # which is free
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def backends(self) -> tuple[BackendConfig, ...]:
        """The servers that can be used as they are."""
        return backends_of(self.servers)

    @property
    def has_own_models(self) -> bool:
        """Whether the gateway will start models itself."""
        return bool(self.folders)

    def all_models(self) -> list[str]:
        """Everything that can be asked for."""
        return [model for found in self.servers for model in found.models] + (
            list(self.models) if self.has_own_models else []
        )


def register(
    subparsers: "argparse._SubParsersAction[Any]",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Add ``init`` to the program's parser.

    Args:
        parents: what every command takes, such as ``-c FILE``.
    """
    about = "write a configuration of what this machine has, and keys for it"
    init = subparsers.add_parser(
        "init", help=about, description=f"{about}.", parents=parents
    )
    init.add_argument(
        "--models-dir",
        metavar="D",
        type=Path,
        action="append",
        default=[],
        help="a folder with GGUF files; may be given again (default: the usual ones)",
    )
    init.add_argument(
        "--llama-server",
        metavar="EXE",
        help="the program that runs them (default: llama-server on PATH)",
    )
    init.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="where to write it (default: ./config.yaml); the keys go beside it",
    )
    init.add_argument(
        "--force",
        action="store_true",
        help=f"replace what is there; it is kept as FILE{_OLD}",
    )


def run(
    options: argparse.Namespace,
    env: Mapping[str, str],
    *,
    ports: Mapping[int, str] | None = None,
) -> Outcome:
    """Look around and write the files.

    Args:
        options: as parsed by what ``register`` added.
        env: the environment.
        ports: where servers are looked for, and what is probably there; the usual ones
            if None.

    Raises:
        ConfigErrors: what the environment says cannot be run with.
        OSError: a file cannot be written.
    """
    path = _target(options, env)
    keys = path.with_name(KEYS_FILE)
    try:
        _refuse_existing(path, keys, force=options.force)
        machine = look(options.models_dir, options.llama_server, env, ports)
    except Refused as refused:
        return Outcome(BAD_USAGE, err=f"inferencia: {refused}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _write(path, keys, machine, env)
    user = add_key(keys, _USER, {"role": "user"})
    admin = add_key(keys, _ADMIN, {"role": "admin"})
    out = _report(path, keys, machine, env, user=user, admin=admin)
    notes = [f"kept     {old}" for old in kept] + [
        f"note     {n}" for n in machine.notes
    ]
    return Outcome(DONE, out=out, err="".join(f"  {note}\n" for note in notes))


def _target(options: argparse.Namespace, env: Mapping[str, str]) -> Path:
    """Where the configuration goes: where the next start looks for it."""
    asked = options.output or options.config
    if asked is None and env.get("INFERENCIA_CONFIG"):
        asked = Path(env["INFERENCIA_CONFIG"])
    return Path("config.yaml") if asked is None else folders.expand(str(asked), env)


def _refuse_existing(path: Path, keys: Path, *, force: bool) -> None:
    there = [one for one in (path, keys) if os.path.lexists(one)]
    if any(one.is_dir() for one in there):
        raise Refused(f"{there[0]} is a folder; -o names the file to write")
    if there and not force:
        names = " and ".join(map(str, there))
        verb = "are" if len(there) > 1 else "is"
        raise Refused(
            f"{names} {verb} there already; write elsewhere with -o FILE, or replace "
            f"what is there with --force (it is kept as FILE{_OLD})"
        )


# --- looking around --------------------------------------------------------------


def look(
    wanted: Sequence[Path],
    exe: str | None,
    env: Mapping[str, str],
    ports: Mapping[int, str] | None,
) -> Machine:
    """Find out what there is.

    Args:
        wanted: folders that were asked for; the usual ones if there are none.
        exe: the llama-server that was asked for.
        ports: where servers are looked for.

    Raises:
        Refused: that llama-server is none.
    """
    program = _llama_server(exe, env)
    servers = asyncio.run(find_servers(ports))
    notes: list[str] = []
    searched = [folders.expand(str(folder), env).absolute() for folder in wanted]
    for folder in searched:
        if not folder.is_dir():
            notes.append(f"{folder} does not exist yet")
    if not searched and program is not None:
        usual = (one.absolute() for one in folders.model_folders(env) if one.is_dir())
        searched = [folder for folder in usual if _usable([folder])]
    models = _usable([folder for folder in searched if folder.is_dir()])
    if searched and program is None:
        notes.append(
            "there is no llama-server on PATH to run GGUF files with; install it, or "
            "name it as llama.exe"
        )
    if wanted and not models:
        notes.append("there are no GGUF files yet: inferencia models pull OWNER/NAME")
    return Machine(servers, searched, models, program, _free_port(), notes)


def _llama_server(asked: str | None, env: Mapping[str, str]) -> str | None:
    """The absolute path of llama-server: a service has another PATH than a person."""
    name = str(folders.expand(asked, env)) if asked else "llama-server"
    found = shutil.which(name, path=env.get("PATH"))
    if found is None and asked:
        raise Refused(f"--llama-server: {asked} is not there, or not executable")
    return os.path.abspath(found) if found else None


def _usable(searched: Sequence[Path]) -> list[str]:
    return [model.name for model in find_models(searched).models if model.is_usable]


def _free_port() -> int:
    """The first of the usual ports that nobody listens on."""
    for port in _PORTS:
        with socket.socket() as probe:
            # As the gateway does it: a connection that has just ended takes no port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
            return port
    return _PORTS[0]


# --- the configuration -----------------------------------------------------------

_HEAD = """\
# Written by `inferencia init`. `inferencia check` tells whether it is right, SIGHUP (or
# a restart) makes a running gateway read it again. docs/configuration.md has every key.
"""

_BACKENDS_HEAD = """\

# Servers that run models. These were found on this machine; others may be added, in the
# cloud too: {name: cloud, type: openrouter, url: "https://openrouter.ai/api/v1",
# api_key: "${env.OPENROUTER_API_KEY}"}.
backends:
"""

_NO_BACKENDS = """\

# Servers that run models, here or elsewhere. None was found.
# backends:
#   - {name: ollama, type: ollama, url: "http://127.0.0.1:11434"}
#   - {name: cloud, type: openrouter, url: "https://openrouter.ai/api/v1",
#      api_key: "${env.OPENROUTER_API_KEY}"}
"""

_LOOKS_AROUND = """\

# Nothing to serve was found when this was written. As long as neither backends nor
# models_dir is set, each start looks for servers on this machine, and for GGUF files in
# ~/models if there is a llama-server on PATH. `inferencia models pull OWNER/NAME`
# fetches one.
"""

_MODELS_HEAD = """\

# Folders that are searched for *.gguf, also below. Each model is started when it is
# asked for, and stopped when its memory is needed. See docs/models.md.
"""

_NO_MODELS = """\

# Folders that are searched for *.gguf; llama.exe runs them. See docs/models.md.
# models_dir: [~/models]
# llama:
#   exe: llama-server
"""

_LLAMA_REST = """\
  # args: {common: "--props --no-warmup"}
  # memory: 20GiB         # for all loaded models; left out, it is found out
"""


def config_text(machine: Machine) -> str:
    """The configuration, with comments."""
    parts = [_HEAD, _server_part(machine)]
    if machine.backends:
        parts += [_BACKENDS_HEAD, *map(_backend_line, machine.backends)]
    elif machine.has_own_models:
        parts.append(_NO_BACKENDS)
    else:
        parts.append(_LOOKS_AROUND)
    parts += [
        f"  # {found.type} at {found.url} wants a key; add it here with its api_key\n"
        for found in machine.servers
        if found.state is State.NEEDS_A_KEY and machine.backends
    ]
    parts.append(_models_part(machine))
    return "".join(parts)


def _server_part(machine: Machine) -> str:
    return f"""
server:
  host: {_HOST}       # 0.0.0.0: also for other machines; see docs/internet.md
  port: {machine.port}

# One key a line, as digests; `inferencia keys add NAME` makes another.
auth:
  keys_file: ./{KEYS_FILE}
"""


def _backend_line(backend: BackendConfig) -> str:
    url = _quoted(backend.url)
    return f"  - {{name: {backend.name}, type: {backend.type}, url: {url}}}\n"


def _models_part(machine: Machine) -> str:
    if not machine.has_own_models:
        return _NO_MODELS
    lines = [_MODELS_HEAD, "models_dir:\n"]
    lines += [f"  - {_quoted(str(folder))}\n" for folder in machine.folders]
    exe = _quoted(machine.exe or "llama-server")
    lines += ["\nllama:\n", f"  exe: {exe}\n", _LLAMA_REST]
    return "".join(lines)


def _quoted(text: str) -> str:
    """A text as YAML: its double-quoted form takes all that JSON writes."""
    return json.dumps(text, ensure_ascii=False)


# --- writing ---------------------------------------------------------------------


def _write(
    path: Path, keys: Path, machine: Machine, env: Mapping[str, str]
) -> list[Path]:
    """Put the configuration in its place, whole; returns what was moved out of it.

    Raises:
        ConfigErrors: it could not be loaded; nothing has changed.
        OSError
    """
    handle, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".yaml", dir=path.parent
    )
    aside = Path(temporary)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(config_text(machine))
            file.flush()
            os.fsync(file.fileno())
        load(aside, env, Flags())
        aside.chmod(0o644)  # it holds no secret
        kept = [_set_aside(one) for one in (path, keys) if os.path.lexists(one)]
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return kept


def _set_aside(path: Path) -> Path:
    old = path.with_name(path.name + _OLD)
    os.replace(path, old)
    return old


# --- what is said ----------------------------------------------------------------


def _report(
    path: Path,
    keys: Path,
    machine: Machine,
    env: Mapping[str, str],
    *,
    user: str,
    admin: str,
) -> str:
    lines = [f"  {line}" for line in _found_lines(machine)]
    start = "inferencia"
    is_usual = folders.find_config(None, env)
    if is_usual is None or not is_usual.exists() or not is_usual.samefile(path):
        start += f" -c {path}"
    lines += [
        "",
        f"  wrote    {path}",
        f"  wrote    {keys} (only digests of these two keys, which are shown once)",
        f"  user     {user}",
        f"  admin    {admin}",
        "",
        f"  start    {start}",
        f"  try it   {_command(machine, user)}",
        "",
    ]
    return "\n".join(lines)


def _found_lines(machine: Machine) -> list[str]:
    lines = []
    for found in machine.servers:
        if found.state is State.SERVES:
            named = ", ".join(found.models[:_NAMED_MODELS])
            more = len(found.models) - _NAMED_MODELS
            named += f" and {more} more" if more > 0 else ""
            lines.append(f"found    {found.type} at {found.url}: {named}")
        elif found.state is not State.MISSING:
            lines.append(f"found    {found.type} at {found.url}: {found.state}")
    if machine.has_own_models:
        count = len(machine.models)
        files = "1 model" if count == 1 else f"{count} models"
        where = ", ".join(map(str, machine.folders))
        lines.append(f"found    {files} in {where}")
    if machine.exe:
        lines.append(f"found    {machine.exe}")
    if not machine.backends and not machine.has_own_models:
        lines.append("found    nothing to serve yet; each start looks again")
    return lines


def _command(machine: Machine, user: str) -> str:
    greeting = Greeting(
        base_url=base_url(_HOST, machine.port),
        source=None,
        servers=(),
        models=machine.all_models() or ["echo"],
        user_key=None,
        admin_key=None,
        is_open=False,
    )
    return greeting.command().replace("$INFERENCIA_KEY", user)
