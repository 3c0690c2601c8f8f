"""From where a request comes, and whether the machine may be administered from there.

A key of role admin is not enough to steer this machine: ``admin.remote`` says from
where it may be used. Without it that is this machine itself, by a connection that no
proxy or tunnel has made, and under a name that is its own: a name of the internet in
``Host`` is that of a silent proxy, or of a page whose name was made to lead here. And
no page of another site may change anything, whatever key its browser sends.
"""

import re
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from urllib.parse import urlsplit

from aiohttp import web

from inferencia.errors import Forbidden

Networks = Sequence[IPv4Network | IPv6Network]

# Headers that proxies and tunnels add: RFC 7239, 7.6.3 of RFC 9110, and the usual
# names of nginx, Cloudflare, Akamai, AWS, Fly, ngrok and Tailscale.
_FORWARDING = re.compile(
    r"forwarded|^via$|^(?:cf|cdn|fly|tailscale|ngrok|x-ngrok|x-amzn?|x-envoy)-"
    r"|^(?:x-)?(?:real|client|cluster-client|true-client|original)-(?:ip|host)$",
    re.IGNORECASE,
)

_PORT = re.compile(r":[0-9]*$")

# The last part of names that lead to no site of the internet.
_PRIVATE = frozenset({"localhost", "local", "internal"})


class RemoteAccess:
    """The rules of ``admin.remote``."""

    def __init__(self, remote: bool | Networks, trusted_proxies: Networks = ()) -> None:
        """Set the rules.

        Args:
            remote: whether from everywhere, or from which networks; from this machine
                it is always possible.
            trusted_proxies: whose word about a client's address is believed.
        """
        self._remote = remote
        self._trusted_proxies = trusted_proxies

    def check(self, request: web.Request, *, changes: bool) -> None:
        """Refuse a request for what is only the administrator's.

        Args:
            request: its key was found and is an administrator's.
            changes: whether it would change something.

        Raises:
            Forbidden: it comes from where it must not come from.
        """
        if not self._is_near(request):
            raise Forbidden(
                "this is only possible on the machine itself, under its own name and "
                "without a proxy between; admin.remote may allow it from elsewhere"
            )
        if changes and is_from_another_site(request):
            raise Forbidden("a page of another site may not do this")

    def _is_near(self, request: web.Request) -> bool:
        if self._remote is True:
            return True
        peer = request.remote or ""
        is_direct = not is_forwarded(request)
        if is_direct and _is_loopback(peer) and names_no_site(request):
            return True
        if self._remote is False:
            return False
        if not is_direct and not _is_in(peer, self._trusted_proxies):
            return False  # nobody knows who stands behind it
        return _is_in(client_address(request, self._trusted_proxies), self._remote)


def is_forwarded(request: web.Request) -> bool:
    """Whether a proxy or tunnel has touched the request."""
    return any(_FORWARDING.search(name) for name in request.headers)


def names_no_site(request: web.Request) -> bool:
    """Whether ``Host`` is an address or a name that nobody can have in the internet.

    Those are names without a dot, and the ones below ``localhost``, ``local`` and
    ``internal`` (RFC 6761, RFC 6762, and ICANN's resolution of 2024).
    """
    host = request.headers.get("Host", "").strip().lower()
    name = host if host.endswith("]") else _PORT.sub("", host)
    name = name.strip("[]").rstrip(".")
    last = name.rpartition(".")
    return not last[1] or last[2] in _PRIVATE or _is_address(name)


def is_from_another_site(request: web.Request) -> bool:
    """Whether a browser says that a page which is not ours made it send the request."""
    site = request.headers.get("Sec-Fetch-Site", "none")
    if site not in ("same-origin", "none"):
        return True
    host = request.headers.get("Host", "").lower()
    for origin in request.headers.getall("Origin", ()):
        try:
            if urlsplit(origin).netloc.lower() != host:
                return True
        except ValueError:  # brackets with no address in them
            return True
    return False


def client_address(request: web.Request, trusted: Networks) -> str:
    """Where a request comes from, as far as it can be believed."""
    peer = request.remote or ""
    if not trusted or not _is_in(peer, trusted):
        return peer
    named = request.headers.get("CF-Connecting-IP", "").strip()
    if named and _is_address(named):
        return named
    chain = ",".join(request.headers.getall("X-Forwarded-For", ())).split(",")
    for hop in reversed([hop.strip() for hop in chain]):
        if not _is_address(hop):
            break
        if not _is_in(hop, trusted):
            return hop
    return peer


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # an IPv6 zone may be any text


def _is_loopback(address: str) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _is_in(address: str, networks: Networks) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)
