"""How busy this machine is: processors, memory, disk, graphics cards.

From ``/proc``, ``nvidia-smi`` and ``/sys/class/drm``; on macOS from ``sysctl`` and
``vm_stat``. What a sandbox or another system does not tell is None. Reading may take a
second where a card's driver sleeps, so ``read`` belongs into a thread. Nothing here
raises.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inferencia.models.capacity import LEAST_CARD, read_text, run

ReadText = Callable[[str], str | None]
Run = Callable[[Sequence[str]], str | None]

_NVIDIA = (
    "nvidia-smi",
    "--query-gpu=name,utilization.gpu,memory.total,memory.used,"
    "temperature.gpu,power.draw",
    "--format=csv,noheader,nounits",
)
_MIB = 1024**2
_CARDS = 8

# Two looks at the processors' clocks that are closer say nothing (a tick is 10 ms).
_LEAST_TICKS = 5

# Of vm_stat's pages: what nobody can be given without writing something away.
_VM_USED = ("Pages active", "Pages wired down", "Pages occupied by compressor")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics card."""

    name: str
    use: float | None  # 0 to 1
    memory_total: int | None  # bytes
    memory_used: int | None
    temperature: float | None = None  # degrees Celsius
    power: float | None = None  # watts


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of a folder."""

    path: str
    total: int  # bytes
    free: int  # for us


@dataclass(frozen=True, slots=True)
class Figures:
    """This machine at one moment."""

    name: str
    cpus: int
    load: tuple[float, float, float] | None  # of 1, 5 and 15 minutes
    cpu: float | None  # 0 to 1, since the look before
    memory_total: int | None  # bytes
    memory_used: int | None
    disk: Disk | None
    gpus: tuple[Gpu, ...] = ()


class Host:
    """Looks at the machine again and again."""

    def __init__(
        self,
        *,
        read: ReadText = read_text,
        run: Run = run,
        system: str = sys.platform,
        has: Callable[[str], object] = shutil.which,
    ) -> None:
        self._read = read
        self._run = run
        self._is_mac = system == "darwin"
        self._has_nvidia = has(_NVIDIA[0]) is not None
        self._ticks: tuple[int, int] | None = None  # busy and all, at the last look
        self._cpu: float | None = None

    def read(self, folder: Path | None) -> Figures:
        """Look now; not from two threads at once.

        Args:
            folder: whose file system is of interest.
        """
        total, used = self._mac_memory() if self._is_mac else self._memory()
        return Figures(
            name=platform.node(),
            cpus=os.cpu_count() or 1,
            load=_load(),
            cpu=self._busy(),
            memory_total=total,
            memory_used=used,
            disk=_disk(folder),
            gpus=self._gpus(),
        )

    def _busy(self) -> float | None:
        """How much of the processors' time was used since the last look."""
        ticks = _ticks(self._read("/proc/stat"))
        if ticks is None:
            return None
        before = self._ticks
        if before is None or ticks[1] - before[1] >= _LEAST_TICKS:
            self._ticks = ticks
            if before is not None:
                share = (ticks[0] - before[0]) / (ticks[1] - before[1])
                self._cpu = round(min(1.0, max(0.0, share)), 3)
        return self._cpu

    def _memory(self) -> tuple[int | None, int | None]:
        found = {}
        for line in (self._read("/proc/meminfo") or "").splitlines():
            name, _, rest = line.partition(":")
            number = _whole(rest.strip().removesuffix("kB"))
            if number is not None:
                found[name] = number * 1024
        total, left = found.get("MemTotal"), found.get("MemAvailable")
        return total, None if total is None or left is None else total - left

    def _mac_memory(self) -> tuple[int | None, int | None]:
        total = _whole(self._run(("sysctl", "-n", "hw.memsize")) or "")
        text = self._run(("vm_stat",)) or ""
        page = re.search(r"page size of (\d+) bytes", text)
        pages = re.findall(rf"^(?:{'|'.join(_VM_USED)}):\s+(\d+)\.", text, re.M)
        used = sum(map(int, pages)) * int(page[1]) if page and pages else None
        return total, used

    def _gpus(self) -> tuple[Gpu, ...]:
        if self._has_nvidia and (cards := _nvidia(self._run(_NVIDIA) or "")):
            return cards
        return () if self._is_mac else tuple(self._amd())

    def _amd(self) -> list[Gpu]:
        cards = []
        for number in range(_CARDS):
            device = f"/sys/class/drm/card{number}/device"
            total = _whole(self._read(f"{device}/mem_info_vram_total") or "")
            if total is None or total < LEAST_CARD:
                continue
            use = _whole(self._read(f"{device}/gpu_busy_percent") or "")
            name = (self._read(f"{device}/product_name") or "").strip()
            used = _whole(self._read(f"{device}/mem_info_vram_used") or "")
            share = None if use is None else use / 100
            cards.append(Gpu(name or f"AMD card {number}", share, total, used))
        return cards


def _load() -> tuple[float, float, float] | None:
    try:
        one, five, fifteen = os.getloadavg()
    except OSError:
        return None
    return round(one, 2), round(five, 2), round(fifteen, 2)


def _ticks(text: str | None) -> tuple[int, int] | None:
    """Busy and all ticks of the processors (proc(5), /proc/stat)."""
    fields = (text or "").partition("\n")[0].split()
    numbers = [int(field) for field in fields[1:9] if field.isascii()]
    if len(numbers) < 5 or fields[0] != "cpu":
        return None
    idle = numbers[3] + numbers[4]  # of which those that wait for a disk are a part
    return sum(numbers) - idle, sum(numbers)


def _disk(folder: Path | None) -> Disk | None:
    """The file system of a folder, or of the nearest one above that is there."""
    if folder is None:
        return None
    for place in (folder, *folder.parents):
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        size = found.f_frsize
        return Disk(str(folder), found.f_blocks * size, found.f_bavail * size)
    return None


def _nvidia(text: str) -> tuple[Gpu, ...]:
    cards = []
    for line in text.splitlines():
        name, *values = (cell.strip() for cell in line.split(","))
        if len(values) != 5:
            continue
        # "[N/A]" and the like where a card does not tell.
        use, total, used, degrees, watts = map(_number, values)
        cards.append(
            Gpu(
                name,
                None if use is None else use / 100,
                None if total is None else int(total * _MIB),
                None if used is None else int(used * _MIB),
                degrees,
                watts,
            )
        )
    return tuple(cards)


def _whole(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,12}(?:\.\d{1,6})?", text) else None
