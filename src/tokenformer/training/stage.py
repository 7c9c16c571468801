"""One stage of training on transformers' Trainer: grow, train, watch, save; resumable to the same bits."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from .. import cost
from ..batches import batches
from ..checkpoints.checkpoint import save_checkpoint
from ..checkpoints.files import disk_errors
from ..checkpoints.lineage import Lineage
from ..checkpoints.optimizer import OPTIMIZER_FILE, OptimizerState
from ..data.blocks import training_order
from ..data.text import TextData
from ..evaluation import Evaluation, evaluate
from ..growth.architectures import group_names
from ..growth.freeze import freeze_only
from ..models.pattention import Pattention
from .log import Log
from .optimization import grow_with_states, learning_rate, make_optimizer, steps_of
from .preparation import frozen_parts, processes, training_arguments, use_bfloat16
from .recipe import Recipe

_COMPLETE = "complete"


Start = Callable[[], tuple[Any, OptimizerState, Lineage]]


def unfinished(target: Path) -> Path:
    """Return where a stage that will be written to `target` keeps its state until then."""
    return target.with_name(f"{target.name}.partial")


def stage_seed(recipe: Recipe, index: int) -> int:
    """Return the seed of the new weights of a stage."""
    return recipe.seed * 1000 + index


class StageRun(TrainerCallback):
    """One stage: build its start, hand it to the Trainer, watch, and write its checkpoint."""

    def __init__(
        self, recipe: Recipe, index: int, data: TextData, log: Log, *, rate: Callable[[int], float] | None = None
    ) -> None:
        """Prepare stage `index` of `recipe`; `rate` gives the learning rate of each of its steps, default the recipe's.

        Every stage trains on its own stretch of one global order of text, after those of the stages before it.
        """
        self.recipe, self.index, self.data, self.log = recipe, index, data, log
        self.stage = recipe.stages[index]
        self.steps = steps_of(self.stage, recipe)
        self.tokens_per_step = recipe.training.batch_size * recipe.training.sequence_length
        every = self.steps / recipe.training.evaluations_per_stage
        self.evaluation_steps = {round(every * (i + 1)) for i in range(recipe.training.evaluations_per_stage)}
        self.bfloat16 = use_bfloat16(recipe.training.precision)
        self.flops_per_step = 0.0
        self.evaluation: Evaluation | None = None
        self.added_group: str | None = None
        self.interrupted = False
        self.spent = 0.0
        self.began: float | None = None
        self.rate = rate or partial(learning_rate, recipe, index)

    def run(self, start: Start, target: Path) -> None:
        """Train what `start` returns, which must be the same after an interruption, and write it to `target`.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the state is saved beside `target`.
        """
        partial_run = unfinished(target)
        resume_from = _newest_complete(partial_run)
        done = int(resume_from.name.removeprefix("checkpoint-")) if resume_from else 0
        logged = self.log.rewind(self.index + 1, done)
        self.model, states, self.lineage = start()
        spent = logged.get("seconds", 0.0) if done else 0.0
        self.spent = max(spent, self.lineage.last.training_seconds)
        arguments = training_arguments(self.recipe, partial_run, steps=self.steps)
        self.model.to(arguments.device)
        if self.stage.growth:
            states = self._grow(states, quiet=done > 0)
        freeze_only(self.model, frozen_parts(self.stage, self.model.config))
        self.flops_per_step = self.tokens_per_step * cost.training_flops(
            self.model.config,
            self.recipe.training.sequence_length,
            frozen_parameters=sum(p.numel() for p in self.model.parameters() if not p.requires_grad),
        )
        optimizer = make_optimizer(self.model, self.recipe, states)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(min(step, self.steps - 1)))
        self.trainer = Trainer(
            self.model,
            arguments,
            train_dataset=self._blocks(),
            data_collator=_collate,
            optimizers=(optimizer, schedule),
            callbacks=[self],
        )
        self.trainer.remove_callback(PrinterCallback)
        self._emit("stage", 0, steps=self.steps, done=done, parameters=cost.parameters(self.model.config))
        with self._interruptible(), disk_errors(partial_run):
            self.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if self.interrupted:
            raise KeyboardInterrupt
        self._finish(target, optimizer, states)

    def _grow(self, states: OptimizerState, *, quiet: bool) -> OptimizerState:
        """Grow, say what it did to the logits and the loss, and rename the optimizer's states along."""
        model = self.model.eval()
        before = None if quiet else self._evaluate(model).loss
        sample = next(batches(self.data.validation_blocks, 4)).to(model.device)
        with torch.no_grad():
            logits = model(sample, use_cache=False).logits
            states = grow_with_states(model, states, **self.stage.growth)
            self.added_group = group_names(model.config)[-1]
            equal = torch.equal(model(sample, use_cache=False).logits, logits)
        if not quiet:
            after = self._evaluate(model).loss
            self._emit(
                "growth",
                0,
                arguments=self.stage.growth,
                token_groups=cost.group_tokens(model.config),
                loss_before=before,
                loss_after=after,
                logits_equal=equal,
            )
        return states

    def _blocks(self) -> Any:
        """Take the stage's stretch of the one global order of text."""
        batch = self.recipe.training.batch_size
        skipped = batch * sum(steps_of(s, self.recipe) for s in self.recipe.stages[: self.index])
        count = batch * self.steps
        if self.recipe.data.streaming:
            return self.data.train_blocks.repeat(None).skip(skipped).take(count)
        order = training_order(len(self.data.train_blocks), skipped, count, seed=self.recipe.seed)
        return Subset(self.data.train_blocks, order.tolist())

    def _evaluate(self, model: Any) -> Evaluation:
        return evaluate(
            model,
            self.data.validation_blocks,
            num_bytes=self.data.validation_bytes,
            batch_size=self.recipe.training.micro_batch_size or 16,
            dtype=torch.bfloat16 if self.bfloat16 else None,
        )

    def _emit(self, event: str, step: int, **facts: Any) -> None:
        """Report an event with the totals so far, over all stages and all that the checkpoint went through before."""
        line = {
            "event": event,
            "stage": self.index + 1,
            "step": step,
            "text_tokens_seen": self.lineage.last.text_tokens_seen + step * self.tokens_per_step,
            "training_flops": self.lineage.last.training_flops + step * self.flops_per_step,
            "seconds": self._seconds(),
        }
        (self.log.on_event if event == "progress" else self.log.write)({**line, **facts})

    def _seconds(self) -> float:
        """Return the wall time of training so far, without validation and preparations."""
        return self.spent + (time.perf_counter() - self.began if self.began is not None else 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent, self.began = self._seconds(), None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage.nested_dropout is not None:
            rng = random.Random(f"{stage_seed(self.recipe, self.index)} {state.global_step}")
            self._keep(rng.uniform(self.stage.nested_dropout, 1))

    def _keep(self, share: float) -> None:
        """Let only the first share of each token group take part."""
        for layer in (m for m in self.model.modules() if isinstance(m, Pattention)):
            layer.keep = share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(1.0)
        self._emit("progress", state.global_step)
        if state.global_step in self.evaluation_steps:
            started = time.perf_counter()
            evaluation = self.evaluation = self._evaluate(self.model)
            assert self.began is not None
            self.began += time.perf_counter() - started
            due = control.should_log  # logging the validation would take the training loss's turn
            self.trainer.log({"eval_loss": evaluation.loss, "eval_bits_per_byte": evaluation.bits_per_byte})
            control.should_log = due
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in logs:
            facts = {"loss": logs["eval_loss"], "bits_per_byte": logs["eval_bits_per_byte"]}
            self._emit("evaluation", state.global_step, **facts, learning_rate=self.rate(state.global_step - 1))
        elif "loss" in logs:
            facts = {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            self._emit("train", state.global_step, **facts)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    def _finish(self, target: Path, optimizer: torch.optim.Optimizer, states: OptimizerState) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        states = {**states, **{names[id(p)]: dict(state) for p, state in optimizer.state.items()}}
        # None after resuming from the last step, which was evaluated before it was saved.
        evaluation = self.evaluation or self._evaluate(self.model)
        results = {"loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte}
        lineage = self.lineage
        if self.stage.growth:
            growth = {**self.stage.growth, "name": self.added_group}
            lineage = lineage.then("grow", arguments=growth, seed=stage_seed(self.recipe, self.index))
        last = self.lineage.last
        lineage = lineage.then(
            "train",
            arguments={"stage": self.index + 1},
            recipe=self.recipe.model_dump(exclude_unset=True),
            data=self.data.facts,
            seed=self.recipe.seed,
            text_tokens_seen=last.text_tokens_seen + self.steps * self.tokens_per_step,
            training_flops=last.training_flops + self.steps * self.flops_per_step,
            training_seconds=self._seconds(),
            **results,
        )
        if self.log.enabled:
            self.model.to("cpu")
            save_checkpoint(
                target,
                self.model,
                self.data.tokenizer,
                lineage,
                extra=lambda folder: torch.save(states, folder / OPTIMIZER_FILE),
            )
        processes().wait_for_everyone()
        self._emit("end", self.steps, **results)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C finish the step and save; a second one is Python's usual KeyboardInterrupt."""

        def stop(number: int, frame: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            old = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not the main thread: whoever runs us there decides about signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def _newest_complete(folder: Path) -> Path | None:
    whole = [p.parent for p in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)
