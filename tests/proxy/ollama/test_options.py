"""Delivery by options: what each era is told, whose wish counts, and what the header says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.hardware import Rig
from planner.placement import Placement, solo
from planner.profile import ModelProfile
from planner.request import PlanRequest
from planner.units import GIB
from proxy.ollama.failures import is_out_of_memory
from proxy.ollama.options import deliver, era_of, header_text, own_wish, placement_text
from proxy.planjson import launcher_arguments
from tests.proxy.planners import RIG, gpu, make

N = 10
PROFILE = ModelProfile(
    architecture="llama", name="m", file_bytes=1, layers=(), input_bytes=0, output_bytes=0, metadata={}, tensors=()
)
FAST, SLOW = solo(0, n_gpus=2, n_layers=N), solo(1, n_gpus=2, n_layers=N)
SPLIT = Placement(layers=(7, 3), order=(1, 0), output_gpu=0)
ASCENDING = Placement(layers=(7, 3), order=(0, 1), output_gpu=1)
PARTIAL = Placement(layers=(4, 3), order=(0, 1), output_gpu=1, cpu_layers=3)


def told(chosen, stock, *, era="llama-server", tensor_split=True, used_gib=1.0, rig=RIG, boost=None):
    plan = make(PROFILE, rig, PlanRequest(era=era, boost=boost), chosen, stock, used_bytes=int(used_gib * GIB))
    delivery = deliver(plan, era, tensor_split=tensor_split)
    assert delivery.without == {"main_gpu"}
    return delivery.text, delivery.options


@pytest.mark.parametrize(
    ("version", "era"),
    [
        ("0.11.5", "runner"),
        ("0.24.0", "runner"),
        ("0.29.9-rc1", "runner"),
        ("0.30.0", "llama-server"),
        ("0.32.15", "llama-server"),
        ("v0.24.1", "runner"),
        ("1.0.0", "llama-server"),
        ("0.0.0", "llama-server"),
        ("", "llama-server"),
        ("nonsense", "llama-server"),
    ],
)
def test_the_version_tells_the_era(version, era):
    assert era_of(version) == era


def test_a_solo_plan_is_a_main_gpu():
    assert told(FAST, SPLIT) == ("solo CUDA0; auto", {"main_gpu": 0})
    assert told(SLOW, FAST) == ("solo CUDA1; auto", {"main_gpu": 1})


def test_num_gpu_is_added_where_fit_would_move_layers():
    # shows: less than llama.cpp's own margin of 1 GiB (and some slack) would be left on the card of 32 GiB
    assert told(FAST, SPLIT, used_gib=31.5)[1] == {"main_gpu": 0, "num_gpu": N + 1}
    assert told(FAST, SPLIT, used_gib=30.0)[1] == {"main_gpu": 0}


def test_nothing_is_put_in_where_stock_is_as_good():
    assert told(FAST, FAST) == ("stock; auto; nothing is faster", {})


def test_a_split_goes_out_as_tensor_split_alone_unless_that_is_off():
    assert told(ASCENDING, FAST) == (
        "split CUDA0=7,CUDA1=4; auto; by tensor_split, which stock Ollama ignores",
        {"tensor_split": "7,4"},
    )
    assert told(PARTIAL, FAST) == ("stock; auto; partial CUDA0=4,CUDA1=4 needs the launcher", {})
    text, options = told(ASCENDING, FAST, tensor_split=False)
    assert (text, options) == ("stock; auto; split CUDA0=7,CUDA1=4 needs the launcher", {})


def test_shares_by_index_would_put_the_output_layer_of_another_order_on_the_wrong_card():
    # shows: the plan has its lowest layers on CUDA1 and the output layer on CUDA0, a fork would do the reverse
    assert told(SPLIT, FAST) == ("stock; auto; split CUDA0=8,CUDA1=3 needs the launcher", {})


def test_the_older_era_knows_num_gpu_alone():
    assert told(FAST, SPLIT, era="runner") == ("stock; auto; solo CUDA0 can't be asked of this Ollama", {})
    assert told(PARTIAL, SPLIT, era="runner")[1] == {}  # fewer layers than stock takes would only be slower
    text, options = told(SPLIT, PARTIAL, era="runner")
    assert (text, options) == ("split CUDA0=8,CUDA1=3; auto; by num_gpu alone", {"num_gpu": N + 1})


def test_the_boost_is_named():
    assert told(FAST, SPLIT, boost=1.75)[0] == "solo CUDA0; boost 1.75"


def test_main_gpu_counts_the_gpus_of_its_library():
    rig = Rig(gpus=(gpu("a", 8, library="ROCm"), gpu("b", 24)))
    assert told(SLOW, FAST, rig=rig) == ("solo CUDA0; auto", {"main_gpu": 0})


def test_a_gpu_that_main_gpu_cannot_say_is_none_to_options():
    # shows: Ollama takes main_gpu 0 for the CUDA card, which has more free memory
    rig = Rig(gpus=(gpu("v", 8, library="Vulkan"), gpu("c", 24)))
    plan = make(PROFILE, rig, PlanRequest(), FAST, SLOW)
    stock_said = replace(plan, chosen=plan.chosen, chosen_by_options=plan.stock)
    assert deliver(stock_said, "llama-server", tensor_split=True).text == "stock; auto; solo Vulkan0 needs the launcher"
    there = replace(plan, chosen=plan.chosen, chosen_by_options=plan.chosen, stock=plan.chosen)
    assert deliver(there, "llama-server", tensor_split=True, explicit=True).options == {}


def test_header_is_one_line_of_ascii():
    assert header_text("a\r\nX: é") == "a??X: ?"
    assert len(header_text("x" * 1000)) == 256
    assert placement_text(PARTIAL, RIG) == "partial CUDA0=4,CUDA1=4"


@pytest.mark.parametrize(
    ("options", "defaults", "wish"),
    [
        ({}, {}, None),
        ({"main_gpu": 0}, {}, None),
        ({"num_gpu": -1}, {}, None),
        ({"num_ctx": 1}, {"num_ctx": 2, "stop": ("a", "b")}, None),
        ({"main_gpu": 1}, {}, "the request sets main_gpu"),
        ({"num_gpu": 0}, {}, "the request sets num_gpu"),
        ({"main_gpu": 0, "num_gpu": 99}, {}, "the request sets num_gpu"),
        ({"tensor_split": "1,1"}, {}, "the request sets tensor_split"),
        ({"tensor_split": [1, 1]}, {}, "the request sets tensor_split"),
        ({}, {"num_gpu": 20}, "the model sets num_gpu"),
        ({}, {"main_gpu": 0}, "the model sets main_gpu"),
        ({}, {"num_gpu": -1}, None),
    ],
)
def test_whose_wish_counts(options, defaults, wish):
    assert own_wish(options, defaults) == wish


def test_launcher_arguments_name_devices_lowest_layers_first():
    def flags(placement):
        plan = make(PROFILE, RIG, PlanRequest(), placement, FAST)
        return " ".join(launcher_arguments(plan))

    assert flags(FAST) == "--device CUDA0 --split-mode none --main-gpu 0 -ngl 11 --fit off"
    assert flags(SPLIT) == "--device CUDA1,CUDA0 --split-mode layer --tensor-split 3,8 -ngl 11 --fit off"
    assert flags(Placement(layers=(0, 0), cpu_layers=N)) == "-ngl 0"


def test_launcher_arguments_leave_out_nothing_of_the_plan():
    # shows: experts in RAM are said too, and what -ngl cannot say (the output layer alone in RAM) is not said wrongly
    def flags(placement):
        return launcher_arguments(make(PROFILE, RIG, PlanRequest(), placement, FAST))

    experts = Placement(layers=(7, 3), order=(1, 0), output_gpu=0, cpu_experts=frozenset({0, 1}))
    assert flags(experts)[-2:] == ["--n-cpu-moe", "2"]
    assert flags(Placement(layers=(7, 3), order=(1, 0))) == []


@pytest.mark.parametrize(
    "text",
    [
        "llama-server process has terminated: exit status 1: cudaMalloc failed: out of memory\n"
        "ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 253796864",
        "llama runner process has terminated: error loading model: unable to allocate CUDA0 buffer",
        "memory layout cannot be allocated with num_gpu = 81",
        "model requires more system memory (12.1 GiB) than is available (8.0 GiB)",
        "llama-server process has terminated: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
    ],
)
def test_a_load_that_ran_out_of_memory_is_known_by_its_text(text):
    assert is_out_of_memory(500, text)
    assert not is_out_of_memory(400, text)


@pytest.mark.parametrize(
    "text", ['option "num_gpu" must be of type integer', "unexpected EOF", "exit status 1: invalid device: CUDA1", ""]
)
def test_other_errors_are_not_taken_for_it(text):
    assert not is_out_of_memory(500, text)
