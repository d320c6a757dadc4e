"""What llama-server's own log says about a load, whoever started it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from planner.cache import cache_bytes
from planner.placement import Placement, solo
from planner.profile import ModelProfile
from planner.settings import LoadSettings
from planner.units import MIB

BUFFER = re.compile(r"(\S+?)(?:\[\S+\])? +(model|KV|RS|compute|output) buffer size = *([\d.]+) MiB")
DEVICE = re.compile(r"using device (\S+) \(.*\) \(([^()]*)\) - ")
FIT = re.compile(r"fitting params to free memory took ([\d.]+) seconds")
COMMAND = re.compile(r'msg="starting llama-server" cmd="([^"]*)"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """One load. ``order`` are the devices in the order in which they take layers; MiB by device and kind of buffer."""

    order: tuple[str, ...]
    buffers_mib: dict[str, dict[str, float]]
    fit_s: float | None


def last_load(log: str, pci_ids: Sequence[str] = ()) -> Loaded:
    """The last load in ``log``; of one that was tried several times, the try that stands.

    A process that sees one GPU of two calls it the first: with ``pci_ids`` of all GPUs, each is named by its place among them.
    """
    begin = log.rfind("using device")
    begin = log.rfind("llama_prepare_model_devices", 0, begin) if begin >= 0 else 0
    while (before := log.rfind("using device", 0, begin)) >= 0 and log.count("\n", before, begin) <= 1:
        begin = before  # one line for each device
    text = log[max(begin, 0) :]
    devices = DEVICE.findall(text)
    names = {device: f"{device.rstrip('0123456789')}{pci_ids.index(pci)}" for device, pci in devices if pci in pci_ids}
    buffers: dict[str, dict[str, float]] = {}
    for device, kind, mib in BUFFER.findall(text):
        buffers.setdefault(names.get(device, device), {})[kind] = float(mib)
    fits = FIT.findall(log)
    order = tuple(names.get(device, device) for device, _ in devices)
    return Loaded(
        order=tuple(device for device in order if "model" in buffers.get(device, {})),
        buffers_mib=buffers,
        fit_s=float(fits[-1]) if fits else None,
    )


def placement_of(loaded: Loaded, profile: ModelProfile, settings: LoadSettings, devices: tuple[str, ...]) -> Placement:
    """Where the layers went, read off the caches: for models whose layers are all alike. ``devices`` stand in the rig's order.

    A model without a cache is on one device. Raises ``ValueError`` where the caches are no whole number of layers.
    """
    each = cache_bytes(profile, settings)[0] / MIB
    if not each:
        (device,) = loaded.order
        return solo(devices.index(device), n_gpus=len(devices), n_layers=profile.n_layers)
    counts = []
    for device in devices:
        layers = loaded.buffers_mib.get(device, {}).get("KV", 0.0) / each
        if abs(layers - round(layers)) > 0.02:
            raise ValueError(f"{device} has the cache of {layers:.2f} layers")
        counts.append(round(layers))
    order = tuple(devices.index(device) for device in loaded.order)
    left = profile.n_layers - sum(counts)
    return Placement(layers=tuple(counts), order=order, output_gpu=order[-1] if order else None, cpu_layers=left)
