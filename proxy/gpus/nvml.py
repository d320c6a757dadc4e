"""GPUs as the NVIDIA driver describes them, through ``pynvml``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from planner.hardware import Gpu, Rig
from proxy.errors import GpuError
from proxy.gpus.host import read_host
from proxy.gpus.order import DeviceOrder, in_ollama_order

T = TypeVar("T")

CORES_PER_SM = {
    **dict.fromkeys(((5, 0), (5, 2), (5, 3), (6, 1), (6, 2), (8, 6), (8, 7), (8, 9), (9, 0)), 128),
    **dict.fromkeys(((10, 0), (10, 1), (10, 3), (11, 0), (12, 0), (12, 1)), 128),
    **dict.fromkeys(((6, 0), (7, 0), (7, 2), (7, 5), (8, 0)), 64),
    **dict.fromkeys(((3, 0), (3, 2), (3, 5), (3, 7)), 192),
}
"""FP32 cores of one SM by compute capability: ``_ConvertSMVer2Cores`` in NVIDIA's cuda-samples (``helper_cuda.h``)."""

TRANSFERS_PER_CLOCK = 2
"""NVML states memory clocks of double data rate, whatever the memory: an RTX 3090's 9751 MHz × 2 × 384 bit / 8 are 936 GB/s."""

_HINTS = {
    "NVMLError_LibraryNotFound": "the NVIDIA driver's libnvidia-ml is not here; in a container, add the 'utility' capability",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is not loaded",
    "NVMLError_LibRmVersionMismatch": "the driver was updated while running; restart the machine",
    "NVMLError_GpuIsLost": "a GPU has fallen off the bus; restart the machine",
    "NVMLError_NoPermission": "this user may not open the NVIDIA devices",
}


class NvmlSource:
    """The rig of this machine; static facts are asked once per card, free memory at each call.

    ``nvml`` stands for the ``pynvml`` module, which is imported at the first call where none is given. A card's fact that
    its driver does not know (``NotSupported``) is ``None``. Safe to call from several threads.
    """

    def __init__(self, order: DeviceOrder | None = None, *, nvml: Any = None) -> None:
        self._order = order or DeviceOrder()
        self._nvml = nvml
        self._started = False
        self._known: dict[str, Gpu] = {}
        self._lock = threading.Lock()

    def rig(self) -> Rig:
        """The rig as it stands now. Raises ``GpuError``: no driver, no GPU, MIG, a GPU that is lost."""
        with self._lock:
            nvml = self._start()
            try:
                gpus = [self._read(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
            except nvml.NVMLError as error:
                self._stop(nvml)
                raise _explained(error) from error
        if not gpus:
            raise GpuError("the NVIDIA driver is here, but it sees no GPU")
        visible = in_ollama_order(gpus, self._order)
        if not visible:
            raise GpuError(f"CUDA_VISIBLE_DEVICES={self._order.visible!r} hides all {len(gpus)} GPUs")
        return Rig(gpus=visible, host=read_host())

    def close(self) -> None:
        """Lets go of the driver; a later call of ``rig`` takes hold of it again."""
        with self._lock:
            if self._started:
                self._stop(self._nvml)

    def _start(self) -> Any:
        if self._nvml is None:
            try:
                import pynvml
            except ImportError as error:  # no wheel for this platform, or one that does not load
                raise GpuError(f"the Python package nvidia-ml-py does not load: {error}") from error
            self._nvml = pynvml
        if not self._started:
            try:
                self._nvml.nvmlInit()
            except self._nvml.NVMLError as error:
                raise _explained(error) from error
            self._started = True
        return self._nvml

    def _stop(self, nvml: Any) -> None:
        """After an error the next call begins anew: a driver that was reloaded gives new handles only to a new session."""
        self._started = False
        self._known.clear()
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()

    def _read(self, nvml: Any, index: int) -> Gpu:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        memory = _unless_unknown(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        total_bytes, free_bytes = (memory.total, memory.free) if memory else (None, None)
        if uuid not in self._known:
            self._known[uuid] = _describe(nvml, handle, uuid, total_bytes)
        known = self._known[uuid]
        if free_bytes is None:  # unified memory (Jetson, GB10): the driver has no count of its own
            free_bytes = min(read_host().free_bytes or 0, known.total_bytes)
        return replace(known, free_bytes=min(free_bytes, known.total_bytes))


def _describe(nvml: Any, handle: Any, uuid: str, total_bytes: int | None) -> Gpu:
    """All facts about one card that stay; raises ``GpuError`` for a card that is partitioned (MIG)."""

    def ask(call: str, *arguments: Any) -> Any:
        return _unless_unknown(nvml, lambda: getattr(nvml, call)(handle, *arguments))

    name = _text(nvml.nvmlDeviceGetName(handle))
    mig = ask("nvmlDeviceGetMigMode")
    if mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE:
        raise GpuError(f"{name} ({uuid}) is partitioned by MIG, which is not planned for: Ollama's own placement stays in force")
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    cores = ask("nvmlDeviceGetNumGpuCores")
    cores_per_sm = CORES_PER_SM.get(tuple(capability)) if capability else None
    bus_bits = ask("nvmlDeviceGetMemoryBusWidth")
    memory_mhz = ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM)
    pci = ask("nvmlDeviceGetPciInfo")
    unified = total_bytes is None
    if unified:
        total_bytes = read_host().total_bytes or 0
    return Gpu(
        uuid=uuid,
        name=name,
        total_bytes=total_bytes or 0,
        free_bytes=0,
        compute_capability=tuple(capability) if capability else None,
        sm_count=cores // cores_per_sm if cores and cores_per_sm else None,
        clock_mhz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM) or None,
        bandwidth_bytes_per_s=bus_bits * memory_mhz * 10**6 * TRANSFERS_PER_CLOCK // 8 if bus_bits and memory_mhz else None,
        pci_id=_text(pci.busId).lower() if pci else None,
        pcie_generation=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_width=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        integrated=unified,
    )


def _unless_unknown(nvml: Any, call: Callable[[], T]) -> T | None:
    """What ``call`` answers, ``None`` where this card or driver does not know it; other errors pass."""
    try:
        return call()
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
            return None
        raise


def _explained(error: Exception) -> GpuError:
    hint = _HINTS.get(type(error).__name__)
    return GpuError(f"NVML does not answer: {error}" + (f" ({hint})" if hint else ""))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
