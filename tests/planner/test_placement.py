"""Placements: what no placement may say, and how one is put into words."""

from __future__ import annotations

import pytest

from planner.hardware import gpu_names
from planner.placement import Placement, contiguous, in_words, on_cpu, solo
from tests.planner.models import gpu

NAMES = ("A", "B", "C")


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (solo(1, n_gpus=3, n_layers=4), "B alone"),
        (on_cpu(n_gpus=3, n_layers=4), "all in RAM"),
        (Placement(layers=(1, 0, 3), order=(2, 0), output_gpu=0), "3 on C + 2 on A"),
        (Placement(layers=(2, 0, 0), order=(0,), output_gpu=0, cpu_layers=2), "2 in RAM + 3 on A"),
        (Placement(layers=(2, 0, 0), order=(0,), cpu_layers=2), "3 in RAM + 2 on A"),
        (
            Placement(layers=(4, 0, 0), order=(0,), output_gpu=0, cpu_experts=frozenset({0, 1})),
            "5 on A, experts of 2 layers in RAM",
        ),
    ],
)
def test_a_placement_counts_the_output_layer_where_it_is(placement: Placement, text: str) -> None:
    """Lowest layers first."""
    assert in_words(placement, NAMES) == text


def test_equal_cards_are_told_apart_by_their_index_and_makers_left_out() -> None:
    """One short name for each card, everywhere."""
    cards = ("NVIDIA GeForce RTX 5090", "GeForce RTX 3090", "RTX 3090", "Radeon RX 7900 XTX")
    names = gpu_names([gpu(name, 1000) for name in cards])
    assert names == ("RTX 5090", "RTX 3090 #1", "RTX 3090 #2", "Radeon RX 7900 XTX")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((3, 2), Placement(layers=(3, 1), order=(0, 1), output_gpu=1)),
        ((3, 0), Placement(layers=(2, 0), order=(0,), output_gpu=0, cpu_layers=2)),
        ((0, 0), on_cpu(n_gpus=2, n_layers=4)),
    ],
)
def test_counts_in_the_order_of_the_devices(counts: tuple[int, int], expected: Placement) -> None:
    """The output layer is the last of the last device; what is missing lies in RAM."""
    assert contiguous(counts, 4) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": (2, -1), "order": (0,)},
        {"layers": (2, 1), "order": (0,)},
        {"layers": (2, 1), "order": (0, 1, 1)},
        {"layers": (2, 1), "order": (0, 1), "output_gpu": 0},
    ],
)
def test_what_llama_cpp_could_not_execute_is_no_placement(wrong: dict[str, object]) -> None:
    """Negative counts, GPUs missing or twice in the order, an output layer that is not on the last."""
    with pytest.raises(ValueError, match=r"layers|order|output"):
        Placement(**wrong)  # type: ignore[arg-type]
