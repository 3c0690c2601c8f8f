"""What a model will take is known from its header, and what there is to be had."""

import io
from collections.abc import Callable, Mapping, Sequence

import pytest

from ggufs import Value, gguf_bytes
from inferencia.models.capacity import GIB, Capacity, detected_budget, run
from inferencia.models.gguf import Header, read_header
from inferencia.models.memory import (
    CacheSettings,
    cache_bytes,
    estimate,
    estimate_command,
)

MIB = 1024**2

# The header of Gemma 3 270m, Q4_K_M.
GEMMA = Header(
    version=3,
    architecture="gemma3",
    context_length=32768,
    vocabulary=262144,
    embedding_length=640,
    feed_forward_length=2048,
    block_count=18,
    head_count=(4,),
    head_count_kv=(1,),
    key_length=256,
    value_length=256,
    sliding_window=512,
    tensor_bytes=246_587_904,
)
LLAMA_8B = Header(
    version=3,
    architecture="llama",
    context_length=131072,
    embedding_length=4096,
    block_count=32,
    head_count=(32,),
    head_count_kv=(8,),
    tensor_bytes=4_900_000_000,
)


# What llama-server (build 10434) printed as the size of its cache for this model.
@pytest.mark.parametrize(
    ("settings", "mib"),
    [
        (CacheSettings(), 133.5),
        (CacheSettings(context=4096), 49.5),
        (CacheSettings(context=4096, parallel=4), 72.0),
        (CacheSettings(context=8192, parallel=1, type_k="q8_0", type_v="q8_0"), 20.72),
    ],
)
def test_the_cache_is_as_large_as_llama_server_says(
    settings: CacheSettings, mib: float
) -> None:
    assert cache_bytes(GEMMA, settings) / MIB == pytest.approx(mib, abs=0.01)


# Its resident memory after a request of 1,200 tokens.
@pytest.mark.parametrize(
    ("words", "mib"),
    [
        ("", 498),
        ("-c 4096", 414),
        ("-c 4096 -np 4", 402),
        ("-c 8192 -np 1 -ctk q8_0 -ctv q8_0", 377),
    ],
)
def test_the_estimate_is_near_what_the_process_took(words: str, mib: int) -> None:
    command = ["llama-server", "-m", "chat.gguf", *words.split()]
    estimated = estimate_command(command, {"chat.gguf": GEMMA}.get)
    assert estimated is not None
    assert 0.9 < estimated / MIB / mib < 1.15


@pytest.mark.parametrize(
    ("header", "settings", "expected"),
    [
        # 2 (key, value) * 32 layers * 8 heads * 128 numbers * 2 bytes a token
        (LLAMA_8B, CacheSettings(context=8192), 8192 * 131072),
        (LLAMA_8B, CacheSettings(), 131072 * 131072),
        (LLAMA_8B, CacheSettings(context=8192, parallel=4), 8192 * 131072),
        (LLAMA_8B, CacheSettings(context=1000), 1024 * 131072),
        (LLAMA_8B, CacheSettings(context=256, type_k="q4_0"), 256 * 32768 * 41 // 16),
        (LLAMA_8B, CacheSettings(context=256, type_v="new"), 256 * 131072),
        (GEMMA, CacheSettings(context=4096, swa_full=True), 4096 * 18 * 1024),
    ],
)
def test_the_cache_grows_with_the_context(
    header: Header, settings: CacheSettings, expected: int
) -> None:
    assert cache_bytes(header, settings) == expected


def header(keys: Mapping[str, Value]) -> Header:
    known: dict[str, Value] = {
        "general.architecture": "x",
        "x.context_length": 1024,
        "x.embedding_length": 64,
        "x.block_count": 4,
        "x.attention.head_count": 4,
    }
    return read_header(io.BytesIO(gguf_bytes({**known, **keys})))


@pytest.mark.parametrize(
    ("keys", "heads"),
    [
        ({}, 16),
        ({"x.attention.head_count_kv": 2}, 8),
        ({"x.attention.head_count_kv": [1, 0, 0, 2]}, 3),
        ({"x.attention.head_count_kv": 2, "x.attention.shared_kv_layers": 3}, 2),
        ({"x.attention.head_count_kv": 2, "x.full_attention_interval": 4}, 2),
        ({"x.attention.causal": False}, 0),
        ({"x.block_count": 2**31}, 4096),
    ],
)
def test_only_layers_that_have_a_cache_count(
    keys: Mapping[str, Value], heads: int
) -> None:
    assert cache_bytes(header(keys)) == heads * 16 * 2 * 2 * 1024


def test_the_file_says_which_layers_have_a_window() -> None:
    keys: dict[str, Value] = {
        "x.context_length": 8192,
        "x.attention.sliding_window": 256,
        "x.attention.key_length": 32,
        "x.attention.key_length_swa": 8,
        "x.attention.sliding_window_pattern": [True, True, True, False],
    }
    listed = cache_bytes(header(keys), CacheSettings(parallel=1))
    assert listed == 4 * 2 * (3 * 768 * (8 + 16) + 8192 * (32 + 16))
    keys["x.attention.sliding_window_pattern"] = 4
    assert cache_bytes(header(keys), CacheSettings(parallel=1)) == listed
    del keys["x.attention.sliding_window_pattern"]
    assert cache_bytes(header(keys)) == 4 * 2 * 4 * 8192 * (32 + 16)


def test_a_recurrent_model_s_states_count_for_each_slot() -> None:
    keys: dict[str, Value] = {
        "x.attention.head_count_kv": 0,
        "x.ssm.inner_size": 100,
        "x.ssm.state_size": 10,
    }
    assert cache_bytes(header(keys), CacheSettings(parallel=3)) == 1000 * 4 * 3 * 4


def test_a_command_s_other_models_count_too() -> None:
    small = Header(version=3, architecture="clip", tensor_bytes=700 * MIB)
    files = {"big.gguf": LLAMA_8B, "see.gguf": small, "draft.gguf": GEMMA}
    command = ["x", "-m", "big.gguf", "-c", "4096"]
    plain = estimate_command(command, files.get)
    seeing = estimate_command([*command, "--mmproj", "see.gguf"], files.get)
    guessing = estimate_command([*command, "-md", "draft.gguf"], files.get)
    assert plain and seeing and guessing
    assert seeing - plain == 828 * MIB
    draft = estimate(GEMMA, settings=CacheSettings(context=4096))
    assert guessing - plain == draft


def test_all_parts_of_a_split_model_count() -> None:
    name = "/m/big-{:05}-of-00003.gguf"
    first = Header(version=3, architecture="llama", tensor_bytes=300)
    rest = Header(version=3, tensor_bytes=100)
    files = {name.format(1): first, name.format(2): rest, name.format(3): rest}
    command = ["x", "--model", name.format(1)]
    whole = estimate_command(command, files.get)
    assert whole == estimate(first, file_bytes=500)
    del files[name.format(3)]
    assert estimate_command(command, files.get) == estimate(first, file_bytes=700)


@pytest.mark.parametrize(
    "words",
    ["", "-m", "-m other.gguf", "-hf ggml-org/gemma", "python -m http.server"],
)
def test_a_command_without_a_readable_model_has_no_estimate(words: str) -> None:
    assert estimate_command(words.split(), {"chat.gguf": GEMMA}.get) is None


def test_of_an_option_that_stands_twice_the_last_counts() -> None:
    command = "x -m a.gguf -c 99 -c -5 -np many --model b.gguf -c 4096".split()
    once = estimate_command("x -m b.gguf -c 4096".split(), {"b.gguf": GEMMA}.get)
    assert estimate_command(command, {"b.gguf": GEMMA}.get) == once


# The machine's own memory.


def machine(
    files: Mapping[str, str] | None = None, programs: Mapping[str, str] | None = None
) -> Callable[[str], Capacity]:
    def running(command: Sequence[str]) -> str | None:
        return (programs or {}).get(" ".join(command))

    def budget(platform: str) -> Capacity:
        read = (files or {}).get
        return detected_budget(read=read, run=running, platform=platform)

    return budget


SMI = "nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits"
MEMINFO = "MemTotal:       {} kB\nMemFree:  1 kB\n"


def test_video_memory_is_the_budget_where_there_is_some() -> None:
    memory = {"/proc/meminfo": MEMINFO.format(64 * 1024**2)}
    budget = machine(memory, {SMI: "24576\n8192\n"})("linux")
    assert budget == Capacity(30 * GIB, "2 NVIDIA cards", 32 * GIB)
    amd = {"/sys/class/drm/card1/device/mem_info_vram_total": str(16 * GIB)}
    assert machine({**memory, **amd})("linux").source == "AMD card"
    own = {"/sys/class/drm/card0/device/mem_info_vram_total": str(GIB // 2)}
    assert machine({**memory, **own})("linux").source == "system memory"


@pytest.mark.parametrize(
    ("installed", "left"), [(64, 57.6), (24, 21.6), (8, 6), (4, 2), (3, 1.5), (1, 0.5)]
)
def test_some_of_the_system_s_memory_is_left_to_others(
    installed: int, left: float
) -> None:
    memory = {"/proc/meminfo": MEMINFO.format(installed * 1024**2)}
    budget = machine(memory, {SMI: "[N/A]\n"})("linux")
    assert budget.bytes == pytest.approx(left * GIB)


@pytest.mark.parametrize(
    "limit",
    [
        {"/sys/fs/cgroup/memory.max": str(8 * GIB)},
        {
            "/proc/self/cgroup": "1:name=x:/y\n0::/system.slice/i.service\n",
            "/sys/fs/cgroup/system.slice/i.service/memory.max": "max\n",
            "/sys/fs/cgroup/system.slice/memory.max": f"{8 * GIB}\n",
        },
        {"/sys/fs/cgroup/memory/memory.limit_in_bytes": str(8 * GIB)},
    ],
)
def test_a_control_group_s_limit_is_kept_to(limit: Mapping[str, str]) -> None:
    memory = {"/proc/meminfo": MEMINFO.format(64 * 1024**2)}
    assert machine({**memory, **limit})("linux").total == 8 * GIB
    none = {"/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}
    assert machine({**memory, **none})("linux").total == 64 * GIB


def test_apple_s_memory_is_shared_as_metal_does() -> None:
    size, wired = "sysctl -n hw.memsize", "sysctl -n iogpu.wired_limit_mb"
    assert machine({}, {size: str(64 * GIB)})("darwin").bytes == 48 * GIB
    assert machine({}, {size: str(24 * GIB)})("darwin").bytes == 16 * GIB
    raised = {size: str(64 * GIB), wired: str(56 * 1024)}
    assert machine({}, raised)("darwin").bytes == 56 * GIB


def test_what_cannot_be_found_out_is_nothing() -> None:
    assert machine()("linux").bytes == 0
    assert machine()("darwin").bytes == 0
    assert run(["no-such-program-here"]) is None
    assert run(["false"]) is None


def test_this_machine_has_memory() -> None:
    budget = detected_budget()
    assert 0 < budget.bytes <= budget.total
