"""A gateway with a life of its own, and an administrator in front of it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gateway import ADMIN, KEYS, PATIENCE, Gateway, running
from inferencia.api.admin.inside import CannotLoad
from inferencia.config import ConfigErrors, Loaded, load
from inferencia.overlay import Flags

API = "/admin/api/"


@dataclass(slots=True)
class Life:
    """Stands for the daemon's life: what is asked of it is noted."""

    folder: Path
    loaded: Loaded
    has_first_keys: bool = False
    reloads: int = 0
    restarts: int = 0
    keys_changes: int = 0
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys_file(self) -> Path:
        return self.loaded.config.auth.keys_file

    def check(self, content: bytes | None = None) -> Loaded:
        try:
            return load(self.folder / "config.yaml", self.env, Flags(), content)
        except ConfigErrors as errors:
            raise CannotLoad(errors.errors) from errors

    async def reload(self) -> tuple[str, ...]:
        self.reloads += 1
        try:
            self.loaded = self.check()
        except CannotLoad as error:
            return error.problems
        return ()

    def keys_changed(self) -> None:
        self.keys_changes += 1

    def restart(self) -> None:
        self.restarts += 1


@dataclass(slots=True)
class Administrator:
    """Asks with a key of the role admin."""

    gateway: Gateway
    life: Life

    async def ask(
        self, method: str, path: str, body: Any = None, **further: Any
    ) -> tuple[int, Any]:
        """Status and JSON (or text) of an answer; ``path`` begins below the API."""
        headers = {"Authorization": f"Bearer {further.pop('key', ADMIN)}"}
        if isinstance(body, bytes):
            further["data"] = body
        elif body is not None:
            further["json"] = body
        headers |= further.pop("headers", {})
        url = self.gateway.url + (path if path.startswith("/") else API + path)
        async with self.gateway.client.request(
            method, url, headers=headers, allow_redirects=False, **further
        ) as answer:
            text = await answer.text()
            is_json = answer.content_type == "application/json"
            return answer.status, json.loads(text) if is_json else text

    async def get(self, path: str) -> Any:
        """What is there."""
        status, found = await self.ask("GET", path)
        assert status == 200, found
        return found

    async def refused(
        self, method: str, path: str, body: Any = None, **further: Any
    ) -> tuple[int, str]:
        """Status and message of a refusal."""
        status, found = await self.ask(method, path, body, **further)
        assert set(found["error"]) >= {"message", "type", "param", "code"}
        return status, found["error"]["message"]

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, **headers: str
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """An answer that goes on."""
        headers = {"Authorization": f"Bearer {ADMIN}"} | headers
        async with self.gateway.client.get(
            self.gateway.url + API + path, headers=headers
        ) as answer:
            assert answer.status == 200, await answer.text()
            yield answer.content


async def next_event(stream: aiohttp.StreamReader) -> tuple[str, Any]:
    """Name and data of the next server-sent event."""
    async with asyncio.timeout(PATIENCE):
        text = (await stream.readuntil(b"\n\n")).decode()
    name, _, data = text.rstrip("\n").rpartition("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@contextlib.asynccontextmanager
async def administering(
    folder: Path, config: Mapping[str, Any] | str, *, keys: str = KEYS
) -> AsyncIterator[Administrator]:
    """A gateway of this configuration.

    Args:
        folder: where its files go.
        config: YAML, or what becomes of it.
        keys: the keys file's text.
    """
    text = config if isinstance(config, str) else json.dumps(config)
    async with running(folder, text, keys=keys) as gateway:
        life = Life(folder, load(folder / "config.yaml", {}, Flags()))
        admin = gateway.parts.admin
        admin.daemon = life
        following = asyncio.create_task(admin.follow())
        try:
            yield Administrator(gateway, life)
        finally:
            following.cancel()
            await asyncio.wait((following,))
            admin.end_streams()
            await admin.aclose()
            await gateway.parts.local.aclose()
