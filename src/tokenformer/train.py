"""Train a recipe: stage after stage with transformers' Trainer, growing in between; resumable to the same bits.

A run folder holds `recipe.yaml`, `log.jsonl`, one checkpoint per finished stage (`stage1`, `stage2`, …, each with
`optimizer.pt`) and, while a stage trains, `stageN.partial` with the Trainer's own checkpoints. Every stage starts from
files alone, so an interrupted run and an uninterrupted one go through the same states.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from . import cost
from .checkpoint import (
    disk_errors,
    load_checkpoint,
    save_checkpoint,
)
from .data import TextData, training_order
from .errors import CheckpointError, DataError
from .evaluate import Evaluation, evaluate
from .growth.architectures import token_groups
from .growth.freeze import freeze_only
from .lineage import Lineage
from .models.modeling_tokenformer import TokenformerForCausalLM
from .models.pattention import Pattention
from .optimization import (
    OPTIMIZER_FILE,
    OptimizerState,
    grow_with_states,
    learning_rate,
    load_states,
    make_optimizer,
    steps_of,
)
from .preparation import (
    check_resumable,
    first_config,
    frozen_parts,
    new_run,
    prepare_run,
    processes,
    training_arguments,
    use_bfloat16,
)
from .recipe import Recipe

_COMPLETE = "complete"

OnEvent = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    on_event: OnEvent = lambda event: None,
) -> list[Path]:
    """Train `recipe` in `folder` and return the checkpoints of its stages, the final one last.

    Args:
        recipe: what to do.
        folder: the run folder.
        resume: continue what an earlier call began, from its newest whole checkpoint; with the same machine and
            threads the final weights equal those of an uninterrupted run bit for bit.
        force: delete an existing run folder first.
        on_event: called with every event of the run, in order: "data", "stage", "growth", "train" (also "progress",
            which is not logged), "evaluation", "end". All but "progress" are lines of log.jsonl.

    Raises:
        RecipeError: the recipe makes no sense, or on resuming is not the one the run began with.
        DataError, TokenizerError: from the text. GrowthError: from growing.
        CheckpointError: the folder exists, or cannot be written.
        KeyboardInterrupt: after Ctrl-C, once the state is saved (a second Ctrl-C leaves at once).
    """
    run = Path(folder)
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    main_process = processes().is_main_process
    if resume and force:
        raise CheckpointError("--resume continues a run and --force starts it over: give one of them")
    if resume:
        check_resumable(recipe, run)
    with nullcontext() if resume or not main_process else new_run(recipe, run, force=force):
        data = prepare_run(recipe, run)
    log = _Log(run / "log.jsonl", on_event if main_process else lambda event: None, enabled=main_process)
    logged = read_log(run) if log.path.exists() else []
    began = next((event for event in logged if event["event"] == "data"), None)
    if began is None:
        log.write({"event": "data", **data.facts})
    elif began != {"event": "data", **data.facts}:
        changed = [f"{k} {began.get(k)} → {v}" for k, v in data.facts.items() if began.get(k) != v]
        raise DataError(f"the text is not what this run began with ({', '.join(changed)}); put it back, or start anew")
    checkpoints: list[Path] = []
    for index in range(len(recipe.stages)):
        checkpoint = run / f"stage{index + 1}"
        if not checkpoint.exists():
            previous = checkpoints[-1] if checkpoints else recipe.model.checkpoint
            _StageRun(recipe, index, data, log).run(previous, checkpoint)
        if main_process:
            shutil.rmtree(run / f"stage{index + 1}.partial", ignore_errors=True)
        checkpoints.append(checkpoint)
    return checkpoints


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """Return the events of a run; a last line cut short by a kill is left out."""
    events = []
    for line in (Path(run) / "log.jsonl").read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


@dataclass
class _Log:
    path: Path
    on_event: OnEvent
    enabled: bool

    def write(self, event: dict[str, Any]) -> None:
        if self.enabled:
            with disk_errors(self.path), self.path.open("a") as stream:
                stream.write(json.dumps(event) + "\n")
        self.on_event(event)

    def rewind(self, stage: int, step: int) -> dict[str, Any]:
        """Drop what was logged after `step` of `stage`, to be logged again; return the newest event that is left."""
        if not self.path.exists():
            return {}
        kept = [e for e in read_log(self.path.parent) if (e.get("stage", 0), e.get("step", 0)) <= (stage, step)]
        if step == 0:
            kept = [e for e in kept if e.get("stage", 0) < stage]
        if self.enabled:
            temporary = self.path.with_suffix(".tmp")
            with disk_errors(self.path):
                temporary.write_text("".join(json.dumps(e) + "\n" for e in kept))
                temporary.replace(self.path)
        return next((e for e in reversed(kept) if "seconds" in e), {})


class _StageRun(TrainerCallback):
    """One stage: build its start, hand it to the Trainer, watch, and write its checkpoint."""

    def __init__(self, recipe: Recipe, index: int, data: TextData, log: _Log) -> None:
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

    def run(self, previous: str | Path | None, target: Path) -> None:
        partial = target.with_name(f"{target.name}.partial")
        resume_from = _newest_complete(partial)
        done = int(resume_from.name.removeprefix("checkpoint-")) if resume_from else 0
        logged = self.log.rewind(self.index + 1, done)
        self.model, states, self.lineage = self._start(previous)
        spent = logged.get("seconds", 0.0) if done else 0.0
        self.clock = time.perf_counter() - max(spent, self.lineage.last.training_seconds)
        arguments = training_arguments(self.recipe, partial, steps=self.steps)
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
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(self.recipe, self.index, min(step, self.steps - 1))
        )
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
        with self._interruptible(), disk_errors(partial):
            self.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if self.interrupted:
            raise KeyboardInterrupt
        self._finish(target, optimizer, states)

    @property
    def _seed(self) -> int:
        """Of this stage's new weights."""
        return self.recipe.seed * 1000 + self.index

    def _start(self, previous: str | Path | None) -> tuple[Any, OptimizerState, Lineage]:
        """Build what this stage starts from, out of files and seeds alone."""
        torch.manual_seed(self._seed)
        if previous is None:
            return TokenformerForCausalLM(first_config(self.recipe, self.data)), {}, Lineage()
        model, _, lineage = load_checkpoint(previous, dtype=torch.float32)
        if model.config.model_type == "tokenformer":
            model.config.max_position_embeddings = max(
                model.config.max_position_embeddings, self.recipe.training.sequence_length
            )
        return model, load_states(previous), lineage

    def _grow(self, states: OptimizerState, *, quiet: bool) -> OptimizerState:
        """Grow, say what it did to the logits and the loss, and rename the optimizer's states along."""
        started = time.perf_counter()
        model = self.model.eval()
        before = None if quiet else self._evaluate(model).loss
        sample = torch.tensor(self.data.validation_blocks[:4]["input_ids"], device=model.device)
        with torch.no_grad():
            logits = model(sample, use_cache=False).logits
            states = grow_with_states(model, states, **self.stage.growth)
            self.added_group = token_groups(model.config)[-1]["name"]
            equal = torch.equal(model(sample, use_cache=False).logits, logits)
        if not quiet:
            after = self._evaluate(model).loss
            self.clock += time.perf_counter() - started
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
            "seconds": time.perf_counter() - self.clock,
        }
        (self.log.on_event if event == "progress" else self.log.write)({**line, **facts})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage.nested_dropout is not None:
            rng = random.Random(f"{self._seed} {state.global_step}")
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
            self.clock += time.perf_counter() - started
            self.trainer.log({"eval_loss": evaluation.loss, "eval_bits_per_byte": evaluation.bits_per_byte})
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in logs:
            facts = {"loss": logs["eval_loss"], "bits_per_byte": logs["eval_bits_per_byte"]}
            self._emit("evaluation", state.global_step, **facts)
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
            lineage = lineage.then("grow", arguments=growth, seed=self._seed)
        last = self.lineage.last
        lineage = lineage.then(
            "train",
            arguments={"stage": self.index + 1},
            recipe=self.recipe.model_dump(exclude_unset=True),
            data=self.data.facts,
            seed=self.recipe.seed,
            text_tokens_seen=last.text_tokens_seen + self.steps * self.tokens_per_step,
            training_flops=last.training_flops + self.steps * self.flops_per_step,
            training_seconds=time.perf_counter() - self.clock,
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


def _newest_complete(partial: Path) -> Path | None:
    whole = [p.parent for p in partial.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)
