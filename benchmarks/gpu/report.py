"""The rows of ``benchmarks.gpu.bench`` as tables, with what was predicted for each, and which promises hold.

    python -m benchmarks.gpu.report rows.jsonl

Predicted speeds rest on the ``solo-…`` cases alone: each model's rate on each GPU by itself. Where the cards are made
equal, both have the first one's.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import profile
from benchmarks.gpu.serverlog import COMMAND, Loaded, placement_of
from planner.memory import estimate_memory
from planner.placement import Placement
from planner.profile import ModelProfile
from planner.request import RUNTIME_BYTES
from planner.settings import LoadSettings
from planner.speed import Calibration, predict_speed, solo_rates
from planner.units import MIB
from proxy.gpus.static import StaticSource

DEVICES = ("CUDA0", "CUDA1")
RIG = StaticSource.from_arguments(["H200"] * 2).rig()
"""What docs/benchmarks.md was measured on. Of other cards the solo rows tell the rates; this still sizes a layer's fixed cost."""
TOKENS = 2048 + 64 // 2
"""Tokens in the context, halfway through an answer."""
WORKSPACE_BYTES = 112 * MIB
"""What a process takes on a GPU beside its context and the buffers that it prints, once it has answered: cuBLAS workspaces and
pools. 83 to 153 MiB on two H200 (``tests/data/two_h200.json``); ``planner.request.MARGIN_BYTES`` has room for it."""
TIMES_STOCK = {"fits": 1.3, "slow-card": 1.8}
"""By case: what the automatic plan is to reach at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A row, understood: ``parts`` is printed and predicted MiB by device, ``used`` NVML's and the predicted total."""

    row: dict[str, Any]
    placement: Placement
    settings: LoadSettings
    parts: tuple[tuple[float, float], ...]
    used: tuple[tuple[float, float], ...]

    @property
    def layers(self) -> str:
        """``fast + slow (+ CPU)``, the output layer counted."""
        said = " + ".join(map(str, self.placement.shares))
        return f"{said} + {self.placement.cpu_layers} CPU" if self.placement.cpu_layers else said


def arguments(row: dict[str, Any]) -> dict[str, str]:
    """Flags and values of the llama-server that ran; a flag given twice counts as given last."""
    words = list(row.get("args", ()))
    if row.get("commands"):
        command = COMMAND.search(row["commands"][-1])
        words = shlex.split(command[1])[1:] if command else words
        appended = re.findall(r"INFO [^\n]*?: (--[^\n]*)", row.get("said", ""))
        words += appended[-1].split() if appended else []
    return {word: following for word, following in pairwise([*words, ""]) if word.startswith("-")}


def settings_of(row: dict[str, Any]) -> LoadSettings:
    """The settings of the load."""
    given = arguments(row)
    batch = int(given["-b"])
    return LoadSettings(
        num_ctx=int(given["-c"]),
        parallel=1,
        batch=batch,
        ubatch=min(int(given["-ub"]), batch),
        flash_attention=given.get("--flash-attn") != "off",
        outputs=None if "--embedding" in given else 1,
    )


def understood(row: dict[str, Any]) -> Load:
    """Raises ``ValueError`` where the log does not say where the layers went."""
    model, settings = known(row["model"]), settings_of(row)
    loaded = Loaded(order=tuple(row["order"]), buffers_mib=row["buffers_mib"], fit_s=row.get("fit_s"))
    placement = placement_of(loaded, model, settings, DEVICES)
    memory = estimate_memory(model, settings, placement, runtime_bytes=(RUNTIME_BYTES + WORKSPACE_BYTES,) * 2)
    parts, used = [], []
    for index, (device, predicted) in enumerate(zip(DEVICES, memory.devices, strict=True)):
        if index in placement.order:
            buffers = row["buffers_mib"][device]
            printed = sum(buffers.get(kind, 0.0) for kind in ("model", "KV", "compute"))
            parts.append((printed, (predicted.total_bytes - predicted.runtime_bytes) / MIB))
            if row.get("used_mib_after_runs"):
                used.append((row["used_mib_after_runs"][index], predicted.total_bytes / MIB))
    return Load(row=row, placement=placement, settings=settings, parts=tuple(parts), used=tuple(used))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; the model of embeddings that a row's load found there is one of its own, before it.

    Raises ``ValueError`` for a line that is none.
    """
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            row["case"], row["way"], row["model"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number} is no row of benchmarks.gpu.bench") from None
        if embedding := row.pop("embedding", None):
            stayed = any(loaded["name"].split(":")[0] == embedding["model"] for loaded in row.get("loaded", ()))
            way = f"{row['way']}: embedding" + ("" if stayed else ", then unloaded")
            yield {**embedding, "case": row["case"], "way": way}
        yield row


def medians(loads: Iterable[Load]) -> list[Load]:
    """One load of each way: the first one's, with the medians of all runs of all loads."""
    by_way: dict[str, list[Load]] = {}
    for load in loads:
        by_way.setdefault(load.row["way"], []).append(load)
    return [_median(alike) for alike in by_way.values()]


def _median(loads: list[Load]) -> Load:
    runs = {
        speed: statistics.median(run for load in loads for run in load.row.get(f"{speed}_runs", [load.row[speed]]))
        for speed in ("decode", "prefill")
        if speed in loads[0].row
    }
    row = loads[0].row | runs | {"load_s": statistics.median(load.row["load_s"] for load in loads), "loads": len(loads)}
    return replace(loads[0], row=row)


@cache
def known(model: str) -> ModelProfile:
    return profile(model)


def calibrations(loads: Iterable[Load]) -> dict[str, Calibration]:
    """By model: what its two solo rows say about the GPUs."""
    rates: dict[str, dict[str, tuple[float, float]]] = {}
    for load in loads:
        row = load.row
        if row["case"].startswith("solo-") and load.placement.order:
            model = row["model"]
            settings = LoadSettings(num_ctx=TOKENS, batch=load.settings.batch, ubatch=load.settings.ubatch)
            gpu = RIG.gpus[load.placement.order[0]]
            learned = solo_rates(
                known(model), settings, gpu, decode_tokens_per_s=row["decode"], prefill_tokens_per_s=row["prefill"]
            )
            rates.setdefault(model, {})[gpu.uuid] = learned
    return {model: Calibration(rates=found) for model, found in rates.items()}


def shares(loads: Iterable[Load]) -> dict[str, float]:
    """By model: the second GPU's decode rate as a part of the first's, each by itself."""
    rates: dict[str, dict[int, float]] = {}
    for load in loads:
        if load.row["case"].startswith("solo-") and load.placement.order:
            rates.setdefault(load.row["model"], {})[load.placement.order[0]] = load.row["decode"]
    return {model: found[1] / found[0] for model, found in rates.items() if len(found) == 2}


def predicted_decode(load: Load, calibration: Calibration | None) -> float | None:
    """Tokens/s; ``None`` where a part on the CPU, unfused attention or an uncalibrated GPU makes it another question."""
    if calibration is None or not load.settings.flash_attention or load.placement.kind not in ("solo", "split"):
        return None
    if load.row["case"].startswith("equal-"):
        first, second = (gpu.uuid for gpu in RIG.gpus)
        if first not in calibration.rates:
            return None
        calibration = Calibration(rates=dict.fromkeys((first, second), calibration.rates[first]))
    settings = LoadSettings(num_ctx=TOKENS, batch=load.settings.batch, ubatch=load.settings.ubatch)
    return predict_speed(known(load.row["model"]), RIG, settings, load.placement, calibration).decode_tokens_per_s


def table(title: str, loads: list[Load], failed: list[dict[str, Any]], learned: dict[str, Calibration]) -> Iterator[str]:
    """One case in Markdown."""
    stock = next((load.row["decode"] for load in medians(loads) if load.row["way"] == "stock"), None)
    yield f"\n### {title}\n"
    yield "| way | layers fast + slow | decode tok/s | × stock | predicted | prefill tok/s | load s | MiB | predicted |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for load in medians(loads):
        row = load.row
        way = f"{row['way']} ({row['loads']} loads)" if row["loads"] > 1 else row["way"]
        predicted = predicted_decode(load, learned.get(row["model"]))
        decode = f"{row['decode']:.1f}" if "decode" in row else ""
        times = f"{row['decode'] / stock:.2f}" if stock and decode else ""
        speed = f"{predicted:.1f}" if predicted else ""
        taken, expected = (" + ".join(f"{pair[i]:.0f}" for pair in load.used or load.parts) for i in (0, 1))
        yield (
            f"| {way} | {load.layers} | {decode} | {times} | {speed} | {row['prefill']:.0f} "
            f"| {row['load_s']:.1f} | {taken} | {expected} |"
        )
    for row in failed:
        out_of_memory = row.get("out_of_memory") or "out of memory" in row.get("log_tail", "")
        reason = "out of memory" if out_of_memory else f"failed: {row.get('error', '')[:60]}"
        yield f"| {row['way']} | {reason} | | | | | | | |"


def verdicts(cases: dict[str, list[Load]], failed: list[dict[str, Any]], learned: dict[str, Calibration]) -> Iterator[str]:
    """Each promise, what was seen, and whether it is kept."""
    loads = [load for found in cases.values() for load in found]
    yield "| promise | seen | kept |\n|---|---|---|"
    yield from _speeds(cases)
    yield _predictions(loads, learned)
    yield _bytes("buffers as llama-server prints them", [(load, pair) for load in loads for pair in load.parts])
    yield _bytes("memory in use by NVML", [(load, pair) for load in loads for pair in load.used])
    behind = [row for row in (*failed, *(load.row for load in loads)) if not row["way"].startswith(("sweep", "stock"))]
    ours = [row for row in behind if row in failed or row.get("out_of_memory")]
    said = ", ".join(f"{row['case']} {row['way']}" for row in ours) or ("none did" if behind else "not run")
    yield f"| no load behind lopsided failed, for memory or otherwise | {said} | {_kept([row not in ours for row in behind])} |"
    fits = sorted(load.row["fit_s"] for load in loads if load.row.get("fit_s"))
    plans = sorted(seconds for load in loads for seconds in load.row.get("plan_s", ()))
    if fits and plans:
        yield (
            f"| time to place a model | `--fit` {fits[0]:.2f} to {fits[-1]:.2f} s; a plan over HTTP {plans[0] * 1e3:.0f} "
            f"to {plans[-1] * 1e3:.0f} ms, median {plans[len(plans) // 2] * 1e3:.0f} | |"
        )
    if reached := shares(loads):
        said = ", ".join(f"{model} {part:.2f}" for model, part in reached.items())
        yield f"| the second card's decode rate, as a part of the first's | {said} | |"


def _speeds(cases: dict[str, list[Load]]) -> Iterator[str]:
    """The automatic plan beside the sweep's best and beside stock."""
    best_of_sweep, of_stock = {}, {}
    for name, loads in cases.items():
        by_way = {load.row["way"]: load.row["decode"] for load in medians(loads) if "decode" in load.row}
        sweep = [decode for way, decode in by_way.items() if way.startswith("sweep")]
        if "auto" in by_way and sweep:
            best_of_sweep[name] = by_way["auto"] / max(sweep)
        if "auto" in by_way and "stock" in by_way:
            of_stock[name] = by_way["auto"] / by_way["stock"]
    for what, ratios, least in (
        ("automatic ≥ 0.97 × the best of the sweep", best_of_sweep, dict.fromkeys(best_of_sweep, 0.97)),
        ("automatic ≥ 0.99 × stock", of_stock, dict.fromkeys(of_stock, 0.99)),
        *((f"*{name}*: automatic ≥ {least} × stock", of_stock, {name: least}) for name, least in TIMES_STOCK.items()),
    ):
        said = ", ".join(f"{name} {ratios[name]:.3f}" for name in least if name in ratios)
        kept = [ratios[name] >= bound for name, bound in least.items() if name in ratios]
        yield f"| {what} | {said or 'not run'} | {_kept(kept)} |"


def _predictions(loads: Iterable[Load], learned: dict[str, Calibration]) -> str:
    """Predicted decode of every load but those that it was learned from."""
    errors = []
    for load in loads:
        predicted = predicted_decode(load, learned.get(load.row["model"]))
        if predicted and not load.row["case"].startswith("solo-"):
            errors.append((abs(predicted / load.row["decode"] - 1), f"{load.row['case']} {load.row['way']}"))
    fine = [error <= 0.1 for error, _ in errors]
    return f"| decode predicted within 10 % | {sum(fine)} of {len(fine)}{_worst(errors)} | {_kept(fine)} |"


def _bytes(what: str, found: list[tuple[Load, tuple[float, float]]]) -> str:
    """Measured and predicted MiB of every device."""
    errors = [(abs(is_ - was), abs(is_ / was - 1), f"{load.row['case']} {load.row['way']}") for load, (was, is_) in found if was]
    fine = [mib <= 128 or part <= 0.02 for mib, part, _ in errors]
    said = "; worst {:.0f} MiB ({:.1%}), {}".format(*max(errors)) if errors else ""
    said = f"{sum(fine)} of {len(fine)}{said}"
    return f"| {what}, within 2 % or 128 MiB | {said} | {_kept(fine)} |"


def _kept(each: list[bool]) -> str:
    return "" if not each else "yes" if all(each) else "**no**"


def _worst(errors: list[tuple[float, str]]) -> str:
    return "; worst {:.1%} ({})".format(*max(errors)) if errors else ""


def report(rows: Path, cases: Path) -> str:
    """The tables in Markdown. Raises ``OSError``, and ``ValueError`` for a line that is no row."""
    titles = {name: case["title"] for name, case in tomllib.loads(cases.read_text()).items()}
    found: dict[str, list[Load]] = {}
    failed: dict[str, list[dict[str, Any]]] = {}
    lines = []
    for row in rows_of(rows):
        if "error" in row or "prefill" not in row:
            failed.setdefault(row["case"], []).append(row)
            continue
        try:
            found.setdefault(row["case"], []).append(understood(row))
        except (ValueError, KeyError, IndexError) as error:
            lines.append(f"<!-- {row['case']} {row['way']}: {error!r} -->")
    learned = calibrations(load for loads in found.values() for load in loads)
    lines += verdicts(found, [row for rows in failed.values() for row in rows], learned)
    for name, title in titles.items():
        if name in found or name in failed:
            lines += table(f"{name}: {title}", found.get(name, []), failed.get(name, []), learned)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--cases", type=Path, default=Path(__file__).parent / "cases.toml")
    args = parser.parse_args()
    try:
        print(report(args.rows, args.cases))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
