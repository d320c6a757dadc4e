"""What a load gets: stock's choice of cards and layers, its cost, and the error where the cards do not have the bytes.

The rules are ``planner.stock``'s; here they meet a request's options and the server's environment.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.hardware import Rig
from planner.memory import LoadSettings, MemoryEstimate, estimate_memory
from planner.placement import Placement, on_cpu, solo
from planner.plan import Era
from planner.profile import ModelProfile
from proxy.simulator.options import DEFAULT_KEEP_ALIVE_S, RunnerOptions

GIB = 2**30
CONTEXT_TIERS = ((47 * GIB, 262144), (23 * GIB, 32768), (0, 4096))
"""Total VRAM in bytes, from which on a request without ``num_ctx`` gets so many tokens (``routes.go``)."""


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

    @property
    def vram_bytes(self) -> int:
        """``size_vram`` of ``/api/ps``: the buffers on the cards, without what CUDA itself takes."""
        return sum(device.total_bytes - device.runtime_bytes for device in self.memory.devices)

    @property
    def size_bytes(self) -> int:
        """``size`` of ``/api/ps``; the host counts where layers run there."""
        return self.vram_bytes + (self.memory.host.total_bytes if self.placement.kind in ("partial", "cpu") else 0)

    def refusal(self, rig: Rig, environment: Environment) -> str | None:
        """The error of this load on ``rig`` as it is now, ``None`` where it fits."""
        for index, (device, gpu) in enumerate(zip(self.memory.devices, rig.gpus, strict=True)):
            if device.total_bytes > gpu.free_bytes:
                if environment.era == "runner":
                    return f"memory layout cannot be allocated with num_gpu = {self.num_gpu}"
                return _cuda_out_of_memory(0 if len(self.placement.order) == 1 else index, self.memory, index, gpu.free_bytes)
        host = self.memory.host
        if self.placement.cpu_layers and rig.host.free_bytes is not None and host.total_bytes > rig.host.free_bytes:
            return (
                f"model requires more system memory ({host.total_bytes / GIB:.1f} GiB) "
                f"than is available ({rig.host.free_bytes / GIB:.1f} GiB)"
            )
        return None


def default_num_ctx(profile: ModelProfile, rig: Rig, options: RunnerOptions, environment: Environment) -> int:
    """Tokens of context: the request's, else the environment's, else by total VRAM; never more than the model was trained for."""
    total = sum(gpu.total_bytes for gpu in rig.gpus)
    automatic = next(tokens for least, tokens in CONTEXT_TIERS if total >= least)
    wanted = options.num_ctx or environment.context_length or automatic
    return min(wanted, profile.context_train or wanted)


def smaller_num_ctx(num_ctx: int) -> int | None:
    """The tier below ``num_ctx`` (``nextLowerAutoNumCtx``), ``None`` at the lowest."""
    return next((tokens for _, tokens in CONTEXT_TIERS[1:] if tokens < num_ctx), None)


def choose_load(profile: ModelProfile, rig: Rig, options: RunnerOptions, environment: Environment, *, num_ctx: int) -> Load:
    """Stock's load of ``profile`` on ``rig`` with ``num_ctx`` tokens."""
    settings = LoadSettings(num_ctx=num_ctx, parallel=environment.num_parallel)
    n = len(rig.gpus)
    predicted = _predicted(profile, settings)
    if options.num_gpu == 0 or not n:
        placement = on_cpu(n_gpus=n, n_layers=profile.n_layers)
    elif environment.honours_tensor_split and options.tensor_split:
        weights = [float(x) for x in options.tensor_split.split(",")]
        placement = _proportional(profile, weights)
    elif environment.era == "llama-server" and options.main_gpu is not None and options.main_gpu < n:
        placement = solo(options.main_gpu, n_gpus=n, n_layers=profile.n_layers)
    else:
        threshold = 0.8 if environment.era == "llama-server" else 0.97
        fitting = [i for i, gpu in enumerate(rig.gpus) if predicted <= threshold * gpu.free_bytes]
        if fitting and not environment.sched_spread:
            placement = solo(max(fitting, key=lambda i: rig.gpus[i].free_bytes), n_gpus=n, n_layers=profile.n_layers)
        else:
            placement = _proportional(profile, [gpu.free_bytes for gpu in rig.gpus])
    memory = estimate_memory(profile, settings, placement, runtime_bytes=[457 * 2**20] * n)
    free = sum(rig.gpus[i].free_bytes for i in placement.order)
    seconds = sum(d.weights_bytes / (g.bandwidth_bytes_per_s or 1) for d, g in zip(memory.devices, rig.gpus, strict=True))
    partial = 0 < options.num_gpu < profile.n_layers + 1
    return Load(
        placement=placement,
        settings=settings,
        memory=memory,
        decode_tokens_per_s=0.7 / seconds if seconds else 5.0,
        prefill_tokens_per_s=20 / seconds if seconds else 50.0,
        wants_more_room=bool(placement.order) and not partial and predicted > 0.8 * free,
        num_gpu=options.num_gpu,
    )


def _predicted(profile: ModelProfile, settings: LoadSettings) -> int:
    heads = max(profile.integer("attention.head_count"), 1)
    kv_heads = min(profile.per_layer("attention.head_count_kv", heads), default=heads)
    return profile.file_bytes + 4 * profile.n_layers * kv_heads * (profile.embedding_length // heads) * settings.total_ctx


def _proportional(profile: ModelProfile, weights: list[float] | list[int]) -> Placement:
    total, layers, used = sum(weights), [], 0.0
    n = profile.n_layers + 1
    for weight in weights:
        before = round(used / total * n)
        used += weight
        layers.append(round(used / total * n) - before)
    last = max(i for i, count in enumerate(layers) if count)
    layers[last] -= 1
    order = tuple(i for i, count in enumerate(layers) if count or i == last)
    return Placement(layers=tuple(layers), order=order, output_gpu=last)


def _cuda_out_of_memory(shown: int, memory: MemoryEstimate, index: int, free_bytes: int) -> str:
    """llama-server's last lines, by what it was allocating when the card was full: weights, then cache, then compute buffer."""
    device = memory.devices[index]
    name = f"CUDA{shown}"
    start = "llama-server process has terminated: exit status 1: "
    if device.runtime_bytes + device.weights_bytes > free_bytes:
        return (
            f"{start}cudaMalloc failed: out of memory\n"
            f"alloc_tensor_range: failed to allocate {name} buffer of size {device.weights_bytes}\n"
            f"llama_model_load: error loading model: unable to allocate {name} buffer"
        )
    size = device.kv_bytes if device.total_bytes - device.compute_bytes > free_bytes else device.compute_bytes
    source = "alloc_tensor_range" if size == device.kv_bytes else "ggml_gallocr_reserve_n_impl"
    return f"{start}cudaMalloc failed: out of memory\n{source}: failed to allocate {name} buffer of size {size}"
