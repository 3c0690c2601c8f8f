"""The text fields of a multipart form, found without copying the files in it.

Audio and image requests come as ``multipart/form-data`` (RFC 7578), and the model's
name is one field among files of many megabytes. The body goes upstream byte for byte;
when the name has to change, only that field's bytes do.

The engine behind us reads the same bytes with a parser of its own, and the two must
agree on which model is meant, or a key could reach a model that it may not see. So
whatever parsers are known to read differently is refused: bare line feeds, text before
the first or after the last delimiter, the boundary inside a part, escapes in a field's
name, a second ``name``, encoded text. No real client sends any of it.
"""

import re
from dataclasses import dataclass, field

from inferencia.errors import InvalidRequest

MAX_PARTS = 128  # OpenAI's largest form has 16 images and about 15 fields
MAX_HEAD_BYTES = 16 * 1024  # of one part: a disposition with a long file name
MAX_TEXT_BYTES = 64 * 1024  # longer fields pass, but are not looked at
MAX_MODEL_BYTES = 1024

# Fields that this program acts on; of two, an engine might take either.
_SINGLE = frozenset({"model", "stream", "response_format"})

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
_FORM = re.compile(r"[ \t]*multipart/form-data[ \t]*(;|$)", re.IGNORECASE)
_PARAMETER = re.compile(
    rf';[ \t]*({_TOKEN})=({_TOKEN}|"(?:[^"\\\r\n\x00]|\\[^\r\n\x00])*")[ \t]*'
)
# RFC 2046, 5.1.1, and the other signs that clients make boundaries of.
_BOUNDARY = re.compile(r"[!#-\[\]-~ ]{0,69}[!#-\[\]-~]")
_FIELD = re.compile(rf"({_TOKEN}):[ \t]*([^\r\n\x00]*?)[ \t]*")
_DISPOSITION = re.compile(r"form-data[ \t]*(?=;|$)", re.IGNORECASE)
_NAME_PARAMETER = re.compile(r"[;\s]name[ \t]*\*?[ \t]*=", re.IGNORECASE)
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\"\\%]")
_CONTENT_LENGTH = re.compile(rb"(?i)(\r\ncontent-length:[ \t]*)\d+")


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one part lies in the body, and what its head says."""

    name: str
    is_file: bool
    head: int  # first byte behind the delimiter's own CRLF, less that CRLF
    start: int  # of the content
    end: int


@dataclass(frozen=True, slots=True)
class Form:
    """A form's text fields, and the body that they were read from.

    Attributes:
        body: the form as it came.
        texts: text fields of up to ``MAX_TEXT_BYTES`` by name; of several with the
            same name the first. Files and longer texts are not among them.
    """

    # Nothing shows in repr(): it is what people wrote.
    body: bytes = field(repr=False)
    texts: dict[str, str] = field(repr=False)
    _boundary: bytes = field(repr=False)
    _model: _Part | None = field(repr=False)

    @classmethod
    def parse(cls, body: bytes, content_type: str) -> "Form":
        """Read a form.

        Args:
            body: the whole request body.
            content_type: the request's header; it carries the boundary.

        Raises:
            InvalidRequest: malformed, ambiguous, or beyond a limit.
        """
        boundary = _boundary_of(content_type)
        texts: dict[str, str] = {}
        seen: set[str] = set()
        model = None
        for part in _parts(body, boundary):
            if part.name in _SINGLE and part.name in seen:
                raise _malformed(f'the field "{part.name}" is there twice', part.name)
            seen.add(part.name)
            if part.name == "model":
                _check_model(part)
                model = part
            if not part.is_file and part.end - part.start <= MAX_TEXT_BYTES:
                texts.setdefault(part.name, _text(body, part))
        return cls(body, texts, boundary, model)

    @property
    def model(self) -> str | None:
        """The field ``model``; ``None`` if the form has none."""
        return self.texts.get("model")

    def get(self, name: str) -> str | None:
        """A short text field; ``None`` if it is absent, long, or a file."""
        return self.texts.get(name)

    def replaced(self, model: str) -> bytes:
        """The body with another model's name, and no other field touched.

        If the form has no such field it is added in front.

        Raises:
            ValueError: the name cannot be put into a form.
        """
        value = model.encode()
        if self._boundary in value or b"\r" in value or b"\n" in value:
            raise ValueError("this model name does not fit into a form")
        part = self._model
        if part is None:
            head = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
            field_bytes = b"--" + self._boundary + head + value + b"\r\n"
            return b"".join((field_bytes, self.body))
        # okhttp, for one, announces each field's length.
        head = _CONTENT_LENGTH.sub(
            b"\\g<1>%d" % len(value), self.body[part.head : part.start]
        )
        whole = memoryview(self.body)  # slices of it are no copies
        return b"".join((whole[: part.head], head, value, whole[part.end :]))


def is_form(content_type: str) -> bool:
    """Whether a request with this Content-Type is a multipart form."""
    return _FORM.match(content_type) is not None


def _boundary_of(content_type: str) -> bytes:
    media_type = _FORM.match(content_type)
    if media_type is None:
        raise InvalidRequest("the request is not multipart/form-data")
    parameters = _parameters(content_type, media_type.start(1))
    boundaries = [value for name, value in parameters if name == "boundary"]
    if len(boundaries) != 1 or not _BOUNDARY.fullmatch(boundaries[0]):
        raise _malformed("its Content-Type must name one boundary of 1 to 70 signs")
    return boundaries[0].encode()


def _parts(body: bytes, boundary: bytes) -> list[_Part]:
    """All parts of the body.

    Every occurrence of the delimiter is looked at, so that none can lie inside a part
    where another parser might find it.
    """
    delimiter = b"--" + boundary
    if not body.startswith(delimiter):
        raise _malformed("it does not begin with its boundary")
    parts: list[_Part] = []
    behind = len(delimiter)
    while body[behind : behind + 2] != b"--":
        if body[behind : behind + 2] != b"\r\n":
            raise _malformed("something follows a boundary on its line")
        at = body.find(delimiter, behind)
        if at < 0:
            raise _malformed("it has no closing boundary")
        if body[at - 2 : at] != b"\r\n":
            raise _malformed("its boundary appears inside a part")
        if len(parts) == MAX_PARTS:
            raise _malformed(f"it has more than {MAX_PARTS} parts")
        parts.append(_part(body, behind, at - 2))
        behind = at + len(delimiter)
    if body[behind + 2 :] not in (b"", b"\r\n"):
        raise _malformed("something follows the closing boundary")
    return parts


def _part(body: bytes, head: int, end: int) -> _Part:
    """The part between ``head`` (the CRLF of its delimiter) and ``end``."""
    head_end = body.find(b"\r\n\r\n", head, min(end, head + MAX_HEAD_BYTES))
    if head_end < 0:
        raise _malformed("a part has no head, or a very long one")
    try:
        lines = body[head + 2 : head_end].decode().split("\r\n")
    except UnicodeDecodeError:
        raise _malformed("a part's head is not UTF-8") from None
    headers: dict[str, str] = {}
    for line in lines:
        header = _FIELD.fullmatch(line)
        if header is None or header[1].lower() in headers:
            raise _malformed("a part's head cannot be understood")
        headers[header[1].lower()] = header[2]
    name, is_file = _disposition(headers.get("content-disposition", ""))
    if not is_file:
        _check_plain(name, headers)
    return _Part(name, is_file, head, head_end + 4, end)


def _disposition(value: str) -> tuple[str, bool]:
    """A field's name, and whether it is a file."""
    kind = _DISPOSITION.match(value)
    # Counted in the raw text: a file name with quotes in it can hide a second name
    # from one parser and show it to another.
    if kind is None or len(_NAME_PARAMETER.findall(value)) != 1:
        raise _malformed("each part needs a Content-Disposition with one name")
    parameters = dict(_parameters(value, kind.end()))
    name = parameters.get("name", "")
    if not name or _AMBIGUOUS.search(name):
        raise _malformed("a field's name is missing or written with escapes")
    return name, "filename" in parameters or "filename*" in parameters


def _parameters(value: str, at: int) -> list[tuple[str, str]]:
    """Parameters of a header value; quotes are taken off, escapes are left in."""
    found: list[tuple[str, str]] = []
    while at < len(value):
        parameter = _PARAMETER.match(value, at)
        if parameter is None:
            raise _malformed("a header's parameters cannot be understood")
        content = parameter[2]
        if content.startswith('"'):
            content = content[1:-1]
        found.append((parameter[1].lower(), content))
        at = parameter.end()
    return found


def _check_plain(name: str, headers: dict[str, str]) -> None:
    """Refuse a text that a parser may decode into another text."""
    encoding = headers.get("content-transfer-encoding", "8bit").lower()
    if encoding not in ("7bit", "8bit", "binary"):
        raise _malformed(f'the field "{name}" must not be encoded', name)
    content_type = headers.get("content-type", "")
    charset = re.search(r"charset[ \t]*=[ \t]*\"?([^\";\s]*)", content_type, re.I)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise _malformed(f'the field "{name}" must be UTF-8', name)


def _check_model(part: _Part) -> None:
    if part.is_file:
        raise _malformed('"model" must be a text field, not a file', "model")
    if part.end - part.start > MAX_MODEL_BYTES:
        raise _malformed('the field "model" is too long', "model")


def _text(body: bytes, part: _Part) -> str:
    try:
        return body[part.start : part.end].decode()
    except UnicodeDecodeError:
        raise _malformed(f'the field "{part.name}" is not UTF-8', part.name) from None


def _malformed(problem: str, param: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"the multipart form is refused: {problem}", param=param)
