"""What quantizing makes of a model: which type each tensor gets under ``Q4_K_M``, ``Q8_0`` and the like.

The rules are those of ``llama_tensor_get_type`` and ``tensor_allows_quantization`` in ``src/llama-quant.cpp`` (llama.cpp b10488)
without an importance matrix. Makers of files who choose types tensor by tensor come out some percent elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.profile import ModelProfile, Tensor, build_profile
from planner.quantization import GgmlType, ggml_type

RECIPES = {
    "Q3_K_M": "Q3_K",
    "Q4_0": "Q4_0",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
    "F16": "F16",
}
"""The quantizations that are known, by the type of most of their tensors."""

FALLBACKS = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What stands in for a type whose blocks a tensor's rows are no multiple of (``tensor_type_fallback``)."""

KEPT = (
    "_norm.weight",
    "ffn_gate_inp",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv",
    "position_embd",
)
"""Parts of the names of matrices that are never quantized."""

LAYERS_OF_70B = 80
"""Layers of what llama.cpp counts as a 70B, where they are llama's."""


def quantized(profile: ModelProfile, recipe: str) -> ModelProfile:
    """``profile`` as it would be after quantizing it by ``recipe``, one of ``RECIPES``, from a file in half precision.

    Raises ``ValueError`` for a recipe that is not known.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown quantization {recipe!r}; known are {', '.join(RECIPES)}")
    type_of = _rules(profile, recipe)
    tensors = [replace(tensor, type=type_of(tensor)) for tensor in profile.tensors]
    grown = sum(tensor.bytes for tensor in tensors) - sum(tensor.bytes for tensor in profile.tensors)
    return build_profile(
        metadata=profile.metadata, tensors=tensors, file_bytes=max(profile.file_bytes + grown, 0), name=profile.name
    )


def _rules(profile: ModelProfile, recipe: str) -> Callable[[Tensor], GgmlType]:
    base, n = RECIPES[recipe], profile.n_layers
    eight = profile.expert_count == 8
    large = profile.architecture == "llama" and n == LAYERS_OF_70B

    def name_of(name: str, layer: int, default: str) -> str:
        if name in ("output.weight", "token_embd.weight"):
            is_output = name == "output.weight" or "output.weight" not in profile.model_tensors
            return "Q6_K" if is_output and default not in ("Q8_0", "F16") else default
        part = name.rpartition("blk.")[2].partition(".")[2].removesuffix(".weight")
        if part == "attn_v":
            found = _attention_v(recipe, layer, n, default)
            found = "Q5_K" if large and found in ("Q3_K", "Q4_K") else found
            return "Q8_0" if eight and default != "F16" else found
        if part == "attn_k" and eight and default != "F16":
            return "Q8_0"
        if part.startswith("ffn_down"):
            return _ffn_down(recipe, layer, n, default)
        if part == "attn_output":
            if eight and recipe in ("Q3_K_M", "Q4_K_S", "Q4_K_M"):
                return "Q5_K"
            return "Q4_K" if recipe == "Q3_K_M" else default
        if part == "attn_qkv":
            return {"Q3_K_M": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(recipe, default)
        return default

    def type_of(tensor: Tensor) -> GgmlType:
        if len(tensor.shape) < 2 or not tensor.name.endswith("weight") or any(part in tensor.name for part in KEPT):
            return tensor.type
        number = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        found = ggml_type(name_of(tensor.name, int(number), base))
        if tensor.shape[0] % found.block_size:
            found = ggml_type(FALLBACKS.get(found.name, "F16"))
        return ggml_type("F16") if tensor.shape[0] % found.block_size else found

    return type_of


def _more_bits(layer: int, n: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _attention_v(recipe: str, layer: int, n: int, default: str) -> str:
    if recipe in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, n):
        return "Q6_K"
    if recipe == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    return "Q5_K" if recipe == "Q4_K_S" and layer < 4 else default


def _ffn_down(recipe: str, layer: int, n: int, default: str) -> str:
    if recipe in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, n):
        return "Q6_K"
    if recipe == "Q3_K_M":
        return "Q5_K" if layer < n // 16 else "Q4_K"
    return "Q5_K" if recipe == "Q4_K_S" and layer < n // 8 else default
