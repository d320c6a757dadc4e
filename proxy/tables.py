"""What a person reads: plans, rigs and answers as tables for a terminal. Renders values, never computes or fetches any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.hardware import Gpu, Rig
from planner.placement import Placement
from planner.plan import Plan
from planner.request import Candidate, Era
from planner.units import GIB, MIB
from proxy.doctor import Finding, Level

if TYPE_CHECKING:  # the demo brings the server with it, which takes a second to import
    from proxy.demo import Outcome, Run

ALTERNATIVES_SHOWN = 5
LEVEL_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
ERA_NAMES: dict[Era, str] = {"llama-server": "stock Ollama ≥ 0.30", "runner": "stock Ollama ≤ 0.24"}


def gib(size_bytes: int | None) -> str:
    """``size_bytes`` in GiB, small ones in MiB, ``-`` where unknown."""
    if size_bytes is None:
        return "-"
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.0f} MiB"


def rate(tokens_per_s: float) -> str:
    """Tokens per second with three digits."""
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


def gpu_names(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Short names: the maker's prefixes left out, equal cards told apart by their index."""
    short = [gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ") for gpu in gpus]
    count = Counter(short)
    return tuple(name if count[name] == 1 else f"{name} #{index}" for index, name in enumerate(short))


def placement_text(placement: Placement, names: Sequence[str]) -> str:
    """``RTX 5090 alone``, ``RTX 3090 25 + RTX 5090 56``, ``CPU 12 + …``: layers, the output layer counted with its GPU."""
    if placement.kind == "solo":
        return f"{names[placement.order[0]]} alone"
    on_cpu = placement.cpu_layers + (placement.output_gpu is None)
    runs = [f"CPU {on_cpu}"] if on_cpu else []
    runs += [f"{names[gpu]} {placement.shares[gpu]}" for gpu in placement.order]
    experts = f", experts of {len(placement.cpu_experts)} layers in RAM" if placement.cpu_experts else ""
    return " + ".join(runs) + experts


def new_table(*columns: str, title: str | None = None, right: Iterable[str] = ()) -> Table:
    """An empty table in the house's look; the columns named in ``right`` hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    numbers = frozenset(right)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=column in numbers)
    return table


def devices_report(rig: Rig, power_shares: Sequence[float]) -> RenderableType:
    """The rig in Ollama's device order, ``power_shares`` in the same order."""
    right = ("#", "memory", "free", "CC", "SMs", "MHz", "GB/s", "share of power")
    table = new_table("#", "GPU", "memory", "free", "CC", "SMs", "MHz", "GB/s", "PCIe", "share of power", "UUID", right=right)
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
            gpu.uuid,
        )
    return Group(table, Text("# is Ollama's index: what main_gpu means.", style="dim"))


def plan_report(
    plan: Plan, *, options: Mapping[str, object], launcher: Sequence[str], header_only: bool = False
) -> RenderableType:
    """The winner and what it costs on each device, stock's own choice in both eras, the best losers, and the reasons.

    ``options`` are those that a request gets, ``launcher`` the arguments of llama-server that mean the same in full.
    """
    names = gpu_names(plan.rig.gpus)
    unchanged = plan.chosen is plan.stock
    verdict = "as stock Ollama does it" if unchanged else plan.chosen.placement.kind
    parts: list[RenderableType] = [
        _model_line(plan, header_only),
        Text(),
        Text.assemble(("Plan: ", "bold"), (placement_text(plan.chosen.placement, names), "bold green"), f"  ({verdict})"),
        _bytes_table(plan.chosen, plan.rig, names),
        _comparison(plan, names),
    ]
    losers = [candidate for candidate in plan.alternatives if candidate not in (plan.chosen, plan.stock)][:ALTERNATIVES_SHOWN]
    if losers:
        parts.append(_candidates("Not chosen", [(candidate.label, candidate) for candidate in losers], names))
    parts += [Text("Why", style="bold"), _numbered(plan.reasons)]
    asked = ", ".join(f"{name} {value}" for name, value in options.items()) or "none"
    arguments = " ".join(launcher) or "none can say this"
    parts += [Text(), Text(f"Options of the request: {asked}"), Text(f"As arguments of llama-server: {arguments}")]
    return Group(*parts)


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


def demo_report(outcomes: Sequence[Outcome], names: Sequence[str], *, ollama: str) -> RenderableType:
    """Stock beside lopsided; under the table what the options of a request cannot deliver."""
    right = ("context", "tok/s", "tok/s ", "gain")
    columns = ("model", "context", "stock Ollama", "tok/s", "lopsided", "tok/s ", "gain", "")
    table = new_table(*columns, title=f"SIMULATED: {' + '.join(names)}, {ollama}", right=right)
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
                f"{outcome.case.model}: the options of a request cannot ask this Ollama for {planned}, "
                f"predicted at {rate(outcome.planned.tokens_per_s)} tok/s."
            )
    return Group(table, *map(Text, notes))


def _run_text(run: Run, n_layers: int, names: Sequence[str]) -> str:
    holders = [f"{name} {count}" for name, count in zip(names, run.layers, strict=True) if count]
    on_cpu = n_layers - sum(run.layers)
    if len(holders) == 1 and not on_cpu:
        return f"{holders[0].rpartition(' ')[0]} alone"
    return " + ".join([f"CPU {on_cpu}"] * bool(on_cpu) + holders)


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
    table = new_table("device", "layers", "output", *right, right=right)
    runs = dict(placement.ranges())
    for gpu in (*placement.order, *(i for i in range(len(rig.gpus)) if i not in placement.order)):
        memory = candidate.memory.devices[gpu]
        table.add_row(
            names[gpu],
            _range_text(runs.get(gpu, range(0))),
            "yes" if gpu == placement.output_gpu else "",
            *map(gib, (memory.weights_bytes, memory.kv_bytes, memory.compute_bytes, memory.runtime_bytes, memory.total_bytes)),
            gib(candidate.limits[gpu]),
        )
    host = candidate.memory.host
    table.add_row(
        "RAM",
        _range_text(range(placement.cpu_layers)),
        "yes" if placement.output_gpu is None else "",
        *map(gib, (host.weights_bytes, host.kv_bytes, host.compute_bytes, host.runtime_bytes, host.total_bytes)),
        gib(rig.host.free_bytes),
    )
    return table


def _comparison(plan: Plan, names: Sequence[str]) -> Table:
    rows = [("lopsided", plan.chosen)]
    rows += [
        (ERA_NAMES[era] + (" (yours)" if era == plan.request.era else ""), stock)
        for era, stock in sorted(plan.stock_by_era.items(), key=lambda item: item[0] != plan.request.era)
    ]
    return _candidates("Predicted speed, beside what stock Ollama does", rows, names)


def _candidates(title: str, rows: Sequence[tuple[str, Candidate]], names: Sequence[str]) -> Table:
    right = ("decode tok/s", "prefill tok/s", "most filled")
    table = new_table("", "placement", *right, title=title, right=right)
    for label, candidate in rows:
        fills = [
            memory.total_bytes / limit for memory, limit in zip(candidate.memory.devices, candidate.limits, strict=True) if limit
        ]
        table.add_row(
            label,
            placement_text(candidate.placement, names) + ("" if candidate.fits else " (does not fit)"),
            rate(candidate.decode_tokens_per_s),
            rate(candidate.prefill_tokens_per_s),
            f"{max(fills, default=0):.0%}",
        )
    return table


def _range_text(layers: range) -> str:
    if not layers:
        return "-"
    return f"{len(layers)}: {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"1: {layers[0]}"


def _or_dash(value: object | None) -> str:
    return "-" if value is None else str(value)
