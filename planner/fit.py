"""Layers onto GPUs by memory: Ollama's runner-era ``greedyFit`` and ``findBestFit`` (``llm/server.go``, 0.11.5 to 0.24).

Both the stock baseline and the boost algorithm rest on these functions; they differ in the devices that they pass in: in
which order, with which bytes, and how many at a time. Costs are bytes (weights + KV) of each repeating layer in order, the
output layer last. Layers are handed out from the last to the first, so what does not fit is always the lowest layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

CAPACITY_PRECISION = 1e-6
"""Width at which the bisection of the capacity factor stops, a pure number (``findBestFit`` in ``llm/server.go``)."""

FORCED_CAPACITY = 1000.0
"""Capacity factor up to which stock pretends to have memory when ``num_gpu`` asks for layers (``findBestFit``)."""

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

    def budget_bytes(self, factor: float) -> int:
        """``min(⌊weighted · factor⌋, ceiling)`` in bytes."""
        weighted = int(self.weighted_bytes * factor)
        return weighted if self.ceiling_bytes is None else min(weighted, self.ceiling_bytes)


def placed(assignment: Assignment) -> int:
    """Layers on any GPU, the output layer counted."""
    return len(assignment) - assignment.count(None)


def greedy_fit(
    costs: Sequence[int], devices: Sequence[Device], factor: float = 1.0, *, requested: int | None = None
) -> Assignment:
    """Hand out layers from the last to the first, to ``devices`` in the order given; stock's ``greedyFit``.

    A device takes layers while the next one fits into what is left of ``budget_bytes(factor)``; then the next device's
    turn comes and it is not asked again. ``requested`` stops after so many layers. Stock passes the device with the least
    memory first; the boost algorithm above 1.0 the strongest first.
    """
    return _owners(len(costs), devices, _ends(_sums(costs), devices, factor, requested))


def _sums(costs: Sequence[int]) -> tuple[int, ...]:
    """``sums[k]``: bytes of the ``k`` highest layers."""
    return tuple(accumulate(reversed(costs), initial=0))


def _ends(sums: Sequence[int], devices: Sequence[Device], factor: float, requested: int | None) -> list[int]:
    """How many layers, from the highest, are placed after each device has taken its share."""
    most = len(sums) - 1 if requested is None else min(requested, len(sums) - 1)
    ends, end = [], 0
    for device in devices:
        if end < most:
            end = min(bisect_right(sums, sums[end] + device.budget_bytes(factor), end) - 1, most)
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
    low, high = 0.0, max_factor
    sums = _sums(costs)
    best = _ends(sums, devices, high, requested)
    most = best[-1] if best else 0
    while most and high - low > CAPACITY_PRECISION:
        middle = (low + high) / 2
        ends = _ends(sums, devices, middle, requested)
        if ends[-1] == most:
            high, best = middle, ends
        else:
            low = middle
    return _owners(len(costs), devices, best)


def find_best_fit(
    costs: Sequence[int], groups: Iterable[Sequence[Device]], *, requested: int | None = None, force: bool = False
) -> Assignment:
    """The balanced fit on the first of ``groups`` that holds everything, or on the last one where none does.

    ``groups`` are tried in turn: one GPU, then two, … (``stock_groups``). With ``requested`` (the option ``num_gpu``) so
    many layers are enough; ``force`` then lets the last group pretend to have ``FORCED_CAPACITY`` times its memory, as stock
    does.
    """
    enough = len(costs) if requested is None else min(requested, len(costs))
    best: Assignment = (None,) * len(costs)
    tried = tuple(groups)
    for number, group in enumerate(tried, start=1):
        forced = force and requested is not None and number == len(tried)
        best = balanced_fit(costs, group, requested=requested, max_factor=FORCED_CAPACITY if forced else 1.0)
        if placed(best) >= enough:
            break
    return best


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
