"""Ollama's device order, from what NVML lists.

NVML counts by PCI id. CUDA counts *fastest first* unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, Ollama counts as CUDA does, less
what ``CUDA_VISIBLE_DEVICES`` hides. CUDA documents of *fastest first* only that a simple heuristic picks device 0 and that the
order of the rest is unspecified (CUDA C++ Programming Guide, "CUDA Environment Variables"); hence the guess here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.hardware import Gpu
from proxy.errors import GpuError


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceOrder:
    """What is known about Ollama's device order.

    ``names`` is the user's list (``LOPSIDED_DEVICE_ORDER``): UUIDs or their beginnings, or card names. ``by_pci`` says that
    CUDA counts by PCI id. ``visible`` is ``CUDA_VISIBLE_DEVICES``, ``None`` where it is not set.
    """

    names: tuple[str, ...] = ()
    by_pci: bool = False
    visible: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], *, names: tuple[str, ...] = ()) -> DeviceOrder:
        """The order that CUDA's variables of this environment, taken to be Ollama's too, and the user's ``names`` state."""
        return cls(
            names=names,
            by_pci=environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID",
            visible=environment.get("CUDA_VISIBLE_DEVICES"),
        )


def in_ollama_order(gpus: Sequence[Gpu], order: DeviceOrder) -> tuple[Gpu, ...]:
    """The visible ones of ``gpus``, index ``i`` being what Ollama calls device ``i``.

    First CUDA's own order: by PCI id, or the fastest card first and the rest by PCI id; where a card's PCI id is unknown, the
    order given stands for that of the ids. Then ``visible`` picks from that, in its own order. Then ``names``, if given: the
    cards it names come first, as it names them, the others after them.
    Raises ``GpuError`` where a name means no visible card, or a beginning of a UUID means several.
    """
    by_pci = list(gpus) if any(gpu.pci_id is None for gpu in gpus) else sorted(gpus, key=lambda gpu: str(gpu.pci_id))
    cuda = by_pci if order.by_pci else _fastest_first(by_pci)
    visible = cuda if order.visible is None else visible_gpus(cuda, order.visible)
    return _named_first(visible, order.names)


def _fastest_first(by_pci: list[Gpu]) -> list[Gpu]:
    """The card with the highest SM count × clock in front (of equal ones the first by PCI id), the others as they are.

    Where any card's SMs or clock are unknown, compute capability decides, then memory.
    """
    known = all(gpu.sm_count and gpu.clock_mhz for gpu in by_pci)

    def speed(gpu: Gpu) -> tuple[int, ...]:
        if known:
            return ((gpu.sm_count or 0) * (gpu.clock_mhz or 0),)
        return (*(gpu.compute_capability or (0, 0)), gpu.total_bytes)

    fastest = max(by_pci, key=speed, default=None)
    return [gpu for gpu in by_pci if gpu is fastest] + [gpu for gpu in by_pci if gpu is not fastest]


def visible_gpus(cuda: Sequence[Gpu], visible: str) -> list[Gpu]:
    """What CUDA shows: it reads indices or UUIDs (or their beginnings) up to the first that means no device, or one twice."""
    shown: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdecimal():
            found = list(cuda[int(entry) : int(entry) + 1])
        else:
            found = [gpu for gpu in cuda if entry and gpu.uuid.startswith(entry)]
        if len(found) != 1:
            break
        if found[0] in shown:
            return []
        shown += found
    return shown


def _named_first(gpus: list[Gpu], names: Sequence[str]) -> tuple[Gpu, ...]:
    left = list(gpus)
    first: list[Gpu] = []
    for name in names:
        found = [gpu for gpu in left if gpu.uuid.lower().startswith(name.lower())]
        if len(found) > 1:
            raise GpuError(f"LOPSIDED_DEVICE_ORDER: {name!r} is the beginning of {len(found)} UUIDs; write more of it")
        words = set(name.lower().split())
        found = found or [gpu for gpu in left if words <= set(gpu.name.lower().split())]  # equal cards: one entry for each
        if not found:
            there = ", ".join(f"{gpu.name} ({gpu.uuid})" for gpu in left) or "none"
            raise GpuError(f"LOPSIDED_DEVICE_ORDER names {name!r}, which is none of the GPUs still to be placed: {there}")
        first.append(min(found, key=lambda gpu: len(gpu.name.split())))  # "RTX 3090" is no RTX 3090 Ti if there is the other
        left.remove(first[-1])
    return (*first, *left)
