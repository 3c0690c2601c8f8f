"""The header of a GGUF file: what a model is, without reading the model.

The format is llama.cpp's (ggml, ``docs/gguf.md``):

    "GGUF", version u32, tensors u64, keys u64
    per key:     name, type u32, value         a text is its length u64 and its bytes
    per tensor:  name, dimensions u32, sizes u64..., type u32, offset u64
    padding to ``general.alignment``, then the tensors' data

Versions 2 and 3 differ only in that 3 may be big-endian. A count in a file is never
believed: what it announces is read piece by piece, up to ``max_bytes`` in all, and
nothing is allocated for it. The vocabulary, which is most of a header, is stepped over
without becoming Python objects: 262,144 tokens take about 20 ms.

Pure: the file comes in opened. What goes wrong with it is a ``NotGguf`` whose message
is a sentence without the file's name.
"""

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# The largest known: 262,144 tokens with 514,906 merges, about 20 MB.
MAX_HEADER_BYTES = 64 * 1024 * 1024
# Models have 30 to 60 keys. Unfused mixtures of experts had 46,000 tensors.
MAX_KEYS = 10_000
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 65_535  # the format's own limit for a key
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
# Numbers in one tensor, or in all: far above any model, far below what would make
# sums meaningless.
MAX_ELEMENTS = 2**50
# A list is kept only if it can be one value per layer; LLAMA_MAX_LAYERS is 512.
MAX_KEPT_ITEMS = 1024
MAX_KEPT_TEXT = 4096

_CHUNK = 1024 * 1024
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY = 8, 9
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_SIZES = {code: struct.calcsize(f"<{text}") for code, text in _FORMATS.items()}

# llama.h, llama_ftype. 4 to 6 and 33 to 35 were removed.
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
    40: "Q1_0",
}
_GUESSED = 1024  # a bit that llama.cpp sets when it made the type up

# ggml.h, ggml_type: name, numbers in a block, bytes of a block.
_TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

Number = int | float | bool
_N = TypeVar("_N", int, tuple[int, ...])

POOLING_RANK = 4  # LLAMA_POOLING_TYPE_RANK; 1 to 3 are mean, cls, last


class NotGguf(ValueError):
    """The file holds no header that could be read; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself. 0, "" and () mean that it does not say."""

    version: int
    architecture: str = ""  # llama, qwen3, bert, clip, ...; "" in later shards
    name: str = ""
    kind: str = ""  # general.type: model, mmproj, adapter, imatrix
    parameters: int = 0  # in this file; a split model's are in all of its files
    quantisation: str = ""  # Q4_K_M, F16, ...
    has_template: bool = False  # a chat template
    context_length: int = 0  # tokens that it was trained for
    vocabulary: int = 0  # tokens
    embedding_length: int = 0
    feed_forward_length: int = 0
    block_count: int = 0  # layers
    # One value for all layers, or one for each.
    head_count: tuple[int, ...] = ()
    head_count_kv: tuple[int, ...] = ()
    key_length: int = 0  # numbers of one head; 0: embedding_length / head_count
    value_length: int = 0
    key_length_swa: int = 0  # the same in layers with a sliding window
    value_length_swa: int = 0
    sliding_window: int = 0  # tokens
    # Every n-th layer sees all tokens, or for each layer whether it does not.
    sliding_pattern: tuple[int, ...] = ()
    shared_kv_layers: int = 0  # the last n layers use the cache of earlier ones
    attention_interval: int = 0  # only every n-th layer has attention
    state_per_layer: int = 0  # numbers kept for each sequence by a recurrent layer
    is_causal: bool = True  # False: an encoder, which writes no text
    pooling: int = 0  # how an embedding model sums up; 4 (rank) is a reranker
    projection_length: int = 0  # a projector's output: the model's embedding_length
    tensor_count: int = 0
    tensor_bytes: int = 0
    # Bytes that the file must have at least; a shorter one is not complete.
    complete_bytes: int = 0
    split_count: int = 0  # 0 and 1: not split
    big_endian: bool = False

    @property
    def is_split(self) -> bool:
        return self.split_count > 1

    @property
    def is_projector(self) -> bool:
        """Whether it turns images or sound into input for another file's model."""
        return self.architecture == "clip" or self.kind == "mmproj"

    @property
    def is_reranker(self) -> bool:
        return self.pooling == POOLING_RANK

    @property
    def is_embedding(self) -> bool:
        """Whether it gives embeddings and no text."""
        return not self.is_reranker and (self.pooling > 0 or not self.is_causal)

    @property
    def is_foreign(self) -> bool:
        """Whether its numbers have the byte order of another kind of machine."""
        return self.big_endian != (sys.byteorder == "big")


class Readable(Protocol):
    """What a header is read from: a file, or something that stands before one."""

    def read(self, size: int = -1, /) -> bytes: ...


def read_header(file: Readable, *, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read the header that begins at the file's position.

    Reads at most ``max_bytes``, and at most 1 MiB beyond the header's end.

    Raises:
        NotGguf: it is none, breaks off, or announces more than a model can have.
        OSError: from the file.
    """
    source = _Source(file, max_bytes)
    version = source.begin()
    tensor_count = source.bounded(source.u64(), MAX_TENSORS, "tensors")
    key_count = source.bounded(source.u64(), MAX_KEYS, "keys")
    keys = _Keys()
    for _ in range(key_count):
        _read_key(source, keys)
    tensors = _read_tensors(source, tensor_count)
    return _header(version, source, keys, tensors)


class _Source:
    """Bytes of the file, in order and never more than the limit."""

    def __init__(self, file: Readable, max_bytes: int) -> None:
        self._file = file
        self._left = max_bytes
        self._data = b""
        self._at = 0  # in _data
        self._before = 0  # bytes of the file ahead of _data
        self.big_endian = False
        self._order("<")

    def _order(self, order: str) -> None:
        self._u32 = struct.Struct(f"{order}I").unpack_from
        self._u64 = struct.Struct(f"{order}Q").unpack_from
        self._any = {code: f"{order}{text}" for code, text in _FORMATS.items()}
        self.order = order

    @property
    def position(self) -> int:
        return self._before + self._at

    def begin(self) -> int:
        """Check the first bytes, settle the byte order; the version."""
        try:
            magic = self.take(len(MAGIC))
        except NotGguf:
            raise NotGguf("is too short for a GGUF file") from None
        if magic != MAGIC:
            raise NotGguf(f"is not a GGUF file: it begins with {ascii(magic)[1:]}")
        version = self.u32()
        if version & 0xFFFF == 0 and version:
            self.big_endian = True
            self._order(">")
            version = version >> 24 | (version >> 8 & 0xFF00)
        if version not in VERSIONS:
            known = " and ".join(str(number) for number in VERSIONS)
            raise NotGguf(f"has GGUF version {version}; known are {known}")
        return version

    def bounded(self, count: int, most: int, what: str) -> int:
        if count > most:
            raise NotGguf(f"announces {count} {what}; at most {most} are read")
        return count

    def _need(self, size: int) -> None:
        """Have ``size`` bytes at hand, or raise."""
        missing = size - (len(self._data) - self._at)
        if missing <= 0:
            return
        if missing > self._left:
            raise NotGguf(f"has a header of more than {self.position} bytes")
        pieces = [self._data[self._at :]]
        while missing > 0:
            piece = self._file.read(min(_CHUNK, self._left))
            if not piece:
                raise NotGguf("breaks off within its header")
            self._left -= len(piece)
            missing -= len(piece)
            pieces.append(piece)
        self._before += self._at
        self._data, self._at = b"".join(pieces), 0

    def take(self, size: int) -> bytes:
        self._need(size)
        begin = self._at
        self._at += size
        return self._data[begin : self._at]

    def skip(self, size: int) -> None:
        """Go on by ``size`` bytes, holding no more than one piece of them."""
        while size > 0:
            step = min(size, _CHUNK)
            self._need(step)
            self._at += step
            size -= step

    def u32(self) -> int:
        self._need(4)
        value: int = self._u32(self._data, self._at)[0]
        self._at += 4
        return value

    def u64(self) -> int:
        self._need(8)
        value: int = self._u64(self._data, self._at)[0]
        self._at += 8
        return value

    def number(self, code: int) -> Number:
        value: Number = struct.unpack(self._any[code], self.take(_SIZES[code]))[0]
        return value

    def name(self) -> str:
        size = self.bounded(self.u64(), MAX_NAME_BYTES, "bytes of a name")
        return self.take(size).decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Step over ``count`` texts.

        This loop is most of the time that a header takes, so it keeps to local names
        and does within one piece of the file without a call of ours.
        """
        unpack = self._u64
        while count > 0:
            data, at, done = self._data, self._at, 0
            try:
                for done in range(1, count + 1):  # noqa: B007 - how far it came
                    at += 8 + unpack(data, at)[0]
            except (struct.error, IndexError, OverflowError):
                done -= 1  # the piece at hand ends before this text's length
            count -= done
            self._at = min(at, len(data))
            self.skip(at - self._at)
            if count > 0:
                self._need(8)

    def tensor(self) -> tuple[list[int], int, int]:
        """Sizes of the dimensions, type, offset in the data."""
        self.skip(self.bounded(self.u64(), MAX_NAME_BYTES, "bytes of a name"))
        count = self.bounded(self.u32(), MAX_DIMENSIONS, "dimensions of a tensor")
        *sizes, code, offset = struct.unpack(
            f"{self.order}{count}QIQ", self.take(8 * count + 12)
        )
        return sizes, code, offset


class _Keys:
    """What was kept of the keys: numbers, short lists of whole numbers, few texts."""

    def __init__(self) -> None:
        self.numbers: dict[str, Number] = {}
        self.lists: dict[str, tuple[int, ...]] = {}
        self.texts: dict[str, str] = {}
        self.lengths: dict[str, int] = {}  # items of a list, bytes of a text

    def whole(self, key: str) -> int:
        """A number that counts something; 0 if it is not there or makes no sense."""
        value = self.numbers.get(key, 0)
        if isinstance(value, float):
            return 0
        return int(value) if 0 <= value <= MAX_ELEMENTS else 0

    def whole_or_list(self, key: str) -> tuple[int, ...]:
        if key in self.lists:
            return tuple(max(0, value) for value in self.lists[key])
        return (self.whole(key),) if key in self.numbers else ()


_KEPT_TEXTS = frozenset({"general.architecture", "general.name", "general.type"})
_KEPT_LISTS = (
    ".attention.head_count",
    ".attention.head_count_kv",
    ".attention.sliding_window_pattern",
    ".feed_forward_length",
)


def _read_key(source: _Source, keys: _Keys) -> None:
    name = source.name()
    code = source.u32()
    if code == _STRING:
        size = source.u64()
        keys.lengths[name] = size
        if name in _KEPT_TEXTS and size <= MAX_KEPT_TEXT:
            keys.texts[name] = source.take(size).decode("utf-8", "replace")
        else:
            source.skip(size)
    elif code == _ARRAY:
        _read_list(source, name, keys)
    elif code in _FORMATS:
        keys.numbers[name] = source.number(code)
    else:
        raise NotGguf(f"has a value of the unknown type {code}")


def _read_list(source: _Source, name: str, keys: _Keys) -> None:
    code, count = source.u32(), source.u64()
    keys.lengths[name] = count
    if code == _STRING:
        source.skip_strings(count)
    elif code not in _FORMATS:
        raise NotGguf(f"has a list of values of the unknown type {code}")
    elif name.endswith(_KEPT_LISTS) and count <= MAX_KEPT_ITEMS and code not in (6, 12):
        items = source.take(count * _SIZES[code])
        values = struct.unpack(f"{source.order}{count}{_FORMATS[code]}", items)
        keys.lists[name] = tuple(int(value) for value in values)
    else:
        source.skip(count * _SIZES[code])


@dataclass(frozen=True, slots=True)
class _Tensors:
    count: int
    elements: int
    bytes: int
    end: int  # of the last one, from the beginning of the data
    commonest: str


def _read_tensors(source: _Source, count: int) -> _Tensors:
    elements = size = end = 0
    by_type: dict[str, int] = {}
    for _ in range(count):
        sizes, code, offset = source.tensor()
        number = 1
        for length in sizes:
            number *= length
        elements += number
        if elements > MAX_ELEMENTS:
            raise NotGguf("announces more numbers than any model has")
        # A type that is newer than this program: its size is not known, the rest is.
        name, block, block_bytes = _TENSOR_TYPES.get(code, (f"type {code}", 1, 0))
        own = -(-number // block) * block_bytes
        size += own
        end = max(end, offset + own)
        by_type[name] = by_type.get(name, 0) + number
    commonest = max(by_type, key=lambda name: by_type[name], default="")
    return _Tensors(count, elements, size, end, commonest)


def _header(version: int, source: _Source, keys: _Keys, tensors: _Tensors) -> Header:
    architecture = keys.texts.get("general.architecture", "")

    def of(key: str, read: Callable[[str], _N]) -> _N:
        return read(f"{architecture}.{key}")

    whole, listed = keys.whole, keys.whole_or_list
    alignment = whole("general.alignment") or _DEFAULT_ALIGNMENT
    if alignment > _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise NotGguf(f"has an alignment of {alignment} bytes")
    start = -(-source.position // alignment) * alignment
    causal = keys.numbers.get(f"{architecture}.attention.causal", True)
    return Header(
        version=version,
        architecture=architecture,
        name=keys.texts.get("general.name", ""),
        kind=keys.texts.get("general.type", ""),
        parameters=whole("general.parameter_count") or tensors.elements,
        quantisation=_quantisation(keys, tensors),
        has_template=keys.lengths.get("tokenizer.chat_template", 0) > 0,
        context_length=of("context_length", whole),
        vocabulary=keys.lengths.get("tokenizer.ggml.tokens", 0),
        embedding_length=of("embedding_length", whole),
        feed_forward_length=max(of("feed_forward_length", listed), default=0),
        block_count=of("block_count", whole),
        head_count=of("attention.head_count", listed),
        head_count_kv=of("attention.head_count_kv", listed),
        key_length=of("attention.key_length", whole),
        value_length=of("attention.value_length", whole),
        key_length_swa=of("attention.key_length_swa", whole),
        value_length_swa=of("attention.value_length_swa", whole),
        sliding_window=of("attention.sliding_window", whole),
        sliding_pattern=of("attention.sliding_window_pattern", listed),
        shared_kv_layers=of("attention.shared_kv_layers", whole),
        attention_interval=of("full_attention_interval", whole),
        state_per_layer=_state(architecture, keys),
        is_causal=bool(causal),
        pooling=of("pooling_type", whole),
        projection_length=whole("clip.vision.projection_dim")
        or whole("clip.audio.projection_dim"),
        tensor_count=tensors.count,
        tensor_bytes=tensors.bytes,
        complete_bytes=start + tensors.end if tensors.count else source.position,
        split_count=whole("split.count"),
        big_endian=source.big_endian,
    )


def _quantisation(keys: _Keys, tensors: _Tensors) -> str:
    if "general.file_type" in keys.numbers:
        code = keys.whole("general.file_type") & ~_GUESSED
        if code in _FILE_TYPES:
            return _FILE_TYPES[code]
    return tensors.commonest


def _state(architecture: str, keys: _Keys) -> int:
    """Numbers that a recurrent layer keeps (llama-hparams.cpp, n_embd_r, n_embd_s)."""

    def of(key: str) -> int:
        return keys.whole(f"{architecture}.ssm.{key}")

    inner, state = of("inner_size"), of("state_size")
    kernel = max(0, of("conv_kernel") - 1)
    return kernel * (inner + 2 * of("group_count") * state) + state * inner
