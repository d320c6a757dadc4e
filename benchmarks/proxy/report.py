"""The tables of a run, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

Rounds = Mapping[str, Mapping[str, list[float]]]

LIMITS: Mapping[str, tuple[str, float]] = {
    "short p50 us": ("≤", 0.45),
    "chunk p50 us": ("≤", 0.55),
    "chunk p99 us": ("≤", 0.25),
    "cpu s per 100k chunks": ("≤", 0.6),
    "chunks per s": ("≥", 6.0),
    "requests per s": ("≥", 5.0),
}
"""What lopsided is held to, as ratios to the naive proxy."""

BODY_LIMIT_MS = 15.0
PLAN_LIMIT_US = 50.0

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("short p50 us", "short request p50, ms", lambda value: f"{value / 1e3:.2f}"),
    ("short p99 us", "p99, ms", lambda value: f"{value / 1e3:.2f}"),
    ("chunk p50 us", "32 streams: chunk p50, µs", lambda value: f"{value:.0f}"),
    ("chunk p99 us", "p99, µs", lambda value: f"{value:.0f}"),
    ("cpu s per 100k chunks", "CPU s per 100k chunks", lambda value: f"{value:.1f}"),
    ("chunks per s", "most chunks/s, thousands", lambda value: f"{value / 1e3:.1f}"),
    ("requests per s", "32 at once: requests/s", lambda value: f"{value:.0f}"),
    ("10 MiB body ms", "10 MiB body, ms", lambda value: f"{value:.1f}"),
)


def is_rate(name: str) -> bool:
    return name.endswith("per s")


def added(rounds: Rounds, contender: str, name: str) -> list[float]:
    """A figure in each round, less that of the same round without a proxy; rates and processor time as they are."""
    values = rounds[contender].get(name, [])
    if is_rate(name) or "cpu" in name:
        return list(values)
    return [value - direct for value, direct in zip(values, rounds["direct"][name], strict=False)]


def ratios(rounds: Rounds, contender: str, name: str) -> list[float]:
    """How much ``contender`` has of what the naive proxy has, in each round."""
    pairs = zip(added(rounds, contender, name), added(rounds, "naive", name), strict=False)
    return [one / other for one, other in pairs]


def spread(values: list[float]) -> str:
    """The median, and between which the middle half of the rounds lies."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def tables(result: Mapping[str, Any]) -> str:
    """Everything that is in ``result``."""
    lines = [f"{result['machine']}, {result['system']}; {', '.join(result['versions'])}", *result["left out"]]
    if "rounds" in result:
        lines += ["", *main_table(result["rounds"]), "", *limits_table(result)]
    if "sweep" in result:
        lines += ["", *sweep_table(result["sweep"])]
    if "memory" in result:
        lines += ["", *memory_table(result["memory"])]
    return "\n".join(lines)


def main_table(rounds: Rounds) -> list[str]:
    lines = [row("", *(title for _, title, _ in COLUMNS)), row("---", *("--:" for _ in COLUMNS))]
    direct = [text(median(rounds["direct"][name])) for name, _, text in COLUMNS if "cpu" not in name]
    direct.insert(4, "–")
    lines.append(row("direct", *direct))
    for contender in rounds:
        if contender != "direct":
            cells = [text(median(values)) if (values := added(rounds, contender, name)) else "–" for name, _, text in COLUMNS]
            lines.append(row(contender, *cells))
    return lines


def limits_table(result: Mapping[str, Any]) -> list[str]:
    rounds: Rounds = result["rounds"]
    others = [name for name in rounds if name not in ("direct", "naive")]
    if "naive" not in rounds:
        return []
    lines = [row("× naive", "limit", *others), row("---", "--:", *("--:" for _ in others))]
    for name, (sign, limit) in LIMITS.items():
        title = next(title for key, title, _ in COLUMNS if key == name)
        cells = [spread(ratios(rounds, other, name)) for other in others]
        lines.append(row(title, f"{sign} {limit:g}", *cells))
    name = "10 MiB body ms"
    naive = added(rounds, "naive", name)
    cells = []
    for other in others:
        values = added(rounds, other, name)
        cells.append(f"{median(a - b for a, b in zip(values, naive, strict=False)):+.1f}" if values else "–")
    lines.append(row("10 MiB body beside naive, ms", f"≤ +{BODY_LIMIT_MS:g}", *cells))
    if "plan us" in result:
        cells = [f"{result['plan us']:.0f}" if other == "lopsided" else "" for other in others]
        lines.append(row("a plan in force, µs a request", f"≤ {PLAN_LIMIT_US:g}", *cells))
    return lines


def sweep_table(sweep: Mapping[str, Rounds]) -> list[str]:
    contenders = [name for name in next(iter(sweep.values())) if name != "direct"]
    lines = [row("clients", *contenders), row("--:", *("--:" for _ in contenders))]
    for count, rounds in sweep.items():
        cells = []
        for contender in contenders:
            per_s = median(rounds[contender][f"{count} requests per s"])
            p50, p99 = (median(added(rounds, contender, f"{count} chunk {name} us")) / 1e3 for name in ("p50", "p99"))
            cells.append(f"{per_s:.0f} · {p50:.2f} / {p99:.2f}")
        lines.append(row(count, *cells))
    return lines


def memory_table(memory: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for figures in memory.values() for name in figures))
    lines = [row("MiB", *names), row("---", *("--:" for _ in names))]
    for contender, figures in memory.items():
        lines.append(row(contender, *(f"{figures[name]:.1f}" if name in figures else "–" for name in names)))
    return lines
