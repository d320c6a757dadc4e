"""Plans and rigs as JSON: one shape for ``lopsided plan --json`` and ``GET /lopsided/plan``. Renders values, decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from planner.frontier import FrontierPoint
from planner.hardware import Gpu, Rig
from planner.plan import Plan
from planner.power import power_shares, raw_powers
from planner.profile import ModelProfile
from planner.reasons import binding
from planner.request import Candidate
from planner.speed import Calibration, gpu_rates
from proxy.launcher.launch import render
from proxy.ollama.options import Delivery, device_names

NOTHING: Mapping[str, Calibration] = MappingProxyType({})
"""No rates of any class."""


def plan_json(plan: Plan, delivery: Delivery, frontier: Iterable[FrontierPoint]) -> dict[str, Any]:
    """The whole answer; ``gpus`` are in Ollama's order, and so is every list with one entry per GPU.

    ``frontier``: the largest context of each kind of placement, the fastest first. ``binding``: what keeps the plan from being
    faster, if anything does.
    """
    settings, bound = plan.chosen.settings, binding(plan.profile, plan.rig, plan.request, plan.chosen)
    chosen = (plan.chosen.placement, settings)
    shares = power_shares(raw_powers(plan.rig.gpus))
    return {
        "model": model_json(plan.profile),
        "gpus": [
            {"uuid": gpu.uuid, "name": gpu.name, "free_bytes": gpu.free_bytes, "power_share": share}
            for gpu, share in zip(plan.rig.gpus, shares, strict=True)
        ],
        "request": {
            "num_ctx": settings.num_ctx,
            "num_batch": settings.batch,
            "parallel": settings.parallel,
            "boost": "auto" if plan.request.boost is None else plan.request.boost,
        },
        "plan": candidate_json(plan.chosen),
        "stock": candidate_json(plan.stock),
        "alternatives": [candidate_json(other) for other in plan.alternatives if (other.placement, other.settings) != chosen],
        "binding": asdict(bound) if bound else None,
        "frontier": [{"num_ctx": point.num_ctx, **candidate_json(point.candidate)} for point in frontier],
        "reasons": list(plan.reasons),
        "delivery": {"options": dict(delivery.options), "launcher": launcher_arguments(plan)},
    }


def quantization_json(recipe: str, plan: Plan) -> dict[str, Any]:
    """The plan for the model quantized by ``recipe``."""
    profile = plan.profile
    return {
        "name": recipe,
        "file_bytes": profile.file_bytes,
        "plan": candidate_json(plan.chosen),
        "stock": candidate_json(plan.stock),
    }


def model_json(profile: ModelProfile) -> dict[str, Any]:
    """What the plan is for."""
    return {
        "name": profile.name,
        "architecture": profile.architecture,
        "layers": profile.n_layers,
        "weights_bytes": profile.weights_bytes,
        "file_bytes": profile.file_bytes,
        "context_train": profile.context_train,
    }


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """One placement; ``layers`` count the output layer with its GPU.

    ``order``: the GPUs from the lowest layers to the highest; ``cpu_experts``: layers whose routed experts stay in RAM.
    """
    placement = candidate.placement
    return {
        "label": candidate.label,
        "kind": placement.kind,
        "layers": list(placement.shares),
        "order": list(placement.order),
        "output_gpu": placement.output_gpu,
        "cpu_layers": placement.cpu_layers,
        "cpu_experts": sorted(placement.cpu_experts),
        "num_batch": candidate.settings.batch,
        "devices": [
            {
                "weights_bytes": device.weights_bytes,
                "kv_bytes": device.kv_bytes,
                "compute_bytes": device.compute_bytes,
                "runtime_bytes": device.runtime_bytes,
                "total_bytes": device.total_bytes,
                "limit_bytes": limit,
            }
            for device, limit in zip(candidate.memory.devices, candidate.limits, strict=True)
        ],
        "decode_tokens_per_s": candidate.decode_tokens_per_s,
        "prefill_tokens_per_s": candidate.prefill_tokens_per_s,
        "calibrated": candidate.calibrated,
    }


def launcher_arguments(plan: Plan) -> list[str]:
    """What llama-server has to be told beside Ollama's own arguments; empty where these can't say it."""
    placement, settings = plan.chosen.placement, plan.chosen.settings
    if not placement.order:
        return ["-ngl", "0"]
    return list(render(placement, device_names(plan.rig), settings=settings, asked=plan.stock.settings) or ())


def gpu_json(gpu: Gpu, index: int, *, power_share: float, measured: Mapping[str, Calibration] = NOTHING) -> dict[str, Any]:
    """A GPU as ``GET /lopsided/devices`` shows it; ``measured`` are the rates by class of model, if any."""
    capability = gpu.compute_capability
    predicted = gpu_rates(gpu)
    return {
        "index": index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "library": gpu.library,
        "pci_id": gpu.pci_id,
        "total_bytes": gpu.total_bytes,
        "free_bytes": gpu.free_bytes,
        "compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
        "sm_count": gpu.sm_count,
        "clock_mhz": gpu.clock_mhz,
        "bandwidth_bytes_per_s": gpu.bandwidth_bytes_per_s,
        "power_share": power_share,
        "predicted": rates_json(predicted.decode_bytes_per_s, predicted.prefill_flops_per_s),
        "measured": {name: rates_json(*found.rates[gpu.uuid]) for name, found in measured.items() if gpu.uuid in found.rates},
    }


def rates_json(decode_bytes_per_s: float, prefill_flops_per_s: float) -> dict[str, float]:
    """A GPU's rates, predicted or measured."""
    return {"decode_bytes_per_s": decode_bytes_per_s, "prefill_flops_per_s": prefill_flops_per_s}


def devices_json(rig: Rig, measured: Mapping[str, Calibration] = NOTHING) -> dict[str, Any]:
    """All GPUs, in Ollama's order, ``device`` as llama.cpp calls each; ``measured`` as in ``Measurements.class_rates``."""
    shares = power_shares(raw_powers(rig.gpus))
    names = device_names(rig)
    return {
        "gpus": [
            {"device": names[index], **gpu_json(gpu, index, power_share=shares[index], measured=measured)}
            for index, gpu in enumerate(rig.gpus)
        ]
    }
