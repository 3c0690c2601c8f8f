"""Samples in, one table and a verdict out. Pure.

Values are medians over the rounds. The ratio is the median of the rounds' own ratios,
gateway to yardstick: what disturbs the machine for a while disturbs both sides of one
round, and both sides of the ratio.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from bench.cells import GOALS, ROWS, Goal, Row
from bench.peers import HAPROXY, NGINX

DIRECT: Final = "direct"
YARDSTICK: Final = "yardstick"
GATEWAY: Final = "inferencia"
PEERS: Final = (NGINX, HAPROXY)
TARGETS: Final = (DIRECT, *PEERS, YARDSTICK, GATEWAY)

#: Below this share of the planned events the load side was too slow to judge by.
_LEAST_OFFERED: Final = 0.95
#: From here on the load side's core is full, so a rate is a lower bound.
_LOAD_FULL: Final = 0.95
#: Above this share of the machine, something else is running.
_MUCH_FOREIGN: Final = 0.10


@dataclass(frozen=True, slots=True)
class Sample:
    """What one cell gave for one target in one round."""

    round: int
    cell: str
    target: str
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Line:
    """A row with its figures; None where nothing was measured."""

    row: Row
    medians: dict[str, float]
    ratio: float | None
    lowest: float | None  # the rounds' ratios, from
    highest: float | None  # to


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a goal is reached; None if it was not measured."""

    goal: Goal
    ratio: float | None
    passed: bool | None


class Samples:
    """All samples of a run, looked up by cell, target and round."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.all = tuple(samples)
        self._by = {(s.cell, s.target, s.round): s for s in self.all}
        self._rounds = sorted({s.round for s in self.all})

    def series(self, row: Row, target: str) -> dict[int, float]:
        """The row's value by round, where it was measured without errors."""
        series = {}
        for number in self._rounds:
            value = self._value(row, target, number)
            if value is not None:
                series[number] = value
        return series

    def _value(self, row: Row, target: str, number: int) -> float | None:
        value = self._raw(row, target, number)
        if value is None or not row.is_added:
            return value
        base = self._raw(row, DIRECT, number)
        if base is None or target == DIRECT:
            return None
        return value - base

    def _raw(self, row: Row, target: str, number: int) -> float | None:
        sample = self._by.get((row.cell, target, number))
        if sample is None or sample.errors or row.value not in sample.values:
            return None
        return sample.values[row.value] * row.scale

    def has_errors(self, cell: str) -> bool:
        """Whether anything went wrong in this cell that a goal rests on."""
        return any(
            s.errors for s in self.all if s.cell == cell and s.target not in PEERS
        )

    def line(self, row: Row) -> Line:
        """Medians and ratios of one row."""
        series = {target: self.series(row, target) for target in TARGETS}
        ratios = [
            value / series[YARDSTICK][number]
            for number, value in series[GATEWAY].items()
            if series[YARDSTICK].get(number, 0) > 0
        ]
        return Line(
            row,
            {target: median(s.values()) for target, s in series.items() if s},
            median(ratios) if ratios else None,
            min(ratios, default=None),
            max(ratios, default=None),
        )

    def verdict(self, goal: Goal) -> Verdict:
        """A goal is missed if its cell had errors, whatever the figures say."""
        row = Row(goal.title, goal.cell, goal.value, goal.better)
        ratio = self.line(row).ratio
        if self.has_errors(goal.cell):
            return Verdict(goal, ratio, False)
        if ratio is None:
            return Verdict(goal, None, None)
        return Verdict(
            goal, ratio, ratio >= 1 if goal.better == "higher" else ratio <= 1
        )


def lines(samples: Samples) -> list[Line]:
    """The rows of the cells that were run."""
    run = {sample.cell for sample in samples.all}
    return [samples.line(row) for row in ROWS if row.cell in run]


def verdicts(samples: Samples) -> list[Verdict]:
    return [samples.verdict(goal) for goal in GOALS]


def table(rows: Sequence[Line]) -> str:
    """The figures in columns; the last one says which direction is better."""
    shown = [
        target
        for target in TARGETS
        if target not in PEERS or any(target in line.medians for line in rows)
    ]
    head = ("", *shown, "ratio", "rounds", "better")
    body = [
        (
            line.row.title,
            *(_figure(line.medians.get(target), line.row) for target in shown),
            "-" if line.ratio is None else f"{line.ratio:.2f}",
            _range(line),
            line.row.better,
        )
        for line in rows
    ]
    widths = [max(len(cells[i]) for cells in [head, *body]) for i in range(len(head))]
    return "\n".join(_padded(cells, widths) for cells in [head, *body])


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *others]).rstrip()


def _figure(value: float | None, row: Row) -> str:
    return "-" if value is None else f"{value:,.{row.digits}f}"


def _range(line: Line) -> str:
    if line.lowest is None or line.highest is None:
        return "-"
    return f"{line.lowest:.2f}..{line.highest:.2f}"


def notes(samples: Samples) -> list[str]:
    """What a reader must know before believing the table."""
    found = []
    for sample in samples.all:
        where = f"{sample.cell}, {sample.target}, round {sample.round + 1}"
        for error, count in sample.errors.items():
            found.append(f"ERROR {where}: {error} ({count}x); its figures are left out")
        values = sample.values
        if values.get("offered_share", 1) < _LEAST_OFFERED:
            share = values["offered_share"]
            found.append(f"{where}: only {share:.0%} of the events came in their time")
    full = {
        f"{s.cell} ({s.target})"
        for s in samples.all
        if s.values.get("load_share", 0) >= _LOAD_FULL and s.target != DIRECT
    }
    if full:
        found.append(
            "the load side's core was full, so these are lower bounds: "
            + ", ".join(sorted(full))
        )
    foreign = [
        s.values["foreign_share"] for s in samples.all if "foreign_share" in s.values
    ]
    if foreign:
        busy = sum(share > _MUCH_FOREIGN for share in foreign)
        found.append(
            f"other programs took {median(foreign):.0%} of the machine (median),"
            f" more than {_MUCH_FOREIGN:.0%} in {busy} of {len(foreign)} cells"
        )
    return found


def judgement(found: Sequence[Verdict]) -> str:
    """The last line: each goal, and all of them together."""
    words = {True: "pass", False: "FAIL", None: "not measured"}
    parts = []
    for verdict in found:
        ratio = "" if verdict.ratio is None else f" {verdict.ratio:.2f}x the yardstick:"
        parts.append(f"{verdict.goal.title}{ratio} {words[verdict.passed]}")
    return "goals: " + "; ".join(parts)
