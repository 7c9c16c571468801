"""What a stage needs to know in order to train, whoever asks for it: a recipe here, a segment of a comparison there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..data.order import Reading
from .optimization import learning_rate, steps_of
from .recipe import Recipe, TrainingSection


@dataclass(frozen=True)
class StageSettings:
    """How a stage grows and trains.

    Attributes:
        training: how to train.
        steps: optimizer steps.
        rate: learning rate of each step, from 0.
        rate_of_new: likewise, of parameters that the optimizer has no state of. None: as of all.
        seed: of the order of the text, and of all else that is random in training.
        reading: what it reads, of which texts.
        number: of the stage in the log, from 1.
        growth: keyword arguments for `grow`; empty where the stage does not grow.
        frozen: what does not train. None: what the checkpoint has frozen.
        nested_dropout: smallest share of each token group that takes part in a step. None: all always do.
        weights_seed: of new weights, and of the shares.
        arguments: what the lineage says was asked for.
        recipe: the whole recipe, for the lineage.
    """

    training: TrainingSection
    steps: int
    rate: Callable[[int], float]
    seed: int
    reading: Reading
    number: int = 1
    growth: dict[str, Any] = field(default_factory=dict)
    frozen: list[str] | None = None
    nested_dropout: float | None = None
    weights_seed: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    rate_of_new: Callable[[int], float] | None = None


def stage_settings(recipe: Recipe, index: int) -> StageSettings:
    """Return what stage `index` (from 0) of a recipe says."""
    stage = recipe.stages[index]
    return StageSettings(
        training=stage.training(recipe.training),
        steps=steps_of(stage, recipe),
        rate=partial(learning_rate, recipe, index),
        seed=recipe.seed,
        reading=reading(recipe, index),
        number=index + 1,
        growth=stage.growth,
        frozen=stage.frozen,
        nested_dropout=stage.nested_dropout,
        weights_seed=recipe.seed * 1000 + index,
        arguments={"stage": index + 1},
        recipe=recipe.model_dump(exclude_unset=True),
    )


def reading(recipe: Recipe, index: int) -> Reading:
    """Return what stage `index` (from 0) reads: it goes on in each text where the stages before it have stopped."""
    stage, before = recipe.stages[index], reading(recipe, index - 1).after() if index else {}
    training = stage.training(recipe.training)
    sequences = training.batch_size * steps_of(stage, recipe)
    if recipe.data is None:
        assert recipe.images is not None
        return Reading(sequences=sequences, shares={recipe.images.source: 1.0}, skipped=before)
    return Reading(
        sequences=sequences,
        shares=(stage.data or recipe.data).shares(recipe.data),
        skipped=before,
        pieces=recipe.training.sequence_length // training.sequence_length,
    )
