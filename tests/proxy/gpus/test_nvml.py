"""NVML as a source: the facts it states, what it does not know, and every way in which it can be broken."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from planner.units import MIB
from proxy.errors import GpuError
from proxy.gpus.nvml import CORES_PER_SM, NvmlSource
from proxy.gpus.order import DeviceOrder


class NVMLError(Exception):
    """As in ``pynvml``: one class per code, the code in ``value``."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __str__(self) -> str:
        return type(self).__name__.removeprefix("NVMLError_")


CODES = {
    "NotSupported": 3,
    "LibraryNotFound": 12,
    "DriverNotLoaded": 9,
    "GpuIsLost": 15,
    "LibRmVersionMismatch": 18,
    "Unknown": 999,
}
ERRORS = {name: type(f"NVMLError_{name}", (NVMLError,), {}) for name in CODES}


def fails(name: str) -> Any:
    return ERRORS[name](CODES[name])


CARDS = {
    "5090": {
        "Name": "NVIDIA GeForce RTX 5090",
        "UUID": "GPU-5090",
        "MemoryInfo": SimpleNamespace(total=32607 * MIB, free=31500 * MIB),
        "CudaComputeCapability": (12, 0),
        "NumGpuCores": 21760,
        "MemoryBusWidth": 512,
        "MaxClockInfo": {1: 3090, 2: 14001},
        "PciInfo": SimpleNamespace(busId=b"00000000:41:00.0"),
        "MaxPcieLinkGeneration": 5,
        "MaxPcieLinkWidth": 16,
        "MigMode": fails("NotSupported"),
    },
    "3090": {
        "Name": b"NVIDIA GeForce RTX 3090",
        "UUID": b"GPU-3090",
        "MemoryInfo": SimpleNamespace(total=24576 * MIB, free=23700 * MIB),
        "CudaComputeCapability": (8, 6),
        "NumGpuCores": 10496,
        "MemoryBusWidth": 384,
        "MaxClockInfo": {1: 2100, 2: 9751},
        "PciInfo": SimpleNamespace(busId="00000000:01:00.0"),
        "MaxPcieLinkGeneration": 4,
        "MaxPcieLinkWidth": 16,
        "MigMode": (0, 0),
    },
}


class FakeNvml:
    """The part of ``pynvml`` that is used, answering from a table; an answer that is an exception is raised."""

    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2

    def __init__(self, *cards: dict[str, Any], init: Exception | None = None) -> None:
        self.cards = [dict(card) for card in cards]
        self.init = init
        self.calls: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802
        self.calls.append("Init")
        if self.init:
            raise self.init

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.calls.append("Shutdown")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802
        return self.cards[index]

    def __getattr__(self, name: str) -> Any:
        fact = name.removeprefix("nvmlDeviceGet")
        if fact == name:
            raise AttributeError(name)

        def call(handle: dict[str, Any], *arguments: int) -> Any:
            self.calls.append(fact)
            answer = handle[fact]
            if isinstance(answer, Exception):
                raise answer
            return answer[arguments[0]] if arguments else answer

        return call


def pair(**facts: Any) -> FakeNvml:
    return FakeNvml({**CARDS["3090"], **facts}, CARDS["5090"])


def test_facts_of_two_cards():
    """Names, memory, SMs from cores, clocks, PCIe; bandwidth 936 and 1792 GB/s from bus width and clock; fastest first."""
    fast, slow = NvmlSource(nvml=pair()).rig().gpus
    assert (fast.name, fast.uuid, fast.pci_id) == ("NVIDIA GeForce RTX 5090", "GPU-5090", "00000000:41:00.0")
    assert (fast.total_bytes, fast.free_bytes) == (32607 * MIB, 31500 * MIB)
    assert (fast.sm_count, fast.clock_mhz, fast.compute_capability) == (170, 3090, (12, 0))
    assert (slow.name, slow.sm_count, slow.pcie_generation, slow.pcie_width) == ("NVIDIA GeForce RTX 3090", 82, 4, 16)
    assert round(fast.bandwidth_bytes_per_s / 1e9) == 1792
    assert round(slow.bandwidth_bytes_per_s / 1e9) == 936


@pytest.mark.parametrize(
    ("card", "capability", "cores", "sms", "bus", "mem_mhz", "gb_per_s"),
    [
        ("P40", (6, 1), 3840, 30, 384, 3615, 347),
        ("V100", (7, 0), 5120, 80, 4096, 877, 898),
        ("T4", (7, 5), 2560, 40, 256, 5001, 320),
        ("A100", (8, 0), 6912, 108, 5120, 1215, 1555),
        ("H200", (9, 0), 16896, 132, 6144, 3201, 4917),
        ("RTX 4090", (8, 9), 16384, 128, 384, 10501, 1008),
    ],
)
def test_sm_count_and_bandwidth_of_known_cards(card, capability, cores, sms, bus, mem_mhz, gb_per_s):
    """The factor of two holds for GDDR and HBM alike, and cores per SM for every generation."""
    facts = {"CudaComputeCapability": capability, "NumGpuCores": cores, "MemoryBusWidth": bus, "MaxClockInfo": {1: 1, 2: mem_mhz}}
    (gpu,) = NvmlSource(nvml=FakeNvml({**CARDS["3090"], **facts})).rig().gpus
    assert gpu.sm_count == sms, card
    assert round(gpu.bandwidth_bytes_per_s / 1e9) == gb_per_s, card


def test_free_memory_is_read_anew_and_the_rest_once():
    """Each decision sees the memory of now; what cannot change is asked once per card."""
    nvml = pair()
    source = NvmlSource(nvml=nvml)
    source.rig()
    asked = len(nvml.calls)
    nvml.cards[0]["MemoryInfo"] = SimpleNamespace(total=24576 * MIB, free=5 * MIB)
    assert source.rig().gpus[1].free_bytes == 5 * MIB
    assert nvml.calls[asked:] == ["UUID", "MemoryInfo"] * 2


@pytest.mark.parametrize(
    ("fact", "lost"),
    [
        ("CudaComputeCapability", ["compute_capability", "sm_count"]),
        ("NumGpuCores", ["sm_count"]),
        ("MemoryBusWidth", ["bandwidth_bytes_per_s"]),
        ("MaxClockInfo", ["bandwidth_bytes_per_s", "clock_mhz"]),
        ("PciInfo", ["pci_id"]),
        ("MaxPcieLinkGeneration", ["pcie_generation"]),
        ("MaxPcieLinkWidth", ["pcie_width"]),
    ],
)
def test_what_a_driver_does_not_know_is_none(fact, lost):
    """``NotSupported`` costs the one fact and what is computed from it, nothing else."""
    (gpu,) = NvmlSource(nvml=FakeNvml({**CARDS["3090"], fact: fails("NotSupported")})).rig().gpus
    names = ("compute_capability", "sm_count", "bandwidth_bytes_per_s", "clock_mhz", "pci_id", "pcie_generation", "pcie_width")
    assert sorted(name for name in names if getattr(gpu, name) is None) == lost


def test_an_unknown_generation_has_no_sm_count():
    """Cores per SM of a capability that is not in the table: unknown, not guessed."""
    assert (99, 0) not in CORES_PER_SM
    (gpu,) = NvmlSource(nvml=FakeNvml({**CARDS["3090"], "CudaComputeCapability": (99, 0)})).rig().gpus
    assert gpu.sm_count is None


def test_unified_memory():
    """A chip without memory of its own (GB10) has the machine's RAM, and is integrated."""
    (gpu,) = NvmlSource(nvml=FakeNvml({**CARDS["3090"], "MemoryInfo": fails("NotSupported")})).rig().gpus
    assert gpu.integrated
    assert 0 <= gpu.free_bytes <= gpu.total_bytes


@pytest.mark.parametrize(
    ("nvml", "says"),
    [
        (FakeNvml(init=fails("LibraryNotFound")), "libnvidia-ml is not here"),
        (FakeNvml(init=fails("DriverNotLoaded")), "driver is not loaded"),
        (FakeNvml(init=fails("LibRmVersionMismatch")), "restart the machine"),
        (FakeNvml(), "sees no GPU"),
        (pair(MigMode=(1, 1)), "partitioned by MIG"),
        (pair(MemoryInfo=fails("GpuIsLost")), "fallen off the bus"),
        (pair(UUID=fails("GpuIsLost")), "fallen off the bus"),
        (pair(NumGpuCores=fails("Unknown")), "NVML does not answer: Unknown"),
    ],
)
def test_a_broken_nvml_is_a_clear_error(nvml, says):
    """No library, no driver, no GPU, MIG, a lost card: ``GpuError`` with what to do, nothing else."""
    with pytest.raises(GpuError, match=says):
        NvmlSource(nvml=nvml).rig()


def test_recovers_when_the_driver_does():
    """After an error the next decision opens NVML anew and asks all facts again."""
    nvml = FakeNvml(CARDS["3090"], {**CARDS["5090"], "MemoryInfo": fails("GpuIsLost")})
    source = NvmlSource(nvml=nvml)
    with pytest.raises(GpuError):
        source.rig()
    nvml.cards[1]["MemoryInfo"] = CARDS["5090"]["MemoryInfo"]
    assert len(source.rig().gpus) == 2
    assert nvml.calls.count("Name") == 1 + 2
    assert [call for call in nvml.calls if call in ("Init", "Shutdown")] == ["Init", "Shutdown", "Init"]
    source.close()
    source.close()
    assert nvml.calls.count("Shutdown") == 2


def test_the_order_is_ollamas():
    """Environment decides order and visibility; all hidden is an error."""
    assert [gpu.uuid for gpu in NvmlSource(DeviceOrder(by_pci=True), nvml=pair()).rig().gpus] == ["GPU-3090", "GPU-5090"]
    assert [gpu.uuid for gpu in NvmlSource(DeviceOrder(visible="1"), nvml=pair()).rig().gpus] == ["GPU-3090"]
    with pytest.raises(GpuError, match="hides all 2 GPUs"):
        NvmlSource(DeviceOrder(visible=""), nvml=pair()).rig()


def test_the_real_library_answers_or_fails_clearly():
    """On any machine: a rig, or a ``GpuError``."""
    source = NvmlSource()
    with suppress(GpuError):
        assert source.rig().gpus
    source.close()
