"""The models of this machine, kept in step with the configuration and the folders.

What the owner wrote (a llama-swap configuration) and what lies in the folders (GGUF
files) becomes one plan for the fleet, and the fleet's models become backends of the
catalogue. Of two models with one name the written one counts.

The folders are looked through again every few seconds; a scan in which nothing has
changed costs no more than looking at the files' times.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferencia import folders
from inferencia.backends.base import Backend
from inferencia.backends.brands import make_backend
from inferencia.catalogue.choosing import Catalogue
from inferencia.logs import foreign_line
from inferencia.models.capacity import detected_budget
from inferencia.models.definitions import LogTo, ModelDefinition, Peer, SwapConfig
from inferencia.models.finding import Finder, Findings, FoundModel, Headers
from inferencia.models.fleet import Fleet, Plan
from inferencia.models.memory import estimate_command
from inferencia.models.offering import (
    GOINFER_PREFIX,
    goinfer_listing,
    to_definitions,
)
from inferencia.models.virtual import VirtualNames
from inferencia.secret import Secret
from inferencia.settings import BackendConfig, Config, QueueConfig

log = logging.getLogger(__name__)

# A file that appears is noticed within five seconds; a scan may take one.
SCAN_SECONDS = 3.0

GIB = 1024**3

# The groups of backends that are brought here; see ``catalogue.roster``.
LOCAL = "local"
PEERS = "peers"


class LocalModels:
    """What runs on this machine, and what is offered of it."""

    def __init__(
        self,
        fleet: Fleet,
        catalogue: Catalogue,
        names: VirtualNames,
        env: Mapping[str, str],
        *,
        instance: str,
    ) -> None:
        """Make it; nothing is offered before ``configure``.

        Args:
            fleet: starts and stops the models.
            catalogue: takes them up as backends.
            names: takes the configuration's further names.
            env: the environment, for the usual folders.
            instance: this process's name in ``Via``.
        """
        self.fleet = fleet
        self.findings = Findings()
        self._catalogue = catalogue
        self.names = names
        self._env = env
        self._instance = instance
        self._config, self._base = Config(), Path()
        self._searched: tuple[Path, ...] = ()
        self._finder: Finder | None = None  # looks there
        self._budget: int | None = None
        self._peers: list[Backend] = []
        self._preloading: set[asyncio.Task[None]] = set()
        self.idle_folders: tuple[Path, ...] = ()  # see ``_idle_folders``
        catalogue.unusable = self.why_unusable

    @property
    def budget(self) -> int | None:
        """Bytes that all loaded models may take together."""
        return self._budget

    @property
    def found(self) -> int:
        """How many GGUF files can be served."""
        return sum(model.is_usable for model in self.findings.models)

    @property
    def swap(self) -> SwapConfig | None:
        """What the configuration says in llama-swap's words, if it does."""
        return self._config.swap_config

    @property
    def written(self) -> int:
        """How many models the configuration describes."""
        swap = self._config.swap_config
        return len(swap.models) if swap is not None else 0

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where GGUF files are looked for."""
        return model_folders(self._config, self._env)

    async def configure(self, config: Config, base: Path) -> None:
        """Offer what this configuration says; what stays the same stays loaded.

        Args:
            config: the whole of it.
            base: the folder that its relative paths are relative to.
        """
        self._config, self._base = config, base
        swap = config.swap_config or SwapConfig()
        self.names.take(swap, created=int(time.time()))
        is_echoed = swap.log_to in (LogTo.UPSTREAM, LogTo.BOTH)
        self.fleet.logs.echo(_print if is_echoed else None)
        self._searched, self._finder = (), None
        self._budget = config.llama.memory
        if swap.models:
            await self._know_budget()
        before = {model.name: model for model in self.findings.models}
        self.findings = await self._scan()
        self._warn_of_unusable(before)
        self.idle_folders = await asyncio.to_thread(_idle_folders, config, self._env)
        await self._take(config.queue)
        await self._take_peers(swap.peers)

    async def follow(self) -> None:
        """Look through the folders again and again; runs until it is cancelled."""
        while True:
            await asyncio.sleep(SCAN_SECONDS)
            try:
                await self.look()
            except Exception:
                # What is served goes on; the next look may go better.
                log.exception("looking for models failed")

    async def look(self) -> bool:
        """Look through the folders now.

        Returns:
            Whether other models are offered than before.
        """
        found = await self._scan()
        if found == self.findings:
            return False
        before = {model.name: model for model in self.findings.models}
        self.findings = found
        for model in found.models:
            old = before.get(model.name)
            if model.is_usable and (old is None or not old.is_usable):
                log.info('found model "%s" at %s', model.name, model.path)
            if old is not None and old != model:
                self.fleet.scheduler.file_changed(model.name)
        for name in before.keys() - {model.name for model in found.models}:
            log.info('model "%s" is gone from the disk', name)
        self._warn_of_unusable(before)
        await self._take()
        return True

    def _warn_of_unusable(self, before: Mapping[str, FoundModel]) -> None:
        """Say which files cannot be served; whoever asks for one is told, too."""
        for model in self.findings.models:
            old = before.get(model.name)
            if not model.is_usable and (old is None or old.is_usable):
                log.warning(
                    'model "%s" cannot be served: %s %s',
                    model.name,
                    model.path,
                    model.error,
                )

    def why_unusable(self, name: str) -> str | None:
        """What is wrong with the file of a model that cannot be served.

        Returns:
            Words without its folder; None if there is no such file.
        """
        for known in (name, name.removeprefix(GOINFER_PREFIX)):
            model = self.findings.named(known)
            if model is not None and not model.is_usable:
                return f"{model.path.name} {model.error}"
        return None

    def preload(self) -> None:
        """Load in the background what the configuration wants loaded at the start."""
        swap = self._config.swap_config
        for model in swap.preload if swap is not None else ():
            task = asyncio.get_running_loop().create_task(self._preload(model))
            self._preloading.add(task)
            task.add_done_callback(self._preloading.discard)

    async def aclose(self) -> None:
        """Stop all models."""
        for task in self._preloading:
            task.cancel()
        if self._preloading:
            await asyncio.wait(tuple(self._preloading))
        await self.fleet.aclose()

    def goinfer_listing(self) -> dict[str, Any]:
        """The answer of goinfer's ``GET /models``."""
        loaded = {name for name in self.fleet.plan.models if self.fleet.is_ready(name)}
        return goinfer_listing(self.findings, loaded)

    async def _preload(self, model: str) -> None:
        try:
            await self.fleet.scheduler.load(model)
        except Exception as error:
            log.warning('preloading model "%s" failed: %s', model, error)

    async def _know_budget(self) -> None:
        """Find out how much memory there is, unless that is known or was said."""
        if self._budget is not None:
            return
        capacity = await asyncio.to_thread(detected_budget)
        self._budget = capacity.bytes or None
        log.info(
            "models may take %.1f GiB of memory together (%s)",
            capacity.bytes / GIB,
            capacity.source,
        )

    async def _scan(self) -> Findings:
        """Look, also into usual folders that have come into being meanwhile."""
        searched = await asyncio.to_thread(model_folders, self._config, self._env)
        if searched != self._searched:
            self._searched = searched
            self._finder = Finder(searched, headers=_HEADERS) if searched else None
            if searched:
                await self._know_budget()
        if self._finder is None:
            return Findings()
        return await asyncio.to_thread(self._finder.scan)

    async def _take(self, queue: QueueConfig | None = None) -> None:
        plan = self._plan()
        backends = self.fleet.take(
            plan, queue=queue, secret_variables=self._config.secret_variables
        )
        await self._catalogue.replace_group(LOCAL, backends)

    def _plan(self) -> Plan:
        config = self._config
        swap = config.swap_config or SwapConfig()
        start_port = swap.start_port + len(swap.models)
        models = {model.id: model for model in self._found_models(start_port)}
        models |= {model.id: model for model in swap.models}
        rules = (swap.matrix or swap.groups) if swap.has_groups else None
        return Plan(models, rules, self._budget, swap.start_port)

    def _found_models(self, start_port: int) -> tuple[ModelDefinition, ...]:
        llama = self._config.llama
        exe = shutil.which(llama.exe, path=self._env.get("PATH")) or llama.exe
        return to_definitions(
            self.findings,
            exe=exe,
            common=llama.args.common,
            goinfer=llama.args.goinfer,
            base=self._base,
            start_port=start_port,
        )

    async def _take_peers(self, peers: tuple[Peer, ...]) -> None:
        here = {backend.name: backend for backend in self._peers}
        self._peers = []
        for peer in peers:
            config = _peer_config(peer)
            backend = here.get(config.name)
            if backend is None or not backend.same_as(config):
                backend = make_backend(config, instance=self._instance)
            backend.filters = peer.filters
            self._peers.append(backend)
        await self._catalogue.replace_group(PEERS, self._peers)


# As they were read; what a model will take is estimated from them, too.
_HEADERS = Headers()


def estimated(command: Sequence[str]) -> int | None:
    """About how many bytes a llama-server started so will take; None: unknown."""
    return estimate_command(command, _HEADERS.read)


def _print(line: str) -> None:
    """Put a line of a model's server into our own log."""
    foreign_line("inferencia.models.output", line)


def has_files(config: Config, env: Mapping[str, str]) -> bool:
    """Whether there is a GGUF file that could be served; reads the folders."""
    searched = model_folders(config, env)
    found = Finder(searched, headers=_HEADERS).scan() if searched else Findings()
    return any(model.is_usable for model in found.models)


def model_folders(config: Config, env: Mapping[str, str]) -> tuple[Path, ...]:
    """Where GGUF files are looked for.

    Without any configuration these are the usual folders, as far as they exist, if
    there is a llama-server to run the files with.
    """
    if config.models_dir or not _takes_the_usual(config):
        return config.models_dir
    return _usual_folders(env) if _can_run(config, env) else ()


def _idle_folders(config: Config, env: Mapping[str, str]) -> tuple[Path, ...]:
    """The usual folders with GGUF files, if there is no llama-server to run them."""
    if not _takes_the_usual(config) or _can_run(config, env):
        return ()
    return tuple(
        folder
        for folder in _usual_folders(env)
        if any(model.is_usable for model in Finder((folder,)).scan().models)
    )


def _takes_the_usual(config: Config) -> bool:
    """Whether the usual folders count, because nobody has said anything else."""
    is_told = config.models_dir or config.swap_config is not None
    return config.discover and not config.is_demo and not is_told


def _can_run(config: Config, env: Mapping[str, str]) -> bool:
    return shutil.which(config.llama.exe, path=env.get("PATH")) is not None


def _usual_folders(env: Mapping[str, str]) -> tuple[Path, ...]:
    return tuple(folder for folder in folders.model_folders(env) if folder.is_dir())


def _peer_config(peer: Peer) -> BackendConfig:
    config = BackendConfig(
        name=f"peer/{peer.id}",
        type="openai",
        url=peer.proxy,
        connect_timeout=peer.timeouts.connect or 30.0,
        timeout=peer.timeouts.response_header,
        models=peer.models,
        prefix=f"{peer.id}/",
    )
    if not peer.api_key:
        return config
    # llama-swap sends it in both places, since peers differ in where they look.
    return replace(
        config,
        api_key=Secret(peer.api_key),
        headers=(("x-api-key", peer.api_key),),
    )
