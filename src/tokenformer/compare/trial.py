"""How the advice of `tokenformer plan --run` does on a comparison: what it would have said, and what came of it.

Every arm that grew once is a choice at each budget. Its own first model, trained without growing to the budget before
that one, is what the owner has; up to the budget it can be trained on, or have grown as the arm did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..law import Knowledge, Seen, expect
from .findings import Findings
from .statistics import Estimate, paired_difference
from .transfer import blocks, grown_runs


@dataclass(frozen=True)
class Choice:
    """To grow, or to train on.

    Attributes:
        arm: that grew, `base`: that did not, and `budget`: of both in the end.
        expected: bits per byte by which growing should have come out lower.
        gain: by which it did; negative if it did not pay.
        misses: bits per byte by which the two forecasts, trained on and grown, differed from what came.
        held: how many of the two lay within their intervals.
    """

    arm: str
    base: str
    budget: float
    expected: float
    gain: Estimate
    misses: tuple[float, float]
    held: int


def choices(findings: Findings, knowledge: Knowledge) -> Iterator[Choice]:
    """Weigh every choice that a comparison holds, by what is known from others."""
    ways = {(each.grown, each.rate): each for each in knowledge.transfers}
    runs = [run for run in grown_runs(findings) if (run.grown, run.rate) in ways]
    for arm, budget in dict.fromkeys((run.arm, run.budget) for run in runs):
        base = findings.own_base(arm)
        earlier = [b for b in findings.budgets_of(base) if b < budget] if base else []
        if base is None or not earlier or (base, budget) not in findings.finals:
            continue
        run = next(run for run in runs if (run.arm, run.budget) == (arm, budget))
        law, size = knowledge.law, blocks(findings.runs(base)[0])
        seen = Seen(size, findings.mean(base, earlier[-1], "text_tokens"), findings.score(base, earlier[-1]).mean)
        on = expect(law, size, findings.mean(base, budget, "text_tokens"), seen=seen)
        way = ways[run.grown, run.rate]
        grown = expect(law, run.after, run.text_tokens, before=run.read, transfer=way, seen=seen)
        came = [findings.score(name, budget).mean for name in (base, arm)]
        gain = paired_difference(
            findings.values(base, budget), findings.values(arm, budget), confidence=findings.recipe.rules.confidence
        )
        yield Choice(
            arm,
            base,
            budget,
            on.bits_per_byte - grown.bits_per_byte,
            gain,
            (came[0] - on.bits_per_byte, came[1] - grown.bits_per_byte),
            sum(e.interval[0] <= bits <= e.interval[1] for e, bits in zip((on, grown), came, strict=True)),
        )


def lost(several: Sequence[Choice], *, grow: bool | None = None) -> float:
    """Return the bits per byte lost on average to always choosing right, by growing as advised, always or never."""
    return fmean(max(c.gain.mean, 0.0) - c.gain.mean * (c.expected > 0 if grow is None else grow) for c in several)


def right(several: Sequence[Choice]) -> int:
    """Count the choices that come out as advised."""
    return sum((choice.expected > 0) == (choice.gain.mean > 0) for choice in several)


def missed(several: Sequence[Choice]) -> float:
    """Return by how many bits per byte forecasts differ from what came, as a root of the mean square."""
    return math.sqrt(fmean(miss**2 for choice in several for miss in choice.misses))
