"""What runs with several seeds say: intervals, paired differences, verdicts in words, and where curves cross.

The metric is bits per byte throughout: less is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import MissingExtraError

try:
    from scipy import stats
except ImportError as error:
    raise MissingExtraError("the statistics of a comparison need scipy: pip install 'tokenformer[compare]'") from error

# Points (cost, bits per byte) by rising cost; between them, bits per byte are linear in the cost's logarithm.
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: in bits per byte; NaN without seeds.
        half_width: of the interval mean ± half_width; None with fewer than two seeds.
        p: of the two-sided t test that the mean is zero; None likewise.
        seeds: how many.
    """

    mean: float
    half_width: float | None
    p: float | None
    seeds: int

    def __str__(self) -> str:
        if not self.seeds:
            return "–"
        return f"{self.mean:.4f}" + ("" if self.half_width is None else f" ± {self.half_width:.4f}")


@dataclass(frozen=True)
class Verdict:
    """What can be said about A and B.

    Attributes:
        kind: "better", "slightly better" (less than matters), "perhaps better" (not after correction), "equivalent",
            "same", "cannot tell", "perhaps worse", "slightly worse", "worse", or "no interval"; in a first look "ahead"
            and "behind" stand for "better" and "worse".
        sentence: the same with names and numbers.
    """

    kind: str
    sentence: str


def estimate(values: Sequence[float], *, confidence: float) -> Estimate:
    """Return the mean of independent values with its interval by Student's t distribution."""
    n = len(values)
    if n < 2:
        return Estimate(values[0] if n else math.nan, None, None, n)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Estimate(mean, float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error, p, n)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], *, confidence: float) -> Estimate:
    """Return A − B over the seeds, the keys, that both have: what a seed decides alike for both cancels out."""
    return estimate([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], confidence=confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p values of a family of comparisons, so that any false finding in it has the stated probability.

    Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def verdict(
    a: str, b: str, difference: Estimate, *, p: float | None, threshold: float, confidence: float, claim: bool
) -> Verdict:
    """Say in words what the difference A − B shows.

    Args:
        a, b: names.
        difference: as `paired_difference` gives it.
        p: its p value, corrected where several comparisons are made.
        threshold: smallest difference in bits per byte that matters.
        confidence: of the interval; a difference is told from none if p < 1 − confidence.
        claim: whether one may be called better or worse; in a first look it is ahead or behind.
    """
    d, h = difference.mean, difference.half_width
    if not difference.seeds:
        return Verdict("no interval", f"{a} and {b} have no seed in common, so that nothing can be said about them")
    kind = ("better" if d < 0 else "worse") if claim else ("ahead" if d < 0 else "behind")
    word = {"better": "better than", "worse": "worse than", "ahead": "ahead of", "behind": "behind"}[kind]
    by = "by" if claim else "in this first look, by"
    if h is None or p is None:
        told = f"{a} came out {word} {b} {by} {abs(d):.4f} bits per byte" if d else f"{a} and {b} came out alike"
        return Verdict("no interval", f"with one seed there is no interval; {told}")
    if d == h == 0:
        return Verdict("same", f"{a} and {b} are the same: equal to the last bit with every seed")
    below = abs(d) + h < threshold
    if p < 1 - confidence:
        told = f"{a} is {word} {b} {by} {abs(d):.4f} ± {h:.4f} bits per byte"
        if below:
            return Verdict(f"slightly {kind}", f"{told}, but by less than the {threshold:g} that matters")
        surely = abs(d) - h >= threshold
        return Verdict(kind, told if surely else f"{told}, which may be less than the {threshold:g} that matters")
    seen = f"{d:+.4f} ± {h:.4f} bits per byte".replace("-", "−")
    if below:
        return Verdict("equivalent", f"{a} and {b} differ by less than the {threshold:g} that matters: by {seen}")
    if abs(d) > h:
        return Verdict(
            f"perhaps {kind}",
            f"{a} is perhaps {word} {b}{',' if claim else ''} {by} {abs(d):.4f} ± {h:.4f} bits per byte: not "
            f"significant after Holm's correction (p = {p:.2g})",
        )
    return Verdict(
        "cannot tell",
        f"{a} and {b} cannot be told apart: they differ by {seen}, which may be nothing or may matter",
    )


def reached(curve: Curve, target: float) -> float | None:
    """Return the first cost at which a curve is as low as `target`; None if it never is: nothing is extrapolated."""
    if curve and curve[0][1] <= target:
        return curve[0][0]
    return next((_cost_at(left, right, target) for left, right in pairwise(curve) if right[1] <= target), None)


def crossing(a: Curve, b: Curve) -> float | None:
    """Return the cost from which A stays below B as far as both are known; None if A is not below in the end.

    If A is below throughout, that is the smallest cost at which both are known.
    """
    known = [x for x, _ in (*a, *b) if all(curve and curve[0][0] <= x <= curve[-1][0] for curve in (a, b))]
    gaps = [(x, value_at(a, x) - value_at(b, x)) for x in sorted(set(known))]
    if not gaps or gaps[-1][1] >= 0:
        return None
    above = [i for i, (_, gap) in enumerate(gaps) if gap >= 0]
    if not above:
        return gaps[0][0]
    return _cost_at(gaps[above[-1]], gaps[above[-1] + 1], 0.0)


def value_at(curve: Curve, cost: float) -> float:
    """Return a curve's bits per byte at a cost between those of its first and last point."""
    costs, values = zip(*curve, strict=True)
    return float(np.interp(math.log(cost), np.log(costs), values))


def _cost_at(left: tuple[float, float], right: tuple[float, float], value: float) -> float:
    """Return where the line between two points has a value, the right point's or one on the way to it."""
    share = (left[1] - value) / (left[1] - right[1])
    return left[0] * (right[0] / left[0]) ** share
