import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.hardware import Gpu
from planner.power import (
    GB,
    best_gpu_for_pcie,
    by_compute_power,
    compute_capacities,
    gpu_compute_cost,
    gpu_minimum_graph_overhead,
    highest_compute_tier,
    is_better_compute,
    power_shares,
    raw_powers,
)
from planner.units import MIB


def gpu(uuid="GPU-0", sm_count=None, clock_mhz=None, cc=None, free_mib=16_000, **more):
    return Gpu(
        uuid=uuid,
        name=f"card {uuid}",
        total_bytes=free_mib * MIB,
        free_bytes=free_mib * MIB,
        sm_count=sm_count,
        clock_mhz=clock_mhz,
        compute_capability=cc,
        **more,
    )


RTX_5090 = gpu("GPU-5090", 170, 2407, (12, 0), 31_500)
RTX_3090 = gpu("GPU-3090", 82, 1695, (8, 6), 23_700)


class TestRawPower:
    def test_sm_count_times_clock_gives_the_pair_its_shares(self):
        assert raw_powers([RTX_5090, RTX_3090]) == (409_190, 138_990)
        assert power_shares(raw_powers([RTX_5090, RTX_3090])) == pytest.approx((0.746, 0.254), abs=5e-4)

    def test_compute_capability_stands_in_where_all_are_unknown(self):
        assert raw_powers([gpu(cc=(12, 0)), gpu(cc=(8, 6))]) == (1200, 806)

    def test_compute_capability_stands_in_where_all_are_equal(self):
        assert raw_powers([gpu(cc=(12, 0), sm_count=10, clock_mhz=100), gpu(cc=(8, 6), sm_count=20, clock_mhz=50)]) == (1200, 806)

    def test_one_unknown_card_moves_all_to_compute_capability(self):
        assert raw_powers([RTX_5090, gpu(cc=(8, 6)), gpu(cc=(7, 5), sm_count=68)]) == (1200, 806, 705)

    def test_a_card_of_which_nothing_is_known_counts_as_the_weakest(self):
        assert raw_powers([RTX_5090, gpu(), RTX_3090]) == (409_190, 138_990, 138_990)
        assert raw_powers([gpu(cc=(12, 0)), gpu(cc=(8, 6)), gpu()]) == (1200, 806, 806)

    def test_nothing_known_at_all_is_equal(self):
        assert raw_powers([gpu(), gpu()]) == (1, 1)
        assert raw_powers([]) == ()


class TestComputeCapacity:
    def test_formula_at_the_pair(self):
        assert compute_capacities([409_190, 138_990], 1.75) == pytest.approx((1.560, 1.190), abs=5e-4)

    @pytest.mark.parametrize("boost", [0.99, 2.01, float("nan"), -1.0])
    def test_a_boost_out_of_range_is_refused(self, boost):
        with pytest.raises(ValueError, match=r"not between 1\.0 and 2\.0"):
            compute_capacities([1, 2], boost)

    @given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(1.0, 2.0))
    def test_it_lies_between_1_and_the_boost_and_orders_as_power_does(self, powers, boost):
        capacities = compute_capacities(powers, boost)
        assert all(1 - 1e-9 <= capacity <= boost + 1e-9 for capacity in capacities)
        for (p, c), (q, d) in itertools.combinations(zip(powers, capacities, strict=True), 2):
            assert p <= q or c >= d
        assert compute_capacities(powers, 1.0) == pytest.approx([1.0] * len(powers))


class TestTiers:
    @pytest.mark.parametrize(
        ("cc", "weight", "reserve"),
        [
            ((12, 0), 1.6, 6 * GB),
            ((10, 0), 1.6, 6 * GB),
            ((9, 0), 1.4, 4 * GB),
            ((8, 9), 1.2, 4 * GB),
            ((8, 6), 1.0, 4 * GB),
            ((8, 0), 1.0, 4 * GB),
            ((7, 5), 0.8, 2 * GB),
            ((6, 1), 0.6, 2 * GB),
            ((5, 2), 0.5, 2 * GB),
            (None, 0.5, 2 * GB),
        ],
    )
    def test_weight_and_reserve_follow_the_compute_capability(self, cc, weight, reserve):
        assert gpu_compute_cost(gpu(cc=cc)) == weight
        assert gpu_minimum_graph_overhead(gpu(cc=cc)) == reserve

    def test_the_5090_has_27_gb_left_after_its_reserve(self):
        assert (RTX_5090.free_bytes - gpu_minimum_graph_overhead(RTX_5090)) / GB == pytest.approx(27.0, abs=0.05)

    def test_the_highest_tier_is_that_of_the_newest_card(self):
        assert highest_compute_tier([RTX_3090, RTX_5090]) == 1.6
        assert highest_compute_tier([RTX_3090]) == 1.0


class TestOrder:
    def test_tier_first_then_raw_power_then_uuid_and_integrated_last(self):
        rig = [
            RTX_3090,
            gpu("GPU-b", 84, 1700, (8, 6)),
            gpu("GPU-integrated", 48, 1500, (12, 1), integrated=True),
            gpu("GPU-5060", 30, 2500, (12, 0)),
            gpu("GPU-a", 84, 1700, (8, 6)),
        ]
        assert by_compute_power(rig) == (3, 4, 1, 0, 2)
        assert is_better_compute(rig, 3, 0)
        assert not is_better_compute(rig, 2, 0)
        assert not is_better_compute(rig, 1, 4)
        assert not is_better_compute(rig, 4, 1)

    @given(st.permutations(range(5)))
    def test_the_order_of_the_input_changes_nothing(self, order):
        rig = [
            RTX_3090,
            RTX_5090,
            gpu("GPU-a", 84, 1700, (8, 6)),
            gpu("GPU-b", 84, 1700, (8, 6)),
            gpu("GPU-c", cc=(7, 5), sm_count=1, clock_mhz=1),
        ]
        shuffled = [rig[i] for i in order]
        assert [shuffled[i].uuid for i in by_compute_power(shuffled)] == [rig[i].uuid for i in by_compute_power(rig)]


class TestBestGpuForPcie:
    def test_the_strongest_that_holds_the_load(self):
        assert best_gpu_for_pcie([RTX_3090, RTX_5090], [20, 27], 15) == 1
        assert best_gpu_for_pcie([RTX_3090, RTX_5090], [20, 10], 15) == 0
        assert best_gpu_for_pcie([RTX_3090, RTX_5090], [20, 27], 28) is None

    def test_between_equal_cards_the_faster_link_then_the_memory_then_the_uuid(self):
        def twin(uuid, generation, width):
            return gpu(uuid, 82, 1695, (8, 6), pcie_generation=generation, pcie_width=width)

        assert best_gpu_for_pcie([twin("GPU-a", 3, 16), twin("GPU-b", 4, 16)], [9, 9], 5) == 1
        assert best_gpu_for_pcie([twin("GPU-a", 4, 16), twin("GPU-b", 5, 4)], [9, 9], 5) == 0
        assert best_gpu_for_pcie([twin("GPU-a", 4, 16), twin("GPU-b", 4, 16)], [8, 9], 5) == 1
        assert best_gpu_for_pcie([twin("GPU-b", 4, 16), twin("GPU-a", 4, 16)], [9, 9], 5) == 1
