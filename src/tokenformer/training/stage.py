"""One stage of training on transformers' Trainer: grow, train, write; resumable to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from ..checkpoints.disk import disk_errors
from ..checkpoints.temporary import clear_abandoned
from ..checkpoints.whole import becomes_addon
from ..data.stream import BlockStream
from ..growth.freeze import freeze_only
from .gradients import check_gradients
from .log import Log
from .material import Material
from .optimization import make_optimizer
from .partial import newest_whole, step_of, unfinished
from .preparation import frozen_parts, training_arguments
from .processes import from_main, processes
from .settings import StageSettings
from .stream import go_on
from .watch import Watcher
from .whole import Begun


class Begin(Protocol):
    """Makes what a stage trains, the same after an interruption; `whole.begin` and `sharded.begin` in part."""

    def __call__(self, settings: StageSettings, data: Material, *, place: Path, state: Path | None) -> Begun:
        """Grow, in `place`, unless there is a `state` to go on from."""


def run_stage(
    settings: StageSettings, begin: Begin, data: Material, log: Log, target: Path, *, parent: str | Path | None = None
) -> PreTrainedModel:
    """Train what `begin` makes, write it to `target`, and return the model.

    Args:
        settings: how to grow and train.
        begin: makes the model, grown, and the optimizer's states.
        data: to train on and to validate on.
        log: of the run.
        target: the checkpoint; while it is unfinished, states to resume from lie beside it.
        parent: checkpoint that `begin` reads, whose licence and other files go along.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    place = unfinished(target)
    if log.enabled:
        clear_abandoned(target.parent)
    # The main process chooses for all from where to continue.
    state, problems = from_main(newest_whole(place) if processes().is_main_process else None)
    done = step_of(state) if state else 0
    logged = log.rewind(settings.number, done)
    begun = begin(settings, data, place=place, state=state)
    model, lineage = begun.model, begun.lineage
    before = lineage.last
    arguments = training_arguments(settings.training, place, steps=settings.steps, seed=settings.seed)
    freeze_only(model, frozen_parts(settings.frozen, model, addon=becomes_addon(model, parent)))
    watcher = Watcher(
        settings,
        model,
        data,
        log,
        before,
        flops_per_step=data.per_step(settings.training) * data.flops(model, settings.training),
        seconds=max(logged.get("seconds", 0.0) if done else 0.0, before.training_seconds),
    )
    optimizer = make_optimizer(model, settings.training, begun.states, apart=settings.rate_of_new is not None)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [_rate(settings, group) for group in optimizer.param_groups]
    )
    examples = data.examples(settings.reading, seed=settings.seed)
    if state and isinstance(examples, BlockStream):  # then its text is the only one
        read = sum(settings.reading.skipped.values()) + done * settings.training.batch_size
        go_on(examples, state, read=read)
    trainer = watcher.trainer = begun.trainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=data.collate,
        compute_loss_func=data.loss,
        optimizers=(optimizer, schedule),
        callbacks=[watcher],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.training.on_bad_step != "go_on":
        trainer.before_clipping = partial(
            check_gradients, model, settings.training.bad_grad_norm, partial(watcher.bad_step, place=place)
        )
    for problem in problems:
        watcher.emit("damaged", done, problem=problem)
    if begun.growth and not done:
        watcher.emit("growth", 0, **begun.growth)
    reads = data.reads(settings.reading)
    parameters = sum(p.numel() for p in model.parameters())
    watcher.emit("stage", 0, steps=settings.steps, done=done, parameters=parameters, reads=reads)
    with watcher.interruptible(), disk_errors(place):
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    if watcher.interrupted:
        raise KeyboardInterrupt
    # None after resuming from the last step, which was evaluated before it was saved.
    found = (watcher.evaluation or data.measure(model, settings.training)).results()
    lineage = lineage.then(
        "train",
        arguments=settings.arguments,
        recipe=settings.recipe,
        data={**data.facts, "reads": reads},
        seed=settings.seed,
        training_seconds=watcher.seconds,
        **watcher.totals(settings.steps),
        **found,
    )

    watcher.emit("end", settings.steps, **found)  # before the checkpoint is there, after which nobody would say it
    begun.write(target, optimizer, data.processor, lineage, parent=parent)
    processes().wait_for_everyone()
    return model


def _rate(settings: StageSettings, group: dict[str, Any]) -> Callable[[int], float]:
    """Return the learning rate of a group of the optimizer, which holds still after the last step."""
    rate = settings.rate_of_new if group["new"] and settings.rate_of_new else settings.rate
    return lambda step: rate(min(step, settings.steps - 1))
