"""The life of the daemon: start, follow changes, drain, end.

Start: keys, backends (configured, or found on this machine, or the built-in one), a
first look at every backend, then the socket. Then a person is told where everything is.

=================  ==============================================================
SIGTERM, SIGINT    drain: not ready, new work refused, open requests may finish
                   within ``shutdown_timeout``, then get an error event; exit 0
the same again     ends at once
SIGHUP             reads configuration and keys again; what is wrong changes nothing
=================  ==============================================================
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from inferencia import __version__
from inferencia.app import (
    Parts,
    body_limits,
    make_backends,
    make_parts,
    raise_descriptor_limit,
)
from inferencia.backends.base import Backend
from inferencia.catalogue import Catalogue
from inferencia.config import BackendConfig, Config, ConfigErrors, Loaded
from inferencia.discovery import Found, State, find_servers
from inferencia.errors import ShuttingDown
from inferencia.firstkeys import KEYS_FILE, FirstKeys, first_keys
from inferencia.folders import state_folder
from inferencia.greeting import Greeting, ServerLine, base_url
from inferencia.keys import Key, KeyRing, KeysError, Role
from inferencia.listener import is_loopback
from inferencia.logs import LEVELS, redact
from inferencia.logs import close as close_logs
from inferencia.middleware import Anonymous, today

log = logging.getLogger(__name__)

# Where to listen when 8080 is taken and nobody asked for it; remembered in this file.
SECOND_PORT = 8088
_PORT_FILE = "port"

# A changed keys file is in force within two of these.
_KEYS_POLL_SECONDS = 1.0

# What interrupted requests may take to say so, and clients to take the last bytes.
_LAST_WORDS_SECONDS = 2.0

ECHO = BackendConfig(name="echo", type="echo")

Reader = Callable[[], Loaded]


class StartFailed(Exception):
    """The daemon cannot start; ``str()`` says why and what to do."""

    def __init__(self, message: str, *, is_usage: bool = False) -> None:
        super().__init__(message)
        self.exit_code = 2 if is_usage else 1


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in force, and the two files where nothing was configured."""

    ring: KeyRing
    first: FirstKeys | None


def open_keys(loaded: Loaded, env: Mapping[str, str]) -> Keys:
    """Read the keys that the configuration names, or make the first two.

    Raises:
        StartFailed: the keys file is wrong, or no key in it can be used.
    """
    config = loaded.config
    auth, given = config.auth, config.server.api_key
    listed = None if auth.api_keys is None else [key.reveal() for key in auth.api_keys]
    admin = given.admin.reveal() if given.admin else None
    user = given.user.reveal() if given.user else None
    first, path = None, auth.keys_file
    try:
        if uses_first_keys(loaded):
            folder = state_folder(env)
            first, path = first_keys(folder), folder / KEYS_FILE
            admin, user = first.admin, first.user
        ring = KeyRing(path, listed=listed, admin=admin, user=user)
    except KeysError as error:
        raise StartFailed(str(error), is_usage=True) from error
    except OSError as error:
        raise StartFailed(f"cannot keep keys: {error}") from error
    if not ring.usable(today()) and not config.is_open:
        raise StartFailed(
            f"no usable key in {path}; make one with: inferencia keys add NAME",
            is_usage=True,
        )
    return Keys(ring, first)


def uses_first_keys(loaded: Loaded) -> bool:
    """Whether nothing says which keys there are, so that two are made."""
    auth, given = loaded.config.auth, loaded.config.server.api_key
    is_told = auth.is_keys_file_given or auth.api_keys is not None
    return loaded.source is None and not (is_told or given.admin or given.user)


def open_terms(config: Config) -> Anonymous | None:
    """The terms of ``--no-api-key``; ``None`` without it.

    Raises:
        StartFailed: others than this machine could connect.
    """
    if not config.is_open:
        return None
    host = config.server.host
    if not is_loopback(host):
        raise StartFailed(
            f"--no-api-key is refused on {host}: anybody could use your models. "
            "Listen on 127.0.0.1, or make a key with: inferencia keys add NAME",
            is_usage=True,
        )
    hosts = {"localhost", "127.0.0.1", "::1", host.lower()}
    key = Key(name="anonymous", digest=b"", role=Role.USER)
    return Anonymous(key, frozenset(hosts), frozenset(config.server.origins))


async def serve(read_config: Reader, loaded: Loaded, env: Mapping[str, str]) -> int:
    """Run the daemon until it is told to end.

    Args:
        read_config: reads the configuration again, at SIGHUP.
        loaded: what it read at the start.
        env: the environment.

    Returns:
        The exit code.

    Raises:
        StartFailed: it cannot start.
    """
    config = loaded.config
    keys = open_keys(loaded, env)
    anonymous = open_terms(config)
    discovery = await _discover(config)
    config = with_backends(config, discovery)
    raise_descriptor_limit()
    hide_secrets(config)
    parts = make_parts(config, keys.ring, anonymous)
    daemon = _Daemon(parts, config, read_config, env, follows=discovery is not None)
    async with contextlib.AsyncExitStack() as stack:
        await parts.listener.start()
        stack.push_async_callback(parts.listener.close)
        parts.catalogue.start()
        stack.push_async_callback(parts.catalogue.aclose)
        await parts.catalogue.refresh()  # waits a little for the first lists
        url = await _open_socket(parts, config, loaded, env)
        _greet(loaded, parts, keys.first, discovery, url, env)
        for warning in (*loaded.warnings, *keys.ring.warnings):
            log.warning("%s", warning)
        log.info("inferencia %s listens on %s", __version__, url)
        await daemon.run()
    log.info("ended")
    close_logs()
    return 0


def hide_secrets(config: Config) -> None:
    """Star the keys that we hold for backends, wherever they might be logged."""
    for backend in config.backends:
        if backend.api_key is not None:
            redact(backend.api_key.reveal())
        for _, value in backend.headers:
            redact(value)


# --- start -----------------------------------------------------------------------


async def _discover(config: Config) -> list[Found] | None:
    """What runs on this machine, if it is to be looked for."""
    if config.is_demo or not config.discover:
        return None
    return await find_servers()


def with_backends(config: Config, discovery: Sequence[Found] | None) -> Config:
    """The configuration with the backends that were found, or the built-in one."""
    if config.is_demo:
        return replace(config, backends=(ECHO,))
    if discovery is None:
        return config
    return replace(config, backends=backends_of(discovery) or (ECHO,))


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


async def _open_socket(
    parts: Parts, config: Config, loaded: Loaded, env: Mapping[str, str]
) -> str:
    """Listen, on the second port if the first is taken and nobody asked for it."""
    server = config.server
    remembered = None if server.is_port_given else _remembered_port(env)
    ports = [remembered or server.port]
    if not server.is_port_given and ports[0] != SECOND_PORT:
        ports.append(SECOND_PORT)
    for port in ports:
        try:
            host, bound = await parts.listener.open(server.host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise StartFailed(_cannot_listen(server.host, port, error)) from error
            log.warning("port %d is taken; trying %d", port, ports[-1])
            continue
        if port != server.port and port != remembered:
            _remember_port(port, env)
        return base_url(host, bound)
    raise AssertionError("there is at least one port")


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is taken by another program; choose another with --port or "
            "server.port"
        )
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by this user; choose one above 1023"
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def _remembered_port(env: Mapping[str, str]) -> int | None:
    try:
        port = int((state_folder(env) / _PORT_FILE).read_text("ascii"))
    except (OSError, ValueError):
        return None
    return port if port == SECOND_PORT else None


def _remember_port(port: int, env: Mapping[str, str]) -> None:
    """So that the command that was printed works after the next start, too."""
    folder = state_folder(env)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / _PORT_FILE).write_text(f"{port}\n", "ascii")
    except OSError as error:
        log.warning("cannot remember the port %d: %s", port, error)


def _greet(
    loaded: Loaded,
    parts: Parts,
    first: FirstKeys | None,
    discovery: Sequence[Found] | None,
    url: str,
    env: Mapping[str, str],
) -> None:
    def everything(model: str) -> bool:
        return True

    models = [entry["id"] for entry in parts.catalogue.listing(everything)]
    Greeting(
        base_url=url,
        source=loaded.source,
        servers=[_server_line(b, parts.catalogue) for b in parts.catalogue.backends]
        + _not_used(discovery or ()),
        models=models,
        user_key=first.user_file if first else None,
        admin_key=first.admin_file if first else None,
        is_open=loaded.config.is_open,
    ).print_to(sys.stdout, env)


def _server_line(backend: Backend, catalogue: Catalogue) -> ServerLine:
    if backend.type == ECHO.type:
        return ServerLine("echo", "built in", 1, "answers with your own words")
    where = backend.config.url
    if not backend.is_listed:
        return ServerLine(backend.name, where, None, backend.trouble or "no answer yet")
    count = len(catalogue.models_of(backend))
    return ServerLine(backend.name, where, count, backend.trouble)


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


class _Daemon:
    """What goes on while it serves."""

    def __init__(
        self,
        parts: Parts,
        config: Config,
        read_config: Reader,
        env: Mapping[str, str],
        *,
        follows: bool,
    ) -> None:
        self._parts = parts
        self._env = env
        self._config = config
        self._read_config = read_config
        self._follows = follows  # servers on this machine are looked for again
        self._ending = asyncio.Event()
        self._reload_asked = asyncio.Event()

    async def run(self) -> None:
        """Serve until told to end, then drain."""
        with self._signals():
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._follow_keys()),
                    group.create_task(self._follow_reloads()),
                ]
                if self._follows:
                    tasks.append(group.create_task(self._follow_servers()))
                await self._ending.wait()
                for task in tasks:
                    task.cancel()
            await self._drain()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload_asked.set)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _end(self, number: signal.Signals) -> None:
        if self._ending.is_set():
            log.warning("%s again: ending at once", number.name)
            logging.shutdown()
            os._exit(1)
        waiting = len(self._parts.doors.active)
        log.info(
            "%s: %d open requests may finish within %g s; the same signal again ends "
            "at once",
            number.name,
            waiting,
            self._config.server.shutdown_timeout,
        )
        self._parts.doors.draining = True
        self._ending.set()

    async def _drain(self) -> None:
        doors = self._parts.doors
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.server.shutdown_timeout):
                await doors.quiet()
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

    async def _follow_keys(self) -> None:
        doors, allowances = self._parts.doors, self._parts.allowances
        while True:
            await asyncio.sleep(_KEYS_POLL_SECONDS)
            if doors.ring.poll():
                names = doors.ring.names
                allowances.drop_idle(names, time.monotonic(), time.time())

    async def _follow_servers(self) -> None:
        """Take up servers that are started later, in place of the built-in model."""
        while True:
            await asyncio.sleep(self._config.watchdog.interval)
            kept = tuple(b for b in self._config.backends if b.type != ECHO.type)
            known = {backend.url for backend in kept}
            found = [f for f in await find_servers() if f.url not in known]
            fresh = backends_of(found, taken={backend.name for backend in kept})
            if fresh:
                self._config = replace(self._config, backends=kept + fresh)
                for backend in fresh:
                    log.info("found %s at %s", backend.name, backend.url)
                await self._take_backends(self._config)

    async def _follow_reloads(self) -> None:
        while True:
            await self._reload_asked.wait()
            self._reload_asked.clear()
            await self._reload()

    async def _reload(self) -> None:
        """Take over a changed configuration and changed keys; cut nothing.

        Either all of it comes into force or nothing does.
        """
        try:
            loaded = self._read_config()
            keys = open_keys(loaded, self._env)
        except ConfigErrors as errors:
            self._refuse_reload(errors.lines())
            return
        except StartFailed as failure:
            self._refuse_reload(str(failure).splitlines())
            return
        self._parts.doors.ring = keys.ring
        config = loaded.config
        if config.discover and not config.is_demo:
            config = replace(config, backends=self._config.backends)
        elif config.is_demo:
            config = replace(config, backends=(ECHO,))
        for warning in (*loaded.warnings, *keys.ring.warnings):
            log.warning("%s", warning)
        await self._take(config)
        self._parts.metrics.reloaded(ok=True)
        log.info("configuration reloaded")

    def _refuse_reload(self, problems: Sequence[str]) -> None:
        for problem in problems:
            log.error("nothing was reloaded: %s", problem)
        self._parts.metrics.reloaded(ok=False)

    async def _take(self, config: Config) -> None:
        parts, old = self._parts, self._config
        server = config.server
        if (server.host, server.port) != (old.server.host, old.server.port):
            log.warning("server.host and server.port take effect at the next start")
        if config.log.format != self._config.log.format:
            log.warning("log.format takes effect at the next start")
        logging.getLogger().setLevel(LEVELS[config.log.level])
        parts.bodies.change_limits(body_limits(server))
        parts.relay.keepalive = server.sse_keepalive
        parts.guard.change(server.header_timeout, server.write_timeout)
        parts.doors.trusted_proxies = server.trusted_proxies
        parts.allowances.change_defaults(
            config.ratelimit.requests_per_second,
            config.ratelimit.burst,
            time.monotonic(),
        )
        await self._take_backends(config)
        self._config = config

    async def _take_backends(self, config: Config) -> None:
        hide_secrets(config)
        here = {backend.name: backend for backend in self._parts.catalogue.backends}
        made = make_backends(config.backends, self._parts.instance)
        backends = []
        for new in made:
            old = here.get(new.name)
            if old is not None and old.same_as(new.config):
                old.place = new.place
                backends.append(old)
            else:
                backends.append(new)
        await self._parts.catalogue.replace(backends, config.routing, config.watchdog)
