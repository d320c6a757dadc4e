"""When lost context is worth a reload: a function of what is loaded, what was planned, and of the time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.placement import Placement, solo
from planner.request import PlanRequest
from proxy.launcher.launches import MOST_CAREFUL
from proxy.ollama.client import Loaded
from proxy.ollama.options import Delivery
from proxy.placing.inforce import InForce
from proxy.placing.shrunk import Shrunk, restores
from proxy.placing.steady import REPLAN_S
from proxy.simulator import demo_models
from tests.proxy.planners import RIG, make

PROFILE = next(model.profile for model in demo_models() if model.name == "phi4:14b")
LAYERS = PROFILE.n_layers
ON_FIRST = solo(0, n_gpus=2, n_layers=LAYERS)
LAUNCHED = Delivery(text="auto; by the launcher", by_launcher=True)
SMALLER = Loaded(name="m", digest="d", vram_bytes=1, context_length=4096)
WHOLE = replace(SMALLER, context_length=8192)


def plan_of(placement, num_ctx):
    return make(PROFILE, RIG, PlanRequest(num_ctx=num_ctx), placement, ON_FIRST)


CURRENT = InForce(
    model="m", blob="b", digest="d", num_ctx=None, planned_ctx=8192, delivery=LAUNCHED, careful=0, plan=plan_of(ON_FIRST, 8192)
)


def test_it_is_due_after_a_while_and_only_where_a_load_has_failed():
    shrunk = Shrunk()
    assert not shrunk.due(CURRENT, SMALLER, level=0, now_s=0.0)
    assert not shrunk.due(CURRENT, SMALLER, level=0, now_s=9 * REPLAN_S)  # somebody else's wish, perhaps
    assert not shrunk.due(CURRENT, SMALLER, level=1, now_s=10 * REPLAN_S)
    assert not shrunk.due(CURRENT, SMALLER, level=1, now_s=11 * REPLAN_S - 1)
    assert shrunk.due(CURRENT, SMALLER, level=1, now_s=11 * REPLAN_S)
    assert shrunk.due(CURRENT, SMALLER, level=0, now_s=11 * REPLAN_S)  # the failure is forgotten by now


@pytest.mark.parametrize(
    ("entry", "level", "mended"),
    [(replace(SMALLER, pinned=True), 1, False), (SMALLER, MOST_CAREFUL, False), (SMALLER, 1, True)],
    ids=["pinned", "plans have failed", "done before"],
)
def test_it_is_not_due(entry, level, mended):
    assert not Shrunk(since=0.0, mended=mended).due(CURRENT, entry, level=level, now_s=REPLAN_S)


def test_seen_with_the_whole_context_it_begins_anew():
    shrunk = Shrunk(since=0.0, mended=True)
    assert not shrunk.due(CURRENT, WHOLE, level=1, now_s=REPLAN_S)
    assert (shrunk.since, shrunk.mended) == (None, False)


def test_a_plan_restores_it_with_the_whole_context_and_no_layer_more_in_ram():
    in_ram = Placement(layers=(LAYERS - 1, 0), order=(0,), output_gpu=0, cpu_layers=1)
    assert restores(CURRENT, plan_of(ON_FIRST, 8192), LAUNCHED)
    assert not restores(CURRENT, plan_of(ON_FIRST, 4096), LAUNCHED)
    assert not restores(CURRENT, plan_of(ON_FIRST, 8192), Delivery(text="solo CUDA0", options={"main_gpu": 0}))
    assert not restores(CURRENT, plan_of(in_ram, 8192), LAUNCHED)
