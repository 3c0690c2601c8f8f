"""The description at /openapi.yaml is of the routes that there are."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from gateway import FakeEngine, behind, running
from inferencia import __version__


def described() -> Any:
    text = resources.files("inferencia").joinpath("openapi.yaml").read_text("utf-8")
    return yaml.safe_load(text)


async def test_every_route_is_described_and_nothing_else(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        routes = {
            (route.method.lower(), re.sub(r":[^}]*", "", route.resource.canonical))
            for route in gateway.parts.doors.roles
            if route.resource is not None and route.method not in ("HEAD", "*")
        }
    paths = described()["paths"]
    methods = {"get", "post", "put", "delete", "patch"}
    assert routes == {(m, path) for path in paths for m in paths[path] if m in methods}


async def test_anybody_can_read_it(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with gateway.get("/openapi.yaml", key=None) as answer:
            assert answer.status == 200
            assert yaml.safe_load(await answer.text()) == described()


def test_it_tells_the_version_of_the_program() -> None:
    assert described()["info"]["version"] == __version__
