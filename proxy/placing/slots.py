"""What is remembered of each model: its placement in force, who uses it, and which placements ran out of memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.ollama.options import Delivery
from proxy.placing.inforce import InForce
from proxy.placing.shrunk import Shrunk

FAILURE_KEPT_S = 3600.0
"""Seconds for which a plan that ran out of memory is remembered: until then the model gets the more careful one at once."""


@dataclass(eq=False, kw_only=True, slots=True)
class Slot:
    """What is known about one blob. ``users`` are requests under way with its ``current`` placement.

    ``seen_at`` is when it was known to be loaded last, in seconds of the monotonic clock, ``restarts`` the count of Ollama's
    ends by then.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    current: InForce | None = None
    users: int = 0
    seen_at: float = 0.0
    restarts: int = 0
    shrunk: Shrunk = field(default_factory=Shrunk)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The last delivery that ran out of memory, and how careful the next one is: 1 leaves a margin, 2 is stock."""

    careful: int
    delivery: Delivery
    at: float


class Failures:
    """Placements that ran out of memory, by blob and by the context that was asked for. ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: dict[tuple[str, int | None], Failure] = {}

    def add(self, failed: InForce) -> bool:
        """``failed`` ran out of memory; whether that is new: several requests may have waited for the same load."""
        before = self.last(failed.blob, failed.num_ctx)
        if before is not None and before.careful > failed.careful:
            return False
        failure = Failure(careful=failed.careful + 1, delivery=failed.delivery, at=self._clock())
        self._last[(failed.blob, failed.num_ctx)] = failure
        return True

    def last(self, blob: str, num_ctx: int | None) -> Failure | None:
        """The last failure of ``blob`` with this context, ``None`` where there was none in the last ``FAILURE_KEPT_S``."""
        failure = self._last.get((blob, num_ctx))
        return failure if failure and self._clock() - failure.at <= FAILURE_KEPT_S else None
