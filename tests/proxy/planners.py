"""A rig and planners for tests that want a certain plan, whatever the search would find."""

from __future__ import annotations

from collections.abc import Callable

from planner.hardware import Gpu, Host, Rig
from planner.memory import DeviceMemory, MemoryEstimate
from planner.placement import Placement, solo
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.request import Candidate, PlanRequest
from planner.settings import LoadSettings
from planner.units import GIB


def gpu(name: str, total_gib: float, *, free_gib: float | None = None, library: str = "CUDA") -> Gpu:
    free = total_gib if free_gib is None else free_gib
    return Gpu(uuid=f"GPU-{name}", name=name, total_bytes=int(total_gib * GIB), free_bytes=int(free * GIB), library=library)


class Source:
    """A source of GPUs that can be told to fail; counts how often it was asked."""

    def __init__(self, rig: Rig) -> None:
        self.value = rig
        self.error: Exception | None = None
        self.asked = 0

    def rig(self) -> Rig:
        self.asked += 1
        if self.error:
            raise self.error
        return self.value


RIG = Rig(gpus=(gpu("fast", 32), gpu("slow", 24)), host=Host())
PAIR = Source(RIG)


def candidate(placement: Placement, *, used_bytes: int = 0, num_ctx: int = 4096) -> Candidate:
    """A placement that takes ``used_bytes`` on each GPU that it uses."""
    held = [DeviceMemory(weights_bytes=used_bytes if i in placement.order else 0) for i in range(len(placement.layers))]
    return Candidate(
        label=placement.kind,
        placement=placement,
        settings=LoadSettings(num_ctx=num_ctx),
        memory=MemoryEstimate(devices=tuple(held), host=DeviceMemory()),
        limits=(2**60,) * len(placement.layers),
        decode_tokens_per_s=10.0,
        prefill_tokens_per_s=100.0,
    )


def make(
    profile: ModelProfile, rig: Rig, request: PlanRequest, chosen: Placement, stock: Placement, *, used_bytes: int = 0
) -> Plan:
    ctx = request.num_ctx or 4096
    baseline = candidate(stock, used_bytes=used_bytes, num_ctx=ctx)
    best = baseline if chosen == stock else candidate(chosen, used_bytes=used_bytes, num_ctx=ctx)
    return Plan(
        profile=profile,
        rig=rig,
        request=request,
        chosen=best,
        chosen_by_options=best if len(chosen.order) == 1 else baseline,
        stock=baseline,
        alternatives=(),
        rejected=(),
        reasons=("told so",),
    )


def planner_for(choose: Callable[[ModelProfile], Placement], *, used_bytes: int = 0):
    """A planner that gives each model what ``choose`` says, against a stock Ollama that takes the first GPU."""

    def planner(profile: ModelProfile, rig: Rig, request: PlanRequest) -> Plan:
        first = solo(0, n_gpus=len(rig.gpus), n_layers=profile.n_layers)
        return make(profile, rig, request, choose(profile), first, used_bytes=used_bytes)

    return planner
