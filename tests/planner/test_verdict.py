"""When a plan counts as slower than stock."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from planner.placement import Placement, solo
from planner.verdict import is_same, is_slower

SPEEDS = st.lists(st.floats(1, 500), min_size=3, max_size=16)


def test_a_clear_loss_is_seen_after_three_answers_and_a_small_one_never() -> None:
    """10 % are a loss, 4 % are not worth a reload, and two answers are too few."""
    assert is_slower([90.0, 90.5, 89.5], [100.0, 100.5, 99.5])
    assert not is_slower([90.0, 90.5], [100.0, 100.5, 99.5])
    assert not is_slower([96.0] * 16, [100.0] * 16)
    assert not is_slower([110.0] * 16, [100.0] * 16)


def test_noise_does_not_take_a_plan_back() -> None:
    """Answers that scatter by 15 %: an equal plan is given up in fewer than one case of forty, one of half the speed always."""
    chance = random.Random(7)

    def answers(speed: float) -> list[float]:
        return [chance.gauss(speed, 0.15 * speed) for _ in range(6)]

    assert sum(is_slower(answers(100), answers(100)) for _ in range(1000)) < 50
    assert all(is_slower(answers(40), answers(100)) for _ in range(100))


@given(SPEEDS, SPEEDS)
def test_two_placements_are_never_both_slower_than_each_other(one: list[float], other: list[float]) -> None:
    """Or a plan and stock would take turns for ever."""
    assert not (is_slower(one, other) and is_slower(other, one))


def test_stocks_cut_may_move_by_a_layer_or_two() -> None:
    """36/29 and 35/30 are one placement; another order, another card or five layers more are not."""
    cut = Placement(layers=(36, 28), order=(0, 1), output_gpu=1)
    assert is_same(cut, Placement(layers=(34, 30), order=(0, 1), output_gpu=1))
    assert not is_same(cut, Placement(layers=(31, 33), order=(0, 1), output_gpu=1))
    assert not is_same(cut, Placement(layers=(36, 28), order=(1, 0), output_gpu=0))
    assert not is_same(cut, Placement(layers=(35, 28), order=(0, 1), output_gpu=1, cpu_layers=1))
    assert not is_same(solo(0, n_gpus=2, n_layers=64), solo(1, n_gpus=2, n_layers=64))
