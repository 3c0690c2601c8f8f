"""``inferencia connect``: what it takes, and what it refuses before it starts."""

import argparse
from pathlib import Path

import pytest

from inferencia import connectcommand
from inferencia.admission import StartFailed
from inferencia.config import ConfigErrors, load
from inferencia.overlay import Flags

RELAY = "https://relay.example.com"


def flags(*arguments: str, **env: str) -> Flags:
    parser = argparse.ArgumentParser()
    connectcommand.register(parser.add_subparsers(), parents=[])
    return connectcommand.flags(parser.parse_args(["connect", *arguments]), env)


def test_the_token_comes_from_the_command_line_a_file_or_a_variable(
    tmp_path: Path,
) -> None:
    file = tmp_path / "token"
    file.write_text("ia-from-the-file\n")
    given = flags(RELAY, "--token", "ia-given")
    assert given.token is not None and given.token.reveal() == "ia-given"
    read = flags(RELAY, "--token-file", str(file), INFERENCIA_TUNNEL_TOKEN="ia-env")
    assert read.token is not None and read.token.reveal() == "ia-from-the-file"
    env = {"INFERENCIA_TUNNEL_TOKEN": "ia-env"}
    dial = load(None, env, flags(RELAY, **env)).config.tunnel.dial
    assert dial.token is not None and dial.token.reveal() == "ia-env"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("http://relay.example.com", "--token", "t"), "use https://"),
        (("relay.example.com", "--token", "t"), "does not begin with http"),
        (("https://u:secret@relay", "--token", "t"), "user or password"),
        ((RELAY,), "no token"),
        ((RELAY, "--token", ""), "no token"),
        ((RELAY, "--token-file", "missing"), "missing: No such file"),
        ((RELAY, "--token-file", "two"), "does not hold a token alone"),
        ((RELAY, "--token-file", "long"), "does not hold a token alone"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").write_text("ia-one\nia-two\n")
    (tmp_path / "long").write_text("x" * 5000)
    with pytest.raises(StartFailed) as raised:
        flags(*arguments)
    assert words in str(raised.value)
    assert "secret" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_its_own_door_is_at_a_free_port_unless_one_was_named(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("log: {level: warn}\n")
    given = flags("http://127.0.0.1:8080", "--token", "t", "--name", "gpu-home")
    loaded = load(config, {}, given).config
    assert loaded.server.port == 0
    assert loaded.tunnel.dial.relays == ("http://127.0.0.1:8080",)
    assert loaded.tunnel.dial.name == "gpu-home"
    config.write_text("server: {port: 4321}\ntunnel: {dial: {relays: [https://a]}}\n")
    loaded = load(config, {}, given).config
    assert loaded.server.port == 4321
    assert loaded.tunnel.dial.relays == ("http://127.0.0.1:8080",)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("dial: {relays: ['https://r']}", "tunnel.dial.token: missing"),
        (
            "dial: {relays: ['http://r'], token: t}",
            "tunnel.dial.relays[0]: http://r would send the token in clear",
        ),
        ("dial: {relays: [r], token: t}", "tunnel.dial.relays"),
        ("beat: 0", "tunnel.beat"),
    ],
)
def test_a_configuration_that_cannot_work_is_an_error(
    text: str, error: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(f"tunnel: {{{text}}}\n")
    with pytest.raises(ConfigErrors) as raised:
        load(tmp_path / "config.yaml", {}, Flags())
    assert any(line.startswith(error) for line in raised.value.errors)


def test_a_relay_that_no_address_offers_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "server: {listen: {':8080': openai}}\ntunnel: {accept: {enabled: true}}\n"
    )
    warnings = load(tmp_path / "config.yaml", {}, Flags()).warnings
    assert any("tunnel.accept.enabled: no address" in line for line in warnings)
