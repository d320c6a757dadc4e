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
    if options.num_gpu == 0 or not n:
        placement = on_cpu(n_gpus=n, n_layers=profile.n_layers)
    else:
        best = max(range(n), key=lambda i: rig.gpus[i].free_bytes)
        placement = solo(best, n_gpus=n, n_layers=profile.n_layers)
    memory = estimate_memory(profile, settings, placement)
    return Load(
        placement=placement,
        settings=settings,
        memory=memory,
        decode_tokens_per_s=50.0,
        prefill_tokens_per_s=1000.0,
        wants_more_room=False,
        num_gpu=options.num_gpu,
    )


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
