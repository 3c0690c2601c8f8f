"""From where this machine may be administered, and that no foreign page does it."""

from collections.abc import Mapping
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from inferencia.errors import Forbidden
from inferencia.remote import Networks, RemoteAccess

OFFICE = [ip_network("10.0.0.0/8")]
PROXY = [ip_network("192.168.1.1/32")]


class Wire:
    """As much of a transport as tells where it comes from."""

    def __init__(self, peer: str) -> None:
        self.peer = peer

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self.peer, 1) if name == "peername" else default

    def is_closing(self) -> bool:
        return False


def is_let_in(
    remote: bool | Networks,
    peer: str,
    *,
    changes: bool = False,
    proxies: Networks = (),
    headers: Mapping[str, str] | None = None,
) -> bool:
    named = {"Host": "gate:8080"} | dict(headers or {})
    request = make_mocked_request("GET", "/", headers=named, transport=Wire(peer))
    try:
        RemoteAccess(remote, proxies).check(request, changes=changes)
    except Forbidden as refusal:
        assert "admin.remote" in refusal.message or "another site" in refusal.message
        return False
    return True


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("remote", [False, True, OFFICE])
def test_on_the_machine_itself_it_is_always_possible(
    remote: bool | Networks, peer: str
) -> None:
    assert is_let_in(remote, peer)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "CF-Ray", "Via", "Forwarded"])
def test_what_a_proxy_on_this_machine_passes_on_is_not_from_this_machine(
    header: str,
) -> None:
    assert not is_let_in(False, "127.0.0.1", headers={header: "127.0.0.1"})
    assert not is_let_in(OFFICE, "127.0.0.1", headers={header: "10.0.0.1"})
    assert is_let_in(True, "127.0.0.1", headers={header: "8.8.8.8"})


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        *[("localhost:8080", True), ("127.0.0.1", True), ("[::1]:8080", True)],
        *[("[::1]", True), ("attic", True), ("Attic.local:80", True)],
        *[("a.localhost", True), ("10.0.0.7:8080", True), ("localhost.", True)],
        *[("evil.example", False), ("evil.example:8080", False)],
        *[("localhost.evil.example", False), ("127.0.0.1.evil.example", False)],
        *[("evil.example.", False), ("127.0.0.1:80.evil.example", False)],
    ],
)
def test_a_name_of_the_internet_is_not_this_machines(host: str, is_own: bool) -> None:
    """A proxy that adds no header passes it on, or a page has bent its own name."""
    named = {"Host": host}
    assert is_let_in(False, "127.0.0.1", headers=named) is is_own
    assert is_let_in(OFFICE, "127.0.0.1", headers=named) is is_own
    assert is_let_in(True, "127.0.0.1", headers=named)
    assert is_let_in(OFFICE, "10.0.0.1", headers=named)


def test_from_elsewhere_only_where_it_is_allowed() -> None:
    assert not is_let_in(False, "10.0.0.1")
    assert is_let_in(OFFICE, "10.0.0.1")
    assert not is_let_in(OFFICE, "11.0.0.1")
    assert is_let_in(True, "11.0.0.1")
    assert not is_let_in(False, "")


def test_a_trusted_proxys_word_about_the_address_counts_and_no_other() -> None:
    told = {"X-Forwarded-For": "10.1.1.1"}
    assert is_let_in(OFFICE, "192.168.1.1", proxies=PROXY, headers=told)
    assert not is_let_in(OFFICE, "192.168.1.2", proxies=PROXY, headers=told)
    told = {"X-Forwarded-For": "11.1.1.1"}
    assert not is_let_in(OFFICE, "192.168.1.1", proxies=PROXY, headers=told)
    # It is in such a network itself, and nobody knows who stands behind it.
    assert not is_let_in(OFFICE, "10.0.0.1", headers=told)


def test_a_page_of_another_site_may_look_but_change_nothing() -> None:
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "http://gate:8081"},
        {"Origin": "null"},
        {"Origin": "http://[evil"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert not is_let_in(True, "8.8.8.8", changes=True, headers=headers), headers
        assert is_let_in(True, "8.8.8.8", headers=headers), headers


def test_our_own_page_and_programs_may_change_things() -> None:
    allowed: tuple[dict[str, str], ...] = (
        {},
        {"Origin": "http://gate:8080", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://Gate:8080"},
        {"Sec-Fetch-Site": "none"},
    )
    for headers in allowed:
        assert is_let_in(True, "8.8.8.8", changes=True, headers=headers), headers
