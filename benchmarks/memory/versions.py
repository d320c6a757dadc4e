"""Rows in which another llama.cpp reserves other bytes than b10488: docs/memory-rows.md, a line for each five of them.

    python benchmarks/memory/versions.py > docs/memory-rows.md

Compares tests/data/memory/cuda_b11434.json (`llama-fit-params` of a CUDA build of b11434, in whole MiB) with the same loads by
b10488 in tests/data/memory/models.json.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

MEMORY = Path(__file__).parents[2] / "tests" / "data" / "memory"
MIB = 2**20
PARTS = ("weights", "context", "compute")
SPLITS = ("solo", "layer", "layer13", "layer31", "part20")
KEY = ("model", "ctx", "ubatch", "kv", "split")


def read(name: str) -> dict[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """A table: ``{device: (weights, context, compute)}`` in MiB for each (model, context, micro-batch, cache type, split)."""
    rows = json.loads((MEMORY / f"{name}.json").read_text())
    return {
        tuple(str(row[key]) for key in KEY): {
            device: tuple(parts) for device, parts in (row.get("mib") or whole_mib(row["bytes"])).items()
        }
        for row in rows
    }


def whole_mib(table: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Bytes as `llama-fit-params` prints them: whole MiB, the rest cut off."""
    return {device: tuple(size // MIB for size in parts) for device, parts in table.items() if any(parts)}


def main() -> None:
    """Prints the page."""
    theirs, ours = read("cuda_b11434"), read("models")
    differing: defaultdict[str, int] = defaultdict(int)
    cells: defaultdict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    rows = 0
    for key, devices in theirs.items():
        apart = {
            device: tuple(a - b for a, b in zip(parts, ours[key].get(device, (0, 0, 0)), strict=True))
            for device, parts in devices.items()
        }
        for part, name in enumerate(PARTS):
            differing[name] += any(abs(delta[part]) > 1 for delta in apart.values())
        differs = any(abs(value) > 1 for delta in apart.values() for value in delta)
        rows += differs
        if differs:
            cells[key[:4]][key[4]] = " ".join(f"{delta[2]:+d}" for delta in apart.values())
    print("# Loads that b11434 and b10488 size differently\n")
    print(
        f"Of {len(theirs)} loads {rows} differ by more than 1 MiB: weights in {differing['weights']}, caches in"
        f" {differing['context']}, compute buffers in {differing['compute']}. Each cell is one load: MiB of compute by b11434"
        " minus those by b10488, on each GPU in order and last on the host; – where nothing differs. The columns are `solo` (one"
        " GPU), `layer`, `layer13` and `layer31` (two GPUs, shares 1:1, 1:3 and 3:1) and `part20` (20 layers on one GPU, the rest"
        " on the CPU). b10488 (`tests/data/memory/models.json`) is what Ollama 0.32 ships and what the memory model follows."
        " Made by `python benchmarks/memory/versions.py > docs/memory-rows.md`.\n"
    )
    print("| model | context | micro-batch | cache | " + " | ".join(SPLITS) + " |")
    print("|---|--:|--:|---|" + "--:|" * len(SPLITS))
    for key, by_split in cells.items():
        print("| " + " | ".join(key) + " | " + " | ".join(by_split.get(split, "–") for split in SPLITS) + " |")


if __name__ == "__main__":
    main()
