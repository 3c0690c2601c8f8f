"""A llama-swap configuration: what each key means, and what it is when left out."""

import re
from pathlib import Path
from typing import Any

import pytest

from inferencia import yamlfile
from inferencia.fields import Reader
from inferencia.models import swapkeys
from inferencia.models.definitions import (
    Capabilities,
    Filters,
    Group,
    LogTo,
    MatrixSets,
    ModelDefinition,
    Peer,
    Profile,
    Selector,
    SwapConfig,
    Timeouts,
)
from inferencia.models.swapfile import TIME_FORMATS, Reading, read_swap

FIXTURES = Path(__file__).parent / "fixtures"
EVERY_KEY = (FIXTURES / "llama-swap" / "every-key.yml").read_text("utf-8")
GOINFERS = (FIXTURES / "goinfer" / "llama-swap.yml").read_text("utf-8")
PAGE = Path(__file__).parent.parent / "docs" / "llama-swap.md"

ENV = {"SWAP_KEY": "sk-second-93c1", "ATTIC_KEY": "sk-attic-77aa"}
# The shortest model.
M = "models: {m: {cmd: 's --port ${PORT}'}}\n"


def read(text: str, **env: str) -> Reading:
    return read_swap(text, {**ENV, **env})


def swap(text: str, **env: str) -> SwapConfig:
    found = read(text, **env)
    assert found.errors == ()
    return found.config


def model(keys: str, above: str = "", **env: str) -> ModelDefinition:
    """The model ``m`` with these keys, written in one line."""
    text = f"{above}\nmodels:\n  m:\n    cmd: s --port ${{PORT}}\n"
    lines = "".join(f"    {line}\n" for line in keys.splitlines())
    return swap(text + lines, **env).models[0]


# --- all of it -------------------------------------------------------------------


def test_a_file_with_every_key_is_understood() -> None:
    config = swap(EVERY_KEY)
    assert [m.id for m in config.models] == ["chat", "coder", "comfyui_auto", "embed"]
    assert config.models[1] == ModelDefinition(
        id="coder",
        command=(
            "/opt/llama/llama-server", "--host", "127.0.0.1", "--port", "${PORT}",
            "--ctx-size", "16384", "-m", "/models/coder-q4.gguf",
            "--alias", "coder of ours",
        ),
        proxy="http://127.0.0.1:${PORT}",
        stop_command=("kill", "-INT", "${PID}"),
        env=(("CUDA_VISIBLE_DEVICES", "0"), ("WHERE", "localhost:${PORT}")),
        check_endpoint="/v1/models",
        health_check_timeout=300.0,
        ttl=0.0,
        unload_timeout=45.0,
        use_model_name="coder-q4",
        concurrency_limit=3,
        filters=Filters(
            strip_params=("top_k", "top_p"),
            set_params={"temperature": 0.7, "stop": ["</s>", None]},
            set_params_by_id={
                "coder": {"reasoning": False},
                "coder:high": {"reasoning_effort": "high", "budget": 16384},
            },
        ),
        timeouts=Timeouts(5.0, 15.0, 60.0, 4.0, 2.0, 30.0),
        ignore_websockets=True,
        name="Coder",
        description="For programs, on port 9100",
        aliases=("gpt-4o", "coder-latest", "coder:high"),
        unlisted=True,
        send_loading_state=False,
        capabilities=Capabilities(("text", "image"), ("text",), True, True, 16384),
        metadata={
            "port": 9100,
            "heat": 0.7,
            "text": "coder at 9100 with 16384",
            "list": [1, 1.5, True, 16384],
        },
        priority=10,
        path="/models/coder-q4.gguf",
    )  # fmt: skip
    assert config.matrix == MatrixSets(
        sets=(
            frozenset({"coder", "embed"}),
            frozenset({"embed"}),
            frozenset({"chat", "embed"}),
        ),
        evict_costs={"coder": 5, "chat": 2},
    )
    assert config.has_groups and config.groups == ()
    assert config.selectors == (
        Selector(
            id="best",
            strategy="spillover",
            targets=("coder", "attic/big"),
            spillover=4,
            name="The best there is",
            description="Ours first",
            unlisted=True,
            metadata={"kind": "virtual"},
        ),
    )
    pins = {"coder": "chat", "gpt-4o": None, "embed": None}
    assert config.profiles == (Profile("evening", "Nobody works", pins),)
    assert config.peers == (
        Peer(
            id="attic",
            proxy="https://attic.example.com/llm",
            models=("big", "coder"),
            api_key="sk-attic-77aa",
            filters=Filters(strip_params=("user",), set_params={"store": False}),
            timeouts=Timeouts(connect=7.0),
        ),
    )
    assert config.preload == ("embed", "coder")
    assert config.api_keys == ("sk-first-6f0b1e", "sk-second-93c1")
    assert config.ignore_paths == (r"\.map$", "^/static/")
    assert config.include_aliases_in_list
    assert config.start_port == 9100
    assert (config.log_level, config.log_to) == ("debug", LogTo.BOTH)
    assert config.log_time_format == "rfc3339"


def test_goinfers_file_loads_and_warns_of_members_that_are_no_models() -> None:
    found = read(GOINFERS)
    assert found.errors == ()
    (only,) = found.config.models
    assert only.aliases == ("Qwen2.5-1.5B-Instruct", "Qwen2.5-1.5B")
    assert (only.use_model_name, only.ttl, only.port) == ("qwen:qwq", 3600.0, 6000)
    assert only.filters.strip_params == ("temperature", "top_p", "top_k")
    assert found.config.groups == (
        Group("group1", ()),
        Group("group2", (), swap=False, exclusive=False),
        Group("forever", (), swap=False, exclusive=False, persistent=True),
    )
    members = [w for w in found.warnings if "is not one of the models" in w]
    assert len(members) == 8
    assert 'groups.group1.members[0]: "llama" is not one of the models' in members


def keys_that_are_read(*texts: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every key that the reader asked for while it read these files."""
    asked: set[str] = set()
    take = swapkeys.Keys.take

    def noting(self: swapkeys.Keys, name: str, read: Reader[Any], default: Any) -> Any:
        if not re.search("setParams|metadata", self.place.path):
            asked.add(yamlfile.below(self.place.path, name))
        return take(self, name, read, default)

    monkeypatch.setattr(swapkeys.Keys, "take", noting)
    for text in texts:
        read(text)
    several = r"\b(models|peers|selectors|profiles|groups)\.[^.]+\."
    return {re.sub(several, r"\1.*.", path) for path in asked}


def leaves(keys: set[str]) -> set[str]:
    return {key for key in keys if not any(k.startswith(f"{key}.") for k in keys)}


def test_the_page_lists_every_key_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    one_model = "models: {m: {cmd: s ${PORT}}}"
    legacy = "models: {a: {cmd: s}}\nmatrix: {sets: {s: a}}"
    below = "routing: {router: {settings: {groups: {g: {members: []}}}}}"
    groups = "groups: {g: {members: []}}"
    texts = (EVERY_KEY, one_model, legacy, groups, below)
    known = keys_that_are_read(*texts, monkeypatch=monkeypatch)
    _, _, keys = PAGE.read_text("utf-8").partition("\n## Keys\n")
    rows = re.findall(r"^\| (`[^|]*)", keys, re.M)
    listed = [key for row in rows for key in re.findall("`([^`]+)`", row)]
    assert sorted(listed) == sorted(leaves(known))


# --- what is left out ------------------------------------------------------------


def test_every_key_of_the_top_has_a_default() -> None:
    assert swap(M) == SwapConfig(
        models=(ModelDefinition("m", ("s", "--port", "${PORT}")),),
        ignore_paths=(r".*\.(js|json|css|png|gif|jpg|jpeg|ico|txt)$",),
        include_aliases_in_list=False,
        start_port=5800,
        log_level="info",
        log_to=LogTo.PROXY,
        log_time_format="",
        has_groups=False,
    )


def test_every_key_of_a_model_has_a_default() -> None:
    found = model("")
    assert found.proxy == "http://localhost:${PORT}"
    assert (found.stop_command, found.env, found.aliases) == ((), (), ())
    assert found.check_endpoint == "/health"
    assert found.health_check_timeout == 120.0
    assert (found.ttl, found.unload_timeout, found.concurrency_limit) == (0, 10, 10)
    assert (found.name, found.description, found.use_model_name) == ("", "", "")
    assert found.upstream_id == "m"
    assert found.filters == Filters() and found.timeouts == Timeouts()
    assert found.timeouts == Timeouts(30, 30, 0, 10, 1, 90)
    assert not (found.unlisted or found.send_loading_state or found.ignore_websockets)
    assert found.capabilities is None
    assert (found.metadata, found.priority, found.port) == ({}, 0, 5800)


def test_groups_selectors_and_peers_have_defaults() -> None:
    found = swap(
        M + "groups: {g: {members: [m]}}\n"
        "selectors: {s: {strategy: warm, targets: [m]}}\n"
        "peers: {p: {proxy: 'http://h', models: [x]}}\n"
    )
    assert found.groups == (Group("g", ("m",), True, True, False),)
    assert found.selectors == (Selector("s", "warm", ("m",), 1, "", "", False, {}),)
    assert found.peers == (Peer("p", "http://h", ("x",), "", Filters(), Timeouts()),)


@pytest.mark.parametrize(
    "key",
    """healthCheckTimeout logLevel logTimeFormat logToStdout logRequests store ui
    metricsMaxInMemory captureBuffer performance startPort sendLoadingState globalTTL
    includeAliasesInList unloadTimeout macros apiKeys upstream profiles selectors
    groups matrix hooks routing peers""".split(),
)
def test_a_key_without_a_value_has_its_default(key: str) -> None:
    assert swap(f"{M}{key}:\n") == swap(M)


@pytest.mark.parametrize(
    "key",
    """cmdStop name description env proxy aliases checkEndpoint ttl unloadTimeout
    useModelName filters macros metadata concurrencyLimit sendLoadingState unlisted
    timeouts compat capabilities healthCheckTimeout""".split(),
)
def test_a_models_key_without_a_value_has_its_default(key: str) -> None:
    assert model(f"{key}:") == model("")


# --- numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("above", "keys", "ttl"),
    [
        ("", "", 0),
        ("globalTTL: 60", "", 60),
        ("globalTTL: 60", "ttl: -1", 60),
        ("globalTTL: 60", "ttl: 0", 0),
        ("globalTTL: 60", "ttl: 5", 5),
    ],
)
def test_ttl_is_the_global_one_unless_a_model_says_otherwise(
    above: str, keys: str, ttl: float
) -> None:
    assert model(keys, above).ttl == ttl


@pytest.mark.parametrize(
    ("above", "keys", "seconds"),
    [
        ("", "", 10),
        ("unloadTimeout: 0", "", 10),
        ("unloadTimeout: 30", "", 30),
        ("unloadTimeout: 30", "unloadTimeout: 0", 30),
        ("unloadTimeout: 30", "unloadTimeout: 4", 4),
    ],
)
def test_unload_timeout_is_the_global_one_unless_a_model_says_otherwise(
    above: str, keys: str, seconds: float
) -> None:
    assert model(keys, above).unload_timeout == seconds


@pytest.mark.parametrize(
    ("written", "seconds"), [(0, 15), (14, 15), (15, 15), (16, 16)]
)
def test_the_health_check_has_at_least_15_seconds(written: int, seconds: float) -> None:
    assert model("", f"healthCheckTimeout: {written}").health_check_timeout == seconds
    own = model(f"healthCheckTimeout: {written}", "healthCheckTimeout: 99")
    assert own.health_check_timeout == seconds


@pytest.mark.parametrize(("written", "limit"), [(0, 10), (1, 1), (64, 64)])
def test_a_concurrency_limit_of_zero_is_ten(written: int, limit: int) -> None:
    assert model(f"concurrencyLimit: {written}").concurrency_limit == limit


@pytest.mark.parametrize(("written", "limit"), [(0, 50), (10, 50), (80, 80)])
def test_comfyui_gets_many_requests_and_no_websockets(written: int, limit: int) -> None:
    text = (
        f"models: {{comfyui_auto: {{cmd: 's ${{PORT}}', concurrencyLimit: {written}}}}}"
    )
    (only,) = swap(text).models
    assert (only.concurrency_limit, only.ignore_websockets) == (limit, True)


@pytest.mark.parametrize(
    ("above", "keys", "expected"),
    [
        ("", "", False),
        ("sendLoadingState: true", "", True),
        ("sendLoadingState: true", "sendLoadingState: false", False),
        ("sendLoadingState: yes", "sendLoadingState: off", False),
        ("", "sendLoadingState: On", True),
    ],
)
def test_the_loading_state_is_sent_as_the_model_or_else_the_top_says(
    above: str, keys: str, expected: bool
) -> None:
    assert model(keys, above).send_loading_state is expected


@pytest.mark.parametrize("name", ["", *TIME_FORMATS])
def test_the_formats_of_times_are_known(name: str) -> None:
    assert swap(f"{M}logTimeFormat: '{name}'").log_time_format == name


def test_a_number_will_do_where_text_is_wanted() -> None:
    assert model("name: 7\ndescription: 1.50\naliases: [3]").name == "7"
    assert model("description: 1.50").description == "1.50"
    assert swap(M + "apiKeys: [12345]").api_keys == ("12345",)


# --- ports -----------------------------------------------------------------------


def test_ports_go_to_those_who_use_one_in_the_order_of_their_ids() -> None:
    config = swap(
        """
startPort: 7000
macros: {run: "s --port ${PORT}"}
models:
  zebra: {cmd: "${run}"}
  Beta: {cmd: "s ${PORT} ${PORT}"}
  none: {cmd: s --port 1234, proxy: "http://h:1234"}
  alpha: {cmd: "${run} -m x.gguf"}
"""
    )
    ports = {model.id: model.port for model in config.models}
    assert ports == {"Beta": 7000, "alpha": 7001, "none": None, "zebra": 7002}
    by_id = {model.id: model for model in config.models}
    assert by_id["zebra"].command == ("s", "--port", "${PORT}")
    started = by_id["zebra"].at_port(9)
    assert (started.command[-1], started.proxy) == ("9", "http://localhost:9")
    assert not by_id["none"].needs_port


def test_ports_that_are_handed_out_anew_change_no_definition() -> None:
    before = swap(M).models[0]
    after = swap("startPort: 7000\n" + M).models[0]
    assert before == after and before.runs_like(after)
    assert (before.port, after.port) == (5800, 7000)


def test_the_port_is_filled_in_where_it_is_only_text() -> None:
    found = model(
        "name: on ${PORT}\ncheckEndpoint: /${PORT}\naliases: ['at-${PORT}']\n"
        "metadata: {'${PORT}': '${PORT}', text: 'p${PORT}'}\n"
        "filters: {setParams: {p: '${PORT}'}}"
    )
    assert (found.name, found.check_endpoint) == ("on 5800", "/5800")
    assert found.aliases == ("at-5800",)
    assert found.metadata == {"5800": 5800, "text": "p5800"}
    assert found.filters.set_params == {"p": 5800}


# --- macros and variables --------------------------------------------------------


def test_a_models_macros_win_over_those_of_the_top_also_within_them() -> None:
    config = swap(
        """
macros: {ctx: 4096, args: "-c ${ctx} -a ${MODEL_ID}"}
models:
  a: {cmd: "s ${PORT} ${args}"}
  b: {macros: {ctx: 8192, more: "${args} -x"}, cmd: "s ${PORT} ${more}"}
"""
    )
    assert config.models[0].command[2:] == ("-c", "4096", "-a", "a")
    assert config.models[1].command[2:] == ("-c", "8192", "-a", "b", "-x")


def test_comments_in_a_command_go_before_macros_and_variables_are_put_in() -> None:
    config = swap(
        """
models:
  m:
    cmd: |
      # ${nothing} ${env.NOTHING} it's
      s ${PORT}
    cmdStop: |
      # ${nothing}
      stop ${PID}
"""
    )
    assert config.models[0].command == ("s", "${PORT}")
    assert config.models[0].stop_command == ("stop", "${PID}")


def test_variables_are_put_in_anywhere_but_in_comments() -> None:
    config = swap(
        """
# ${env.NOTHING}
startPort: ${env.FIRST}
macros: {bin: "${env.BIN}/server"}  # ${env.NOTHING}
models:
  ${env.NAME}:
    cmd: ${bin} --port ${PORT}
    env: ["TOKEN=${env.TOKEN}"]
    metadata: {"${env.NAME}": "${env.FIRST}", n: ${env.FIRST}}
""",
        FIRST="7001", BIN="/opt", NAME="qwen", TOKEN='a"b\\c: #d',
    )  # fmt: skip
    (only,) = config.models
    assert (only.id, only.port, only.command[0]) == ("qwen", 7001, "/opt/server")
    assert only.env == (("TOKEN", 'a"b\\c: #d'),)
    assert only.metadata == {"qwen": "7001", "n": 7001}


def test_a_variables_value_may_hold_macros_and_can_never_be_yaml() -> None:
    text = "macros: {a: '1'}\nmodels: {m: {cmd: 's ${PORT} ${env.ARGS}'}}"
    assert swap(text, ARGS="${a} [x] ").models[0].command[2:] == ("1", "[x]")


def test_variables_that_become_keys_are_kept_from_child_processes() -> None:
    found = read(
        M
        + """
macros: {one: "${env.A}", two: "${one}${env.B}", other: "${env.C}"}
apiKeys: ["${env.SWAP_KEY}"]
peers: {p: {proxy: 'http://h', models: [x], apiKey: "${two}"}}
""",
        A="a", B="b", C="c",
    )  # fmt: skip
    assert found.errors == ()
    assert found.secret_variables == {"A", "B", "SWAP_KEY"}
    assert found.config.peers[0].api_key == "ab"


def test_keys_are_not_in_what_is_printed() -> None:
    assert "sk-" not in repr(swap(EVERY_KEY))


def test_what_llama_swap_does_not_expand_may_look_like_a_macro() -> None:
    found = read(
        "macros: {a: x}\n"
        "models: {m: {cmd: 's ${PORT}', env: ['P=${HOME}:${a}', 'Q=${a}'],"
        " filters: {setParams: {t: '${user}', u: '${a}'}}}}"
    )
    assert found.errors == ()
    assert found.warnings == (
        "models.m.env[0]: unknown macro ${HOME}; left as it is",
        "models.m.filters.setParams.t: unknown macro ${user}; left as it is",
    )
    assert found.config.models[0].env == (("P", "${HOME}:${a}"), ("Q", "x"))
    assert found.config.models[0].filters.set_params == {"t": "${user}", "u": "x"}


def test_anchors_merge_keys_and_names_for_them_are_understood() -> None:
    config = swap(
        """
x-common: &common
  ttl: 60
  env: [A=1]
x-more: &more {ttl: 1, unlisted: true}
models:
  a: {<<: *common, cmd: "s ${PORT}"}
  b:
    cmd: s ${PORT}
    <<: [*common, *more]
    env: []
"""
    )
    a, b = config.models
    assert (a.ttl, a.env, a.unlisted) == (60, (("A", "1"),), False)
    assert (b.ttl, b.env, b.unlisted) == (60, (), True)


# --- names -----------------------------------------------------------------------


def test_names_with_parameters_of_their_own_are_aliases() -> None:
    found = model(
        "aliases: [one]\n"
        "filters: {setParamsByID: {m: {a: 1}, one: {a: 2}, '${MODEL_ID}:two': {a: 3}}}"
    )
    assert found.aliases == ("one", "m:two")
    assert found.filters.set_params_by_id["m:two"] == {"a": 3}


def test_preloading_takes_ids_and_aliases_and_leaves_out_what_is_unknown() -> None:
    found = read(
        "models: {m: {cmd: 's ${PORT}', aliases: [a]}}\n"
        "hooks: {on_startup: {preload: [a, ' m ', '', mm, gone]}}"
    )
    assert (found.errors, found.config.preload) == ((), ("m",))
    assert found.warnings == (
        'hooks.on_startup.preload[3]: "mm" is not one of the models; did you mean m?',
        'hooks.on_startup.preload[4]: "gone" is not one of the models',
    )


def test_priorities_go_to_the_models() -> None:
    text = (
        "models: {a: {cmd: 's ${PORT}', aliases: [x]}, b: {cmd: 's ${PORT}'}}\n"
        "routing: {scheduler: {use: fifo, settings: {fifo: {priority: {x: 5}}}}}"
    )
    assert [model.priority for model in swap(text).models] == [5, 0]


# --- groups and matrix -----------------------------------------------------------

TWO = "models: {a: {cmd: 's ${PORT}'}, b: {cmd: 's ${PORT}', aliases: [c]}}\n"


def test_groups_may_stand_at_the_top_or_below_routing() -> None:
    groups = "{groups: {g: {members: [a, b], swap: no}}}"
    below = f"routing: {{router: {{use: group, settings: {groups}}}}}"
    unnamed = f"routing: {{router: {{settings: {groups}}}}}"
    found = {swap(TWO + text).groups for text in (groups[1:-1], below, unnamed)}
    assert found == {(Group("g", ("a", "b"), swap=False),)}


def test_a_matrix_may_stand_at_the_top_or_below_routing() -> None:
    matrix = "{matrix: {vars: {v: b}, sets: {s: a & v}, evict_costs: {v: 3}}}"
    below = f"routing: {{router: {{use: matrix, settings: {matrix}}}}}"
    for text in (matrix[1:-1], below):
        found = swap(TWO + text).matrix
        assert found == MatrixSets((frozenset("ab"),), {"b": 3})


def test_of_groups_and_matrix_below_routing_the_one_that_is_used_counts() -> None:
    settings = "{groups: {g: {members: [a]}}, matrix: {sets: {s: a & b}}}"
    found = read(f"{TWO}routing: {{router: {{use: group, settings: {settings}}}}}")
    assert found.config.matrix is None and len(found.config.groups) == 1
    assert found.warnings == (
        "routing.router.settings.matrix: not used: routing.router.use is group",
    )


def test_a_member_that_is_an_alias_or_unknown_is_left_out_with_a_warning() -> None:
    found = read(TWO + "groups: {g: {members: [c, d, a]}}")
    assert (found.errors, found.config.groups[0].members) == ((), ("a",))
    assert found.warnings == (
        'groups.g.members[0]: "c" is an alias; write its model: b',
        'groups.g.members[1]: "d" is not one of the models',
    )


# --- odd, but no error -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("logRequests: true", "logRequests: deprecated, and no effect here"),
        ("captureBuffer: 5", "captureBuffer: no effect here; see docs/llama-swap.md"),
        ("store: {path: /a}", "store: no effect here; see docs/llama-swap.md"),
        ("ui: {activity: {session_id: []}}", "ui: no effect here; see"),
        ("performance: {every: 5s}", "performance: no effect here; see"),
        ("metricsMaxInMemory: 1", "metricsMaxInMemory: no effect here; see"),
    ],
)
def test_what_has_no_effect_is_said(text: str, warning: str) -> None:
    (found,) = read(M + text).warnings
    assert found.startswith(warning)


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ("aliases: [m]", 'aliases[0]: "m" is the id of the model itself'),
        ("filters: {strip_params: a}", "filters.strip_params: deprecated; it is strip"),
        ("filters: {stripParams: 'a,model'}", "filters.stripParams: model is never"),
        ("filters: {setParams: {model: x}}", "filters.setParams.model: never set"),
        ("timeouts: {idleConn: 1}", "timeouts.idleConn: no effect here"),
    ],
)
def test_what_is_odd_in_a_model_is_said(keys: str, warning: str) -> None:
    found = read(f"models: {{m: {{cmd: 's ${{PORT}}', {keys}}}}}")
    assert found.errors == ()
    (message,) = found.warnings
    assert message.startswith(f"models.m.{warning}")


def test_no_models_at_all_is_odd() -> None:
    assert read("").warnings == ("models: there are none",)
    peers = "peers: {p: {proxy: 'http://h', models: [x]}}"
    assert read(peers).warnings == ()
