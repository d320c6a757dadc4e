"""The search against brute force, and the rules by which a candidate is chosen."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.cache import cache_bytes
from planner.choice import NEVER_WORSE_GAIN, choose, ranked, score
from planner.cuts import EXACT_GPUS
from planner.hardware import Rig
from planner.memory import estimate_memory
from planner.placement import Placement
from planner.plan import make_plan
from planner.profile import ModelProfile
from planner.request import Candidate, Objective, PlanRequest
from planner.search import Search
from planner.settings import LoadSettings
from planner.speed import HOP_SECONDS, LAYER_SECONDS, Calibration
from tests.planner import models

REQUEST = PlanRequest(num_ctx=2048, num_batch=32, runtime_bytes=0, margin_bytes=0)
SETTINGS = LoadSettings(num_ctx=2048, batch=32, ubatch=32, outputs=1)
GPU_SHARE, HOST_RATE = 0.80, 0.6 * 51.2e9
"""Of a GPU with GDDR, and of a host of which nothing is known: planner/speed.py says where these come from."""
LEARNED = st.dictionaries(
    st.sampled_from(["GPU-gpu0", "GPU-gpu1", "GPU-gpu2"]), st.tuples(st.integers(5, 2000).map(lambda gb: gb * 1e9), st.just(1e13))
)
KEPT = st.builds(
    replace,
    st.just(REQUEST),
    calibration=st.none() | st.builds(Calibration, rates=LEARNED),
    margin_bytes=st.sampled_from([0, 3 * models.MIB]),
    runtime_bytes=st.sampled_from([0, 5 * models.MIB]),
    gpu_overhead_bytes=st.sampled_from([0, 2 * models.MIB]),
)


def every_split(n_gpus: int, n_layers: int, *, partial: bool) -> Iterator[Placement]:
    """All contiguous placements with the output layer on a GPU, over every subset of GPUs in every order."""
    for count in range(1, n_gpus + 1):
        for order in permutations(range(n_gpus), count):
            for cpu in range(n_layers + 1) if partial else (0,):
                n = n_layers - cpu
                for cuts in combinations(range(1, n + 1), count - 1):
                    bounds = (0, *cuts, n)
                    layers = [0] * n_gpus
                    for gpu, (start, stop) in zip(order, pairwise(bounds), strict=True):
                        layers[gpu] = stop - start
                    yield Placement(layers=tuple(layers), order=order, output_gpu=order[-1], cpu_layers=cpu)


def seconds_of(profile: ModelProfile, rig: Rig, request: PlanRequest, placement: Placement) -> float:
    """Seconds of a token, layer by layer: bytes over rate, a fixed cost for each layer, a hop wherever the next device begins.

    A card of which a rate was learned takes as many times longer for the fixed cost as for the bytes.
    """
    caches = cache_bytes(profile, SETTINGS)
    home: list[int | None] = [None] * placement.cpu_layers
    for gpu in placement.order:
        home += [gpu] * placement.layers[gpu]
    reads = [(layer.weights_bytes + cache, at) for layer, cache, at in zip(profile.layers, caches, home, strict=True)]
    reads.append((profile.output_bytes, placement.output_gpu))
    seconds = 0.0
    for i, (read_bytes, at) in enumerate(reads):
        promised = HOST_RATE if at is None else GPU_SHARE * (rig.gpus[at].bandwidth_bytes_per_s or 0)
        learned = promised
        if at is not None and request.calibration is not None:
            learned = request.calibration.rates.get(rig.gpus[at].uuid, (promised, 0))[0]
        seconds += read_bytes / learned + (LAYER_SECONDS * promised / learned if i < profile.n_layers else 0)
    devices = [at for _, at in reads]
    return seconds + HOP_SECONDS * sum(here != there for here, there in pairwise(devices))


def fits(profile: ModelProfile, rig: Rig, request: PlanRequest, placement: Placement) -> bool:
    """Whether every GPU that is used has room for weights, cache, compute buffer, runtime, margin and overhead."""
    kept = request.margin_bytes + request.runtime_bytes + request.gpu_overhead_bytes
    caches = cache_bytes(profile, SETTINGS)
    for gpu, run in placement.ranges():  # what is quickly seen not to fit
        held = sum(profile.layers[layer].weights_bytes + caches[layer] for layer in run)
        if held + kept > rig.gpus[gpu].free_bytes:
            return False
    devices = estimate_memory(profile, SETTINGS, placement).devices
    return all(devices[gpu].total_bytes + kept <= rig.gpus[gpu].free_bytes for gpu in placement.order)


def brute_force(profile: ModelProfile, rig: Rig, request: PlanRequest, *, partial: bool) -> float | None:
    """Seconds of the fastest placement among all that fit."""
    ways = every_split(len(rig.gpus), profile.n_layers, partial=partial)
    by_speed = sorted((seconds_of(profile, rig, request, way), i, way) for i, way in enumerate(ways))
    return next((seconds for seconds, _, way in by_speed if fits(profile, rig, request, way)), None)


@st.composite
def problems(draw: st.DrawFn, *, most_gpus: int, most_layers: int) -> tuple[ModelProfile, Rig]:
    """A model and GPUs that hold between a part of it and all of it."""
    ffn = tuple(draw(st.lists(st.sampled_from([1024, 2048, 4096]), min_size=1, max_size=3)))
    profile = models.small(n_layers=draw(st.integers(2, most_layers)), ffn=ffn, vocabulary=draw(st.sampled_from([2048, 32768])))
    size = profile.weights_bytes // models.MIB + 1
    gpus = [
        models.gpu(
            f"gpu{i}",
            free_mib=draw(st.integers(8, 2 * size + 60)),
            gb_per_s=draw(st.integers(100, 1800)),
        )
        for i in range(draw(st.integers(1, most_gpus)))
    ]
    return profile, models.rig(*gpus)


@settings(max_examples=60, deadline=None)
@given(problems(most_gpus=2, most_layers=24), KEPT)
def test_two_gpus_get_the_optimum_of_brute_force(problem: tuple[ModelProfile, Rig], request: PlanRequest) -> None:
    """Every cut and order over up to 2 GPUs and 24 layers, with and without layers in RAM."""
    _compare(*problem, request)


@settings(max_examples=30, deadline=None)
@given(problems(most_gpus=3, most_layers=24), KEPT)
def test_three_gpus_get_the_optimum_of_brute_force(problem: tuple[ModelProfile, Rig], request: PlanRequest) -> None:
    """The same over up to 3 GPUs: every subset in every order."""
    _compare(*problem, request)


def test_three_hundred_random_rigs_of_three_gpus_get_the_optimum() -> None:
    """Evenly drawn, which hypothesis does not: cards so small that their compute buffers decide, with one layer or none."""
    chance = random.Random(8)
    for _ in range(300):
        ffn = tuple(chance.choice([1024, 2048, 4096]) for _ in range(chance.randint(1, 3)))
        profile = models.small(n_layers=chance.randint(2, 12), ffn=ffn, vocabulary=chance.choice([2048, 32768]))
        most = 2 * profile.weights_bytes // models.MIB + 62
        gpus = (models.gpu(f"gpu{i}", chance.randint(8, most), gb_per_s=chance.randint(100, 1800)) for i in range(3))
        learned = {f"GPU-gpu{i}": (chance.randint(5, 2000) * 1e9, 1e13) for i in range(3) if chance.random() < 0.5}
        _compare(profile, models.rig(*gpus), replace(REQUEST, calibration=Calibration(rates=learned)))


def test_cards_that_are_each_the_faster_one_for_some_layers_share_them_so() -> None:
    """One card is held back: its fixed costs make it the slower one for small layers, its bytes the faster one for large ones."""
    profile = models.small(n_layers=12, ffn=(4096,) * 6 + (1024,) * 6, vocabulary=2048)
    rig = models.rig(models.gpu("held", 66, gb_per_s=1800), models.gpu("slow", 4000, gb_per_s=97))
    request = replace(REQUEST, calibration=Calibration(rates={"GPU-held": (600e9, 1e13)}))
    assert make_plan(profile, rig, request).chosen.placement.layers == (6, 6)
    _compare(profile, rig, request)


def test_a_card_slower_than_ram_gets_no_layers_that_ram_holds_too() -> None:
    """Both cards hold everything, and yet the slow one made the plan slower than it would be without that card."""
    profile = models.small(n_layers=12, ffn=(4096,), vocabulary=2048)
    rig = models.rig(models.gpu("fast", 66, gb_per_s=1800), models.gpu("slow", 4000, gb_per_s=9))
    chosen, alone = (make_plan(profile, machine, REQUEST).chosen for machine in (rig, models.rig(rig.gpus[0])))
    assert chosen.placement.cpu_layers
    assert chosen.placement.order == (0,)
    assert chosen.decode_tokens_per_s == pytest.approx(alone.decode_tokens_per_s)


def _compare(profile: ModelProfile, rig: Rig, request: PlanRequest) -> None:
    search = Search(profile, rig, request)
    outrun = all(search.outruns_ram(gpu, SETTINGS) for gpu in range(len(rig.gpus)))
    full = brute_force(profile, rig, request, partial=False) if outrun else None
    expected = full or brute_force(profile, rig, request, partial=True)
    plan = make_plan(profile, rig, request)
    found = [
        c
        for c in (*plan.alternatives, plan.stock)
        if c.placement.output_gpu is not None and fits(profile, rig, request, c.placement)
    ]
    if expected is None:  # no GPU has room for the output layer
        assert not found
    else:
        assert max(c.decode_tokens_per_s for c in found) == pytest.approx(1 / expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(60, 400), st.integers(100, 1800)), min_size=EXACT_GPUS + 1, max_size=16), st.integers(8, 126)
)
def test_many_gpus_come_within_a_layer_each_of_the_fractional_optimum(cards: list[tuple[int, int]], n_layers: int) -> None:
    """A layer cut in any proportion would fill the fastest GPUs first; whole layers lose at most one on each GPU."""
    profile = models.small(n_layers=n_layers, ffn=(2048,), vocabulary=2048)
    rig = models.rig(*(models.gpu(f"gpu{i}", free_mib=free, gb_per_s=rate) for i, (free, rate) in enumerate(cards)))
    search = Search(profile, rig, REQUEST)
    sizes, work = search.sizes(SETTINGS), search.work(SETTINGS)
    layer = sizes.held_bytes(0, 1)
    rest = float(n_layers)
    seconds = work.output_bytes / search.host.decode_bytes_per_s
    for gpu in sorted(range(len(cards)), key=lambda i: -cards[i][1]):
        room = search.limits[gpu] - sizes.output_bytes - 8 * models.MIB - layer  # 8 MiB: more than any compute buffer here
        took = min(max(room / layer, 0.0), rest)
        rest -= took
        seconds += took * work.layer_bytes[0] / search.rates[gpu].decode_bytes_per_s + HOP_SECONDS
    if rest:
        return  # it does not fit so
    found = search.best_split(range(len(cards)), SETTINGS)
    assert found is not None
    assert found.fits
    assert 1 / found.decode_tokens_per_s <= seconds + n_layers * LAYER_SECONDS


@settings(max_examples=25, deadline=None)
@example(6, 20, 20, 0)
@given(st.integers(2, 8), st.integers(20, 120), st.integers(20, 120), st.integers(0, 2**32))
def test_experts_in_ram_come_within_5_percent_of_brute_force(n_layers: int, free0: int, free1: int, seed: int) -> None:
    """Experts of the N lowest layers in RAM, every N and every cut over two GPUs.

    Mostly the optimum; compute buffers as large as a layer, which move with the cut, can hide it in models this small.
    """
    profile = models.small(n_layers=n_layers, ffn=(1024,), experts=8, vocabulary=2048)
    rig = models.rig(models.gpu("a", free0, gb_per_s=200 + seed % 1500), models.gpu("b", free1, gb_per_s=200 + seed % 700))
    search = Search(profile, rig, REQUEST)
    work = search.work(SETTINGS)
    splits = every_split(2, n_layers, partial=False)
    ways = [replace(split, cpu_experts=frozenset(range(n))) for split in splits for n in range(n_layers + 1)]
    fastest = next(
        (
            way
            for way in sorted(ways, key=lambda p: search.decode_seconds(work, p))
            if search.holds(search.candidate("", way, SETTINGS))
        ),
        None,
    )
    plan = make_plan(profile, rig, REQUEST)
    best = max((c.decode_tokens_per_s for c in (*plan.alternatives, plan.stock)), default=0)
    if fastest:
        assert best >= 0.95 / search.decode_seconds(work, fastest), fastest


def test_where_prompts_count_the_best_split_for_them_is_found() -> None:
    """Sixty random pairs, every cut and order: nothing is more than 5 % better at the turn that is asked for."""
    chance = random.Random(3)
    asked = LoadSettings(num_ctx=4096, batch=512, ubatch=512, outputs=1)
    for _ in range(60):
        profile = models.header(chance.choice(["llama3.1-8b-q4km", "qwen3-30b-a3b-q4km"]))
        objective: Objective = chance.choice(["prefill", "balanced", (3000.0, 100.0)])
        cards = [
            models.gpu(
                f"gpu{i}", chance.randint(3_000, 24_000), sm_count=chance.randint(20, 170), gb_per_s=chance.randint(200, 1800)
            )
            for i in range(2)
        ]
        request = PlanRequest(num_ctx=4096, num_batch=512, objective=objective)
        search = Search(profile, models.rig(*cards), request)
        ways = (search.candidate("", way, asked) for way in every_split(2, profile.n_layers, partial=False))
        best = max((score(way, objective) for way in ways if search.holds(way)), default=0.0)
        plan = make_plan(profile, search.rig, request)
        assert max(score(found, objective) for found in (*plan.alternatives, plan.stock)) >= best * 0.95


def candidate(label: str, decode: float, prefill: float, *, fits: bool = True, gpus: int = 1) -> Candidate:
    """A candidate with these speeds."""
    profile = models.small(n_layers=4)
    placement = (
        Placement(layers=(4, 0), order=(0,), output_gpu=0) if gpus == 1 else Placement(layers=(2, 2), order=(0, 1), output_gpu=1)
    )
    return Candidate(
        label=label,
        placement=placement,
        settings=SETTINGS,
        memory=estimate_memory(profile, SETTINGS, placement),
        limits=(10**9 if fits else 0, 10**9),
        decode_tokens_per_s=decode,
        prefill_tokens_per_s=prefill,
    )


def test_stock_itself_stays_unless_something_is_2_percent_faster() -> None:
    """``chosen is stock``: the very object, so that the caller can pass the request unchanged."""
    stock = candidate("stock", 100, 1000)
    just_less, just_more = (
        candidate("a", 100 * (1 + NEVER_WORSE_GAIN) - 0.01, 2000),
        candidate("b", 100 * (1 + NEVER_WORSE_GAIN) + 1, 500),
    )
    assert choose([just_less], stock, "decode") is stock
    assert choose([just_less, just_more], stock, "decode") is just_more
    assert choose([], stock, "decode") is stock


def test_a_faster_prefill_alone_never_costs_decode_without_being_asked_for() -> None:
    """With the objective ``prefill`` it may; one that is slower in both is never taken."""
    stock = candidate("stock", 100, 1000)
    prefills = candidate("a", 80, 2000)
    assert choose([prefills], stock, "decode") is stock
    assert choose([prefills], stock, "prefill") is prefills
    assert choose([candidate("c", 50, 900)], stock, "balanced") is stock


def test_a_stock_that_runs_out_of_memory_is_left_for_anything_that_fits() -> None:
    """Slower beats failing."""
    slower = candidate("a", 50, 500)
    assert choose([slower], candidate("stock", 100, 1000, fits=False), "decode") is slower


def test_equal_speeds_go_to_fewer_gpus_then_to_the_faster_prefill_then_to_the_first() -> None:
    """Ties within a thousandth, in the stated order."""
    two, slow, fast, same = (
        candidate("two", 100.05, 2000, gpus=2),
        candidate("slow", 100, 1000),
        candidate("fast", 100, 1500),
        candidate("same", 100, 1500),
    )
    assert [c.label for c in ranked([two, slow, fast, same], "decode")] == ["fast", "same", "slow", "two"]


@pytest.mark.parametrize("objective", ["decode", "prefill", "balanced"])
def test_each_objective_takes_the_best_of_its_own(objective: str) -> None:
    """On an unequal pair the objective ``prefill`` never gets a slower prefill than the others."""
    profile = models.header("llama3.3-70b-q4km")
    rig = models.rig(models.rtx5090(), models.rtx3090())
    request = PlanRequest(num_ctx=8192, objective=objective)  # type: ignore[arg-type]
    plan = make_plan(profile, rig, request)
    others = [make_plan(profile, rig, PlanRequest(num_ctx=8192, objective=o)).chosen for o in ("decode", "prefill", "balanced")]  # type: ignore[arg-type]
    assert all(score(plan.chosen, request.objective) >= score(other, request.objective) * 0.98 for other in others)
