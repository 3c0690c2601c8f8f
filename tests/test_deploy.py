"""What is in ``deploy/`` fits the program: names, variables, limits and times.

There is no Docker here. The Dockerfile is read as text, and its health check and its
environment are tried with the program itself. ``test_proxies.py`` runs the samples for
nginx, Caddy and HAProxy in the real ones.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from engines.real import LOCAL, Engine, free_port
from inferencia.config import load
from inferencia.downstream.listener import KEEPALIVE_SECONDS
from inferencia.keys import KeyRing
from inferencia.measurement import CLIENT_GONE, Measurement
from inferencia.metrics import BREAKER_STATES, BackendState, Metrics
from inferencia.middleware import today
from inferencia.overlay import VARIABLES, Flags
from inferencia.quantities import parse_duration, parse_size
from inferencia.settings import BackendConfig, ServerConfig
from inferencia.spending import Spent

REPOSITORY = Path(__file__).resolve().parent.parent
DEPLOY = REPOSITORY / "deploy"
KEY = "sk-deploy-4f1d9c07b2e6a853"

OTHER_VARIABLES = {"API_KEYS", "BACKEND_URL", "BACKEND_TYPE", "CONFIG", "STATE"}
KNOWN = {f"INFERENCIA_{name}" for name in OTHER_VARIABLES.union(VARIABLES)}


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text("utf-8")


def values(name: str) -> dict[str, str]:
    """The variables of an environment file."""
    lines = [line for line in text_of(name).splitlines() if line.strip()]
    pairs = (line.partition("=") for line in lines if not line.startswith("#"))
    return {name: value for name, _, value in pairs}


# --- Dockerfile ------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what follows them."""
    text = re.sub(r"^#.*\n", "", text_of("Dockerfile"), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (name, rest.strip())
        for name, _, rest in (line.partition(" ") for line in lines if line.strip())
    ]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest))
    return found


def environment(stage: list[tuple[str, str]]) -> dict[str, str]:
    words = [
        word for name, rest in stage if name == "ENV" for word in shlex.split(rest)
    ]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def health_check() -> list[str]:
    (rest,) = [rest for name, rest in stages()[-1] if name == "HEALTHCHECK"]
    command: list[str] = json.loads(rest.partition(" CMD ")[2])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


def test_the_image_has_a_stage_to_build_and_one_to_run() -> None:
    build, final = stages()
    assert build[0] == ("FROM", "python:${PYTHON}-slim AS build")
    assert final[0] == ("FROM", "python:${PYTHON}-slim")
    assert ("COPY", "--from=build /opt/inferencia /opt/inferencia") in final
    # Nothing of the sources, of pip's caches or of a compiler gets into the last one.
    assert [
        rest for name, rest in final if name == "COPY" and "--from" not in rest
    ] == []
    assert not any("apt-get" in rest or "curl" in rest for _, rest in instructions())
    assert not any(name == "ADD" for name, _ in instructions())


def test_the_image_runs_as_user_1000_and_keeps_state_in_one_folder() -> None:
    final = stages()[-1]
    assert [rest for name, rest in final if name == "USER"] == ["1000:1000"]
    order = [name for name, _ in final]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name == "RUN")
    settings = environment(final)
    assert settings["INFERENCIA_STATE"] == settings["HOME"] == "/state"
    made = [rest for name, rest in final if name == "RUN" and "/state" in rest]
    assert any("--owner=1000" in rest and "--mode=0700" in rest for rest in made)


def test_the_image_holds_no_secret() -> None:
    words = re.compile(r"key|token|secret|password", re.I)
    named = [rest for name, rest in instructions() if name in ("ENV", "ARG", "LABEL")]
    assert not any(words.search(rest) for rest in named)
    assert set(environment(stages()[-1])) & KNOWN <= {
        f"INFERENCIA_{name}" for name in ("STATE", "HOST", "PORT")
    }


def test_what_the_image_copies_is_there_and_nothing_else_is_sent() -> None:
    copied = {
        word
        for name, rest in stages()[0]
        if name == "COPY"
        for word in rest.split()[:-1]
    }
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((REPOSITORY / name).exists() for name in copied)
    # setup.cfg reads these two while the package is built.
    assert {"README.md", "LICENSE"} <= copied


@pytest.fixture
def contained() -> Iterator[Engine]:
    """The program in the image's environment; its root cannot be written."""
    port = free_port()
    env = environment(stages()[-1])
    del env["PATH"]
    env |= {
        "HOME": "/dev/null/home",
        "INFERENCIA_STATE": "/dev/null/state",
        "INFERENCIA_HOST": LOCAL,
        "INFERENCIA_PORT": str(port),
        "INFERENCIA_API_KEYS": KEY,
        "INFERENCIA_BACKEND_URL": f"http://{LOCAL}:{free_port()}",
    }
    command = [sys.executable, "-P", "-m", "inferencia", "serve"]
    engine = Engine(port, {"Authorization": f"Bearer {KEY}"}, command=command, env=env)
    yield engine
    engine.stop()


def test_it_lives_on_a_read_only_root_and_its_health_check_is_right(
    contained: Engine, tmp_path: Path
) -> None:
    contained.log = tmp_path / "log"
    # A proxy that a container is told of is not asked for the container itself.
    asked = {"INFERENCIA_PORT": str(contained.port), "http_proxy": "http://[::1]:9"}

    def is_healthy() -> bool:
        done = subprocess.run(
            health_check(), env=asked, capture_output=True, timeout=30
        )
        return done.returncode == 0

    assert not is_healthy()
    contained.start()
    assert is_healthy()
    assert contained.get("/v1/models").status in (200, 503)
    assert contained.process is not None
    contained.process.signal(signal.SIGTERM)
    assert contained.process.wait(15) == 0, contained.process.last_words()
    assert not is_healthy()


# --- compose and environment files -----------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    whole = yaml.safe_load(text_of("compose.yaml"))
    service: dict[str, Any] = whole["services"]["inferencia"]
    assert set(whole["volumes"]) == {"state"}
    return service


def test_compose_starts_nothing_without_a_key_and_a_backend(
    compose: dict[str, Any],
) -> None:
    for name in ("INFERENCIA_API_KEYS", "INFERENCIA_BACKEND_URL"):
        assert re.fullmatch(rf"\$\{{{name}:\?[^}}]+\}}", compose["environment"][name])


def test_compose_hands_on_only_variables_that_exist(compose: dict[str, Any]) -> None:
    assert set(compose["environment"]) <= KNOWN
    used = set(re.findall(r"\$\{(\w+)", text_of("compose.yaml")))
    assert used <= KNOWN | {"PUBLISH_ADDRESS"}


def test_compose_passes_on_what_is_unset_as_unset(compose: dict[str, Any]) -> None:
    """An empty INFERENCIA_ORIGINS would mean "none", whatever the file says."""
    fixed = {"INFERENCIA_HOST"}
    for name, value in compose["environment"].items():
        is_default = value is not None and ":-" in value
        is_required = value is not None and ":?" in value
        assert value is None or is_default or is_required or name in fixed


def test_compose_keeps_the_container_small(compose: dict[str, Any]) -> None:
    assert compose["read_only"] is True
    assert compose["cap_drop"] == ["ALL"]
    assert compose["security_opt"] == ["no-new-privileges:true"]
    assert compose["user"] == "1000:1000"
    assert compose["volumes"] == ["state:/state"]
    assert "privileged" not in compose and "network_mode" not in compose


def test_compose_lets_open_streams_end(compose: dict[str, Any]) -> None:
    grace = parse_duration(compose["stop_grace_period"])
    assert grace >= ServerConfig().shutdown_timeout + 10


def test_compose_builds_from_where_the_dockerfile_expects(
    compose: dict[str, Any],
) -> None:
    context = (DEPLOY / compose["build"]["context"]).resolve()
    assert context == REPOSITORY
    assert context / compose["build"]["dockerfile"] == DEPLOY / "Dockerfile"


def test_compose_publishes_the_port_on_this_machine_only(
    compose: dict[str, Any],
) -> None:
    (published,) = compose["ports"]
    port = "${INFERENCIA_PORT:-8080}"
    assert published == "${PUBLISH_ADDRESS:-127.0.0.1}:" + f"{port}:{port}"
    assert compose["environment"]["INFERENCIA_PORT"] == port


EXAMPLES = ("env.example", "env.coolify.example")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_sets_what_is_required_and_nothing_unknown(name: str) -> None:
    given = values(name)
    assert {"INFERENCIA_API_KEYS", "INFERENCIA_BACKEND_URL"} <= set(given)
    mentioned = set(re.findall(r"^#? ?([A-Z_]+)=", text_of(name), re.M))
    assert mentioned <= KNOWN | {"PUBLISH_ADDRESS"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_loads_and_its_key_opens_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = values(name)
    given.pop("PUBLISH_ADDRESS", None)
    loaded = load(None, {"HOME": str(tmp_path), **given}, Flags())
    assert loaded.config.backends[0].url == given["INFERENCIA_BACKEND_URL"]
    keys = loaded.config.auth.api_keys
    assert keys is not None
    ring = KeyRing(tmp_path / "keys.txt", listed=[key.reveal() for key in keys])
    assert ring.usable(today()) == 0


# --- reverse proxies and the tunnel ----------------------------------------------


def first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.M)
    assert found is not None, f"no {pattern}"
    return found[1]


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile", "haproxy.cfg"])
def test_a_proxy_forwards_to_the_default_port(name: str) -> None:
    assert f"127.0.0.1:{ServerConfig().port}" in text_of(name)


def test_no_proxy_gives_up_before_a_backend_does() -> None:
    longest = BackendConfig(name="b", type="openai").timeout
    nginx, haproxy = text_of("nginx.conf"), text_of("haproxy.cfg")
    assert parse_duration(first(r"proxy_read_timeout (\w+);", nginx)) > longest
    assert parse_duration(first(r"timeout server (\w+)$", haproxy)) > longest
    assert parse_duration(first(r"timeout client (\w+)$", haproxy)) > longest


def test_proxies_leave_idle_connections_before_we_close_them() -> None:
    tunnel = yaml.safe_load(text_of("cloudflared/config.yml"))
    idle = (
        first(r"^\s+keepalive_timeout (\w+);", text_of("nginx.conf")),
        first(r"^\s+keepalive (\w+)$", text_of("Caddyfile")),
        tunnel["ingress"][0]["originRequest"]["keepAliveTimeout"],
    )
    assert all(parse_duration(time) < KEEPALIVE_SECONDS for time in idle)


def test_proxies_take_the_bodies_that_we_take() -> None:
    most = ServerConfig().max_body
    assert parse_size(first(r"max_size (\w+)", text_of("Caddyfile"))) == most
    assert (
        int(first(r"client_max_body_size (\d+)m;", text_of("nginx.conf"))) == most >> 20
    )


def test_the_tunnel_leads_here_and_nowhere_else() -> None:
    tunnel = yaml.safe_load(text_of("cloudflared/config.yml"))
    *routes, last = tunnel["ingress"]
    (route,) = routes
    assert route["service"] == f"http://127.0.0.1:{ServerConfig().port}"
    # cloudflared refuses a file whose last rule has a hostname.
    assert last == {"service": "http_status:404"}
    assert tunnel["tunnel"] in tunnel["credentials-file"]


# --- Prometheus and Grafana ------------------------------------------------------

# Words of PromQL that look like a label or a metric without being one of ours.
_TYPES = re.compile(r"^# TYPE (\S+) (\w+)$", re.M)
_SAMPLE = re.compile(r"^(inferencia_\w+)(?:\{(.*)\})? ", re.M)
_LABEL = re.compile(r'(\w+)="')
_USED = re.compile(r"inferencia_\w+")
_SELECTED = re.compile(r"(inferencia_\w+)\{([^}]*)\}")
# Prometheus adds these two to whatever it scrapes.
_SCRAPED = {"instance", "job"}


@pytest.fixture(scope="module")
def exposed() -> Mapping[str, set[str]]:
    """What /metrics can show: the samples' names, with their labels."""
    metrics = Metrics()
    states = [
        BackendState(name, True, state, in_flight=1, open_connections=1)
        for name, state in zip("abc", BREAKER_STATES, strict=True)
    ]
    metrics.follow_backends(lambda: states)
    metrics.follow_line(lambda: {"m": 1})
    metrics.follow_spending(lambda: [Spent("a", today=1.0, total=2.0, limit=3.0)])
    metrics.refused("rps", "alice")
    metrics.failed_login()
    m = Measurement(id="1", method="POST", client="127.0.0.1")
    m.path, m.key, m.model, m.backend = "/v1/chat/completions", "alice", "m", "a"
    m.status, m.error_code, m.comments = 200, "backend_error", 1
    m.prompt_tokens, m.completion_tokens, m.cached_tokens = 3, 4, 1
    m.queued = 0.5
    m.first_byte, m.ended = m.started + 0.1, m.started + 1.0
    metrics.record(m)
    metrics.record(replace(m, status=CLIENT_GONE))
    text = metrics.render().decode()
    samples: dict[str, set[str]] = {}
    for name, labels in _SAMPLE.findall(text):
        samples.setdefault(name, set()).update(_LABEL.findall(labels))
    # Some families show nothing here, such as those of what is not configured.
    for family, kind in _TYPES.findall(text):
        endings = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        for ending in endings:
            samples.setdefault(family + ending, set())
    return samples


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(text_of("prometheus-rules.yaml"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text_of("grafana-dashboard.json"))[
        "panels"
    ]
    return found


def expressions() -> list[str]:
    targets = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [rule["expr"] for rule in rules()] + targets


def test_every_metric_that_is_asked_for_exists(
    exposed: Mapping[str, set[str]],
) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    dashboard = json.loads(text_of("grafana-dashboard.json"))
    queries = [variable["query"] for variable in dashboard["templating"]["list"]]
    used = {
        name
        for expression in [*expressions(), *queries]
        for name in _USED.findall(without(expression, recorded))
    }
    assert len(used) > 10
    assert used <= set(exposed)


def without(expression: str, recorded: set[str]) -> str:
    """The expression without the names that the rules themselves make."""
    for name in sorted(recorded, key=len, reverse=True):
        expression = expression.replace(name, "")
    return expression


def test_every_label_that_is_asked_for_exists(exposed: Mapping[str, set[str]]) -> None:
    for expression in expressions():
        for name, selectors in _SELECTED.findall(expression):
            labels = set(re.findall(r"(\w+)\s*[=!]~?\s*\"", selectors))
            assert labels <= exposed[name] | _SCRAPED, expression
        names = [n for n in _USED.findall(expression) if n in exposed]
        had = _SCRAPED.union(*(exposed[name] for name in names))
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= had, expression


def test_every_alert_says_what_happened() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 8
    for alert in alerts:
        assert alert["annotations"]["summary"].strip()
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
    assert len({alert["alert"] for alert in alerts}) == len(alerts)


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_asks_whatever_source_is_chosen() -> None:
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    """Those of the dashboard, too: they are put into a file of rules for that."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here (apt-get install prometheus)")
    shown = [
        {"record": f"shown:number{n}", "expr": expr.replace("$__rate_interval", "5m")}
        for n, expr in enumerate(expressions())
    ]
    group = {"name": "shown", "rules": shown}
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    for path in (DEPLOY / "prometheus-rules.yaml", tmp_path / "shown.yaml"):
        command = [promtool, "check", "rules", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_parentheses_and_quotes_are_closed_in_every_expression() -> None:
    """What can be said without Prometheus."""
    for expression in expressions():
        assert expression.count('"') % 2 == 0, expression
        plain = re.sub(r'"[^"]*"', "", expression)
        for opening, closing in ("()", "{}", "[]"):
            assert plain.count(opening) == plain.count(closing), expression
