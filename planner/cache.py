"""What a layer remembers between tokens: KV cells, a recurrent state, or both; in bytes, exact.

Sources, llama.cpp b10488: ``llama_kv_cache`` (``src/llama-kv-cache.cpp``), ``llama_kv_cache_iswa`` (windows),
``llama_kv_cache_dsa`` (indexer keys), ``llama_memory_recurrent``, ``llama_hparams::n_embd_{k_gqa,v_gqa,r,s}``
(``src/llama-hparams.cpp``) and the context rounding in the constructor of ``llama_context`` (``src/llama-context.cpp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from planner.families import Family, family_of
from planner.profile import ModelProfile, Tensor
from planner.quantization import ggml_type
from planner.settings import LoadSettings

CELL_PADDING = 256
"""Cells. Contexts and windows are rounded up to it (``GGML_PAD(…, 256)`` in ``llama_context`` and ``llama_kv_cache_iswa``)."""

STATE_ELEMENT_BYTES = 4
"""Recurrent states are F32 whatever the cache types (``llama_model::create_memory``)."""

SPARSE_INDEXER = frozenset({"deepseek32", "glm-dsa"})
"""Architectures with ``llama_kv_cache_dsa``: a second cache, of one indexer key a token."""

SHARED_INDEXER_CONTEXT = 1 << 20
"""Tokens of trained context from which GLM's layers share indexers where the file does not say (``src/models/glm-dsa.cpp``)."""

EXAONE4_WINDOW_LAYERS = 64
"""Layers of the one EXAONE 4 that has windows (``src/models/exaone4.cpp``)."""

RECURRENT_TENSORS = ("ssm_", "time_mix_", "shortconv.")
"""A layer with a tensor named so keeps a state instead of KV cells."""


def pad(n: int, multiple: int) -> int:
    """``n`` rounded up to a multiple: ``GGML_PAD``."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """What one layer keeps: a row of keys and of values for each cell, and a state for each sequence, in elements.

    ``borrows_cache``: it attends over the cells of a layer before it, and keeps none.
    """

    windowed: bool
    key_elements: int
    value_elements: int
    indexer_elements: int
    state_elements: int
    attends: bool
    owns_cache: bool
    borrows_cache: bool


def sequence_ctx(settings: LoadSettings) -> int:
    """Cells of one sequence, ``n_ctx_seq``: ``-c`` rounded up, shared out to the sequences, rounded up again."""
    return pad(pad(settings.total_ctx, CELL_PADDING) // settings.parallel, CELL_PADDING)


def ubatch_tokens(settings: LoadSettings, *, causal: bool = True) -> int:
    """``n_ubatch``: the micro-batch, no larger than the batch, nor (with causal attention) the context."""
    return min(settings.ubatch, min(settings.batch, settings.total_ctx) if causal else settings.batch)


def window_cells(settings: LoadSettings, window: int) -> int:
    """Cells of a windowed layer for one sequence: the window and a micro-batch, rounded up, at most the context."""
    return pad(min(sequence_ctx(settings), window + ubatch_tokens(settings)), CELL_PADDING)


def window_tokens(profile: ModelProfile) -> int:
    """The attention window in tokens, 0 where the model has none."""
    family = family_of(profile.architecture)
    if family is None or not (family.window_period or "all_windows" in family.features):
        return 0
    window = profile.integer("attention.sliding_window")
    if profile.architecture == "exaone4":  # only the 32B's depth has windows, of a size of its own where the file says nothing
        return (window or family.window) if profile.n_computed_layers == EXAONE4_WINDOW_LAYERS else 0
    if profile.architecture == "llama4":  # a key of 0 switches the chunks off; otherwise they are 8192 tokens
        return 0 if f"{profile.architecture}.attention.sliding_window" in profile.metadata and not window else family.window
    return window or (0 if "window_needs_key" in family.features else family.window)


def _windowed_layers(profile: ModelProfile, family: Family) -> tuple[bool, ...]:
    n = profile.n_layers
    if not window_tokens(profile):
        return (False,) * n
    if "all_windows" in family.features:
        return (True,) * n
    pattern = profile.metadata.get(f"{profile.architecture}.attention.sliding_window_pattern")
    if "pattern_array" in family.features and isinstance(pattern, tuple):
        return tuple(bool(value) for value in pattern[:n]) + (False,) * (n - len(pattern))
    period = pattern if isinstance(pattern, int) and not isinstance(pattern, bool) else family.window_period
    if period == 0:
        return (True,) * n
    dense = 0 if "global_first" in family.features else period - 1
    return tuple(i % period != dense and i < profile.n_computed_layers for i in range(n))


def _state_elements(profile: ModelProfile) -> int:
    """Elements of one sequence's state in one layer: ``n_embd_r() + n_embd_s()``."""
    width = profile.embedding_length
    if head := profile.integer("wkv.head_size"):
        return profile.integer("token_shift_count", 2) * width + width * head
    if taps := profile.integer("shortconv.l_cache"):
        return width * (taps - 1)
    taps = profile.integer("ssm.conv_kernel")
    if head := profile.integer("kda.head_dim"):
        heads = profile.integer("attention.head_count")
        return 3 * ((taps or 4) - 1) * heads * head + head * head * heads
    inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
    return max(taps - 1, 0) * (inner + 2 * profile.integer("ssm.group_count") * state) + state * inner


def _full_indexers(profile: ModelProfile) -> tuple[bool, ...]:
    """Which layers choose the cells to look at themselves; the others take the choice of the one before (GLM 5.2)."""
    types = profile.metadata.get(f"{profile.architecture}.attention.indexer.types")
    if isinstance(types, tuple):
        return tuple(bool(value) for value in types[: profile.n_layers]) + (True,) * (profile.n_layers - len(types))
    shared = profile.architecture == "glm-dsa" and profile.context_train >= SHARED_INDEXER_CONTEXT
    return tuple(not shared or i < 2 or i % 4 == 2 for i in range(profile.n_layers))


def is_recurrent(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer with these tensors keeps a recurrent state."""
    return any(name.startswith(RECURRENT_TENSORS) for name in tensors)


def layer_caches(profile: ModelProfile) -> tuple[LayerCache, ...]:
    """What each repeating layer keeps, one object for equal ones; computed once a profile."""
    return profile.remember("layer caches", None, lambda: _layer_caches(profile))


def _layer_caches(profile: ModelProfile) -> tuple[LayerCache, ...]:
    known = family_of(profile.architecture)
    unknown, family = known is None, known or Family()
    heads = profile.per_layer("attention.head_count")
    heads_kv = profile.per_layer_or("attention.head_count_kv", heads)
    first_heads = next((n for n in heads if n), 0)
    default = profile.embedding_length // first_heads if first_heads else 0
    key, value = profile.integer("attention.key_length", default), profile.integer("attention.value_length", default)
    key_window = profile.integer("attention.key_length_swa", key)
    value_window = profile.integer("attention.value_length_swa", value)
    is_mla = bool(profile.integer("attention.key_length_mla") and profile.integer("attention.value_length_mla"))
    indexer = profile.integer("attention.indexer.key_length") if unknown or profile.architecture in SPARSE_INDEXER else 0
    full_indexers = _full_indexers(profile)
    windowed = _windowed_layers(profile, family)
    shared = profile.integer("attention.shared_kv_layers")
    owners = profile.n_layers - shared if shared else family.cached_layers or profile.n_layers
    state = _state_elements(profile)
    has_cache = not {"encoder", "no_cache"} & family.features
    recurrent_kinds = {kind for kind in set(profile.tensor_kinds) if is_recurrent(profile.layer_tensors[kind])}

    def row(windowed: bool, recurrent: bool, computed: bool, owner: bool, indexes: bool, heads: int) -> LayerCache:
        attends = bool(heads) and (not recurrent or "attention_and_state" in family.features or unknown)
        return LayerCache(
            windowed=windowed,
            key_elements=heads * (key_window if windowed else key),
            value_elements=0 if is_mla else heads * (value_window if windowed else value),
            indexer_elements=indexer if indexes and computed else 0,
            state_elements=state if recurrent and computed else 0,
            attends=attends and computed,
            # layers without attention are not left out, and have rows where all have the widest (_cache_bytes)
            owns_cache=(attends or not recurrent_kinds) and owner and (computed or family.nextn_cached) and has_cache,
            borrows_cache=attends and computed and not owner and has_cache,
        )

    n, computed = profile.n_layers, profile.n_computed_layers
    traits = tuple(
        zip(
            windowed,
            (kind in recurrent_kinds for kind in profile.tensor_kinds),
            (i < computed for i in range(n)),
            (i < owners for i in range(n)),
            full_indexers,
            heads_kv,
            strict=True,
        )
    )
    rows = {each: row(*each) for each in set(traits)}
    return tuple(map(rows.__getitem__, traits))


def distinct_caches(profile: ModelProfile) -> tuple[LayerCache, ...]:
    """Each cache that any layer keeps once."""
    return profile.remember(
        "distinct caches", None, lambda: tuple({id(cache): cache for cache in layer_caches(profile)}.values())
    )


def cache_bytes(profile: ModelProfile, settings: LoadSettings) -> tuple[int, ...]:
    """Bytes of KV cache or recurrent state of each repeating layer."""
    return profile.remember("cache_bytes", settings, lambda: _cache_bytes(profile, settings))


def caches_before(profile: ModelProfile, settings: LoadSettings) -> tuple[int, ...]:
    """Bytes of what the repeating layers below each keep, and of all of them last: a run's is a difference of two."""
    return profile.remember("caches_before", settings, lambda: tuple(accumulate(cache_bytes(profile, settings), initial=0)))


def _cache_bytes(profile: ModelProfile, settings: LoadSettings) -> tuple[int, ...]:
    k, v = ggml_type(settings.kv_type_k), ggml_type(settings.kv_type_v)
    full = sequence_ctx(settings) * settings.parallel
    window = window_cells(settings, window_tokens(profile)) * settings.parallel
    caches = distinct_caches(profile)
    # without flash attention V is stored transposed, in rows of one width (llama_kv_cache, TAG_V_CACHE_VARIABLE)
    widest = 0 if settings.flash_attention else max((c.value_elements for c in caches), default=0)

    def bytes_of(cache: LayerCache) -> int:
        size = settings.parallel * cache.state_elements * STATE_ELEMENT_BYTES
        if cache.owns_cache:
            values = max(cache.value_elements, widest)
            row = k.row_bytes(cache.key_elements) + v.row_bytes(values) + k.row_bytes(cache.indexer_elements)
            size += (window if cache.windowed else full) * row
        return size

    bytes_by_id = {id(cache): bytes_of(cache) for cache in caches}
    return tuple(map(bytes_by_id.__getitem__, map(id, layer_caches(profile))))
