"""``GET state``: everything at one moment, in sections.

``Sections`` makes each section as JSON text, so that what is sent to many is made once,
and what has not changed is known by its text. Moments are told as seconds since 1970
and not as lengths of time: then nothing changes while nothing happens.
"""

import dataclasses
import json
import time
from collections.abc import Iterable
from typing import Any

from inferencia import __version__
from inferencia.api.admin.inside import Inside
from inferencia.api.admin.rates import Rates
from inferencia.backends.base import Backend
from inferencia.backends.managed import Managed
from inferencia.backends.tunnelled import TunnelledBackend
from inferencia.context import Context
from inferencia.host import Figures
from inferencia.keylines import Key
from inferencia.models.definitions import ModelDefinition
from inferencia.models.downloads import Downloads, Entry
from inferencia.models.downloads import State as DownloadState
from inferencia.models.offering import GOINFER_PREFIX
from inferencia.models.running import ModelState, State
from inferencia.secret import starred
from inferencia.tasks import Tasks, TaskState

_IN_MEMORY = (State.LOADING, State.READY, State.STOPPING)


class Sections:
    """The sections of the state."""

    def __init__(
        self, inside: Inside, rates: Rates, downloads: Downloads, tasks: Tasks
    ) -> None:
        self._inside = inside
        self._rates = rates
        self._downloads = downloads
        self._tasks = tasks
        self._started = time.time()
        self.host: Figures | None = None  # set by whoever looks at the machine
        # Texts of models, with what they were made of; most of them never change.
        self._models: dict[str, tuple[ModelState, ModelDefinition, str]] = {}
        self._keys: tuple[Key, ...] = inside.doors.ring.keys  # as they were told last
        self._keys_changed = self._started

    def texts(self) -> dict[str, str]:
        """All sections but the history, each as JSON."""
        inside = self._inside
        small = {
            "time": round(time.time(), 3),
            "version": __version__,
            "started": round(self._started, 3),
            "health": self._health(),
            "endpoint": inside.endpoint,
            "config": self._config(),
            "rates": self._rates.now,
            "totals": self._totals(),
            "in_flight": len(inside.doors.active),
            "waiting": self._waiting(),
            "memory": self._memory(),
            "requests": requests(inside.doors.active),
            "backends": [
                self._backend(backend)
                for backend in inside.catalogue.backends
                if not isinstance(backend, Managed | TunnelledBackend)
            ],
            "agents": [dataclasses.asdict(agent) for agent in inside.agents()],
            "keys": self._keys_told(),
            "downloads": [download(entry) for entry in self._downloads.entries],
            "tasks": [task(state) for state in self._tasks.states()],
            "usage": dataclasses.asdict(inside.usage.state),
            "host": None if self.host is None else dataclasses.asdict(self.host),
        }
        texts = {name: json.dumps(value) for name, value in small.items()}
        texts["models"] = f"[{', '.join(self._model_texts())}]"
        return texts

    def whole(self) -> str:
        """All of it, history included, as one JSON object."""
        texts = self.texts() | {"history": json.dumps(self._rates.history)}
        return joined(texts)

    def _health(self) -> str:
        if self._inside.doors.draining:
            return "draining"
        return "ready" if self._inside.catalogue.is_ready else "unavailable"

    def _config(self) -> dict[str, Any]:
        daemon, admin = self._inside.daemon, self._inside.config.admin
        loaded = None if daemon is None else daemon.loaded
        source = None if loaded is None else loaded.source
        return {
            "path": None if source is None else str(source.absolute()),
            "edit_commands": admin.edit_commands,
            "warnings": [] if loaded is None else list(loaded.warnings),
        }

    def _keys_told(self) -> dict[str, Any]:
        """As much of the keys as shows that others are in force."""
        ring = self._inside.doors.ring
        keys = ring.keys
        if keys != self._keys:
            self._keys, self._keys_changed = keys, time.time()
        return {
            "count": len(keys),
            "changed": round(self._keys_changed, 3),
            "problem": ring.problem,
        }

    def _totals(self) -> dict[str, int]:
        names = ("requests", "prompt_tokens", "completion_tokens")
        return dict(zip(names, self._inside.usage.totals, strict=True))

    def _waiting(self) -> dict[str, Any]:
        models = dict(self._inside.line.waiting_by_model())
        for state in self._inside.local.fleet.states():
            if state.waiting:
                models[state.model] = models.get(state.model, 0) + state.waiting
        return {"total": sum(models.values()), "models": models}

    def _memory(self) -> dict[str, int | None]:
        states = self._inside.local.fleet.states()
        used = sum(_memory(state) or 0 for state in states)
        return {"budget": self._inside.local.budget, "used": used}

    def _backend(self, backend: Backend) -> dict[str, Any]:
        return {
            "name": backend.name,
            "type": backend.config.type,
            "url": backend.config.url or None,
            "state": "down" if backend.is_down else "up",
            "trouble": backend.trouble or None,
            "breaker": backend.breaker.state(time.monotonic()),
            "models": len(self._inside.catalogue.models_of(backend)),
            "in_flight": backend.held,
            "waiting": self._inside.line.waiting_at(backend),
            "open_connections": backend.carrier.open_connections,
        }

    # Models.

    def models(self) -> list[dict[str, Any]]:
        """Each model's entry."""
        found: list[dict[str, Any]] = json.loads(f"[{', '.join(self._model_texts())}]")
        return found

    def model(self, name: str) -> dict[str, Any]:
        """The entry of a local model.

        Raises:
            ModelNotFound: there is no such model.
        """
        fleet = self._inside.local.fleet
        entry: dict[str, Any] = json.loads(
            self._local_text(fleet.state(name), fleet.plan.models[name])
        )
        return entry

    def _model_texts(self) -> list[str]:
        fleet = self._inside.local.fleet
        plan, states = fleet.plan.models, fleet.states()
        texts = []
        for state in states:
            definition = plan.get(state.model)
            if definition is None or _is_shadow(state, definition):
                continue
            texts.append(self._local_text(state, definition))
        for name in self._models.keys() - plan.keys():
            del self._models[name]
        found = self._inside.local.findings.models
        broken = (m for m in found if not m.is_usable and not m.is_arriving)
        texts += [
            json.dumps(_plain(m.name, "local", "broken") | {"error": m.error})
            for m in broken
            if m.name not in plan
        ]
        texts += [json.dumps(entry) for entry in self._remote()]
        return texts

    def _local_text(self, state: ModelState, definition: ModelDefinition) -> str:
        known = self._models.get(state.model)
        if known is not None and known[0] == state and known[1] is definition:
            return known[2]
        progress = self._inside.local.fleet.progress(state.model)
        text = json.dumps(_local(state, definition, progress))
        if state.state is State.STOPPED:  # of others, moments come from lengths of time
            self._models[state.model] = (state, definition, text)
        return text

    def _remote(self) -> Iterable[dict[str, Any]]:
        catalogue = self._inside.catalogue
        for backend in catalogue.backends:
            if isinstance(backend, Managed):
                continue
            is_agent = isinstance(backend, TunnelledBackend)
            name = f"tunnel/{backend.name}" if is_agent else backend.name
            for model in catalogue.models_of(backend):
                yield _plain(model, name, "remote")


def joined(texts: dict[str, str]) -> str:
    """Sections as one JSON object."""
    members = (f"{json.dumps(name)}: {text}" for name, text in texts.items())
    return f"{{{', '.join(members)}}}"


def _plain(model: str, backend: str, state: str) -> dict[str, Any]:
    return {"id": model, "backend": backend, "state": state, "listed": True}


def _is_shadow(state: ModelState, definition: ModelDefinition) -> bool:
    """Whether it is only the other name of a file's model, and not in use."""
    is_other_name = state.model == GOINFER_PREFIX + definition.use_model_name
    return is_other_name and state.state is State.STOPPED


def _local(
    state: ModelState, definition: ModelDefinition, progress: float | None
) -> dict[str, Any]:
    now, wall = time.monotonic(), time.time()

    def moment(then: float | None) -> float | None:
        return None if then is None else round(wall - (now - then), 1)

    def later(seconds: float | None) -> float | None:
        return None if seconds is None else float(round(wall + seconds))

    return {
        "id": state.model,
        "backend": "local",
        "state": str(state.state),
        "listed": not definition.unlisted,
        "in_flight": state.in_flight,
        "waiting": state.waiting,
        "loaded_since": moment(state.loaded_since),
        "load_seconds": _rounded(state.load_seconds),
        "unloads_at": later(state.ttl_left),
        "ttl": definition.ttl or None,
        "last_used": moment(state.last_used),
        "progress": _rounded(progress) if state.state is State.LOADING else None,
        "memory": _memory(state),
        "memory_estimated": state.memory_estimated,
        "memory_measured": state.memory_measured,
        "error": state.error or None,
        "retry_at": later(state.retry_after or None),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _memory(state: ModelState) -> int | None:
    """What a model takes now, as far as that is known; None if it is not loaded."""
    if state.state not in _IN_MEMORY:
        return None
    return state.memory_measured or state.memory_estimated


def requests(active: Iterable[Context]) -> list[dict[str, Any]]:
    """The requests in flight, oldest first."""
    return [
        _request(context)
        for context in sorted(active, key=lambda one: one.measurement.started)
    ]


def _request(context: Context) -> dict[str, Any]:
    m = context.measurement
    tokens = m.completion_so_far
    # An answer in one piece has begun for us when its engine streams it to us.
    has_begun = m.first_byte is not None or tokens > 0
    rate = None
    if tokens and m.first_byte is not None:
        seconds = time.monotonic() - m.first_byte
        rate = round(tokens / seconds, 1) if seconds > 0 else None
    return {
        "id": context.id,
        "key": m.key,
        "model": m.model,
        "backend": m.backend,
        "path": m.path,
        "client": m.client,
        "stream": m.stream,
        "state": "answering" if has_begun else "waiting",
        "began": round(time.time() - (time.monotonic() - m.started), 2),
        "waits_for": None if context.waits_for is None else context.waits_for(),
        "time_to_first_byte": _rounded(m.time_to_first_byte),
        "prompt_tokens": m.prompt_tokens,
        "completion_tokens": tokens if has_begun else None,
        "tokens_per_second": rate,
        "bytes_out": m.bytes_out,
    }


def download(entry: Entry) -> dict[str, Any]:
    """A download as it is told."""
    progress = entry.progress
    is_running = entry.state is DownloadState.RUNNING
    return {
        "id": entry.id,
        "model": str(entry.reference),
        "state": str(entry.state),
        "phase": str(progress.phase),
        "file": progress.file,
        "number": progress.number,
        "files": progress.files,
        "done": progress.done,
        "size": progress.size,
        "rate": round(progress.rate, 1) if is_running else 0.0,
        "seconds_left": _rounded(progress.seconds_left) if is_running else None,
        "note": progress.note,
        "error": entry.error,
        "began": round(entry.began, 3),
        "ended": _rounded(entry.ended),
        "path": None if entry.path is None else str(entry.path),
    }


def task(state: TaskState) -> dict[str, Any]:
    """A task as it is told."""
    told = dataclasses.asdict(state)
    return told | {
        "state": str(state.state),
        "commands": list(map(starred, state.commands)),
    }
