"""Which of a run's processes this is, and which share of the text it reads."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .recipe import TrainingSection


def processes() -> PartialState:
    """Return which of the run's processes this is; under torchrun there are several."""
    return PartialState(cpu=not torch.accelerator.is_available())


def from_main(value: Any) -> Any:
    """Return what the main process gave, in all of them."""
    return broadcast_object_list([value])[0]


def started_again() -> bool:
    """Whether torchrun has started the run's processes again, because one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def reader(training: TrainingSection) -> tuple[int, int]:
    """Return which share of the text this process reads, of how many: those that split a tensor's tokens share one."""
    tensor = 1 if training.parallel is None else training.parallel.tensor
    return processes().process_index // tensor, processes().num_processes // tensor
