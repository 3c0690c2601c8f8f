"""``/admin/api/usage``: what was used, by key, model, backend, hour, day or week.

A year by day and key is thousands of rows. They become text in the database's thread,
a row at a time, so that the event loop waits for none of it.
"""

import dataclasses
import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from inferencia.api.admin.asking import told_text
from inferencia.api.admin.inside import Inside
from inferencia.api.route import Route
from inferencia.errors import BackendUnavailable, InvalidRequest
from inferencia.keys import Role
from inferencia.quantities import moment
from inferencia.usagereport import BY, NOTHING, By, UsageRow, as_csv, report
from inferencia.usagewriter import UsageUnavailable

_FORMATS = ("json", "csv")


class UsageApi:
    """Everybody's usage."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside

    def routes(self) -> tuple[Route, ...]:
        return (Route("admin", "GET", "/admin/api/usage", Role.ADMIN, self.usage),)

    async def usage(self, request: web.Request) -> web.Response:
        asked = _Asked.of(request)
        form = asked.as_csv if request.query.get("format") == "csv" else asked.as_json
        if self._inside.usage.state.is_on:
            try:
                text = await self._inside.usage.ask(lambda db: form(asked.rows(db)))
            except UsageUnavailable as error:
                raise BackendUnavailable(str(error), retry_after=5) from error
        else:
            text = form(([], []))
        if form == asked.as_csv:
            return _csv(text, asked.by)
        # As it is now: what has been asked for was put into the database before.
        usage = json.dumps(dataclasses.asdict(self._inside.usage.state))
        return told_text(f'{text[:-1]}, "usage": {usage}}}')


_Rows = tuple[Sequence[UsageRow], Sequence[UsageRow]]  # by group, and all together


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request wants to know."""

    by: tuple[By, ...]
    since: float | None  # seconds since 1970
    until: float | None
    key: str | None

    @classmethod
    def of(cls, request: web.Request) -> "_Asked":
        query = request.query
        if query.get("format", "json") not in _FORMATS:
            raise InvalidRequest('"format" is json or csv', param="format")
        return cls(
            _by(query.get("by", "key")),
            _moment(request, "since"),
            _moment(request, "until"),
            query.get("key") or None,
        )

    def rows(self, connection: sqlite3.Connection) -> _Rows:
        def of(by: Sequence[By]) -> Sequence[UsageRow]:
            return report(
                connection, by, since=self.since, until=self.until, key=self.key
            )

        return of(self.by), of(())

    def as_csv(self, found: _Rows) -> str:
        return as_csv(found[0], self.by)

    def as_json(self, found: _Rows) -> str:
        """An object; rows are encoded one by one, so that other threads go on."""
        rows, total = found
        head = {"by": self.by, "since": self.since, "until": self.until}
        encoded = ", ".join(json.dumps(row.as_dict(self.by)) for row in rows)
        sums = json.dumps((total[0] if total else NOTHING).as_dict(()))
        return f'{json.dumps(head)[:-1]}, "rows": [{encoded}], "total": {sums}}}'


def _by(text: str) -> tuple[By, ...]:
    names = [name.strip() for name in text.split(",")]
    by = tuple(one for name in names for one in BY if one == name)
    if len(by) != len(names) or len(set(by)) != len(by):
        raise InvalidRequest(
            f'"by" is one or more of {", ".join(BY)}, separated by commas', param="by"
        )
    return by


def _moment(request: web.Request, name: str) -> float | None:
    text = request.query.get(name, "").strip()
    if not text:
        return None
    try:
        return moment(text, time.time())
    except ValueError as error:
        raise InvalidRequest(f'"{name}": {error}', param=name) from error


def _csv(text: str, by: Sequence[By]) -> web.Response:
    name = "-".join(("usage", *by))
    headers = {
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": f'attachment; filename="{name}.csv"',
    }
    return web.Response(text=text, content_type="text/csv", headers=headers)
