"""Where an engine is: the host, port and path that a base URL says."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

_HOST = re.compile(r"[A-Za-z0-9._-]+")
_URL = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an engine is: what a base URL says."""

    host: str  # a name or an address, without brackets
    port: int
    tls: bool
    base_path: str  # "" or "/x", put before every target

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``http[s]://host[:port][/path]``; a trailing slash is dropped.

        Raises:
            ValueError: it is something else. The text names the URL, except where
                that would show a password.
        """
        if "@" in url:
            raise ValueError("a URL with a user or password in it is not accepted")
        if not _URL.fullmatch(url):
            raise ValueError(f"URL {url!r} has characters other than printable ASCII")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ValueError(f"URL {url!r} is malformed: {error}") from error
        if parts.scheme not in ("http", "https"):
            raise ValueError(f"URL {url!r} does not begin with http:// or https://")
        if not (_HOST.fullmatch(host) or _is_ipv6(host)) or port == 0:
            raise ValueError(f"URL {url!r} has no usable host and port")
        if parts.query or parts.fragment or "?" in url or "#" in url:
            raise ValueError(f"URL {url!r} has a query or a fragment")
        tls = parts.scheme == "https"
        if port is None:
            port = 443 if tls else 80
        return cls(host, port, tls, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """What ``Host`` says: ``host:port``, without the scheme's own port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port == (443 if self.tls else 80):
            return host
        return f"{host}:{self.port}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6 and "%" not in host
    except ValueError:
        return False
