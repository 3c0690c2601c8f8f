"""``/api/metrics/activity``: pages of requests, from the record of usage.

Each row is what llama-swap's page shows of a request. There is nothing of what was
said in it, and there are no captures.
"""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from inferencia.errors import InvalidRequest, NotFound
from inferencia.usage import UsageBook
from inferencia.usagewriter import UsageUnavailable

_DEFAULT_LIMIT, _MAX_LIMIT = 25, 999
_MAX_NUMBER = 2**63 - 1
_MAX_MODELS = 64

# What pages may be sorted by, and the columns that stand behind it.
_SORTS = {
    "id": "entry",
    "timestamp": "started",
    "model": "model",
    "req_path": "endpoint",
    "resp_status_code": "status",
    "duration_ms": "duration",
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "cache_tokens": "cached_tokens",
    "tokens_per_second": "tokens_per_second",
}
_COLUMNS = tuple(
    "entry id started key model endpoint stream status prompt_tokens completion_tokens "
    "cached_tokens tokens_per_second first_byte duration error".split()
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a query asks for."""

    where: str
    values: tuple[Any, ...]
    order: str
    page: int
    limit: int


async def activity(request: web.Request, usage: UsageBook) -> web.Response:
    """One page of requests that have ended.

    Raises:
        InvalidRequest: the query cannot be understood.
        NotFound: usage is not recorded.
    """
    asked = _asked(request)
    try:
        total, rows = await usage.ask(lambda connection: _read(connection, asked))
    except UsageUnavailable as error:
        raise NotFound(f"there is no record of requests: {error}") from error
    return web.json_response(
        {
            "data": [_shown(row) for row in rows],
            "page": asked.page,
            "limit": asked.limit,
            "total": total,
            "total_pages": -(-total // asked.limit),
        }
    )


def _asked(request: web.Request) -> Asked:
    query = request.query
    conditions: list[str] = ["1"]
    values: list[Any] = []
    models = query.getall("model", [])[:_MAX_MODELS]
    if models:
        conditions.append(f"model IN ({', '.join('?' * len(models))})")
        values += models
    limits: tuple[tuple[str, str, Callable[[str, str], float]], ...] = (
        ("start", "started >= ?", _moment),
        ("end", "started <= ?", _moment),
        ("min_id", "entry >= ?", _number),
        ("max_id", "entry <= ?", _number),
    )
    for name, condition, read in limits:
        if name in query:
            conditions.append(condition)
            values.append(read(name, query[name]))
    column = _SORTS.get(query.get("sort", "id"))
    order = query.get("order", "desc").lower()
    if column is None or order not in ("asc", "desc"):
        raise InvalidRequest(f'"sort" may be {", ".join(_SORTS)}; "order" asc or desc')
    limit = _number("limit", query.get("limit", str(_DEFAULT_LIMIT)))
    page = _number("page", query.get("page", "1"))
    if not 1 <= limit <= _MAX_LIMIT or not 1 <= page < 2**31:
        raise InvalidRequest(f'"limit" is 1 to {_MAX_LIMIT}, "page" 1 or more')
    return Asked(
        " AND ".join(conditions),
        tuple(values),
        f"{column} {order}, entry {order}",
        page,
        limit,
    )


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 19:
        raise InvalidRequest(f'"{name}" must be a whole number', param=name)
    return min(int(text), _MAX_NUMBER)


def _moment(name: str, text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(
            f'"{name}" must be a time such as 2027-01-31T12:00:00Z', param=name
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _read(connection: sqlite3.Connection, asked: Asked) -> tuple[int, Sequence[Any]]:
    where, values = asked.where, asked.values
    counted = connection.execute(
        f"SELECT count(*) FROM requests WHERE {where}", values
    ).fetchone()
    rows = connection.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM requests WHERE {where} "
        f"ORDER BY {asked.order} LIMIT ? OFFSET ?",
        (*values, asked.limit, (asked.page - 1) * asked.limit),
    ).fetchall()
    return int(counted[0]), rows


def _shown(row: Sequence[Any]) -> dict[str, Any]:
    one = dict(zip(_COLUMNS, row, strict=True))
    began = datetime.fromtimestamp(one["started"], UTC)
    prompt, first_byte = one["prompt_tokens"], one["first_byte"]
    # What a stream waits for before its first byte is mostly the reading of the prompt.
    reads = prompt / first_byte if one["stream"] and prompt and first_byte else None
    shown = {
        "id": one["entry"],
        "timestamp": began.isoformat(timespec="milliseconds"),
        "model": one["model"] or "",
        "req_path": one["endpoint"] or "",
        "resp_content_type": "text/event-stream" if one["stream"] else "",
        "resp_status_code": one["status"] or 0,
        "tokens": {
            "cache_tokens": _or_unknown(one["cached_tokens"]),
            "draft_tokens": -1,
            "draft_acc_tokens": -1,
            "input_tokens": prompt or 0,
            "output_tokens": one["completion_tokens"] or 0,
            "prompt_per_second": _or_unknown(reads),
            "tokens_per_second": _or_unknown(one["tokens_per_second"]),
        },
        "duration_ms": int((one["duration"] or 0) * 1000),
        "has_capture": False,
        "metadata": {"key": one["key"] or "", "request_id": one["id"]},
    }
    if one["error"]:
        shown["error_msg"] = one["error"]
    return shown


def _or_unknown(value: Any) -> Any:
    return -1 if value is None else value
