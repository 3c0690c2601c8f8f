"""What a service declares of each of its routes."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from inferencia.keys import Role

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method at one path."""

    service: str  # as ``server.listen`` names it; health is on every address
    method: str
    path: str  # aiohttp's pattern, such as /v1/models/{id:.+}
    role: Role | None  # what the key must be; None: no key at all
    handler: Handler
    is_relayed: bool = False  # the answer's bytes are passed on, which HEAD forbids
    further: tuple[str, ...] = ()  # services that have it as well
    changes: bool = False  # something; of other methods than GET that is assumed
    is_transfer: bool = False  # an administrator's, for which a drain waits

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it takes; HEAD goes with GET (RFC 9110, 9.1)."""
        if self.method == "GET" and not self.is_relayed:
            return ("GET", "HEAD")
        return (self.method,)
