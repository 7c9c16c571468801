"""A claim or a first look? What an arm's result at one budget rests on, and when that is too little for a claim.

A first look never says that an arm is better or worse than another: the order of models that have read little text,
that train at the wrong learning rate, or that begin drowned, is often another one later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
    return list(_doubts(arms))


def _doubts(arms: Collection[Ground]) -> Iterator[str]:
    read = [arm.text for arm in arms]
    if min(read) < ENOUGH_TEXT:
        span = " to ".join(dict.fromkeys(rounded(number) for number in (min(read), max(read))))
        yield f"arms read {span} text tokens a parameter, where a claim about quality needs {ENOUGH_TEXT} or more"
    found = {
        "were not tuned": [not arm.tuning.runs for arm in arms],
        "lie at the end of those that were tried": [arm.tuning.end is not None for arm in arms],
        "are not settled": [arm.tuning.end is None and not arm.tuning.settled for arm in arms],
    }
    for what, each in found.items():
        if any(each):
            yield f"the learning rates of {_of(each)} {what}"
    unknown = [arm.drowned is None for arm in arms]
    if any(unknown):
        yield f"the initial scales of {_of(unknown)} were not measured"
    drowned = [bool(arm.drowned) for arm in arms]
    if any(drowned):
        yield f"parts of {_of(drowned)} drown the others at initialisation"


def _of(each: Collection[bool]) -> str:
    return f"{sum(each)} of {len(each)} arms" if len(each) > 1 else "the only arm"
