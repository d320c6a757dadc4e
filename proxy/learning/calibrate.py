"""``lopsided calibrate``: measures each GPU on purpose, by letting Ollama answer from one GPU after the other.

Ollama is asked directly, past a running proxy, which reads what was measured from the state file. What is loaded here is
unloaded again, whatever happens.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import httpx

from planner.hardware import Rig
from planner.plan import Plan, make_plan
from planner.request import Candidate, Era
from planner.speed import gpu_rates
from planner.stock import main_gpu_of
from proxy.config.settings import Settings
from proxy.errors import LopsidedError, ModelError, UpstreamError
from proxy.gpus import GpuSource
from proxy.gpus.reader import RigReader
from proxy.learning.calibration import Heard, measure, place_of
from proxy.learning.measurements import Measurements
from proxy.learning.verify import misplaced
from proxy.models.catalog import Catalog, ModelFacts
from proxy.ollama.answers import Counters, Tail
from proxy.ollama.client import Ollama
from proxy.ollama.options import device_names, keeps_fit_margin, placement_text
from proxy.planjson import rates_json
from proxy.plans.loading import plan_request, without_companions

CONTEXT_TOKENS = 4096
"""Context of the loads, where none is asked for: what plans are rated by."""

ROUNDS = 3
"""Answers of each placement: enough for a median, and for ``verdict.LEAST_ANSWERS``."""

TRIES = 6
"""Answers that are asked for at most: some models end theirs after a few words."""

ANSWER_TOKENS = 96
"""Length of an answer."""

PROMPT_WORDS = 1200
"""Length of a prompt; its words are common ones, of little more than one token."""

WARM_UP = {"words": 40, "num_predict": 8}
"""The first answer after a load, which is not counted: kernels are loaded, clocks rise."""

LOAD_S = 900.0
"""Longest wait for one answer, its load included."""

VOCABULARY = (
    "time person year way day thing man world life hand part child eye woman place work week case point home water room mother "
    "area money story fact month lot right study book word business issue side kind head house service friend father power"
)
"""What prompts are made of."""

Step = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A placement to be measured: how it is asked of Ollama, and what the plan expects of it."""

    label: str
    plan: Plan
    candidate: Candidate
    options: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a trial: medians, or why there are none."""

    trial: Trial
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All outcomes, and the models that Ollama evicted for them."""

    model: str
    rig: Rig
    outcomes: tuple[Outcome, ...]
    evicted: tuple[str, ...]


def solo_trials(plan: Plan, *, num_ctx: int) -> Iterator[Trial]:
    """The model on each GPU that holds it alone and that ``main_gpu`` can name."""
    names = device_names(plan.rig)
    for candidate in sorted((plan.stock, *plan.alternatives), key=lambda one: one.placement.order):
        if candidate.placement.kind != "solo" or not candidate.fits:
            continue
        (gpu,) = candidate.placement.order
        if (main_gpu := main_gpu_of(plan.rig, gpu)) is None:
            continue
        options = {"num_ctx": num_ctx, "num_batch": candidate.settings.batch, "main_gpu": main_gpu}
        if not keeps_fit_margin(candidate, plan.rig):
            options["num_gpu"] = sum(candidate.placement.shares)
        yield Trial(label=f"{names[gpu]} alone", plan=plan, candidate=candidate, options=options)


class Calibrating:
    """One run of the command. ``step`` is told what happens; ``measurements`` get what is found."""

    def __init__(
        self, client: httpx.AsyncClient, source: GpuSource, settings: Settings, measurements: Measurements, step: Step
    ) -> None:
        self._client = client
        self._ollama = Ollama(client)
        self._catalog = Catalog(client)
        self._gpus = RigReader(source)
        self._settings = settings
        self._measurements = measurements
        self._step = step
        self._words = random.Random()  # noqa: S311 - prompts that no cache has seen

    async def run(self, model: str, *, num_ctx: int | None, stock: bool) -> Report:
        """Measures ``model`` on each GPU alone, with ``stock`` where stock Ollama puts it too. Raises ``LopsidedError``.

        Where no GPU holds it alone, or Ollama is too old to be told, only stock's placement is measured.
        """
        facts = await self._catalog.facts(model)
        if facts.is_embedding:
            raise ModelError(f"{model} writes nothing that could be measured; take a model that answers")
        before = {entry.name for entry in await self._ollama.loaded()}
        self._step(f"unloading {model}")
        await self._unload(model)
        try:
            outcomes = [await self._measure(model, trial) for trial in await self._trials(facts, num_ctx=num_ctx, stock=stock)]
        finally:
            await self._unload(model)
        await asyncio.to_thread(self._measurements.save)
        gone = before - {entry.name for entry in await self._ollama.loaded()}
        others = tuple(sorted(name for name in gone if name.removesuffix(":latest") != model.removesuffix(":latest")))
        return Report(model=model, rig=await self._gpus.rig(), outcomes=tuple(outcomes), evicted=others)

    async def _trials(self, facts: ModelFacts, *, num_ctx: int | None, stock: bool) -> list[Trial]:
        era = await self._ollama.era()
        rig = without_companions(await self._gpus.rig(), facts)
        found: list[Trial] = []
        if era == "llama-server":
            tokens = num_ctx or min(CONTEXT_TOKENS, facts.profile.context_train or CONTEXT_TOKENS)
            found += solo_trials(self._plan(facts, rig, tokens, era), num_ctx=tokens)
        if stock or not found:
            plan = self._plan(facts, rig, num_ctx, era)
            options = {"num_ctx": num_ctx} if num_ctx else {}
            label = f"stock: {placement_text(plan.stock.placement, rig)}"
            found.append(Trial(label=label, plan=plan, candidate=plan.stock, options=options))
        return found

    def _plan(self, facts: ModelFacts, rig: Rig, num_ctx: int | None, era: Era) -> Plan:
        return make_plan(facts.profile, rig, plan_request({"num_ctx": num_ctx}, facts, self._settings, era))

    async def _measure(self, model: str, trial: Trial) -> Outcome:
        try:
            self._step(f"{trial.label}: loading")
            await self._ask(model, trial, **WARM_UP)
            if wrong := await self._misplaced(model, trial):
                return Outcome(trial=trial, problem=wrong)
            self._measurements.forget(place_of(trial.plan, trial.candidate))
            words = min(PROMPT_WORDS, trial.candidate.settings.num_ctx // 3)
            decode, prefill = [], []
            for count in range(TRIES):
                self._step(f"{trial.label}: answer {min(count + 1, ROUNDS)} of {ROUNDS}")
                counters = await self._ask(model, trial, words=words, num_predict=ANSWER_TOKENS)
                heard = Heard(counters=counters, fresh_prompt=True, placed=True)
                found = measure(trial.plan, trial.candidate, heard)
                self._measurements.add(replace(found, turn=None))
                prefill.append(counters.prompt_tokens / counters.prompt_s if counters.prompt_s else 0.0)
                if found.tokens_per_s:
                    decode.append(heard.written_tokens / counters.eval_s)
                if len(decode) >= ROUNDS:
                    break
        except LopsidedError as error:
            return Outcome(trial=trial, problem=str(error))
        return Outcome(
            trial=trial,
            decode_tokens_per_s=median(decode) if decode else None,
            prefill_tokens_per_s=median(prefill),
            problem=None if decode else f"its answers are too short: fewer than {ANSWER_TOKENS // 3} tokens",
        )

    async def _misplaced(self, model: str, trial: Trial) -> str | None:
        digest = (await self._catalog.facts(model)).digest
        entry = next((entry for entry in await self._ollama.loaded() if entry.digest == digest), None)
        if entry is None:
            return "it is not loaded any more"
        return misplaced(trial.candidate, trial.plan.rig, await self._gpus.watched(), entry.vram_bytes)

    async def _ask(self, model: str, trial: Trial, *, words: int, num_predict: int) -> Counters:
        """One answer. Raises ``UpstreamError`` with Ollama's words where it fails."""
        prompt = " ".join(self._words.choices(VOCABULARY.split(), k=words)) + "\nA story with all of these words:"
        options = {**trial.options, "num_predict": num_predict, "seed": self._words.randrange(2**31)}
        body = {"model": model, "prompt": prompt, "raw": True, "stream": False, "keep_alive": "5m", "options": options}
        try:
            answer = await self._client.post("/api/generate", json=body, timeout=LOAD_S)
        except httpx.HTTPError as error:
            raise UpstreamError(f"Ollama does not answer: {error or type(error).__name__}") from error
        tail = Tail()
        tail.feed(answer.content)
        if answer.status_code != 200 or (counters := tail.counters()) is None:
            raise UpstreamError(f"Ollama answers {answer.status_code}: {answer.text[:300].strip()}")
        return counters

    async def _unload(self, model: str) -> None:
        with suppress(httpx.HTTPError):
            await self._client.post("/api/generate", json={"model": model, "keep_alive": 0, "stream": False}, timeout=LOAD_S)
        with suppress(UpstreamError):  # it shows models for a moment after
            digest = (await self._catalog.facts(model)).digest
            for _ in range(100):
                if all(entry.digest != digest for entry in await self._ollama.loaded()):
                    return
                await asyncio.sleep(0.1)


def report_json(report: Report, measurements: Measurements) -> dict[str, Any]:
    """What ``--json`` prints: each card's rates as its data predict and as measured, and each trial."""
    rates = {
        uuid: found
        for outcome in report.outcomes
        for uuid, found in measurements.calibration(outcome.trial.plan.profile, report.rig).rates.items()
    }
    return {
        "model": report.model,
        "gpus": [
            {
                "uuid": gpu.uuid,
                "name": gpu.name,
                "bandwidth_bytes_per_s": gpu.bandwidth_bytes_per_s,
                "predicted": rates_json(gpu_rates(gpu).decode_bytes_per_s, gpu_rates(gpu).prefill_flops_per_s),
                "measured": rates_json(*rates[gpu.uuid]) if gpu.uuid in rates else None,
            }
            for gpu in report.rig.gpus
        ],
        "trials": [
            {
                "placement": outcome.trial.label,
                "num_ctx": outcome.trial.candidate.settings.num_ctx,
                "predicted_tokens_per_s": outcome.trial.candidate.decode_tokens_per_s,
                "decode_tokens_per_s": outcome.decode_tokens_per_s,
                "prefill_tokens_per_s": outcome.prefill_tokens_per_s,
                "problem": outcome.problem,
            }
            for outcome in report.outcomes
        ],
        "evicted": list(report.evicted),
    }
