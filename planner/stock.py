"""What stock Ollama would do with a request: the baseline that no plan may be slower than. Both eras.

0.30 and later (``server/sched.go``, v0.32.15): one GPU where ``PredictServerVRAM`` is within 80 % of its free memory (the one
with the most of it), else all GPUs of one library; llama.cpp's ``--fit`` splits inside (``planner.autofit``). 0.11.5 to 0.24
(``llm/server.go``): as few GPUs as hold everything, filled in proportion to memory (``planner.fit``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.autofit import FIT_MARGIN_BYTES, Fit, auto_fit, split_by_memory
from planner.contiguous import to_placement
from planner.costs import layer_costs
from planner.fit import Device, stock_fit, stock_groups
from planner.hardware import Gpu, Rig
from planner.placement import Placement, contiguous, on_cpu
from planner.profile import ModelProfile
from planner.request import PlanRequest
from planner.settings import LoadSettings
from planner.sizes import sizes_of
from planner.units import GIB, MIB

CONTEXT_TIERS = ((47 * GIB, 262144), (23 * GIB, 32768), (0, 4096))
"""``(total VRAM in bytes, tokens)``: the context of a request that sets none (``Serve`` in ``server/routes.go``)."""

SOLO_PERCENT = 80
"""A model goes to one GPU where it is predicted to take no more of its free memory (``bestSingleGPUFit``)."""

DEFAULT_BATCH, MEDIUM_BATCH, LARGE_BATCH, CONSTRAINED_BATCH = 512, 1024, 2048, 256
"""Tokens (``llamaServerGenerationBatch…`` in ``server/sched.go``)."""

EMBEDDING_BATCH = 2048
"""Tokens, where nobody sets a batch: an embedding model reads a text in one batch (``DefaultEmbeddingNumBatch``)."""

BATCH_HEADROOM_PERCENT = {LARGE_BATCH: 60, MEDIUM_BATCH: 75}
"""A larger batch needs the model to be predicted within this part of the free memory (``generationBatchHasHeadroom``)."""

BATCH_SURCHARGE_BYTES = {LARGE_BATCH: 2 * GIB, MEDIUM_BATCH: 768 * MIB}
"""What it adds to the prediction (``generationBatchSurcharge``)."""

CONSTRAINED_GPU_BYTES = 8 * GIB
"""Without flash attention, a CUDA card with no more memory gets ``CONSTRAINED_BATCH`` for contexts above 4096 tokens."""

RUNNER_RESERVE_BYTES = 457 * MIB
"""What the runner era keeps free on each GPU (``MinimumMemory`` in ``ml/device.go``)."""

SINGLE_SEQUENCE = frozenset(
    {"mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe"}
    | {"nemotron_h", "nemotron_h_moe", "nemotron_h_omni"}
)
"""Architectures that Ollama never runs in parallel (``Scheduler.load``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StockLoad:
    """What stock does. ``shifts_bytes``: what each GPU holds more than the placement says (parts of a layer, ``Fit``).

    ``gpus`` are those that Ollama lets llama-server see, ``solo`` whether it chose one of them by itself or by ``main_gpu``.
    """

    placement: Placement
    settings: LoadSettings
    gpus: tuple[int, ...]
    solo: bool
    shifts_bytes: tuple[int, ...]


def default_num_ctx(rig: Rig) -> int:
    """Tokens of context where neither request, model nor ``OLLAMA_CONTEXT_LENGTH`` says any, the trained limit aside."""
    total = sum(gpu.total_bytes for gpu in rig.gpus)
    return next(tokens for least, tokens in CONTEXT_TIERS if total >= least)


def effective_settings(profile: ModelProfile, rig: Rig, request: PlanRequest) -> LoadSettings:
    """The load that ``request`` means on ``rig``, before any batch is chosen: context cut to the trained one, sequences."""
    wanted = request.num_ctx or default_num_ctx(rig)
    single = request.embedding or profile.architecture.replace("-", "_") in SINGLE_SEQUENCE
    parallel = 1 if single else request.parallel
    num_ctx = min(wanted, profile.context_train or wanted)
    batch = request.num_batch or DEFAULT_BATCH
    if request.embedding and request.era == "llama-server":  # ``embeddingBatchSize`` in ``llm/llama_server.go``
        batch = min(request.num_batch or EMBEDDING_BATCH, num_ctx)
    return LoadSettings(
        num_ctx=num_ctx,
        parallel=parallel,
        batch=batch,
        ubatch=batch,
        kv_type_k=request.kv_type_k,
        kv_type_v=request.kv_type_v,
        flash_attention=request.flash_attention,
        outputs=None if request.embedding or request.era == "runner" else parallel,
    )


def predict_server_vram(profile: ModelProfile, total_ctx: int) -> int:
    """Bytes that Ollama expects a model to take: ``PredictServerVRAM`` in ``llm/llama_server.go``.

    ``file size + 2 · layers · least KV heads · (embedding / heads) · context · 2``: no windows, no states, no quantized cache.
    """
    heads = profile.integer("attention.head_count", 1)
    kv_heads = min(profile.counts("attention.head_count_kv", 1), default=1)
    head = profile.embedding_length // heads if heads else 0
    n_blocks = profile.integer("block_count", profile.n_layers)
    return profile.file_bytes + 2 * n_blocks * max(kv_heads, 1) * head * total_ctx * 2


def automatic_batch(settings: LoadSettings, predicted_bytes: int, gpus: Sequence[Gpu], available_bytes: int) -> int:
    """Tokens of a batch that nobody has set: ``automaticGenerationBatch`` on the chosen ``gpus``."""
    ctx = settings.total_ctx
    cuda = [gpu for gpu in gpus if gpu.library == "CUDA"]
    if not settings.flash_attention and cuda:
        small = any(0 < min(gpu.free_bytes or gpu.total_bytes, gpu.total_bytes) <= CONSTRAINED_GPU_BYTES for gpu in cuda)
        return CONSTRAINED_BATCH if ctx > 4096 and small else DEFAULT_BATCH
    batch = LARGE_BATCH if ctx > 32768 else MEDIUM_BATCH if ctx > 4096 else DEFAULT_BATCH
    for size in (LARGE_BATCH, MEDIUM_BATCH):
        if batch == size and not _batch_fits(size, predicted_bytes, available_bytes):
            batch = MEDIUM_BATCH if size == LARGE_BATCH else DEFAULT_BATCH
    return batch


def _batch_fits(batch: int, predicted: int, available: int) -> bool:
    if not predicted or not available:
        return True
    threshold = available * SOLO_PERCENT // 100
    within = predicted <= available * BATCH_HEADROOM_PERCENT[batch] // 100
    return predicted <= threshold and within and BATCH_SURCHARGE_BYTES[batch] <= threshold - predicted


def available_bytes(rig: Rig, gpus: Sequence[int]) -> int:
    """Free memory of ``gpus`` as Ollama adds it up: integrated ones together no more than the host has free."""
    discrete = sum(rig.gpus[i].free_bytes for i in gpus if not rig.gpus[i].integrated)
    shared = sum(rig.gpus[i].free_bytes for i in gpus if rig.gpus[i].integrated)
    return discrete + (min(shared, rig.host.free_bytes) if rig.host.free_bytes else shared)


def settings_on(profile: ModelProfile, rig: Rig, request: PlanRequest, gpus: Sequence[int]) -> LoadSettings:
    """The settings of a load that is placed on ``gpus``: the request's, with Ollama's automatic batch where it sets none."""
    settings = effective_settings(profile, rig, request)
    if request.num_batch or request.embedding or request.era == "runner" or not gpus:
        return settings
    predicted = predict_server_vram(profile, settings.total_ctx)
    batch = automatic_batch(settings, predicted, [rig.gpus[i] for i in gpus], available_bytes(rig, gpus))
    return settings if batch == settings.batch else replace(settings, batch=batch, ubatch=batch)


def stock_load(profile: ModelProfile, rig: Rig, request: PlanRequest) -> StockLoad:
    """What stock Ollama of ``request.era`` does, the client's ``num_gpu`` and ``main_gpu`` honoured."""
    if not rig.gpus or request.num_gpu == 0:
        placement = on_cpu(n_gpus=len(rig.gpus), n_layers=profile.n_layers)
        settings = settings_on(profile, rig, request, ())
        return StockLoad(placement=placement, settings=settings, gpus=(), solo=False, shifts_bytes=(0,) * len(rig.gpus))
    return _runner_load(profile, rig, request) if request.era == "runner" else _llama_server_load(profile, rig, request)


def select_gpus(profile: ModelProfile, rig: Rig, request: PlanRequest) -> tuple[tuple[int, ...], bool]:
    """The GPUs that a load gets, in the rig's order, and whether it is one on purpose: ``selectLlamaServerPlacement``."""
    groups = libraries(rig)
    if len(rig.gpus) <= 1:
        return tuple(range(len(rig.gpus))), request.main_gpu is not None
    if request.main_gpu is not None:
        named = _first_called(rig, request.main_gpu)
        return (_best_group(rig, groups), False) if named is None else ((named,), True)
    if not request.spread:
        settings = effective_settings(profile, rig, request)
        predicted = predict_server_vram(profile, settings.total_ctx)
        holding = [i for i in range(len(rig.gpus)) if predicted <= available_bytes(rig, (i,)) * SOLO_PERCENT // 100]
        if predicted and holding:
            return (max(holding, key=_rank(rig)),), True
    return _best_group(rig, groups), False


def main_gpu_of(rig: Rig, gpu: int) -> int | None:
    """The ``main_gpu`` that means ``gpu``: its place in its library; ``None`` where Ollama takes another library's for it."""
    place = next(group.index(gpu) for group in libraries(rig) if gpu in group)
    return place if _first_called(rig, place) == gpu else None


def _first_called(rig: Rig, main_gpu: int) -> int | None:
    """The GPU that Ollama takes for ``main_gpu``: of those in that place of a library the one that it would choose by itself."""
    called = [group[main_gpu] for group in libraries(rig) if 0 <= main_gpu < len(group)]
    return max(called, key=_rank(rig), default=None)


def _rank(rig: Rig) -> Callable[[int], tuple[bool, int, int]]:
    """By what Ollama chooses one of several GPUs: the discrete one with the most free memory."""
    return lambda gpu: (not rig.gpus[gpu].integrated, available_bytes(rig, (gpu,)), -gpu)


def libraries(rig: Rig) -> list[tuple[int, ...]]:
    """The GPUs of each library (CUDA, ROCm, …), in the order in which Ollama finds them."""
    names = dict.fromkeys(gpu.library for gpu in rig.gpus)
    return [tuple(i for i, gpu in enumerate(rig.gpus) if gpu.library == name) for name in names]


def _best_group(rig: Rig, groups: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return max(groups, key=lambda group: (any(not rig.gpus[i].integrated for i in group), available_bytes(rig, group)))


def _llama_server_load(profile: ModelProfile, rig: Rig, request: PlanRequest) -> StockLoad:
    gpus, solo = select_gpus(profile, rig, request)
    settings = settings_on(profile, rig, request, gpus)
    free = [max(rig.gpus[i].free_bytes - request.runtime_bytes, 0) for i in gpus]
    if request.num_gpu is not None and request.num_gpu > 0:
        counts = split_by_memory(min(request.num_gpu, profile.n_layers + 1), free)
        fit = Fit(placement=contiguous(counts, profile.n_layers), shifts_bytes=(0,) * len(gpus))
    else:
        fit = auto_fit(profile, sizes_of(profile, settings), free, [FIT_MARGIN_BYTES] * len(gpus))
    shifts = [0] * len(rig.gpus)
    for gpu, shift in zip(gpus, fit.shifts_bytes, strict=True):
        shifts[gpu] = shift
    return StockLoad(
        placement=on_rig(fit.placement, gpus, len(rig.gpus)),
        settings=settings,
        gpus=gpus,
        solo=solo,
        shifts_bytes=tuple(shifts),
    )


def on_rig(placement: Placement, gpus: Sequence[int], n_gpus: int) -> Placement:
    """``placement`` on devices 0, 1, … as one on the rig's ``gpus``."""
    layers = [0] * n_gpus
    for device, count in enumerate(placement.layers):
        layers[gpus[device]] = count
    return replace(
        placement,
        layers=tuple(layers),
        order=tuple(gpus[device] for device in placement.order),
        output_gpu=None if placement.output_gpu is None else gpus[placement.output_gpu],
    )


def _runner_load(profile: ModelProfile, rig: Rig, request: PlanRequest) -> StockLoad:
    settings = settings_on(profile, rig, request, ())
    costs = layer_costs(profile, settings).all_bytes
    sizes = sizes_of(profile, settings)
    requested = request.num_gpu if request.num_gpu is not None and request.num_gpu > 0 else None
    gpus = _best_group(rig, libraries(rig))
    graphs = [0] * len(rig.gpus)
    placement = on_cpu(n_gpus=len(rig.gpus), n_layers=profile.n_layers)
    for _ in range(3):  # stock repeats the fit with the graphs that the last round has measured
        devices = [
            Device(
                gpu=i,
                weighted_bytes=max(rig.gpus[i].free_bytes - RUNNER_RESERVE_BYTES - request.gpu_overhead_bytes - graphs[i], 0),
                integrated=rig.gpus[i].integrated,
                uuid=rig.gpus[i].uuid,
            )
            for i in gpus
        ]
        groups = stock_groups(devices)
        fit = stock_fit(costs, groups[-1:] if request.spread else groups, requested=requested, force=True)
        found = to_placement(fit, n_gpus=len(rig.gpus))
        if found == placement:
            break
        placement = found
        if placement.order:
            for gpu, buffer in zip(placement.order, sizes.compute_bytes(placement), strict=True):
                graphs[gpu] = max(graphs[gpu], buffer)
    return StockLoad(
        placement=placement,
        settings=settings,
        gpus=placement.order,
        solo=len(placement.order) == 1,
        shifts_bytes=(0,) * len(rig.gpus),
    )
