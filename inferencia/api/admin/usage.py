"""``/admin/api/usage``: what was used, by key, model, backend, hour or day."""

import dataclasses
import sqlite3
import time
from collections.abc import Sequence

from aiohttp import web

from inferencia.api.admin.asking import told
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
        query = request.query
        by = _by(query.get("by", "key"))
        form = query.get("format", "json")
        if form not in _FORMATS:
            raise InvalidRequest('"format" is json or csv', param="format")
        since, until = _moment(request, "since"), _moment(request, "until")
        key = query.get("key") or None

        def job(
            connection: sqlite3.Connection,
        ) -> tuple[list[UsageRow], list[UsageRow]]:
            def of(by: Sequence[By]) -> list[UsageRow]:
                return report(connection, by, since=since, until=until, key=key)

            return of(by), of(())

        state = self._inside.usage.state
        rows: Sequence[UsageRow] = ()
        total: Sequence[UsageRow] = ()
        if state.is_on:
            try:
                rows, total = await self._inside.usage.ask(job)
            except UsageUnavailable as error:
                raise BackendUnavailable(str(error), retry_after=5) from error
        if form == "csv":
            return _csv(as_csv(rows, by), by)
        return told(
            {
                "by": list(by),
                "since": since,
                "until": until,
                "rows": [row.as_dict(by) for row in rows],
                "total": (total[0] if total else NOTHING).as_dict(()),
                "usage": dataclasses.asdict(state),
            }
        )


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
