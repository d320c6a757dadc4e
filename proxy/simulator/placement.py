"""What a load gets: stock's choice of cards and layers, its cost, and the error where the cards do not have the bytes.

The rules are ``planner.stock``'s; here they meet a request's options and the server's environment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.autofit import split_by_memory
from planner.hardware import Rig
from planner.memory import DeviceMemory, MemoryEstimate, estimate_memory
from planner.placement import Placement, contiguous
from planner.profile import ModelProfile
from planner.request import RUNTIME_BYTES, Era, PlanRequest
from planner.settings import LoadSettings
from planner.speed import Calibration, predict_speed
from planner.stock import (
    CONTEXT_TIERS,
    SOLO_PERCENT,
    StockLoad,
    available_bytes,
    effective_settings,
    predict_server_vram,
    stock_load,
)
from planner.units import GIB
from proxy.models.gguf import is_embedding
from proxy.simulator.options import DEFAULT_KEEP_ALIVE_S, RunnerOptions


class LoadError(Exception):
    """A model could not be loaded; the text is what Ollama answers with status 500."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The simulated server's version and environment (``OLLAMA_*``)."""

    era: Era = "llama-server"
    num_parallel: int = 1
    context_length: int | None = None
    kv_cache_type: str = "f16"
    flash_attention: bool = True
    sched_spread: bool = False
    gpu_overhead_bytes: int = 0
    keep_alive_s: float = DEFAULT_KEEP_ALIVE_S
    max_loaded_models: int | None = None
    honours_tensor_split: bool = False
    rates: Calibration | None = None
    """How fast the cards really are, where not as fast as their data say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A model on its way to the cards: what was chosen, what it takes, and how fast it will answer."""

    placement: Placement
    settings: LoadSettings
    memory: MemoryEstimate
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    wants_more_room: bool
    num_gpu: int
    visible: tuple[int, ...]
    """The cards that the runner sees, in the order in which it numbers them."""

    @property
    def vram_bytes(self) -> int:
        """``size_vram`` of ``/api/ps``: the buffers on the cards, without what CUDA itself takes."""
        return sum(device.total_bytes - device.runtime_bytes for device in self.memory.devices)

    @property
    def size_bytes(self) -> int:
        """``size`` of ``/api/ps``; the host's weights and cache count where layers run there (recorded: not its compute)."""
        in_ram = self.memory.host.weights_bytes + self.memory.host.kv_bytes
        return self.vram_bytes + (in_ram if self.placement.kind in ("partial", "cpu") else 0)

    def refusal(self, rig: Rig, environment: Environment) -> str | None:
        """The error of this load on ``rig`` as it is now, ``None`` where it fits."""
        for index, (device, gpu) in enumerate(zip(self.memory.devices, rig.gpus, strict=True)):
            if device.total_bytes <= gpu.free_bytes:
                continue
            if environment.era == "llama-server":
                return _cuda_out_of_memory(self.visible.index(index), device, gpu.free_bytes)
            if self.num_gpu > 0:  # without it the older era takes fewer layers until they fit
                return f"memory layout cannot be allocated with num_gpu = {self.num_gpu}"
        host = self.memory.host
        if self.placement.cpu_layers and rig.host.free_bytes is not None and host.total_bytes > rig.host.free_bytes:
            return (
                f"model requires more system memory ({host.total_bytes / GIB:.1f} GiB) "
                f"than is available ({rig.host.free_bytes / GIB:.1f} GiB)"
            )
        return None


def wanted_num_ctx(profile: ModelProfile, rig: Rig, options: RunnerOptions, environment: Environment) -> int:
    """Tokens of context that ``options`` mean: the request's, the environment's or the default, within the trained context."""
    return effective_settings(profile, rig, _plan_request(profile, options, environment)).num_ctx


def smaller_num_ctx(num_ctx: int) -> int | None:
    """The tier below ``num_ctx`` (``nextLowerAutoNumCtx``), ``None`` at the lowest; only the two lower tiers are tried."""
    return next((tokens for _, tokens in CONTEXT_TIERS[1:] if tokens < num_ctx), None)


def choose_load(profile: ModelProfile, rig: Rig, options: RunnerOptions, environment: Environment, *, num_ctx: int) -> Load:
    """Stock's load of ``profile`` on ``rig`` with ``num_ctx`` tokens. Raises ``LoadError`` where a fork refuses a split."""
    request = replace(_plan_request(profile, options, environment), num_ctx=num_ctx)
    stock = stock_load(profile, rig, request)
    placement, visible = stock.placement, stock.gpus
    if environment.honours_tensor_split and options.tensor_split and placement.order:
        placement = split_by_weights(profile, options.tensor_split, n_gpus=len(rig.gpus))
        visible = tuple(range(len(rig.gpus)))
    settings = stock.settings
    if environment.era == "llama-server" and not request.embedding:
        settings = replace(settings, outputs=settings.parallel)
    memory = estimate_memory(profile, settings, placement, runtime_bytes=[request.runtime_bytes] * len(rig.gpus))
    speed = predict_speed(profile, rig, settings, placement, environment.rates)
    return Load(
        placement=placement,
        settings=settings,
        memory=memory,
        decode_tokens_per_s=speed.decode_tokens_per_s,
        prefill_tokens_per_s=speed.prefill_tokens_per_s,
        wants_more_room=_wants_more_room(profile, rig, stock, request),
        num_gpu=options.num_gpu,
        visible=visible,
    )


def _plan_request(profile: ModelProfile, options: RunnerOptions, environment: Environment) -> PlanRequest:
    return PlanRequest(
        num_ctx=options.num_ctx or environment.context_length,
        num_batch=options.num_batch,
        num_gpu=options.num_gpu if options.num_gpu >= 0 else None,
        main_gpu=options.main_gpu if environment.era == "llama-server" else None,
        parallel=environment.num_parallel,
        kv_type_k=environment.kv_cache_type,
        kv_type_v=environment.kv_cache_type,
        flash_attention=environment.flash_attention,
        embedding=is_embedding(profile.metadata),
        spread=environment.sched_spread,
        gpu_overhead_bytes=environment.gpu_overhead_bytes,
        era=environment.era,
        runtime_bytes=RUNTIME_BYTES,
    )


def split_by_weights(profile: ModelProfile, tensor_split: str, *, n_gpus: int) -> Placement:
    """What a fork makes of ``tensor_split: "70,30"``: all layers on the cards, in those proportions. Raises ``LoadError``."""
    try:
        weights = [int(float(part) * 1000) for part in tensor_split.split(",")]
    except ValueError:
        raise LoadError(f'invalid tensor_split "{tensor_split}"') from None
    if len(weights) > n_gpus or min(weights) < 0 or not any(weights):
        raise LoadError(f'invalid tensor_split "{tensor_split}" for {n_gpus} GPUs')
    counts = split_by_memory(profile.n_layers + 1, [*weights, *[0] * (n_gpus - len(weights))])
    return contiguous(counts, profile.n_layers)


def _wants_more_room(profile: ModelProfile, rig: Rig, stock: StockLoad, request: PlanRequest) -> bool:
    """Whether, with other models loaded, one of them is evicted before this one is started.

    Since 0.30: the predicted bytes are more than 80 % of what is free on the chosen cards, and no part of the layers was asked
    for (``load`` in ``server/sched.go``). Before: not everything lies on the cards, and nobody asked for that.
    """
    if not rig.gpus or request.num_gpu == 0 or 0 < (request.num_gpu or 0) <= profile.n_layers:
        return False
    if request.era == "runner":
        return stock.placement.kind in ("partial", "cpu")
    predicted = predict_server_vram(profile, stock.settings.total_ctx)
    return predicted > available_bytes(rig, stock.gpus) * SOLO_PERCENT // 100


def _cuda_out_of_memory(number: int, device: DeviceMemory, free_bytes: int) -> str:
    """llama-server's last lines, by what it was allocating when the card was full: weights, then cache, then compute buffer.

    The last is recorded (Ollama 0.32.15); the others follow llama.cpp's sources.
    """
    name = f"CUDA{number}"
    weights_end = device.runtime_bytes + device.weights_bytes
    if weights_end > free_bytes:
        cause, size = "alloc_tensor_range", device.weights_bytes
    elif weights_end + device.kv_bytes > free_bytes:
        cause, size = "alloc_tensor_range", device.kv_bytes
    else:
        cause, size = "ggml_gallocr_reserve_n_impl", device.compute_bytes
    return (
        "llama-server process has terminated: exit status 1: cudaMalloc failed: out of memory\n"
        f"{cause}: failed to allocate {name} buffer of size {size}"
    )
