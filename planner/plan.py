"""PlanRequest -> Plan: which placement a model gets, what it should cost, what stock Ollama would do, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.hardware import Rig
from planner.memory import LoadSettings, MemoryEstimate
from planner.placement import Placement
from planner.profile import ModelProfile

Era = Literal["runner", "llama-server"]
"""``runner``: Ollama 0.11.5 to 0.24; ``llama-server``: 0.30 and later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What is to be planned. ``boost`` is ``None`` for the automatic search, else the boost algorithm's factor, 1.0 to 2.0."""

    settings: LoadSettings = LoadSettings()
    boost: float | None = None
    era: Era = "llama-server"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answer. ``chosen is stock`` means that nothing is better and the request passes unchanged."""

    profile: ModelProfile
    rig: Rig
    request: PlanRequest
    chosen: Candidate
    stock: Candidate
    stock_by_era: dict[Era, Candidate]
    alternatives: tuple[Candidate, ...]
    reasons: tuple[str, ...]


def make_plan(profile: ModelProfile, rig: Rig, request: PlanRequest) -> Plan:
    """The plan for ``request`` on ``rig``. Pure: equal input gives an equal plan."""
    raise NotImplementedError
