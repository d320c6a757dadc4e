"""Plans: what they promise on any rig, and what they say about a few real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.choice import NEVER_WORSE_GAIN, TIE
from planner.hardware import Rig
from planner.memory import estimate_memory
from planner.placement import Placement
from planner.plan import Plan, make_plan
from planner.profile import ModelProfile, Scalar
from planner.request import Candidate, Era, PlanRequest
from planner.speed import Calibration
from tests.planner import models
from tests.planner.models import gpu, rig, rtx3090, rtx5090

LLAMA_70B = "llama3.3-70b-q4km"
QWEN_32B = "qwen2.5-32b-q4km"
PAIR = rig(rtx5090(), rtx3090())

SLOWER_AT_MOST = (1 - NEVER_WORSE_GAIN) * (1 - TIE)
"""What more memory may cost: stock can come within the gain that a plan must have over it."""


def decode(candidate: Candidate) -> float:
    """Its decode rate."""
    return candidate.decode_tokens_per_s


@st.composite
def rigs(draw: st.DrawFn, most: int = 4) -> Rig:
    """Some GPUs, from tiny to large, slow and fast, integrated now and then."""
    cards = draw(st.lists(st.tuples(st.integers(40, 600), st.integers(100, 1800), st.booleans()), min_size=1, max_size=most))
    return rig(
        *(gpu(f"gpu{i}", free, gb_per_s=rate, integrated=shared and i == 2) for i, (free, rate, shared) in enumerate(cards))
    )


PROFILES = st.sampled_from(
    [
        models.small(n_layers=12, ffn=(4096, 2048)),
        models.small(n_layers=30, ffn=(2048,), vocabulary=16384),
        models.small(n_layers=10, ffn=(1024,), experts=8),
    ]
)
REQUESTS = st.builds(
    PlanRequest,
    num_ctx=st.sampled_from([2048, 8192, None]),
    num_batch=st.sampled_from([128, None]),
    era=st.sampled_from(["runner", "llama-server"]),
    spread=st.booleans(),
    objective=st.sampled_from(["decode", "prefill", "balanced"]),
    margin_bytes=st.just(8 * models.MIB),
    runtime_bytes=st.just(16 * models.MIB),
)


def check(plan: Plan) -> None:
    """What every plan keeps."""
    for candidate in (*plan.alternatives, plan.chosen, plan.chosen_by_options):
        if candidate is not plan.stock:
            assert candidate.fits
        assert candidate.placement.n_layers == plan.profile.n_layers
    if plan.stock.fits and plan.request.objective == "decode":
        assert decode(plan.chosen) >= decode(plan.stock)
        assert decode(plan.chosen) >= decode(plan.chosen_by_options) * (1 - TIE)
    assert (plan.unchanged, plan.unchanged_by_options) == (plan.chosen is plan.stock, plan.chosen_by_options is plan.stock)
    assert plan.stock is plan.stock_of(plan.request.era)
    for era in get_args(Era):
        other = make_plan(plan.profile, plan.rig, replace(plan.request, era=era)).stock
        assert plan.stock_of(era).placement == other.placement


@settings(max_examples=60, deadline=None)
@given(PROFILES, rigs(), REQUESTS)
def test_no_gpu_is_given_more_than_it_has_and_nothing_is_slower_than_stock(
    profile: ModelProfile, cards: Rig, request: PlanRequest
) -> None:
    """On any rig, in both eras, for every objective."""
    check(make_plan(profile, cards, request))


@settings(max_examples=40, deadline=None)
@given(PROFILES, rigs(3), st.data())
def test_more_memory_never_makes_a_plan_slower_or_infeasible(profile: ModelProfile, cards: Rig, data: st.DataObject) -> None:
    """One GPU gets up to 300 MiB more; the batch is set, since stock's automatic one grows with the memory."""
    request = PlanRequest(num_ctx=4096, num_batch=64, margin_bytes=0, runtime_bytes=0)
    i = data.draw(st.integers(0, len(cards.gpus) - 1))
    more = data.draw(st.integers(1, 300)) * models.MIB
    larger = replace(cards.gpus[i], free_bytes=cards.gpus[i].free_bytes + more, total_bytes=cards.gpus[i].total_bytes + more)
    before = make_plan(profile, cards, request)
    after = make_plan(profile, replace(cards, gpus=(*cards.gpus[:i], larger, *cards.gpus[i + 1 :])), request)
    assert after.chosen.fits
    assert decode(after.chosen) >= decode(before.chosen) * SLOWER_AT_MOST


@settings(max_examples=40, deadline=None)
@given(PROFILES, rigs(3), st.randoms(use_true_random=False))
def test_the_order_of_the_gpus_changes_nothing_but_their_numbers(profile: ModelProfile, cards: Rig, random: object) -> None:
    """The best candidate beside stock (whose split follows the order) is as fast, on the same cards."""
    order = list(range(len(cards.gpus)))
    random.shuffle(order)  # type: ignore[attr-defined]
    request = PlanRequest(num_ctx=4096, num_batch=64, margin_bytes=0, runtime_bytes=0)
    plans = [make_plan(profile, c, request) for c in (cards, replace(cards, gpus=tuple(cards.gpus[i] for i in order)))]
    first, second = (max((decode(c) for c in (*p.alternatives, p.stock) if c.fits), default=0) for p in plans)
    assert first == pytest.approx(second, rel=2 * TIE)


@pytest.mark.parametrize("turn", [(0, 0), (-1, 8)])
def test_a_turn_without_tokens_is_refused(turn: tuple[float, float]) -> None:
    """Nothing can be fastest at it."""
    with pytest.raises(ValueError, match="tokens of prompt"):
        PlanRequest(objective=turn)


def test_equal_input_gives_an_equal_plan() -> None:
    """Nothing but the arguments has a say."""
    profile = models.header(LLAMA_70B)
    assert make_plan(profile, PAIR, PlanRequest(num_ctx=8192)) == make_plan(profile, PAIR, PlanRequest(num_ctx=8192))


def test_a_70b_fills_the_5090_first_with_the_output_layer_on_it() -> None:
    """The split that options cannot deliver: the 3090 takes the low layers, the 5090 is filled to its limit."""
    plan = make_plan(models.header(LLAMA_70B), PAIR, PlanRequest(num_ctx=8192))
    placement = plan.chosen.placement
    assert (placement.order, placement.output_gpu) == ((1, 0), 0)
    assert placement.shares[0] > plan.stock.placement.shares[0]
    layer = plan.profile.layers[40].weights_bytes
    assert plan.chosen.limits[0] - plan.chosen.memory.devices[0].total_bytes < 1.2 * layer
    assert plan.chosen_by_options is plan.stock


def test_a_32b_that_stock_splits_runs_on_the_fast_card_alone() -> None:
    """18.5 GiB are more than 80 % of a 4090, yet they fit: ``main_gpu`` delivers that."""
    cards = rig(
        gpu("RTX 4090", 23700, total_mib=24564, gb_per_s=1008, capability=(8, 9), sm_count=128, clock_mhz=2520), rtx3090(16000)
    )
    plan = make_plan(models.header(QWEN_32B), cards, PlanRequest(num_ctx=4096))
    assert plan.stock.placement.kind == "split"
    assert plan.chosen.placement.order == (0,)
    assert plan.chosen_by_options is plan.chosen
    assert any("chosen: RTX 4090 alone" in reason and "predicted, not calibrated" in reason for reason in plan.reasons)


def test_a_model_that_stock_puts_on_the_slow_card_goes_to_the_fast_one() -> None:
    """Case C: the slow card has more free memory."""
    cards = rig(rtx5090(24000), gpu("Tesla P40", 24300, gb_per_s=346, capability=(6, 1), sm_count=30, clock_mhz=1531))
    plan = make_plan(models.header("phi4-14b-q4km"), cards, PlanRequest(num_ctx=8192))
    assert plan.stock.placement.order == (1,)
    assert plan.chosen.placement.order == plan.chosen_by_options.placement.order == (0,)


def test_stock_stays_the_very_object_where_it_is_right() -> None:
    """The 5090 alone, by stock's own choice."""
    plan = make_plan(models.header(QWEN_32B), PAIR, PlanRequest(num_ctx=4096))
    assert plan.chosen is plan.chosen_by_options is plan.stock
    assert any(reason.startswith("stock stays") for reason in plan.reasons)


def test_num_gpu_brings_back_layers_that_stock_left_in_ram() -> None:
    """``--fit`` keeps 1 GiB free on each card; a model that needs some of it ends partly in RAM, which ``num_gpu`` mends."""
    profile = models.header(QWEN_32B)
    plans = (make_plan(profile, rig(rtx3090(free), rtx3090(free)), PlanRequest(num_ctx=4096)) for free in range(11600, 12400, 50))
    mended = next(plan for plan in plans if plan.stock.placement.kind == "partial")
    assert mended.chosen_by_options.label == "all layers (num_gpu)" or mended.chosen_by_options is mended.stock


@pytest.mark.parametrize("boost", [1.0, 1.25, 1.5, 1.75, 2.0])
def test_a_boost_is_taken_literally_and_recorded_beside_stock(boost: float) -> None:
    """Whatever speed is predicted; the reasons begin with it."""
    plan = make_plan(models.header(LLAMA_70B), PAIR, PlanRequest(num_ctx=8192, boost=boost))
    assert plan.chosen.label == f"boost {boost:g}"
    assert plan.chosen.fits
    assert plan.reasons[0].startswith(f"the boost {boost:g} is set")
    assert plan.stock.label == "stock"


def test_a_boost_whose_layout_does_not_fit_leaves_stock() -> None:
    """Its reserves on small cards leave 41 GiB of a 70B to 32 GiB of RAM; stock's layout fits."""
    cards = models.rig(models.rtx5090(8000), models.rtx3090(6000), ram_gib=32)
    plan = make_plan(models.header(LLAMA_70B), cards, PlanRequest(num_ctx=8192, boost=1.25))
    assert plan.stock.fits
    assert plan.chosen is plan.stock
    said = [reason for reason in plan.reasons if reason.startswith("boost 1.25 does not fit")]
    assert said == ["boost 1.25 does not fit: the host would need 40.9 GiB of RAM"]
    assert plan.reasons[-1] == "stock stays: what the boost asks for does not fit"


def test_experts_go_to_ram_before_whole_layers() -> None:
    """Llama 4 Scout, 61 GiB, on 54 GiB: only the routed experts of a few layers leave the GPUs."""
    plan = make_plan(models.header("llama4-scout-q4km"), PAIR, PlanRequest(num_ctx=8192))
    assert plan.chosen.placement.cpu_experts == frozenset(range(len(plan.chosen.placement.cpu_experts)))
    assert plan.chosen.placement.cpu_layers == 0
    assert decode(plan.chosen) > decode(plan.stock)


@pytest.mark.parametrize("ram_gib", [48, 56, 128])
def test_experts_go_to_ram_as_far_as_it_holds_them(ram_gib: int) -> None:
    """Of a Scout's 58 GiB of experts some three quarters have to: a host with 48 GiB does as well as one with all the room."""
    rig = models.rig(models.rtx5090(15_000), models.rtx3090(10_000), ram_gib=ram_gib)
    plan = make_plan(models.header("llama4-scout-q4km"), rig, PlanRequest(num_ctx=8192))
    assert 30 < len(plan.chosen.placement.cpu_experts) < 40
    assert plan.chosen.memory.host.total_bytes <= ram_gib * models.GIB
    assert decode(plan.chosen) > decode(plan.stock)


@pytest.mark.parametrize("num_ctx", [8192, 32768])
def test_a_larger_automatic_batch_does_not_cost_the_fast_card_layers(num_ctx: int) -> None:
    """With more memory Ollama chooses larger batches, whose buffers take the room of layers: so the smallest is looked at."""
    fast, slow = models.rtx5090(20_000), [models.gpu("slow", free_mib, gb_per_s=300) for free_mib in (12_000, 48_000)]
    profile = models.header("qwen2.5-32b-q4km")
    small, large = (make_plan(profile, models.rig(fast, card), PlanRequest(num_ctx=num_ctx)) for card in slow)
    assert small.chosen.settings.batch == 512
    assert any(candidate.settings.batch > 512 for candidate in large.alternatives)
    assert decode(large.chosen) >= decode(small.chosen) * (1 - TIE)
    assert large.chosen.fits


def test_a_batch_that_is_set_is_kept() -> None:
    """``num_batch`` is the client's wish."""
    profile, rig = models.header("qwen2.5-32b-q4km"), models.rig(models.rtx5090(20_000), models.gpu("slow", 48_000, gb_per_s=300))
    plan = make_plan(profile, rig, PlanRequest(num_ctx=32768, num_batch=1024))
    assert all(candidate.settings.batch == 1024 for candidate in (*plan.alternatives, *plan.rejected))


def test_a_wider_margin_is_kept() -> None:
    """After a load that failed."""
    margin = 3 * models.GIB
    plan = make_plan(models.header(LLAMA_70B), PAIR, PlanRequest(num_ctx=8192, margin_bytes=margin))
    for device, card in zip(plan.chosen.memory.devices, PAIR.gpus, strict=True):
        assert device.total_bytes <= card.free_bytes - margin


def test_learned_rates_decide_and_are_named() -> None:
    """A 5090 that turned out slower than the 3090 (a power limit, a bad slot) is not filled first."""
    rates = {"GPU-RTX 5090": (300e9, 2e13), "GPU-RTX 3090": (700e9, 6e13)}
    plan = make_plan(models.header(LLAMA_70B), PAIR, PlanRequest(num_ctx=8192, calibration=Calibration(rates=rates)))
    assert plan.chosen.calibrated
    assert plan.chosen.placement.output_gpu == 1 or plan.chosen is plan.stock
    assert plan.chosen.memory.devices[1].total_bytes > 0.9 * plan.chosen.limits[1]


def test_what_is_predicted_lies_between_the_measured_neighbours() -> None:
    """Case B, two cards of 14336 MiB: 46 layers on the fast card ran, with about 400 MiB to spare; two layers more failed."""
    profile = models.quantized(QWEN_32B, "q4_0")
    cards = rig(gpu("fast", 14336, gb_per_s=4800), gpu("slow", 14336, gb_per_s=3300))
    plan = make_plan(profile, cards, PlanRequest(num_ctx=4096))
    ran = Placement(layers=(45, 19), order=(1, 0), output_gpu=0)
    settings = plan.chosen.settings
    ran_bytes = estimate_memory(profile, settings, ran).devices[0].total_bytes
    chosen = plan.chosen.memory.devices[0]
    layer = profile.layers[0].weights_bytes
    assert ran_bytes - layer < chosen.total_bytes - chosen.runtime_bytes < ran_bytes + 2 * layer


def test_a_machine_without_gpus_and_a_host_without_memory_are_answers_too() -> None:
    """Nothing raises: stock stays, and the reason says that nothing fits."""
    profile = models.header(LLAMA_70B)
    assert make_plan(profile, rig(), PlanRequest()).chosen.placement.kind == "cpu"
    nothing = make_plan(profile, rig(gpu("small", 2000), ram_gib=4), PlanRequest(num_ctx=4096))
    assert nothing.chosen is nothing.stock
    assert any("nothing else fits" in reason for reason in nothing.reasons)


def test_a_named_gpu_gets_the_whole_model_whatever_its_speed_and_none_that_does_not_fit() -> None:
    """It comes before the boost; where the model does not fit, the search decides, and the first reason says so."""
    profile, cards = models.header("llama3.1-8b-q4km"), rig(rtx5090(), rtx3090())
    for boost in (None, 1.5):
        plan = make_plan(profile, cards, PlanRequest(num_ctx=4096, gpu=1, gpu_reason="a rule", boost=boost))
        assert plan.chosen.placement.order == plan.chosen_by_options.placement.order == (1,)
        assert plan.reasons[0].endswith(": a rule")
    full = rig(rtx5090(), rtx3090(2000))
    asked = PlanRequest(num_ctx=4096, gpu=1, gpu_reason="a rule")
    plan = make_plan(profile, full, asked)
    assert plan.chosen.placement == make_plan(profile, full, replace(asked, gpu=None)).chosen.placement
    assert plan.reasons[0].startswith("does not fit alone on ")


@settings(max_examples=25, deadline=None)
@given(PROFILES, rigs(), REQUESTS, st.data())
def test_what_is_reserved_stays_free(profile: ModelProfile, cards: Rig, request: PlanRequest, data: st.DataObject) -> None:
    """Of every plan that fits, stock's own placement included."""

    reserve = tuple(data.draw(st.integers(0, card.free_bytes)) for card in cards.gpus)
    plan = make_plan(profile, cards, replace(request, reserve_bytes=reserve))
    for candidate in (plan.chosen, *plan.alternatives):
        if candidate.fits:
            for device, card, kept in zip(candidate.memory.devices, cards.gpus, reserve, strict=True):
                assert device.total_bytes <= card.free_bytes - kept


@pytest.mark.parametrize("value", [-1, -(2**63), 2**32, "x", float("nan"), float("inf"), (-1,), ("x",)], ids=str)
def test_what_is_no_count_to_llama_cpp_is_none_here(value: Scalar | tuple[Scalar, ...]) -> None:
    """One expert less than none once planned for ever."""
    profile = models.header(QWEN_32B)
    wrong = replace(profile, metadata={**profile.metadata, f"{profile.architecture}.expert_count": value})
    assert wrong.integer("expert_count") == 0
    assert set(wrong.per_layer("expert_count")) == {0}
    assert make_plan(wrong, PAIR, PlanRequest(num_ctx=4096)).chosen == make_plan(profile, PAIR, PlanRequest(num_ctx=4096)).chosen


def test_an_embedding_model_keeps_its_batch() -> None:
    """It takes no text that is longer."""
    plan = make_plan(models.header("llama3.1-8b-q4km"), PAIR, PlanRequest(num_ctx=114688, embedding=True))
    assert {candidate.settings.batch for candidate in (plan.stock, *plan.alternatives, *plan.rejected)} == {2048}


@pytest.mark.parametrize("wish", [{}, {"gpu": 0, "gpu_reason": "a rule says so"}, {"boost": 1.75}], ids=["auto", "rule", "boost"])
def test_options_do_not_ask_for_a_card_that_main_gpu_cannot_say(wish: dict[str, Any]) -> None:
    """``main_gpu: 0`` is the other library's first card, which has more free memory; where all are of one, it is the fast one."""
    model, request = models.header("llama3.1-8b-q4km"), PlanRequest(num_ctx=8192, **wish)
    fast, spare = gpu("fast", 14_000, sm_count=160), gpu("spare", 16_000, gb_per_s=300)
    plans = [
        make_plan(model, rig(fast, spare, gpu("slow", 20_000, gb_per_s=200, library=library)), request)
        for library in ("CUDA", "Vulkan")
    ]
    assert [plan.chosen.placement.order for plan in plans] == [(0,), (0,)]
    assert [plan.unchanged_by_options for plan in plans] == [False, wish != {}]
    assert [plan.chosen_by_options.placement.order for plan in plans] == [(0,), (2,) if wish else (1,)]


def test_a_small_embedding_model_leaves_the_fast_card_to_others() -> None:
    """The slow card by its data or by what was measured; not where cards are alike, for a model that chats, or a large one."""
    small = models.small(n_layers=12)
    embedding = PlanRequest(num_ctx=2048, embedding=True)
    assert make_plan(small, PAIR, embedding).chosen.placement.order == (1,)
    assert make_plan(small, PAIR, replace(embedding, embedding=False)).chosen.placement.order == (0,)
    assert make_plan(small, PAIR, replace(embedding, gpu=0, gpu_reason="a rule says so")).chosen.placement.order == (0,)
    alike = rig(gpu("first", 20_000), gpu("second", 20_000))
    assert make_plan(small, alike, embedding).unchanged
    uuids = [one.uuid for one in alike.gpus]
    for slow, rates in ((0, (4e11, 9e11)), (1, (9e11, 4e11))):
        measured = Calibration(rates={uuid: (rate, 1e13) for uuid, rate in zip(uuids, rates, strict=True)})
        plan = make_plan(small, alike, replace(embedding, calibration=measured))
        assert plan.chosen.placement.order == (slow,)
        assert "a small embedding model leaves the fast card to others" in plan.reasons[0]
    assert make_plan(small, rig(gpu("fast", 20_000), gpu("slow", 200, gb_per_s=100)), embedding).chosen.placement.order == (0,)
