"""What the operating system knows of processes and their groups.

On Linux it is read from ``/proc`` (proc(5)). Elsewhere ``ps`` tells when a process
started, and the rest is not known, which the functions say by None: a caller then does
without. Nothing here is cached, since all of it changes at any time.

``watch_exit`` tells an event loop that a process has ended, without the child watchers
of asyncio, which differ in each version of Python and do not exist in uvloop.
"""

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")

# A listener whose line of those who wait for it is full leaves a connection open.
_CONNECT_SECONDS = 0.5

# Programs behind which a server runs that is no process of ours: in a container, on
# another machine, as another user. Who listens for it is none of our group either.
GO_BETWEENS = frozenset(
    "docker podman nerdctl crun runc kubectl ssh sudo doas su lxc incus systemd-run "
    "systemctl machinectl flatpak flatpak-spawn distrobox toolbox nsenter snap".split()
)

# In /proc/net/tcp: all addresses, loopback, and each as IPv6 writes it. The groups of
# four bytes stand in the machine's order; on a big-endian one nothing matches, and the
# owner of a port is not known.
_LOCAL = re.compile("(?:0{24}|0{16}FFFF0000)?(?:0{8}|[0-9A-F]{6}7F)|0{24}01000000")
_LISTENS = "0A"


@dataclass(frozen=True, slots=True)
class Stat:
    """A line of ``/proc/PID/stat``."""

    pid: int
    state: str  # one letter; Z: it is dead, and its parent has not asked yet
    parent: int
    group: int
    started: str  # in clock ticks since the machine started

    @property
    def is_alive(self) -> bool:
        return self.state not in "ZX"


def stat(pid: int) -> Stat | None:
    """What a process is; None if there is none, or no ``/proc``."""
    try:
        text = (_PROC / str(pid) / "stat").read_text("ascii", "replace")
    except OSError:
        return None
    # The program's name stands in parentheses and may hold any character.
    fields = text.rpartition(")")[2].split()
    return Stat(pid, fields[0], int(fields[1]), int(fields[2]), fields[19])


def mark(pid: int) -> str | None:
    """A text that no other process has had or will have: which boot, and when.

    None if there is no such process, or only its remains, or if a sandbox keeps us
    from knowing.
    """
    if not _has_proc():
        return _mark_by_ps(pid)
    found = stat(pid)
    if found is None or not found.is_alive:
        return None
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return None
    return f"{boot} {found.started}"


def _mark_by_ps(pid: int) -> str | None:
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    env = {"PATH": os.defpath + ":/usr/sbin:/sbin", "LC_ALL": "C", "TZ": "UTC"}
    try:
        told = subprocess.run(command, capture_output=True, env=env, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    state, _, started = told.stdout.decode("ascii", "replace").strip().partition(" ")
    return None if state.startswith("Z") else started.strip() or None


def owner(pid: int) -> int | None:
    """The user a process runs as; None if that is not known."""
    try:
        return (_PROC / str(pid)).stat().st_uid
    except OSError:
        return None


def lives(group: int) -> bool:
    """Whether somebody in a process group is alive; the dead do not count."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody of another user; on macOS also one who is dead
    if not _has_proc():
        return True
    return any(one.group == group and one.is_alive for one in _all())


def reap_adopted(group: int) -> None:
    """Take note of dead grandchildren that became ours, as they do if we are init."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


def family(group: int) -> frozenset[int] | None:
    """The processes of a group and all that descend from them.

    None where that is not known.
    """
    if not _has_proc():
        return None
    return frozenset(one.pid for one in _relatives(group))


def with_departed(group: int) -> frozenset[int]:
    """A group, and the groups that descendants of it have made (setsid, job control).

    Nobody else is in those: a group stays within one session, and a session has only
    its leader's descendants (setpgid(2), setsid(2)). Whose parent has ended descends
    from nobody any more, and so is not found. Where nothing is known, the group alone.
    """
    if not _has_proc():
        return frozenset({group})
    # A group of another PID namespace has the number 0, which would mean our own.
    found = {one.group for one in _relatives(group) if one.group > 1}
    return frozenset(found | {group})


def _relatives(group: int) -> list[Stat]:
    everybody = list(_all())
    found = {one.pid for one in everybody if one.group == group}
    while more := {one.pid for one in everybody if one.parent in found} - found:
        found |= more
    return [one for one in everybody if one.pid in found]


def resident(group: int) -> int | None:
    """Bytes of memory that a group and its descendants occupy; None if unknown.

    What a process shares (a mapped model file, shared memory) is taken to be shared
    with the others of its group. The exact figure of ``smaps_rollup`` would take the
    kernel a walk through every page of the model.
    """
    members = family(group)
    if not members:
        return None
    private = shared = 0
    for pid in members:
        with contextlib.suppress(OSError):
            fields = (_PROC / str(pid) / "statm").read_text("ascii").split()
            pages, of_files = int(fields[1]), int(fields[2])
            private += pages - of_files
            shared = max(shared, of_files)
    return (private + shared) * _PAGE


# --- ports ----------------------------------------------------------------------


async def is_taken(port: int) -> bool:
    """Whether somebody listens on this port of the loopback addresses."""
    families = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
    for kind, host in families:
        if await _answers(kind, host, port):
            return True
    return False


async def _answers(kind: socket.AddressFamily, host: str, port: int) -> bool:
    try:
        trial = socket.socket(kind, socket.SOCK_STREAM)
    except OSError:
        return False  # this machine knows no IPv6
    with trial:
        trial.setblocking(False)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(trial, (host, port))
        except TimeoutError:
            return True
        except OSError:
            return False
        # A port from the range of outgoing connections can meet itself
        # (RFC 9293, 3.5: simultaneous open).
        return bool(trial.getsockname() != trial.getpeername())


def owns_port(group: int, port: int) -> bool | None:
    """Whether all who listen on a port belong to a group or descend from it.

    All, because llama-server lets others share its port (``SO_REUSEPORT``), and the
    system then spreads connections over them.

    Returns:
        None if that cannot be told: there is no ``/proc``, a process is not ours to
        look into, or the server is reached through one of ``GO_BETWEENS``.
    """
    foreign = _listeners(port)
    if not foreign:
        return None
    try:
        foreign -= _sockets(group)  # the usual case, without looking at everybody
        if not foreign:
            return True
        members = family(group) or frozenset()
        for pid in members:
            foreign -= _sockets(pid)
    except PermissionError:
        return None
    if foreign and any(_name(pid) in GO_BETWEENS for pid in members):
        return None
    return not foreign


def _listeners(port: int) -> set[str]:
    """The inodes of the sockets that listen on a port, so that loopback finds them."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), (_PROC / "self/net" / table).open() as lines:
            next(lines, None)  # the heading
            for line in lines:
                fields = line.split()
                if fields[3] != _LISTENS:
                    break  # those who listen come first; connections are many
                address, _, number = fields[1].rpartition(":")
                if int(number, 16) == port and _LOCAL.fullmatch(address):
                    found.add(fields[9])
    return found


def _sockets(pid: int) -> set[str]:
    """The inodes of a process's sockets.

    Raises:
        PermissionError: it is not ours to look into.
    """
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        folder = _PROC / str(pid) / "fd"
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                kind, _, inode = os.readlink(folder / name).partition(":")
                if kind == "socket":
                    found.add(inode.strip("[]"))
    return found


# --- the end of a process -------------------------------------------------------


def watch_exit(
    process: "subprocess.Popen[bytes]", callback: Callable[[], None]
) -> None:
    """Call back in the running loop as soon as a child of ours has ended.

    On Linux it is not yet reaped at that moment, so its number, and its group's, still
    belong to it. ``process.wait()`` then returns at once.
    """
    loop = asyncio.get_running_loop()
    try:
        watched = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # no Linux, an old one, or a sandbox
        _watch_in_thread(process, loop, callback)
        return

    def ended() -> None:
        loop.remove_reader(watched)
        os.close(watched)
        callback()

    loop.add_reader(watched, ended)


def _watch_in_thread(
    process: "subprocess.Popen[bytes]",
    loop: asyncio.AbstractEventLoop,
    callback: Callable[[], None],
) -> None:
    def wait() -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(callback)

    threading.Thread(target=wait, name=f"wait-{process.pid}", daemon=True).start()


def _has_proc() -> bool:
    return (_PROC / "self/stat").exists()


def _all() -> Iterator[Stat]:
    for name in os.listdir(_PROC):
        if name.isdecimal() and (found := stat(int(name))):
            yield found


def _name(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text("utf-8", "replace").strip()
    except OSError:
        return ""
