"""What an arm is made of: models from configurations, and runs cut into segments that are trained once.

A run is an arm with a seed, a learning rate and a budget. With the warm-up–stable–decay schedule all budgets of an arm
share a trunk at constant learning rate; each has its own decay, which branches off. A segment's identity is everything
that decides its weights, so that what two runs have in common, across budgets and across arms, is one segment.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..training.optimization import cosine
from ..training.recipe import TrainingSection
from .recipe import ArmStage, CompareRecipe

Phase = Literal["hold", "fall", "cosine"]


@dataclass(frozen=True)
class Run:
    """An arm with a seed, a peak learning rate and a budget."""

    arm: str
    seed: int
    learning_rate: float
    budget: float


@dataclass(frozen=True)
class Segment:
    """A stretch of training in which nothing changes but the weights.

    Attributes:
        parent: the segment before it, or None at the beginning.
        arm: the first arm it belongs to; others that begin alike share it.
        seed: of weights and of the order of text.
        learning_rate: the peak.
        growth: how it begins, if the model grows here.
        stage: of the arm that it belongs to, which says what it reads; None before the first.
        frozen: what does not train.
        start, end: what has been spent, in the recipe's unit.
        phase: hold the learning rate (after the warm-up), let it fall to zero, or one cosine.
    """

    recipe: CompareRecipe
    parent: Segment | None
    arm: str
    seed: int
    learning_rate: float
    growth: ArmStage | None
    stage: ArmStage | None
    frozen: tuple[str, ...]
    start: float
    end: float
    phase: Phase

    @cached_property
    def id(self) -> str:
        """Digest of everything that decides the weights at its end."""
        training = self.recipe.training_of(self.arm).model_dump(exclude_defaults=True)
        facts = {
            "parent": self.parent.id if self.parent else None,
            "model": None if self.parent else self.recipe.arms[self.arm].model.model_dump(exclude_unset=True),
            "data": self.recipe.data.model_dump(exclude_defaults=True),
            "training": {**training, "learning_rate": self.learning_rate, "decay": None},
            "warmup": self.recipe.budgets[0],
            "equal": self.recipe.equal,
            "seed": self.seed,
            "growth": {"method": self.growth.method, **self.growth.amounts} if self.growth else None,
            "frozen": self.frozen,
            "until": [self.start, self.end, self.phase],
        }
        if reads := {**self.recipe.arms[self.arm].model_dump(include={"data"}, exclude_defaults=True), **self._reads}:
            facts["reads"] = reads
        if self.growth and self.growth.rates:
            facts["rates"] = self.growth.rates
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def training(self) -> TrainingSection:
        """How it trains."""
        own = {field: size for field, size in self._reads.items() if field != "data"}
        return self.recipe.training_of(self.arm).model_copy(update=own)

    @property
    def shares(self) -> dict[str, float]:
        """What share of the text tokens each text is that it reads."""
        stage, arm = self.stage.data if self.stage else None, self.recipe.arms[self.arm].data
        return (stage or arm or self.recipe.data).shares(self.recipe.data)

    @property
    def _reads(self) -> dict[str, Any]:
        return self.stage.reads if self.stage else {}

    def rate(self, step: int, *, steps: int, per_step: float) -> float:
        """Return the learning rate of step `step` (from 0) of `steps` that cost `per_step` each."""
        warmup = self.recipe.training_of(self.arm).warmup
        spent = step * per_step
        if self.phase == "cosine":
            rise = warmup * (self.end - self.start)
            if spent >= rise:
                return cosine(self.learning_rate, spent - rise, self.end - self.start - rise)
            return self.learning_rate * _risen(spent, rise, per_step)
        if self.phase == "fall":
            return self.learning_rate * (1 - step / steps) * self._rewarmed(self.start + spent, per_step)
        risen = _risen(self.start + spent, warmup * self.recipe.budgets[0], per_step)
        return self.learning_rate * risen * self._rewarmed(self.start + spent, per_step)

    def rate_of_new(self, step: int, *, steps: int, per_step: float) -> float:
        """Return the learning rate of what is new since it grew here, likewise."""
        share = self.growth.rewarm_new if self.growth else None
        risen = 1.0 if share is None else _risen(step * per_step, share * self.recipe.budgets[0], per_step)
        return risen * self.rate(step, steps=steps, per_step=per_step)

    def _rewarmed(self, spent: float, per_step: float) -> float:
        """Return how far the learning rate has risen again since the model last grew."""
        grown: Segment | None = self
        while grown is not None and grown.growth is None:
            grown = grown.parent
        if grown is None or grown.growth is None:
            return 1.0
        growth, warmup = grown.growth, self.recipe.training_of(self.arm).warmup
        share = growth.rewarm if growth.rewarm is not None else warmup if growth.after_decay else 0.0
        return _risen(spent - grown.start, share * self.recipe.budgets[0], per_step)


def _risen(spent: float, rise: float, per_step: float) -> float:
    """Return the share of the full learning rate in a step that costs `per_step`, on the way up over `rise`."""
    return min(1.0, (spent + per_step) / (rise + per_step))


def segments(recipe: CompareRecipe, run: Run) -> list[Segment]:
    """Cut a run into its segments, in order. It grows only before the end of its trunk: not at its end, nor later."""
    schedule, trunk_end = recipe.training_of(run.arm).schedule, recipe.trunk_end(run.arm, run.budget)
    stages = {stage.at: stage for stage in recipe.arms[run.arm].stages if stage.at < trunk_end}
    cuts = set(stages)
    if schedule != "cosine":
        cuts |= {end for budget in recipe.budgets if (end := recipe.trunk_end(run.arm, budget)) < trunk_end}
    falls = {recipe.trunk_end(run.arm, at): at for at, stage in stages.items() if stage.after_decay}
    cuts = {cut for cut in cuts | set(falls) if not any(begin < cut < end for begin, end in falls.items())}
    phase: Phase = "cosine" if schedule == "cosine" else "hold"
    bounds: list[tuple[float, Phase]] = [
        (cut, "fall" if cut in falls.values() else phase) for cut in [*sorted(cuts), trunk_end]
    ]
    if trunk_end < run.budget:
        bounds.append((run.budget, "fall"))
    found: list[Segment] = []
    stage: ArmStage | None = None
    start = 0.0
    for end, phase in bounds:
        stage = stages.get(start, stage)
        found.append(
            Segment(
                recipe,
                parent=found[-1] if found else None,
                arm=run.arm,
                seed=run.seed,
                learning_rate=run.learning_rate,
                growth=stage if stage and stage.at == start and stage.grows else None,
                stage=stage,
                frozen=tuple(stage.frozen) if stage else (),
                start=start,
                end=end,
                phase=phase,
            )
        )
        start = end
    return found


def final_runs(recipe: CompareRecipe, arm: str, learning_rate: float) -> list[Run]:
    """Return the runs that are reported: every seed with every budget."""
    return [Run(arm, seed, learning_rate, budget) for seed in recipe.seeds for budget in recipe.budgets]
