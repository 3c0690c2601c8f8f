"""README.md and docs/ tell the truth: what can be tried in them is tried.

Each fenced block is dealt with by its language. ``sh`` is run in front of a real
gateway, ``yaml`` is loaded as a configuration, ``python`` and ``json`` are parsed. A
comment above a block says what else is to be done, and readers do not see it:

=============================  ====================================================
``<!-- not run: WHY -->``      it needs what a test does not have
``<!-- answers: TEXT -->``     requests in it may be refused; TEXT is in the answer
``<!-- read by PROGRAM -->``   YAML that is not ours
=============================  ====================================================
"""

import ast
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from engines.real import LOCAL, Engine, clean_environment, free_port
from inferencia import cli, errors
from inferencia.config import all_keys, load
from inferencia.overlay import GOINFER_VARIABLES, VARIABLES, Flags
from inferencia.settings import BackendConfig, Config
from test_floors import FLOORS

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = (REPOSITORY / "README.md", *sorted(DOCS.glob("*.md")))
LANGUAGES = {"sh", "yaml", "python", "json", "text", "ini"}

KEY = "sk-docs-5b0e7c41f9d2a863"
ADMIN_KEY = "sk-docs-admin-e41b07c9d2f5"
METRICS_KEY = "sk-docs-metrics-90c2d7f1ab"

# Models of the examples; here each of them is the built-in one.
MODELS = (
    "gpt-oss-20b-MXFP4-Q8",
    "aya-expanse_8b_Q4_K_M",
    "Qwen2.5-1.5B-Instruct-Q4_K_M",
)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    text: str
    mark: str  # the comment above it

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n+)?(?P<indent> *)```(?P<language>\w*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in FENCE.finditer(text):
            line = text.count("\n", 0, found.start("text"))
            name = str(page.relative_to(REPOSITORY))
            parts = (found["language"], found["text"], found["mark"] or "")
            yield Block(name, line, *parts)


BLOCKS = tuple(blocks())


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def test_every_block_says_its_language_and_every_mark_is_understood() -> None:
    assert [str(b) for b in BLOCKS if b.language not in LANGUAGES] == []
    known = re.compile(r"not run: .+|answers: .+|read by .+")
    assert [str(b) for b in BLOCKS if b.mark and not known.fullmatch(b.mark)] == []
    fences = sum(page.read_text("utf-8").count("```") for page in PAGES)
    assert fences == 2 * len(BLOCKS)
    # A mark that has slipped away from its block would mark nothing.
    comments = sum(page.read_text("utf-8").count("<!-- ") for page in PAGES)
    assert comments == sum(bool(block.mark) for block in BLOCKS)


# --- sh --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """A gateway with the names and keys of the examples, and a shell before it."""

    engine: Engine
    shell: str
    home: Path
    texts: dict[str, str]  # what stands in the examples, and what it is here

    def run(self, block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
        script = block.text
        for written, here in self.texts.items():
            script = script.replace(written, here)
        options = "-sS" if block.mark.startswith("answers") else "-sS --fail-with-body"
        curl = f'curl() {{ command curl {options} --max-time 10 "$@"; }}\n'
        (folder / "config.yaml").write_text("auth: {keys_file: keys.txt}\n")
        (folder / "keys.txt").touch(mode=0o600)
        (folder / "keys.txt").write_text(f"{KEY} name=first\n")
        return subprocess.run(
            [self.shell, "-euo", "pipefail", "-c", curl + script],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=folder,
            env=self.environment(),
        )

    def environment(self) -> dict[str, str]:
        env = clean_environment()
        kept = {name: value for name, value in env.items() if "proxy" not in name}
        for name in ("STATE_DIRECTORY", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
            kept.pop(name, None)
        return {
            **kept,
            "HOME": str(self.home),
            "PATH": str(self.home / "bin"),
            "GI_API_KEY_ADMIN": ADMIN_KEY,
        }


TLS = "cert.pem"  # what the two commands about a certificate of one's own share

# What blocks may call besides. Others are not found: no test starts what a page tells
# an administrator to start, should its mark be forgotten.
PROGRAMS = ("curl", "openssl", "cat")

# Stands for the installed command. A daemon is ended as soon as it says where it
# listens, at a port that is free.
COMMAND = """\
#!{python}
import subprocess, sys
command = [sys.executable, "-P", "-m", "inferencia", *sys.argv[1:]]
if {{"check", "keys", "models", "service", "--version"}}.intersection(command):
    sys.exit(subprocess.run(command).returncode)
child = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
for line in child.stdout:
    print(line, end="")
    if " endpoint " in line:
        child.terminate()
sys.exit(child.wait())
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash on PATH")
    home = tmp_path_factory.mktemp("home")
    program = home / "bin" / "inferencia"
    program.parent.mkdir()
    program.write_text(COMMAND.format(python=sys.executable))
    program.chmod(0o755)
    for name in PROGRAMS:
        if found := shutil.which(name):
            (program.parent / name).symlink_to(found)
    state = home / ".local" / "state" / "inferencia"
    state.mkdir(parents=True)
    for name, secret in (("key", KEY), ("admin-key", ADMIN_KEY)):
        (state / name).touch(mode=0o600)
        (state / name).write_text(secret)
    port, openai, swap = free_port(), free_port(), free_port()
    (home / "keys").touch(mode=0o600)
    (home / "keys").write_text(
        f"{KEY} name=me\n{ADMIN_KEY} name=boss role=admin\n"
        f"{METRICS_KEY} name=prometheus role=metrics\n"
    )
    config = {
        "server": {
            "listen": {
                f"{LOCAL}:{port}": "openai metrics",
                f"{LOCAL}:{openai}": "openai",
                f"{LOCAL}:{swap}": "llama-swap",
            },
            "origins": ["https://chat.example.com"],
        },
        "auth": {"keys_file": str(home / "keys")},
        "ratelimit": {"requests_per_second": 1000, "burst": 1000},
        "backends": [{"name": "echo", "type": "echo"}],
        "routing": {"aliases": dict.fromkeys(MODELS, "echo")},
    }
    (home / "served.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-P", "-m", "inferencia", "serve", "-c"]
    engine = Engine(
        port, command=[*command, str(home / "served.yaml")], log=home / "log"
    )
    texts = {
        "http://localhost:8080": f"http://{LOCAL}:{port}",
        "http://127.0.0.1:8080": f"http://{LOCAL}:{port}",
        "https://llm.example.com": f"http://{LOCAL}:{port}",
        "https://YOUR-URL.trycloudflare.com": f"http://{LOCAL}:{port}",
        "localhost:3333": f"{LOCAL}:{openai}",
        "localhost:5555": f"{LOCAL}:{swap}",
        "sk-your-metrics-key": METRICS_KEY,
        "sk-your-key": KEY,
    }
    with engine.running():
        yield Stage(engine, shell, home, texts)


@dataclass(slots=True)
class TlsGateway(Engine):
    """A gateway behind a certificate of its own."""

    folder: Path = Path()

    def connect(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        context = ssl.create_default_context(cafile=self.folder / "cert.pem")
        return http.client.HTTPSConnection(
            "localhost", self.port, timeout=timeout, context=context
        )


def test_a_certificate_of_ones_own_is_made_and_served(
    stage: Stage, tmp_path: Path
) -> None:
    """The two commands of "TLS of its own", with a gateway started between them."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl on PATH")
    make, ask = (b for b in of("sh") if b.page == "docs/internet.md" and TLS in b.text)
    assert stage.run(make, tmp_path).returncode == 0
    port = free_port()
    config = {
        "server": {"tls": {"cert": "cert.pem", "key": "key.pem"}, "port": port},
        "auth": {"keys_file": "keys.txt"},
        "backends": [{"type": "echo"}],
    }
    path = tmp_path / "tls.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-P", "-m", "inferencia", "serve", "-c", str(path)]
    engine = TlsGateway(port, command=command, log=tmp_path / "log", folder=tmp_path)
    assert "https://localhost:8443/" in ask.text
    with engine.running():
        text = ask.text.replace(":8443/", f":{port}/")
        done = stage.run(replace(ask, text=text), tmp_path)
    assert '"ok"' in done.stdout, done.stderr


def is_run(block: Block) -> bool:
    return not block.mark.startswith("not run")


@pytest.mark.parametrize("block", [b for b in of("sh") if is_run(b)], ids=str)
def test_commands_work(block: Block, stage: Stage, tmp_path: Path) -> None:
    for program in PROGRAMS:
        if program in block.text and not shutil.which(program):
            pytest.skip(f"no {program} on PATH")
    done = stage.run(block, tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.strip(), "it says nothing"
    if block.mark:
        kind, _, text = block.mark.partition(": ")
        assert kind == "answers" and text in done.stdout, said


def test_nearly_all_that_can_be_run_is() -> None:
    """What needs no other machine, account or privilege has no excuse."""
    excuse = re.compile(r"needs |\.ci/|changes |for as long as ")
    weak = [str(b) for b in of("sh") if not is_run(b) and not excuse.search(b.mark)]
    assert weak == []


# --- yaml, python, json ----------------------------------------------------------


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_configurations_are_loaded(block: Block, tmp_path: Path) -> None:
    if block.mark.startswith("read by"):
        return
    path = tmp_path / "config.yaml"
    path.write_text(block.text)
    names = re.findall(r"\$\{env\.(\w+)\}", block.text)
    loaded = load(path, {**dict.fromkeys(names, KEY), "HOME": "/nonexistent"}, Flags())
    allowed = ("not in this version", "does not exist", "is not there", "llama.exe: ")
    odd = [w for w in loaded.warnings if not any(text in w for text in allowed)]
    assert odd == []


def test_other_examples_can_be_parsed() -> None:
    for block in of("python"):
        ast.parse(block.text, str(block))
    for block in of("json"):
        try:
            json.loads(block.text)
        except ValueError as error:
            raise AssertionError(f"{block}: {error}") from error


# --- links -----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    plain = (re.sub(r"[^\w -]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_links_lead_somewhere() -> None:
    lost = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if target.startswith(("https://", "mailto:")):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                lost.append(f"{page.name}: {target}")
    assert lost == []


def test_every_page_can_be_found_from_the_readme() -> None:
    text = PAGES[0].read_text("utf-8")
    assert [p.name for p in PAGES[1:] if f"(docs/{p.name})" not in text] == []


# --- the reference of the configuration ------------------------------------------

REFERENCE = (DOCS / "configuration.md").read_text("utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of all tables' rows, less the backquotes around a whole cell."""
    found = []
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = re.split(r"(?<!\\) \| ", line[2:].removesuffix("|").rstrip())
            found.append([re.sub(r"^`([^`]*)`$", r"\1", c.strip()) for c in cells])
    return found


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def documented_keys() -> dict[str, str]:
    """Every key of the reference, with its default as it stands there."""
    keys = re.compile(r"[a-z_]+(?:\[\])?(?:\.[a-z_]+)*")
    listed = [row for row in rows(REFERENCE) if len(row) == 4]
    assert [row[0] for row in listed if not keys.fullmatch(row[0])] == []
    assert len({row[0] for row in listed}) == len(listed), "a key stands there twice"
    return {row[0]: row[2] for row in listed}


def value_of(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_the_reference_has_every_key_and_no_other() -> None:
    known = set(all_keys())
    groups = {key for key in known for other in known if other.startswith(f"{key}.")}
    assert set(documented_keys()) == known - groups - {"backends"}


def test_the_reference_has_the_true_defaults(tmp_path: Path) -> None:
    """Each default, written into a file as it stands there, is the program's own."""
    wrong = []
    for key, shown in documented_keys().items():
        if shown in ("its type", "see there", "required"):
            assert key in ("backends[].name", "backends[].type", "backends[].url")
            continue
        path = tmp_path / "config.yaml"
        names = key.replace("[]", "").split(".")
        tree = shown
        for name in reversed(names[1:]):
            tree = f"{{{name}: {tree}}}"
        if names[0] == "backends":
            tree = f"[{{type: echo, {tree[1:-1]}}}]"
        path.write_text(f"{names[0]}: {tree}\n")
        config = load(path, {"PATH": os.environ["PATH"]}, Flags()).config
        rest = key.removeprefix("backends[].")
        holder, default = (
            (config, Config())
            if rest == key
            else (config.backends[0], BackendConfig(type="echo"))
        )
        found, expected = value_of(holder, rest), value_of(default, rest)
        if key == "auth.keys_file":
            expected = tmp_path / expected
        if found != expected and not (found is None and expected == ()):
            wrong.append(f"{key}: {shown} is {found!r}, and not {expected!r}")
    assert wrong == []


def test_the_reference_has_every_environment_variable() -> None:
    listed = rows(section(REFERENCE, "Environment variables"))
    named = {name for row in listed for name in re.findall(r"\b[A-Z][A-Z_]+\b", row[0])}
    apart = {
        "API_KEYS",
        "BACKEND_URL",
        "BACKEND_TYPE",
        "CONFIG",
        "STATE",
    }
    ours = {f"INFERENCIA_{name}" for name in apart.union(VARIABLES)}
    others = {"STATE_DIRECTORY", "XDG_STATE_HOME"}
    assert named == ours | {f"GI_{name}" for name in GOINFER_VARIABLES} | others
    told = {name: row[1] for row in listed for name in row[0].replace("`", "").split()}
    for name, key in VARIABLES.items():
        assert f"`{key}`" in told[f"INFERENCIA_{name}"] or key == told[
            f"INFERENCIA_{name}"
        ].strip("`"), name


def usage_of(*command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    return out.getvalue()


COMMANDS = (
    (),
    ("serve",),
    ("connect",),
    ("init",),
    ("check",),
    ("keys", "add"),
    ("keys", "list"),
    ("keys", "revoke"),
    ("keys", "rotate"),
    ("status",),
    ("usage",),
    ("models",),
    ("models", "show"),
    ("models", "pull"),
    ("models", "rm"),
    ("service", "install"),
    ("service", "uninstall"),
    ("service", "print"),
)


def test_the_reference_has_every_flag_and_no_other() -> None:
    text = section(REFERENCE, "Command line")
    flags = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
    known = {flag for c in COMMANDS for flag in flags.findall(usage_of(*c))}
    assert set(flags.findall(text)) == known
    listed = {row[0] for row in rows(text)}
    assert {" ".join(c) for c in COMMANDS if c} <= listed


# --- other tables ----------------------------------------------------------------


def test_every_error_code_is_explained() -> None:
    codes = {
        value.code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.ApiError)
    }
    table = section((DOCS / "api.md").read_text("utf-8"), "Errors")
    named = set(re.findall(r"`([a-z_]+)`", "\n".join(map(str, rows(table)))))
    listed = {code for row in rows(table) for code in re.findall(r"[a-z_]{6,}", row[0])}
    assert codes - {None} == listed, named


def test_every_metric_is_explained() -> None:
    files = (REPOSITORY / "inferencia").glob("*metrics.py")
    source = "".join(file.read_text("utf-8") for file in files)
    known = set(re.findall(r'"(inferencia_[a-z_]+)"', source))
    table = section((DOCS / "api.md").read_text("utf-8"), "Metrics")
    assert {row[0] for row in rows(table)} == known


def test_every_module_has_its_place_in_the_description_of_the_house() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    for height, (name, rooms) in enumerate(FLOORS, start=1):
        (row,) = re.findall(rf"^\| {height} .*$", text, re.M)
        missing = [r for r in rooms if r[:2] != "__" and f"`{r}" not in row]
        assert not missing, f"on floor {height}, {name}: {', '.join(missing)}"
