"""The next best candidates: that they fit, are others, and come in order."""

from __future__ import annotations

from itertools import pairwise

import pytest

from planner.choice import TIE
from planner.plan import make_plan
from planner.request import PlanRequest
from planner.runnersup import RUNNERS_UP, with_runners_up
from planner.search import Search
from tests.planner import models


@pytest.mark.parametrize("num_ctx", [4096, 8192])
def test_a_split_has_five_runners_up_that_fit_the_best_first(num_ctx: int) -> None:
    """Of a 70B on an unequal pair, at two contexts; none is the chosen one, none faster."""
    rig = models.rig(models.rtx5090(), models.rtx3090())
    plan = make_plan(models.header("llama3.3-70b-q4km"), rig, PlanRequest(num_ctx=num_ctx))
    others = [other for other in with_runners_up(plan).alternatives if other is not plan.chosen]
    assert len(others) >= RUNNERS_UP
    assert len({other.placement for other in (*others, plan.chosen)}) == len(others) + 1
    assert all(other.fits for other in others)
    for better, worse in pairwise((plan.chosen, *others)):
        assert worse.decode_tokens_per_s <= better.decode_tokens_per_s * (1 + TIE)


def test_a_way_to_the_runners_up_may_lead_over_a_placement_that_is_listed_already() -> None:
    """The boost algorithm's layout is one layer beside the best split: the next ones lie behind it."""
    rig = models.rig(models.rtx5090(), models.gpu("RTX 8000", 47_000, gb_per_s=672, capability=(7, 5)), ram_gib=16)
    plan = make_plan(models.header("llama3.3-70b-q4km"), rig, PlanRequest(num_ctx=16384))
    moved = set(Search(plan.profile, plan.rig, plan.request).moves(plan.chosen))
    assert moved <= {other.placement for other in plan.alternatives}
    assert len(with_runners_up(plan).alternatives) > RUNNERS_UP


def test_the_plan_itself_stays_as_it_is() -> None:
    """Chosen, stock and reasons are the very same; what had enough alternatives gets no more."""
    rig = models.rig(*(models.gpu(f"gpu{i}", 24_000, gb_per_s=500 + 100 * i) for i in range(5)))
    plan = make_plan(models.header("llama3.1-8b-q4km"), rig, PlanRequest(num_ctx=8192))
    told = with_runners_up(plan)
    assert (told.chosen, told.stock, told.reasons) == (plan.chosen, plan.stock, plan.reasons)
    assert set(map(id, told.alternatives)) == set(map(id, plan.alternatives))


def test_a_model_that_stays_in_ram_has_no_layers_to_move() -> None:
    """No GPU has room for what a load takes beside its layers: the plan is shown all the same."""
    rig = models.rig(models.gpu("a", 600, gb_per_s=900), models.gpu("b", 600, gb_per_s=400))
    plan = make_plan(models.header("llama3.1-8b-q4km"), rig, PlanRequest(num_ctx=8192))
    assert plan.chosen.placement.kind == "cpu"
    assert with_runners_up(plan).chosen is plan.chosen
