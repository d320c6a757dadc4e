"""Models that are to be loaded at the same time: where each goes, so that all have room and none has another unloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from planner.hardware import Rig
from planner.plan import Planner
from planner.profile import ModelProfile
from planner.request import Candidate, PlanRequest
from proxy.plans.loading import makes_room
from proxy.plans.room import alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A model of a group, and how it would be asked for."""

    profile: ModelProfile
    request: PlanRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a group leaves to one of its models: the GPU to be alone on (``None``: several), and bytes to leave on each."""

    gpu: int | None
    reserve_bytes: tuple[int, ...]


def share(members: Sequence[Member], own: int, rig: Rig, planner: Planner, *, by_options: bool = True) -> Share | None:
    """What ``members[own]`` gets, so that all the others can be loaded beside it, whichever comes first.

    The members are placed one after the other, each as fast as what the earlier ones leave allows: the first in the order given;
    where one of them then finds no room on the GPUs, the small ones first. Where that does not help either, they cannot be kept
    together: ``None``. ``by_options``: a load on one GPU has Ollama look at that GPU alone before it unloads others.
    """
    for order in _orders(members):
        placed = _placed(members, order, rig, planner, by_options=by_options)
        if placed is not None:
            others = [_held(candidate, members[index]) for index, candidate in placed.items() if index != own]
            mine = placed[own].placement
            reserve = tuple(sum(bytes_) for bytes_ in zip((0,) * len(rig.gpus), *others, strict=True))
            return Share(gpu=mine.order[0] if mine.kind == "solo" else None, reserve_bytes=reserve)
    return None


def _orders(members: Sequence[Member]) -> Iterable[tuple[int, ...]]:
    given = tuple(range(len(members)))
    return dict.fromkeys((given, tuple(sorted(given, key=lambda index: members[index].profile.file_bytes))))


def _placed(
    members: Sequence[Member], order: Sequence[int], rig: Rig, planner: Planner, *, by_options: bool
) -> dict[int, Candidate] | None:
    """Each member's placement, found in ``order``; ``None`` where one of them has no room, or would have another unloaded."""
    placed: dict[int, Candidate] = {}
    for index in order:
        member = members[index]
        own_reserve = member.request.reserve_bytes or (0,) * len(rig.gpus)
        others = [_held(candidate, members[other]) for other, candidate in placed.items()]
        reserve = tuple(sum(bytes_) for bytes_ in zip(own_reserve, *others, strict=True))
        plan = planner(member.profile, rig, replace(member.request, reserve_bytes=reserve))
        for candidate in (plan.chosen, *alone(plan)):
            on_gpus = candidate.placement.kind in ("solo", "split") and candidate.fits
            if on_gpus and _in_peace(members, {**placed, index: candidate}, rig, by_options=by_options):
                placed[index] = candidate
                break
        else:
            return None
    return placed


def _in_peace(members: Sequence[Member], placed: Mapping[int, Candidate], rig: Rig, *, by_options: bool) -> bool:
    """Whether each could be loaded last without Ollama unloading another one for it."""
    for index, candidate in placed.items():
        others = [_held(other, members[at]) for at, other in placed.items() if at != index]
        left = [gpu.free_bytes - sum(taken) for gpu, *taken in zip(rig.gpus, *others, strict=True)]
        beside = replace(rig, gpus=tuple(replace(gpu, free_bytes=free) for gpu, free in zip(rig.gpus, left, strict=True)))
        gpus = candidate.placement.order if by_options and candidate.placement.kind == "solo" else None
        if others and makes_room(members[index].profile, beside, members[index].request, gpus):
            return False
    return True


def _held(candidate: Candidate, member: Member) -> tuple[int, ...]:
    """Bytes that a member takes on each GPU, with the margin that plans beside it leave."""
    totals = (device.total_bytes for device in candidate.memory.devices)
    return tuple(total and total + member.request.margin_bytes for total in totals)
