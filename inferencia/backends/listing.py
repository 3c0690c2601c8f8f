"""Reading the model list of a server that is not trusted.

Pure. A list is bounded in bytes, entries and the length of a name; entries that are not
usable are left out, and only a body that is no list at all is refused.
"""

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# OpenRouter's list, the longest that we know, is half a MiB.
MAX_LIST_BYTES = 4 * 1024 * 1024
MAX_MODELS = 10_000
MAX_ID_LENGTH = 256

# A model: the server's own name for it, and its record.
Record = tuple[str, Mapping[str, Any]]


def base_name(model_id: str) -> str:
    """The last part of a model id that is an absolute file path; else the id.

    mlx_lm and llama-server name a model by where its file lies. That is nothing that
    clients should have to type or see. (A Windows machine may serve models too.)
    """
    if model_id.startswith("/"):
        return PurePosixPath(model_id).name or model_id
    if re.match(r"[A-Za-z]:[\\/]", model_id):
        return PureWindowsPath(model_id).name or model_id
    return model_id


def read_list(body: bytes) -> list[Record] | None:
    """The ids and records of ``{"data": [{"id": ...}, ...]}``.

    Entries without a usable id are left out, and so is what exceeds ``MAX_MODELS``.
    None if the body is not of that shape.
    """
    return read_records(body, "data", "id")


def read_records(body: bytes, member: str, id_member: str) -> list[Record] | None:
    """``read_list`` for a list whose members have other names."""
    try:
        document = parse_json(body)
    except ValueError:
        return None
    entries = document.get(member) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        return None
    return [
        (entry[id_member], entry)
        for entry in entries[:MAX_MODELS]
        if isinstance(entry, dict) and is_usable_id(entry.get(id_member))
    ]


def is_usable_id(value: object) -> bool:
    """Whether a value can be a model's name: short, and printable in any output."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_ID_LENGTH
        and (value.isprintable())
    )


def is_loading_error(status: int, body: bytes) -> bool:
    """Whether an answer is llama-server's way of saying that it loads its model."""
    if status != 503:
        return False
    try:
        document = parse_json(body)
    except ValueError:
        return False
    error = document.get("error") if isinstance(document, dict) else None
    return isinstance(error, dict) and error.get("type") == "unavailable_error"


def parse_json(body: bytes) -> Any:
    """Decode JSON from a server that is not trusted.

    Raises:
        ValueError: it is not JSON, also because of NaN, its depth, or its encoding.
    """
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("too deep") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
