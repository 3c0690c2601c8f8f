"""A gateway with models of its own: small servers, started as child processes."""

import contextlib
import json
import os
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fakeserver import COMMAND
from gateway import ADMIN, USER, Gateway, running
from inferencia.config import load
from inferencia.models.running import State
from inferencia.overlay import Flags

# Test runs beside each other should not ask for the same ports all the time.
START_PORT = 20_000 + os.getpid() * 7 % 20_000


def server(model: str, *options: str, **keys: Any) -> dict[str, Any]:
    """A model of a llama-swap configuration, served by the fake server."""
    command = [*COMMAND, "--model", model, *options]
    return {
        "cmd": f"{shlex.join(command)} --port ${{PORT}}",
        "proxy": "http://127.0.0.1:${PORT}",
    } | keys


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own."""
    folder = tmp_path / "state"
    monkeypatch.setenv("INFERENCIA_STATE", str(folder))
    return folder


@contextlib.asynccontextmanager
async def swapping(
    folder: Path, models: dict[str, Any], *, keys: str = "", **further: Any
) -> AsyncIterator[Gateway]:
    """A gateway with these models.

    Args:
        folder: where its files go.
        models: as a llama-swap configuration has them.
        keys: further lines of the keys file.
        further: more keys of the llama-swap configuration; those of ours in ``ours``.
    """
    from gateway import KEYS

    ours = further.pop("ours", {})
    config = {
        "swap": {"models": models, "startPort": START_PORT} | further,
        "llama": {"memory": "1GiB"},
        "ratelimit": {"requests_per_second": 10000, "burst": 10000},
    } | ours
    async with running(folder, json.dumps(config), keys=KEYS + keys) as gateway:
        local = gateway.parts.local
        try:
            await local.configure(
                load(folder / "config.yaml", {}, Flags()).config, folder
            )
            yield gateway
        finally:
            await local.aclose()


def is_loaded(gateway: Gateway, model: str) -> bool:
    return gateway.parts.local.fleet.state(model).state is State.READY


def in_flight(gateway: Gateway, model: str) -> int:
    return gateway.parts.local.fleet.state(model).in_flight


async def load_model(gateway: Gateway, model: str) -> None:
    await gateway.parts.local.fleet.scheduler.load(model)


async def got(
    gateway: Gateway, path: str, key: str = ADMIN, method: str = "GET", **further: Any
) -> tuple[int, Any]:
    """Status and JSON (or text) of an answer."""
    headers = {"Authorization": f"Bearer {key}"} | further.pop("headers", {})
    async with gateway.client.request(
        method, gateway.url + path, headers=headers, allow_redirects=False, **further
    ) as answer:
        text = await answer.text()
        is_json = answer.content_type == "application/json"
        return answer.status, json.loads(text) if is_json else text


__all__ = ["ADMIN", "USER", "got", "in_flight", "is_loaded", "load_model", "server"]
