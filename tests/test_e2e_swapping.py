"""llama-swap's further keys with a real llama-server: matrix, peers, a memory budget.

Three names for two models, so that there is something to choose between.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import USER_KEY
from engines.real import Engine, free_port, until
from test_e2e_models import chat, embed, files, loaded

pytestmark = pytest.mark.e2e
assert files  # the fixture

MakeGateway = Callable[[str], Engine]


def swap(llama_server: Path, files: Path, memory: str = "8GiB", **further: Any) -> str:
    """Two chat models, which are one file, and one for embeddings."""
    command = f"{shlex.quote(str(llama_server))} --port ${{PORT}} -t 1 -np 1 -m {files}"
    models = {
        "gemma": {"cmd": f"{command}/gemma.gguf -c 1024"},
        "other": {"cmd": f"{command}/gemma.gguf -c 512"},
        "minilm": {"cmd": f"{command}/minilm.gguf --embeddings"},
    }
    written = {"startPort": free_port(), "models": models} | further
    return f"swap: {json.dumps(written)}\nllama: {{memory: {memory}}}\n"


def test_a_matrix_keeps_what_it_allows_together_and_gives_up_what_costs_least(
    make_gateway: MakeGateway, llama_server: Path, files: Path
) -> None:
    matrix = {
        "vars": {"g": "gemma", "o": "other", "e": "minilm"},
        "evict_costs": {"gemma": 10},
        "sets": {"with_gemma": "g & e", "with_other": "o & e", "chats": "g & o"},
    }
    config = swap(llama_server, files, matrix=matrix)
    with make_gateway(config).running() as gateway:
        assert (embed(gateway).status, chat(gateway).status) == (200, 200)
        assert loaded(gateway) == {"minilm", "gemma"}
        # Beside minilm it would cost gemma (10), beside gemma only minilm (1).
        assert chat(gateway, "other").status == 200
        assert loaded(gateway) == {"gemma", "other"}


def test_a_peers_models_are_served_with_its_key_and_filters(
    make_gateway: MakeGateway, llama: Engine, llama_server: Path, files: Path
) -> None:
    there = make_gateway(f'backends: [{{type: llamacpp, url: "{llama.url}"}}]')
    with there.running():
        until(
            lambda: b"gemma-270m" in there.get("/v1/models").body, 10, "it has models"
        )
        attic: dict[str, Any] = {
            "proxy": there.url,
            "apiKey": USER_KEY,
            "models": ["gemma-270m"],
        }
        attic["filters"] = {"setParams": {"max_tokens": 3}}
        gone = {"proxy": f"http://127.0.0.1:{free_port()}", "models": ["x"]}
        config = swap(llama_server, files, peers={"attic": attic, "gone": gone})
        with make_gateway(config).running() as here:
            listed = {m["id"] for m in here.get("/v1/models").json()["data"]}
            assert "attic/gemma-270m" in listed
            for name in ("attic/gemma-270m", "gemma-270m"):
                reply = chat(here, name, max_tokens=50)
                assert reply.status == 200
                assert reply.json()["usage"]["completion_tokens"] <= 3
            assert chat(here, "attic/gemma-270m", stream=True).chunks()
            assert chat(here, "gone/x").status == 503


@pytest.mark.parametrize(("memory", "kept"), [("8GiB", 3), ("600MiB", 2)])
def test_a_budget_holds_within_groups_that_would_allow_more(
    make_gateway: MakeGateway,
    llama_server: Path,
    files: Path,
    memory: str,
    kept: int,
) -> None:
    together: dict[str, Any] = {"swap": False, "exclusive": False}
    groups = {
        "chats": together | {"members": ["gemma", "other"]},
        "always": together | {"persistent": True, "members": ["minilm"]},
    }
    config = swap(llama_server, files, memory, groups=groups)
    with make_gateway(config).running() as gateway:
        assert (embed(gateway).status, chat(gateway).status) == (200, 200)
        assert chat(gateway, "other").status == 200
        assert len(loaded(gateway)) == kept
        assert {"minilm", "other"} <= loaded(gateway)
