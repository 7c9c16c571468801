"""Watching a stage train: events, validation, prefixes of token groups, and Ctrl-C."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..checkpoints.lineage import Event
from ..data.stream import BlockStream
from ..errors import TokenformerError
from ..models.pattention import Pattention
from .log import Log, finite
from .material import Material, Measured
from .partial import mark_complete, states_in, step_of
from .processes import processes
from .settings import StageSettings
from .stream import save_place


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
        data: Material,
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
        self.evaluation: Measured | None = None
        self.interrupted = self.diverged = False
        self._seconds = seconds
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time of training so far."""
        return self._seconds + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def totals(self, step: int) -> dict[str, Any]:
        """Return what training has cost by the end of a step."""
        seen = f"{self.data.unit}_seen"
        return {
            seen: getattr(self.before, seen) + step * self.data.per_step(self.settings.training),
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
            self.evaluation = self.data.measure(self.model, self.settings.training)
            assert self._began is not None
            self._began += time.perf_counter() - started
            due = control.should_log  # logging the validation would take the training loss's turn
            self.trainer.log({f"eval_{name}": value for name, value in self.evaluation.numbers().items()})
            control.should_log = due
        if state.global_step % self.settings.training.save_every == 0 or state.global_step == self.settings.steps:
            control.should_save = True
        if self._any_interrupted():
            control.should_save = control.should_training_stop = True

    def bad_step(self, gradients: dict[str, Tensor], problem: str, *, place: Path) -> None:
        """Leave a step out, or stop the run before it, as the recipe says; `place` holds the states.

        Raises:
            TokenformerError: the run stops.
        """
        step = self.trainer.state.global_step + 1
        if self.settings.training.on_bad_step == "skip":
            for p in self.model.parameters():
                p.grad = None
            self.emit("skipped", step, problem=problem)
            return
        saved = [step_of(state) for state in states_in(place)]
        kept = f"its state after step {max(saved)} is saved" if saved else "no state of it was saved yet"
        raise TokenformerError(
            f"stage {self.settings.number} stopped before step {step}, which would spoil the weights: {problem}; {kept}"
            ". Train on with --resume and training.on_bad_step: skip, or start again with a smaller learning rate"
        )

    def _any_interrupted(self) -> bool:
        """Agree whether to stop: Ctrl-C reaches the run's processes in different steps, and all must stop in one."""
        if processes().num_processes > 1:
            flag = torch.tensor(int(self.interrupted), device=processes().device)
            self.interrupted = bool(reduce(flag, "sum"))
        return self.interrupted

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in logs and self.evaluation is not None:
            rate = self.settings.rate(state.global_step - 1)
            self.emit("evaluation", state.global_step, **self.evaluation.results(), learning_rate=rate)
        elif "loss" in logs:
            facts = {name: finite(float(logs[name])) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            self.emit("train", state.global_step, **facts)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.trainer.train_dataset, BlockStream):
            save_place(self.trainer.train_dataset, Path(args.output_dir) / f"checkpoint-{state.global_step}")
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
