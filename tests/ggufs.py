"""Small GGUF files for tests, with any header."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

# What a tensor is: name, sizes, type (0 is F32) or the bytes that it has in the file.
Tensor = tuple[str, tuple[int, ...], int]
Value = str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[float]

# 300 numbers: a file of more than the 1000 bytes that discovery asks for.
ONE_TENSOR: tuple[Tensor, ...] = (("token_embd.weight", (20, 15), 0),)
_BLOCKS = {0: (1, 4), 1: (1, 2), 8: (32, 34), 12: (256, 144)}


def header_bytes(
    keys: Mapping[str, Value],
    tensors: Sequence[Tensor] = ONE_TENSOR,
    *,
    version: int = 3,
    order: str = "<",
) -> bytes:
    """A header alone, without the padding and the tensors' data."""
    out = [b"GGUF", struct.pack(f"{order}IQQ", version, len(tensors), len(keys))]
    for name, value in keys.items():
        out += [_text(name, order), _value(value, order)]
    offset = 0
    for name, sizes, code in tensors:
        out += [_text(name, order), struct.pack(f"{order}I", len(sizes))]
        out.append(struct.pack(f"{order}{len(sizes)}QIQ", *sizes, code, offset))
        offset += -(-tensor_bytes(sizes, code) // 32) * 32
    return b"".join(out)


def tensor_bytes(sizes: tuple[int, ...], code: int) -> int:
    number = 1
    for size in sizes:
        number *= size
    block, size = _BLOCKS[code]
    return -(-number // block) * size


def gguf_bytes(
    keys: Mapping[str, Value],
    tensors: Sequence[Tensor] = ONE_TENSOR,
    *,
    version: int = 3,
    order: str = "<",
) -> bytes:
    """A whole file; the tensors' data are zeros."""
    out = header_bytes(keys, tensors, version=version, order=order)
    for _, sizes, code in tensors:
        out += bytes(-len(out) % 32) + bytes(tensor_bytes(sizes, code))
    return out


def write_gguf(
    path: Path,
    *,
    arch: str = "llama",
    name: str = "Tiny",
    context: int = 4096,
    file_type: int | None = 15,
    template: str | None = None,
    tensors: Sequence[Tensor] = ONE_TENSOR,
    keys: Mapping[str, Value] | None = None,
) -> Path:
    """Write a model that no engine could run, but that says all a model says.

    It has two layers, 8 heads of which 2 are for the cache, and an embedding of 64.
    ``keys`` are added, or replace what stands there.
    """
    written: dict[str, Value] = {
        "general.architecture": arch,
        "general.name": name,
        f"{arch}.context_length": context,
        f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 128,
        f"{arch}.block_count": 2,
        f"{arch}.attention.head_count": 8,
        f"{arch}.attention.head_count_kv": 2,
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b"],
    }
    if file_type is not None:
        written["general.file_type"] = file_type
    if template is not None:
        written["tokenizer.chat_template"] = template
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes({**written, **(keys or {})}, tensors))
    return path


def write_projector(path: Path, *, projection: int = 64) -> Path:
    """Write what goes with a model that sees."""
    keys: dict[str, Value] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.vision.projection_dim": projection,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(keys))
    return path


def write_shards(
    folder: Path, stem: str, count: int, *, without: Sequence[int] = ()
) -> list[Path]:
    """Write a split model as llama.cpp does: only its first file says what it is."""
    paths = []
    for number in range(1, count + 1):
        path = folder / f"{stem}-{number:05}-of-{count:05}.gguf"
        split: dict[str, Value] = {"split.no": number - 1, "split.count": count}
        if number in without:
            continue
        if number == 1:
            write_gguf(path, keys=split)
        else:
            path.write_bytes(gguf_bytes(split))
        paths.append(path)
    return paths


def _text(text: str, order: str) -> bytes:
    encoded = text.encode()
    return struct.pack(f"{order}Q", len(encoded)) + encoded


def _value(value: Value, order: str) -> bytes:
    if isinstance(value, str):
        return struct.pack(f"{order}I", 8) + _text(value, order)
    if isinstance(value, bool):
        return struct.pack(f"{order}I?", 7, value)
    if isinstance(value, int):
        return struct.pack(f"{order}II", 4, value)
    if isinstance(value, float):
        return struct.pack(f"{order}If", 6, value)
    begin = struct.pack(f"{order}I", 9)
    if all(isinstance(item, str) for item in value):
        texts = b"".join(_text(str(item), order) for item in value)
        return begin + struct.pack(f"{order}IQ", 8, len(value)) + texts
    code, letter = (7, "?") if all(isinstance(v, bool) for v in value) else (4, "I")
    if any(isinstance(item, float) for item in value):
        code, letter = 6, "f"
    count = len(value)
    return begin + struct.pack(f"{order}IQ{count}{letter}", code, count, *value)
