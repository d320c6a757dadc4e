"""Bytes on each device for a placement: weights + KV cache or state + compute buffer + runtime, each a part of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.cache import caches_before
from planner.compute import PIPELINE_COPIES, compute_model
from planner.exchange import DevicePart
from planner.families import family_of
from planner.inputs import F32
from planner.placement import Placement
from planner.profile import ModelProfile
from planner.settings import LoadSettings

UNKNOWN_COMPUTE_FACTOR = 2
UNKNOWN_SPILLED_FACTOR = 3
"""How much larger than those of known parts the compute buffers of an unknown architecture are taken to be, with all layers on
GPUs and with some in RAM: no known family's are so much larger than its tensors suggest (``tests/planner/test_memory.py``)."""


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
    profile: ModelProfile,
    settings: LoadSettings,
    placement: Placement,
    *,
    runtime_bytes: Sequence[int] | None = None,
    projector_bytes: int = 0,
) -> MemoryEstimate:
    """Bytes on each device for ``placement``.

    ``runtime_bytes`` is the fixed cost of each GPU that is used (0 if not given; see ``planner.request``). ``projector_bytes`` is
    the size of a vision or audio projector (``--mmproj``): it goes whole to the first GPU that is used (``clip_init`` takes the
    first device, ``tools/mtmd/clip.cpp``), or to the host where none is; its activations, which depend on the image, are not in
    it.
    """
    unknown = family_of(profile.architecture) is None
    factor = (UNKNOWN_SPILLED_FACTOR if placement.cpu_layers else UNKNOWN_COMPUTE_FACTOR) if unknown else 1
    projector_gpu = min(placement.order, default=None)
    cpu_experts = frozenset(i for i in placement.cpu_experts if profile.layers[i].expert_bytes)  # others have nothing to move
    weights = profile.weights_before
    caches = caches_before(profile, settings)
    compute = compute_model(profile, settings, cpu_layers=placement.cpu_layers)
    visitors = range(min(placement.cpu_layers, profile.n_computed_layers))
    pipelined = (
        len(placement.order) > 1 and not placement.cpu_layers and not placement.cpu_experts and placement.output_gpu is not None
    )
    copies = PIPELINE_COPIES if pipelined else 1
    dry = settings.outputs is None or not pipelined
    embedding_logits = _logits_of_embedding(profile, settings, copies) if unknown else 0
    devices = [DeviceMemory()] * len(placement.layers)
    for place, (gpu, run) in enumerate(placement.ranges()):
        output = gpu == placement.output_gpu
        part = DevicePart(
            layers=run,
            visitors=range(0) if place else visitors,
            first=place == 0,
            normed=dry and place > 0,
            sends_norm=dry and gpu != placement.order[-1],
            output=output,
            copies=copies,
            host_experts=frozenset(i for i in cpu_experts if i in run),
            foreign_experts=() if place else tuple(sorted(i for i in cpu_experts if i >= run.stop)),
        )
        devices[gpu] = DeviceMemory(
            weights_bytes=weights[run.stop]
            - weights[run.start]
            - sum(profile.layers[i].expert_bytes for i in cpu_experts if i in run)
            + (profile.output_bytes if output else 0)
            + (projector_bytes if gpu == projector_gpu else 0),
            kv_bytes=caches[run.stop] - caches[run.start],
            compute_bytes=factor * compute.device_bytes(part)
            + (0 if place or (output and profile.tied_bytes) else embedding_logits),
            runtime_bytes=runtime_bytes[gpu] if runtime_bytes else 0,
        )
    host = DeviceMemory(
        weights_bytes=profile.input_bytes
        + weights[placement.cpu_layers]
        + sum(profile.layers[i].expert_bytes for i in cpu_experts if i >= placement.cpu_layers)
        + (profile.output_bytes - profile.tied_bytes if placement.output_gpu is None else 0)
        + (projector_bytes if projector_gpu is None else 0),
        kv_bytes=caches[placement.cpu_layers],
        compute_bytes=factor * compute.host_bytes(visitors=visitors, copies=copies),
    )
    return MemoryEstimate(devices=tuple(devices), host=host, upper_bound=unknown)


def _logits_of_embedding(profile: ModelProfile, settings: LoadSettings, copies: int) -> int:
    """Bytes that the first GPU needs if it makes the logits with the embedding in RAM (``src/models/bitnet.cpp``).

    0 where a model has an output matrix of its own.
    """
    embedding = profile.model_tensors.get("token_embd.weight")
    if embedding is None or "output.weight" in profile.model_tensors:
        return 0
    return copies * embedding.bytes + settings.ubatch * profile.vocab_size * F32
