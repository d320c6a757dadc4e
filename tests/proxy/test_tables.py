"""The words and numbers of the tables."""

from dataclasses import replace

import pytest
from rich.console import Console

from planner.hardware import Rig
from planner.placement import Placement, on_cpu, solo
from proxy.gpus.static import StaticSource
from proxy.tables import devices_report, gib, gpu_names, placement_text, rate

GPUS = StaticSource.from_arguments(["RTX 5090", "RTX 3090", "RTX 3090", "RX 7900 XTX"]).rig().gpus
NAMES = ("A", "B", "C")


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(None, "-"), (0, "0 MiB"), (2**30 - 2**20, "1023 MiB"), (2**30, "1.0 GiB"), (33 * 10**9, "30.7 GiB")]
)
def test_sizes_are_in_gib_small_ones_in_mib(size_bytes, text):
    assert gib(size_bytes) == text


@pytest.mark.parametrize(("tokens_per_s", "text"), [(9.876, "9.9"), (99.94, "99.9"), (123.4, "123")])
def test_rates_have_the_digits_that_mean_something(tokens_per_s, text):
    assert rate(tokens_per_s) == text


def test_equal_cards_are_told_apart_by_their_index():
    names = gpu_names(GPUS)
    assert names[:3] == ("RTX 5090", "RTX 3090 #1", "RTX 3090 #2")
    assert names[3].endswith("RX 7900 XTX")


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (solo(1, n_gpus=3, n_layers=4), "B alone"),
        (on_cpu(n_gpus=3, n_layers=4), "CPU 5"),
        (Placement(layers=(1, 0, 3), order=(2, 0), output_gpu=0), "C 3 + A 2"),
        (Placement(layers=(2, 0, 0), order=(0,), output_gpu=0, cpu_layers=2), "CPU 2 + A 3"),
        (Placement(layers=(2, 0, 0), order=(0,), cpu_layers=2), "CPU 3 + A 2"),
        (Placement(layers=(4, 0, 0), order=(0,), output_gpu=0, cpu_experts=frozenset({0, 1})), "A 5, experts of 2 layers in RAM"),
    ],
)
def test_a_placement_counts_the_output_layer_where_it_is(placement, text):
    assert placement_text(placement, NAMES) == text


def test_what_a_card_does_not_tell_is_a_dash():
    bare = replace(GPUS[0], compute_capability=None, sm_count=None, clock_mhz=None, bandwidth_bytes_per_s=None, pcie_width=None)
    console = Console(width=140)
    with console.capture() as capture:
        console.print(devices_report(Rig(gpus=(bare,)), [1.0], {}))
    row = next(line for line in capture.get().splitlines() if "RTX 5090" in line)
    assert row.split()[-6:] == ["-", "-", "-", "-", "-", "100.0%"]
