"""What lives on a device before its first layer runs: the inputs of the graph, by name, with their sizes.

Sources, llama.cpp b10488: the ``llm_graph_input_*`` classes and ``build_inp_*`` of ``src/llama-graph.cpp``, and the
``build_input_*`` methods of ``llama_kv_cache`` (``src/llama-kv-cache.cpp``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.allocator import align
from planner.cache import (
    SPARSE_INDEXER,
    LayerCache,
    distinct_caches,
    layer_caches,
    sequence_ctx,
    ubatch_tokens,
    window_cells,
    window_tokens,
)
from planner.families import family_of
from planner.profile import ModelProfile
from planner.quantization import GgmlType, ggml_type
from planner.settings import LoadSettings
from planner.tape import STEADY, Size

F32, F16, I32, I64 = 4, 2, 4, 8
"""Bytes of an element."""

RESIDUAL, NORMED, PER_LAYER, POSITIONS, MASK, INDICES, KEY_ROTATION, VALUE_ROTATION, OUTPUT_ROWS, STATES, STATE_ROWS = range(
    -1, -12, -1
)
"""What lives when a layer begins: its input; that input normed, where the device before did that; per-layer embeddings; the
tokens' positions; the attention mask; the cells that are written; matrices that rotate keys and values; the rows of the
output; the convolution states of the next Mamba layer, fetched early. All but the first three and the mask are small, but lie
where larger holes could join."""

CHOICE_MASK = -16
"""A sparse indexer's own mask, F16 always."""

EXTRA_ROWS = -15
"""The states that are kept of sequences that do not take part: none, but a tensor all the same (``build_rs``)."""

POOLED = -17
"""Which rows become a text's embedding, or what part of each (``build_pooling``): read after the logits, so that it lies between
those and the inputs that are free by then."""

EMBEDDING, PERMUTED, DEEPSTACK = -12, -13, -14
"""Gemma 3n's embedding before it becomes several streams, and those streams with their dimensions in another order; Qwen3-VL's
embedding with room for what images add to the first layers (``build_inp_embd``)."""

ZEROS = -8192
"""From here down: what a layer with a sparse indexer writes over the mask at the cells that it looks at, one name a layer
(``build_attn`` of ``attn_k_dsa``). It is a leaf of the graph, which lies on the device from the start."""

BORROWED, SLICES = -64, -4096
"""From here down: copies of keys and values that a layer reads from another's cache, two names a layer (``borrowed_names``), and
its part of the per-layer embeddings, one name a layer (``slice_name``)."""

WINDOW = 20
"""Layers with a window have a cache, a mask and matrices of their own: their names are lower by this."""


MEAN = 1
"""The pooling type of an embedding that is the mean of all rows (``LLAMA_POOLING_TYPE_MEAN``); all others take a row."""

Attention = Literal["fused", "plain", "fallen", "host"]
"""``fused``: one operation. ``plain``: scores as a matrix. ``fallen``: the same with a cache that was made for fused attention,
since the GPU has no kernel. ``host``: one operation, on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What is computed at a time: tokens of a micro-batch, tokens whose logits are wanted. The cells come later: ``cells_of``.

    ``attention``, see ``attention_of``, and what follows from it for cache and mask: ``fused``. ``pooling``: how a decoder that
    is loaded for embeddings makes one of a text (``llama_pooling_type``), 0 where it does not.
    """

    tokens: int
    outputs: int
    pooling: int
    sequences: int
    attention: Attention
    keys: GgmlType
    values: GgmlType

    @property
    def fused(self) -> bool:
        """Whether attention is one operation, wherever it runs."""
        return self.attention in ("fused", "host")


def scale_of(profile: ModelProfile, settings: LoadSettings, *, falls: bool = False) -> Scale:
    """The graph that ``llama_context::sched_reserve`` measures: a full micro-batch. ``falls``: attention is not to be fused."""
    encoder = _is_encoder(profile)
    sequences = settings.parallel
    tokens = min(ubatch_tokens(settings, causal=not encoder), sequence_ctx(settings) * sequences)
    tokens = -(-tokens // sequences) * sequences
    keys, values = (ggml_type("f16" if encoder else name) for name in (settings.kv_type_k, settings.kv_type_v))
    attention = attention_of(profile, keys, values, wanted=settings.flash_attention)
    if falls and attention == "fused" and values.block_size == 1:
        attention = "fallen"
    return Scale(
        tokens=tokens,
        outputs=min(tokens, settings.outputs or tokens),
        pooling=profile.integer("pooling_type") if settings.outputs is None and not encoder else 0,
        sequences=sequences,
        attention=attention,
        keys=keys,
        values=values,
    )


def cells_of(profile: ModelProfile, settings: LoadSettings, scale: Scale) -> tuple[int, int]:
    """Cells of one sequence that attention sees, and those that it sees through a window: full caches."""
    if _is_encoder(profile):
        return scale.tokens, scale.tokens
    return sequence_ctx(settings), window_cells(settings, window_tokens(profile))


def _is_encoder(profile: ModelProfile) -> bool:
    family = family_of(profile.architecture)
    return family is not None and bool({"encoder", "no_cache"} & family.features)


FLASH_ATTENTION_HEADS = frozenset(
    {(n, n) for n in (40, 64, 72, 80, 96, 112, 128, 256, 512)} | {(192, 128), (320, 256), (576, 512)}
)
"""Sizes of key and value heads for which CUDA has a kernel (``ggml_cuda_get_best_fattn_kernel``, ``ggml-cuda/fattn.cu``)."""

FLASH_ATTENTION_TYPES = frozenset({"F16", "BF16", "Q8_0", "Q4_0"})
"""Cache types for which CUDA has a kernel, K and V alike, unless built with ``GGML_CUDA_FA_ALL_QUANTS``
(``ggml_cuda_fattn_kv_type_supported``)."""


def _caps_scores(profile: ModelProfile) -> bool:
    """Whether llama.cpp switches fused attention off: for Grok, whose scores are capped, and for what may be another such one."""
    capped = f"{profile.architecture}.attn_logit_softcapping" in profile.metadata
    return profile.architecture == "grok" or (capped and family_of(profile.architecture) is None)


def attention_of(profile: ModelProfile, keys: GgmlType, values: GgmlType, *, wanted: bool) -> Attention:
    """What becomes of attention under ``--flash-attn auto``, as Ollama passes it (``off`` where it is not ``wanted``).

    Where CUDA has no kernel it falls back, but not with quantized values: those need fused attention, so that it runs on the
    CPU then, to which keys and values are copied (``llama_init_from_model`` and ``resolve_fused_ops``,
    ``src/llama-context.cpp``).
    """
    if not wanted or (values.block_size == 1 and _caps_scores(profile)):
        return "plain"
    heads = max(profile.integer("attention.head_count"), 1)
    head = profile.embedding_length // heads
    key, value = profile.integer("attention.key_length", head), profile.integer("attention.value_length", head)
    latent = bool(profile.integer("attention.key_length_mla"))  # whose values are a view of the keys
    known_heads = not key or (key, value) in FLASH_ATTENTION_HEADS or not value
    seen = {"F16" if kind.name == "F32" else kind.name for kind in ((keys,) if latent else (keys, values))}  # F32 is cast before
    if known_heads and len(seen) == 1 and seen <= FLASH_ATTENTION_TYPES:
        return "fused"
    return "host" if values.block_size > 1 else "fallen"


NO_ROTATION = frozenset(
    {
        "bert",
        "bloom",
        "gpt2",
        "jais",
        "jamba",
        "jina-bert-v2",
        "kimi-linear",
        "mpt",
        "nemotron_h",
        "nemotron_h_moe",
        "refact",
        "starcoder",
    }
)
"""Architectures without rotary positions."""

ROTATION_IN_WINDOWS = frozenset({"cohere2", "exaone4"})
"""Architectures whose windowed layers alone have rotary positions."""


VALUE_ROTATION_ROWS = 64
"""Rows of the matrix that rotates values (``llama_kv_cache::build_input_v_rot``); heads must be a multiple of it."""


def rotation_bytes(profile: ModelProfile, scale: Scale, matrix: int) -> int:
    """Bytes of the Hadamard matrix for keys or values; 0 where ``llama_kv_cache`` rotates nothing."""
    windowed, matrix = matrix < -WINDOW, matrix + WINDOW if matrix < -WINDOW else matrix
    kind, cache_type = ("key", scale.keys) if matrix == KEY_ROTATION else ("value", scale.values)
    if cache_type.block_size == 1 or profile.integer("attention.key_length_mla"):  # latent: values are a view
        return 0
    head = profile.integer(
        f"attention.{kind}_length", profile.embedding_length // max(profile.integer("attention.head_count"), 1)
    )
    if windowed:
        head = profile.integer(f"attention.{kind}_length_swa", head)
    if head % VALUE_ROTATION_ROWS:
        return 0
    rows = VALUE_ROTATION_ROWS
    while matrix == KEY_ROTATION and head % (2 * rows) == 0:
        rows *= 2
    return rows * rows * F32


def rotates(profile: ModelProfile, cache: LayerCache) -> bool:
    """Whether a layer's queries and keys are rotated, or scaled instead (Llama 4)."""
    if profile.architecture in ROTATION_IN_WINDOWS:
        return cache.windowed or not window_tokens(profile)
    if profile.architecture.startswith("granite"):  # the key is their switch
        return bool(profile.metadata.get(f"{profile.architecture}.rope.scaling.finetuned", True))
    return profile.architecture not in NO_ROTATION


def attention_features(profile: ModelProfile, cache: LayerCache, index: int) -> tuple[int, int]:
    """Features of a token's queries in a layer, and of what attention makes of them."""
    all_heads = profile.per_layer("attention.head_count")
    heads = all_heads[index]
    if not cache.value_elements and profile.integer("attention.key_length_mla"):  # latent: one key, whose head is the value
        return heads * cache.key_elements, heads * profile.integer("attention.kv_lora_rank")
    groups = max(profile.per_layer_or("attention.head_count_kv", all_heads)[index], 1)
    return heads * (cache.key_elements // groups), heads * cache.value_elements // groups


def convolution_state_elements(profile: ModelProfile) -> int:
    """Elements of one sequence's convolution state in a layer: the tokens before, as Mamba or LFM2 keep them."""
    if taps := profile.integer("shortconv.l_cache"):
        return (taps - 1) * profile.embedding_length
    inner, groups = profile.integer("ssm.inner_size"), profile.integer("ssm.group_count")
    channels = inner + 2 * groups * profile.integer("ssm.state_size")
    return max(profile.integer("ssm.conv_kernel") - 1, 0) * channels


def embedding_bytes(profile: ModelProfile, scale: Scale) -> int:
    """Bytes of a micro-batch's hidden state."""
    return align(profile.embedding_length * scale.tokens * F32)


def borrowed_names(index: int) -> tuple[int, int]:
    """Names of the copies of keys and values that layer ``index`` reads from another layer's cache."""
    return BORROWED - 2 * index, BORROWED - 2 * index - 1


def slice_name(index: int) -> int:
    """Name of the part of the per-layer embeddings that layer ``index`` gets on another device than the first."""
    return SLICES - index


def sparse_cells(profile: ModelProfile) -> int:
    """Cells that each token looks at in a model with a sparse indexer; 0 where it looks at all."""
    known = profile.architecture in SPARSE_INDEXER or family_of(profile.architecture) is None
    return profile.integer("attention.indexer.top_k") if known else 0


def deepstack_layers(profile: ModelProfile) -> int:
    """The first layers to whose result an image adds more of itself (``n_deepstack_layers``, Qwen3-VL)."""
    known = profile.architecture in ("qwen3vl", "qwen3vlmoe") or family_of(profile.architecture) is None
    return profile.integer("n_deepstack_layers") if known else 0


def input_sizes(profile: ModelProfile, scale: Scale) -> dict[int, Size]:
    """Bytes of each input on a device, by name; 0 where a model has no such input."""
    mask_element = F16 if scale.fused else F32
    # without flash attention V is stored transposed, and each of its elements has an index (build_input_v_idxs)
    caches = distinct_caches(profile)
    widest = max((cache.value_elements for cache in caches), default=1)
    indices = 1 + widest if scale.attention == "plain" else 2
    tokens, embedding = scale.tokens, embedding_bytes(profile, scale)
    per_layer = profile.integer("embedding_length_per_layer_input") * profile.n_layers
    fixed = {
        RESIDUAL: profile.embedding_length * max(profile.integer("altup.num_inputs"), 1) * tokens * F32,
        NORMED: embedding,
        PER_LAYER: per_layer * tokens * F32,
        POSITIONS: tokens * I32,
        OUTPUT_ROWS: scale.outputs * I32,
        POOLED: scale.sequences * (tokens * F32 if scale.pooling == MEAN else I32) if scale.pooling else 0,
        EXTRA_ROWS: 0,
        STATE_ROWS: scale.sequences * I32,
        STATES: convolution_state_elements(profile) * scale.sequences * F32,
        EMBEDDING: embedding,
        PERMUTED: embedding * max(profile.integer("altup.num_inputs"), 1),
        DEEPSTACK: embedding * (1 + deepstack) if (deepstack := deepstack_layers(profile)) else 0,
    }
    for offset in (0, WINDOW):
        fixed[INDICES - offset] = indices * tokens * I64
        for matrix in (KEY_ROTATION - offset, VALUE_ROTATION - offset):
            fixed[matrix] = rotation_bytes(profile, scale, matrix)
    sizes: dict[int, Size] = {name: (align(size), STEADY) for name, size in fixed.items()}
    sizes[MASK] = (0, (tokens * mask_element, 0))
    sizes[MASK - WINDOW] = (0, (0, tokens * mask_element))
    sizes[CHOICE_MASK] = (0, (tokens * F16, 0)) if sparse_cells(profile) else (0, STEADY)
    chosen = sparse_cells(profile)
    named = chosen or per_layer or any(cache.borrows_cache for cache in caches)
    for i, cache in enumerate(layer_caches(profile) if named else ()):
        if chosen:
            sizes[ZEROS - i] = align(chosen * tokens * F32), STEADY
        if per_layer:
            sizes[slice_name(i)] = align(per_layer // profile.n_layers * tokens * F32), STEADY
        if cache.borrows_cache:
            rows = scale.keys.row_bytes(cache.key_elements), scale.values.row_bytes(cache.value_elements)
            for name, row in zip(borrowed_names(i), rows, strict=True):
                sizes[name] = (0, (0, row * scale.sequences) if cache.windowed else (row * scale.sequences, 0))
    return sizes
