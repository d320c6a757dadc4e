"""What quantizing makes of a model, against files that llama.cpp's quantizer made."""

from __future__ import annotations

import pytest

from planner.recipes import RECIPES, quantized
from tests.planner import models


@pytest.mark.parametrize(
    ("name", "recipe"), [("gemma2-27b-q4km", "Q4_K_M"), ("mistral-small-24b-q4km", "Q4_K_M"), ("qwen3-0.6b-q8", "Q8_0")]
)
def test_a_quantized_file_comes_out_type_by_type(name: str, recipe: str) -> None:
    """Made anew from its own shapes, every tensor has the type that it has in the file."""
    profile = models.header(name)
    made = quantized(profile, recipe)
    assert [tensor.type for tensor in made.tensors] == [tensor.type for tensor in profile.tensors]
    assert made == profile


@pytest.mark.parametrize(
    "name", ["deepseek-v2-lite-q4km", "gemma4-31b-q4km", "llama4-scout-q4km", "phi4-14b-q4km", "qwen3.5-35b-a3b-q4km"]
)
def test_other_architectures_come_out_within_half_a_percent(name: str) -> None:
    """Latent attention, shared experts, fused QKV, recurrent layers: makers of files differ in single tensors."""
    profile = models.header(name)
    assert quantized(profile, "Q4_K_M").weights_bytes == pytest.approx(profile.weights_bytes, rel=0.005)


def test_recipes_grow_in_the_order_of_their_bits() -> None:
    """Of a 70B; what is not a matrix keeps its type, and the file grows by what its tensors do."""
    profile = models.header("llama3.3-70b-q4km")
    made = [quantized(profile, recipe) for recipe in RECIPES]
    sizes = [model.weights_bytes for model in made]
    assert sizes == sorted(sizes)
    for model in made:
        assert model.file_bytes - profile.file_bytes == sum(t.bytes for t in model.tensors) - sum(
            t.bytes for t in profile.tensors
        )
        assert all(new.type == old.type for new, old in zip(model.tensors, profile.tensors, strict=True) if len(old.shape) == 1)


def test_rows_that_are_no_multiple_of_a_block_fall_back() -> None:
    """gpt-oss is 2880 wide: 256 does not divide it, so Q4_K becomes Q5_0 there."""
    made = quantized(models.header("gpt-oss-20b"), "Q4_K_M")
    assert made.layer_tensors[0]["attn_q.weight"].type.name == "Q5_0"


def test_an_unknown_recipe_is_refused_by_name() -> None:
    """With those that are known."""
    with pytest.raises(ValueError, match="Q4_K_M"):
        quantized(models.header("qwen3-0.6b-q8"), "Q7_X")
