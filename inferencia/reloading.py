"""What is in force, and how something else takes its place while requests go on.

    1. read configuration and keys, and make new backends: nothing has changed yet
    2. put all of it into force
    3. wait a little for the lists of new backends

Whatever is wrong is told in the first step, and then nothing changes. Backends that are
configured as they were are kept with their connections and counts, so that no stream is
cut. Servers that are found later are taken up the same way.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from inferencia.admission import (
    StartFailed,
    keys_path,
    open_keys,
    open_terms,
    uses_first_keys,
)
from inferencia.api.admin.inside import CannotLoad
from inferencia.app import Parts, body_limits, connection_cap, make_backends
from inferencia.backends.base import Backend
from inferencia.config import ConfigErrors, Loaded
from inferencia.cors import Cors
from inferencia.discovery import Found
from inferencia.loglines import redact
from inferencia.logs import LEVELS
from inferencia.neighbours import ECHO, looks_around, newcomers, with_backends
from inferencia.notify import Notifier
from inferencia.remote import RemoteAccess
from inferencia.settings import Config

log = logging.getLogger(__name__)

# Reads the configuration: the file as it is, or with other content.
Reader = Callable[[bytes | None], Loaded]


class InForce:
    """The configuration and the keys that count now.

    This is what administrators may change; see ``api.admin.inside``.
    """

    def __init__(
        self,
        parts: Parts,
        loaded: Loaded,
        config: Config,
        *,
        read: Reader,
        env: Mapping[str, str],
        ports: tuple[int, ...],
        notifier: Notifier,
        restart: Callable[[], None],
    ) -> None:
        """Begin with what the daemon was started with.

        Args:
            parts: what it was put into force in.
            loaded: the configuration as it was read.
            config: the same with its backends.
            read: reads it again.
            env: the environment.
            ports: where we listen.
            notifier: how to tell the service manager.
            restart: begins to drain, and starts the program anew behind that.
        """
        self.loaded = loaded  # changes at a reload
        self.config = config  # also when servers are found
        self.restart = restart
        self._parts = parts
        self._read = read
        self._env = env
        self._ports = ports
        self._notifier = notifier
        self._changing = asyncio.Lock()  # held by whoever swaps the backends

    @property
    def keys_file(self) -> Path:
        """The keys file that is followed, whether or not it is there."""
        return keys_path(self.loaded, self._env)

    @property
    def has_first_keys(self) -> bool:
        """Whether two keys were made because nobody said which there are."""
        return uses_first_keys(self.loaded)

    def check(self, content: bytes | None = None) -> Loaded:
        """Load a configuration without putting it into force; blocks.

        Args:
            content: instead of what is in the file.

        Raises:
            CannotLoad: it is wrong.
        """
        try:
            loaded = self._read(content)
            if not uses_first_keys(loaded):
                open_keys(loaded, self._env)
            open_terms(loaded.config)
            make_backends(loaded.config.backends, self._parts.instance)
        except ConfigErrors as errors:
            raise CannotLoad(errors.errors) from errors
        except StartFailed as failure:
            raise CannotLoad(tuple(str(failure).splitlines())) from failure
        except ValueError as error:
            raise CannotLoad((str(error),)) from error
        return loaded

    def keys_changed(self) -> None:
        """Tell everybody that other keys are in force."""
        self._parts.doors.keys_changed()
        self._parts.tunnel.keys_changed()
        names = self._parts.doors.ring.names
        self._parts.allowances.drop_idle(names, time.monotonic(), time.time())

    async def reload(self) -> tuple[str, ...]:
        """Take over a changed configuration and changed keys; cut nothing.

        Either all of it comes into force or nothing does.

        Returns:
            What is wrong with it.
        """
        self._notifier.reloading()
        try:
            async with self._changing:
                return await self._reload()
        finally:
            self._notifier.ready()

    async def take_found(self, found: Sequence[Found]) -> None:
        """Take up servers that were started later, in place of the built-in model."""
        async with self._changing:
            kept = tuple(b for b in self.config.backends if b.type != ECHO.type)
            new = newcomers(kept, found)
            if not new:
                return
            config = replace(self.config, backends=kept + new)
            for backend in new:
                log.info("found %s at %s", backend.name, backend.url)
            await self._take_backends(config, self._made(config))
            self.config = config

    async def _reload(self) -> tuple[str, ...]:
        try:
            loaded = self._read(None)
            keys = open_keys(loaded, self._env)
            terms = open_terms(loaded.config)
            config = await self._with_backends(loaded.config)
            backends = self._made(config)
        except ConfigErrors as errors:
            return self._refuse(errors.lines())
        except StartFailed as failure:
            return self._refuse(str(failure).splitlines())
        except Exception as error:
            log.exception("the configuration cannot be read again")
            return self._refuse([f"{type(error).__name__}: {error}"])
        for warning in (*loaded.warnings, *keys.ring.warnings):
            log.warning("%s", warning)
        doors = self._parts.doors
        doors.ring = keys.ring
        if doors.anonymous is not None and terms is not None:
            doors.anonymous = replace(doors.anonymous, origins=terms.origins)
        self._warn_of_the_next_start(config)
        self._take(config)
        await self._take_backends(config, backends)
        await self._parts.local.configure(config, loaded.folder)
        # Waits a little for the first lists, so that who asked for it finds them.
        await self._parts.catalogue.refresh()
        self.config, self.loaded = config, loaded
        self._parts.admin.take(config)
        self.keys_changed()
        self._parts.metrics.reloaded(ok=True)
        log.info("configuration reloaded")
        return ()

    async def _with_backends(self, config: Config) -> Config:
        """With those that were found before, if it still takes what is found."""
        if looks_around(config) and looks_around(self.config):
            return replace(config, backends=self.config.backends)
        config, _ = await with_backends(config, self._env, own_ports=self._ports)
        return config

    def _made(self, config: Config) -> list[Backend]:
        """The backends of ``config``; those that have not changed are kept."""
        here = {backend.name: backend for backend in self._parts.catalogue.backends}
        backends = []
        try:
            made = make_backends(config.backends, self._parts.instance)
        except ValueError as error:
            raise StartFailed(str(error), is_usage=True) from error
        for new in made:
            old = here.get(new.name)
            if old is not None and old.same_as(new.config):
                old.place = new.place
                backends.append(old)
            else:
                backends.append(new)
        return backends

    def _refuse(self, problems: Sequence[str]) -> tuple[str, ...]:
        for problem in problems:
            log.error("nothing was reloaded: %s", problem)
        self._parts.metrics.reloaded(ok=False)
        return tuple(problems)

    def _warn_of_the_next_start(self, new: Config) -> None:
        """Name what was changed and cannot be changed while it runs."""
        old = self.config
        pairs = [
            (f"server.{name}", getattr(old.server, name), getattr(new.server, name))
            for name in ("host", "port", "listen", "tls")
        ]
        pairs.append(("log.format", old.log.format, new.log.format))
        pairs.append(("usage.path", old.usage.path, new.usage.path))
        pairs.append(("metrics.public", old.metrics, new.metrics))
        for key, before, after in pairs:
            if before != after:
                log.warning("%s was changed: it takes effect at the next start", key)

    def _take(self, config: Config) -> None:
        """Put into force what is not about backends."""
        parts, server = self._parts, config.server
        logging.getLogger().setLevel(LEVELS[config.log.level])
        parts.tunnel.reload(self.config.tunnel, config.tunnel)
        parts.bodies.change_limits(body_limits(server))
        parts.relay.keepalive = server.sse_keepalive
        parts.guard.change(server.header_timeout, server.write_timeout)
        parts.guard.max_connections = connection_cap(server.max_connections)
        parts.doors.trusted_proxies = server.trusted_proxies
        parts.doors.cors = Cors(server.origins)
        remote = RemoteAccess(config.admin.remote, server.trusted_proxies)
        parts.doors.remote = remote
        parts.allowances.change_defaults(
            config.ratelimit.requests_per_second,
            config.ratelimit.burst,
            time.monotonic(),
        )
        parts.line.change(config.queue)
        parts.usage.change_keep(config.usage.keep)

    async def _take_backends(self, config: Config, backends: list[Backend]) -> None:
        hide_secrets(config)
        self._parts.spending.change(config.backends, config.usage.prices)
        await self._parts.catalogue.replace(backends, config.routing, config.watchdog)


def hide_secrets(config: Config) -> None:
    """Star the keys that we hold for backends, wherever they might be logged."""
    if config.tunnel.dial.token is not None:
        redact(config.tunnel.dial.token.reveal())
    for backend in config.backends:
        if backend.api_key is not None:
            redact(backend.api_key.reveal())
        for _, value in backend.headers:
            redact(value)
