"""A configuration's text without its secrets, and with them again."""

import json
import random
from pathlib import Path

import pytest

from inferencia import yamlfile
from inferencia.configedit import (
    NotThere,
    at_next_start,
    changes,
    masked,
    protected,
    restored,
)
from inferencia.secret import starred

EXAMPLE = Path(__file__).resolve().parent.parent / "config.example.yaml"

TEXT = """\
# Our gateway. The old key was sk-old-0123456789abcdef, keep it.
server:
  port: 8080   # not 80
  api_key: {admin: "sk-admin-0123456789", user: 'tiny'}
backends:
  - name: mlx
    url: http://localhost:11973
    api_key: plainsecret  # from Bob
    headers:
      X-Org: "acme-inc"
      Authorization: Bearer ${env.ORG_TOKEN}
  - {name: cloud, url: "https://api.example.com", api_key: &k sk-cloud-987654321}
  # - {name: off, api_key: sk-disabled-1234567}
tunnel:
  dial: {relays: [], token: ${env.TOKEN}}
swap:
  apiKeys: [sk-swap-one-111111, "sk-swap-two-222222"]
  peers: {far.away: {proxy: "http://p", apiKey: farsecret, models: [a]}}
  models:
    a: {cmd: "llama-server --api-key abcdef123456 --port ${PORT}"}
    b:
      cmd: |
        llama-server --port 1
          --hf-token hf_verysecretthing --ctx 5
      env: ["HF_TOKEN=hushhush", "CUDA_VISIBLE_DEVICES=0"]
state: {url: "redis://:hunter22@host/0"}
routing: {aliases: {x: y}}
"""
SECRETS = (
    *("sk-old-0123456789abcdef", "sk-admin-0123456789", "tiny", "plainsecret"),
    *("acme-inc", "sk-cloud-987654321", "sk-disabled-1234567", "sk-swap-one-111111"),
    *("sk-swap-two-222222", "farsecret", "abcdef123456", "hf_verysecretthing"),
    *("hushhush", "hunter22"),
)


def tree(text: str) -> yamlfile.Node:
    return yamlfile.parse(text.encode()).root


def test_no_secret_is_shown_and_all_else_is() -> None:
    shown = masked(TEXT)
    assert [secret for secret in SECRETS if secret in shown] == []
    assert shown.count("***") == len(SECRETS)
    for kept in (
        "# from Bob",
        "port: 8080   # not 80",
        "Bearer ${env.ORG_TOKEN}",
        "token: ${env.TOKEN}",
        "CUDA_VISIBLE_DEVICES=0",
        "&k ",
        "--port ${PORT}",
        "--ctx 5",
    ):
        assert kept in shown
    assert shown.count("\n") == TEXT.count("\n")
    tree(shown)


def test_what_was_not_changed_comes_back_byte_for_byte() -> None:
    assert restored(masked(TEXT), TEXT) == TEXT
    windows = TEXT.replace("\n", "\r\n")
    assert restored(masked(windows), windows) == windows
    assert masked(masked(TEXT)) == masked(TEXT)


def test_the_example_file_has_nothing_to_hide() -> None:
    text = EXAMPLE.read_text()
    assert restored(masked(text), text) == text


def test_a_backend_keeps_its_secret_wherever_it_stands() -> None:
    first, second = "name: mlx", "name: cloud"
    text = """\
backends:
  - {name: new, url: "http://n", api_key: typed-just-now}
  - {url: "https://api.example.com", api_key: "***", name: cloud}
"""
    assert first not in text and second in text
    after = restored(text, TEXT)
    assert "api_key: sk-cloud-987654321" in after
    assert "typed-just-now" in after


@pytest.mark.parametrize(
    ("change", "to"),
    [
        ("name: cloud", "name: evil"),  # another backend gets no key
        ("token: ${env.TOKEN}", 'token: "***"'),  # that was no secret
        ("x: y", 'x: "***"'),
        ("port: 8080", 'port: "***"'),
        ('apiKeys: ["***", "***"]', 'apiKeys: ["***", "***", "***"]'),
        ("--ctx 5", "--ctx *** "),  # more stars than secrets
    ],
)
def test_stars_elsewhere_mean_nothing(change: str, to: str) -> None:
    shown = masked(TEXT)
    assert change in shown
    with pytest.raises(NotThere, match="write the value out"):
        restored(shown.replace(change, to), TEXT)


@pytest.mark.parametrize(
    ("change", "to"),
    [
        (
            "routing:",
            "tts_backends: [{name: b, url: 'http://evil', api_key: *k}]\nrouting:",
        ),
        ("x: y", "x: *k"),
        ("x: y", "*k : y"),
        ("level: info", "level: *k"),
        ("- {name: cloud,", "- &all {name: cloud,"),
    ],
)
def test_an_alias_takes_no_secret_to_another_place(change: str, to: str) -> None:
    """Not to another URL, and not into what a message or a list would show."""
    original = TEXT + "log: {level: info}\n"
    text = masked(original).replace(change, to)
    if "&all" in to:
        text = text.replace(
            "tunnel:", "  - {<<: *all, name: b, url: 'http://evil'}\ntunnel:"
        )
    assert text != masked(original)
    with pytest.raises(NotThere, match=r"alias"):
        restored(text, original)


def test_an_alias_that_was_there_stays() -> None:
    original = (
        "backends:\n"
        "  - {name: a, url: 'http://a', api_key: &k sk-cloud-987654321}\n"
        "  - {name: b, url: 'http://b', api_key: *k}\n"
    )
    assert restored(masked(original), original) == original
    assert "sk-cloud" not in masked(original)


@pytest.mark.parametrize(
    "command",
    [
        "run --api-key hidden-1",
        "run --api-key=hidden-1 --ctx 5",
        "run --api-key 'hidden-1'",
        'run --token="hidden-1"',
        "HF_TOKEN='hidden-1' run",
        "curl -H 'Authorization: Bearer hidden-1'",
        "curl http://me:hidden-1@there/",
        "run sk-hidden-1",
    ],
)
def test_a_command_is_shown_without_its_secrets(command: str) -> None:
    assert "hidden" not in starred(command) and "***" in starred(command)
    for text in (json.dumps(command), "'" + command.replace("'", "''") + "'"):
        original = f"swap:\n  models:\n    a:\n      cmd: {text}\n"
        assert "hidden" not in masked(original)
        tree(masked(original))  # it is YAML still
        assert restored(masked(original), original) == original


def test_stars_in_comments_may_stay_stars() -> None:
    text = "# *** new ***\n" + masked(TEXT).replace("keep it", "forget *** it")
    after = restored(text, TEXT)
    assert "# *** new ***" in after
    assert "key was ***, forget *** it" in after
    assert "sk-disabled-1234567" in after


def test_a_secret_may_be_replaced_or_taken_away() -> None:
    text = (
        masked(TEXT)
        .replace('admin: "***"', "admin: sk-new-key")
        .replace('user: "***"', "user: null")
    )
    after = restored(text, TEXT)
    assert "admin: sk-new-key, user: null" in after
    assert "plainsecret" in after


@pytest.mark.parametrize(
    "broken",
    [
        "server: {api_key: {admin: sk-half-0123456789\nbackends: [",
        "a: b: c\napi_key: plainsecret99\n",
        "api_key: plainsecret99\n\tx: 1\napiKey: othersecret99",
        "x: \x01\ntoken: plainsecret99",
        "*bad\ntoken: othersecret99\n",
        "a: [" * 200 + "\ntoken: othersecret99\n",
    ],
)
def test_what_is_no_yaml_hides_its_secrets_too(broken: str) -> None:
    shown = masked(broken)
    for secret in ("sk-half-0123456789", "plainsecret99", "othersecret99"):
        assert secret not in shown


def test_names_with_brackets_and_dots_do_not_uncover_a_secret() -> None:
    text = """\
backends:
  - {name: "a]b", api_key: plainsecret1, headers: {"X.Y": plainsecret2}}
  - {name: "c.d[0]", api_key: plainsecret3}
  - {name: twin, api_key: plainsecret4}
  - {name: twin, api_key: plainsecret5}
"""
    shown = masked(text)
    assert "plainsecret" not in shown
    assert restored(shown, text) == text


@pytest.mark.parametrize("seed", range(30))
def test_any_text_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [*TEXT.splitlines(keepends=True), "***", "\t", '"', "# ", "]", "x: |\n"]
    text = "".join(rng.choice(pieces) for _ in range(40))
    if "***" not in text:
        assert restored(masked(text), text) == text
    masked(text)


# --- changes ---------------------------------------------------------------------

OLD = """\
server: {port: 8080}
backends:
  - {name: a, url: "http://a", api_key: secretofa}
  - {name: b, url: "http://b"}
  - {name: c, url: "http://c", headers: {X: secretofc}}
  - {name: d, url: "http://d", api_key: "${env.D}"}
usage: {keep: 30d}
log: {level: info}
"""


def refused(sent: str, old: str = OLD, is_swap: bool = False) -> list[str]:
    new = restored(sent, old)
    return protected(tree(sent), tree(old), tree(new), is_swap=is_swap)


def edited(change: str, to: str) -> str:
    shown = masked(OLD)
    assert change in shown
    return shown.replace(change, to)


def test_changes_are_told_by_their_paths() -> None:
    new = OLD.replace("8080", "8081").replace(
        "level: info", "level: warn, format: text"
    )
    new = new.replace("usage: {keep: 30d}\n", "")
    assert list(changes(tree(OLD), tree(new))) == [
        *("server.port", "usage.keep", "log.level", "log.format"),
    ]
    assert at_next_start(tree(OLD), tree(new)) == ["server.port", "log.format"]
    assert list(changes(tree("usage: null\n"), tree("usage: {}\n"))) == []


def test_nothing_is_protected_where_nothing_has_changed() -> None:
    assert refused(masked(OLD)) == []
    assert refused(edited("level: info", "level: debug")) == []
    assert refused(edited("keep: 30d", "keep: 1d")) == []


@pytest.mark.parametrize(
    ("change", "to", "path"),
    [
        ("port: 8080", "port: 8081", "server.port"),
        ("server: {port: 8080}\n", "", "server.port"),
        ("log:", "admin: {tasks: {x: rm}}\nlog:", "admin.tasks.x"),
        ("log:", "auth: {keys_file: /tmp/k}\nlog:", "auth.keys_file"),
        ("log:", "tunnel: {accept: {enabled: true}}\nlog:", "tunnel.accept.enabled"),
        ("log:", "swap: {models: {a: {cmd: rm}}}\nlog:", "swap.models.a.cmd"),
        ("log:", "swap: file.yml\nlog:", "swap"),
        ("log:", "llama: {exe: /bin/rm}\nlog:", "llama.exe"),
        ("log:", "models_dir: /\nlog:", "models_dir"),
        ("log:", "state: {url: 'redis://x'}\nlog:", "state.url"),
        ("keep: 30d", "keep: 30d, path: /etc/passwd", "usage.path"),
    ],
)
def test_protected_parts_are_named(change: str, to: str, path: str) -> None:
    assert refused(edited(change, to)) == [path]


@pytest.mark.parametrize(
    ("change", "to", "path"),
    [
        # The key that is kept here must not go to another server.
        ('url: "http://a"', 'url: "http://evil"', "backends[a].url"),
        (
            'url: "http://a"',
            'url: "http://a", headers: {Host2: evil}',
            "backends[a].headers.Host2",
        ),
        ('url: "http://c"', 'url: "http://evil"', "backends[c].url"),
        ('url: "http://d"', 'url: "http://evil"', "backends[d].url"),
        # Nor may the value of some variable.
        (
            "log:",
            "routing: {default_model: '${env.SECRET}'}\nlog:",
            "routing.default_model",
        ),
        ("name: b,", "name: b, api_key: '${env.SECRET}',", "backends[b].api_key"),
    ],
)
def test_no_secret_can_be_sent_elsewhere(change: str, to: str, path: str) -> None:
    assert path in refused(edited(change, to))


def test_a_backend_may_be_moved_together_with_its_key() -> None:
    moved = edited('url: "http://a", api_key: "***"', 'url: "http://x", api_key: mine')
    assert refused(moved) == []
    assert refused(edited('url: "http://b"', 'url: "http://x"')) == []
    new = "  - {name: e, url: 'http://e', api_key: mine}\nusage:"
    assert refused(edited("usage:", new)) == []


def test_a_key_does_not_follow_a_name_to_another_place() -> None:
    """Whoever takes b away and calls another server b gets nothing with it."""
    swapped = edited('name: a, url: "http://a"', 'name: a, url: "http://evil"')
    assert refused(swapped) == ["backends[a].url"]


def test_all_of_a_llama_swap_file_is_protected() -> None:
    old = "models: {a: {cmd: x}}\n"
    assert refused(old.replace("x", "rm"), old, is_swap=True) == ["models.a.cmd"]
