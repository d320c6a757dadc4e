"""Whether a plan turned out slower than stock: measured tokens per second of answers, against those of stock's placement."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import median

from planner.placement import Placement

LEAST_ANSWERS = 3
"""Answers of each side below which nothing is decided."""

LOSS = 0.05
"""Part of stock's speed that a plan must lose to be given up: less is not worth a reload."""

CERTAINTY = 2.0
"""Standard errors by which it must lose: a plan as fast as stock is given up in fewer than one case of forty."""

MAD_TO_DEVIATION = 1.4826
"""Standard deviations in a median absolute deviation of normal noise."""

MEDIAN_ERROR = 1.2533
"""The standard error of a median in standard errors of a mean, of normal noise: sqrt(pi / 2)."""

SAME_SHARE = 0.05
"""Part of the layers by which two splits may differ on each device and still count as one: free memory moves stock's cut."""


def is_slower(plan: Sequence[float], stock: Sequence[float]) -> bool:
    """Whether the answers of the plan, in tokens per second, are slower than stock's by ``LOSS`` and beyond their noise."""
    if min(len(plan), len(stock)) < LEAST_ANSWERS:
        return False
    loss = median(stock) * (1 - LOSS) - median(plan)
    return loss > 0 and median(stock) - median(plan) > CERTAINTY * sqrt(_variance(plan) + _variance(stock))


def is_same(one: Placement, other: Placement) -> bool:
    """Whether two placements of one model on one rig are the same but for the layers that free memory moves to and fro."""
    slack = max(1, round(one.n_layers * SAME_SHARE))
    return (
        one.order == other.order
        and one.kind == other.kind
        and one.output_gpu == other.output_gpu
        and all(abs(a - b) <= slack for a, b in zip(one.shares, other.shares, strict=True))
        and abs(len(one.cpu_experts) - len(other.cpu_experts)) <= slack
    )


def _variance(values: Sequence[float]) -> float:
    """Of the median of ``values``, by their median absolute deviation."""
    middle = median(values)
    deviation = MAD_TO_DEVIATION * median(abs(value - middle) for value in values)
    return (MEDIAN_ERROR * deviation) ** 2 / len(values)
