"""An agent's way to one address of one relay.

    DIALING -> REGISTERING -> ACTIVE -> (lost) -> BACKOFF -> DIALING ...
                                 |
                                 +-> DRAINING (the relay ends) -> DIALING ...

``Link.run`` goes round this circle for ever. What the relay wants is one number, how
many data connections there should be; ``_reconcile`` dials what is missing and closes
nothing, since only the relay knows which of them carry a request.

When the control connection is lost, data connections go on, and the next registration
asks to resume the session. If the relay does not know it any more they are closed.
"""

import asyncio
import enum
import functools
import logging
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from inferencia import __version__
from inferencia.tunnel.carrier import Carrier, Channel, WebSocket
from inferencia.tunnel.dialing import DialFailed, Refused, Untrusted, dial
from inferencia.tunnel.frames import CloseCode
from inferencia.tunnel.wire import (
    CONTROL_PATH,
    CONTROL_PROTOCOL,
    DATA_PATH,
    DATA_PROTOCOL,
    DIALS_AT_ONCE,
    INSTANCE_HEADER,
    MAX_PASSING,
    REGISTER_SECONDS,
    RELAY_HEADER,
    SESSION_HEADER,
    SPARE_CONNECTIONS,
    VERSION,
    BadMessage,
    Bye,
    Drain,
    Drained,
    Message,
    Model,
    Models,
    ModelsOk,
    Pool,
    Register,
    Registered,
    Status,
    decode,
    encode,
    fitting,
)
from inferencia.upstream.origin import Origin

log = logging.getLogger(__name__)

# Full jitter: a random time up to a bound that doubles. A relay that starts anew sees
# its agents spread, and one that is off for hours costs next to nothing.
_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 30.0
# A session that lasted so long proves that the way is good.
_GOOD_SECONDS = 60.0
# What only a person can mend is tried seldom, and never given up.
_FATAL_SECONDS = 300.0
_FATAL_STATUSES = (401, 403, 426)
# Messages of a relay that wait to be read; each is read at once.
_MAX_UNREAD = 1000
# Changes of the models are told at most so often.
_MODELS_SECONDS = 1.0


class LinkState(enum.StrEnum):
    """See the module's header."""

    BACKOFF = "backoff"
    FATAL_WAIT = "fatal_wait"  # BACKOFF until a person has done something
    DIALING = "dialing"
    REGISTERING = "registering"
    STANDBY = "standby"  # another address leads to the same relay
    ACTIVE = "active"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Terms:
    """What all links of an agent share."""

    name: str | None
    token: Callable[[], str]
    instance: str
    context: ssl.SSLContext
    beat: float
    max_streams: Callable[[], int]
    models: Callable[[], tuple[Model, ...]]
    active: Callable[[], int]  # requests that are being worked on
    serve: Callable[[], asyncio.Protocol]  # the HTTP server of one connection
    hosts: tuple[str, ...] = ()  # whose TLS ends here
    # Takes over a data connection when the relay says what it is for.
    take_over: Callable[[Carrier, bytes], None] | None = None


class _Sent(Exception):
    """The relay ended the session and said when to come back."""

    def __init__(self, why: str, wait: float | None, *, is_fatal: bool = False) -> None:
        super().__init__(why)
        self.wait = wait  # seconds; None: as the backoff says
        self.is_fatal = is_fatal


class _Twin(Exception):
    """This address leads to a relay that another link is connected to."""


class Link:
    """One address of one relay."""

    def __init__(
        self,
        origin: Origin,
        address: str,
        terms: Terms,
        *,
        claim: Callable[["Link", str], bool],
    ) -> None:
        """Make a link; ``run`` dials.

        Args:
            origin: the relay.
            address: one of its numbers.
            terms: see ``Terms``.
            claim: asked with a relay's own name before registering there; False if
                another link has it.
        """
        self.origin = origin
        self.address = address
        self.state = LinkState.BACKOFF
        self.relay = ""  # the relay's own name, while it is claimed
        self.trouble = ""  # why there is no session
        self.joined = 0  # registrations so far
        self._terms = terms
        self._claim = claim
        self._loop = asyncio.get_running_loop()
        self._failures = 0  # in a row, for the backoff
        self._said = ""  # the trouble that was logged last
        self._session: str | None = None
        self._channel: Channel | None = None
        self._inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._target = 0
        self._seq = 0
        self._live: set[Carrier] = set()
        # Connections of a relay that ends; it closes them one by one.
        self._parting: set[WebSocket] = set()
        self._dialing: set[asyncio.Task[None]] = set()
        self._data_failures = 0
        self._data_after = 0.0  # loop time before which no data connection is dialed
        self._data_timer: asyncio.TimerHandle | None = None
        self._told: tuple[Model, ...] = ()  # the models that the relay knows
        self._told_at = 0.0  # loop time at which they were last told anew
        self._models_timer: asyncio.TimerHandle | None = None
        self._drained = asyncio.Event()  # the relay has nothing more for us
        self._is_leaving = False
        self._bye: Bye | None = None
        self._lost_by: Exception | None = None  # why the last channel ended

    @property
    def live(self) -> int:
        """Data connections that are open."""
        return len(self._live)

    @property
    def round_trip(self) -> float | None:
        """Seconds of the last ping on the control connection."""
        return None if self._channel is None else self._channel.round_trip

    async def run(self) -> None:
        """Keep connected until cancelled."""
        try:
            while not self._is_leaving:
                wait = await self._one_session()
                if self.state not in (LinkState.FATAL_WAIT, LinkState.STANDBY):
                    self.state = LinkState.BACKOFF
                await asyncio.sleep(wait)
            await asyncio.Event().wait()  # nobody is let in any more
        finally:
            self._close()

    def models_changed(self) -> None:
        """Have the relay told, if it is so."""
        if self.state is LinkState.ACTIVE and self._models_timer is None:
            wait = self._told_at + _MODELS_SECONDS - self._loop.time()
            self._models_timer = self._loop.call_later(max(0, wait), self._tell_models)

    async def leave(self, seconds: float, reason: str) -> None:
        """Ask the relay for no new work; return when nothing is in flight."""
        self._is_leaving = True
        if self._channel is None or self.state is not LinkState.ACTIVE:
            return
        self._send(Drain(seconds, reason))
        await self._drained.wait()

    # One session.

    async def _one_session(self) -> float:
        """Connect, and stay until the session ends.

        Returns:
            Seconds until the next try.
        """
        began = self._loop.time()
        try:
            await self._register()
            began = self._loop.time()
            await self._serve()
        except _Twin:
            self.state = LinkState.STANDBY
            return self._terms.beat * random.uniform(1, 2)
        except Refused as error:
            return self._was_refused(error)
        except _Sent as error:
            if error.is_fatal:
                return self._fatal(str(error), error.wait)
            self._say(str(error))
            if error.wait is not None:
                self._failures = 0
                return error.wait * random.uniform(0.5, 1.5)
        except Untrusted as error:
            self._say(f"{error} (tunnel.dial.ca_file names further authorities)")
        except (DialFailed, ConnectionError) as error:
            self._say(str(error))
        finally:
            self._leave_channel()
        if self._loop.time() - began >= _GOOD_SECONDS:
            self._failures = 0
        return self._backoff()

    async def _register(self) -> None:
        self.state = LinkState.DIALING
        self._inbox = asyncio.Queue()
        self._bye = None
        await dial(
            self.origin,
            self.address,
            CONTROL_PATH,
            CONTROL_PROTOCOL,
            self._headers(),
            self._terms.context,
            self._control,
        )
        if not self.relay:
            raise _Twin
        self.state = LinkState.REGISTERING
        self._told = fitting(self._terms.models())
        self._send(
            Register(
                version=VERSION,
                agent=self._terms.name,
                instance=self._terms.instance,
                resume=self._session,
                software=f"inferencia/{__version__}",
                max_streams=self._terms.max_streams(),
                spare=SPARE_CONNECTIONS,
                models=self._told,
                passthrough=self._terms.hosts,
            )
        )
        try:
            async with asyncio.timeout(REGISTER_SECONDS):
                message = await self._next()
        except TimeoutError as error:
            raise DialFailed("did not answer the registration") from error
        if not isinstance(message, Registered):
            raise DialFailed("answered the registration with something else")
        self._joined(message)

    def _control(self, headers: Mapping[str, str]) -> WebSocket:
        relay = headers.get(RELAY_HEADER.lower(), f"{self.address}")
        self.relay = relay if self._claim(self, relay) else ""
        inbox = self._inbox  # of this connection; the next one has another

        def take(text: str) -> None:
            self._take(channel, inbox, text)

        def lost(error: Exception | None) -> None:
            self._parting.discard(channel)
            self._lost_by = error
            inbox.put_nowait(None)

        channel = self._channel = Channel(
            is_client=True, beat=self._terms.beat, on_message=take, on_lost=lost
        )
        return channel

    def _joined(self, registered: Registered) -> None:
        if self._session is not None and not registered.resumed:
            self._drop_data()  # the relay has forgotten what they belong to
        self._session = registered.session
        self._target = self._seq = 0
        # What failed while the relay was away says nothing about it now.
        self._data_failures, self._data_after = 0, 0.0
        self.state = LinkState.ACTIVE
        self.trouble = self._said = ""
        self.joined += 1
        log.info(
            "relay %s: connected as %s, offering %d models",
            self.origin.authority,
            registered.agent,
            len(registered.accepted),
        )
        self._say_rejected(registered.rejected)
        if missing := set(self._terms.hosts) - set(registered.passthrough):
            log.warning(
                "relay %s passes no TLS on for %s: it takes tunnel.accept.passthrough "
                "there, and host:NAME in the models= of this agent's key",
                self.origin.authority,
                ", ".join(sorted(missing)),
            )

    async def _serve(self) -> None:
        """Do as the relay says until the control connection ends.

        Raises:
            _Sent: it ended the session and said why.
            ConnectionError: the connection was lost.
        """
        while True:
            try:
                async with asyncio.timeout(self._terms.beat):
                    message = await self._next()
            except TimeoutError:
                self._send_status()
                self.models_changed()
                continue
            if isinstance(message, Pool):
                self._target, self._seq = message.target, message.seq
                self._reconcile()
                self._send_status()
            elif isinstance(message, ModelsOk):
                self._say_rejected(message.rejected)
            elif isinstance(message, Drain):
                raise self._parted(message)
            elif isinstance(message, Drained):
                self._drained.set()
                if not self._is_leaving:
                    self._part()
            elif isinstance(message, Bye):
                self._bye = message

    async def _next(self) -> Message:
        message = await self._inbox.get()
        if message is not None:
            return message
        self._drained.set()
        bye = self._bye
        if bye is None:
            why = str(self._lost_by or "")
            lost = "the control connection was lost"
            raise ConnectionResetError(f"{lost}: {why}" if why else lost)
        raise _sent_away(bye, self.origin)

    def _parted(self, drain: Drain) -> _Sent:
        """The relay ends: come back soon, perhaps to its successor.

        What goes through its connections goes on; the relay closes them when it has no
        more use for them, and the control connection last.
        """
        self.state = LinkState.DRAINING
        log.info("relay %s drains: %s", self.origin.authority, drain.reason)
        self._parting.update(self._live)
        self._live.clear()
        if self._channel is not None:
            self._parting.add(self._channel)
            self._channel = None
        self._session = None
        return _Sent(drain.reason, random.uniform(*drain.reconnect_after))

    def _take(
        self, channel: Channel, inbox: "asyncio.Queue[Message | None]", text: str
    ) -> None:
        if channel in self._parting:
            return  # what it says is about a session that ends
        try:
            message = decode(text)
        except BadMessage as error:
            channel.fail(ConnectionResetError(f"not understood: {error}"))
            return
        if inbox.qsize() >= _MAX_UNREAD:
            channel.fail(ConnectionResetError("it says more than is taken in"))
        elif message is not None:
            inbox.put_nowait(message)

    def _send(self, message: Message) -> None:
        if self._channel is not None:
            self._channel.send(encode(message))

    def _send_status(self) -> None:
        self._send(
            Status(
                live=len(self._live),
                dialing=len(self._dialing),
                active=self._terms.active(),
                seq=self._seq,
            )
        )

    def _tell_models(self) -> None:
        self._models_timer = None
        models = fitting(self._terms.models())
        if self.state is LinkState.ACTIVE and models != self._told:
            self._told = models
            self._told_at = self._loop.time()
            self._send(Models(models))

    def _part(self) -> None:
        if self._channel is not None:
            self._channel.finish(CloseCode.NORMAL)

    def _leave_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.finish(CloseCode.NORMAL)
        if self._models_timer is not None:
            self._models_timer.cancel()
            self._models_timer = None
        self.relay = ""
        self._drained.set()
        self._drained = asyncio.Event()

    # Data connections.

    def _reconcile(self) -> None:
        """Dial what is missing, a few at a time."""
        if self.state is not LinkState.ACTIVE or self._session is None:
            return
        wait = self._data_after - self._loop.time()
        most = self._terms.max_streams() + (MAX_PASSING if self._terms.hosts else 0)
        most = min(self._target, most)
        missing = most - len(self._live) - len(self._dialing)
        if missing > 0 and wait > 0:
            if self._data_timer is None:
                self._data_timer = self._loop.call_later(wait, self._look_again)
            return
        for _ in range(min(missing, DIALS_AT_ONCE - len(self._dialing))):
            task = self._loop.create_task(self._dial_data(self._session))
            self._dialing.add(task)
            task.add_done_callback(self._dialed)

    def _look_again(self) -> None:
        self._data_timer = None
        self._reconcile()

    async def _dial_data(self, session: str) -> None:
        try:
            await dial(
                self.origin,
                self.address,
                DATA_PATH,
                DATA_PROTOCOL,
                self._headers() | {SESSION_HEADER: session},
                self._terms.context,
                self._carrier,
            )
            self._data_failures = 0
        except DialFailed as error:
            self._data_failures += 1
            wait = _jittered(self._data_failures)
            if isinstance(error, Refused) and error.retry_after is not None:
                wait += error.retry_after
            self._data_after = self._loop.time() + wait
            log.debug("relay %s: data connection: %s", self.origin.authority, error)

    def _carrier(self, headers: Mapping[str, str]) -> WebSocket:
        carrier = Carrier(
            self._terms.serve(),
            is_client=True,
            beat=self._terms.beat,
            peer=self.origin.authority,
            on_lost=self._lost_data,
        )
        if self._terms.take_over is not None:
            carrier.on_note = functools.partial(self._terms.take_over, carrier)
        self._live.add(carrier)
        return carrier

    def _dialed(self, task: asyncio.Task[None]) -> None:
        self._dialing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("dialing failed by our own fault", exc_info=error)
        self._reconcile()

    def _lost_data(self, carrier: Carrier) -> None:
        self._parting.discard(carrier)
        self._live.discard(carrier)
        self._reconcile()

    def _drop_data(self) -> None:
        for carrier in tuple(self._live):
            carrier.abort()

    def _headers(self) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self._terms.token()}",
            INSTANCE_HEADER: self._terms.instance,
        }

    def _close(self) -> None:
        """End everything. Nothing is waited for."""
        self.state = LinkState.BACKOFF
        self._leave_channel()
        if self._data_timer is not None:
            self._data_timer.cancel()
        for task in tuple(self._dialing):
            task.cancel()
        for carrier in tuple(self._live):
            carrier.close()
        for parting in tuple(self._parting):
            parting.finish()

    # When to try again, and what to say.

    def _was_refused(self, error: Refused) -> float:
        host = self.origin.host
        if error.status in _FATAL_STATUSES:
            return self._fatal(_remedy(error, host, self._terms.name), None)
        if error.status == 404:
            self._say(
                "answered 404: no tunnel is accepted there (tunnel.accept.enabled, or "
                "server.listen without the service tunnel)"
            )
        else:
            self._say(str(error))
        if error.retry_after is None:
            return self._backoff()
        return error.retry_after + random.uniform(0, _FIRST_BACKOFF_SECONDS)

    def _fatal(self, text: str, wait: float | None) -> float:
        self.state = LinkState.FATAL_WAIT
        self.trouble = text
        log.error("%s", text)
        return (wait or _FATAL_SECONDS) * random.uniform(0.8, 1.2)

    def _backoff(self) -> float:
        self._failures += 1
        return _jittered(self._failures)

    def _say(self, trouble: str) -> None:
        """Log a trouble once, until there is another or it was overcome."""
        self.trouble = trouble
        if trouble != self._said:
            log.warning("relay %s: %s", self.origin.authority, trouble)
        self._said = trouble

    def _say_rejected(self, rejected: tuple[str, ...]) -> None:
        if rejected:
            log.warning(
                "relay %s does not take %s: not in the models= of this agent's key",
                self.origin.authority,
                ", ".join(rejected[:10]),
            )


def _jittered(failures: int) -> float:
    bound = _FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 10)
    return random.uniform(0, min(_LONGEST_BACKOFF_SECONDS, bound))


def _remedy(error: Refused, host: str, name: str | None) -> str:
    """What to do about a refusal that will not end by itself."""
    if error.status == 401:
        return (
            f"{host} refused this token (401); make one there with: inferencia keys "
            f"add {name or 'NAME'} --role agent --models 'qwen*'"
        )
    if error.status == 403:
        return (
            f"{host} refused this token (403): it must be that of a key with the role "
            "agent (inferencia keys add NAME --role agent)"
        )
    return f"{host} speaks another version of the tunnel ({error.status}): {error.said}"


def _sent_away(bye: Bye, origin: Origin) -> _Sent:
    is_fatal = bye.code in ("unauthorized", "incompatible", "replaced")
    text = f"{origin.host} ended the session ({bye.code}): {bye.message}"
    return _Sent(text, bye.retry_after or None, is_fatal=is_fatal)
