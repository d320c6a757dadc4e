"""What is asked of the planner, and what a placement costs: the vocabulary between the caller, the search and the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.memory import MemoryEstimate
from planner.placement import Placement
from planner.settings import LoadSettings
from planner.speed import Calibration
from planner.units import MIB

Era = Literal["runner", "llama-server"]
"""``runner``: Ollama 0.11.5 to 0.24; ``llama-server``: 0.30 and later."""

Objective = Literal["decode", "prefill", "balanced"] | tuple[float, float]
"""What is to be fast: writing the answer, reading the prompt, or a chat turn of both: ``planner.choice.BALANCED_TURN``, or one of
so many tokens of prompt and answer."""

MARGIN_BYTES = 384 * MIB
"""Bytes left free on each GPU beside everything that is accounted for: cuBLAS workspaces and buffer pools (72 to 153 MiB
measured on an H200 after prompts of 2048 tokens), fragmentation, a desktop that grows. With Ollama 0.32.15 a split ran that
left about 400 MiB; one that lacked 146 MiB failed. llama.cpp's ``--fit`` leaves ``autofit.FIT_MARGIN_BYTES``."""

RUNTIME_BYTES = 527 * MIB
"""What the CUDA context of a process takes on each GPU that it uses. Measured: of 22528 and 14336 MiB free, llama-server b10488
(CUDA 13, H200) sees 22001 and 13809. Smaller cards take less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What is to be planned: a load as a client asks for it, and how the server is set.

    * ``num_ctx``, ``num_batch``: tokens; ``None``: nobody has set it, so Ollama's default for this rig.
    * ``num_gpu``, ``main_gpu``: the client's own placement options; ``None``: not set (-1 means the same for ``num_gpu``).
    * ``parallel``, ``kv_type_k``, ``kv_type_v``, ``flash_attention``, ``spread``, ``gpu_overhead_bytes``: Ollama's environment.
    * ``boost``: ``None`` for the automatic search, else the boost algorithm's factor, 1.0 to 2.0.
    * ``margin_bytes``: bytes that a plan leaves free on each GPU; wider after a load that failed.
    * ``runtime_bytes``: the fixed cost of each GPU that is used.
    * ``gpu``: the GPU that holds the whole model, by its place in the rig, and ``gpu_reason`` why. Where it does not fit there,
      the search decides as ever. It comes before ``boost``.
    * ``reserve_bytes``: bytes to leave free on each GPU beside the margin, in the rig's order; empty for none.
    * ``calibration``: rates learned from real answers, ``None``: predicted from the cards' data.

    Raises ``ValueError`` for an objective without tokens, or with negative ones.
    """

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    parallel: int = 1
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool = True
    embedding: bool = False
    spread: bool = False
    gpu_overhead_bytes: int = 0
    boost: float | None = None
    era: Era = "llama-server"
    objective: Objective = "decode"
    margin_bytes: int = MARGIN_BYTES
    runtime_bytes: int = RUNTIME_BYTES
    gpu: int | None = None
    gpu_reason: str = ""
    reserve_bytes: tuple[int, ...] = ()
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if isinstance(self.objective, tuple) and (min(self.objective) < 0 or not sum(self.objective)):
            raise ValueError(f"a turn of {self.objective[0]} tokens of prompt and {self.objective[1]} of answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A placement with what it should cost. ``limits`` are the bytes that each GPU may be given, in the rig's order."""

    label: str
    placement: Placement
    settings: LoadSettings
    memory: MemoryEstimate
    limits: tuple[int, ...]
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    calibrated: bool = False

    @property
    def fits(self) -> bool:
        """No GPU is given more bytes than its limit."""
        return all(device.total_bytes <= limit for device, limit in zip(self.memory.devices, self.limits, strict=True))
