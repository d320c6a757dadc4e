"""The plans in force: one per loaded model, made once, the same for every request until the model is unloaded.

Options that change from one request to the next make Ollama reload the model. So a plan is made when a model is about to be
loaded and then stays, whatever happens to free memory meanwhile; ``/api/ps`` says when it has ended. Models are told apart by
their blob, since Ollama lets all names of one blob share a runner. Whatever goes wrong here costs a request its placement,
never its answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from planner.plan import Plan
from proxy.config.rules import Rule
from proxy.config.settings import Settings
from proxy.errors import LopsidedError, ModelError, UpstreamError
from proxy.gpus.reader import RigReader
from proxy.launcher.launches import Launches
from proxy.models.catalog import MODELS_KEPT, Catalog, ModelFacts, full_name
from proxy.ollama.client import Loaded, Ollama
from proxy.ollama.endpoints import LoadRequest
from proxy.ollama.names import blob_name
from proxy.ollama.options import MAIN_GPU, Delivery, own_wish, stock
from proxy.placing.drafts import Drafts, why_not
from proxy.placing.inforce import InForce, Ledger, file_name, held_bytes
from proxy.placing.running import Running, running
from proxy.placing.shrunk import restores
from proxy.placing.slots import Failures, Slot
from proxy.placing.steady import due, said, same_runner, worth_reload
from proxy.plans.loading import asked_context
from proxy.plans.ruled import OFF, RuledPlans
from proxy.statefile import StateFile
from proxy.v1.seen import SeenOnV1

PLAN_S = 10.0
"""Longest wait for a plan: facts of a model on a cold disk take seconds, then the request goes as it is."""

LOOK_S = 1.0
"""Seconds for which a model seen in ``/api/ps``, or just used, counts as loaded."""

log = logging.getLogger("lopsided.placement")


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What one request gets. To be handed back to :meth:`Placements.done` when the request is over.

    ``level`` is how careful the launcher's answers for the model had become by then.
    """

    delivery: Delivery
    in_force: InForce | None = None
    request: LoadRequest | None = None
    level: int = 0


class Placements:
    """Decides what each request gets, and remembers it.

    Where ``gpus`` has none to be planned for, everything passes unchanged. ``clock`` is monotonic, in seconds; ``restarts``
    counts what looked like an end of Ollama, and with it of everything that was loaded.
    """

    def __init__(
        self,
        *,
        ollama: Ollama,
        catalog: Catalog,
        gpus: RigReader,
        settings: Settings,
        plans: RuledPlans,
        clock: Callable[[], float] = time.monotonic,
        restarts: Callable[[], int] = lambda: 0,
        launches: Launches | None = None,
    ) -> None:
        self._ollama = ollama
        self._catalog = catalog
        self._settings = settings
        self._plans = plans
        self._clock = clock
        self._restarts = restarts
        self._launches = launches or Launches(clock)
        self._slots: dict[str, Slot] = {}
        self._failures = Failures(clock)
        self._drafts = Drafts(
            ollama=ollama,
            catalog=catalog,
            gpus=gpus,
            settings=settings,
            plans=plans,
            launches=self._launches,
            slots=self._slots,
        )
        self._facts: OrderedDict[str, ModelFacts] = OrderedDict()
        self._on_v1 = SeenOnV1(catalog, clock)
        file = StateFile(settings.state, file_name(settings.upstream))
        self._ledger = Ledger(file, self.in_force, lambda: self._launches.spread)
        self._taken_over: set[str] = set()

    def take_over(self) -> None:
        """Goes on with what was in force when the proxy ended last; each model's next request asks whether it still is."""
        for in_force in self._ledger.read():
            self._slots[in_force.blob] = Slot(current=in_force, seen_at=-math.inf, restarts=self._restarts())
            self._taken_over.add(in_force.blob)
        self._launches.spread = self._ledger.spread  # the launcher alone could tell, and may be gone

    # What requests do

    async def decide(self, request: LoadRequest) -> Decision:
        """What ``request`` gets; never raises, whatever is missing."""
        if request.unloads:
            return Decision(delivery=stock("unloads"))
        try:
            if known := self._known(request):
                return known
            async with asyncio.timeout(PLAN_S):
                return await self._decide(request)
        except Exception as error:  # noqa: BLE001 - why_not logs what nobody expected
            reason = why_not(error, PLAN_S)
            known = None if isinstance(error, ModelError) else self._known(request, certain=False)
            return known or Decision(delivery=self._drafts.none(request.model, reason))

    def done(self, decision: Decision, *, loaded: bool, left: bool = False) -> None:
        """The request is over; ``loaded`` where Ollama answered it, so that the model was in memory, ``left`` where its client
        did not wait for that."""
        in_force = decision.in_force
        if in_force is not None and (slot := self._slots.get(in_force.blob)):
            slot.users -= 1
            if left and not loaded and not slot.users:
                self._launches.left(blob_name(in_force.blob))
            if loaded and slot.current is in_force:
                slot.seen_at = self._clock()
            if loaded and not self._launches.answered(blob_name(in_force.blob)):
                log.warning("%s was loaded past the launcher: plans go out as request options", in_force.model)

    async def after_failure(self, decision: Decision) -> Decision | None:
        """What to send instead, once ``decision`` has run out of memory; ``None`` where it was stock's own placement."""
        failed = decision.in_force
        if failed is None or decision.request is None:
            return None
        blob = blob_name(failed.blob)
        # the launcher's next answer is another: also where it was first seen by this very load, or by another that failed
        answers_anew = self._launches.failed(blob) or self._launches.level(blob) > decision.level
        if not failed.delivery.options and not answers_anew:
            return None
        if failed.delivery.options and not (failed.delivery.by_launcher and answers_anew):  # a card that options name stays so
            if self._failures.add(failed):
                log.warning("%s: %s ran out of memory", failed.model, failed.delivery.text)
            if (slot := self._slots[failed.blob]).current is failed:
                slot.current = None
        instead = await self.decide(decision.request)
        self.done(decision, loaded=False)  # not before: a client that leaves meanwhile has it called for this decision
        return instead

    def seen_on_v1(self, model: str) -> None:
        """A request that can't have its placement loads ``model``: it is left alone, or each change of client would reload it."""
        self._on_v1.add(model)

    def store_changed(self) -> None:
        """Names may stand for other models now (pull, create, copy, delete)."""
        self._catalog.forget()
        self._facts.clear()

    # What people ask

    async def preview(self, model: str, num_ctx: int | None) -> tuple[Plan, Delivery]:
        """The plan that ``model`` would get now, without any effect. Raises ``LopsidedError``."""
        return await self._drafts.preview(model, num_ctx)

    async def vram_bytes(self, blob: str) -> int | None:
        """What Ollama says that ``blob`` takes on all GPUs, ``None`` where it is not loaded. Raises ``UpstreamError``."""
        entry = (await self._drafts.loaded()).get(blob)
        return entry.vram_bytes if entry else None

    def running(self, placed: InForce) -> Running | None:
        """What runs of ``placed``, and where its plan says; ``None`` where that is not known."""
        return running(placed, self._launches)

    def take_back(self, blob: str) -> None:
        """The plan of ``blob`` turned out slower than stock: the next request that finds it idle gets another."""
        slot = self._slots.get(blob)
        if slot is not None and not slot.users:
            slot.current = None

    def in_force(self) -> tuple[InForce, ...]:
        """Every placement that was decided and has not ended as far as is known."""
        return tuple(slot.current for slot in self._slots.values() if slot.current is not None)

    def injected(self, blob: str) -> Mapping[str, object]:
        """The options that go into the requests for the file named ``blob`` now."""
        return next((now.delivery.options for now in self.in_force() if blob_name(now.blob) == blob), {})

    # How it is decided

    async def _decide(self, request: LoadRequest) -> Decision:
        facts = await self._facts_of(request.model)
        blob, rule = facts.key, self._plans.rule(request.model)
        wish = own_wish(request.options, facts.defaults)
        if wish is not None and rule.off:
            return Decision(delivery=stock(OFF))
        if wish is not None:
            without = MAIN_GPU if request.options.get("main_gpu") == 0 else frozenset()
            return Decision(delivery=stock(wish, without=without))
        if not rule.off and not self._launches.places_all and await self._on_v1.has(blob):
            if (slot := self._slots.get(blob)) is not None:
                slot.current = None
            return Decision(delivery=stock("seen on /v1", without=MAIN_GPU))
        slot = self._slots.setdefault(blob, Slot())
        num_ctx = asked_context(request.options, facts, self._settings)
        if not self._holds(slot, num_ctx, rule):
            async with slot.lock:
                if not self._holds(slot, num_ctx, rule):
                    restarts, before = self._restarts(), slot.current
                    slot.current = await self._renewed(slot, request, facts, num_ctx)
                    slot.seen_at, slot.restarts = self._clock(), restarts
                    self._forget_oldest()
                    if slot.current is not before or self._ledger.spread != self._launches.spread:
                        await self._ledger.keep()
        if slot.current is None:  # it failed for memory in between
            return await self._decide(request)
        return self._use(slot, slot.current, request)

    def _known(self, request: LoadRequest, *, certain: bool = True) -> Decision | None:
        """The decision where it takes no question to anybody: all but the first request in a while.

        Not ``certain``: questions have failed, and what was in force last is the best that can be known.
        """
        facts = self._facts.get(full_name(request.model))
        slot = self._slots.get(facts.key) if facts else None
        if facts is None or slot is None or slot.current is None:
            return None
        if self._on_v1.unknown and (certain or self._on_v1.names(request.model)):
            return None
        num_ctx, rule = asked_context(request.options, facts, self._settings), self._plans.rule(request.model)
        if slot.current.num_ctx != num_ctx or (certain and not self._holds(slot, num_ctx, rule)):
            return None
        if own_wish(request.options, facts.defaults) is not None:
            return None
        return self._use(slot, slot.current, request)

    def _use(self, slot: Slot, in_force: InForce, request: LoadRequest) -> Decision:
        slot.users += 1
        level = self._launches.level(blob_name(in_force.blob))
        return Decision(delivery=in_force.delivery, in_force=in_force, request=request, level=level)

    def _holds(self, slot: Slot, num_ctx: int | None, rule: Rule) -> bool:
        """Whether the slot's placement is in force beyond doubt, without asking anybody; during a request it always is."""
        current = slot.current
        if current is None or current.num_ctx != num_ctx:
            return False
        if slot.users > 0:
            return True
        recent = self._clock() - slot.seen_at < LOOK_S and slot.restarts == self._restarts()
        return recent and current.rule in (None, rule) and not due(current, self._clock())

    async def _renewed(self, slot: Slot, request: LoadRequest, facts: ModelFacts, num_ctx: int | None) -> InForce:
        """The placement to use from now on: the current one while Ollama still has the model, else a new one."""
        blob, current, rule = facts.key, slot.current, self._plans.rule(request.model)
        ruled_so = current is not None and current.rule in (None, rule)
        unchanged = current if ruled_so and current is not None and current.num_ctx == num_ctx else None
        try:
            loaded, known = await self._drafts.loaded(), True
            self._forget_ended(loaded, kept=blob)
        except UpstreamError:
            loaded, known = {}, False
            if unchanged:
                return unchanged
        if unchanged and blob in loaded:
            if not await self._mends_context(slot, unchanged, request, facts, loaded):
                return await self._still(unchanged, request, facts, loaded)
            loaded = {other: entry for other, entry in loaded.items() if other != blob}
        slot.shrunk.since = None
        failure = self._failures.last(blob, num_ctx)
        careful = failure.careful if failure else 0
        plan, delivery = None, stock("the plans before ran out of memory", without=MAIN_GPU)
        if rule.off:
            delivery = stock(OFF)
        elif careful < 2:
            plan, delivery = await self._drafts.make(request, facts, loaded, careful=careful)
            if failure and delivery.options == failure.delivery.options:
                plan, careful, delivery = None, 2, stock("the same plan ran out of memory before", without=MAIN_GPU)
        planned_ctx, held = plan.chosen.settings.num_ctx if plan else None, held_bytes(plan, delivery)
        if plan and current and ruled_so and blob in loaded and planned_ctx == current.planned_ctx:
            # the same context, asked for in other words: nothing to reload
            plan, delivery, held = current.plan, current.delivery, current.held_bytes
        self._launches.called(blob_name(blob), request.model)
        if delivery.by_launcher and blob not in loaded and known:
            self._launches.expect(blob_name(blob))
        log.info("%s: %s", full_name(request.model), delivery.text)
        return InForce(
            model=full_name(request.model),
            blob=blob,
            digest=facts.digest,
            num_ctx=num_ctx,
            delivery=delivery,
            careful=careful,
            plan=plan,
            planned_ctx=planned_ctx,
            held_bytes=held,
            rule=rule,
            decided_at=self._clock(),
        )

    async def _still(self, current: InForce, request: LoadRequest, facts: ModelFacts, loaded: Mapping[str, Loaded]) -> InForce:
        """``current``, which is loaded and idle; or what is so much better by now that it is worth loading the model anew."""
        if current.plan is None or not due(current, self._clock()):
            return current
        again = replace(current, decided_at=self._clock())
        plan, delivery = await self._drafts.make(request, facts, loaded, careful=current.careful)
        if plan is None or plan.chosen.settings.num_ctx != current.planned_ctx or delivery.by_launcher:
            return again
        if self._failures.last(current.blob, current.num_ctx) or not worth_reload(current.plan, plan):
            return again
        delivery = said(plan, delivery)
        if same_runner(delivery, current.delivery):
            return again
        log.info("%s: %s, in place of %s", current.model, delivery.text, current.delivery.text)
        return replace(again, plan=plan, delivery=delivery, held_bytes=held_bytes(plan, delivery))

    async def _mends_context(
        self, slot: Slot, current: InForce, request: LoadRequest, facts: ModelFacts, loaded: Mapping[str, Loaded]
    ) -> bool:
        """Unloads ``current``, which is idle, where a failed load cost it context and a plan holds the whole of it by now."""
        level = self._launches.level(blob_name(current.blob))
        if not slot.shrunk.due(current, loaded[current.blob], level=level, now_s=self._clock()):
            return False
        plan, delivery = await self._drafts.make(request, facts, loaded, careful=1)
        if plan is None or not restores(current, plan, delivery):
            return False
        slot.shrunk.mended = True
        log.info("%s is loaded anew: there is room for %d tokens of context again", current.model, current.planned_ctx)
        try:
            await self._ollama.unload(request.model)
        except LopsidedError as error:
            log.warning("%s stays loaded: %s", current.model, error)
            return False
        return True

    def _forget_oldest(self) -> None:
        """Keeps ``MODELS_KEPT`` placements, those of requests under way and what was used last: each holds its plan."""
        idle = sorted((slot for slot in self._slots.values() if slot.current and not slot.users), key=lambda slot: slot.seen_at)
        for slot in idle[:-MODELS_KEPT]:
            slot.current = None

    def _forget_ended(self, loaded: Collection[str], *, kept: str) -> None:
        """Drops what was taken over of models that are not ``loaded`` any more, once that is known."""
        for blob in self._taken_over - {kept, *loaded}:
            if not self._slots[blob].users:
                self._slots[blob].current = None
        self._taken_over.clear()

    async def _facts_of(self, model: str) -> ModelFacts:
        facts = await self._catalog.facts(model)
        self._facts[full_name(model)] = facts
        while len(self._facts) > MODELS_KEPT:
            self._facts.popitem(last=False)
        return facts
