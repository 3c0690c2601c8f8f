"""How busy the machine is, as it can be found out."""

from collections.abc import Sequence
from pathlib import Path

from inferencia.host import Gpu, Host


def host(
    files: dict[str, str] | None = None,
    printed: str | None = None,
    *,
    system: str = "linux",
    texts: dict[str, str] | None = None,
) -> Host:
    def run(command: Sequence[str]) -> str | None:
        return (texts or {}).get(command[0], printed)

    found = files or {}
    has = "x" if printed is not None else None
    return Host(read=found.get, run=run, system=system, has=lambda name: has)


def test_this_machine_tells_what_it_can(tmp_path: Path) -> None:
    figures = Host().read(tmp_path / "not" / "there")
    assert figures.cpus >= 1 and figures.name
    assert figures.disk is not None
    assert 0 < figures.disk.free <= figures.disk.total


def test_processors_are_busy_as_much_as_their_ticks_say() -> None:
    files = {"/proc/stat": "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1"}
    one = host(files)
    assert one.read(None).cpu is None
    files["/proc/stat"] = "cpu  130 0 120 840 10 0 0 0 0 0\n"
    assert one.read(None).cpu == 0.5
    # Two looks at once say nothing new.
    assert one.read(None).cpu == 0.5


def test_memory_is_what_nobody_can_have() -> None:
    text = "MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable:  400 kB\n"
    figures = host({"/proc/meminfo": text}).read(None)
    assert (figures.memory_total, figures.memory_used) == (1024000, 614400)


def test_a_sandbox_that_hides_everything_is_no_error() -> None:
    figures = host({"/proc/stat": "nonsense", "/proc/meminfo": "x"}).read(None)
    assert (figures.cpu, figures.memory_total, figures.memory_used) == (None,) * 3
    assert (figures.disk, figures.gpus) == (None, ())


def test_cards_tell_what_they_do_and_may_keep_silent() -> None:
    printed = (
        "NVIDIA GeForce RTX 3090, 93, 24576, 9216, 61, 301.50\n"
        "Tesla, [N/A], 8192, [Not Supported], 40, [N/A]\ngarbage\n"
    )
    assert host(printed=printed).read(None).gpus == (
        Gpu("NVIDIA GeForce RTX 3090", 0.93, 24 * 2**30, 9 * 2**30, 61.0, 301.5),
        Gpu("Tesla", None, 8 * 2**30, None, 40.0, None),
    )
    device = "/sys/class/drm/card1/device"
    files = {
        f"{device}/mem_info_vram_total": str(16 * 2**30),
        f"{device}/mem_info_vram_used": str(2**30),
        f"{device}/gpu_busy_percent": "7\n",
        "/sys/class/drm/card0/device/mem_info_vram_total": str(2**29),  # a small one
    }
    assert host(files).read(None).gpus == (Gpu("AMD card 1", 0.07, 16 * 2**30, 2**30),)


def test_a_mac_is_asked_in_its_own_way() -> None:
    texts = {
        "sysctl": "17179869184\n",
        "vm_stat": "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                 100.\nPages active:               1000.\n"
        "Pages wired down:            500.\nPages occupied by compressor: 36.\n",
    }
    figures = host(system="darwin", texts=texts).read(None)
    assert figures.memory_total == 16 * 2**30
    assert figures.memory_used == 1536 * 16384
