"""What is known of the loads that the launcher asked about: which failed, and whether the launcher still answers.

A load failed where the proxy saw the answer that says so, or where the model is launched anew, before ``/api/ps`` has shown it,
with a smaller context: so Ollama itself tries again. The same load once more proves nothing, since its client may have left, or
it was over before anybody looked; only the second such load in a row, with nothing seen of either, counts. Pure save the clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TypeVar

from planner.plan import Plan
from planner.request import Candidate

T = TypeVar("T")

FAILURE_KEPT_S = 3600.0
"""Seconds for which a failed load is remembered: until then the model gets the more careful answer at once."""

PENDING_S = 900.0
"""Seconds after which a load that was never seen to end is forgotten; the largest models take minutes from a slow disk."""

BLOBS_KEPT = 1024
"""Models remembered of each kind."""

UNPROVEN_TRIES = 2
"""Loads in a row that ended unseen and for no known reason: so many count as one that failed."""

MOST_CAREFUL = 2
"""0 is the plan, 1 the plan with a wider margin, 2 what stock Ollama would do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    answer: object
    context: int
    at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    careful: int
    answer: object
    at: float


class Launches:
    """Answers that went out, and what became of them. ``clock`` is monotonic, in seconds; blobs are named by ``blob_name``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pending: OrderedDict[str, _Given] = OrderedDict()
        self._failures: OrderedDict[str, _Failure] = OrderedDict()
        self._unseen: OrderedDict[str, int] = OrderedDict()  # loads in a row that ended so
        self._expected: OrderedDict[str, None] = OrderedDict()
        self._names: OrderedDict[str, str] = OrderedDict()
        self._placed: OrderedDict[str, tuple[Plan, Candidate]] = OrderedDict()
        self.answering = False
        """The launcher has asked, and no load went past it since."""
        self.spread = False
        """Ollama leaves every GPU visible to each load (``OLLAMA_SCHED_SPREAD``), so that the launcher alone can place it."""

    @property
    def places_all(self) -> bool:
        """Every load is placed by the launcher, so that no request needs options."""
        return self.answering and self.spread

    # What the launcher does

    def asked(self, blob: str, *, spread: bool) -> None:
        """The launcher asks for ``blob``."""
        self.answering, self.spread = True, spread
        self._expected.pop(blob, None)
        self._placed.pop(blob, None)

    def careful(self, blob: str, context: int) -> int:
        """How careful the answer for ``blob`` must be, now that it is launched with ``context`` tokens in all."""
        before = self._before(blob)
        open_answer = self._pending.pop(blob, None)
        if open_answer is None or self._clock() - open_answer.at > PENDING_S:
            self._unseen.pop(blob, None)
            return before
        unseen = self._unseen.get(blob, 0) + 1
        if context < open_answer.context or unseen >= UNPROVEN_TRIES:
            return self._failed(blob, before + 1, open_answer.answer)
        _put(self._unseen, blob, unseen)
        return before

    def level(self, blob: str) -> int:
        """How careful the next answer for ``blob`` will be at least: 0 where none has failed lately."""
        return self._before(blob)

    def given(self, blob: str, answer: object, context: int) -> None:
        """``answer`` went out for ``blob``: from now on it is open whether that loads."""
        _put(self._pending, blob, _Given(answer=answer, context=context, at=self._clock()))

    def place(self, blob: str, plan: Plan, candidate: Candidate) -> None:
        """``blob`` was last told to go where ``candidate`` of ``plan`` has it."""
        _put(self._placed, blob, (plan, candidate))

    def placed(self, blob: str) -> tuple[Plan, Candidate] | None:
        """The plan by which ``blob`` was placed last, and which of its candidates; ``None`` where Ollama was left alone."""
        return self._placed.get(blob)

    def has_failed(self, blob: str, answer: object) -> bool:
        """Whether this very answer is the one that failed last, and nothing has loaded since."""
        failure = self._failures.get(blob)
        return failure is not None and failure.answer == answer

    def give_up(self, blob: str, answer: object) -> int:
        """``answer`` would fail as it did before: only stock is left."""
        return self._failed(blob, MOST_CAREFUL, answer)

    # What Ollama says

    def failed(self, blob: str) -> bool:
        """A request for ``blob`` ran out of memory: whether a plan was to blame, so that the next launch gets another answer."""
        open_answer = self._pending.pop(blob, None)
        before = self._before(blob)
        if open_answer is None or before >= MOST_CAREFUL:
            return False
        self._failed(blob, before + 1, open_answer.answer)
        return True

    @property
    def pending(self) -> Collection[str]:
        """Models whose load is still open."""
        now = self._clock()
        return [blob for blob, given in self._pending.items() if now - given.at <= PENDING_S]

    def loaded(self, blob: str) -> None:
        """``/api/ps`` shows ``blob``, or a request for it was answered: its load went well, and the answer may be given again."""
        self._pending.pop(blob, None)
        self._unseen.pop(blob, None)
        if failure := self._failures.get(blob):
            self._failures[blob] = replace(failure, answer=None)

    def left(self, blob: str) -> None:
        """The client that ``blob`` was loaded for has left, and Ollama ends such a load: what becomes of it means nothing."""
        self._pending.pop(blob, None)

    def expect(self, blob: str) -> None:
        """A request is about to load ``blob``, and counts on the launcher to place it; or waits for a load that it has placed."""
        if blob not in self.pending:
            _put(self._expected, blob, None)

    def called(self, blob: str, model: str) -> None:
        """A request by the name ``model`` loads ``blob``."""
        _put(self._names, blob, model)

    def name(self, blob: str) -> str | None:
        """By which name ``blob`` was asked for last; ``None`` where no request came this way."""
        return self._names.get(blob)

    def answered(self, blob: str) -> bool:
        """A request for ``blob`` was answered. False where its load was expected here and went past the launcher."""
        self.loaded(blob)
        if blob not in self._expected:
            return True
        self._expected.clear()
        self.answering = False
        return False

    def _before(self, blob: str) -> int:
        failure = self._failures.get(blob)
        if failure and self._clock() - failure.at > FAILURE_KEPT_S:
            failure = None
            del self._failures[blob]
        return failure.careful if failure else 0

    def _failed(self, blob: str, careful: int, answer: object) -> int:
        careful = min(careful, MOST_CAREFUL)
        self._unseen.pop(blob, None)
        _put(self._failures, blob, _Failure(careful=careful, answer=answer, at=self._clock()))
        return careful


def _put(kept: OrderedDict[str, T], blob: str, value: T) -> None:
    kept[blob] = value
    kept.move_to_end(blob)
    while len(kept) > BLOBS_KEPT:
        kept.popitem(last=False)
