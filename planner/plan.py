"""PlanRequest -> Plan: which placement a model gets, what it should cost, what stock Ollama would do, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import get_args

from planner.costs import layer_costs
from planner.hardware import Rig
from planner.layout import create_layout
from planner.placement import on_cpu
from planner.profile import ModelProfile
from planner.request import Candidate, Era, Objective, PlanRequest
from planner.search import NEVER_WORSE_GAIN, Search, choose, gpu_names, ranked, score
from planner.stock import GIB, StockLoad, libraries, on_rig, settings_on, stock_load

__all__ = ["Candidate", "Era", "Objective", "Plan", "PlanRequest", "make_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answer. ``chosen is stock`` means that nothing is better and the request passes unchanged.

    * ``chosen``: the best of all, which takes the launcher to deliver. ``chosen_by_options``: the best that request options can
      deliver: ``stock``, a GPU alone (``main_gpu``), or every layer on the GPUs (``num_gpu``); ``is stock`` as above.
    * ``stock``: what Ollama of ``request.era`` does; ``stock_by_era``: both eras.
    * ``alternatives``: all candidates that fit, the best first. ``rejected``: those that do not fit.
    """

    profile: ModelProfile
    rig: Rig
    request: PlanRequest
    chosen: Candidate
    chosen_by_options: Candidate
    stock: Candidate
    stock_by_era: dict[Era, Candidate]
    alternatives: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    reasons: tuple[str, ...]


def make_plan(profile: ModelProfile, rig: Rig, request: PlanRequest) -> Plan:
    """The plan for ``request`` on ``rig``. Pure: equal input gives an equal plan."""
    search = Search(profile, rig, request)
    loads = {era: stock_load(profile, rig, replace(request, era=era)) for era in get_args(Era)}
    stocks = {era: search.stock(load, "stock") for era, load in loads.items()}
    stock = stocks[request.era]
    load = loads[request.era]

    solos = search.solos(stock.settings.batch) if rig.gpus else []
    splits = list(_splits(search, load))
    seen = [*solos, *splits]
    unique = {(c.placement, c.settings): c for c in reversed(seen) if c.placement != stock.placement}
    fitting = ranked((c for c in seen if unique.get((c.placement, c.settings)) is c and search.holds(c)), request.objective)
    rejected = tuple(c for c in seen if not search.holds(c))
    by_options = [c for c in fitting if any(c is solo for solo in solos)] + _all_layers(search, stock, load)

    if request.boost is not None and rig.gpus:
        chosen, reasons = _boosted(search, stock)
        chosen_by_options = chosen if chosen.placement.kind == "solo" else stock
    else:
        chosen = choose(fitting, stock, request.objective)
        chosen_by_options = choose(by_options, stock, request.objective)
        reasons = ()
    return Plan(
        profile=profile,
        rig=rig,
        request=request,
        chosen=chosen,
        chosen_by_options=chosen_by_options,
        stock=stock,
        stock_by_era=stocks,
        alternatives=fitting,
        rejected=rejected,
        reasons=(*reasons, *_reasons(search, chosen, stock, fitting, rejected)),
    )


def _splits(search: Search, load: StockLoad) -> Iterable[Candidate]:
    for gpus in libraries(search.rig):
        settings = settings_on(search.profile, search.rig, search.request, gpus)
        if search.request.num_batch is None and load.settings.batch > settings.batch:
            settings = replace(settings, batch=load.settings.batch, ubatch=load.settings.ubatch)
        full = list(search.splits(gpus, settings, full=True))
        yield from full
        if len(gpus) > 1:
            yield from search.boosted(gpus, settings)
        if not full and not any(search.holds(solo) for solo in search.solos(0)):
            yield from search.splits(gpus, settings, full=False)
    cpu = on_cpu(n_gpus=len(search.rig.gpus), n_layers=search.profile.n_layers)
    yield search.candidate("all in RAM", cpu, settings_on(search.profile, search.rig, search.request, ()))


def _all_layers(search: Search, stock: Candidate, load: StockLoad) -> list[Candidate]:
    """Where stock leaves layers in RAM: all of them on its GPUs, as ``num_gpu`` makes it, if that fits."""
    if stock.placement.kind != "partial" or search.request.num_gpu is not None:
        return []
    asked = replace(search.request, num_gpu=search.profile.n_layers + 1)
    forced = stock_load(search.profile, search.rig, asked)
    candidate = search.candidate("all layers (num_gpu)", forced.placement, load.settings)
    return [candidate] if search.holds(candidate) else []


def _boosted(search: Search, stock: Candidate) -> tuple[Candidate, tuple[str, ...]]:
    """The boost algorithm's layout, literally, with its own reserves."""
    boost = search.request.boost or 1.0
    rig = search.rig
    gpus = max(libraries(rig), key=lambda group: sum(rig.gpus[i].free_bytes for i in group))
    layout = create_layout(layer_costs(search.profile, stock.settings), [rig.gpus[i] for i in gpus], boost=boost)
    candidate = search.candidate(f"boost {boost:g}", on_rig(layout.placement, gpus, len(rig.gpus)), stock.settings)
    return candidate, (f"boost {boost:g} is set: the boost algorithm's layout, whatever is predicted", *layout.reasons)


def _reasons(
    search: Search, chosen: Candidate, stock: Candidate, fitting: tuple[Candidate, ...], rejected: tuple[Candidate, ...]
) -> tuple[str, ...]:
    request, names = search.request, gpu_names(search.rig)
    calibrated = "measured rates" if chosen.calibrated else "predicted, not calibrated"
    lines = [f"stock Ollama ({request.era} era): {describe(stock, names)}, {_speed(stock)}"]
    if not stock.fits:
        lines.append(f"stock would run out of memory: {_overflow(stock, names)}")
    for candidate in rejected:
        lines.append(f"{candidate.label} does not fit: {_overflow(candidate, names)}")
    gain = score(chosen, request.objective) / score(stock, request.objective) - 1
    if chosen is stock:
        best = fitting[0] if fitting else None
        lines.append(
            f"stock stays: the best other, {best.label}, is predicted {score(best, request.objective) / score(stock, request.objective) - 1:+.1%} "
            f"(a plan needs {NEVER_WORSE_GAIN:+.0%})"
            if best
            else "stock stays: nothing else fits"
        )
    else:
        lines.append(f"chosen: {describe(chosen, names)}, {_speed(chosen)}, {gain:+.0%} against stock ({calibrated})")
        lines.append(_binding(chosen, names))
    return tuple(lines)


def describe(candidate: Candidate, names: tuple[str, ...]) -> str:
    """A placement in words."""
    placement = candidate.placement
    if not placement.order:
        return "all in RAM"
    if placement.kind == "solo":
        return f"all on {names[placement.order[0]]}"
    text = " + ".join(f"{placement.shares[gpu]} layers on {names[gpu]}" for gpu in placement.order)
    text += f" + {placement.cpu_layers} in RAM" if placement.cpu_layers else ""
    text += f", experts of {len(placement.cpu_experts)} layers in RAM" if placement.cpu_experts else ""
    return text


def _speed(candidate: Candidate) -> str:
    return f"{candidate.decode_tokens_per_s:.1f} tok/s decode, {candidate.prefill_tokens_per_s:.0f} prefill"


def _overflow(candidate: Candidate, names: tuple[str, ...]) -> str:
    over = [
        f"{names[gpu]} would need {device.total_bytes / GIB:.1f} of {limit / GIB:.1f} GiB"
        for gpu, (device, limit) in enumerate(zip(candidate.memory.devices, candidate.limits, strict=True))
        if device.total_bytes > limit
    ]
    return "; ".join(over) or f"the host would need {candidate.memory.host.total_bytes / GIB:.1f} GiB of RAM"


def _binding(chosen: Candidate, names: tuple[str, ...]) -> str:
    if not chosen.placement.order:
        return "no GPU holds anything"
    gpu = chosen.placement.order[-1]
    used, limit = chosen.memory.devices[gpu].total_bytes, chosen.limits[gpu]
    return f"{names[gpu]} is given {used / GIB:.1f} of {limit / GIB:.1f} GiB, {(limit - used) / GIB:.1f} GiB to spare"
