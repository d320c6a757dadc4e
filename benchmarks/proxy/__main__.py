"""What a proxy in front of Ollama costs: lopsided beside nginx, the obvious proxy and LiteLLM, interleaved in one run.

    python -m benchmarks.proxy --out .cache/bench-proxy.json      (make bench-proxy; docs/performance.md has a run's table)

In each round every contender is driven in turn, so that what else the machine does hits them alike; figures are medians over
rounds, and ratios are made within a round. LiteLLM and aiohttp are installed on first use, into ``.cache/bench-proxy``; a
contender that can't be had is left out, and the output says so. ``--quick`` is three rounds of the main table, two minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.proxy.contenders import OTHER_CORES, Contender, alone, come_first, running
from benchmarks.proxy.install import LeftOutError, prepare, versions
from benchmarks.proxy.measures import MEMORY, OLLAMA_ALONE, ROUND, SLOW, SWEEP, Measure, machine, peak_mib, sweep_of
from benchmarks.proxy.plancost import plan_cost_us
from benchmarks.proxy.report import Rounds, tables

NAMES = ("nginx", "naive", "litellm", "lopsided", "lopsided, aiohttp", "lopsided, httpcore")
SLOW_ROUNDS = 3
"""Rounds in which those take part that take long."""


def play(measures: Sequence[Measure], contenders: Sequence[Contender], rounds: int, what: str) -> Rounds:
    """Figures of each contender, one list entry a round."""
    found: Rounds = {contender.name: defaultdict(list) for contender in contenders}
    for index in range(rounds):
        began = time.monotonic()
        for measure in measures:
            for offset in range(len(contenders)):
                contender = contenders[(offset + index) % len(contenders)]
                if contender.name in SLOW and (index >= SLOW_ROUNDS or measure.__name__ == "image"):
                    continue
                gc.collect()
                with alone(contender, contenders):
                    figures = uvloop.run(measure(contender))
                for name, value in figures.items():
                    found[contender.name][name].append(value)
        print(f"  {what} {index + 1} of {rounds}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def available(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of ``names`` that can take part, and a line on each of the others."""
    found, left_out = [], []
    for name in names:
        try:
            prepare(name)
        except LeftOutError as error:
            left_out.append(f"{name} is left out: {error}")
            print(left_out[-1], file=sys.stderr)
        else:
            found.append(name)
    return found, left_out


def memory(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """MiB of each contender when it is idle, and added by each of ``MEMORY``."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for what, work in MEMORY.items():
        with running([name for name in names if name not in SLOW or what not in OLLAMA_ALONE]) as contenders:
            for contender in contenders[1:]:
                found[contender.name].setdefault("idle", contender.memory_bytes() / 2**20)
                found[contender.name][what] = uvloop.run(peak_mib(contender, work))
        print(f"  memory: {what}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxy", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, help="21, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="few rounds, and only the main table and the plan's cost")
    parser.add_argument(
        "--only", default=",".join(name.replace(", ", ":") for name in NAMES), help="contenders (default: %(default)s)"
    )
    parser.add_argument("--parts", help="of the run (default: rounds,sweep,memory,plan)")
    parser.add_argument("--out", type=Path, help="where the figures of every round go, as JSON")
    arguments = parser.parse_args()
    parts = set((arguments.parts or ("rounds,plan" if arguments.quick else "rounds,sweep,memory,plan")).split(","))
    rounds = arguments.rounds or (3 if arguments.quick else 21)
    names, left_out = available([name.replace(":", ", ") for name in arguments.only.split(",")])
    result: dict[str, object] = {
        "machine": machine(),
        "versions": versions(names),
        "system": platform.system(),
        "load before": os.getloadavg()[0],
        "left out": left_out,
    }
    os.sched_setaffinity(0, OTHER_CORES)
    come_first(os.getpid())
    with running(names) as contenders:
        if "plan" in parts:
            result["plan us"] = plan_cost_us(contenders[0])
        if "rounds" in parts:
            result["rounds"] = play(ROUND, contenders, rounds, "round")
        few = [contender for contender in contenders if ":" not in contender.name and "," not in contender.name]
        few = [contender for contender in few if contender.name not in SLOW]
        if "sweep" in parts:
            result["sweep"] = {
                str(count): play(sweep_of(count), few, max(rounds // 4, 3), f"{count} clients, round") for count in SWEEP
            }
    if "memory" in parts:
        result["memory"] = memory([name for name in names if "," not in name])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1))
    print(tables(result))


if __name__ == "__main__":
    main()
