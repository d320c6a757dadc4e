"""The simulated cards: a rig whose free memory goes down while models are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.hardware import Rig


class SimulatedGpus:
    """Cards in Ollama's device order, and what Ollama and other programs hold of each.

    ``rig()`` is a source of GPUs as the proxy wants one: a snapshot with the bytes that are free now.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._held = [0] * len(rig.gpus)
        self._occupied = [0] * len(rig.gpus)

    def rig(self) -> Rig:
        """The cards with the memory that is free now."""
        taken = [held + occupied for held, occupied in zip(self._held, self._occupied, strict=True)]
        gpus = (replace(gpu, free_bytes=max(gpu.free_bytes - used, 0)) for gpu, used in zip(self._rig.gpus, taken, strict=True))
        return replace(self._rig, gpus=tuple(gpus))

    def hold(self, used_bytes: Sequence[int]) -> None:
        """Takes ``used_bytes`` of each card for a model; negative numbers give them back."""
        self._held = [held + used for held, used in zip(self._held, used_bytes, strict=True)]

    def occupy(self, gpu: int, used_bytes: int) -> None:
        """Lets another program (a desktop, a game) hold ``used_bytes`` of card ``gpu`` from now on."""
        self._occupied[gpu] = used_bytes
