"""Loads that llama.cpp b10488 measured itself (benchmarks/memory/measure.py), and the same loads estimated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from planner.memory import MemoryEstimate, estimate_memory
from planner.placement import Placement, contiguous, solo
from planner.profile import ModelProfile
from planner.settings import LoadSettings
from planner.units import MIB
from proxy.models.gguf import read_profile

DATA = Path(__file__).parents[1] / "data"
SHARES = {"layer": (1, 1), "layer13": (1, 3), "layer31": (3, 1), "spill13": (1, 3), "spill31": (3, 1)}
OFFLOADED = {"spill13": 12, "spill31": 24}
"""Layers on the GPUs, the output layer among them, where it is not all of them."""


@cache
def profile_of(model: str) -> ModelProfile:
    """The profile of one of the headers under tests/data/gguf."""
    return read_profile(DATA / "gguf" / f"{model}.gguf")


def placement_of(split: str, n_layers: int) -> Placement:
    """What a split's flags make llama.cpp do (``llama_model_base::load_tensors``)."""
    if split == "solo":
        return solo(0, n_gpus=1, n_layers=n_layers)
    if split.startswith("part"):
        layers = min(int(split.removeprefix("part")) - 1, n_layers)
        return Placement(layers=(layers,), order=(0,), output_gpu=0, cpu_layers=n_layers - layers)
    shares = SHARES[split]
    offloaded = min(OFFLOADED.get(split, n_layers + 1), n_layers + 1)
    ends = [end / sum(shares) for end in accumulate(shares)]
    homes = [next(gpu for gpu, end in enumerate(ends) if end > layer / offloaded) for layer in range(offloaded - 1)]
    return Placement(
        layers=tuple(homes.count(gpu) for gpu in range(len(shares))),
        order=(0, 1),
        output_gpu=1,
        cpu_layers=n_layers - len(homes),
    )


def settings_of(row: dict[str, Any]) -> LoadSettings:
    """The settings of a measured load."""
    return LoadSettings(
        num_ctx=row["ctx"],
        parallel=row.get("parallel", 1),
        batch=max(row["ubatch"], 2048),
        ubatch=row["ubatch"],
        kv_type_k=row["kv"],
        kv_type_v=row.get("kv_v", row["kv"]),
        flash_attention=row.get("flash_attention", True),
        outputs=row.get("outputs"),
    )


def estimate_of(row: dict[str, Any], profile: ModelProfile) -> MemoryEstimate:
    """The same load, estimated."""
    counts = row.get("counts")
    placement = contiguous(counts, profile.n_layers) if counts else placement_of(row["split"], profile.n_layers)
    in_ram = range(placement.cpu_layers, min(row.get("cpu_experts", 0), profile.n_layers))
    placement = replace(placement, cpu_experts=frozenset(in_ram))
    return estimate_memory(profile, settings_of(row), placement)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Estimated less measured, in MiB, for one device or the host of one load; ``measured_mib`` is the sum of the three."""

    row: dict[str, Any]
    device: str
    weights_mib: float
    kv_mib: float
    compute_mib: float
    measured_mib: float

    @property
    def total_mib(self) -> float:
        """All three together."""
        return self.weights_mib + self.kv_mib + self.compute_mib

    def within(self, share: float, mib: float) -> bool:
        """Whether the total is off by no more than a share of the truth, or so many MiB."""
        return abs(self.total_mib) <= max(share * self.measured_mib, mib)


def read_table(name: str) -> list[dict[str, Any]]:
    """The rows of a table under tests/data/memory."""
    rows: list[dict[str, Any]] = json.loads((DATA / "memory" / f"{name}.json").read_text())
    return rows


def differences(table: str) -> Iterator[Difference]:
    """Every device and host of a table under tests/data/memory."""
    for row in read_table(table):
        profile = profile_of(row["model"])
        memory = estimate_of(row, profile)
        for device, (weights, kv, compute) in row["bytes"].items():
            index = int(device.removeprefix("CUDA")) if device != "Host" else -1
            if index >= len(memory.devices):
                continue  # the second device of a load on one
            part = memory.devices[index] if index >= 0 else memory.host
            yield Difference(
                row=row,
                device=device,
                weights_mib=(part.weights_bytes - weights) / MIB,
                kv_mib=(part.kv_bytes - kv) / MIB,
                compute_mib=(part.compute_bytes - compute) / MIB,
                measured_mib=(weights + kv + compute) / MIB,
            )
