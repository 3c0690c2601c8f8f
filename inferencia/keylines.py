"""The language of the keys file: what one line says, and what a whole text says.

    sk-secret [name=alice] [role=user|admin|agent|metrics] [models=qwen*,gpt-*]
              [rps=5] [burst=10] [tpm=20000] [concurrency=2] [daily_tokens=500000]
              [priority=10] [expires=2027-01-31]                   # all on one line

``sha256:`` and 64 hex digits may stand for the secret. ``#`` begins a comment at the
start of a line or after white space; blank lines say nothing. A key without a name is
called ``key-`` and the first eight digits of its digest.

Nothing here opens a file. A secret leaves this module as its digest only, and no error
repeats what it found: the text at a wrong place may well be a secret.
"""

import difflib
import enum
import fnmatch
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Any

from inferencia.placeholders import is_placeholder

# A key of 16 random characters of base64 holds 96 bits; below that it could be a word.
# The predecessor took any length, so a short key is warned about and not refused.
MIN_GOOD_LENGTH = 16

# A file that is no keys file at all has an error on each line; nobody reads a thousand.
MAX_PROBLEMS = 20

DIGEST_MARK = "sha256:"

_SECRET = re.compile(r"[!-~]+")  # printable ASCII without the space
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
# Names go into logs, metrics, URLs and shell commands; none of these needs quoting.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_FIELD = re.compile(r"\S+")
_COMMENT = re.compile(r"(?:^|\s)#.*", re.DOTALL)
_PRIORITY = re.compile(r"-?[0-9]{1,3}")
_WHOLE = re.compile(r"[0-9]{1,12}")
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DAYS = re.compile(r"([1-9][0-9]{0,4})d")
_DERIVED_DIGITS = 8


class Role(enum.Enum):
    """What a key is for. Admin may do all that user may."""

    USER = "user"
    ADMIN = "admin"
    AGENT = "agent"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class Key:
    """One key, without its secret. ``None`` is the default or no limit."""

    name: str
    role: Role = Role.USER
    models: tuple[str, ...] = ()  # globs; empty: all
    rps: float | None = None  # requests per second
    burst: int | None = None
    tpm: int | None = None  # tokens per minute
    concurrency: int | None = None
    daily_tokens: int | None = None
    priority: int = 0  # in the waiting line; higher goes first
    expires: date | None = None  # the last day, in UTC, on which it is good
    digest: bytes = field(default=b"", repr=False)  # SHA-256 of the secret

    def may_see(self, model: str) -> bool:
        """Whether one of the key's globs fits; upper and lower case differ."""
        return not self.models or _pattern(self.models).match(model) is not None

    def has_expired(self, today: date) -> bool:
        """Whether ``today`` (UTC) is past the key's last day."""
        return self.expires is not None and today > self.expires


@functools.lru_cache(maxsize=1024)
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    """What fits one of the globs."""
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs))


@dataclass(frozen=True, slots=True)
class Line:
    """A key as it stands in the file."""

    number: int  # from one
    key: Key
    is_bare: bool  # without a name of its own
    is_placeholder: bool  # an example's text, which must never authenticate
    is_short: bool


class LineError(ValueError):
    """A line cannot be understood. The message fits after ``FILE:NUMBER: ``."""


class KeysError(Exception):
    """Keys cannot be taken over; ``problems`` has one line of text for each reason."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def digest_of(secret: bytes) -> bytes:
    """What is kept of a secret and looked up for a presented one."""
    return hashlib.sha256(secret).digest()


def derived_name(digest: bytes, digits: int = _DERIVED_DIGITS) -> str:
    """What a key without a name is called."""
    return "key-" + digest.hex()[:digits]


def parse(text: str, origin: str) -> tuple[Line, ...]:
    """All keys of a text, in order.

    Names are unique afterwards: should the digests of two nameless keys begin alike,
    or somebody else have that name, more digits tell them apart.

    Raises:
        KeysError: each problem as ``ORIGIN:NUMBER: what is wrong``.
    """
    lines: list[Line] = []
    problems: list[str] = []
    numbers: dict[str | bytes, int] = {}  # where a name or digest was first seen
    for number, one in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        try:
            line = parse_line(one, number)
            if line is not None:
                _refuse_duplicates(line, numbers)
                lines.append(line)
        except LineError as error:
            problems.append(f"{origin}:{number}: {error}")
            if len(problems) == MAX_PROBLEMS:
                break
    if problems:
        raise KeysError(tuple(problems))
    return tuple(_with_unique_names(lines))


def parse_line(text: str, number: int = 1) -> Line | None:
    """The key of one line, or None if the line says nothing.

    Raises:
        LineError: the line is wrong.
    """
    text = _COMMENT.sub("", text.removeprefix("\ufeff")).strip()
    if not text:
        return None
    secret, *options = text.split()
    if is_placeholder(text) and not all("=" in option for option in options):
        return bare_line(text, number)  # a predecessor's example, which has blanks
    line = bare_line(secret, number)
    given: dict[str, Any] = dict(
        _option(option) for option in _refuse_repeated(options)
    )
    return replace(line, key=replace(line.key, **given), is_bare="name" not in given)


def bare_line(secret: str, number: int = 1) -> Line:
    """The key of a secret, or of ``sha256:`` and its digest, that stands alone.

    Raises:
        LineError: it is neither.
    """
    digest = _digest(secret)
    return Line(
        number=number,
        key=Key(derived_name(digest), digest=digest),
        is_bare=True,
        is_placeholder=is_placeholder(secret),
        is_short=len(secret) < MIN_GOOD_LENGTH,
    )


def compose(digest: bytes, options: Mapping[str, str]) -> str:
    """The line for a new key, in the order of the file's documentation.

    Raises:
        LineError: an option is unknown or its value is wrong.
    """
    for name, value in options.items():
        _convert(name, value)
    words = [f"{name}={options[name]}" for name in OPTIONS if name in options]
    return " ".join([DIGEST_MARK + digest.hex(), *words])


def with_digest(text: str, line: Line, digest: bytes) -> str:
    """The same line with another secret; all that stands behind it stays.

    A key whose name came from its digest keeps that name, now written out, so that
    its limits and its history stay its own.
    """
    new = DIGEST_MARK + digest.hex()
    if line.is_bare:
        new += f" name={line.key.name}"
    return _FIELD.sub(lambda _: new, text, count=1)


def with_options(text: str, line: Line, options: Mapping[str, str | None]) -> str:
    """The same line with other options; its secret, its comment and the rest stay.

    Args:
        text: the line as it stands in the file.
        line: what it says.
        options: what is to be there from now on; None: that one shall not.

    Raises:
        LineError: an option is unknown or its value is wrong.
    """
    if "name" in options:
        raise LineError("a key's name cannot be changed")
    for name, value in options.items():
        if name not in OPTIONS:
            _convert(name, "")
        if value is not None:
            _convert(name, value)
    comment = _COMMENT.search(text)
    end = len(text) if comment is None else comment.start()
    body, rest = text[:end], text[end:]
    blanks = body[len(body.rstrip()) :]
    words = body.split()
    kept = [word for word in words[1:] if word.partition("=")[0] not in options]
    if line.is_bare:
        # Its name came from its digest, and shall not change with a later rotation.
        kept.insert(0, f"name={line.key.name}")
    new = [f"{name}={options[name]}" for name in OPTIONS if options.get(name)]
    return " ".join([words[0], *kept, *new]) + blanks + rest


def last_day(text: str, today: date) -> str:
    """``30d`` as the date that many days from today; a date as it is.

    Raises:
        LineError: it is neither, or has passed.
    """
    if days := _DAYS.fullmatch(text):
        return (today + timedelta(days=int(days[1]))).isoformat()
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise LineError(
            f'expected a date such as 2027-01-31 or days such as 30d, got "{text[:64]}"'
        ) from None
    if day < today:
        raise LineError(f"{day} has passed")
    return day.isoformat()


def _digest(secret: str) -> bytes:
    if secret.partition("=")[0] in OPTIONS and "=" in secret:
        raise LineError("the secret must come first, options after it")
    if secret.startswith(DIGEST_MARK):
        digits = secret.removeprefix(DIGEST_MARK)
        if not _DIGEST.fullmatch(digits):
            raise LineError(f"{DIGEST_MARK} must be followed by 64 hex digits")
        return bytes.fromhex(digits)
    if not _SECRET.fullmatch(secret) and not is_placeholder(secret):
        raise LineError("a secret may only have printable ASCII characters, no blanks")
    return digest_of(secret.encode("utf-8", "surrogateescape"))


def _refuse_repeated(options: list[str]) -> Iterator[str]:
    seen = set()
    for option in options:
        name = option.partition("=")[0]
        if name in OPTIONS and name in seen:
            raise LineError(f"{name} is given twice")
        seen.add(name)
        yield option


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise LineError(
            "after the secret only options NAME=VALUE may follow, "
            "and a comment after a blank and #"
        )
    return name, _convert(name, value)


def _convert(name: str, value: str) -> object:
    """The value of an option as ``Key`` holds it."""
    reader = OPTIONS.get(name)
    if reader is not None:
        return reader(value, name)
    # Only what resembles an option is repeated; the rest might be half a secret.
    nearest = difflib.get_close_matches(name, OPTIONS, n=1)
    if nearest:
        raise LineError(f'unknown option "{name}"; did you mean {nearest[0]}?')
    raise LineError(f"unknown option; known are {', '.join(OPTIONS)}")


def _name(value: str, _: str) -> str:
    if not _NAME.fullmatch(value):
        raise LineError(
            "name must be 1 to 64 letters, digits or . _ @ + -, "
            "and begin with a letter or digit"
        )
    return value


def _role(value: str, _: str) -> Role:
    try:
        return Role(value)
    except ValueError:
        known = ", ".join(role.value for role in Role)
        raise LineError(f"role must be one of {known}") from None


def _models(value: str, _: str) -> tuple[str, ...]:
    globs = tuple(value.split(","))
    if not all(globs) or not value.isprintable() or " " in value:
        raise LineError("models must be patterns separated by commas, without blanks")
    return globs


def _decimal(value: str, name: str) -> float:
    if not _DECIMAL.fullmatch(value) or not float(value):
        raise LineError(f"{name} must be a number above zero, such as 5 or 0.5")
    return float(value)


def _whole(value: str, name: str) -> int:
    if not _WHOLE.fullmatch(value) or not int(value):
        raise LineError(
            f"{name} must be a whole number above zero; leave it out for no limit"
        )
    return int(value)


def _priority(value: str, name: str) -> int:
    if not _PRIORITY.fullmatch(value):
        raise LineError(f"{name} must be a whole number from -999 to 999")
    return int(value)


def _date(value: str, name: str) -> date:
    # fromisoformat alone would also take 20270131 and week dates.
    try:
        if _DATE.fullmatch(value):
            return date.fromisoformat(value)
    except ValueError:
        pass  # the thirteenth month
    raise LineError(f"{name} must be a date such as 2027-01-31")


# What each option's value is read with, in the order in which options are written.
OPTIONS: Mapping[str, Callable[[str, str], Any]] = {
    "name": _name,
    "role": _role,
    "models": _models,
    "rps": _decimal,
    "burst": _whole,
    "tpm": _whole,
    "concurrency": _whole,
    "daily_tokens": _whole,
    "priority": _priority,
    "expires": _date,
}


def _refuse_duplicates(line: Line, numbers: dict[str | bytes, int]) -> None:
    if not line.is_placeholder:
        first = numbers.setdefault(line.key.digest, line.number)
        if first != line.number:
            raise LineError(f"the same secret as on line {first}")
    if line.is_bare:
        return
    first = numbers.setdefault(line.key.name, line.number)
    if first != line.number:
        raise LineError(f'name "{line.key.name}" is taken by line {first}')


def _with_unique_names(lines: list[Line]) -> Iterator[Line]:
    taken = {line.key.name for line in lines if not line.is_bare}
    for line in lines:
        if line.is_bare:
            name = unique_name(line.key.digest, taken)
            taken.add(name)
            line = replace(line, key=replace(line.key, name=name))
        yield line


def unique_name(digest: bytes, taken: set[str]) -> str:
    """A nameless key's name that nobody else has."""
    digits = _DERIVED_DIGITS
    while (name := derived_name(digest, digits)) in taken and digits < 64:
        digits += 1
    return name
