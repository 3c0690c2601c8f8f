"""Whether a model's file is in use on this machine, as a command line can find out.

The gateway is asked at the addresses of its configuration, if a key for it is written
down here (of most only digests are). Besides, whoever runs with the file's path among
its arguments uses it: llama-server, started by the gateway or by hand.
"""

import contextlib
import http.client
import json
import os
import ssl
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferencia.addresses import addresses
from inferencia.admission import keys_path, uses_first_keys
from inferencia.config import Loaded
from inferencia.firstkeys import FirstKeys
from inferencia.folders import state_folder
from inferencia.keylines import DIGEST_MARK, KeysError, Role, parse
from inferencia.keys import read_file
from inferencia.sockets import SECOND_PORT
from inferencia.trust import trusting

# The gateway is on this machine and answers from memory.
_SECONDS = 2.0

# The list of a thousand models takes half a megabyte.
_MAX_ANSWER_BYTES = 16 * 1024 * 1024

# Keys that are tried one after the other: the gateway of another configuration takes
# none of them, and after some it would refuse to be asked more often.
_MAX_TRIED = 5

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Process:
    """A process that has a file among its arguments."""

    pid: int
    program: str


@dataclass(frozen=True, slots=True)
class WrittenKey:
    """A key with its secret."""

    secret: str
    role: Role = Role.USER
    is_narrow: bool = False  # it may see some models only


@dataclass(frozen=True, slots=True)
class InMemory:
    """What is known of the models that the gateway has loaded."""

    paths: Mapping[str, str] = field(default_factory=dict)  # by name
    doubt: str = ""  # why it is not known although a gateway runs; "" if it is


def loaded_models(loaded: Loaded, env: Mapping[str, str]) -> InMemory:
    """The models that the running gateway has loaded; none if no gateway runs."""
    doubt = ""
    for connection in connections(loaded, "models", "goinfer"):
        with contextlib.closing(connection), contextlib.suppress(*FAILURES):
            if not is_gateway(connection):
                continue
            doubt = doubt or (
                f"the gateway at {connection.host}:{connection.port} runs, but tells "
                "nobody without a key which models are loaded, and none that it takes "
                "is written down here; set INFERENCIA_API_KEY_USER to one"
            )
            roles = (Role.USER, Role.ADMIN)
            keys = [key for key in written_keys(loaded, env) if key.role in roles]
            for key in keys[:_MAX_TRIED]:
                status, document = ask(connection, "/models", key.secret)
                if status == 200:
                    return InMemory(_loaded_in(document))
    return InMemory(doubt=doubt)


def processes_with(paths: Collection[Path]) -> list[Process]:
    """Processes, other than this one, that have one of the files as an argument."""
    wanted = {os.fsencode(path) for path in paths}
    wanted |= {os.fsencode(os.path.realpath(path)) for path in paths}
    found = []
    for pid, arguments in _command_lines():
        # "--model=PATH" is one argument.
        values = {argument.partition(b"=")[2] for argument in arguments}
        if pid != os.getpid() and wanted & {*arguments[1:], *values}:
            program = os.path.basename(os.fsdecode(arguments[0]))
            found.append(Process(pid, program))
    return found


# --- the gateway -----------------------------------------------------------------

# How talking to it may fail.
FAILURES = (OSError, http.client.HTTPException, ValueError)


def connections(loaded: Loaded, *services: str) -> Iterator[http.client.HTTPConnection]:
    """Connections to where the gateway may listen, not opened yet.

    Args:
        loaded: its configuration.
        services: one of which is to be asked for there.
    """
    server = loaded.config.server
    places = [
        (one.host, one.port)
        for one in addresses(server)
        if any(map(one.offers, services))
    ]
    if not server.listen and not server.is_port_given:
        places.append((server.host, SECOND_PORT))
    for host, port in places:
        host = _EVERYWHERE.get(host, host)
        if server.tls.cert is None:
            yield http.client.HTTPConnection(host, port, timeout=_SECONDS)
        else:
            with contextlib.suppress(OSError):
                context = _trusting(server.tls.cert)
                yield http.client.HTTPSConnection(
                    host, port, timeout=_SECONDS, context=context
                )


def _trusting(certificate: Path) -> ssl.SSLContext:
    """Trust exactly the configured certificate, whatever name it is for."""
    context = trusting(certificate)
    context.check_hostname = False
    return context


def is_gateway(connection: http.client.HTTPConnection) -> bool:
    """Whether it is ours that answers there; nobody else gets to see a key."""
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read(_MAX_ANSWER_BYTES)
    return (answer.getheader("Server") or "").lower().startswith("inferencia")


def ask(connection: http.client.HTTPConnection, path: str, key: str) -> tuple[int, Any]:
    """Status and decoded JSON of an answer.

    Raises:
        OSError, http.client.HTTPException, ValueError: see ``FAILURES``.
    """
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    body = answer.read(_MAX_ANSWER_BYTES)
    return answer.status, json.loads(body)


def written_keys(loaded: Loaded, env: Mapping[str, str]) -> list[WrittenKey]:
    """The keys that are written down on this machine as they are, not as digests.

    In the order of how much they are likely to open with how little power: first those
    of users who may see every model.
    """
    config = loaded.config
    given = config.server.api_key
    found = [WrittenKey(s.reveal()) for s in (given.user,) if s is not None]
    found += [WrittenKey(s.reveal()) for s in config.auth.api_keys or ()]
    if config.swap_config is not None:
        found += [WrittenKey(secret) for secret in config.swap_config.api_keys]
    if given.admin is not None:
        found.append(WrittenKey(given.admin.reveal(), Role.ADMIN))
    with contextlib.suppress(OSError, ValueError):
        if uses_first_keys(loaded):
            folder = state_folder(env)
            first = FirstKeys(folder / "key", folder / "admin-key")
            found.append(WrittenKey(first.user))
            found.append(WrittenKey(first.admin, Role.ADMIN))
    if config.auth.api_keys is None:
        with contextlib.suppress(OSError, KeysError):
            found += _in_file(keys_path(loaded, env))
    found.sort(key=lambda key: (key.is_narrow, key.role is not Role.USER))
    return found


def _in_file(path: Path) -> Iterator[WrittenKey]:
    data, _ = read_file(path)
    text = data.decode("utf-8", "surrogateescape")
    lines = text.removeprefix("\ufeff").split("\n")
    for line in parse(text, "keys"):
        secret = lines[line.number - 1].split()[0]
        if not line.is_placeholder and not secret.startswith(DIGEST_MARK):
            yield WrittenKey(secret, line.key.role, bool(line.key.models))


def _loaded_in(document: Any) -> dict[str, str]:
    models = document.get("models") if isinstance(document, dict) else None
    if not isinstance(models, dict):
        return {}
    return {
        name: str(entry.get("path", ""))
        for name, entry in models.items()
        if isinstance(entry, dict) and entry.get("loaded") is True
    }


# --- processes -------------------------------------------------------------------


def _command_lines() -> Iterator[tuple[int, list[bytes]]]:
    """Every process with its arguments, as far as this user may see them."""
    if os.path.isdir("/proc/self"):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    text = Path("/proc", name, "cmdline").read_bytes()
                    if text:
                        yield int(name), text.rstrip(b"\0").split(b"\0")
        return
    # macOS: arguments are told with blanks between them, so that a path with a blank
    # in it is not found.
    command = ["ps", "-A", "-ww", "-o", "pid=,args="]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
        for line in done.stdout.splitlines():
            pid, *arguments = line.split()
            if pid.isdigit() and arguments:
                yield int(pid), arguments
