"""What runs of a placement in force, and where its plan says: what answers are measured by."""

from __future__ import annotations

from dataclasses import dataclass

from planner.plan import Plan
from planner.request import Candidate
from proxy.launcher.launches import Launches
from proxy.ollama.names import blob_name
from proxy.placing.inforce import InForce


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A loaded model as its plan has it."""

    name: str
    blob: str
    plan: Plan
    candidate: Candidate


def running(placed: InForce, launches: Launches) -> Running | None:
    """What runs of ``placed``; ``None`` where that is not known."""
    by_launcher = launches.placed(blob_name(placed.blob)) if placed.delivery.by_launcher else None
    if by_launcher:
        return Running(name=placed.model, blob=placed.blob, plan=by_launcher[0], candidate=by_launcher[1])
    plan, options = placed.plan, placed.delivery.options
    if plan is None or placed.delivery.by_launcher or "tensor_split" in options:
        return None
    if options and plan.request.era == "runner":  # num_gpu leaves the rest to Ollama
        return None
    return Running(name=placed.model, blob=placed.blob, plan=plan, candidate=plan.chosen_by_options if options else plan.stock)
