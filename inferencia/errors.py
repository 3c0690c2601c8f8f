"""What can go wrong, in the words that a client reads.

Every refusal or failure that reaches a client is one of these exceptions. Each class
says what happened and carries the status, ``type`` and ``code`` of the answer; the
message names the thing, the value and the next step. How an error becomes bytes is
decided here too (``body`` and ``event``), so that a refusal looks the same as JSON,
inside a stream, and from the parser of malformed requests.

The shape is OpenAI's: https://platform.openai.com/docs/guides/error-codes
"""

import json
import math
import re
from collections.abc import Mapping


class ApiError(Exception):
    """A failure with a status and a shape that OpenAI's clients understand."""

    status: int = 500
    type: str = "server_error"
    code: str | None = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe one failure.

        Args:
            message: what happened and what to do, for the person who reads it.
            param: the request's field that is at fault.
            retry_after: seconds after which trying again makes sense; rounded up to
                whole seconds, at least one (RFC 9110, 10.2.3).
            headers: further response headers, such as ``Allow``.
        """
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def fields(self) -> dict[str, object]:
        """The members of the ``error`` object: these four, in this order."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }

    def body(self, *, anthropic: bool = False) -> bytes:
        """The error as a JSON body.

        Args:
            anthropic: also say ``"type": "error"``, as Anthropic's clients expect on
                ``/v1/messages`` (https://docs.anthropic.com/en/api/errors).
        """
        body: dict[str, object] = {"type": "error"} if anthropic else {}
        return json.dumps(body | {"error": self.fields()}).encode()

    def event(self, *, anthropic: bool = False) -> bytes:
        """The error as one server-sent event, for a stream that has begun."""
        name = b"event: error\n" if anthropic else b""
        return name + b"data: " + self.body(anthropic=anthropic) + b"\n\n"


class InvalidRequest(ApiError):
    """The request cannot be understood or lacks something."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidJson(InvalidRequest):
    """The body is not the JSON object that it should be."""

    code = "invalid_json"


class InvalidConfig(InvalidRequest):
    """A configuration cannot be loaded as it is."""

    code = "invalid_config"


class InvalidApiKey(ApiError):
    """No key, an unknown one, or one that has expired."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(ApiError):
    """The key is good, but its role may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(ApiError):
    """There is nothing at this path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No such model, or none that this key may see."""

    code = "model_not_found"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        lists: bool = False,
        doubt: str = "",
    ) -> None:
        """Describe it.

        Args:
            message: what is not there.
            param: the request's field that names it.
            lists: also say where all models are listed; see ``at``.
            doubt: a last sentence: why the message may not be the whole truth.
        """
        super().__init__(message, param=param)
        self._sentences = (message, doubt) if lists else None
        self.at("/v1/models")

    def at(self, listing: str) -> None:
        """Let it name another list: the one that its reader can ask for.

        Args:
            listing: the path.
        """
        if self._sentences is not None:
            message, doubt = self._sentences
            told = f"{message} GET {listing} lists all. {doubt}"
            self.message = told.rstrip()


class MethodNotAllowed(ApiError):
    """The path exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(ApiError):
    """The body did not come in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class RequestAborted(ApiError):
    """Somebody who may do so has ended the request while it ran."""

    status = 409
    type = "invalid_request_error"
    code = "request_aborted"


class Conflict(ApiError):
    """It cannot be done as things are now."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class RequestTooLarge(ApiError):
    """The body exceeds ``server.max_body``."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedEncoding(ApiError):
    """The request body is compressed."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_encoding"


class UnsupportedMediaType(ApiError):
    """The request body is of another kind than the one that is taken here."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RateLimitExceeded(ApiError):
    """Too many requests, too many at once, or too many failed logins."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class InsufficientQuota(RateLimitExceeded):
    """The key has used its tokens for today."""

    code = "insufficient_quota"


class InternalError(ApiError):
    """Our own fault."""


class InsufficientStorage(ApiError):
    """The disk has no room for what was sent."""

    status = 507
    code = "insufficient_storage"


class BackendError(ApiError):
    """The backend spoke nonsense, redirected, or broke before its first byte."""

    status = 502
    type = "backend_error"
    code: str | None = "backend_error"


class BackendAuthFailed(BackendError):
    """The backend refuses the key that we hold for it."""

    code = "backend_auth_failed"


class LoopDetected(BackendError):
    """The request has been here before (``Via``)."""

    code = "loop_detected"


class BackendUnavailable(BackendError):
    """Every backend that serves the model is down or cannot be reached."""

    status = 503
    code = "backend_unavailable"


class ModelLoadFailed(BackendUnavailable):
    """The engine could not load the model."""

    code = "model_load_failed"


class ShuttingDown(BackendUnavailable):
    """The daemon drains and takes no new work."""

    code = "shutting_down"


class Overloaded(BackendUnavailable):
    """We have no room: for a request body, a connection, or a socket to a backend."""

    code = "overloaded"


class QueueFull(BackendUnavailable):
    """All backends are busy, and as many requests wait for them as may."""

    code = "queue_full"


class QueueTimeout(BackendUnavailable):
    """All backends were busy for as long as a request may wait for them."""

    code = "queue_timeout"


class BackendTimeout(BackendError):
    """The backend was silent for longer than it may."""

    status = 504
    code = "backend_timeout"


# A backend's code that may stand in a log and as a label: a name, and no sentence.
_PLAIN_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")


class PassedError(BackendError):
    """A backend's own error answer, passed on with its status."""

    def __init__(
        self,
        status: int,
        error: Mapping[str, object],
        *,
        retry_after: str | None = None,
        original: bytes | None = None,
    ) -> None:
        """Take over what the backend said.

        Args:
            status: the backend's, 400 to 599.
            error: the members of its ``error`` object, all four of ours among them.
            retry_after: its ``Retry-After`` header, passed on as it is.
            original: the backend's whole body, if it has OpenAI's shape already.
        """
        super().__init__(str(error["message"]))
        self.status = status
        self.type = str(error["type"])
        # What it is counted as; the client gets what the backend said.
        code = str(error["code"])
        self.code = code if _PLAIN_CODE.fullmatch(code) else "passed_error"
        self._error = dict(error)
        self._original = original
        if retry_after is not None:
            self.headers["Retry-After"] = retry_after

    def fields(self) -> dict[str, object]:
        return self._error

    def body(self, *, anthropic: bool = False) -> bytes:
        if self._original is not None and not anthropic:
            return self._original
        return super().body(anthropic=anthropic)

    def event(self, *, anthropic: bool = False) -> bytes:
        # An event is one line; the original may have several.
        self._original = None
        return super().event(anthropic=anthropic)
