"""Checkpoints whose configuration lists token groups at linear maps, which are changed in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..growth.beside import names_beside
from .checkpoint import load_checkpoint, save_checkpoint
from .lineage import Lineage
from .verify import carry_files, config_fields, is_addon_folder


def has_sites(path: str | Path) -> bool:
    """Whether a checkpoint's configuration lists token groups at linear maps.

    Raises:
        CheckpointError: there is no checkpoint at `path`.
    """
    return bool(config_fields(path).get("token_sites"))


def becomes_addon(model: nn.Module, parent: str | Path | None) -> bool:
    """Whether what was trained beside a checkpoint's linear maps is kept without it.

    Not where the checkpoint holds such tokens itself, as one that was tokenised does, nor where there is none.
    """
    if parent is None or not names_beside(model):
        return False
    return is_addon_folder(parent) or not has_sites(parent)


def change_whole(
    path: str | Path, output: str | Path, change: partial[Any], *, force: bool = False, seed: int | None = None
) -> Lineage:
    """Load a checkpoint, change the model, and write it as a new one, whose lineage says so.

    Args:
        path: of the checkpoint.
        output: folder of the new one.
        change: a verb with its arguments by name, such as `partial(drop, names=["more"])`.
        force: replace what stands at `output`.
        seed: of the change.

    Raises:
        CheckpointError: as `load_checkpoint` and `save_checkpoint`. Others: as the verb.
    """
    model, tokenizer, lineage = load_checkpoint(path)
    change(model, **({} if seed is None else {"seed": seed}))
    arguments = {name: value for name, value in change.keywords.items() if value is not None}
    after = lineage.then(change.func.__name__, arguments=arguments, seed=seed)
    return save_checkpoint(output, model, tokenizer, after, force=force, extra=lambda folder: carry_files(path, folder))
