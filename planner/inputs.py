"""What lives on a device before its first layer runs: the inputs of the graph, by name, with their sizes.

Sources, llama.cpp b10488: the ``llm_graph_input_*`` classes and ``build_inp_*`` of ``src/llama-graph.cpp``, and the
``build_input_*`` methods of ``llama_kv_cache`` (``src/llama-kv-cache.cpp``).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.allocator import align
from planner.cache import LayerCache, layer_caches, sequence_ctx, ubatch_tokens, window_cells, window_tokens
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

WINDOW = 20
"""Layers with a window have a cache, a mask and matrices of their own: their names are lower by this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What is computed at a time: tokens of a micro-batch, tokens whose logits are wanted. The cells come later: ``cells_of``.

    ``falls_back``: fused attention was wanted, but CUDA has no kernel for it.
    """

    tokens: int
    outputs: int
    sequences: int
    flash_attention: bool
    falls_back: bool
    keys: GgmlType
    values: GgmlType


def scale_of(profile: ModelProfile, settings: LoadSettings) -> Scale:
    """The graph that ``llama_context::sched_reserve`` measures: a full micro-batch."""
    encoder = _is_encoder(profile)
    fused = runs_flash_attention(profile, settings)
    sequences = settings.parallel
    tokens = min(ubatch_tokens(settings, causal=not encoder), sequence_ctx(settings) * sequences)
    tokens = -(-tokens // sequences) * sequences
    return Scale(
        tokens=tokens,
        outputs=min(tokens, settings.outputs or tokens),
        sequences=sequences,
        flash_attention=fused,
        falls_back=settings.flash_attention and not fused,
        keys=ggml_type("f16" if encoder else settings.kv_type_k),
        values=ggml_type("f16" if encoder else settings.kv_type_v),
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


def runs_flash_attention(profile: ModelProfile, settings: LoadSettings) -> bool:
    """Whether attention is fused: asked for, and known to CUDA; ``--flash-attn auto`` falls back where it is not.

    With quantized values there is no way back, so they count as fused.
    """
    heads = max(profile.integer("attention.head_count"), 1)
    head = profile.embedding_length // heads
    key, value = profile.integer("attention.key_length", head), profile.integer("attention.value_length", head)
    known = not key or (key, value) in FLASH_ATTENTION_HEADS or not value
    return settings.flash_attention and (known or ggml_type(settings.kv_type_v).block_size > 1)


NO_ROTATION = frozenset(
    {
        "bert",
        "bloom",
        "gpt2",
        "granitehybrid",
        "jais",
        "jamba",
        "jina-bert-v2",
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
    head = profile.integer(
        f"attention.{kind}_length", profile.embedding_length // max(profile.integer("attention.head_count"), 1)
    )
    if windowed:
        head = profile.integer(f"attention.{kind}_length_swa", head)
    latent = bool(profile.integer("attention.key_length_mla"))
    if cache_type.block_size == 1 or head % VALUE_ROTATION_ROWS or latent:
        return 0
    rows = VALUE_ROTATION_ROWS
    while matrix == KEY_ROTATION and head % (2 * rows) == 0:
        rows *= 2
    return rows * rows * F32


def rotates(profile: ModelProfile, cache: LayerCache) -> bool:
    """Whether a layer's queries and keys are rotated, or scaled instead (Llama 4)."""
    if profile.architecture in ROTATION_IN_WINDOWS:
        return cache.windowed
    return profile.architecture not in NO_ROTATION


def embedding_bytes(profile: ModelProfile, scale: Scale) -> int:
    """Bytes of a micro-batch's hidden state."""
    return align(profile.embedding_length * scale.tokens * F32)


def input_sizes(profile: ModelProfile, scale: Scale) -> dict[int, Size]:
    """Bytes of each input on a device, by name; 0 where a model has no such input."""
    fused = scale.flash_attention
    mask_element = F16 if fused else F32
    # without flash attention V is stored transposed, and each of its elements has an index (build_input_v_idxs)
    widest = max((cache.value_elements for cache in layer_caches(profile)), default=1)
    indices = 2 if fused or scale.falls_back else 1 + widest
    tokens, embedding = scale.tokens, embedding_bytes(profile, scale)
    per_layer = profile.integer("embedding_length_per_layer_input") * profile.n_layers
    inner, groups = profile.integer("ssm.inner_size"), profile.integer("ssm.group_count")
    channels = inner + 2 * groups * profile.integer("ssm.state_size")
    fixed = {
        RESIDUAL: profile.embedding_length * max(profile.integer("altup.num_inputs"), 1) * tokens * F32,
        NORMED: embedding,
        PER_LAYER: per_layer * tokens * F32,
        POSITIONS: tokens * I32,
        OUTPUT_ROWS: scale.outputs * I32,
        STATE_ROWS: scale.sequences * I32,
        STATES: max(profile.integer("ssm.conv_kernel") - 1, 0) * channels * scale.sequences * F32,
    }
    for offset in (0, WINDOW):
        fixed[INDICES - offset] = indices * tokens * I64
        for matrix in (KEY_ROTATION - offset, VALUE_ROTATION - offset):
            fixed[matrix] = rotation_bytes(profile, scale, matrix)
    sizes: dict[int, Size] = {name: (align(size), STEADY) for name, size in fixed.items()}
    sizes[MASK] = (0, (tokens * mask_element, 0))
    sizes[MASK - WINDOW] = (0, (0, tokens * mask_element))
    return sizes
