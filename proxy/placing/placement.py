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
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from planner.hardware import Rig
from planner.plan import Plan, Planner, make_plan
from planner.request import Era, PlanRequest
from proxy.config.rulefile import RuleFile
from proxy.config.rules import Rule
from proxy.config.settings import Settings
from proxy.errors import GpuError, LopsidedError, ModelError, UpstreamError
from proxy.gpus import GpuSource
from proxy.gpus.static import StaticSource
from proxy.launcher.launches import MOST_CAREFUL, Launches
from proxy.models.catalog import Catalog, ModelFacts, full_name
from proxy.ollama.client import Loaded, Ollama
from proxy.ollama.endpoints import LoadRequest
from proxy.ollama.names import blob_name
from proxy.ollama.options import MAIN_GPU, Delivery, deliver, deliver_by_launcher, own_wish, stock
from proxy.placing.inforce import InForce, Ledger, file_name, held_bytes
from proxy.placing.running import Running, running
from proxy.placing.steady import REPLAN_S, due, said, same_runner, worth_reload
from proxy.plans.loading import asked_context, plan_request
from proxy.plans.room import Held
from proxy.plans.ruled import OFF, Load, RuledPlans, in_context
from proxy.statefile import StateFile
from proxy.v1.seen import SeenOnV1

PLAN_S = 10.0
"""Longest wait for a plan: facts of a model on a cold disk take seconds, then the request goes as it is."""

LOOK_S = 1.0
"""Seconds for which a model seen in ``/api/ps``, or just used, counts as loaded."""

FAILURE_KEPT_S = 3600.0
"""Seconds for which a plan that ran out of memory is remembered: until then the model gets the more careful one at once."""

NAMES_KEPT = 1024
"""Models whose facts are remembered by name, and lines of the log."""

log = logging.getLogger("lopsided.placement")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """The last delivery that ran out of memory, and how careful the next one is: 1 leaves a margin, 2 is stock."""

    careful: int
    delivery: Delivery
    at: float


@dataclass(eq=False, kw_only=True, slots=True)
class _Slot:
    """What is known about one blob. ``users`` are requests under way with its ``current`` placement."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    current: InForce | None = None
    users: int = 0
    seen_at: float = 0.0
    restarts: int = 0
    cut_at: float | None = None
    """Since when the current placement is known to have less context than planned, after a load that failed."""
    mended: bool = False
    """It was loaded anew for that reason, and not seen with the whole context since."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What one request gets. To be handed back to :meth:`Placements.done` when the request is over."""

    delivery: Delivery
    in_force: InForce | None = None
    request: LoadRequest | None = None


class Placements:
    """Decides what each request gets, and remembers it.

    ``gpus`` is ``None`` where there are none to be planned for: then everything passes unchanged. ``clock`` is monotonic, in
    seconds; ``restarts`` counts what looked like an end of Ollama, and with it of everything that was loaded.
    """

    def __init__(
        self,
        *,
        ollama: Ollama,
        catalog: Catalog,
        gpus: GpuSource | None,
        settings: Settings,
        planner: Planner = make_plan,
        clock: Callable[[], float] = time.monotonic,
        restarts: Callable[[], int] = lambda: 0,
        launches: Launches | None = None,
        rules: RuleFile | None = None,
    ) -> None:
        self._ollama = ollama
        self._catalog = catalog
        self._gpus = gpus
        self._live = not isinstance(gpus, StaticSource)  # what is written down does not change with what is loaded
        self._settings = settings
        self._plans = RuledPlans(
            catalog=catalog, rules=rules or RuleFile(None), settings=settings, planner=planner, live=self._live
        )
        self._clock = clock
        self._restarts = restarts
        self._launches = launches or Launches(clock)
        self._facts: OrderedDict[str, ModelFacts] = OrderedDict()
        self._slots: dict[str, _Slot] = {}
        self._failures: dict[tuple[str, int | None], _Failure] = {}
        self._on_v1 = SeenOnV1(catalog, clock)
        self._told: set[str] = set()
        self._reading: asyncio.Task[Rig] | None = None
        self._ledger = Ledger(StateFile(settings.state, file_name(settings.upstream)), self.in_force)
        self._taken_over: set[str] = set()

    def take_over(self) -> None:
        """Goes on with what was in force when the proxy ended last; each model's next request asks whether it still is."""
        for in_force in self._ledger.read():
            self._slots[in_force.blob] = _Slot(current=in_force, seen_at=-math.inf, restarts=self._restarts())
            self._taken_over.add(in_force.blob)

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
        except ModelError as error:
            return self._as_it_is(request.model, str(error))
        except LopsidedError as error:
            reason = str(error)
        except TimeoutError:
            reason = f"no plan within {PLAN_S:g} s"
        except Exception as error:
            log.debug("planning failed", exc_info=error)
            reason = f"planning failed: {type(error).__name__}: {error}"
        return self._known(request, certain=False) or self._as_it_is(request.model, reason)

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
        if self._launches.failed(blob_name(failed.blob)):  # also where the launcher was first seen by this very load
            return await self._again(decision, decision.request)  # the same request, and another answer to the launcher
        if not failed.delivery.options:
            return None
        slot = self._slots[failed.blob]
        before = self._failure(failed.blob, failed.num_ctx)
        if before is None or before.careful <= failed.careful:  # the first of those that waited for this load
            self._failures[(failed.blob, failed.num_ctx)] = _Failure(
                careful=failed.careful + 1, delivery=failed.delivery, at=self._clock()
            )
            log.warning("%s: %s ran out of memory", failed.model, failed.delivery.text)
        if slot.current is failed:
            slot.current = None
        return await self._again(decision, decision.request)

    async def _again(self, decision: Decision, request: LoadRequest) -> Decision:
        instead = await self.decide(request)
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
        facts = await self._catalog.facts(model)
        era = await self._ollama.era()
        options = {"num_ctx": num_ctx}
        wanted = self._wanted(options, facts, era)
        loaded = await self._by_blob(await self._ollama.loaded())
        plan = await self._plan(Load(model=model, facts=facts, options=options, request=wanted), loaded)
        return plan, stock(OFF) if self._plans.rule(model).off else self._delivery(plan, era, wanted)

    def running(self, placed: InForce) -> Running | None:
        """What runs of ``placed``, and where its plan says; ``None`` where that is not known."""
        return running(placed, self._launches)

    async def look(self, blob: str) -> tuple[Rig | None, int | None]:
        """The rig as it is now, ``None`` where nothing watches it, and what ``blob`` takes on all GPUs, ``None`` if not loaded.

        Raises ``LopsidedError``.
        """
        entry = (await self._by_blob(await self._ollama.loaded())).get(blob)
        return await self.rig() if self._live else None, entry.vram_bytes if entry else None

    @property
    def watches(self) -> bool:
        """Whether the rig's free bytes follow what is loaded."""
        return self._live

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

    async def rig(self) -> Rig:
        """The GPUs as they are now. Raises ``GpuError``."""
        if self._gpus is None:
            raise GpuError("no source of GPUs")
        if self._reading is None or self._reading.done():  # a driver that hangs takes one thread, not all of them
            self._reading = asyncio.create_task(asyncio.to_thread(self._gpus.rig), name="read GPUs")
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._reading)

    # How it is decided

    async def _decide(self, request: LoadRequest) -> Decision:
        facts = await self._facts_of(request.model)
        blob, rule = facts.blob or facts.digest, self._plans.rule(request.model)
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
        slot = self._slots.setdefault(blob, _Slot())
        num_ctx = asked_context(request.options, facts, self._settings)
        if not self._holds(slot, num_ctx, rule):
            async with slot.lock:
                if not self._holds(slot, num_ctx, rule):
                    restarts, before = self._restarts(), slot.current
                    slot.current = await self._renewed(slot, request, facts, blob, num_ctx)
                    slot.seen_at, slot.restarts = self._clock(), restarts
                    if slot.current is not before:
                        await self._ledger.keep()
        if slot.current is None:  # it failed for memory in between
            return await self._decide(request)
        return self._use(slot, slot.current, request)

    def _known(self, request: LoadRequest, *, certain: bool = True) -> Decision | None:
        """The decision where it takes no question to anybody: all but the first request in a while.

        Not ``certain``: questions have failed, and what was in force last is the best that can be known.
        """
        facts = self._facts.get(full_name(request.model))
        slot = self._slots.get(facts.blob or facts.digest) if facts else None
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

    @staticmethod
    def _use(slot: _Slot, in_force: InForce, request: LoadRequest) -> Decision:
        slot.users += 1
        return Decision(delivery=in_force.delivery, in_force=in_force, request=request)

    def _holds(self, slot: _Slot, num_ctx: int | None, rule: Rule) -> bool:
        """Whether the slot's placement is in force beyond doubt, without asking anybody; during a request it always is."""
        current = slot.current
        if current is None or current.num_ctx != num_ctx:
            return False
        if slot.users > 0:
            return True
        recent = self._clock() - slot.seen_at < LOOK_S and slot.restarts == self._restarts()
        return recent and current.rule in (None, rule) and not due(current, self._clock())

    async def _renewed(self, slot: _Slot, request: LoadRequest, facts: ModelFacts, blob: str, num_ctx: int | None) -> InForce:
        """The placement to use from now on: the current one while Ollama still has the model, else a new one."""
        current, rule = slot.current, self._plans.rule(request.model)
        ruled_so = current is not None and current.rule in (None, rule)
        unchanged = current if ruled_so and current is not None and current.num_ctx == num_ctx else None
        try:
            loaded, known = await self._by_blob(await self._ollama.loaded()), True
            self._forget_ended(loaded, kept=blob)
        except UpstreamError:
            loaded, known = {}, False
            if unchanged:
                return unchanged
        if unchanged and blob in loaded:
            if not await self._mends_context(slot, unchanged, request, facts, loaded):
                return await self._still(unchanged, request, facts, loaded)
            loaded = {other: entry for other, entry in loaded.items() if other != blob}
        slot.cut_at = None
        failure = self._failure(blob, num_ctx)
        careful = failure.careful if failure else 0
        plan, delivery = None, stock("the plans before ran out of memory", without=MAIN_GPU)
        if rule.off:
            delivery = stock(OFF)
        elif careful < 2:
            plan, delivery = await self._new_plan(request, facts, loaded, careful=careful)
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
        plan, delivery = await self._new_plan(request, facts, loaded, careful=current.careful)
        if plan is None or plan.chosen.settings.num_ctx != current.planned_ctx or self._failure(current.blob, current.num_ctx):
            return again
        if delivery.by_launcher or not worth_reload(current.plan, plan):
            return again
        plan, delivery = said(plan, delivery)
        if same_runner(delivery, current.delivery):
            return again
        log.info("%s: %s, in place of %s", current.model, delivery.text, current.delivery.text)
        return replace(again, plan=plan, delivery=delivery, held_bytes=held_bytes(plan, delivery))

    async def _mends_context(
        self, slot: _Slot, current: InForce, request: LoadRequest, facts: ModelFacts, loaded: Mapping[str, Loaded]
    ) -> bool:
        """Unloads ``current``, which is idle, where a failed load cost it context and a plan holds the whole of it by now.

        Ollama itself tries again with a smaller context where nobody sets one. Not before ``REPLAN_S``, and once.
        """
        entry, planned_ctx = loaded[current.blob], current.planned_ctx or 0
        if not 0 < entry.context_length < planned_ctx:
            slot.cut_at, slot.mended = None, False
            return False
        level, now = self._launches.level(blob_name(current.blob)), self._clock()
        if slot.cut_at is None and level:
            slot.cut_at = now
            log.warning("%s: loaded with %d tokens of context, not %d", current.model, entry.context_length, planned_ctx)
        if slot.cut_at is None or slot.mended or now - slot.cut_at < REPLAN_S or level >= MOST_CAREFUL or entry.pinned:
            return False
        plan, delivery = await self._new_plan(request, facts, loaded, careful=1)
        if plan is None or not delivery.by_launcher or plan.chosen.settings.num_ctx < planned_ctx:
            return False
        if plan.chosen.placement.cpu_layers > (current.plan.chosen.placement.cpu_layers if current.plan else 0):
            return False
        slot.mended = True
        log.info("%s is loaded anew: there is room for %d tokens of context again", current.model, planned_ctx)
        try:
            await self._ollama.unload(request.model)
        except LopsidedError as error:
            log.warning("%s stays loaded: %s", current.model, error)
            return False
        return True

    def _forget_ended(self, loaded: Collection[str], *, kept: str) -> None:
        """Drops what was taken over of models that are not ``loaded`` any more, once that is known."""
        for blob in self._taken_over - {kept, *loaded}:
            if not self._slots[blob].users:
                self._slots[blob].current = None
        self._taken_over.clear()

    async def _new_plan(
        self, request: LoadRequest, facts: ModelFacts, loaded: Mapping[str, Loaded], *, careful: int
    ) -> tuple[Plan | None, Delivery]:
        """A plan and its delivery; without a plan, stock: which then stays in force, as any other placement does."""
        try:
            async with asyncio.timeout(PLAN_S / 2):
                era = await self._ollama.era()
                wanted = self._wanted(request.options, facts, era, careful=careful > 0)
                load = Load(model=request.model, facts=facts, options=request.options, request=wanted)
                plan = await self._plan(load, loaded)
        except LopsidedError as error:
            reason = str(error)
        except TimeoutError:
            reason = f"no plan within {PLAN_S / 2:g} s"
        except Exception as error:
            log.debug("planning failed", exc_info=error)
            reason = f"planning failed: {type(error).__name__}: {error}"
        else:
            return plan, self._delivery(plan, era, wanted)
        self._tell(f"{full_name(request.model)} passes unchanged: {reason}")
        return None, stock(reason)

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
        return await self._plans.beside(load, await self.rig(), own=own, others=others, loaded=loaded, by_options=by_options)

    def _held(self, blob: str, entry: Loaded, model: str) -> Held:
        """A loaded model, as it stands to ``model``, which is about to be loaded."""
        slot = self._slots.get(blob)
        busy = slot is not None and slot.users > 0
        return Held(
            vram_bytes=entry.vram_bytes,
            held_bytes=slot.current.held_bytes if slot and slot.current else None,
            stays=busy or entry.pinned or self._plans.stays(entry.name, model),
        )

    def _failure(self, blob: str, num_ctx: int | None) -> _Failure | None:
        failure = self._failures.get((blob, num_ctx))
        return failure if failure and self._clock() - failure.at <= FAILURE_KEPT_S else None

    def _as_it_is(self, model: str, reason: str) -> Decision:
        self._tell(f"{full_name(model)} passes unchanged: {reason}")
        return Decision(delivery=stock(reason))

    def _tell(self, text: str) -> None:
        """Logs ``text`` once."""
        if text not in self._told and len(self._told) < NAMES_KEPT:
            self._told.add(text)
            log.warning("%s", text)

    # What is asked of Ollama and the GPUs

    async def _facts_of(self, model: str) -> ModelFacts:
        facts = await self._catalog.facts(model)
        self._facts[full_name(model)] = facts
        while len(self._facts) > NAMES_KEPT:
            self._facts.popitem(last=False)
        return facts

    async def _by_blob(self, loaded: tuple[Loaded, ...]) -> dict[str, Loaded]:
        """The loaded models by their blobs, whatever their names; those that can't be planned for are left out."""
        found = {}
        for entry in loaded:
            with suppress(ModelError):
                facts = await self._catalog.facts(entry.name)
                found[facts.blob or facts.digest] = entry
        return found
