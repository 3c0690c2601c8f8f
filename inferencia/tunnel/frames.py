"""WebSocket without a socket (RFC 6455): the handshake's values, and frames in bytes.

``FrameReader`` takes bytes as they come and gives pieces of messages: what is here of a
long frame is handed on at once, so nothing is gathered and a peer cannot make us
remember more than a control frame. It is strict; a fault is kept, and nothing is read
after it. No extensions are negotiated, so every reserved bit is a fault.

Clients mask what they send, servers do not, and each refuses the other (5.1).
"""

import base64
import hashlib
import secrets
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

# What one frame of ours holds at most. A ping waits for the frame before it: this is
# 16 ms on an uplink of 32 Mbit/s.
MAX_WRITTEN_BYTES = 64 * 1024
# What a peer's frame may announce. Proxies may join frames; nobody joins so many.
MAX_FRAME_BYTES = 1024 * 1024
# RFC 6455, 5.5
MAX_CONTROL_BYTES = 125

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3

Masking = Callable[[bytes, bytearray], None]


class Opcode(IntEnum):
    """What a frame carries (5.2)."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class CloseCode(IntEnum):
    """Why a connection ends (7.4.1)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    TOO_BIG = 1009


class Piece(NamedTuple):
    """Some bytes of a message, or a whole control frame."""

    opcode: int  # never CONTINUATION
    data: bytes
    is_last: bool = True  # whether the message ends with it


def new_key() -> str:
    """A value for ``Sec-WebSocket-Key``."""
    return base64.b64encode(secrets.token_bytes(16)).decode()


def accept_of(key: str) -> str:
    """The ``Sec-WebSocket-Accept`` that answers a key (4.2.2)."""
    digest = hashlib.sha1(key.encode("latin-1") + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def is_key(value: str) -> bool:
    """Whether a ``Sec-WebSocket-Key`` is 16 bytes in base64."""
    try:
        return len(base64.b64decode(value, validate=True)) == 16
    except ValueError:
        return False


def frame(opcode: Opcode, payload: bytes, *, is_masked: bool) -> bytes:
    """One whole frame.

    Args:
        opcode: what it carries.
        payload: at most 2**63 - 1 bytes; 125 of a control frame.
        is_masked: whether a client sends it.
    """
    size = len(payload)
    mask_bit = 0x80 if is_masked else 0
    if size < 126:
        head = bytes((0x80 | opcode, mask_bit | size))
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, mask_bit | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, mask_bit | 127, size)
    if not is_masked:
        return head + payload
    mask = secrets.token_bytes(4)
    return head + mask + masked(payload, mask)


def close_payload(code: CloseCode, reason: str = "") -> bytes:
    """What a close frame holds (5.5.1); a long reason is cut."""
    text = reason.encode()[: MAX_CONTROL_BYTES - 2]
    return struct.pack("!H", code) + text.decode("utf-8", "ignore").encode()


class FrameReader:
    """Takes frames apart. After a fault it gives nothing more."""

    __slots__ = (
        "_buffer",
        "_expects_masked",
        "_held",
        "_is_final",
        "_left",
        "_mask",
        "_message",
        "_opcode",
        "fault",
    )

    def __init__(self, *, expects_masked: bool) -> None:
        """Start before the first frame.

        Args:
            expects_masked: whether we are the server.
        """
        self.fault: str | None = None
        self._expects_masked = expects_masked
        self._buffer = b""  # the beginning of a head
        self._left = 0  # bytes of the payload that are still to come
        self._mask = b""  # for them, turned to where they begin; "" if not masked
        self._opcode: int = Opcode.BINARY  # of the frame that is being read
        self._is_final = True  # its FIN bit
        self._message: int | None = None  # of the message that is not finished
        self._held = b""  # of a control frame that is not whole

    def feed(self, data: bytes) -> list[Piece]:
        """What these bytes bring. Look at ``fault`` afterwards."""
        pieces: list[Piece] = []
        at = 0
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        end = len(data)
        while self.fault is None:
            if self._left:
                if at == end:
                    break
                at = self._take_payload(data, at, pieces)
                continue
            size = self._take_head(data, at)
            if not size:
                self._buffer = data[at:]
                break
            at += size
            if not self._left and self.fault is None:
                self._finish(b"", pieces)
        return pieces

    def _take_payload(self, data: bytes, at: int, pieces: list[Piece]) -> int:
        part = data[at : at + self._left]
        self._left -= len(part)
        if self._mask:
            plain = masked(part, self._mask)
            turn = len(part) & 3
            self._mask = self._mask[turn:] + self._mask[:turn]
        else:
            plain = part
        if self._left == 0:
            self._finish(plain, pieces)
        elif self._opcode >= Opcode.CLOSE:
            self._held += plain
        elif self._message is not None:
            pieces.append(Piece(self._message, plain, is_last=False))
        return at + len(part)

    def _finish(self, plain: bytes, pieces: list[Piece]) -> None:
        """The frame is whole with these bytes."""
        if self._opcode >= Opcode.CLOSE:
            pieces.append(Piece(self._opcode, self._held + plain))
            self._held = b""
            return
        assert self._message is not None
        pieces.append(Piece(self._message, plain, is_last=self._is_final))
        if self._is_final:
            self._message = None

    def _take_head(self, data: bytes, at: int) -> int:
        """Read a frame's head; its size, or 0 if it is not whole."""
        if len(data) - at < 2:
            return 0
        first, second = data[at], data[at + 1]
        if self._refuse_first_bytes(first, second):
            return 0
        short = second & 0x7F
        size = 2 + (0 if short < 126 else 2 if short == 126 else 8)
        mask_at = size
        size += 4 if second & 0x80 else 0
        if len(data) - at < size:
            return 0
        length = short
        if short >= 126:
            length = int.from_bytes(data[at + 2 : at + mask_at])
            if length < (126 if short == 126 else 1 << 16):
                self.fault = "a length that is not in its shortest form"
                return 0
            if length > MAX_FRAME_BYTES:
                self.fault = f"a frame of {length} bytes"
                return 0
        self._mask = data[at + mask_at : at + size]
        self._left = length
        self._opcode = first & 0x0F
        if self._opcode < Opcode.CLOSE:
            self._is_final = bool(first & 0x80)
            if self._opcode:
                self._message = self._opcode
        return size

    def _refuse_first_bytes(self, first: int, second: int) -> bool:
        """Hold a frame's first two bytes against the rules."""
        number = first & 0x0F
        is_final = bool(first & 0x80)
        is_new = number in (Opcode.TEXT, Opcode.BINARY)
        if first & 0x70:
            self.fault = "reserved bits are set"
        elif number > Opcode.PONG or Opcode.BINARY < number < Opcode.CLOSE:
            self.fault = f"an unknown opcode {number}"
        elif bool(second & 0x80) is not self._expects_masked:
            self.fault = "a masked frame" if second & 0x80 else "an unmasked frame"
        elif number >= Opcode.CLOSE and (not is_final or second & 0x7F > 125):
            self.fault = "a control frame that is fragmented or too long"
        elif is_new and self._message is not None:
            self.fault = "a new message within another"
        elif number == Opcode.CONTINUATION and self._message is None:
            self.fault = "a continuation of nothing"
        return self.fault is not None


def masked(data: bytes, mask: bytes) -> bytes:
    """``data`` with a mask laid over it; twice is once not (5.3)."""
    mixed = bytearray(data)
    _mask_in_place(mask, mixed)
    return bytes(mixed)


def mask_in_python(mask: bytes, data: bytearray) -> None:
    """Lay a mask over ``data``: four strides, each translated in one go."""
    for place, key in enumerate(mask):
        data[place::4] = data[place::4].translate(_translation(key))


def _translation(key: int) -> bytes:
    return bytes(byte ^ key for byte in range(256))


def _fastest() -> Masking:
    """aiohttp's own, which is compiled (7 us for 64 KiB against 90), if it is there."""
    try:
        from aiohttp._websocket.helpers import websocket_mask
    except ImportError:  # its place is not documented
        return mask_in_python
    return websocket_mask


_mask_in_place: Masking = _fastest()
