"""The error of the memory model beside that of other estimators, as the table in docs/memory.md.

    python benchmarks/memory/compare.py [GGUF_ESTIMATE]

The truth is tests/data/memory (llama.cpp b10488's own figures). `GGUF_ESTIMATE` is the small program in `gguf-estimate/` beside
this file, built with `go build`; without it the column of gguf-parser-go stays empty.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.memory.measure import DATA, write_sparse  # noqa: E402
from planner.stock import predict_server_vram  # noqa: E402
from planner.units import MIB  # noqa: E402
from proxy.models.gguf import read_header  # noqa: E402
from tests.planner.measured import Difference, differences, profile_of  # noqa: E402

Estimator = Callable[[str, int, int, str], float]
"""MiB of one GPU that holds everything, for (model, context, micro-batch, cache type)."""


def ollama_mib(model: str, ctx: int, _ubatch: int, _kv: str) -> float:
    """What stock Ollama expects (``PredictServerVRAM``)."""
    return predict_server_vram(profile_of(model), ctx) / MIB


def gguf_parser(tool: str, folder: str) -> Estimator:
    """What gguf-parser-go expects; the headers are written at full size for it, as it asks the file's length."""

    def estimate(model: str, ctx: int, ubatch: int, kv: str) -> float:
        path = Path(folder) / f"{model.replace('/', '-')}.gguf"
        if not path.exists():
            header = read_header(DATA / "gguf" / f"{model}.gguf")
            write_sparse(path, header.metadata, tuple(header.tensors))
        done = subprocess.run([tool, str(path), str(ctx), str(ubatch), kv], capture_output=True, text=True, check=True)
        return sum(int(device["nonuma"]) for device in json.loads(done.stdout)) / MIB

    return estimate


def errors(rows: Iterable[Difference], estimate: Estimator) -> list[float]:
    """Estimated less measured MiB for each load on one GPU."""
    return [
        estimate(d.row["model"], d.row["ctx"], d.row["ubatch"], d.row["kv"]) - d.measured_mib
        for d in rows
        if d.row["split"] == "solo"
        and d.device == "CUDA0"
        and len(d.row) == len(("model", "ctx", "ubatch", "kv", "split", "bytes"))
    ]


def summary(values: list[float]) -> str:
    """Mean absolute error, and the range."""
    if not values:
        return "–"
    low, high = (round(value) for value in (min(values), max(values)))
    return f"{fmean(map(abs, values)):.0f} ({low:+d} … {high:+d})"


def main(tool: str | None) -> None:
    """Prints the table and its sums."""
    by_model: defaultdict[str, list[Difference]] = defaultdict(list)
    for table in ("models", "families"):
        for difference in differences(table):
            if table == "models" or "/" in difference.row["model"]:
                by_model[difference.row["model"]].append(difference)
    print("| model | devices | within 1 % or 32 MiB | lopsided, every device | lopsided, one GPU | Ollama | gguf-parser-go |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    sums: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        rival = gguf_parser(tool, folder) if tool else None
        for model, rows in by_model.items():
            alone = [d.total_mib for d in rows if d.row["split"] == "solo" and d.device == "CUDA0"]
            columns = {
                "lopsided, every device": [d.total_mib for d in rows],
                "lopsided, one GPU": alone,
                "Ollama": errors(rows, ollama_mib),
                "gguf-parser-go": errors(rows, rival) if rival else [],
            }
            for name, values in columns.items():
                sums[name] += values
            good = sum(d.within(0.01, 32) for d in rows) / len(rows)
            cells = " | ".join(summary(values) for values in columns.values())
            print(f"| {model.removeprefix('families/')} | {len(rows)} | {good:.0%} | {cells} |")
    print()
    for name, values in sums.items():
        if values:
            print(f"{name}: median |error| {median(map(abs, values)):.1f} MiB, mean {fmean(map(abs, values)):.1f} MiB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
