"""llama.cpp's ``--fit``: how a group of GPUs shares a model when nobody says how.

``common_params_fit_impl`` in ``common/fit.cpp``, b10488, with the context given and ``n_gpu_layers`` and ``tensor_split`` unset. It
loads dryly to know its bytes; here the memory model gives them. A MoE layer that overflows in part counts here as a
layer whose experts all lie in RAM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.memory import estimate_memory
from planner.placement import Placement
from planner.profile import ModelProfile
from planner.settings import LoadSettings

MIB = 2**20

FIT_MARGIN_BYTES = 1024 * MIB
"""What ``--fit`` leaves free on each device (``fit_params_target`` in ``common/common.h``; ``LLAMA_ARG_FIT_TARGET``)."""


@dataclass(frozen=True, slots=True)
class _Share:
    """Layers of one device, the output layer counted on the last; the last ``partial`` of them have their experts in RAM."""

    layers: int = 0
    partial: int = 0


def default_split(profile: ModelProfile, free_bytes: Sequence[int]) -> Placement:
    """Layers in proportion to free memory: layer ``i`` of ``n + 1`` goes to the first device whose cumulative share exceeds ``i/(n + 1)``.

    ``load_tensors`` in ``src/llama-model.cpp``; the output layer is layer ``n``.
    """
    total, count = sum(free_bytes), profile.n_layers + 1
    owners, cumulative = [], 0
    bounds = []
    for free in free_bytes:
        cumulative += free
        bounds.append(cumulative)
    for layer in range(count):
        owners.append(next((gpu for gpu, bound in enumerate(bounds) if bound * count > layer * total), len(bounds) - 1))
    return _placement([_Share(owners.count(gpu)) for gpu in range(len(free_bytes))], profile)


def params_fit(
    profile: ModelProfile, settings: LoadSettings, free_bytes: Sequence[int], margins_bytes: Sequence[int] | None = None
) -> Placement:
    """The placement that ``--fit`` chooses on devices with ``free_bytes``, in ``--device`` order; ``order`` counts those devices.

    The default split if every device then keeps its margin. Otherwise layers fill the last device to its limit, then the one
    before it, …; what remains stays on the CPU. A MoE model is filled without its experts first, which then come back from
    the first device on.
    """
    margins = [FIT_MARGIN_BYTES] * len(free_bytes) if margins_bytes is None else margins_bytes
    targets = [free - margin for free, margin in zip(free_bytes, margins, strict=True)]
    whole = default_split(profile, free_bytes)
    if all(used <= target for used, target in zip(_used(profile, settings, whole), targets, strict=True)):
        return whole
    shares = _fill_back_to_front(profile, settings, targets)
    if profile.expert_count and _surplus_without_experts(profile, settings, whole, targets) > 0:
        shares = _bring_experts_back(profile, settings, targets, shares)
    return _placement(shares, profile)


def _fill_back_to_front(profile: ModelProfile, settings: LoadSettings, targets: Sequence[int]) -> list[_Share]:
    n, last = len(targets), len(targets) - 1
    shares = [_Share()] * n
    for gpu in reversed(range(n)):
        unassigned = profile.n_layers + 1 - sum(share.layers for share in shares)

        def given(count: int, gpu: int = gpu) -> list[_Share]:
            partial = 0 if not profile.expert_count else max(count - (gpu == last), 0)
            return [*shares[:gpu], _Share(count, partial), *shares[gpu + 1 :]]

        count = _most(unassigned, lambda count, gpu=gpu, given=given: _fits(profile, settings, given(count), targets, gpu))
        shares = given(count)
    return shares


def _bring_experts_back(
    profile: ModelProfile, settings: LoadSettings, targets: Sequence[int], shares: list[_Share]
) -> list[_Share]:
    """Front to back: each device takes as many whole layers as it holds from the layers without experts behind it."""
    n = len(targets)
    dense = n
    while dense and shares[dense - 1].layers:
        dense -= 1
    for gpu in range(n):
        if gpu > dense:
            break

        def given(count: int, gpu: int = gpu) -> list[_Share]:
            return _converted(shares, gpu, count)

        available = sum(share.partial for share in shares)
        count = _most(available, lambda count, gpu=gpu, given=given: _fits(profile, settings, given(count), targets, gpu))
        shares = given(count)
        while dense < n - 1 and not shares[dense].partial:
            dense += 1
    return shares


def _converted(shares: Sequence[_Share], gpu: int, count: int) -> list[_Share]:
    """``count`` layers without experts, taken from the front, made whole on ``gpu``."""
    result = list(shares)
    for source, share in enumerate(shares):
        taken = min(count, share.partial)
        count -= taken
        result[source] = _Share(result[source].layers - taken, result[source].partial - taken)
        result[gpu] = _Share(result[gpu].layers + taken, result[gpu].partial)
    return result


def _surplus_without_experts(
    profile: ModelProfile, settings: LoadSettings, whole: Placement, targets: Sequence[int]
) -> int:
    bare = Placement(
        layers=whole.layers,
        order=whole.order,
        output_gpu=whole.output_gpu,
        cpu_layers=whole.cpu_layers,
        cpu_experts=frozenset(range(profile.n_layers)),
    )
    return sum(targets) - sum(_used(profile, settings, bare))


def _most(limit: int, fits: object) -> int:
    """The largest count up to ``limit`` that fits: bytes only grow with layers."""
    low, high = 0, limit
    assert callable(fits)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _fits(profile: ModelProfile, settings: LoadSettings, shares: Sequence[_Share], targets: Sequence[int], gpu: int) -> bool:
    return _used(profile, settings, _placement(shares, profile))[gpu] <= targets[gpu]


def _used(profile: ModelProfile, settings: LoadSettings, placement: Placement) -> list[int]:
    return [device.total_bytes for device in estimate_memory(profile, settings, placement).devices]


def _placement(shares: Sequence[_Share], profile: ModelProfile) -> Placement:
    """Devices in order, the output layer on the last that holds anything; experts of a device's last ``partial`` layers in RAM."""
    holders = [gpu for gpu, share in enumerate(shares) if share.layers]
    if not holders:
        return Placement(layers=(0,) * len(shares), cpu_layers=profile.n_layers)
    output = holders[-1]
    layers = [share.layers - (gpu == output) for gpu, share in enumerate(shares)]
    start = profile.n_layers - sum(layers)
    in_ram: set[int] = set()
    for gpu in holders:
        end = start + layers[gpu]
        in_ram.update(range(max(end - shares[gpu].partial, start), end))
        start = end
    return Placement(
        layers=tuple(layers),
        order=tuple(holders),
        output_gpu=output,
        cpu_layers=profile.n_layers - sum(layers),
        cpu_experts=frozenset(in_ram),
    )
