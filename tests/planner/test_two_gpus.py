"""The planner against real loads of llama-server b10488 on two pairs of H200 and two of H100, the second card held back."""

from __future__ import annotations

import json
import shlex
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.models import SHAPES, Decoder
from benchmarks.gpu.models import profile as synthetic
from planner.memory import estimate_memory
from planner.placement import Placement
from planner.profile import ModelProfile
from planner.request import MARGIN_BYTES, RUNTIME_BYTES
from planner.settings import LoadSettings
from planner.speed import Calibration, predict_speed, solo_rates
from planner.units import MIB
from tests.planner import models

DATA = Path(__file__).parents[1] / "data"


def rows(pair: str) -> list[dict[str, Any]]:
    """The measured loads of one file."""
    return [row | {"pair": pair} for row in json.loads((DATA / f"{pair}.json").read_text())["rows"]]


ROWS = rows("two_h200")
ALL = ROWS + rows("two_h100") + rows("two_h200_tuned") + rows("two_h100_tuned")
RIG = models.rig(*(models.gpu(name, 140_000, gb_per_s=4800, capability=(9, 0)) for name in ("first", "second")))
H100 = models.rig(*(models.gpu(name, 80_000, gb_per_s=3352, capability=(9, 0)) for name in ("first", "second")))
RIGS = {"two_h200": RIG, "two_h200_tuned": RIG, "two_h100": H100, "two_h100_tuned": H100}
CONTEXT_BYTES = 523 * MIB
"""The least that a process takes on a GPU of which it uses nothing: 523 to 527 MiB, by card and driver."""


def profile(row: dict[str, Any]) -> ModelProfile:
    """The synthetic model that was loaded: Q4_0 matrices, an output matrix in Q8_0, heads of 128."""
    return _profile(row["model"], older=row["pair"] == "two_h200")


@cache
def _profile(name: str, *, older: bool) -> ModelProfile:
    """The first pair had a 32B of another shape."""
    return synthetic(name, Decoder(64, 5120, 25600, 64, 8) if older and name == "32b" else SHAPES[name])


def load(row: dict[str, Any]) -> tuple[LoadSettings, Placement]:
    """The settings and the placement that llama-server's arguments stand for."""
    words = shlex.split(row["args"])
    given = dict(zip(words[::2], words[1::2], strict=True))
    parallel = int(given.get("-np", 1))
    settings = LoadSettings(
        num_ctx=int(given["-c"]) // parallel,
        parallel=parallel,
        batch=int(given["-b"]),
        ubatch=int(given["-ub"]),
        kv_type_k=given.get("--cache-type-k", "f16"),
        kv_type_v=given.get("--cache-type-v", "f16"),
        outputs=parallel,
    )
    n_layers = SHAPES[row["model"]].layers
    offloaded = min(int(given.get("-ngl", 999)), n_layers + 1)
    order = tuple(int(name.removeprefix("CUDA")) for name in given["--device"].split(","))
    shares = [int(share) for share in given["--tensor-split"].split(",")] if "--tensor-split" in given else [offloaded]
    layers = [0, 0]
    for gpu, share in zip(order, shares, strict=True):
        layers[gpu] = share - (gpu == order[-1])
    return settings, Placement(
        layers=tuple(layers),
        order=order,
        output_gpu=order[-1],
        cpu_layers=n_layers + 1 - offloaded,
        cpu_experts=frozenset(range(int(given.get("--n-cpu-moe", 0)))),
    )


def said(row: dict[str, Any]) -> str:
    return f"{row['pair']} {row['model']} {row['args']}"


@pytest.mark.parametrize("row", ALL, ids=said)
def test_the_bytes_on_each_gpu_are_those_that_llama_server_printed(row: dict[str, Any]) -> None:
    """Weights, KV and compute buffer of every load, on each GPU that it used."""
    settings, placement = load(row)
    devices = estimate_memory(profile(row), settings, placement).devices
    for gpu in placement.order:
        printed = row["buffers_mib"][f"CUDA{gpu}"]
        assert devices[gpu].weights_bytes / MIB == pytest.approx(printed["model"], abs=0.1)
        assert devices[gpu].kv_bytes / MIB == pytest.approx(printed["KV"], abs=0.1)
        assert devices[gpu].compute_bytes / MIB == pytest.approx(printed["compute"], abs=0.1)


@pytest.mark.parametrize("row", ALL, ids=said)
def test_the_runtime_and_the_margin_cover_what_nvml_counts_beside_the_buffers(row: dict[str, Any]) -> None:
    """After prompts and answers too, when cuBLAS has its workspace; a GPU that the load leaves alone has the context only."""
    for gpu, used_mib in enumerate(row["used_mib_after_runs"]):
        beside = used_mib - sum(row["buffers_mib"].get(f"CUDA{gpu}", {}).values())
        assert CONTEXT_BYTES / MIB <= beside <= (RUNTIME_BYTES + MARGIN_BYTES) / MIB


PAIRS = sorted({(row["pair"], row["model"]) for row in ALL})
WITHIN = {"two_h200": (0.03, 0.11), "two_h200_tuned": (0.05, 0.12), "two_h100": (0.06, 0.12), "two_h100_tuned": (0.05, 0.13)}
"""Decode and prefill, relative."""


@pytest.mark.parametrize(("pair", "model"), PAIRS)
def test_splits_over_unequal_gpus_run_as_fast_as_predicted_from_the_solo_rows(pair: str, model: str) -> None:
    """Decode and prefill as near as ``WITHIN`` says, both in the measured order (ties within 3 %), from two solo rows alone."""
    rig = RIGS[pair]
    held = [(row, *load(row)) for row in ALL if (row["pair"], row["model"]) == (pair, model) and row["second_gpu_held"]]
    found, rates = profile(held[0][0]), {}
    for row, settings, placement in reversed(held):  # the first of each GPU counts
        if placement.kind == "solo":
            gpu = rig.gpus[placement.order[0]]
            rates[gpu.uuid] = solo_rates(
                found, settings, gpu, decode_tokens_per_s=row["decode"], prefill_tokens_per_s=row["prefill"]
            )
    splits = [
        (row, predict_speed(found, rig, settings, placement, Calibration(rates=rates)))
        for row, settings, placement in held
        if placement.kind == "split"
    ]
    assert len(splits) >= 2
    decodes = [(row["decode"], speed.decode_tokens_per_s) for row, speed in splits]
    prefills = [(row["prefill"], speed.prefill_tokens_per_s) for row, speed in splits]
    for pairs, share in zip((decodes, prefills), WITHIN[pair], strict=True):
        assert [predicted for _, predicted in pairs] == pytest.approx([measured for measured, _ in pairs], rel=share)
        for (one, lower), (other, higher) in combinations(sorted(pairs), 2):
            assert higher > lower or other < 1.03 * one
