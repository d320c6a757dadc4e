import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.contiguous import is_contiguous, nearest_contiguous, to_placement
from planner.placement import Placement


@pytest.mark.parametrize(
    ("assignment", "contiguous"),
    [
        ((None, 1, 1, 0, 0), True),
        ((1, 1, 1, 0), True),  # the strongest holds the output layer alone
        ((1, 0, 0, None), True),
        ((None, None, None), True),
        ((1, 0, 1, 1), False),
        ((1, None, 1, 1), False),
        ((1, 0, 0, 1), False),  # the output layer must follow the last repeating one
    ],
)
def test_what_counts_as_contiguous(assignment, contiguous):
    assert is_contiguous(assignment) is contiguous


def test_a_contiguous_assignment_becomes_a_placement():
    assert to_placement((None, 2, 2, 0, 0), n_gpus=3) == Placement(layers=(1, 0, 2), order=(2, 0), output_gpu=0, cpu_layers=1)
    assert to_placement((1, 1, 0), n_gpus=2) == Placement(layers=(0, 2), order=(1, 0), output_gpu=0)


def test_an_interleaving_assignment_is_no_placement():
    with pytest.raises(ValueError, match="not in one run"):
        to_placement((0, 1, 0), n_gpus=2)


def test_layers_that_jumped_over_a_gpu_shift_its_run_and_each_gpu_keeps_its_bytes():
    assignment = (2, 2, 0, 0, 1, 1, 1, 0, 0, 0)
    assert nearest_contiguous(assignment, [1] * 10, [6, 3, 9]) == (2, 2, 1, 1, 1, 0, 0, 0, 0, 0)


def test_a_hole_on_the_cpu_is_closed_from_below():
    assert nearest_contiguous((1, 0, None, 0), [1] * 4, [2, 1]) == (None, 1, 0, 0)


def test_no_room_for_the_output_layer_is_an_error():
    with pytest.raises(ValueError, match="GPU 0 has no room"):
        nearest_contiguous((0, 1, 0), [1, 1, 9], [3, 3])


@st.composite
def assignments(draw):
    n_gpus, n_layers = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    costs = draw(st.lists(st.integers(1, 9), min_size=n_layers + 1, max_size=n_layers + 1))
    owners = draw(st.lists(st.one_of(st.none(), st.integers(0, n_gpus - 1)), min_size=n_layers + 1, max_size=n_layers + 1))
    used = [sum(c for c, o in zip(costs, owners, strict=True) if o == gpu) for gpu in range(n_gpus)]
    return tuple(owners), costs, [size + draw(st.integers(0, 5)) for size in used]


@given(assignments())
def test_it_agrees_with_brute_force_over_every_cut(case):
    assignment, costs, usable = case
    result = nearest_contiguous(assignment, costs, usable)
    assert is_contiguous(result)
    assert result[-1] == assignment[-1]
    if is_contiguous(assignment):
        assert result == assignment
        return

    def bytes_on(owners, gpu):
        return sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == gpu)

    def badness(owners):
        return owners.count(None), sum(abs(bytes_on(owners, g) - bytes_on(assignment, g)) for g in range(len(usable)))

    body, output = assignment[:-1], assignment[-1]
    holders = {gpu for gpu in assignment if gpu is not None}
    mean = {g: [i for i, o in enumerate(body) if o == g] for g in holders}
    order = sorted(holders, key=lambda g: (g == output, sum(mean[g]) / max(len(mean[g]), 1), mean[g][:1]))
    ways = []
    for cuts in itertools.combinations_with_replacement(range(len(body) + 1), len(order)):
        bounds = [*cuts, len(body)]
        owners = [None] * cuts[0] if cuts else [None] * len(body)
        for gpu, (start, end) in zip(order, itertools.pairwise(bounds), strict=True):
            owners += [gpu] * (end - start)
        way = (*owners, output)
        if all(bytes_on(way, g) <= usable[g] for g in range(len(usable))):
            ways.append(way)
    assert badness(result) == min(badness(way) for way in ways)
    assert result in ways
