"""How Ollama would load a model for a request, as the planner wants to know it: context, batch, and the GPUs at that moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from planner.hardware import Gpu, Rig
from planner.memory import MIB, LoadSettings
from planner.plan import Era, PlanRequest
from proxy.catalog import ModelFacts
from proxy.errors import ModelError
from proxy.gpus.specs import idle_free_bytes
from proxy.settings import Settings

GIB = 2**30

CONTEXT_BY_VRAM = ((47 * GIB, 262144), (23 * GIB, 32768), (0, 4096))
"""From so many bytes of all GPUs together, Ollama's context where nobody sets one (``server/routes.go``)."""

DEFAULT_BATCH = 512
"""Tokens of a batch where nobody sets one; Ollama raises it with the context, which the stock baseline knows."""

MIN_CONTEXT = 4
"""Ollama raises smaller contexts to this (``Scheduler.GetRunner`` in ``server/sched.go``)."""

MAX_TOKENS = 2**31 - 1
"""llama.cpp counts tokens in 32 bits."""

WIDER_MARGIN_BYTES = 1024 * MIB
WIDER_MARGIN_SHARE = 0.05
"""What a plan leaves free on each GPU after one that ran out of memory: this many bytes and this share of the card."""


def asked_context(options: Mapping[str, Any], facts: ModelFacts, settings: Settings) -> int | None:
    """Tokens of context that the request, the model or Ollama's environment asks for; ``None`` where Ollama chooses."""
    wanted: int | None = options.get("num_ctx") or facts.default_integer("num_ctx") or settings.context_length
    return wanted


def plan_request(options: Mapping[str, Any], facts: ModelFacts, rig: Rig, settings: Settings, era: Era) -> PlanRequest:
    """What to plan for a request with ``options``. Raises ``ModelError`` for sizes that no load can have."""
    num_ctx = asked_context(options, facts, settings) or context_by_vram(rig)
    num_ctx = min(max(num_ctx, MIN_CONTEXT), facts.profile.context_train or num_ctx)
    batch = options.get("num_batch") or facts.default_integer("num_batch") or DEFAULT_BATCH
    if num_ctx > MAX_TOKENS or not 0 < batch <= MAX_TOKENS:
        raise ModelError(f"a context of {num_ctx} tokens with a batch of {batch} cannot be planned")
    load = LoadSettings(
        num_ctx=num_ctx,
        parallel=1 if facts.is_embedding else settings.num_parallel or 1,
        batch=batch,
        ubatch=batch,
        kv_type_k=settings.kv_cache_type,
        kv_type_v=settings.kv_cache_type,
        flash_attention=settings.flash_attention is not False,
    )
    return PlanRequest(settings=load, boost=settings.boost, era=era)


def context_by_vram(rig: Rig) -> int:
    """Tokens of context that Ollama takes where nobody sets any."""
    total_bytes = sum(gpu.total_bytes for gpu in rig.gpus)
    return next(tokens for least_bytes, tokens in CONTEXT_BY_VRAM if total_bytes >= least_bytes)


def without_companions(rig: Rig, facts: ModelFacts) -> Rig:
    """``rig`` less what is loaded beside the weights (projector, adapters): on each GPU, since Ollama chooses which."""
    size_bytes = facts.projector_bytes + facts.adapter_bytes
    return replace(rig, gpus=tuple(_less(gpu, size_bytes) for gpu in rig.gpus)) if size_bytes else rig


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


def with_margin(rig: Rig) -> Rig:
    """``rig`` with less free on each GPU, for a plan after one that ran out of memory."""
    return replace(
        rig, gpus=tuple(_less(gpu, WIDER_MARGIN_BYTES + int(WIDER_MARGIN_SHARE * gpu.total_bytes)) for gpu in rig.gpus)
    )


def _less(gpu: Gpu, size_bytes: int) -> Gpu:
    return replace(gpu, free_bytes=min(max(gpu.free_bytes - size_bytes, 0), gpu.total_bytes))
