"""Which memory a load will find: what is free, what Ollama frees for it, and what is to be left for others.

With other models loaded, Ollama evicts idle ones, the shortest keep-alive first, while a model is predicted to take more than
80 % of what is free where it goes (``server/sched.go``). Everything here is a function of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from planner.hardware import Rig
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.request import Candidate, PlanRequest
from planner.search import Search
from planner.speed import gpu_rates
from proxy.catalog import ModelFacts
from proxy.loading import freed, makes_room
from proxy.rules import Rule, Rules, find_gpu

SMALL_PERCENT = 25
"""An embedding model that takes no more of the slowest card's memory is small: it goes there."""

SLOWER = 0.9
"""A card that decodes at less than this part of the fastest one's rate is a slow one, a pure number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A loaded model. ``held_bytes`` is what it holds on each GPU, ``None`` where that is not known.

    ``stays``: nobody should count on Ollama to evict it; it is busy, pinned, more important, or to be kept together with the one
    that loads.
    """

    vram_bytes: int
    held_bytes: tuple[int, ...] | None
    stays: bool = False


def rig_for(rig: Rig, *, own: Held | None, others: Iterable[Held], evicted: bool, live: bool) -> Rig:
    """``rig`` as a load finds it: without ``own``, the same model loaded before, and without those that Ollama evicts.

    ``live``: ``rig`` tells what is free now, all models included; else what is free without any.
    """
    gone = [held for held in others if evicted and not held.stays]
    if live:
        for held in ([own] if own else []) + gone:
            rig = freed(rig, held.vram_bytes, held.held_bytes)
        return rig
    for held in others:
        if held not in gone:
            rig = taken(rig, held.vram_bytes, held.held_bytes)
    return rig


def taken(rig: Rig, vram_bytes: int, held: Sequence[int] | None) -> Rig:
    """``rig`` with a model of ``vram_bytes`` loaded; where ``held`` does not say it, in proportion to what is free."""
    if held is None or len(held) != len(rig.gpus):
        free = sum(gpu.free_bytes for gpu in rig.gpus)
        held = [vram_bytes * gpu.free_bytes // max(free, 1) for gpu in rig.gpus]
    gpus = (replace(gpu, free_bytes=max(gpu.free_bytes - bytes_, 0)) for gpu, bytes_ in zip(rig.gpus, held, strict=True))
    return replace(rig, gpus=tuple(gpus))


def evicts(plan: Plan, candidate: Candidate | None) -> bool:
    """Whether Ollama evicts idle models for ``plan``: it looks at the GPU of ``candidate`` where that is one, else at all."""
    gpus = candidate.placement.order if candidate and candidate.placement.kind == "solo" and not plan.request.spread else None
    return makes_room(plan.profile, plan.rig, plan.request, gpus)


def beside_others(plan: Plan) -> int | None:
    """The GPU of the fastest placement on one GPU for which Ollama evicts nobody; ``None`` where there is none."""
    alone = (found for found in (plan.stock, *plan.alternatives) if found.placement.kind == "solo" and found.fits)
    ranked = sorted(alone, key=lambda found: -found.decode_tokens_per_s)
    return next((found.placement.order[0] for found in ranked if not evicts(plan, found)), None)


def ruled(request: PlanRequest, rig: Rig, rule: Rule, facts: ModelFacts) -> PlanRequest:
    """``request`` with what ``rule`` says of ``rig``, and a small embedding model on the slow card.

    GPUs that are not there count as not named: the file may be shared by several machines, and `lopsided doctor` tells.
    """
    reserves = [0] * len(rig.gpus)
    for name, size_bytes in rule.reserve:
        if (gpu := find_gpu(rig.gpus, name)) is not None:
            reserves[gpu] = size_bytes
    if any(reserves):
        request = replace(request, reserve_bytes=tuple(reserves))
    if rule.boost is not None:
        request = replace(request, boost=None if rule.boost == "auto" else rule.boost)
    gpu = find_gpu(rig.gpus, rule.gpu) if rule.gpu is not None else None
    if gpu is not None:
        return replace(request, gpu=gpu, gpu_reason="a rule of lopsided.toml says so")
    if facts.is_embedding and rule.gpu is None and (gpu := slow_gpu(facts.profile, rig, request)) is not None:
        return replace(request, gpu=gpu, gpu_reason="a small embedding model leaves the fast card to others")
    return request


def slow_gpu(profile: ModelProfile, rig: Rig, request: PlanRequest) -> int | None:
    """Where a small embedding model pushes nobody out: the slowest card; ``None`` where cards are alike or it is not small."""
    rates = [gpu_rates(gpu, request.calibration).decode_bytes_per_s for gpu in rig.gpus]
    if not rates or min(rates) > SLOWER * max(rates):
        return None
    slowest = min(range(len(rates)), key=lambda gpu: (rates[gpu], -gpu))
    search = Search(profile, rig, request)
    small = search.alone(slowest).memory.devices[slowest].total_bytes * 100 <= SMALL_PERCENT * rig.gpus[slowest].total_bytes
    return slowest if small else None


def unknown_gpus(rules: Rules, rig: Rig) -> tuple[str, ...]:
    """GPUs that rules name and that are not there."""
    return tuple(dict.fromkeys(name for name in rules.gpus() if find_gpu(rig.gpus, name) is None))
