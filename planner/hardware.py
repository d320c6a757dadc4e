"""What a machine has: its GPUs, its host memory, and the order in which Ollama counts them.

One immutable snapshot is taken per decision (by ``proxy.gpus``); everything in ``planner`` works on that snapshot.
Unknown is ``None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU as it stands now.

    ``clock_mhz`` is the highest SM clock the card boosts to; ``sm_count`` counts streaming multiprocessors (or an
    equal unit of another vendor); ``bandwidth_bytes_per_s`` is the memory's theoretical rate, bus width times data rate.
    """

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None
    sm_count: int | None = None
    clock_mhz: int | None = None
    bandwidth_bytes_per_s: int | None = None
    pci_id: str | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    integrated: bool = False
    library: str = "CUDA"

    def __post_init__(self) -> None:
        if not 0 <= self.free_bytes <= self.total_bytes:
            raise ValueError(f"{self.name}: free bytes {self.free_bytes} are not between 0 and total bytes {self.total_bytes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The machine around the GPUs: its RAM and how fast the CPU reads it."""

    total_bytes: int | None = None
    free_bytes: int | None = None
    bandwidth_bytes_per_s: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rig:
    """The GPUs of one machine **in Ollama's device order**: index ``i`` here is what ``main_gpu: i`` means to Ollama.

    The source of the snapshot brings the cards into that order, so that no index ever has to be mapped afterwards.
    """

    gpus: tuple[Gpu, ...]
    host: Host = Host()


def gpu_names(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Short names for people: the maker's prefixes left out, equal cards told apart by their index."""
    short = [gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ") for gpu in gpus]
    return tuple(name if short.count(name) == 1 else f"{name} #{index}" for index, name in enumerate(short))
