"""How long an estimate takes: 128 layers on 8 devices, as a table.

python benchmarks/memory/time_estimate.py tests/data/gguf/llama3.3-70b-q4km.gguf

The model is that of the file with its layers repeated, in their order, until there are 128 of them.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from planner.memory import estimate_memory
from planner.placement import Placement
from planner.profile import ModelProfile, Tensor, build_profile
from planner.settings import LoadSettings
from proxy.models.gguf import read_header

LAYERS, DEVICES = 128, 8
RUNS = 50
SHIFTS = LAYERS // DEVICES - 1


def stretch(path: str) -> ModelProfile:
    """The model of ``path`` with ``LAYERS`` layers: its own again and again, per-layer metadata too."""
    header = read_header(path)
    layers: dict[int, list[tuple[str, Tensor]]] = {}
    tensors: list[Tensor] = []
    for tensor in header.tensors:
        if match := re.match(r"blk\.(\d+)\.(.+)", tensor.name):
            layers.setdefault(int(match[1]), []).append((match[2], tensor))
        else:
            tensors.append(tensor)
    for i in range(LAYERS):
        tensors += [replace(tensor, name=f"blk.{i}.{name}") for name, tensor in layers[i % len(layers)]]
    metadata: dict[str, Any] = {
        key: (value * LAYERS)[:LAYERS] if isinstance(value, tuple) and len(value) == len(layers) else value
        for key, value in header.metadata.items()
    }
    return build_profile(metadata=metadata, tensors=tensors, file_bytes=0)


def split(shift: int = 0) -> Placement:
    """Layers shared out evenly, ``shift`` of the last device's given to the first."""
    each = LAYERS // DEVICES
    layers = (each + shift, *(each for _ in range(DEVICES - 2)), each - shift)
    return Placement(layers=layers, order=tuple(range(DEVICES)), output_gpu=DEVICES - 1)


def milliseconds(call: Callable[[], object], runs: int = RUNS) -> list[float]:
    """The time of each of several calls."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def main(path: str) -> None:
    """Prints the table."""
    settings = LoadSettings(num_ctx=8192, batch=2048, ubatch=512)
    quantized = replace(settings, kv_type_k="q8_0", kv_type_v="q8_0")
    profile, known = stretch(path), split()
    fresh = iter([stretch(path) for _ in range(RUNS // 5)])
    for warm in (settings, quantized):
        estimate_memory(profile, warm, known)
    shifts, contexts, batches = count(1), count(1), count(1)

    def context(of: LoadSettings) -> LoadSettings:
        return replace(of, num_ctx=8192 + 256 * next(contexts))

    def batch() -> LoadSettings:
        return replace(settings, ubatch=512 + 8 * next(batches))

    cases = {
        "the same load again": milliseconds(lambda: estimate_memory(profile, settings, known)),
        "another split": milliseconds(lambda: estimate_memory(profile, settings, split(next(shifts))), SHIFTS),
        "another context": milliseconds(lambda: estimate_memory(profile, context(settings), known)),
        "another context, q8_0 cache": milliseconds(lambda: estimate_memory(profile, context(quantized), known)),
        "another micro-batch": milliseconds(lambda: estimate_memory(profile, batch(), known)),
        "a model's first estimate": milliseconds(lambda: estimate_memory(next(fresh), settings, known), RUNS // 5),
    }
    print(f"{LAYERS} layers on {DEVICES} devices      median ms   lowest ms")
    for name, times in cases.items():
        print(f"{name:28} {median(times):9.2f} {min(times):11.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
