"""The command line: ``lopsided``. Reads arguments, asks the other modules, prints.

Exit codes: 0 fine, 1 the thing asked for can't be done, 2 bad usage (a wrong setting too). Errors go to stderr, in one line.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx
from rich.console import Console, RenderableType
from rich.progress import track

from planner.frontier import frontier
from planner.hardware import Rig, gpu_names
from planner.plan import make_plan
from planner.power import power_shares, raw_powers
from planner.recipes import RECIPES, quantized
from planner.request import Era
from planner.runnersup import with_runners_up
from proxy.config.rulefile import RuleFile, read_rules
from proxy.config.settings import CACHE_TYPES, Settings, load_settings, settings_file, unknown_variables
from proxy.doctor import Sight, judge, judge_rules, look
from proxy.errors import GgufError, GpuError, LopsidedError, SettingsError, UpstreamError
from proxy.estimate import Count, estimate_command
from proxy.gpus import GpuSource
from proxy.gpus.nvml import NvmlSource
from proxy.gpus.order import DeviceOrder
from proxy.gpus.static import StaticSource, with_cards
from proxy.launcher.command import launcher_commands
from proxy.learning.calibrate import Calibrating, Report, report_json
from proxy.learning.calibration import LearnedPlanner
from proxy.learning.measurements import FILE_NAME as MEASUREMENTS_FILE
from proxy.learning.measurements import Measurements
from proxy.ollama.options import era_of
from proxy.planjson import devices_json, launcher_arguments, plan_json, quantization_json
from proxy.planning import is_file, plan_for
from proxy.plans.loading import MAX_TOKENS
from proxy.statefile import StateFile
from proxy.tables import (
    calibration_report,
    demo_report,
    devices_report,
    doctor_report,
    gib,
    plan_report,
    quantizations_report,
)

if TYPE_CHECKING:  # the demo brings the server with it, which takes a second to import
    from proxy.demo import Machine, Outcome, Stage

PIPE_WIDTH = 140
"""Columns of a table that goes into a file or a pipe; a terminal says its own."""

TOKENS = Count(1, MAX_TOKENS)


class Commands(click.Group):
    """Turns lopsided's own errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was named."""
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise click.UsageError(str(error)) from error
        except LopsidedError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="lopsided", message="%(prog)s %(version)s")
def main() -> None:
    """Make a stock Ollama put each model where it runs fastest on unequal GPUs.

    Settings come from the environment and from lopsided.toml; `lopsided doctor` shows what they lead to.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks ≥ gets ?, not an error
    if os.environ.get("COLUMNS") == "0":  # as some pseudo-terminals say that they don't know: rich would print nothing
        del os.environ["COLUMNS"]


gpu_option = click.option(
    "--gpu",
    "cards",
    multiple=True,
    metavar="CARD[:FREE]",
    help="A card to plan for instead of this machine's, e.g. \"RTX 3090:22GiB\" (RAM stays this machine's). "
    "Repeat it in Ollama's device order.",
)
add_gpu_option = click.option(
    "--add-gpu", "added", multiple=True, metavar="CARD[:FREE]", help="A card to plan for beside those, as if it were built in."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@main.command()
@click.option("--host", metavar="HOST:PORT", help="Where to listen (LOPSIDED_HOST, else 127.0.0.1:11435).")
@click.option("--upstream", metavar="URL", help="Where Ollama is (LOPSIDED_UPSTREAM, else OLLAMA_HOST, else 127.0.0.1:11434).")
def serve(host: str | None, upstream: str | None) -> None:
    """Run the proxy in front of Ollama."""
    import uvicorn  # here and in demo: the server takes a second to import, which the other commands need not wait for

    from proxy.app import create_app
    from proxy.wire.serve import listen, log_to_stderr, settle_process, uvicorn_options

    settings = load_settings(**_given(host=host, upstream=upstream))
    read_rules(settings_file())
    source = gpu_source(settings)
    seen = asyncio.run(look(settings, device_order(settings), source))
    if seen.upstream_is_lopsided:
        raise click.ClickException(
            f"{settings.upstream.url} is lopsided itself, so requests would go in a circle: "
            "set LOPSIDED_UPSTREAM to the address of Ollama"
        )
    for line in unknown_variables(os.environ):
        click.echo(f"Warning: {line}", err=True)
    listener = listen(settings.host)
    reached = settings.host.connectable()
    click.echo(f"lopsided  {reached.url}" + ("" if reached == settings.host else "  on every address of this machine"))
    click.echo(f"Ollama    {settings.upstream.url}  {_ollama_text(seen)}")
    for line in _gpu_lines(seen):
        click.echo(line)
    log_to_stderr()
    app = create_app(settings, source=source, order=device_order(settings))
    server = uvicorn.Server(uvicorn.Config(app, **uvicorn_options(settings.drain_s), log_level="warning"))
    settle_process()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return


def _version(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.match(r"v?\d+\.\d+", value):
        raise click.BadParameter(f"{value!r} is no version such as 0.24.0")
    return value


def _recipes(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(name.strip().upper() for name in (value or "").split(",") if name.strip())
    if unknown := [name for name in names if name not in RECIPES]:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(RECIPES)}")
    return names


@main.command()
@click.argument("model", metavar="MODEL|FILE.gguf")
@gpu_option
@add_gpu_option
@click.option("--ctx", type=TOKENS, help="Tokens of context (default: the model's own, else what Ollama takes by VRAM).")
@click.option("--batch", type=TOKENS, help="Tokens of a batch (default: what Ollama takes by context and memory).")
@click.option("--parallel", type=Count(1, 1024), help="Sequences at once (OLLAMA_NUM_PARALLEL, else 1).")
@click.option("--kv-type", type=click.Choice(CACHE_TYPES), help="Type of the KV cache (OLLAMA_KV_CACHE_TYPE, else f16).")
@click.option(
    "--quant",
    "recipes",
    metavar="LIST",
    callback=_recipes,
    help=f"Plan for other quantizations of the model too, e.g. Q4_K_M,Q8_0 ({', '.join(RECIPES)}).",
)
@click.option("--boost", metavar="1.0-2.0|auto", help="Factor of the boost algorithm (OLLAMA_SCHED_COMPUTE_BOOST, else auto).")
@click.option(
    "--ollama-version",
    metavar="VERSION",
    callback=_version,
    help="Plan for this Ollama, e.g. 0.24.0 (default: the one there is).",
)
@click.option("--rules/--no-rules", default=True, help="Follow the rules of lopsided.toml (they come before --boost), or not.")
@json_option
def plan(
    model: str,
    cards: tuple[str, ...],
    added: tuple[str, ...],
    ctx: int | None,
    batch: int | None,
    parallel: int | None,
    kv_type: str | None,
    recipes: tuple[str, ...],
    boost: str | None,
    ollama_version: str | None,
    rules: bool,
    as_json: bool,
) -> None:
    """Show where a model would go, and why.

    MODEL is a name of Ollama's, FILE.gguf a file here; nothing is loaded.
    """
    settings = load_settings(**_given(num_parallel=parallel, kv_cache_type=kv_type, boost=boost))
    options = {"num_ctx": ctx, "num_batch": batch}
    if is_file(model) and not Path(model).is_file():  # said before what may be wrong with the GPUs
        raise GgufError(f"{model}: no such file")
    planner = LearnedPlanner(planner=make_plan, measurements=open_measurements(settings), objective=settings.objective)
    rig = with_cards(_rig(settings, cards), added)
    file = RuleFile(settings_file() if rules else None)
    answer = asyncio.run(plan_for(model, rig, options, settings, version=ollama_version, planner=planner, rules=file))
    made = with_runners_up(answer.plan)
    points = frontier(made.profile, made.rig, made.request)
    variants = [(name, planner(quantized(made.profile, name), made.rig, made.request)) for name in recipes]
    if as_json:
        found = plan_json(made, answer.delivery, points)
        if variants:
            found["quantizations"] = [quantization_json(name, variant) for name, variant in variants]
        _print_json(found)
        return
    launcher = launcher_arguments(made)
    _print(plan_report(made, points, delivery=answer.delivery, launcher=launcher, header_only=answer.header_only))
    if variants:
        click.echo()
        _print(quantizations_report(variants))


@main.command()
@gpu_option
@json_option
def devices(cards: tuple[str, ...], as_json: bool) -> None:
    """List the GPUs in Ollama's order."""
    settings = load_settings()
    rig = _rig(settings, cards)
    measured = open_measurements(settings).class_rates(rig)
    if as_json:
        _print_json(devices_json(rig, measured))
    else:
        _print(devices_report(rig, power_shares(raw_powers(rig.gpus)), measured))


@main.command()
@click.argument("model")
@click.option("--ctx", type=TOKENS, help="Tokens of context (default: 4096; for --stock what Ollama takes).")
@click.option("--stock", is_flag=True, help="Measure the placement of stock Ollama too, to hold later plans against it.")
@json_option
def calibrate(model: str, ctx: int | None, stock: bool, as_json: bool) -> None:
    """Measure how fast each GPU really is.

    Ollama loads MODEL on one GPU after the other and answers a few times from each, in a minute or two; it is unloaded again.
    A running proxy uses what was found from its next plan on.
    """
    settings = load_settings()
    if stock and settings.sched_spread:
        raise click.ClickException(
            "OLLAMA_SCHED_SPREAD is set, so stock's placement cannot be asked for: it spreads every model over all GPUs"
        )
    source, measurements = gpu_source(settings), open_measurements(settings)
    console = Console(stderr=True)

    async def run() -> Report:
        async with httpx.AsyncClient(base_url=settings.upstream.url, trust_env=False) as client:
            with console.status(f"asking Ollama at {settings.upstream.url}") as status:
                return await Calibrating(client, source, settings, measurements, status.update).run(
                    model, num_ctx=ctx, stock=stock
                )

    try:
        report = asyncio.run(run())
    except UpstreamError as error:
        raise click.ClickException(f"{error}. Is Ollama at {settings.upstream.url}? LOPSIDED_UPSTREAM names it") from error
    found = report_json(report, measurements)
    if as_json:
        _print_json(found)
    else:
        _print(calibration_report(found))
    if all(outcome.problem for outcome in report.outcomes):
        raise SystemExit(1)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check settings, Ollama and GPUs."""
    settings = load_settings()
    seen = asyncio.run(look(settings, device_order(settings), gpu_source(settings)))
    findings = (*judge(seen), *judge_rules(settings_file(), seen, os.environ))
    if as_json:
        _print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        _print(doctor_report(findings))
    if any(finding.level == "fail" for finding in findings):
        raise SystemExit(1)


@main.command()
@click.option("--once", is_flag=True, help="End after the table.")
@click.option("--era", type=click.Choice(["llama-server", "runner"]), default="llama-server", help="Which Ollama is simulated.")
@json_option
def demo(once: bool, era: Era, as_json: bool) -> None:
    """Show stock Ollama beside lopsided.

    The cards and Ollama are simulated, the requests are real. Needs no GPU.
    """
    from proxy.demo import MACHINES, PAIR, Summary, open_stage

    def play(stage: Stage, machine: Machine) -> list[Outcome]:
        what = f"Asking the simulated Ollama ({len(machine.cards)} cards)"
        console = Console(stderr=True)
        cases = track(machine.cases, what, console=console, transient=True, disable=not console.is_terminal)
        return [stage.play(case) for case in cases]

    with open_stage(era) as stage:
        played = {PAIR: play(stage, PAIR)}
        for machine in MACHINES[1:]:
            with open_stage(era, machine) as other:
                played[machine] = play(other, machine)
        summaries = [Summary.of(machine, outcomes) for machine, outcomes in played.items()]
        if as_json:
            rigs = [
                {**asdict(summary), "rows": [asdict(outcome) for outcome in outcomes]}
                for summary, outcomes in zip(summaries, played.values(), strict=True)
            ]
            _print_json({"simulated": True, "ollama": stage.simulator.version, "rigs": rigs})
        else:
            names = gpu_names(stage.simulator.rig().gpus)
            _print(demo_report(played[PAIR], names, summaries, ollama=f"Ollama {stage.simulator.version}"))
        if once or as_json:
            return
        stage.simulator.scheduler.time_scale = 1.0
        case = PAIR.cases[1]  # one that lopsided places otherwise than stock
        body = json.dumps({"model": case.model, "prompt": "Hello", "options": {"num_ctx": case.num_ctx}})
        click.echo(
            f"\nStill running, now at the simulated speed. Point a client at lopsided, or at the simulated Ollama to compare:\n"
            f"  lopsided          {stage.proxy_url}\n"
            f"  simulated Ollama  {stage.ollama_url}\n"
            f"  curl -i {stage.proxy_url}/api/generate -d '{body}'\n"
            "Ctrl-C ends it."
        )
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


main.add_command(estimate_command)
main.add_command(launcher_commands)


def open_measurements(settings: Settings) -> Measurements:
    """What was measured so far, nothing where that is switched off."""
    return Measurements(StateFile(settings.state if settings.calibration else None, MEASUREMENTS_FILE))


def gpu_source(settings: Settings, cards: tuple[str, ...] = ()) -> GpuSource:
    """Where the GPUs come from: ``--gpu``, else the profile of the settings, else NVML."""
    if cards:
        return StaticSource.from_arguments(cards)
    if settings.profile:
        return StaticSource.from_file(settings.profile)
    return NvmlSource(device_order(settings))


def device_order(settings: Settings) -> DeviceOrder:
    """What is known of Ollama's device order: CUDA's variables, and the setting's names."""
    return DeviceOrder.from_environment(os.environ, names=settings.device_order)


def _ollama_text(seen: Sight) -> str:
    if seen.version is None:
        return f"does not answer yet ({seen.upstream_problem}); requests get 502 until it does"
    return f"version {seen.version}, {era_of(seen.version)} era"


def _gpu_lines(seen: Sight) -> Iterator[str]:
    if seen.rig is None:
        yield f"GPUs      none seen: {seen.gpu_problem}. Requests pass unchanged; `lopsided doctor` says more"
        return
    for index, (gpu, name) in enumerate(zip(seen.rig.gpus, gpu_names(seen.rig.gpus), strict=True)):
        yield f"GPU {index}     {name}  {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"


def _rig(settings: Settings, cards: tuple[str, ...]) -> Rig:
    try:
        return gpu_source(settings, cards).rig()
    except GpuError as error:
        if cards or settings.profile:
            raise
        raise GpuError(f'{error}. Cards can be named instead: --gpu "RTX 5090" --gpu "RTX 3090"') from error


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _print(report: RenderableType) -> None:
    console = Console()
    if console.is_terminal:
        console.print(report)
        return
    if not os.environ.get("COLUMNS", "").isdigit():
        console.width = PIPE_WIDTH
    with console.capture() as capture:
        console.print(report)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
