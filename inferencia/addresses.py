"""Where to listen, and which services each address offers.

Normally one address offers all that is built. ``server.listen`` takes its place: each
of its addresses offers what it names, and health besides. ``llama-swap`` includes all
of ``openai``, as llama-swap itself does.
"""

from dataclasses import dataclass

from inferencia.settings import ServerConfig

# What can be asked for and is there. Health is everywhere and need not be asked for.
BUILT = frozenset(
    {"openai", "models", "goinfer", "llama-swap", "metrics", "admin", "tunnel"}
)
_INCLUDES = {"llama-swap": frozenset({"openai"})}

_HEALTH = frozenset({"health"})


@dataclass(frozen=True, slots=True)
class Address:
    """One address to listen on."""

    host: str
    port: int
    services: frozenset[str] | None = None  # None: all that there are

    def offers(self, service: str) -> bool:
        """Whether a service can be used here."""
        return self.services is None or service in self.services


def addresses(server: ServerConfig) -> tuple[Address, ...]:
    """All addresses, in the order of the configuration; at least one."""
    if not server.listen:
        return (Address(server.host, server.port),)
    found = []
    for address, services in server.listen.items():
        host, port = split_address(address, server)
        offered = _HEALTH.union(services)
        for service in services:
            offered |= _INCLUDES.get(service, frozenset())
        found.append(Address(host, port, frozenset(offered)))
    return tuple(found)


def split_address(address: str, server: ServerConfig) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; without a host it is ``server.host``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]") or server.host, int(port)


def unbuilt(server: ServerConfig) -> tuple[tuple[str, str], ...]:
    """Each address with a warning of what is asked for and not there."""
    return tuple(
        (address, f'the service "{service}" is not in this version')
        for address, services in server.listen.items()
        for service in services
        if service not in BUILT
    )
