"""Ollama's device order from NVML's list."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.hardware import Gpu
from proxy.errors import GpuError
from proxy.gpus.order import DeviceOrder, in_ollama_order


def gpu(name: str, uuid: str, pci: int, sms: int | None = 80, capability: tuple[int, int] = (8, 6)) -> Gpu:
    return Gpu(
        uuid=f"GPU-{uuid}",
        name=f"NVIDIA GeForce {name}",
        total_bytes=2**34,
        free_bytes=2**33,
        sm_count=sms,
        clock_mhz=2000,
        compute_capability=capability,
        pci_id=f"00000000:{pci:02x}:00.0",
    )


SLOW = gpu("RTX 3090", "aa1", 1, 82)
TI = gpu("RTX 3090 Ti", "aa2", 2, 84)
FAST = gpu("RTX 5090", "bb3", 0x41, 170, (12, 0))
RIG = [TI, FAST, SLOW]


def order(**known: object) -> list[Gpu]:
    return list(in_ollama_order(RIG, DeviceOrder(**known)))


def test_fastest_first_unless_told_otherwise():
    """CUDA's default: the fastest card is device 0, the rest by PCI id."""
    assert order() == [FAST, SLOW, TI]


def test_pci_order():
    """CUDA_DEVICE_ORDER=PCI_BUS_ID: as NVML counts."""
    assert order(by_pci=True) == [SLOW, TI, FAST]


@pytest.mark.parametrize("cards", [[TI, FAST, SLOW], [FAST, SLOW, TI]])
def test_cards_of_unknown_pci_ids_stay_as_they_are_listed(cards):
    """A profile has no PCI ids, and its order is Ollama's: sorted by UUID, the layers of one card would go to another."""
    unknown = [replace(card, pci_id=None) for card in cards]
    assert list(in_ollama_order(unknown, DeviceOrder(by_pci=True))) == unknown


def test_unknown_speed_falls_back_to_compute_capability():
    """One card without an SM count, and the newer generation is taken for the fastest."""
    old = gpu("RTX 8000", "cc", 0x11, None, (7, 5))
    assert in_ollama_order([old, FAST, SLOW], DeviceOrder())[0] == FAST


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        ("0,1", [FAST, SLOW]),
        ("2, 0", [TI, FAST]),
        ("GPU-aa2,GPU-bb3", [TI, FAST]),
        ("GPU-bb", [FAST]),
        ("1,-1,0", [SLOW]),
        ("1,7,0", [SLOW]),
        ("0,GPU-aa", [FAST]),
        ("0,0", []),
        ("", []),
        ("-1", []),
        ("none", []),
    ],
)
def test_cuda_visible_devices(visible, shown):
    """Indices into CUDA's order or UUIDs, in the order given, up to the first that means no device; one twice: nothing."""
    assert order(visible=visible) == shown


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["GPU-aa1"], [SLOW, FAST, TI]),
        (["RTX 3090", "RTX 3090 Ti"], [SLOW, TI, FAST]),
        (["3090", "3090"], [SLOW, TI, FAST]),
        (["gpu-AA2", "rtx 5090"], [TI, FAST, SLOW]),
    ],
)
def test_an_order_given_by_the_user(names, ordered):
    """UUIDs or their beginnings, or names, each for one card; those not named follow."""
    assert order(names=tuple(names)) == ordered


def test_a_name_means_the_card_that_has_no_more_words():
    """``RTX 3090`` is the 3090, though the 3090 Ti comes before it."""
    later = gpu("RTX 3090", "dd4", 3, 82)
    assert in_ollama_order([TI, later], DeviceOrder(names=("RTX 3090",))) == (later, TI)


@pytest.mark.parametrize(("names", "says"), [(("RTX 4090",), "names 'RTX 4090'"), (("GPU-aa",), "beginning of 2 UUIDs")])
def test_an_order_that_means_no_card(names, says):
    """Refused, listing the cards that are there."""
    with pytest.raises(GpuError, match=says):
        order(names=names)


@given(st.permutations(RIG), st.booleans(), st.sampled_from([None, "0,1", "2"]))
def test_the_order_of_the_input_changes_nothing(gpus, by_pci, visible):
    """NVML's own listing order has no say."""
    known = DeviceOrder(by_pci=by_pci, visible=visible)
    assert in_ollama_order(gpus, known) == in_ollama_order(RIG, known)


def test_from_the_environment():
    """The variables that CUDA reads; the user's names come from the settings."""
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ""}
    assert DeviceOrder.from_environment(environment, names=("a",)) == DeviceOrder(names=("a",), by_pci=True, visible="")
    assert DeviceOrder.from_environment({}) == DeviceOrder()
