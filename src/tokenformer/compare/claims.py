"""A claim or a first look? What an arm's result at one budget rests on, and when that is too little for a claim.

A first look never says that an arm is better or worse than another: the order of models that have read little text,
that train at the wrong learning rate, or that begin drowned, is often another one later.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .page import rounded
from .tuning import Tuning

# Text tokens a parameter from which on a result may be a claim: about what training in the best proportion takes
# (Hoffmann et al., arXiv 2203.15556). All parameters are counted, a tied embedding once.
ENOUGH_TEXT = 20
# Share of the training FLOPs above which the output head hides what the blocks do.
LARGE_HEAD = 0.15
# Largest budget over smallest from which on a curve shows a trend.
LONG_CURVE = 32


@dataclass(frozen=True)
class Ground:
    """What an arm's result at one budget rests on.

    Attributes:
        text: text tokens read for each parameter.
        tuning: the search for its learning rate.
        drowned: what drowns the rest of its model at initialisation; None if that was not measured.
    """

    text: float
    tuning: Tuning
    drowned: list[str] | None


def doubts(arms: Collection[Ground]) -> list[str]:
    """Say why a comparison of these arms is a first look, in parts of a sentence; nothing where it is a claim."""
    least, most = (rounded(end(arm.text for arm in arms)) for end in (min, max))
    span = least if least == most else f"{least} to {most}"
    little = f"arms read {span} text tokens a parameter, where a claim about quality needs {ENOUGH_TEXT} or more"
    reasons = {
        little: [arm.text < ENOUGH_TEXT for arm in arms],
        "the learning rates of {} were not tuned": [not arm.tuning.runs for arm in arms],
        "the learning rates of {} lie at the end of those that were tried": [
            arm.tuning.end is not None for arm in arms
        ],
        "the learning rates of {} are not settled": [not (arm.tuning.settled or arm.tuning.end) for arm in arms],
        "the initial scales of {} were not measured": [arm.drowned is None for arm in arms],
        "parts of {} drown the others at initialisation": [bool(arm.drowned) for arm in arms],
    }
    return [reason.format(_of(each)) for reason, each in reasons.items() if any(each)]


def _of(each: Collection[bool]) -> str:
    return f"{sum(each)} of {len(each)} arms" if len(each) > 1 else "the only arm"
