"""What stock Ollama does: against llama.cpp's own ``--fit``, recorded loads, and the rules of its sources."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.autofit import FIT_MARGIN_BYTES, Fit, auto_fit, split_by_memory
from planner.hardware import Host
from planner.placement import contiguous
from planner.plan import make_plan
from planner.request import PlanRequest
from planner.settings import LoadSettings
from planner.sizes import Sizes, sizes_of
from planner.speed import predict_speed
from planner.stock import (
    automatic_batch,
    default_num_ctx,
    effective_settings,
    main_gpu_of,
    predict_server_vram,
    select_gpus,
    settings_on,
    stock_load,
)
from planner.units import GIB, MIB
from proxy.gpus.static import StaticSource
from tests.planner import models
from tests.planner.models import gpu, rig, rtx3090, rtx5090

DATA = Path(__file__).parents[1] / "data"
H200_MIB = 143_000
"""Free memory of the GPUs on which the measured rows were made: the cards' sizes were emulated by margins."""


def rows(name: str) -> list[dict[str, Any]]:
    """Rows of a measurement; ``layers`` counts the output layer, ``None`` is the default split.

    ``cpu_experts`` of the two measured tables are the layers all of whose routed experts went to RAM.
    """
    result: list[dict[str, Any]] = json.loads((DATA / f"{name}.json").read_text())
    return result


def difference(row: dict[str, Any], fit: Fit, default: tuple[int, ...]) -> int:
    """Layers by which the device that is furthest off differs from the row."""
    return max(abs(got - expected) for got, expected in zip(fit.placement.shares, row["layers"] or default, strict=True))


def fitted(row: dict[str, Any], free_bytes: list[int], margins_bytes: list[int]) -> Fit:
    """The fit of the row's model."""
    profile = models.header(row["model"])
    load = LoadSettings(num_ctx=row["ctx"], batch=2048, ubatch=512)
    return auto_fit(profile, sizes_of(profile, load), free_bytes, margins_bytes)


def test_the_fit_is_llama_cpps_own_on_16_models_and_9_rigs() -> None:
    """Its code ran with devices that say how much they have free (benchmarks/fit): 432 loads on one to eight devices."""
    found = []
    for row in rows("stock_fit_dry"):
        free = [mib * MIB for mib in row["free_mib"]]
        fit = fitted(row, free, [FIT_MARGIN_BYTES] * len(free))
        found.append(difference(row, fit, split_by_memory(models.header(row["model"]).n_layers + 1, free)))
        if row.get("cpu_experts"):
            assert abs(len(fit.placement.cpu_experts) - row["cpu_experts"]) <= 2
    assert len(found) == 432
    assert sum(layers == 0 for layers in found) >= 400
    assert sum(layers <= 1 for layers in found) >= 421


@given(st.integers(0, 130), st.lists(st.just(0) | st.integers(0, 9) | st.integers(0, 10**11), min_size=1, max_size=6))
def test_the_default_split_gives_each_layer_to_the_first_device_whose_share_exceeds_its_own(layers: int, free: list[int]) -> None:
    """As ``load_tensors`` does it, one layer after the other."""
    expected = [0] * len(free)
    for layer in range(layers):
        shares = (sum(free[: i + 1]) / sum(free) > layer / layers for i in range(len(free)) if sum(free))
        expected[next((i for i, exceeds in enumerate(shares) if exceeds), 0)] += 1
    assert split_by_memory(layers, free) == tuple(expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=4), st.sampled_from([2048, 16384]))
def test_a_dense_model_is_filled_with_as_many_layers_as_one_by_one(free_mib: list[int], num_ctx: int) -> None:
    profile = models.small(n_layers=12, ffn=(4096, 2048), vocabulary=16384)
    sizes = sizes_of(profile, LoadSettings(num_ctx=num_ctx))
    free = [mib * MIB for mib in free_mib]
    fit = auto_fit(profile, sizes, free, [0] * len(free))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.autofit._most_beside_ram", most_one_by_one)
        assert fit == auto_fit(profile, sizes, free, [0] * len(free))


def most_one_by_one(sizes: Sizes, shares: Sequence[Any], device: int, target: int, rest: int) -> int:
    """Each number of layers on its own, from none on."""
    fitting = 0
    for layers in range(1, rest):
        counts = [share.layers for share in shares]
        counts[device] = layers
        placement = contiguous(counts, sizes.n_layers)
        used = sizes.compute_bytes(placement)[0] + (sizes.output_bytes if placement.output_gpu == device else 0)
        run = dict(placement.ranges())[device]
        if used + sizes.held_bytes(run.start, run.stop) > target:
            break
        fitting = layers
    return fitting


CUDA_CONTEXT_MIB = 527
"""What each process takes on each GPU that it sees (measured on an H200: docs/memory.md)."""


def measured_difference(row: dict[str, Any], *taken_mib: int) -> int:
    """The row's fit where processes have ``taken_mib`` of the two cards."""
    free = [H200_MIB * MIB] * 2
    margins = [(H200_MIB - usable + taken) * MIB for usable, taken in zip(row["usable_mib"], taken_mib, strict=True)]
    return difference(row, fitted(row, free, margins), split_by_memory(models.header(row["model"]).n_layers + 1, free))


def test_the_measured_fits_are_met_with_a_whole_number_of_cuda_contexts_for_each_model_and_context() -> None:
    """108 rows measured on shared GPUs: the same card takes 37 layers in one and 38 in the next (docs/placement.md).

    The fitting process has a context of its own, so the least number is one; how many others ran beside it is not recorded. The
    rows of a model at a context stand next to each other, one for each pair of cards, and share one number: 36 for 108 rows.
    """
    found: list[int] = []
    for name in ("stock_fit", "stock_fit_b10488"):
        for _, group in groupby(rows(name), key=itemgetter("model", "ctx")):
            measured = list(group)
            taken = [processes * CUDA_CONTEXT_MIB for processes in range(1, 11)]
            differences = [[measured_difference(row, mib, mib) for row in measured] for mib in taken]
            found += min(differences, key=lambda each: (sum(layers > 1 for layers in each), sum(each)))
    assert len(found) == 108
    assert sum(layers <= 1 for layers in found) >= 103  # 95 %


@pytest.mark.parametrize(("name", "taken_mib", "met"), [("stock_fit", (2400, 1900), 66), ("stock_fit_b10488", (4500, 4900), 34)])
def test_100_of_the_108_measured_fits_are_met_with_one_amount_a_card(name: str, taken_mib: tuple[int, int], met: int) -> None:
    """Four numbers for all rows, ± 1 layer."""
    assert sum(measured_difference(row, *taken_mib) <= 1 for row in rows(name)) >= met


PAIRS = {
    (31500, 23700): ("RTX 5090", "RTX 3090"),
    (23700, 11800): ("RTX 4090", "RTX 3060 12GB"),
    (15700, 23900): ("RTX 5070 Ti 16GB", "Tesla P40"),
    (23700, 7700): ("RTX 3090", "RTX 4060 8GB"),
}
"""The cards that the measured rows' sizes stand for."""


@pytest.mark.parametrize("name", ["stock_fit", "stock_fit_b10488"])
def test_a_plan_is_never_predicted_slower_than_a_measured_fit_and_fits(name: str) -> None:
    """On the cards that each of the 108 rows stands for, with so much free as the row says that ``--fit`` might use."""
    for row in rows(name):
        profile = models.header(row["model"])
        cards = zip(PAIRS[tuple(row["usable_mib"])], row["usable_mib"], strict=True)  # type: ignore[index]
        machine = StaticSource.from_arguments([f"{card}:{mib}MiB" for card, mib in cards]).rig()
        machine = replace(machine, host=Host(total_bytes=256 * GIB, free_bytes=256 * GIB))
        request = PlanRequest(num_ctx=row["ctx"], num_batch=512)
        plan = make_plan(profile, machine, request)
        counts = row["layers"] or split_by_memory(profile.n_layers + 1, [1, 1])
        measured = contiguous(counts, profile.n_layers, frozenset(row.get("cpu_experts", ())))
        speed = predict_speed(profile, machine, plan.chosen.settings, measured)
        assert plan.chosen.fits, row
        assert plan.chosen.decode_tokens_per_s >= speed.decode_tokens_per_s, row


def test_the_default_split_follows_the_free_memory() -> None:
    """32 + 24 GB: 46 of 80 layers on the first; a device without memory gets nothing."""
    assert split_by_memory(80, [32, 24]) == (46, 34)
    assert split_by_memory(81, [1, 0, 1]) == (41, 0, 40)
    assert split_by_memory(4, [0, 0]) == (4, 0)


def test_a_real_ollama_splits_what_is_more_than_80_percent_of_each_card() -> None:
    """Measured with Ollama 0.32.15, two H200, a 32B in Q4_0: split 36/29, split 32/33, the slow card alone (± 2 layers)."""
    profile = models.quantized("qwen2.5-32b-q4km", "q4_0")
    for free_mib, expected in (((22528, 16384), (36, 29)), ((14336, 14336), (32, 33)), ((24576, 34816), (0, 65))):
        cards = rig(*(gpu(f"H200 {i}", mib, total_mib=H200_MIB) for i, mib in enumerate(free_mib)))
        shares = stock_load(profile, cards, PlanRequest(num_ctx=4096)).placement.shares
        assert all(abs(got - layers) <= 2 for got, layers in zip(shares, expected, strict=True)), (free_mib, shares)


def test_spread_splits_what_one_card_would_hold() -> None:
    """Case C with ``OLLAMA_SCHED_SPREAD=1``; the client's ``main_gpu`` wins over it."""
    profile = models.quantized("qwen2.5-32b-q4km", "q4_0")
    cards = rig(gpu("fast", 24576), gpu("slow", 34816))
    spread = PlanRequest(num_ctx=4096, spread=True)
    assert stock_load(profile, cards, spread).placement.kind == "split"
    assert stock_load(profile, cards, replace(spread, main_gpu=0)).placement.order == (0,)


def test_the_prediction_is_ollamas_formula() -> None:
    """File size + 2 · layers · KV heads · head width · context · 2 bytes: 8B at 8192 tokens is 4.9 GB + 1 GiB."""
    profile = models.header("llama3.1-8b-q4km")
    assert predict_server_vram(profile, 8192) == profile.file_bytes + 2 * 32 * 8 * 128 * 8192 * 2


@pytest.mark.parametrize(
    ("main_gpu", "expected"),
    [(None, ((1,), True)), (0, ((0,), True)), (1, ((1,), True)), (7, ((0, 1), False)), (-1, ((0, 1), False))],
)
def test_one_gpu_or_several(main_gpu: int | None, expected: tuple[tuple[int, ...], bool]) -> None:
    """The card with the most memory however slow, the one that is named, or all where the name is none of them."""
    profile = models.header("llama3.1-8b-q4km")
    cards = rig(gpu("fast", 12000, gb_per_s=1800), gpu("slow", 24000, gb_per_s=300))
    assert select_gpus(profile, cards, PlanRequest(num_ctx=4096, main_gpu=main_gpu)) == expected


def test_discrete_gpus_come_before_integrated_ones_and_libraries_do_not_mix() -> None:
    """An integrated GPU with more memory loses; a split stays within the library with the most memory."""
    small, large = models.header("llama3.1-8b-q4km"), models.header("llama3.3-70b-q4km")
    cards = rig(gpu("discrete", 12000), gpu("integrated", 60000, integrated=True))
    assert select_gpus(small, cards, PlanRequest(num_ctx=4096)) == ((0,), True)
    mixed = rig(gpu("a", 24000), gpu("v", 16000, library="Vulkan"), gpu("b", 24000))
    assert select_gpus(large, mixed, PlanRequest(num_ctx=4096)) == ((0, 2), False)


def test_main_gpu_says_which_card_where_no_other_library_is_preferred() -> None:
    """What Ollama makes of it is the card that is meant, or there is none for that card."""
    cards = rig(gpu("a", 9000), gpu("v", 16000, library="Vulkan"), gpu("b", 24000), gpu("w", 8000, library="Vulkan"))
    assert [main_gpu_of(cards, index) for index in range(4)] == [None, 0, 1, None]
    assert [main_gpu_of(rig(gpu("a", 9000), gpu("b", 24000)), index) for index in range(2)] == [0, 1]
    beside = rig(gpu("integrated", 60000, integrated=True, library="Vulkan"), gpu("card", 9000))
    assert [main_gpu_of(beside, index) for index in range(2)] == [None, 0]
    for main_gpu, meant in ((0, 1), (1, 2)):
        assert select_gpus(models.header("llama3.1-8b-q4km"), cards, PlanRequest(main_gpu=main_gpu)) == ((meant,), True)


def test_an_integrated_gpu_has_no_more_than_the_hosts_free_memory() -> None:
    """Its 60 GB are the host's, of which 8 GiB are free: the model does not fit by the 80 % rule."""
    profile = models.header("qwen2.5-32b-q4km")
    cards = rig(gpu("integrated", 60000, integrated=True), gpu("small", 4000), ram_gib=8)
    assert select_gpus(profile, cards, PlanRequest(num_ctx=4096)) == ((0, 1), False)


@pytest.mark.parametrize(("vram_gib", "expected"), [(22, 4096), (23, 32768), (46, 32768), (47, 262144)])
def test_the_default_context_goes_by_all_vram(vram_gib: int, expected: int) -> None:
    """Three tiers, and never more than the model was trained for."""
    cards = rig(gpu("a", 1000, total_mib=10 * 1024), gpu("b", 1000, total_mib=(vram_gib - 10) * 1024))
    assert default_num_ctx(cards) == expected
    assert effective_settings(models.header("llama3.1-8b-q4km"), cards, PlanRequest()).num_ctx == min(expected, 131072)
    assert effective_settings(models.header("phi4-14b-q4km"), cards, PlanRequest(num_ctx=1_000_000)).num_ctx == 16384


@pytest.mark.parametrize(
    ("ctx", "predicted_gib", "free_gib", "expected"),
    [
        (4096, 10, 40, 512),
        (8192, 10, 40, 1024),
        (65536, 10, 40, 2048),
        (65536, 25, 40, 1024),  # more than 60 %
        (65536, 23.5, 40, 2048),
        (65536, 31, 40, 512),  # more than 75 %
        (8192, 7.6, 10, 512),
        (8192, 7.3, 10, 512),  # within 75 %, but 768 MiB more are over 80 %
        (8192, 7.2, 10, 1024),
    ],
)
def test_the_automatic_batch(ctx: int, predicted_gib: float, free_gib: int, expected: int) -> None:
    """By context, with headroom and surcharge."""
    load = LoadSettings(num_ctx=ctx)
    assert automatic_batch(load, int(predicted_gib * GIB), [rtx5090()], free_gib * GIB) == expected


def test_without_flash_attention_cuda_gets_a_small_batch() -> None:
    """512, or 256 where a card of 8 GiB or less meets a context above 4096."""
    large, small = rtx5090(), gpu("small", 7000)
    for ctx, gpus, expected in ((65536, [large], 512), (8192, [large, small], 256), (4096, [small], 512)):
        assert automatic_batch(LoadSettings(num_ctx=ctx, flash_attention=False), GIB, gpus, 64 * GIB) == expected


def test_a_batch_that_is_set_stays_and_the_group_may_have_a_larger_one_than_a_card() -> None:
    """Pinning a model to one card can halve its batch: 1024 on both, 512 on one."""
    profile = models.header("qwen2.5-32b-q4km")
    cards = rig(rtx5090(), rtx3090())
    request = PlanRequest(num_ctx=8192)
    assert [settings_on(profile, cards, request, gpus).batch for gpus in ((0, 1), (1,))] == [1024, 512]
    assert settings_on(profile, cards, replace(request, num_batch=128), (0, 1)).ubatch == 128


def test_num_gpu_splits_by_free_memory_whatever_fits() -> None:
    """``-ngl`` makes ``--fit`` give up: 99 means all layers, 0 none, -1 that nobody has said anything."""
    profile = models.header("llama3.3-70b-q4km")
    cards = rig(rtx5090(), gpu("small", 8000))
    automatic = stock_load(profile, cards, PlanRequest(num_ctx=8192)).placement
    assert automatic.kind == "partial"
    assert stock_load(profile, cards, PlanRequest(num_ctx=8192, num_gpu=-1)).placement == automatic
    forced = stock_load(profile, cards, PlanRequest(num_ctx=8192, num_gpu=99)).placement
    assert (sum(forced.shares), forced.order) == (81, (0, 1))
    assert stock_load(profile, cards, PlanRequest(num_ctx=8192, num_gpu=0)).placement.kind == "cpu"


def test_the_runner_era_uses_as_few_gpus_as_hold_everything() -> None:
    """No 80 % rule: a 32B fits the 5090 alone; the 70B is spread in proportion, the output layer on the card with more memory."""
    cards = rig(rtx3090(), rtx5090())
    request = PlanRequest(num_ctx=8192, era="runner")
    assert stock_load(models.header("qwen2.5-32b-q4km"), cards, request).placement.order == (1,)
    both = stock_load(models.header("llama3.3-70b-q4km"), cards, request).placement
    assert both.kind == "split"
    assert both.order == (1, 0)
    assert both.shares[1] == pytest.approx(81 * 31.5 / (31.5 + 23.7), abs=3)


def test_embedding_models_and_some_architectures_have_one_sequence() -> None:
    """``OLLAMA_NUM_PARALLEL`` does not reach them."""
    request = PlanRequest(num_ctx=4096, parallel=4)
    cards = rig(rtx5090())
    assert effective_settings(models.header("llama3.1-8b-q4km"), cards, request).parallel == 4
    assert effective_settings(models.header("llama3.1-8b-q4km"), cards, replace(request, embedding=True)).parallel == 1
    assert effective_settings(models.header("nemotron-nano-9b-v2-q4km"), cards, request).parallel == 1


@pytest.mark.parametrize(
    ("num_ctx", "num_batch", "batch"), [(8192, None, 2048), (512, None, 512), (8192, 512, 512), (64, 512, 64)]
)
def test_an_embedding_model_reads_a_text_in_one_batch(num_ctx: int, num_batch: int | None, batch: int) -> None:
    """``embeddingBatchSize``: 2048 tokens where nobody sets another, wherever it lies, and no more than the context."""
    request = PlanRequest(num_ctx=num_ctx, num_batch=num_batch, embedding=True)
    stock = stock_load(models.header("qwen3-0.6b-q8"), rig(rtx5090(), rtx3090()), request)
    assert (stock.settings.batch, stock.settings.ubatch) == (batch, batch)


def test_no_gpu_at_all_leaves_everything_in_ram() -> None:
    """Both eras."""
    for era in ("runner", "llama-server"):
        load = stock_load(models.header("llama3.1-8b-q4km"), rig(), PlanRequest(num_ctx=4096, era=era))  # type: ignore[arg-type]
        assert load.placement.kind == "cpu"


def test_a_server_that_generates_reserves_logits_for_one_token_of_each_sequence() -> None:
    """As llama-server does; embeddings and the runner era reserve them for every token, which is never too little."""
    profile, cards = models.header("llama3.1-8b-q4km"), models.rig(models.gpu("one", 24_000, gb_per_s=900))
    assert effective_settings(profile, cards, PlanRequest(parallel=2)).outputs == 2
    assert effective_settings(profile, cards, PlanRequest(parallel=2, era="runner")).outputs is None
    assert effective_settings(profile, cards, PlanRequest(embedding=True)).outputs is None
