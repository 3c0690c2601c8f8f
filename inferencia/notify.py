"""Telling the service manager how we are: systemd's notify protocol, sd_notify(3).

A service of ``Type=notify`` finds the name of a datagram socket in ``$NOTIFY_SOCKET``
and writes ``NAME=value`` lines to it, one datagram per message:

====================================  ===============================================
``READY=1``                           requests are answered; also ends a reload
``RELOADING=1``, ``MONOTONIC_USEC=``  configuration is being read again, as of when
``STOPPING=1``                        the drain has begun
``EXTEND_TIMEOUT_USEC=``              how long it may take, if that is longer than
                                      the unit's own limit
``STATUS=``                           a line for ``systemctl status``
``WATCHDOG=1``                        still alive; without it within WatchdogSec the
                                      service is killed and started again
====================================  ===============================================

Without a socket every call does nothing. A message that cannot be delivered is told to
the log and never stops the daemon. When to send which is decided elsewhere
(``serving``, ``pulse``).
"""

import logging
import socket
import time
from collections.abc import Mapping, MutableMapping
from typing import Self

log = logging.getLogger(__name__)

# For ``systemctl status``, which shows one line.
MAX_STATUS = 256  # characters

# The manager reads quickly; if it does not, the event loop has better things to do
# than to wait. A lost READY would end in a restart, so that one is worth a second.
_PATIENCE_SECONDS = 1.0

_MICROSECONDS = 1_000_000

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """One end of the conversation; the other one never answers."""

    def __init__(self, address: str = "", *, watchdog_seconds: float = 0.0) -> None:
        """Make one that speaks to ``address``.

        Args:
            address: a path, or ``@name`` for a name in Linux's abstract namespace;
                empty: nobody wants to know.
            watchdog_seconds: within which a sign of life is expected; 0: none is.
        """
        self.watchdog_seconds = watchdog_seconds
        # The variables that ``take`` has removed, for whom we start in our place.
        self.environment: Mapping[str, str] = {}
        self._address = _socket_name(address)
        self._socket: socket.socket | None = None
        if self._address is not None:
            kind = socket.SOCK_DGRAM
            self._socket = socket.socket(socket.AF_UNIX, kind)  # not inheritable
        elif address:
            # vsock: for virtual machines that report to their host.
            log.warning("NOTIFY_SOCKET is neither a path nor @name; nobody is told")

    @classmethod
    def take(cls, env: MutableMapping[str, str], pid: int) -> Self:
        """Make one as the environment says, and remove that from it.

        So child processes do not speak in our name, nor wait for a watchdog of theirs.

        Args:
            env: the environment of this process.
            pid: our process id; a watchdog may be meant for another process.
        """
        taken = {name: env.pop(name) for name in _VARIABLES if name in env}
        address = taken.get("NOTIFY_SOCKET", "")
        interval = taken.get("WATCHDOG_USEC", "")
        meant_for = taken.get("WATCHDOG_PID", "")
        seconds = 0.0
        if interval.isascii() and interval.isdigit() and meant_for in ("", str(pid)):
            seconds = int(interval) / _MICROSECONDS
        notifier = cls(address, watchdog_seconds=seconds)
        notifier.environment = taken
        return notifier

    @property
    def is_heard(self) -> bool:
        """Whether there is anybody to tell."""
        return self._socket is not None

    def ready(self, status: str = "") -> None:
        """Requests are answered from now on, or a reload has ended."""
        self._send("READY=1", *_status(status))

    def reloading(self, status: str = "") -> None:
        """Configuration is read again; ``ready`` must follow, whatever came of it."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}", *_status(status))

    def stopping(self, status: str = "", *, within_seconds: float = 0.0) -> None:
        """The drain has begun.

        Args:
            within_seconds: how long it may take; keeps a unit with a shorter
                TimeoutStopSec from killing us earlier.
        """
        extension = int(within_seconds * _MICROSECONDS)
        further = (f"EXTEND_TIMEOUT_USEC={extension}",) if extension > 0 else ()
        self._send("STOPPING=1", *further, *_status(status))

    def status(self, text: str) -> None:
        """Show this line in ``systemctl status``."""
        self._send(*_status(text))

    def watchdog(self) -> None:
        """We are alive. If this one is not taken at once, the next one will be."""
        self._send("WATCHDOG=1", patience=0.0)

    def close(self) -> None:
        """Say nothing more. Calling it again does nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str, patience: float = _PATIENCE_SECONDS) -> None:
        if self._socket is None or self._address is None or not lines:
            return
        message = "\n".join(lines).encode("utf-8", "replace")
        try:
            self._socket.settimeout(patience)
            # Not connected: a manager that was restarted has a new socket there.
            self._socket.sendto(message, self._address)
        except OSError as error:  # includes TimeoutError and BlockingIOError
            name = lines[0].partition("=")[0]
            log.warning("the service manager did not hear %s: %s", name, error)


def _socket_name(address: str) -> bytes | None:
    """What the system calls take: ``@`` stands for a leading NUL byte."""
    if address.startswith("@"):
        return b"\0" + address[1:].encode("utf-8", "surrogateescape")
    if address.startswith("/"):
        return address.encode("utf-8", "surrogateescape")
    return None


def _status(text: str) -> tuple[str, ...]:
    """The STATUS line; a line end in it would begin another message."""
    line = "".join(c if c.isprintable() else " " for c in text[:MAX_STATUS]).strip()
    return (f"STATUS={line}",) if line else ()
