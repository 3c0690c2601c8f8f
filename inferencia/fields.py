"""What a value of the configuration may be: one reader for each kind.

A reader is a function from a ``Place`` (a value, with its path) to what the program
works with: seconds, bytes, networks, secrets. It raises ``Rejected`` with a message
that says what was expected and shows what was found; secrets are never shown. Readers
of lists and groups note a rejection and go on, so that one run reports every error.

A group of keys is a frozen dataclass whose fields are made by ``key`` and ``part``:

    @dataclass(frozen=True, slots=True)
    class ServerConfig:
        port: int = key(whole(0, 65535), 8080)
        tls: TlsConfig = part(TlsConfig)

That declaration is all there is: the reading, the names of the known keys and the
defaults follow from it.
"""

import dataclasses
import difflib
import ipaddress
import json
import re
import shlex
from collections.abc import Callable, Iterator
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

from inferencia import folders, quantities, yamlfile
from inferencia.secret import Secret
from inferencia.tunnel.wire import is_host_name
from inferencia.yamlfile import Mapping, Node, Scalar, Sequence, Style

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Enough to recognise a value by, short enough to leave the message on one line.
MAX_SHOWN = 60

# What a secret that strayed into another field looks like.
_LOOKS_SECRET = re.compile(r"(?i)^\s*(?:sk-|hf_|sha256:|bearer\s|basic\s|gsk_|eyJ)")


class Rejected(Exception):
    """A value that cannot be taken; the message completes ``path: ``."""


@dataclass(slots=True)
class Book:
    """What one reading works with, and what it brings to light."""

    env: MappingABC[str, str]
    folder: Path  # relative paths from the file begin here
    # All keys that exist, as ``backends[].url``: to name the one that was meant.
    known: tuple[str, ...] = ()
    # Unknown keys that only cause a warning, with its text.
    tolerated: MappingABC[str, str] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    # Variables that secrets came from; child processes must not see them.
    secret_variables: set[str] = dataclasses.field(default_factory=set)

    def error(self, path: str, message: str) -> None:
        self.errors.append(f"{path}: {message}" if path else message)

    def warn(self, path: str, message: str) -> None:
        self.warnings.append(f"{path}: {message}" if path else message)


@dataclass(frozen=True, slots=True)
class Place:
    """One value, where it stands, and whether it may be shown."""

    node: Node
    path: str
    book: Book
    is_secret: bool = False

    @property
    def name(self) -> str:
        """What errors call it: its path, or the variable or flag it came from."""
        label = self.node.label if isinstance(self.node, Scalar) else None
        return label or self.path

    def below(self, key: str, node: Node) -> "Place":
        path = yamlfile.below(self.path, key)
        return Place(node, path, self.book, self.is_secret)

    def item(self, index: int, node: Node) -> "Place":
        return Place(node, f"{self.path}[{index}]", self.book, self.is_secret)

    def secret(self) -> "Place":
        return dataclasses.replace(self, is_secret=True)

    def rejected(self, expected: str) -> Rejected:
        """``expected …, got …``, for the caller to raise."""
        return Rejected(f"{expected}, got {self.shown()}")

    def shown(self) -> str:
        """The value as an error may show it."""
        if isinstance(self.node, Mapping):
            return "a group of keys"
        if isinstance(self.node, Sequence):
            return "a list"
        if self.is_secret or _LOOKS_SECRET.match(self.node.text):
            return "something else (not shown, it may be secret)"
        if self.node.is_null:
            return "nothing"
        if not self.node.is_text:
            return self.node.text
        filled = self.node.style is Style.FILLED_IN and not self.node.label
        return _quoted(self.node.text) + (" from a variable" if filled else "")

    def scalar(self, expected: str) -> Scalar:
        """The single value here, with its variables filled in.

        Raises:
            Rejected: a group, a list or nothing is here, or a variable is not set.
        """
        if not isinstance(self.node, Scalar) or self.node.is_null:
            raise self.rejected(expected)
        if "${env." not in self.node.text or self.node.label:
            return self.node
        if self.is_secret:
            self.book.secret_variables.update(self.node.variables)
        if "${env." in self.node.substituted(lambda name: "").text:
            raise Rejected("expected ${env.NAME}, the name of an environment variable")
        return self.node.substituted(self._variable)

    def _variable(self, name: str) -> str:
        try:
            return self.book.env[name]
        except KeyError:
            raise Rejected(f"the environment variable {name} is not set") from None

    def filled(self, expected: str) -> "Place":
        """The same place holding ``scalar(expected)``."""
        return dataclasses.replace(self, node=self.scalar(expected))


Reader = Callable[[Place], T]

# Under this name a dataclass field keeps the reader of its key.
READER = "reader"


def key(read: Reader[T], default: T) -> T:
    """A field that is a key of the configuration."""
    metadata = {READER: read}
    if isinstance(default, dict):  # a mutable default needs a factory
        return cast(
            T,
            dataclasses.field(default_factory=lambda: dict(default), metadata=metadata),
        )
    return dataclasses.field(default=default, metadata=metadata)


def part(group: type[T], *, is_secret: bool = False) -> T:
    """A field that is a group of keys, declared by the dataclass ``group``."""
    read = section(group, is_secret=is_secret)
    return dataclasses.field(default_factory=group, metadata={READER: read})


def hidden(read: Reader[T], default: T) -> T:
    """A key whose value stays out of ``repr``."""
    return dataclasses.field(default=default, metadata={READER: read}, repr=False)


def readers(group: type[Any]) -> dict[str, Reader[Any]]:
    """The keys of a group and how each is read."""
    return {
        field.name: field.metadata[READER]
        for field in dataclasses.fields(group)
        if READER in field.metadata
    }


# --- single values ---------------------------------------------------------------


def text(place: Place) -> str:
    """One line of text that is not empty."""
    value = _line(place, "expected text")
    if not value:
        raise Rejected("expected text, got nothing between the quotes")
    return value


def _line(place: Place, expected: str) -> str:
    place = place.filled(expected)
    node = cast(Scalar, place.node)
    if not node.is_text:
        raise Rejected(f"{expected}, got {place.shown()}; put it in quotes if meant so")
    value = node.text.strip()
    # Nothing here may hold a line end; in a header or a log it would do harm.
    if not value.isprintable():
        raise Rejected(f"{expected} on one line, without control characters")
    return value


def any_text(place: Place) -> str:
    """One line of text that may be empty; nothing is empty text."""
    if isinstance(place.node, Scalar) and place.node.is_null:
        return ""
    return _line(place, "expected text")


def optional(read: Reader[T]) -> Reader[T | None]:
    """``null`` as well as what ``read`` takes; an empty text counts as ``null``."""

    def read_optional(place: Place) -> T | None:
        if isinstance(place.node, Scalar):
            if place.node.is_null:
                return None
            if not place.scalar("").text.strip():
                return None
        return read(place)

    return read_optional


def secret(place: Place) -> Secret | None:
    """A secret text; empty and ``null`` are none."""
    return optional(lambda here: Secret(text(here)))(place.secret())


def bearer(place: Place) -> Secret | None:
    """A secret that is sent as ``Authorization: Bearer``: visible ASCII."""
    value = secret(place)
    if value and not re.fullmatch(r"[!-~]+", value.reveal()):
        raise Rejected("expected a key without blanks and letters beyond ASCII")
    return value


def flag(place: Place) -> bool:
    place = place.filled("expected true or false")
    value = cast(Scalar, place.node).boolean
    if value is None:
        raise place.rejected("expected true or false")
    return value


def whole(low: int, high: int | None = None) -> Reader[int]:
    """A whole number from ``low`` to ``high``, both included."""
    bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
    if high is None and low == -(10**9):
        bounds = ""
    expected = f"expected a whole number {bounds}".rstrip()

    def read(place: Place) -> int:
        place = place.filled(expected)
        value = cast(Scalar, place.node).number
        if isinstance(value, float):
            raise place.rejected(expected)
        if value is None:
            raise Rejected(f"{expected}, got {place.shown()}{_number_hint(place)}")
        if value < low or (high is not None and value > high):
            raise place.rejected(expected)
        return value

    return read


def _number_hint(place: Place) -> str:
    node = cast(Scalar, place.node)
    digits = node.text.replace("_", "")
    if node.style is Style.QUOTED and re.fullmatch(r"[0-9.]+", digits):
        return "; write it without quotes"
    if re.fullmatch(r"0[0-9]+", digits):
        return "; write it without leading zeros"
    if digits != node.text and digits.isdigit():
        return "; write it without _"
    if node.label and node.text.startswith("tcp://"):
        # Kubernetes gives every container NAME_PORT=tcp://... for a service "name".
        return "; Kubernetes sets this for a service of that name"
    return ""


def number(*, above: float | None = None) -> Reader[float]:
    """A number with or without a fraction, greater than ``above``."""
    expected = "expected a number" + (f" above {above:g}" if above is not None else "")

    def read(place: Place) -> float:
        place = place.filled(expected)
        value = cast(Scalar, place.node).number
        if value is None:
            raise Rejected(f"{expected}, got {place.shown()}{_number_hint(place)}")
        if above is not None and value <= above:
            raise place.rejected(expected)
        return float(value)

    return read


def duration(*, can_be_zero: bool = True) -> Reader[float]:
    """Seconds, from ``30s``, ``1h30m``, ``0.5``."""

    def read(place: Place) -> float:
        place = place.filled(quantities.DURATION_EXPECTED)
        seconds = _quantity(place, quantities.parse_duration)
        if not seconds and not can_be_zero:
            raise place.rejected("expected a duration above zero")
        return seconds

    return read


def size(low: int = 0) -> Reader[int]:
    """Bytes, from ``64MiB`` or a bare number."""

    def read(place: Place) -> int:
        place = place.filled(quantities.SIZE_EXPECTED)
        bytes_ = _quantity(place, quantities.parse_size)
        if bytes_ < low:
            least = quantities.format_size(low)
            raise place.rejected(f"expected a size of at least {least}")
        return bytes_

    return read


def _quantity(place: Place, parse: Callable[[str], T]) -> T:
    try:
        return parse(cast(Scalar, place.node).text)
    except ValueError as error:
        raise place.rejected(str(error)) from None


def one_of(*names: str, **synonyms: str) -> Reader[str]:
    """One of ``names``, in any case."""
    expected = f"expected {_listed(names)}"

    def read(place: Place) -> str:
        place = place.filled(expected)
        value = cast(Scalar, place.node).text.strip().lower()
        value = synonyms.get(value, value)
        if value not in names:
            raise Rejected(f"{expected}, got {place.shown()}{nearest(value, names)}")
        return value

    return read


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def nearest(name: str, known: MappingABC[str, Any] | tuple[str, ...]) -> str:
    """``; did you mean X?`` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def anything(place: Place) -> Node | None:
    """Whatever is there, unread."""
    is_null = isinstance(place.node, Scalar) and place.node.is_null
    return None if is_null else place.node


def tri_state(place: Place) -> bool | None:
    """``true``, ``false``, or ``auto`` (None)."""
    place = place.filled("expected auto, true or false")
    node = cast(Scalar, place.node)
    if node.text.strip().lower() == "auto":
        return None
    if node.boolean is None:
        raise place.rejected("expected auto, true or false")
    return node.boolean


# --- files -----------------------------------------------------------------------


def file_path(place: Place) -> Path:
    """An absolute path; a relative one begins at the configuration file's folder."""
    return _resolved(text(place), place)


def file_path_or_off(place: Place) -> Path | Literal[False]:
    """A path, or False for ``off``: there shall be no such file."""
    if isinstance(place.node, Scalar) and place.node.text.strip() in ("off", "false"):
        return False
    return file_path(place)


def _resolved(path: str, place: Place) -> Path:
    label = place.node.label if isinstance(place.node, Scalar) else None
    # What a variable or a flag says is meant where the program was started.
    folder = Path.cwd() if label else place.book.folder
    try:
        return folder / folders.expand(path, place.book.env)
    except OSError as error:
        raise Rejected(f"cannot expand ~: {error}") from None


def search_path(place: Place) -> tuple[Path, ...]:
    """Folders: a list, or one text with ``:`` between them."""
    if isinstance(place.node, Sequence):
        return list_of(file_path)(place)
    if isinstance(place.node, Scalar) and place.node.is_null:
        return ()
    joined = _line(place, "expected folders")
    return tuple(_resolved(path, place) for path in joined.split(":") if path)


def executable(place: Place) -> str:
    """A command to be found on PATH, or a path, made absolute."""
    command = text(place)
    if "/" not in command and not command.startswith("~"):
        return command
    return str(_resolved(command, place))


# --- addresses -------------------------------------------------------------------


def host(place: Place) -> str:
    """An IP address or a host name to listen on, without port."""
    value = text(place).removeprefix("[").removesuffix("]")
    if ":" in value:
        try:
            ipaddress.IPv6Address(value)
        except ValueError:
            raise place.rejected("expected an address without port") from None
    elif not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?", value):
        hint = "; 0.0.0.0 is all addresses" if value == "*" else ""
        raise Rejected(
            f"expected an address such as 127.0.0.1, got {place.shown()}{hint}"
        )
    elif re.fullmatch(r"[0-9.]+", value):
        try:
            ipaddress.IPv4Address(value)
        except ValueError:
            raise place.rejected("expected an address such as 127.0.0.1") from None
    return value


def datagram_target(place: Place) -> str:
    """An address to send to, with a port or without: ``192.168.1.255:7``."""
    place = place.filled("expected an address such as 192.168.1.255")
    node = cast(Scalar, place.node)
    bare, colon, port = node.text.strip().rpartition(":")
    if colon and (":" not in bare or bare.endswith("]")):
        if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) <= 65535:
            raise place.rejected("expected a port from 1 to 65535 after the address")
        host(dataclasses.replace(place, node=dataclasses.replace(node, text=bare)))
        return f"{bare}:{port}"
    return host(place)


def hardware_address(place: Place) -> str:
    """Six bytes as ``aa:bb:cc:dd:ee:ff`` or ``AA-BB-CC-DD-EE-FF``."""
    value = text(place).lower().replace("-", ":")
    if not re.fullmatch("[0-9a-f]{2}(:[0-9a-f]{2}){5}", value):
        raise place.rejected("expected a hardware address such as aa:bb:cc:dd:ee:ff")
    return value


def network(place: Place) -> Network:
    """``10.0.0.0/8``, ``fd00::/8``, or a single address."""
    value = text(place)
    expected = "expected a network such as 10.0.0.0/8"
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise place.rejected(expected) from None
    raise Rejected(f"{expected}, got {place.shown()}; did you mean {meant}?")


def remote_access(place: Place) -> bool | tuple[Network, ...]:
    """``true``, ``false``, or a list of networks."""
    if isinstance(place.node, Sequence):
        return list_of(network)(place)
    place = place.filled("expected true, false or a list of networks")
    value = cast(Scalar, place.node).boolean
    if value is None:
        raise place.rejected("expected true, false or a list of networks")
    return value


def url(place: Place) -> str:
    """``http`` or ``https``, with a host; no credentials, query or fragment."""
    value = text(place)
    expected = "expected a URL such as http://localhost:11434"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise place.rejected(expected) from None
    if "@" in parts.netloc:
        # Not shown: it holds a password, and it would end up in logs.
        raise Rejected("a URL must not hold a user or password; use api_key or headers")
    if parts.scheme not in ("http", "https"):
        hint = "; write http:// in front" if "://" not in value else ""
        raise Rejected(f"{expected}, got {place.shown()}{hint}")
    if not parts.hostname or port == 0 or not re.fullmatch(r"[!-~]+", value):
        raise place.rejected(expected)
    if parts.query or parts.fragment:
        raise Rejected(f"{expected}, without ? and #")
    return value


def origins(place: Place) -> tuple[str, ...]:
    """Origins of web pages: a list, or one text with commas."""
    if isinstance(place.node, Sequence):
        return list_of(_origin)(place)
    if isinstance(place.node, Scalar) and place.node.is_null:
        return ()
    found = _line(place, "expected a list of origins").split(",")
    values = tuple(value.strip() for value in found if value.strip())
    for value in values:
        _check_origin(value, place)
    return values


def _origin(place: Place) -> str:
    value = text(place)
    _check_origin(value, place)
    return value


# RFC 6454, 6.1: scheme, host in lower case, port unless it is the default one.
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])"
    r"(?::[0-9]{1,5})?"
)


def _check_origin(value: str, place: Place) -> None:
    default = value.startswith("http://") and value.endswith(":80")
    default |= value.startswith("https://") and value.endswith(":443")
    if default or not _ORIGIN.fullmatch(value):
        place.book.warn(
            place.name,
            f"no browser sends the origin {_quoted(value)};"
            " one looks like https://app.example.com or http://localhost:3000",
        )


# --- names -----------------------------------------------------------------------

SERVICES = (
    "openai",
    "models",
    "goinfer",
    "llama-swap",
    "ollama",
    "metrics",
    "admin",
    "tunnel",
)


def services(place: Place) -> tuple[str, ...]:
    """Services at one address: names with blanks between them, or a list."""
    if isinstance(place.node, Sequence):
        names = list_of(text)(place)
    else:
        names = tuple(text(place).replace(",", " ").split())
    for name in names:
        if name not in SERVICES:
            hint = nearest(name, SERVICES) or f"; there are {', '.join(SERVICES)}"
            raise Rejected(f"unknown service {_quoted(name)}{hint}")
    return names


def listen_addresses(place: Place) -> dict[str, tuple[str, ...]]:
    """``{"host:port": services}``, the host may be missing."""
    found = mapping_of(services)(place)
    for address in found:
        _check_listen_address(address)
    return found


def listen_address(place: Place) -> str:
    """``host:port``, the host may be missing."""
    value = text(place)
    _check_listen_address(value)
    return value


def _check_listen_address(address: str) -> None:
    name, colon, port = address.rpartition(":")
    good = colon and port.isascii() and port.isdigit() and len(port) <= 5
    if not good or int(port) > 65535 or any(c.isspace() for c in name):
        raise Rejected(f"expected HOST:PORT or :PORT, got {_quoted(address)}")


def by_host_name(read: Reader[T]) -> Reader[dict[str, T]]:
    """Something for each of several host names, which become lower case."""

    def read_names(place: Place) -> dict[str, T]:
        found: dict[str, T] = {}
        for name, value in mapping_of(read)(place).items():
            if not is_host_name(name.lower()):
                raise Rejected(f"{_quoted(name)} cannot be the name of a host")
            if name.lower() in found:
                raise Rejected(f"{_quoted(name)} is there twice")
            found[name.lower()] = value
        return found

    return read_names


# RFC 9110, 5.6.2: token.
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
# These describe the connection or the message, and are ours to write.
_OUR_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "content-encoding",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "via",
    }
)


def headers(place: Place) -> tuple[tuple[str, str], ...]:
    """Header fields, as ``Name: value``; no name twice, whatever its case."""
    found = mapping_of(_header_value)(place.secret())
    seen: set[str] = set()
    for name in found:
        if not _TOKEN.fullmatch(name):
            raise Rejected(f"{_quoted(name)} cannot be the name of a header")
        if name.lower() in _OUR_HEADERS:
            raise Rejected(f"the header {name} is written by inferencia itself")
        if name.lower() in seen:
            raise Rejected(f"the header {name} is given twice")
        seen.add(name.lower())
    return tuple(found.items())


def _header_value(place: Place) -> str:
    # As written, since "1.10" and "true" are fine values of a header.
    value = place.scalar("expected text").text.strip()
    # RFC 9110, 5.5, without the line ends that would begin another header.
    if not re.fullmatch(r"[\t -~\x80-\xff]*", value):
        raise Rejected("a header's value is one line of Latin-1 text (not shown)")
    return value


def prices(place: Place) -> dict[str, float]:
    """``{prompt: …, completion: …}``, per million tokens."""
    found = mapping_of(_price)(place)
    for name in found:
        if name not in ("prompt", "completion"):
            raise Rejected(f"expected prompt and completion, got {_quoted(name)}")
    return found


def _price(place: Place) -> float:
    value = number()(place)
    if value < 0:
        raise place.rejected("expected a number that is not negative")
    return value


def task(place: Place) -> tuple[str, ...]:
    """One command line, or a list of them; words are split as by a shell."""
    if not isinstance(place.node, Sequence):
        return (_command_line(place),)
    if not place.node.items:
        raise Rejected("expected a command, or a list of them")
    return list_of(_command_line)(place)


def _command_line(place: Place) -> str:
    value = text(place)
    try:
        shlex.split(value)
    except ValueError:
        raise Rejected("a quotation mark or backslash has no counterpart") from None
    return value


# --- several values --------------------------------------------------------------


def list_of(read: Reader[T]) -> Reader[tuple[T, ...]]:
    """A list; nothing is an empty one."""

    def read_list(place: Place) -> tuple[T, ...]:
        if isinstance(place.node, Scalar) and place.node.is_null:
            return ()
        if not isinstance(place.node, Sequence):
            raise place.rejected("expected a list")
        places = [place.item(i, node) for i, node in enumerate(place.node.items)]
        return tuple(value for here in places for value in _tried(read, here))

    return read_list


def mapping_of(read: Reader[T]) -> Reader[dict[str, T]]:
    """Names with values; nothing is an empty mapping."""

    def read_mapping(place: Place) -> dict[str, T]:
        if isinstance(place.node, Scalar) and place.node.is_null:
            return {}
        if not isinstance(place.node, Mapping):
            raise place.rejected("expected names with values")
        found = {}
        for name, node in place.node.items.items():
            here = place.below(name, node)
            if not name.strip() or not name.isprintable():
                here.book.error(here.path, "a name must be one line of text")
                continue
            for value in _tried(read, here):
                found[name] = value
        return found

    return read_mapping


def section(group: type[T], *, is_secret: bool = False) -> Reader[T]:
    """A group of keys, as the dataclass ``group`` declares them.

    ``is_secret``: what stands where the group should be may be a secret.
    """

    def read_section(place: Place) -> T:
        if isinstance(place.node, Scalar) and place.node.is_null:
            return group()
        known = readers(group)
        if not isinstance(place.node, Mapping):
            place = place.secret() if is_secret else place
            raise place.rejected(f"expected a group with {', '.join(known)}")
        values = {}
        for name, node in place.node.items.items():
            here = place.below(name, node)
            if name not in known:
                _unknown(here, name, known)
                continue
            for value in _tried(known[name], here):
                values[name] = value
        return group(**values)

    return read_section


def _tried(read: Reader[T], place: Place) -> Iterator[T]:
    """The value, or nothing once its rejection is noted."""
    try:
        yield read(place)
    except Rejected as rejected:
        place.book.error(place.name, str(rejected))


def _unknown(place: Place, name: str, known: MappingABC[str, Any]) -> None:
    general = general_path(place.path)
    if general in place.book.tolerated:
        place.book.warn(place.path, place.book.tolerated[general])
        return
    place.book.error(place.path, f"unknown key{_suggestion(place, name, known)}")


def general_path(path: str) -> str:
    """``backends[].url`` of ``backends[3].url``."""
    return re.sub(r"\[[0-9]+\]", "[]", path)


def _suggestion(place: Place, name: str, known: MappingABC[str, Any]) -> str:
    """The nearest known key: beside it, else one of that name elsewhere."""
    name_meant = name.lower().replace("-", "_")
    parent = place.path[: place.path.rfind(".") + 1]
    if close := difflib.get_close_matches(name_meant, known, n=1):
        return f"; did you mean {parent}{close[0]}?"
    leaves = {path.rpartition(".")[2]: path for path in reversed(place.book.known)}
    if close := difflib.get_close_matches(name_meant, leaves, n=1, cutoff=0.7):
        return f"; did you mean {leaves[close[0]]}?"
    return f"; known here: {', '.join(known)}"


def _quoted(value: str) -> str:
    clipped = value if len(value) <= MAX_SHOWN else value[: MAX_SHOWN - 1] + "…"
    return json.dumps(clipped, ensure_ascii=not clipped.isprintable())
