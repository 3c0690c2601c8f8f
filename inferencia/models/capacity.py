"""How much memory this machine has for models.

Video memory where there is some, else the system's; some is left for everybody else.
The first of these that says something:

    NVIDIA      ``nvidia-smi``, all cards together
    AMD         ``/sys/class/drm/card*/device/mem_info_vram_total``; what a processor
                with graphics sets apart for itself is too small to count
    Apple       what Metal lets one program have: two thirds of the memory, or three
                quarters above 36 GiB, unless ``iogpu.wired_limit_mb`` says otherwise
    otherwise   ``MemTotal``, or the limit of our control group if that is lower

Runs programs and reads files, so it blocks: call it from a thread. Nothing here raises.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ReadText = Callable[[str], str | None]
Run = Callable[[Sequence[str]], str | None]

GIB = 1024**3

# nvidia-smi takes a second or two where the driver is not kept loaded.
_PATIENCE_SECONDS = 5.0
# What llama-server itself leaves free on each card (--fit-target).
_CARD_RESERVE = GIB
_SYSTEM_RESERVE = 2 * GIB
# Less video memory is a processor's own graphics, not a place for models.
LEAST_CARD = 4 * GIB
_CARDS = 8

_NVIDIA = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Capacity:
    """What models may take together."""

    bytes: int  # 0: nothing could be found out
    source: str  # "2 NVIDIA cards", "system memory", ...
    total: int  # before the reserve


def read_text(path: str) -> str | None:
    """A small system file's text; None if it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def run(command: Sequence[str]) -> str | None:
    """What a program prints; None if it is not there, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("ascii", "replace")


def detected_budget(
    *,
    read: ReadText = read_text,
    run: Run = run,
    platform: str = sys.platform,
) -> Capacity:
    """Find out how much memory models may take together."""
    if platform == "darwin":
        return _apple(run)
    cards = _nvidia(run)
    if cards:
        return _on_cards(cards, "NVIDIA")
    cards = _amd(read)
    if cards:
        return _on_cards(cards, "AMD")
    total = _system(read)
    reserve = max(_SYSTEM_RESERVE, total // 10)
    return Capacity(_less(total, reserve), "system memory", total)


def _less(total: int, reserve: int) -> int:
    """``total`` without the reserve, but never below its half."""
    return max(total - reserve, total // 2)


def _on_cards(cards: Sequence[int], brand: str) -> Capacity:
    total = sum(cards)
    source = f"{brand} card" if len(cards) == 1 else f"{len(cards)} {brand} cards"
    return Capacity(sum(_less(card, _CARD_RESERVE) for card in cards), source, total)


def _whole(text: str | None) -> int:
    """The number that a file or program says; 0 for anything else."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _nvidia(run: Run) -> list[int]:
    lines = (run(_NVIDIA) or "").splitlines()
    return [size * 1024**2 for line in lines if (size := _whole(line))]


def _amd(read: ReadText) -> list[int]:
    files = [
        f"/sys/class/drm/card{number}/device/mem_info_vram_total"
        for number in range(_CARDS)
    ]
    return [size for file in files if (size := _whole(read(file))) >= LEAST_CARD]


def _apple(run: Run) -> Capacity:
    total = _whole(run(("sysctl", "-n", "hw.memsize")))
    wired = _whole(run(("sysctl", "-n", "iogpu.wired_limit_mb"))) * 1024**2
    share = total * 3 // 4 if total > 36 * GIB else total * 2 // 3
    return Capacity(min(wired, total) or share, "Apple memory", total)


def _system(read: ReadText) -> int:
    total = 0
    for line in (read("/proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            total = _whole(rest.strip().removesuffix("kB")) * 1024
    limits = [size for file in _limit_files(read) if (size := _whole(read(file)))]
    # Without a limit, version 1 of control groups says a number near 2**63.
    return min([total, *limits]) if total else 0


def _limit_files(read: ReadText) -> list[str]:
    """Where our control group's limit stands, and those of the groups around it."""
    files = ["/sys/fs/cgroup/memory/memory.limit_in_bytes"]
    group = PurePosixPath("/")
    for line in (read("/proc/self/cgroup") or "").splitlines():
        if line.startswith("0::/"):
            group = PurePosixPath(line.removeprefix("0::"))
    for place in (group, *group.parents):
        files.append(f"/sys/fs/cgroup{place}".rstrip("/") + "/memory.max")
    return files
