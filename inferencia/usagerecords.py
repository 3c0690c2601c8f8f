"""The records of the journal of usage, as bytes: what has begun, and what has ended.

=======  =========================================================================
begun    the first ``BEGUN_WIDTH`` of ``usageschema.COLUMNS``
ended    all of them
=======  =========================================================================

What was noted together is one frame: a mark, the length and the CRC-32 of what follows,
and a list of such tuples in ``marshal``'s form of version 2, which every Python since
2.5 reads and writes; it is the cheapest there is, five times cheaper than JSON. A frame
that was cut short, or does not fit its checksum, is passed over up to the next mark.
"""

import marshal
import struct
from collections.abc import Sequence
from typing import Any
from zlib import crc32

_FORM = 2  # of marshal
_HEAD = struct.Struct("<4sII")  # mark, length, checksum
_MARK = b"\xf5use"  # no character of UTF-8 begins so

Record = Sequence[Any]

_dumps = marshal.dumps
_packed = _HEAD.pack


def framed(records: list[tuple[Any, ...]]) -> bytes:
    """These records as one frame."""
    try:
        data = _dumps(records, _FORM)
    except ValueError:  # an heir of str or int is among them
        data = _dumps([tuple(map(_plain, values)) for values in records], _FORM)
    return _packed(_MARK, len(data), crc32(data)) + data


def _plain(value: Any) -> int | float | str | None:
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else str(value)


def unframed(data: bytes) -> tuple[list[Record], int]:
    """The records of whole frames, and how often some bytes were passed over."""
    records: list[Record] = []
    damaged = at = 0
    while at < len(data):
        if data.startswith(_MARK, at) and at + _HEAD.size <= len(data):
            _, length, checksum = _HEAD.unpack_from(data, at)
            body = data[at + _HEAD.size : at + _HEAD.size + length]
            if len(body) == length and crc32(body) == checksum:
                found = marshal.loads(body)
                # A daemon of before lists were written may have been killed.
                records += found if isinstance(found, list) else [found]
                at += _HEAD.size + length
                continue
        following = data.find(_MARK, at + 1)
        end = len(data) if following < 0 else following
        damaged += bool(data[at:end].strip(b"\0"))  # zeros: room not used yet
        at = end
    return records, damaged
