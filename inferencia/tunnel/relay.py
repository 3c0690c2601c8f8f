"""The relay: agents come in, and each becomes a backend.

``open_control`` and ``open_data`` are called when the handshake of a connection has
been checked as HTTP and its key is known; what they give takes over the socket.
Identity is the key's name and nothing else: a data connection shows the key again, and
its session must be of the same key and the same process.

The newest process with a key is the one that is sent requests. An older one drains: its
network may have changed under it, and whoever comes back must not wait for a timeout.
A session that has ended stays known, as a backend that is down, so that its models are
503 and not 404, until its key is gone.

``run`` looks after all sessions; it is also what tells the catalogue, so that nothing
here is called back in the middle of something.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from inferencia.backends.base import Backend
from inferencia.errors import ApiError, RateLimitExceeded, ShuttingDown
from inferencia.keys import Key, Role
from inferencia.limits import TokenBucket
from inferencia.tunnel.carrier import Carrier, Channel, PeerLost
from inferencia.tunnel.session import Session, State
from inferencia.tunnel.wire import (
    GRACE_SECONDS,
    REGISTER_SECONDS,
    VERSION,
    BadMessage,
    Bye,
    Drain,
    Message,
    Models,
    ModelsOk,
    Register,
    Registered,
    Status,
    decode,
    encode,
)

log = logging.getLogger(__name__)

# The name of the agents' group in the catalogue.
GROUP = "tunnel"

_TICK_SECONDS = 1.0
# Keys that change are told of at once; this is for those that expire.
_KEYS_SECONDS = 60.0
# When a relay starts anew, all its agents come at once. So many are let in; a thousand
# are back within a minute.
_HANDSHAKES_PER_SECOND, _HANDSHAKES_BURST = 20.0, 40.0
# Who comes when there is no room is told a time of his own, so that he comes but once.
_LONGEST_TURN_SECONDS = 120.0
# One agent's control connections: a process that starts and fails is no flood.
_AGENTS_PER_SECOND, _AGENTS_BURST = 1.0, 10.0
# Its data connections; a burst of requests asks for many.
_DATA_PER_SECOND, _DATA_BURST = 100.0, 400.0
# Sessions of one key, those that drain included.
_MAX_SESSIONS_PER_AGENT = 3


class Gone(ApiError):
    """A data connection for a session that has ended."""

    status = 410
    type = "invalid_request_error"
    code = "session_gone"


class Hub(Protocol):
    """What is told of agents: the catalogue."""

    async def replace_group(self, group: str, backends: Sequence[Backend]) -> None: ...

    def relist(self, backend: Backend) -> None: ...


@dataclass(frozen=True, slots=True)
class AgentState:
    """What is known of one agent at this moment."""

    name: str
    state: str  # of its newest session; "ended" if there is none
    software: str
    connected_since: float | None  # seconds since 1970, of the newest session
    connections: int  # data connections, used or not
    streams: int  # requests in flight, those of draining sessions included
    waiting: int  # requests that wait for a data connection
    target: int
    max_streams: int
    active: int  # as it reported: its work for everybody
    round_trip: float | None  # seconds
    reconnects: int  # sessions and resumptions after the first
    models: tuple[str, ...]
    rejected: tuple[str, ...]
    hosts: tuple[str, ...]  # whose TLS is passed on to it
    passing: int  # clients whose TLS passes through now, or is about to


@dataclass(slots=True, eq=False)
class _Agent:
    """What stays known of an agent while it comes and goes."""

    name: str
    newest: Session
    since: float  # seconds since 1970, of the newest session
    joins: int = 0  # control connections that registered
    older: list[Session] = field(default_factory=list)  # that drain

    @property
    def sessions(self) -> tuple[Session, ...]:
        return (self.newest, *self.older)


class TunnelRelay:
    """All agents of one daemon."""

    def __init__(
        self,
        hub: Hub,
        find: Callable[[str], Key | None],
        *,
        instance: str,
        beat: float,
        passes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a relay without agents.

        Args:
            hub: the catalogue.
            find: the key of this name as it is now; None if it is gone. (A secret
                that was rotated is the same agent's; the old one opens nothing new.)
            instance: this process's name.
            beat: ``tunnel.beat`` in seconds.
            passes: whether there is a port whose TLS is passed on by name.
            clock: for the admission.
        """
        self._hub = hub
        self._find = find
        self._instance = instance
        self._beat = beat
        self._passes = passes
        self._clock = clock
        self._agents: dict[str, _Agent] = {}
        self._sessions: dict[str, Session] = {}
        self._registering: set[Channel] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._is_draining = False
        now = clock()
        self._doors = TokenBucket(
            _HANDSHAKES_PER_SECOND, _HANDSHAKES_BURST, _HANDSHAKES_BURST, now
        )
        self._turns_until = now  # turns are promised so far ahead
        self._buckets: dict[tuple[str, str], TokenBucket] = {}

    @property
    def instance(self) -> str:
        return self._instance

    @property
    def states(self) -> tuple[AgentState, ...]:
        """All agents that were here, by name."""
        return tuple(_state(self._agents[name]) for name in sorted(self._agents))

    @property
    def sessions(self) -> tuple[Session, ...]:
        """All that have not ended."""
        return tuple(self._sessions.values())

    def knows(self, name: str) -> bool:
        """Whether an agent has been here since the start."""
        return name in self._agents

    # Connections that come in.

    def open_control(self, key: Key, instance: str, peer: str) -> Channel:
        """A control connection of this agent.

        Raises:
            ApiError: it has to come later.
        """
        if self._is_draining:
            raise ShuttingDown("this relay is shutting down", retry_after=1)
        now = self._clock()
        wait = self._bucket(key.name, "control", now).take(1, now)
        if not wait and self._doors.take(1, now):
            wait = self._next_turn(now)
        if wait:
            raise RateLimitExceeded(
                "too many agents at once; each has its turn", retry_after=wait
            )
        return _Registration(self, key, instance, peer).channel

    def _next_turn(self, now: float) -> float:
        """When the next of those who came at once is to come again, in seconds."""
        first = max(self._turns_until, now)
        self._turns_until = first + 1 / _HANDSHAKES_PER_SECOND
        return min(self._turns_until - now, _LONGEST_TURN_SECONDS)

    def open_data(self, key: Key, instance: str, session_id: str, peer: str) -> Carrier:
        """A data connection of a session of this agent.

        Raises:
            ApiError: there is no such session of theirs, or it has enough of them.
        """
        session = self._sessions.get(session_id)
        if session is None or session.state is State.ENDED:
            raise Gone("this registration has ended; register again")
        if session.agent != key.name or session.instance != instance:
            # Somebody else's session is as unknown as none.
            raise Gone("this registration has ended; register again")
        now = self._clock()
        wait = self._bucket(key.name, "data", now).take(1, now)
        if session.pool.open_connections >= session.max_connections:
            wait = max(wait, 1.0)
        if session.state is State.DRAINING:
            raise Gone("this registration takes no new connections")
        if wait:
            raise RateLimitExceeded(
                "this agent has dialed as many connections as it may",
                retry_after=wait,
            )
        return session.pool.expect(beat=self._beat, peer=peer)

    def _bucket(self, name: str, kind: str, now: float) -> TokenBucket:
        rate, burst = (
            (_AGENTS_PER_SECOND, _AGENTS_BURST)
            if kind == "control"
            else (_DATA_PER_SECOND, _DATA_BURST)
        )
        fresh = TokenBucket(rate, burst, burst, now)
        return self._buckets.setdefault((name, kind), fresh)

    # What agents say.

    def register(
        self, channel: Channel, key: Key, instance: str, register: Register
    ) -> Session | None:
        """Let an agent in; None if it was sent away."""
        refusal = _refusal(key, instance, register)
        if refusal is not None:
            channel.send(encode(refusal))
            channel.finish()
            return None
        session = self._resumable(key, register)
        is_resumed = session is not None
        if session is None:
            session = self._new_session(key, register)
        else:
            session.offer(register.models)
        session.hosts = register.passthrough if self._passes else ()
        agent = self._agents[key.name]
        agent.joins += 1
        session.join(channel)
        session.send(
            Registered(
                session=session.id,
                resumed=is_resumed,
                agent=key.name,
                relay=self._instance,
                accepted=session.sorted.names,
                rejected=session.sorted.rejected,
                beat=self._beat,
                grace=GRACE_SECONDS,
                passthrough=tuple(filter(session.passes, session.hosts)),
            )
        )
        session.begin()
        self._say_who_came(session, is_resumed=is_resumed)
        self._changed.set()
        return session

    def heard(self, session: Session, message: Message) -> None:
        """An agent says something after it was let in."""
        if isinstance(message, Status):
            session.reported(message)
        elif isinstance(message, Models):
            found = session.offer(message.models)
            session.send(ModelsOk(found.names, found.rejected))
            self._hub.relist(session.backend)
        elif isinstance(message, Drain):
            log.info('agent "%s" drains: %s', session.agent, message.reason)
            session.drain("is shutting down")
        elif isinstance(message, Bye):
            session.end("")

    def check_keys(self) -> None:
        """Send away those whose key is gone; hold models against changed keys."""
        for agent in tuple(self._agents.values()):
            key = self._key_now(agent.name)
            for session in agent.sessions:
                if key is None:
                    session.end("unauthorized", "the key of this agent was revoked")
                elif session.change_key(key):
                    found = session.sorted
                    session.send(ModelsOk(found.names, found.rejected))
                    self._hub.relist(session.backend)
            if key is None:
                log.info('agent "%s": its key is gone', agent.name)
                del self._agents[agent.name]
                self._changed.set()

    def _key_now(self, name: str) -> Key | None:
        key = self._find(name)
        return key if key is not None and key.role is Role.AGENT else None

    # Its life.

    async def run(self) -> None:
        """Look after the sessions until cancelled."""
        loop = asyncio.get_running_loop()
        checked = loop.time()
        while True:
            try:
                async with asyncio.timeout(min(_TICK_SECONDS, self._beat)):
                    await self._changed.wait()
                self._changed.clear()
                await self._tell_hub()
            except TimeoutError:
                pass
            now = loop.time()
            for session in tuple(self._sessions.values()):
                session.tick(now)
            if now - checked >= _KEYS_SECONDS:
                checked = now
                self.check_keys()

    def drain(self, seconds: float) -> None:
        """Tell every agent that this relay ends; let nobody in any more."""
        self._is_draining = True
        spread = min(30.0, 1.0 + len(self._sessions) / _HANDSHAKES_PER_SECOND)
        for session in self._sessions.values():
            session.say_drain(seconds, "the relay is shutting down", spread)

    async def aclose(self) -> None:
        """Close every connection. Calling it again does nothing."""
        self._is_draining = True
        for channel in tuple(self._registering):
            channel.fail(ConnectionResetError("the relay is shutting down"))
        for session in tuple(self._sessions.values()):
            session.end("shutdown", "the relay is shutting down", 1.0)
        for session in tuple(self._sessions.values()):
            await session.pool.aclose()
        self._sessions.clear()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _tell_hub(self) -> None:
        backends = [agent.newest.backend for agent in self._agents.values()]
        await self._hub.replace_group(GROUP, backends)

    # Sessions.

    def _resumable(self, key: Key, register: Register) -> Session | None:
        session = self._sessions.get(register.resume or "")
        if (
            session is None
            or session.agent != key.name
            or session.instance != register.instance
            or session.state not in (State.ACTIVE, State.SUSPECT)
        ):
            return None
        return session

    def _new_session(self, key: Key, register: Register) -> Session:
        session = Session(
            secrets.token_urlsafe(18),
            key,
            register,
            relay=self._instance,
            on_change=self._session_changed,
        )
        self._sessions[session.id] = session
        agent = self._agents.get(key.name)
        if agent is None:
            self._agents[key.name] = _Agent(key.name, session, time.time())
            return session
        old, agent.newest, agent.since = agent.newest, session, time.time()
        self._retire(agent, old, is_same_process=old.instance == session.instance)
        return session

    def _retire(self, agent: _Agent, old: Session, *, is_same_process: bool) -> None:
        """Let an older session of an agent finish what it has begun."""
        if old.state is State.ENDED:
            return
        agent.older.append(old)
        if is_same_process:
            old.end("")  # it says itself that it has lost it
        elif old.state is State.ACTIVE:
            log.warning(
                'agent "%s": another process came with the same key and takes over; '
                "if that is another machine, give it a key of its own",
                agent.name,
            )
            old.drain("was replaced by another process with the same key")
            old.send(Bye("replaced", "another process came with the same key", 300.0))
        while len(agent.sessions) > _MAX_SESSIONS_PER_AGENT:
            agent.older[0].end("replaced", "too many processes with the same key", 300)

    def _session_changed(self, session: Session) -> None:
        agent = self._agents.get(session.agent)
        if session.state is State.ENDED:
            self._sessions.pop(session.id, None)
            task = asyncio.get_running_loop().create_task(session.pool.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            if agent is not None and session in agent.older:
                agent.older.remove(session)
        if agent is not None and session is agent.newest:
            self._hub.relist(session.backend)

    def _say_who_came(self, session: Session, *, is_resumed: bool) -> None:
        log.info(
            'agent "%s" %s with %d models (%s)',
            session.agent,
            "is back" if is_resumed else "is connected",
            len(session.sorted.accepted),
            session.software,
        )
        if not session.key.models and not is_resumed:
            log.warning(
                'agent "%s" may announce any model, and whoever has its token too; '
                "limit it by models= in its line of the keys file",
                session.agent,
            )
        if session.sorted.rejected:
            log.warning(
                'agent "%s" may not serve %s (models= of its key)',
                session.agent,
                ", ".join(session.sorted.rejected[:10]),
            )


class _Registration:
    """A control connection, from its handshake to its end."""

    def __init__(self, relay: TunnelRelay, key: Key, instance: str, peer: str) -> None:
        self._relay = relay
        self._key = key
        self._instance = instance
        self._peer = peer
        self._session: Session | None = None
        self.channel = Channel(
            is_client=False,
            beat=relay._beat,
            on_message=self._take,
            on_lost=self._lost,
        )
        relay._registering.add(self.channel)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(REGISTER_SECONDS, self._too_late)

    def _take(self, text: str) -> None:
        try:
            message = decode(text)
            if message is None:
                return
            if self._session is not None:
                self._relay.heard(self._session, message)
            elif isinstance(message, Register):
                self._settle()
                self._session = self._relay.register(
                    self.channel, self._key, self._instance, message
                )
            else:
                raise BadMessage(f"{message.kind} before register")
        except BadMessage as error:
            log.warning('agent "%s" is not understood: %s', self._key.name, error)
            self.channel.send(encode(Bye("incompatible", str(error))))
            self.channel.finish()

    def _lost(self, error: Exception | None) -> None:
        self._settle()
        if self._session is not None:
            self._session.lost(self.channel, error)

    def _settle(self) -> None:
        self._timer.cancel()
        self._relay._registering.discard(self.channel)

    def _too_late(self) -> None:
        self.channel.fail(PeerLost(f"no register within {REGISTER_SECONDS:g} s"))


def _refusal(key: Key, instance: str, register: Register) -> Bye | None:
    """Why an agent cannot be let in as it introduces itself."""
    if register.version != VERSION:
        return Bye(
            "incompatible",
            f"this relay speaks version {VERSION} of the tunnel, not "
            f"{register.version}",
        )
    if register.instance != instance:
        return Bye("incompatible", "instance differs from that of the handshake")
    if register.agent is not None and register.agent != key.name:
        return Bye(
            "unauthorized",
            f'this token is that of "{key.name}", not of "{register.agent}" '
            "(tunnel.dial.name)",
        )
    return None


def _state(agent: _Agent) -> AgentState:
    session = agent.newest
    is_there = session.state is not State.ENDED
    return AgentState(
        name=agent.name,
        state=session.state.value,
        software=session.software,
        connected_since=agent.since if is_there else None,
        connections=sum(one.pool.open_connections for one in agent.sessions),
        streams=sum(one.pool.in_use for one in agent.sessions),
        waiting=session.pool.waiting,
        target=session.target,
        max_streams=session.max_streams,
        active=session.status.active if is_there else 0,
        round_trip=session.round_trip,
        reconnects=max(0, agent.joins - 1),
        models=session.sorted.names,
        rejected=session.sorted.rejected,
        hosts=tuple(filter(session.passes, session.hosts)),
        passing=sum(one.pool.passing for one in agent.sessions),
    )
