"""Bytes on each device for a placement: weights + KV cache + compute buffer + runtime, each a part of its own.

First model: dense attention on every layer; the exact one takes its place behind the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.placement import Placement
from planner.profile import ModelProfile
from planner.quantization import ggml_type

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSettings:
    """What a load is asked for, as llama-server's flags have it.

    ``num_ctx`` is the context of one sequence in tokens; ``-c`` is ``num_ctx · parallel``. ``batch`` and ``ubatch`` are
    ``-b`` and ``-ub`` in tokens. Cache types are names from ``quantization.CACHE_TYPE_NAMES``.
    """

    num_ctx: int = 4096
    parallel: int = 1
    batch: int = 512
    ubatch: int = 512
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool = True

    def __post_init__(self) -> None:
        if min(self.num_ctx, self.parallel, self.batch, self.ubatch) < 1:
            raise ValueError(f"context, parallel, batch and micro-batch must be at least 1: {self}")

    @property
    def total_ctx(self) -> int:
        """Tokens of all sequences together: llama-server's ``-c``."""
        return self.num_ctx * self.parallel


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


def cache_bytes(profile: ModelProfile, settings: LoadSettings) -> tuple[int, ...]:
    """Bytes of KV cache or recurrent state of each repeating layer."""
    key_length = profile.integer("attention.key_length") or profile.embedding_length // max(
        profile.integer("attention.head_count"), 1
    )
    value_length = profile.integer("attention.value_length") or key_length
    heads = profile.per_layer("attention.head_count_kv", profile.integer("attention.head_count"))
    cells = -(-settings.total_ctx // 256) * 256
    k, v = ggml_type(settings.kv_type_k), ggml_type(settings.kv_type_v)
    return tuple(cells * (k.row_bytes(n * key_length) + v.row_bytes(n * value_length)) for n in heads)


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
        + (profile.output_bytes if placement.output_gpu is None else 0),
        kv_bytes=sum(caches[: placement.cpu_layers]),
        compute_bytes=hidden,
    )
    return MemoryEstimate(devices=tuple(devices), host=host)
