"""The context frontier: how many tokens of context each kind of placement has room for, and how fast it is.

A cache grows with the context, so a model leaves the fast card at some context, and all cards at a larger one. The frontier says
where: ``32k at 33 tok/s on both, 12k at 52 tok/s on the RTX 5090 alone``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from planner.choice import ranked
from planner.hardware import Rig
from planner.profile import ModelProfile
from planner.request import Candidate, PlanRequest
from planner.search import Search
from planner.stock import default_num_ctx, libraries, settings_on

CONTEXT_STEP = 1024
"""Tokens to which the largest context is found, and the least that is looked at (llama.cpp rounds contexts up to 256)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """``num_ctx``: the most tokens of context that a kind of placement has room for; ``candidate``: it, at that context.

    Its speeds are rated like all others, with ``speed.CONTEXT_TOKENS`` in the context.
    """

    num_ctx: int
    candidate: Candidate


Tier = Callable[[Search], Candidate | None]
"""A kind of placement: the best of its kind that fits under a search's request."""


LEAST_CONTEXT = 4096
"""Tokens of context that a placement must have room for to count as the best one: Ollama's own smallest default."""


def fitted_context(profile: ModelProfile, rig: Rig, request: PlanRequest) -> int | None:
    """The most tokens of context that the fastest placement has room for; ``None`` where nothing has room for enough.

    The fastest is that of those with room for ``LEAST_CONTEXT`` (or all that the model was trained for): a card that could hold
    a model, but hardly a prompt with it, is none. ``request.gpu``, where the model fits there, is the only placement.
    """
    least = min(LEAST_CONTEXT, profile.context_train or LEAST_CONTEXT)
    if request.gpu is not None:
        found = _largest_of(partial(_alone, request.gpu), profile, rig, request)
        if found and found.num_ctx >= least:
            return found.num_ctx
    return next((point.num_ctx for point in frontier(profile, rig, request) if point.num_ctx >= least), None)


def frontier(profile: ModelProfile, rig: Rig, request: PlanRequest) -> tuple[FrontierPoint, ...]:
    """The largest context on each GPU alone, on the two fastest, three, …, and with a rest in RAM; the fastest first.

    ``request.num_ctx`` has no say: contexts go up to the trained one (where that is unknown, to Ollama's default for ``rig``). A
    point that has no more context than a faster one is left out, so contexts grow as speeds fall. Empty where nothing fits.

    Found by bisection to ``CONTEXT_STEP``. Where Ollama chooses the batch, and a larger one begins with a longer context, the
    context found is one at which the placement fits and ``CONTEXT_STEP`` more does not.
    """
    points = [point for tier in _tiers(rig) if (point := _largest_of(tier, profile, rig, request))]
    kept: list[FrontierPoint] = []
    for candidate in ranked((point.candidate for point in points), request.objective):
        point = next(point for point in points if point.candidate is candidate)
        if not kept or point.num_ctx > kept[-1].num_ctx:
            kept.append(point)
    return tuple(kept)


def _largest_of(tier: Tier, profile: ModelProfile, rig: Rig, request: PlanRequest) -> FrontierPoint | None:
    longest = profile.context_train or default_num_ctx(rig)

    def at(steps: int) -> FrontierPoint | None:
        num_ctx = min(steps * CONTEXT_STEP, longest)
        found = tier(Search(profile, rig, replace(request, num_ctx=num_ctx)))
        return FrontierPoint(num_ctx=num_ctx, candidate=found) if found else None

    return _largest(-(-longest // CONTEXT_STEP), at)


def _tiers(rig: Rig) -> Iterator[Tier]:
    """Each GPU alone; of each library the fastest two GPUs, three, …; layers or experts in RAM."""
    for gpu in range(len(rig.gpus)):
        yield partial(_alone, gpu)
    for group in libraries(rig):
        for count in range(2, len(group) + 1):
            yield partial(_split, group, count)
        yield partial(_in_ram, group)


def _alone(gpu: int, search: Search) -> Candidate | None:
    candidate = search.alone(gpu)
    return candidate if search.holds(candidate) else None


def _split(group: tuple[int, ...], count: int, search: Search) -> Candidate | None:
    fastest = sorted(group, key=lambda gpu: (-search.rates[gpu].decode_bytes_per_s, gpu))[:count]
    gpus = tuple(sorted(fastest))
    return search.best_split(gpus, settings_on(search.profile, search.rig, search.request, gpus))


def _in_ram(group: tuple[int, ...], search: Search) -> Candidate | None:
    settings = settings_on(search.profile, search.rig, search.request, group)
    found = search.splits(group, settings, full=False)
    return next(iter(ranked(filter(search.holds, found), "decode")), None)


def _largest(most: int, at: Callable[[int], FrontierPoint | None]) -> FrontierPoint | None:
    """What ``at`` finds at the largest number from 1 to ``most`` at which it finds anything."""
    if best := at(most):
        return best
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if point := at(middle):
            low, best = middle, point
        else:
            high = middle
    return best
