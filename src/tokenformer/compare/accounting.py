"""Does growing pay? What an arm spends until it is as good as another in the end, by two accountings.

Counted: the first model and every growth are paid; against the best arm of any size that never grows.
Owned: the first model is there already and its cost is sunk; against the arm that trains the last size from scratch.

Both are read off the ends of whole runs, each decayed to its budget. Between two of them, bits per byte are linear in
the logarithm of what is paid; nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .findings import Findings
from .results import Line
from .statistics import Curve, reached

# Parameters of a grown model and of one trained from scratch may differ by this share and still be one size.
_SAME_SIZE = 0.03

Paid = Callable[[Line], float | None]


@dataclass(frozen=True)
class Account:
    """What an arm spends until it is as good as another at the end of the budget that decides.

    Attributes:
        arm: that spends, and `target`: the other.
        flops: training FLOPs, without those that are sunk.
        share: of the target's training FLOPs up to that end.
        by_seed: the same share for each seed on its own that gets there.
        seeds: how many seeds both arms have.
        at_once: it is as good at its smallest budget already, so that it may need less.
    """

    arm: str
    target: str
    flops: float
    share: float
    by_seed: tuple[float, ...]
    seeds: int
    at_once: bool


def saving(findings: Findings, arm: str, target: str) -> Account | None:
    """Return what an arm spends in all until it is as good as `target`; None if it never is."""
    return _account(findings, arm, target, paid=lambda line: line["training_flops"])


def counted(findings: Findings, arm: str) -> Account | None:
    """Return what a growing arm spends in all until it is as good as the best arm that never grows.

    Runs that end before the first growth are those of the small model, and left out. None if no such arm is there, or
    it is never as good.
    """
    best = findings.best(findings.last, grown=False)
    return _account(findings, arm, best, paid=lambda line: line["training_flops"] if line["growths"] else None)


def owned(findings: Findings, arm: str) -> Account | None:
    """Return what a growing arm spends after its first growth until it is as good as its last size from scratch.

    Runs that end before the last growth are of smaller models, and left out. None if nothing trains that size from
    scratch, or it is never as good.
    """
    twin, whole = scratch_twin(findings, arm), len(findings.recipe.arms[arm].growths)

    def after_growth(line: Line) -> float | None:
        grown = len(line["growths"]) == whole > 0
        return line["training_flops"] - line["growths"][0]["training_flops"] if grown else None

    return _account(findings, arm, twin, paid=after_growth)


def scratch_twin(findings: Findings, arm: str) -> str | None:
    """Return the best arm that never grows and has the kind and the size, within 3 %, of an arm's last model."""
    last = findings.runs(arm)[0]

    def alike(other: str) -> bool:
        line = findings.runs(other)[0]
        same = line["config"].get("model_type") == last["config"].get("model_type")
        return same and abs(line["parameters"] - last["parameters"]) <= _SAME_SIZE * last["parameters"]

    return next((a for a in findings.ranking(findings.last) if not findings.grown(a) and a != arm and alike(a)), None)


def cheapest(findings: Findings, accounting: Callable[[Findings, str], Account | None]) -> Account | None:
    """Return the account of the growing arm that needs the smallest share; None if none gets there."""
    found = [a for arm in findings.arms if findings.grown(arm) and (a := accounting(findings, arm)) is not None]
    return min(found, key=lambda account: account.share, default=None)


def accounts(findings: Findings) -> Iterator[str]:
    """Say what growing saved, by both accountings."""
    grown = [arm for arm in findings.arms if findings.grown(arm)]
    best = findings.best(findings.last, grown=False)
    if not grown or best is None:
        return
    if (least := cheapest(findings, counted)) is None:
        yield f"Counted, with everything paid, no arm that grows reaches the final bits per byte of {best}."
    else:
        yield (
            f"Counted, with everything paid, {least.arm} reaches the final bits per byte of {best}, the best arm that "
            f"never grows, with {least.share:.2f} × its training FLOPs."
        )
    twins = {arm: scratch_twin(findings, arm) for arm in grown}
    if (least := cheapest(findings, owned)) is not None:
        yield (
            f"Owned, with the first model there already, {least.arm} reaches those of {least.target}, its size from "
            f"scratch, with {least.share:.2f} × its training FLOPs."
        )
    elif any(twins.values()):
        yield "Owned, with the first model there already, no arm that grows reaches those of its size from scratch."
    else:
        yield "What growing costs an owner of the first model is open: no arm trains a grown size from scratch."


def _account(findings: Findings, arm: str, target: str | None, *, paid: Paid) -> Account | None:
    """Read the crossing off the means over the seeds that both have, and off each seed alone."""
    if target is None:
        return None
    curves: dict[int, Curve] = {}
    finals = findings.finals.get((target, findings.last), {})
    for seed in finals:
        lines = [findings.finals[arm, budget].get(seed) for budget in findings.budgets_of(arm)]
        curve = [(x, line["bits_per_byte"]) for line in lines if line is not None and (x := paid(line)) is not None]
        if curve:
            curves[seed] = curve
    longest = max(map(len, curves.values()), default=0)
    whole = [seed for seed, curve in sorted(curves.items()) if len(curve) == longest]
    if not whole:
        return None
    by_budget = zip(*(curves[seed] for seed in whole), strict=True)
    mean = [(_mean([x for x, _ in ends]), _mean([bits for _, bits in ends])) for ends in by_budget]
    spent = reached(mean, _mean([finals[seed]["bits_per_byte"] for seed in whole]))
    if spent is None:
        return None
    alone = [(reached(curves[seed], finals[seed]["bits_per_byte"]), finals[seed]["training_flops"]) for seed in whole]
    return Account(
        arm,
        target,
        spent,
        spent / _mean([flops for _, flops in alone]),
        tuple(own / flops for own, flops in alone if own is not None),
        len(whole),
        spent == mean[0][0],
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
