"""What llama.cpp's ``--fit`` does with a group of GPUs: ``common_params_fit_impl`` in ``common/fit.cpp``, b10488.

1. The default split, in proportion to free memory; kept where every device then keeps its margin.
2. Else layers are filled back to front: the last device first, to its limit, with the output layer on it. While one device is
   filled, everything not yet given away is in RAM. A mixture of experts is filled with its routed experts in RAM.
3. Where all the rest of a mixture of experts fits, layers are then converted front to back to full ones; the last of a device
   may overflow in part to the next one.

Step 2 uses the method of false position there; what it finds is the largest number of layers within the limit, found here by
bisection. Devices are counted from 0 in the order of the group; bytes are those that llama.cpp sees free, after the CUDA context.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from planner.placement import Placement, contiguous
from planner.profile import ModelProfile
from planner.sizes import Sizes
from planner.units import MIB

FIT_MARGIN_BYTES = 1024 * MIB
"""Bytes that ``--fit`` leaves free on each device (``LLAMA_ARG_FIT_TARGET``, ``common/common.h``)."""

Fraction = Literal["attention", "up", "gate", "all but experts"]
"""How much of a layer stays on its device, ``common_layer_fraction_t``."""

OVERFLOWS: dict[Fraction, re.Pattern[str]] = {
    "attention": re.compile(r"ffn_(gate|up|gate_up|down).*"),
    "up": re.compile(r"ffn_(gate|gate_up|down).*"),
    "gate": re.compile(r"ffn_down.*"),
    "all but experts": re.compile(r"ffn_(up|down|gate_up|gate)_(ch|)exps"),
}
"""Tensors of a layer that go elsewhere (``get_overflow_pattern``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A placement on devices 0, 1, … and ``shifts_bytes``: what each holds more than the placement says (parts of a layer)."""

    placement: Placement
    shifts_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """Layers of one device, the output layer counted: ``parts`` of them, the last, have their experts elsewhere."""

    layers: int = 0
    parts: int = 0
    fraction: Fraction = "all but experts"
    to_next: bool = False

    @property
    def full(self) -> int:
        return self.layers - self.parts


def split_by_memory(layers: int, free_bytes: Sequence[int]) -> tuple[int, ...]:
    """How the default split hands out ``layers``, the output layer counted (``load_tensors`` in ``src/llama-model.cpp``).

    Layer ``i`` goes to the first device whose cumulative share of the free memory exceeds ``i / layers``.
    """
    total = sum(free_bytes)
    if not total:
        return tuple(layers if i == 0 else 0 for i in range(len(free_bytes)))
    ends = [0]
    for part in accumulate(free_bytes[:-1]):
        end = int(part / total * layers)
        while end < layers and end / layers < part / total:
            end += 1
        while end > ends[-1] and (end - 1) / layers >= part / total:
            end -= 1
        ends.append(end)
    return tuple(stop - start for start, stop in pairwise((*ends, layers)))


def auto_fit(profile: ModelProfile, sizes: Sizes, free_bytes: Sequence[int], margins_bytes: Sequence[int]) -> Fit:
    """The placement that ``--fit`` chooses on devices with ``free_bytes`` of which ``margins_bytes`` are to stay free."""
    n, nd = sizes.n_layers, len(free_bytes)
    targets = [free - margin for free, margin in zip(free_bytes, margins_bytes, strict=True)]
    default = split_by_memory(n + 1, free_bytes)
    used = _memory(profile, sizes, [_Share(layers=count) for count in default])
    if all(use <= target for use, target in zip(used, targets, strict=True)):
        return Fit(placement=contiguous(default, n), shifts_bytes=(0,) * nd)
    shares = _fill_back_to_front(profile, sizes, targets)
    if profile.expert_count and _fits_without_experts(profile, sizes, default, targets):
        shares = _fill_experts(profile, sizes, shares, targets)
    return _as_fit(profile, sizes, shares)


def _fits_without_experts(profile: ModelProfile, sizes: Sizes, default: Sequence[int], targets: Sequence[int]) -> bool:
    dense = [_Share(layers=count, parts=count - (i == _last_of(default))) for i, count in enumerate(default)]
    return sum(_memory(profile, sizes, dense)) < sum(targets)


def _last_of(counts: Sequence[int]) -> int:
    """The last device with a share, -1 where none has one."""
    return max((i for i, count in enumerate(counts) if count), default=-1)


def _fill_back_to_front(profile: ModelProfile, sizes: Sizes, targets: Sequence[int]) -> list[_Share]:
    last = len(targets) - 1
    shares = [_Share() for _ in targets]
    moe = bool(profile.expert_count)
    for device in range(last, -1, -1):
        rest = sizes.n_layers + 1 - sum(share.layers for share in shares)

        def share_of(layers: int, device: int = device) -> _Share:
            return _Share(layers=layers, parts=max(layers - (device == last), 0) if moe else 0)

        fits = _fits(profile, sizes, shares, device, targets, share_of)
        if moe:
            shares[device] = share_of(_most(rest, fits))
        elif rest and fits(rest):
            shares[device] = share_of(rest)
        else:
            shares[device] = share_of(_most_beside_ram(sizes, shares, device, targets[device], rest))
    return shares


def _most_beside_ram(sizes: Sizes, shares: Sequence[_Share], device: int, target: int, rest: int) -> int:
    """The most of a dense model's ``rest`` layers that fit on ``device``, where not all do.

    One stays in RAM at least, so that the compute buffer is that of any such number, and layers' bytes alone decide.
    """
    if rest < 2:
        return 0
    counts = [share.layers for share in shares]
    counts[device] = rest // 2
    buffer = sizes.compute_bytes(contiguous(counts, sizes.n_layers))[0]
    held, stop = sizes.held_prefix, min(rest, sizes.n_layers)
    room = target - buffer - (sizes.output_bytes if rest > stop else 0)
    return max(min(rest - bisect_left(held, held[stop] - room), rest - 1), 0)


def _fits(
    profile: ModelProfile,
    sizes: Sizes,
    shares: Sequence[_Share],
    device: int,
    targets: Sequence[int],
    share_of: Callable[[int], _Share],
) -> Callable[[int], bool]:
    def fits(layers: int) -> bool:
        test = [*shares]
        test[device] = share_of(layers)
        return _memory(profile, sizes, test)[device] <= targets[device]

    return fits


def _most(highest: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to ``highest`` that fits, where all below it do; 0 is never asked."""
    if highest and fits(highest):
        return highest
    low, high = 0, highest
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _fill_experts(profile: ModelProfile, sizes: Sizes, shares: Sequence[_Share], targets: Sequence[int]) -> list[_Share]:
    """Step 3: layers without experts, from the first device that has any on, become full layers of device 0, then 1, …"""
    now = [*shares]
    last = len(now) - 1
    for device in range(len(now)):
        start = _first_dense(now)
        if device > start:
            break
        convertible = sum(share.parts for share in now[start:])

        def converted(count: int, device: int = device, now: Sequence[_Share] = tuple(now)) -> list[_Share]:
            return _convert(now, device, count)

        def fits(count: int, device: int = device, converted: Callable[[int], list[_Share]] = converted) -> bool:
            return _memory(profile, sizes, converted(count))[device] <= targets[device]

        now = converted(_most(convertible, fits))
        start = _first_dense(now)
        if now[start].layers > (0 if device < last else 1) and now[start].layers > 0:
            now = _overflow_one(profile, sizes, now, device, start, targets)
    return now


def _first_dense(shares: Sequence[_Share]) -> int:
    """The first device, from the back, of the run that holds layers; the front ones are full already."""
    start = len(shares) - 1
    for i, share in enumerate(shares):
        if share.parts and share.fraction == "all but experts":
            return i
    return start


def _convert(shares: Sequence[_Share], device: int, count: int) -> list[_Share]:
    now = [*shares]
    for i in range(len(now)):
        taken = min(count, now[i].parts) if i >= device else 0
        if taken:
            now[i] = replace(now[i], layers=now[i].layers - taken, parts=now[i].parts - taken)
            now[device] = replace(now[device], layers=now[device].layers + taken)
            count -= taken
    return now


def _overflow_one(
    profile: ModelProfile, sizes: Sizes, shares: Sequence[_Share], device: int, start: int, targets: Sequence[int]
) -> list[_Share]:
    """One layer more on ``device``, as much of it as fits; the rest of it on the next device, or in RAM after the last."""
    last = len(shares) - 1

    def test(fraction: Fraction) -> list[_Share] | None:
        now = [*shares]
        now[start] = replace(now[start], layers=now[start].layers - 1, parts=max(now[start].parts - 1, 0))
        more = replace(now[device], layers=now[device].layers + 1, parts=now[device].parts + 1)
        now[device] = replace(more, fraction=fraction, to_next=device < last)
        used = _memory(profile, sizes, now)
        fits = used[device] < targets[device] and (device == last or used[device + 1] < targets[device + 1])
        return now if fits else None

    if (up := test("up")) is None:
        return test("attention") or [*shares]
    return test("gate") or up


def _moves(profile: ModelProfile, sizes: Sizes, shares: Sequence[_Share]) -> list[tuple[int, int | None, int, int, bool]]:
    """``(from, to, layer, bytes, all experts)`` of what the partial layers leave elsewhere; ``None`` is RAM."""
    moves = []
    start = sizes.n_layers + 1 - sum(share.layers for share in shares)
    for device, share in enumerate(shares):
        first = start + share.full
        for layer in range(first, start + share.layers):
            if layer >= sizes.n_layers:
                continue
            fraction: Fraction = share.fraction if layer == first else "all but experts"
            to = device + 1 if layer == first and share.to_next else None
            moves.append((device, to, layer, _overflow_bytes(profile, layer, fraction), fraction == "all but experts"))
        start += share.layers
    return moves


def _overflow_bytes(profile: ModelProfile, layer: int, fraction: Fraction) -> int:
    key = ("overflow_bytes", layer, fraction)
    known: int | None = profile.memo.get(key)
    if known is None:
        pattern = OVERFLOWS[fraction]
        known = sum(tensor.bytes for name, tensor in profile.layer_tensors[layer].items() if pattern.match(name))
        profile.memo[key] = known
    return known


def _memory(profile: ModelProfile, sizes: Sizes, shares: Sequence[_Share]) -> list[int]:
    """Bytes on each device: ``get_memory_for_layers``."""
    fit = _as_fit(profile, sizes, shares)
    placement = fit.placement
    used = [0] * len(shares)
    compute = sizes.compute_bytes(placement) if placement.order else ()
    for (device, run), buffer in zip(placement.ranges(), compute, strict=True):
        used[device] = sizes.held_bytes(run.start, run.stop) + buffer + fit.shifts_bytes[device]
        used[device] -= sum(profile.layers[layer].expert_bytes for layer in run if layer in placement.cpu_experts)
        used[device] += sizes.output_bytes if device == placement.output_gpu else 0
    return used


def _as_fit(profile: ModelProfile, sizes: Sizes, shares: Sequence[_Share]) -> Fit:
    """The nearest placement: a layer most of whose experts go to RAM counts as one with its experts there."""
    shifts = [0] * len(shares)
    in_ram = set()
    for source, target, layer, moved, is_whole in _moves(profile, sizes, shares):
        experts = profile.layers[layer].expert_bytes
        if target is not None:
            shifts[source] -= moved
            shifts[target] += moved
        elif is_whole or 2 * moved > experts:
            in_ram.add(layer)
            shifts[source] += experts - moved
        else:
            shifts[source] -= moved
    placement = contiguous([share.layers for share in shares], sizes.n_layers, frozenset(in_ram))
    return Fit(placement=placement, shifts_bytes=tuple(shifts))
