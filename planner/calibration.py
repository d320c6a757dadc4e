"""Rates of each device from the speeds of real answers: robust regression over what each placement read.

A token of an answer took ``t = Σ_d bytes_d · x_d + hops`` (``planner.speed``), where ``x_d`` is the slowness of device ``d`` in
seconds per byte; ``bytes_d`` (with those that its layers' fixed costs stand for) and ``t`` are known, ``x_d`` is sought. A prompt
took ``t = Σ_d w_d · y_d + (micro-batches − 1) · pace``, with the FLOP of a micro-batch ``w_d`` and the slowness ``y_d``.

1. Of the answers of one placement, the one of median speed speaks for all: first loads, other programs and odd prompts that
   make up less than half of them change nothing.
2. A device that ran a model alone has been measured, and its rate is exactly ``speed.solo_rates`` of that answer. Answers of the
   model that is planned for come before those of others of its class; dense models and mixtures of experts are apart, because
   they reach different parts of a card's memory rate.
3. Splits are then explained by least squares of ``log t``, with Huber's weights against outliers and one term for each device
   that holds it near where it was: closely where it ran alone, loosely (``UNMEASURED_SPREAD``) where only the card's data
   are known. What splits of one proportion cannot tell apart, so stays where it was. No slowness falls below a part of that.
4. Cards without any answer are expected to miss their predicted rates as the measured ones do on median, the host as the best
   of them does, if all are slower than predicted: what slows every card, slows the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, log
from statistics import median

from planner.hardware import Rig
from planner.observation import Observation, Run
from planner.speed import HOP_SECONDS, HOST, JAM, Calibration, gpu_rates, host_rates, pace

LEAST_DECODE_TOKENS = 32
"""Tokens of an answer below which its speed says too little: clocks still rise, and a hiccup counts for much."""

LEAST_PROMPT_TOKENS = 256
"""Tokens of a prompt below which reading it is bound by other things than operations."""

NOISE = 0.02
"""Spread of the times of one placement, relative: the measured tables repeat within 2 %."""

SPLIT_NOISE = 0.05
"""Spread of a split's time around the sum over its devices, relative: what the measured splits keep to."""

MODEL_SPREAD = 0.15
"""Spread of a device's rate between models of one class, relative: on an H200 an 8B model reaches 30 % less than one of 32B."""

UNMEASURED_SPREAD = 1.0
"""Spread of a device's slowness around what its data predict, relative: power limits, drivers, narrow slots, other programs."""

HUBER = 1.5
"""Spreads from which on a residual counts linearly, so that no outlier has its way (Huber 1964 has 1.345 for 95 % efficiency)."""

LOWEST_SLOWNESS = 0.1
"""Part of its starting value below which no slowness is fitted: no device turns out ten times as fast."""

LONGEST_STEP = 0.5
"""Logarithm by which one round follows a residual at most: beyond, the straight line is too far from the curve."""

ROUNDS = 40
"""Rounds of reweighting; each halves the distance."""


def calibrate(observations: Iterable[Observation], rig: Rig, *, model: str, experts: bool) -> Calibration:
    """The rates of ``rig``'s devices for ``model`` (``model_key``), which is a mixture of ``experts`` or dense.

    Observations of devices that the rig does not have are left out. Without any that are of use the calibration is empty.
    """
    predicted = {gpu.uuid: gpu_rates(gpu) for gpu in rig.gpus} | {HOST: host_rates(rig.host)}
    seen = [one for one in observations if one.run.devices and all(device in predicted for device in one.run.devices)]
    reading = {device: 1 / rates.decode_bytes_per_s for device, rates in predicted.items()}
    computing = {device: 1 / rates.prefill_flops_per_s for device, rates in predicted.items()}
    layer_bytes = {device: rates.layer_bytes for device, rates in predicted.items()}
    answers = _middle_rows(seen, reading, partial(_decode_row, layer_bytes))
    prompts = _middle_rows(seen, computing, _prefill_row)
    if not answers and not prompts:
        return Calibration()
    decode, decode_guess = _learn(answers, reading, model=model, experts=experts)
    prefill, prefill_guess = _learn(prompts, computing, model=model, experts=experts)
    known = {
        device: (1 / decode.get(device, decode_guess[device]), 1 / prefill.get(device, prefill_guess[device]))
        for device in predicted
    }
    return Calibration(
        rates={device: rates for device, rates in known.items() if device in decode},
        inferred={device: rates for device, rates in known.items() if device not in decode},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One run in one phase: ``seconds = Σ work · slowness + overlap · pace(work · slowness)``, seen in ``count`` answers."""

    run: Run
    work: tuple[float, ...]
    overlap: int
    seconds: float
    count: int = 1

    def parts(self, slowness: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each device: its own, and its part in the pace of the stages that overlap."""
        parts = {device: work * slowness[device] for device, work in zip(self.run.devices, self.work, strict=True)}
        if self.overlap:
            between = pace(tuple(parts.values()))
            parts = {device: part + self.overlap * between * (part / between) ** JAM for device, part in parts.items()}
        return parts


def _decode_row(layer_bytes: Mapping[str, float], one: Observation) -> _Row | None:
    run, hops_s = one.run, one.run.hops * HOP_SECONDS
    if one.decode_tokens < LEAST_DECODE_TOKENS or one.decode_s / one.decode_tokens <= hops_s:
        return None
    counted = zip(one.reads, run.layers, run.devices, strict=True)
    work = tuple(read + layers * layer_bytes[device] for read, layers, device in counted)
    return _Row(run=run, work=work, overlap=0, seconds=one.decode_s / one.decode_tokens - hops_s)


def _prefill_row(one: Observation) -> _Row | None:
    if one.prompt_tokens < LEAST_PROMPT_TOKENS or one.prompt_s <= 0 or not any(one.run.flops):
        return None
    batches = ceil(one.prompt_tokens / one.run.ubatch)
    work = tuple(flops * one.prompt_tokens / batches for flops in one.run.flops)
    return _Row(run=one.run, work=work, overlap=batches - 1, seconds=one.prompt_s)


def _middle_rows(
    seen: Iterable[Observation], slowness: Mapping[str, float], to_row: Callable[[Observation], _Row | None]
) -> list[_Row]:
    """Of each run the row of median speed, compared with what is predicted for each; the faster one of two in the middle."""
    by_run: dict[Run, list[_Row]] = {}
    for one in seen:
        if row := to_row(one):
            by_run.setdefault(row.run, []).append(row)
    middles = []
    for rows in by_run.values():
        rows.sort(key=lambda row: (row.seconds / sum(row.parts(slowness).values()), row.seconds, row.work))
        middles.append(replace(rows[(len(rows) - 1) // 2], count=len(rows)))
    return sorted(middles, key=lambda row: (row.run.devices, row.run.model, row.work, row.seconds))  # whatever order they came in


def _learn(
    rows: Sequence[_Row], predicted: Mapping[str, float], *, model: str, experts: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """The slowness of the devices that were measured, and what is to be expected of each one that was not."""
    start = dict(predicted)
    other = _fit([row for row in rows if row.run.experts != experts], predicted, model)
    misses = {device: slowness / predicted[device] for device, slowness in other.items() if device != HOST}
    for device, miss in misses.items():  # classes differ in how much of a card they reach, cards keep their order
        start[device] *= miss / min(misses.values())
    fitted = _fit([row for row in rows if row.run.experts == experts], start, model)
    found = _misses(fitted, start)
    common = {device: max(1.0, min(found)) if device == HOST else median(found) for device in start}
    return fitted, {device: slowness * common[device] for device, slowness in start.items()}


def _misses(slowness: Mapping[str, float], predicted: Mapping[str, float]) -> list[float]:
    """By what factor each GPU is slower than predicted; of none, 1."""
    return [slow / predicted[device] for device, slow in slowness.items() if device != HOST] or [1.0]


def _fit(rows: Sequence[_Row], predicted: Mapping[str, float], model: str) -> dict[str, float]:
    """The slowness of every device that some row tells about."""
    alone: dict[str, float] = {}
    spreads: dict[str, float] = {}
    for device in predicted:
        solos = [row for row in rows if row.run.devices == (device,)]
        own = [row for row in solos if row.run.model == model]
        if solos:
            alone[device] = _weighted_median(
                [(row.seconds / (row.work[0] * (1 + row.overlap)), row.count) for row in own or solos]
            )
            spreads[device] = NOISE if own else MODEL_SPREAD
    splits = [row for row in rows if len(row.run.devices) > 1]
    common = (
        median(_misses(alone, predicted))
        if alone
        else median([row.seconds / sum(row.parts(predicted).values()) for row in splits] or [1])
    )
    start = {
        device: alone.get(device, predicted[device] * (1 if device == HOST else common))
        for device in predicted
        if device in alone or any(device in row.run.devices for row in splits)
    }
    if not splits:
        return start
    devices = tuple(start)
    holds = [spreads.get(device, UNMEASURED_SPREAD) ** -2 for device in devices]
    spread = [SPLIT_NOISE if row.run.model == model else MODEL_SPREAD for row in splits]
    factors = [1.0] * len(devices)
    for _ in range(ROUNDS):
        now = {device: start[device] * factor for device, factor in zip(devices, factors, strict=True)}
        matrix = [[hold if i == j else 0.0 for j in range(len(devices))] for i, hold in enumerate(holds)]
        right = list(holds)
        for row, sigma in zip(splits, spread, strict=True):
            parts = row.parts(now)
            predicted_s = sum(parts.values())
            miss = log(row.seconds / predicted_s)
            weight = sigma**-2 * min(1.0, HUBER * sigma / max(abs(miss), 1e-9))
            share = [parts.get(device, 0.0) / (factor * predicted_s) for device, factor in zip(devices, factors, strict=True)]
            target = 1 + max(min(miss, LONGEST_STEP), -LONGEST_STEP)
            for i, one in enumerate(share):
                right[i] += weight * one * target
                for j, two in enumerate(share):
                    matrix[i][j] += weight * one * two
        factors = [(old + new) / 2 for old, new in zip(factors, _solve(matrix, right), strict=True)]
    return {device: start[device] * factor for device, factor in zip(devices, factors, strict=True)}


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """The minimum of ``x·M·x / 2 − r·x``, ``M`` positive definite, with no ``x`` below ``LOWEST_SLOWNESS``.

    Those that would fall below are set there, the worst first, and the rest is solved again.
    """
    fixed: set[int] = set()
    while True:
        free = [i for i in range(len(right)) if i not in fixed]
        rows = [[*(matrix[i][j] for j in free), right[i] - sum(matrix[i][j] * LOWEST_SLOWNESS for j in fixed)] for i in free]
        for k, pivot in enumerate(rows):  # elimination; a positive definite matrix needs no exchange of rows
            for row in rows[k + 1 :]:
                ratio = row[k] / pivot[k]
                for j in range(k, len(row)):
                    row[j] -= ratio * pivot[j]
        found = [LOWEST_SLOWNESS] * len(right)
        for k in range(len(rows) - 1, -1, -1):
            known = sum(rows[k][j] * found[free[j]] for j in range(k + 1, len(rows)))
            found[free[k]] = (rows[k][-1] - known) / rows[k][k]
        lowest = min(free, key=lambda i: found[i], default=None)
        if lowest is None or found[lowest] >= LOWEST_SLOWNESS:
            return found
        fixed.add(lowest)


def _weighted_median(values: Iterable[tuple[float, int]]) -> float:
    """The smallest value up to which half of the weight lies."""
    ordered = sorted(values)
    half, passed = sum(weight for _, weight in ordered) / 2, 0.0
    for value, weight in ordered:
        passed += weight
        if passed >= half:
            return value
    raise ValueError("no values")
