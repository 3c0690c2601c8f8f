"""Models on this machine, with a real llama-server and two real models.

Three kinds of users arrive with what they have: a llama-swap configuration, goinfer's,
or only a folder.
"""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import USER_KEY
from engines.real import Engine, Installed, free_port, until

pytestmark = pytest.mark.e2e

MakeGateway = Callable[[str], Engine]


@pytest.fixture
def files(installed: Installed, tmp_path: Path) -> Path:
    """A folder with the chat model and the embedding model."""
    folder = tmp_path / "models"
    folder.mkdir()
    for source, name in (("chat.gguf", "gemma.gguf"), ("minilm.gguf", "minilm.gguf")):
        if not (installed.folder / source).exists():
            pytest.skip(f"no {source} in {installed.folder}")
        (folder / name).symlink_to(installed.folder / source)
    return folder


def swap(llama_server: Path, files: Path, **further: Any) -> str:
    """A configuration of ours with a llama-swap configuration inside, as YAML."""
    command = f"{llama_server} --port ${{PORT}} -c 2048 -np 2 -t 2 -m {files}/"
    models: dict[str, dict[str, Any]] = {
        "gemma": {"cmd": f"{command}gemma.gguf", "aliases": ["gpt-4o"]},
        "minilm": {"cmd": f"{command}minilm.gguf --embeddings"},
    }
    for name, keys in further.pop("models", {}).items():
        models[name] = {**models[name], **keys}
    return "swap: " + json.dumps({"startPort": free_port(), "models": models} | further)


def chat(gateway: Engine, model: str = "gemma", **further: Any) -> Any:
    body = {
        "model": model,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "Hello!"}],
    }
    return gateway.post("/v1/chat/completions", body | further)


def embed(gateway: Engine) -> Any:
    return gateway.post("/v1/embeddings", {"model": "minilm", "input": "a cat"})


def loaded(gateway: Engine) -> set[str]:
    listed = gateway.get("/v1/models").json()["data"]
    return {m["id"] for m in listed if m.get("status", {}).get("value") == "loaded"}


def servers_of(gateway: Engine) -> list[int]:
    """The process ids of the model servers that a gateway has started."""
    assert gateway.process is not None
    own = str(gateway.process._child.pid)
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            stat = (folder / "stat").read_text()
            parent = stat.rpartition(")")[2].split()[1]
            if parent == own and b"llama-server" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def test_two_models_take_turns_under_load_and_every_request_is_answered(
    make_gateway: MakeGateway, llama_server: Path, files: Path
) -> None:
    groups = {"one": {"swap": True, "members": ["gemma", "minilm"]}}
    with make_gateway(swap(llama_server, files, groups=groups)).running() as gateway:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [
                pool.submit(embed if number % 2 else chat, gateway)
                for number in range(24)
            ]
            statuses = [one.result().status for one in asked]
        assert statuses == [200] * 24
        assert len(loaded(gateway)) == 1
        # A swap for each request would make 23.
        starts = gateway.log.read_text().count('"starting model')
        assert 2 <= starts <= 8, starts


def test_embeddings_beside_chat_stay_loaded_in_one_group(
    make_gateway: MakeGateway, llama_server: Path, files: Path
) -> None:
    groups = {"both": {"swap": False, "members": ["gemma", "minilm"]}}
    config = swap(
        llama_server,
        files,
        groups=groups,
        hooks={"on_startup": {"preload": ["gpt-4o"]}},
    )
    with make_gateway(config).running() as gateway:
        until(lambda: "gemma" in loaded(gateway), 20, "gemma is preloaded")
        first = embed(gateway)
        assert first.status == 200
        assert len(first.json()["data"][0]["embedding"]) == 384
        assert chat(gateway, "gpt-4o").status == 200
        assert loaded(gateway) == {"gemma", "minilm"}
        assert gateway.log.read_text().count('"starting model') == 2


def test_a_model_is_unloaded_when_nobody_has_asked_for_it_for_its_ttl(
    make_gateway: MakeGateway, llama_server: Path, files: Path
) -> None:
    config = swap(llama_server, files, models={"minilm": {"ttl": 1}})
    with make_gateway(config).running() as gateway:
        assert embed(gateway).status == 200
        assert loaded(gateway) == {"minilm"}
        until(lambda: not loaded(gateway), 5, "it was unloaded")
        until(lambda: not servers_of(gateway), 5, "its process is gone")
        assert embed(gateway).status == 200


def test_a_server_that_is_killed_while_it_streams_ends_in_an_error_and_is_started_anew(
    make_gateway: MakeGateway, llama_server: Path, files: Path
) -> None:
    with make_gateway(swap(llama_server, files)).running() as gateway:
        assert chat(gateway).status == 200
        body = {
            "model": "gemma",
            "stream": True,
            "max_tokens": 400,
            "messages": [{"role": "user", "content": "Count to a thousand."}],
        }
        connection = gateway.send(
            "POST", "/v1/chat/completions", json.dumps(body).encode()
        )
        with contextlib.closing(connection):
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data: ")
            (server,) = servers_of(gateway)
            os.kill(server, signal.SIGKILL)
            rest = answer.read()
        assert b'"error"' in rest and b"[DONE]" not in rest
        # At once, or after a second if the server had not served for long.
        until(lambda: chat(gateway).status == 200, 20, "it was started anew")


def test_a_reload_keeps_what_has_not_changed_loaded_and_cuts_no_stream(
    make_gateway: MakeGateway, llama_server: Path, files: Path
) -> None:
    gateway = make_gateway(swap(llama_server, files))
    config = Path(gateway.command[-1])
    with gateway.running():
        assert chat(gateway).status == 200
        before = servers_of(gateway)
        body = {
            "model": "gemma",
            "stream": True,
            "max_tokens": 60,
            "messages": [{"role": "user", "content": "Hello!"}],
        }
        connection = gateway.send(
            "POST", "/v1/chat/completions", json.dumps(body).encode()
        )
        with contextlib.closing(connection):
            answer = connection.getresponse()
            first = answer.readline()
            text = config.read_text()
            config.write_text(text.replace("--embeddings", "--embeddings -t 1"))
            assert gateway.process is not None
            gateway.process.signal(signal.SIGHUP)
            until(
                lambda: "configuration reloaded" in gateway.log.read_text(),
                10,
                "it was reloaded",
            )
            rest = answer.read()
        assert first.startswith(b"data: ") and b"[DONE]" in rest
        assert servers_of(gateway) == before
        assert embed(gateway).status == 200


def test_no_server_is_left_when_the_gateway_itself_is_killed(
    make_gateway: MakeGateway, llama_server: Path, files: Path
) -> None:
    with make_gateway(swap(llama_server, files)).running() as gateway:
        assert chat(gateway).status == 200
        (server,) = servers_of(gateway)
        assert gateway.process is not None
        gateway.process.signal(signal.SIGKILL)
        until(lambda: not Path(f"/proc/{server}").exists(), 5, "the server has ended")


def test_a_file_that_is_no_model_is_told_to_whoever_asks(
    make_gateway: MakeGateway, llama_server: Path, files: Path
) -> None:
    config = swap(llama_server, files).replace("minilm.gguf", "nothing.gguf")
    with make_gateway(config).running() as gateway:
        answer = embed(gateway)
        assert answer.status == 503
        error = answer.json()["error"]
        assert error["code"] == "model_load_failed"
        assert "llama-server exited with code 1" in error["message"]
        assert int(answer.headers["Retry-After"]) >= 1
        assert chat(gateway).status == 200


# --- three kinds of users ---------------------------------------------------------


def daemon(folder: Path, *arguments: str, **env: str) -> Engine:
    """The gateway as somebody starts it who has no file of ours."""
    port = free_port()
    home = folder / "home"
    home.mkdir()
    command = [sys.executable, "-m", "inferencia", "serve", *arguments]
    command += ["--port", str(port)]
    kept = {"HOME": str(home), "XDG_STATE_HOME": "", "XDG_CONFIG_HOME": ""}
    kept |= {"INFERENCIA_RATELIMIT_RPS": "1000", "INFERENCIA_RATELIMIT_BURST": "1000"}
    return Engine(port, command=command, log=folder / "out", env=kept | env)


@contextlib.contextmanager
def with_its_key(gateway: Engine) -> Any:
    with gateway.running():
        state = Path(gateway.env["HOME"]) / ".local/state/inferencia"
        key = (state / "key").read_text().strip()
        gateway.headers = {"Authorization": f"Bearer {key}"}
        yield gateway


def test_a_llama_swap_users_file_is_all_that_is_needed(
    tmp_path: Path, llama_server: Path, files: Path
) -> None:
    (tmp_path / "llama-swap.yml").write_text(
        f"""\
startPort: {free_port()}
macros:
  server: {llama_server} --port ${{PORT}} -c 2048
models:
  gemma: {{cmd: "${{server}} -m {files}/gemma.gguf", filters: {{stripParams: "n"}}}}
  minilm: {{cmd: "${{server}} -m {files}/minilm.gguf --embeddings"}}
"""
    )
    with with_its_key(daemon(tmp_path, "-c", "llama-swap.yml")) as gateway:
        assert chat(gateway, n=0).status == 200
        assert embed(gateway).status == 200


def test_a_goinfer_users_file_is_all_that_is_needed(
    tmp_path: Path, llama_server: Path, files: Path
) -> None:
    (tmp_path / "goinfer.yml").write_text(
        f"""\
models_dir: {files}
llama: {{exe: {llama_server}, args: {{common: "--props --no-warmup -c 2048"}}}}
server: {{api_key: {{admin: {"a" * 64}, user: {USER_KEY * 3}}}}}
"""
    )
    gateway = daemon(tmp_path, "-c", "goinfer.yml")
    gateway.headers = {"Authorization": f"Bearer {USER_KEY * 3}"}
    with gateway.running():
        listed = gateway.get("/models").json()
        assert listed["count"] == 2
        assert listed["models"]["gemma"]["params"]["arch"] == "gemma3"
        body = {"model": "gemma", "prompt": "Once upon a", "max_tokens": 4}
        infer = gateway.post("/infer", body)
        assert infer.status == 200
        assert infer.json()["tokens_predicted"] == 4
        streamed = gateway.post("/infer", body | {"stream": True}).events()
        assert json.loads(streamed[-1])["stop"] is True
        assert chat(gateway, "GI_gemma").status == 200
        assert embed(gateway).status == 200


def test_a_folder_in_the_environment_is_all_that_is_needed(
    tmp_path: Path, llama_server: Path, files: Path
) -> None:
    env = {"GI_MODELS_DIR": str(files), "GI_LLAMA_EXE": str(llama_server)}
    with with_its_key(daemon(tmp_path, **env)) as gateway:
        assert chat(gateway).status == 200
        shutil.copy(files / "minilm.gguf", files / "later.gguf")

        def has_come() -> bool:
            listed = gateway.get("/v1/models").json()["data"]
            return any(model["id"] == "later" for model in listed)

        until(has_come, 5, "the new file is offered")
        body = {"model": "later", "input": "a cat"}
        assert gateway.post("/v1/embeddings", body).status == 200
