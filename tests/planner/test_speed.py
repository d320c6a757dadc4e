"""Seconds per token: against two measured tables, and where a card's data are missing."""

from __future__ import annotations

from itertools import pairwise

import pytest

from planner.hardware import Gpu, Host
from planner.placement import Placement, on_cpu, solo
from planner.plan import make_plan
from planner.profile import ModelProfile
from planner.request import PlanRequest
from planner.settings import LoadSettings
from planner.speed import (
    HOP_SECONDS,
    LAYER_SECONDS,
    LOWEST_EFFICIENCY,
    Calibration,
    decode_seconds,
    gpu_rates,
    host_rates,
    model_work,
    predict_speed,
    solo_rates,
)
from tests.planner import models

SETTINGS = LoadSettings(num_ctx=4096)


def h200(name: str, free_mib: int = 140_000) -> Gpu:
    """One of the measured cards."""
    return models.gpu(name, free_mib, gb_per_s=4800, capability=(9, 0))


FAST, SLOW = h200("fast"), h200("slow")

MEASURED_70B = {"57,43": (24.4, 546), "70,30": (30.6, 760), "80,20": (36.5, 1102), "90,10": (43.8, 1361)}
"""70B Q4_0 on two H200, the second held to about a third: shares of fast and slow, decode and prefill (2048 tokens) in tok/s."""

MEASURED_32B = {
    (36, 29, "fast first"): 74.0,
    (32, 33, "fast first"): 71.5,
    (35, 30, "slow first"): 71.2,
    (41, 24, "slow first"): 75.1,
    (44, 21, "slow first"): 75.5,
    (46, 19, "slow first"): 77.0,
}
"""A 32B shape in Q4_0 under Ollama 0.32.15, the second GPU at 0.70 of the first: layers of each, the output layer counted."""


def split(fast: int, slow: int, order: str = "fast first") -> Placement:
    """Layers as measured, the output layer counted on the last device."""
    if order == "fast first":
        return Placement(layers=(fast, slow - 1), order=(0, 1), output_gpu=1)
    return Placement(layers=(fast - 1, slow), order=(1, 0), output_gpu=0)


def calibrated(profile: ModelProfile, fast: tuple[float, float], slow: tuple[float, float]) -> Calibration:
    """What the solo rows alone say about the two cards."""
    return Calibration(
        rates={
            gpu.uuid: solo_rates(profile, SETTINGS, gpu, decode_tokens_per_s=decode, prefill_tokens_per_s=prefill)
            for gpu, (decode, prefill) in ((FAST, fast), (SLOW, slow))
        }
    )


@pytest.mark.parametrize("shares", MEASURED_70B)
def test_each_split_of_the_measured_70b_is_predicted_within_5_percent(shares: str) -> None:
    """Only the solo rows (52.5 and 15.0 tok/s) are known to the model."""
    profile = models.quantized("llama3.3-70b-q4km", "q4_0")
    fast = round(81 * int(shares.split(",")[0]) / 100)
    speed = predict_speed(
        profile, models.rig(FAST, SLOW), SETTINGS, split(fast, 81 - fast), calibrated(profile, (52.5, 1407), (15.0, 236))
    )
    decode, prefill = MEASURED_70B[shares]
    assert speed.calibrated
    assert speed.decode_tokens_per_s == pytest.approx(decode, rel=0.05)
    assert speed.prefill_tokens_per_s == pytest.approx(prefill, rel=0.10)


@pytest.mark.parametrize("row", MEASURED_32B)
def test_each_split_of_the_measured_32b_is_predicted_within_5_percent(row: tuple[int, int, str]) -> None:
    """Case A to C under a real Ollama; the solo rows are 86.9 and 61.0 tok/s."""
    profile = models.quantized("qwen2.5-32b-q4km", "q4_0")
    speed = predict_speed(profile, models.rig(FAST, SLOW), SETTINGS, split(*row), calibrated(profile, (86.9, 2740), (61.0, 1560)))
    assert speed.decode_tokens_per_s == pytest.approx(MEASURED_32B[row], rel=0.05)


def test_the_measured_splits_are_ranked_as_measured() -> None:
    """In both tables; measured rows within 3 % of each other may be in any order."""
    b70, b32 = models.quantized("llama3.3-70b-q4km", "q4_0"), models.quantized("qwen2.5-32b-q4km", "q4_0")
    rig = models.rig(FAST, SLOW)
    tables = []
    rates = calibrated(b70, (52.5, 1407), (15.0, 236))
    fasts = {shares: round(81 * int(shares.split(",")[0]) / 100) for shares in MEASURED_70B}
    tables.append([(MEASURED_70B[s][0], predict_speed(b70, rig, SETTINGS, split(f, 81 - f), rates)) for s, f in fasts.items()])
    rates = calibrated(b32, (86.9, 2740), (61.0, 1560))
    tables.append([(measured, predict_speed(b32, rig, SETTINGS, split(*row), rates)) for row, measured in MEASURED_32B.items()])
    for table in tables:
        for (slower, low), (faster, high) in pairwise(sorted(table, key=lambda row: row[0])):
            assert faster < slower * 1.03 or high.decode_tokens_per_s > low.decode_tokens_per_s


@pytest.mark.parametrize("free_mib", range(28_000, 39_000, 2000))
def test_a_70b_split_that_was_not_measured_lies_between_its_measured_neighbours(free_mib: int) -> None:
    """Whatever the fast card has free: it fits, and runs between the rows beside it (the sum's 5 % allowed)."""
    profile = models.quantized("llama3.3-70b-q4km", "q4_0")
    cards = models.rig(h200("fast", free_mib), h200("slow", 30_000))
    rates = calibrated(profile, (52.5, 1407), (15.0, 236))
    chosen = make_plan(profile, cards, PlanRequest(num_ctx=4096, calibration=rates)).chosen
    share = chosen.placement.shares[0] / 81
    rows = [(int(shares.split(",")[0]) / 100, decode) for shares, (decode, _) in MEASURED_70B.items()] + [(1.0, 52.5)]
    below, above = max(row for row in rows if row[0] <= share), min(row for row in rows if row[0] > share)
    assert chosen.fits
    assert below[1] * 0.95 <= chosen.decode_tokens_per_s <= above[1] * 1.05


def test_a_32b_split_that_was_not_measured_lies_between_its_measured_neighbours() -> None:
    """Case B, 14336 MiB free on each: 46 layers on the fast card ran at 77.0 tok/s, 48 ran out of memory."""
    profile = models.quantized("qwen2.5-32b-q4km", "q4_0")
    cards = models.rig(h200("fast", 14_336), h200("slow", 14_336))
    rates = calibrated(profile, (86.9, 2740), (61.0, 1560))
    chosen = make_plan(profile, cards, PlanRequest(num_ctx=4096, calibration=rates)).chosen
    assert chosen.fits
    assert chosen.placement.shares == (47, 18)
    assert 77.0 <= chosen.decode_tokens_per_s <= 86.9


def test_two_equal_gpus_overlap_their_prefill_as_measured() -> None:
    """Alone 1403 tok/s, split in halves 2213: micro-batches of 512 go through both GPUs at once; decode stays as it was."""
    profile = models.quantized("llama3.3-70b-q4km", "q4_0")
    rates = calibrated(profile, (52.0, 1403), (52.0, 1403))
    speed = predict_speed(profile, models.rig(FAST, SLOW), SETTINGS, split(41, 40), rates)
    assert speed.prefill_tokens_per_s == pytest.approx(2213, rel=0.11)
    assert speed.decode_tokens_per_s == pytest.approx(52.1, rel=0.02)


def test_a_micro_batch_as_long_as_the_prompt_leaves_nothing_to_overlap() -> None:
    """With ``-ub 2048`` a prompt of 2048 tokens is one micro-batch: one GPU works at a time."""
    profile = models.header("llama3.3-70b-q4km")
    rig = models.rig(FAST, SLOW)
    small, large = LoadSettings(num_ctx=4096), LoadSettings(num_ctx=4096, batch=2048, ubatch=2048)
    assert (
        predict_speed(profile, rig, large, split(41, 40)).prefill_tokens_per_s
        < 0.75 * predict_speed(profile, rig, small, split(41, 40)).prefill_tokens_per_s
    )


def test_decode_is_the_sum_of_bytes_over_bandwidth_layers_and_hops() -> None:
    """The equation itself, on a split with a layer in RAM."""
    profile = models.small(n_layers=6)
    work = model_work(profile, SETTINGS)
    rates, host = (
        (gpu_rates(models.gpu("a", 1000, gb_per_s=4800)), gpu_rates(models.gpu("b", 1000, gb_per_s=500))),
        host_rates(Host(bandwidth_bytes_per_s=50 * 10**9)),
    )
    placement = Placement(layers=(2, 3), order=(0, 1), output_gpu=1, cpu_layers=1)
    layer = work.layer_bytes[0]
    expected = 2 * layer / (4800e9 * LOWEST_EFFICIENCY) + (3 * layer + work.output_bytes) / (500e9 * LOWEST_EFFICIENCY)
    expected += layer / host.decode_bytes_per_s + 6 * LAYER_SECONDS + 2 * HOP_SECONDS
    assert decode_seconds(work, placement, rates, host) == pytest.approx(expected)


def test_a_token_reads_its_active_experts_only() -> None:
    """Two of eight experts are read, in VRAM as in RAM."""
    profile = models.small(n_layers=4, experts=8)
    work = model_work(profile, SETTINGS)
    assert work.expert_bytes[0] == profile.layers[0].expert_bytes * 2 / 8
    rig = models.rig(FAST)
    everything = solo(0, n_gpus=1, n_layers=4)
    in_ram = Placement(layers=(4,), order=(0,), output_gpu=0, cpu_experts=frozenset({0, 1}))
    gpu, host = gpu_rates(FAST), host_rates(rig.host)
    moved = 2 * work.expert_bytes[0]
    slower = decode_seconds(work, in_ram, (gpu,), host) - decode_seconds(work, everything, (gpu,), host)
    assert slower == pytest.approx(moved / host.decode_bytes_per_s - moved / gpu.decode_bytes_per_s + 4 * HOP_SECONDS)


def test_a_window_bounds_what_a_long_context_costs() -> None:
    """Gemma 3 keeps five layers of six within 1024 tokens; a model without windows reads everything in the context."""
    for name, most in (("gemma3-27b-q4km", 1.35), ("llama3.1-8b-q4km", 1.999)):
        profile = models.header(name)
        short, long = (model_work(profile, LoadSettings(num_ctx=ctx)) for ctx in (2048, 4096))
        cache = [sum(work.layer_bytes) - sum(layer.weights_bytes for layer in profile.layers) for work in (short, long)]
        assert cache[1] / cache[0] == pytest.approx(most, abs=0.2)


def test_unknown_bandwidth_falls_back_to_the_generation_of_the_card() -> None:
    """A newer generation is never rated below an older one that is as unknown."""
    capabilities = [None, (5, 2), (6, 1), (7, 5), (8, 6), (12, 0)]
    rates = [gpu_rates(models.gpu("x", 8000, gb_per_s=None, capability=capability, sm_count=None)) for capability in capabilities]
    assert all(rate.source == "generation" for rate in rates)
    assert [rate.decode_bytes_per_s for rate in rates[1:]] == sorted({rate.decode_bytes_per_s for rate in rates[1:]})
    assert rates[0] == rates[1]


def test_everything_in_ram_runs_at_the_hosts_speed() -> None:
    """Half the RAM bandwidth, about half the tokens."""
    profile = models.header("llama3.1-8b-q4km")
    fast, slow = (
        predict_speed(
            profile, models.Rig(gpus=(), host=Host(bandwidth_bytes_per_s=bandwidth)), SETTINGS, on_cpu(n_gpus=0, n_layers=32)
        )
        for bandwidth in (100 * 10**9, 50 * 10**9)
    )
    assert fast.decode_tokens_per_s == pytest.approx(2 * slow.decode_tokens_per_s, rel=0.02)


def test_a_card_that_is_held_back_is_held_back_in_its_layers_fixed_costs_too() -> None:
    """At half of its rate a card takes twice as long for everything: exactly twice the token, wherever its bytes are."""
    profile = models.small(n_layers=6)
    work, host = model_work(profile, SETTINGS), host_rates(Host())
    alone = solo(0, n_gpus=1, n_layers=6)
    promised = gpu_rates(FAST)
    half = Calibration(rates={FAST.uuid: (promised.decode_bytes_per_s / 2, promised.prefill_flops_per_s)})
    held = gpu_rates(FAST, half)
    assert held.layer_s == 2 * LAYER_SECONDS
    assert held.layer_bytes == promised.layer_bytes
    slow, fast = (decode_seconds(work, alone, (rates,), host) for rates in (held, promised))
    assert slow == pytest.approx(2 * fast)
    learned = solo_rates(profile, SETTINGS, FAST, decode_tokens_per_s=1 / slow, prefill_tokens_per_s=1)
    assert learned[0] == pytest.approx(held.decode_bytes_per_s)


@pytest.mark.parametrize("order", ["fast first", "slow first"])
def test_a_small_mixture_is_ranked_over_both_orders_as_its_cards_are(order: str) -> None:
    """The output layer is a sixth of what such a token reads, and has no fixed costs: on the card that is held back it costs less
    than its bytes alone would have it."""
    profile = models.header("qwen3-30b-a3b-q4km")
    rates = calibrated(profile, (270.0, 12000), (90.0, 2600))
    placement = split(25, 24, order)
    work, cards = model_work(profile, SETTINGS), tuple(gpu_rates(gpu, rates) for gpu in (FAST, SLOW))
    slow = 24 - (order == "fast first")
    fast_s, slow_s = 1 / 270, 1 / 90
    share = (work.output_bytes / (work.output_bytes + work.read_prefix[-1] + 48 * cards[0].layer_bytes)) * (order == "fast first")
    expected = (1 - share) * (slow / 48 * slow_s + (1 - slow / 48) * fast_s) + share * slow_s
    assert decode_seconds(work, placement, cards, host_rates(Host())) == pytest.approx(expected, rel=0.05)
