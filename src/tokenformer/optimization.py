"""What moves in a stage, by how much, and with which memory of earlier stages."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .growth.grow import grow
from .recipe import Recipe, Stage

OPTIMIZER_FILE = "optimizer.pt"
OptimizerState = dict[str, dict[str, torch.Tensor]]


def steps_of(stage: Stage, recipe: Recipe) -> int:
    """Optimizer steps of a stage: its text tokens, rounded up to whole batches."""
    return math.ceil(stage.text_tokens / (recipe.training.batch_size * recipe.training.sequence_length))


def learning_rate(recipe: Recipe, stage: int, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of stage `stage` (from 0)."""
    t = recipe.training
    steps = [steps_of(s, recipe) for s in recipe.stages]
    peak = recipe.stages[stage].learning_rate or t.learning_rate
    if t.schedule == "cosine":
        warmup = t.warmup * steps[stage]
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1.0, steps[stage] - warmup)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    total, now = sum(steps), sum(steps[:stage]) + step
    rise = (now + 1) / (t.warmup * total + 1)
    fall = (total - now) / max(1.0, t.decay * total)
    return peak * min(1.0, rise, fall)


def load_states(checkpoint: str | Path) -> OptimizerState:
    """Read the optimizer's states by parameter name; none where the checkpoint came without.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = Path(checkpoint) / OPTIMIZER_FILE
    if not file.exists():
        return {}
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged: {OPTIMIZER_FILE}: {reason}; delete it to start the optimizer afresh"
        ) from error


def grow_with_states(model: Any, states: OptimizerState, **growth: Any) -> OptimizerState:
    """Grow `model` in place, and return `states` under the names that growing gave their parameters.

    Raises:
        GrowthError: as `grow`.
    """
    before = {id(p): name for name, p in model.named_parameters()}
    grow(model, **growth)
    names = {before[id(p)]: name for name, p in model.named_parameters() if id(p) in before}
    return {names[name]: state for name, state in states.items()}


def make_optimizer(model: Any, recipe: Recipe, states: OptimizerState) -> torch.optim.Optimizer:
    """AdamW over what trains, each parameter with the state it had in an earlier stage, if it had one."""
    t = recipe.training
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in training.values() if p.dim() >= 2], "weight_decay": t.weight_decay},
        {"params": [p for p in training.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    # The schedule multiplies lr = 1: it returns learning rates, not factors.
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=1.0, betas=(t.beta1, t.beta2), eps=1e-8, fused=True
    )
    for name, p in training.items():
        if name in states:
            optimizer.state[p] = {key: value.to(p.device, copy=True) for key, value in states[name].items()}
    return optimizer
