"""What a value of the configuration may be when it means something outside of it.

Files and folders, addresses and networks, names of services and hosts, headers, prices,
commands: one reader for each (``fields`` says what a reader is). Nothing is looked up
and no file is opened; what can be told from the text alone is told.
"""

import dataclasses
import ipaddress
import re
import shlex
from pathlib import Path
from typing import Literal, TypeVar, cast
from urllib.parse import urlsplit

from inferencia import folders
from inferencia.fields import (
    Place,
    Reader,
    Rejected,
    line,
    list_of,
    mapping_of,
    nearest,
    number,
    quoted,
    text,
)
from inferencia.tunnel.wire import is_host_name
from inferencia.yamlfile import Scalar, Sequence

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


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
    joined = line(place, "expected folders")
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
    found = line(place, "expected a list of origins").split(",")
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
            f"no browser sends the origin {quoted(value)};"
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
            raise Rejected(f"unknown service {quoted(name)}{hint}")
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
        raise Rejected(f"expected HOST:PORT or :PORT, got {quoted(address)}")


def by_host_name(read: Reader[T]) -> Reader[dict[str, T]]:
    """Something for each of several host names, which become lower case."""

    def read_names(place: Place) -> dict[str, T]:
        found: dict[str, T] = {}
        for name, value in mapping_of(read)(place).items():
            if not is_host_name(name.lower()):
                raise Rejected(f"{quoted(name)} cannot be the name of a host")
            if name.lower() in found:
                raise Rejected(f"{quoted(name)} is there twice")
            found[name.lower()] = value
        return found

    return read_names


# RFC 9110, 5.6.2: token.
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
# These touch the framing of a message, which is the pool's alone.
FRAMING_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# These describe the connection or the message, and are ours to write.
_OUR_HEADERS = FRAMING_HEADERS | {"content-encoding", "via"}


def headers(place: Place) -> tuple[tuple[str, str], ...]:
    """Header fields, as ``Name: value``; no name twice, whatever its case."""
    found = mapping_of(_header_value)(place.secret())
    seen: set[str] = set()
    for name in found:
        if not _TOKEN.fullmatch(name):
            raise Rejected(f"{quoted(name)} cannot be the name of a header")
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
            raise Rejected(f"expected prompt and completion, got {quoted(name)}")
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
