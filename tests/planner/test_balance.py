import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.balance import device_cost, protect_output_layer, redistribute_heavy_layers, target_imbalance
from planner.costs import LayerCosts


def model(layers, output, ffn=None):
    return LayerCosts(layers_bytes=tuple(layers), ffn_bytes=tuple(ffn or layers), output_bytes=output)


class TestProtectOutputLayer:
    def test_it_goes_to_the_strongest_and_layers_make_room_on_the_gpu_that_gave_it_up(self):
        assert protect_output_layer((0, 0, 1, 1, 1), model([2] * 4, 4), [5, 9], [0, 1]) == (1, 1, 1, 1, 0)
        assert protect_output_layer((1, 1, 0, 0, 1), model([2] * 4, 2), [4, 9], [0, 1]) == (1, 1, 1, 0, 0)

    def test_with_room_nothing_else_moves(self):
        assert protect_output_layer((0, 1, 1), model([2, 2], 4), [6, 6], [0, 1]) == (0, 1, 0)

    def test_where_no_other_gpu_has_room_a_layer_goes_to_the_cpu(self):
        assert protect_output_layer((0, 0, 1), model([3, 3], 1), [6, 2], [0, 1]) == (None, 0, 0)

    def test_an_output_layer_larger_than_the_strongest_gpu_stays(self):
        assert protect_output_layer((0, 1, 1), model([2, 2], 9), [8, 20], [0, 1]) == (0, 1, 1)


class TestRedistributeHeavyLayers:
    def test_cost_counts_the_output_layer_twice(self):
        assert device_cost((1, 0, 0), model([5, 7], 3), 0) == 7 + 2 * 3
        assert device_cost((1, 0, 0), model([5, 7], 3), 1) == 5

    def test_target_is_the_ratio_of_raw_powers(self):
        assert target_imbalance([409_190, 138_990], 0, 1) == pytest.approx(2.944, abs=1e-3)

    def test_it_stops_at_nine_tenths_of_the_target(self):
        moved = redistribute_heavy_layers((1,) * 10 + (0,) * 10 + (0,), model([10] * 20, 0), [1000, 1000], [0, 1], [3000, 999])
        assert moved.count(1) == 5  # 15 : 5 is the first ratio of at least 2.7

    def test_it_stops_when_the_strongest_is_full(self):
        moved = redistribute_heavy_layers((1,) * 10 + (0,) * 11, model([10] * 20, 0), [120, 1000], [0, 1], [3000, 999])
        assert moved.count(1) == 8

    def test_the_largest_ffn_moves_first_and_of_equal_ones_the_highest_layer(self):
        layers = model([10] * 5, 0, ffn=[5, 8, 8, 5, 5])
        assert redistribute_heavy_layers((1, 1, 1, 1, 0, 0), layers, [20, 99], [0, 1], [900, 9]) == (1, 1, 0, 1, 0, 0)

    def test_the_weakest_gives_before_the_one_between(self):
        moved = redistribute_heavy_layers((2, 2, 1, 1, 0, 0), model([10] * 5, 0), [20, 99, 99], [0, 1, 2], [900, 90, 9])
        assert moved == (2, 0, 1, 1, 0, 0)

    def test_equal_gpus_that_are_balanced_are_left_alone(self):
        assignment = (1,) * 5 + (0,) * 5 + (0,)
        assert redistribute_heavy_layers(assignment, model([10] * 10, 0), [1000, 1000], [0, 1], [100, 100]) == assignment


@given(st.data())
def test_neither_step_overfills_a_gpu_or_takes_a_layer_off_the_gpus_without_need(data):
    n_gpus = data.draw(st.integers(1, 4))
    layers = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=10))
    costs = model(layers, data.draw(st.integers(0, 20)))
    owners = tuple(data.draw(st.lists(st.integers(0, n_gpus - 1), min_size=len(layers) + 1, max_size=len(layers) + 1)))
    powers = data.draw(st.lists(st.integers(1, 1000), min_size=n_gpus, max_size=n_gpus))

    def used(assignment):
        return [sum(c for c, o in zip(costs.all_bytes, assignment, strict=True) if o == gpu) for gpu in range(n_gpus)]

    usable = [size + data.draw(st.integers(0, 30)) for size in used(owners)]
    ranked = data.draw(st.permutations(range(n_gpus)))
    protected = protect_output_layer(owners, costs, usable, ranked)
    moved = redistribute_heavy_layers(protected, costs, usable, ranked, powers)
    for assignment in (protected, moved):
        assert all(size <= limit for size, limit in zip(used(assignment), usable, strict=True))
    assert (protected[-1] == ranked[0]) == (costs.output_bytes <= usable[ranked[0]] or owners[-1] == ranked[0])
    assert moved.count(None) == protected.count(None)
    assert all(now in (before, ranked[0]) for before, now in zip(protected, moved, strict=True))
