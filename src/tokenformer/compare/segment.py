"""Train one segment of a run, from its parent's checkpoint to its own; resumable like any stage."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import cost
from ..batches import batches
from ..checkpoints.checkpoint import load_checkpoint
from ..checkpoints.files import replacing_file
from ..checkpoints.lineage import Lineage
from ..checkpoints.optimizer import OptimizerState, load_states
from ..data.order import Reading
from ..data.text import TextData
from ..evaluation import Evaluation
from ..growth.beside import has_row
from ..growth.freeze import freeze_only
from ..growth.neurons import group_neurons
from ..growth.tokenise import build
from ..training.log import Log, finite, read_log
from ..training.processes import processes
from ..training.recipe import TrainingSection
from ..training.settings import StageSettings
from ..training.stage import run_stage
from ..training.text import TextMaterial, first_config
from ..training.whole import Begun
from .arms import Segment
from .budgets import cost_per_step, flops_per_step, steps_within
from .methods import grow_by
from .recipe import CompareRecipe
from .results import Line
from .scales import initial_scales


@dataclass(frozen=True)
class Text:
    """One text with two sets of held-out documents: to choose learning rates by, and to report on."""

    tuning: TextData
    report: TextData


def train_segment(segment: Segment, parent: Line | None, text: Text, folder: Path) -> Line:
    """Train `segment` in `folder`/ID and return its line for the results.

    Args:
        segment: what to train.
        parent: the line of the segment before it.
        text: to train and evaluate on.
        folder: of all segments; that of the parent holds its checkpoint.

    Raises:
        GrowthError: the growth is impossible.
        EvaluationError: FLOPs that cannot be trusted.
        KeyboardInterrupt: after Ctrl-C, once the state is saved; the next call continues from there.
    """
    training, place = segment.training, folder / segment.id
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place / "checkpoint", ignore_errors=True)  # of a worker that was killed before it could say so
    before = parent or {"spent": 0.0, "training_flops": 0.0, "text_tokens": 0, "seconds": 0.0}
    model, states, lineage = _previous(segment, text, training, folder)
    growth = None
    if segment.growth is not None:
        model, states, growth = _grow(segment, model, states, text, training)
        growth |= {field: before[field] for field in ("training_flops", "text_tokens", "seconds")}
        lineage = lineage.then("grow", arguments={"method": growth["method"], **segment.growth.amounts})
    freeze_only(model, list(segment.frozen))
    per_step = _per_step(segment, model, training, place)
    flops = flops_per_step(model, training)
    steps = max(1, steps_within(segment.end, before["spent"], per_step))
    settings = stage_settings(segment, training, parent, steps=steps, per_step=per_step)
    trained = run_stage(
        settings,
        lambda *_, **__: Begun(model.to(processes().device), states, lineage),
        TextMaterial(text.report),
        Log(place / "log.jsonl", on_event=lambda event: None, enabled=True),
        place / "checkpoint",
    )
    events = read_log(place)
    curve = [_point(event, before, flops) for event in events if event["event"] == "evaluation"]
    return {
        "event": "segment",
        "id": segment.id,
        "parent": segment.parent.id if segment.parent else None,
        "arm": segment.arm,
        "seed": segment.seed,
        "learning_rate": segment.learning_rate,
        "phase": segment.phase,
        "until": segment.end,
        "steps": steps,
        "spent": before["spent"] + steps * per_step,
        "read": settings.reading.after(),
        "parameters": cost.parameters(trained.config),
        **_point(next(event for event in reversed(events) if event["event"] == "end"), before, flops),
        "tuning_bits_per_byte": finite(_evaluate(trained, text.tuning, training).bits_per_byte),
        "growth": growth,
        "curve": curve,
        "config": trained.config.to_diff_dict(),
    }


def first_model(recipe: CompareRecipe, arm: str, text: Text) -> PreTrainedModel:
    """Make the model an arm begins with, of random weights."""
    model, where = recipe.arms[arm].model, f"arms.{arm}.model"
    config = first_config(model, text.report, context=recipe.training.sequence_length, where=where)
    made = build(config, dtype=torch.float32)
    if has_row(made):
        group_neurons(made)
    return made


def initial_line(recipe: CompareRecipe, arm: str, text: Text) -> Line:
    """Return the line for the results on the scales of an arm's first model, drawn with the first seed."""
    torch.manual_seed(recipe.seeds[0])
    blocks = initial_scales(first_model(recipe, arm, text), _sample(text))
    return {"event": "initial", "arm": arm, "seed": recipe.seeds[0], "blocks": blocks}


def _sample(text: Text) -> Tensor:
    """Return some held-out text, `[4, T]`."""
    return next(batches(next(iter(text.report.validation.values())).blocks, 4))


def _previous(
    segment: Segment, text: Text, training: TrainingSection, folder: Path
) -> tuple[PreTrainedModel, OptimizerState, Lineage]:
    torch.manual_seed(segment.seed)
    if segment.parent is None:
        return first_model(segment.recipe, segment.arm, text), {}, Lineage()
    checkpoint = folder / segment.parent.id / "checkpoint"
    model, _, lineage = load_checkpoint(checkpoint, dtype=torch.float32)
    keep = training.keep_optimizer_state or segment.growth is None
    return model, load_states(checkpoint) if keep else {}, lineage


def _grow(
    segment: Segment, model: PreTrainedModel, states: OptimizerState, text: Text, training: TrainingSection
) -> tuple[PreTrainedModel, OptimizerState, Line]:
    """Grow, and say what it did to size, loss and logits."""
    assert segment.growth is not None
    sample = _sample(text)
    before, parameters = _evaluate(model, text.report, training), cost.parameters(model.config)
    with torch.no_grad():
        logits = model.eval()(sample, use_cache=False).logits
        model, states = grow_by(
            model, states, segment.growth.method, seed=int(segment.id, 16) % 2**31, **segment.growth.amounts
        )
        equal = torch.equal(model.eval()(sample, use_cache=False).logits, logits)
    after = _evaluate(model, text.report, training)
    return (
        model,
        states,
        {
            "method": segment.growth.method,
            "parameters_before": parameters,
            "parameters_after": cost.parameters(model.config),
            "bits_per_byte_before": finite(before.bits_per_byte),
            "bits_per_byte_after": finite(after.bits_per_byte),
            "logits_equal": equal,
        },
    )


def stage_settings(
    segment: Segment, training: TrainingSection, parent: Line | None, *, steps: int, per_step: float
) -> StageSettings:
    """Say a segment as a stage; `train_segment` has grown its model and frozen parts of it.

    Args:
        segment: what to train.
        training: how it trains.
        parent: the line of the segment before it.
        steps: optimizer steps.
        per_step: what each costs, in the recipe's unit.
    """
    rewarm_new = segment.growth is not None and segment.growth.rewarm_new is not None
    return StageSettings(
        # Whether growth resets the optimizer was decided before; between other segments nothing is lost.
        training=training.model_copy(update={"keep_optimizer_state": True, **_going_on(training)}),
        steps=steps,
        rate=partial(segment.rate, steps=steps, per_step=per_step),
        rate_of_new=partial(segment.rate_of_new, steps=steps, per_step=per_step) if rewarm_new else None,
        seed=segment.seed,
        reading=Reading(
            sequences=training.batch_size * steps,
            shares=segment.shares,
            skipped=_read(segment, parent) if parent else {},
            pieces=segment.recipe.training.sequence_length // training.sequence_length,
        ),
        frozen=list(segment.frozen),
        arguments={"arm": segment.arm, "segment": segment.id, "training": training.model_dump(exclude_unset=True)},
    )


def _going_on(training: TrainingSection) -> dict[str, str]:
    """Let a run diverge where its recipe does not say otherwise: that is a result, too."""
    return {} if "on_bad_step" in training.model_fields_set else {"on_bad_step": "go_on"}


def _read(segment: Segment, parent: Line) -> dict[str, int]:
    """Return the text blocks that were read before; lines of older versions, which knew one text, do not say."""
    (*_, text), length = segment.shares, segment.recipe.training.sequence_length
    return parent.get("read") or {text: math.ceil(parent["text_tokens"] / length)}


def _per_step(segment: Segment, model: PreTrainedModel, training: TrainingSection, place: Path) -> float:
    """Return what a step costs; a measured time is kept, so that resuming cuts the segment alike."""
    kept = place / "per_step.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = cost_per_step(model, training, segment.recipe.equal)
    with replacing_file(kept) as file:
        file.write_text(json.dumps(found), encoding="utf-8")
    return found


def _evaluate(model: PreTrainedModel, data: TextData, training: TrainingSection) -> Evaluation:
    return TextMaterial(data).measure(model.to(processes().device), training)


def _point(event: Line, before: Line, flops_per_step: float) -> Line:
    return {
        "training_flops": before["training_flops"] + event["step"] * flops_per_step,
        "text_tokens": event["text_tokens_seen"],
        "seconds": event["seconds"],
        "loss": finite(event["loss"]),
        "bits_per_byte": finite(event["bits_per_byte"]),
        **{field: event[field] for field in ("bits_per_byte_of",) if field in event},
    }
