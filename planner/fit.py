"""Layers onto GPUs by memory: Ollama's runner-era ``greedyFit`` and ``findBestFit`` (``llm/server.go``, 0.11.5 to 0.24).

Both the stock baseline and the boost algorithm rest on these functions; they differ in the devices that they pass in: in
which order, with which bytes, and how many at a time. Costs are bytes (weights + KV) of each repeating layer in order, the
output layer last. Layers are handed out from the last to the first, so what does not fit is always the lowest layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

CAPACITY_PRECISION = 1e-6
"""Width at which the bisection of the capacity factor stops, a pure number (``findBestFit`` in ``llm/server.go``)."""

FORCED_CAPACITY = 1000.0
"""Capacity factor up to which stock pretends to have memory when ``num_gpu`` asks for layers (``findBestFit``)."""

ROUNDING = 1e-9
"""A pure number, far more than what is lost where bytes are divided and multiplied as floats."""

Assignment = tuple[int | None, ...]
"""The GPU of each layer, by its index in the rig, ``None`` for the CPU; the output layer is the last item."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU as the fit sees it; ``gpu`` is its index in the rig.

    ``weighted_bytes`` is the memory that capacity factors multiply: free bytes less the reserve, times the compute
    capacity in the boost algorithm. ``ceiling_bytes`` is what the device may really be given, whatever the factor;
    ``None`` sets no ceiling (stock has none: its factor stays at or below 1 unless ``num_gpu`` forces layers).
    ``integrated`` devices are filled only with what the discrete ones leave. ``uuid`` breaks ties.
    """

    gpu: int
    weighted_bytes: int
    ceiling_bytes: int | None = None
    integrated: bool = False
    uuid: str = ""


def placed(assignment: Assignment) -> int:
    """Layers on any GPU, the output layer counted."""
    return len(assignment) - assignment.count(None)


def greedy_fit(
    costs: Sequence[int], devices: Sequence[Device], factor: float = 1.0, *, requested: int | None = None
) -> Assignment:
    """Hand out layers from the last to the first, to ``devices`` in the order given; stock's ``greedyFit``.

    A device takes layers while the next one fits into what is left of ``min(⌊weighted · factor⌋, ceiling)`` bytes; then the next
    device's turn comes and it is not asked again. ``requested`` stops after so many layers. Stock passes the device with the
    least memory first; the boost algorithm above 1.0 the strongest first.
    """
    sums = _sums(costs)
    return _owners(len(costs), devices, _ends(sums, _budgets(devices, sums), factor, requested))


def _sums(costs: Sequence[int]) -> tuple[int, ...]:
    """``sums[k]``: bytes of the ``k`` highest layers."""
    return tuple(accumulate(reversed(costs), initial=0))


def _budgets(devices: Sequence[Device], sums: Sequence[int]) -> list[tuple[int, int]]:
    """The weighted bytes of each device, and its ceiling: all bytes of the model where it has none."""
    return [(one.weighted_bytes, sums[-1] if one.ceiling_bytes is None else one.ceiling_bytes) for one in devices]


def _ends(sums: Sequence[int], budgets: Sequence[tuple[int, int]], factor: float, requested: int | None) -> list[int]:
    """How many layers, from the highest, are placed after each device has taken its share."""
    stop = len(sums) if requested is None else min(requested + 1, len(sums))
    ends, end = [], 0
    for weighted, ceiling in budgets:
        room = int(weighted * factor)
        end = bisect_right(sums, sums[end] + min(room, ceiling), end, stop) - 1
        ends.append(end)
    return ends


def _owners(n: int, devices: Sequence[Device], ends: Sequence[int]) -> Assignment:
    owners: list[int | None] = []
    start = 0
    for device, end in zip(devices, ends, strict=True):
        owners += [device.gpu] * (end - start)
        start = end
    return (*[None] * (n - start), *reversed(owners))


def balanced_fit(
    costs: Sequence[int], devices: Sequence[Device], *, requested: int | None = None, max_factor: float = 1.0
) -> Assignment:
    """The greedy fit at the smallest capacity factor that still places as many layers as ``max_factor``.

    Bisected to ``CAPACITY_PRECISION``, as stock's ``findBestFit`` does; the smaller the factor, the more evenly (in
    proportion to ``weighted_bytes``) the layers lie. Discrete and integrated devices are balanced each among themselves,
    the discrete ones first (``ByPerformance`` in ``ml/device.go``). Stock counts in 32-bit floats, this in 64-bit ones: a
    layer that fits to the byte can come out one device further.
    """
    owners: Assignment = (None,) * len(costs)
    unplaced = len(costs)
    wanted = requested
    for integrated in (False, True):
        kind = [device for device in devices if device.integrated == integrated]
        fit = _smallest_factor_fit(costs[:unplaced], kind, wanted, max_factor)
        owners = fit + owners[unplaced:]
        unplaced -= placed(fit)
        wanted = None if wanted is None else wanted - placed(fit)
    return owners


def _smallest_factor_fit(costs: Sequence[int], devices: Sequence[Device], requested: int | None, max_factor: float) -> Assignment:
    if not devices:
        return (None,) * len(costs)
    low, high = 0.0, max_factor
    sums = _sums(costs)
    budgets = _budgets(devices, sums)
    best = _ends(sums, budgets, high, requested)
    most = best[-1]
    same_from = _factor_for(sums, budgets, best)
    while most and high - low > CAPACITY_PRECISION:
        middle = (low + high) / 2
        if middle >= same_from:
            high = middle
            continue
        ends = _ends(sums, budgets, middle, requested)
        if ends[-1] == most:
            high, best, same_from = middle, ends, _factor_for(sums, budgets, ends)
        else:
            low = middle
    return _owners(len(costs), devices, best)


def _factor_for(sums: Sequence[int], budgets: Sequence[tuple[int, int]], ends: Sequence[int]) -> float:
    """The factor from which on, up to one that gave ``ends``, every one gives them: each device has room for its share."""
    shares = zip(budgets, pairwise((0, *ends)), strict=True)
    needed = ((sums[end] - sums[start]) / weighted for (weighted, _), (start, end) in shares if end > start and weighted)
    return max(needed, default=0.0) * (1 + ROUNDING)


def most_placed(costs: Sequence[int], devices: Iterable[Device], *, requested: int | None = None) -> int:
    """How many layers ``balanced_fit`` places, which takes longer to say where."""
    sums = _sums(costs)
    discrete_first = sorted(devices, key=lambda device: device.integrated)
    return max(_ends(sums, _budgets(discrete_first, sums), 1.0, requested), default=0)


def find_best_fit(
    costs: Sequence[int], groups: Sequence[Sequence[Device]], *, requested: int | None = None, force: bool = False
) -> Assignment:
    """The balanced fit on the first of ``groups`` that holds everything, or on the last one where none does.

    ``groups`` are tried in turn: one GPU, then two, … (``stock_groups``). With ``requested`` (the option ``num_gpu``) so
    many layers are enough; ``force`` then lets the last group pretend to have ``FORCED_CAPACITY`` times its memory, as stock
    does.
    """
    if not groups:
        return (None,) * len(costs)
    enough = len(costs) if requested is None else min(requested, len(costs))
    *smaller, last = groups
    for group in smaller:
        if most_placed(costs, group, requested=requested) >= enough:
            return balanced_fit(costs, group, requested=requested)
    forced = force and requested is not None
    return balanced_fit(costs, last, requested=requested, max_factor=FORCED_CAPACITY if forced else 1.0)


def stock_fit(
    costs: Sequence[int], groups: Sequence[Sequence[Device]], *, requested: int | None = None, force: bool = False
) -> Assignment:
    """``find_best_fit``, and where not every layer fits a second one without the output layer, which then stays on the CPU.

    Stock would rather leave the output layer in RAM than a repeating one, and takes the second fit whatever the first placed
    (``assignLayers`` in ``llm/server.go``), also where ``requested`` was met.
    """
    fit = find_best_fit(costs, groups, requested=requested, force=force)
    if placed(fit) == len(costs):
        return fit
    wanted = None if requested is None else min(requested, len(costs) - 1)
    return (*find_best_fit(costs[:-1], groups, requested=wanted, force=force), None)


def stock_groups(devices: Iterable[Device]) -> tuple[tuple[Device, ...], ...]:
    """One device, two, …: those with the most memory, each group with the least memory first, as stock hands out.

    Discrete devices come before integrated ones. Equal memory: the smaller UUID, then the smaller index, counts as the
    larger device.
    """
    ranked = sorted(devices, key=lambda d: (d.integrated, -d.weighted_bytes, d.uuid, d.gpu))
    return tuple(tuple(reversed(ranked[:count])) for count in range(1, len(ranked) + 1))
