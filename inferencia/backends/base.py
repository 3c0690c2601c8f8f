"""A backend: one server that speaks OpenAI's protocol, and what we know about it.

``Backend`` holds the habits that all servers share: reading a model list without
trusting it, building the headers that may go up, saying in words why nothing comes
back. A brand (``brands.py``) is a small subclass that overrides what it does
differently. What carries the bytes stands behind ``Carrier``: the pool of
``upstream/``, the built-in ``echo``, later a tunnel.

A request's stay at a backend is a ``Turn``:

    turn = backend.begin(now)      counts it, and takes the breaker's probe if it is one
    turn.succeeded() / .failed()   what the answer says about the backend (breaker.py)
    turn.end()                     gives the place back; idempotent; without a verdict
                                   before it the request counts as abandoned

All three are plain calls, so that no cancellation can come between them.

``is_down`` and ``is_listed`` are written by the catalogue alone, ``trouble`` and
``server`` by the backend's own answers.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

from inferencia.backends.headers import upstream_headers, via_name
from inferencia.backends.listing import (
    MAX_LIST_BYTES,
    Record,
    base_name,
    is_loading_error,
    read_list,
)
from inferencia.breaker import Breaker
from inferencia.models.definitions import Filters
from inferencia.settings import BackendConfig
from inferencia.upstream.answer import (
    Answer,
    ConnectFailed,
    NoDescriptors,
    Silent,
    Untrusted,
    UpstreamError,
)
from inferencia.values import FRAMING_HEADERS

# When neither health_timeout nor watchdog.request_timeout sets a limit: a probe that
# hangs for ever would hide that the machine is gone.
_PROBE_SECONDS = 5.0

# A cloud's list changes seldom, and asking for it uses our key.
_CLOUD_POLL_SECONDS = 600.0

_GLOB = re.compile(r"[*?\[]")
_VERSION = re.compile(r"/v1(?:/(?:chat/completions|completions|embeddings|models))?\Z")

_CONNECT_TROUBLE = {
    "refused": "refuses connections; is the server running?",
    "dns": "cannot be found: its host name does not resolve",
    "unreachable": "cannot be reached; is the machine on?",
    "tls": "does not complete the TLS handshake; is it https?",
    "timeout": "does not take connections; is the machine on?",
}


class Carrier(Protocol):
    """Sends one request and brings the answer's head, as ``upstream.pool`` does."""

    async def send(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]],
        body: bytes = b"",
        *,
        silence_seconds: float = 0,
        on_wire: Callable[[], None] | None = None,
    ) -> Answer: ...

    async def aclose(self) -> None: ...

    @property
    def open_connections(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One model that a backend offers."""

    id: str  # the name that clients use: base name of a path, with the prefix
    upstream_id: str  # the name that the server must be sent
    raw: Mapping[str, Any] = field(default_factory=dict)  # its record in the list
    is_hidden: bool = False  # served, but not shown in the list of models


class ListFailed(Exception):
    """There is no model list. ``str()`` says why and what to do, without secrets."""


class StillLoading(ListFailed):
    """There is no list yet, but the server lives: it is loading its model."""


class NotAsked(ListFailed):
    """There is no list, and that says nothing about the server."""


class Turn:
    """One request's stay at a backend; see the module's header."""

    __slots__ = ("_backend", "_ended", "_judged", "_was_probe")

    def __init__(self, backend: "Backend", *, was_probe: bool) -> None:
        self._backend = backend
        self._was_probe = was_probe
        self._judged = False
        self._ended = False

    @property
    def is_ready(self) -> bool:
        """Whether the request can be sent now, without ``get_ready`` before it."""
        return True

    @property
    def tells_of_loading(self) -> bool:
        """Whether a chat's client shall read that the model is being loaded."""
        return False

    async def get_ready(
        self, *, key: str, priority: int, tell: Callable[[Callable[[], str]], None]
    ) -> None:
        """Wait until the request can be sent.

        Args:
            key: the name of the client's key, for fairness between keys.
            priority: that key's priority.
            tell: called with what says, whenever asked, what is being waited for.

        Raises:
            ApiError: it never will.
        """

    def succeeded(self) -> None:
        """Note an answer that shows that the backend works, as soon as it is known."""
        self._judged = True
        self._backend.breaker.succeeded()

    def failed(self, now: float, *, unreachable: bool = False) -> None:
        """Note a failure, also one after ``succeeded``: a stream that was cut.

        Args:
            now: on the breaker's clock.
            unreachable: whether there was no connection at all.
        """
        self._judged = True
        self._backend.is_unreachable = unreachable
        self._backend.breaker.failed(now)

    def end(self) -> None:
        """Give the place back. Calling it again does nothing."""
        if self._ended:
            return
        self._ended = True
        if not self._judged:
            self._backend.breaker.abandoned(was_probe=self._was_probe)
        self._backend._turn_ended()


class Backend:
    """One configured server. Brands override the class variables and ``_fetch``."""

    type: ClassVar[str] = "openai"
    list_path: ClassVar[str] = "/v1/models"
    # Whether a non-streamed request runs on when its client leaves, so that it is
    # better asked for as a stream (measured with llama-server).
    assembles_by_default: ClassVar[bool] = False
    # Whether it knows its models without asking, so that there is nothing to probe.
    lists_itself: ClassVar[bool] = False
    # Further headers of the client that this brand has a use for.
    passed_headers: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: BackendConfig,
        carrier: Carrier,
        *,
        instance: str = "",
        place: str = "",
    ) -> None:
        """Make a backend.

        Args:
            config: its part of the configuration.
            carrier: what takes requests there; closed by ``aclose``.
            instance: this process's name for ``Via``, see ``via_name``.
            place: where it is configured, such as ``backends[0]``, for messages.

        Raises:
            ValueError: a configured header would break the framing.
        """
        for name, _ in config.headers:
            if name.lower() in FRAMING_HEADERS:
                raise ValueError(f"{place or config.name}: header {name} cannot be set")
        self.config = config
        self.carrier = carrier
        self.place = place
        self.breaker = Breaker()
        self.in_flight = 0  # requests between begin and end
        # Called when a place was given back; set while requests wait for one.
        self.on_free: Callable[[Backend], None] | None = None
        # The same server with other settings: before a reload, as long as requests of
        # that time are running, and after one.
        self._elder: Backend | None = None
        self._heir: Backend | None = None
        self.filters: Filters | None = None  # what its owner wants changed in requests
        self.is_down = False  # the watchdog's verdict; the catalogue writes it
        self.is_unreachable = False  # whether the last request that failed got nowhere
        self.is_listed = False  # whether a list ever came; the catalogue writes it
        self.server = ""  # what its last answer said in ``Server``
        self.trouble = ""  # why the last probe failed or found nothing; "" if fine
        self.found_loading = False  # by the last probe
        self._via = via_name(instance)
        self._idle: asyncio.Event | None = None  # made by ``wait_until_idle``

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def priority(self) -> int:
        return self.config.priority

    @property
    def address(self) -> str:
        """``host:port`` for messages; never the user part of a URL."""
        return address_of(self.config.url)

    @property
    def load(self) -> float:
        """How busy it is, for choosing the least busy one."""
        if self.config.max_concurrency:
            return self.held / self.config.max_concurrency
        return float(self.held)

    @property
    def is_full(self) -> bool:
        """Whether it works on as many requests as it may."""
        limit = self.config.max_concurrency
        return bool(limit) and self.held >= limit

    @property
    def held(self) -> int:
        """Requests that the server works on for us, those of before a reload too."""
        if self._elder is None:
            return self.in_flight
        return self.in_flight + self._elder.held

    @property
    def assembles(self) -> bool:
        """Whether a non-streamed request is to be sent as a stream."""
        if self.config.assemble is not None:
            return self.config.assemble
        return self.assembles_by_default or is_llama_server(self.server)

    @property
    def has_completion(self) -> bool:
        """Whether it has llama.cpp's own ``/completion``."""
        return self.type == "llamacpp" or is_llama_server(self.server)

    @property
    def is_cloud(self) -> bool:
        """Whether it is somebody else's service, reached with our key.

        Clouds are polled seldom, and judged by how requests end, not by the list.
        """
        return False

    @property
    def exact_models(self) -> tuple[ListedModel, ...]:
        """The configured names without glob characters: known without any list."""
        return tuple(
            ListedModel(self.config.prefix + name, name)
            for name in self.config.models
            if not _GLOB.search(name)
        )

    @property
    def has_loaded(self) -> bool:
        """Whether its model is in memory; asked only if it ``lists_itself``."""
        return True

    @property
    def own_models(self) -> tuple[ListedModel, ...]:
        """What it offers, if it ``lists_itself``; the catalogue asks no server then."""
        return ()

    def same_as(self, config: BackendConfig) -> bool:
        """Whether this backend is what ``config`` asks for, so that it can be kept."""
        return self.config == config

    def poll_seconds(self, interval: float) -> float:
        """How long to wait between two probes that went well."""
        return max(interval, _CLOUD_POLL_SECONDS) if self.is_cloud else interval

    def take_over(self, elder: "Backend") -> None:
        """Stand for the same server from now on, and know of it what is known."""
        self.is_down = elder.is_down
        self.is_listed = elder.is_listed
        self.trouble = elder.trouble
        self.server = elder.server
        if elder.held:
            self._elder = elder
            elder._heir = self

    # One request's stay.

    def begin(self, now: float) -> Turn:
        """Count a request that is about to be sent."""
        self.in_flight += 1
        return Turn(self, was_probe=self.breaker.begin(now))

    async def wait_until_idle(self) -> None:
        """Return when no request is being worked on."""
        while self.in_flight:
            self._idle = self._idle or asyncio.Event()
            self._idle.clear()
            await self._idle.wait()

    def _turn_ended(self) -> None:
        self.in_flight -= 1
        if self._idle is not None and not self.in_flight:
            self._idle.set()
        if self.on_free is not None:
            self.on_free(self)
        if self._heir is not None:
            self._heir._elders_turn_ended()

    def _elders_turn_ended(self) -> None:
        if self._elder is not None and not self._elder.held:
            self._elder = None
        if self.on_free is not None:
            self.on_free(self)
        if self._heir is not None:
            self._heir._elders_turn_ended()

    # Sending.

    async def send(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[str, str]],
        body: bytes = b"",
        *,
        silence_seconds: float = 0,
        content_type: str | None = None,
        request_id: str = "",
        on_wire: Callable[[], None] | None = None,
    ) -> Answer:
        """Send a client's request and return when the answer's head is there.

        Args:
            method: such as ``POST``.
            path: such as ``/v1/chat/completions``, with its query if any.
            headers: the client's, as received; only what is allowed goes on.
            body: what is sent, byte for byte.
            silence_seconds: longest silence allowed; 0 is none.
            content_type: what the body is, where the client's word does not hold.
            request_id: our id of this request.
            on_wire: called when the first byte has been written.

        Raises:
            UpstreamError: there is no answer.
        """
        answer = await self.carrier.send(
            method,
            path,
            self.request_headers(
                headers, request_id=request_id, content_type=content_type
            ),
            body,
            silence_seconds=silence_seconds,
            on_wire=on_wire,
        )
        self.server = answer.header("server") or ""
        return answer

    def request_headers(
        self,
        headers: Iterable[tuple[str, str]],
        *,
        request_id: str = "",
        content_type: str | None = None,
    ) -> list[tuple[str, str]]:
        """What a client's headers become on the way to this server; see ``send``."""
        return upstream_headers(
            headers,
            config_headers=self.config.headers,
            api_key=self._api_key(),
            via=self._via,
            request_id=request_id,
            content_type=content_type,
            further=self.passed_headers,
        )

    def is_loading(self, status: int, body: bytes) -> bool:
        """Whether an answer says that the model is being loaded (llama-server's)."""
        return is_loading_error(status, body)

    async def aclose(self) -> None:
        """Close all connections. Calling it again does nothing."""
        await self.carrier.aclose()

    # The model list.

    async def list_models(self, request_timeout: float = 0) -> tuple[ListedModel, ...]:
        """Ask for the model list: one probe of health, and what can be served.

        An empty list is no failure; ``trouble`` then says why it is empty.

        Args:
            request_timeout: ``watchdog.request_timeout``, seconds; the shorter of it
                and ``health_timeout`` holds.

        Raises:
            StillLoading: the server lives and is loading its model.
            NotAsked: it is not known how the server is.
            ListFailed: it does not answer, or not with a list.
        """
        limits = [s for s in (self.config.health_timeout, request_timeout) if s > 0]
        seconds = min(limits, default=_PROBE_SECONDS)
        self.found_loading = False
        try:
            async with asyncio.timeout(seconds):
                records = await self._fetch(seconds)
        except ListFailed as error:
            self.trouble = str(error)
            self.found_loading = isinstance(error, StillLoading)
            raise
        except TimeoutError:
            self.trouble = self._says(f"did not list its models within {seconds:g} s")
            raise ListFailed(self.trouble) from None
        except NoDescriptors as error:
            raise NotAsked(str(error)) from error
        except UpstreamError as error:
            self.trouble = self.why(error)
            raise ListFailed(self.trouble) from error
        models = self._offered(records)
        self.trouble = "" if models else self._why_empty(len(records))
        return models

    async def _fetch(self, seconds: float) -> list[Record]:
        """Get the list: pairs of the server's own id and its record."""
        answer, body = await self._get(self.list_path, seconds)
        self._check(answer, body, self.list_path)
        return self._records(body)

    def _records(self, body: bytes) -> list[Record]:
        records = read_list(body)
        if records is None:
            raise ListFailed(
                self._says(f"answers GET {self.list_path}, but not with a model list")
            )
        return records

    async def _get(self, path: str, seconds: float) -> tuple[Answer, bytes]:
        answer = await self.send("GET", path, (), silence_seconds=seconds)
        return answer, await answer.read(MAX_LIST_BYTES)

    def _check(self, answer: Answer, body: bytes, path: str) -> None:
        """Refuse an answer that is not 200, in words that lead to the remedy."""
        status = answer.status
        if status == 200:
            return
        if self.is_loading(status, body):
            raise StillLoading(self._says("is still loading its model"))
        if status in (401, 403):
            held = "refuses the key" if self._api_key() else "wants a key"
            raise ListFailed(self._says(f"{held} ({status})", self._at("api_key")))
        if status == 404:
            raise ListFailed(
                self._says(
                    f"has no {path} (404); is it the right server, and does its url "
                    "lack a path?",
                    self._at("url"),
                )
            )
        raise ListFailed(self._says(f"answers GET {path} with status {status}"))

    def _offered(self, records: Iterable[Record]) -> tuple[ListedModel, ...]:
        """Apply the base-name rule, the globs and the prefix; the first of a name."""
        offered: dict[str, ListedModel] = {}
        seen: set[str] = set()
        for upstream_id, raw in records:
            if upstream_id in seen:
                continue
            seen.add(upstream_id)
            name = base_name(upstream_id)
            if self.config.prefix + name in offered:
                name = upstream_id  # two paths with one base name: both stay usable
            if self._is_wanted(name, upstream_id):
                model = ListedModel(self.config.prefix + name, upstream_id, raw)
                offered[model.id] = model
        return tuple(offered.values())

    def _is_wanted(self, name: str, upstream_id: str) -> bool:
        globs = self.config.models
        return not globs or any(
            fnmatchcase(name, glob) or fnmatchcase(upstream_id, glob) for glob in globs
        )

    def _api_key(self) -> str:
        return self.config.api_key.reveal() if self.config.api_key else ""

    # Words.

    def _why_empty(self, listed: int) -> str:
        if listed:
            return self._says(
                f"lists {listed} models, but none matches", self._at("models")
            )
        return self._says("is up, but lists no models", "load or pull one there")

    def why(self, error: UpstreamError) -> str:
        """A failure in words: what happened where, and what to do about it."""
        if isinstance(error, NoDescriptors):
            return str(error)
        if isinstance(error, Untrusted):
            return self._says(
                f"shows a certificate that is not trusted: {error.problem}",
                f"add it to the system's or to SSL_CERT_FILE, or {self._at('url')}",
            )
        if isinstance(error, ConnectFailed):
            what = _CONNECT_TROUBLE.get(error.reason, "cannot be connected to")
            return self._says(what, f"start it, or {self._at('url')}")
        if isinstance(error, Silent):
            return self._says(f"was silent for {error.seconds:g} s")
        return self._says(f"does not answer well: {error}")

    def _at(self, member: str) -> str:
        where = f"{self.place}.{member}" if self.place else f"its {member}"
        return f"fix {where}"

    def _says(self, what: str, remedy: str = "") -> str:
        text = f'backend "{self.name}" at {self.address} {what}'
        return f"{text} ({remedy})" if remedy else text


def address_of(url: str) -> str:
    """``host:port`` of a URL, without anything that could be secret."""
    parts = urlsplit(url)
    if not parts.hostname:
        return url
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def without_version(url: str) -> str:
    """The URL without a trailing ``/v1``, since our paths carry it themselves.

    Nor with an endpoint behind it, as it is pasted from an example of curl.
    """
    return _VERSION.sub("", url.rstrip("/"))


def is_llama_server(server: str) -> bool:
    """Whether a ``Server`` header is llama-server's."""
    return server.lower().startswith("llama.cpp")
