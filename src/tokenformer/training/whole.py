"""How a stage begins and is written where every process holds the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import cost
from ..checkpoints.beside import save_stage
from ..checkpoints.checkpoint import save_checkpoint
from ..checkpoints.lineage import Lineage
from ..checkpoints.optimizer import OPTIMIZER_FILE, OptimizerState
from ..checkpoints.verify import carry_files
from ..checkpoints.whole import becomes_addon
from ..growth.beside import all_group_names
from .log import finite
from .material import Material
from .optimization import grow_with_states
from .processes import processes
from .settings import StageSettings
from .stream import StreamTrainer

Start = Callable[[], tuple[PreTrainedModel, OptimizerState, Lineage]]


@dataclass
class Begun:
    """What a stage trains.

    Attributes:
        model: grown, where it trains.
        states: the optimizer's, of the stages before, by parameter name.
        lineage: up to and with the growth.
        growth: what growing did; empty where the stage does not grow.
        trainer: what trains it, and keeps and reads its state.
    """

    model: PreTrainedModel
    states: OptimizerState
    lineage: Lineage
    growth: dict[str, Any] = field(default_factory=dict)
    trainer: ClassVar[type[StreamTrainer]] = StreamTrainer

    def write(
        self,
        target: Path,
        optimizer: torch.optim.Optimizer,
        processor: Any,
        lineage: Lineage,
        *,
        parent: str | Path | None,
    ) -> None:
        """Let the main process write what was trained; all call it.

        It becomes a checkpoint with the optimizer's states, or an add-on where that is what trained.

        Args:
            target: folder of the new checkpoint.
            optimizer: that trained.
            processor: tokenizer or image processor, to write beside it.
            lineage: of what was trained.
            parent: checkpoint that the stage began from, whose licence and other files go along.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not processes().is_main_process:
            return
        model, addon = self.model.to("cpu"), becomes_addon(self.model, parent)
        names = {id(p): name for name, p in model.named_parameters()}
        states = {**self.states, **{names[id(p)]: dict(state) for p, state in optimizer.state.items()}}

        def add_files(folder: Path) -> None:
            torch.save(states, folder / OPTIMIZER_FILE)
            if parent is not None and not addon:  # what loads an add-on loads its parent
                carry_files(parent, folder)

        if addon:
            assert parent is not None
            save_stage(target, model, lineage, parent=parent, extra=add_files)
        else:
            save_checkpoint(target, model, processor, lineage, extra=add_files)


def begin(start: Start, settings: StageSettings, data: Material, *, place: Path, state: Path | None) -> Begun:
    """Let what `start` returns grow, and measure it before and after unless there is a `state` to go on from.

    What `start` makes, the model, the optimizer's states by parameter name, and the lineage, must be the same after an
    interruption.
    """
    model, states, lineage = start()
    model.to(processes().device)
    if not settings.growth:
        return Begun(model, states, lineage)
    before = outcome(model, data, settings, measured=state is None)
    states = grow_with_states(model, states, **settings.growth)
    after = outcome(model, data, settings, measured=state is None)
    return Begun(model, states, grown(lineage, settings, model), told(settings, model, before, after))


@torch.no_grad()
def outcome(
    model: PreTrainedModel, data: Material, settings: StageSettings, *, measured: bool
) -> tuple[Tensor, float | None]:
    """Return a model's logits of some held-out inputs and, where asked, its loss on all of them."""
    loss = data.measure(model.eval(), settings.training).loss if measured else None
    sample = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in data.sample().items()}
    return model.eval()(**sample).logits, loss


def grown(lineage: Lineage, settings: StageSettings, model: PreTrainedModel) -> Lineage:
    """Say in a lineage that a stage grew its model."""
    arguments = {**settings.growth, "name": all_group_names(model)[-1]}
    return lineage.then("grow", arguments=arguments, seed=settings.weights_seed)


def told(
    settings: StageSettings,
    model: PreTrainedModel,
    before: tuple[Tensor, float | None],
    after: tuple[Tensor, float | None],
) -> dict[str, Any]:
    """Say what growing did to a model's size, its logits and its loss."""
    return {
        "arguments": settings.growth,
        "token_groups": cost.group_tokens(model.config),
        "loss_before": finite(before[1]),
        "loss_after": finite(after[1]),
        "logits_equal": torch.equal(before[0], after[0]),
    }
