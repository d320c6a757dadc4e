"""Plans by the rules of ``lopsided.toml``, beside the models that are loaded: one way for requests, launches and previews."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from planner.frontier import fitted_context
from planner.hardware import Rig
from planner.plan import Plan, Planner, revert
from planner.request import PlanRequest
from proxy.config.rulefile import RuleFile
from proxy.config.rules import Rule, matches
from proxy.config.settings import Settings
from proxy.errors import LopsidedError, fitting_together
from proxy.models.catalog import Catalog, ModelFacts
from proxy.ollama.options import Delivery, with_context
from proxy.once import Once
from proxy.plans.loading import makes_room, plan_request, sets_context, without_companions
from proxy.plans.room import Held, beside_others, doubts, evicts, rig_for, ruled, said_by
from proxy.plans.together import Member, share

TOLD_KEPT = 64
"""Lines of the log that are remembered, so that each is said once."""

BESIDE = "elsewhere Ollama would unload another model"
AT_A_COST = "what is faster would have Ollama unload another model"
TOGETHER = "there it stays loaded together with its group"
OFF = "a rule switches it off"
APART = "keep_together: there is no room for the whole group, so each is placed as if there were none"
"""Why such a plan was made, or none, in the words of a reason."""

log = logging.getLogger("lopsided.rules")


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A model about to be loaded. ``options`` are what the client sets, ``request`` the load as it is without any rule."""

    model: str
    facts: ModelFacts
    options: Mapping[str, Any]
    request: PlanRequest

    @property
    def blob(self) -> str:
        """What tells models apart."""
        return self.facts.key


def in_context(delivery: Delivery, plan: Plan, wanted: PlanRequest) -> Delivery:
    """``delivery`` of ``plan``, with the context if the rules set it: ``wanted`` is the load's request, without any."""
    num_ctx = plan.request.num_ctx
    return delivery if num_ctx is None or num_ctx == wanted.num_ctx else with_context(delivery, num_ctx)


class RuledPlans:
    """Makes plans. ``live``: the rigs that it is given tell what is free beside all that is loaded."""

    def __init__(self, *, catalog: Catalog, rules: RuleFile, settings: Settings, planner: Planner, live: bool = True) -> None:
        self._catalog = catalog
        self._rules = rules
        self._settings = settings
        self._planner = planner
        self.live = live
        self._tell = Once(log, kept=TOLD_KEPT)

    @property
    def by_name(self) -> bool:
        """Whether a rule goes by the names of models."""
        return bool(self._rules.current().by_name)

    def rule(self, model: str) -> Rule:
        """What holds for ``model`` now."""
        return self._rules.for_model(model)

    def stays(self, other: str, model: str) -> bool:
        """Whether the rules want ``other`` to remain loaded when ``model`` is loaded."""
        rules = self._rules.current()
        together = any(matches(name, other) for name in rules.together_with(model))
        return together or rules.rank(other) < rules.rank(model)

    async def beside(
        self, load: Load, rig: Rig, *, own: Held | None, others: Sequence[Held], loaded: Collection[str], by_options: bool = True
    ) -> Plan:
        """A plan on the GPUs as Ollama will find them: less ``own``, the same model loaded before, and less those of ``others``
        that it evicts. ``loaded`` are the blobs of all. ``by_options``: options say which GPU; else Ollama looks at all of them.

        The plan's request says which context it is for: another than the load's where the rules set it.
        """

        def there(*, evicted: bool) -> Rig:
            return rig_for(rig, own=own, others=others, evicted=evicted, live=self.live)

        evicted = not self._sets_context(load) and makes_room(load.facts.profile, there(evicted=False), load.request)
        plan = await self.on(load, there(evicted=evicted), loaded=loaded, by_options=by_options)
        if not others or not evicts(plan, plan.chosen_by_options if by_options else None):
            return plan
        gives_way = load.facts.is_embedding or any(held.stays for held in others)
        if by_options and gives_way and (gpu := beside_others(plan)) is not None:
            load = replace(load, request=replace(load.request, gpu=gpu, gpu_reason=BESIDE))
            return await self.on(load, there(evicted=evicted), loaded=loaded)
        if by_options and load.facts.is_embedding and plan.stock.fits and not evicts(plan, plan.stock):
            return revert(plan, plan.chosen_by_options, AT_A_COST)
        if any(held.stays for held in others) and makes_room(load.facts.profile, there(evicted=True), plan.request):
            # with the others gone that is still too little for Ollama: it unloads these too
            going = [replace(held, stays=False) for held in others]
            return await self.beside(load, rig, own=own, others=going, loaded=loaded, by_options=by_options)
        if evicted or all(held.stays for held in others):
            return plan
        roomier = await self.on(load, there(evicted=True), loaded=loaded, by_options=by_options)
        # without an option that says where, Ollama looks at what is free now, and unloads nobody
        return plan if by_options and roomier.unchanged_by_options else roomier

    async def on(self, load: Load, rig: Rig, *, loaded: Collection[str], by_options: bool = True) -> Plan:
        """A plan on ``rig`` as it is. Its reasons begin with the rules that it follows. Raises ``ModelError`` for a file that
        contradicts itself."""
        rig, rule = without_companions(rig, load.facts), self.rule(load.model)
        wanted = ruled(load.request, rig, rule)
        grouped = await self._with_group(load, wanted, rig, loaded, by_options)
        problems = [*doubts([rule], rig), *([APART] if grouped is None else [])]
        wanted = grouped or wanted
        if self._sets_context(load):
            wanted = await asyncio.to_thread(self._with_context, load, wanted, rig)
        with fitting_together():
            plan = await asyncio.to_thread(self._planner, load.facts.profile, rig, wanted)
        for problem in problems:
            self._tell(problem)
        return replace(plan, reasons=tuple(filter(None, (said_by(rule), *problems, *plan.reasons))))

    def _sets_context(self, load: Load) -> bool:
        """Whether neither client nor model sets the context, and the rules or ``LOPSIDED_CONTEXT`` do.

        An embedding model takes texts of its trained length; it gets another one only where a rule has the number.
        """
        said = self.rule(load.model).context or self._settings.context
        wanted = isinstance(said, int) or (said == "fit" and not load.facts.is_embedding)
        return wanted and not sets_context(load.options, load.facts)

    def _with_context(self, load: Load, wanted: PlanRequest, rig: Rig) -> PlanRequest:
        said, profile = self.rule(load.model).context, load.facts.profile
        if isinstance(said, int):
            return replace(wanted, num_ctx=min(said, profile.context_train or said))
        fitted, limit = fitted_context(profile, rig, wanted), self._settings.context_length
        return replace(wanted, num_ctx=min(fitted, limit or fitted)) if fitted else wanted

    async def _with_group(
        self, load: Load, wanted: PlanRequest, rig: Rig, loaded: Collection[str], by_options: bool
    ) -> PlanRequest | None:
        """``wanted`` with room for those of its group that are not loaded (the others hold theirs already); ``None``: no room."""
        members: list[Member] = []
        own = Member(profile=load.facts.profile, request=wanted)
        for name in self._rules.current().together_with(load.model):
            if matches(name, load.model):
                members.append(own)
                continue
            with suppress(LopsidedError):  # one that is not there needs no room
                facts = await self._catalog.facts(name)
                if facts.key not in loaded and not self.rule(name).off:
                    request = ruled(plan_request({}, facts, self._settings, wanted.era), rig, self.rule(name))
                    other = Load(model=name, facts=facts, options={}, request=request)
                    if self._sets_context(other):
                        request = await asyncio.to_thread(self._with_context, other, request, rig)
                    members.append(Member(profile=facts.profile, request=request))
        if len(members) < 2:
            return wanted
        found = await asyncio.to_thread(share, members, members.index(own), rig, self._planner, by_options=by_options)
        if found is None:
            return None
        kept = wanted.reserve_bytes or (0,) * len(rig.gpus)
        wanted = replace(wanted, reserve_bytes=tuple(map(sum, zip(kept, found.reserve_bytes, strict=True))))
        return wanted if wanted.gpu is not None or found.gpu is None else replace(wanted, gpu=found.gpu, gpu_reason=TOGETHER)
