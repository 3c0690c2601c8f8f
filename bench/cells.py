"""What is measured: the cells, and the rows of the table that are made of them.

A cell is one job against one target; it gives several values. A row is one of those
values, with the unit it is printed in and the direction that is better.
"""

from dataclasses import dataclass
from typing import Final, Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How much time each kind of cell gets, in seconds; ``--quick`` takes less."""

    rounds: int
    requests: float
    first_byte_count: int
    paced: float
    warm: float
    prompts: int
    held: int  # open streams of which the memory is taken
    search: float  # for each try at the most streams; 0: not searched, no peers


FULL: Final = Pace(
    rounds=5,
    requests=3.0,
    first_byte_count=600,
    paced=4.0,
    warm=0.7,
    prompts=20,
    held=200,
    search=1.2,
)
QUICK: Final = Pace(
    rounds=2,
    requests=0.6,
    first_byte_count=150,
    paced=1.1,
    warm=0.2,
    prompts=5,
    held=100,
    search=0.0,
)

#: Between two tokens of one stream: 140 tokens a second, a fast small model.
INTERVAL_US: Final = 7000


#: The most streams that are tried at once, and how exact the number is.
MOST_HELD: Final = 1024
HELD_STEP: Final = 64

#: A proxy holds so many streams if nearly all events pass within this time.
HELD_LAG_US: Final = 50_000.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement."""

    name: str
    kind: str  # a kind of ``load.Job``, or ``start``
    connections: int = 1
    body_bytes: int = 1024
    is_for_direct: bool = True  # whether it means anything without a proxy


CELLS: Final = (
    Cell("rps1", "requests", 1),
    Cell("rps32", "requests", 32),
    Cell("rps256", "requests", 256),
    Cell("ttfb", "first_byte"),
    Cell("paced32", "paced", 32),
    Cell("paced128", "paced", 128),
    Cell("held", "held", is_for_direct=False),
    Cell("prompt1", "prompt", body_bytes=1 << 20),
    Cell("prompt8", "prompt", body_bytes=8 << 20),
    Cell("start", "start", is_for_direct=False),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    title: str
    cell: str
    value: str  # name among the cell's values
    better: Better
    is_added: bool = False  # less what direct took in the same round
    scale: float = 1.0
    digits: int = 0


ROWS: Final = (
    Row("requests/s, 1 connection", "rps1", "per_second", "higher"),
    Row("requests/s, 32 connections", "rps32", "per_second", "higher"),
    Row("requests/s, 256 connections", "rps256", "per_second", "higher"),
    Row("CPU us per request, 32 connections", "rps32", "cpu_us", "lower", digits=1),
    Row("added us to first byte, p50", "ttfb", "first_byte_p50_us", "lower", True),
    Row("added us to first byte, p99", "ttfb", "first_byte_p99_us", "lower", True),
    Row("CPU us per chunk, 32 streams", "paced32", "cpu_us", "lower", digits=1),
    Row("CPU us per chunk, 128 streams", "paced128", "cpu_us", "lower", digits=1),
    Row("lag us of a chunk, 128 streams, p50", "paced128", "lag_p50_us", "lower"),
    Row("lag us of a chunk, 128 streams, p99", "paced128", "lag_p99_us", "lower"),
    Row("streams held, lag p99 <= 50 ms", "held", "streams", "higher"),
    Row(
        "ms per 1 MiB prompt, p50",
        "prompt1",
        "latency_p50_us",
        "lower",
        scale=1e-3,
        digits=2,
    ),
    Row(
        "ms per 8 MiB prompt, p50",
        "prompt8",
        "latency_p50_us",
        "lower",
        scale=1e-3,
        digits=2,
    ),
    Row("s from start to first answer", "start", "start_s", "lower", digits=2),
    Row("MiB of memory when idle", "start", "idle_mib", "lower", digits=1),
    Row("KiB of memory per open stream", "start", "kib_per_stream", "lower", digits=1),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """A row in which the gateway must be at least as good as the yardstick."""

    title: str
    cell: str
    value: str
    better: Better


GOALS: Final = (
    Goal("requests/s at 32 connections", "rps32", "per_second", "higher"),
    Goal("CPU per chunk at 128 streams", "paced128", "cpu_us", "lower"),
)
