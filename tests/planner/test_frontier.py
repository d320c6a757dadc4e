"""The context frontier: what every point keeps, and that no step more would fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.frontier import CONTEXT_STEP, LEAST_CONTEXT, fitted_context, frontier
from planner.hardware import Rig
from planner.profile import ModelProfile
from planner.request import PlanRequest
from planner.search import Search
from tests.planner import models
from tests.planner.models import gpu, rig, rtx3090, rtx5090

REQUEST = PlanRequest(num_batch=64, margin_bytes=0, runtime_bytes=0)


@st.composite
def rigs(draw: st.DrawFn) -> Rig:
    """One to three GPUs that hold between nothing and all of a small model with its whole context."""
    cards = draw(st.lists(st.tuples(st.integers(20, 900), st.integers(100, 1800)), min_size=1, max_size=3))
    return rig(*(gpu(f"gpu{i}", free, gb_per_s=rate) for i, (free, rate) in enumerate(cards)), ram_gib=1)


PROFILES = st.sampled_from([models.small(n_layers=8), models.small(n_layers=6, ffn=(1024,), experts=8)])


@settings(max_examples=25, deadline=None)
@given(PROFILES, rigs())
def test_every_point_fits_and_contexts_grow_as_speeds_fall(profile: ModelProfile, cards: Rig) -> None:
    """And no context is longer than the trained one."""
    points = frontier(profile, cards, REQUEST)
    for point in points:
        assert point.candidate.fits
        assert point.candidate.settings.num_ctx == point.num_ctx <= (profile.context_train or 0)
    for faster, longer in pairwise(points):
        assert longer.num_ctx > faster.num_ctx
        assert longer.candidate.decode_tokens_per_s <= faster.candidate.decode_tokens_per_s * 1.001


@settings(max_examples=25, deadline=None)
@given(rigs())
def test_a_gpu_alone_holds_its_context_and_not_a_step_more(cards: Rig) -> None:
    """Or the context is the trained one."""
    profile = models.small(n_layers=8)
    for point in frontier(profile, cards, REQUEST):
        if point.candidate.placement.kind == "solo" and point.num_ctx < (profile.context_train or 0):
            more = Search(profile, cards, replace(REQUEST, num_ctx=point.num_ctx + CONTEXT_STEP))
            assert not more.holds(more.alone(point.candidate.placement.order[0]))


def test_the_frontier_of_a_32b_on_an_unequal_pair() -> None:
    """The 5090 alone has room for more than the default 32768, both for nearly all, the trained context takes RAM."""
    points = frontier(models.header("qwen2.5-32b-q4km"), rig(rtx5090(), rtx3090()), PlanRequest(num_ctx=4096))
    assert [point.candidate.placement.kind for point in points] == ["solo", "split", "partial"]
    assert points[0].candidate.placement.order == (0,)
    assert 32768 < points[0].num_ctx < points[1].num_ctx < points[2].num_ctx == 131072


def test_a_trained_context_that_is_no_multiple_of_a_step_is_reached() -> None:
    """And one below a step."""
    for trained in (5000, 700):
        profile = models.small(n_layers=4)
        key = f"{profile.architecture}.context_length"
        profile = models.build_profile(
            metadata={**profile.metadata, key: trained}, tensors=profile.tensors, file_bytes=profile.file_bytes, name="odd"
        )
        assert [point.num_ctx for point in frontier(profile, rig(rtx5090()), PlanRequest())] == [trained]


def test_no_gpu_leaves_no_frontier() -> None:
    """Everything in RAM is no tier: there is nothing to keep."""
    assert frontier(models.small(n_layers=4), rig(), PlanRequest()) == ()


@settings(max_examples=25, deadline=None)
@given(PROFILES, rigs())
def test_the_fitted_context_is_that_of_the_fastest_point_with_room_for_a_prompt(profile: ModelProfile, cards: Rig) -> None:
    """Whatever its length, but for the least."""
    least = min(LEAST_CONTEXT, profile.context_train or LEAST_CONTEXT)
    longer = [point.num_ctx for point in frontier(profile, cards, REQUEST) if point.num_ctx >= least]
    assert fitted_context(profile, cards, REQUEST) == (longer[0] if longer else None)


def test_the_fitted_context_is_that_of_the_gpu_that_is_named() -> None:
    """The slower card holds less of the cache."""
    profile, cards = models.header("llama3.1-8b-q4km"), rig(rtx5090(), rtx3090(9000))
    on_the_slow = fitted_context(profile, cards, replace(PlanRequest(), gpu=1))
    assert on_the_slow is not None
    assert on_the_slow < (fitted_context(profile, cards, PlanRequest()) or 0)
