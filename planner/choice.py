"""Which candidate is taken: what each objective wants more of, how ties are broken, and when stock stays."""

from __future__ import annotations

from collections.abc import Iterable

from planner.request import Candidate, Objective

NEVER_WORSE_GAIN = 0.02
"""How much faster than stock a plan must be predicted to be taken, a pure number; a smaller gain is not worth a reload."""

TIE = 0.001
"""Scores that differ by less count as equal, a pure number."""

BALANCED_TURN = (1024, 256)
"""Tokens of prompt and answer by which the objective ``balanced`` weighs prefill and decode."""


def turn(objective: Objective) -> tuple[float, float]:
    """Tokens of prompt and answer that the objective wants fast."""
    if objective == "decode":
        return 0, 1
    if objective == "prefill":
        return 1, 0
    return BALANCED_TURN if objective == "balanced" else objective


def score(candidate: Candidate, objective: Objective) -> float:
    """What the objective wants more of: tokens/s of its turn."""
    prompt, answer = turn(objective)
    return (prompt + answer) / (prompt / candidate.prefill_tokens_per_s + answer / candidate.decode_tokens_per_s)


def ranked(candidates: Iterable[Candidate], objective: Objective) -> tuple[Candidate, ...]:
    """The best first. Within ``TIE`` of the best: fewer GPUs, then the faster prefill, then the order given."""
    rest = sorted(candidates, key=lambda candidate: -score(candidate, objective))
    order: list[Candidate] = []
    while rest:
        best = score(rest[0], objective)
        tied = [candidate for candidate in rest if score(candidate, objective) >= best * (1 - TIE)]
        order += sorted(tied, key=lambda candidate: (len(candidate.placement.order), -candidate.prefill_tokens_per_s))
        rest = rest[len(tied) :]
    return tuple(order)


def choose(candidates: Iterable[Candidate], stock: Candidate, objective: Objective) -> Candidate:
    """The best of ``candidates``, or ``stock`` itself where none is worth leaving it.

    Stock stays unless the best scores ``NEVER_WORSE_GAIN`` more, so what decodes no faster and prefills slower is never taken,
    whatever the objective. A stock that does not fit (the load would fail) is left for any candidate.
    """
    best = next(iter(ranked(candidates, objective)), None)
    if best is None or not stock.fits:
        return best or stock
    return best if score(best, objective) >= score(stock, objective) * (1 + NEVER_WORSE_GAIN) else stock
