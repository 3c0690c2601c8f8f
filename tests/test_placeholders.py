"""Keys of examples open nothing, real keys are not mistaken for them, none is shown."""

import secrets

import pytest

from inferencia.placeholders import is_placeholder
from inferencia.secret import Secret


@pytest.mark.parametrize(
    "secret",
    [
        "PLEASE SET SECURE API KEY",
        "PLEASE SET ADMIN API KEY",
        "Please-set-me",
        "sk-change-me",
        "sk-CHANGE_ME-1",
        "changeme",
        "sk-your-key",
        "sk-your-secret-key",
        "sk-PASTE_YOUR_KEY_HERE",
        "sk-key1",
        "sk-key2",
        "your-api-key",
        "YOUR_API_KEY",
        "  sk-your-key  ",
    ],
)
def test_a_key_from_an_example_is_a_placeholder(secret: str) -> None:
    assert is_placeholder(secret)


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "sk-a",
        "sk-alice",
        "sk-key10",
        "sk-test-key-0123456789",
        "pleasant",
        "secret",
    ],
)
def test_a_key_that_somebody_chose_is_none(secret: str) -> None:
    assert not is_placeholder(secret)


def test_no_random_key_is_a_placeholder() -> None:
    for _ in range(2000):
        assert not is_placeholder(f"sk-{secrets.token_urlsafe(32)}")
        assert not is_placeholder(secrets.token_hex(32))


def test_a_secret_shows_stars_wherever_it_is_printed() -> None:
    secret = Secret("sk-very-secret")
    shown = f"{secret} {secret!r} {[secret]} %s %r" % (secret, secret)
    assert "very" not in shown
    assert secret.reveal() == "sk-very-secret"


def test_secrets_are_equal_when_their_texts_are() -> None:
    assert Secret("ä") == Secret("ä")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1
    assert not Secret("")
