"""systemd itself, as the first process of a machine of its own on this one.

Namespaces for processes, mounts, names and control groups, and a root file system that
is this machine's with a layer above it that only lives as long as the box. Nothing of
the machine's own systemd, if it has one, is touched. It takes root on Linux.

The network is this machine's, so what is served inside can be asked from outside.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import inferencia

PATIENCE = 30.0
LOOK_SECONDS = 0.05

SYSTEMD = Path("/lib/systemd/systemd")
PYTHON = Path("/usr/bin/python3")
#: Where the tests' own packages are inside.
PREFIX = "/opt/inferencia"

# Nothing is started at first: this target wants nothing.
_TARGET = "[Unit]\nDescription=nothing\nDefaultDependencies=no\n"
_PATHS = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
_BOOT = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs {mount}
mkdir {mount}/above {mount}/work {mount}/root
cd {mount}
mount -t overlay overlay -o lowerdir=/,upperdir=above,workdir=work root
cd root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mkdir -p opt/code opt/packages
mount --bind {code} opt/code
mount --bind {packages} opt/packages
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
rm -rf etc/inferencia etc/systemd/system/inferencia.service*
printf {target} > etc/systemd/system/nothing.target
: > etc/machine-id
mkdir .before
pivot_root . .before
umount -l .before
exec env -i container=other {paths} {systemd} --system --unit=nothing.target \\
    --log-target=console --show-status=0
"""


class NoBox(Exception):
    """This machine cannot have one; ``str()`` says why."""


class Box:
    """A running one."""

    def __init__(self, first: int) -> None:
        self._inside = [
            *("nsenter", "-t", str(first), "-m", "-p", "-u", "-i", "-C", "-r"),
        ]

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a program inside, in the folder ``/``."""
        words = ["env", "-i", _PATHS, *argv]
        return subprocess.run(
            [*self._inside, *words],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def did(self, *argv: str) -> str:
        """Run a program that has to succeed; what it printed."""
        done = self.run(*argv)
        assert done.returncode == 0, f"{shlex.join(argv)}: {done.stderr}{done.stdout}"
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """Make a file that everybody may read, with its folder."""
        script = 'mkdir -p "$(dirname "$1")" && printf %s "$2" > "$1" && chmod 644 "$1"'
        self.did("sh", "-c", script, "sh", path, text)

    def shows(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.did("systemctl", "show", "-P", name, unit).strip()

    def until(self, unit: str, **properties: str) -> None:
        """Wait until a unit's properties are these."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = {name: self.shows(unit, name) for name in properties}
            if found == properties:
                return
            assert time.monotonic() < deadline, f"{unit}: {found}, not {properties}"
            time.sleep(LOOK_SECONDS)


@contextlib.contextmanager
def boxed(folder: Path) -> Iterator[Box]:
    """A box with this very ``inferencia`` installed for the system's Python.

    Raises:
        NoBox: there can be none here.
    """
    _check()
    mount = folder / "box"
    mount.mkdir()
    script = _BOOT.format(
        mount=shlex.quote(str(mount)),
        code=shlex.quote(str(Path(inferencia.__file__).parent.parent)),
        packages=shlex.quote(sysconfig.get_path("purelib")),
        target=shlex.quote(_TARGET),
        paths=_PATHS,
        systemd=SYSTEMD,
    )
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount"]
    unshare += ["--uts", "--ipc", "--cgroup", "sh", "-c", script]
    log = folder / "box.log"
    with log.open("wb") as output:
        outside = subprocess.Popen(
            unshare, stdout=output, stderr=output, start_new_session=True
        )
    try:
        box = Box(_first(outside, log))
        _install(box)
        yield box
    finally:
        # With the first process all others of the box end, and its mounts with them.
        outside.send_signal(signal.SIGKILL)
        outside.wait(PATIENCE)


def _check() -> None:
    if sys.platform != "linux" or os.getuid() != 0:
        raise NoBox("it takes root on Linux")
    if not SYSTEMD.exists():
        raise NoBox("there is no systemd")
    asked = "import sys, venv; print(*sys.version_info[:2])"
    told = subprocess.run([PYTHON, "-c", asked], capture_output=True, text=True)
    if told.stdout.split() != [str(part) for part in sys.version_info[:2]]:
        raise NoBox(f"{PYTHON} is not of the version of the tests' Python")


def _first(outside: "subprocess.Popen[bytes]", log: Path) -> int:
    """The first process of the box, as it is numbered outside, once it takes orders."""
    children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and outside.poll() is None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            (first,) = map(int, children.read_text().split())
            command = ("systemctl", "is-active", "nothing.target")
            is_systemd = Path(f"/proc/{first}/comm").read_text().strip() == "systemd"
            if is_systemd and Box(first).run(*command).returncode == 0:
                return first
        time.sleep(LOOK_SECONDS)
    raise NoBox(f"systemd does not start in namespaces here: {log.read_text()[-500:]}")


def _install(box: Box) -> None:
    """A virtual environment that finds the packages of the tests'."""
    box.did(str(PYTHON), "-m", "venv", "--without-pip", PREFIX)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = f"{PREFIX}/lib/{version}/site-packages"
    box.write(f"{packages}/box.pth", "/opt/code\n/opt/packages\n")
    box.write(
        f"{PREFIX}/bin/inferencia",
        f'#!/bin/sh\nexec {PREFIX}/bin/python3 -P -m inferencia "$@"\n',
    )
    box.did("chmod", "755", f"{PREFIX}/bin/inferencia")
