"""One agent's stay at a relay, from its registration to its end.

    ACTIVE ---(control lost)---> SUSPECT ---(resumed)---> ACTIVE
      |                             |
      |                             +--(grace over, or no connection left)--> ENDED
      +--(drain, or replaced)--> DRAINING --(nothing in flight)--> ENDED

Only an ACTIVE session gets new requests. In every other state what has begun goes on,
since the control connection is not what carries it.

How many data connections there should be is decided in ``wanted``: those in use, one
for each request that waits, and some to spare. More are asked for at once, fewer only
after a minute, and the relay alone closes what is too many.
"""

import asyncio
import enum
import fnmatch
import logging
from collections.abc import Callable
from dataclasses import dataclass

from inferencia.backends.base import ListedModel
from inferencia.backends.tunnelled import TunnelledBackend
from inferencia.keys import Key
from inferencia.tunnel.carrier import Channel
from inferencia.tunnel.frames import CloseCode
from inferencia.tunnel.pool import ParkedConnections
from inferencia.tunnel.wire import (
    GRACE_SECONDS,
    MAX_PASSING,
    MAX_STREAMS,
    Bye,
    Drain,
    Drained,
    Message,
    Model,
    Pool,
    Register,
    Status,
    encode,
)

log = logging.getLogger(__name__)

# A surplus this old is no burst's rest; then one connection closes each few seconds.
_SURPLUS_SECONDS = 60.0
_SHRINK_SECONDS = 5.0
# What an agent may take to go when it has been told that nothing more will come.
_LEAVE_SECONDS = 5.0
# What in a key's ``models`` is no model but a host whose TLS may be passed on to it.
_HOST_MARK = "host:"


class State(enum.StrEnum):
    """See the module's header."""

    ACTIVE = "active"
    SUSPECT = "suspect"
    DRAINING = "draining"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Sorted:
    """An agent's models, held against the globs of its key."""

    accepted: tuple[Model, ...]
    rejected: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.id for model in self.accepted)


def sort_models(models: tuple[Model, ...], key: Key) -> Sorted:
    """Which models an agent may announce."""
    accepted = tuple(model for model in models if key.may_see(model.id))
    rejected = tuple(model.id for model in models if not key.may_see(model.id))
    return Sorted(accepted, rejected)


def may_pass(key: Key, host: str) -> bool:
    """Whether an agent may be given the TLS of clients who ask for this host.

    Its key must say so. A key without any ``models`` may announce every model, but no
    host: whoever gets the TLS of a name could have a certificate made out for it.
    """
    globs = [glob.partition(_HOST_MARK) for glob in key.models]
    return any(
        mark and not before and fnmatch.fnmatchcase(host, glob)
        for before, mark, glob in globs
    )


def wanted(*, in_use: int, waiting: int, spare: int, most: int) -> int:
    """How many data connections there should be."""
    return max(min(spare, most), min(in_use + waiting + spare, most))


class Session:
    """What the relay knows of one stay, and its connections."""

    def __init__(
        self,
        id: str,
        key: Key,
        register: Register,
        *,
        relay: str,
        on_change: Callable[["Session"], None],
    ) -> None:
        """Begin a stay; ``join`` gives it its control connection.

        Args:
            id: known to this agent and to us.
            key: whose digest it has shown.
            register: how it introduced itself.
            relay: this process's name for ``Via``.
            on_change: called when its state has changed.
        """
        self.id = id
        self.key = key
        self.instance = register.instance
        self.software = register.software
        self.max_streams = min(
            register.max_streams, key.concurrency or MAX_STREAMS, MAX_STREAMS
        )
        self.spare = register.spare
        self.state = State.ACTIVE
        self.why = ""  # it is not ACTIVE
        self.status = Status(0, 0, 0, 0)  # as last reported
        self.offered: tuple[Model, ...] = register.models  # before they were sorted
        self.hosts: tuple[str, ...] = ()  # whose TLS it ends itself, allowed or not
        self.sorted = sort_models(register.models, key)
        self.channel: Channel | None = None
        self.pool = ParkedConnections(key.name, self._note_change)
        self.backend = TunnelledBackend(
            key.name,
            self.pool,
            session=id,
            instance=relay,
            max_streams=self.max_streams,
            priority=key.priority,
            reported=lambda: self.status.active,
        )
        self.backend.serve(listed(self.sorted.accepted))
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._target = 0
        self._seq = 0
        self._is_noted = False  # a look at the target is scheduled
        self._surplus_since: float | None = None
        self._shrunk = 0.0  # when the last surplus connection was closed
        self._until: float | None = None  # when SUSPECT or a drained session ends

    @property
    def agent(self) -> str:
        return self.key.name

    @property
    def target(self) -> int:
        """The data connections that it was asked for."""
        return self._target

    @property
    def round_trip(self) -> float | None:
        """Seconds of the last ping on the control connection."""
        return None if self.channel is None else self.channel.round_trip

    @property
    def max_connections(self) -> int:
        """How many data connections it may have."""
        return self.max_streams + (MAX_PASSING if self.hosts else 0)

    def passes(self, host: str) -> bool:
        """Whether it may be given the TLS of clients who ask for this host, now."""
        return (
            self.state is State.ACTIVE
            and host in self.hosts
            and may_pass(self.key, host)
        )

    def join(self, channel: Channel) -> None:
        """Take a control connection, the first or one after a loss."""
        old, self.channel = self.channel, channel
        if old is not None:
            old.fail(ConnectionResetError("another control connection took over"))
        if self.state is State.SUSPECT:
            self._until = None
            self._become(State.ACTIVE, "")

    def lost(self, channel: Channel, error: Exception | None) -> None:
        """A control connection has ended."""
        if channel is not self.channel:
            return
        self.channel = None
        why = f": {error}" if error is not None and str(error) else ""
        if self.state is State.ACTIVE:
            log.info('agent "%s": its control connection was lost%s', self.agent, why)
            self._until = self._loop.time() + GRACE_SECONDS
            self._become(
                State.SUSPECT, "is not connected; it will dial again by itself"
            )
        elif self.state is State.DRAINING:
            self._until = self._loop.time() + (
                GRACE_SECONDS if self.pool.in_use else 0.0
            )

    def drain(self, why: str) -> None:
        """Send it nothing new; what has begun goes on."""
        if self.state in (State.ACTIVE, State.SUSPECT):
            self._become(State.DRAINING, why)
            self._set_target(0)
            self._note_change()

    def reported(self, status: Status) -> None:
        """Take note of how busy the agent is."""
        self.status = status
        if status.seq < self._seq:
            self._send_target()  # that message was lost

    def offer(self, models: tuple[Model, ...]) -> Sorted:
        """Take note of what the agent serves now; the catalogue has to be told."""
        self.offered = models
        self.sorted = sort_models(models, self.key)
        self.backend.serve(listed(self.sorted.accepted))
        return self.sorted

    def change_key(self, key: Key) -> bool:
        """Hold the models against a changed key; True if that changes them."""
        before = self.sorted
        self.key = key
        self.offer(self.offered)
        return self.sorted != before

    def send(self, message: Message) -> None:
        if self.channel is not None:
            self.channel.send(encode(message))

    def tick(self, now: float) -> None:
        """Do what is due. To be called about once a second."""
        if self.state is State.SUSPECT and not self.pool.open_connections:
            self.end("")
        elif self._until is not None and now >= self._until:
            self.end("")
        elif self.state is State.DRAINING:
            self._say_drained(now)
        else:
            self._shrink(now)

    def _say_drained(self, now: float) -> None:
        if not self.pool.in_use and self._until is None:
            self.send(Drained())
            self._until = now + _LEAVE_SECONDS

    def say_drain(self, seconds: float, reason: str, spread: float) -> None:
        """Tell the agent that this relay ends."""
        self.send(Drain(seconds, reason, (0.0, spread)))

    def end(self, code: str, message: str = "", retry_after: float = 0.0) -> None:
        """Close the control connection; ``pool.aclose`` does the rest.

        Args:
            code: of the ``bye``; "" says none.
            message: for the agent's log.
            retry_after: seconds.
        """
        if self.state is State.ENDED:
            return
        channel, self.channel = self.channel, None
        if channel is not None:
            if code:
                channel.send(encode(Bye(code, message, retry_after)))
            channel.finish(CloseCode.GOING_AWAY)
        self._become(State.ENDED, "is not connected; it will dial again by itself")

    # How many connections there should be.

    def _note_change(self) -> None:
        if not self._is_noted:
            self._is_noted = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._is_noted = False
        if self.state is State.ACTIVE and self._wanted > self._target:
            self._set_target(self._wanted)
        elif self.state is State.DRAINING:
            self._say_drained(self._loop.time())

    @property
    def _wanted(self) -> int:
        # What passes through is beside the requests: neither may hold up the other.
        passing = self.pool.passing
        return passing + wanted(
            in_use=max(0, self.pool.in_use + self.pool.waiting - passing),
            waiting=0,
            spare=self.spare,
            most=self.max_streams,
        )

    def _set_target(self, target: int) -> None:
        self._target = target
        self._seq += 1
        self._send_target()

    def _send_target(self) -> None:
        self.send(Pool(self._target, self._seq))

    def begin(self) -> None:
        """Ask for connections, after the agent was told that it is registered."""
        self._set_target(self._wanted if self.state is State.ACTIVE else 0)

    def _shrink(self, now: float) -> None:
        """Close connections that have been too many for a while, one by one."""
        surplus = self.pool.open_connections - self._wanted
        if surplus <= 0 or self.state is not State.ACTIVE:
            self._surplus_since = None
            return
        if self._surplus_since is None:
            self._surplus_since = now
        if now - self._surplus_since < _SURPLUS_SECONDS:
            return
        if self._target > self._wanted:
            self._set_target(self._wanted)
        if now - self._shrunk >= _SHRINK_SECONDS:
            self._shrunk = now
            self.pool.close_idle(1)

    def _become(self, state: State, why: str) -> None:
        self.state = state
        self.why = why
        self.backend.is_down = state is not State.ACTIVE
        self.backend.trouble = f'agent "{self.agent}" {why}' if why else ""
        if self.backend.is_down:
            self.pool.refuse(self.backend.trouble)
        else:
            self.pool.accept()
        self._on_change(self)


def listed(models: tuple[Model, ...]) -> tuple[ListedModel, ...]:
    """An agent's models as the catalogue takes them."""
    return tuple(ListedModel(model.id, model.id, model.record) for model in models)
