"""What a step of an arm costs: FLOPs counted from its real modules, text tokens, or seconds."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .. import cost
from ..errors import EvaluationError
from ..growth.architectures import row_of
from ..training.optimization import make_optimizer
from ..training.recipe import TrainingSection
from .recipe import Unit

# Between the counter and the formula; both count matrix products only, so that they differ by rounding alone.
TOLERANCE = 0.01
_TIMED_STEPS = 10


def counted_flops(model: PreTrainedModel, context: int) -> float:
    """Count the FLOPs per text token of one forward and backward pass over `context` text tokens, by torch's counter.

    Raises:
        EvaluationError: `cost.training_flops_of` says otherwise; one of the two is wrong, and no budget would be equal.
    """
    counted = cost.counted_flops(model, context)
    if row_of(model.config) is None:
        return counted  # cost has no other way to know
    stated = cost.training_flops_of(model, context)
    if abs(counted - stated) > TOLERANCE * stated:
        raise EvaluationError(
            f"the FLOPs of this {model.config.model_type!r} model cannot be trusted: torch counts {counted:,.0f} a "
            f"text token, tokenformer.cost {stated:,.0f}; please report its configuration: {model.config.to_dict()}"
        )
    return counted


def optimizer_flops(model: PreTrainedModel, training: TrainingSection) -> float:
    """Count the FLOPs of the matrix products in one optimizer step: none of AdamW's, many of Muon's."""
    if training.optimizer == "adamw":
        return 0.0
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(twin, training, {})
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops()


def flops_per_step(model: PreTrainedModel, training: TrainingSection) -> float:
    """Count the FLOPs of a training step: forward, backward, and what the optimizer multiplies."""
    text_tokens = training.batch_size * training.sequence_length
    return text_tokens * counted_flops(model, training.sequence_length) + optimizer_flops(model, training)


def cost_per_step(model: PreTrainedModel, training: TrainingSection, unit: Unit) -> float:
    """Return what a training step costs, in `unit`.

    Seconds are the median of ten steps' forward and backward passes, timed now.
    """
    batch_size, context = training.batch_size, training.sequence_length
    if unit == "text_tokens":
        return batch_size * context
    if unit == "training_flops":
        return flops_per_step(model, training)
    ids = torch.zeros(batch_size, context, dtype=torch.long, device=next(model.parameters()).device)
    times = []
    for _ in range(_TIMED_STEPS):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return statistics.median(times)


def steps_within(budget: float, spent: float, per_step: float) -> int:
    """Return how many steps come nearest to `budget` when `spent` has gone before; none where that is more."""
    return max(0, round((budget - spent) / per_step))
