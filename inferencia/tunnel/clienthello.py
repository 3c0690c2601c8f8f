"""The first message of TLS, as far as it says which host is meant (RFC 8446, RFC 6066).

``HelloReader`` takes bytes as they come and gives the server's name as soon as the
whole ClientHello is there. What it has read stays with whoever feeds it: nothing is
taken away from the bytes, which go on to the host as they are.

It is strict. A message that another reader could understand in two ways must not be
sent by one reading and answered by another: lengths must fit exactly, no extension may
come twice, and there is one name or none. With Encrypted ClientHello the name is that
of the outer message, which is the one that is meant to be read on the way.

The alerts are what a client is told that is not let through (RFC 8446, 6).
"""

from typing import Final

from inferencia.tunnel.wire import is_host_name

# What nginx and HAProxy take as well. With the keys of post-quantum exchange and every
# extension that browsers know, a ClientHello has 2 KiB.
MAX_HELLO_BYTES = 16 * 1024

_HANDSHAKE_RECORD: Final = 22
_CLIENT_HELLO: Final = 1
_RECORD_HEAD_BYTES = 5
_HANDSHAKE_HEAD_BYTES = 4
_MAX_RECORD_BYTES = 1 << 14  # RFC 8446, 5.1
_SERVER_NAME: Final = 0  # the extension, and the only kind of name in it

_ALERT_RECORD, _FATAL = 21, 2


def _alert(description: int) -> bytes:
    return bytes((_ALERT_RECORD, 3, 1, 0, 2, _FATAL, description))


# Nobody here answers to that name, or there was none.
UNRECOGNIZED_NAME = _alert(112)
# The ClientHello is malformed.
DECODE_ERROR = _alert(50)
# It cannot be done now.
INTERNAL_ERROR = _alert(80)


class BadHello(Exception):
    """This is no ClientHello that we send on. The text is fit for a log."""

    def __init__(self, why: str, alert: bytes) -> None:
        """Keep why.

        Args:
            why: what is wrong; nothing of what came.
            alert: what to answer; empty if the client does not speak TLS.
        """
        super().__init__(why)
        self.alert = alert


class HelloReader:
    """Reads up to the end of the ClientHello, and not one byte further."""

    __slots__ = ("_message", "_needed", "_raw", "_read", "name")

    def __init__(self) -> None:
        self.name: str | None = None  # in lower case, once it is known
        self._raw = bytearray()  # all that came
        self._read = 0  # of it: whole records
        self._message = bytearray()  # the fragments of these records
        self._needed = _RECORD_HEAD_BYTES  # of ``_raw``, before it is worth a look

    @property
    def received(self) -> bytes:
        """All bytes that were fed, for the host."""
        return bytes(self._raw)

    def feed(self, data: bytes) -> bool:
        """Take more bytes.

        Returns:
            Whether ``name`` is known now.

        Raises:
            BadHello: they cannot be sent on.
        """
        self._raw += data
        while self.name is None and len(self._raw) >= self._needed:
            self._read_record()
        if self.name is None and len(self._raw) >= MAX_HELLO_BYTES:
            raise _malformed("a ClientHello that is too long")
        return self.name is not None

    def _read_record(self) -> None:
        head = self._raw[self._read : self._read + _RECORD_HEAD_BYTES]
        if head[0] != _HANDSHAKE_RECORD or head[1] != 3:
            raise BadHello("something else than TLS", b"")
        size = int.from_bytes(head[3:])
        if not 0 < size <= _MAX_RECORD_BYTES:
            raise _malformed("a record of a length that is not allowed")
        body = self._read + _RECORD_HEAD_BYTES
        self._needed = body + size
        if len(self._raw) < self._needed:
            return
        self._message += self._raw[body : body + size]
        self._read = self._needed
        self._needed += _RECORD_HEAD_BYTES
        self._look()

    def _look(self) -> None:
        """Take the message apart if it is whole."""
        message = self._message
        if message[0] != _CLIENT_HELLO:
            raise _malformed("another message than a ClientHello")
        if len(message) < _HANDSHAKE_HEAD_BYTES:
            return
        end = _HANDSHAKE_HEAD_BYTES + int.from_bytes(message[1:4])
        if end > MAX_HELLO_BYTES:
            raise _malformed("a ClientHello that is too long")
        if len(message) > end:
            raise _malformed("a message behind the ClientHello")
        if len(message) == end:
            self.name = server_name(bytes(message[_HANDSHAKE_HEAD_BYTES:]))


def server_name(hello: bytes) -> str:
    """The host that a ClientHello asks for (RFC 8446, 4.1.2), in lower case.

    Args:
        hello: the whole message, without the head of its handshake message.

    Raises:
        BadHello: it is malformed, or names none.
    """
    fields = _Fields(hello)
    fields.take(2 + 32)  # version, random
    if len(fields.vector(1)) > 32:
        raise _malformed("a session id that is too long")
    suites = fields.vector(2)
    if not suites or len(suites) % 2:
        raise _malformed("a malformed list of ciphers")
    if not fields.vector(1):
        raise _malformed("a ClientHello without a compression method")
    if fields.is_empty:  # as old clients send it
        raise _nameless()
    extensions = _Fields(fields.vector(2))
    fields.end()
    return _named(extensions)


def _named(extensions: "_Fields") -> str:
    seen: set[int] = set()
    name: str | None = None
    while not extensions.is_empty:
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind in seen:
            raise _malformed("an extension that comes twice")
        seen.add(kind)
        if kind == _SERVER_NAME:
            name = _host_name(content)
    if name is None:
        raise _nameless()
    return name


def _host_name(content: bytes) -> str:
    """What the extension ``server_name`` says (RFC 6066, 3)."""
    outer = _Fields(content)
    names = _Fields(outer.vector(2))
    outer.end()
    if names.number(1) != _SERVER_NAME:
        raise _malformed("a name of an unknown kind")
    raw = names.vector(2)
    names.end()
    try:
        name = raw.decode("ascii").lower()
    except UnicodeDecodeError:
        raise _malformed("a name that is not ASCII") from None
    if not is_host_name(name):
        raise BadHello("a name that no host has", UNRECOGNIZED_NAME)
    return name


class _Fields:
    """Reads the presentation language of TLS (RFC 8446, 3)."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._data)

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) < size:
            raise _malformed("a field that ends too early")
        self._at += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> bytes:
        """Bytes behind their length, which has ``size`` bytes."""
        return self.take(self.number(size))

    def end(self) -> None:
        if not self.is_empty:
            raise _malformed("a field that is longer than its content")


def _malformed(why: str) -> BadHello:
    return BadHello(why, DECODE_ERROR)


def _nameless() -> BadHello:
    return BadHello("a ClientHello without a server's name", UNRECOGNIZED_NAME)
