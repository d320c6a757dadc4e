"""From an owner for each layer to what llama.cpp can execute: the lowest layers on the CPU, then one run on each device."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, groupby

from planner.fit import Assignment
from planner.placement import Placement


def is_contiguous(assignment: Assignment) -> bool:
    """Whether each GPU holds one run, the CPU the lowest layers, and no repeating layer follows the output layer's device."""
    runs = [gpu for gpu, _ in groupby(assignment[:-1])]
    output = assignment[-1]
    return len(runs) == len(set(runs)) and None not in runs[1:] and (output not in runs[:-1] or output is None)


def to_placement(assignment: Assignment, *, n_gpus: int) -> Placement:
    """The placement that a contiguous ``assignment`` says. Raises ``ValueError`` where it interleaves."""
    if not is_contiguous(assignment):
        raise ValueError(f"the layers of {assignment} are not in one run for each device")
    body, output = assignment[:-1], assignment[-1]
    order = tuple(gpu for gpu in dict.fromkeys(assignment) if gpu is not None)
    return Placement(
        layers=tuple(body.count(gpu) for gpu in range(n_gpus)), order=order, output_gpu=output, cpu_layers=body.count(None)
    )


def nearest_contiguous(assignment: Assignment, costs: Sequence[int], usable_bytes: Sequence[int]) -> Assignment:
    """The contiguous assignment nearest to ``assignment``, within ``usable_bytes`` of each GPU; itself where it is contiguous.

    The GPUs keep the order of their layers' mean index (equal: of their lowest layer), that of the output layer comes last.
    Of the ways to cut the layers for them, as few layers as possible stay on the CPU; then the bytes of each GPU change as
    little as possible, ``Σ |bytes_i − bytes_i before|``; then the lower devices take fewer layers. The output layer does not
    move. Raises ``ValueError`` where its device has no room for it.
    """
    if is_contiguous(assignment):
        return assignment
    body, output = assignment[:-1], assignment[-1]
    owned = {gpu: [i for i, owner in enumerate(body) if owner == gpu] for gpu in assignment if gpu is not None}
    order = sorted(owned, key=lambda gpu: (gpu == output, sum(owned[gpu]) / max(len(owned[gpu]), 1), owned[gpu][:1]))
    wanted = {gpu: sum(costs[i] for i in owned[gpu]) for gpu in order}
    limits = {gpu: usable_bytes[gpu] - (costs[-1] if gpu == output else 0) for gpu in order}
    prefix = [0, *accumulate(costs[:-1])]
    last = len(body)
    for cpu_layers in range(last + 1):
        ends: dict[int, tuple[int, tuple[int, ...]]] = {cpu_layers: (0, ())}
        for gpu in order:
            stops = (last,) if gpu == order[-1] else range(last + 1)
            ends = _extend(ends, prefix, limits[gpu], wanted[gpu], stops)
        if last in ends:
            owners: list[int | None] = [None] * cpu_layers
            start = cpu_layers
            for gpu, end in zip(order, ends[last][1], strict=True):
                owners += [gpu] * (end - start)
                start = end
            return (*owners, output)
    raise ValueError(f"GPU {output} has no room for the output layer")


def _extend(
    ends: dict[int, tuple[int, tuple[int, ...]]], prefix: Sequence[int], limit_bytes: int, wanted_bytes: int, stops: Sequence[int]
) -> dict[int, tuple[int, tuple[int, ...]]]:
    """From the best ``(deviation, cuts)`` that ends at each layer to those with one device more, which ends at a stop."""
    longer: dict[int, tuple[int, tuple[int, ...]]] = {}
    for start, (deviation, cuts) in ends.items():
        for end in stops[bisect_left(stops, start) :]:
            run_bytes = prefix[end] - prefix[start]
            if run_bytes > limit_bytes:
                break
            way = (deviation + abs(run_bytes - wanted_bytes), (*cuts, end))
            if end not in longer or way < longer[end]:
                longer[end] = way
    return longer
