"""How a layer's graph differs between architectures beyond what its tensors tell, and which layers fetch states early.

Sources, llama.cpp b10488: ``src/models/<architecture>.cpp``, and ``build_rs`` of ``src/llama-graph.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.cache import is_recurrent
from planner.profile import ModelProfile, Tensor

SPARSE_GEMMA3N_LAYERS = 10
"""Layers with sparse activations (``n_layer_sparsity`` in ``src/models/models.h``)."""

VALUE_NORM = frozenset({"gemma3n", "gemma4"})
"""Architectures that norm values too."""

LATE_OUTPUTS = frozenset(
    {
        "gemma3n",
        "gemma4",
        "gpt-oss",
        "hy-v3",
        "nemotron_h",
        "qwen35",
        "qwen35moe",
        "qwen3next",
        "step35",
        "cohere2moe",
        "bailingmoe3",
    }
)
"""Architectures that choose the rows of the output after the last norm (``embeddings_nextn_masked``)."""

SUMS_INTO_RESIDUAL = frozenset({"lfm2", "lfm2moe"})
"""Architectures both of whose sums take over the residual's memory."""

PROJECTS_LATE = frozenset({"command-r", "cohere2", "falcon", "gptneox", "stablelm"})
"""Architectures that project the result of attention only after the feed-forward beside it, since it is added to that."""

RESIDUAL_FIRST = SUMS_INTO_RESIDUAL | {"phi3", "phimoe"}
"""Architectures whose last sum takes over the residual's memory: ``ggml_add(ctx0, residual, cur)``."""


def is_mamba(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer is one of ``llm_build_mamba_base``."""
    return "ssm_in.weight" in tensors and not any(name.startswith(("ssm_ba", "ssm_beta", "ssm_alpha")) for name in tensors)


def scans_on_gpu(profile: ModelProfile, index: int) -> bool:
    """Whether CUDA has a kernel for a layer's ``ggml_ssm_scan`` (``ggml_backend_cuda_device_supports_op``); true without one."""
    tensors = profile.layer_tensors[index]
    if not is_mamba(tensors) or "ssm_a" not in tensors:
        return True
    inner, state, decay = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size"), tensors["ssm_a"].shape
    if len(decay) > 1 and decay[0] > 1:  # Mamba: a decay for each element of the state
        return state == 16 and inner % 128 == 0
    return state in (128, 256) and inner // max(profile.integer("ssm.time_step_rank"), 1) % 16 == 0


def fetches_early(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the states of a layer's convolution are fetched while the layer before still runs, see ``next_early``."""
    return (is_mamba(tensors) and not attends_beside_state(tensors)) or "shortconv.in_proj.weight" in tensors


def next_early(profile: ModelProfile, index: int) -> int | None:
    """The layer whose states are fetched right behind the attention or the scan of layer ``index``, if any.

    ``build_rs`` puts them into the graph at once, while what follows in this layer waits for its reader; routed experts end the
    wait (``build_moe_ffn`` calls ``ggml_build_forward_expand``).
    """
    found: tuple[int | None, ...] = profile.remember("next early", None, lambda: _all_next_early(profile))
    return found[index]


def _all_next_early(profile: ModelProfile) -> tuple[int | None, ...]:
    tensors, kinds = profile.layer_tensors, profile.tensor_kinds
    early = {kind for kind in set(kinds) if fetches_early(tensors[kind])}
    found: list[int | None] = [None] * profile.n_layers
    for i in reversed(range(profile.n_computed_layers - 1)):
        if early and "ffn_gate_inp.weight" not in tensors[i]:
            found[i] = i + 1 if kinds[i + 1] in early else found[i + 1]
    return tuple(found)


def attends_in_ram(profile: ModelProfile, index: int) -> bool:
    """Attention over a cache in RAM runs on the CPU where states are fetched right behind it, of a later layer or its own.

    Unless that later layer lies on a GPU, which then computes the attention too.
    """
    return next_early(profile, index) is not None or attends_beside_state(profile.layer_tensors[index])


def may_attend_in_ram(profile: ModelProfile) -> bool:
    """Whether ``attends_in_ram`` can hold for any layer."""
    early = any(fetches_early(profile.layer_tensors[kind]) for kind in set(profile.tensor_kinds))
    return early or any(attends_beside_state(profile.layer_tensors[kind]) for kind in set(profile.tensor_kinds))


def attends_beside_state(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer has both attention and a state (Falcon-H1)."""
    return is_recurrent(tensors) and is_mamba(tensors) and "attn_q.weight" in tensors
