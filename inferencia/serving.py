"""The life of the daemon: start, follow changes, drain, end.

Start: keys, backends (configured, or found on this machine, or the built-in one), a
first look at every backend, then the socket. Then a person is told where everything is.

=================  ==============================================================
SIGTERM, SIGINT    drain: not ready, new work refused, open requests may finish
                   within ``shutdown_timeout``, then get an error event; exit 0
the same again     ends at once
SIGHUP             reads configuration and keys again; what is wrong changes nothing
=================  ==============================================================

An administrator may ask for the last, and for a restart: a drain, behind which the
program starts itself anew (``cli``).
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import (
    Callable,
    Container,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from inferencia import __version__
from inferencia.admission import (
    Keys,
    StartFailed,
    keys_path,
    open_keys,
    open_terms,
    uses_first_keys,
)
from inferencia.api.admin.inside import CannotLoad
from inferencia.app import (
    Parts,
    body_limits,
    connection_cap,
    make_backends,
    make_parts,
    raise_descriptor_limit,
)
from inferencia.backends.base import Backend
from inferencia.catalogue import Catalogue
from inferencia.config import (
    BackendConfig,
    Config,
    ConfigErrors,
    Loaded,
    TlsConfig,
)
from inferencia.cors import Cors
from inferencia.discovery import Found, State, find_servers
from inferencia.errors import ShuttingDown
from inferencia.firstkeys import FirstKeys
from inferencia.greeting import Greeting, ServerLine, stop_writing
from inferencia.localmodels import LocalModels, has_files
from inferencia.logs import LEVELS, redact
from inferencia.logs import close as close_logs
from inferencia.middleware import Anonymous
from inferencia.notify import Notifier
from inferencia.pulse import Pulse
from inferencia.remote import RemoteAccess
from inferencia.sockets import CannotListen, Opened, open_sockets
from inferencia.tls import Certificate, CertificateError
from inferencia.usage import usage_file

log = logging.getLogger(__name__)

# Changed keys and certificates are in force within two of these.
_FILES_POLL_SECONDS = 1.0

# What interrupted requests may take to say so, and clients to take the last bytes.
_LAST_WORDS_SECONDS = 2.0

ECHO = BackendConfig(name="echo", type="echo")

# Reads the configuration: the file as it is, or with other content.
Reader = Callable[[bytes | None], Loaded]

# What ``serve`` returns when the program is to be started anew.
START_AGAIN = -1
_T = TypeVar("_T")


async def serve(
    read_config: Reader,
    loaded: Loaded,
    env: Mapping[str, str],
    notifier: Notifier | None = None,
) -> int:
    """Run the daemon until it is told to end.

    Args:
        read_config: reads the configuration again.
        loaded: what it read at the start.
        env: the environment.
        notifier: how to tell the service manager, if there is one.

    Returns:
        The exit code, or ``START_AGAIN``.

    Raises:
        StartFailed: it cannot start.
    """
    keys = open_keys(loaded, env)
    anonymous = open_terms(loaded.config)
    signals = _Signals()
    notifier = notifier or Notifier()
    beat_seconds = notifier.watchdog_seconds / 2
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(notifier.close)
        pulse = Pulse(beat=notifier.watchdog, beat_seconds=beat_seconds)
        await stack.enter_async_context(pulse)
        stack.enter_context(signals.caught())
        start = _start(
            read_config, loaded, env, keys, anonymous, signals, stack, notifier
        )
        daemon = await signals.unless_ended(start)
        if daemon is not None:
            await daemon.run()
    log.info("starting again" if signals.is_restart else "ended")
    close_logs()
    return START_AGAIN if signals.is_restart else 0


async def _start(
    read_config: Reader,
    loaded: Loaded,
    env: Mapping[str, str],
    keys: Keys,
    anonymous: Anonymous | None,
    signals: "_Signals",
    stack: contextlib.AsyncExitStack,
    notifier: Notifier,
) -> "_Daemon":
    """Do all that comes before serving; what must be closed goes onto ``stack``."""
    discovery = await _discover(loaded.config)
    has_models = await asyncio.to_thread(has_files, loaded.config, env)
    config = with_backends(loaded.config, discovery, has_models=has_models)
    raise_descriptor_limit()
    hide_secrets(config)
    try:
        parts = make_parts(config, keys.ring, anonymous, env)
    except ValueError as error:
        raise StartFailed(str(error), is_usage=True) from error
    await _open_usage(parts, config, env, stack)
    await parts.listener.start(parts.shortcuts)
    stack.push_async_callback(parts.listener.close)
    parts.catalogue.start()
    stack.push_async_callback(parts.catalogue.aclose)
    stack.push_async_callback(parts.local.aclose)
    stack.push_async_callback(parts.admin.aclose)
    await parts.local.fleet.open()
    await parts.local.configure(config, base_folder(loaded))
    await parts.catalogue.refresh()  # waits a little for the first lists
    certificate = open_certificate(config.server.tls)
    try:
        opened = await open_sockets(parts.listener, config.server, certificate, env)
    except CannotListen as error:
        raise StartFailed(str(error)) from error
    await stack.enter_async_context(parts.tunnel)
    _greet(loaded, parts, keys.first, discovery, opened)
    for warning in (*loaded.warnings, *keys.ring.warnings):
        log.warning("%s", warning)
    urls = ", ".join(one.url for one in opened)
    log.info("inferencia %s listens on %s", __version__, urls)
    notifier.ready(f"listens on {urls}")
    ports = tuple(one.port for one in opened)
    parts.admin.endpoint = f"{_base_url(opened)}/v1"
    return _Daemon(
        parts, config, loaded, read_config, env, signals, ports, notifier, certificate
    )


async def _open_usage(
    parts: Parts,
    config: Config,
    env: Mapping[str, str],
    stack: contextlib.AsyncExitStack,
) -> None:
    """Open the record of usage, and let limits go on from it."""
    try:
        path = usage_file(config.usage, env)
    except OSError as error:
        log.warning("usage is not written down: %s", error)
        return
    if path is None:
        return
    stack.push_async_callback(parts.usage.close)
    standing = await parts.usage.open(path, config.usage.keep)
    if standing is None:
        return
    now, wall = time.monotonic(), time.time()
    parts.allowances.restore(standing.tokens_today, standing.tokens_lately, now, wall)
    parts.spending.restore(standing.cost_today)


def open_certificate(tls: TlsConfig) -> Certificate | None:
    """The configured certificate, if there is one.

    Raises:
        StartFailed: it cannot be used.
    """
    if tls.cert is None or tls.key is None:
        return None
    try:
        return Certificate(tls.cert, tls.key)
    except CertificateError as error:
        raise StartFailed(f"server.tls: {error}", is_usage=True) from error


def base_folder(loaded: Loaded) -> Path:
    """What the configuration's relative paths are relative to."""
    return loaded.source.absolute().parent if loaded.source else Path.cwd()


def hide_secrets(config: Config) -> None:
    """Star the keys that we hold for backends, wherever they might be logged."""
    if config.tunnel.dial.token is not None:
        redact(config.tunnel.dial.token.reveal())
    for backend in config.backends:
        if backend.api_key is not None:
            redact(backend.api_key.reveal())
        for _, value in backend.headers:
            redact(value)


# --- start -----------------------------------------------------------------------


async def _discover(
    config: Config, *, own_ports: Sequence[int] = ()
) -> list[Found] | None:
    """What runs on this machine, if it is to be looked for."""
    if not _looks_around(config):
        return None
    return await find_servers(own_ports=own_ports)


def with_backends(
    config: Config, discovery: Sequence[Found] | None, *, has_models: bool
) -> Config:
    """The configuration with the backends that were found, or the built-in one.

    Args:
        config: as it was read.
        discovery: what was found; None if nothing was looked for.
        has_models: whether this gateway has models to start itself.
    """
    if config.is_demo:
        return replace(config, backends=(ECHO,))
    if discovery is None:
        return config
    found = backends_of(discovery)
    has_others = has_models or config.tunnel.accept.enabled
    return replace(config, backends=found or (() if has_others else (ECHO,)))


def backends_of(
    discovery: Sequence[Found], taken: Container[str] = ()
) -> tuple[BackendConfig, ...]:
    """A backend for each server that was found, with names not yet ``taken``."""
    backends: list[BackendConfig] = []
    for found in discovery:
        if found.state not in (State.SERVES, State.IS_LOADING):
            continue
        is_new = found.type not in taken and all(b.name != found.type for b in backends)
        name = found.type if is_new else f"{found.type}-{found.port}"
        backends.append(BackendConfig(name=name, type=found.type, url=found.url))
    return tuple(backends)


def _greet(
    loaded: Loaded,
    parts: Parts,
    first: FirstKeys | None,
    discovery: Sequence[Found] | None,
    opened: Sequence[Opened],
) -> None:
    def everything(model: str) -> bool:
        return True

    models = [entry["id"] for entry in parts.catalogue.listing(everything)]
    greeting = Greeting(
        base_url=_base_url(opened),
        notes=[
            f"{one.url}: {', '.join(sorted(one.address.services))}"
            for one in opened
            if one.address is not None and one.address.services is not None
        ]
        + [f"serves {relay} as an agent" for relay in loaded.config.tunnel.dial.relays],
        source=loaded.source,
        servers=[
            _server_line(backend, parts.catalogue)
            for backend in parts.catalogue.backends
            if not backend.lists_itself
        ]
        + _own_models(parts.local)
        + _not_used(discovery or ()),
        models=models,
        user_key=first.user_file if first else None,
        admin_key=first.admin_file if first else None,
        is_open=loaded.config.is_open,
        page=next((f"{o.url}/admin/" for o in opened if o.offers("admin")), ""),
    )
    try:
        greeting.print_to(sys.stdout, os.environ)
    except OSError as error:
        # A pipe that nobody reads or a full disk is no reason to serve nobody.
        log.warning("standard output is not written: %s", error.strerror)
        stop_writing(sys.stdout)


def _base_url(opened: Sequence[Opened]) -> str:
    return next((o.url for o in opened if o.offers("openai")), opened[0].url)


def _server_line(backend: Backend, catalogue: Catalogue) -> ServerLine:
    if backend.type == ECHO.type:
        return ServerLine("echo", "built in", 1, "answers with your own words")
    where = backend.config.url
    if not backend.is_listed:
        trouble = backend.trouble or "no answer yet"
        is_loading = "loading its model" in trouble
        return ServerLine(backend.name, where, None, trouble, is_loading)
    count = len(catalogue.models_of(backend))
    return ServerLine(backend.name, where, count, backend.trouble)


def _own_models(local: LocalModels) -> list[ServerLine]:
    """What this gateway starts itself, when it is asked for."""
    lines = []
    if local.found:
        files = "1 GGUF file" if local.found == 1 else f"{local.found} GGUF files"
        where = ", ".join(map(str, local.folders))
        remark = "started when asked for"
        lines.append(ServerLine("llama.cpp", f"{files} in {where}", 1, remark))
    if local.idle_folders:
        where = ", ".join(map(str, local.idle_folders))
        remark = f"no llama-server on the PATH to run the GGUF files in {where}"
        lines.append(ServerLine("llama.cpp", "", None, remark))
    if local.written:
        models = "1 model" if local.written == 1 else f"{local.written} models"
        remark = "started when asked for"
        lines.append(ServerLine("llama-swap", f"{models} of its file", 1, remark))
    return lines


def _not_used(discovery: Sequence[Found]) -> list[ServerLine]:
    """The usual servers that are not there, and those that want a key."""
    lines = []
    for found in discovery:
        if found.state is State.NEEDS_A_KEY:
            remark = "wants a key: configure it under backends"
            lines.append(ServerLine(found.type, found.url, None, remark))
        elif found.state is State.MISSING and found.type != "llamacpp":
            lines.append(
                ServerLine(found.type, "", None, f"nothing on port {found.port}")
            )
    return lines


# --- life ------------------------------------------------------------------------


class _Signals:
    """What the outside asks of the process; caught from its start to its end."""

    def __init__(self) -> None:
        self.ending = asyncio.Event()
        self.ended_by = ""  # the signal's name
        self.is_restart = False  # unless a signal comes meanwhile
        self.reload = asyncio.Event()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    async def unless_ended(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """The result of ``work``; None if the end was asked for before it was there."""
        task = asyncio.create_task(work)
        ending = asyncio.create_task(self.ending.wait())
        try:
            await asyncio.wait((task, ending), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for one in (task, ending):
                one.cancel()
            await asyncio.wait((task, ending))

    def restart(self) -> None:
        """End, and start again."""
        if not self.ending.is_set():
            self.is_restart, self.ended_by = True, "restart"
            self.ending.set()

    def _end(self, number: signal.Signals) -> None:
        if self.is_restart:
            self.is_restart, self.ended_by = False, number.name
        elif self.ending.is_set():
            log.warning("%s again: ending at once", number.name)
            logging.shutdown()
            os._exit(1)
        self.ended_by = number.name
        self.ending.set()


class _Daemon:
    """What goes on while it serves."""

    def __init__(
        self,
        parts: Parts,
        config: Config,
        loaded: Loaded,
        read_config: Reader,
        env: Mapping[str, str],
        signals: _Signals,
        ports: tuple[int, ...],
        notifier: Notifier,
        certificate: Certificate | None,
    ) -> None:
        self._parts = parts
        self._env = env
        self._config = config
        self.loaded = loaded  # what ``_config`` was made of
        self._read_config = read_config
        self._signals = signals
        self._ports = ports  # where we listen
        self._notifier = notifier
        self._certificate = certificate
        self._changing = asyncio.Lock()  # held by whoever swaps the backends
        parts.admin.daemon = self

    # What an administrator may ask for; see ``api.admin.inside``.

    @property
    def keys_file(self) -> Path:
        return keys_path(self.loaded, self._env)

    @property
    def has_first_keys(self) -> bool:
        return uses_first_keys(self.loaded)

    def check(self, content: bytes | None = None) -> Loaded:
        try:
            loaded = self._read_config(content)
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

    async def reload(self) -> tuple[str, ...]:
        self._notifier.reloading()
        try:
            async with self._changing:
                return await self._reload()
        finally:
            self._notifier.ready()

    def keys_changed(self) -> None:
        doors = self._parts.doors
        self._parts.tunnel.keys_changed()
        names = doors.ring.names
        self._parts.allowances.drop_idle(names, time.monotonic(), time.time())

    def restart(self) -> None:
        self._signals.restart()

    async def run(self) -> None:
        """Serve until told to end, then drain."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._follow_files()),
                group.create_task(self._follow_reloads()),
                group.create_task(self._follow_servers()),
                group.create_task(self._parts.local.follow()),
                group.create_task(self._parts.admin.follow()),
            ]
            self._parts.local.preload()
            await self._signals.ending.wait()
            self._parts.doors.draining = True
            for task in tasks:
                task.cancel()
        await self._drain()

    async def _drain(self) -> None:
        doors = self._parts.doors
        self._parts.swap.end_streams()
        self._parts.admin.end_streams()
        patience = self._config.server.shutdown_timeout
        log.info(
            "%s: %d open requests may finish within %g s; the same signal again ends "
            "at once",
            self._signals.ended_by,
            len(doors.active),
            patience,
        )
        status = f"{len(doors.active)} open requests may finish"
        if self._signals.is_restart:
            self._notifier.reloading(status)
        else:
            seconds = patience + 2 * _LAST_WORDS_SECONDS
            self._notifier.stopping(status, within_seconds=seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._parts.tunnel.drain(patience)
        left = tuple(doors.active)
        for context in left:
            context.interrupt(
                ShuttingDown("the server was shut down before this was finished")
            )
        if left:
            log.warning("%d requests were cut by the shutdown", len(left))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await doors.quiet()
                await self._parts.guard.flushed()

    async def _follow_files(self) -> None:
        doors = self._parts.doors
        while True:
            await asyncio.sleep(_FILES_POLL_SECONDS)
            if self._certificate is not None:
                self._certificate.poll()
            if doors.ring.poll():
                self.keys_changed()

    async def _follow_servers(self) -> None:
        """Take up servers that are started later, in place of the built-in model."""
        while True:
            await asyncio.sleep(self._config.watchdog.interval)
            if not _looks_around(self._config):
                continue
            try:
                found = await find_servers(own_ports=self._ports)
                async with self._changing:
                    await self._take_found(found)
            except Exception:
                # What is found next time may be better; what is served goes on.
                log.exception("looking for servers failed")

    async def _take_found(self, found: Sequence[Found]) -> None:
        kept = tuple(b for b in self._config.backends if b.type != ECHO.type)
        known = {urlsplit(backend.url).port for backend in kept}
        new = [one for one in found if one.port not in known]
        fresh = backends_of(new, taken={backend.name for backend in kept})
        if not fresh:
            return
        config = replace(self._config, backends=kept + fresh)
        for backend in fresh:
            log.info("found %s at %s", backend.name, backend.url)
        await self._take_backends(config, self._made(config))
        self._config = config

    async def _follow_reloads(self) -> None:
        while True:
            await self._signals.reload.wait()
            self._signals.reload.clear()
            await self.reload()

    async def _reload(self) -> tuple[str, ...]:
        """Take over a changed configuration and changed keys; cut nothing.

        Either all of it comes into force or nothing does.

        Returns:
            What is wrong with it.
        """
        try:
            loaded = self._read_config(None)
            keys = open_keys(loaded, self._env)
            terms = open_terms(loaded.config)
            config = await self._with_backends(loaded.config)
            backends = self._made(config)
        except ConfigErrors as errors:
            return self._refuse_reload(errors.lines())
        except StartFailed as failure:
            return self._refuse_reload(str(failure).splitlines())
        except Exception as error:
            log.exception("the configuration cannot be read again")
            return self._refuse_reload([f"{type(error).__name__}: {error}"])
        for warning in (*loaded.warnings, *keys.ring.warnings):
            log.warning("%s", warning)
        doors = self._parts.doors
        doors.ring = keys.ring
        if doors.anonymous is not None and terms is not None:
            doors.anonymous = replace(doors.anonymous, origins=terms.origins)
        self._take(config)
        await self._take_backends(config, backends)
        await self._parts.local.configure(config, base_folder(loaded))
        # Waits a little for the first lists, so that who asked for it finds them.
        await self._parts.catalogue.refresh()
        self._config, self.loaded = config, loaded
        self._parts.admin.take(config)
        self._parts.allowances.drop_idle(keys.ring.names, time.monotonic(), time.time())
        self._parts.metrics.reloaded(ok=True)
        log.info("configuration reloaded")
        return ()

    async def _with_backends(self, config: Config) -> Config:
        """The new configuration with its backends, found ones as far as it has none."""
        if _looks_around(config) and _looks_around(self._config):
            return replace(config, backends=self._config.backends)
        found = await _discover(config, own_ports=self._ports)
        has_models = await asyncio.to_thread(has_files, config, self._env)
        return with_backends(config, found, has_models=has_models)

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

    def _refuse_reload(self, problems: Sequence[str]) -> tuple[str, ...]:
        for problem in problems:
            log.error("nothing was reloaded: %s", problem)
        self._parts.metrics.reloaded(ok=False)
        return tuple(problems)

    def _take(self, config: Config) -> None:
        """Put into force what is not about backends."""
        parts, old = self._parts, self._config
        server = config.server
        for name in ("host", "port", "listen", "tls"):
            if getattr(server, name) != getattr(old.server, name):
                log.warning("server.%s takes effect at the next start", name)
        if config.log.format != old.log.format:
            log.warning("log.format takes effect at the next start")
        if config.usage.path != old.usage.path:
            log.warning("usage.path takes effect at the next start")
        if config.metrics != old.metrics:
            log.warning("metrics.public takes effect at the next start")
        logging.getLogger().setLevel(LEVELS[config.log.level])
        parts.tunnel.reload(old.tunnel, config.tunnel)
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
        self._parts.spending.change(config.backends)
        await self._parts.catalogue.replace(backends, config.routing, config.watchdog)


def _looks_around(config: Config) -> bool:
    """Whether the backends are whatever servers run on this machine.

    Whoever says which models to start does not mean other programs' models.
    """
    has_own = bool(config.models_dir) or config.swap_config is not None
    return config.discover and not config.is_demo and not has_own
