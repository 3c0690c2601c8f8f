"""What the two ends of a tunnel say to each other, and how long they wait.

An agent, at home, keeps one control connection to a relay, which has a public address,
and as many data connections as the relay wants. All of them are WebSockets that the
agent dials. A data connection carries one HTTP/1.1 connection whose client is the
relay. On the control connection go the messages of this module, one JSON object each:

============  ====  ===============================================================
register      A>R   first of all: which program this is, what it serves
registered    R>A   the session's id, and what is accepted of the models
pool          R>A   how many data connections there should be, in all
status        A>R   each beat and on change: how busy it is
models        A>R   all models again, when they have changed
models_ok     R>A   what is accepted of them
drain         both  no new work, please; what has begun may finish
drained       R>A   nothing is in flight and nothing more will come
bye           both  why this connection ends now
============  ====  ===============================================================

Two go on a data connection, as text between its bytes (passthrough.py):

============  ====  ===============================================================
passthrough   R>A   what follows is a client's TLS for this name, not HTTP
passed        A>R   all was sent, and the server has closed its end
============  ====  ===============================================================

``pool`` names an absolute number, not how many more, so that a message that is lost or
late does no harm. Each has a ``seq``; ``status`` repeats the one that it knows, and a
relay that sees an old one says it again.

Unknown members and unknown kinds of message are ignored, so that either end may be
newer. Everything else is checked here: what a peer sends is not to be trusted.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

VERSION = 1
CONTROL_PATH = "/tunnel/v1/control"
DATA_PATH = "/tunnel/v1/data"
# The subprotocols carry the version, since every proxy passes them on.
CONTROL_PROTOCOL = "inferencia.control.v1"
DATA_PROTOCOL = "inferencia.data.v1"
INSTANCE_HEADER = "Inferencia-Instance"
SESSION_HEADER = "Inferencia-Session"
RELAY_HEADER = "Inferencia-Relay"

# Above it, somebody's model list is broken.
MAX_MESSAGE_BYTES = 256 * 1024
MAX_MODELS = 1000
MAX_ID_LENGTH = 256
MAX_TEXT_LENGTH = 500
MAX_STREAMS = 4096

# A peer that has said nothing for so many beats is gone. Counted only while we read:
# a client that takes no bytes stops our reading too, and says nothing about the peer.
DEAD_BEATS = 2.5
HANDSHAKE_SECONDS = 10.0
REGISTER_SECONDS = 10.0
# How long a request waits for a data connection to be dialed.
SLOT_SECONDS = 10.0
# A connection that was heard so lately is used at once; others are asked first.
FRESH_SECONDS = 5.0
PROBE_SECONDS = 3.0
# How long streams go on without a control connection.
GRACE_SECONDS = 30.0

# Clients whose TLS passes through to one agent at a time, beside its requests. Each has
# a data connection of its own, for as long as it keeps its own open.
MAX_PASSING = 256
MAX_HOSTS = 64
# A message between the bytes of a data connection.
MAX_NOTE_BYTES = 2048

# Data connections kept beside those in use: a burst finds them dialed already, while a
# new one takes 3.5 round trips.
SPARE_CONNECTIONS = 4
DEFAULT_STREAMS = 16
# More at once only queue up in the relay.
DIALS_AT_ONCE = 8


class BadMessage(Exception):
    """A peer's message is not what it should be. The text is fit for a log."""


class _Members:
    """Reads the members of one message."""

    def __init__(self, kind: str, members: Mapping[str, Any]) -> None:
        self._kind = kind
        self._members = members

    def text(self, name: str, default: str | None = None) -> str:
        value = self._members.get(name, default)
        if not isinstance(value, str) or len(value) > MAX_TEXT_LENGTH:
            raise BadMessage(f"{self._kind}: {name} is not a short text")
        if not value.isprintable():
            raise BadMessage(f"{self._kind}: {name} is not printable")
        return value

    def maybe_text(self, name: str) -> str | None:
        return None if self._members.get(name) is None else self.text(name)

    def whole(self, name: str, default: int, most: int) -> int:
        value = self._members.get(name, default)
        if type(value) is not int or not 0 <= value <= most:
            raise BadMessage(f"{self._kind}: {name} is not 0 to {most}")
        return value

    def seconds(self, name: str, default: float) -> float:
        value = self._members.get(name, default)
        if type(value) not in (int, float) or not 0 <= value <= 1e6:
            raise BadMessage(f"{self._kind}: {name} is not a number of seconds")
        return float(value) if math.isfinite(value) else default

    def flag(self, name: str) -> bool:
        return self._members.get(name) is True

    def list(self, name: str, most: int) -> list[Any]:
        value = self._members.get(name, [])
        if not isinstance(value, list) or len(value) > most:
            raise BadMessage(f"{self._kind}: {name} is not a list of at most {most}")
        return value

    def ids(self, name: str) -> tuple[str, ...]:
        found = self.list(name, MAX_MODELS)
        for item in found:
            if not is_model_id(item):
                raise BadMessage(f"{self._kind}: {name} holds no proper model id")
        return tuple(found)

    def hosts(self, name: str) -> tuple[str, ...]:
        found = self.list(name, MAX_HOSTS)
        if not all(isinstance(item, str) and is_host_name(item) for item in found):
            raise BadMessage(f"{self._kind}: {name} holds no proper host name")
        return tuple(found)

    def models(self) -> tuple["Model", ...]:
        models = []
        for item in self.list("models", MAX_MODELS):
            if not isinstance(item, dict) or not is_model_id(item.get("id")):
                raise BadMessage(f"{self._kind}: models holds no proper record")
            models.append(Model(item["id"], item))
        return tuple(models)


def is_model_id(value: object) -> bool:
    """Whether a value can be a model's name: short, and printable in any output."""
    return isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable()


# RFC 1123, 2.1, in lower case; the last label tells it from an address.
_HOST_NAME = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
)


def is_host_name(value: str) -> bool:
    """Whether a text is the name of a host, in lower case and without a dot behind."""
    return len(value) <= 253 and _HOST_NAME.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class Model:
    """One model of an agent: its record in ``/v1/models`` there."""

    id: str
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Register:
    kind: ClassVar[str] = "register"
    version: int
    agent: str | None  # the name that it goes by; must be that of its key
    instance: str  # new for each process
    resume: str | None  # the session that it had on a connection that was lost
    software: str
    max_streams: int  # requests that it takes at a time
    spare: int  # connections that it would like to keep ready
    models: tuple[Model, ...]
    passthrough: tuple[str, ...] = ()  # host names whose TLS it ends itself

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls(
            version=m.whole("version", 0, 1000),
            agent=m.maybe_text("agent"),
            instance=m.text("instance"),
            resume=m.maybe_text("resume"),
            software=m.text("software", ""),
            max_streams=max(1, m.whole("max_streams", DEFAULT_STREAMS, MAX_STREAMS)),
            spare=m.whole("spare", SPARE_CONNECTIONS, MAX_STREAMS),
            models=m.models(),
            passthrough=m.hosts("passthrough"),
        )


@dataclass(frozen=True, slots=True)
class Registered:
    kind: ClassVar[str] = "registered"
    session: str
    resumed: bool
    agent: str  # the name of its key, by which it is known
    relay: str
    accepted: tuple[str, ...]
    rejected: tuple[str, ...]  # models that the key's globs do not allow
    beat: float
    grace: float
    passthrough: tuple[str, ...] = ()  # of the host names, those that are sent on

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls(
            session=m.text("session"),
            resumed=m.flag("resumed"),
            agent=m.text("agent", ""),
            relay=m.text("relay", ""),
            accepted=m.ids("accepted"),
            rejected=m.ids("rejected"),
            beat=m.seconds("beat", 15.0),
            grace=m.seconds("grace", GRACE_SECONDS),
            passthrough=m.hosts("passthrough"),
        )


@dataclass(frozen=True, slots=True)
class Pool:
    kind: ClassVar[str] = "pool"
    target: int
    seq: int

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls(m.whole("target", 0, MAX_STREAMS), m.whole("seq", 0, 1 << 53))


@dataclass(frozen=True, slots=True)
class Status:
    kind: ClassVar[str] = "status"
    live: int  # data connections
    dialing: int
    active: int  # requests that it works on, whoever sent them
    seq: int  # of the last ``pool``

    @classmethod
    def read(cls, m: _Members) -> Self:
        most = 1 << 31
        return cls(
            live=m.whole("live", 0, most),
            dialing=m.whole("dialing", 0, most),
            active=m.whole("active", 0, most),
            seq=m.whole("seq", 0, 1 << 53),
        )


@dataclass(frozen=True, slots=True)
class Models:
    kind: ClassVar[str] = "models"
    models: tuple[Model, ...]

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls(m.models())


@dataclass(frozen=True, slots=True)
class ModelsOk:
    kind: ClassVar[str] = "models_ok"
    accepted: tuple[str, ...]
    rejected: tuple[str, ...]

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls(m.ids("accepted"), m.ids("rejected"))


@dataclass(frozen=True, slots=True)
class Drain:
    kind: ClassVar[str] = "drain"
    deadline: float  # seconds that what has begun may still take
    reason: str
    reconnect_after: tuple[float, float] = (0.0, 1.0)  # seconds, at least and at most

    @classmethod
    def read(cls, m: _Members) -> Self:
        bounds = m.list("reconnect_after", 2)
        pair = _Members(cls.kind, {str(i): value for i, value in enumerate(bounds)})
        least, most = pair.seconds("0", 0.0), pair.seconds("1", 1.0)
        return cls(
            deadline=m.seconds("deadline", 0.0),
            reason=m.text("reason", ""),
            reconnect_after=(min(least, most), most),
        )


@dataclass(frozen=True, slots=True)
class Drained:
    kind: ClassVar[str] = "drained"

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls()


@dataclass(frozen=True, slots=True)
class Bye:
    """The codes: unauthorized, replaced, incompatible, shutdown, overloaded."""

    kind: ClassVar[str] = "bye"
    code: str
    message: str
    retry_after: float = 0.0  # seconds

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls(
            m.text("code", ""), m.text("message", ""), m.seconds("retry_after", 0.0)
        )


@dataclass(frozen=True, slots=True)
class Passthrough:
    kind: ClassVar[str] = "passthrough"
    host: str  # that the client has asked for
    client: str  # its address, as the relay says

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls(m.text("host"), m.text("client", ""))


@dataclass(frozen=True, slots=True)
class Passed:
    kind: ClassVar[str] = "passed"

    @classmethod
    def read(cls, m: _Members) -> Self:
        return cls()


Message = (
    Register
    | Registered
    | Pool
    | Status
    | Models
    | ModelsOk
    | Drain
    | Drained
    | Bye
    | Passthrough
    | Passed
)
_KINDS: Mapping[str, type[Message]] = {
    kind.kind: kind
    for kind in (
        Register,
        Registered,
        Pool,
        Status,
        Models,
        ModelsOk,
        Drain,
        Drained,
        Bye,
        Passthrough,
        Passed,
    )
}


def encode(message: Message) -> str:
    """A message as it travels."""
    members: dict[str, Any] = {"t": message.kind}
    for field in fields(message):
        value = getattr(message, field.name)
        if field.name == "models":
            value = [{**model.record, "id": model.id} for model in value]
        members[field.name] = value
    return json.dumps(members)


def decode(text: str | bytes) -> Message | None:
    """What a peer says; None if it is a kind of message that is not known here.

    Raises:
        BadMessage: it is no message, or one of its members is wrong.
    """
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadMessage("this is not JSON") from error
    if not isinstance(document, dict) or not isinstance(document.get("t"), str):
        raise BadMessage("this is no message")
    kind = _KINDS.get(document["t"])
    return None if kind is None else kind.read(_Members(kind.kind, document))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def fitting(models: tuple[Model, ...]) -> tuple[Model, ...]:
    """As many of the models, from the first on, as one message can hold."""
    size = 1024  # the other members
    kept = []
    for model in models[:MAX_MODELS]:
        size += len(json.dumps(model.record)) + 2
        if size > MAX_MESSAGE_BYTES:
            break
        kept.append(model)
    return tuple(kept)
