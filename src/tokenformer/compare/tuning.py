"""Which learning rate an arm trains with, as a pure function of the recipe and of the results that are there.

Every rate of the grid is tried with the first seed. Then, as long as either applies:

- Two best rates that differ by less than `rules.threshold` are tried with the second seed, too; the better mean of the
  two is best.
- A best rate at an end of those tried extends the grid there, by the factor between its last two rates, at most
  `EXTENSIONS` times at each end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .arms import Run, final_runs
from .recipe import CompareRecipe
from .results import Line

EXTENSIONS = 4

End = Literal["smallest", "largest"]


@dataclass(frozen=True)
class Tuning:
    """How far the search for an arm's learning rate is.

    Attributes:
        rate: the best so far; None where none of several is tried yet.
        runs: of the search, as far as they are known by now; none where there is one rate only.
        settled: all of these runs are there, and no more are needed.
        end: which of the tried rates the best one is, if it does not lie between others.
    """

    rate: float | None
    runs: list[Run]
    settled: bool
    end: End | None


def tuning(recipe: CompareRecipe, arm: str, lines: Sequence[Line]) -> Tuning:
    """Say which learning rates are to be tried for an arm, and which is the best so far."""
    grid, (first, *others) = sorted(recipe.learning_rates), recipe.seeds
    if len(grid) == 1:
        return Tuning(grid[0], [], settled=True, end=None)
    scores = {
        (line["seed"], line["learning_rate"]): _score(line)
        for line in lines
        if line["event"] == "run" and line["purpose"] == "tuning" and line["arm"] == arm
    }
    ladder = [*reversed(_beyond(grid[1], grid[0])), *grid, *_beyond(grid[-2], grid[-1])]
    low, high = ladder.index(grid[0]), ladder.index(grid[-1])
    repeated: list[float] = []
    while True:
        wanted = [(first, rate) for rate in ladder[low : high + 1]] + [(others[0], rate) for rate in repeated]
        runs = [Run(arm, seed, rate, recipe.tuning_budget) for seed, rate in wanted]
        tried = [rate for rate in ladder[low : high + 1] if (first, rate) in scores]
        if not tried:
            return Tuning(None, runs, settled=False, end=None)
        two = sorted(tried, key=lambda rate: scores[first, rate])[:2]
        close = abs(scores[first, two[0]] - scores[first, two[-1]]) < recipe.rules.threshold
        best, complete = two[0], all(run in scores for run in wanted)
        if close and others and all((others[0], rate) in scores for rate in two):
            best = min(two, key=lambda rate: scores[first, rate] + scores[others[0], rate])
        if complete and close and others and not set(two) <= set(repeated):
            repeated += [rate for rate in two if rate not in repeated]
        elif complete and best == ladder[low] and low > 0:
            low -= 1
        elif complete and best == ladder[high] and high < len(ladder) - 1:
            high += 1
        else:
            ends: dict[float, End] = {tried[-1]: "largest", tried[0]: "smallest"}
            return Tuning(best, runs, complete, ends.get(best))


def known_runs(recipe: CompareRecipe, arm: str, lines: Sequence[Line]) -> list[tuple[Run, str]]:
    """Return an arm's runs and their purposes: those that tune it, and once these are there those that are reported."""
    found = tuning(recipe, arm, lines)
    finals = final_runs(recipe, arm, found.rate) if found.settled and found.rate is not None else []
    return [*((run, "tuning") for run in found.runs), *((run, "final") for run in finals)]


def _beyond(inner: float, end: float) -> list[float]:
    """Return the rates that extend a grid beyond `end`, after `inner`; rounded, so that they can be told and found."""
    return [float(f"{end * (end / inner) ** i:.6g}") for i in range(1, EXTENSIONS + 1)]


def _score(line: Line) -> float:
    bits = line["tuning_bits_per_byte"]
    return bits if bits is not None and math.isfinite(bits) else math.inf
