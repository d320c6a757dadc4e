"""How fast real cards are: rates from runs that people published, so that a simulated card does not run as the planner predicts.

``published.csv`` beside this file holds the runs and says where they come from. Only decode is taken from there; prompts are read
as the cards' data have it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from planner.hardware import Gpu, Rig
from planner.speed import Calibration, gpu_rates
from proxy.gpus.specs import Card, find_card

TABLE = Path(__file__).with_name("published.csv")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One model on one kind of card: the bytes that a token reads, and tokens/s of decode."""

    card: Card
    model: str
    read_bytes: float
    layers: int
    tokens_per_s: float

    @property
    def gpu(self) -> Gpu:
        """The card, as far as it decides decode."""
        card = self.card
        return Gpu(
            uuid=card.name,
            name=card.name,
            total_bytes=card.total_bytes,
            free_bytes=card.total_bytes,
            compute_capability=card.compute_capability,
            bandwidth_bytes_per_s=card.bandwidth_bytes_per_s,
        )

    @property
    def bytes_per_s(self) -> float:
        """What the card read in a second, its layers' fixed costs counted as the bytes that they stand for."""
        return (self.read_bytes + self.layers * gpu_rates(self.gpu).layer_bytes) * self.tokens_per_s

    @property
    def share(self) -> float:
        """The same as a part of the card's theoretical rate."""
        return self.bytes_per_s / self.card.bandwidth_bytes_per_s


@cache
def published_runs() -> tuple[Run, ...]:
    """All runs of the table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(
            Run(
                card=find_card(row["card"]),
                model=row["model"],
                read_bytes=float(row["read_gb"]) * 1e9,
                layers=int(row["layers"]),
                tokens_per_s=float(row["tokens_per_s"]),
            )
            for row in csv.DictReader(line for line in file if not line.startswith("#"))
        )


def published_rates(rig: Rig) -> Calibration:
    """Each card's rate: the median of its own runs, else its data by the median share of the cards of its compute capability.

    A card of a generation without runs keeps what the planner predicts.
    """
    rates = {}
    for gpu in rig.gpus:
        predicted = gpu_rates(gpu)
        share = _share(gpu)
        decode = gpu.bandwidth_bytes_per_s * share if gpu.bandwidth_bytes_per_s and share else predicted.decode_bytes_per_s
        rates[gpu.uuid] = (decode, predicted.prefill_flops_per_s)
    return Calibration(rates=rates)


def _share(gpu: Gpu) -> float | None:
    return _median(run.share for run in published_runs() if run.card.name == gpu.name) or _median(
        run.share for run in published_runs() if run.card.compute_capability == gpu.compute_capability
    )


def _median(shares: Iterable[float]) -> float | None:
    found = list(shares)
    return median(found) if found else None
