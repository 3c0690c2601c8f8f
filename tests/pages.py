"""What the tests of the page at /admin/ have in common: a daemon, and how to use it.

The models are GGUF files whose server is ``fakeserver.py``.
"""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import localengine
from browser import Browser
from engines.real import Engine, free_port

ADMIN = "sk-page-admin-51c0a7f2e9"
USER = "sk-page-user-8d2b6e4f10"
VIEWS = {
    "n": "now",
    "m": "models",
    "u": "usage",
    "k": "keys",
    "p": "playground",
    "l": "logs",
    "c": "config",
    "t": "tasks",
}


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon and its files."""

    engine: Engine
    folder: Path
    config: Path
    models: Path

    @property
    def page(self) -> str:
        return f"{self.engine.url}/admin/"

    def chat(self, model: str = "alpha", key: str = USER) -> int:
        """Have a short chat, and say with which status."""
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": model, "messages": messages}
        headers = {"Authorization": f"Bearer {key}"}
        return self.engine.post("/v1/chat/completions", body, **headers).status

    def models_as(self, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return self.engine.get("/v1/models", **headers).status


@contextlib.contextmanager
def daemon_running(
    folder: Path,
    *fake: str,
    config: str = "",
    env: dict[str, str] | None = None,
    llama: Path | None = None,
    memory: str = "1GiB",
) -> Iterator[Daemon]:
    """A daemon with a folder of models.

    Args:
        folder: where all its files go; ``models`` in it may be there already, else it
            gets the models alpha and beta.
        fake: options of ``fakeserver.py``.
        config: more lines of the configuration.
        env: of the daemon.
        llama: a real llama-server, in place of the fake one.
        memory: that models may take together.
    """
    models = folder / "models"
    if not models.exists():
        localengine.models(models, "alpha", "beta")
    llama = llama or localengine.llama_server(folder, *fake)
    port = free_port()
    path = folder / "config.yaml"
    path.write_text(
        f"# what the owner wrote\n"
        f"server: {{port: {port}, shutdown_timeout: 1s}}\n"
        f"auth: {{keys_file: keys.txt}}\n"
        f"ratelimit: {{requests_per_second: 1000, burst: 1000}}\n"
        f"models_dir: [models]\n"
        f"llama: {{exe: {json.dumps(str(llama))}, memory: {memory}}}\n"
        f"usage: {{path: usage.sqlite3}}\n{config}"
    )
    keys = folder / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text(f"{ADMIN} name=root role=admin\n{USER} name=alice\n")
    command = [sys.executable, "-m", "inferencia", "serve", "-c", str(path)]
    state = folder / "state"
    environment = {"INFERENCIA_STATE": str(state), "HOME": str(folder), **(env or {})}
    engine = Engine(port, {}, command, folder / "daemon.log", environment)
    with engine.running():
        yield Daemon(engine, folder, path, models)


def enter(
    browser: Browser, daemon: Daemon, view: str = "now", key: str = ADMIN
) -> None:
    """Open a view as somebody who has a key."""
    browser.open(f"{daemon.page}#{view}")
    browser.type("#key", key)
    browser.press("Open", "main")
    browser.until(lambda: browser.count("#views a"), "the menu is there")


def row(name: str) -> str:
    """The row of a table whose first cell holds this, for scripts."""
    return (
        "[...document.querySelectorAll('tbody tr:not(.extra)')]"
        f".find((row) => row.cells[0].innerText.includes({json.dumps(name)}))"
    )


def row_says(browser: Browser, name: str, text: str) -> None:
    browser.until(
        lambda: text in (browser.script(f"return {row(name)}?.innerText ?? ''") or ""),
        f"the row of {name} says {text}",
    )


def press_in_row(browser: Browser, name: str, label: str) -> None:
    """Press a button of a row, by its words."""
    pressed = (
        f"const one = [...({row(name)}?.querySelectorAll('button') ?? [])]"
        f".find((one) => one.innerText.trim() === {json.dumps(label)} "
        "&& one.checkVisibility() && !one.disabled);"
        "one?.click(); return Boolean(one);"
    )
    browser.until(lambda: browser.script(pressed), f"{name} has a button {label}")


def answer_yes(browser: Browser, words: str) -> None:
    """Answer a question in place, not faster than a person could."""
    press = (
        f"const one = [...document.querySelectorAll('.ask:not([hidden]) button')]"
        f".find((one) => one.innerText.trim() === {json.dumps(words)});"
        "one?.click(); return [...document.querySelectorAll('.ask')]"
        ".every((one) => one.hidden)"
    )
    browser.until(lambda: browser.script(press), f"the question is answered {words}")


TASK = """
admin:
  tasks:
    greet: {greet}
    wait: {wait}
"""


def tasks(folder: Path) -> str:
    """A task that prints, and one that goes on until it is ended."""
    greet = [sys.executable, "-c", "print('hello <b>there</b>')"]
    wait = [sys.executable, "-c", "import signal; print(1, flush=True); signal.pause()"]
    return TASK.format(
        greet=json.dumps(shlex.join(greet)), wait=json.dumps(shlex.join(wait))
    )
