"""What the operating system says about processes, and how to hold them to a core.

Linux is read from ``/proc``; elsewhere ``ps`` is asked, whose times are as exact as it
prints them (hundredths of a second on macOS).
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_IS_LINUX = sys.platform == "linux"


def run(main: Coroutine[None, None, None], *, fast_loop: bool) -> None:
    """``asyncio.run``, on uvloop if wanted and installed."""
    if fast_loop and has_uvloop():
        import uvloop

        uvloop.run(main)
    else:
        asyncio.run(main)


def has_uvloop() -> bool:
    """Whether uvloop can be imported here."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return False
    return True


def cpu_seconds(pid: int) -> float:
    """User and system time that all threads of a process have used so far."""
    if _IS_LINUX:
        # The name may hold spaces and brackets; fields count from the last bracket.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return _clock(_ps(pid, "time"))


def rss_bytes(pid: int) -> int:
    """Memory of a process that is in RAM now."""
    if _IS_LINUX:
        pages = (_PROC / str(pid) / "statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return int(_ps(pid, "rss")) * 1024


def children_of(pid: int) -> list[int]:
    """The child processes of a process that are programs of their own kind.

    Not among them: shells, which only watch over another child.
    """
    lines = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,comm="],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    rows = (line.split(None, 2) for line in lines)
    return [
        int(child)
        for child, parent, name in rows
        if int(parent) == pid and Path(name).name not in ("sh", "ps")
    ]


def offspring_of(pid: int) -> list[int]:
    """A process and all that it has started, and these, and so on."""
    found = [pid]
    for one in found:
        found += children_of(one)
    return found


def busy_seconds() -> float | None:
    """Time that all cores together have worked so far; None where it is not told."""
    if not _IS_LINUX:
        return None
    fields = (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = [int(field) for field in fields[:8]]
    idle = ticks[3] + ticks[4]  # idle and waiting for a disk
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def _ps(pid: int, field: str) -> str:
    asked = subprocess.run(
        ["ps", "-o", f"{field}=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return asked.stdout.strip()


def _clock(text: str) -> float:
    """Seconds in ``[[days-]hours:]minutes:seconds`` as ``ps`` prints them."""
    days, _, rest = text.rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + int(days or 0) * 86400


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core each side is held to; None where the system cannot do that."""

    proxy: int | None
    mock: int | None
    load: int | None

    @classmethod
    def choose(cls) -> "Cores":
        """The proxy gets one core for itself, mock and load generator what is left.

        With two cores mock and load generator share the second one.
        """
        if sys.platform != "linux":
            return cls(None, None, None)
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) == 1:
            return cls(None, None, None)
        return cls(cores[0], cores[1], cores[2] if len(cores) > 2 else cores[1])


def pin(pid: int, core: int | None) -> None:
    """Hold a process that has just been started, and its later threads, to a core."""
    if core is not None and sys.platform == "linux":
        os.sched_setaffinity(pid, {core})
