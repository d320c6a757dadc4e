"""Learning from traffic: what each finished answer says about the cards goes into the next plans.

An answer counts where nothing else that passes through here ran on its cards meanwhile, and where Ollama and the driver say
that the model lies where its plan says. Its prompt counts only if llama-server's prompt cache cannot have known it: Ollama counts
cached tokens with the others, but not their time. Nothing here ever costs a request more than the copy of its last bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from planner.calibration import LEAST_DECODE_TOKENS, LEAST_PROMPT_TOKENS
from planner.hardware import Rig
from planner.observation import observe
from planner.plan import Plan, Planner, revert
from planner.profile import ModelProfile
from planner.request import Candidate, PlanRequest
from planner.speed import decode_seconds, gpu_rates, host_rates, model_work, work_at
from planner.verdict import is_slower
from proxy.errors import LopsidedError
from proxy.gpus.reader import RigReader
from proxy.learning.measurements import Measurement, Measurements, Place
from proxy.learning.verify import misplaced
from proxy.ollama.answers import Counters, Tail
from proxy.ollama.endpoints import LoadRequest
from proxy.placing.inforce import InForce
from proxy.placing.placement import Decision, Placements
from proxy.placing.running import Running

SAVE_S = 5.0
"""Seconds that the state file may lag behind."""

LEARN_PAUSE_S = 0.5
"""Seconds between two answers that are taken in: one more says next to nothing, and each holds up the streams for a moment."""

HEARD_KEPT = 16
"""Answers that wait to be taken in; the oldest give way."""

PROMPT_START_BYTES = 128
"""Of a prompt, by which it is known again: shorter beginnings in common are too short to matter."""

PROMPTS_KEPT = 1024
"""Beginnings of prompts that count as known to some cache; llama-server keeps far fewer."""

SPEED_FIELDS = ("predicted_tokens_per_s", "calibrated", "measured_tokens_per_s", "stock_tokens_per_s", "reverted")
"""What ``GET /lopsided/models`` says of the speed of a model: all ``null`` where nothing is known of where it runs."""

Objective = Literal["auto", "decode", "prefill", "balanced"]

log = logging.getLogger("lopsided.calibration")


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedPlanner:
    """``planner`` with what was measured: rates, the usual turn, and plans taken back that turned out slower than stock."""

    planner: Planner
    measurements: Measurements
    objective: Objective

    def __call__(self, profile: ModelProfile, rig: Rig, request: PlanRequest) -> Plan:
        """The plan of ``profile``. May read the state file."""
        calibration = self.measurements.calibration(profile, rig)
        objective = (self.measurements.turn(profile) or "decode") if self.objective == "auto" else self.objective
        plan = self.planner(profile, rig, replace(request, calibration=calibration, objective=objective))
        for candidate in dict.fromkeys((plan.chosen, plan.chosen_by_options)):
            if reason := self.loss(plan, candidate):
                plan = revert(plan, candidate, reason)
        return plan

    def loss(self, plan: Plan, candidate: Candidate) -> str | None:
        """By how much ``candidate`` was measured slower than stock, in words; ``None`` where it was not.

        A boost or a GPU that was asked for is a wish, not a prediction, and a stock that does not fit is none to go back to.
        """
        wished = plan.request.boost is not None or candidate.placement.order == (plan.request.gpu,)
        if candidate == plan.stock or wished or not plan.stock.fits:
            return None
        ours, stock = (self.measurements.speeds(place_of(plan, one)) for one in (candidate, plan.stock))
        if not is_slower(ours, stock):
            return None
        return f"measured {median(ours):.1f} tok/s, stock {median(stock):.1f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """An answer's counters, whether no cache can have known its prompt, and whether the model is where its plan says."""

    counters: Counters
    fresh_prompt: bool
    placed: bool = False

    @property
    def written_tokens(self) -> int:
        """Tokens that ``eval_s`` spans."""
        return self.counters.eval_tokens - 1

    @property
    def tells_rates(self) -> bool:
        """It is long enough."""
        prompt_tokens = self.counters.prompt_tokens if self.fresh_prompt else 0
        return self.written_tokens >= LEAST_DECODE_TOKENS or prompt_tokens >= LEAST_PROMPT_TOKENS


@dataclass(eq=False, kw_only=True, slots=True)
class Watch:
    """One request under way. ``devices``: the UUIDs that it uses, once they matter; ``None`` where that is not known."""

    tail: Tail = field(default_factory=Tail)
    placed: InForce | None = None
    devices: frozenset[str] | None = None
    fresh_prompt: bool = False
    alone: bool = True


class Calibrator:
    """Watches requests and keeps what their answers say, unless it is ``off``."""

    def __init__(
        self,
        measurements: Measurements,
        planner: LearnedPlanner,
        placements: Placements,
        gpus: RigReader,
        *,
        off: bool = False,
    ) -> None:
        self.measurements = measurements
        self._off = off
        self._planner = planner
        self._placements = placements
        self._gpus = gpus
        self._active: set[Watch] = set()
        self._prompts: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._verified: OrderedDict[str, tuple[Plan, str | None]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard: deque[tuple[Watch, Running, Counters]] = deque(maxlen=HEARD_KEPT)
        self._learning = False
        self._saving = False

    def begin(self, decision: Decision | None = None, request: LoadRequest | None = None) -> Watch:
        """A request goes out, placed by ``decision``; without one, somewhere."""
        watch = Watch(placed=decision.in_force if decision else None)
        if watch.placed is not None and request is not None:
            watch.fresh_prompt = self._is_fresh(watch.placed.blob, request)
        for other in self._active:
            if (watch.alone or other.alone) and self._may_meet(watch, other):
                watch.alone = other.alone = False
        self._active.add(watch)
        return watch

    def end(self, watch: Watch) -> None:
        """It is over, whatever came of it."""
        self._active.discard(watch)
        if self._off or not watch.alone or watch.placed is None or (counters := watch.tail.counters()) is None:
            return
        if (model := self._placements.running(watch.placed)) is not None:  # the launcher has been asked by now
            self._heard.append((watch, model, counters))
            if not self._learning:
                self._learning = True
                self._start(self._learn(), "learn")

    def speeds(self, placed: InForce) -> dict[str, Any]:
        """Tokens per second of answers, as predicted and as measured, for ``GET /lopsided/models``. May read the state file."""
        model = self._placements.running(placed)
        if model is None:
            return dict.fromkeys(SPEED_FIELDS)
        measured, stock = (
            self.measurements.speeds(place_of(model.plan, candidate)) for candidate in (model.candidate, model.plan.stock)
        )
        values = (
            model.candidate.decode_tokens_per_s,
            model.candidate.calibrated,
            median(measured) if measured else None,
            median(stock) if stock else None,
            model.plan.reverted or None,
        )
        return dict(zip(SPEED_FIELDS, values, strict=True))

    async def aclose(self) -> None:
        """Writes what was taken in and is not written yet; up to ``HEARD_KEPT`` answers that still wait are lost."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.measurements.save)

    def _may_meet(self, one: Watch, other: Watch) -> bool:
        """Whether they may use the same card."""
        ours, theirs = self._devices(one), self._devices(other)
        return ours is None or theirs is None or not ours.isdisjoint(theirs)

    def _devices(self, watch: Watch) -> frozenset[str] | None:
        if watch.devices is None and watch.placed is not None and (model := self._placements.running(watch.placed)) is not None:
            placement = model.candidate.placement
            if placement.kind in ("solo", "split"):  # others use the CPU too
                watch.devices = frozenset(model.plan.rig.gpus[gpu].uuid for gpu in placement.order)
        return watch.devices

    def _is_fresh(self, blob: str, request: LoadRequest) -> bool:
        """Whether no prompt of this model began as this one does; from now on, one did."""
        if (start := prompt_start(request)) is None:
            return False
        key = (blob, start)
        known = key in self._prompts
        self._prompts[key] = None
        self._prompts.move_to_end(key)
        while len(self._prompts) > PROMPTS_KEPT:
            self._prompts.popitem(last=False)
        return not known

    async def _learn(self) -> None:
        """Takes in what was heard, with pauses: many short answers in a row teach little more than a few."""
        try:
            while self._heard:
                await self._keep(*self._heard.popleft())
                await asyncio.sleep(LEARN_PAUSE_S)
        finally:
            self._learning = False

    async def _keep(self, watch: Watch, model: Running, counters: Counters) -> None:
        heard = Heard(counters=counters, fresh_prompt=watch.fresh_prompt)
        if heard.tells_rates:
            try:
                wrong = await self._misplaced(model)
            except LopsidedError as error:
                wrong = str(error)
            heard = replace(heard, placed=wrong is None)
        lost = await asyncio.to_thread(self._add, model, heard)
        if lost is not None:
            log.warning("%s: %s; from its next load on it goes where stock puts it", model.name, lost)
            self._placements.take_back(model.blob)
        if not self._saving:
            self._saving = True
            self._start(self._save(), "save measurements")

    def _add(self, model: Running, heard: Heard) -> str | None:
        """Takes the answer in; says what the plan is found to lose by it, the first time that it is."""
        before = self._planner.loss(model.plan, model.candidate)
        self.measurements.add(measure(model.plan, model.candidate, heard))
        return None if before else self._planner.loss(model.plan, model.candidate)

    async def _misplaced(self, model: Running) -> str | None:
        """Asked once for each load."""
        plan, wrong = self._verified.get(model.blob, (None, None))
        if plan is not model.plan:  # made anew for each load
            vram_bytes = await self._placements.vram_bytes(model.blob)
            wrong = "it is not loaded any more"
            if vram_bytes is not None:
                wrong = misplaced(model.candidate, model.plan.rig, await self._gpus.watched(), vram_bytes)
                if wrong:
                    log.warning("%s is not where its plan has it: %s. Its answers teach nothing", model.name, wrong)
                self._verified[model.blob] = (model.plan, wrong)
                while len(self._verified) > PROMPTS_KEPT:
                    self._verified.popitem(last=False)
        return wrong

    async def _save(self) -> None:
        await asyncio.sleep(SAVE_S)
        self._saving = False
        await asyncio.to_thread(self.measurements.save)

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.debug("%s failed", task.get_name(), exc_info=error)


def place_of(plan: Plan, candidate: Candidate) -> Place:
    """Where ``candidate`` puts the plan's model."""
    return Place.of(plan.profile, plan.rig, candidate.settings.num_ctx, candidate.placement)


def measure(plan: Plan, candidate: Candidate, heard: Heard) -> Measurement:
    """What an answer of ``candidate`` says."""
    counters = heard.counters
    context_tokens = max(counters.prompt_tokens + counters.eval_tokens // 2, 1)
    speed = None
    if heard.placed and heard.written_tokens >= LEAST_DECODE_TOKENS:
        speed = heard.written_tokens / counters.eval_s * _slowed(plan, candidate, context_tokens)
    return Measurement(
        place=place_of(plan, candidate),
        observation=observe(
            plan.profile,
            plan.rig,
            candidate.settings,
            candidate.placement,
            context_tokens=context_tokens,
            decode=(heard.written_tokens, counters.eval_s) if heard.placed else (0, 0.0),
            prompt=(counters.prompt_tokens, counters.prompt_s) if heard.placed and heard.fresh_prompt else (0, 0.0),
        ),
        tokens_per_s=speed,
        turn=(min(counters.prompt_tokens, counters.prompt_s * candidate.prefill_tokens_per_s), float(counters.eval_tokens)),
    )


def _slowed(plan: Plan, candidate: Candidate, context_tokens: int) -> float:
    """How much longer a token takes with ``context_tokens`` in the context than with the usual number, as predicted."""
    rates, host = tuple(gpu_rates(gpu) for gpu in plan.rig.gpus), host_rates(plan.rig.host)
    here, usual = (
        decode_seconds(work, candidate.placement, rates, host)
        for work in (work_at(plan.profile, candidate.settings, context_tokens), model_work(plan.profile, candidate.settings))
    )
    return here / usual


def prompt_start(request: LoadRequest) -> bytes | None:
    """The first bytes of what is before all else in the prompt, ``None`` where there is no prompt."""
    first = next((found[-1] for name in ("system", "messages", "prompt") if (found := request.fields.get(name))), None)
    return request.body[first.value_start : min(first.end, first.value_start + PROMPT_START_BYTES)] if first else None
