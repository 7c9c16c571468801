"""The optimizer's state beside a checkpoint's weights, by the names of the parameters."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from ..errors import CheckpointError

OPTIMIZER_FILE = "optimizer.pt"


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
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged: {OPTIMIZER_FILE}: {reason}; delete it to start the optimizer afresh"
        ) from error
