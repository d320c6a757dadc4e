import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.fit import (
    CAPACITY_PRECISION,
    Device,
    balanced_fit,
    find_best_fit,
    greedy_fit,
    most_placed,
    placed,
    stock_fit,
    stock_groups,
)
from planner.units import MIB

FREE_5090, FREE_3090 = 31_500 * MIB, 23_700 * MIB
STOCK_RESERVE = 457 * MIB

OUTPUT_BYTES = 800_000_000
LAYER_BYTES = (40_000_000_000 - OUTPUT_BYTES) // 80
REFERENCE = (LAYER_BYTES,) * 80 + (OUTPUT_BYTES,)
"""40 GB in all: 80 equal layers with their KV, and the output layer."""


def device(gpu, weighted_bytes, **more):
    return Device(gpu=gpu, weighted_bytes=weighted_bytes, uuid=f"GPU-{gpu}", **more)


def share(assignment, gpu):
    """Share of the reference model's bytes on ``gpu``."""
    return sum(cost for cost, owner in zip(REFERENCE, assignment, strict=True) if owner == gpu) / sum(REFERENCE)


class TestReferenceModel:
    def test_weakest_first_at_full_capacity_gives_the_3090_about_60_percent(self):
        (group,) = (g for g in stock_groups([device(0, FREE_5090), device(1, FREE_3090)]) if len(g) == 2)
        fit = greedy_fit(REFERENCE, group, 1.0)
        assert placed(fit) == 81
        assert share(fit, 1) == pytest.approx(0.62, abs=0.015)
        assert fit[-1] == 1  # the output layer goes out first, to the weakest card

    @pytest.mark.parametrize("reserve", [0, STOCK_RESERVE])
    def test_the_bisection_gives_the_3090_about_43_percent(self, reserve):
        groups = stock_groups([device(0, FREE_5090 - reserve), device(1, FREE_3090 - reserve)])
        fit = find_best_fit(REFERENCE, groups)
        assert placed(fit) == 81
        assert share(fit, 1) == pytest.approx(0.43, abs=0.01)

    def test_a_model_that_one_card_holds_stays_on_the_one_with_the_most_memory(self):
        groups = stock_groups([device(0, FREE_3090), device(1, FREE_5090)])
        assert find_best_fit([LAYER_BYTES] * 40, groups) == (1,) * 40


class TestGreedyFit:
    def test_layers_go_out_from_the_last_and_the_lowest_stay_on_the_cpu(self):
        assert greedy_fit([3, 3, 3, 3, 3], [device(7, 6), device(4, 3)]) == (None, None, 4, 7, 7)

    def test_a_device_that_was_passed_is_not_asked_again(self):
        assert greedy_fit([1, 5], [device(0, 4), device(1, 5)]) == (None, 1)

    def test_the_ceiling_holds_whatever_the_weight_and_the_factor(self):
        assert greedy_fit([1] * 10, [device(0, 20, ceiling_bytes=4)], 3.0) == (None,) * 6 + (0,) * 4

    def test_requested_stops_after_so_many_layers(self):
        assert greedy_fit([1] * 4, [device(0, 9)], requested=3) == (None, 0, 0, 0)
        assert greedy_fit([1] * 4, [device(0, 9)], requested=9) == (0,) * 4
        assert greedy_fit([1] * 4, [device(0, 9)], requested=0) == (None,) * 4

    @pytest.mark.parametrize("devices", [[], [device(0, 0)]])
    def test_nothing_to_give_to_leaves_everything_on_the_cpu(self, devices):
        assert greedy_fit([1, 1], devices) == (None, None)


class TestBalancedFit:
    def test_integrated_devices_get_only_what_discrete_ones_leave(self):
        both = [device(0, 50, integrated=True), device(1, 4)]
        assert balanced_fit([1] * 6, both) == (0, 0, 1, 1, 1, 1)
        assert balanced_fit([1] * 4, both) == (1,) * 4

    def test_layers_lie_in_proportion_to_weighted_memory(self):
        fit = balanced_fit([1000] * 100, [device(0, 3_000_000), device(1, 1_000_000)])
        assert (fit.count(0), fit.count(1)) == (75, 25)

    def test_num_gpu_stops_the_fit_of_integrated_devices_too(self):
        both = [device(0, 50, integrated=True), device(1, 4)]
        assert balanced_fit([1] * 9, both, requested=5) == (None,) * 4 + (0, 1, 1, 1, 1)


class TestStockFit:
    def test_where_not_all_fits_the_output_layer_is_left_out_first(self):
        groups = stock_groups([device(0, 10)])
        assert stock_fit([5, 5, 5], groups) == (0, 0, None)

    def test_num_gpu_below_the_layer_count_leaves_the_output_layer_too(self):
        groups = stock_groups([device(0, 10)])
        assert stock_fit([1, 1, 1, 1], groups, requested=2) == (None, 0, 0, None)

    def test_a_forced_num_gpu_overcommits_the_last_group_in_proportion(self):
        groups = stock_groups([device(0, 30), device(1, 10)])
        fit = stock_fit([10] * 8, groups, requested=8, force=True)
        assert (fit.count(0), fit.count(1)) == (6, 2)

    def test_the_first_number_of_devices_that_holds_everything_wins(self):
        groups = stock_groups([device(0, 5), device(1, 5), device(2, 5)])
        assert set(stock_fit([1] * 4, groups)) == {0}
        assert set(stock_fit([1] * 8, groups)) == {0, 1}
        assert set(stock_fit([1] * 14, groups)) == {0, 1, 2}


def test_groups_grow_from_the_most_memory_with_the_least_first_and_discrete_before_integrated():
    devices = [device(0, 9, integrated=True), device(1, 3), device(2, 7), device(3, 7)]
    assert [[d.gpu for d in group] for group in stock_groups(devices)] == [[2], [3, 2], [1, 3, 2], [0, 1, 3, 2]]


costs = st.lists(st.integers(1, 40), min_size=1, max_size=14)
memories = st.lists(st.integers(0, 120), min_size=1, max_size=4)


@given(costs, memories, st.floats(1.0, 2.0))
def test_layers_are_contiguous_runs_within_every_ceiling_with_the_lowest_on_the_cpu(costs, memories, weight):
    devices = [device(i, int(m * weight), ceiling_bytes=m) for i, m in enumerate(memories)]
    fit = find_best_fit(costs, stock_groups(devices))
    assert len(fit) == len(costs)
    runs = [owner for owner, _ in itertools.groupby(fit)]
    assert len(runs) == len(set(runs))
    assert None not in runs[1:]
    for i, memory in enumerate(memories):
        assert sum(cost for cost, owner in zip(costs, fit, strict=True) if owner == i) <= memory


@given(costs, memories, st.data())
def test_more_memory_never_makes_a_fit_infeasible(costs, memories, data):
    more = [m + data.draw(st.integers(0, 60)) for m in memories]
    before, after = (
        placed(find_best_fit(costs, stock_groups([device(i, m) for i, m in enumerate(sizes)]))) for sizes in (memories, more)
    )
    assert after >= before


@given(costs, memories)
def test_the_bisection_places_as_many_layers_as_full_capacity(costs, memories):
    devices = [device(i, m) for i, m in enumerate(memories)]
    assert placed(balanced_fit(costs, devices)) == placed(greedy_fit(costs, devices))


@given(costs, memories, st.sampled_from([1.0, 1.5]), st.none() | st.integers(0, 15), st.floats(0.5, 5.0))
def test_the_bisection_ends_where_one_that_looks_at_every_factor_does(costs, memories, weight, requested, most):
    devices = [device(i, int(m * weight), ceiling_bytes=m if weight > 1 else None) for i, m in enumerate(memories)]
    low, high = 0.0, most
    while high - low > CAPACITY_PRECISION:
        middle = (low + high) / 2
        fits = placed(greedy_fit(costs, devices, middle, requested=requested)) == placed(
            greedy_fit(costs, devices, most, requested=requested)
        )
        low, high = (low, middle) if fits else (middle, high)
    expected = greedy_fit(costs, devices, high, requested=requested)
    assert balanced_fit(costs, devices, requested=requested, max_factor=most) == expected
    assert most_placed(costs, devices, requested=requested) == placed(greedy_fit(costs, devices, requested=requested))
