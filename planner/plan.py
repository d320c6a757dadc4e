"""PlanRequest -> Plan: which placement a model gets, what it should cost, what stock Ollama would do, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from planner.choice import choose, ranked
from planner.costs import layer_costs
from planner.cuts import EXACT_GPUS
from planner.hardware import Rig, gpu_names
from planner.layout import create_layout
from planner.placement import on_cpu
from planner.profile import ModelProfile
from planner.reasons import boost_reason, reasons
from planner.request import Candidate, Era, PlanRequest
from planner.search import Search
from planner.speed import gpu_rates
from planner.stock import DEFAULT_BATCH, StockLoad, libraries, main_gpu_of, on_rig, settings_on, stock_load


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answer.

    * ``chosen``: the best of all, which needs the launcher to deliver. ``chosen_by_options``: the best that request options can
      deliver: ``stock``, a GPU alone (``main_gpu``, where that can say which), or every layer on the GPUs (``num_gpu``).
    * ``stock``: what Ollama of ``request.era`` does.
    * ``reverted``: why stock is taken although something was predicted to be faster; empty where nothing was taken back.
    * ``alternatives``: all candidates that fit, the best first. ``rejected``: those that do not fit.
    """

    profile: ModelProfile
    rig: Rig
    request: PlanRequest
    chosen: Candidate
    chosen_by_options: Candidate
    stock: Candidate
    alternatives: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    reasons: tuple[str, ...]
    reverted: str = ""

    @property
    def unchanged(self) -> bool:
        """Nothing is better than ``stock``: the request passes unchanged."""
        return self.chosen == self.stock

    @property
    def unchanged_by_options(self) -> bool:
        """Nothing that options can deliver is better than ``stock``."""
        return self.chosen_by_options == self.stock

    def stock_of(self, era: Era) -> Candidate:
        """What Ollama of ``era`` does: ``stock``, or what is only worked out here, since nothing is chosen by it."""
        if era == self.request.era:
            return self.stock
        return _stock(Search(self.profile, self.rig, self.request), era)[0]


def revert(plan: Plan, candidate: Candidate, reason: str) -> Plan:
    """``plan`` with stock's placement wherever ``candidate`` was chosen."""
    return replace(
        plan,
        chosen=plan.stock if plan.chosen == candidate else plan.chosen,
        chosen_by_options=plan.stock if plan.chosen_by_options == candidate else plan.chosen_by_options,
        reverted=reason,
        reasons=(*plan.reasons, f"taken back: {candidate.label}, {reason}"),
    )


SMALL_PERCENT = 25
"""An embedding model that takes no more of the slowest card's memory is small: it goes there."""

SLOWER = 0.9
"""A card that decodes at less than this part of the fastest one's rate is a slow one, a pure number."""

Planner = Callable[[ModelProfile, Rig, PlanRequest], Plan]
"""``make_plan``, or what stands in its place."""


def make_plan(profile: ModelProfile, rig: Rig, request: PlanRequest) -> Plan:
    """The plan for ``request`` on ``rig``. Pure: equal input gives an equal plan."""
    search = Search(profile, rig, request)
    if request.embedding and request.gpu is None and (slow := _slow_gpu(search)) is not None:
        request = replace(request, gpu=slow, gpu_reason="a small embedding model leaves the fast card to others")
    stock, load = _stock(search, request.era)
    solos = search.solos(load.settings.batch)
    told = [solo for solo in solos if _can_be_told(solo, rig)]
    by_options = [*told, *_all_layers(search, stock, load)]
    seen = list(_without(stock, [*solos, *by_options, *_splits(search, load, solos)]))
    held = [search.holds(candidate) for candidate in seen]
    rejected = tuple(candidate for candidate, holds in zip(seen, held, strict=True) if not holds)
    fitting = ranked(compress(seen, held), request.objective)
    deliverable = [candidate for candidate in fitting if candidate in by_options]

    named = _on_named_gpu(request, (stock, *fitting))
    first: tuple[str, ...] = ()
    if request.gpu is not None:
        said = "all on" if named else "does not fit alone on"
        first = (f"{said} {gpu_names(rig.gpus)[request.gpu]}: {request.gpu_reason}",)
    if named:
        chosen = named
        chosen_by_options = named if _can_be_told(named, rig) else stock
    elif request.boost is not None and rig.gpus:
        boosted, why = _boosted(search, request.boost)
        first = (*first, *why)
        holds = search.holds(boosted)
        chosen = boosted if holds else stock
        if not holds:  # the search's own layouts of that name have other reserves
            rejected = (*(candidate for candidate in rejected if candidate.label != boosted.label), boosted)
        chosen_by_options = chosen if _can_be_told(chosen, rig) else stock
    else:
        chosen = choose(fitting, stock, request.objective)
        chosen_by_options = choose(deliverable, stock, request.objective)
    return Plan(
        profile=profile,
        rig=rig,
        request=request,
        chosen=chosen,
        chosen_by_options=chosen_by_options,
        stock=stock,
        alternatives=fitting,
        rejected=rejected,
        reasons=(*first, *reasons(profile, rig, request, chosen=chosen, stock=stock, fitting=fitting, rejected=rejected)),
    )


def _stock(search: Search, era: Era) -> tuple[Candidate, StockLoad]:
    request = search.request if era == search.request.era else replace(search.request, era=era)
    load = stock_load(search.profile, search.rig, request)
    return search.stock(load, "stock"), load


def _slow_gpu(search: Search) -> int | None:
    """Where a small embedding model pushes nobody out: the slowest card; ``None`` where cards are alike or it is not small."""
    gpus = search.rig.gpus
    rates = [gpu_rates(gpu, search.request.calibration).decode_bytes_per_s for gpu in gpus]
    if not rates or min(rates) > SLOWER * max(rates):
        return None
    slowest = min(range(len(rates)), key=lambda gpu: (rates[gpu], -gpu))
    small = search.alone(slowest).memory.devices[slowest].total_bytes * 100 <= SMALL_PERCENT * gpus[slowest].total_bytes
    return slowest if small else None


def _on_named_gpu(request: PlanRequest, candidates: Iterable[Candidate]) -> Candidate | None:
    """The first of ``candidates`` that is alone on the GPU that the request names, and fits there."""
    alone = (found for found in candidates if found.placement.kind == "solo" and found.fits)
    return next((found for found in alone if found.placement.order == (request.gpu,)), None)


def _can_be_told(candidate: Candidate, rig: Rig) -> bool:
    """Whether ``candidate`` is on one GPU, and ``main_gpu`` can say which."""
    return candidate.placement.kind == "solo" and main_gpu_of(rig, candidate.placement.order[0]) is not None


def _without(stock: Candidate, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """``candidates`` without stock's own placement and batch, the first of equal ones."""
    seen = {(stock.placement, stock.settings)}
    for candidate in candidates:
        key = (candidate.placement, candidate.settings)
        if key not in seen:
            seen.add(key)
            yield candidate


def _splits(search: Search, load: StockLoad, solos: Sequence[Candidate]) -> Iterator[Candidate]:
    """The splits of each library's GPUs, the boost algorithm's layouts, and everything in RAM.

    Layers or experts are left in RAM where no GPUs hold everything, or, of up to ``EXACT_GPUS``, none that outrun RAM. Where they
    are not, Ollama's smallest batch is looked at too: its compute buffers leave room for layers, and short micro-batches overlap.
    (Weights in RAM would be copied for each of them, and an embedding model takes no text longer than its batch.)
    """
    for gpus in libraries(search.rig):
        settings = settings_on(search.profile, search.rig, search.request, gpus)
        if search.request.num_batch is None and load.settings.batch > settings.batch:
            settings = replace(settings, batch=load.settings.batch, ubatch=load.settings.ubatch)
        batches = [settings]
        if search.request.num_batch is None and not search.request.embedding and settings.batch > DEFAULT_BATCH:
            batches.append(replace(settings, batch=DEFAULT_BATCH, ubatch=DEFAULT_BATCH))
        full = [split for batch in batches for split in search.splits(gpus, batch, full=True)]
        yield from full
        whole = (*full, *(solo for solo in solos if search.holds(solo)))
        outrun = any(all(search.outruns_ram(gpu, settings) for gpu in found.placement.order) for found in whole)
        if not whole or (not outrun and len(gpus) <= EXACT_GPUS):
            yield from search.splits(gpus, settings, full=False)
        if len(gpus) > 1:
            yield from search.boosted(gpus, settings)
    cpu = on_cpu(n_gpus=len(search.rig.gpus), n_layers=search.profile.n_layers)
    yield search.candidate("all in RAM", cpu, settings_on(search.profile, search.rig, search.request, ()))


def _all_layers(search: Search, stock: Candidate, load: StockLoad) -> list[Candidate]:
    """Where stock leaves layers in RAM: all of them on its GPUs, as ``num_gpu`` makes it."""
    if stock.placement.kind != "partial" or search.request.num_gpu is not None:
        return []
    forced = stock_load(search.profile, search.rig, replace(search.request, num_gpu=search.profile.n_layers + 1))
    return [search.candidate("all layers (num_gpu)", forced.placement, load.settings)]


def _boosted(search: Search, boost: float) -> tuple[Candidate, tuple[str, ...]]:
    """The boost algorithm's layout, literally and with its own reserves, on the library with the most memory; and its reasons."""
    rig = search.rig
    gpus = max(libraries(rig), key=lambda group: sum(rig.gpus[i].free_bytes for i in group))
    settings = settings_on(search.profile, rig, search.request, gpus)
    layout = create_layout(layer_costs(search.profile, settings), [rig.gpus[i] for i in gpus], boost=boost)
    candidate = search.candidate(f"boost {boost:g}", on_rig(layout.placement, gpus, len(rig.gpus)), settings)
    return candidate, (boost_reason(boost), *layout.reasons)
