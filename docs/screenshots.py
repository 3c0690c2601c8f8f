"""Take the pictures of the page in docs/screenshots/: each view light, dark and narrow.

    python docs/screenshots.py [--seconds N] [--only VIEW]

Needs ``chromium``, ``chromedriver`` and ``pngquant``. It shows a real daemon on a free
port, with files of its own in a temporary folder: invented models whose server is
``tests/fakeserver.py``, an invented month of usage, and clients that keep an invented
backend busy for some seconds before the first picture is taken.
"""

import argparse
import contextlib
import http.server
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from browser import Browser, browsing  # noqa: E402
from ggufs import Value, header_bytes, tensor_bytes  # noqa: E402
from inferencia.usageschema import COLUMNS  # noqa: E402
from inferencia.usagestore import Store, entry_of  # noqa: E402
from pages import Daemon, daemon_running, enter, press_in_row, row_says  # noqa: E402

Q4_K = 12  # among ggml's types
FOLDER = REPOSITORY / "docs" / "screenshots"
# 128 colours are a third of the size and look the same.
PALETTE = ("pngquant", "--force", "--skip-if-larger", "--strip", "128")
LOOKS = {"light": (1280, 800), "dark": (1280, 800), "phone": (390, 844)}
VIEWS = {
    "now": "now",
    "models": "models",
    "usage": "usage",
    "keys": "keys",
    "playground": "playground?model=qwen3-coder-30b&temperature=0.2",
    "logs": "logs?filter=chat",
    "config": "config",
    "tasks": "tasks",
}
REMOTE = ("qwen3-coder-30b", "gemma-3-12b-it")
# key -> its model, tokens a second, and how many it asks for at a time
CLIENTS = {
    "alice": ("qwen3-coder-30b", 38, 420),
    "nightly-batch": ("gemma-3-12b-it", 61, 900),
    "bob": ("qwen3-coder-30b", 24, 240),
}
ANSWER = (
    "A token bucket holds up to `burst` tokens and gains `rate` of them a second. "
    "Each request takes some; when there are too few, it is told how long to wait.\n\n"
    "That gives two limits in one: short bursts pass at full speed, and in the long "
    "run nobody spends more than `rate`."
)

KEYS = "\n".join(
    (
        "sk-shot-alice name=alice models=qwen*,gemma* rps=20 daily_tokens=2000000",
        "sk-shot-bob name=bob tpm=60000 concurrency=2",
        "sk-shot-batch name=nightly-batch rps=2 priority=-1",
        "sk-shot-guest name=guest models=gemma* daily_tokens=50000 expires=2025-06-30",
        "sk-shot-grafana name=grafana role=metrics",
    )
)
SECRETS = {
    "alice": "sk-shot-alice",
    "bob": "sk-shot-bob",
    "nightly-batch": "sk-shot-batch",
}
TASKS = """
admin:
  tasks:
    update llama.cpp:
      - git -C ~/llama.cpp pull --ff-only
      - cmake --build ~/llama.cpp/build -j --target llama-server
    free the disk cache: sync
    reboot: systemctl reboot
"""


class _Engine(http.server.BaseHTTPRequestHandler):
    """A backend that answers each chat with as many words as it is asked for."""

    protocol_version = "HTTP/1.0"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the daemon's log is what is shown."""

    def do_GET(self) -> None:
        listed = [{"id": name, "object": "model"} for name in REMOTE]
        self._answer(json.dumps({"object": "list", "data": listed}).encode())

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(length))
        pace, count = asked.get("seed", 45), asked.get("max_tokens", 0)
        words = ANSWER.split(" ")
        if count:
            words = list(itertools.islice(itertools.cycle(words), count))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        time.sleep(0.15)
        for word in words:
            choice = {"index": 0, "delta": {"content": f"{word} "}}
            self._event({"choices": [choice]})
            time.sleep(random.uniform(0.6, 1.4) / pace)
        end = {"index": 0, "delta": {}, "finish_reason": "stop"}
        usage = {
            "prompt_tokens": random.randint(20, 900),
            "completion_tokens": len(words),
        }
        self._event({"choices": [end]})
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: object) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Nothing: clients leave when the pictures are taken."""


@contextlib.contextmanager
def engine() -> Iterator[str]:
    """The backend, and its address."""
    server = _Server(("127.0.0.1", 0), _Engine)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_models(folder: Path) -> None:
    """Invented models, and one that has not come whole."""
    folder.mkdir()
    for name, arch, context, parameters in (
        ("Qwen3-8B-Q4_K_M", "qwen3", 40960, 8_190_735_360),
        ("Qwen3-32B-Q4_K_M", "qwen3", 40960, 32_762_123_264),
        ("nomic-embed-text-v1.5-Q4_K_M", "nomic-bert", 8192, 136_731_648),
        ("Phi-4-mini-Q4_K_M", "phi3", 131072, 3_836_021_760),
    ):
        tensor = ("token_embd.weight", (4096, parameters // 4096), Q4_K)
        keys: dict[str, Value] = {
            "general.architecture": arch,
            "general.name": name,
            "general.file_type": 15,
            f"{arch}.context_length": context,
            f"{arch}.embedding_length": 4096,
            f"{arch}.block_count": 36,
            "tokenizer.chat_template": "{{ messages }}",
        }
        header = header_bytes(keys, [tensor])
        path = folder / f"{name}.gguf"
        path.write_bytes(header)
        # Of the numbers nothing is written: the file has a size and takes no room.
        os.truncate(path, len(header) + 32 + tensor_bytes(*tensor[1:]))
    half = folder / "Mistral-Small-24B-Q4_K_M.gguf"
    half.write_bytes(header)
    os.truncate(half, 2**30)
    os.utime(half, (0, 0))  # what is new may still be on its way


def write_usage(path: Path) -> None:
    """An invented month."""
    rng = random.Random(7)
    keys = {"nightly-batch": 9, "alice": 7, "bob": 4, "guest": 1, "ci": 2}
    now = time.time()
    rows: list[list[Any]] = []
    for day in range(30):
        weekday = time.gmtime(now - day * 86400).tm_wday
        for key, share in keys.items():
            if weekday >= 5 and key in ("alice", "bob", "ci"):
                continue
            for number in range(rng.randint(share, 4 * share)):
                ended = now - day * 86400 - number * 60 - 3600 * rng.random()
                rows.append(_usage_row(rng, len(rows), ended, key))
    store = Store(path)
    try:
        store.add(rows)
    finally:
        store.close()


def _usage_row(rng: random.Random, number: int, ended: float, key: str) -> list[Any]:
    seconds = rng.uniform(2, 40)
    model = rng.choice((*REMOTE, "Qwen3-8B-Q4_K_M", "Qwen3-32B-Q4_K_M"))
    prompt = rng.randint(200, 6000)
    values = dict.fromkeys(COLUMNS, None) | {
        "entry": entry_of(ended - seconds) + number,
        "id": f"req-{number}",
        "started": ended - seconds,
        "key": key,
        "model": model,
        "backend": "attic" if model in REMOTE else model,
        "endpoint": "/v1/chat/completions",
        "status": 200,
        "prompt_tokens": prompt,
        "completion_tokens": rng.randint(40, 900),
        "cached_tokens": prompt // rng.randint(2, 9),
        "estimated": 0,
        "duration": seconds,
        "bytes_out": 4000,
        "outcome": "complete" if rng.random() < 0.985 else "cut",
        "cost": rng.uniform(0.0005, 0.01),
        "billed": 0,
    }
    return list(values.values())


def keep_asking(url: str, key: str, stop: threading.Event) -> None:
    """One client that has one answer after the other."""
    model, pace, tokens = CLIENTS[key]
    messages = [{"role": "user", "content": "Explain a token bucket."}]
    headers = {
        "Authorization": f"Bearer {SECRETS[key]}",
        "Content-Type": "application/json",
    }
    while not stop.is_set():
        # The backend takes its pace from the seed.
        asked = {"model": model, "stream": True, "seed": pace, "max_tokens": tokens}
        body = json.dumps({**asked, "messages": messages}).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
        with contextlib.suppress(OSError), urllib.request.urlopen(request) as answer:
            while not stop.is_set() and answer.readline():
                pass
        stop.wait(random.uniform(0.5, 4))


@contextlib.contextmanager
def clients(url: str) -> Iterator[None]:
    """Clients that keep the backend busy."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=keep_asking, args=(url, key, stop)) for key in CLIENTS
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def daemon(folder: Path, backend: str) -> Iterator[Daemon]:
    """A daemon with all that is shown."""
    write_models(folder / "models")
    write_usage(folder / "usage.sqlite3")
    config = (
        f"backends:\n  - {{name: attic, type: openai, url: '{backend}',"
        " prices: {'*': {prompt: 0.4, completion: 1.6}}}\n"
        f"{TASKS}"
    )
    with daemon_running(
        folder, "--memory", "300", config=config, memory="24GiB"
    ) as running:
        keys = folder / "keys.txt"
        keys.write_text(keys.read_text().splitlines()[0] + "\n" + KEYS + "\n")
        yield running


def prepare(browser: Browser, running: Daemon) -> None:
    """Load a model, say something, change something: what the views then show."""
    enter(browser, running, "models")
    press_in_row(browser, "Qwen3-8B", "Load")
    row_says(browser, "Qwen3-8B", "ready")
    browser.open(f"{running.page}#tasks")
    browser.press("Start free the disk cache")
    time.sleep(0.5)  # as a person would; faster, it counts as pressed twice
    browser.press("Yes, start", ".ask:not([hidden])")
    browser.sees("done")


def settle(browser: Browser, view: str) -> None:
    """What a view shows only after something was done in it."""
    if view == "playground":
        browser.type("#say", "What is a token bucket?")
        browser.press("Send")
        browser.until(
            lambda: browser.count("article:not([aria-busy])") > 1, "it is said"
        )
    elif view == "config":
        browser.until(lambda: browser.count(".findings"), "it is checked")
        browser.script(
            "const field = document.getElementById('config');"
            "field.value += 'routing: {aliases: {gpt-4o-mini: Qwen3-8B-Q4_K_M}}\\n';"
            "field.dispatchEvent(new Event('input'));"
        )
        browser.sees("it can be saved")
    elif view == "models":
        row_says(browser, "Qwen3-8B", "ready")
    elif view == "tasks":
        browser.press("Output")
    time.sleep(2.5)  # rows, bars, some lines of the log


def take(browser: Browser, running: Daemon, views: Sequence[str]) -> None:
    """Take the pictures."""
    FOLDER.mkdir(exist_ok=True)
    for look, (width, height) in LOOKS.items():
        browser.prefer(color_scheme="dark" if look == "dark" else "light")
        browser.resize(width, height)
        for view in views:
            # Another page first: what was typed in a view is not to be seen again.
            browser.open("about:blank")
            browser.open(f"{running.page}#{VIEWS[view]}")
            settle(browser, view)
            path = FOLDER / f"{view}-{look}.png"
            browser.screenshot(path)
            subprocess.run([*PALETTE, "--output", path, path], check=True)
            print(f"{path.relative_to(REPOSITORY)}  {path.stat().st_size // 1024} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures of the page.")
    parser.add_argument("--seconds", type=float, default=100, help="of traffic first")
    parser.add_argument("--only", choices=VIEWS, action="append", help="this view")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        backend = stack.enter_context(engine())
        running = stack.enter_context(daemon(folder, backend))
        browser = stack.enter_context(browsing(folder))
        stack.enter_context(clients(running.engine.url))
        prepare(browser, running)
        time.sleep(asked.seconds)
        take(browser, running, asked.only or list(VIEWS))


if __name__ == "__main__":
    main()
