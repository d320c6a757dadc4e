"""How long an estimate takes: 128 layers on 8 devices, as a table.

python benchmarks/memory/time_estimate.py tests/data/gguf/llama3.3-70b-q4km.gguf
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from planner.memory import estimate_memory
from planner.placement import Placement
from planner.profile import ModelProfile, Tensor, build_profile
from planner.settings import LoadSettings
from proxy.gguf import read_header

LAYERS, DEVICES = 128, 8


def stretch(path: str) -> ModelProfile:
    """The model of ``path`` with ``LAYERS`` layers, each like its first."""
    header = read_header(path)
    first = [tensor for tensor in header.tensors if tensor.name.startswith("blk.0.")]
    rest = [tensor for tensor in header.tensors if not tensor.name.startswith("blk.")]
    layers = [
        Tensor(name=t.name.replace("blk.0.", f"blk.{i}."), type=t.type, shape=t.shape) for i in range(LAYERS) for t in first
    ]
    return build_profile(metadata=header.metadata, tensors=[*rest, *layers], file_bytes=0)


def split(shift: int = 0) -> Placement:
    """Layers shared out evenly, ``shift`` of the last device's given to the first."""
    each = LAYERS // DEVICES
    layers = (each + shift, *(each for _ in range(DEVICES - 2)), each - shift)
    return Placement(layers=layers, order=tuple(range(DEVICES)), output_gpu=DEVICES - 1)


def milliseconds(call: Callable[[], object], runs: int) -> float:
    """Mean time of a call."""
    begin = time.perf_counter()
    for _ in range(runs):
        call()
    return (time.perf_counter() - begin) / runs * 1e3


def main(path: str) -> None:
    profile, settings = stretch(path), LoadSettings(num_ctx=8192)
    first = milliseconds(lambda: estimate_memory(profile, settings, split()), 1)
    shifts, contexts = count(1), count(1)
    rows = {
        "the model's first estimate": first,
        "the same again": milliseconds(lambda: estimate_memory(profile, settings, split()), 200),
        "another split": milliseconds(lambda: estimate_memory(profile, settings, split(next(shifts))), LAYERS // DEVICES - 1),
        "another context": milliseconds(
            lambda: estimate_memory(profile, replace(settings, num_ctx=8192 + 256 * next(contexts)), split()), 50
        ),
    }
    for name, value in rows.items():
        print(f"{name:28} {value:6.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1])
