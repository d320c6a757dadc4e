"""The planner against 38 real loads: llama-server b10488 on two H200, the second held back (``benchmarks/gpu/measure.py``)."""

from __future__ import annotations

import json
import shlex
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from planner.memory import estimate_memory
from planner.placement import Placement
from planner.profile import ModelProfile, Tensor, build_profile
from planner.quantization import ggml_type
from planner.request import MARGIN_BYTES, RUNTIME_BYTES
from planner.settings import LoadSettings
from planner.speed import Calibration, predict_speed, solo_rates
from planner.units import MIB
from tests.planner import models

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "two_h200.json").read_text())["rows"]
VOCABULARY = 128256
SHAPES = {"8b": (32, 4096, 14336, 32, 8, 0), "32b": (64, 5120, 25600, 64, 8, 0), "moe30": (48, 2048, 768, 32, 4, 128)}
"""Layers, width, width of the FFN or an expert, heads, KV heads, experts."""
RIG = models.rig(*(models.gpu(name, 140_000, gb_per_s=4800, capability=(9, 0)) for name in ("first", "second")))


@cache
def profile(name: str) -> ModelProfile:
    """The synthetic model that was loaded: Q4_0 matrices, an output matrix in Q8_0, heads of 128."""
    n_layers, width, ffn, heads, kv_heads, experts = SHAPES[name]
    q4, q8, f32 = ggml_type("q4_0"), ggml_type("q8_0"), ggml_type("f32")
    tensors = [
        Tensor(name="token_embd.weight", type=q4, shape=(width, VOCABULARY)),
        Tensor(name="output.weight", type=q8, shape=(width, VOCABULARY)),
        Tensor(name="output_norm.weight", type=f32, shape=(width,)),
    ]
    many = (experts,) if experts else ()
    kind = "_exps" if experts else ""
    for i in range(n_layers):
        matrices = {
            "attn_q": (width, heads * 128),
            "attn_k": (width, kv_heads * 128),
            "attn_v": (width, kv_heads * 128),
            "attn_output": (heads * 128, width),
            f"ffn_gate{kind}": (width, ffn, *many),
            f"ffn_up{kind}": (width, ffn, *many),
            f"ffn_down{kind}": (ffn, width, *many),
        }
        vectors = {"attn_norm": (width,), "ffn_norm": (width,)}
        if experts:
            vectors |= {"attn_q_norm": (128,), "attn_k_norm": (128,), "ffn_gate_inp": (width, experts)}
        tensors += [Tensor(name=f"blk.{i}.{stem}.weight", type=q4, shape=shape) for stem, shape in matrices.items()]
        tensors += [Tensor(name=f"blk.{i}.{stem}.weight", type=f32, shape=shape) for stem, shape in vectors.items()]
    architecture = "qwen3moe" if experts else "llama"
    numbers = {
        "block_count": n_layers,
        "context_length": 131072,
        "embedding_length": width,
        "feed_forward_length": 6144 if experts else ffn,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "rope.dimension_count": 128,
        "vocab_size": VOCABULARY,
    }
    numbers |= {"expert_count": experts, "expert_used_count": 8, "expert_feed_forward_length": ffn} if experts else {}
    metadata = {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in numbers.items()}}
    return build_profile(metadata=metadata, tensors=tensors, file_bytes=sum(t.bytes for t in tensors), name=name)


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
    n_layers = SHAPES[row["model"]][0]
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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']} {row['args']}")
def test_the_bytes_on_each_gpu_are_those_that_llama_server_printed(row: dict[str, Any]) -> None:
    """Weights, KV and compute buffer of every load, on each GPU that it used."""
    settings, placement = load(row)
    devices = estimate_memory(profile(row["model"]), settings, placement).devices
    for gpu in placement.order:
        printed = row["buffers_mib"][f"CUDA{gpu}"]
        assert devices[gpu].weights_bytes / MIB == pytest.approx(printed["model"], abs=1)
        assert devices[gpu].kv_bytes / MIB == pytest.approx(printed["KV"], abs=1)
        assert devices[gpu].compute_bytes / MIB == pytest.approx(printed["compute"], abs=32)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']} {row['args']}")
def test_the_runtime_and_the_margin_cover_what_nvml_counts_beside_the_buffers(row: dict[str, Any]) -> None:
    """After prompts and answers too, when cuBLAS has its workspace; a GPU that the load leaves alone has the context only."""
    for gpu, used_mib in enumerate(row["used_mib_after_runs"]):
        beside = used_mib - sum(row["buffers_mib"].get(f"CUDA{gpu}", {}).values())
        assert 527 <= beside <= (RUNTIME_BYTES + MARGIN_BYTES) / MIB


@pytest.mark.parametrize("model", SHAPES)
def test_splits_over_unequal_gpus_run_as_fast_as_predicted_from_the_solo_rows(model: str) -> None:
    """Decode within 3 %, prefill within 11, both in the measured order (ties within 3 %), from the two solo rows alone."""
    found = profile(model)
    held = [(row, *load(row)) for row in ROWS if row["model"] == model and row["second_gpu_held"]]
    rates = {}
    for row, settings, placement in held:
        if placement.kind == "solo":
            gpu = RIG.gpus[placement.order[0]]
            rates[gpu.uuid] = solo_rates(
                found, settings, gpu, decode_tokens_per_s=row["decode"], prefill_tokens_per_s=row["prefill"]
            )
    splits = [
        (row, predict_speed(found, RIG, settings, placement, Calibration(rates=rates)))
        for row, settings, placement in held
        if placement.kind == "split"
    ]
    assert len(splits) >= 4
    decodes = [(row["decode"], speed.decode_tokens_per_s) for row, speed in splits]
    prefills = [(row["prefill"], speed.prefill_tokens_per_s) for row, speed in splits]
    for pairs, share in ((decodes, 0.03), (prefills, 0.11)):
        assert [predicted for _, predicted in pairs] == pytest.approx([measured for measured, _ in pairs], rel=share)
        for (one, lower), (other, higher) in combinations(sorted(pairs), 2):
            assert higher > lower or other < 1.03 * one
