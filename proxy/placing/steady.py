"""When the plan of a loaded model is worth a reload. Functions of their arguments.

A reload takes seconds, sometimes minutes, and throws the prompt caches away. So a plan stays while its model is loaded, unless
another one is clearly better, and not again soon.
"""

from __future__ import annotations

from planner.choice import score
from planner.plan import Plan
from planner.request import Candidate
from proxy.ollama.options import Delivery, deliver, with_context
from proxy.placing.inforce import InForce

RELOAD_GAIN = 0.10
"""How much faster than a loaded model's plan another must be predicted to be worth a reload, a pure number."""

REPLAN_S = 600.0
"""Seconds for which a decision stands before it is looked at again: a model is not reloaded for speed more often than that."""


def due(in_force: InForce, now_s: float) -> bool:
    """Whether it is time to look at ``in_force`` again.

    Never at a placement that no plan explains, or that request options can't change: the launcher's, and of Ollama up to 0.24.
    """
    if in_force.plan is None or in_force.delivery.by_launcher or in_force.plan.request.era == "runner":
        return False
    return now_s - in_force.decided_at >= REPLAN_S


def worth_reload(before: Plan, after: Plan) -> bool:
    """Whether ``after``, delivered by options, beats ``before`` by ``RELOAD_GAIN``, both by the rates of now."""
    objective = after.request.objective
    now = _as_rated_now(before.chosen_by_options, after)
    return score(after.chosen_by_options, objective) >= score(now, objective) * (1 + RELOAD_GAIN)


def said(plan: Plan, delivery: Delivery) -> Delivery:
    """The ``delivery`` of ``plan`` by options that say where it goes, although stock would choose the same.

    Without an option that changes, Ollama loads nothing anew.
    """
    if not plan.unchanged_by_options or plan.stock.placement.kind != "solo":
        return delivery
    explicit = deliver(plan, plan.request.era, tensor_split=False, explicit=True)
    num_ctx = delivery.options.get("num_ctx")
    return explicit if num_ctx is None else with_context(explicit, int(num_ctx))


def same_runner(one: Delivery, other: Delivery) -> bool:
    """Whether Ollama takes one for the other: of the options that go out, ``tensor_split`` means nothing to it."""
    first, second = ({**delivery.options, "tensor_split": None} for delivery in (one, other))
    return first == second


def _as_rated_now(candidate: Candidate, plan: Plan) -> Candidate:
    """``candidate`` as ``plan`` rates it, by what was learned since; as it was rated before if ``plan`` has not looked at it."""
    same = (
        found
        for found in (plan.stock, *plan.alternatives, *plan.rejected)
        if (found.placement, found.settings) == (candidate.placement, candidate.settings)
    )
    return next(same, candidate)
