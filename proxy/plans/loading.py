"""How Ollama would load a model for a request, as the planner wants to know it, and what its GPUs have free then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from planner.hardware import Gpu, Rig
from planner.profile import ModelProfile
from planner.request import MARGIN_BYTES, Era, PlanRequest
from planner.stock import SOLO_PERCENT, effective_settings, predict_server_vram
from planner.units import MIB
from proxy.config.settings import Settings
from proxy.errors import ModelError
from proxy.gpus.specs import idle_free_bytes
from proxy.models.catalog import ModelFacts

WIDER_MARGIN_BYTES = MARGIN_BYTES + 1024 * MIB
"""Bytes left free on each GPU by a plan after one that ran out of memory."""

MAX_TOKENS = 2**31 - 1
"""llama.cpp counts tokens in 32 bits."""


def asked_context(options: Mapping[str, Any], facts: ModelFacts, settings: Settings) -> int | None:
    """Tokens of context that the request, the model or Ollama's environment asks for; ``None`` where Ollama chooses."""
    wanted: int | None = options.get("num_ctx") or facts.default_integer("num_ctx") or settings.context_length
    return wanted


def sets_context(options: Mapping[str, Any], facts: ModelFacts) -> bool:
    """Whether the client or the model says how long the context is to be."""
    return options.get("num_ctx") is not None or facts.default_integer("num_ctx") is not None


def plan_request(
    options: Mapping[str, Any], facts: ModelFacts, settings: Settings, era: Era, *, careful: bool = False
) -> PlanRequest:
    """What to plan for a request with ``options``. Raises ``ModelError`` for sizes that no load can have."""
    num_ctx = asked_context(options, facts, settings)
    num_batch = options.get("num_batch") or facts.default_integer("num_batch")
    if not 0 < (num_ctx or 1) <= MAX_TOKENS or not 0 < (num_batch or 1) <= MAX_TOKENS:
        raise ModelError(f"num_ctx {num_ctx} with num_batch {num_batch} cannot be planned: 1 to {MAX_TOKENS} tokens each")
    return PlanRequest(
        num_ctx=num_ctx,
        num_batch=num_batch,
        parallel=settings.num_parallel or 1,
        kv_type_k=settings.kv_cache_type,
        kv_type_v=settings.kv_cache_type,
        flash_attention=settings.flash_attention is not False,
        embedding=facts.is_embedding,
        spread=settings.sched_spread,
        gpu_overhead_bytes=settings.gpu_overhead_bytes or 0,
        boost=settings.boost,
        era=era,
        margin_bytes=WIDER_MARGIN_BYTES if careful else MARGIN_BYTES,
    )


def without_companions(rig: Rig, facts: ModelFacts) -> Rig:
    """``rig`` less what is loaded beside the weights (projector, adapters): on each GPU, since Ollama chooses which."""
    size_bytes = facts.projector_bytes + facts.adapter_bytes
    return replace(rig, gpus=tuple(_less(gpu, size_bytes) for gpu in rig.gpus)) if size_bytes else rig


def makes_room(profile: ModelProfile, rig: Rig, request: PlanRequest, gpus: Sequence[int] | None = None) -> bool:
    """Whether Ollama evicts idle models before it loads this one on ``gpus``, by default on all of them.

    It does where it expects the model to take more than 80 % of what is free there.
    """
    predicted_bytes = predict_server_vram(profile, effective_settings(profile, rig, request).total_ctx)
    chosen = range(len(rig.gpus)) if gpus is None else gpus
    return predicted_bytes * 100 > SOLO_PERCENT * sum(rig.gpus[gpu].free_bytes for gpu in chosen)


def freed(rig: Rig, vram_bytes: int, held: Sequence[int] | None) -> Rig:
    """``rig`` as it will be when a model that takes ``vram_bytes`` has been unloaded, to be loaded anew.

    ``held`` says how much it holds on each GPU; without it, its bytes are taken to lie where memory is used. No GPU comes out
    emptier than the driver leaves it.
    """
    used = [gpu.total_bytes - gpu.free_bytes for gpu in rig.gpus]
    if held is None or len(held) != len(rig.gpus):
        held = [vram_bytes * gpu_used // max(sum(used), 1) for gpu_used in used]
    gpus = []
    for gpu, held_bytes in zip(rig.gpus, held, strict=True):
        idle_bytes = max(idle_free_bytes(gpu.total_bytes), gpu.free_bytes)
        gpus.append(replace(gpu, free_bytes=min(gpu.free_bytes + held_bytes, idle_bytes)))
    return replace(rig, gpus=tuple(gpus))


def _less(gpu: Gpu, size_bytes: int) -> Gpu:
    return replace(gpu, free_bytes=min(max(gpu.free_bytes - size_bytes, 0), gpu.total_bytes))
