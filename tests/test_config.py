"""The configuration: what may be written, what wins, and what an error says."""

import ipaddress
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from inferencia import fields, yamlfile
from inferencia.config import ConfigErrors, Loaded, all_keys, load
from inferencia.configrules import UNBUILT
from inferencia.overlay import VARIABLES, Flags
from inferencia.secret import Secret
from inferencia.settings import BackendConfig, Config, RoutingConfig
from inferencia.summary import summary

FIXTURES = Path(__file__).parent / "fixtures"

# Backends that need no more than these are written as MLX in the tests.
MLX = "backends: [{name: m, type: mlx, url: 'http://localhost:11973'}]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, so that no config.yaml is found by chance."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("inferencia.folders.SYSTEM_CONFIG", tmp_path / "etc.yaml")
    return tmp_path


@pytest.fixture
def file(folder: Path) -> Path:
    return folder / "config.yaml"


def loaded(
    text: str | bytes = "",
    env: Mapping[str, str] | None = None,
    flags: Flags | None = None,
    *,
    name: str = "config.yaml",
) -> Loaded:
    """What ``text`` in a file in the current folder gives."""
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path, {"HOME": "/nowhere", **(env or {})}, flags or Flags())


def errors(
    text: str | bytes = "",
    env: Mapping[str, str] | None = None,
    flags: Flags | None = None,
) -> tuple[str, ...]:
    with pytest.raises(ConfigErrors) as raised:
        loaded(text, env, flags)
    return raised.value.errors


def error(text: str | bytes = "", env: Mapping[str, str] | None = None) -> str:
    found = errors(text, env)
    assert len(found) == 1, found
    return found[0]


def warnings(text: str = "", env: Mapping[str, str] | None = None) -> tuple[str, ...]:
    return loaded(text, env).warnings


def backend_of(text: str, env: Mapping[str, str] | None = None) -> BackendConfig:
    return loaded(f"backends: [{text}]", env).config.backends[0]


def reach(config: object, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


pytestmark = pytest.mark.usefixtures("folder")


# --- defaults, and what wins -----------------------------------------------------


def test_an_empty_file_is_all_defaults(file: Path) -> None:
    config = loaded("").config
    assert config.server == Config().server
    assert config.auth.keys_file == file.parent / "keys.txt"
    assert not config.auth.is_keys_file_given
    assert config.backends == ()
    assert config.discover


def test_groups_that_hold_only_comments_are_all_defaults() -> None:
    assert (
        loaded("server:\n  # port: 1\nbackends:\nrouting: {}\n").config.backends == ()
    )


def test_without_a_file_everything_has_its_default(folder: Path) -> None:
    found = load(None, {"HOME": str(folder)}, Flags())
    assert found.source is None
    assert found.config.server.port == 8080
    assert not found.config.server.is_port_given
    assert found.warnings == ()


def test_the_file_wins_over_defaults_the_environment_over_the_file_flags_over_all() -> (
    None
):
    assert loaded("server: {port: 1}").config.server.port == 1
    env = {"INFERENCIA_PORT": "2"}
    assert loaded("server: {port: 1}", env).config.server.port == 2
    assert loaded("server: {port: 1}", env, Flags(port=3)).config.server.port == 3
    config = loaded("server:\n", {"GI_HOST": "10.0.0.1"}, Flags(host="::1")).config
    assert config.server.host == "::1"


def test_a_port_that_anybody_asked_for_is_known_as_such() -> None:
    assert not loaded("server: {host: localhost}").config.server.is_port_given
    assert loaded("server: {port: 8080}").config.server.is_port_given
    assert loaded("", {"INFERENCIA_PORT": "8080"}).config.server.is_port_given
    assert loaded("", flags=Flags(port=8080)).config.server.is_port_given


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("HOST", "0.0.0.0", "server.host", "0.0.0.0"),
        ("PORT", " 9000 ", "server.port", 9000),
        ("AUTH_KEYS_FILE", "/k.txt", "auth.keys_file", Path("/k.txt")),
        ("LOG_LEVEL", "DEBUG", "log.level", "debug"),
        ("LOG_FORMAT", "text", "log.format", "text"),
        ("RATELIMIT_RPS", "2.5", "ratelimit.requests_per_second", 2.5),
        ("RATELIMIT_BURST", "7", "ratelimit.burst", 7),
        ("MODELS_DIR", "/a:/b", "models_dir", (Path("/a"), Path("/b"))),
        ("LLAMA_EXE", "/bin/ls", "llama.exe", "/bin/ls"),
        ("ORIGINS", "http://a, http://b", "server.origins", ("http://a", "http://b")),
        ("API_KEY_ADMIN", "sk-admin", "server.api_key.admin", Secret("sk-admin")),
        ("API_KEY_USER", "123", "server.api_key.user", Secret("123")),
        ("API_KEYS", "a, b,,", "auth.api_keys", (Secret("a"), Secret("b"))),
    ],
)
def test_each_variable_sets_its_key(
    name: str, value: str, path: str, expected: object
) -> None:
    config = loaded("", {f"INFERENCIA_{name}": value}).config
    assert reach(config, path) == expected


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("MODELS_DIR", "/a:/b", "models_dir", (Path("/a"), Path("/b"))),
        ("LLAMA_EXE", "/bin/ls", "llama.exe", "/bin/ls"),
        ("HOST", "10.0.0.1", "server.host", "10.0.0.1"),
        ("ORIGINS", "http://a", "server.origins", ("http://a",)),
        ("API_KEY_ADMIN", "sk-admin", "server.api_key.admin", Secret("sk-admin")),
        ("API_KEY_USER", "sk-user", "server.api_key.user", Secret("sk-user")),
    ],
)
def test_goinfers_variables_mean_the_same_and_ours_win(
    name: str, value: str, path: str, expected: object
) -> None:
    assert reach(loaded("", {f"GI_{name}": value}).config, path) == expected
    both = {f"GI_{name}": "other", f"INFERENCIA_{name}": value}
    assert reach(loaded("", both).config, path) == expected


def test_a_variable_that_is_set_but_empty_is_not_set() -> None:
    names = (*VARIABLES, "BACKEND_URL", "BACKEND_TYPE", "TUNNEL_TOKEN")
    env = {f"INFERENCIA_{name}": "" for name in names}
    assert loaded("server: {port: 1}\n" + MLX, env).config.server.port == 1


def test_empty_origins_mean_none() -> None:
    text = "server: {origins: [http://a]}"
    assert loaded(text, {"INFERENCIA_ORIGINS": ""}).config.server.origins == ()
    assert loaded(text, {"GI_ORIGINS": " "}).config.server.origins == ()


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_api_keys_that_are_set_but_empty_are_an_error(value: str) -> None:
    assert error("", {"INFERENCIA_API_KEYS": value}).startswith("INFERENCIA_API_KEYS: ")


def test_an_error_in_a_variable_names_the_variable_and_not_the_file() -> None:
    with pytest.raises(ConfigErrors) as raised:
        loaded("server: {prot: 1}", {"INFERENCIA_PORT": "http"})
    assert raised.value.lines() == [
        "config.yaml: server.prot: unknown key; did you mean server.port?",
        'INFERENCIA_PORT: expected a whole number from 0 to 65535, got "http"',
    ]


def test_what_kubernetes_sets_is_explained() -> None:
    message = error("", {"INFERENCIA_PORT": "tcp://10.0.0.1:8080"})
    assert "Kubernetes" in message


def test_a_misspelt_variable_is_pointed_out() -> None:
    (warning,) = warnings("", {"INFERENCIA_LOGLEVEL": "debug"})
    assert warning == (
        "INFERENCIA_LOGLEVEL: unknown variable; did you mean INFERENCIA_LOG_LEVEL?"
    )
    assert warnings("", {"INFERENCIA_SMOKE_BASE_URL": "x", "GI_T": "y"}) == ()


def test_a_predecessors_variable_that_is_not_read_is_pointed_out() -> None:
    env = {"INFERENCIA_KOKORO_URL": "http://x", "GI_DEFAULT_MODEL": "m"}
    found = [warning.partition(":")[0] for warning in warnings("", env)]
    assert found == ["GI_DEFAULT_MODEL", "INFERENCIA_KOKORO_URL"]


# --- BACKEND_URL and BACKEND_TYPE ------------------------------------------------


def test_backend_url_alone_makes_a_backend_and_ends_the_search() -> None:
    config = loaded("", {"INFERENCIA_BACKEND_URL": "http://192.168.0.5:11973"}).config
    assert config.backends == (
        BackendConfig(name="mlx", type="mlx", url="http://192.168.0.5:11973"),
    )
    assert not config.discover


def test_backend_url_on_another_port_is_openai_unless_the_type_says_otherwise() -> None:
    env = {"INFERENCIA_BACKEND_URL": "http://h:1234"}
    assert loaded("", env).config.backends[0].type == "openai"
    env["INFERENCIA_BACKEND_TYPE"] = "lmstudio"
    assert loaded("", env).config.backends[0].type == "lmstudio"


def test_backend_url_replaces_the_url_of_the_first_backend_only() -> None:
    text = """
backends:
  - {name: a, type: ollama, url: http://a, timeout: 9s}
  - {name: b, type: mlx, url: http://b}
"""
    config = loaded(text, {"INFERENCIA_BACKEND_URL": "http://c:11973"}).config
    assert [(b.name, b.type, b.url) for b in config.backends] == [
        ("a", "ollama", "http://c:11973"),
        ("b", "mlx", "http://b"),
    ]
    assert config.backends[0].timeout == 9


def test_backend_type_changes_the_first_backend() -> None:
    config = loaded(MLX, {"INFERENCIA_BACKEND_TYPE": "vllm"}).config
    assert config.backends[0].type == "vllm"


def test_backend_type_without_any_url_needs_one_unless_it_is_echo() -> None:
    message = error("", {"INFERENCIA_BACKEND_TYPE": "mlx"})
    assert message == "INFERENCIA_BACKEND_TYPE: set INFERENCIA_BACKEND_URL as well"
    (echo,) = loaded("", {"INFERENCIA_BACKEND_TYPE": "echo"}).config.backends
    assert echo.type == "echo"


def test_a_bad_backend_url_names_the_variable() -> None:
    message = error("", {"INFERENCIA_BACKEND_URL": "192.168.0.5:11973"})
    assert message.startswith("INFERENCIA_BACKEND_URL: expected a URL")


def test_a_configured_backend_ends_the_search() -> None:
    assert not loaded(MLX).config.discover
    assert loaded("backends: []").config.discover
    assert loaded("backends:\n").config.discover


# --- variables in values ---------------------------------------------------------


def test_a_variable_is_filled_in_wherever_it_stands() -> None:
    env = {"H": "gpu", "P": "1234", "K": "sk-1", "D": "5", "B": "true", "M": "7"}
    config = loaded(
        """
server: {port: ${env.P}, header_timeout: "${env.D}s", api_key: {user: ${env.K}}}
# ${env.NOT_SET} in a comment is nobody's business
metrics: {public: ${env.B}}
ratelimit: {burst: "${env.M}"}
backends:
  - {name: a, url: "http://${env.H}:${env.P}/v1", headers: {X-Key: "k ${env.K}"}}
""",
        env,
    ).config
    assert config.server.port == 1234
    assert config.server.header_timeout == 5
    assert config.server.api_key.user == Secret("sk-1")
    assert config.metrics.public is True
    assert config.ratelimit.burst == 7
    assert config.backends[0].url == "http://gpu:1234/v1"
    assert config.backends[0].headers == (("X-Key", "k sk-1"),)


def test_a_variable_that_is_not_set_is_an_error_at_its_key() -> None:
    message = error("backends: [{name: a, url: 'http://x', api_key: ${env.NOPE}}]")
    assert message == "backends[0].api_key: the environment variable NOPE is not set"


def test_what_only_looks_like_a_variable_is_an_error() -> None:
    assert "the name of an environment variable" in error("llama: {exe: '${env.A-B}'}")


def test_a_variables_value_is_not_searched_for_further_variables() -> None:
    env = {"A": "${env.B}"}
    assert loaded("routing: {default_model: ${env.A}}", env).config.routing == (
        RoutingConfig(default_model="${env.B}")
    )


def test_text_from_a_variable_may_look_like_a_number() -> None:
    config = loaded("routing: {default_model: ${env.A}}", {"A": "123"}).config
    assert config.routing.default_model == "123"


def test_variables_that_secrets_come_from_are_remembered() -> None:
    env = {"K": "k", "H": "h", "U": "http://u"}
    text = "{name: a, url: ${env.U}, api_key: ${env.K}, headers: {X: ${env.H}}}"
    assert loaded(f"backends: [{text}]", env).config.secret_variables == {"K", "H"}


# --- types and ranges ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {port: 70000}",
         "server.port: expected a whole number from 0 to 65535, got 70000"),
        ("server: {port: -1}",
         "server.port: expected a whole number from 0 to 65535, got -1"),
        ("server: {port: http}",
         'server.port: expected a whole number from 0 to 65535, got "http"'),
        ("server: {port: '8080'}",
         'server.port: expected a whole number from 0 to 65535, got "8080";'
         " write it without quotes"),
        ("server: {port: 0o10}",
         'server.port: expected a whole number from 0 to 65535, got "0o10"'),
        ("server: {port: 010}",
         'server.port: expected a whole number from 0 to 65535, got "010";'
         " write it without leading zeros"),
        ("server: {port: 8_080}",
         'server.port: expected a whole number from 0 to 65535, got "8_080";'
         " write it without _"),
        ("server: {port: 80.5}",
         "server.port: expected a whole number from 0 to 65535, got 80.5"),
        ("server: {port: true}",
         "server.port: expected a whole number from 0 to 65535, got true"),
        ("server: {port: }",
         "server.port: expected a whole number from 0 to 65535, got nothing"),
        ("server: {port: [8080]}",
         "server.port: expected a whole number from 0 to 65535, got a list"),
        ("server: {port: {a: 1}}",
         "server.port: expected a whole number from 0 to 65535, got a group of keys"),
        ("server: {header_timeout: thirty}",
         'server.header_timeout: expected a duration such as 30s, got "thirty"'),
        ("server: {header_timeout: 1:30}",
         'server.header_timeout: expected a duration such as 30s, got "1:30"'),
        ("server: {header_timeout: true}",
         "server.header_timeout: expected a duration such as 30s, got true"),
        ("server: {header_timeout: -5}",
         "server.header_timeout: a duration cannot be negative, got -5"),
        ("server: {header_timeout: 0s}",
         'server.header_timeout: expected a duration above zero, got "0s"'),
        ("server: {max_body: 64 megs}",
         'server.max_body: expected a size such as 64MiB, got "64 megs"'),
        ("server: {max_body: 0}",
         "server.max_body: expected a size of at least 1B, got 0"),
        ("server: {max_body: 2024-01-31}",
         'server.max_body: expected a size such as 64MiB, got "2024-01-31"'),
        ("server: {host: '127.0.0.1:80'}",
         'server.host: expected an address without port, got "127.0.0.1:80"'),
        ("server: {host: 300.0.0.1}",
         'server.host: expected an address such as 127.0.0.1, got "300.0.0.1"'),
        ("server: {host: '*'}",
         'server.host: expected an address such as 127.0.0.1, got "*";'
         " 0.0.0.0 is all addresses"),
        ("server: {host: 5}",
         "server.host: expected text, got 5; put it in quotes if meant so"),
        ("server: {host: ''}",
         "server.host: expected text, got nothing between the quotes"),
        ("server: {trusted_proxies: [10.0.0.1/8]}",
         "server.trusted_proxies[0]: expected a network such as 10.0.0.0/8,"
         ' got "10.0.0.1/8"; did you mean 10.0.0.0/8?'),
        ("server: {trusted_proxies: 10.0.0.0/8}",
         'server.trusted_proxies: expected a list, got "10.0.0.0/8"'),
        ("server: {listen: {':4444': goinfr}}",
         'server.listen.:4444: unknown service "goinfr"; did you mean goinfer?'),
        ("server: {listen: {'4444': goinfer}}",
         'server.listen: expected HOST:PORT or :PORT, got "4444"'),
        ("metrics: {public: yes}",
         'metrics.public: expected true or false, got "yes"'),
        ("metrics: {public: on}",
         'metrics.public: expected true or false, got "on"'),
        ("metrics: {public: 1}", "metrics.public: expected true or false, got 1"),
        ("metrics: {public: 'true'}",
         'metrics.public: expected true or false, got "true"'),
        ("log: {level: verbose}",
         'log.level: expected debug, info, warn or error, got "verbose"'),
        ("log: {format: jsno}",
         'log.format: expected json or text, got "jsno"; did you mean json?'),
        ("ratelimit: {requests_per_second: 0}",
         "ratelimit.requests_per_second: expected a number above 0, got 0"),
        ("ratelimit: {requests_per_second: .inf}",
         'ratelimit.requests_per_second: expected a number above 0, got ".inf"'),
        ("ratelimit: {burst: 0}",
         "ratelimit.burst: expected a whole number of at least 1, got 0"),
        ("watchdog: {fail_threshold: 0}",
         "watchdog.fail_threshold: expected a whole number of at least 1, got 0"),
        ("watchdog: []",
         "watchdog: expected a group with interval, fail_threshold, request_timeout,"
         " got a list"),
        ("backends: mlx", 'backends: expected a list, got "mlx"'),
        ("backends: {name: a}", "backends: expected a list, got a group of keys"),
        ("routing: {aliases: [a]}",
         "routing.aliases: expected names with values, got a list"),
        ("routing: {aliases: {a: }}", "routing.aliases.a: expected text, got nothing"),
        ("routing: {fallbacks: {a: b}}",
         'routing.fallbacks.a: expected a list, got "b"'),
        ("routing: {default_model: \"a\\nb\"}",
         "routing.default_model: expected text on one line,"
         " without control characters"),
        ("[1, 2]", "expected keys such as server and backends, got a list"),
        ("hello", 'expected keys such as server and backends, got "hello"'),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_was_expected(text: str, message: str) -> None:
    assert error(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{url: localhost:11434}",
         'backends[0].url: expected a URL such as http://localhost:11434,'
         ' got "localhost:11434"; write http:// in front'),
        ("{url: 'ftp://h'}",
         "backends[0].url: expected a URL such as http://localhost:11434,"
         ' got "ftp://h"'),
        ("{url: 'http://'}",
         "backends[0].url: expected a URL such as http://localhost:11434,"
         ' got "http://"'),
        ("{url: 'http://h:99999'}",
         "backends[0].url: expected a URL such as http://localhost:11434,"
         ' got "http://h:99999"'),
        ("{url: 'http://h/?a=b'}",
         "backends[0].url: expected a URL such as http://localhost:11434,"
         " without ? and #"),
        ("{url: 'http://user:hunter2@h'}",
         "backends[0].url: a URL must not hold a user or password;"
         " use api_key or headers"),
        ("{name: a}",
         "backends[0]: url is missing; a backend needs one (only type echo does not)"),
        ("{url: 'http://h', type: olama}",
         "backends[0].type: expected mlx, ollama, llamacpp, lmstudio, vllm, openai,"
         ' openrouter, anthropic or echo, got "olama"; did you mean ollama?'),
        ("{url: 'http://h', assemble: on}",
         'backends[0].assemble: expected auto, true or false, got "on"'),
        ("{url: 'http://h', priority: high}",
         'backends[0].priority: expected a whole number from -1000000000 to'
         ' 1000000000, got "high"'),
        ("{url: 'http://h', models: ['']}",
         "backends[0].models[0]: expected text, got nothing between the quotes"),
        ("{url: 'http://h', headers: {'X Y': z}}",
         'backends[0].headers: "X Y" cannot be the name of a header'),
        ("{url: 'http://h', headers: {Host: z}}",
         "backends[0].headers: the header Host is written by inferencia itself"),
        ("{url: 'http://h', headers: {X-A: a, x-a: b}}",
         "backends[0].headers: the header x-a is given twice"),
        ("{url: 'http://h', api_key: 'sk a'}",
         "backends[0].api_key: expected a key without blanks and letters beyond ASCII"),
        ("{url: 'http://h', tiemout: 5s}",
         "backends[0].tiemout: unknown key; did you mean backends[0].timeout?"),
    ],
)  # fmt: skip
def test_a_wrong_value_of_a_backend_is_named(text: str, message: str) -> None:
    assert error(f"backends: [{text}]") == message


def test_values_in_range_are_taken() -> None:
    config = loaded(
        """
server:
  host: "[::1]"
  port: 0
  header_timeout: 0.5
  read_timeout: 1h30m
  write_timeout: 500ms
  shutdown_timeout: 0
  max_body: 1GiB
  max_body_total: 2GiB
  trusted_proxies: [127.0.0.1, 10.0.0.0/8, fd00::/8]
  sse_keepalive: 0
log: {level: warning, format: TEXT}
"""
    ).config
    server = config.server
    assert (server.host, server.port) == ("::1", 0)
    assert (server.header_timeout, server.read_timeout) == (0.5, 5400)
    assert (server.write_timeout, server.shutdown_timeout) == (0.5, 0)
    assert server.max_body == 1024**3
    assert server.trusted_proxies[0] == ipaddress.ip_network("127.0.0.1/32")
    assert (config.log.level, config.log.format) == ("warn", "text")


def test_a_backend_is_read_whole() -> None:
    backend = backend_of(
        "{name: yes, type: openai, url: 'https://h/v1', timeout: 0, api_key: sk-x,"
        " headers: {X-Version: 1.10, X-On: true}, models: ['qwen*'], prefix: h/,"
        " priority: -1, assemble: true, pad_nonstream: true}"
    )
    assert backend.name == "yes"
    assert backend.timeout == 0
    assert backend.headers == (("X-Version", "1.10"), ("X-On", "true"))
    assert (backend.models, backend.prefix) == (("qwen*",), "h/")
    assert (backend.priority, backend.assemble) == (-1, True)
    assert backend.pad_nonstream


def test_assemble_is_auto_unless_it_is_said() -> None:
    assert backend_of("{url: 'http://h', assemble: auto}").assemble is None
    assert backend_of("{url: 'http://h', assemble: false}").assemble is False


def test_a_backends_type_follows_from_its_port_and_its_name_from_its_type() -> None:
    backend = backend_of("{url: 'http://gpu:11973'}")
    assert (backend.name, backend.type) == ("mlx", "mlx")
    backend = backend_of("{url: 'http://gpu:8000'}")
    assert (backend.name, backend.type) == ("openai", "openai")


def test_two_backends_cannot_have_one_name() -> None:
    message = error("backends: [{url: 'http://a'}, {url: 'http://b'}]")
    assert message == (
        'backends[1].name: "openai" is the name of backends[0] too;'
        " every backend needs its own"
    )


def test_aliases_may_follow_each_other_but_not_in_a_circle() -> None:
    text = "routing: {aliases: {a: b, b: c, '*': c}}"
    assert loaded(text).config.routing.aliases == {"a": "b", "b": "c", "*": "c"}
    assert error("routing: {aliases: {x: a, a: b, b: c, c: a}}") == (
        "routing.aliases.a: leads back to itself: a -> b -> c -> a"
    )
    assert "a -> a" in error("routing: {aliases: {a: a}}")


def test_a_model_cannot_be_its_own_fallback() -> None:
    assert error("routing: {fallbacks: {a: [b, a]}}") == (
        "routing.fallbacks.a: a model cannot be its own fallback"
    )


def test_relative_paths_begin_at_the_files_folder_and_a_tilde_is_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "etc").mkdir()
    (folder / "etc" / "c.yaml").write_text("auth: {keys_file: ./k.txt}")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    path, home = folder / "etc" / "c.yaml", {"HOME": str(folder)}
    auth = load(path, home, Flags()).config.auth
    assert auth.keys_file == folder / "etc" / "k.txt"
    assert auth.is_keys_file_given
    path.write_text("auth: {keys_file: ~/k.txt}")
    assert load(path, home, Flags()).config.auth.keys_file == folder / "k.txt"
    env = {**home, "INFERENCIA_AUTH_KEYS_FILE": "k.txt"}
    auth = load(path, env, Flags()).config.auth
    assert auth.keys_file == folder / "elsewhere" / "k.txt"


# --- what errors say -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {prot: 1}", "server.prot: unknown key; did you mean server.port?"),
        ("server: {max-body: 1}",
         "server.max-body: unknown key; did you mean server.max_body?"),
        ("sevrer: {}", "sevrer: unknown key; did you mean server?"),
        ("port: 1", "port: unknown key; did you mean server.port?"),
        ("keys_file: a", "keys_file: unknown key; did you mean auth.keys_file?"),
        ("url: a", "url: unknown key; did you mean backends[].url?"),
        ("metrics: {xyz: 1}", "metrics.xyz: unknown key; known here: public"),
        ("on: 1", "on: unknown key; known here: " + ", ".join(
            fields.readers(Config))),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_known_one(text: str, message: str) -> None:
    assert error(text) == message


def test_all_errors_are_reported_together() -> None:
    found = errors(
        """
server: {port: x, prot: 1, port: 2, host: [a]}
backends: [{url: nope}, 5, {url: 'http://h', timeout: long}]
routing: {aliases: {a: a}}
swap: {models: {a: {comd: x, cmd: y, proxy: 'http://h'}}}
""",
        {"INFERENCIA_API_KEYS": "", "INFERENCIA_LOG_LEVEL": "loud"},
    )
    assert [message.partition(": ")[0] for message in found] == [
        "server.port",
        "server.port",
        "server.prot",
        "server.host",
        "backends[0].url",
        "backends[1]",
        "backends[2].timeout",
        "INFERENCIA_LOG_LEVEL",
        "INFERENCIA_API_KEYS",
        "routing.aliases.a",
        "swap.models.a.comd",
    ]


def test_a_key_given_twice_is_an_error_at_any_level() -> None:
    assert error("server: {}\nserver: {}\n") == "server: given twice, on lines 1 and 2"
    text = "backends:\n  - url: http://h\n    url: http://h\n"
    assert error(text) == "backends[0].url: given twice, on lines 2 and 3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "line 1, column 5: "),
        ("server:\n\tport: 1", "line 2, column 1: a tab"),
        ("a: 1\n---\nb: 1\n", "line 2: a second document"),
        (b"\xff", "line 1: not UTF-8"),
        (b"a" * (yamlfile.MAX_BYTES + 1), "larger than"),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_with_the_line(
    text: str | bytes, message: str
) -> None:
    assert error(text).startswith(message)


def test_a_file_that_was_asked_for_and_is_not_there_is_an_error(folder: Path) -> None:
    for path, env in (
        (folder / "no.yaml", {}),
        (None, {"INFERENCIA_CONFIG": str(folder / "no.yaml")}),
    ):
        with pytest.raises(ConfigErrors) as raised:
            load(path, {"HOME": "/nowhere", **env}, Flags())
        assert raised.value.lines() == [
            f"{folder / 'no.yaml'}: cannot read it: No such file or directory"
        ]


def test_a_folder_in_place_of_the_file_is_an_error(file: Path) -> None:
    file.mkdir()
    with pytest.raises(ConfigErrors, match="Is a directory"):
        load(None, {"HOME": "/nowhere"}, Flags())


@pytest.mark.parametrize(
    "text",
    [
        "server: {api_key: CANARY}",
        "server: {api_key: {admin: [CANARY]}}",
        "server: {api_key: {admin: \"CANARY\\n\"}, prot: 1}",
        "server: {api_key: [CANARY]}",
        "server: {port: sk-CANARY}",
        "server: {CANARY: 1}\nbackends: [{url: 'http://u:CANARY@h'}]",
        "backends: [{url: 'http://h', api_key: {a: CANARY}}]",
        "backends: [{url: 'http://h', api_key: 'CANARY x'}]",
        "backends: [{url: 'http://h', headers: CANARY}]",
        "backends: [{url: 'http://h', headers: {Host: CANARY}}]",
        "backends: [{url: 'http://h', headers: {X: \"CANARY\\nY: 1\"}}]",
        "backends: [{url: 'http://h', headers: {X: [CANARY]}}]",
        "tunnel: {dial: {token: CANARY, passthrough: {a: b}}}",
        "state: {url: 'redis://u:CANARY@h'}",
        "api_key: *CANARY",
        "api_key: 'CANARY",
    ],
)  # fmt: skip
def test_no_error_shows_a_secret(text: str) -> None:
    for message in errors(text):
        assert "CANARY" not in message.replace("server.CANARY", ""), message


def test_no_error_has_more_than_one_line_or_no_end() -> None:
    text = 'server: {"a\\nb": 1, host: "x\\ny", port: "' + "9" * 5000 + '"}'
    for message in errors(text):
        assert "\n" not in message
        assert len(message) < 300


# --- what is not built -----------------------------------------------------------


def test_a_task_is_a_command_line_or_several() -> None:
    tasks = loaded(
        "admin: {tasks: {a: 'ls -l', b: [git pull, 'make x']}}"
    ).config.admin.tasks
    assert tasks == {"a": ("ls -l",), "b": ("git pull", "make x")}


def test_a_task_whose_quotation_marks_do_not_match_is_refused() -> None:
    (error,) = errors("admin: {tasks: {a: [ls, 'say \"hello']}}")
    assert error.startswith("admin.tasks.a[1]: a quotation mark or backslash has no")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("state: {url: redis://h}", "state.url"),
        ("backends: [{url: 'http://h', type: anthropic}]",
         "backends[0].type: anthropic"),
    ],
)  # fmt: skip
def test_a_feature_that_is_not_built_is_refused(text: str, path: str) -> None:
    assert f"{path}: not in this version" in errors(text)


@pytest.mark.parametrize(
    "mac", ["00:1a:2b:3c:4d:5e", "00:1A:2B:3C:4D:5E", "'00-1a-2b-3c-4d-5e'"]
)
def test_a_hardware_address_may_be_written_as_machines_show_it(mac: str) -> None:
    text = f"backends: [{{url: 'http://h', wake: {{mac: {mac}}}}}]"
    (backend,) = loaded(text).config.backends
    assert backend.wake.mac == "00:1a:2b:3c:4d:5e"


@pytest.mark.parametrize(
    "mac", ["1", "00:1a:2b:3c:4d", "00:1a:2b:3c:4d:5g", "001a2b3c4d5e", "0:1:2:3:4:5"]
)
def test_what_is_no_hardware_address_is_refused(mac: str) -> None:
    text = f"backends: [{{url: 'http://h', wake: {{mac: '{mac}'}}}}]"
    assert errors(text) == (
        "backends[0].wake.mac: expected a hardware address such as aa:bb:cc:dd:ee:ff, "
        f'got "{mac}"',
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("192.168.1.255", "192.168.1.255"),
        ("192.168.1.255:7", "192.168.1.255:7"),
        ("gpu.lan:4000", "gpu.lan:4000"),
        ("fe80::1", "fe80::1"),
        ("'[fe80::1]:7'", "[fe80::1]:7"),
    ],
)
def test_packets_may_go_to_an_address_with_a_port(written: str, read: str) -> None:
    text = f"backends: [{{url: 'http://h', wake: {{broadcast: {written}}}}}]"
    (backend,) = loaded(text).config.backends
    assert backend.wake.broadcast == read


@pytest.mark.parametrize("written", ["1.2.3", "h:0", "h:65536", "h:x", "h h"])
def test_an_address_that_no_packet_can_go_to_is_refused(written: str) -> None:
    text = f"backends: [{{url: 'http://h', wake: {{broadcast: '{written}'}}}}]"
    (message,) = errors(text)
    assert message.startswith("backends[0].wake.broadcast: expected a")


def test_a_spending_limit_without_prices_causes_a_warning() -> None:
    text = "backends: [{url: 'http://h', daily_spend: 5}]"
    (warning,) = warnings(text)
    assert warning.startswith("backends[0].daily_spend: never reached")
    text = "backends: [{url: 'http://h', daily_spend: 5, prices: {'*': {prompt: 1}}}]"
    assert warnings(text) == ()


def test_every_line_of_the_table_of_unbuilt_things_names_a_key() -> None:
    known = set(all_keys())
    for path in UNBUILT:
        assert path.partition("=")[0] in known


def test_limits_of_bodies_and_connections_are_accepted() -> None:
    text = "server: {max_connections: 100, max_body_total: 1GiB}"
    assert loaded(text).config.server.max_connections == 100


def test_a_llama_swap_file_is_recognised_by_its_name_and_by_its_keys() -> None:
    for name, text, models in (
        ("llama-swap.yml", "logLevel: info\nmodels: {}\n", []),
        (
            "other.yaml",
            "healthCheckTimeout: 50\nmodels: {a: {cmd: b, proxy: 'http://h'}}\n",
            ["a"],
        ),
    ):
        found = loaded(text, name=name).config.swap_config
        assert found is not None
        assert [model.id for model in found.models] == models


# --- the predecessors' files -----------------------------------------------------


def test_go_inferencias_example_loads_without_any_warning() -> None:
    found = load(FIXTURES / "go-inferencia" / "config.yaml", {"HOME": "/h"}, Flags())
    assert found.warnings == ()
    assert found.config.backends == (
        BackendConfig(name="mlx", type="mlx", url="http://localhost:11973", timeout=60),
    )
    assert found.config.server.write_timeout == 120


def test_goinfers_example_loads_with_warnings_only() -> None:
    found = load(FIXTURES / "goinfer" / "goinfer.yml", {"HOME": "/h"}, Flags())
    server = found.config.server
    assert server.listen[":2222"] == ("models",)
    assert "http://localhost" in server.origins
    assert found.config.models_dir == (Path("/home/me/models"),)
    assert found.config.discover
    assert {warning.partition(":")[0] for warning in found.warnings} == {
        "llama-swap.yml",
        "llama.exe",
        "models_dir",
        "server.origins[0]",
    }


def test_goinfers_example_without_a_neighbour_does_not_mention_one(
    folder: Path,
) -> None:
    shutil.copy(FIXTURES / "goinfer" / "goinfer.yml", folder)
    found = load(Path("goinfer.yml"), {"HOME": "/h"}, Flags())
    assert not any("llama-swap.yml" in warning for warning in found.warnings)


def test_all_that_go_inferencia_could_say_is_understood() -> None:
    found = loaded(
        """
server: {host: 127.0.0.1, port: 8080, read_timeout: 30s, write_timeout: 120s}
backends:
  - {name: ollama, type: ollama, url: http://localhost:11434, timeout: 300s,
     health_timeout: 5s}
tts_backends:
  - {name: kokoro, url: http://localhost:50051}
  - {name: chatterbox, url: http://localhost:50052, timeout: 10s}
log: {level: info, format: json, cloud_format: gcp}
observability: {otel_enabled: false, otel_endpoint: "", otel_service_name: inferencia}
watchdog: {interval: 30s, fail_threshold: 3, request_timeout: 5s}
"""
    )
    assert [(b.name, b.type, b.models, b.timeout) for b in found.config.backends] == [
        ("ollama", "ollama", (), 300),
        ("kokoro", "openai", ("kokoro",), 30),
        ("chatterbox", "openai", ("chatterbox",), 10),
    ]
    assert [warning.partition(":")[0] for warning in found.warnings] == [
        "tts_backends",
        "log.cloud_format",
        "observability",
    ]


def test_speech_backends_alone_leave_the_search_on() -> None:
    text = "tts_backends: [{name: kokoro, url: 'http://localhost:50051'}]"
    assert loaded(text).config.discover


def test_a_wrong_speech_backend_is_named() -> None:
    assert error("tts_backends: [{name: a}]") == "tts_backends[0]: url is missing"
    assert error("tts_backends: 5") == "tts_backends: expected a list, got 5"
    text = "tts_backends: [{name: m, url: 'http://h'}]\n" + MLX
    assert error(text).startswith(
        'tts_backends[0].name: "m" is the name of backends[0]'
    )


def test_origins_and_models_dir_may_be_one_text_as_goinfer_wrote_them() -> None:
    config = loaded("server: {origins: 'http://a,http://b'}\nmodels_dir: /a:/b").config
    assert config.server.origins == ("http://a", "http://b")
    assert config.models_dir == (Path("/a"), Path("/b"))


# --- warnings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("models_dir: /no/such/folder", "models_dir: /no/such/folder does not exist"),
        ("models_dir: config.yaml", "is not a folder"),
        ("llama: {exe: /no/such/exe}", "llama.exe: /no/such/exe is not there"),
        ("server: {origins: [localhost]}", 'no browser sends the origin "localhost"'),
        ("server: {origins: ['http://a/']}", 'no browser sends the origin "http://a/"'),
        ("server: {origins: ['*']}", 'no browser sends the origin "*"'),
        ("server: {max_body: 1GiB}", "bodies above 256MiB are refused"),
    ],
)  # fmt: skip
def test_what_is_odd_is_a_warning(text: str, warning: str) -> None:
    found = warnings(text)
    assert any(warning in one for one in found), found


def test_models_without_a_program_to_run_them_are_a_warning() -> None:
    (warning,) = warnings("models_dir: .", {"PATH": "/no/such/folder"})
    assert warning.startswith("llama.exe: there is no llama-server on the PATH")
    assert not warnings("", {"PATH": "/no/such/folder"})


def test_an_odd_origin_from_the_environment_is_a_warning() -> None:
    (odd,) = warnings("", {"GI_ORIGINS": "localhost"})
    assert odd.startswith("GI_ORIGINS: no browser sends")


def test_half_a_certificate_is_an_error() -> None:
    (error,) = errors("server: {tls: {cert: a}}")
    assert error == "server.tls.key: missing; cert alone is of no use"


def test_services_that_are_not_there_are_a_warning() -> None:
    text = "server: {listen: {':1': openai metrics, ':2': ollama}}"
    (warning,) = warnings(text)
    assert warning == ('server.listen.:2: the service "ollama" is not in this version')


def test_the_flag_for_one_port_replaces_several_addresses() -> None:
    found = loaded("server: {listen: {':1': openai}}", flags=Flags(port=7))
    assert (found.config.server.port, found.config.server.listen) == (7, {})


# --- flags -----------------------------------------------------------------------


def test_demo_serves_only_echo_whatever_is_configured() -> None:
    env = {"INFERENCIA_BACKEND_URL": "http://h"}
    config = loaded(MLX, env, Flags(demo=True)).config
    assert [(b.name, b.type) for b in config.backends] == [("echo", "echo")]
    assert config.is_demo
    assert not config.discover


def test_no_api_key_is_handed_on() -> None:
    assert loaded("", flags=Flags(no_api_key=True)).config.is_open
    assert not loaded("").config.is_open


# --- what is shown ---------------------------------------------------------------


def test_neither_repr_nor_summary_shows_a_secret() -> None:
    found = loaded(
        """
server: {api_key: {admin: CANARY-1, user: CANARY-2}}
backends:
  - {name: a, url: http://h, api_key: CANARY-3, headers: {X-Key: CANARY-4}}
routing: {default_model: m, aliases: {x: y}, fallbacks: {m: [n]}}
""",
        {"INFERENCIA_API_KEYS": "CANARY-5"},
    )
    shown = "\n".join(summary(found.config, Path("keys.txt")))
    assert "CANARY" not in shown + repr(found) + str(found.config)
    assert "X-Key" in shown
    assert "api_key ***" in shown
    assert "x -> y" in shown


def test_the_summary_says_that_servers_are_looked_for() -> None:
    shown = summary(loaded("").config, Path("/k/keys.txt"))
    assert "backends  none configured: local servers are looked for" in shown
    assert "keys      /k/keys.txt" in shown


def test_the_summary_names_every_address_with_its_services() -> None:
    text = "server: {listen: {':1': openai, '[::1]:2': metrics}}"
    shown = summary(loaded(text).config, Path("keys.txt"))
    assert shown[:2] == [
        "listen    127.0.0.1:1, health openai",
        "listen    [::1]:2, health metrics",
    ]


# --- whatever is thrown at it ----------------------------------------------------

ODD_VALUES = (
    *("", "~", "0", "-1", "1e9", "true", "on", "1:30", "''", "'\\t'", "'a\\nb'", "é"),
    *("[]", "{}", "[[]]", "{a: b}", "[a, [b], {c: d}]", "${env.X}", "'${env.'", "'*'"),
    *(
        "http://",
        "'http://[::1'",
        "'http://h:x'",
        "5s",
        "-5s",
        "5MiB",
        "9" * 19,
        "auto",
    ),
)


def with_everywhere(value: str, keys: Mapping[str, Any]) -> str:
    """A group, in YAML's flow style, in which every key that is none has ``value``."""
    texts = []
    for name, inner in keys.items():
        text = with_everywhere(value, inner) if inner else value
        texts.append(f"{name}: [{text}]" if name == "backends" else f"{name}: {text}")
    return "{" + ", ".join(texts) + "}"


@pytest.mark.parametrize("value", ODD_VALUES)
def test_every_key_takes_or_refuses_every_odd_value(value: str) -> None:
    """No reader fails on what it did not expect."""
    tree: dict[str, Any] = {}
    for path in all_keys():
        here = tree
        for name in path.replace("[]", "").split("."):
            here = here.setdefault(name, {})
    for text in (
        with_everywhere(value, tree),
        with_everywhere(value, dict.fromkeys(set(tree) - {"backends"})),
        f"backends: {value}",
    ):
        try:
            loaded(text)
        except ConfigErrors as refusal:
            assert all("\n" not in message for message in refusal.errors)
