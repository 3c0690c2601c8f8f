"""The example files are the reference: complete, true, and without usable keys."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inferencia import keylines
from inferencia.config import Loaded, all_keys, load
from inferencia.fields import general_path, readers
from inferencia.overlay import Flags
from inferencia.settings import BackendConfig, Config
from inferencia.yamlfile import Mapping, Node, Sequence, parse

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "config.example.yaml"

# What a backend must say for itself, and a path that the file's folder completes.
NO_DEFAULT = {
    "backends",
    "backends[].name",
    "backends[].type",
    "backends[].url",
    "auth.keys_file",
}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(EXAMPLE, {"HOME": "/nowhere"}, Flags())


def paths(node: Node, path: str = "") -> Iterator[str]:
    """Every key that a file holds, by its general path."""
    if isinstance(node, Mapping):
        for name, inner in node.items.items():
            here = f"{path}.{name}" if path else name
            yield general_path(here)
            yield from paths(inner, here)
    elif isinstance(node, Sequence):
        for index, inner in enumerate(node.items):
            yield from paths(inner, f"{path}[{index}]")


def values(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a group and of the groups in it, with its value."""
    for name in readers(type(group)):
        value, here = getattr(group, name), f"{path}{name}"
        if dataclasses.is_dataclass(value):
            yield from values(value, f"{here}.")
        else:
            yield here, value


def test_the_example_loads_without_a_warning(loaded: Loaded) -> None:
    assert loaded.warnings == ()


def test_every_key_appears_in_the_example_and_nothing_else() -> None:
    written = list(paths(parse(EXAMPLE.read_bytes()).root))
    assert sorted(written) == sorted(all_keys())


def test_every_key_of_the_example_has_its_default(loaded: Loaded) -> None:
    (backend,) = loaded.config.backends
    written = [*values(loaded.config), *values(backend, "backends[].")]
    defaults = dict([*values(Config()), *values(BackendConfig(), "backends[].")])
    wrong = {
        path: (value, defaults[path])
        for path, value in written
        if path not in NO_DEFAULT and value != defaults[path]
    }
    assert not wrong, "in the example, and the default"


def test_the_keys_file_of_the_example_is_the_default_one(loaded: Loaded) -> None:
    assert loaded.config.auth.keys_file == ROOT / Config().auth.keys_file


def test_every_key_of_the_example_is_explained() -> None:
    """A comment stands beside it, above it, or above the group that it begins."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    unexplained = []
    for number, line in enumerate(lines):
        if not re.match(r" *(?:- )?[a-z_]+:", line) or "#" in line:
            continue
        above = number - 1
        while re.match(r" *(?:- )?[a-z_]+:", lines[above]):
            above -= 1  # the lines of one group share a comment
        if not lines[above].lstrip(" -").startswith("#"):
            unexplained.append(line.strip())
    # Titles of groups, whose keys are explained one by one.
    titles = {"server:", "auth:", "routing:", "llama:", "metrics:", "log:", "tunnel:"}
    assert set(unexplained) <= titles


def test_every_environment_variable_of_a_key_is_in_the_example() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    names = set(re.findall(r"(?:INFERENCIA|GI)_[A-Z_]+", text))
    assert names >= {
        "INFERENCIA_CONFIG",
        "INFERENCIA_HOST",
        "INFERENCIA_PORT",
        "INFERENCIA_API_KEYS",
        "INFERENCIA_AUTH_KEYS_FILE",
        "INFERENCIA_BACKEND_URL",
        "INFERENCIA_BACKEND_TYPE",
        "INFERENCIA_LOG_LEVEL",
        "INFERENCIA_LOG_FORMAT",
        "INFERENCIA_RATELIMIT_RPS",
        "INFERENCIA_RATELIMIT_BURST",
        "INFERENCIA_MODELS_DIR",
        "INFERENCIA_LLAMA_EXE",
        "INFERENCIA_ORIGINS",
        "INFERENCIA_API_KEY_ADMIN",
        "INFERENCIA_TUNNEL_TOKEN",
        "GI_MODELS_DIR",
        "GI_LLAMA_EXE",
        "GI_HOST",
        "GI_ORIGINS",
        "GI_API_KEY_ADMIN",
    }


def test_the_example_keys_are_understood_and_open_nothing() -> None:
    text = (ROOT / "keys.example.txt").read_text(encoding="utf-8")
    lines = keylines.parse(text, "keys.example.txt")
    assert len(lines) == 5
    assert all(line.is_placeholder for line in lines)
