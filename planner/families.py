"""What llama.cpp knows about an architecture that its tensors do not tell: windows, shared caches, encoders.

One row a family. Each comes from llama.cpp b10488, ``src/models/<architecture>.cpp`` (``load_arch_hparams``), and from
``llama_model::create_memory`` in ``src/llama-model.cpp``. What a layer computes is read from its tensors (``planner.graph``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Feature = Literal[
    "encoder", "no_cache", "window_needs_key", "all_windows", "global_first", "pattern_array", "attention_and_state"
]
"""
* ``encoder``: attention within the micro-batch: no cache; no output matrix.
* ``no_cache``: a diffusion model: an output matrix, but no cache.
* ``window_needs_key``: without ``attention.sliding_window`` in the file there is no window.
* ``all_windows``: every attention layer has the window.
* ``global_first``: the layer without a window is the first of a period, not the last.
* ``pattern_array``: ``attention.sliding_window_pattern`` may be an array, one boolean a layer.
* ``attention_and_state``: every layer has a KV cache and a recurrent state.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Traits of an architecture.

    * ``window_period``: one layer in so many has no window, where the file says nothing else; 0: no windows.
    * ``window``: tokens, where the file names none.
    * ``cached_layers``: layers from this one on reuse another layer's cache (0: all have their own).
    * ``nextn_cached``: KV cells are reserved for multi-token-prediction layers too, although nothing runs there.
    """

    window_period: int = 0
    window: int = 0
    cached_layers: int = 0
    nextn_cached: bool = True
    features: frozenset[Feature] = frozenset()


def _row(*features: Feature, period: int = 0, window: int = 0, cached_layers: int = 0, nextn_cached: bool = True) -> Family:
    return Family(
        window_period=period, window=window, cached_layers=cached_layers, nextn_cached=nextn_cached, features=frozenset(features)
    )


_PLAIN = _row()
_ENCODER = _row("encoder")
_NO_CACHE = _row("no_cache")
_NEXTN_FILTERED = _row(nextn_cached=False)

FAMILIES: dict[str, Family] = {
    # windows on some layers
    "cohere2": _row(period=4),
    "exaone4": _row(period=4, window=4096),
    "gemma2": _row(period=2, window=4096),
    "gemma3": _row("window_needs_key", period=6),
    "gemma3n": _row(period=5, cached_layers=20),
    "gemma4": _row("pattern_array", period=6),
    "gpt-oss": _row(period=2),
    "llama4": _row(period=4, window=8192),
    "olmo2": _row("window_needs_key", period=4),
    "plamo3": _row("window_needs_key", period=8),
    "smallthinker": _row("window_needs_key", "global_first", period=4, window=4096),
    # encoders
    "bert": _ENCODER,
    "eurobert": _ENCODER,
    "gemma-embedding": _row("encoder", period=6),
    "jina-bert-v2": _ENCODER,
    "jina-bert-v3": _ENCODER,
    "modern-bert": _row("encoder", "window_needs_key", "global_first", period=3),
    "neo-bert": _ENCODER,
    "nomic-bert": _ENCODER,
    "nomic-bert-moe": _ENCODER,
    # diffusion
    "dream": _NO_CACHE,
    "llada": _NO_CACHE,
    "llada-moe": _NO_CACHE,
    "rnd1": _NO_CACHE,
    # a recurrent state, alone or beside attention
    "falcon-h1": _row("attention_and_state"),
    "granitehybrid": _PLAIN,
    "jamba": _PLAIN,
    "kimi-linear": _PLAIN,
    "lfm2": _row("window_needs_key", "all_windows"),
    "lfm2moe": _row("window_needs_key", "all_windows"),
    "mamba": _PLAIN,
    "mamba2": _PLAIN,
    "nemotron_h": _PLAIN,
    "nemotron_h_moe": _PLAIN,
    "deepseek32": _NEXTN_FILTERED,
    "glm-dsa": _NEXTN_FILTERED,
    "mistral4": _PLAIN,
    "qwen35": _NEXTN_FILTERED,
    "qwen35moe": _NEXTN_FILTERED,
    "qwen3next": _NEXTN_FILTERED,
    "rwkv6": _PLAIN,
    "rwkv6qwen2": _PLAIN,
    "rwkv7": _PLAIN,
    "arwkv7": _PLAIN,
    # attention on every layer
    **dict.fromkeys(
        (
            "apertus", "arcee", "arctic", "baichuan", "bailingmoe", "bailingmoe2", "bloom", "chatglm", "codeshell",
            "command-r", "dbrx", "deci", "deepseek", "deepseek2", "dots1", "ernie4_5", "ernie4_5-moe", "exaone", "falcon",
            "gemma", "glm4", "glm4moe", "gpt2", "gptneox", "granite", "granitemoe", "hunyuan-dense", "hunyuan-moe",
            "internlm2", "llama", "llama-embed", "minicpm", "minicpm3", "minimax-m2", "mistral3", "mpt", "nemotron", "olmo",
            "olmoe", "orion", "phi2", "phi3", "phimoe", "plm", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe",
            "qwen3vl", "qwen3vlmoe", "refact", "seed_oss", "smollm3", "stablelm", "starcoder", "starcoder2", "xverse",
        ),
        _PLAIN,
    ),
}  # fmt: skip


def family_of(architecture: str) -> Family | None:
    """The row of ``architecture``, ``None`` where it is not known: then only an upper bound can be given."""
    return FAMILIES.get(architecture)
