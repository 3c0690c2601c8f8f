"""A model on this machine as a backend: started when it is asked for.

Each model has a backend of its own, so that it has its own breaker. Its requests need a
*lease* before they are sent: the promise that the model's process runs and stays until
the lease is given back. Who hands out leases, to how many at once and in what order,
and starts and stops processes, stands behind ``Host``.

    turn = backend.begin(now)
    await turn.get_ready(...)      may wait, swap models, and load
    answer = await backend.send(...)
    turn.end()                     gives the lease back, too
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from inferencia.backends.base import Backend, ListedModel, Turn
from inferencia.models.definitions import Capabilities, Filters, ModelDefinition
from inferencia.settings import BackendConfig
from inferencia.upstream.answer import (
    Answer,
    ConnectFailed,
    NoDescriptors,
    Silent,
    UpstreamError,
)
from inferencia.upstream.pool import Upstream

# Engines that run on without their client unless they are asked for a stream.
_ASSEMBLED_ENGINES = ("llama-server", "llama-cpp", "mlx_lm")


class Lease(Protocol):
    """The promise that a model's process runs and stays."""

    def release(self, *, served: bool = True) -> None:
        """Give it back; again does nothing.

        Args:
            served: whether the model has answered.
        """


class Host(Protocol):
    """Starts and stops the processes of models."""

    def try_lease(self, model: str) -> Lease | None:
        """A lease of a model that runs and takes requests now."""

    async def lease(
        self,
        model: str,
        *,
        key: str,
        priority: int,
        tell: Callable[[Callable[[], str]], None],
    ) -> Lease:
        """Wait until the model runs; see ``ManagedTurn.get_ready``."""

    def is_ready(self, model: str) -> bool:
        """Whether the model is in memory."""

    def why_it_died(self, model: str) -> str:
        """How the process has ended that there was last; "" if it lives."""


class ModelCarrier:
    """Takes requests to the process that serves the model now."""

    def __init__(self) -> None:
        self.upstream: Upstream | None = None  # set while the process runs

    def send(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]],
        body: bytes = b"",
        *,
        silence_seconds: float = 0,
        on_wire: Callable[[], None] | None = None,
    ) -> Coroutine[Any, Any, Answer]:
        # Not a coroutine itself: that would be one more for each request.
        upstream = self.upstream
        if upstream is None:
            return _refused()
        return upstream.send(
            method,
            target,
            headers,
            body,
            silence_seconds=silence_seconds,
            on_wire=on_wire,
        )

    @property
    def open_connections(self) -> int:
        return 0 if self.upstream is None else self.upstream.open_connections

    async def aclose(self) -> None:
        """Nothing: connections are closed when the process ends (``Host``)."""


async def _refused() -> Answer:
    raise ConnectFailed("refused", "its process has ended")


class ManagedTurn(Turn):
    """A stay that needs its model in memory."""

    __slots__ = ("_has_answered", "_lease")

    def __init__(
        self, backend: "Managed", *, was_probe: bool, lease: Lease | None
    ) -> None:
        super().__init__(backend, was_probe=was_probe)
        self._lease = lease
        self._has_answered = False

    @property
    def is_ready(self) -> bool:
        return self._lease is not None

    @property
    def tells_of_loading(self) -> bool:
        backend = self._backend
        assert isinstance(backend, Managed)
        return backend.definition.send_loading_state and not backend.has_loaded

    async def get_ready(
        self, *, key: str, priority: int, tell: Callable[[Callable[[], str]], None]
    ) -> None:
        backend = self._backend
        assert isinstance(backend, Managed)
        self._lease = await backend.host.lease(
            backend.definition.id, key=key, priority=priority, tell=tell
        )
        # What failed before says nothing about a process that has just got ready.
        backend.breaker.succeeded()

    def succeeded(self) -> None:
        self._has_answered = True
        super().succeeded()

    def end(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release(served=self._has_answered)
        super().end()


class Managed(Backend):
    """One model on this machine."""

    type = "local"
    lists_itself = True

    def __init__(
        self,
        definition: ModelDefinition,
        host: Host,
        *,
        carrier: ModelCarrier | None = None,
        instance: str = "",
    ) -> None:
        """Make a backend.

        Args:
            definition: the model.
            host: starts and stops its process.
            carrier: that of the same model before a reload.
            instance: this process's name for ``Via``.
        """
        self.definition = definition
        self.host = host
        self.model_carrier = carrier or ModelCarrier()
        super().__init__(_config_of(definition), self.model_carrier, instance=instance)
        self.is_listed = True
        if definition.filters != Filters():
            self.filters = definition.filters
        self._names_engine = any(
            engine in part
            for part in definition.command[:3]
            for engine in _ASSEMBLED_ENGINES
        )

    @property
    def address(self) -> str:
        return "this machine"

    def why(self, error: UpstreamError) -> str:
        """What happened to the model's server, and its own last words if it ended."""
        name = self.definition.id
        if isinstance(error, NoDescriptors):
            return str(error)
        if isinstance(error, Silent):
            return f'model "{name}" was silent for {error.seconds:g} s'
        died = self.host.why_it_died(name)
        if died or isinstance(error, ConnectFailed):
            return f'the server of model "{name}" {died or "has ended"}; ask again'
        return f'the server of model "{name}" does not answer well: {error}'

    @property
    def has_loaded(self) -> bool:
        return self.host.is_ready(self.definition.id)

    @property
    def assembles(self) -> bool:
        return self._names_engine or super().assembles

    @property
    def has_completion(self) -> bool:
        command = self.definition.command[:3]
        return any("llama" in part for part in command) or super().has_completion

    @property
    def own_models(self) -> tuple[ListedModel, ...]:
        definition = self.definition
        return (
            ListedModel(
                definition.id,
                definition.upstream_id,
                record_of(definition),
                is_hidden=definition.unlisted,
            ),
        )

    def begin(self, now: float) -> ManagedTurn:
        self.in_flight += 1
        lease = self.host.try_lease(self.definition.id)
        return ManagedTurn(self, was_probe=self.breaker.begin(now), lease=lease)


def _config_of(definition: ModelDefinition) -> BackendConfig:
    timeouts = definition.timeouts
    return BackendConfig(
        name=f"local/{definition.id}",
        type="llamacpp",
        url=definition.proxy,
        connect_timeout=timeouts.connect or 30.0,
        timeout=timeouts.response_header,
    )


def record_of(definition: ModelDefinition) -> dict[str, Any]:
    """A model's record for ``/v1/models``, with llama-swap's members."""
    record: dict[str, Any] = {"id": definition.id, "owned_by": "inferencia"}
    if definition.name:
        record["name"] = definition.name
    if definition.description:
        record["description"] = definition.description
    if definition.capabilities is not None:
        record |= _abilities(definition.capabilities)
    told: dict[str, Any] = dict(definition.metadata) | {"type": "model"}
    if definition.aliases:
        told["aliases"] = list(definition.aliases)
    record["meta"] = {"llamaswap": told}
    if definition.capabilities is not None and definition.capabilities.context:
        record["meta"]["n_ctx"] = definition.capabilities.context
    return record


def _abilities(said: Capabilities) -> dict[str, Any]:
    takes, gives = said.inputs or ("text",), said.outputs or ("text",)
    found: dict[str, Any] = {
        "architecture": {
            "input_modalities": list(takes),
            "output_modalities": list(gives),
            "modality": f"{'+'.join(takes)}->{'+'.join(gives)}",
        },
        "capabilities": {
            "vision": "image" in takes and "text" in gives,
            "audio_transcriptions": "audio" in takes and "text" in gives,
            "audio_speech": "text" in takes and "audio" in gives,
            "image_generation": "text" in takes and "image" in gives,
            "image_to_image": "image" in takes and "image" in gives,
            "function_calling": said.tools,
            "reranker": said.reranker,
        },
    }
    if said.tools:
        found["supported_parameters"] = ["tools", "tool_choice"]
    if said.context:
        found["context_length"] = said.context
    return found
