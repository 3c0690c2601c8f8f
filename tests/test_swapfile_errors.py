"""A llama-swap configuration that is wrong: every error, each at its key."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferencia import yamlfile
from inferencia.fields import Book
from inferencia.models.definitions import SwapConfig
from inferencia.models.swapfile import read_swap, read_tree
from inferencia.yamlfile import Mapping, Node, Scalar, Sequence, Style

M = "models: {m: {cmd: 's --port ${PORT}'}}\n"


def errors(text: str, **env: str) -> tuple[str, ...]:
    return read_swap(text, env).errors


def error(text: str, **env: str) -> str:
    found = errors(text, **env)
    assert len(found) == 1, found
    return found[0]


def model_error(keys: str, **env: str) -> str:
    """What is wrong with a model of these keys, without its path."""
    text = f"models: {{m: {{cmd: 's ${{PORT}}', {keys}}}}}"
    return error(text, **env).removeprefix("models.m.")


# --- which key is meant ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("healtCheckTimeout: 5", "healtCheckTimeout: unknown key; did you mean health"),
        ("health_check_timeout: 5", "health_check_timeout: unknown key; did you mean"),
        ("group: {}", "group: unknown key; did you mean groups?"),
        ("zzz: 1", "zzz: unknown key; known here: macros, healthCheckTimeout, "),
        ("store: {paht: a}", "store.paht: unknown key; did you mean store.path?"),
        ("ui: {x-a: 1}", "ui.x-a: unknown key; known here: activity"),
        ("groups: {g: {member: [m]}}",
         "groups.g.member: unknown key; did you mean groups.g.members?"),
        ("routing: {router: {settings: {group: {}}}}",
         "routing.router.settings.group: unknown key; did you mean"
         " routing.router.settings.groups?"),
        ("hooks: {onStartup: {}}",
         "hooks.onStartup: unknown key; did you mean hooks.on_startup?"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_one(text: str, message: str) -> None:
    assert error(M + text).startswith(message)


def test_an_unknown_key_of_a_model_is_named_with_its_path() -> None:
    text = "models: {org/m: {cmd: 's ${PORT}', alias: [a]}}"
    assert error(text) == (
        "models.org/m.alias: unknown key; did you mean models.org/m.aliases?"
    )


def test_every_error_is_reported() -> None:
    found = errors(
        """
startPort: none
macros: {a: "${b}"}
models:
  x: {cmd: "${c} ${PORT}", ttl: -2, aliases: [y]}
  y: {cmd: "s ${a}"}
  z: {}
  x: {cmd: again}
groups: {g: {members: [x, x]}}
apiKeys: ["a b"]
""",
    )
    assert [message.rpartition(": ")[0].partition(": ")[0] for message in found] == [
        "models.x",
        "macros.a",
        "startPort",
        "models.x.cmd",
        "models.x.ttl",
        "models.z.cmd",
        "models.x.aliases[0]",
        "groups.g.members[1]",
        "apiKeys[0]",
    ]


@pytest.mark.parametrize("text", ["[]", "- a", "x", "a: b: c", "\t", "a: &a [*a]"])
def test_what_is_no_configuration_is_an_error(text: str) -> None:
    assert len(errors(text)) == 1


def test_a_tree_within_another_file_has_its_path() -> None:
    book = Book({}, Path("/"))
    root = yamlfile.parse(b"models: {qwen: {cmd: 's ${foo} ${PORT}'}}").root
    read_tree(root, book, "swap")
    assert book.errors == ["swap.models.qwen.cmd: unknown macro ${foo}"]


# --- values ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("startPort: 0", "startPort: expected a whole number from 1 to 65535, got 0"),
        ("startPort: 70000", "startPort: expected a whole number from 1 to 65535"),
        ("globalTTL: -1", "globalTTL: expected a whole number from 0 to"),
        ("unloadTimeout: -1", "unloadTimeout: expected a whole number from 0 to"),
        ("healthCheckTimeout: 5m", "healthCheckTimeout: expected a whole number"),
        ("healthCheckTimeout: '5'", "healthCheckTimeout: expected a whole number"),
        ("logLevel: loud", "logLevel: expected debug, info, warn or error, got"),
        ("logToStdout: file", "logToStdout: expected proxy, upstream, both or none"),
        ("logTimeFormat: iso", "logTimeFormat: expected ansic, unixdate"),
        ("sendLoadingState: maybe", "sendLoadingState: expected true or false"),
        ("sendLoadingState: 'yes'", "sendLoadingState: expected true or false"),
        ("apiKeys: secret", "apiKeys: expected a list, got something else"),
        ("apiKeys: ['']", "apiKeys[0]: expected a key without blanks"),
        ("apiKeys: [null]", "apiKeys[0]: expected text, got something else"),
        ("apiKeys: ['a b']", "apiKeys[0]: expected a key without blanks"),
        ("upstream: {ignorePaths: ['(']}",
         "upstream.ignorePaths[0]: expected a regular expression (missing )"),
        ("upstream: {ignorePaths: ['[[:alpha:]]']}",
         "upstream.ignorePaths[0]: expected a regular expression (Possible nested"),
        ("upstream: {ignorePaths: ['a{1,99999999999}']}",
         "upstream.ignorePaths[0]: expected a regular expression"),
        ("macros: [a]", "macros: expected names with values, got a list"),
        ("macros: {a: [b]}", "macros.a: expected text, a number, true or false"),
        ("macros: {a: null}", "macros.a: expected text, a number, true or false"),
        ("macros: {a: '${a}'}", "macros.a: it cannot use itself"),
        ("macros: {PORT: 1}", "macros.PORT: the name PORT is reserved"),
        ("groups: [a]", "groups: expected names with values, got a list"),
        ("groups: {g: [m]}", "groups.g: expected a group of keys, got a list"),
        ("groups: {(default): {members: [m]}}", "groups.(default): the name of the"),
        ("groups: {a: {members: [m]}, b: {members: [m]}}",
         'groups.b.members: "m" is in the group a already'),
        ("groups: {a: {members: [m, m]}}", 'groups.a.members[1]: "m" stands there'),
        ("groups: {a: {members: [m]}}\nmatrix: {sets: {s: m}}",
         "matrix: groups and matrix exclude each other"),
        ("groups: {a: {members: [m]}}\nrouting: {router: {settings:"
         " {groups: {b: {members: [m]}}}}}",
         "groups: stands here and in routing.router; keep one of them"),
        ("routing: {router: {use: matrix}}",
         "routing.router.use: says matrix, but routing.router.settings.matrix is"),
        ("routing: {router: {use: random}}",
         "routing.router.use: expected group or matrix"),
        ("routing: {scheduler: {use: lifo}}",
         "routing.scheduler.use: there is one scheduler, fifo"),
        ("routing: {scheduler: {settings: {fifo: {priority: {n: 1}}}}}",
         "routing.scheduler.settings.fifo.priority.n: there is no such model"),
        ("routing: {scheduler: {settings: {fifo: {priority: {m: high}}}}}",
         "routing.scheduler.settings.fifo.priority.m: expected a whole number"),
        ("matrix: {sets: {s: a & m}}",
         'matrix.sets.s: "a" is neither a model nor one of vars'),
        ("matrix: {vars: {v: gone}, sets: {s: m}}",
         'matrix.vars.v: "gone" is not one of the models'),
        ("matrix: {sets: {s: m}, evict_costs: {m: 0}}",
         "matrix.evict_costs.m: expected a whole number of at least 1"),
        ("matrix: {sets: {s: m}, evict_costs: {gone: 1}}",
         "matrix.evict_costs.gone: neither a model nor one of vars"),
        ("matrix: {vars: {v: m}}", "matrix.sets: missing; a matrix needs at least"),
        ("peers: {p: {models: [a]}}", "peers.p.proxy: missing"),
        ("peers: {p: {proxy: 'http://h'}}", "peers.p.models: missing"),
        ("peers: {p: {proxy: h, models: [a]}}", "peers.p.proxy: expected a URL"),
        ("peers: {p: {proxy: 'http://h', models: [a], apiKey: 'sk x'}}",
         "peers.p.apiKey: expected a key without blanks"),
        ("peers: {p: {proxy: 'http://h', models: [a], filters: {setParamsByID: {}}}}",
         "peers.p.filters.setParamsByID: unknown key"),
        ("peers: {p: {proxy: 'http://h', models: [a], apiKey: '${nothing}'}}",
         "peers.p.apiKey: unknown macro ${nothing}"),
        ("peers: {p: {proxy: 'http://h', models: ['${MODEL_ID}']}}",
         "peers.p.models[0]: unknown macro ${MODEL_ID}; it is known only within"),
        ("selectors: {s: {targets: [m]}}", "selectors.s.strategy: missing; there are"),
        ("selectors: {s: {strategy: pin}}", "selectors.s.targets: missing"),
        ("selectors: {s: {strategy: any, targets: [m]}}",
         "selectors.s.strategy: expected pin, warm or spillover"),
        ("selectors: {s: {strategy: pin, targets: [n]}}",
         'selectors.s.targets[0]: "n" is not known'),
        ("selectors: {m: {strategy: pin, targets: [m]}}",
         "selectors.m: there is a model of the same name"),
        ("selectors: {a: {strategy: pin, targets: [b]},"
         " b: {strategy: pin, targets: [m]}}",
         'selectors.a.targets[0]: "b" is a selector itself'),
        ("selectors: {s: {strategy: spillover, targets: [m, m]}}",
         'selectors.s.targets[1]: "m" stands there twice'),
        ("selectors: {s: {strategy: spillover, targets: [m],"
         " settings: {spillover: 0}}}",
         "selectors.s.settings.spillover: expected a whole number of at least 1"),
        ("peers: {p: {proxy: 'http://h', models: [x]}}\n"
         "selectors: {s: {strategy: warm, targets: [x]}}",
         'selectors.s.targets[0]: "x" is a peer\'s; warm is for models on this'),
        ("peers: {p: {proxy: 'http://h', models: [x]}}\n"
         "selectors: {p/x: {strategy: pin, targets: [x]}}",
         "selectors.p/x: there is a model of the same name"),
        ("profiles: {p: [m]}", "profiles.p: expected description and pins; lists are"),
        ("profiles: {p: {}}", "profiles.p.pins: missing"),
        ("profiles: {p: {pins: {a: gone}}}",
         'profiles.p.pins.a: "gone" is not known'),
    ],
)  # fmt: skip
def test_a_wrong_value_is_explained_at_its_key(text: str, message: str) -> None:
    assert errors(M + text)[0].startswith(message)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("ttl: -2", "ttl: expected a whole number from -1 to"),
        ("ttl: 1h", "ttl: expected a whole number from -1 to"),
        ("concurrencyLimit: -1", "concurrencyLimit: expected a whole number from 0"),
        ("unloadTimeout: -1", "unloadTimeout: expected a whole number from 0"),
        ("proxy: 'localhost:1'", "proxy: expected a URL such as"),
        ("proxy: 'ftp://h'", "proxy: expected a URL such as"),
        ("proxy: 'http://u:secret@h'", "proxy: a URL must not hold a user or passwo"),
        ("checkEndpoint: 'http://h/x'", "checkEndpoint: expected a path such as"),
        ("env: [A]", "env[0]: expected NAME=value"),
        ("env: ['=1']", "env[0]: expected NAME=value"),
        ("env: {A: 1}", "env: expected a list, got a group of keys"),
        ("aliases: a", 'aliases: expected a list, got "a"'),
        ("aliases: ['']", "aliases[0]: expected a name, got nothing"),
        ("aliases: [[a]]", "aliases[0]: expected text, got a list"),
        ("aliases: [a, a]", 'aliases[1]: "a" is a name of the model m already'),
        ("unlisted: perhaps", "unlisted: expected true or false"),
        ("timeouts: {connect: -1}", "timeouts.connect: expected a whole number from 0"),
        ("timeouts: {idle: 1}", "timeouts.idle: unknown key; did you mean models.m."),
        ("compat: {ignoreWebsocket: true}", "compat.ignoreWebsocket: unknown key; did"),
        ("capabilities: {in: [smell]}", "capabilities.in[0]: expected text, audio or"),
        ("capabilities: {context: -1}", "capabilities.context: expected a whole numb"),
        ("metadata: [a]", "metadata: expected names with values, got a list"),
        ("filters: {setParams: [a]}", "filters.setParams: expected names with values"),
        ("filters: {setParamsByID: {a: 1}}",
         "filters.setParamsByID.a: expected names with values"),
        ("filters: {stripParams: [a]}", "filters.stripParams: expected text, got a"),
        ("macros: {a: '${b}'}", "macros.a: unknown macro ${b}"),
        ("macros: {MODEL_ID: x}", "macros.MODEL_ID: the name MODEL_ID is reserved"),
        ("macros: 5", "macros: expected names with values, got 5"),
        ("name: '${b}'", "name: unknown macro ${b}"),
        ("cmdStop: 'stop ${b}'", "cmdStop: unknown macro ${b}"),
        ("checkEndpoint: '${b}'", "checkEndpoint: unknown macro ${b}"),
        ("useModelName: '${b}'", "useModelName: unknown macro ${b}"),
        ("metadata: {a: [{b: '${c}'}]}", "metadata.a[0].b: unknown macro ${c}"),
        ("metadata: {'${c}': 1}", "metadata.${c}: unknown macro ${c}"),
        ("filters: {setParamsByID: {'${c}': {}}}",
         "filters.setParamsByID.${c}: unknown macro ${c}"),
        ("filters: {setParamsByID: {a: {b: '${c}'}}}",
         "filters.setParamsByID.a.b: unknown macro ${c}"),
        ("filters: {stripParams: '${c}'}", "filters.stripParams: unknown macro ${c}"),
        ("filters: {setParamsByID: {'${MODEL_ID}': {}, m: {}}}",
         'filters.setParamsByID.${MODEL_ID}: there is another "m" beside it'),
        ("name: 'at ${PID}'", "name: ${PID} is known only in cmdStop"),
        ("name: '${env.GONE}'", "name: the environment variable GONE is not set"),
        ("name: '${env.TWO}'", "name: the environment variable TWO holds a line end"),
        ("name: '${env.NUL}'", "name: the environment variable NUL holds a line end"),
        ("name: '${env.}'", "name: expected ${env.NAME}"),
        ("name: '${env.NEST}'", "name: expected ${env.NAME}"),
        ('description: "a\\ab"', "description: expected text without control char"),
        ('name: "a\\nb"', "name: expected text on one line"),
    ],
)  # fmt: skip
def test_a_wrong_value_of_a_model_is_explained_at_its_key(
    keys: str, message: str
) -> None:
    env = {"TWO": "a\nb", "NUL": "a\0b", "NEST": "${env.TWO}"}
    assert model_error(keys, **env).startswith(message)


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        ("cmd: ''", ["cmd: expected a command, got nothing"]),
        ("cmd: '# all'", ["cmd: expected a command, got nothing"]),
        ("cmd: s", ["proxy: missing; since cmd does not use ${PORT}, it has to say"
                    " where the server listens"]),
        ("cmd: s, proxy: 'http://h:${PORT}'",
         ["proxy: ${PORT} is there only if cmd uses it"]),
        ("cmd: s, proxy: 'http://h', env: ['A=${PORT}']",
         ["env[0]: ${PORT} is there only if cmd uses it"]),
        ("cmd: \"s ${PORT} 'a\"", ["cmd: a quote ' is not closed: 'a"]),
        ("cmd: 's ${PORT} ${PID}'", ["cmd: ${PID} is known only in cmdStop"]),
        ("cmd: 's ${nothing}'", ["cmd: unknown macro ${nothing}"]),
        ("cmd: [s]", ["cmd: expected text, got a list"]),
    ],
)  # fmt: skip
def test_a_command_that_cannot_work_is_explained(
    model: str, messages: list[str]
) -> None:
    found = errors(f"models: {{m: {{{model}}}}}")
    assert list(found) == [f"models.m.{message}" for message in messages]


def test_a_model_that_is_no_group_of_keys_is_named() -> None:
    assert error("models: {m: [a]}") == "models.m: expected a group of keys, got a list"
    assert error("models: {m: }") == (
        "models.m.cmd: missing; it is the command that starts the model"
    )


def test_a_name_means_one_model() -> None:
    text = """
models:
  a: {cmd: "s ${PORT}", aliases: [x, b]}
  b: {cmd: "s ${PORT}", aliases: [x]}
  c: {cmd: "s ${PORT}", filters: {setParamsByID: {a: {}, x: {}}}}
"""
    assert errors(text) == (
        'models.a.aliases[1]: "b" is a name of the model b already',
        'models.b.aliases[0]: "x" is a name of the model a already',
        'models.c.filters.setParamsByID: "a" is a name of the model a already',
        'models.c.filters.setParamsByID: "x" is a name of the model a already',
    )


def test_a_peers_full_name_is_its_own() -> None:
    text = (
        "models: {p/x: {cmd: 's ${PORT}'}}\npeers: {p: {proxy: http://h, models: [x]}}"
    )
    assert error(text) == (
        'peers: "p/x" is a model of a peer, and the name of something else'
    )


def test_ports_may_run_out() -> None:
    models = "".join(f"  m{i}: {{cmd: 's ${{PORT}}'}}\n" for i in range(3))
    text = f"startPort: 65534\nmodels:\n{models}"
    assert error(text) == "models.m2: no port is left for it; lower startPort"


def test_no_error_shows_a_secret() -> None:
    text = (
        "models: {m: {cmd: 's ${PORT}', env: [CANARY]}}\n"
        "apiKeys: ['CANARY x', [CANARY]]\n"
        "peers: {p: {proxy: 'http://u:CANARY@h', models: [x], apiKey: {a: CANARY}}}"
    )
    found = errors(text)
    assert len(found) == 5, found
    assert not any("CANARY" in message for message in found)


# --- bounds ----------------------------------------------------------------------


def test_macros_that_laugh_a_billion_times_are_an_error_and_no_wait() -> None:
    macros = "".join(
        f"  m{i}: '{f'${{m{i - 1}}}' * 10 if i else 'ha'}'\n" for i in range(40)
    )
    models = "".join(f"  x{i}: {{cmd: '${{m39}} ${{PORT}}'}}\n" for i in range(500))
    begun = time.monotonic()
    found = errors(f"macros:\n{macros}models:\n{models}")
    assert time.monotonic() - begun < 20
    assert len(found) == 500
    assert "expand to more than" in found[0]


def test_long_macros_in_many_models_are_an_error_and_no_wait() -> None:
    macros = f"  a: '{'x' * 60_000}'\n  b: '${{MODEL_ID}}${{a}}'\n"
    models = "".join(f"  x{i}: {{cmd: '${{b}} ${{PORT}}'}}\n" for i in range(1000))
    found = errors(f"macros:\n{macros}models:\n{models}")
    assert len(found) == 1
    assert "all macros together expand to more than" in found[0]


# --- garbage ---------------------------------------------------------------------

SEED = b"""
startPort: 7000
globalTTL: 60
macros: {bin: s, n: 5, args: "${bin} --port ${PORT} -n ${n}"}
models:
  a:
    cmd: |
      # c
      ${args} 'x y'
    macros: {n: 6}
    aliases: [x, "${MODEL_ID}-1"]
    env: ["A=${env.A}"]
    filters: {stripParams: "a,b", setParams: {t: 1}, setParamsByID: {y: {t: 2}}}
    capabilities: {in: [text], context: 5}
    metadata: {p: "${PORT}", l: [1, null]}
  b: {cmd: "s", proxy: "http://h:1", ttl: 5, timeouts: {connect: 1}}
matrix: {vars: {v: a}, sets: {s: "(v | b) & +t", t: b}, evict_costs: {v: 2}}
routing: {scheduler: {settings: {fifo: {priority: {a: 1}}}}}
hooks: {on_startup: {preload: [a, x]}}
selectors: {z: {strategy: pin, targets: [a, p/q]}}
profiles: {q: {pins: {a: b, c: null}}}
peers: {p: {proxy: "http://h", models: [q], apiKey: "k"}}
apiKeys: [k1]
upstream: {ignorePaths: ["a$"]}
"""


def accepts(config: SwapConfig, problems: object) -> None:
    assert isinstance(config, SwapConfig)
    if not problems:
        assert all(model.command for model in config.models)
        assert len({model.id for model in config.models}) == len(config.models)


def test_the_seed_of_the_garbage_is_right() -> None:
    found = read_swap(SEED, {"A": "1"})
    assert found.errors == ()
    accepts(found.config, ())


@pytest.mark.parametrize("seed", range(8))
def test_a_text_with_garbage_gives_errors_or_a_configuration(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        text = bytearray(SEED)
        for _ in range(rng.randrange(1, 5)):
            at, end = sorted(rng.choices(range(len(text)), k=2))
            end = min(end, at + rng.randrange(20))
            text[at:end] = rng.choice(
                [b"", b"${", b"}", b"'", b"- ", b": ", b"\n", b"*a", b"&a", b"<<: ",
                 bytes([rng.randrange(256)]), text[at:end] * 2]
            )  # fmt: skip
        found = read_swap(bytes(text), {"A": "1"})
        accepts(found.config, found.errors)


WEIRD: tuple[Node, ...] = (
    *(Scalar(text) for text in ("", "null", "-1", "1e9", "true", "a", "${PORT}")),
    *(Scalar(text) for text in ("${PID}", "${args}", "${MODEL_ID}", "${nothing}")),
    *(
        Scalar(text)
        for text in ("a", "b", "x", "${env.A}", "${env.B}", "a\n\0", "9" * 50)
    ),
    Scalar("1", Style.QUOTED),
    Mapping(),
    Mapping({"": Scalar("a"), "\n": Mapping(), "a": Sequence()}),
    Sequence(),
    Sequence((Scalar(""), Sequence((Mapping(),)), Scalar("a"))),
)


def values(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node, Mapping):
        for value in node.items.values():
            yield from values(value)
    elif isinstance(node, Sequence):
        for value in node.items:
            yield from values(value)


def replaced(node: Node, target: Node, new: Node) -> Node:
    """The tree with ``target``, that very node, replaced."""
    if node is target:
        return new
    if isinstance(node, Mapping):
        items = {k: replaced(v, target, new) for k, v in node.items.items()}
        return Mapping(items, node.line)
    if isinstance(node, Sequence):
        return Sequence(tuple(replaced(v, target, new) for v in node.items))
    return node


def test_any_value_in_the_place_of_any_other_gives_errors_or_a_configuration() -> None:
    root = yamlfile.parse(SEED).root
    rng = random.Random(1)  # all of them take two seconds; each is tried somewhere
    for target in list(values(root)):
        for new in rng.sample(WEIRD, 8):
            book = Book({"A": "1"}, Path("/"))
            accepts(read_tree(replaced(root, target, new), book, ""), book.errors)
