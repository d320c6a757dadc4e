"""Whether a model lies where its plan says: what Ollama and the driver count, against what the plan expects."""

from __future__ import annotations

from planner.hardware import Rig
from planner.request import Candidate
from planner.units import GIB, MIB

SLACK = 0.15
"""Part of the expected bytes that may be missing or too many: projectors, adapters, another version's buffers."""

SLACK_BYTES = 512 * MIB
"""The same for small models."""


def misplaced(candidate: Candidate, planned: Rig, now: Rig | None, vram_bytes: int) -> str | None:
    """Why ``candidate`` is not what is loaded, in words, or ``None``.

    ``planned`` is the rig of its plan, ``now`` the rig with the model loaded (``None``: nothing watches its memory),
    ``vram_bytes`` what ``/api/ps`` says it takes on all GPUs.
    """
    devices = candidate.memory.devices
    expected_bytes = sum(device.total_bytes - device.runtime_bytes for device in devices)
    if abs(vram_bytes - expected_bytes) > max(expected_bytes * SLACK, SLACK_BYTES):
        return f"{vram_bytes / GIB:.1f} GiB lie on GPUs, {expected_bytes / GIB:.1f} GiB were expected"
    if now is None:
        return None
    used = {gpu.uuid: gpu.total_bytes - gpu.free_bytes for gpu in now.gpus}
    for gpu, device in zip(planned.gpus, devices, strict=True):
        if used.get(gpu.uuid, 0) < device.total_bytes * (1 - SLACK) - SLACK_BYTES:
            return f"{gpu.name} holds {used.get(gpu.uuid, 0) / GIB:.1f} GiB, {device.total_bytes / GIB:.1f} GiB were expected"
    return None
