"""What a person reads when the daemon starts."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from inferencia.greeting import Greeting, ServerLine, base_url, first_choice

STATE = Path("/home/me/.local/state/inferencia")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def greeting(**changes: Any) -> Greeting:
    facts: dict[str, Any] = {
        "base_url": "http://127.0.0.1:8080",
        "source": None,
        "servers": [ServerLine("ollama", "http://127.0.0.1:11434", 7)],
        "models": ["qwen3:8b"],
        "user_key": STATE / "key",
        "admin_key": STATE / "admin-key",
        "is_open": False,
    }
    return Greeting(**facts | changes)


def printed(out: io.StringIO, env: Mapping[str, str], **changes: Any) -> str:
    greeting(**changes).print_to(out, env)
    return out.getvalue()


@pytest.mark.parametrize(
    ("out", "env", "is_coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_only_a_terminal_that_wants_it_gets_colour(
    out: io.StringIO, env: Mapping[str, str], is_coloured: bool
) -> None:
    assert ("\x1b[" in printed(out, env)) is is_coloured


def test_found_loading_and_missing_servers_are_told_apart() -> None:
    text = printed(
        io.StringIO(),
        {},
        servers=[
            ServerLine("ollama", "http://127.0.0.1:11434", 7),
            ServerLine("lmstudio", "http://127.0.0.1:1234", 1),
            ServerLine("llamacpp", "http://127.0.0.1:8081", None, "soon", True),
            ServerLine("mlx", "", None, "nothing on port 11973"),
        ],
    )
    words = [line.split()[:2] for line in text.splitlines()[2:6]]
    assert words == [
        ["found", "ollama"],
        ["found", "lmstudio"],
        ["loading", "llamacpp"],
        ["missing", "mlx"],
    ]
    assert "7 models" in text
    assert "1 model\n" in text


def test_many_models_are_counted_not_named() -> None:
    text = printed(io.StringIO(), {}, models=[f"m{n}" for n in range(30)])
    assert "m7 and 22 more" in text
    assert "m8" not in text


def test_the_configuration_is_named_and_no_key_of_it_is_guessed() -> None:
    text = printed(
        io.StringIO(), {}, source=Path("/etc/x.yaml"), user_key=None, admin_key=None
    )
    assert "/etc/x.yaml" in text
    assert '-H "Authorization: Bearer $INFERENCIA_KEY"' in text


def test_without_keys_the_line_sends_none() -> None:
    text = printed(io.StringIO(), {}, is_open=True)
    assert "Authorization" not in text
    assert "none needed" in text


def test_the_line_can_be_pasted_whatever_names_it_holds() -> None:
    command = greeting(models=["it's"], user_key=Path("/a b/key")).command()
    assert "\n" not in command
    assert "$(cat '/a b/key')" in command
    assert """it'"'"'s""" in command


@pytest.mark.parametrize(
    ("models", "chosen"),
    [
        (["all-minilm:latest", "nomic-embed-text", "qwen3:8b"], "qwen3:8b"),
        (["whisper-1"], "whisper-1"),
        ([], None),
    ],
)
def test_a_model_that_chats_is_tried_first(
    models: list[str], chosen: str | None
) -> None:
    assert first_choice(models) == chosen


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80"),
    ],
)
def test_the_address_is_one_that_a_client_here_can_use(host: str, url: str) -> None:
    assert base_url(host, 80) == url
