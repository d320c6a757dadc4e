"""Lists of devices as llama-server prints them."""

import pytest

from planner.hardware import Gpu
from planner.units import MIB
from proxy.gpus.listed import parse_listing, rig_of

PRINTED = """\
ggml_cuda_init: found 2 CUDA devices (Total VRAM: 286742 MiB):
  Device 0: NVIDIA H200, compute capability 9.0, VMM: yes, VRAM: 143371 MiB
load_backend: loaded RPC backend from /usr/lib/ollama/libggml-rpc.so
Available devices:
  CUDA0: NVIDIA GeForce RTX 3090 (24124 MiB, 23700 MiB free)
  ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24510 MiB free)
  Vulkan1: Some Card (Mesa) (8192 MiB, 9000 MiB free)
  RPC0: 127.0.0.1:50052 (7953 MiB, 7001 MiB free)
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
"""


def test_devices_are_listed_in_order_and_other_lines_passed_over():
    devices = parse_listing(PRINTED)
    assert [device.name for device in devices] == ["CUDA0", "ROCm0", "Vulkan1", "RPC0"]
    assert [device.library for device in devices] == ["CUDA", "ROCm", "Vulkan", "RPC"]
    assert devices[0].total_bytes == 24124 * MIB
    assert devices[0].free_bytes == 23700 * MIB
    assert devices[3].description == "127.0.0.1:50052"


def test_a_device_has_no_more_free_than_it_has():
    assert parse_listing(PRINTED)[2].free_bytes == 8192 * MIB


@pytest.mark.parametrize(
    "line",
    [f"CUDA{'9' * 5000}: X (1 MiB, 1 MiB free)", f"CUDA0: X ({'9' * 5000} MiB, 1 MiB free)", "CUDA0: X (1 MiB, \u0663 MiB free)"],
)
def test_numbers_that_no_device_has_make_no_device(line):
    assert parse_listing(f"Available devices:\n  {line}\n") == ()


def test_no_more_devices_are_taken_than_llama_cpp_has():
    lines = "".join(f"  CUDA{number}: X (1 MiB, 1 MiB free)\n" for number in range(400))
    assert [device.name for device in parse_listing(lines)] == [f"CUDA{number}" for number in range(16)]


def test_an_empty_list_has_no_devices():
    assert parse_listing("Available devices:\n  (none)\n") == ()


def test_cards_of_the_table_are_known_and_others_by_their_memory_alone():
    cuda, rocm, vulkan, rpc = rig_of(parse_listing(PRINTED)).gpus
    assert (cuda.sm_count, cuda.compute_capability, cuda.free_bytes) == (82, (8, 6), 23700 * MIB)
    assert (rocm.sm_count, rocm.library) == (96, "ROCm")
    assert (vulkan.sm_count, vulkan.name, vulkan.uuid) == (None, "Some Card (Mesa)", "Vulkan1")
    assert (rpc.bandwidth_bytes_per_s, rpc.uuid) == (None, "RPC0")


def test_what_the_driver_knows_of_a_card_wins_but_for_what_is_free():
    known = Gpu(uuid="GPU-1", name="NVIDIA GeForce RTX 3090", total_bytes=24576 * MIB, free_bytes=9000 * MIB, sm_count=80)
    gpu = rig_of(parse_listing(PRINTED), known={"CUDA0": known}).gpus[0]
    assert (gpu.uuid, gpu.sm_count, gpu.total_bytes, gpu.free_bytes) == ("GPU-1", 80, 24576 * MIB, 9000 * MIB)


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        (("NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 3090"), ("fast", "slow")),
        (("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 5090"), ("slow", "fast")),
        (("NVIDIA GeForce RTX 3090",), ("slow",)),
        (("Other", "NVIDIA GeForce RTX 5090"), ("CUDA0", "fast")),
        (("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 5090"), ("CUDA0", "slow", "fast")),
        (("A", "B", "C"), ("fast", "slow", "CUDA2")),
    ],
)
def test_a_card_is_the_one_of_its_name_though_a_profile_or_a_guess_has_another_order(listed, found):
    names = {"fast": "RTX 5090", "slow": "RTX 3090"}
    cards = [Gpu(uuid=uuid, name=name, total_bytes=8 * MIB, free_bytes=4 * MIB) for uuid, name in names.items()]
    text = "".join(f"  CUDA{number}: {name} (8 MiB, 6 MiB free)\n" for number, name in enumerate(listed))
    rig = rig_of(parse_listing(text), known={"CUDA0": cards[0], "CUDA1": cards[1]})
    assert tuple(gpu.uuid for gpu in rig.gpus) == found
    assert all(gpu.free_bytes == (4 if gpu.uuid in names else 6) * MIB for gpu in rig.gpus)
