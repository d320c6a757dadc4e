"""Rates from answers: against the measured tables, against outliers, and where too little is known."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.calibration import calibrate
from planner.hardware import Rig
from planner.observation import Observation, device_reads, model_key, observe
from planner.placement import Placement, solo
from planner.plan import make_plan
from planner.profile import ModelProfile
from planner.request import PlanRequest
from planner.settings import LoadSettings
from planner.speed import (
    CONTEXT_TOKENS,
    HOP_SECONDS,
    HOST,
    PROMPT_TOKENS,
    Calibration,
    Rates,
    decode_seconds,
    gpu_rates,
    host_rates,
    model_work,
    predict_speed,
    solo_rates,
)
from tests.planner import models
from tests.planner.test_speed import FAST, MEASURED_32B, MEASURED_70B, SLOW, split
from tests.planner.test_two_gpus import RIG, ROWS, load, profile

SETTINGS = LoadSettings(num_ctx=4096)
PAIR = models.rig(FAST, SLOW)
HELD = [row for row in ROWS if row["second_gpu_held"]]
DENSE, MIXTURE = models.small(n_layers=12), models.small(n_layers=12, experts=8)


def answer(
    model: ModelProfile,
    placement: Placement,
    decode: float,
    prefill: float = 0.0,
    *,
    rig: Rig = PAIR,
    settings: LoadSettings = SETTINGS,
    slower: float = 1.0,
) -> Observation:
    """One answer of 96 tokens to a prompt of 2048, at these tokens per second."""
    return observe(
        model,
        rig,
        settings,
        placement,
        context_tokens=CONTEXT_TOKENS,
        decode=(96, 96 / decode * slower),
        prompt=(PROMPT_TOKENS, PROMPT_TOKENS / prefill * slower) if prefill else (0, 0.0),
    )


def learn(model: ModelProfile, seen: list[Observation], rig: Rig = PAIR) -> Calibration:
    """What ``seen`` says for a plan of ``model``."""
    return calibrate(seen, rig, model=model_key(model), experts=bool(model.expert_count))


def measured(row: dict[str, Any], slower: float = 1.0) -> Observation:
    """A row of the measured table as an answer."""
    settings, placement = load(row)
    return answer(profile(row), placement, row["decode"], row["prefill"], rig=RIG, settings=settings, slower=slower)


def misses(seen: list[Observation]) -> list[float]:
    """By how much each measured row with a held second GPU is predicted wrong, relative."""
    found = []
    for row in HELD:
        settings, placement = load(row)
        model = profile(row)
        speed = predict_speed(model, RIG, settings, placement, learn(model, seen, RIG))
        found.append(abs(speed.decode_tokens_per_s / row["decode"] - 1))
    return found


def test_solo_answers_of_the_measured_table_predict_every_split_within_3_percent() -> None:
    """Three models, 22 rows, learned from the six that ran on one GPU; the solo rows themselves come out exactly."""
    solos = [row for row in HELD if "none" in row["args"]]
    found = misses([measured(row) for row in solos])
    assert max(found) < 0.03
    assert max(miss for miss, row in zip(found, HELD, strict=True) if row in solos) < 1e-9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("which", ["solos", "solos and splits", "splits"])
def test_a_fifth_of_wild_answers_in_any_order_changes_little(seed: int, which: str) -> None:
    """Ten answers of each row with 2 % of noise, two of them off by up to three times either way: still within 10 %."""
    chance = random.Random(seed)
    kinds = {"solos": ("none",), "splits": ("tensor-split",), "solos and splits": ("none", "tensor-split")}[which]
    rows = [row for row in HELD if any(kind in row["args"] for kind in kinds)]
    seen = [
        measured(row, chance.choice((3.0, 2.0, 1.5, 0.4)) if i < 2 else chance.gauss(1, 0.02)) for row in rows for i in range(10)
    ]
    chance.shuffle(seen)
    assert max(misses(seen)) < 0.10


@pytest.mark.parametrize("wild", [0, 2])
def test_the_solo_rows_of_the_two_other_tables_predict_their_splits(wild: int) -> None:
    """70B (52.5 and 15.0 tok/s alone) and 32B under a real Ollama (86.9 and 61.0), from ten answers each."""
    b70, b32 = models.quantized("llama3.3-70b-q4km", "q4_0"), models.quantized("qwen2.5-32b-q4km", "q4_0")
    fast, slow = (solo(gpu, n_gpus=2, n_layers=80) for gpu in (0, 1))
    seen = [answer(b70, fast, 52.5, 1407, slower=2.5 if i < wild else 1.0) for i in range(10)]
    seen += [answer(b70, slow, 15.0, 236, slower=0.5 if i < wild else 1.0) for i in range(10)]
    for shares, (decode, prefill) in MEASURED_70B.items():
        layers = round(81 * int(shares.split(",")[0]) / 100)
        speed = predict_speed(b70, PAIR, SETTINGS, split(layers, 81 - layers), learn(b70, seen))
        assert speed.decode_tokens_per_s == pytest.approx(decode, rel=0.10)
        assert speed.prefill_tokens_per_s == pytest.approx(prefill, rel=0.10)
    fast, slow = (solo(gpu, n_gpus=2, n_layers=64) for gpu in (0, 1))
    seen = [answer(b32, fast, 86.9, slower=2.5 if i < wild else 1.0) for i in range(10)]
    seen += [answer(b32, slow, 61.0, slower=0.5 if i < wild else 1.0) for i in range(10)]
    for row, decode in MEASURED_32B.items():
        speed = predict_speed(b32, PAIR, SETTINGS, split(*row), learn(b32, seen))
        assert speed.decode_tokens_per_s == pytest.approx(decode, rel=0.10)


def test_a_solo_answer_gives_exactly_what_solo_rates_gives() -> None:
    """The device that ran alone is calibrated, the one that did not is not, but is expected to miss its prediction alike."""
    seen = [answer(DENSE, solo(0, n_gpus=2, n_layers=12), 1000, 90_000)]
    found = learn(DENSE, seen)
    assert found.rates.keys() == {"GPU-fast"}
    assert found.rates["GPU-fast"] == pytest.approx(
        solo_rates(DENSE, SETTINGS, PAIR.gpus[0], decode_tokens_per_s=1000, prefill_tokens_per_s=90_000), rel=1e-12
    )
    assert found.inferred["GPU-slow"] == pytest.approx(found.rates["GPU-fast"])
    assert predict_speed(DENSE, PAIR, SETTINGS, solo(0, n_gpus=2, n_layers=12), found).calibrated
    assert not predict_speed(DENSE, PAIR, SETTINGS, solo(1, n_gpus=2, n_layers=12), found).calibrated


def test_what_slows_every_card_is_expected_of_the_host() -> None:
    """A small model whose cards were busy stays on one of them; a host beside a card that keeps its promise keeps its own."""
    predicted = 1 / host_rates(PAIR.host).decode_bytes_per_s
    alone = [solo(gpu, n_gpus=2, n_layers=12) for gpu in (0, 1)]
    usual = [predict_speed(DENSE, PAIR, SETTINGS, placement).decode_tokens_per_s for placement in alone]
    busy = learn(DENSE, [answer(DENSE, placement, speed / 40) for placement, speed in zip(alone, usual, strict=True)])
    assert 1 / busy.inferred[HOST][0] == pytest.approx(40 * predicted, rel=0.3)
    assert make_plan(DENSE, PAIR, PlanRequest(num_ctx=4096, calibration=busy)).chosen.placement.kind == "solo"
    one = learn(DENSE, [answer(DENSE, alone[0], usual[0]), answer(DENSE, alone[1], usual[1] / 40)])
    assert 1 / one.inferred[HOST][0] == pytest.approx(predicted)


def test_splits_of_one_proportion_leave_the_cards_relation_as_predicted() -> None:
    """One equation for two unknowns: the split itself comes out as measured, the cards keep the ratio that their data say."""
    rig = models.rig(models.gpu("a", 9000, gb_per_s=1000), models.gpu("b", 9000, gb_per_s=400))
    placement = Placement(layers=(8, 4), order=(1, 0), output_gpu=0)
    before = predict_speed(DENSE, rig, SETTINGS, placement)
    speed = before.decode_tokens_per_s / 1.4
    found = learn(DENSE, [answer(DENSE, placement, speed, rig=rig)], rig)
    assert predict_speed(DENSE, rig, SETTINGS, placement, found).decode_tokens_per_s == pytest.approx(speed, rel=1e-3)
    assert found.rates["GPU-a"][0] / found.rates["GPU-b"][0] == pytest.approx(2.5, rel=0.01)


def test_splits_of_several_proportions_tell_the_cards_apart() -> None:
    """The second card is three times slower than its data say; nothing ever ran on one card alone."""
    truth = Calibration(rates={"GPU-fast": (3e12, 9e13), "GPU-slow": (1e12, 3e13)})
    model = models.quantized("llama3.1-8b-q4km", "q4_0")
    seen = []
    for slow in (5, 10, 16, 22):
        placement = Placement(layers=(32 - slow, slow), order=(1, 0), output_gpu=0)
        speed = predict_speed(model, PAIR, SETTINGS, placement, truth)
        seen.append(answer(model, placement, speed.decode_tokens_per_s, speed.prefill_tokens_per_s))
    for uuid, rates in learn(model, seen).rates.items():
        assert rates == pytest.approx(truth.rates[uuid], rel=0.03)


@pytest.mark.parametrize(
    ("rate", "prefill", "hop_s"), [(0.6, 0.5, 0.0), (1.0, 0.5, 0.5e-3), (1.0, 0.3, 2e-3)], ids=["power limit", "x4 slot", "eGPU"]
)
def test_what_holds_a_card_back_is_found_whatever_it_is(rate: float, prefill: float, hop_s: float) -> None:
    """A lower rate, or longer ways to the card and back: after answers of three splits a fourth one runs as predicted."""
    model = models.quantized("qwen2.5-32b-q4km", "q4_0")
    fast, slow = (gpu_rates(gpu) for gpu in PAIR.gpus)
    truth = Calibration(
        rates={
            "GPU-fast": (fast.decode_bytes_per_s, fast.prefill_flops_per_s),
            "GPU-slow": (slow.decode_bytes_per_s * rate, slow.prefill_flops_per_s * prefill),
        }
    )

    def real(layers: int) -> tuple[Placement, float, float]:
        placement = Placement(layers=(64 - layers, layers), order=(1, 0), output_gpu=0)
        speed = predict_speed(model, PAIR, SETTINGS, placement, truth)
        return placement, 1 / (1 / speed.decode_tokens_per_s + hop_s), speed.prefill_tokens_per_s

    chance = random.Random(4)
    seen = [answer(model, *real(layers), slower=chance.gauss(1, 0.02)) for layers in (12, 16, 20) for _ in range(4)]
    placement, decode, prompt = real(26)
    speed = predict_speed(model, PAIR, SETTINGS, placement, learn(model, seen))
    assert speed.calibrated
    assert speed.decode_tokens_per_s == pytest.approx(decode, rel=0.05)
    assert speed.prefill_tokens_per_s == pytest.approx(prompt, rel=0.10)
    without = predict_speed(model, PAIR, SETTINGS, placement)
    assert abs(without.prefill_tokens_per_s / prompt - 1) > 0.10


def test_one_split_that_is_always_wrong_does_not_have_its_way() -> None:
    """One split of seven is not where it is believed to be, and runs 2.5 times as fast: the rates come out within 10 %."""
    truth = Calibration(rates={"GPU-fast": (3e12, 9e13), "GPU-slow": (1e12, 3e13)})
    model = models.quantized("llama3.1-8b-q4km", "q4_0")
    seen = []
    for slow in (4, 8, 12, 16, 20, 24, 28):
        placement = Placement(layers=(32 - slow, slow), order=(1, 0), output_gpu=0)
        speed = predict_speed(model, PAIR, SETTINGS, placement, truth).decode_tokens_per_s
        seen.append(answer(model, placement, speed, slower=0.4 if slow == 16 else 1.0))
    for uuid, rates in learn(model, seen).rates.items():
        assert rates[0] == pytest.approx(truth.rates[uuid][0], rel=0.10)


def test_a_device_measured_alone_makes_one_split_tell_the_other() -> None:
    """Solo on the fast card, then a single split: the slow card's rate follows."""
    truth = Calibration(rates={"GPU-fast": (3e12, 9e13), "GPU-slow": (1e12, 3e13)})
    model = models.quantized("llama3.1-8b-q4km", "q4_0")
    seen = [
        answer(model, placement, predict_speed(model, PAIR, SETTINGS, placement, truth).decode_tokens_per_s)
        for placement in (solo(0, n_gpus=2, n_layers=32), Placement(layers=(16, 16), order=(1, 0), output_gpu=0))
    ]
    assert learn(model, seen).rates["GPU-slow"][0] == pytest.approx(1e12, rel=0.05)


def test_a_model_that_ran_itself_counts_before_others_of_its_class() -> None:
    """The card reaches 2 TB/s with one dense model and 1 TB/s with another: each is predicted by its own answers."""
    other = models.small(n_layers=24)
    place = {model.n_layers: solo(0, n_gpus=2, n_layers=model.n_layers) for model in (DENSE, other)}
    seen = []
    for model, rate in ((DENSE, 2e12), (other, 1e12)):
        truth = Calibration(rates={"GPU-fast": (rate, 1e14)})
        speed = predict_speed(model, PAIR, SETTINGS, place[model.n_layers], truth).decode_tokens_per_s
        seen.append(answer(model, place[model.n_layers], speed))
    assert learn(DENSE, seen).rates["GPU-fast"][0] == pytest.approx(2e12)
    assert learn(other, seen).rates["GPU-fast"][0] == pytest.approx(1e12)


def test_the_other_class_tells_how_cards_compare_but_not_how_fast_they_are() -> None:
    """A dense model showed that the second card runs at a third of the first: so it is expected of a mixture too."""
    seen = [answer(DENSE, solo(gpu, n_gpus=2, n_layers=12), speed) for gpu, speed in ((0, 1000), (1, 400))]
    found = learn(MIXTURE, seen)
    dense = learn(DENSE, seen).rates
    assert not found.rates
    assert found.inferred["GPU-fast"][0] == pytest.approx(gpu_rates(PAIR.gpus[0]).decode_bytes_per_s)
    ratio = dense["GPU-slow"][0] / dense["GPU-fast"][0]
    assert found.inferred["GPU-slow"][0] / found.inferred["GPU-fast"][0] == pytest.approx(ratio)


def test_layers_in_ram_tell_the_hosts_rate() -> None:
    """The GPU is known from a solo answer, so what a partial placement takes longer is the RAM's."""
    model = models.quantized("llama3.1-8b-q4km", "q4_0")
    truth = Calibration(rates={"GPU-fast": (3e12, 9e13), HOST: (70e9, 4e11)})
    seen = []
    for placement in (solo(0, n_gpus=2, n_layers=32), Placement(layers=(20, 0), order=(0,), output_gpu=0, cpu_layers=12)):
        speed = predict_speed(model, PAIR, SETTINGS, placement, truth)
        seen.append(answer(model, placement, speed.decode_tokens_per_s, speed.prefill_tokens_per_s))
    found = learn(model, seen)
    assert found.rates[HOST][0] == pytest.approx(70e9, rel=0.02)
    assert found.rates["GPU-fast"] == pytest.approx(truth.rates["GPU-fast"], rel=1e-4)


def test_answers_that_say_nothing_are_left_out() -> None:
    """Short answers, short prompts, cards that are gone, and answers faster than a hop."""
    placement = Placement(layers=(6, 6), order=(1, 0), output_gpu=0)
    good = answer(DENSE, placement, 1000, 90_000)
    useless = [
        replace(good, decode_tokens=31, prompt_tokens=255),
        replace(good, decode_s=96 * HOP_SECONDS, prompt_tokens=0),
        replace(good, run=replace(good.run, devices=("GPU-gone",))),
    ]
    assert learn(DENSE, []) == learn(DENSE, useless) == Calibration()
    assert learn(DENSE, [good, *useless]).rates == learn(DENSE, [good]).rates


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any placement of twelve layers on two GPUs and RAM, experts in RAM too."""
    cpu = draw(st.integers(0, 12))
    first = draw(st.integers(0, 12 - cpu))
    layers = (first, 12 - cpu - first)
    order = draw(st.permutations([gpu for gpu in (0, 1) if layers[gpu]]))
    experts = draw(st.sets(st.integers(cpu, 11))) if cpu < 12 else set()
    output = order[-1] if order and draw(st.booleans()) else None
    return Placement(layers=layers, order=tuple(order), output_gpu=output, cpu_layers=cpu, cpu_experts=frozenset(experts))


@given(placements())
def test_the_bytes_of_each_device_add_up_to_the_predicted_time(placement: Placement) -> None:
    """The regression's equation is the prediction's: with experts, layers and the output layer wherever they are."""
    rates = tuple(Rates(decode_bytes_per_s=rate, prefill_flops_per_s=1, layer_s=s) for rate, s in ((3e9, 4e-5), (7e8, 1e-4)))
    host = Rates(decode_bytes_per_s=5e7, prefill_flops_per_s=1)
    work = model_work(MIXTURE, SETTINGS)
    reads, hops = device_reads(work, placement)
    run = observe(MIXTURE, PAIR, SETTINGS, placement, context_tokens=CONTEXT_TOKENS).run
    seconds = hops * HOP_SECONDS
    for layers, (gpu, read) in zip(run.layers, reads.items(), strict=True):
        device = host if gpu is None else rates[gpu]
        seconds += (read + layers * device.layer_bytes) / device.decode_bytes_per_s
    assert seconds == pytest.approx(decode_seconds(work, placement, rates, host))


@given(st.lists(st.tuples(placements(), st.floats(0.01, 1e5), st.floats(0.01, 1e7)), max_size=12), st.randoms())
def test_whatever_was_seen_rates_are_positive_and_do_not_depend_on_the_order(
    answers: list[tuple[Placement, float, float]], chance: random.Random
) -> None:
    """Nonsense in, finite rates out."""
    seen = [answer(MIXTURE, placement, decode, prefill) for placement, decode, prefill in answers]
    found = learn(MIXTURE, seen)
    for rates in (*found.rates.values(), *found.inferred.values()):
        assert all(0 < rate < 1e30 for rate in rates)
    chance.shuffle(seen)
    assert learn(MIXTURE, seen) == found
