"""What stock Ollama would do with a model, in both eras: the baseline of every plan.

Sources: Ollama 0.32 ``server/sched.go`` (``selectLlamaServerPlacement``, ``automaticGenerationBatch``), ``llm/llama_server.go``
(``PredictServerVRAM``), ``server/routes.go``; Ollama 0.24 ``llm/server.go`` (``assignLayers``). What llama.cpp then does with a group of
GPUs is in ``planner.params_fit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from planner.contiguous import to_placement
from planner.costs import layer_costs
from planner.fit import Device, stock_fit, stock_groups
from planner.hardware import Gpu, Rig
from planner.memory import estimate_memory
from planner.params_fit import params_fit
from planner.placement import Placement, on_cpu, solo
from planner.profile import ModelProfile
from planner.runtime import context_bytes
from planner.settings import LoadSettings

Era = Literal["runner", "llama-server"]
"""``runner``: Ollama 0.11.5 to 0.24; ``llama-server``: 0.30 and later."""

MIB = 2**20
GIB = 2**30

CONTEXT_BY_VRAM = ((47 * GIB, 262144), (23 * GIB, 32768), (0, 4096))
"""From so many bytes of all GPUs together, the context in tokens where nobody sets one (``server/routes.go``)."""

SINGLE_GPU_PERCENT = 80
"""A model goes to one GPU if its predicted bytes are at most so much of the free ones (``bestSingleGPUFit``)."""

BATCHES = ((32768, 2048), (4096, 1024), (0, 512))
"""Above so many tokens of context, the batch (``generationBatchForContext``)."""

BATCH_HEADROOM_PERCENT = {2048: 60, 1024: 75, 512: 100}
BATCH_SURCHARGE_BYTES = {2048: 2 * GIB, 1024: 768 * MIB, 512: 0}
"""A batch needs the predicted bytes within the first of the free ones, and room for the second within 80 % of them."""

RUNNER_RESERVE_BYTES = 457 * MIB
"""What the runner era leaves free on each GPU beside ``OLLAMA_GPU_OVERHEAD`` and the graph (``MinimumMemory`` in ``ml/device.go``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StockOptions:
    """What a request and Ollama's environment say about placement; ``None``: nobody said anything."""

    num_gpu: int | None = None
    main_gpu: int | None = None
    spread: bool = False
    auto_batch: bool = True
    gpu_overhead_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StockChoice:
    """Stock's placement, the settings it loads with (its automatic batch), and why."""

    placement: Placement
    settings: LoadSettings
    reason: str


def default_num_ctx(rig: Rig, profile: ModelProfile) -> int:
    """Tokens of context where nobody sets one: by the total bytes of all GPUs, cut to the trained context."""
    total = sum(gpu.total_bytes for gpu in rig.gpus)
    tokens = next(tokens for least, tokens in CONTEXT_BY_VRAM if total >= least)
    return min(tokens, profile.context_train or tokens)


def predict_server_vram(profile: ModelProfile, total_ctx: int) -> int:
    """Ollama's one number for a model's bytes: ``file + 4 · layers · min_kv_heads · (embedding / max_heads) · context``.

    ``PredictServerVRAM``: it knows neither windows nor MLA, recurrent layers, cache types, or heads of another width.
    """
    heads = profile.integer("attention.head_count")
    kv_heads = min((n for n in profile.per_layer("attention.head_count_kv", heads)), default=0) or 1
    width = profile.embedding_length // heads if heads else 0
    return profile.file_bytes + 4 * profile.integer("block_count", profile.n_layers) * kv_heads * width * total_ctx


def automatic_batch(settings: LoadSettings, predicted_bytes: int, gpus: Sequence[Gpu]) -> int:
    """``num_batch`` where nobody sets it, on the chosen ``gpus`` (``automaticGenerationBatch``)."""
    available = sum(gpu.free_bytes for gpu in gpus)
    if not settings.flash_attention and any(gpu.library == "CUDA" for gpu in gpus):
        small = any(gpu.library == "CUDA" and min(gpu.free_bytes or gpu.total_bytes, gpu.total_bytes) <= 8 * GIB for gpu in gpus)
        return 256 if small and settings.total_ctx > 4096 else 512
    largest = next(batch for above, batch in BATCHES if settings.total_ctx > above)
    return next(b for _, b in BATCHES if b <= largest and (b == 512 or _batch_fits(b, predicted_bytes, available)))


def _batch_fits(batch: int, predicted_bytes: int, available_bytes: int) -> bool:
    if not predicted_bytes or not available_bytes:
        return True
    threshold = available_bytes * 80 // 100
    return (
        predicted_bytes <= available_bytes * BATCH_HEADROOM_PERCENT[batch] // 100
        and predicted_bytes + BATCH_SURCHARGE_BYTES[batch] <= threshold
    )


def with_batch(settings: LoadSettings, profile: ModelProfile, gpus: Sequence[Gpu], *, auto: bool) -> LoadSettings:
    """``settings`` with stock's automatic batch for a load on ``gpus``, or as they are."""
    if not auto:
        return settings
    batch = automatic_batch(settings, predict_server_vram(profile, settings.total_ctx), gpus)
    return replace(settings, batch=batch, ubatch=batch)


def stock_choice(
    profile: ModelProfile, rig: Rig, settings: LoadSettings, era: Era, options: StockOptions = StockOptions()
) -> StockChoice:
    """What stock Ollama of ``era`` does with ``profile`` on ``rig``."""
    if not rig.gpus or options.num_gpu == 0:
        placement = on_cpu(n_gpus=len(rig.gpus), n_layers=profile.n_layers)
        return StockChoice(placement=placement, settings=settings, reason="no GPU, or num_gpu 0")
    return _runner(profile, rig, settings, options) if era == "runner" else _llama_server(profile, rig, settings, options)


def _llama_server(profile: ModelProfile, rig: Rig, settings: LoadSettings, options: StockOptions) -> StockChoice:
    groups = _by_library(rig.gpus)
    predicted = predict_server_vram(profile, settings.total_ctx)
    best = None
    if len(rig.gpus) > 1 and options.main_gpu is not None and options.main_gpu >= 0:
        named = [group[options.main_gpu] for group in groups if options.main_gpu < len(group)]
        best, why = _preferred(rig.gpus, named), f"main_gpu {options.main_gpu} is asked for"
    elif len(rig.gpus) == 1:
        best, why = 0, "the only GPU"
    elif not options.spread:
        fitting = [i for i, gpu in enumerate(rig.gpus) if predicted <= gpu.free_bytes * SINGLE_GPU_PERCENT // 100]
        best, why = _preferred(rig.gpus, fitting), "of the GPUs that it fills to 80 % at most, the one with the most free memory"
    if best is not None:
        chosen = [best]
    else:
        chosen = max(groups, key=lambda group: sum(rig.gpus[i].free_bytes for i in group))
        why = (
            "OLLAMA_SCHED_SPREAD is set: split over all GPUs"
            if options.spread
            else f"predicted {predicted / GIB:.1f} GiB are more than 80 % of any GPU's free memory: split over all"
        )
    gpus = [rig.gpus[i] for i in chosen]
    loaded = with_batch(settings, profile, gpus, auto=options.auto_batch)
    free = [gpu.free_bytes - context_bytes(gpu) for gpu in gpus]
    if options.num_gpu is not None and options.num_gpu > 0:
        local = _forced(profile, free, options.num_gpu)
    else:
        local = params_fit(profile, loaded, free)
    return StockChoice(placement=_on_rig(local, chosen, len(rig.gpus)), settings=loaded, reason=why)


def _forced(profile: ModelProfile, free_bytes: Sequence[int], num_gpu: int) -> Placement:
    """``-ngl``: the highest layers, in proportion to free memory; the output layer counts as the first of them."""
    offloaded = min(num_gpu, profile.n_layers + 1)
    total, bounds, cumulative = sum(free_bytes), [], 0
    for free in free_bytes:
        cumulative += free
        bounds.append(cumulative)
    owners = [
        next((gpu for gpu, bound in enumerate(bounds) if bound * offloaded > layer * total), len(bounds) - 1)
        for layer in range(offloaded)
    ]
    output = owners[-1]
    layers = tuple(owners[:-1].count(gpu) for gpu in range(len(free_bytes)))
    order = tuple(gpu for gpu in range(len(free_bytes)) if layers[gpu] or gpu == output)
    return Placement(layers=layers, order=order, output_gpu=output, cpu_layers=profile.n_layers + 1 - offloaded)


def _runner(profile: ModelProfile, rig: Rig, settings: LoadSettings, options: StockOptions) -> StockChoice:
    costs = layer_costs(profile, settings)
    graph = max(
        device.compute_bytes for device in estimate_memory(profile, settings, solo(0, n_gpus=1, n_layers=profile.n_layers)).devices
    )
    reserve = RUNNER_RESERVE_BYTES + options.gpu_overhead_bytes + graph
    usable = [max(gpu.free_bytes - reserve, 0) for gpu in rig.gpus]
    devices = [
        Device(gpu=i, weighted_bytes=usable[i], ceiling_bytes=usable[i], integrated=gpu.integrated, uuid=gpu.uuid)
        for i, gpu in enumerate(rig.gpus)
    ]
    fit = stock_fit(costs.all_bytes, stock_groups(devices))
    placement = to_placement(fit, n_gpus=len(rig.gpus))
    return StockChoice(
        placement=placement, settings=settings, reason="as few GPUs as hold it, most free memory first, filled in proportion"
    )


def _by_library(gpus: Sequence[Gpu]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, gpu in enumerate(gpus):
        groups.setdefault(gpu.library, []).append(index)
    return list(groups.values())


def _preferred(gpus: Sequence[Gpu], candidates: Sequence[int]) -> int | None:
    """Discrete before integrated, then the most free memory, then Ollama's order."""
    return min(candidates, key=lambda i: (gpus[i].integrated, -gpus[i].free_bytes, i), default=None)


def _on_rig(local: Placement, chosen: Sequence[int], n_gpus: int) -> Placement:
    """``local``, which counts the ``chosen`` GPUs, counted as the rig does."""
    layers = [0] * n_gpus
    for index, gpu in enumerate(chosen):
        layers[gpu] = local.layers[index]
    return Placement(
        layers=tuple(layers),
        order=tuple(chosen[index] for index in local.order),
        output_gpu=None if local.output_gpu is None else chosen[local.output_gpu],
        cpu_layers=local.cpu_layers,
        cpu_experts=local.cpu_experts,
    )
