"""How long a plan takes: ``python benchmarks/search.py``. The model is read once; each plan is made anew, as the proxy does it.

*first*: nothing about the model is known yet (compute buffers are replayed), or in the second and third row only what those above
needed; *again*: the median of later plans, each with other free memory, as after a model was loaded or unloaded.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from planner import Gpu, Host, PlanRequest, Rig, build_profile, make_plan
from planner.profile import ModelProfile
from planner.units import MIB
from proxy.models.gguf import read_profile

HEADERS = Path(__file__).parents[1] / "tests" / "data" / "gguf"
RUNS = 41

CARDS = (
    ("RTX 5090", 31500, 1792, (12, 0), 170, 2407),
    ("RTX 3090", 23700, 936, (8, 6), 82, 1695),
    ("RTX 4090", 23700, 1008, (8, 9), 128, 2520),
    ("RTX 4060 Ti", 15700, 288, (8, 9), 34, 2535),
    ("Tesla P40", 23900, 346, (6, 1), 30, 1531),
    ("RTX 3060", 11800, 360, (8, 6), 28, 1777),
    ("RTX 8000", 48000, 672, (7, 5), 72, 1770),
    ("RTX 5070 Ti", 15700, 896, (12, 0), 70, 2452),
)


def gpu(card: tuple[str, int, float, tuple[int, int], int, int], less_mib: int) -> Gpu:
    name, free_mib, gb_per_s, capability, sm_count, clock_mhz = card
    return Gpu(
        uuid=f"GPU-{name}",
        name=name,
        total_bytes=(free_mib + 600) * MIB,
        free_bytes=(free_mib - less_mib) * MIB,
        compute_capability=capability,
        sm_count=sm_count,
        clock_mhz=clock_mhz,
        bandwidth_bytes_per_s=int(gb_per_s * 1e9),
    )


def deepened(profile: ModelProfile, n_layers: int) -> ModelProfile:
    """``profile`` with its layers repeated until there are ``n_layers``."""
    rows = [tensor for tensor in profile.tensors if not tensor.name.startswith("blk.")]
    for i in range(n_layers):
        source = profile.layer_tensors[i % profile.n_layers]
        rows += [replace(tensor, name=f"blk.{i}.{name}") for name, tensor in source.items()]
    metadata = {**profile.metadata, f"{profile.architecture}.block_count": n_layers}
    size = sum(tensor.bytes for tensor in rows)
    return build_profile(metadata=metadata, tensors=rows, file_bytes=size, name=f"{profile.architecture} {n_layers} layers")


def measure(profile: ModelProfile, cards: Sequence[tuple[str, int, float, tuple[int, int], int, int]], num_ctx: int) -> None:
    host = Host(total_bytes=2**38, free_bytes=2**38)
    times = []
    label = ""
    for run in range(RUNS):
        rig = Rig(gpus=tuple(gpu(card, 7 * run) for card in cards), host=host)
        start = time.process_time()
        plan = make_plan(profile, rig, PlanRequest(num_ctx=num_ctx))
        times.append((time.process_time() - start) * 1e3)
        label = plan.chosen.label
    print(
        f"{profile.name:34} {profile.n_layers:4} layers  {len(cards):2} GPUs  first {times[0]:6.1f} ms  "
        f"again {statistics.median(times[1:]):5.1f} ms  worst {max(times[1:]):5.1f} ms  {label[:60]}"
    )


def main() -> None:
    llama = read_profile(HEADERS / "llama3.3-70b-q4km.gguf")
    measure(llama, CARDS[:2], 8192)
    measure(llama, CARDS[1:3], 8192)
    measure(llama, CARDS[:2], 131072)
    measure(read_profile(HEADERS / "llama3.3-70b-q4km.gguf"), CARDS[1:3], 8192)
    measure(read_profile(HEADERS / "qwen2.5-32b-q4km.gguf"), CARDS[:2], 32768)
    measure(read_profile(HEADERS / "qwen3-30b-a3b-q4km.gguf"), CARDS[3:6:2], 32768)
    measure(read_profile(HEADERS / "llama4-scout-q4km.gguf"), CARDS[:2], 8192)
    measure(llama, CARDS[:3], 32768)
    measure(llama, CARDS[1:], 32768)
    measure(deepened(llama, 126), CARDS, 8192)
    measure(deepened(llama, 300), CARDS, 8192)
    measure(deepened(llama, 126), CARDS * 2, 8192)


if __name__ == "__main__":
    main()
