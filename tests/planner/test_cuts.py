"""Cuts: what is not looked at would not have been faster."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cuts import FEW_LAYERS, ROLES, Problem


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One to three GPUs of any speed beside RAM, for layers of any size."""
    layers = draw(st.lists(st.integers(1, 40), min_size=4, max_size=14))
    gpus = range(draw(st.integers(1, 3)))
    seconds = st.integers(1, 9).map(lambda x: x / 10)
    return Problem(
        held=(0, *accumulate(layers)),
        read=(0.0, *accumulate(map(float, layers))),
        inverse={gpu: draw(seconds) for gpu in gpus},
        layer_s={gpu: draw(seconds) for gpu in gpus},
        rooms={gpu: draw(st.integers(5, 25) | st.integers(0, 200)) for gpu in gpus},
        buffers={(gpu, role, few): draw(st.integers(0, 5)) for gpu in gpus for role in ROLES for few in range(FEW_LAYERS + 1)},
        output_held=draw(st.integers(0, 5)),
        output_read=draw(st.integers(0, 20)),
        host=(draw(st.sampled_from([0.5, 2.0])), draw(st.sampled_from([0.5, 2.0]))),
    )


@settings(max_examples=600, deadline=None)
@given(problems())
def test_a_device_that_outruns_those_before_it_is_filled(problem: Problem) -> None:
    found = problem.solve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "_each_faster", lambda *_: False)
        expected = problem.solve()
    assert (found is None) == (expected is None)
    if found and expected:
        assert found.seconds == pytest.approx(expected.seconds, rel=1e-12)


def test_a_small_card_that_holds_no_layer_below_a_full_one_gets_one_elsewhere() -> None:
    """The fast card could take the three layers at the end, but then only the largest would be left beside it."""
    layers = [1, 30, 3, 3, 3]
    problem = Problem(
        held=(0, *accumulate(layers)),
        read=(0.0, *accumulate(map(float, layers))),
        inverse={0: 0.3, 1: 0.1},
        layer_s={0: 0.1, 1: 0.1},
        rooms={0: 10, 1: 36},
        buffers=dict.fromkeys(((gpu, role, few) for gpu in (0, 1) for role in ROLES for few in range(FEW_LAYERS + 1)), 0),
        output_held=12,
        output_read=1,
        host=(2.0, 2.0),
    )
    split = problem.solve()
    assert split is not None
    assert split.counts == ((0, 1), (1, 2))
