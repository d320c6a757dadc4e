"""The boost algorithm's two corrections of a fit: the output layer and the heaviest layers go to the strongest GPU.

Both take and return an ``Assignment``; neither gives a GPU more than its ``usable_bytes``. Layers may interleave afterwards
(``planner.contiguous`` mends that).
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.costs import LayerCosts
from planner.fit import Assignment

OUTPUT_COST_FACTOR = 2
"""How many times its bytes the output layer counts in a device's cost, a pure number; from the boost algorithm."""

BALANCE_TOLERANCE = 0.9
"""The part of the target imbalance that is near enough to it, a pure number; from the boost algorithm."""


def protect_output_layer(
    assignment: Assignment, model: LayerCosts, usable_bytes: Sequence[int], ranked: Sequence[int]
) -> Assignment:
    """The output layer on ``ranked[0]``, the strongest of the GPUs that share the model (``ranked``: strongest first).

    Its lowest layers make room where they must: each goes to the GPU that gave up the output layer, else to the strongest
    that has room, else to the CPU. Unchanged where the output layer alone is larger than the strongest GPU's
    ``usable_bytes``.
    """
    if not ranked or assignment[-1] == ranked[0] or model.output_bytes > usable_bytes[ranked[0]]:
        return assignment
    strongest, former = ranked[0], assignment[-1]
    owners = [*assignment[:-1], strongest]
    held = _held(owners, model, len(usable_bytes))
    room = [usable - taken for usable, taken in zip(usable_bytes, held, strict=True)]
    takers = [gpu for gpu in dict.fromkeys((former, *ranked[1:])) if gpu is not None]
    for layer, cost in enumerate(model.layers_bytes):
        if room[strongest] >= 0:
            break
        if owners[layer] == strongest:
            owners[layer] = next((gpu for gpu in takers if room[gpu] >= cost), None)
            room[strongest] += cost
            if (taker := owners[layer]) is not None:
                room[taker] -= cost
    return tuple(owners)


def redistribute_heavy_layers(
    assignment: Assignment, model: LayerCosts, usable_bytes: Sequence[int], ranked: Sequence[int], powers: Sequence[float]
) -> Assignment:
    """Layers moved from the weakest GPU to the strongest until their costs are as unequal as their power.

    ``cost_i = Σ layer bytes + 2 · output bytes`` (``device_cost``); ``target = raw_strongest / (raw_weakest + 1)``
    (``target_imbalance``). While ``cost_strongest / cost_weakest < 0.9 · target`` the layer with the largest FFN (equal: the
    highest) of those that fit moves; none fits: the strongest is full. The weakest is the last of ``ranked`` that holds
    repeating layers; when it has given up its last one, the next takes its place.
    """
    owners = [*assignment]
    if not ranked:
        return assignment
    strongest = ranked[0]
    held = _held(owners, model, len(usable_bytes))
    room = usable_bytes[strongest] - held[strongest]
    costs = {gpu: held[gpu] + ((OUTPUT_COST_FACTOR - 1) * model.output_bytes if owners[-1] == gpu else 0) for gpu in ranked}
    for weakest in reversed(ranked[1:]):
        target = BALANCE_TOLERANCE * target_imbalance(powers, strongest, weakest)
        unequal = costs[strongest] >= target * costs[weakest]
        movable = [] if unequal else [i for i, owner in enumerate(owners[:-1]) if owner == weakest]
        for heaviest in sorted(movable, key=lambda i: (-model.ffn_bytes[i], -i)):
            if costs[strongest] >= target * costs[weakest]:
                return tuple(owners)
            moved = model.layers_bytes[heaviest]
            if moved <= room:
                owners[heaviest] = strongest
                room -= moved
                costs[strongest] += moved
                costs[weakest] -= moved
        if weakest in owners[:-1]:
            break
    return tuple(owners)


def device_cost(assignment: Sequence[int | None], model: LayerCosts, gpu: int) -> int:
    """``Σ layer bytes + 2 · output bytes`` of what ``gpu`` holds: the output layer is worth two of its size."""
    layers = sum(cost for cost, owner in zip(model.layers_bytes, assignment[:-1], strict=True) if owner == gpu)
    return layers + (OUTPUT_COST_FACTOR * model.output_bytes if assignment[-1] == gpu else 0)


def target_imbalance(powers: Sequence[float], strongest: int, weakest: int) -> float:
    """``raw_strongest / (raw_weakest + 1)``: how many times the weakest GPU's cost the strongest should have."""
    return powers[strongest] / (powers[weakest] + 1)


def _held(owners: Sequence[int | None], model: LayerCosts, n_gpus: int) -> list[int]:
    """Bytes that each GPU holds."""
    held = dict.fromkeys((*range(n_gpus), None), 0)
    for cost, owner in zip(model.all_bytes, owners, strict=True):
        held[owner] += cost
    return [held[gpu] for gpu in range(n_gpus)]
