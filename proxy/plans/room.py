"""Which memory a load will find: what is free, what Ollama frees for it, and what is to be left for others.

With other models loaded, Ollama evicts idle ones, the shortest keep-alive first, while a model is predicted to take more than
80 % of what is free where it goes (``server/sched.go``). Everything here is a function of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from planner.hardware import Rig, gpu_names
from planner.plan import Plan
from planner.request import Candidate, PlanRequest
from planner.stock import main_gpu_of
from planner.units import GIB
from proxy.config.rules import Rule, find_gpus
from proxy.plans.loading import freed, makes_room


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


def alone(plan: Plan) -> list[Candidate]:
    """The placements on one GPU that fit, the fastest first."""
    found = (candidate for candidate in (plan.stock, *plan.alternatives) if candidate.placement.kind == "solo" and candidate.fits)
    return sorted(found, key=lambda candidate: -candidate.decode_tokens_per_s)


def beside_others(plan: Plan) -> int | None:
    """The GPU of the fastest placement that ``main_gpu`` can say and for which Ollama evicts nobody; ``None``: there is none."""
    quiet = (found.placement.order[0] for found in alone(plan) if not evicts(plan, found))
    return next((gpu for gpu in quiet if main_gpu_of(plan.rig, gpu) is not None), None)


def ruled(request: PlanRequest, rig: Rig, rule: Rule) -> PlanRequest:
    """``request`` with what ``rule`` says of ``rig``.

    GPUs that are not there count as not named: the file may be shared by several machines, and :func:`doubts` tells. Of several
    that one name means, each has its reserve, and ``gpu`` is the first.
    """
    reserves = [0] * len(rig.gpus)
    for name, size_bytes in rule.reserve:
        for gpu in find_gpus(rig.gpus, name):
            reserves[gpu] = size_bytes
    if any(reserves):
        request = replace(request, reserve_bytes=tuple(reserves))
    if rule.boost is not None:
        request = replace(request, boost=None if rule.boost == "auto" else rule.boost)
    if rule.gpu is not None and (named := find_gpus(rig.gpus, rule.gpu)):
        return replace(request, gpu=named[0], gpu_reason="a rule of lopsided.toml says so")
    return request


def said_by(rule: Rule) -> str | None:
    """What ``rule`` says, each with the section of the file that says it, in words; ``None`` where it says nothing."""
    by, said = dict(rule.by), []
    for key, value in rule.values().items():
        text = f"{value / GIB:.1f} GiB" if key.startswith("reserve ") else value
        said.append(f"{key} = {text}" + (f' ([models."{by[key]}"])' if key in by else ""))
    return f"lopsided.toml: {', '.join(said)}" if said else None


def doubts(rules: Iterable[Rule], rig: Rig) -> Iterator[str]:
    """What the GPUs that ``rules`` name leave to be said: ones that are not there, several of a name, reserves of whole cards."""
    named = dict.fromkeys(rule.gpu for rule in rules if rule.gpu is not None)
    reserves = dict(reserve for rule in rules for reserve in rule.reserve)
    for name in named | dict.fromkeys(reserves):
        if not (found := find_gpus(rig.gpus, name)):
            yield f"a rule names the GPU {name!r}, which is not here: that part of the rule is ignored"
        elif name in named and len(found) > 1:
            yield f"gpu = {name!r} means {len(found)} GPUs here: {rig.gpus[found[0]].uuid} is taken"
        yield from (
            f"the reserve leaves nothing of {gpu_names(rig.gpus)[gpu]}: nothing is placed there"
            for gpu in found
            if reserves.get(name, 0) >= rig.gpus[gpu].total_bytes
        )
