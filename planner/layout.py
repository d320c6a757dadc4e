"""The boost algorithm: layers onto unequal GPUs, the strongest filled first, with the output layer on it.

``Layouts.at`` puts the steps together: weigh memory by compute power (``planner.power``), fit (``planner.fit``), protect
the output layer and move heavy layers (``planner.balance``), bring the result into contiguous runs (``planner.contiguous``).
The algorithm is that of the r/LocalLLaMA post "Heterogeneous GPU Weighting & Layer Splitting", with one rule put above it: no
device is given more bytes than it has free, less its reserve, whatever the boost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from planner.balance import device_cost, protect_output_layer, redistribute_heavy_layers, target_imbalance
from planner.contiguous import is_contiguous, nearest_contiguous, to_placement
from planner.costs import LayerCosts
from planner.fit import Assignment, Device, balanced_fit, most_placed, placed, stock_fit, stock_groups
from planner.hardware import Gpu, gpu_names
from planner.placement import Placement
from planner.power import (
    BOOST_MAX,
    BOOST_MIN,
    best_gpu_for_pcie,
    by_compute_power,
    compute_capacities,
    gpu_minimum_graph_overhead,
    power_shares,
    raw_powers,
)
from planner.units import GIB

MOST_GROUPS = 64
"""Groups of several GPUs that the boost algorithm tries: all of them for up to six GPUs."""


class Layouts:
    """Where the boost algorithm puts ``model`` on ``gpus``, which are of one library and in the rig's order, at any boost.

    ``reserves_bytes`` are kept free on each GPU; if not given, ``gpu_minimum_graph_overhead`` of each. No device is given more
    than its free bytes less its reserve.
    """

    def __init__(self, model: LayerCosts, gpus: Sequence[Gpu], reserves_bytes: Sequence[int] | None = None) -> None:
        self.model = model
        self.gpus = gpus
        self.powers = raw_powers(gpus)
        reserves = [gpu_minimum_graph_overhead(gpu) for gpu in gpus] if reserves_bytes is None else reserves_bytes
        self.usable = [max(gpu.free_bytes - reserve, 0) for gpu, reserve in zip(gpus, reserves, strict=True)]
        self._ranked = by_compute_power(gpus)
        self._alone: dict[int, int | None] = {}
        self._corrected: dict[tuple[Assignment, tuple[int, ...]], tuple[Assignment, Assignment, bool, Assignment]] = {}

    def at(self, boost: float) -> Layout:
        """The layout at ``boost``.

        1.0 is Ollama's runner-era layout: as few GPUs as hold everything, those with the most memory, in proportion to it, the
        one with the least first; where not everything fits, the output layer stays on the CPU. Above 1.0: the strongest GPU
        that holds everything alone, else the strongest two that do, …, filled strongest first in proportion to memory times
        compute capacity; then ``protect_output_layer`` and ``redistribute_heavy_layers``. What fits nowhere stays on the CPU,
        the lowest layers first; the output layer only where it fits no GPU.

        Raises ``ValueError`` where ``boost`` is not between 1.0 and 2.0.
        """
        if not BOOST_MIN <= boost <= BOOST_MAX:
            raise ValueError(f"the boost {boost} is not between {BOOST_MIN} and {BOOST_MAX}")
        model = self.model
        if boost == BOOST_MIN:
            fit = stock_fit(model.all_bytes, stock_groups(self._device(gpu, 1.0) for gpu in range(len(self.gpus))))
            return Layout(layouts=self, boost=boost, group=(), fit=fit, protected=fit, balanced=fit, final=fit)
        fit, group = self._fit(model.all_bytes, boost)
        if fit[-1] is None:  # no GPU holds the output layer, and nothing is handed out before it
            fit, group = self._fit(model.layers_bytes, boost)
            fit = (*fit, None)
        if (fit, group) not in self._corrected:
            self._corrected[fit, group] = self._correct(fit, group)
        protected, balanced, taken_back, final = self._corrected[fit, group]
        return Layout(
            layouts=self,
            boost=boost,
            group=group,
            fit=fit,
            protected=protected,
            balanced=balanced,
            taken_back=taken_back,
            final=final,
        )

    def _correct(self, fit: Assignment, group: tuple[int, ...]) -> tuple[Assignment, Assignment, bool, Assignment]:
        """What the steps after the fit make of it; many boosts have the same."""
        model, usable = self.model, self.usable
        protected = protect_output_layer(fit, model, usable, group)
        balanced = redistribute_heavy_layers(protected, model, usable, group, self.powers)
        final = nearest_contiguous(balanced, model.all_bytes, usable)
        if placed(final) >= placed(protected):
            return protected, balanced, False, final
        final = nearest_contiguous(protected, model.all_bytes, usable)
        return protected, final, True, final

    def _fit(self, costs: Sequence[int], boost: float) -> tuple[Assignment, tuple[int, ...]]:
        """The fit on the first group that holds everything, else on all GPUs; and the group, strongest first."""
        group: tuple[int, ...] = ()
        devices: list[Device] = []
        for group in self._groups(sum(costs)):
            capacities = compute_capacities([self.powers[gpu] for gpu in group], boost)
            devices = [self._device(gpu, capacity) for gpu, capacity in zip(group, capacities, strict=True)]
            if most_placed(costs, devices) == len(costs):
                break
        return balanced_fit(costs, devices), group

    def _groups(self, total_bytes: int) -> Iterator[tuple[int, ...]]:
        """The best GPU alone, then two, … of those whose memory may hold it, the strongest of each number first; all at last.

        Of several no more than ``MOST_GROUPS``: sixteen GPUs have 65,000, and none may hold layers that are as large as a card.
        """
        if total_bytes not in self._alone:
            self._alone[total_bytes] = best_gpu_for_pcie(self.gpus, self.usable, total_bytes)
        if (alone := self._alone[total_bytes]) is not None:
            yield (alone,)
        ranked, usable = self._ranked, self.usable
        several = (group for count in range(2, len(ranked)) for group in combinations(ranked, count))
        yield from islice((group for group in several if sum(usable[gpu] for gpu in group) >= total_bytes), MOST_GROUPS)
        yield ranked

    def _device(self, gpu: int, capacity: float) -> Device:
        return Device(
            gpu=gpu,
            weighted_bytes=int(self.usable[gpu] * capacity),
            ceiling_bytes=self.usable[gpu],
            integrated=self.gpus[gpu].integrated,
            uuid=self.gpus[gpu].uuid,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What each step made of the one before: ``fit`` on ``group``, strongest first, ``protected``, ``balanced``, and ``final``.

    ``taken_back``: heavy layers did not move, since then not as many would have fit in contiguous runs.
    """

    layouts: Layouts
    boost: float
    group: tuple[int, ...]
    fit: Assignment
    protected: Assignment
    balanced: Assignment
    taken_back: bool = False
    final: Assignment

    @property
    def placement(self) -> Placement:
        """The last step's, as llama.cpp can execute it."""
        return to_placement(self.final, n_gpus=len(self.layouts.gpus))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is so, in the order of the steps."""
        model, gpus, usable = self.layouts.model, self.layouts.gpus, self.layouts.usable
        group, powers, names = self.group, self.layouts.powers, gpu_names(gpus)
        if self.boost == BOOST_MIN:
            first = "boost 1: in proportion to memory, the GPU with the least first, as Ollama's runner era does"
            return first, _fit_reason(self.fit, model, names, usable)
        reasons = []
        if len(group) > 1:
            shares = power_shares([powers[i] for i in group])
            capacities = compute_capacities([powers[i] for i in group], self.boost)
            weights = (
                f"{names[i]} {s:.0%} of the power, memory ×{c:.2f}" for i, s, c in zip(group, shares, capacities, strict=True)
            )
            reasons.append(f"boost {self.boost:g}: the strongest GPU first, memory weighted by power ({'; '.join(weights)})")
        reasons.append(_fit_reason(self.fit, model, names, usable))
        if self.protected != self.fit:
            reasons.append(f"the output layer goes to {names[group[0]]}, the strongest GPU")
        elif group and self.fit[-1] != group[0]:
            room = f"{usable[group[0]] / GIB:.1f} of {model.output_bytes / GIB:.1f} GiB"
            reasons.append(f"the output layer does not fit on {names[group[0]]}, the strongest GPU, which has {room}")
        if self.taken_back:
            reasons.append("heavy layers stay where they are: moved, and then in contiguous runs, not as many would fit")
        if self.balanced != self.protected:
            reasons.append(_move_reason(self.protected, self.balanced, model, names, group, powers))
        if not is_contiguous(self.balanced):
            changed = sum(one != other for one, other in zip(self.final, self.balanced, strict=True))
            reasons.append(f"the layers interleaved: {changed} changed GPU to bring each GPU's layers into one contiguous run")
        return tuple(reasons)


def create_layout(model: LayerCosts, gpus: Sequence[Gpu], *, boost: float) -> Layout:
    """The layout of ``Layouts`` at one boost, with the boost algorithm's own reserves."""
    return Layouts(model, gpus).at(boost)


def _fit_reason(fit: Assignment, model: LayerCosts, names: Sequence[str], usable: Sequence[int]) -> str:
    size = f"{sum(model.all_bytes) / GIB:.1f} GiB"
    if placed(fit) == len(fit):
        holders = " + ".join(name for gpu, name in enumerate(names) if gpu in fit)
        return f"all {size} fit on {holders}"
    left = [f"the {fit[:-1].count(None)} lowest layers"] if None in fit[:-1] else []
    left += ["the output layer"] if fit[-1] is None else []
    return f"{size} do not fit in the {sum(usable) / GIB:.1f} GiB that the GPUs can give: {' and '.join(left)} stay on the CPU"


def _move_reason(
    before: Assignment, after: Assignment, model: LayerCosts, names: Sequence[str], group: Sequence[int], powers: Sequence[float]
) -> str:
    moved = [owner for owner, now in zip(before, after, strict=True) if owner != now]
    sources = [gpu for gpu in group if gpu in moved]
    strongest, weakest = group[0], sources[-1]
    costs = " to ".join(f"{device_cost(after, model, gpu) / GIB:.1f}" for gpu in (strongest, weakest))
    return (
        f"{len(moved)} heavy layers move from {' and '.join(names[gpu] for gpu in sources)} to {names[strongest]}: "
        f"their cost is {costs} GiB now, {target_imbalance(powers, strongest, weakest):.2f} to 1 the target"
    )
