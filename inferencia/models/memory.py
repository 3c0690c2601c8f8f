"""How much memory a model will take once it is loaded, from its header alone.

    weights     what the tensors take in the file
    cache       keys and values of every token in the context, for each layer
    scratch     what computing one batch takes, and llama-server itself

The rules are llama.cpp's (``llama-kv-cache-iswa.cpp``, ``server.cpp``), build 10434:
without ``-c`` the context is what the model was trained for; without ``-np`` there are
four slots that share it. Layers with a sliding window keep little more than the window.

An estimate is for deciding what fits, before anything is known: whoever has seen a
process run knows better. It does not count what llama-server keeps of earlier prompts
(``--cache-ram``, up to 8 GiB), since it gives that up by itself, nor that ``--fit``
takes a smaller context where memory is short.

Pure: headers come in through a function.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from .gguf import Header
from .naming import SUFFIX, shard

ReadHeader = Callable[[str], Header | None]

# llama-server's defaults.
SLOTS = 4
UBATCH = 512
CACHE_TYPE = "f16"
_CELLS = 256  # the context is rounded up to a multiple of this

# Bytes of a number in the cache.
_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_0": 22 / 32,
    "q5_1": 24 / 32,
    "q4_0": 18 / 32,
    "q4_1": 20 / 32,
    "iq4_nl": 18 / 32,
}

# Which layers see all tokens where the file does not say: every n-th (set_swa_pattern
# in llama.cpp's src/models). A model that is missing here counts as having no window,
# which estimates too much.
_PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
    "smallthinker": 4,
}
_WINDOWS = {"gemma2": 4096, "llama4": 8192}
# gemma3n's layers from here on use the cache of earlier ones.
_LAYERS_WITH_CACHE = {"gemma3n": 20}

# llama-server without a model, its libraries and what it allocates as it goes. Measured
# with build 10434 on a CPU: 60 to 100 MiB. A GPU's own context is of the same order.
_PROCESS = 96 * 1024 * 1024
# A projector computes on whole images; its batch is not in its header.
_PROJECTOR_SCRATCH = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What a command says about the context and its cache; llama-server's defaults."""

    context: int = 0  # tokens; 0: what the model was trained for
    parallel: int = 0  # slots; 0: llama-server decides, and they share the context
    unified: bool = False  # whether slots share the context though they are counted
    type_k: str = CACHE_TYPE
    type_v: str = CACHE_TYPE
    swa_full: bool = False  # layers with a window keep everything
    ubatch: int = UBATCH  # tokens computed at once

    @property
    def slots(self) -> int:
        return self.parallel if self.parallel > 0 else SLOTS

    @property
    def streams(self) -> int:
        """How many parts the context is divided into."""
        return 1 if self.unified or self.parallel <= 0 else self.parallel


DEFAULTS = CacheSettings()


def estimate(
    header: Header, *, file_bytes: int = 0, settings: CacheSettings = DEFAULTS
) -> int:
    """Bytes that a model takes when it is loaded by llama-server.

    Args:
        header: of the model's first file.
        file_bytes: of all its tensors, where they are in several files; 0: the header
            knows them all.
    """
    weights = file_bytes or header.tensor_bytes
    return weights + cache_bytes(header, settings) + _scratch(header, settings)


def cache_bytes(header: Header, settings: CacheSettings = DEFAULTS) -> int:
    """Bytes of the cache of keys and values, and of recurrent layers' states."""
    if not header.is_causal:
        return 0  # an encoder sees each text once
    streams = settings.streams
    cells = _padded(_context(header, settings) // streams)
    window = cells
    if not settings.swa_full:
        window = _window_cells(header, settings, cells)
    total = 0.0
    for layer, heads in enumerate(_heads(header)):
        slides = _slides(header, layer)
        key, value = _lengths(header, slides=slides)
        numbers = key * _bytes_of(settings.type_k) + value * _bytes_of(settings.type_v)
        total += heads * numbers * (window if slides else cells) * streams
    state = header.state_per_layer * 4 * settings.slots * header.block_count
    return int(total) + state


def estimate_command(argv: Sequence[str], read_header: ReadHeader) -> int | None:
    """Bytes that a llama-server started by ``argv`` takes.

    Args:
        argv: any command that names a model by ``-m``; the program itself is not
            looked at. What stands in its environment is not known here.
        read_header: gives a file's header, or None if it cannot be read.

    Returns:
        None if the command names no model whose header can be read.
    """
    options = _Options(argv)
    model = options.text("-m", "--model")
    settings = options.settings()
    total = _estimate_file(model, settings, read_header)
    if total is None:
        return None
    if projector := _header_of(options.text("--mmproj", "-mm"), read_header):
        total += projector.tensor_bytes + _PROJECTOR_SCRATCH
    draft = options.text("--spec-draft-model", "-md", "--model-draft")
    total += _estimate_file(draft, options.draft_settings(), read_header) or 0
    return total


def _estimate_file(
    path: str, settings: CacheSettings, read_header: ReadHeader
) -> int | None:
    header = _header_of(path, read_header)
    if header is None:
        return None
    sizes = [header.tensor_bytes]
    for other in _other_shards(path):
        part = read_header(other)
        # A part that is not there will be as large as the first.
        sizes.append(part.tensor_bytes if part else header.tensor_bytes)
    return estimate(header, file_bytes=sum(sizes), settings=settings)


def _header_of(path: str, read_header: ReadHeader) -> Header | None:
    return read_header(path) if path else None


def _other_shards(path: str) -> Iterator[str]:
    named = PurePath(path)
    part = shard(named.name.removesuffix(SUFFIX))
    if part is None:
        return
    for number in range(1, part.count + 1):
        if number != part.number:
            yield str(named.with_name(part.file_name(number)))


def _padded(cells: int) -> int:
    return -(-cells // _CELLS) * _CELLS


def _context(header: Header, settings: CacheSettings) -> int:
    return settings.context if settings.context > 0 else header.context_length


def _bytes_of(cache_type: str) -> float:
    return _BYTES.get(cache_type.lower(), _BYTES[CACHE_TYPE])


def _window_cells(header: Header, settings: CacheSettings, cells: int) -> int:
    window = header.sliding_window or _WINDOWS.get(header.architecture, 0)
    shared = settings.slots if settings.streams == 1 else 1
    return min(cells, _padded(window * shared + settings.ubatch))


def _slides(header: Header, layer: int) -> bool:
    """Whether a layer sees only its window."""
    if not (header.sliding_window or header.architecture in _WINDOWS):
        return False
    if len(header.sliding_pattern) > 1:
        return bool(header.sliding_pattern[layer % len(header.sliding_pattern)])
    known = _PERIODS.get(header.architecture, 1)
    period = header.sliding_pattern[0] if header.sliding_pattern else known
    # 0 is "all slide" for llama.cpp; what is not known counts as "none does".
    return period == 0 or layer % period < period - 1


def _heads(header: Header) -> Iterator[int]:
    """How many heads of each layer are kept."""
    known = header.head_count_kv or header.head_count
    last = header.block_count - header.shared_kv_layers
    last = min(last, _LAYERS_WITH_CACHE.get(header.architecture, last))
    for layer in range(min(header.block_count, 1024)):
        recurrent = header.attention_interval > 1 and (
            (layer + 1) % header.attention_interval
        )
        if layer >= last or recurrent or not known:
            yield 0
        else:
            yield known[layer] if layer < len(known) else known[-1]


def _lengths(header: Header, *, slides: bool) -> tuple[int, int]:
    """Numbers of one head's key and value for one token."""
    heads = max(header.head_count, default=0)
    usual = header.embedding_length // heads if heads else 0
    key = header.key_length or usual
    value = header.value_length or usual
    if slides:
        return header.key_length_swa or key, header.value_length_swa or value
    return key, value


def _scratch(header: Header, settings: CacheSettings) -> int:
    """What one batch takes, by the sizes that llama-server itself reports.

    Gemma 3 270m: 24.3 MiB at a context of 4,096 and 52.3 MiB at 32,768 as reported,
    28.5 and 56.5 MiB by this.
    """
    inner = header.feed_forward_length or 4 * header.embedding_length
    activations = settings.ubatch * 4 * (4 * header.embedding_length + 3 * inner)
    mask = _context(header, settings) * settings.ubatch * 2 if header.is_causal else 0
    window = header.sliding_window * settings.slots * settings.ubatch * 2
    logits = header.vocabulary * 4 * settings.slots
    return _PROCESS + activations + mask + window + logits


class _Options:
    """A llama-server's command line; of an option that stands twice the last counts."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = argv

    def text(self, *names: str) -> str:
        places = [i for i, word in enumerate(self._argv[:-1]) if word in names]
        return self._argv[places[-1] + 1] if places else ""

    def number(self, *names: str) -> int:
        text = self.text(*names)
        # More digits than any size has are no size.
        return int(text) if text.isascii() and text.isdigit() and len(text) < 13 else 0

    def has(self, *names: str) -> bool:
        return any(word in names for word in self._argv)

    def settings(self) -> CacheSettings:
        return CacheSettings(
            context=self.number("-c", "--ctx-size"),
            parallel=self.number("-np", "--parallel"),
            unified=self.has("-kvu", "--kv-unified"),
            type_k=self.text("-ctk", "--cache-type-k") or CACHE_TYPE,
            type_v=self.text("-ctv", "--cache-type-v") or CACHE_TYPE,
            swa_full=self.has("--swa-full"),
            ubatch=self.number("-ub", "--ubatch-size") or UBATCH,
        )

    def draft_settings(self) -> CacheSettings:
        """Of the small model that guesses for the large one; it has the same slots."""
        own = self.settings()
        type_k = self.text("--spec-draft-type-k", "-ctkd", "--cache-type-k-draft")
        type_v = self.text("--spec-draft-type-v", "-ctvd", "--cache-type-v-draft")
        return CacheSettings(
            context=self.number("-cd", "--ctx-size-draft") or own.context,
            parallel=own.parallel,
            unified=own.unified,
            type_k=type_k or CACHE_TYPE,
            type_v=type_v or CACHE_TYPE,
            ubatch=own.ubatch,
        )
