"""When growing paid, and what a doubling of parameters was worth: the advice of `when_to_grow`, fitted and tested.

Every arm that grows, beside the same first model trained on, is a choice at each budget beyond its first growth. The
worth is fitted to all budgets but the largest, and the advice that it gives is tested on the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import AutoConfig

from .. import cost
from ..when_to_grow import WORTH_OF_PARAMETERS, Bargain, slope
from .findings import Findings
from .page import Element, Heading, Paragraph, Table, scientific
from .results import Line
from .statistics import Estimate, paired_difference


@dataclass(frozen=True)
class Choice:
    """To grow, or to train on.

    Attributes:
        arm: that grows, and `base`: that does not.
        at: of the first growth, and `budget`: of both in the end, in the recipe's unit.
        bargain: what could be known at the time of growing.
        gain: bits per byte by which growing came out better; negative if it did not pay.
    """

    arm: str
    base: str
    at: float
    budget: float
    bargain: Bargain
    gain: Estimate


def choices(findings: Findings) -> list[Choice]:
    """Return all choices whose outcome is there, and whose slope can be told from the base's evaluations."""
    return [
        choice
        for arm in findings.arms
        if findings.grown(arm) and (base := findings.own_base(arm)) is not None
        for budget in findings.budgets_of(arm)
        if (choice := _choice(findings, arm, base, budget)) is not None
    ]


def fitted_worth(several: Sequence[Choice]) -> float | None:
    """Return the worth of a doubling of parameters by which choosing loses least; None if any or none would do.

    Choices part at their prices; the number is the geometric middle of two of them.
    """
    prices = sorted({choice.bargain.price for choice in several if choice.bargain.price > 0})
    between = [math.sqrt(low * high) for low, high in pairwise(prices)]
    if not between:
        return None
    lost = [lost_by(several, worth) for worth in between]
    always, never = lost_by(several, math.inf), lost_by(several, 0.0)
    if min(lost) >= min(always, never):
        return None
    return between[lost.index(min(lost))]


def lost_by(several: Sequence[Choice], worth: float) -> float:
    """Return the bits per byte lost on average to always choosing right; a worth of 0 never grows, inf always does."""
    return math.fsum(max(c.gain.mean, 0.0) - c.gain.mean * c.bargain.pays(worth) for c in several) / len(several)


def right(several: Sequence[Choice], worth: float) -> int:
    """Count the choices that come out right."""
    return sum(choice.bargain.pays(worth) == (choice.gain.mean > 0) for choice in several)


def decision(findings: Findings) -> Iterator[Element]:
    """Tabulate all choices; fit, and test on the largest budget."""
    every = choices(findings)
    if not every:
        return
    last = max(choice.budget for choice in every)
    earlier, latest = ([c for c in every if (c.budget == last) == is_last] for is_last in (False, True))
    yield Heading("Grow now, or train on?")
    yield Paragraph(
        "At equal cost a grown model reads less text. Text given up and parameters gained (in the maps of the blocks) "
        "are counted in doublings. The slope is in bits per byte per doubling of text, measured just before growing, "
        "at constant learning rate. The price is slope × text given up ÷ parameters gained, in bits per byte. The "
        "advice is to grow where the price is below what a doubling of parameters is worth."
    )
    worth = fitted_worth(earlier)
    if not earlier:
        yield Paragraph("There are no smaller budgets to fit the worth of a doubling of parameters to.")
    elif worth is None:
        yield Paragraph(
            "On the smaller budgets, choosing by any worth of a doubling of parameters loses as much as always "
            "growing, or never growing."
        )
    else:
        yield Paragraph(
            f"Fitted to all budgets but the largest, a doubling of parameters is worth {worth:.3f} bits per byte."
        )
    for name, value in (
        ("The worth fitted here", worth),
        ("The worth that `tokenformer plan` uses", WORTH_OF_PARAMETERS),
    ):
        if value is not None:
            yield Paragraph(f"{name}, {value:.3f}, on the largest budget: {_tested(latest, value)}")
    yield Table(
        ["arm", "grows at", findings.unit, "slope", "text given up", "parameters gained", "price", "gained by growing"],
        [
            [
                c.arm,
                scientific(c.at),
                scientific(c.budget),
                f"{c.bargain.slope:.3f}",
                f"{c.bargain.text:.2f}",
                f"{c.bargain.parameters:.2f}",
                f"{c.bargain.price:.4f}",
                f"{c.gain}".replace("-", "−"),
            ]
            for c in sorted(every, key=lambda c: (c.budget, c.bargain.price))
        ],
    )


def _tested(several: Sequence[Choice], worth: float) -> str:
    return (
        f"{right(several, worth)} of {len(several)} choices are right, and {lost_by(several, worth):.4f} bits per byte "
        f"are lost on average. Always growing loses {lost_by(several, math.inf):.4f}, never growing "
        f"{lost_by(several, 0.0):.4f}."
    )


def _choice(findings: Findings, arm: str, base: str, budget: float) -> Choice | None:
    at, confidence = findings.recipe.arms[arm].growths[0].at, findings.recipe.rules.confidence
    gain = paired_difference(findings.values(base, budget), findings.values(arm, budget), confidence=confidence)
    slopes = [found for line in findings.runs(base) if (found := _slope(findings, line, at)) is not None]
    if not gain.seeds or not slopes:
        return None
    ends = [next(iter(findings.finals[name, budget].values())) for name in (base, arm)]
    small, large = (cost.block_parameters(AutoConfig.for_model(**line["config"])) for line in ends)
    if not 0 < small < large:  # it begins without blocks, or does not grow within this budget
        return None
    text = findings.mean(base, budget, "text_tokens") / findings.mean(arm, budget, "text_tokens")
    bargain = Bargain(math.fsum(slopes) / len(slopes), math.log2(large / small), math.log2(text))
    return Choice(arm, base, at, budget, bargain, gain)


def _slope(findings: Findings, line: Line, at: float) -> float | None:
    """Return the slope of a never-grown run just before `at`, its decay left out."""
    recipe = findings.recipe
    if recipe.training_of(line["arm"]).schedule == "cosine" or not line["curve"]:
        return None
    held, spent = recipe.trunk_end(line["arm"], line["budget"]), recipe.equal
    curve = [(p["text_tokens"], p["bits_per_byte"]) for p in line["curve"] if p[spent] <= held * (1 + 1e-3)]
    finite = [(text, bits) for text, bits in curve if bits is not None]
    return slope(finite, at * line["text_tokens"] / line[spent])
