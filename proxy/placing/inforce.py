"""The placements in force, and the file that brings them over an end of the proxy without warning.

A model stays loaded while the proxy is killed and started again. With a plan made anew, on cards that are full by now, its next
request would carry other options, and Ollama would load it again for nothing. So what is in force is written down before it
goes out, and taken over at the next start; ``/api/ps`` then says which of it still holds.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.plan import Plan
from proxy.address import Address
from proxy.config.rules import Rule
from proxy.ollama.options import Delivery, header_text
from proxy.statefile import StateFile

FORMAT = 1
"""Counts up when a file that an older lopsided wrote can't be understood any more; such a file is passed over."""

KEEP_S = 1.0
"""Longest that a request waits for its placement to be on the disk; a file of this size takes milliseconds."""

log = logging.getLogger("lopsided.placement")


@dataclass(frozen=True, kw_only=True, slots=True)
class InForce:
    """A model's placement as it was decided: for every request that loads it with this context.

    ``num_ctx`` is the context that was asked for (``None``: Ollama chooses), ``planned_ctx`` the one that was planned with.
    ``held_bytes`` is what it takes on each GPU, ``None`` where that is not known. ``plan`` is ``None`` where there was none, and
    for one that was taken over from another process. ``rule`` is the one that it was decided by, ``None`` likewise.
    ``decided_at`` is in seconds of the monotonic clock, of the process that decided.
    """

    model: str
    blob: str
    digest: str
    num_ctx: int | None
    delivery: Delivery
    careful: int
    plan: Plan | None = None
    planned_ctx: int | None = None
    held_bytes: tuple[int, ...] | None = None
    rule: Rule | None = None
    decided_at: float = -math.inf


def held_bytes(plan: Plan | None, delivery: Delivery) -> tuple[int, ...] | None:
    """Bytes on each GPU of a model that was placed so, ``None`` where that is not known."""
    if plan is None:
        return None
    running = plan.chosen if delivery.by_launcher else plan.chosen_by_options
    return tuple(device.total_bytes for device in running.memory.devices)


class Ledger:
    """Keeps what ``in_force`` returns in ``file``; nothing here raises, and nobody waits longer than ``KEEP_S``."""

    def __init__(
        self, file: StateFile, in_force: Callable[[], Iterable[InForce]], spread: Callable[[], bool] = lambda: False
    ) -> None:
        self._file = file
        self._in_force = in_force
        self._spread = spread
        self.spread = False
        """Whether Ollama was seen to spread models (``OLLAMA_SCHED_SPREAD``), as it was read or written last."""
        self._changed = False
        self._writing: asyncio.Task[None] | None = None

    def read(self) -> tuple[InForce, ...]:
        """What was in force when the file was written last."""
        value = self._file.read()
        if not value or value.get("format") != FORMAT:
            return ()
        self.spread = value.get("spread") is True
        try:
            return tuple(from_json(row) for row in value["in_force"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._file.set_aside(f"{type(error).__name__}: {error}")
            return ()

    async def keep(self) -> None:
        """Call after each change: returns when it is on the disk, or ``KEEP_S`` later."""
        self._changed = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="keep placements")
        await asyncio.wait({self._writing}, timeout=KEEP_S)

    async def _write(self) -> None:
        while self._changed:
            self._changed = False
            rows, self.spread = [to_json(in_force) for in_force in self._in_force()], self._spread()
            await asyncio.to_thread(self._file.write, {"format": FORMAT, "spread": self.spread, "in_force": rows})


def file_name(upstream: Address) -> str:
    """The file for the models of one Ollama: several proxies may share a folder."""
    return f"in-force-{re.sub(r'[^A-Za-z0-9.-]', '_', f'{upstream.host}-{upstream.port}-{upstream.path}'.removesuffix('-'))}.json"


def to_json(in_force: InForce) -> dict[str, Any]:
    """Everything but the plan, which is large, and needed only to explain it."""
    delivery = in_force.delivery
    return {
        "model": in_force.model,
        "blob": in_force.blob,
        "digest": in_force.digest,
        "num_ctx": in_force.num_ctx,
        "planned_ctx": in_force.planned_ctx,
        "held_bytes": in_force.held_bytes,
        "careful": in_force.careful,
        "delivery": {
            "text": delivery.text,
            "options": dict(delivery.options),
            "without": sorted(delivery.without),
            "by_launcher": delivery.by_launcher,
        },
    }


def from_json(row: Mapping[str, Any]) -> InForce:
    """The inverse of :func:`to_json`. Raises ``ValueError``, ``TypeError``, ``KeyError`` or
    ``AttributeError`` where ``row`` is something else."""
    delivery = row["delivery"]
    held = row["held_bytes"]
    return InForce(
        model=_text(row["model"]),
        blob=_text(row["blob"]),
        digest=_text(row["digest"]),
        num_ctx=_count_or_none(row["num_ctx"]),
        planned_ctx=_count_or_none(row["planned_ctx"]),
        held_bytes=None if held is None else tuple(_count(item) for item in held),
        careful=_count(row["careful"]),
        delivery=Delivery(
            text=header_text(_text(delivery["text"])),
            options={_text(name): _option(value) for name, value in delivery["options"].items()},
            without=frozenset(_text(name) for name in delivery["without"]),
            by_launcher=delivery["by_launcher"] is True,
        ),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError(f"{value!r} is no number of things")
    return value


def _count_or_none(value: object) -> int | None:
    return None if value is None else _count(value)


def _option(value: object) -> int | str:
    return value if isinstance(value, str) else _count(value)
