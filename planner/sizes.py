"""Bytes of any run of layers at once: prefix sums over weights and caches, and a compute buffer for each role of a device.

``planner.memory`` says exactly what one placement takes; a search that looks at hundreds needs an answer in microseconds. The
compute buffers are those of the first placement that was asked for with as many devices (``_role``): the winner is always
measured anew with ``estimate_memory``.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import add

from planner.cache import caches_before
from planner.memory import estimate_memory
from planner.placement import Placement
from planner.profile import ModelProfile
from planner.settings import LoadSettings


class Sizes:
    """Sizes of ``profile`` under ``settings``; make one with ``sizes_of``.

    ``held_prefix[i]``: weights and caches of the layers below ``i``, in bytes.
    """

    def __init__(self, profile: ModelProfile, settings: LoadSettings) -> None:
        self.profile = profile
        self.settings = settings
        self.n_layers = profile.n_layers
        held: Iterable[int] = map(add, profile.weights_before, caches_before(profile, settings))
        self.held_prefix = tuple(held)
        self.experts_prefix = profile.experts_before
        self.output_bytes = profile.output_bytes

    def held_bytes(self, start: int, stop: int) -> int:
        """Weights and caches of the repeating layers from ``start`` up to ``stop``."""
        return self.held_prefix[stop] - self.held_prefix[start]

    def compute_bytes(self, placement: Placement) -> tuple[int, ...]:
        """The compute buffer of each device in ``placement.order``."""

        def made() -> tuple[int, ...]:
            devices = estimate_memory(self.profile, self.settings, placement).devices
            return tuple(devices[gpu].compute_bytes for gpu in placement.order)

        return self.profile.remember("compute_bytes", (self.settings, *_role(placement)), made)


def sizes_of(profile: ModelProfile, settings: LoadSettings) -> Sizes:
    """The sizes of a profile under these settings; made once."""
    return profile.remember("sizes", settings, lambda: Sizes(profile, settings))


def _role(placement: Placement) -> tuple[int, bool, bool, bool]:
    """What a compute buffer hangs on: devices, layers in RAM, experts in RAM, an output layer on a GPU."""
    return (
        len(placement.order),
        bool(placement.cpu_layers),
        bool(placement.cpu_experts),
        placement.output_gpu is not None,
    )
