"""Promises of ``exposition.py``: a text that Prometheus reads, and bounded families."""

import math
import random
import re

import pytest

from inferencia.exposition import Exposition, Family, HistogramChild

LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')


def parsed(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples of an exposition, read by the letter of the format's description."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    decoded = text.decode()
    assert decoded.endswith("\n") or not decoded
    described: list[str] = []
    for line in decoded.split("\n")[:-1]:
        if line.startswith("# "):
            keyword, name, _ = line[2:].split(" ", 2)
            assert keyword in ("HELP", "TYPE")
            assert (keyword == "TYPE") == (described[-1:] == [name]), line
            described.append(name)
            continue
        match = LINE.fullmatch(line)
        assert match, line
        name, labels, value = match.groups()
        pairs = LABEL.findall(labels or "")
        assert ",".join(f'{n}="{v}"' for n, v in pairs) == (labels or ""), line
        assert name.startswith(described[-1]), f"{line} stands under {described[-1]}"
        key = (
            name,
            frozenset(
                (n, re.sub(r"\\(.)", lambda m: m[1].replace("n", "\n"), v))
                for n, v in pairs
            ),
        )
        assert key not in samples, f"twice: {line}"
        samples[key] = float(value)
    return samples


def sample(text: bytes, name: str, **labels: str) -> float:
    return parsed(text)[name, frozenset(labels.items())]


def test_the_text_is_as_the_format_says() -> None:
    book = Exposition()
    book.counter("a_total", "Back\\slash and\nnew line.", ["x"]).labels('q"\\\n').inc(2)
    book.gauge("b", "Without labels.").labels().set(0.25)
    times = book.histogram("c_seconds", "Times.", ["y"], bounds=[0.1, 1, 10])
    for seconds in (0.05, 0.1, 0.5, 100):
        times.labels("z").observe(seconds)
    assert book.render().decode() == (
        "# HELP a_total Back\\\\slash and\\nnew line.\n"
        "# TYPE a_total counter\n"
        'a_total{x="q\\"\\\\\\n"} 2\n'
        "# HELP b Without labels.\n"
        "# TYPE b gauge\n"
        "b 0.25\n"
        "# HELP c_seconds Times.\n"
        "# TYPE c_seconds histogram\n"
        'c_seconds_bucket{y="z",le="0.1"} 2\n'
        'c_seconds_bucket{y="z",le="1"} 3\n'
        'c_seconds_bucket{y="z",le="10"} 3\n'
        'c_seconds_bucket{y="z",le="+Inf"} 4\n'
        'c_seconds_sum{y="z"} 100.65\n'
        'c_seconds_count{y="z"} 4\n'
    )


def test_a_family_without_labels_shows_from_the_start() -> None:
    book = Exposition()
    book.counter("a_total", "A.")
    book.histogram("b_seconds", "B.", bounds=[1])
    text = book.render()
    assert sample(text, "a_total") == 0
    assert sample(text, "b_seconds_bucket", le="+Inf") == 0
    assert sample(text, "b_seconds_count") == 0


@pytest.mark.parametrize("value", [0, 1, -1, 1.5, 1e21, 1e-9, math.inf, -math.inf])
def test_numbers_come_back_as_they_were(value: float) -> None:
    book = Exposition()
    book.gauge("a", "A.").labels().set(value)
    assert sample(book.render(), "a") == value


def test_no_number_is_nan() -> None:
    book = Exposition()
    book.gauge("a", "A.").labels().set(math.nan)
    assert b"\na NaN\n" in book.render()


def test_gauges_go_up_and_down() -> None:
    book = Exposition()
    child = book.gauge("a", "A.").labels()
    child.inc()
    child.inc(3)
    child.dec()
    assert sample(book.render(), "a") == 3


def test_samples_are_asked_for_at_each_rendering() -> None:
    book = Exposition()
    now = {("x",): 1.0}
    book.sampled("a", "A.", ["l"], lambda: now.items())
    assert sample(book.render(), "a", l="x") == 1
    now[("y",)] = 2
    del now[("x",)]
    assert parsed(book.render()) == {("a", frozenset({("l", "y")})): 2}


def test_a_label_set_that_is_sampled_twice_shows_once() -> None:
    book = Exposition()
    book.sampled("a", "A.", ["l"], lambda: [(("x",), 1), (("x",), 2)])
    assert sample(book.render(), "a", l="x") == 2


def test_a_family_does_not_grow_without_bound() -> None:
    book = Exposition()
    family = book.counter("a_total", "A.", ["l", "m"], max_children=3)
    for number in range(1000):
        family.labels(f"l{number}", "m").inc()
    family.labels("l1", "m").inc()  # what is known goes on counting
    samples = parsed(book.render())
    assert len(samples) == 4
    assert sample(book.render(), "a_total", l="other", m="other") == 997
    assert sample(book.render(), "a_total", l="l1", m="m") == 2


def test_half_a_surrogate_pair_does_not_spoil_the_text() -> None:
    book = Exposition()
    book.counter("a_total", "A.", ["l"]).labels("x\ud800").inc()
    assert sample(book.render(), "a_total", l="x?") == 1


def test_mistakes_of_the_programmer_are_told_at_once() -> None:
    book = Exposition()
    family = book.counter("a_total", "A.", ["l"])
    with pytest.raises(ValueError, match="labels"):
        family.labels()
    with pytest.raises(ValueError, match="already"):
        book.gauge("a_total", "Again.")
    for name in ("", "1a", "a-b", "a b"):
        with pytest.raises(ValueError, match="name"):
            book.gauge(name, "A.")
    for label in ("", "1a", "__a", "a:b"):
        with pytest.raises(ValueError, match="label"):
            book.gauge("g", "A.", [label])
    for bounds in ([2, 1], [1, 1]):
        with pytest.raises(ValueError, match="rise"):
            book.histogram("h", "A.", bounds=bounds)
    with pytest.raises(ValueError, match="le"):
        book.histogram("h", "A.", ["le"], bounds=[1])


@pytest.mark.parametrize("seed", range(50))
def test_any_label_values_and_observations_come_back(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = 'ab"\\\n{}=, ü😹\r\t'
    book = Exposition()
    counters = book.counter("a_total", "A.", ["l", "m"])
    bounds = sorted({rng.uniform(0, 10) for _ in range(5)})
    times: Family[HistogramChild] = book.histogram("t", "T.", ["l"], bounds=bounds)
    counts: dict[tuple[str, str], float] = {}
    seen: dict[str, list[float]] = {}
    for _ in range(30):
        word, other = (
            "".join(rng.choice(alphabet) for _ in range(rng.randrange(6)))
            for _ in range(2)
        )
        amount = rng.choice([1, 2.5, 1e9])
        counters.labels(word, other).inc(amount)
        counts[word, other] = counts.get((word, other), 0) + amount
        value = rng.choice([*bounds, rng.uniform(0, 20)])
        times.labels(word).observe(value)
        seen.setdefault(word, []).append(value)
    samples = parsed(book.render())

    def value_of(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    for (word, other), count in counts.items():
        assert value_of("a_total", l=word, m=other) == count
    for word, values in seen.items():
        assert value_of("t_count", l=word) == len(values)
        assert times.labels(word).count == len(values)
        assert value_of("t_sum", l=word) == pytest.approx(sum(values))
        for bound in bounds:
            below = sum(value <= bound for value in values)
            assert value_of("t_bucket", l=word, le=repr(bound)) == below
