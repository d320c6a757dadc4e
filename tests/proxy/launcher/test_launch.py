"""Ollama's recorded launches are understood, and llama.cpp puts each layer where a placement's arguments mean it to go."""

from __future__ import annotations

import bisect
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.hardware import Gpu, Rig
from planner.memory import DeviceMemory, MemoryEstimate
from planner.placement import Placement, on_cpu, solo
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.request import Candidate, PlanRequest
from planner.settings import LoadSettings
from planner.units import GIB
from proxy.errors import ModelError
from proxy.gpus.order import DeviceOrder
from proxy.launcher.launch import (
    WISHES,
    LaunchRequest,
    answer,
    ask_for_devices,
    parse_arguments,
    parse_launch,
    plan_arguments,
    plan_request,
    render,
    visible_devices,
)

RECORDED = Path(__file__).parents[1].parent / "data" / "launches" / "ollama-0.32.15.log"
ARGUMENTS = [line.removeprefix("ARGV: ").split() for line in RECORDED.read_text().splitlines() if line.startswith("ARGV: ")]
LOADS = [arguments for arguments in ARGUMENTS if "--model" in arguments]
ASKED = LoadSettings()


def gpu(uuid: str, pci_id: str, total_gib: int = 32) -> Gpu:
    return Gpu(uuid=uuid, name="NVIDIA H200", total_bytes=total_gib * GIB, free_bytes=(total_gib - 2) * GIB, pci_id=pci_id)


FAST, SLOW = gpu("GPU-fast", "0000:02:00.0"), gpu("GPU-slow", "0000:01:00.0", total_gib=24)
RIG = Rig(gpus=(FAST, SLOW))


def parsed(arguments: str) -> LaunchRequest:
    return parse_arguments(arguments.split())


def body(arguments: list[str], **environment: str) -> bytes:
    facts = "".join(f"{name}={value}\n" for name, value in environment.items())
    return (facts + "\n" + "".join(f"{argument}\n" for argument in arguments)).encode()


# Parsing


def test_every_recorded_load_is_understood():
    assert len(LOADS) == 8
    for arguments in LOADS:
        request = parse_launch(body(arguments, CUDA_VISIBLE_DEVICES="0,1"))
        assert request.model_path.startswith("/root/.ollama/models/blobs/sha256-b18c850a")
        assert request.blob == request.model_path.rpartition("/")[2]
        assert request.settings == LoadSettings(num_ctx=4096, parallel=1, batch=512, ubatch=512, outputs=1)
        assert request.main_gpu == (0 if "--main-gpu" in arguments else None)
        assert request.wish is None
        assert request.devices is None


def test_recorded_discovery_starts_are_no_loads():
    for arguments in ARGUMENTS:
        if arguments not in LOADS:
            with pytest.raises(ModelError, match="no --model"):
                parse_arguments(arguments)


def test_the_context_is_that_of_one_sequence_and_the_last_of_a_flag_counts():
    request = parsed(
        "--model /m -c 4096 -c 32768 -np 4 -b 1024 -ub 2048 --cache-type-k q8_0 --cache-type-v q4_0 --flash-attn off"
    )
    assert request.settings == LoadSettings(
        num_ctx=8192,
        parallel=4,
        batch=1024,
        ubatch=1024,
        kv_type_k="q8_0",
        kv_type_v="q4_0",
        flash_attention=False,
        outputs=4,
    )


def test_what_lies_beside_the_model_is_found():
    request = parsed("--model /m -c 8 --mmproj /p --lora /a,/b --lora /c --embeddings -ngl 12")
    assert (request.projector_path, request.adapter_paths, request.gpu_layers) == ("/p", ("/a", "/b", "/c"), 12)
    assert request.settings.outputs is None
    assert request.wish == "the request or the model sets num_gpu"


def test_a_flag_is_no_value_of_another_ones():
    assert parse_arguments(["--model", "-c", "-c", "8"]).model_path == "-c"
    with pytest.raises(ModelError, match="parallel is ''"):
        parse_arguments(["--model", "/m", "-c", "8", "-np"])


@pytest.mark.parametrize(
    "arguments",
    ["", "--model", "--model /m", "--model /m -c 0", "--model /m -c x", "--model /m -c 8 -np 0", "--model /m -c 8 -b -1"],
)
def test_arguments_that_cannot_be_planned_are_refused_with_a_reason(arguments):
    with pytest.raises(ModelError):
        parsed(arguments)


def test_a_cache_type_that_is_not_known_is_refused_with_a_reason():
    with pytest.raises(ModelError, match="turbo3"):
        parsed("--model /m -c 8 -ctk turbo3")


@given(st.binary())
def test_a_body_of_any_bytes_is_understood_or_refused(posted):
    try:
        parse_launch(posted)
    except ModelError:
        return


def test_what_separates_things_is_written_otherwise():
    request = parse_launch(b"CUDA_VISIBLE_DEVICES=0,\t1%0A\n\n--model\n/a%20b%0A%25c\xff\n-c\n8\n")
    assert request.model_path == "/a b\n%c\udcff"
    assert request.environment == {"CUDA_VISIBLE_DEVICES": "0,\t1\n"}


@pytest.mark.parametrize(
    ("value", "spread"), [("1", True), ("true", True), ("yes", True), ("0", False), ("false", False), ("", False)]
)
def test_spread_is_read_as_ollama_reads_it(value, spread):
    assert parse_launch(body(["--model", "/m", "-c", "8"], OLLAMA_SCHED_SPREAD=value)).spread is spread


@pytest.mark.parametrize("name", WISHES)
def test_a_placement_by_hand_in_ollamas_environment_is_the_users_wish(name):
    assert name in parse_launch(body(["--model", "/m", "-c", "8"], **{name: "1"})).wish


def test_a_launch_is_planned_with_what_ollama_told_llama_server():
    base = PlanRequest(num_ctx=131072, boost=1.5, spread=True, era="runner")
    request = plan_request(parsed("--model /m -c 16384 -np 2 -b 1024 -ctk q8_0 -ctv q4_0 --flash-attn on"), base)
    assert request == PlanRequest(num_ctx=8192, parallel=2, kv_type_k="q8_0", kv_type_v="q4_0", flash_attention=True, boost=1.5)
    for context, batch, num_batch in ((16384, 300, 300), (4096, 1024, 1024), (32768, 2048, 2048), (32769, 2048, None)):
        assert plan_request(parsed(f"--model /m -c {context} -b {batch}"), base).num_batch == num_batch
    embedding = plan_request(parsed("--model /m -c 8192 -b 2048 -ub 2048 --embedding"), base)
    assert (embedding.embedding, embedding.num_batch) == (True, 2048)  # longer texts are refused: no plan may make it smaller


# Devices


def visible(rig: Rig | None, order: DeviceOrder | None = None, **environment: str) -> dict[str, str] | None:
    found = visible_devices(parse_launch(body(["--model", "/m", "-c", "8"], **environment)), rig, order)
    return None if found is None else {name: found_gpu.uuid for name, found_gpu in found.items()}


def test_indices_count_in_ollamas_order_or_by_pci_where_that_is_set():
    assert visible(RIG, CUDA_VISIBLE_DEVICES="0,1") == {"CUDA0": "GPU-fast", "CUDA1": "GPU-slow"}
    assert visible(RIG, CUDA_VISIBLE_DEVICES="1") == {"CUDA0": "GPU-slow"}
    by_pci = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible(RIG, CUDA_VISIBLE_DEVICES="0,1", **by_pci) == {"CUDA0": "GPU-slow", "CUDA1": "GPU-fast"}
    assert visible(RIG, CUDA_VISIBLE_DEVICES="1,0", **by_pci) == {"CUDA0": "GPU-fast", "CUDA1": "GPU-slow"}


def test_uuids_name_gpus_whatever_the_order():
    assert visible(RIG, CUDA_VISIBLE_DEVICES="GPU-slow,GPU-fast") == {"CUDA0": "GPU-slow", "CUDA1": "GPU-fast"}


def test_the_list_is_needed_where_nothing_else_tells():
    assert visible(None, CUDA_VISIBLE_DEVICES="0,1") is None
    assert visible(RIG) is None
    assert visible(RIG, CUDA_VISIBLE_DEVICES="") is None
    assert visible(RIG, CUDA_VISIBLE_DEVICES="0", LLAMA_ARG_RPC="10.0.0.7:50052") is None


@pytest.mark.parametrize("visible_cards", ["1,2", "2", "0,2", "0,-1", "GPU-other,GPU-fast", "GPU-fast,GPU-"])
@pytest.mark.parametrize("pci", [{}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}])
def test_an_entry_that_means_no_card_of_the_rig_leaves_none_to_guess(visible_cards, pci):
    """Ollama counts a card that lopsided does not see: what llama-server calls CUDA0 need not be the first one known."""
    assert visible(RIG, CUDA_VISIBLE_DEVICES=visible_cards, **pci) is None
    listing = "Available devices:%0A  CUDA0: NVIDIA H200 (9 MiB, 9 MiB free)%0A"
    assert visible(RIG, CUDA_VISIBLE_DEVICES=visible_cards, DEVICES=listing, **pci) == {"CUDA0": "CUDA0"}


@pytest.mark.parametrize("pci", [{}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}])
def test_cards_behind_those_of_the_rig_are_left_out(pci):
    """Ollama counts from the first card on, and hides none."""
    rig = Rig(gpus=(replace(FAST, pci_id=None),))
    assert visible(rig, CUDA_VISIBLE_DEVICES="0,1", **pci) == {"CUDA0": "GPU-fast"}
    assert visible(rig, DeviceOrder(visible="1", by_pci=bool(pci)), CUDA_VISIBLE_DEVICES="0,1", **pci) is None


PROFILE = Rig(gpus=tuple(replace(card, pci_id=None) for card in (FAST, SLOW)))
"""As a profile describes cards: in Ollama's order, without PCI ids."""
TURNED = Rig(gpus=PROFILE.gpus[::-1])


@pytest.mark.parametrize("pci", [{}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}])
@pytest.mark.parametrize("rig", [PROFILE, TURNED])
def test_a_profiles_cards_are_counted_as_they_stand_in_it(rig, pci):
    first, second = (card.uuid for card in rig.gpus)
    assert visible(rig, CUDA_VISIBLE_DEVICES="0,1", **pci) == {"CUDA0": first, "CUDA1": second}
    assert visible(rig, CUDA_VISIBLE_DEVICES="1", **pci) == {"CUDA0": second}
    assert visible(rig, CUDA_VISIBLE_DEVICES="GPU-slow", **pci) == {"CUDA0": "GPU-slow"}
    assert visible(rig, CUDA_VISIBLE_DEVICES="GPU-slow,GPU-fast", **pci) == {"CUDA0": "GPU-slow", "CUDA1": "GPU-fast"}


@pytest.mark.parametrize("by_pci", [False, True])
@pytest.mark.parametrize("own", ["1,2", "2, 1", "7,0"])
@pytest.mark.parametrize("rig", [PROFILE, TURNED])
def test_numbers_that_hide_or_turn_cards_for_lopsided_too_mean_the_same_cards(rig, own, by_pci):
    """The rig has the visible cards, in the order of ``own``, and Ollama writes the numbers of all cards."""
    pci = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if by_pci else {}
    order = DeviceOrder(visible=own, by_pci=by_pci)
    first, second = (card.uuid for card in rig.gpus)
    numbers = own.replace(" ", "").split(",")
    assert visible(rig, order, CUDA_VISIBLE_DEVICES=",".join(numbers), **pci) == {"CUDA0": first, "CUDA1": second}
    assert visible(rig, order, CUDA_VISIBLE_DEVICES=",".join(numbers[::-1]), **pci) == {"CUDA0": second, "CUDA1": first}
    assert visible(rig, order, CUDA_VISIBLE_DEVICES=numbers[1], **pci) == {"CUDA0": second}
    for unknown in (f"{own},5", "5"):
        assert visible(rig, order, CUDA_VISIBLE_DEVICES=unknown, **pci) is None


@pytest.mark.parametrize(
    "order",
    [
        DeviceOrder(visible="1,0", by_pci=True),  # Ollama counts otherwise
        DeviceOrder(visible="1,0", names=("H200",)),  # the rig stands as its user says
        DeviceOrder(visible="1"),  # a profile of more cards than lopsided's own environment shows
    ],
)
def test_numbers_that_may_mean_other_cards_to_ollama_leave_none_to_guess(order):
    assert visible(RIG, order, CUDA_VISIBLE_DEVICES="1,0") is None


def test_uuids_in_lopsideds_own_environment_leave_numbers_to_the_rigs_order():
    order = DeviceOrder(visible="GPU-fast,GPU-slow")
    assert visible(RIG, order, CUDA_VISIBLE_DEVICES="1") == {"CUDA0": "GPU-slow"}
    assert visible(RIG, order, CUDA_VISIBLE_DEVICES="GPU-slow") == {"CUDA0": "GPU-slow"}


def test_a_list_names_the_devices_and_says_what_is_free():
    listing = (
        "Available devices:%0A%20%20RPC0:%2010.0.0.7:50052%20(24576%20MiB,%2023000%20MiB%20free)%0A"
        "%20%20CUDA0:%20NVIDIA%20H200%20(24576%20MiB,%209000%20MiB%20free)%0A"
    )
    request = parse_launch(body(["--model", "/m", "-c", "8"], CUDA_VISIBLE_DEVICES="1", LLAMA_ARG_RPC="x", DEVICES=listing))
    found = visible_devices(request, RIG)
    assert list(found) == ["RPC0", "CUDA0"]
    assert found["CUDA0"].uuid == "GPU-slow"
    assert found["CUDA0"].free_bytes == 9000 * 2**20
    assert (found["RPC0"].library, found["RPC0"].free_bytes) == ("RPC", 23000 * 2**20)
    assert "DEVICES" not in request.environment


# Rendering


def test_a_split_names_devices_and_shares_in_the_order_of_the_layers():
    placement = Placement(layers=(45, 19), order=(1, 0), output_gpu=0)
    assert render(placement, ("CUDA0", "CUDA1"), settings=ASKED, asked=ASKED) == (
        *("--device", "CUDA1,CUDA0", "--split-mode", "layer", "--tensor-split", "19,46", "-ngl", "65", "--fit", "off"),
    )


def test_one_gpu_is_named_alone():
    args = render(solo(1, n_gpus=2, n_layers=32), ("CUDA0", "Vulkan0"), settings=ASKED, asked=ASKED, exact=False)
    assert args == ("--device", "Vulkan0", "--split-mode", "none", "--main-gpu", "0")
    args = render(solo(1, n_gpus=2, n_layers=32), ("CUDA0", "Vulkan0"), settings=ASKED, asked=ASKED)
    assert args == ("--device", "Vulkan0", "--split-mode", "none", "--main-gpu", "0", "-ngl", "33", "--fit", "off")


def solo_plan(left_mib: int, *, n_gpus: int) -> Plan:
    """A plan that puts everything on the first GPU and leaves so much of it free."""
    rig = Rig(gpus=tuple(gpu(f"GPU-{i}", f"0000:0{i}:00.0") for i in range(n_gpus)))
    total_bytes = rig.gpus[0].free_bytes - left_mib * 2**20
    chosen = Candidate(
        label="solo",
        placement=solo(0, n_gpus=n_gpus, n_layers=32),
        settings=ASKED,
        memory=MemoryEstimate(
            devices=(DeviceMemory(weights_bytes=total_bytes), *[DeviceMemory()] * (n_gpus - 1)), host=DeviceMemory()
        ),
        limits=tuple(card.free_bytes for card in rig.gpus),
        decode_tokens_per_s=1.0,
        prefill_tokens_per_s=1.0,
    )
    return Plan(
        profile=ModelProfile(
            architecture="llama", name="m", file_bytes=0, layers=(), input_bytes=0, output_bytes=0, metadata={}, tensors=()
        ),
        rig=rig,
        request=PlanRequest(),
        chosen=chosen,
        chosen_by_options=chosen,
        stock=chosen,
        alternatives=(),
        rejected=(),
        reasons=(),
    )


def test_the_care_of_fit_is_given_up_only_where_its_margin_is_too_thin():
    alone = ("--device", "CUDA0", "--split-mode", "none", "--main-gpu", "0")
    assert plan_arguments(solo_plan(1280, n_gpus=2), ("CUDA0", "CUDA1"), ASKED) == alone
    assert plan_arguments(solo_plan(1279, n_gpus=2), ("CUDA0", "CUDA1"), ASKED) == (*alone, "-ngl", "33", "--fit", "off")


def test_one_visible_gpu_with_room_needs_no_arguments():
    assert plan_arguments(solo_plan(1280, n_gpus=1), ("CUDA0",), ASKED) is None
    assert plan_arguments(solo_plan(1279, n_gpus=1), ("CUDA0",), ASKED) is not None
    assert plan_arguments(solo_plan(1280, n_gpus=1), ("CUDA0",), LoadSettings(batch=256))[-2:] == ("-b", "512")


def test_batches_are_given_where_the_plan_has_others():
    args = render(solo(0, n_gpus=1, n_layers=2), ("CUDA0",), settings=LoadSettings(batch=2048, ubatch=1024), asked=ASKED)
    assert args[-4:] == ("-b", "2048", "-ub", "1024")


def test_what_llama_server_cannot_be_told_is_left_to_stock():
    assert render(on_cpu(n_gpus=2, n_layers=8), ("CUDA0", "CUDA1"), settings=ASKED, asked=ASKED) is None
    layers_only = Placement(layers=(8, 0), order=(0,), output_gpu=None)
    assert render(layers_only, ("CUDA0", "CUDA1"), settings=ASKED, asked=ASKED) is None


def test_answers_are_one_argument_a_line():
    assert answer(("--device", "CUDA0")) == (200, b"--device\nCUDA0\n")
    assert answer(None) == (204, b"")
    assert ask_for_devices() == (409, b"devices needed\n")


@st.composite
def placements(draw):
    """Placements that llama-server can be told: up to 6 GPUs, 200 layers, layers and experts in RAM."""
    n_gpus = draw(st.integers(1, 6))
    order = draw(st.permutations(range(n_gpus)))[: draw(st.integers(1, n_gpus))]
    layers = [0] * n_gpus
    for holder in order:
        layers[holder] = draw(st.integers(1, 40))
    if draw(st.booleans()):
        layers[order[-1]] -= 1
    cpu_layers = draw(st.integers(0, 40))
    n_layers = sum(layers) + cpu_layers
    experts = draw(st.frozensets(st.integers(0, max(n_layers - 1, 0)))) if n_layers else frozenset()
    return Placement(layers=tuple(layers), order=tuple(order), output_gpu=order[-1], cpu_layers=cpu_layers, cpu_experts=experts)


def f32(value: float) -> float:
    """``value`` rounded to C's ``float``. Rounding a double's sum or quotient of two floats gives the float's own."""
    return struct.unpack("f", struct.pack("f", value))[0]


def load_tensors(arguments: tuple[str, ...], n_layers: int) -> list[str]:
    """The device of each repeating layer and of the output layer (the last), by llama.cpp's own rule and arithmetic.

    ``llama_model_base::load_tensors`` in ``src/llama-model.cpp``, b10488, line by line: cumulative shares in single precision,
    then ``std::upper_bound`` of each offloaded layer's place among them.
    """
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    devices = values["--device"].split(",")
    splits = [f32(float(share)) for share in values.get("--tensor-split", "1").split(",")]
    assert len(splits) == len(devices)
    split_sum = 0.0
    for i in range(len(splits)):
        split_sum = f32(split_sum + splits[i])
        splits[i] = split_sum
    splits = [f32(split / split_sum) for split in splits]
    n_gpu_layers = int(values["-ngl"])
    i_gpu_start = max(n_layers + 1 - n_gpu_layers, 0)
    act_gpu_layers = min(n_gpu_layers, n_layers + 1)

    def layer_device(il: int) -> str:
        if il < i_gpu_start or il - i_gpu_start >= act_gpu_layers:
            return "CPU"
        return devices[bisect.bisect_right(splits, f32(f32(il - i_gpu_start) / act_gpu_layers))]

    return [layer_device(il) for il in range(n_layers + 1)]


@given(placements())
def test_llama_cpp_puts_every_layer_where_the_placement_says(placement):
    names = [f"CUDA{i}" for i in range(len(placement.layers))]
    arguments = render(placement, names, settings=ASKED, asked=ASKED)
    found = load_tensors(arguments, placement.n_layers)
    expected = ["CPU"] * placement.cpu_layers
    for holder, run in placement.ranges():
        expected += [names[holder]] * len(run)
    assert found == [*expected, names[placement.output_gpu]]


@given(placements())
def test_exactly_the_experts_that_belong_in_ram_are_sent_there(placement):
    names = [f"CUDA{i}" for i in range(len(placement.layers))]
    arguments = render(placement, names, settings=ASKED, asked=ASKED)
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    patterns = [  # what llama.cpp makes of --n-cpu-moe (llm_ffn_exps_block_regex in common/common.h), and of -ot
        rf"blk\.{i}\.ffn_(up|down|gate|gate_up)_(ch|)exps" for i in range(int(values.get("--n-cpu-moe", 0)))
    ]
    if "-ot" in values:
        pattern, equals, buffer = values["-ot"].rpartition("=")
        assert (equals, buffer) == ("=", "CPU")
        assert "," not in pattern
        patterns.append(pattern)
    in_ram = {
        layer
        for layer in range(placement.cpu_layers, placement.n_layers)
        if any(re.search(pattern, f"blk.{layer}.ffn_gate_up_exps.weight") for pattern in patterns)
    }
    assert in_ram == {layer for layer in placement.cpu_experts if layer >= placement.cpu_layers}
