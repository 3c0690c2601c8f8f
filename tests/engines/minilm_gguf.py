"""Turn all-MiniLM-L6-v2 (safetensors) into a GGUF file for ``llama-server``.

    python minilm_gguf.py MODEL_FOLDER OUT.gguf

Needs numpy and gguf, not torch. The tensor names on the right are llama.cpp's for the
architecture ``bert`` (``gguf.constants.MODEL_TENSORS``), those on the left are
sentence-transformers'.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found, unused-ignore]
import numpy as np  # type: ignore[import-not-found, unused-ignore]

_DTYPES = {"F32": np.float32, "F16": np.float16}

_ONCE = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}
_PER_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
# llama.cpp adds these two to f32 activations without a cast, so they stay f32.
_KEPT_F32 = {"position_embd.weight", "token_types.weight"}


class Safetensors:
    """A safetensors file: 8 bytes of head length, a JSON head, the data."""

    def __init__(self, path: Path) -> None:
        self._raw = path.read_bytes()
        (length,) = struct.unpack_from("<Q", self._raw)
        self._head: dict[str, Any] = json.loads(self._raw[8 : 8 + length])
        self._data = 8 + length

    def tensor(self, name: str) -> Any:
        entry = self._head[name]
        begin, end = (self._data + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(self._raw[begin:end], _DTYPES[entry["dtype"]])
        return flat.reshape(entry["shape"]).astype(np.float32)


def tensor_names(layers: int) -> Iterator[tuple[str, str]]:
    """Pairs of the name in the safetensors file and the name in the GGUF file."""
    yield from _ONCE.items()
    for layer in range(layers):
        for theirs, ours in _PER_LAYER.items():
            for part in ("weight", "bias"):
                yield (
                    f"encoder.layer.{layer}.{theirs}.{part}",
                    f"blk.{layer}.{ours}.{part}",
                )


def vocabulary(lines: list[str]) -> tuple[list[bytes], list[int]]:
    """WordPiece tokens in llama.cpp's spelling: ``##s`` -> ``s``, ``a`` -> ``▁a``."""
    tokens, types = [], []
    for line in lines:
        if len(line) > 2 and line.startswith("[") and line.endswith("]"):
            tokens.append(line.encode())
            types.append(int(gguf.TokenType.CONTROL))
            continue
        text = line[2:] if line.startswith("##") else "\u2581" + line
        tokens.append(text.encode())
        types.append(int(gguf.TokenType.NORMAL))
    return tokens, types


def describe(out: Any, config: dict[str, Any], lines: list[str]) -> None:
    """Write the key-value part: dimensions and tokenizer."""
    out.add_name("all-MiniLM-L6-v2")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_head_count(config["num_attention_heads"])
    out.add_layer_norm_eps(config["layer_norm_eps"])
    out.add_causal_attention(False)
    out.add_pooling_type(gguf.PoolingType.MEAN)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tokens, types = vocabulary(lines)
    out.add_tokenizer_model("bert")
    out.add_tokenizer_pre("jina-v2-en")  # llama.cpp's name for plain lower-cased BERT
    out.add_token_list(tokens)
    out.add_token_types(types)
    out.add_token_type_count(config.get("type_vocab_size", 2))
    place = {token: index for index, token in enumerate(lines)}
    out.add_bos_token_id(place["[CLS]"])
    out.add_eos_token_id(place["[SEP]"])
    out.add_sep_token_id(place["[SEP]"])
    out.add_unk_token_id(place["[UNK]"])
    out.add_pad_token_id(place["[PAD]"])
    out.add_mask_token_id(place["[MASK]"])
    out.add_add_bos_token(True)
    out.add_add_eos_token(True)


def convert(folder: Path, target: Path) -> None:
    """Write ``target``; it appears whole or not at all."""
    config = json.loads((folder / "config.json").read_text())
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    source = Safetensors(folder / "model.safetensors")
    unfinished = target.with_suffix(".part")
    out = gguf.GGUFWriter(unfinished, "bert")
    describe(out, config, lines)
    for theirs, ours in tensor_names(config["num_hidden_layers"]):
        tensor = source.tensor(theirs)
        if tensor.ndim == 2 and ours not in _KEPT_F32:
            tensor = tensor.astype(np.float16)
        out.add_tensor(ours, tensor)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    unfinished.replace(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
