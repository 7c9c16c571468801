"""What a step of an arm costs: FLOPs counted from its real modules, text tokens, or seconds."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import cost
from ..errors import EvaluationError
from .recipe import Unit

# Between the counter and the formula; both count matrix products only, so that they differ by rounding alone.
TOLERANCE = 0.01
_TIMED_STEPS = 10


def counted_flops(model: Any, context: int) -> float:
    """Count the FLOPs per text token of one forward and backward pass over `context` text tokens.

    torch's counter watches the real modules, frozen ones included, with attention written out: its kernels on CPUs are
    unknown to the counter, and fused ones compute scores twice, which is no work of the model's.

    Raises:
        EvaluationError: `cost.training_flops` says otherwise; one of the two is wrong, and no budget would be equal.
    """
    attention = model.config._attn_implementation
    ids = torch.zeros(1, context, dtype=torch.long, device=next(model.parameters()).device)
    model.set_attn_implementation("eager")
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.set_attn_implementation(attention)
    model.zero_grad(set_to_none=True)
    counted = counter.get_total_flops() / context
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    stated = cost.training_flops(model.config, context, frozen_parameters=frozen)
    if abs(counted - stated) > TOLERANCE * stated:
        raise EvaluationError(
            f"the FLOPs of this {model.config.model_type!r} model cannot be trusted: torch counts {counted:,.0f} a "
            f"text token, tokenformer.cost {stated:,.0f}; please report its configuration: {model.config.to_dict()}"
        )
    return counted


def cost_per_step(model: Any, unit: Unit, *, batch_size: int, context: int) -> float:
    """Return what a training step over `batch_size` sequences of `context` text tokens costs, in `unit`.

    Seconds are the median of ten steps' forward and backward passes, timed now.
    """
    if unit == "text_tokens":
        return batch_size * context
    if unit == "training_flops":
        return batch_size * context * counted_flops(model, context)
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
