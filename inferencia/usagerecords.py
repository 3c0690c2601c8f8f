"""The records of the journal of usage, as bytes: what has begun, and what has ended.

=======  =========================================================================
begun    the first ``BEGUN_WIDTH`` of ``usageschema.COLUMNS``
ended    all of them
=======  =========================================================================

What was noted together is one frame: a mark, the length and the CRC-32 of what follows,
and a list of such tuples in ``marshal``'s form of version 2, which every Python since
2.5 reads and writes; it is the cheapest there is, five times cheaper than JSON. A frame
that was cut short, or does not fit its checksum, is passed over up to the next mark.

A file may be used again for other records, from its beginning. So that those of before
are not taken for new ones, each use has a number, from which checksums start.
"""

import marshal
import struct
from collections.abc import Sequence
from typing import Any
from zlib import crc32

_FORM = 2  # of marshal
_HEAD = struct.Struct("<4sII")  # mark, length, checksum
_MARK = b"\xf5us2"  # no character of UTF-8 begins so

Record = Sequence[Any]

_dumps = marshal.dumps
_packed = _HEAD.pack


def framed(records: list[tuple[Any, ...]], number: int) -> bytes:
    """These records as one frame of a file's use of this number."""
    try:
        data = _dumps(records, _FORM)
    except ValueError:  # an heir of str or int is among them
        data = _dumps([tuple(map(_plain, values)) for values in records], _FORM)
    return _packed(_MARK, len(data), crc32(data, number)) + data


def _plain(value: Any) -> int | float | str | None:
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else str(value)


def unframed(data: bytes, number: int) -> tuple[list[Record], int]:
    """The records of whole frames of one use of a file.

    Returns:
        The records, and how often there was something else before a frame. (Behind the
        last one anything may stand: a torn frame, or what the file held before.)
    """
    records: list[Record] = []
    damaged = at = 0
    is_damaged = False
    while at < len(data):
        found = _frame(data, at, number)
        if found is not None:
            body, at = found
            records += body
            damaged += is_damaged
            is_damaged = False
            continue
        following = data.find(_MARK, at + 1)
        is_damaged = True
        at = len(data) if following < 0 else following
    return records, damaged


def _frame(data: bytes, at: int, number: int) -> tuple[Any, int] | None:
    """What is in the whole frame that begins here, and where that ends."""
    if not data.startswith(_MARK, at) or at + _HEAD.size > len(data):
        return None
    _, length, checksum = _HEAD.unpack_from(data, at)
    at += _HEAD.size
    body = data[at : at + length]
    if len(body) < length or crc32(body, number) != checksum:
        return None
    return marshal.loads(body), at + length
