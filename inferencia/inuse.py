"""Whether a model's file is in use on this machine, as a command line can find out.

The gateway is asked at the addresses of its configuration, if a key for it is known
here (it keeps digests of most). Besides, whoever runs with the file's path among its
arguments uses it: llama-server, started by the gateway or by hand.
"""

import contextlib
import http.client
import json
import os
import ssl
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferencia.addresses import addresses
from inferencia.admission import uses_first_keys
from inferencia.config import Loaded
from inferencia.firstkeys import FirstKeys
from inferencia.folders import state_folder
from inferencia.sockets import SECOND_PORT

# The gateway is on this machine and answers from memory.
_SECONDS = 2.0

# The list of a thousand models takes half a megabyte.
_MAX_ANSWER_BYTES = 16 * 1024 * 1024

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Process:
    """A process that has a file among its arguments."""

    pid: int
    program: str


def loaded_models(loaded: Loaded, env: Mapping[str, str]) -> dict[str, str]:
    """The models that the running gateway has loaded: path by name.

    Empty if no gateway runs, if it has none, or if it does not tell us.
    """
    keys = list(_keys(loaded, env))
    for connection in connections(loaded, "models"):
        with contextlib.closing(connection), contextlib.suppress(*FAILURES):
            if not is_gateway(connection):
                continue
            for key in keys:
                status, document = ask(connection, "/models", key)
                if status == 200:
                    return _loaded_in(document)
    return {}


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


def connections(loaded: Loaded, service: str) -> Iterator[http.client.HTTPConnection]:
    """Connections to where the gateway may listen, not opened yet.

    Args:
        loaded: its configuration.
        service: what is to be asked for there.
    """
    server = loaded.config.server
    places = [(one.host, one.port) for one in addresses(server) if one.offers(service)]
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
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
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


def _keys(loaded: Loaded, env: Mapping[str, str]) -> Iterator[str]:
    """The keys that are written down somewhere as they are."""
    given = loaded.config.server.api_key
    for secret in (given.admin, given.user, *(loaded.config.auth.api_keys or ())):
        if secret is not None:
            yield secret.reveal()
    if uses_first_keys(loaded):
        with contextlib.suppress(OSError, ValueError):
            folder = state_folder(env)
            yield FirstKeys(folder / "key", folder / "admin-key").user


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
