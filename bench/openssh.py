"""OpenSSH as a tunnel: a server of this run's own, and one ``ssh -R`` to it.

Keys, configuration and lists of keys are made in a folder of the run; nothing of the
user's is read. The server takes nothing but this run's key, and allows nothing but a
forwarded port.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import machine
from bench.children import ChildFailed, Children, tail

#: How to get what is missing.
HOW_TO_INSTALL = "apt-get install openssh-server openssh-client openssl"

_START_SECONDS = 15.0
# sshd is seldom in PATH.
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"))
# As root, sshd of Debian insists on this folder, which its service would make.
_PRIVILEGE_FOLDER = Path("/run/sshd")

_SERVER = """\
Port {port}
ListenAddress {address}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding remote
AllowAgentForwarding no
X11Forwarding no
LogLevel ERROR
"""


def missing() -> str | None:
    """The first program that is needed and not here."""
    programs = ("sshd", "ssh", "ssh-keygen", "openssl")
    return next((name for name in programs if _path(name) is None), None)


def _path(program: str) -> str | None:
    return shutil.which(program, path=_PATH)


@contextlib.contextmanager
def privilege_folder() -> Iterator[None]:
    """Have the folder that sshd wants, and take it away again if it was not there."""
    if os.geteuid() or _PRIVILEGE_FOLDER.exists():
        yield
        return
    _PRIVILEGE_FOLDER.mkdir(mode=0o755)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _PRIVILEGE_FOLDER.rmdir()


class Server:
    """An sshd."""

    def __init__(
        self,
        children: Children,
        folder: Path,
        *,
        address: str,
        port: int,
        core: int | None = None,
    ) -> None:
        """Start it; it listens soon, and ``forward`` waits for that.

        Args:
            children: ends it.
            folder: for keys, configuration and log; an empty one.
            address: where it listens, a number.
            port: a free one.
            core: where it is held, and all that it forks.
        """
        self._children = children
        self._folder = folder
        self._log = folder / "log"
        folder.chmod(0o700)
        for name in ("host", "user"):
            _run(
                "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)
            )
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        self._host_key = (folder / "host.pub").read_text()
        config = folder / "sshd_config"
        config.write_text(_SERVER.format(port=port, address=address, folder=folder))
        program = _path("sshd")
        assert program is not None  # else ``missing`` said so
        self._server = children.run(
            [program, "-D", "-e", "-f", str(config)],
            core=core,
            log=self._log,
            speaks=False,
        )

    def forward(
        self,
        *,
        address: str,
        port: int,
        to: int,
        prefix: Sequence[str] = (),
        core: int | None = None,
    ) -> "Forwarded":
        """Have connections to a free port here go through ssh, to a port there.

        Args:
            address: of the server, as seen by the client.
            port: likewise.
            to: the port on the client's 127.0.0.1.
            prefix: put before the command, to run it elsewhere.
            core: where the client is held.

        Raises:
            ChildFailed: no such connection came about.
        """
        known = self._folder / "known"
        known.write_text(f"[{address}]:{port} {self._host_key}")
        forwarded = _free_port()
        options = {
            "IdentityFile": str(self._folder / "user"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(known),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ExitOnForwardFailure": "yes",
            "ConnectionAttempts": "20",
            "LogLevel": "ERROR",
        }
        given = [part for pair in options.items() for part in ("-o", "=".join(pair))]
        user = pwd.getpwuid(os.geteuid()).pw_name
        client = self._children.run(
            [
                *(*prefix, "ssh", "-N", "-T", "-F", "none", *given),
                *("-p", str(port), "-R", f"127.0.0.1:{forwarded}:127.0.0.1:{to}"),
                f"{user}@{address}",
            ],
            core=core,
            log=self._log,
            speaks=False,
        )
        deadline = time.monotonic() + _START_SECONDS
        while not _listens(forwarded):
            if client.poll() is not None or time.monotonic() > deadline:
                raise ChildFailed(f"ssh -R did not come about\n{tail(self._log)}")
            time.sleep(0.02)
        return Forwarded(forwarded, client.pid, machine.offspring_of(self._server.pid))


class Forwarded:
    """One ``ssh -R``."""

    def __init__(self, port: int, client: int, server: list[int]) -> None:
        self.port = port  # on 127.0.0.1 of the server
        self.client = client  # pid of ssh
        self.server = server  # pids of sshd and what it has forked for the connection


def make_certificate(folder: Path, addresses: Sequence[str]) -> tuple[Path, Path]:
    """A self-signed certificate for these addresses, and its key, by openssl."""
    chain, key = folder / "chain.pem", folder / "key.pem"
    names = ",".join(f"IP:{address}" for address in addresses)
    _run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"),
        *("-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=bench"),
        *("-addext", f"subjectAltName={names}"),
        *("-keyout", str(key), "-out", str(chain)),
    )
    return chain, key


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ChildFailed(f"{' '.join(command)}: {done.stderr.strip()}")


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
