"""What the lines of a comparison say: runs by arm, budget and seed, who is best, who beats whom, what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import EvaluationError, RecipeError
from ..sections import parse_sections
from ..units import counted
from .claims import Ground, doubts
from .page import scientific
from .recipe import CompareRecipe
from .results import MAY_GAIN, Line, check_same_text
from .scales import drowned
from .statistics import Estimate, Verdict, estimate, holm, paired_difference, verdict
from .tuning import Tuning, tuning

_UNITS = {"training_flops": "training FLOPs", "text_tokens": "text tokens", "seconds": "seconds of training"}


@dataclass(frozen=True)
class Contrast:
    """An arm against another at one budget."""

    difference: Estimate
    p: float | None
    """Corrected by Holm's method; None with fewer than two common seeds."""
    verdict: Verdict

    def __str__(self) -> str:
        sign = "+" if self.difference.mean > 0 else ""
        return f"{sign}{self.difference}".replace("-", "−")


@dataclass(frozen=True)
class Findings:
    """A comparison's results, complete or not.

    Attributes:
        begun: the recipe lines by date, from one machine or several; the last one holds.
        finals: runs that are reported, by arm and budget, then by seed.
        tunings: runs that tried a learning rate, by arm.
        searches: what these found, by arm.
        initial: the scales of its first model, by arm.
        diverged: final runs without finite bits per byte; in none of the above.

    Final runs at another learning rate than the best so far are left out: they are from before its grid was extended.
    """

    recipe: CompareRecipe
    begun: list[Line]
    finals: dict[tuple[str, float], dict[int, Line]]
    tunings: dict[str, list[Line]]
    searches: dict[str, Tuning]
    initial: dict[str, Line]
    diverged: list[Line]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Findings:
        """Sort the lines of a results file.

        Raises:
            RecipeError: no recipe among them, one that makes no sense, those of several comparisons, or an unknown arm.
            DataError: they are of different texts.
            EvaluationError: no final run is there yet.
        """
        begun = sorted((line for line in lines if line.get("event") == "recipe"), key=lambda line: line["date"])
        if not begun:
            raise RecipeError(
                f"there is no recipe among {counted(len(lines), 'line')}; a report needs the results.jsonl that "
                "`tokenformer compare` writes"
            )
        rules = [{field: value for field, value in line["recipe"].items() if field not in MAY_GAIN} for line in begun]
        if any(stated != rules[-1] for stated in rules):
            raise RecipeError(
                "these lines are of several comparisons: their recipes differ in more than "
                f"{', '.join(MAY_GAIN)}; report each by itself"
            )
        check_same_text(begun)
        recipe = parse_sections(CompareRecipe, begun[-1]["recipe"], where="the recipe in the results")
        runs = [line for line in lines if line.get("event") == "run"]
        unknown = [line["arm"] for line in runs if line["arm"] not in recipe.arms]
        if unknown:
            raise RecipeError(f"a run of {unknown[0]!r} is in the results; their recipe has {', '.join(recipe.arms)}")
        tunings: dict[str, list[Line]] = {arm: [] for arm in recipe.arms}
        for line in runs:
            if line["purpose"] == "tuning":
                tunings[line["arm"]].append(line)
        searches = {arm: tuning(recipe, arm, tried) for arm, tried in tunings.items()}
        finals: dict[tuple[str, float], dict[int, Line]] = {}
        diverged = []
        for line in runs:
            if line["purpose"] == "tuning" or searches[line["arm"]].rate not in (None, line["learning_rate"]):
                continue
            if line["bits_per_byte"] is not None and math.isfinite(line["bits_per_byte"]):
                finals.setdefault((line["arm"], line["budget"]), {})[line["seed"]] = line
            else:
                diverged.append(line)
        if not finals:
            raise EvaluationError(
                f"nothing to report yet: none of {counted(len(recipe.arms), 'arm')} has finished a final run; "
                "continue with `tokenformer compare`"
            )
        initial = {line["arm"]: line for line in lines if line.get("event") == "initial"}
        return cls(recipe, begun, finals, tunings, searches, initial, diverged)

    @cached_property
    def budgets(self) -> list[float]:
        """Budgets with results, smallest first."""
        return sorted({budget for _, budget in self.finals})

    @cached_property
    def last(self) -> float:
        """The budget that decides: the largest that all arms with results have, or the largest if there is none."""
        shared = [budget for budget in self.budgets if len(self.ranking(budget)) == len(self.arms)]
        return (shared or self.budgets)[-1]

    @property
    def unit(self) -> str:
        """What budgets are counted in."""
        return _UNITS[self.recipe.equal]

    def at(self, budget: float) -> str:
        """Write a budget with its unit."""
        return f"{scientific(budget)} {self.unit}"

    def ranking(self, budget: float) -> list[str]:
        """Return the arms with results at a budget, best mean first."""
        there = [arm for arm in self.recipe.arms if (arm, budget) in self.finals]
        return sorted(there, key=lambda arm: self.score(arm, budget).mean)

    def by_rank(self) -> list[str]:
        """Return all arms by rank at the budget that decides, then those without results at it."""
        budgets = (self.last, *reversed(self.budgets))
        return list(dict.fromkeys(arm for budget in budgets for arm in self.ranking(budget)))

    def values(self, arm: str, budget: float, field: str = "bits_per_byte") -> dict[int, float]:
        """Return a field of an arm's final runs at a budget, by seed; empty if there are none."""
        return {seed: line[field] for seed, line in sorted(self.finals.get((arm, budget), {}).items())}

    def mean(self, arm: str, budget: float, field: str) -> float:
        """Return the mean of a field over an arm's seeds."""
        return _mean(list(self.finals[arm, budget].values()), field)

    def score(self, arm: str, budget: float) -> Estimate:
        """Return an arm's bits per byte at a budget."""
        return estimate(list(self.values(arm, budget).values()), confidence=self.recipe.rules.confidence)

    def runs(self, arm: str) -> list[Line]:
        """Return an arm's final runs at the largest budget it has, by seed."""
        return [line for _, line in sorted(self.finals[arm, self.budgets_of(arm)[-1]].items())]

    @cached_property
    def arms(self) -> list[str]:
        """Arms with results, in the recipe's order."""
        return [arm for arm in self.recipe.arms if any(arm == name for name, _ in self.finals)]

    def grown(self, arm: str) -> bool:
        """Tell whether an arm is meant to grow."""
        return bool(self.recipe.arms[arm].growths)

    def best(self, budget: float, *, grown: bool) -> str | None:
        """Return the arm with the best mean at a budget among those that grow, or those that never do."""
        return next((arm for arm in self.ranking(budget) if self.grown(arm) == grown), None)

    def own_base(self, arm: str) -> str | None:
        """Return the never-grown arm that begins with the same model and trains alike: this one, simply trained on."""

        def begins(name: str) -> tuple[Any, ...]:
            training = self.recipe.training_of(name).model_dump(exclude={"keep_optimizer_state"})
            return self.recipe.arms[name].model, self.recipe.arms[name].data, training

        plain = (a for a in self.arms if not self.recipe.arms[a].stages and a != arm)
        return next((a for a in plain if begins(a) == begins(arm)), None)

    def budgets_of(self, arm: str) -> list[float]:
        """Return the budgets that an arm has results at, smallest first."""
        return [budget for budget in self.budgets if (arm, budget) in self.finals]

    def curve(self, arm: str, field: str = "training_flops") -> list[tuple[float, float]]:
        """Return the decayed ends of an arm's runs, (`field`, bits per byte) by rising budget: means over seeds."""
        ends = (list(self.finals[arm, budget].values()) for budget in self.budgets_of(arm))
        return [(_mean(lines, field), _mean(lines, "bits_per_byte")) for lines in ends]

    def text_per_parameter(self, arm: str, budget: float) -> float:
        """Return the text tokens that an arm reads within a budget for each parameter that it has in the end."""
        return self.mean(arm, budget, "text_tokens") / self.mean(arm, budget, "parameters")

    def doubts(self, budget: float) -> list[str]:
        """Say why the arms at a budget are a first look, in parts of a sentence; nothing where they are a claim."""
        return doubts(
            [
                Ground(
                    self.text_per_parameter(arm, budget),
                    self.searches[arm],
                    drowned(blocks) if (blocks := self.initial.get(arm, {}).get("blocks")) else None,
                )
                for arm in self.ranking(budget)
            ]
        )

    def contrasts(self, budget: float, other: str) -> dict[str, Contrast]:
        """Compare every arm at a budget with one of them, over common seeds, best first.

        Comparisons with the reference are a family of their own for Holm's correction: those with another arm take over
        what it says of that arm and the reference, so that a pair has one p value.
        """
        rules, against = self.recipe.rules, self.values(other, budget)
        claim = not self.doubts(budget)
        found = {
            arm: paired_difference(self.values(arm, budget), against, confidence=rules.confidence)
            for arm in self.ranking(budget)
            if arm != other
        }
        tested = {arm: difference.p for arm, difference in found.items() if difference.p is not None}
        taken_over = tested.pop(rules.reference, None) is not None
        p: dict[str, float | None] = dict(zip(tested, holm(list(tested.values())), strict=True))
        if taken_over:
            p[rules.reference] = self.contrasts(budget, rules.reference)[other].p
        return {
            arm: Contrast(
                difference,
                p.get(arm),
                verdict(
                    arm,
                    other,
                    difference,
                    p=p.get(arm),
                    threshold=rules.threshold,
                    confidence=rules.confidence,
                    claim=claim,
                ),
            )
            for arm, difference in found.items()
        }

    def missing(self) -> list[str]:
        """Say which final runs the recipe asks for and the results do not have, and which diverged."""
        said = []
        ended = {(line["arm"], line["budget"], line["seed"]) for line in self.diverged}
        ended |= {(*place, seed) for place, runs in self.finals.items() for seed in runs}
        for arm in self.recipe.arms:
            gaps = {
                budget: [seed for seed in self.recipe.seeds if (arm, budget, seed) not in ended]
                for budget in self.recipe.budgets
            }
            count = sum(map(len, gaps.values()))
            if count:
                where = "; ".join(
                    f"{scientific(budget)}: seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
                    for budget, seeds in gaps.items()
                    if seeds
                )
                are = "is" if count == 1 else "are"
                said.append(
                    f"{count} of the {len(gaps) * len(self.recipe.seeds)} runs of {arm} {are} missing ({where})."
                )
        for line in self.diverged:
            said.append(
                f"{line['arm']} diverged with seed {line['seed']} and budget {scientific(line['budget'])}: its mean is "
                "taken over the others, which flatters it."
            )
        return said


def _mean(lines: Sequence[Line], field: str) -> float:
    return math.fsum(line[field] for line in lines) / len(lines)
