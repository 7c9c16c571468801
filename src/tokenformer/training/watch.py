"""Watching a stage train: events, validation, prefixes of token groups, and Ctrl-C."""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..checkpoints.lineage import Event
from ..data.text import TextData
from ..evaluation import Evaluation, evaluate
from ..models.pattention import Pattention
from .log import Log, finite
from .partial import mark_complete
from .preparation import processes, use_bfloat16
from .recipe import TrainingSection
from .settings import StageSettings


@dataclass(frozen=True)
class Validation(Evaluation):
    """What validation measured on all held-out text together.

    Attributes:
        texts: on that of each text, by its name.
    """

    texts: dict[str, Evaluation]


def validate(model: PreTrainedModel, data: TextData, training: TrainingSection) -> Validation:
    """Measure a model on the held-out text, as precisely as it trains."""
    texts = {
        name: evaluate(
            model,
            held.blocks,
            num_bytes=held.num_bytes,
            batch_size=training.micro_batch_size or 16,
            dtype=torch.bfloat16 if use_bfloat16(training.precision) else None,
        )
        for name, held in data.validation.items()
    }
    if len(texts) == 1:
        (only,) = texts.values()
        return Validation(only.loss, only.bits_per_byte, only.text_tokens, texts)
    count = sum(found.text_tokens for found in texts.values())
    loss = sum(found.loss * found.text_tokens for found in texts.values()) / count
    num_bytes = sum(held.num_bytes for held in data.validation.values())
    return Validation(loss, loss * count / math.log(2) / num_bytes, count, texts)


class Watcher(TrainerCallback):
    """What goes on beside the steps of a stage; its events carry totals over all that the checkpoint went through.

    Whoever makes a Trainer with it sets `trainer`.

    Args:
        settings: of the stage.
        model: that trains.
        data: to validate on.
        log: of the run.
        before: what the checkpoint that the stage starts from has cost.
        flops_per_step: of training.
        seconds: wall time of training up to now, without validation and preparations.
    """

    trainer: Trainer

    def __init__(
        self,
        settings: StageSettings,
        model: PreTrainedModel,
        data: TextData,
        log: Log,
        before: Event,
        *,
        flops_per_step: float,
        seconds: float,
    ) -> None:
        self.settings, self.model, self.data, self.log, self.before = settings, model, data, log, before
        self.flops_per_step = flops_per_step
        evaluations = settings.training.evaluations_per_stage
        self.evaluation_steps = {round(settings.steps / evaluations * (i + 1)) for i in range(evaluations)}
        self.evaluation: Validation | None = None
        self.interrupted = self.diverged = False
        self._seconds = seconds
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time of training so far."""
        return self._seconds + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def totals(self, step: int) -> dict[str, Any]:
        """Return what training has cost by the end of a step."""
        return {
            "text_tokens_seen": self.before.text_tokens_seen + step * self.settings.tokens_per_step,
            "training_flops": self.before.training_flops + step * self.flops_per_step,
        }

    def emit(self, event: str, step: int, **facts: Any) -> None:
        """Report an event, and once in a stage that it has diverged."""
        line = {
            "event": event,
            "stage": self.settings.number,
            "step": step,
            **self.totals(step),
            "seconds": self.seconds,
            **facts,
        }
        (self.log.on_event if event == "progress" else self.log.write)(line)
        if not self.diverged and "loss" in facts and facts["loss"] is None:
            self.diverged = True
            self.emit("diverged", step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds, self._began = self.seconds, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.settings.nested_dropout is not None:
            rng = random.Random(f"{self.settings.weights_seed} {state.global_step}")
            self._keep(rng.uniform(self.settings.nested_dropout, 1))

    def _keep(self, share: float) -> None:
        """Let only the first share of each token group take part."""
        for layer in (m for m in self.model.modules() if isinstance(m, Pattention)):
            layer.keep = share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.settings.nested_dropout is not None:
            self._keep(1.0)
        self.emit("progress", state.global_step)
        if state.global_step in self.evaluation_steps:
            started = time.perf_counter()
            self.evaluation = validate(self.model, self.data, self.settings.training)
            assert self._began is not None
            self._began += time.perf_counter() - started
            due = control.should_log  # logging the validation would take the training loss's turn
            self.trainer.log({f"eval_{name}": value for name, value in _flat(self.evaluation).items()})
            control.should_log = due
        if self._any_interrupted():
            control.should_save = control.should_training_stop = True

    def _any_interrupted(self) -> bool:
        """Agree whether to stop: Ctrl-C reaches the run's processes in different steps, and all must stop in one."""
        if processes().num_processes > 1:
            flag = torch.tensor(int(self.interrupted), device=processes().device)
            self.interrupted = bool(reduce(flag, "sum"))
        return self.interrupted

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in logs and self.evaluation is not None:
            rate = self.settings.rate(state.global_step - 1)
            self.emit("evaluation", state.global_step, **results(self.evaluation), learning_rate=rate)
        elif "loss" in logs:
            facts = {name: finite(float(logs[name])) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            self.emit("train", state.global_step, **facts)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes().wait_for_everyone()  # each writes its own random numbers' state
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
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


def results(validation: Validation) -> dict[str, Any]:
    """Say of a validation what events and lineage say."""
    each = {name: finite(found.bits_per_byte) for name, found in validation.texts.items()}
    return {
        "loss": finite(validation.loss),
        "bits_per_byte": finite(validation.bits_per_byte),
        **({"bits_per_byte_of": each} if len(each) > 1 else {}),
    }


def _flat(validation: Validation) -> dict[str, float]:
    """Say of a validation what loggers take: numbers by name."""
    each = {f"bits_per_byte_of_{name}": found.bits_per_byte for name, found in validation.texts.items()}
    both = {"loss": validation.loss, "bits_per_byte": validation.bits_per_byte}
    return {**both, **(each if len(each) > 1 else {})}
