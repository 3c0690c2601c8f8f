"""The life of the daemon: start, follow changes, drain, end.

    1. the keys, and who may come in without one
    2. the backends: configured, or found on this machine, or the built-in one
    3. a first look at every backend, then the sockets
    4. a person is told where everything is, the service manager that it is ready
    5. files, servers and requests to reload are followed until the end is asked for
    6. drain: not ready, new work refused; open requests may finish within
       ``shutdown_timeout``, then get an error event
    7. everything that was opened is closed in reverse, and the exit code is 0

Who asks for the end is the work of ``signals``; what may change meanwhile, of
``reloading``.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping

from inferencia import __version__
from inferencia.admission import Keys, StartFailed, open_keys, open_terms
from inferencia.app import Parts, make_parts, raise_descriptor_limit
from inferencia.config import Loaded
from inferencia.discovery import find_servers
from inferencia.errors import ShuttingDown
from inferencia.logs import close as close_logs
from inferencia.middleware import Anonymous
from inferencia.neighbours import looks_around, with_backends
from inferencia.notify import Notifier
from inferencia.pulse import Pulse
from inferencia.reloading import InForce, Reader, hide_secrets
from inferencia.settings import Config, TlsConfig
from inferencia.signals import Signals
from inferencia.sockets import CannotListen, open_sockets
from inferencia.tls import Certificate, CertificateError
from inferencia.usage import usage_file
from inferencia.welcome import base_url, greet

log = logging.getLogger(__name__)

# Changed keys and certificates are in force within two of these.
_FILES_POLL_SECONDS = 1.0

# What interrupted requests may take to say so, and clients to take the last bytes.
_LAST_WORDS_SECONDS = 2.0

# What ``serve`` returns when the program is to be started anew.
START_AGAIN = -1


async def serve(
    read: Reader,
    loaded: Loaded,
    env: Mapping[str, str],
    notifier: Notifier | None = None,
) -> int:
    """Run the daemon until it is told to end.

    Args:
        read: reads the configuration again.
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
    signals = Signals()
    notifier = notifier or Notifier()
    beat_seconds = notifier.watchdog_seconds / 2
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(notifier.close)
        pulse = Pulse(beat=notifier.watchdog, beat_seconds=beat_seconds)
        await stack.enter_async_context(pulse)
        stack.enter_context(signals.caught())
        start = _start(read, loaded, env, keys, anonymous, signals, stack, notifier)
        daemon = await signals.unless_ended(start)
        if daemon is not None:
            await daemon.run()
    log.info("starting again" if signals.is_restart else "ended")
    close_logs()
    return START_AGAIN if signals.is_restart else 0


# --- start -----------------------------------------------------------------------


async def _start(
    read: Reader,
    loaded: Loaded,
    env: Mapping[str, str],
    keys: Keys,
    anonymous: Anonymous | None,
    signals: Signals,
    stack: contextlib.AsyncExitStack,
    notifier: Notifier,
) -> "_Daemon":
    """Do all that comes before serving; what must be closed goes onto ``stack``."""
    config, found = await with_backends(loaded.config, env)
    raise_descriptor_limit()
    hide_secrets(config)
    try:
        parts = make_parts(config, keys.ring, anonymous, env)
    except ValueError as error:
        raise StartFailed(str(error), is_usage=True) from error
    await _open_parts(parts, config, loaded, env, stack)
    certificate = _open_certificate(config.server.tls)
    try:
        opened = await open_sockets(parts.listener, config.server, certificate, env)
    except CannotListen as error:
        raise StartFailed(str(error)) from error
    # Before anything is awaited: administrators may ask from now on.
    ports = tuple(one.port for one in opened)
    in_force = InForce(
        parts,
        loaded,
        config,
        read=read,
        env=env,
        ports=ports,
        notifier=notifier,
        restart=signals.restart,
    )
    parts.admin.endpoint = f"{base_url(opened)}/v1"
    parts.admin.daemon = in_force
    await stack.enter_async_context(parts.tunnel)
    greet(loaded, parts, keys.first, found, opened)
    for warning in (*loaded.warnings, *keys.ring.warnings):
        log.warning("%s", warning)
    urls = ", ".join(one.url for one in opened)
    log.info("inferencia %s listens on %s", __version__, urls)
    notifier.ready(f"listens on {urls}")
    return _Daemon(parts, in_force, signals, notifier, certificate, ports)


async def _open_parts(
    parts: Parts,
    config: Config,
    loaded: Loaded,
    env: Mapping[str, str],
    stack: contextlib.AsyncExitStack,
) -> None:
    """Bring to life what was made, as far as it comes before the sockets."""
    await _open_usage(parts, config, env, stack)
    await parts.listener.start(parts.shortcuts)
    stack.push_async_callback(parts.listener.close)
    parts.catalogue.start()
    stack.push_async_callback(parts.catalogue.aclose)
    stack.push_async_callback(parts.local.aclose)
    stack.push_async_callback(parts.admin.aclose)
    await parts.local.fleet.open()
    await parts.local.configure(config, loaded.folder)
    await parts.catalogue.refresh()  # waits a little for the first lists


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


def _open_certificate(tls: TlsConfig) -> Certificate | None:
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


# --- life ------------------------------------------------------------------------


class _Daemon:
    """What goes on while it serves."""

    def __init__(
        self,
        parts: Parts,
        in_force: InForce,
        signals: Signals,
        notifier: Notifier,
        certificate: Certificate | None,
        ports: tuple[int, ...],
    ) -> None:
        self._parts = parts
        self._in_force = in_force
        self._signals = signals
        self._notifier = notifier
        self._certificate = certificate
        self._ports = ports  # where we listen

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

    async def _follow_files(self) -> None:
        while True:
            await asyncio.sleep(_FILES_POLL_SECONDS)
            if self._certificate is not None:
                self._certificate.poll()
            if self._parts.doors.ring.poll():
                self._in_force.keys_changed()

    async def _follow_reloads(self) -> None:
        while True:
            await self._signals.reload.wait()
            self._signals.reload.clear()
            await self._in_force.reload()

    async def _follow_servers(self) -> None:
        """Take up servers that are started later, in place of the built-in model."""
        while True:
            await asyncio.sleep(self._in_force.config.watchdog.interval)
            if not looks_around(self._in_force.config):
                continue
            try:
                found = await find_servers(own_ports=self._ports)
                await self._in_force.take_found(found)
            except Exception:
                # What is found next time may be better; what is served goes on.
                log.exception("looking for servers failed")

    async def _drain(self) -> None:
        doors = self._parts.doors
        self._parts.swap.end_streams()
        self._parts.admin.end_streams()
        patience = self._in_force.config.server.shutdown_timeout
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
