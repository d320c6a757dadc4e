"""What a person reads: plans, rigs and answers as tables for a terminal. Renders values, never computes or fetches any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.frontier import FrontierPoint
from planner.hardware import Rig, gpu_names
from planner.memory import DeviceMemory
from planner.placement import contiguous, in_words
from planner.plan import Plan
from planner.request import Candidate, Era
from planner.runnersup import RUNNERS_UP
from planner.speed import Calibration
from planner.units import GIB, MIB
from proxy.doctor import Finding, Level
from proxy.ollama.options import Delivery

if TYPE_CHECKING:  # the demo brings the server with it, which takes a second to import
    from proxy.demo import Outcome, Run, Summary

LEVEL_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
ERA_NAMES: dict[Era, str] = {"llama-server": "stock ≥ 0.30", "runner": "stock ≤ 0.24"}


def gib(size_bytes: int | None) -> str:
    """``size_bytes`` in GiB, small ones in MiB, ``-`` where unknown."""
    if size_bytes is None:
        return "-"
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.0f} MiB"


def rate(tokens_per_s: float) -> str:
    """Tokens per second with three digits."""
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


def new_table(*columns: str, title: str | None = None, right: Iterable[str] = ()) -> Table:
    """An empty table in the house's look, for terminals of 80 columns; the columns named in ``right`` hold numbers.

    Where it is too wide all the same, text goes on in the next line; nothing is left out.
    """
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    numbers = frozenset(right)
    for column in columns:
        number = column in numbers
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def devices_report(rig: Rig, power_shares: Sequence[float], measured: Mapping[str, Calibration]) -> RenderableType:
    """The rig in Ollama's device order, ``power_shares`` in the same order; ``measured``: rates by class of model, if any."""
    right = ("#", "memory", "free", "CC", "SMs", "MHz", "GB/s", "power share")
    table = new_table("#", "GPU", "memory", "free", "CC", "SMs", "MHz", "GB/s", "PCIe", "power share", right=right)
    for index, (gpu, name, share) in enumerate(zip(rig.gpus, gpu_names(rig.gpus), power_shares, strict=True)):
        table.add_row(
            str(index),
            name,
            gib(gpu.total_bytes),
            gib(gpu.free_bytes),
            ".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else "-",
            _or_dash(gpu.sm_count),
            _or_dash(gpu.clock_mhz),
            f"{gpu.bandwidth_bytes_per_s / 1e9:.0f}" if gpu.bandwidth_bytes_per_s else "-",
            f"{gpu.pcie_generation} ×{gpu.pcie_width}" if gpu.pcie_generation and gpu.pcie_width else "-",
            f"{share:.1%}",
        )
    legend = (
        "#: Ollama's index, which main_gpu means. CC: compute capability. Power share: of the computing power "
        "(SMs × MHz where known), by which the boost algorithm weighs cards."
    )
    uuids = [Text(f"  {index}  {gpu.uuid}") for index, gpu in enumerate(rig.gpus)]
    rates = [
        (f"{index}  {name}", kind, gpu.bandwidth_bytes_per_s, found.rates[gpu.uuid])
        for index, (gpu, name) in enumerate(zip(rig.gpus, gpu_names(rig.gpus), strict=True))
        for kind, found in measured.items()
        if gpu.uuid in found.rates
    ]
    parts = [_rates_table(rates)] if rates else []
    return Group(table, Text(legend, style="dim"), Text(), *parts, Text("UUIDs", style="bold"), *uuids)


def _rates_table(rows: Iterable[tuple[str, str, int | None, tuple[float, float]]]) -> Table:
    """Measured rates: the card, the class of models, its memory's rate, effective bytes/s in decode and FLOP/s in prefill."""
    right = ("decode GB/s", "of spec", "prefill TFLOP/s")
    table = new_table("GPU", "models", *right, title="Measured from answers", right=right)
    for name, kind, spec, (decode, prefill) in rows:
        share = f"{decode / spec:.0%}" if spec else "-"
        table.add_row(name, kind, f"{decode / 1e9:.0f}", share, f"{prefill / 1e12:.1f}")
    return table


def calibration_report(found: Mapping[str, Any]) -> RenderableType:
    """What ``lopsided calibrate`` found, as ``proxy.learning.calibrate.report_json`` has it."""
    right = ("context", "predicted", "decode", "prefill")
    trials = new_table("placement", *right, title=f"{found['model']}, tokens per second", right=right)
    for trial in found["trials"]:
        trials.add_row(
            trial["placement"],
            str(trial["num_ctx"]),
            rate(trial["predicted_tokens_per_s"]),
            *(rate(value) if value else "-" for value in (trial["decode_tokens_per_s"], trial["prefill_tokens_per_s"])),
        )
    rates = ("spec GB/s", "predicted", "measured", "predicted ", "measured ")
    title = "Each GPU: GB/s while it writes, then TFLOP/s while it reads a prompt"
    gpus = new_table("GPU", *rates, title=title, right=rates)
    for gpu in found["gpus"]:
        predicted, measured = gpu["predicted"], gpu["measured"] or {}
        cells = []
        for name, unit, digits in (("decode_bytes_per_s", 1e9, 0), ("prefill_flops_per_s", 1e12, 1)):
            cells += [f"{predicted[name] / unit:.{digits}f}", f"{measured[name] / unit:.{digits}f}" if measured else "-"]
        spec = gpu["bandwidth_bytes_per_s"]
        gpus.add_row(gpu["name"], f"{spec / 1e9:.0f}" if spec else "-", *cells)
    notes = [f"{trial['placement']} was not measured: {trial['problem']}" for trial in found["trials"] if trial["problem"]]
    if found["evicted"]:
        notes.append(f"Ollama unloaded {', '.join(found['evicted'])} meanwhile; the next request loads it again.")
    return Group(trials, gpus, *(Text(note, style="yellow") for note in notes))


def plan_report(
    plan: Plan, frontier: Sequence[FrontierPoint], *, delivery: Delivery, launcher: Sequence[str], header_only: bool = False
) -> RenderableType:
    """The winner and what it costs on each device, stock's own choice in both eras, the best losers, room for context, and why.

    ``delivery`` is what a request gets, ``launcher`` the arguments of llama-server that mean the plan in full.
    """
    names = gpu_names(plan.rig.gpus)
    verdict = "as stock Ollama does it" if plan.unchanged else plan.chosen.placement.kind
    parts: list[RenderableType] = [
        _model_line(plan, header_only),
        Text(),
        Text.assemble(("Plan: ", "bold"), (in_words(plan.chosen.placement, names), "bold green"), f"  ({verdict})"),
        Text(),
        _bytes_table(plan.chosen, plan.rig, names),
        *_ram_warning(plan.chosen, plan.rig),
        _comparison(plan, delivery, names),
    ]
    losers = [candidate for candidate in plan.alternatives if candidate not in (plan.chosen, plan.stock)][:RUNNERS_UP]
    if losers:
        rows = [(candidate.label if candidate.label.startswith("boost ") else "", candidate) for candidate in losers]
        parts.append(_candidates("Not chosen", rows, names))
    if frontier:
        parts.append(_frontier_table(frontier, names))
    parts += [Text("Why", style="bold"), _numbered((*plan.reasons, *_less_context(plan, frontier, names)))]
    asked = ", ".join(f"{name} {value}" for name, value in delivery.options.items()) or "none"
    arguments = " ".join(launcher) or "none can say this"
    parts += [Text(), Text(f"Options of the request: {asked}"), Text(f"X-Lopsided-Plan: {delivery.text}")]
    if plan.request.era == "llama-server":
        parts.append(Text(f"The plan as arguments of llama-server: {arguments}"))
    return Group(*parts)


def _less_context(plan: Plan, points: Sequence[FrontierPoint], names: Sequence[str]) -> Iterator[str]:
    """The longest context with which nothing lies in RAM, where the plan's own leaves something there."""
    on_gpus = [point for point in points if point.candidate.placement.kind in ("solo", "split")]
    if plan.chosen.placement.kind == "partial" and on_gpus and on_gpus[-1].num_ctx < plan.chosen.settings.num_ctx:
        longest = on_gpus[-1]
        placed, speed = in_words(longest.candidate.placement, names), f"{longest.candidate.decode_tokens_per_s:.1f} tok/s decode"
        yield f"with a context of {longest.num_ctx} nothing would lie in RAM: {placed}, {speed}"


def _frontier_table(points: Sequence[FrontierPoint], names: Sequence[str]) -> Table:
    title = "Room for context (most tokens by kind of placement)"
    table = new_table("context", "decode", "placement", title=title, right=("context", "decode"))
    for point in points:
        placed = in_words(point.candidate.placement, names)
        table.add_row(str(point.num_ctx), rate(point.candidate.decode_tokens_per_s), placed)
    return table


def quantizations_report(plans: Iterable[tuple[str, Plan]]) -> RenderableType:
    """The plan for each quantization of one model."""
    right = ("file", "decode", "prefill", "stock's")
    table = new_table("", "file", "placement", "decode", "prefill", "stock's", title="Quantized otherwise", right=right)
    for name, plan in plans:
        chosen = plan.chosen
        speeds = (chosen.decode_tokens_per_s, chosen.prefill_tokens_per_s, plan.stock.decode_tokens_per_s)
        placed = in_words(chosen.placement, gpu_names(plan.rig.gpus))
        table.add_row(name, gib(plan.profile.file_bytes), placed, *map(rate, speeds))
    return table


def _numbered(lines: Iterable[str]) -> Table:
    grid = Table.grid(padding=(0, 1))
    for number, line in enumerate(lines, start=1):
        grid.add_row(f"  {number}.", Text(line))
    return grid


def doctor_report(findings: Iterable[Finding]) -> RenderableType:
    """One line a finding, what to do under it."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        table.add_row(Text(finding.level, style=LEVEL_STYLES[finding.level]), finding.subject, Text(finding.text))
        if finding.advice:
            table.add_row("", "", Text(finding.advice, style="dim"))
    return table


def demo_report(
    outcomes: Sequence[Outcome], names: Sequence[str], summaries: Sequence[Summary], *, ollama: str
) -> RenderableType:
    """Stock beside lopsided on one pair, what needs the launcher under it, and what all machines come to."""
    right = ("context", "tok/s", "tok/s ", "gain")
    columns = ("model", "context", "stock Ollama", "tok/s", "lopsided", "tok/s ", "gain", "")
    table = new_table(*columns, title=f"SIMULATED: {' + '.join(names)}, {ollama}", right=right)
    table.columns[0].no_wrap = True
    names = [name.removeprefix("RTX ") for name in names]
    notes = []
    for outcome in outcomes:
        same = outcome.stock.layers == outcome.lopsided.layers
        table.add_row(
            outcome.case.model,
            str(outcome.case.num_ctx),
            _run_text(outcome.stock, outcome.n_layers, names),
            rate(outcome.stock.tokens_per_s),
            "the same" if same else _run_text(outcome.lopsided, outcome.n_layers, names),
            rate(outcome.lopsided.tokens_per_s),
            f"{outcome.gain:.2f}×",
            outcome.case.note,
        )
        if outcome.planned:
            planned = _run_text(outcome.planned, outcome.n_layers, names)
            notes.append(
                f"{outcome.case.model}: the options of a request cannot ask this Ollama for {planned}; "
                f"the launcher can: {rate(outcome.planned.tokens_per_s)} tok/s."
            )
    legend = "38 on 5090: layers, the output layer counted. tok/s: the speed of the answer."
    return Group(table, Text(legend, style="dim"), *map(Text, notes), Text(), _summary_table(summaries))


def _summary_table(summaries: Iterable[Summary]) -> RenderableType:
    right = ("models", "stock splits/slow card", "median gain", "with launcher", "least of all")
    table = new_table("cards", *right, title="How many times as fast as stock Ollama, on five machines", right=right)
    for summary in summaries:
        table.add_row(
            " + ".join(card.removeprefix("Quadro ").removeprefix("Tesla ") for card in summary.cards),
            str(summary.models),
            str(summary.poor),
            *(f"{gain:.2f}×" for gain in (summary.median_gain, summary.median_launcher_gain, summary.least_gain)),
        )
    legend = (
        "Median gain: of the models that stock splits or puts on a slower card. Least of all: of every model. Each card decodes "
        "as fast as published llama.cpp runs on it, or on its generation; lopsided plans by data sheets alone."
    )
    return Group(table, Text(legend, style="dim"))


def _run_text(run: Run, n_layers: int, names: Sequence[str]) -> str:
    return in_words(contiguous(run.layers, n_layers - 1), names)


def _model_line(plan: Plan, header_only: bool) -> RenderableType:
    profile, settings = plan.profile, plan.chosen.settings
    experts = f" · {profile.expert_count} experts, {profile.experts_used} used" if profile.expert_count else ""
    first = (
        f"{profile.name or 'unnamed model'} · {profile.architecture} · {profile.n_layers} layers + output"
        f" · {gib(profile.weights_bytes)} for GPUs{experts}"
    )
    kv = settings.kv_type_k if settings.kv_type_k == settings.kv_type_v else f"{settings.kv_type_k}/{settings.kv_type_v}"
    boost = "auto" if plan.request.boost is None else f"{plan.request.boost:g}"
    trained = f" of {profile.context_train}" if profile.context_train else ""
    second = (
        f"context {settings.num_ctx}{trained} · parallel {settings.parallel} · batch {settings.batch} · KV {kv} · boost {boost}"
    )
    lines = [Text(first, style="bold"), Text(second)]
    if header_only:
        lines.append(Text("The file is a header only: no tensor data follow it. It can be planned, not run.", style="yellow"))
    return Group(*lines)


def _bytes_table(candidate: Candidate, rig: Rig, names: Sequence[str]) -> Table:
    placement = candidate.placement
    right = ("weights", "KV", "compute", "runtime", "total", "limit")
    title = "GiB on each device (limit: what is free, on GPUs less a margin)"
    table = new_table("device", "layers", "output", *right, title=title, right=right)
    runs = dict(placement.ranges())
    for gpu in (*placement.order, *(i for i in range(len(rig.gpus)) if i not in placement.order)):
        table.add_row(
            names[gpu],
            _range_text(runs.get(gpu, range(0))),
            "yes" if gpu == placement.output_gpu else "",
            *_sizes(candidate.memory.devices[gpu], candidate.limits[gpu]),
        )
    table.add_row(
        "RAM",
        _range_text(range(placement.cpu_layers)),
        "yes" if placement.output_gpu is None else "",
        *_sizes(candidate.memory.host, rig.host.free_bytes),
    )
    return table


def _sizes(memory: DeviceMemory, limit_bytes: int | None) -> Iterator[str]:
    """Two digits after the point, or the rest between a limit of 30.4 GiB and a total of 30.4 GiB is not seen."""
    parts = (memory.weights_bytes, memory.kv_bytes, memory.compute_bytes, memory.runtime_bytes, memory.total_bytes, limit_bytes)
    for size_bytes in parts:
        yield "-" if size_bytes is None else f"{size_bytes / GIB:.2f}"


def _ram_warning(candidate: Candidate, rig: Rig) -> Iterator[Text]:
    placement, free_bytes = candidate.placement, rig.host.free_bytes
    needed_bytes = candidate.memory.host.total_bytes
    in_ram = placement.cpu_layers or placement.cpu_experts or placement.output_gpu is None
    if in_ram and free_bytes is not None and needed_bytes > free_bytes:
        text = (
            f"RAM: {gib(needed_bytes)} are needed, {gib(free_bytes)} are free. Ollama may refuse to load this, "
            "or read what has no room from the disk again for every token, far slower than predicted."
        )
        yield Text(text, style="yellow")
        yield Text()


def _comparison(plan: Plan, delivery: Delivery, names: Sequence[str]) -> Table:
    """The plan, what the options of a request make of it where that is something else, and stock in both eras."""
    rows = [("plan", plan.chosen)]
    if plan.request.era == "llama-server" and plan.chosen_by_options != plan.chosen:
        rows.append(("by request options", plan.chosen_by_options))
    elif plan.request.era == "runner" and not plan.unchanged and not delivery.options:
        rows.append(("by request options", plan.stock))
    rows += [
        (ERA_NAMES[era] + (" (yours)" if era == plan.request.era else ""), plan.stock_of(era))
        for era in sorted(ERA_NAMES, key=lambda era: era != plan.request.era)
    ]
    return _candidates("Predicted tokens per second, beside stock Ollama's", rows, names)


def _candidates(title: str, rows: Sequence[tuple[str, Candidate]], names: Sequence[str]) -> Table:
    """``decode`` is the speed of an answer, ``prefill`` that of reading the prompt; labels and batches where they differ."""
    labelled = any(label for label, _ in rows)
    batched = len({candidate.settings.batch for _, candidate in rows}) > 1
    right = (*["batch"] * batched, "decode", "prefill", "GiB on each GPU")
    table = new_table(*[""] * labelled, "placement", *right, title=title, right=right)
    for label, candidate in rows:
        table.add_row(
            *[label] * labelled,
            in_words(candidate.placement, names) + ("" if candidate.fits else " (does not fit)"),
            *[str(candidate.settings.batch)] * batched,
            rate(candidate.decode_tokens_per_s),
            rate(candidate.prefill_tokens_per_s),
            " + ".join(f"{device.total_bytes / GIB:.1f}" if device.total_bytes else "-" for device in candidate.memory.devices),
        )
    return table


def _range_text(layers: range) -> str:
    if not layers:
        return "-"
    return f"{len(layers)}: {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"1: {layers[0]}"


def _or_dash(value: object | None) -> str:
    return "-" if value is None else str(value)
