"""What is where and by what means: the answers of ``GET /lopsided/models`` and ``GET /lopsided/launcher``."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Any

from planner.hardware import Rig
from planner.plan import Plan
from planner.request import Candidate
from proxy.config.settings import Settings
from proxy.errors import GpuError, LauncherError, LopsidedError
from proxy.gpus.reader import RigReader
from proxy.launcher.installation import SAYINGS, Installation, find_library, inspect
from proxy.launcher.launches import Launches
from proxy.learning.calibration import SPEED_FIELDS, Calibrator
from proxy.learning.verify import misplaced
from proxy.models.catalog import Catalog, full_name
from proxy.ollama.client import Loaded, Ollama
from proxy.ollama.names import blob_name
from proxy.ollama.options import placement_text
from proxy.placing.inforce import InForce
from proxy.placing.placement import Placements

STATES = {"installed": "silent", "replaced": "gone", "absent": "absent", "interrupted": "broken", "lost": "broken"}
"""What the state of an installation is called here, as long as the launcher does not answer."""


class Overview:
    """Reads; changes nothing."""

    def __init__(
        self,
        *,
        ollama: Ollama,
        catalog: Catalog,
        gpus: RigReader,
        placements: Placements,
        launches: Launches,
        calibrator: Calibrator,
        settings: Settings,
    ) -> None:
        self._ollama = ollama
        self._catalog = catalog
        self._gpus = gpus
        self._placements = placements
        self._launches = launches
        self._calibrator = calibrator
        self._settings = settings

    async def models(self) -> dict[str, Any]:
        """Every placement in force, and what Ollama has loaded beside. ``predicted_bytes``: on each GPU of
        ``GET /lopsided/devices``. Raises ``UpstreamError``."""
        entries = await self._ollama.loaded()
        loaded = {full_name(entry.name): entry for entry in entries} | {entry.digest: entry for entry in entries}
        rig = None
        with suppress(GpuError):
            rig = await self._gpus.rig()
        rows, shown = [], set()
        for in_force in self._placements.in_force():
            actual = loaded.get(in_force.digest) or loaded.get(in_force.model)
            if actual:
                shown.add(actual.name)
            rows.append(await self._placed(in_force, actual, rig))
        rows += [await self._stranger(entry, rig) for entry in entries if entry.name not in shown]
        return {"models": rows}

    async def launcher(self) -> dict[str, Any]:
        """Whether the launcher answers, is silent, gone or not there, and how plans go out."""
        found = await asyncio.to_thread(self._installation)
        return launcher_json(answering=self._launches.answering, places_all=self._launches.places_all, found=found)

    async def _placed(self, in_force: InForce, actual: Loaded | None, rig: Rig | None) -> dict[str, Any]:
        runs = self._placements.running(in_force)
        predicted, where = [], None
        if runs:
            predicted = _bytes(runs.plan, runs.candidate, rig)
            if actual:
                watched = rig if self._gpus.live else None
                where = misplaced(runs.candidate, runs.plan.rig, watched, actual.vram_bytes)
        elif in_force.delivery.places:
            predicted = list(in_force.held_bytes or ())
        smaller = actual is not None and 0 < actual.context_length < (in_force.planned_ctx or 0)
        return {
            "model": in_force.model,
            "placement": in_force.delivery.text,
            "options": dict(in_force.delivery.options),
            "loaded": actual is not None,
            "predicted_bytes": predicted,
            "actual_vram_bytes": actual.vram_bytes if actual else None,
            "misplaced": where,
            "context_length": actual.context_length if actual else None,
            "context_note": f"{in_force.planned_ctx} tokens of context were planned" if smaller else None,
            **await asyncio.to_thread(self._calibrator.speeds, in_force),
        }

    async def _stranger(self, entry: Loaded, rig: Rig | None) -> dict[str, Any]:
        """A loaded model that no request through the proxy placed: the launcher may have, for a client that goes past it."""
        known = None
        with suppress(LopsidedError):  # Ollama may have no name for it by now, or not open its file
            facts = await self._catalog.facts(entry.name)
            known = self._launches.placed(blob_name(facts.key))
        row: dict[str, Any] = {
            "model": full_name(entry.name),
            "placement": "loaded past lopsided",
            "options": {},
            "loaded": True,
            "predicted_bytes": [],
            "actual_vram_bytes": entry.vram_bytes,
            "misplaced": None,
            "context_length": entry.context_length,
            "context_note": None,
            **dict.fromkeys(SPEED_FIELDS),
        }
        if known is None:
            return row
        plan, candidate = known
        return row | {
            "placement": f"{placement_text(candidate.placement, plan.rig)}; by the launcher",
            "predicted_bytes": _bytes(plan, candidate, rig),
            "predicted_tokens_per_s": candidate.decode_tokens_per_s,
        }

    def _installation(self) -> Installation | None:
        """What is in Ollama's library here; ``None`` where Ollama is not here, or nothing is found."""
        if not sys.platform.startswith("linux") or not self._settings.upstream.is_loopback():
            return None
        with suppress(LauncherError, OSError):
            return inspect(find_library())
        return None


def launcher_json(*, answering: bool, places_all: bool, found: Installation | None) -> dict[str, Any]:
    """``state``: ``answering``, ``silent`` (installed, and not heard of), ``gone`` (after an update of Ollama), ``broken``,
    ``absent``, or ``unseen`` (Ollama is elsewhere, or its library is). ``delivery``: ``launcher``, ``options`` or both."""
    state = "answering" if answering else STATES.get(found.state, "unseen") if found else "unseen"
    texts = {
        "answering": "answering",
        "silent": "installed, but it has not asked since lopsided started, or a load has gone past it",
        "absent": "not installed",
        "unseen": "not seen: it has not asked, and Ollama's library is not found on this machine",
    }
    return {
        "state": state,
        "text": texts.get(state) or SAYINGS[found.state if found else "none"],
        "delivery": "launcher" if places_all else "launcher and options" if answering else "options",
        "library": str(found.library) if found else None,
    }


def _bytes(plan: Plan, candidate: Candidate, rig: Rig | None) -> list[int]:
    """Bytes of ``candidate`` on each GPU of ``rig``: ``plan`` may be for those alone that one launch left visible."""
    held = {gpu.uuid: device.total_bytes for gpu, device in zip(plan.rig.gpus, candidate.memory.devices, strict=True)}
    return [held.get(gpu.uuid, 0) for gpu in rig.gpus] if rig else list(held.values())
