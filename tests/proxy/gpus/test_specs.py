"""The table of cards: known figures, and names as people and drivers write them."""

import pytest

from planner.units import GIB, MIB
from proxy.errors import GpuError
from proxy.gpus.specs import cards, find_card, idle_free_bytes


@pytest.mark.parametrize(
    ("name", "sms", "clock_mhz", "gib", "gb_per_s", "capability", "pcie"),
    [
        ("RTX 5090", 170, 2407, 32, 1792, (12, 0), (5, 16)),
        ("RTX 3090", 82, 1695, 24, 936, (8, 6), (4, 16)),
        ("Tesla P40", 30, 1531, 24, 347, (6, 1), (3, 16)),
        ("H200", 132, 1980, 141, 4894, (9, 0), (5, 16)),
        ("RX 7900 XTX", 96, 2498, 24, 960, None, (4, 16)),
        ("Arc B580", 20, 2670, 12, 456, None, (4, 8)),
    ],
)
def test_figures_of_known_cards(name, sms, clock_mhz, gib, gb_per_s, capability, pcie):
    """SMs (compute units, Xe cores), boost clock, memory, bandwidth, capability and bus as their makers state them."""
    card = find_card(name)
    assert (card.sm_count, card.clock_mhz, card.total_bytes, card.compute_capability) == (sms, clock_mhz, gib * GIB, capability)
    assert round(card.bandwidth_bytes_per_s / 1e9) == gb_per_s
    assert (card.pcie_generation, card.pcie_width) == pcie


def test_libraries_follow_the_vendor():
    """Ollama runs AMD cards through ROCm and Intel's through Vulkan."""
    assert [find_card(name).library for name in ("RTX 3090", "RX 7900 XTX", "Arc B580")] == ["CUDA", "ROCm", "Vulkan"]


@pytest.mark.parametrize(("gib", "known_mib"), [(32, 31_500), (24, 23_700)])
def test_the_drivers_reserve(gib, known_mib):
    """What is free on an idle 5090 and 3090, within 0.5 %."""
    assert idle_free_bytes(gib * GIB) / MIB == pytest.approx(known_mib, rel=0.005)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("5090", "GeForce RTX 5090"),
        ("rtx 5090", "GeForce RTX 5090"),
        ("RTX5090", "GeForce RTX 5090"),
        ("NVIDIA GeForce RTX 5090", "GeForce RTX 5090"),
        ("RTX 3090 24GB", "GeForce RTX 3090"),
        ("3090ti", "GeForce RTX 3090 Ti"),
        ("4070 Ti SUPER", "GeForce RTX 4070 Ti SUPER"),
        ("RTX 4060 Ti 16GB", "GeForce RTX 4060 Ti 16GB"),
        ("RTX 4060 Ti 16 GiB", "GeForce RTX 4060 Ti 16GB"),
        ("RTX 3080", "GeForce RTX 3080"),
        ("RTX 3080 12 GB", "GeForce RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 Laptop GPU"),
        ("RTX 4090 Mobile", "GeForce RTX 4090 Laptop GPU"),
        ("RTX 8000", "Quadro RTX 8000"),
        ("RTX 6000 Ada", "RTX 6000 Ada Generation"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM4 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("NVIDIA H200", "H200"),
        ("A770", "Arc A770"),
        ("AMD Radeon RX 7900 XTX", "Radeon RX 7900 XTX"),
        ("MI300X", "Radeon Instinct MI300X"),
    ],
)
def test_names_as_people_and_drivers_write_them(written, name):
    """Brand, case, spaces and the memory's size don't matter where one card is meant."""
    assert find_card(written).name == name


@pytest.mark.parametrize("brand", ["", "NVIDIA "])
def test_every_card_is_found_by_its_own_name(brand):
    """No card of the table is hidden behind another."""
    assert [find_card(brand + card.name) for card in cards()] == list(cards())


@pytest.mark.parametrize("written", ["RTX 4060 Ti", "A100", "V100", "H100"])
def test_a_name_that_several_cards_have(written):
    """Cards that differ in memory or form are not guessed between: the error lists them."""
    with pytest.raises(GpuError, match=r"can be .*, .*; say which"):
        find_card(written)


@pytest.mark.parametrize(
    "written", ["RTX 5900", "GeForce 5095", "RTX", "", "   ", "banana", "RTX 3090 x2", "RTX 5090x " * 1000, "RTX 3050 Ti"]
)
def test_an_unknown_name(written):
    """An error, with the nearest names where there are any; a card that exists in laptops alone is not meant by its bare name."""
    with pytest.raises(GpuError, match="no card is known as"):
        find_card(written)


def test_the_nearest_names_are_near():
    """Two swapped digits lead to the card that was meant."""
    with pytest.raises(GpuError, match=r"near to it: .*RTX 5090"):
        find_card("RTX 5900")


def test_figures_of_all_cards_are_possible():
    """No line of the table slipped: SMs, clocks, memory and bandwidth within what has been built."""
    assert len(cards()) > 300
    for card in cards():
        assert 2 <= card.sm_count <= 400, card
        assert 500 <= card.clock_mhz <= 3500, card
        assert 4 * GIB <= card.total_bytes <= 300 * GIB, card
        assert 20e9 <= card.bandwidth_bytes_per_s <= 12e12, card
        assert card.library != "CUDA" or card.compute_capability >= (5, 0), card
