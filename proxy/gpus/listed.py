"""GPUs as ``llama-server --list-devices`` lists them, where NVML knows none: ROCm, Vulkan, other machines' over RPC.

One device a line after ``Available devices:`` (``common_print_available_devices`` in ``common/arg.cpp``, llama.cpp b10488)::

    CUDA0: NVIDIA GeForce RTX 5090 (32606 MiB, 31500 MiB free)
    RPC0: 192.168.1.7:50052 (24259 MiB, 23700 MiB free)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.hardware import Gpu, Host, Rig
from planner.units import MIB
from proxy.errors import GpuError
from proxy.gpus.specs import find_card

_LINE = re.compile(r"^ +([A-Za-z]+)([0-9]{1,9}): (.*) \(([0-9]{1,9}) MiB, ([0-9]{1,9}) MiB free\)\s*$", re.MULTILINE)
"""Nine digits are a million GiB; Python refuses to read thousands of them."""


MOST_DEVICES = 16
"""llama.cpp knows no more (``llama_max_devices`` in ``src/llama.cpp``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedDevice:
    """One line. ``name`` is what ``--device`` calls it: its library and its number there."""

    name: str
    library: str
    description: str
    total_bytes: int
    free_bytes: int


def parse_listing(text: str) -> tuple[ListedDevice, ...]:
    """The devices in the order of the list, ``MOST_DEVICES`` at most; other lines are passed over, and so are devices without a
    number (``BLAS``)."""
    return tuple(
        ListedDevice(
            name=library + number,
            library=library,
            description=description,
            total_bytes=int(total_mib) * MIB,
            free_bytes=min(int(free_mib), int(total_mib)) * MIB,
        )
        for library, number, description, total_mib, free_mib in _LINE.findall(text)[:MOST_DEVICES]
    )


def rig_of(devices: Sequence[ListedDevice], *, known: Mapping[str, Gpu] | None = None, host: Host | None = None) -> Rig:
    """The rig of a list, in its order. ``known`` has what else is known of devices by their names; of the two
    numbers of free bytes the smaller one counts, since a profile may hold some back.

    A card that is not known is looked up in the table of cards by its description, and else only its memory is known. A list
    says no UUID, so the device's name stands for it.
    """
    found = _identified(devices, known or {})
    return Rig(gpus=tuple(_gpu(device, found.get(device.name)) for device in devices), host=host or Host())


def _identified(devices: Sequence[ListedDevice], known: Mapping[str, Gpu]) -> dict[str, Gpu]:
    """Which of the ``known`` cards each device is: its own if it is called so, else another that is, else its own.

    A profile may have the cards in another order, and the order of the driver's is a guess.
    """

    def is_own(device: ListedDevice, card: Gpu) -> bool:
        return card == known.get(device.name)

    def is_called(device: ListedDevice, card: Gpu) -> bool:
        return card.library == device.library and set(card.name.lower().split()) <= set(device.description.lower().split())

    left, found = list(known.values()), {}
    for fits in (lambda *both: is_own(*both) and is_called(*both), is_called, is_own):
        for device in devices:
            card = next((card for card in left if device.name not in found and fits(device, card)), None)
            if card is not None:
                found[device.name] = card
                left.remove(card)
    return found


def _gpu(device: ListedDevice, known: Gpu | None) -> Gpu:
    if known is not None:
        return replace(known, free_bytes=min(known.free_bytes, device.free_bytes))
    gpu = Gpu(
        uuid=device.name,
        name=device.description,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        library=device.library,
    )
    try:
        card = find_card(device.description)
    except GpuError:
        return gpu
    return replace(
        gpu,
        compute_capability=card.compute_capability,
        sm_count=card.sm_count,
        clock_mhz=card.clock_mhz,
        bandwidth_bytes_per_s=card.bandwidth_bytes_per_s,
        pcie_generation=card.pcie_generation,
        pcie_width=card.pcie_width,
        integrated=card.integrated,
    )
