"""The header of a GGUF file is read whatever it holds, or refused with a sentence."""

import io
import random
import struct
from collections.abc import Mapping

import pytest

from engines.real import Installed
from ggufs import Tensor, Value, gguf_bytes, header_bytes
from inferencia.models.gguf import MAX_TENSORS, Header, NotGguf, read_header

KEYS: dict[str, Value] = {
    "general.architecture": "gemma3",
    "general.type": "model",
    "general.name": "Tiny 3",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.feed_forward_length": [2048, 1024],
    "gemma3.block_count": 18,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": [1, 0, 2],
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 128,
    "gemma3.attention.sliding_window": 512,
    "gemma3.attention.sliding_window_pattern": [True, False],
    "gemma3.rope.freq_base": 1e6,
    "tokenizer.ggml.tokens": ["<s>", "", "word" * 100],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
    "tokenizer.chat_template": "{{ messages }}",
    "general.file_type": 15,
}
TENSORS: tuple[Tensor, ...] = (("a.weight", (256, 4), 12), ("b.weight", (10,), 0))


def read(content: bytes, **limits: int) -> Header:
    return read_header(io.BytesIO(content), **limits)


def test_a_header_says_what_the_model_is() -> None:
    content = gguf_bytes(KEYS, TENSORS)
    assert read(content) == Header(
        version=3,
        architecture="gemma3",
        name="Tiny 3",
        kind="model",
        parameters=1034,
        quantisation="Q4_K_M",
        has_template=True,
        context_length=32768,
        vocabulary=3,
        embedding_length=640,
        feed_forward_length=2048,
        block_count=18,
        head_count=(4,),
        head_count_kv=(1, 0, 2),
        key_length=256,
        value_length=128,
        sliding_window=512,
        sliding_pattern=(1, 0),
        tensor_count=2,
        tensor_bytes=616,
        complete_bytes=len(content),
    )


def test_version_2_and_big_endian_files_say_the_same() -> None:
    known = read(gguf_bytes(KEYS, TENSORS))
    older = read(gguf_bytes(KEYS, TENSORS, version=2))
    other = read(gguf_bytes(KEYS, TENSORS, order=">"))
    assert (older.version, older.parameters) == (2, known.parameters)
    assert other.big_endian and other.is_foreign and not known.is_foreign
    assert (other.head_count_kv, other.tensor_bytes) == ((1, 0, 2), 616)


@pytest.mark.parametrize(
    ("keys", "parameters"),
    [({}, 1034), ({"general.parameter_count": 7_000}, 7_000)],
)
def test_parameters_are_what_is_said_or_counted(
    keys: Mapping[str, Value], parameters: int
) -> None:
    assert read(gguf_bytes(keys, TENSORS)).parameters == parameters


@pytest.mark.parametrize(
    ("file_type", "name"),
    [(1, "F16"), (7, "Q8_0"), (1024 + 18, "Q6_K"), (999, "Q4_K"), (None, "Q4_K")],
)
def test_quantisation_has_the_name_that_people_use(
    file_type: int | None, name: str
) -> None:
    keys = {} if file_type is None else {"general.file_type": file_type}
    assert read(gguf_bytes(keys, TENSORS)).quantisation == name


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"general.architecture": "clip"}, {"is_projector"}),
        ({"general.architecture": "x", "general.type": "mmproj"}, {"is_projector"}),
        ({"general.architecture": "b", "b.pooling_type": 1}, {"is_embedding"}),
        ({"general.architecture": "b", "b.attention.causal": False}, {"is_embedding"}),
        ({"general.architecture": "b", "b.pooling_type": 4}, {"is_reranker"}),
        ({"general.architecture": "b", "b.pooling_type": 0}, set()),
        ({"split.no": 1, "split.count": 3}, {"is_split"}),
        ({"split.count": 1}, set()),
    ],
)
def test_a_header_tells_what_kind_of_file_it_is(
    keys: Mapping[str, Value], what: set[str]
) -> None:
    header = read(gguf_bytes(keys))
    kinds = {"is_projector", "is_embedding", "is_reranker", "is_split"}
    assert {kind for kind in kinds if getattr(header, kind)} == what


def test_a_tensor_of_a_newer_type_counts_but_has_no_size() -> None:
    content = bytearray(header_bytes({}, [("t", (32,), 0)]))
    content[-12:-8] = struct.pack("<I", 77)
    header = read(bytes(content))
    assert (header.parameters, header.tensor_bytes) == (32, 0)
    assert header.quantisation == "type 77"


def test_the_state_of_recurrent_layers_is_known() -> None:
    keys: dict[str, Value] = {
        "general.architecture": "mamba",
        "mamba.ssm.conv_kernel": 4,
        "mamba.ssm.inner_size": 16,
        "mamba.ssm.state_size": 8,
        "mamba.ssm.group_count": 1,
    }
    assert read(gguf_bytes(keys)).state_per_layer == 3 * 32 + 128


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too short"),
        (b"GG", "too short"),
        (b"GGUF", "breaks off"),
        (b"PK\x03\x04" + bytes(100), "is not a GGUF file: it begins with 'PK"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(100), "version 4"),
        (b"GGUF" + bytes(100), "version 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, MAX_TENSORS + 1, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), "bytes of a name"),
        (gguf_bytes({"general.alignment": 33}), "alignment"),
        (gguf_bytes({"general.alignment": 2**31}), "alignment"),
    ],
)
def test_what_is_no_gguf_file_is_refused_with_a_sentence(
    content: bytes, says: str
) -> None:
    with pytest.raises(NotGguf, match=says):
        read(content)


def announcing(code: int, item: int, count: int) -> bytes:
    """A file with one key, which announces a list or a text of any length."""
    begin = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    if code == 8:
        return begin + struct.pack("<IQ", 8, count)
    return begin + struct.pack("<IIQ", 9, item, count)


@pytest.mark.parametrize("count", [2**20, 2**32, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize(("code", "item"), [(8, 0), (9, 8), (9, 4), (9, 10), (9, 0)])
def test_an_announced_length_is_never_believed(
    code: int, item: int, count: int
) -> None:
    content = announcing(code, item, count)
    for rest in (b"", bytes(1000), b"\xff" * 1000):
        with pytest.raises(NotGguf, match="breaks off"):
            read(content + rest)
    # The zeros that follow would go on as empty texts and numbers for ever.
    with pytest.raises(NotGguf, match=r"more than|breaks off"):
        read(content + bytes(200_000), max_bytes=100_000)


def test_lists_of_lists_and_unknown_types_are_refused() -> None:
    for item in (9, 13, 2**32 - 1):
        with pytest.raises(NotGguf, match="unknown type"):
            read(announcing(9, item, 1) + bytes(100))


def test_sizes_that_no_model_has_are_refused() -> None:
    for sizes in [(2**63, 2**63), (2**51,), (2**64 - 1,) * 4]:
        content = header_bytes({}, [("t", (1,) * len(sizes), 0)])
        packed = struct.pack(f"<{len(sizes)}Q", *sizes)
        content = content[: -12 - len(packed)] + packed + content[-12:]
        with pytest.raises(NotGguf, match="more numbers than any model"):
            read(content)


def test_no_more_is_read_than_allowed() -> None:
    keys = {"tokenizer.ggml.tokens": ["token"] * 10_000}
    file = io.BytesIO(gguf_bytes(keys))
    with pytest.raises(NotGguf, match="header of more than"):
        read_header(file, max_bytes=50_000)
    assert file.tell() <= 50_000


class OneByteAtATime(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(1, size or 1))


def test_a_file_that_comes_in_small_pieces_is_read_the_same() -> None:
    content = gguf_bytes(KEYS, TENSORS)
    assert read_header(OneByteAtATime(content)) == read(content)


def test_texts_that_lie_across_pieces_are_stepped_over() -> None:
    rng = random.Random(5)
    words = ["x" * rng.choice([0, 1, 7, 300, 70_000]) for _ in range(200)]
    content = gguf_bytes({**KEYS, "tokenizer.ggml.tokens": words}, TENSORS)
    assert len(content) > 2 * 1024 * 1024
    header = read(content)
    assert (header.vocabulary, header.quantisation) == (200, "Q4_K_M")
    assert header.complete_bytes == len(content)


def test_a_header_that_breaks_off_anywhere_is_refused() -> None:
    content = header_bytes(KEYS, TENSORS)
    read(content)
    for end in range(len(content)):
        with pytest.raises(NotGguf):
            read(content[:end])


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_header_is_read_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    whole = header_bytes(KEYS, TENSORS)
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8, 30])):
            content[rng.randrange(len(content))] = rng.choice([0, 1, 255, 127, 9])
        try:
            read(bytes(content))
        except NotGguf as error:
            assert str(error).isprintable()


@pytest.mark.e2e
def test_real_models_are_read_as_llama_server_reads_them(installed: Installed) -> None:
    with open(installed.folder / "chat.gguf", "rb") as file:
        chat = read_header(file)
    assert (chat.architecture, chat.quantisation) == ("gemma3", "Q4_K_M")
    assert (chat.parameters, chat.context_length) == (268_098_176, 32768)
    assert (chat.vocabulary, chat.has_template) == (262_144, False)
    size = (installed.folder / "chat.gguf").stat().st_size
    assert chat.complete_bytes == size
    with open(installed.folder / "minilm.gguf", "rb") as file:
        minilm = read_header(file)
    assert (minilm.architecture, minilm.quantisation) == ("bert", "F16")
    assert minilm.is_embedding and not minilm.is_causal
