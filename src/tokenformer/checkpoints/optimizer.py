"""The optimizer's state beside a checkpoint's weights, by the names of the parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import CheckpointError, first_line
from .pickles import load_tensors
from .verify import OPTIMIZER_FILE as OPTIMIZER_FILE

OptimizerState = dict[str, dict[str, torch.Tensor]]


def load_states(checkpoint: str | Path) -> OptimizerState:
    """Read the optimizer's states by parameter name; none where the checkpoint came without.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = Path(checkpoint) / OPTIMIZER_FILE
    if not file.exists():
        return {}
    try:
        states = load_tensors(file)
        found = [(name, tensor) for name, state in states.items() for tensor in state.values()]
        if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found):
            raise TypeError("it holds more than tensors by the names of parameters")
    except Exception as error:  # a damaged pickle can fail in as many ways as there are; all mean that it is damaged
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged: {OPTIMIZER_FILE} ({file.stat().st_size} bytes) cannot be read "
            f"({first_line(error)}); delete it to start the optimizer afresh"
        ) from error
    return dict(states)
