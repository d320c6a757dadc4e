"""What a model's layers take: the input of the boost algorithm and of the stock baseline."""

from __future__ import annotations

from dataclasses import dataclass

from planner.cache import cache_bytes
from planner.profile import ModelProfile
from planner.settings import LoadSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCosts:
    """What a model's layers take, in bytes.

    ``layers_bytes``: weights and KV of each repeating layer. ``ffn_bytes``: the part of each that is feed-forward weights,
    routed experts counted. ``output_bytes``: the output layer.
    """

    layers_bytes: tuple[int, ...]
    ffn_bytes: tuple[int, ...]
    output_bytes: int

    def __post_init__(self) -> None:
        if len(self.ffn_bytes) != len(self.layers_bytes):
            raise ValueError(f"{len(self.ffn_bytes)} FFN sizes for {len(self.layers_bytes)} layers")

    @property
    def all_bytes(self) -> tuple[int, ...]:
        """Bytes of every layer, the output layer last."""
        return (*self.layers_bytes, self.output_bytes)


def layer_costs(profile: ModelProfile, settings: LoadSettings) -> LayerCosts:
    """The costs of ``profile``'s layers under ``settings``: weights plus KV cache or recurrent state."""
    caches = cache_bytes(profile, settings)
    return LayerCosts(
        layers_bytes=tuple(weights + cache for weights, cache in zip(profile.layer_weights, caches, strict=True)),
        ffn_bytes=tuple(layer.ffn_bytes + layer.expert_bytes for layer in profile.layers),
        output_bytes=profile.output_bytes,
    )
