"""The words and numbers of the tables."""

from dataclasses import replace

import pytest
from rich.console import Console

from planner.hardware import Rig
from proxy.gpus.static import StaticSource
from proxy.tables import devices_report, gib, rate

GPUS = StaticSource.from_arguments(["RTX 5090"]).rig().gpus


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(None, "-"), (0, "0 MiB"), (2**30 - 2**20, "1023 MiB"), (2**30, "1.0 GiB"), (33 * 10**9, "30.7 GiB")]
)
def test_sizes_are_in_gib_small_ones_in_mib(size_bytes, text):
    assert gib(size_bytes) == text


@pytest.mark.parametrize(("tokens_per_s", "text"), [(9.876, "9.9"), (99.94, "99.9"), (123.4, "123")])
def test_rates_have_the_digits_that_mean_something(tokens_per_s, text):
    assert rate(tokens_per_s) == text


def test_what_a_card_does_not_tell_is_a_dash():
    bare = replace(GPUS[0], compute_capability=None, sm_count=None, clock_mhz=None, bandwidth_bytes_per_s=None, pcie_width=None)
    console = Console(width=140)
    with console.capture() as capture:
        console.print(devices_report(Rig(gpus=(bare,)), [1.0], {}))
    row = next(line for line in capture.get().splitlines() if "RTX 5090" in line)
    assert row.split()[-6:] == ["-", "-", "-", "-", "-", "100.0%"]
