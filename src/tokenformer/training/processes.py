"""Which of a run's processes this is."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return which of the run's processes this is; under torchrun there are several."""
    return PartialState(cpu=not torch.accelerator.is_available())
