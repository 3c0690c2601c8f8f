"""What a backend's error answer becomes for the client: an error in OpenAI's shape.

Each engine has a shape of its own for errors. What it said reaches the client, in the
members that OpenAI's clients read, and untouched where it has them all already. What is
our fault or the backend's, and not the client's, is not passed on as if it were.
"""

from typing import Any

from inferencia.backends.base import Backend
from inferencia.backends.listing import parse_json
from inferencia.errors import ApiError, BackendAuthFailed, BackendError, PassedError
from inferencia.upstream.answer import Answer

_DEFAULT_TYPES = {
    400: ("invalid_request_error", "invalid_request"),
    404: ("invalid_request_error", "not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}


def error_answer(backend: Backend, answer: Answer, body: bytes) -> ApiError:
    """What an answer that is no success becomes for the client.

    A refused key is ours, not the client's, and a redirect would lead past us; both
    are the backend's failure. Other errors keep their status and what they say.
    """
    status = answer.status
    if status in (401, 407):
        return BackendAuthFailed(
            f'backend "{backend.name}" refuses the API key that this server has for it'
        )
    if not 400 <= status <= 599:
        return BackendError(
            f'backend "{backend.name}" answered with status {status}, which cannot be '
            "passed on"
        )
    return error_answer_of(
        backend, status, body, retry_after=answer.header("retry-after")
    )


def error_answer_of(
    backend: Backend, status: int, body: bytes, *, retry_after: str | None = None
) -> PassedError:
    """A backend's error body in OpenAI's shape; unchanged where it has it already."""
    said = _said(body)
    kind, code = _DEFAULT_TYPES.get(
        status,
        ("backend_error", "backend_error")
        if status >= 500
        else ("invalid_request_error", None),
    )
    error: dict[str, Any] = {
        "message": f'backend "{backend.name}" answered {status}',
        "type": kind,
        "param": None,
        "code": code,
    }
    if isinstance(said, str) and said:
        error["message"] = said
    elif isinstance(said, dict):
        error |= {name: value for name, value in said.items() if name != "code"}
        given = said.get("code")
        if isinstance(given, str):
            error["code"] = given
        elif error["type"] != kind:
            # llama-server's code is the status once more; its type says what it is.
            error["code"] = error["type"]
    is_whole = isinstance(said, dict) and all(
        name in said and error[name] == said[name] for name in _ERROR_MEMBERS
    )
    return PassedError(
        status, error, retry_after=retry_after, original=body if is_whole else None
    )


_ERROR_MEMBERS = ("message", "type", "param", "code")
_MAX_DETAILS = 8


def _said(body: bytes) -> dict[str, Any] | str | None:
    """What an error body says: the members of its error, or a sentence.

    Known shapes: OpenAI's; ``{"error": "text"}`` of mlx_lm and Ollama; vLLM's older
    one without ``error``; FastAPI's ``detail``; plain text.
    """
    try:
        document = parse_json(body)
    except ValueError:
        text = body[:500].decode("utf-8", "replace").strip()
        return text if text and text.isprintable() and "<" not in text else None
    if not isinstance(document, dict):
        return None
    error = document.get("error", document)
    if isinstance(error, str):
        return error
    if not isinstance(error, dict):
        return None
    if not isinstance(error.get("message"), str):
        return _detail(error.get("detail"))
    if not isinstance(error.get("type", ""), str):
        return str(error["message"])
    return dict(error)


def _detail(detail: Any) -> str | None:
    """FastAPI's ``detail``: a sentence, or what is wrong with each field."""
    if isinstance(detail, str):
        return detail
    if not isinstance(detail, list):
        return None
    found = []
    for item in detail[:_MAX_DETAILS]:
        if isinstance(item, dict) and isinstance(item.get("msg"), str):
            where = item.get("loc")
            parts = where if isinstance(where, list) else []
            path = ".".join(str(part) for part in parts[:_MAX_DETAILS])
            found.append(f"{path}: {item['msg']}" if path else str(item["msg"]))
    return "; ".join(found) or None
