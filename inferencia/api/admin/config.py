"""``/admin/api/config``: the configuration's text, checked, saved, put into force.

The text goes out without its secrets and comes back with stars in their places
(``configedit``). What is saved was loaded first, exactly as a start would load it.
"""

import asyncio
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from inferencia import yamlfile
from inferencia.api.admin.asking import asked, member, needed, told
from inferencia.api.admin.inside import CannotLoad, Daemon, Inside
from inferencia.api.route import Route
from inferencia.configedit import (
    PROTECTED,
    NotThere,
    at_next_start,
    masked,
    protected,
    reaching_out,
    restored,
)
from inferencia.errors import Conflict, Forbidden, InvalidConfig
from inferencia.keys import Role
from inferencia.rewriting import OwnerLost, rewrite
from inferencia.yamlfile import YamlError

BACKUP_SUFFIX = ".bak"

# "path.to.key: message"; a path has no blanks, but for names in brackets.
_PROBLEM = re.compile(r"((?:[A-Za-z_][^\s:]*|\[[^]]*\])+): (.*)", re.DOTALL)
_LINE = re.compile(r"line (\d+)")


class Wrong(InvalidConfig):
    """A configuration with errors, each of which is told."""

    def __init__(self, problems: Sequence[str], text: str) -> None:
        super().__init__("\n".join(problems))
        self._problems = _told_apart(problems, text)

    def fields(self) -> dict[str, object]:
        return super().fields() | {"problems": self._problems}


class Protected(Forbidden):
    """Parts were changed that may not be changed over HTTP."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(
            "these may not be changed over HTTP unless admin.edit_commands is true: "
            + ", ".join(paths)
        )
        self._paths = list(paths)

    def fields(self) -> dict[str, object]:
        return super().fields() | {"protected": self._paths}


@dataclass(frozen=True, slots=True)
class _Checked:
    """What there is to say of a text that was sent."""

    content: str  # with its secrets
    errors: Sequence[str]
    warnings: Sequence[str] = ()
    protected: Sequence[str] = ()
    restart: Sequence[str] = ()


class ConfigApi:
    """The configuration, and what puts it into force."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._saving = asyncio.Lock()

    def routes(self) -> tuple[Route, ...]:
        def route(method: str, path: str, handler: Any) -> Route:
            return Route("admin", method, f"/admin/api{path}", Role.ADMIN, handler)

        return (
            route("GET", "/config", self.read),
            route("PUT", "/config", self.save),
            route("POST", "/config/check", self.check),
            route("POST", "/reload", self.reload),
            route("POST", "/restart", self.restart),
        )

    async def read(self, request: web.Request) -> web.Response:
        daemon, path = self._daemon(), self._path()
        answer: dict[str, Any] = {
            "path": None,
            "text": "",
            "revision": None,
            "can_save": False,
            "edit_commands": self._inside.config.admin.edit_commands,
            "protected": list(PROTECTED),
            "warnings": list(daemon.loaded.warnings),
        }
        if path is not None:
            answer |= await asyncio.to_thread(_shown, path)
        return told(answer)

    async def check(self, request: web.Request) -> web.Response:
        values = await asked(request, self._inside.bodies, ("text",))
        text: str = needed(values, "text", str)
        path = self._file()
        original = await asyncio.to_thread(_content, path)
        checked = await asyncio.to_thread(self._checked, text, original)
        return told(
            {
                "ok": not checked.errors,
                "errors": _told_apart(checked.errors, text),
                "warnings": _told_apart(checked.warnings, text),
                "protected": list(checked.protected),
                "restart": list(checked.restart),
                "diff": await asyncio.to_thread(_diff, original, checked.content),
            }
        )

    async def save(self, request: web.Request) -> web.Response:
        known = ("text", "revision", "reload")
        values = await asked(request, self._inside.bodies, known)
        text: str = needed(values, "text", str)
        revision, reload = (
            member(values, "revision", str),
            member(values, "reload", bool),
        )
        path = self._file()
        async with self._saving:
            original = await asyncio.to_thread(_content, path)
            if revision is not None and revision != _revision(original):
                raise Conflict(f"{path} was changed since you read it; read it again")
            checked = await asyncio.to_thread(self._checked, text, original)
            if checked.errors:
                raise Wrong(checked.errors, text)
            if checked.protected and not self._inside.config.admin.edit_commands:
                raise Protected(checked.protected)
            backup = await self._write(path, original, checked.content)
        problems: Sequence[str] = ()
        if reload:
            problems = self._without_file(await self._daemon().reload())
        return told(
            {
                "revision": _revision(checked.content),
                "backup": str(backup),
                "reloaded": bool(reload) and not problems,
                "problems": _told_apart(problems, text),
                "restart": list(checked.restart),
            }
        )

    async def reload(self, request: web.Request) -> web.Response:
        await asked(request, self._inside.bodies, ())
        problems = self._without_file(await self._daemon().reload())
        if problems:
            raise Wrong(problems, await self._text())
        return told({"reloaded": True, "problems": []})

    async def restart(self, request: web.Request) -> web.Response:
        await asked(request, self._inside.bodies, ())
        daemon = self._daemon()
        try:
            await asyncio.to_thread(daemon.check)
        except CannotLoad as error:
            raise Wrong(error.problems, await self._text()) from error
        daemon.restart()
        return told({"restarting": True}, status=202)

    def _daemon(self) -> Daemon:
        daemon = self._inside.daemon
        if daemon is None:
            raise Conflict("there is no configuration here")
        return daemon

    def _path(self) -> Path | None:
        return self._daemon().loaded.source

    def _file(self) -> Path:
        path = self._path()
        if path is None:
            raise Conflict(
                "there is no configuration file; make one with: inferencia init"
            )
        return path

    async def _text(self) -> str:
        """What is in the file now; nothing if that cannot be read."""
        path = self._path()
        try:
            return "" if path is None else await asyncio.to_thread(_content, path)
        except Conflict:
            return ""

    def _without_file(self, problems: Sequence[str]) -> list[str]:
        """Problems as they are told beside the text, where its name says nothing."""
        return [problem.removeprefix(f"{self._path()}: ") for problem in problems]

    def _checked(self, text: str, original: str) -> _Checked:
        """Load what was sent, and compare it with what is there; blocks."""
        if "\r\n" in original and "\r" not in text:  # a page's text field drops them
            text = text.replace("\n", "\r\n")
        try:
            sent = _tree(text)  # first: in half a text nothing stands at its place
            content = restored(text, original)
            new = _tree(content)
            if untold := self._untold(sent, original, new):
                return _Checked(content, (), protected=untold)
            loaded = self._daemon().check(content.encode())
        except NotThere as error:
            return _Checked(text, error.problems)
        except YamlError as error:
            return _Checked(text, (str(error),))
        except UnicodeEncodeError:
            return _Checked(text, ("it holds half a character",))
        except CannotLoad as error:
            return _Checked(content, error.problems)
        old = _tree_or_nothing(original)
        return _Checked(
            content,
            (),
            loaded.warnings,
            protected(sent, old, new, is_swap=loaded.is_swap),
            at_next_start(old, new),
        )

    def _untold(
        self, sent: yamlfile.Node, original: str, new: yamlfile.Node
    ) -> Sequence[str]:
        """What is protected in a text that is not even loaded, for it names files or
        variables: their content would be in the errors."""
        if self._inside.config.admin.edit_commands:
            return ()
        old, is_swap = _tree_or_nothing(original), self._daemon().loaded.is_swap
        if not reaching_out(old, new):
            return ()
        return protected(sent, old, new, is_swap=is_swap)

    async def _write(self, path: Path, original: str, content: str) -> Path:
        """Save, with what was there beside it."""
        real = _followed(path)
        backup = real.with_name(real.name + BACKUP_SUFFIX)

        def write() -> None:
            if backup.is_symlink():
                raise OSError(0, "it is a link", str(backup))
            rewrite(backup, _bytes(original), like=real)
            rewrite(real, _bytes(content))

        try:
            await asyncio.to_thread(write)
        except OwnerLost as error:
            raise Conflict(str(error)) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise Conflict(f"{real} cannot be written: {reason}") from error
        return backup


def _followed(path: Path) -> Path:
    """The file itself, where a link leads to it."""
    return Path(os.path.realpath(path))


def _content(path: Path) -> str:
    """What is in the file; bytes that are no UTF-8 come back by ``_bytes``.

    Raises:
        Conflict: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(yamlfile.MAX_BYTES + 1)
    except OSError as error:
        raise Conflict(f"{path} cannot be read: {error.strerror}") from error
    return data.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _revision(content: str) -> str:
    return hashlib.sha256(_bytes(content)).hexdigest()[:16]


def _shown(path: Path) -> Mapping[str, Any]:
    content = _content(path)
    shown = masked(content).encode("utf-8", "replace").decode("utf-8")
    return {
        "path": str(path.absolute()),
        "text": shown,
        "revision": _revision(content),
        "can_save": os.access(_followed(path).parent, os.W_OK),
    }


def _tree(text: str) -> yamlfile.Node:
    return yamlfile.parse(_bytes(text), merge_keys=True).root


def _tree_or_nothing(text: str) -> yamlfile.Node:
    """Of a file that somebody has spoiled nothing: all that is sent is new."""
    try:
        return _tree(text)
    except YamlError:
        return yamlfile.Mapping()


def _told_apart(problems: Iterable[str], text: str) -> list[dict[str, Any]]:
    """Each ``path.to.key: message`` in its parts, with its line in the text."""
    root = _tree_or_nothing(text)
    return [_problem(problem, root) for problem in problems]


def _problem(problem: str, root: yamlfile.Node) -> dict[str, Any]:
    found = _PROBLEM.fullmatch(problem)
    line = _LINE.match(problem)
    if found is None or line is not None:
        number = int(line[1]) if line is not None else None
        return {"path": "", "message": problem, "line": number}
    where = yamlfile.line_of(root, found[1])
    return {"path": found[1], "message": found[2], "line": where}


def _diff(original: str, content: str) -> str:
    """What would change, without secrets, as ``diff -u`` shows it."""
    before, after = masked(original).splitlines(), masked(content).splitlines()
    lines: Iterable[str] = difflib.unified_diff(
        before, after, "saved", "new", lineterm=""
    )
    text = "".join(f"{line}\n" for line in lines)
    return text.encode("utf-8", "replace").decode("utf-8")
