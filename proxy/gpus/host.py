"""The machine around the GPUs: its RAM, from ``/proc/meminfo`` where there is one (Linux, containers, WSL)."""

from __future__ import annotations

import re
from pathlib import Path

from planner.hardware import Host

MEMINFO = Path("/proc/meminfo")


def read_host(meminfo: Path = MEMINFO) -> Host:
    """Total and available bytes of RAM, ``None`` where the system does not say; bandwidth is never known."""
    try:
        rows = dict(re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE))
    except (OSError, UnicodeDecodeError):
        return Host()
    return Host(total_bytes=_bytes(rows.get("MemTotal")), free_bytes=_bytes(rows.get("MemAvailable")))


def _bytes(kib: str | None) -> int | None:
    return int(kib) * 1024 if kib else None
