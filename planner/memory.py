"""Bytes on each device for a placement: weights + KV cache or state + compute buffer + runtime, each a part of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.cache import cache_bytes
from planner.families import family_of
from planner.placement import Placement
from planner.profile import ModelProfile
from planner.settings import LoadSettings

__all__ = ["MIB", "DeviceMemory", "LoadSettings", "MemoryEstimate", "cache_bytes", "estimate_memory"]

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Bytes on one device, or on the host. ``runtime_bytes`` is the CUDA context and its workspaces."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0
    runtime_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.runtime_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes of a placement: ``devices`` in the rig's order. ``upper_bound``: the architecture is unknown, the truth is lower."""

    devices: tuple[DeviceMemory, ...]
    host: DeviceMemory
    upper_bound: bool = False


def estimate_memory(
    profile: ModelProfile, settings: LoadSettings, placement: Placement, *, runtime_bytes: Sequence[int] | None = None
) -> MemoryEstimate:
    """Bytes on each device for ``placement``; ``runtime_bytes`` is the fixed cost of each GPU that is used (0 if not given)."""
    caches = cache_bytes(profile, settings)
    logits = 4 * settings.ubatch * profile.vocab_size
    hidden = 4 * settings.ubatch * profile.embedding_length * 12
    devices = [DeviceMemory()] * len(placement.layers)
    for gpu, run in placement.ranges():
        output = gpu == placement.output_gpu
        devices[gpu] = DeviceMemory(
            weights_bytes=sum(
                profile.layers[i].weights_bytes - (profile.layers[i].expert_bytes if i in placement.cpu_experts else 0)
                for i in run
            )
            + (profile.output_bytes if output else 0),
            kv_bytes=sum(caches[i] for i in run),
            compute_bytes=hidden + (logits if output else 0),
            runtime_bytes=runtime_bytes[gpu] if runtime_bytes else 0,
        )
    host = DeviceMemory(
        weights_bytes=profile.input_bytes
        + sum(layer.weights_bytes for layer in profile.layers[: placement.cpu_layers])
        + sum(profile.layers[i].expert_bytes for i in placement.cpu_experts if i >= placement.cpu_layers)
        + (profile.output_bytes - profile.tied_bytes if placement.output_gpu is None else 0),
        kv_bytes=sum(caches[: placement.cpu_layers]),
        compute_bytes=hidden,
    )
    return MemoryEstimate(devices=tuple(devices), host=host, upper_bound=family_of(profile.architecture) is None)
