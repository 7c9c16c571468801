"""What moves in a stage, by how much, and with which memory of earlier stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoints.optimizer import OptimizerState
from ..growth.architectures import architecture_of, row_of
from ..growth.beside import has_row
from ..growth.grow import grow
from ..growth.neurons import group_neurons
from ..models.names import BASE_GROUP
from .muon import Muon
from .placement import mesh_of, placed_like
from .recipe import Recipe, Stage, TrainingSection


def steps_of(stage: Stage, recipe: Recipe) -> int:
    """Optimizer steps of a stage: its text tokens or images, rounded up to whole batches."""
    return math.ceil(stage.amount / recipe.per_step(stage))


def learning_rate(recipe: Recipe, stage: int, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of stage `stage` (from 0)."""
    t = recipe.training
    steps = [steps_of(s, recipe) for s in recipe.stages]
    sizes = [recipe.per_step(s) for s in recipe.stages]
    peak = recipe.stages[stage].learning_rate or t.learning_rate
    if t.schedule == "cosine":
        warmup = t.warmup * steps[stage]
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        return cosine(peak, step - warmup, max(1.0, steps[stage] - warmup))
    # In steps of this stage, so that shares are of text tokens whatever the sizes of the others' batches.
    read = [count * size / sizes[stage] for count, size in zip(steps, sizes, strict=True)]
    total, now = sum(read), sum(read[:stage]) + step
    rise = (now + 1) / (t.warmup * total + 1)
    fall = 1.0 if t.schedule == "constant" else (total - now) / max(1.0, t.decay * total)
    return peak * min(1.0, rise, fall)


def cosine(peak: float, done: float, total: float) -> float:
    """Return the learning rate at `done` of `total`, on the cosine from `peak` to a tenth of it (paper's schedule)."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done / total))))


def states_by_group(model: PreTrainedModel, states: OptimizerState) -> OptimizerState:
    """Keep an ordinary model's neurons by token group from here on, and return `states` under their names there."""
    if not has_row(model):
        return states
    group_neurons(model)
    own = {name for name, _ in model.named_parameters()}

    def grouped(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        inside = f"{module}.groups.{BASE_GROUP}.{leaf}"
        return inside if inside in own else name

    return {grouped(name): state for name, state in states.items()}


def grow_with_states(model: PreTrainedModel, states: OptimizerState, **growth: Any) -> OptimizerState:
    """Grow `model` in place, and return `states` under the names that growing gave their parameters.

    Raises:
        GrowthError: as `grow`.
    """
    states = states_by_group(model, states)
    before = {id(p): name for name, p in model.named_parameters()}
    grow(model, **growth)
    names = {before[id(p)]: name for name, p in model.named_parameters() if id(p) in before}
    return {names.get(name, name): state for name, state in states.items()}


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one: their parameter groups in a row, and one state.

    `state`, `param_groups` and state dicts are those of any optimizer, so that schedules, accelerate and the Trainer
    need to know nothing of the parts.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let every part take its step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = iter(self.param_groups)
        for part in self.parts:
            # Anew in every step, for loading a state dict replaces them.
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]
            part.step()
        return loss


def make_optimizer(
    model: PreTrainedModel, t: TrainingSection, states: OptimizerState, *, apart: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of a `training` section over what trains, each parameter with its state of an earlier stage.

    A parameter starts afresh where it had none, where that was another optimizer's, and where the recipe says so.
    `apart`: those stand in parameter groups of their own, which are "new".
    """
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = _rates(model, t)
    by_muon = _block_matrices(model) if t.optimizer == "muon" else set()
    kept: OptimizerState = {}
    for name, p in training.items():
        own = ("momentum_buffer",) if p in by_muon else ("step", "exp_avg", "exp_avg_sq")
        had = states.get(name, {}) if t.keep_optimizer_state else {}
        if set(own) <= had.keys():
            kept[name] = {key: _kept(had[key], p) for key in own}
    groups: dict[tuple[bool, float, float, bool, Any], list[torch.nn.Parameter]] = {}
    for name, p in training.items():
        decay, new = t.weight_decay if p.dim() >= 2 else 0.0, apart and name not in kept
        # torch steps at once what lies alike: on one mesh of processes, or on none.
        groups.setdefault((p in by_muon, rates.get(p, 1.0), decay, new, mesh_of(p)), []).append(p)
    # The schedule multiplies lr: it returns learning rates, not factors.
    muon, adamw = (
        [
            {"params": ps, "lr": rate, "weight_decay": decay, "new": new}
            for (by, rate, decay, new, _), ps in groups.items()
            if by is muon
        ]
        for muon in (True, False)
    )
    parts: list[torch.optim.Optimizer] = []
    if muon:
        parts.append(Muon(muon))
    if adamw:
        parts.append(torch.optim.AdamW(adamw, betas=(t.beta1, t.beta2), eps=1e-8, fused=True))
    optimizer = parts[0] if len(parts) == 1 else CombinedOptimizer(parts)
    for name, state in kept.items():
        optimizer.state[training[name]] = state
    return optimizer


def _kept(moment: torch.Tensor, p: torch.nn.Parameter) -> torch.Tensor:
    """Return a moment where its parameter lies; a count of steps, which has no place, on the same device."""
    return (placed_like(moment, p) if moment.dim() else moment).to(p.device, copy=True)


def _block_matrices(model: PreTrainedModel) -> set[torch.nn.Parameter]:
    """Return the matrices of the blocks: where these are not known, all but those of embeddings and of the head."""
    row = row_of(model.config)
    if row is not None:
        return {p for p in row.blocks_of(model).parameters() if p.dim() == 2}
    others = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) or m is model.get_output_embeddings()]
    apart = {p for module in others for p in module.parameters()}
    return {p for p in model.parameters() if p.dim() == 2 and p not in apart}


def _rates(model: PreTrainedModel, t: TrainingSection) -> dict[torch.nn.Parameter, float]:
    """Return what a parameter's learning rate is as a multiple of the schedule's, where it is another."""
    narrower = 1.0 if t.rate_width is None else t.rate_width / model.config.hidden_size
    rates = {} if t.optimizer == "muon" else dict.fromkeys(_block_matrices(model), narrower)
    head = model.get_output_embeddings()
    if model.main_input_name == "pixel_values":
        # A map of pixels is no table of which each input moves a row; it and positions learn as a head does.
        head = getattr(model, architecture_of(model.config).head)
        rates |= dict.fromkeys(model.base_model.embeddings.parameters(), t.head_rate)
    else:
        rates[model.get_input_embeddings().weight] = t.embedding_rate
    if head is not None:
        # Of one tied to the embedding the rate does not follow the width, for the embedding's does not.
        rates[head.weight] = t.head_rate * (1.0 if head.weight in rates else narrower)
    return rates
