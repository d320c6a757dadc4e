"""Seconds per token of a placement: decode by bytes over bandwidth, prefill by operations over rate.

Decode computes layer after layer, so its time is a sum over devices::

    t = Σ_d (active weight bytes_d + cache bytes_d) / effective bandwidth_d + layers_d · layer seconds_d, + hops · HOP_SECONDS

Active are all weights of a dense layer and ``experts_used / expert_count`` of the routed experts. A layer costs ``LAYER_SECONDS``
beside its bytes, and on a card that turned out slower than its data promise so many times more. On three measured pairs of
unequal GPUs (56 splits of four dense models and a mixture) this holds within 5 % (``tests/planner/test_two_gpus.py``).

Prefill works on micro-batches: each device is a stage that takes ``2 · active parameters · tokens / rate`` seconds (at least as
long as reading its weights). Where everything is on GPUs, the stages overlap, ``t = Σ stages + (micro-batches − 1) · pace``
(``pace``: the slowest stage, and more where others are nearly as slow), else they follow one another. Weights in RAM are copied
to a GPU for each micro-batch.

Rates come from a ``Calibration``, else from the card's data, else from its generation (``Rates.source`` says which).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import ceil, prod
from typing import Literal

from planner.cache import cache_bytes
from planner.hardware import Gpu, Host, Rig
from planner.placement import Placement
from planner.profile import ModelProfile, Tensor
from planner.settings import LoadSettings

GPU_EFFICIENCY = (
    ((12, 0), 0.80),
    ((9, 0), 0.50),  # H100, H200, B200: HBM
    ((8, 6), 0.80),
    ((8, 0), 0.50),  # A100: HBM
    ((7, 5), 0.80),
    ((7, 0), 0.50),  # V100: HBM
    ((6, 1), 0.80),
    ((6, 0), 0.50),  # P100: HBM
)
"""``(lowest compute capability, part of the memory's theoretical rate that decode reaches)``, a pure number: 0.80 of GDDR, 0.50
of HBM, whose rate a single token's kernels can't exhaust. Fitted together with ``LAYER_SECONDS`` to dense models alone: published
runs of 1B to 70B models on thirteen cards (``proxy/simulator/published.csv``) and three models measured on an H200; 7 % off in
the root mean square on GDDR, 10 % on HBM."""

LOWEST_EFFICIENCY = 0.80
"""The same of older GPUs, and where the compute capability is unknown: nearly all of those have GDDR."""

LAYER_SECONDS = 40e-6
"""What a layer costs beside its bytes: kernel starts, norms, waiting. See ``GPU_EFFICIENCY``; single cards fit 37 to 90 µs. The
routing of experts costs no more that could be told from it: mixtures were kept out of the fit and come out 0.9 to 1.35 times as
fast as measured (30B-A3B on an H200, gpt-oss 20B on an RTX 4090)."""

HOP_SECONDS = 75e-6
"""Handing a hidden state to the next device and waiting for it: 33 splits measured on two H200 fit 50 to 100 µs; 16 on one H200
that stood for two cards fit 200."""

HOST_BANDWIDTH_BYTES_PER_S = 51_200_000_000
"""Of a host about which nothing is known: two channels of DDR4-3200 (JEDEC 79-4: 25.6 GB/s each)."""

HOST_EFFICIENCY = 0.6
"""Part of the host's theoretical memory rate that llama.cpp's CPU threads reach, a pure number; cautious."""

HOST_FLOPS_PER_S = 4e11
"""Prefill on a CPU alone, FLOP/s: eight AVX2 cores at about 3 GHz reach a third of their peak."""

UNKNOWN_BANDWIDTH = (
    ((10, 0), 896e9),  # RTX 5070 Ti
    ((9, 0), 3350e9),  # H100 SXM
    ((8, 9), 504e9),  # RTX 4070
    ((8, 0), 760e9),  # RTX 3080
    ((7, 0), 448e9),  # RTX 2070
    ((6, 0), 320e9),  # GTX 1080
)
"""``(lowest compute capability, bytes/s)`` for a GPU of unknown bandwidth: a middling card of its generation (NVIDIA's data)."""

LOWEST_BANDWIDTH = 192e9
"""Bytes/s of older GPUs, and where the compute capability is unknown too (a GTX 1060's)."""

FLOPS_PER_SM_CYCLE = (
    ((10, 0), 440.0),
    ((9, 0), 750.0),  # measured: H200, 132 SMs × 1980 MHz, 70B Q4_0 at 1407 tok/s
    ((8, 9), 440.0),
    ((8, 0), 400.0),  # RTX 3090, 8B Q6_K at 3500 tok/s (llama.cpp pull request 7860)
    ((7, 5), 350.0),
    ((7, 0), 250.0),
    ((6, 0), 266.0),  # Tesla P40, 7B Q4_0 at 912 tok/s (llama.cpp pull request 4766)
)
"""``(lowest compute capability, FLOP)`` that prefill gets out of one SM in one clock, all losses counted."""

LOWEST_FLOPS_PER_SM_CYCLE = 100.0
"""The same of older GPUs."""

UNKNOWN_SM_CYCLES_PER_S = 80e9
"""SM count × clock of a GPU where one is unknown: 46 SMs at 1.74 GHz (an RTX 3070)."""

EXPERT_FLOPS_SHARE = 0.25
"""Part of a dense layer's prefill rate that routed experts reach, a pure number: each of them meets few tokens of a micro-batch
(32 of 512 where 8 of 128 are used), so tiles of the matrix units stay mostly empty. Measured: a 30B-A3B on an H200 reads a prompt
at 10 100 to 12 300 tok/s, dense models on the same card reach 178 TFLOP/s."""

JAM = 3.5
"""How little the stages of a pipeline wait for each other, a pure number: the higher, the more the slowest alone sets the pace.
Measured on two H200 with models of 8B to 70B: splits whose stages take nearly the same time are up to 16 % slower than that;
3.5 predicts all 27 within 11 %, in their order."""

PCIE_LANE_BYTES_PER_S = 0.8 * 0.985e9
"""Of one third-generation lane, a fifth of it lost to protocol; each generation doubles it (PCI Express Base Specification)."""

UNKNOWN_PCIE = (3, 16)
"""Generation and lanes of a link that is not known."""

CONTEXT_TOKENS = 4096
"""Tokens in the context when decode is rated: few chats fill a large context."""

PROMPT_TOKENS = 2048
"""Tokens of the prompt by which prefill is rated; also the length of the measured rows."""

HOST = "host"
"""What a ``Calibration`` calls the CPU with its RAM, in place of a UUID."""

Source = Literal["calibrated", "inferred", "card", "generation"]
"""Measured on the device itself; carried over from what others turned out to be; from the card's data; from its generation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How fast one device is: effective bytes/s in decode, effective FLOP/s in prefill, bytes/s of its PCIe link.

    ``layer_s`` are the seconds that a layer costs in decode beside its bytes.
    """

    decode_bytes_per_s: float
    prefill_flops_per_s: float
    layer_s: float = LAYER_SECONDS
    pcie_bytes_per_s: float = PCIE_LANE_BYTES_PER_S * UNKNOWN_PCIE[1]
    source: Source = "card"

    @property
    def layer_bytes(self) -> float:
        """Bytes that the device would read in ``layer_s``; the same before and after a calibration."""
        return self.layer_s * self.decode_bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Rates learned from real answers: ``(effective bytes/s, prefill FLOP/s)`` by GPU UUID, of the CPU by ``HOST``.

    ``inferred`` are those of devices that were not measured, as far as the measured ones tell; all others keep the predicted.
    """

    rates: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    inferred: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def apply(self, device: str, rates: Rates) -> Rates:
        """``rates`` as predicted, or what is known better of ``device``: its layers' fixed costs miss as its rate does.

        What holds a card back (a power limit, a lower clock, another program) holds its small kernels back too: on two pairs of
        an H200 and one held back, 26 splits of four models come out 1.7 % off in the root mean square so, and 2.2 % with fixed
        costs that are the same everywhere.
        """
        known = self.rates.get(device) or self.inferred.get(device)
        if known is None:
            return rates
        source: Source = "calibrated" if device in self.rates else "inferred"
        layer_s = rates.layer_s * rates.decode_bytes_per_s / known[0]
        return replace(rates, decode_bytes_per_s=known[0], prefill_flops_per_s=known[1], layer_s=layer_s, source=source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Tokens per second. ``calibrated``: every GPU that holds layers has learned rates."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    calibrated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one token costs in a model: bytes read in decode and FLOP in prefill, of each repeating layer and the output layer.

    FLOP are those of a dense layer that would take as long: experts' count ``1 / EXPERT_FLOPS_SHARE`` times.
    ``expert_bytes`` are the parts of the active experts, contained in ``layer_bytes``. ``weights_bytes`` are all weights of a
    layer, ``experts_held_bytes`` all of its experts. ``read_prefix[i]`` sums ``layer_bytes`` below layer ``i``, and so on.
    """

    layer_bytes: tuple[float, ...]
    expert_bytes: tuple[float, ...]
    output_bytes: int
    weights_bytes: tuple[int, ...]
    experts_held_bytes: tuple[int, ...]
    read_prefix: tuple[float, ...]
    expert_prefix: tuple[float, ...]
    flops_prefix: tuple[float, ...]
    weights_prefix: tuple[int, ...]


def model_work(profile: ModelProfile, settings: LoadSettings) -> Work:
    """The work of ``profile`` with ``CONTEXT_TOKENS`` in the context (fewer where it is smaller); kept with the profile."""
    key = replace(settings, num_ctx=min(settings.num_ctx, CONTEXT_TOKENS), parallel=1, batch=1, ubatch=1)
    return profile.remember("work", key, lambda: work_at(profile, settings, CONTEXT_TOKENS))


def work_at(profile: ModelProfile, settings: LoadSettings, context_tokens: int) -> Work:
    """The work of ``profile`` with ``context_tokens`` in the context (fewer where it is smaller)."""
    used = replace(settings, num_ctx=min(settings.num_ctx, context_tokens), parallel=1, batch=1, ubatch=1)
    share = profile.experts_used / profile.expert_count if profile.expert_count else 1.0
    caches, weights = cache_bytes(profile, used), profile.layer_weights
    held = tuple(layer.expert_bytes for layer in profile.layers)
    experts = tuple(each * share for each in held)
    layer_bytes = tuple(
        weight - routed + active + cache for weight, routed, active, cache in zip(weights, held, experts, caches, strict=True)
    )
    of_kind = {kind: _flops(profile.layer_tensors[kind], share) for kind in set(profile.tensor_kinds)}
    return Work(
        layer_bytes=layer_bytes,
        expert_bytes=experts,
        output_bytes=profile.output_bytes,
        weights_bytes=weights,
        experts_held_bytes=held,
        read_prefix=(0.0, *accumulate(layer_bytes)),
        expert_prefix=(0.0, *accumulate(experts)),
        flops_prefix=(0.0, *accumulate(of_kind[kind] for kind in profile.tensor_kinds)),
        weights_prefix=profile.weights_before,
    )


def _flops(tensors: Mapping[str, Tensor], share: float) -> float:
    """Operations of a token in a layer: two for each parameter that it meets."""
    dense = expert = 0.0
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2:
            continue
        if "exps" in name:
            expert += prod(tensor.shape) * share
        else:
            dense += prod(tensor.shape)
    return 2.0 * (dense + expert / EXPERT_FLOPS_SHARE)


def gpu_rates(gpu: Gpu, calibration: Calibration | None = None) -> Rates:
    """Rates of one GPU: learned, else inferred, else by its data, else by its generation."""
    capability = gpu.compute_capability or (0, 0)
    generation, width = gpu.pcie_generation or UNKNOWN_PCIE[0], gpu.pcie_width or UNKNOWN_PCIE[1]
    pcie = PCIE_LANE_BYTES_PER_S * width * 2.0 ** (generation - 3)
    bandwidth = gpu.bandwidth_bytes_per_s or _by_generation(UNKNOWN_BANDWIDTH, capability, LOWEST_BANDWIDTH)
    cycles = gpu.sm_count * gpu.clock_mhz * 1e6 if gpu.sm_count and gpu.clock_mhz else UNKNOWN_SM_CYCLES_PER_S
    predicted = Rates(
        decode_bytes_per_s=bandwidth * _by_generation(GPU_EFFICIENCY, capability, LOWEST_EFFICIENCY),
        prefill_flops_per_s=cycles * _by_generation(FLOPS_PER_SM_CYCLE, capability, LOWEST_FLOPS_PER_SM_CYCLE),
        pcie_bytes_per_s=pcie,
        source="card" if gpu.bandwidth_bytes_per_s else "generation",
    )
    return calibration.apply(gpu.uuid, predicted) if calibration else predicted


def host_rates(host: Host, calibration: Calibration | None = None) -> Rates:
    """Rates of the CPU with its RAM: learned, else by its data."""
    bandwidth = host.bandwidth_bytes_per_s or HOST_BANDWIDTH_BYTES_PER_S
    predicted = Rates(decode_bytes_per_s=bandwidth * HOST_EFFICIENCY, prefill_flops_per_s=HOST_FLOPS_PER_S)
    return calibration.apply(HOST, predicted) if calibration else predicted


def _by_generation(table: tuple[tuple[tuple[int, int], float], ...], capability: tuple[int, int], lowest: float) -> float:
    return next((value for least, value in table if capability >= least), lowest)


def predict_speed(
    profile: ModelProfile, rig: Rig, settings: LoadSettings, placement: Placement, calibration: Calibration | None = None
) -> Speed:
    """Decode and prefill of ``placement`` on ``rig``."""
    rates = tuple(gpu_rates(gpu, calibration) for gpu in rig.gpus)
    return work_speed(model_work(profile, settings), placement, rates, host_rates(rig.host, calibration), ubatch=settings.ubatch)


def work_speed(work: Work, placement: Placement, rates: tuple[Rates, ...], host: Rates, *, ubatch: int) -> Speed:
    """The same for known work on known devices."""
    return Speed(
        decode_tokens_per_s=1 / decode_seconds(work, placement, rates, host),
        prefill_tokens_per_s=PROMPT_TOKENS / prefill_seconds(work, placement, rates, host, ubatch=ubatch),
        calibrated=bool(placement.order) and all(rates[gpu].source == "calibrated" for gpu in placement.order),
    )


def decode_seconds(work: Work, placement: Placement, rates: tuple[Rates, ...], host: Rates) -> float:
    """Seconds for one token of an answer."""
    seconds = placement.cpu_layers * host.layer_s
    hops = max(len(placement.order) - 1, 0)
    in_ram = work.read_prefix[placement.cpu_layers]
    if placement.order and placement.cpu_layers:
        hops += 1
    for layer in placement.cpu_experts:
        if layer >= placement.cpu_layers:
            in_ram += work.expert_bytes[layer]
            hops += 2
    for gpu, run in placement.ranges():
        read = work.read_prefix[run.stop] - work.read_prefix[run.start]
        read -= sum(work.expert_bytes[layer] for layer in run if layer in placement.cpu_experts) if placement.cpu_experts else 0
        read += work.output_bytes if gpu == placement.output_gpu else 0
        seconds += read / rates[gpu].decode_bytes_per_s + len(run) * rates[gpu].layer_s
    if placement.output_gpu is None:
        in_ram += work.output_bytes
    return seconds + in_ram / host.decode_bytes_per_s + hops * HOP_SECONDS


def prefill_seconds(work: Work, placement: Placement, rates: tuple[Rates, ...], host: Rates, *, ubatch: int) -> float:
    """Seconds to read ``PROMPT_TOKENS``. Logits are computed for the last token only, so the output layer counts nothing."""
    batches = ceil(PROMPT_TOKENS / ubatch)
    each = PROMPT_TOKENS / batches
    if not placement.order:
        flops = work.flops_prefix[-1] * PROMPT_TOKENS / host.prefill_flops_per_s
        return float(max(flops, batches * work.weights_prefix[-1] / host.decode_bytes_per_s))
    stages = []
    for gpu, run in placement.ranges():
        flops = work.flops_prefix[run.stop] - work.flops_prefix[run.start]
        weights = float(work.weights_prefix[run.stop] - work.weights_prefix[run.start])
        stages.append(max(flops * each / rates[gpu].prefill_flops_per_s, weights / rates[gpu].decode_bytes_per_s))
    if placement.kind in ("solo", "split"):
        return sum(stages) + (batches - 1) * pace(stages)
    first = rates[placement.order[0]]
    copied = work.weights_prefix[placement.cpu_layers] + sum(
        work.experts_held_bytes[layer] for layer in placement.cpu_experts if layer >= placement.cpu_layers
    )
    extra = copied / first.pcie_bytes_per_s + work.flops_prefix[placement.cpu_layers] * each / first.prefill_flops_per_s
    return batches * (sum(stages) + extra)


def pace(stages: Sequence[float]) -> float:
    """Seconds from one micro-batch to the next through ``stages`` of so many seconds each: ``(Σ stage^JAM)^(1/JAM)``."""
    slowest = max(stages)
    return slowest * sum((stage / slowest) ** JAM for stage in stages) ** (1 / JAM) if slowest else 0.0


def solo_rates(
    profile: ModelProfile, settings: LoadSettings, gpu: Gpu, *, decode_tokens_per_s: float, prefill_tokens_per_s: float
) -> tuple[float, float]:
    """What a ``Calibration`` keeps of ``gpu`` if it ran ``profile`` alone at these speeds: effective bytes/s and FLOP/s."""
    work = model_work(profile, settings)
    read = work.read_prefix[-1] + work.output_bytes + profile.n_layers * gpu_rates(gpu).layer_bytes
    return read * decode_tokens_per_s, work.flops_prefix[-1] * prefill_tokens_per_s
