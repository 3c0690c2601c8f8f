"""The backend behind a tunnel: an agent that has dialed in.

To everybody above, it is a backend like others. What differs: it tells by itself what
it serves, so nobody asks; it is down when its control connection is; and it may be
busy for others too, which it reports.
"""

from collections.abc import Callable
from typing import ClassVar

from inferencia.backends.base import Backend, Carrier, ListedModel
from inferencia.settings import BackendConfig
from inferencia.upstream.answer import ConnectFailed, Silent, UpstreamError


class TunnelledBackend(Backend):
    """One agent's session."""

    type: ClassVar[str] = "agent"
    lists_itself: ClassVar[bool] = True

    def __init__(
        self,
        agent: str,
        carrier: Carrier,
        *,
        session: str,
        instance: str,
        max_streams: int,
        priority: int,
        reported: Callable[[], int],
    ) -> None:
        """Make a backend.

        Args:
            agent: the name of its key.
            carrier: its parked connections.
            session: of this stay; other stays are other backends.
            instance: this process's name for ``Via``.
            max_streams: requests that it takes at a time.
            priority: as ``backends[].priority``; from its key.
            reported: how many requests it said that it works on, whoever sent them.
        """
        config = BackendConfig(
            name=agent,
            url=f"tunnel:{agent}/{session}",
            max_concurrency=max_streams,
            priority=priority,
        )
        super().__init__(config, carrier, instance=instance)
        self._models: tuple[ListedModel, ...] = ()
        self._reported = reported

    @property
    def own_models(self) -> tuple[ListedModel, ...]:
        return self._models

    @property
    def address(self) -> str:
        return "(tunnel)"

    @property
    def load(self) -> float:
        return max(self.held, self._reported()) / self.config.max_concurrency

    def serve(self, models: tuple[ListedModel, ...]) -> None:
        """Offer these from now on; the catalogue has to be told."""
        self._models = models

    def same_as(self, config: BackendConfig) -> bool:
        return False  # no part of the configuration can mean it

    def why(self, error: UpstreamError) -> str:
        if isinstance(error, ConnectFailed):
            return str(error)
        if isinstance(error, Silent):
            return self._says(f"was silent for {error.seconds:g} s")
        return self._says(f"was lost or does not answer well: {error}")

    def _says(self, what: str, remedy: str = "") -> str:
        text = f'agent "{self.name}" {what}'
        return f"{text} ({remedy})" if remedy else text
