"""The candidates beside the chosen one, for people: a search looks for the fastest and keeps few others."""

from __future__ import annotations

from dataclasses import replace

from planner.choice import ranked
from planner.placement import in_words
from planner.plan import Plan
from planner.request import Candidate
from planner.search import Search

RUNNERS_UP = 5
"""Candidates beside the chosen one that are worth showing."""


def with_runners_up(plan: Plan) -> Plan:
    """``plan`` with at least ``RUNNERS_UP`` alternatives, where so many fit: the chosen split with layers moved fills them up."""
    search = Search(plan.profile, plan.rig, plan.request)
    known = {candidate.placement for candidate in (plan.chosen, plan.stock, *plan.alternatives)}
    passed = {plan.chosen.placement}
    others = [candidate for candidate in plan.alternatives if candidate != plan.chosen]
    near: list[Candidate] = [plan.chosen]
    for source in near:
        for placement in search.moves(source):
            if len(others) >= RUNNERS_UP:
                break
            moved = search.candidate(in_words(placement, search.names), placement, source.settings)
            if placement not in passed and search.holds(moved):
                passed.add(placement)
                near.append(moved)
                if placement not in known:
                    others.append(moved)
    kept = [candidate for candidate in plan.alternatives if candidate == plan.chosen]
    return replace(plan, alternatives=(*kept, *ranked(others, plan.request.objective)))
