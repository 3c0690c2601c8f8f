"""Where a llama-swap configuration may come from: a file, a key, a neighbour."""

from pathlib import Path

import pytest

from inferencia.config import ConfigErrors, Loaded, load
from inferencia.models.definitions import SwapConfig
from inferencia.overlay import Flags

SWAP = """
x-base: &base {ttl: 60}
macros: {bin: "${env.BIN}"}
models:
  a:
    <<: *base
    # ${env.NOT_EVEN_READ}
    cmd: ${bin} --port ${PORT}
"""
INLINE = """
swap:
  macros: {bin: "${env.BIN}"}
  models: {a: {ttl: 60, cmd: "${bin} --port ${PORT}"}}
"""
WRONG = "models: {a: {cmd: 's ${gone} ${PORT}', tll: 5}}\n"
GOINFERS = "llama: {exe: sh}\n"
PROBLEMS = (
    "models.a.cmd: unknown macro ${gone}",
    "models.a.tll: unknown key; did you mean models.a.ttl?",
)

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(name: str, text: str, **others: str) -> Loaded:
    """What the file gives, with ``others`` (by stems) beside it."""
    for stem, content in others.items():
        Path(f"{stem.replace('_', '-')}.yml").write_text(content)
    Path(name).write_text(text)
    env = {"HOME": "/nowhere", "PATH": "/bin:/usr/bin", "BIN": "server", "KEY": "sk-a"}
    return load(Path(name), env, Flags())


def swap_of(found: Loaded) -> SwapConfig:
    assert found.config.swap_config is not None
    return found.config.swap_config


def lines(name: str, text: str, **others: str) -> list[str]:
    """The errors as they are printed, without the folder."""
    with pytest.raises(ConfigErrors) as raised:
        loaded(name, text, **others)
    return raised.value.lines()


def test_a_program_that_is_not_there_is_a_warning_at_its_key() -> None:
    problem = "models.a.cmd: server is not there, or not executable"
    for found, label in (
        (loaded("llama-swap.yml", SWAP), ""),
        (loaded("config.yaml", "swap: mine.yml\n", mine=SWAP), "swap: mine.yml: "),
        (loaded("config.yaml", INLINE), "swap."),
        (loaded("goinfer.yml", GOINFERS, llama_swap=SWAP), "llama-swap.yml: "),
    ):
        assert found.warnings == (label + problem,)
    there = "models: {a: {cmd: 'sh -c ${PORT}'}}\n"
    assert loaded("llama-swap.yml", there).warnings == ()


def test_all_ways_to_say_it_mean_the_same() -> None:
    ways = (
        loaded("llama-swap.yml", SWAP),
        loaded("other.yaml", SWAP),
        loaded("config.yaml", "swap: mine.yml\n", mine=SWAP),
        loaded("config.yaml", INLINE),
        loaded("goinfer.yml", GOINFERS, llama_swap=SWAP),
    )
    first = swap_of(ways[0])
    (only,) = first.models
    assert (only.id, only.command, only.ttl, only.port) == (
        "a",
        ("server", "--port", "${PORT}"),
        60.0,
        5800,
    )
    assert [swap_of(found) for found in ways] == [first] * 5


def test_without_any_there_is_none() -> None:
    assert loaded("config.yaml", "swap: null\n").config.swap_config is None
    assert loaded("goinfer.yml", GOINFERS).config.swap_config is None
    found = loaded("config.yaml", "{}\n", llama_swap=SWAP)
    assert found.config.swap_config is None


def test_errors_say_the_key_and_the_file_it_is_in(folder: Path) -> None:
    assert lines("llama-swap.yml", WRONG) == [
        f"llama-swap.yml: {problem}" for problem in PROBLEMS
    ]
    assert lines("config.yaml", "swap: mine.yml\n", mine=WRONG) == [
        f"config.yaml: swap: mine.yml: {problem}" for problem in PROBLEMS
    ]
    assert lines("config.yaml", f"swap:\n  {WRONG}") == [
        f"config.yaml: swap.{problem.replace('mean models', 'mean swap.models')}"
        for problem in PROBLEMS
    ]
    assert lines("goinfer.yml", GOINFERS, llama_swap=WRONG) == [
        f"goinfer.yml: llama-swap.yml: {problem}" for problem in PROBLEMS
    ]


def test_what_is_wrong_elsewhere_is_reported_together_with_it() -> None:
    text = "server: {port: x}\nswap: {models: {a: {}}}\n"
    assert [line.split(": ")[1] for line in lines("config.yaml", text)] == [
        "server.port",
        "swap.models.a.cmd",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swap: gone.yml", "swap: gone.yml: cannot read "),
        ("swap: [a.yml]", "swap: expected text, got a list"),
        ("swap: 5", "swap: expected text, got 5"),
        ("swap: mine.yml", "swap: mine.yml: line 1, column 5"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(text: str, message: str) -> None:
    (line,) = lines("config.yaml", text, mine="a: b: c")
    assert line.startswith(f"config.yaml: {message}")


def test_the_file_is_looked_for_beside_the_configuration(folder: Path) -> None:
    (folder / "etc").mkdir()
    (folder / "etc" / "mine.yml").write_text(SWAP)
    (folder / "etc" / "config.yaml").write_text("swap: mine.yml\n")
    env = {"HOME": "/nowhere", "BIN": "server"}
    found = load(folder / "etc" / "config.yaml", env, Flags())
    assert swap_of(found).models[0].command[0] == "server"


def test_warnings_say_where_they_are_from() -> None:
    odd = SWAP + "captureBuffer: 5\n"
    text = "no effect here; see docs/llama-swap.md"
    found = loaded("config.yaml", "swap: mine.yml\n", mine=odd)
    assert f"swap: mine.yml: captureBuffer: {text}" in found.warnings
    assert f"captureBuffer: {text}" in loaded("llama-swap.yml", odd).warnings
    found = loaded("config.yaml", INLINE + "  captureBuffer: 5\n")
    assert f"swap.captureBuffer: {text}" in found.warnings


def test_its_keys_are_handed_on_and_their_variables_kept_from_children() -> None:
    text = 'apiKeys: ["${env.KEY}"]\n'
    inline = loaded("config.yaml", f"{INLINE}  {text}")
    for found in (inline, loaded("llama-swap.yml", SWAP + text)):
        assert swap_of(found).api_keys == ("sk-a",)
        assert found.config.secret_variables == {"KEY"}


def test_merge_keys_are_for_llama_swaps_files_only() -> None:
    text = "x: &x {port: 1}\nserver: {<<: *x}\n"
    (line,) = lines("config.yaml", text)
    assert line == "config.yaml: line 2: merge keys (<<) are not supported"


@pytest.mark.parametrize("text", ["mine.yml", "[]"])
def test_a_file_that_holds_no_keys_is_an_error_and_no_name_of_another(
    text: str,
) -> None:
    (line,) = lines("llama-swap.yml", text, mine=SWAP)
    assert line.startswith("llama-swap.yml: expected keys such as")
