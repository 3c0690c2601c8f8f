"""The house has floors: a module imports only from lower ones.

The floors are described in docs/architecture.md; a new module is given its place here.
"""

import ast
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "inferencia"

# Low to high. A package's name stands for all modules in it that have no place of
# their own.
FLOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "pure",
        (
            "__init__",
            "breaker",
            "catalogue.affinity",
            "errors",
            "estimating",
            "exposition",
            "http1",
            "keylines",
            "limits",
            "members",
            "metering",
            "models",
            "models.choice",
            "models.commandline",
            "models.deciding",
            "models.definitions",
            "models.failures",
            "models.filtering",
            "models.gguf",
            "models.macros",
            "models.matrix",
            "models.memory",
            "models.naming",
            "models.presets",
            "models.projectors",
            "multipart",
            "placeholders",
            "quantities",
            "secret",
            "sse",
            "translate",
            "tunnel",
            "tunnel.clienthello",
            "tunnel.frames",
            "tunnel.wire",
            "upstream.answer",
            "upstream.origin",
            "yamlfile",
        ),
    ),
    (
        "books",
        (
            "addresses",
            "config",
            "configedit",
            "configrules",
            "endofturn",
            "doorstep",
            "fields",
            "firstkeys",
            "folders",
            "host",
            "keys",
            "keysfile",
            "loglines",
            "logs",
            "measurement",
            "metrics",
            "tunnelmetrics",
            "models.capacity",
            "models.finding",
            "models.swapfile",
            "models.swapgroups",
            "models.swapkeys",
            "models.swapmodels",
            "models.swapnames",
            "models.swaptree",
            "models.offering",
            "models.quota",
            "models.tree",
            "notify",
            "overlay",
            "pulse",
            "rewriting",
            "settings",
            "spending",
            "taskrecord",
            "summary",
            "trust",
            "usage",
            "usagejournal",
            "usageleftovers",
            "usagerecords",
            "usagereport",
            "usageschema",
            "usagesegments",
            "usagerows",
            "usagestore",
            "usagewriter",
            "values",
        ),
    ),
    (
        "carriers",
        (
            "upstream",
            "downstream",
            "tls",
            "wake",
            "models.childlog",
            "models.groups",
            "models.launching",
            "models.orphans",
            "models.process",
            "tunnel.carrier",
        ),
    ),
    (
        "providers",
        (
            "backends",
            "discovery",
            "models.download",
            "models.downloads",
            "models.fleet",
            "models.hub",
            "models.partial",
            "models.machine",
            "models.owning",
            "models.removing",
            "models.running",
            "models.scheduler",
            "models.turns",
            "models.uploading",
            "models.virtual",
            "tasks",
            "tunnel.agent",
            "tunnel.dialing",
            "tunnel.link",
            "tunnel.passthrough",
            "tunnel.pool",
            "tunnel.relay",
            "tunnel.session",
            "tunnel.splice",
            "tunnel.tlsend",
        ),
    ),
    ("choosing", ("catalogue", "waiting")),
    (
        "face",
        (
            "middleware",
            "bodies",
            "context",
            "copying",
            "cors",
            "loadingstate",
            "refusals",
            "relaying",
            "errand",
            "remote",
            "reshaping",
            "shortcuts",
            "upgrading",
            "api",
        ),
    ),
    (
        "app",
        (
            "admission",
            "app",
            "greeting",
            "inuse",
            "localmodels",
            "neighbours",
            "reloading",
            "serving",
            "signals",
            "sockets",
            "tunnelling",
            "visitors",
            "welcome",
        ),
    ),
    (
        "cli",
        (
            "cli",
            "connectcommand",
            "initcommand",
            "keycommands",
            "modelcommands",
            "pullcommand",
            "servicecommands",
            "statuscommand",
            "usagecommand",
            "__main__",
        ),
    ),
)
# On these floors neighbours do not know each other; app.py hands them what they need.
# On the others they may, as long as nothing goes round in a circle.
STRANGERS = {"carriers"}

# aiohttp's server side is for those who talk to clients.
MAY_USE_WEB = {"app", "downstream", "tunnel", "tunnelling", "visitors"} | set(
    dict(FLOORS)["face"]
)

# yarl is aiohttp's type for addresses: no client of it can do without.
THIRD_PARTY = {"aiohttp", "yarl", "yaml", "uvloop"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name below ``inferencia``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


@functools.cache
def imports(name: str, tree: ast.Module) -> tuple[str, ...]:
    """Absolute names of what a module imports, wherever in its text."""
    return tuple(_imports(name, tree))


def _imports(name: str, tree: ast.Module) -> Iterator[str]:
    is_package = (PACKAGE / name.replace(".", "/")).is_dir()
    package = (
        f"inferencia.{name}" if is_package else f"inferencia.{name}".rpartition(".")[0]
    )
    for node in statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(source, package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement in it, however deep; much fewer than nodes are looked at."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(node, name, ()):
            yield inner
            yield from statements(inner)


def own_imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Which of our modules a module imports: ``from ..errors import X`` is errors."""
    found = set()
    for imported in imports(name, tree):
        if imported != "inferencia" and not imported.startswith("inferencia."):
            continue
        target = imported.removeprefix("inferencia").removeprefix(".")
        while target and target not in known:
            target = target.rpartition(".")[0]
        found.add(target or "__init__")
    return found - {name}


def floor_of(name: str) -> int | None:
    room = name
    while room:
        for height, (_, rooms) in enumerate(FLOORS):
            if room in rooms:
                return height
        room = room.rpartition(".")[0]
    return None


def test_every_module_has_its_floor() -> None:
    homeless = [name for name in modules() if floor_of(name) is None]
    assert not homeless, f"give these a place in FLOORS: {', '.join(homeless)}"


def upward(trees: dict[str, ast.Module]) -> list[str]:
    """Imports that go up, or to a stranger next door, as ``importer -> imported``."""
    wrong = []
    for name, tree in trees.items():
        here = floor_of(name)
        for target in own_imports(name, tree, set(trees)):
            there = floor_of(target)
            if here is None or there is None:
                continue  # the test above names it
            same_room = name.partition(".")[0] == target.partition(".")[0]
            strangers = here == there and FLOORS[here][0] in STRANGERS
            if there > here or (strangers and not same_room):
                wrong.append(f"{name} -> {target}")
    return sorted(wrong)


def test_a_module_imports_only_from_lower_floors() -> None:
    wrong = upward(modules())
    assert not wrong, f"imports from a higher floor: {', '.join(wrong)}"


def test_an_import_that_goes_up_is_named() -> None:
    trees = {
        "app": ast.parse("from .api import openai"),
        "api": ast.parse(""),
        "api.openai": ast.parse("def f():\n    from ..app import build"),
        "upstream": ast.parse("import inferencia.downstream.listener, asyncio"),
        "downstream.listener": ast.parse("from inferencia.errors import ApiError"),
        "errors": ast.parse(""),
    }
    assert upward(trees) == ["api.openai -> app", "upstream -> downstream.listener"]


def test_no_imports_go_round_in_a_circle() -> None:
    trees = modules()
    below = {name: own_imports(name, tree, set(trees)) for name, tree in trees.items()}
    while leaves := {name for name, targets in below.items() if not targets}:
        below = {n: t - leaves for n, t in below.items() if n not in leaves}
    circle = ", ".join(f"{n} -> {' '.join(sorted(t))}" for n, t in below.items())
    assert not below, f"a circle is among: {circle}"


def test_only_those_who_talk_to_clients_use_aiohttp_web() -> None:
    wrong = [
        name
        for name, tree in modules().items()
        if name.partition(".")[0] not in MAY_USE_WEB
        and any((i + ".").startswith("aiohttp.web") for i in imports(name, tree))
    ]
    assert not wrong, f"aiohttp.web is used in: {', '.join(wrong)}"


def test_nothing_but_the_declared_packages_is_imported() -> None:
    allowed = THIRD_PARTY | set(sys.stdlib_module_names) | {"inferencia"}
    wrong = {
        f"{name} -> {imported}"
        for name, tree in modules().items()
        for imported in imports(name, tree)
        if imported.partition(".")[0] not in allowed
    }
    assert not wrong, f"not a declared dependency: {', '.join(sorted(wrong))}"


# Runs in a fresh interpreter: what third parties do when they are imported is done
# before the hook is set, and -B keeps Python from writing its caches.
IMPORT_ALL = """
import asyncio, importlib, logging, os, signal, sys, threading
import aiohttp.web, yaml
try:
    import uvloop
except ImportError:
    pass

def watch(event, args):
    wrote = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if wrote or event.startswith(("socket.", "subprocess.", "os.", "sqlite3.")):
        if event not in ("os.listdir", "os.scandir"):
            sys.exit(f"{name} did {event} {args} while it was imported")

signals = [signal.getsignal(n) for n in signal.valid_signals()]
level = logging.root.level
names = sys.argv[1:]
sys.addaudithook(watch)
for name in names:
    importlib.import_module(name)
assert [signal.getsignal(n) for n in signal.valid_signals()] == signals, "signals"
assert logging.root.level == level and not logging.root.handlers, "logging"
assert threading.active_count() == 1, "threads"
"""


def test_importing_a_module_does_nothing_else() -> None:
    names = [f"inferencia.{name}" for name in modules() if name != "__main__"]
    command = [sys.executable, "-B", "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout + done.stderr == ""
