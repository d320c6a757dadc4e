"""What an answer tells about the devices that it came from: which bytes and operations, in how many seconds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from planner.hardware import Rig
from planner.placement import Placement
from planner.profile import ModelProfile
from planner.settings import LoadSettings
from planner.speed import HOST, Work, work_at


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One model in one place: what all of its answers have in common.

    ``devices`` are UUIDs, or ``HOST`` for RAM, in the order of the layers; ``layers`` are those on each. ``flops`` are those of a
    prompt's token on each; empty where weights are copied to a GPU for a prompt, which is not a sum over devices.
    """

    model: str
    experts: bool
    devices: tuple[str, ...]
    layers: tuple[int, ...]
    hops: int
    flops: tuple[float, ...]
    ubatch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One answer. ``reads`` are the bytes that each of the run's devices read for a token.

    ``decode_tokens`` were written in ``decode_s`` seconds, ``prompt_tokens`` read in ``prompt_s``; 0 tokens: not known, or of
    no use.
    """

    run: Run
    reads: tuple[float, ...]
    decode_tokens: int = 0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    prompt_s: float = 0.0


def model_key(profile: ModelProfile) -> str:
    """Names a model by what decides its speed: its architecture and its tensors' names, types and shapes."""
    if (known := profile.memo.get("key")) is None:
        text = repr([profile.architecture, *((t.name, t.type.name, t.shape) for t in profile.tensors)])
        known = profile.memo["key"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return str(known)


def observe(
    profile: ModelProfile,
    rig: Rig,
    settings: LoadSettings,
    placement: Placement,
    *,
    context_tokens: int,
    decode: tuple[int, float] = (0, 0.0),
    prompt: tuple[int, float] = (0, 0.0),
) -> Observation:
    """An answer of ``profile`` in ``placement``; ``decode`` and ``prompt`` are tokens and seconds.

    ``context_tokens`` were in the context on average while it was written.
    """
    work = work_at(profile, settings, context_tokens)
    reads, hops = device_reads(work, placement)
    runs = placement.ranges()
    flops = {rig.gpus[gpu].uuid: work.flops_prefix[run.stop] - work.flops_prefix[run.start] for gpu, run in runs}
    if not placement.order:
        flops = {HOST: work.flops_prefix[-1]}
    names = tuple(HOST if gpu is None else rig.gpus[gpu].uuid for gpu in reads)
    return Observation(
        run=Run(
            model=model_key(profile),
            experts=bool(profile.expert_count),
            devices=names,
            layers=tuple(placement.cpu_layers if gpu is None else placement.layers[gpu] for gpu in reads),
            hops=hops,
            flops=() if placement.kind == "partial" else tuple(flops[name] for name in names),
            ubatch=settings.ubatch,
        ),
        reads=tuple(reads.values()),
        decode_tokens=decode[0],
        decode_s=decode[1],
        prompt_tokens=prompt[0],
        prompt_s=prompt[1],
    )


def device_reads(work: Work, placement: Placement) -> tuple[dict[int | None, float], int]:
    """Bytes that each GPU (``None``: the CPU) reads for a token of an answer, and hops: the sum in ``speed.decode_seconds``."""
    hops = max(len(placement.order) - 1, 0) + bool(placement.order and placement.cpu_layers)
    in_ram = work.read_prefix[placement.cpu_layers] + (work.output_bytes if placement.output_gpu is None else 0)
    on_gpus: dict[int | None, float] = {}
    for gpu, run in placement.ranges():
        experts = [work.expert_bytes[layer] for layer in run if layer in placement.cpu_experts]
        in_ram += sum(experts)
        hops += 2 * len(experts)
        on_gpus[gpu] = work.read_prefix[run.stop] - work.read_prefix[run.start] - sum(experts)
        on_gpus[gpu] += work.output_bytes if gpu == placement.output_gpu else 0
    return {**({None: in_ram} if in_ram else {}), **on_gpus}, hops
