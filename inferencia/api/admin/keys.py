"""``/admin/api/keys``: the keys in force; those of the keys file are changed in place.

Also the daemon's own copy follows at once, so that a key works, or works no more, when
the answer is there.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from aiohttp import web

from inferencia.api.admin.asking import asked, member, needed, told
from inferencia.api.admin.inside import Daemon, Inside
from inferencia.api.route import Route
from inferencia.context import CONTEXT
from inferencia.errors import Conflict, InvalidRequest, NotFound
from inferencia.keylines import Key, KeysError, LineError, last_day
from inferencia.keys import Role
from inferencia.keysfile import (
    EditError,
    add_key,
    change_key,
    list_keys,
    revoke_key,
    rotate_key,
)

# The members of a key that can be set, and what each must be.
_MEMBERS: Mapping[str, type[Any]] = {
    "role": str,
    "models": list,
    "rps": float,
    "burst": int,
    "tpm": int,
    "concurrency": int,
    "daily_tokens": int,
    "priority": int,
    "expires": str,
}

_T = TypeVar("_T")


class KeysApi:
    """Keys: list, make, change, rotate, revoke."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._editing = asyncio.Lock()

    def routes(self) -> tuple[Route, ...]:
        path = "/admin/api/keys"
        one = f"{path}/{{name:[^/]+}}"
        return (
            Route("admin", "GET", path, Role.ADMIN, self.list),
            Route("admin", "POST", path, Role.ADMIN, self.add),
            Route("admin", "PATCH", one, Role.ADMIN, self.change),
            Route("admin", "DELETE", one, Role.ADMIN, self.revoke),
            Route("admin", "POST", f"{one}/rotate", Role.ADMIN, self.rotate),
        )

    async def list(self, request: web.Request) -> web.Response:
        ring, daemon = self._inside.doors.ring, self._inside.daemon
        sources = await self._sources()
        return told(
            {
                "keys": [self._told(key, sources) for key in ring.keys],
                "path": None if daemon is None else str(daemon.keys_file),
                "problem": ring.problem,
            }
        )

    async def add(self, request: web.Request) -> web.Response:
        values = await asked(request, self._inside.bodies, ("name", *_MEMBERS))
        name = needed(values, "name", str)
        given = {k: v for k, v in _options(values).items() if v is not None}
        async with self._editing:
            path = self._daemon().keys_file
            self._refuse_other_sources(name)
            if any(key.name == name for key in self._inside.doors.ring.keys):
                raise Conflict(f'there is a key "{name}" already')
            secret = await self._edit(lambda: add_key(path, name, given))
        return await self._with_secret(name, secret)

    async def change(self, request: web.Request) -> web.Response:
        values = await asked(request, self._inside.bodies, tuple(_MEMBERS))
        options = _options(values)
        async with self._editing:
            key, path = self._changeable(request), self._daemon().keys_file
            is_admin = options.get("role", "admin") == Role.ADMIN.value
            if not is_admin or options.get("expires") is not None:
                self._refuse_last_admin(key)
            await self._edit(lambda: change_key(path, key.name, options))
        return told({"key": await self._entry(key.name)})

    async def rotate(self, request: web.Request) -> web.Response:
        await asked(request, self._inside.bodies, ())
        async with self._editing:
            key, path = self._changeable(request), self._daemon().keys_file
            secret = await self._edit(lambda: rotate_key(path, key.name))
        asking = request[CONTEXT].key
        is_own = asking is not None and asking.name == key.name
        return await self._with_secret(key.name, secret, is_own=is_own)

    async def revoke(self, request: web.Request) -> web.Response:
        await asked(request, self._inside.bodies, ())
        async with self._editing:
            key, path = self._changeable(request), self._daemon().keys_file
            self._refuse_last_admin(key)
            entry = self._told(key, await self._sources())
            await self._edit(lambda: revoke_key(path, key.name))
        return told({"key": entry})

    # What may be changed.

    def _daemon(self) -> Daemon:
        daemon = self._inside.daemon
        if daemon is None:
            raise Conflict("keys cannot be changed here")
        return daemon

    def _changeable(self, request: web.Request) -> Key:
        """The key that is meant, if it is in the file.

        Raises:
            ApiError: it is not.
        """
        name = request.match_info["name"]
        self._refuse_other_sources(name)
        for key in self._inside.doors.ring.keys:
            if key.name == name:
                return key
        raise NotFound(f'there is no key "{name[:64]}"')

    def _refuse_other_sources(self, name: str) -> None:
        loaded = self._daemon().loaded
        if loaded.config.auth.api_keys is not None:
            raise Conflict("the keys are those of INFERENCIA_API_KEYS; change that")
        where = self._elsewhere().get(name)
        if where is not None:
            raise Conflict(f'the key "{name}" is not in the keys file ({where})')

    def _refuse_last_admin(self, key: Key) -> None:
        """See that somebody is left who can administer."""
        today = datetime.now(UTC).date()
        others = (
            other
            for other in self._inside.doors.ring.keys
            if other.role is Role.ADMIN
            and other.name != key.name
            and not other.has_expired(today)
        )
        if key.role is Role.ADMIN and not any(others):
            raise Conflict(f'"{key.name}" is the last key of the role admin')

    def _elsewhere(self) -> dict[str, str]:
        """Keys that the configuration or a first start has made, and which of both."""
        daemon = self._inside.daemon
        if daemon is None:
            return {}
        if daemon.has_first_keys:
            return {"admin": "state", "user": "state"}
        given = daemon.loaded.config.server.api_key
        roles = {"admin": given.admin, "user": given.user}
        return {role: "config" for role, secret in roles.items() if secret is not None}

    # Doing it.

    async def _edit(self, edit: Callable[[], _T]) -> _T:
        """Change the file in a thread, and put it into force.

        Raises:
            ApiError: it cannot be changed so.
        """
        try:
            done = await asyncio.to_thread(edit)
        except LineError as error:
            raise InvalidRequest(str(error)) from error
        except (EditError, KeysError) as error:
            raise Conflict(str(error)) from error
        if self._inside.doors.ring.poll():
            self._daemon().keys_changed()
        return done

    async def _with_secret(
        self, name: str, secret: str, *, is_own: bool = False
    ) -> web.Response:
        key = await self._entry(name)
        return told({"secret": secret, "is_own": is_own, "key": key}, status=201)

    # Telling.

    async def _entry(self, name: str) -> dict[str, Any] | None:
        sources = await self._sources()
        for key in self._inside.doors.ring.keys:
            if key.name == name:
                return self._told(key, sources)
        return None  # its file was changed by somebody else meanwhile

    async def _sources(self) -> Mapping[str, str]:
        """Where each key comes from, by its name."""
        daemon = self._inside.daemon
        ring = self._inside.doors.ring
        if daemon is None:
            return {}
        config = daemon.loaded.config
        if config.auth.api_keys is not None:
            return {key.name: "environment" for key in ring.keys}
        path = daemon.keys_file
        try:
            lines = await asyncio.to_thread(list_keys, path)
        except (EditError, KeysError):
            lines = ()
        in_file = {line.key.name: "file" for line in lines}
        return {key.name: "swap" for key in ring.keys} | in_file | self._elsewhere()

    def _told(self, key: Key, sources: Mapping[str, str]) -> dict[str, Any]:
        source = sources.get(key.name, "file")
        allowances, today = self._inside.allowances, datetime.now(UTC).date()
        return {
            "name": key.name,
            "role": key.role.value,
            "models": list(key.models),
            "rps": key.rps,
            "burst": key.burst,
            "tpm": key.tpm,
            "concurrency": key.concurrency,
            "daily_tokens": key.daily_tokens,
            "priority": key.priority,
            "expires": None if key.expires is None else key.expires.isoformat(),
            "expired": key.has_expired(today),
            "source": source,
            "can_change": source == "file",
            "in_flight": allowances.in_flight(key.name),
            "tokens_today": allowances.used_today(key.name, time.time()),
        }


def _options(values: Mapping[str, Any]) -> dict[str, str | None]:
    """Options as the keys file writes them; None for those that shall not be there.

    Raises:
        InvalidRequest: one is of another type, or no date.
    """
    options: dict[str, str | None] = {}
    for name, kind in _MEMBERS.items():
        if name not in values:
            continue
        if name == "models" and isinstance(values[name], str):  # as in the keys file
            values = {**values, name: values[name].split(",")}
        value = member(values, name, kind)
        options[name] = None if value is None else _written(name, value)
    return options


def _written(name: str, value: Any) -> str | None:
    if name == "models":
        if not all(isinstance(glob, str) for glob in value):
            raise InvalidRequest('"models" must be a list of text', param=name)
        # One that is empty would vanish between its commas, and no pattern is all.
        if not all(value) or any("," in glob for glob in value):
            raise InvalidRequest(
                '"models" must be a list of patterns, each without a comma', param=name
            )
        return ",".join(value) or None
    if name == "expires":
        try:
            return last_day(value, datetime.now(UTC).date())
        except LineError as error:
            raise InvalidRequest(f'"expires": {error}', param=name) from error
    if name == "priority" and not value:
        return None
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return str(value)
