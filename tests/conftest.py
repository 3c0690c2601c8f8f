"""Fixtures, most of them of the end-to-end set: real engines, the gateway before them.

They start once, when the first test marked ``e2e`` asks for them. Without
``INFERENCIA_E2E_DIR`` (see tests/engines/install.py) those tests are skipped.

``INFERENCIA_TEST_LOOP=uvloop`` runs every asynchronous test on uvloop.
"""

import asyncio
import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from browser import Browser, browsing, programs
from engines.real import (
    Engine,
    Installed,
    chat_engine,
    embedding_engine,
    free_port,
    gateway_engine,
    mlx_engine,
    until,
)
from inferencia import cli
from inferencia.logs import close as close_logs
from inferencia.trust import trusting

USER_KEY = "sk-e2e-user-7f3a91c2d4"
OTHER_KEYS = """
sk-e2e-metrics-5b8d02e6a1 name=scraper role=metrics
sk-e2e-narrow-9c1e44f7b3 name=narrow models=minilm
"""


# What is collected stays: while thousands of tests are, nothing is garbage, and looking
# for some took a third of that time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


if os.environ.get("INFERENCIA_TEST_LOOP") == "uvloop":

    def pytest_asyncio_loop_factories(
        config: pytest.Config, item: pytest.Item
    ) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
        import uvloop

        return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session", autouse=True)
def no_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs keep that are told nothing else does not go where ours do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def brisk() -> Iterator[None]:
    """Gateways of this process are quicker than in life.

    Clients that leave are given up sooner: dozens of tests wait for that, and those
    that are about the time set their own. The system's certificates are read once,
    which takes 25 ms, for all agents.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inferencia.downstream.connection._LINGER_SECONDS", 0.2)
        patch.setattr("inferencia.downstream.connection._HALF_CLOSED_SECONDS", 0.05)
        patch.setattr("inferencia.tunnelling.trusting", functools.cache(trusting))
        yield


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This very process in an empty environment and folder."""
    for name in tuple(os.environ):
        if name.startswith(("INFERENCIA_", "GI_", "XDG_", "STATE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    # What the tests have in memory is much to look through, and none of its business.
    monkeypatch.setattr(cli, "_tune_collector", lambda: None)
    yield tmp_path
    close_logs()


@pytest.fixture(scope="session")
def installed() -> Installed:
    named = os.environ.get("INFERENCIA_E2E_DIR")
    if not named:
        pytest.skip(
            "INFERENCIA_E2E_DIR is not set (python tests/engines/install.py fills it)"
        )
    folder = Path(named).resolve()
    if not (folder / "venv").is_dir():
        pytest.skip(f"no engines in {folder} (python tests/engines/install.py)")
    return Installed(folder)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def llama_server(installed: Installed) -> Path:
    program = installed.llama_server()
    if program is None:
        pytest.skip(f"no llama-server in {installed.folder} nor on PATH")
    return program


@pytest.fixture(scope="session")
def llama(installed: Installed, llama_server: Path, logs: Path) -> Iterator[Engine]:
    """A llama-server with the chat model ``gemma-270m``."""
    if not (installed.folder / "chat.gguf").exists():
        pytest.skip(f"no chat.gguf in {installed.folder}")
    with chat_engine(installed, llama_server, logs / "llama.log").running() as engine:
        yield engine


@pytest.fixture(scope="session")
def embedder(installed: Installed, llama_server: Path, logs: Path) -> Iterator[Engine]:
    """A llama-server with the embedding model ``minilm``."""
    if not (installed.folder / "minilm.gguf").exists():
        pytest.skip(f"no minilm.gguf in {installed.folder}")
    engine = embedding_engine(installed, llama_server, logs / "embedder.log")
    with engine.running():
        yield engine


@pytest.fixture(scope="session")
def mlx(installed: Installed, logs: Path) -> Iterator[Engine]:
    """A real mlx_lm server with the tiny model ``mlx-a``."""
    if not installed.has_package("mlx_lm") or not (installed.folder / "mlx-a").is_dir():
        pytest.skip(f"no mlx_lm or mlx-a in {installed.folder}")
    with mlx_engine(installed, logs / "mlx.log").running() as engine:
        yield engine


@pytest.fixture
def make_gateway(tmp_path: Path) -> Iterator[Callable[[str], Engine]]:
    """Makes gateways of a test's own; each is stopped when the test ends."""
    made: list[Engine] = []

    def make(config: str) -> Engine:
        engine = prepare_gateway(tmp_path / f"gateway{len(made)}", config)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop()


@pytest.fixture(scope="session")
def gateway(
    llama: Engine, embedder: Engine, mlx: Engine, logs: Path
) -> Iterator[Engine]:
    """``inferencia serve`` in front of all three engines; their models are listed."""
    config = f"""
backends:
  - {{name: chat, type: llamacpp, url: "{llama.url}"}}
  - {{name: embedding, type: llamacpp, url: "{embedder.url}/v1"}}
  - {{name: apple, type: mlx, url: "{mlx.url}"}}
"""
    with prepare_gateway(logs / "gateway", config).running() as engine:
        wait_for_models(engine, {"gemma-270m", "minilm", "mlx-a"})
        yield engine


def prepare_gateway(folder: Path, config: str) -> Engine:
    """Write the files of a gateway; it listens on a port of its own."""
    folder.mkdir()
    port = free_port()
    common = f"""
server: {{host: 127.0.0.1, port: {port}, shutdown_timeout: 2s}}
auth: {{keys_file: keys.txt}}
ratelimit: {{requests_per_second: 1000, burst: 1000}}
watchdog: {{interval: 1s, fail_threshold: 2}}
log: {{level: info, format: json}}
"""
    keys = folder / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text(f"{USER_KEY} name=alice\n{OTHER_KEYS}")
    (folder / "config.yaml").write_text(common + config)
    log = folder / "gateway.log"
    return gateway_engine(folder / "config.yaml", port, USER_KEY, log)


def wait_for_models(gateway: Engine, wanted: set[str]) -> None:
    def are_listed() -> bool:
        listed = {model["id"] for model in gateway.get("/v1/models").json()["data"]}
        return wanted <= listed

    words = "" if gateway.process is None else gateway.process.last_words()
    until(are_listed, 15, f"{sorted(wanted)} are in /v1/models\n{words}")


@pytest.fixture
def engine_address(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tells a test that only needs some llama-server where ours is."""
    if not os.environ.get("INFERENCIA_E2E_LLAMA_URL"):
        url = request.getfixturevalue("llama").url
        monkeypatch.setenv("INFERENCIA_E2E_LLAMA_URL", url)


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium for all tests of the page."""
    if not os.environ.get("INFERENCIA_E2E_DIR"):
        pytest.skip("INFERENCIA_E2E_DIR is not set")
    if programs() is None:
        pytest.skip("no chromium or chromedriver on PATH (Debian: chromium-driver)")
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """The window as if it were new; what its console holds then fails the test."""
    window.resize(1440, 900)
    window.prefer(color_scheme="light", reduced_motion="no-preference")
    window.complaints()
    yield window
    # Of a daemon that has been stopped the browser notes that it is gone.
    complaints = [one for one in window.complaints() if "net::ERR_" not in one]
    with contextlib.suppress(Exception):
        window.script("sessionStorage.clear(); localStorage.clear()")
    window.open("about:blank")
    assert complaints == []
