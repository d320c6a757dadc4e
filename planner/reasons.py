"""A plan's reasons in words: what stock does, what does not fit, what was chosen, what bounds it. Computes nothing anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.cache import cache_bytes
from planner.choice import NEVER_WORSE_GAIN, score
from planner.hardware import Rig, gpu_names
from planner.placement import in_words
from planner.profile import ModelProfile
from planner.request import Candidate, PlanRequest
from planner.speed import gpu_rates
from planner.units import GIB

LOSERS_SHOWN = 5
"""Candidates that are named beside the chosen one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """What keeps a plan from being faster: GPU ``gpu`` has ``left_bytes`` left, and the next layer takes ``layer_bytes``."""

    gpu: int
    left_bytes: int
    layer_bytes: int


def binding(profile: ModelProfile, rig: Rig, request: PlanRequest, chosen: Candidate) -> Binding | None:
    """The fastest GPU that is used and has no room for a layer more; ``None`` where one holds everything, or all have room."""
    caches, placement = cache_bytes(profile, chosen.settings), chosen.placement
    full = []
    for gpu, run in placement.ranges():
        beside = run.start - 1 if run.start else run.stop
        if beside == profile.n_layers:
            continue
        layer = profile.layers[beside]
        held = layer.weights_bytes + caches[beside] - (layer.expert_bytes if beside in placement.cpu_experts else 0)
        left = chosen.limits[gpu] - chosen.memory.devices[gpu].total_bytes
        if left < held:
            full.append(Binding(gpu=gpu, left_bytes=left, layer_bytes=held))
    return max(full, key=lambda one: gpu_rates(rig.gpus[one.gpu], request.calibration).decode_bytes_per_s, default=None)


def reasons(
    profile: ModelProfile,
    rig: Rig,
    request: PlanRequest,
    *,
    chosen: Candidate,
    stock: Candidate,
    fitting: Sequence[Candidate],
    rejected: Sequence[Candidate],
) -> tuple[str, ...]:
    """Why ``chosen``: one sentence each, in order."""
    names = gpu_names(rig.gpus)
    lines = [f"stock Ollama ({request.era} era): {in_words(stock.placement, names)}, {_speed(stock)}"]
    if not stock.fits:
        lines.append(f"stock would run out of memory: {_overflow(stock, names)}")
    lines += [f"{candidate.label} does not fit: {_overflow(candidate, names)}" for candidate in rejected]
    losers = [candidate for candidate in fitting if candidate != chosen][:LOSERS_SHOWN]
    if chosen == stock:
        lines.append(_stock_stays(stock, losers, request))
        return tuple(lines)
    lines += [f"not chosen: {candidate.label}, {_speed(candidate)}" for candidate in losers]
    gain = score(chosen, request.objective) / score(stock, request.objective) - 1
    rates = "by measured rates" if chosen.calibrated else "predicted, not calibrated"
    lines.append(f"chosen: {in_words(chosen.placement, names)}, {_speed(chosen)}, {gain:+.0%} against stock ({rates})")
    lines += _bounds(chosen, names)
    if bound := binding(profile, rig, request, chosen):
        left, layer = max(bound.left_bytes, 0) / GIB, bound.layer_bytes / GIB
        lines.append(f"bound by the memory of {names[bound.gpu]}: {left:.2f} GiB are left, one layer more takes {layer:.2f}")
    return tuple(lines)


def boost_reason(boost: float) -> str:
    """Why there was no search."""
    return f"the boost {boost:g} is set: the boost algorithm's layout, whatever speed is predicted"


def _stock_stays(stock: Candidate, losers: Sequence[Candidate], request: PlanRequest) -> str:
    if request.boost is not None and request.gpu is None:
        return "stock stays: what the boost asks for does not fit"
    if not losers:
        return "stock stays: nothing else fits"
    gain = score(losers[0], request.objective) / score(stock, request.objective) - 1
    return f"stock stays: the best other, {losers[0].label}, is predicted {gain:+.1%}, and a plan needs {NEVER_WORSE_GAIN:+.0%}"


def _speed(candidate: Candidate) -> str:
    return f"{candidate.decode_tokens_per_s:.1f} tok/s decode, {candidate.prefill_tokens_per_s:.0f} tok/s prefill"


def _overflow(candidate: Candidate, names: Sequence[str]) -> str:
    over = [
        f"{names[gpu]} would need {device.total_bytes / GIB:.1f} of {limit / GIB:.1f} GiB"
        for gpu, (device, limit) in enumerate(zip(candidate.memory.devices, candidate.limits, strict=True))
        if device.total_bytes > limit
    ]
    return "; ".join(over) or f"the host would need {candidate.memory.host.total_bytes / GIB:.1f} GiB of RAM"


def _bounds(chosen: Candidate, names: Sequence[str]) -> list[str]:
    """What each GPU is given, the last in order first: the one that was filled first."""
    return [
        f"{names[gpu]} is given {chosen.memory.devices[gpu].total_bytes / GIB:.1f} of {chosen.limits[gpu] / GIB:.1f} GiB"
        for gpu in reversed(chosen.placement.order)
    ]
