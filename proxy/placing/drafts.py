"""A plan for a model that is about to be loaded, as Ollama and the GPUs are now, and the way in which it goes out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from planner.plan import Plan
from planner.request import Era, PlanRequest
from proxy.config.settings import Settings
from proxy.errors import LopsidedError, ModelError
from proxy.gpus.reader import RigReader
from proxy.launcher.launches import Launches
from proxy.models.catalog import Catalog, ModelFacts, full_name
from proxy.ollama.client import Loaded, Ollama
from proxy.ollama.endpoints import LoadRequest
from proxy.ollama.options import Delivery, deliver, deliver_by_launcher, stock
from proxy.once import Once
from proxy.placing.slots import Slot
from proxy.plans.loading import plan_request
from proxy.plans.room import Held
from proxy.plans.ruled import OFF, Load, RuledPlans, in_context

DRAFT_S = 5.0
"""Longest wait for one plan."""

LINES_KEPT = 1024
"""Lines of the log about models that pass unchanged."""

log = logging.getLogger("lopsided.placement")


class Drafts:
    """Makes plans, and remembers none.

    ``slots`` says by blob what holds memory, and who is busy.
    """

    def __init__(
        self,
        *,
        ollama: Ollama,
        catalog: Catalog,
        gpus: RigReader,
        settings: Settings,
        plans: RuledPlans,
        launches: Launches,
        slots: Mapping[str, Slot],
    ) -> None:
        self._ollama = ollama
        self._catalog = catalog
        self._gpus = gpus
        self._settings = settings
        self._plans = plans
        self._launches = launches
        self._slots = slots
        self._tell = Once(log, kept=LINES_KEPT)

    async def make(
        self, request: LoadRequest, facts: ModelFacts, loaded: Mapping[str, Loaded], *, careful: int
    ) -> tuple[Plan | None, Delivery]:
        """A plan and its delivery; without a plan, stock and why. ``loaded`` are models by their blobs."""
        try:
            async with asyncio.timeout(DRAFT_S):
                era = await self._ollama.era()
                wanted = self._wanted(request.options, facts, era, careful=careful > 0)
                load = Load(model=request.model, facts=facts, options=request.options, request=wanted)
                plan = await self._plan(load, loaded)
                return plan, self._delivery(plan, era, wanted)
        except Exception as error:  # noqa: BLE001 - why_not logs what nobody expected
            return None, self.none(request.model, why_not(error, DRAFT_S))

    def none(self, model: str, reason: str) -> Delivery:
        """Stock, since there is no plan for ``model``; the log says so once."""
        self._tell(f"{full_name(model)} passes unchanged: {reason}")
        return stock(reason)

    async def preview(self, model: str, num_ctx: int | None) -> tuple[Plan, Delivery]:
        """The plan that ``model`` would get now, without any effect. Raises ``LopsidedError``."""
        facts = await self._catalog.facts(model)
        era = await self._ollama.era()
        options = {"num_ctx": num_ctx}
        wanted = self._wanted(options, facts, era)
        plan = await self._plan(Load(model=model, facts=facts, options=options, request=wanted), await self.loaded())
        return plan, stock(OFF) if self._plans.rule(model).off else self._delivery(plan, era, wanted)

    async def loaded(self) -> dict[str, Loaded]:
        """The loaded models by their blobs, whatever their names; those that can't be planned for are left out.

        Raises ``UpstreamError``.
        """
        found = {}
        for entry in await self._ollama.loaded():
            with suppress(ModelError):
                found[(await self._catalog.facts(entry.name)).key] = entry
        return found

    def _wanted(self, options: Mapping[str, Any], facts: ModelFacts, era: Era, *, careful: bool = False) -> PlanRequest:
        """What to plan. The launcher never spreads a model; without it, an Ollama that was seen to spread goes on with that."""
        wanted = plan_request(options, facts, self._settings, era, careful=careful)
        if era == "llama-server" and self._launches.answering:
            return replace(wanted, spread=False)
        return replace(wanted, spread=True) if self._launches.spread else wanted

    def _delivery(self, plan: Plan, era: Era, wanted: PlanRequest) -> Delivery:
        if era == "llama-server" and self._launches.answering:
            delivery = deliver_by_launcher(plan, spread=self._launches.spread, tensor_split=self._settings.tensor_split)
        else:
            delivery = deliver(plan, era, tensor_split=self._settings.tensor_split)
        return in_context(delivery, plan, wanted)

    async def _plan(self, load: Load, loaded: Mapping[str, Loaded]) -> Plan:
        others = [self._held(blob, loaded[blob], load.model) for blob in sorted(loaded.keys() - {load.blob})]
        own = self._held(load.blob, loaded[load.blob], load.model) if load.blob in loaded else None
        by_options = not self._launches.places_all
        rig = await self._gpus.rig()
        return await self._plans.beside(load, rig, own=own, others=others, loaded=loaded, by_options=by_options)

    def _held(self, blob: str, entry: Loaded, model: str) -> Held:
        """A loaded model, as it stands to ``model``, which is about to be loaded."""
        slot = self._slots.get(blob)
        busy = slot is not None and slot.users > 0
        return Held(
            vram_bytes=entry.vram_bytes,
            held_bytes=slot.current.held_bytes if slot and slot.current else None,
            stays=busy or entry.pinned or self._plans.stays(entry.name, model),
        )


def why_not(error: Exception, limit_s: float) -> str:
    """Why there is no plan, in words; ``limit_s`` is the time that there was. What nobody expected goes to the debug log."""
    if isinstance(error, LopsidedError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"no plan within {limit_s:g} s"
    log.debug("planning failed", exc_info=error)
    return f"planning failed: {type(error).__name__}: {error}"
