"""A table of cards by name: what ``--gpu "RTX 5090"`` stands for.

``cards.csv`` beside this file holds some 400 cards; ``tests/make_cards.py`` writes it and says where the figures come from.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from planner.units import GIB, MIB
from proxy.errors import GpuError

TABLE = Path(__file__).with_name("cards.csv")

DRIVER_RESERVE_SHARE = 0.037
"""Share of a card's memory that is not free on an idle machine: driver, ECC or display.

Between the two known cases: an RTX 5090 has about 31 500 of 32 768 MiB free, an RTX 3090 about 23 700 of 24 576 MiB.
"""

_LIBRARIES = {"NVIDIA": "CUDA", "AMD": "ROCm", "Intel": "Vulkan"}
_BRANDS = frozenset({"nvidia", "amd", "intel", "geforce", "radeon", "quadro", "tesla", "instinct", "graphics", "gpu", "r", "tm"})
_SERIES = frozenset({"rtx", "gtx", "rx", "arc"})
_NEAREST = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One kind of card; ``sm_count`` counts compute units on AMD cards and Xe cores on Intel's."""

    name: str
    library: str
    total_bytes: int
    sm_count: int
    clock_mhz: int
    bandwidth_bytes_per_s: int
    compute_capability: tuple[int, int] | None
    pcie_generation: int | None
    pcie_width: int | None
    integrated: bool


def idle_free_bytes(total_bytes: int) -> int:
    """Bytes that a model finds free on a card of ``total_bytes`` that nothing else uses, in whole MiB."""
    return int(total_bytes * (1 - DRIVER_RESERVE_SHARE)) // MIB * MIB


@cache
def cards() -> tuple[Card, ...]:
    """All cards of the table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(_card(row) for row in csv.DictReader(line for line in file if not line.startswith("#")))


def find_card(name: str) -> Card:
    """The card that ``name`` means: brand, case and spaces don't matter, nor the memory's size where one card fits.

    ``5090``, ``rtx 5090`` and ``NVIDIA GeForce RTX 5090`` are one card; ``RTX 4060 Ti`` is two, told apart by ``16GB`` or
    ``8GB``. The first of these rules that any card meets decides: the same words; the same but for the card's own memory
    size; the same but for the series (``RTX``, ``RX``); all words of ``name``, and the fewest others. Laptop cards are
    meant only by names that say ``Laptop`` or ``Mobile``. Raises ``GpuError`` where no card or several meet it.
    """
    wanted = _words(name)
    if not wanted - _SERIES:
        raise _unknown(name)
    table = [row for row in _table() if "laptop" in wanted or "laptop" not in row[1]]
    extra = {card.name: len(words - {size} - wanted) for card, words, size in table if wanted - {size} <= words}
    fewest = min(extra.values(), default=0)
    for found in (
        [card for card, words, _ in table if words == wanted],
        [card for card, words, size in table if words - {size} == wanted - {size}],
        [card for card, words, size in table if words - {size} - _SERIES == wanted - {size} - _SERIES],
        [card for card, _, _ in table if extra.get(card.name) == fewest],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise GpuError(f"{name!r} can be {_list(card.name for card in found)}; say which")
    raise _unknown(name)


@cache
def _table() -> tuple[tuple[Card, frozenset[str], str], ...]:
    """Each card, the words of its name, and the word for its memory's size."""
    return tuple((card, _words(card.name), f"{card.total_bytes / GIB:g}gb") for card in cards())


def _unknown(name: str) -> GpuError:
    by_words = {" ".join(sorted(words)): card.name for card, words, _ in _table()}
    near = difflib.get_close_matches(" ".join(sorted(_words(name))), by_words, n=_NEAREST, cutoff=0.4)
    hint = f"; near to it: {_list(by_words[words] for words in near)}" if near else ""
    return GpuError(f"no card is known as {name!r}{hint}. Others can be described in a profile (docs/settings.md)")


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NEAREST]) + (f" and {len(names) - _NEAREST} more" if len(names) > _NEAREST else "")


def _words(name: str) -> frozenset[str]:
    """The words that tell cards apart, in lower case: ``16 GB`` and ``16GiB`` as ``16gb``, mobile cards as ``laptop``."""
    text = re.sub(r"(\d+)\s*gi?b\b", r" \1gb ", name.lower()).replace("mobile", "laptop")
    text = re.sub(r"\b(rtx|gtx|rx)(?=\d)", r"\1 ", text)
    text = re.sub(r"(?<=\d)(ti|xtx|xt|super|gre)\b", r" \1", text)
    return frozenset(re.findall(r"[a-z0-9]+", text)) - _BRANDS - {"generation", "edition"}


def _card(row: dict[str, str]) -> Card:
    major, _, minor = row["compute_capability"].partition(".")
    generation, _, width = row["pcie"].partition("x")
    return Card(
        name=row["name"],
        library=_LIBRARIES[row["vendor"]],
        total_bytes=int(float(row["memory_gib"]) * GIB),
        sm_count=int(row["sm_count"]),
        clock_mhz=int(row["clock_mhz"]),
        bandwidth_bytes_per_s=int(row["bandwidth_mb_per_s"]) * 10**6,
        compute_capability=(int(major), int(minor)) if major else None,
        pcie_generation=int(generation) if generation else None,
        pcie_width=int(width) if width else None,
        integrated=row["integrated"] == "1",
    )
