from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.costs import LayerCosts, layer_costs
from planner.fit import most_placed
from planner.hardware import Gpu
from planner.layout import Layouts, create_layout
from planner.placement import Placement
from planner.power import GB, by_compute_power, gpu_minimum_graph_overhead
from planner.profile import Tensor, build_profile
from planner.quantization import ggml_type
from planner.settings import LoadSettings
from planner.units import MIB


def card(name, free_mib, sm_count, clock_mhz, cc, uuid=None):
    return Gpu(
        uuid=uuid or name,
        name=name,
        total_bytes=48_000 * MIB,
        free_bytes=int(free_mib * MIB),
        sm_count=sm_count,
        clock_mhz=clock_mhz,
        compute_capability=cc,
    )


RTX_5090 = card("RTX 5090", 31_500, 170, 2407, (12, 0))
RTX_3090 = card("RTX 3090", 23_700, 82, 1695, (8, 6))
PAIR = (RTX_5090, RTX_3090)


def model_of(total_bytes, n_layers=80, output_bytes=800_000_000):
    layer = (total_bytes - output_bytes) // n_layers
    return LayerCosts(layers_bytes=(layer,) * n_layers, ffn_bytes=(layer // 2,) * n_layers, output_bytes=output_bytes)


REFERENCE = model_of(40 * GB)
"""40 GB in all: 80 equal layers with their KV, and the output layer."""


def bytes_on(placement, model, gpu):
    body = sum(sum(model.layers_bytes[i] for i in run) for holder, run in placement.ranges() if holder == gpu)
    return body + (model.output_bytes if placement.output_gpu == gpu else 0)


def usable(gpu):
    return max(gpu.free_bytes - gpu_minimum_graph_overhead(gpu), 0)


class TestReferencePair:
    @pytest.mark.parametrize("output_bytes", [0, 40 * GB // 81, 800_000_000])
    def test_at_1_75_the_5090_is_full_with_68_percent_and_the_output_layer(self, output_bytes):
        model = model_of(40 * GB, output_bytes=output_bytes)
        layout = create_layout(model, PAIR, boost=1.75)
        assert layout.placement.kind == "split"
        assert layout.placement.output_gpu == 0
        assert layout.placement.order == (1, 0)
        on_5090 = bytes_on(layout.placement, model, 0)
        assert on_5090 / (40 * GB) == pytest.approx(0.68, abs=0.015)
        assert bytes_on(layout.placement, model, 1) / (40 * GB) == pytest.approx(0.32, abs=0.015)
        assert usable(RTX_5090) / GB == pytest.approx(27.0, abs=0.05)
        assert usable(RTX_5090) - on_5090 < model.layers_bytes[0]  # one more layer would not fit
        assert any("heavy layers move from RTX 3090 to RTX 5090" in reason for reason in layout.reasons)

    def test_at_1_0_the_layout_is_stocks_own_with_43_percent_on_the_3090(self):
        placement = create_layout(REFERENCE, PAIR, boost=1.0).placement
        assert bytes_on(placement, REFERENCE, 1) / (40 * GB) == pytest.approx(0.43, abs=0.01)
        assert placement.output_gpu == 1

    def test_the_reserves_can_be_given(self):
        placement = Layouts(REFERENCE, PAIR, (457 * MIB, 457 * MIB)).at(1.75).placement
        assert bytes_on(placement, REFERENCE, 0) / (40 * GB) > 0.7

    @pytest.mark.parametrize("boost", [1.25, 1.75, 2.0])
    def test_a_model_that_the_5090_holds_with_its_reserve_lies_on_it_alone(self, boost):
        layout = create_layout(model_of(27 * GB), PAIR, boost=boost)
        assert layout.placement == Placement(layers=(80, 0), order=(0,), output_gpu=0)
        assert layout.reasons == ("all 25.1 GiB fit on RTX 5090",)

    def test_the_strongest_card_that_holds_it_alone_comes_before_any_split(self):
        weak_but_large = replace(RTX_3090, free_bytes=40_000 * MIB)
        layout = create_layout(model_of(30 * GB), (RTX_5090, weak_but_large), boost=1.75)
        assert layout.placement == Placement(layers=(0, 80), order=(1,), output_gpu=1)


class TestWhatDoesNotFit:
    def test_above_1_the_lowest_layers_stay_on_the_cpu_and_the_output_layer_on_the_strongest(self):
        model = model_of(60 * GB)
        layout = create_layout(model, PAIR, boost=1.75)
        placement = layout.placement
        assert placement.kind == "partial"
        assert placement.output_gpu == 0
        assert placement.cpu_layers > 0
        left = usable(RTX_5090) + usable(RTX_3090) - bytes_on(placement, model, 0) - bytes_on(placement, model, 1)
        assert left < 2 * model.layers_bytes[0]
        assert any(f"the {placement.cpu_layers} lowest layers stay on the CPU" in reason for reason in layout.reasons)

    def test_at_1_0_the_output_layer_stays_on_the_cpu_as_stock_has_it(self):
        placement = create_layout(model_of(48 * GB, output_bytes=GB), PAIR, boost=1.0).placement
        assert placement.output_gpu is None
        assert placement.cpu_layers == 0

    def test_an_output_layer_that_fits_no_gpu_stays_on_the_cpu_alone(self):
        model = LayerCosts(layers_bytes=(GB,) * 8, ffn_bytes=(GB,) * 8, output_bytes=40 * GB)
        layout = create_layout(model, PAIR, boost=1.5)
        assert layout.placement == Placement(layers=(8, 0), order=(0,))
        assert any("the output layer stay" in reason for reason in layout.reasons)

    @pytest.mark.parametrize("boost", [1.0, 1.5])
    @pytest.mark.parametrize("gpus", [(), (card("tiny", 1000, 10, 1000, (7, 5)),)])
    def test_without_a_gpu_that_holds_a_layer_all_stays_on_the_cpu(self, gpus, boost):
        placement = create_layout(REFERENCE, gpus, boost=boost).placement
        assert placement == Placement(layers=(0,) * len(gpus), cpu_layers=80)

    @pytest.mark.parametrize("boost", [0.5, 2.5, float("nan")])
    def test_a_boost_out_of_range_is_refused(self, boost):
        with pytest.raises(ValueError, match="not between"):
            create_layout(REFERENCE, PAIR, boost=boost)


def test_layers_that_jump_over_the_middle_gpu_are_brought_into_runs_and_it_is_said():
    middle = card("RTX 4090", 23_700, 128, 2520, (8, 9))
    model = model_of(60 * GB)
    layout = create_layout(model, (*PAIR, middle), boost=1.75)
    assert layout.placement.order == (1, 2, 0)
    assert layout.placement.cpu_layers == 0
    assert any("interleaved" in reason for reason in layout.reasons)
    assert usable(RTX_5090) - bytes_on(layout.placement, model, 0) < model.layers_bytes[0]


def test_heavy_layers_stay_where_in_runs_not_as_many_would_fit_after_the_move():
    gpus = tuple(
        card(name, size / MIB, sm, 100, cc)
        for name, size, sm, cc in (("a", 7, 100, (12, 0)), ("b", 9, 50, (8, 9)), ("c", 8, 20, (8, 6)))
    )
    model = LayerCosts(layers_bytes=(2, 8), ffn_bytes=(2, 8), output_bytes=4)
    layout = Layouts(model, gpus, (0, 0, 0)).at(1.01)
    assert layout.placement == Placement(layers=(0, 1, 1), order=(2, 1, 0), output_gpu=0)
    assert layout.reasons[-1].startswith("heavy layers stay")


def test_an_output_layer_that_the_bisection_put_elsewhere_comes_back_to_the_strongest():
    gpus = (card("small and strong", 6 * GB / MIB, 170, 2407, (12, 0)), card("large and weak", 44 * GB / MIB, 82, 1695, (8, 6)))
    model = LayerCosts(layers_bytes=(25 * GB,) * 3, ffn_bytes=(GB,) * 3, output_bytes=6 * GB)
    layout = Layouts(model, gpus, (0, 0)).at(1.9)
    assert layout.placement == Placement(layers=(0, 1), order=(1, 0), output_gpu=0, cpu_layers=2)
    assert "the output layer goes to small and strong, the strongest GPU" in layout.reasons


def test_two_cards_of_one_name_are_told_apart():
    twins = (replace(RTX_3090, uuid="GPU-a"), replace(RTX_3090, uuid="GPU-b"))
    assert "all 33.5 GiB fit on RTX 3090 #0 + RTX 3090 #1" in create_layout(model_of(36 * GB), twins, boost=1.5).reasons


def test_costs_of_a_profile_are_weights_and_cache_with_experts_as_ffn():
    f16 = ggml_type("f16")
    profile = build_profile(
        metadata={
            "general.architecture": "llama",
            "llama.embedding_length": 64,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
        },
        tensors=[
            Tensor(name="token_embd.weight", type=f16, shape=(64, 100)),
            Tensor(name="blk.0.attn_q.weight", type=f16, shape=(64, 64)),
            Tensor(name="blk.0.ffn_up.weight", type=f16, shape=(64, 128)),
            Tensor(name="blk.0.ffn_up_exps.weight", type=f16, shape=(64, 32, 4)),
            Tensor(name="output.weight", type=f16, shape=(64, 100)),
        ],
        file_bytes=10**6,
    )
    model = layer_costs(profile, LoadSettings(num_ctx=256))
    kv_bytes = 256 * 2 * 16 * 2 * 2  # tokens · heads · head size · (K and V) · f16
    assert model.layers_bytes == (2 * (64 * 64 + 64 * 128 + 64 * 32 * 4) + kv_bytes,)
    assert model.ffn_bytes == (2 * (64 * 128 + 64 * 32 * 4),)
    assert model.output_bytes == 2 * 64 * 100


def test_costs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="1 FFN sizes for 2 layers"):
        LayerCosts(layers_bytes=(1, 1), ffn_bytes=(1,), output_bytes=0)


@st.composite
def rigs(draw):
    cards = []
    for i in range(draw(st.integers(1, 4))):
        sm, clock = draw(st.sampled_from([(170, 2407), (82, 1695), (30, 2500), (None, None)]))
        cc = draw(st.sampled_from([(12, 0), (8, 9), (8, 6), (7, 5), None]))
        gpu = card(f"card {i}", draw(st.integers(0, 32_000)), sm, clock, cc, uuid=f"GPU-{i}")
        cards.append(replace(gpu, integrated=draw(st.integers(0, 5)) == 0))
    return tuple(cards)


@st.composite
def models(draw):
    layers = draw(st.lists(st.integers(1, 4 * GB), min_size=1, max_size=24))
    ffn = [int(size * draw(st.floats(0, 1))) for size in layers]
    return LayerCosts(layers_bytes=tuple(layers), ffn_bytes=tuple(ffn), output_bytes=draw(st.integers(0, 6 * GB)))


boosts = st.one_of(st.just(1.0), st.floats(1.0, 2.0))


@given(models(), rigs(), boosts)
def test_each_layer_is_placed_once_in_runs_and_no_gpu_over_its_real_bytes(model, gpus, boost):
    placement = create_layout(model, gpus, boost=boost).placement
    placed = [i for _, run in placement.ranges() for i in run]
    assert [*range(placement.cpu_layers), *placed] == list(range(len(model.layers_bytes)))
    for i, gpu in enumerate(gpus):
        assert bytes_on(placement, model, i) <= usable(gpu)


@given(models(), rigs(), boosts, st.data())
def test_the_order_of_the_gpus_changes_only_their_numbers(model, gpus, boost, data):
    order = data.draw(st.permutations(range(len(gpus))))
    one = create_layout(model, gpus, boost=boost).placement
    other = create_layout(model, [gpus[i] for i in order], boost=boost).placement
    assert other.layers == tuple(one.layers[i] for i in order)
    assert [order[i] for i in other.order] == list(one.order)
    assert (None if other.output_gpu is None else order[other.output_gpu]) == one.output_gpu
    assert other.cpu_layers == one.cpu_layers


@settings(max_examples=200)
@given(models(), rigs(), boosts, st.data())
def test_more_memory_never_makes_it_infeasible(model, gpus, boost, data):
    more = tuple(replace(gpu, free_bytes=gpu.free_bytes + data.draw(st.integers(0, 16_000)) * MIB) for gpu in gpus)
    if create_layout(model, gpus, boost=boost).placement.kind in ("solo", "split"):
        assert create_layout(model, more, boost=boost).placement.kind in ("solo", "split")


@given(models(), rigs(), st.floats(1.0, 2.0, exclude_min=True))
def test_above_1_the_output_layer_is_on_the_strongest_gpu_in_use_that_can_hold_it(model, gpus, boost):
    placement = create_layout(model, gpus, boost=boost).placement
    for gpu in by_compute_power(gpus):
        if placement.output_gpu == gpu:
            break
        if gpu in placement.order or placement.output_gpu is None:
            assert usable(gpus[gpu]) < model.output_bytes


def test_many_gpus_that_hold_few_large_layers_each_are_not_tried_in_every_combination(monkeypatch):
    """Their memory would do for many groups, and no group holds the layers: of 16 GPUs there are 65,000, which took 15 s."""
    tried = []
    monkeypatch.setattr("planner.layout.most_placed", lambda *given: tried.append(given) or most_placed(*given))
    large = 4 * GB
    model = LayerCosts(layers_bytes=(large,) * 12, ffn_bytes=(large,) * 12, output_bytes=large)
    cards = [card(f"gpu{i}", large * 1.9 / MIB, 100 + i, 1000, (8, 6)) for i in range(12)]
    Layouts(model, cards, [0] * 12).at(1.5)
    assert 2 < len(tried) < 200
