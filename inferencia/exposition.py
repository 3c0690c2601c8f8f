"""Metrics and their text form, version 0.0.4 of Prometheus.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format

A family has a name, a help text and label names; each set of label values is a child
that counts. ``labels`` finds a child by one dictionary look-up, so counting costs about
a microsecond. Families do not grow without bound: past ``max_children``, everything
new is counted by one child whose label values are all ``other``.

Nothing here is shared between threads.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Literal, Protocol, TypeVar

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Enough for 20 keys, 20 models and 5 statuses; rendered in about 10 milliseconds.
MAX_CHILDREN = 2000
OTHER = "other"

_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")


class _Child(Protocol):
    def lines(self, name: str, labels: str) -> Iterator[str]: ...


class _Lines(Protocol):
    name: str

    def lines(self) -> Iterator[str]: ...


C = TypeVar("C", bound=_Child)
F = TypeVar("F", bound=_Lines)


class CounterChild:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Add ``amount``, which must not be negative."""
        self.value += amount

    def lines(self, name: str, labels: str) -> Iterator[str]:
        yield f"{name}{_braced(labels)} {_number(self.value)}\n"


class GaugeChild(CounterChild):
    """A number that goes up and down."""

    __slots__ = ()

    def dec(self, amount: float = 1) -> None:
        """Subtract ``amount``."""
        self.value -= amount

    def set(self, value: float) -> None:
        """Replace the number."""
        self.value = value


class HistogramChild:
    """Counts how many observations were at most so large."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        """How many observations there were."""
        return sum(self._counts)

    def lines(self, name: str, labels: str) -> Iterator[str]:
        lead = f"{name}_bucket{{{labels}," if labels else f"{name}_bucket{{"
        total = 0
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            yield f'{lead}le="{_number(bound)}"}} {total}\n'
        yield f"{name}_sum{_braced(labels)} {_number(self._sum)}\n"
        yield f"{name}_count{_braced(labels)} {total}\n"


class Family(Generic[C]):
    """All children of one name."""

    def __init__(
        self,
        name: str,
        help_text: str,
        kind: Literal["counter", "gauge", "histogram"],
        labels: Sequence[str],
        new_child: Callable[[], C],
        max_children: int,
    ) -> None:
        self.head = _head(name, help_text, kind, labels)
        self.name = name
        self._label_names = tuple(labels)
        self._new_child = new_child
        self._max_children = max_children
        self._children: dict[tuple[str, ...], C] = {}
        self._written: dict[tuple[str, ...], str] = {}  # labels as text
        if not labels:
            self.labels()  # without labels there is one child, from the start

    def labels(self, *values: str) -> C:
        """The child with these label values, in the order of the label names."""
        child = self._children.get(values)
        return self._make(values) if child is None else child

    def _make(self, values: tuple[str, ...]) -> C:
        if len(values) != len(self._label_names):
            raise ValueError(f"{self.name} has the labels {self._label_names}")
        others = (OTHER,) * len(values)
        if len(self._children) >= self._max_children and others != values:
            return self.labels(*others)
        self._written[values] = _labels(self._label_names, values)
        child = self._children[values] = self._new_child()
        return child

    def lines(self) -> Iterator[str]:
        """The family as text, line by line."""
        yield self.head
        for values, child in self._children.items():
            yield from child.lines(self.name, self._written[values])


class Sampled:
    """A family whose numbers are asked for whenever it is rendered."""

    def __init__(
        self,
        name: str,
        help_text: str,
        kind: Literal["counter", "gauge"],
        labels: Sequence[str],
        read: Callable[[], Iterable[tuple[tuple[str, ...], float]]],
    ) -> None:
        self.head = _head(name, help_text, kind, labels)
        self.name = name
        self._label_names = tuple(labels)
        self._read = read

    def lines(self) -> Iterator[str]:
        """The family as text, line by line; of equal label sets the last counts."""
        yield self.head
        for values, number in dict(self._read()).items():
            labels = _labels(self._label_names, values)
            yield f"{self.name}{_braced(labels)} {_number(number)}\n"


class Exposition:
    """Families in the order in which they were made; names are unique."""

    def __init__(self) -> None:
        self._families: dict[str, _Lines] = {}

    def counter(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str] = (),
        max_children: int = MAX_CHILDREN,
    ) -> Family[CounterChild]:
        """A new family of counters; by convention its name ends in ``_total``."""
        return self._add(
            Family(name, help_text, "counter", labels, CounterChild, max_children)
        )

    def gauge(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str] = (),
        max_children: int = MAX_CHILDREN,
    ) -> Family[GaugeChild]:
        """A new family of gauges."""
        return self._add(
            Family(name, help_text, "gauge", labels, GaugeChild, max_children)
        )

    def histogram(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str] = (),
        *,
        bounds: Sequence[float],
        max_children: int = MAX_CHILDREN,
    ) -> Family[HistogramChild]:
        """A new family of histograms.

        Args:
            name: of the family.
            help_text: one sentence.
            labels: names of the labels; ``le`` is taken.
            bounds: the buckets' upper bounds, rising, without infinity.
            max_children: each child has a line per bucket.
        """
        rising = tuple(bounds)
        if list(rising) != sorted(set(rising)) or "le" in labels:
            raise ValueError(f"{name}: bounds must rise, and le is no label")
        return self._add(
            Family(
                name,
                help_text,
                "histogram",
                labels,
                lambda: HistogramChild(rising),
                max_children,
            )
        )

    def sampled(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str],
        read: Callable[[], Iterable[tuple[tuple[str, ...], float]]],
        *,
        kind: Literal["counter", "gauge"] = "gauge",
    ) -> None:
        """A family whose samples are asked for at each rendering."""
        self._add(Sampled(name, help_text, kind, labels, read))

    def render(self) -> bytes:
        """Everything as text, in UTF-8."""
        lines = [line for family in self._families.values() for line in family.lines()]
        # A name from a backend's list may hold half a surrogate pair.
        return "".join(lines).encode("utf-8", "replace")

    def _add(self, family: F) -> F:
        if family.name in self._families:
            raise ValueError(f"there is a metric {family.name} already")
        self._families[family.name] = family
        return family


def _head(name: str, help_text: str, kind: str, labels: Sequence[str]) -> str:
    if not _METRIC_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a metric")
    for label in labels:
        if not _LABEL_NAME.fullmatch(label):
            raise ValueError(f"{name}: {label!r} is no name for a label")
    escaped = help_text.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n"


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    return ",".join(
        f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)
    )


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    if value == -math.inf:
        return "-Inf"
    if value != value:
        return "NaN"
    return str(int(value)) if value == int(value) else repr(float(value))
