"""A plan as JSON: the one shape of ``lopsided plan --json`` and ``GET /lopsided/plan``. Sizes in bytes, rates in tokens per second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.hardware import Gpu
from planner.placement import Placement
from planner.plan import Candidate, Plan
from planner.power import power_shares, raw_powers


def plan_json(plan: Plan, delivery: Mapping[str, Any]) -> dict[str, Any]:
    """``plan`` as dictionaries, lists, numbers and text; ``delivery`` says how it reaches Ollama (``options``, ``launcher``)."""
    settings = plan.chosen.settings
    profile = plan.profile
    return {
        "model": {
            "name": profile.name,
            "architecture": profile.architecture,
            "file_bytes": profile.file_bytes,
            "weights_bytes": profile.weights_bytes,
            "n_layers": profile.n_layers,
            "context_train": profile.context_train or None,
            "expert_count": profile.expert_count,
            "experts_used": profile.experts_used,
        },
        "gpus": _gpus_json(plan.rig.gpus),
        "request": {
            "num_ctx": settings.num_ctx,
            "num_batch": settings.batch,
            "parallel": settings.parallel,
            "boost": "auto" if plan.request.boost is None else plan.request.boost,
        },
        "plan": candidate_json(plan.chosen),
        "plan_by_options": candidate_json(plan.chosen_by_options),
        "stock": candidate_json(plan.stock),
        "alternatives": [candidate_json(candidate) for candidate in plan.alternatives],
        "reasons": list(plan.reasons),
        "delivery": dict(delivery),
    }


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """One placement: ``layers`` counts the output layer as one; ``order`` is that of ``--device``, lowest layers first."""
    devices = zip(candidate.memory.devices, candidate.limits, strict=True)
    return {
        "label": candidate.label,
        **placement_json(candidate.placement),
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
            for device, limit in devices
        ],
        "decode_tokens_per_s": round(candidate.decode_tokens_per_s, 2),
        "prefill_tokens_per_s": round(candidate.prefill_tokens_per_s, 1),
        "calibrated": candidate.calibrated,
    }


def placement_json(placement: Placement) -> dict[str, Any]:
    """Where the layers are."""
    return {
        "kind": placement.kind,
        "layers": list(placement.shares),
        "order": list(placement.order),
        "output_gpu": placement.output_gpu,
        "cpu_layers": placement.cpu_layers,
        "cpu_experts": sorted(placement.cpu_experts),
    }


def _gpus_json(gpus: Sequence[Gpu]) -> list[dict[str, Any]]:
    shares = power_shares(raw_powers(gpus)) if gpus else ()
    return [
        {"uuid": gpu.uuid, "name": gpu.name, "free_bytes": gpu.free_bytes, "power_share": round(share, 3)}
        for gpu, share in zip(gpus, shares, strict=True)
    ]
