"""Compute weighting: how strong each GPU is beside the others, for the boost algorithm.

The boost algorithm is that of the r/LocalLLaMA post "Heterogeneous GPU Weighting & Layer Splitting": free memory is weighted
by each GPU's share of the compute power, so that the stronger one is filled first. Functions that compare take all GPUs of
a rig, since what raw power is measured in depends on what is known about every one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.hardware import Gpu

BOOST_MIN, BOOST_MAX = 1.0, 2.0
"""Range of the boost factor, a pure number (``OLLAMA_SCHED_COMPUTE_BOOST``): 1.0 weighs nothing."""

GB = 10**9
"""Bytes of the boost algorithm's gigabyte. Decimal: an RTX 5090 with 31 500 MiB (33.03 GB) free and its 6 GB reserve has 27.0 GB
left, which is the figure that the algorithm states; binary ones would leave 26.6 GB."""

COMPUTE_TIERS: tuple[tuple[tuple[int, int], float], ...] = (
    ((10, 0), 1.6),  # Blackwell
    ((9, 0), 1.4),  # Hopper
    ((8, 9), 1.2),  # Ada
    ((8, 0), 1.0),  # Ampere
    ((7, 0), 0.8),  # Volta, Turing: the first with tensor cores
    ((6, 0), 0.6),  # Pascal
)
"""``(lowest compute capability, weight)`` of each tier. The boost algorithm gives the range 0.5 … 1.6; the steps are NVIDIA's
architectures by their compute capability (CUDA C++ Programming Guide, "Compute Capabilities"), with Ampere as 1."""

LOWEST_TIER_WEIGHT = 0.5
"""Weight of a GPU older than every tier, or of unknown compute capability."""

GRAPH_OVERHEADS: tuple[tuple[tuple[int, int], int], ...] = (((10, 0), 6 * GB), ((8, 0), 4 * GB))
"""``(lowest compute capability, reserve in bytes)``; from the boost algorithm. Newer cards run with larger batches and graphs."""

LOWEST_GRAPH_OVERHEAD_BYTES = 2 * GB
"""The reserve of all other GPUs, those of unknown compute capability with them; from the boost algorithm."""


def raw_powers(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """The raw power of each GPU: ``SM count · clock``, in SM·MHz; where that can't tell them apart ``100·major + minor``.

    The compute capability takes over for *all* GPUs (the two scales don't compare) when the products are equal, or when one
    is unknown and every compute capability is known. Where one lacks both figures, the products stand as far as
    they are known (else the compute capabilities), and a GPU without one gets the least that is known: a card about which
    nothing is known is never taken for the strongest. Nothing known at all: 1 each.
    """
    products = [gpu.sm_count * gpu.clock_mhz if gpu.sm_count and gpu.clock_mhz else None for gpu in gpus]
    generations = [
        100 * gpu.compute_capability[0] + gpu.compute_capability[1] if gpu.compute_capability else None for gpu in gpus
    ]
    if len(set(products)) > 1 and None not in products:
        return _filled(products)
    if None not in generations:
        return _filled(generations)
    return _filled(products if any(products) else generations)


def _filled(figures: Sequence[int | None]) -> tuple[int, ...]:
    least = min((figure for figure in figures if figure), default=1)
    return tuple(figure or least for figure in figures)


def power_shares(powers: Sequence[float]) -> tuple[float, ...]:
    """``share_i = raw_i / Σ raw``, pure numbers that sum to 1, of the GPUs that are to share a model."""
    total = sum(powers)
    return tuple(power / total for power in powers)


def compute_capacities(powers: Sequence[float], boost: float) -> tuple[float, ...]:
    """``capacity_i = share_i · boost + (1 − share_i)``: the factors that free memory is weighted by, from 1 to ``boost``.

    Raises ``ValueError`` where ``boost`` is not between ``BOOST_MIN`` and ``BOOST_MAX``.
    """
    if not BOOST_MIN <= boost <= BOOST_MAX:
        raise ValueError(f"the boost {boost} is not between {BOOST_MIN} and {BOOST_MAX}")
    return tuple(share * boost + (1 - share) for share in power_shares(powers))


def gpu_compute_cost(gpu: Gpu) -> float:
    """The compute tier as a weight from 0.5 to 1.6: what a GB on this GPU is worth beside one on an Ampere card."""
    capability = gpu.compute_capability or (0, 0)
    return next((weight for lowest, weight in COMPUTE_TIERS if capability >= lowest), LOWEST_TIER_WEIGHT)


def gpu_minimum_graph_overhead(gpu: Gpu) -> int:
    """Bytes kept free for graph and runtime: 6 GB from compute capability 10 on, 4 GB from 8 on, else 2 GB (decimal)."""
    capability = gpu.compute_capability or (0, 0)
    return next((reserve for lowest, reserve in GRAPH_OVERHEADS if capability >= lowest), LOWEST_GRAPH_OVERHEAD_BYTES)


def highest_compute_tier(gpus: Sequence[Gpu]) -> float:
    """The greatest ``gpu_compute_cost`` among ``gpus``. Raises ``ValueError`` where there are none."""
    return max(gpu_compute_cost(gpu) for gpu in gpus)


def by_compute_power(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """The indices of ``gpus``, strongest first: discrete before integrated, then compute tier, then raw power.

    Equally strong: the smaller UUID first, then the smaller index. Free memory has no say, so the order stays as it is
    while memory comes and goes.
    """
    strengths = _strengths(gpus)
    return tuple(sorted(range(len(gpus)), key=lambda i: (tuple(-s for s in strengths[i]), gpus[i].uuid, i)))


def is_better_compute(gpus: Sequence[Gpu], one: int, other: int) -> bool:
    """Whether GPU ``one`` is truly stronger than ``other``, both indices into ``gpus``, as ``by_compute_power`` compares."""
    strengths = _strengths(gpus)
    return strengths[one] > strengths[other]


def _strengths(gpus: Sequence[Gpu]) -> list[tuple[bool, float, int]]:
    return [(not gpu.integrated, gpu_compute_cost(gpu), power) for gpu, power in zip(gpus, raw_powers(gpus), strict=True)]


def best_gpu_for_pcie(gpus: Sequence[Gpu], usable_bytes: Sequence[int], required_bytes: int) -> int | None:
    """The GPU most able to take a load alone, so that no hidden state crosses PCIe; ``None`` where none holds ``required_bytes``.

    Of the GPUs whose ``usable_bytes`` (free bytes less the reserve) are enough, the strongest; among equally strong ones
    that with the faster PCIe link (it loads sooner), then with more usable bytes, then the order of ``by_compute_power``.
    """
    strengths = _strengths(gpus)
    able = [i for i in by_compute_power(gpus) if usable_bytes[i] >= required_bytes]
    return max(able, key=lambda i: (strengths[i], _pcie_rate(gpus[i]), usable_bytes[i]), default=None)


def _pcie_rate(gpu: Gpu) -> int:
    """Lanes times the rate of one, in units of half a first-generation lane; each generation doubles it. Unknown is 0."""
    return gpu.pcie_width * 2**gpu.pcie_generation if gpu.pcie_width and gpu.pcie_generation else 0
