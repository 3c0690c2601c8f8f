"""Data connections of one agent, from the relay's side: they are parked until used.

``ParkedConnections`` is the ``Pool`` of ``upstream/`` for an origin that cannot be
dialed. Connections come to it (``expect``); a request takes one that is parked, or
waits in line for the next that comes or becomes free. What is in here was dialed by the
agent, and no request of its backend can reach anything else.

A connection that was not heard for some seconds is asked for a sign of life before a
request is sent, so that a machine that has gone to sleep is noticed while another one
can still be tried (``ConnectFailed``: nothing was sent). What has been sent is sent
once; it is never tried again here.

Bytes that come on a parked connection, which nobody can have asked for, end it: that
is the rule of ``upstream/`` for idle connections.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from inferencia.http1 import request_head
from inferencia.tunnel.carrier import Carrier
from inferencia.tunnel.frames import CloseCode
from inferencia.tunnel.wire import FRESH_SECONDS, PROBE_SECONDS, SLOT_SECONDS
from inferencia.upstream.answer import Answer, ConnectFailed
from inferencia.upstream.connection import Connection
from inferencia.upstream.origin import Origin
from inferencia.upstream.pool import Pool

# What the requests name as their host; no resolver knows it.
ORIGIN = Origin("agent.tunnel", 80, False, "")
# Of so many connections the quickest sign of life counts, in case one is dead.
_ASKED_AT_ONCE = 3


class _Dialed(Connection):
    """The client half of HTTP/1.1 over a connection that came from outside."""

    __slots__ = ("_parked",)

    def __init__(self, pool: "ParkedConnections") -> None:
        super().__init__(pool, asyncio.get_running_loop())
        self._parked = pool
        self.idle_until = math.inf  # the relay alone closes what is idle

    @property
    def carrier(self) -> Carrier:
        return cast(Carrier, self._transport)

    @property
    def is_usable(self) -> bool:
        return not self.is_lost and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._parked.take_in(self)


class ParkedConnections(Pool):
    """The connections that one agent has dialed."""

    def __init__(self, agent: str, on_change: Callable[[], None]) -> None:
        """Make an empty pool.

        Args:
            agent: whose it is, for messages.
            on_change: called when more or fewer connections are open, in use or
                waited for; it must not call back.
        """
        super().__init__(ORIGIN, keepalive=math.inf)
        self._agent = agent
        self._on_change = on_change
        self._waiting: deque[asyncio.Future[_Dialed]] = deque()
        self._refusal: str | None = None  # why nothing is sent now
        self.passing = 0  # connections that ``take_out`` gave away, or is asked for

    @property
    def waiting(self) -> int:
        """Requests that wait for a connection."""
        return len(self._waiting)

    @property
    def in_use(self) -> int:
        """Connections that carry a request now, or are about to."""
        return len(self._connections) - len(self._idle)

    def expect(self, *, beat: float, peer: str) -> Carrier:
        """What takes over a socket that the agent has dialed; then it is parked.

        Args:
            beat: seconds between two pings.
            peer: the address that it comes from.
        """
        return Carrier(_Dialed(self), is_client=False, beat=beat, peer=peer)

    def take_in(self, connection: _Dialed) -> None:
        """A connection is there."""
        self._connections.add(connection)
        if self._all_lost is not None:
            connection.shut()
        else:
            self.give_back(connection)

    def close_idle(self, count: int) -> None:
        """Close so many connections that carry nothing, those unused longest first."""
        for connection in self._idle[:count]:
            self.discard(connection)
            cast(_Dialed, connection).carrier.finish(CloseCode.GOING_AWAY)

    async def take_out(self) -> tuple[Carrier, Callable[[], None]]:
        """A connection for something else than requests; it does not come back.

        Returns:
            The connection, whose protocol has to be replaced at once, and what is to
            be called once when it is lost.

        Raises:
            ConnectFailed: there is none.
        """
        self.passing += 1
        try:
            connection = await self._ready()
        except BaseException:
            self.passing -= 1
            self._on_change()
            raise

        def lost() -> None:
            connection.is_lost = True
            self.passing -= 1
            self.lost(connection)

        return connection.carrier, lost

    def refuse(self, why: str) -> None:
        """Send nothing more; who waits is told why. What is under way goes on."""
        self._refusal = why
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(ConnectFailed("unreachable", why))

    def accept(self) -> None:
        """Take requests again."""
        self._refusal = None

    # What ``Upstream`` does by dialing.

    async def send(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]],
        body: bytes = b"",
        *,
        silence_seconds: float = 0,
        on_wire: Callable[[], None] | None = None,
    ) -> Answer:
        """Send one request, once. See ``Upstream.send``.

        Raises:
            ValueError: the request cannot be written as one HTTP message.
            ConnectFailed: nothing was sent.
            Disconnected, BadAnswer, Silent: there is no head.
        """
        head = request_head(method, target, self._authority, headers, len(body))
        connection = await self._ready()
        answer = connection.begin(method, head, body, silence_seconds)
        try:
            if on_wire is not None:
                on_wire()
            error = await answer.head
        except BaseException:
            answer.cancel()
            raise
        if error is not None:
            raise error
        return answer

    async def aclose(self) -> None:
        """Close every connection and wait until they are closed."""
        self.refuse(f'the way to agent "{self._agent}" is closed')
        await super().aclose()

    def give_back(self, connection: Connection) -> None:
        """Take back a connection that may serve more; whoever waits first gets it."""
        dialed = cast(_Dialed, connection)
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(dialed)
                break
        else:
            self._idle.append(dialed)
        self._on_change()

    def lost(self, connection: Connection) -> None:
        super().lost(connection)
        self._on_change()

    async def _ready(self) -> _Dialed:
        """A connection that is there for certain.

        Raises:
            ConnectFailed: there is none.
        """
        while True:
            if self._refusal is not None:
                raise ConnectFailed("unreachable", self._refusal)
            connection = cast(_Dialed | None, self._take_idle())
            if connection is None:
                connection = await self._next_one()
            else:
                self._on_change()
            if not connection.is_usable:
                continue
            if connection.now() - connection.carrier.heard <= FRESH_SECONDS:
                return connection
            return await self._first_to_answer(connection)

    async def _next_one(self) -> _Dialed:
        """Wait in line for a connection that comes or becomes free."""
        future: asyncio.Future[_Dialed] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._on_change()
        try:
            async with asyncio.timeout(SLOT_SECONDS):
                return await future
        except BaseException as error:
            if future in self._waiting:
                self._waiting.remove(future)
            if future.done() and not future.cancelled() and not future.exception():
                self.give_back(future.result())  # it came too late for this one
            if not isinstance(error, TimeoutError):
                raise
            raise ConnectFailed(
                "unreachable",
                f'agent "{self._agent}" had no connection free for {SLOT_SECONDS:g} s',
            ) from error

    async def _first_to_answer(self, connection: _Dialed) -> _Dialed:
        """Ask this connection and some others for a sign of life.

        Raises:
            ConnectFailed: none of them gave one.
        """
        asked = {connection.carrier.ping(): connection}
        while len(asked) < _ASKED_AT_ONCE and (other := self._take_idle()) is not None:
            dialed = cast(_Dialed, other)
            asked[dialed.carrier.ping()] = dialed
        winner: _Dialed | None = None
        waiting = set(asked)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                while waiting and winner is None:
                    done, waiting = await asyncio.wait(
                        waiting, return_when=asyncio.FIRST_COMPLETED
                    )
                    alive = (asked[f] for f in done if not f.cancelled())
                    winner = next((one for one in alive if one.is_usable), None)
        except TimeoutError:
            pass
        finally:
            for other in asked.values():
                if other is not winner and other.is_usable:
                    self.give_back(other)
        if winner is None:
            raise ConnectFailed(
                "unreachable",
                f'agent "{self._agent}" gave no sign of life for {PROBE_SECONDS:g} s',
            )
        return winner
