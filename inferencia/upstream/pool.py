"""The connections to one origin, and the requests that travel on them.

``Pool`` is what every set of connections has in common: it lends those that are idle,
takes back those that are clean, and closes. ``Upstream`` fills it by dialing.

A reused connection that closes without one byte of an answer was closed by the peer
while idle (llama-server does so after 5 seconds or 100 requests). Then, and only then,
the request is sent once more on a fresh connection.
"""

import asyncio
import functools
import logging
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

from inferencia.endofturn import EndOfTurn
from inferencia.http1 import request_head
from inferencia.upstream.answer import Answer, ConnectFailed, Disconnected
from inferencia.upstream.connection import SHORTEST_TIMER_SECONDS, Connection
from inferencia.upstream.dialing import Dialer
from inferencia.upstream.origin import Origin

log = logging.getLogger(__name__)

# Of the connections that rest after a large read, so many go on in each turn of the
# loop.
_LARGE_READS_PER_TURN = 8


class Pool(ABC):
    """The connections to one origin, however they come about.

    It belongs to the event loop that first uses it and is closed with ``aclose``.
    """

    def __init__(self, origin: Origin, *, keepalive: float) -> None:
        """Make an empty pool.

        Args:
            origin: where its connections lead.
            keepalive: seconds that an idle connection is used again; less if the
                peer announces less. 0 means a connection per request.
        """
        self.origin = origin
        self.keepalive = keepalive
        self._authority = origin.authority
        self._connections: set[Connection] = set()  # every open one
        self._idle: list[Connection] = []  # the last one given back is the last
        self._resting: deque[Connection] = deque()  # after a large read
        self._all_lost: asyncio.Event | None = None  # exists once we are closing

    @property
    def open_connections(self) -> int:
        """Connections that are open, in use or not."""
        return len(self._connections)

    @property
    def idle_connections(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    async def aclose(self) -> None:
        """Close every connection and wait until they are closed. May be called twice.

        Answers that are going on fail; later requests raise ``ConnectFailed``.
        """
        if self._all_lost is None:
            self._all_lost = asyncio.Event()
        for connection in list(self._connections):
            connection.shut()
        if self._connections:
            await self._all_lost.wait()

    def _take_idle(self) -> Connection | None:
        """The connection used last that is still good; closes those that are not."""
        while self._idle:
            connection = self._idle.pop()
            if connection.now() < connection.idle_until and connection.is_open:
                return connection
            connection.close()
        return None

    # What connections tell (``connection.Keeper``)

    @abstractmethod
    def give_back(self, connection: Connection) -> None:
        """Take back a connection that has completed an exchange and may serve more."""

    def discard(self, connection: Connection) -> None:
        """This connection is about to close: do not give it to anybody."""
        if connection in self._idle:
            self._idle.remove(connection)

    def lost(self, connection: Connection) -> None:
        """This connection is closed."""
        self.discard(connection)
        self._connections.discard(connection)
        if self._all_lost is not None and not self._connections:
            self._all_lost.set()

    def rest(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Let a connection read on when it is its turn."""
        if not self._resting:
            self._let_read_on_later(loop)
        self._resting.append(connection)

    def _let_read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(_LARGE_READS_PER_TURN, len(self._resting))):
            self._resting.popleft().read_on()
        if self._resting:
            self._let_read_on_later(loop)

    def _let_read_on_later(self, loop: asyncio.AbstractEventLoop) -> None:
        call = functools.partial(self._let_read_on, loop)
        EndOfTurn.of(loop).call(loop, call)


class Upstream(Pool):
    """The connections to an origin that can be dialed."""

    def __init__(
        self,
        origin: Origin,
        *,
        connect_timeout: float = 5.0,
        keepalive: float = 4.0,
        max_idle: int = 256,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Make an empty pool; nothing is dialed before the first ``send``.

        Args:
            origin: where to connect.
            connect_timeout: see ``Dialer``.
            keepalive: see ``Pool``.
            max_idle: idle connections kept; above it the oldest closes. Requests end
                in bursts, so that for a moment all that were in use are idle.
            ssl_context: see ``Dialer``.
        """
        super().__init__(origin, keepalive=keepalive)
        self._max_idle = max_idle
        self._idle_timer: asyncio.TimerHandle | None = None
        self._dialer = Dialer(
            origin, connect_timeout=connect_timeout, ssl_context=ssl_context
        )

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
        """Send one request; returns when the head of its answer is there.

        Cancelling this closes the connection at once. Interim answers are skipped. An
        answer may come while the body is still being written; if it is no success, the
        rest of the body is not sent.

        Args:
            method: in capitals, as it goes on the wire.
            target: path and query, without the origin's base path.
            headers: without ``Host``, ``Content-Length``, ``Connection`` and the like,
                which are added here.
            body: sent as it is, with its length.
            silence_seconds: the answer's ``silence_seconds`` from now on.
            on_wire: called once, when there is a connection and the request has begun
                to travel.

        Raises:
            ValueError: the request cannot be written as one HTTP message.
            ConnectFailed: nothing was sent. (After a reused connection had closed
                without a byte, this is about the second try.)
            Disconnected, BadAnswer, Silent: there is no head.
        """
        if self._all_lost is not None:
            raise ConnectFailed(
                "unreachable", f"the way to {self._authority} is closed"
            )
        target = self.origin.base_path + target
        head = request_head(method, target, self._authority, headers, len(body))
        connection = self._take_idle()
        while True:
            is_fresh = connection is None
            if connection is None:
                connection = await self._dial()
            answer = connection.begin(method, head, body, silence_seconds)
            try:
                if on_wire is not None:
                    on_wire()
                error = await answer.head
            except BaseException:
                answer.cancel()
                raise
            if error is None:
                return answer
            may_retry = isinstance(error, Disconnected) and not is_fresh
            if not may_retry or self._all_lost is not None:
                raise error
            log.debug("%s; the request goes out on a fresh connection", error)
            connection = on_wire = None

    async def _dial(self) -> Connection:
        """A fresh connection, ready for a request.

        Raises:
            ConnectFailed: always that, whatever went wrong.
        """
        loop = asyncio.get_running_loop()
        connection = await self._dialer.dial(lambda: Connection(self, loop))
        if not connection.is_lost:
            self._connections.add(connection)
        if self._all_lost is not None:
            connection.close()
            raise ConnectFailed(
                "unreachable", f"the way to {self._authority} is closed"
            )
        return connection

    async def aclose(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        await super().aclose()

    def give_back(self, connection: Connection) -> None:
        self._idle.append(connection)
        if len(self._idle) > self._max_idle:
            self._idle[0].close()
        if self._idle_timer is None and self._idle:
            self._sweep_at(connection.idle_until)

    def _sweep_at(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        delay = max(due - loop.time(), SHORTEST_TIMER_SECONDS)
        self._idle_timer = loop.call_later(delay, self._sweep)

    def _sweep(self) -> None:
        """Close what was idle for too long; look again when the next one is due."""
        self._idle_timer = None
        for connection in list(self._idle):
            if connection.idle_until <= connection.now():
                connection.close()
        if self._idle:
            self._sweep_at(min(connection.idle_until for connection in self._idle))
