"""When a model that has lost context by a failed load is worth loading anew.

Where nobody sets a context, Ollama tries a load that ran out of memory again with a smaller one by itself, and the model stays
like that. Once a plan holds all that was planned with, an idle model is loaded anew for it: not before ``REPLAN_S``, and once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from planner.plan import Plan
from proxy.launcher.launches import MOST_CAREFUL
from proxy.ollama.client import Loaded
from proxy.ollama.options import Delivery
from proxy.placing.inforce import InForce
from proxy.placing.steady import REPLAN_S

log = logging.getLogger("lopsided.placement")


@dataclass(kw_only=True, slots=True)
class Shrunk:
    """What is known of the lost context of one model: ``since`` when, in seconds of the monotonic clock, and whether it was
    ``mended``: loaded anew for that reason, and not seen with the whole context since."""

    since: float | None = None
    mended: bool = False

    def due(self, current: InForce, entry: Loaded, *, level: int, now_s: float) -> bool:
        """Whether to look for a plan that holds the whole context of ``current``, loaded as ``entry`` and idle.

        ``level`` is how careful the launcher's next answer will be: 0 where no load has failed lately.
        """
        planned_ctx = current.planned_ctx or 0
        if not 0 < entry.context_length < planned_ctx:
            self.since, self.mended = None, False
            return False
        if self.since is None and level:
            self.since = now_s
            log.warning("%s: loaded with %d tokens of context, not %d", current.model, entry.context_length, planned_ctx)
        if self.since is None or self.mended or entry.pinned:
            return False
        return level < MOST_CAREFUL and now_s - self.since >= REPLAN_S


def restores(current: InForce, plan: Plan, delivery: Delivery) -> bool:
    """Whether ``plan`` holds the context that ``current`` was planned with, and puts no more layers into RAM for it."""
    if not delivery.by_launcher or plan.chosen.settings.num_ctx < (current.planned_ctx or 0):
        return False
    before = current.plan.chosen.placement.cpu_layers if current.plan else 0
    return plan.chosen.placement.cpu_layers <= before
