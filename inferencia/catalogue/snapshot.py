"""What all backends offer at one moment: who serves a name, and the list for clients.

A ``Snapshot`` never changes; when a list comes in, a new one is made of all.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferencia.backends.base import Backend, ListedModel

# Members of a backend's own record that clients have a use for. Not among them: file
# paths, command lines, permissions.
_KEPT_MEMBERS = (
    "name",
    "display_name",
    "description",
    "context_length",
    "context_window",
    "max_context_length",
    "max_model_len",
    "max_output_tokens",
    "architecture",
    "capabilities",
    "supported_parameters",
    "pricing",
    "meta",
)
_MAX_MEMBER_LENGTH = 4096  # characters of JSON


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that can take the request, and the model's name there."""

    backend: Backend
    upstream_id: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is known at one moment."""

    served: Mapping[str, tuple[Candidate, ...]]  # by name, names sorted
    hidden: frozenset[str]  # names that are served and not listed
    loaded: frozenset[str]  # names that a server says are in its memory
    ours: Mapping[str, Backend]  # names whose backend knows whether they are loaded
    entries: tuple[dict[str, Any], ...]  # of /v1/models, sorted by id

    def listed_as(self, name: str) -> str | None:
        """The name, or with Ollama's implied ``:latest``; None if neither is known."""
        if name in self.served:
            return name
        latest = f"{name}:latest"
        return latest if latest in self.served else None

    def visible(self, may_see: Callable[[str], bool]) -> list[str]:
        """The names that are listed, sorted."""
        return [n for n in self.served if n not in self.hidden and may_see(n)]

    def is_loaded(self, name: str) -> bool:
        """Whether a model is in memory now, as far as is known."""
        ours = self.ours.get(name)
        return name in self.loaded or (ours is not None and ours.has_loaded)


def snapshot_of(
    offers: Iterable[tuple[Backend, Sequence[ListedModel]]], created: int
) -> Snapshot:
    """Merge what backends offer.

    Args:
        offers: each backend with its models; of two with one priority, the first
            describes what both have.
        created: when models were made whose record does not say, in seconds since 1970.
    """
    served: dict[str, list[Candidate]] = {}
    entries: dict[str, dict[str, Any]] = {}
    loaded: set[str] = set()
    ours: dict[str, Backend] = {}
    for backend, models in sorted(offers, key=lambda offer: -offer[0].priority):
        for model in models:
            candidate = Candidate(backend, model.upstream_id)
            served.setdefault(model.id, []).append(candidate)
            if backend.lists_itself and "status" not in model.raw:
                ours[model.id] = backend
            if model.id not in entries and not model.is_hidden:
                entries[model.id] = _entry(model, backend, created)
            if _is_loaded(model.raw):
                loaded.add(model.id)
    names = sorted(served)
    return Snapshot(
        {name: tuple(served[name]) for name in names},
        frozenset(name for name in names if name not in entries),
        frozenset(loaded),
        ours,
        tuple(entries[name] for name in names if name in entries),
    )


def with_status(entry: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """An entry with whether the model is in memory, as llama-server's router says."""
    return entry | {"status": {"value": "loaded" if backend.has_loaded else "unloaded"}}


def _entry(model: ListedModel, backend: Backend, created: int) -> dict[str, Any]:
    """A model as ``/v1/models`` shows it."""
    told = model.raw.get("created")
    owner = model.raw.get("owned_by")
    entry = {
        "id": model.id,
        "object": "model",
        "created": told if type(told) is int else created,
        "owned_by": owner if isinstance(owner, str) and owner else backend.name,
    }
    for name in _KEPT_MEMBERS:
        value = model.raw.get(name)
        if value is not None and _is_small(value):
            entry[name] = value
    status = model.raw.get("status")
    if backend.lists_itself and isinstance(status, dict):
        entry["status"] = {"value": "loaded" if _is_loaded(model.raw) else "unloaded"}
    return entry


def _is_loaded(raw: Mapping[str, Any]) -> bool:
    """Whether a list says that a model is in memory, as llama-server's router does."""
    status = raw.get("status")
    return isinstance(status, dict) and status.get("value") == "loaded"


def _is_small(value: object) -> bool:
    try:
        return len(json.dumps(value)) <= _MAX_MEMBER_LENGTH
    except (ValueError, RecursionError):
        return False
