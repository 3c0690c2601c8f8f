"""Commands and their errors: each in a line, with what to do about it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import inferencia
from daemons import KEY, SWAP, Ran, state_of
from inferencia import cli

FIXTURES = Path(__file__).parent / "fixtures"

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("srve",), ('"srve"', "serve")),
        (("--port", "99999"), ("--port", "65535", "99999")),
        (("--port", "http"), ("--port", "http")),
        (("serve", "--prot", "1"), ("--prot",)),
        (("--no-api",), ("--no-api",)),  # nothing is guessed where doors open
        (("keys",), ("COMMAND",)),
        (("keys", "add"), ("NAME",)),
        (("keys", "rename", "x"), ("rename", "rotate")),
        (("check", "it"), ("it",)),
        (("-c",), ("-c", "argument")),
        (("--host", "a b"), ("--host", "127.0.0.1")),
        (("-c", "nope.yaml"), ("nope.yaml", "No such file")),
        (("check", "-c", "nope.yaml"), ("nope.yaml", "No such file")),
        (("--config=nope.yaml", "check"), ("nope.yaml", "No such file")),
        (("-c", "nope.yaml", "keys", "list"), ("nope.yaml", "No such file")),
        (("check", "-c", "."), ("directory",)),
    ],
)
def test_bad_usage_is_told_in_one_line(
    alone: Path, capsys: Capture, arguments: Sequence[str], words: Sequence[str]
) -> None:
    ran = Ran.of(capsys, *arguments)
    assert (ran.code, ran.out) == (2, "")
    for word in words:
        assert word in ran.line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_a_key_it_does_not_listen_for_others(
    alone: Path, capsys: Capture, host: str
) -> None:
    ran = Ran.of(capsys, "--no-api-key", "--host", host)
    assert (ran.code, ran.out) == (2, "")
    assert "--no-api-key" in ran.line and host in ran.line


def test_help_and_version_go_to_standard_output(alone: Path, capsys: Capture) -> None:
    ran = Ran.of(capsys, "--version")
    assert (ran.code, ran.out, ran.err) == (0, f"{inferencia.__version__}\n", "")
    for arguments in (("--help",), ("-h",), ("serve", "--help"), ("keys", "-h")):
        ran = Ran.of(capsys, *arguments)
        assert (ran.code, ran.err) == (0, "")
    whole = Ran.of(capsys, "--help").out
    for word in (*cli._BUILT, "INFERENCIA_CONFIG"):
        assert word in whole
    serve = Ran.of(capsys, "serve", "--help").out
    for option in ("--host", "--port", "--no-api-key", "--demo", "-c"):
        assert option in serve


def test_check_lists_every_error_by_its_path(alone: Path, capsys: Capture) -> None:
    (alone / "config.yaml").write_text(
        "server: {prot: 80}\n"
        "backends:\n"
        "  - {name: a, url: http://x, timeout: thirty}\n"
        "  - {name: a, url: http://y}\n"
    )
    ran = Ran.of(capsys, "check")
    assert (ran.code, ran.out) == (2, "")
    lines = ran.err.splitlines()
    assert len(lines) == 3
    assert any(
        "server.prot: unknown key; did you mean server.port" in li for li in lines
    )
    assert any("backends[0].timeout: expected a duration" in li for li in lines)
    assert any("backends[1].name:" in li for li in lines)
    served = Ran.of(capsys, "serve")
    assert (served.code, served.err) == (2, ran.err)  # check loads what serve would


def test_check_sums_up_without_a_secret(alone: Path, capsys: Capture) -> None:
    (alone / "config.yaml").write_text(
        "server: {api_key: {admin: sk-admin-0123456789abcdef}}\n"
        "backends:\n"
        "  - {name: cloud, url: https://api.example.com, api_key: sk-up-9876543210,"
        " headers: {X-Secret: hidden-value-1}}\n"
        "routing: {aliases: {gpt: qwen}}\n"
        "models_dir: /nowhere\n"
    )
    (alone / "keys.txt").write_text(f"{KEY} name=alice\nsk-key1\n")
    (alone / "keys.txt").chmod(0o644)
    ran = Ran.of(capsys, "check")
    assert (ran.code, ran.err) == (0, "")
    for word in (
        "cloud",
        "api.example.com",
        "gpt -> qwen",
        "2 usable",
        "127.0.0.1:8080",
    ):
        assert word in ran.out
    warnings = [li for li in ran.out.splitlines() if li.startswith("warning: ")]
    for word in ("models_dir", "chmod 600", "placeholder"):
        assert any(word in warning for warning in warnings), warnings
    for secret in ("sk-admin-0123", "sk-up-98", "hidden-value", KEY):
        assert secret not in ran.out


def test_check_without_a_configuration_makes_no_files(
    alone: Path, capsys: Capture
) -> None:
    ran = Ran.of(capsys, "check")
    assert (ran.code, ran.err) == (0, "")
    assert "none; defaults and environment" in ran.out
    assert not state_of(alone).exists()


@pytest.mark.parametrize(
    ("keys", "env", "words"),
    [
        (None, {}, ("keys.txt",)),
        ("", {}, ("keys.txt",)),
        ("sk-key1\nsk-your-key-here\n", {}, ("keys.txt", "placeholder")),
        (f"{KEY} expires=2020-01-01\n", {}, ("keys.txt",)),
        (None, {"INFERENCIA_API_KEYS": "sk-change-me"}, ("INFERENCIA_API_KEYS",)),
    ],
)
def test_without_a_usable_key_it_does_not_start_and_says_how_to_make_one(
    alone: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    keys: str | None,
    env: Mapping[str, str],
    words: Sequence[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    (alone / "config.yaml").write_text("backends: [{url: http://127.0.0.1:1}]\n")
    if keys is not None:
        (alone / "keys.txt").write_text(keys)
        (alone / "keys.txt").chmod(0o600)
    for command in ("serve", "check"):
        ran = Ran.of(capsys, command)
        assert (ran.code, ran.out) == (2, "")
        last = ran.err.splitlines()[-1]
        assert "inferencia keys add" in last
        for word in words:
            assert word in ran.err
        assert KEY not in ran.err


def test_the_remedy_names_the_configuration_that_was_asked_for(
    alone: Path, capsys: Capture
) -> None:
    (alone / "mine.yaml").write_text("backends: [{url: http://127.0.0.1:1}]\n")
    ran = Ran.of(capsys, "-c", "mine.yaml")
    assert "keys.txt, which does not exist; " in ran.line
    assert ran.line.endswith("inferencia keys add NAME -c mine.yaml")
    added = Ran.of(capsys, "keys", "add", "NAME", "-c", "mine.yaml")
    assert added.code == 0
    assert Ran.of(capsys, "check", "-c", "mine.yaml").code == 0


def test_an_admins_key_is_added_before_the_first_start_with_a_llama_swap_file(
    alone: Path, capsys: Capture
) -> None:
    text = SWAP.format(exe="llama-server") + f"apiKeys: [{KEY}]\n"
    (alone / "llama-swap.yml").write_text(text)
    add = ("keys", "add", "me", "--role", "admin", "-c", "llama-swap.yml")
    assert Ran.of(capsys, *add).code == 0
    assert (state_of(alone) / "keys.txt").exists()


@pytest.mark.parametrize(("name", "file"), [("user", "key"), ("admin", "admin-key")])
def test_the_first_keys_are_not_changed_by_command_but_it_is_told_where_they_are(
    alone: Path, capsys: Capture, name: str, file: str
) -> None:
    for command in ("add", "revoke", "rotate"):
        ran = Ran.of(capsys, "keys", command, name)
        assert (ran.code, ran.out) == (2, "")
        assert f'"{name}"' in ran.line and str(state_of(alone) / file) in ran.line
    assert str(state_of(alone) / file) in Ran.of(capsys, "keys", "list").err


def test_a_key_of_the_configuration_is_not_changed_by_command(
    alone: Path, capsys: Capture
) -> None:
    (alone / "config.yaml").write_text(f"server: {{api_key: {{admin: {KEY}}}}}\n")
    ran = Ran.of(capsys, "keys", "add", "admin")
    assert ran.code == 2 and "server.api_key.admin" in ran.line
    assert Ran.of(capsys, "keys", "add", "user").code == 0


def test_keys_set_in_the_environment_are_not_lost_by_those_added_later(
    alone: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCIA_API_KEY_USER", KEY)
    assert Ran.of(capsys, "keys", "add", "bob").code == 0
    ran = Ran.of(capsys, "check")
    assert "keys: 2 usable" in ran.out


@pytest.mark.parametrize("command", [("--demo",), ("keys", "add", "x")])
def test_a_state_folder_that_cannot_be_is_told_with_what_to_do(
    alone: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    command: Sequence[str],
) -> None:
    (alone / "file").write_text("")
    monkeypatch.setenv("INFERENCIA_STATE", str(alone / "file" / "state"))
    ran = Ran.of(capsys, *command)
    assert (ran.code, ran.out) == (1, "")
    assert str(alone / "file") in ran.line


def test_a_user_without_a_home_is_told_what_to_set(
    alone: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    ran = Ran.of(capsys, "--demo")
    assert (ran.code, ran.out) == (1, "")
    assert "INFERENCIA_STATE" in ran.line and "HOME" in ran.line


def test_a_key_file_that_holds_no_key_is_named(alone: Path, capsys: Capture) -> None:
    state = state_of(alone)
    state.mkdir(parents=True)
    (state / "key").write_bytes(b"two words\xff\n")
    ran = Ran.of(capsys, "--demo")
    assert (ran.code, ran.out) == (2, "")
    assert str(state / "key") in ran.line and "remove it" in ran.line


def test_an_address_that_is_not_ours_is_told(alone: Path, capsys: Capture) -> None:
    ran = Ran.of(capsys, "--demo", "--host", "192.0.2.1", "--port", "0")
    assert ran.code == 1
    last = ran.err.splitlines()[-1]
    assert "192.0.2.1" in last and "0.0.0.0" in last and "Traceback" not in ran.err
