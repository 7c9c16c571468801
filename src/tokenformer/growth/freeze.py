"""Which parameters train: `freeze(model, names)` = `tokenformer freeze`, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from ..errors import GrowthError
from .architectures import architecture_of, token_groups, with_groups
from .neurons import group_neurons
from .operations import Operation, unchanged

# What a model has beside token groups.
EMBEDDING, FINAL_NORM, LINEAR_MAPS = "embedding", "final_norm", "linear_maps"


def freeze(model: Any, names: Iterable[str]) -> None:
    """Stop these parts of `model` from training: no gradient, no optimizer memory, and they do not move by one bit.

    Args:
        model: TokenFormer, or an ordinary transformer of an architecture in the table.
        names: token groups (with the blocks that came with them), "embedding" (with the output head), "final_norm", or
            "linear_maps": all else in the blocks.

    Raises:
        GrowthError: a name that the model does not have. Nothing is then frozen.
    """
    _set(model, names, trains=False)


def unfreeze(model: Any, names: Iterable[str] | None = None) -> None:
    """Let these parts train again, by default all; names and errors as for `freeze`."""
    _set(model, parts(model) if names is None else names, trains=True)


def freeze_only(model: Any, names: Iterable[str]) -> None:
    """Freeze these parts and no others.

    Raises:
        GrowthError: as `freeze`, or nothing would be left to train.
    """
    names = list(names)
    unfreeze(model)
    freeze(model, names)
    if not any(p.requires_grad for p in model.parameters()):
        raise GrowthError(f"freezing {', '.join(names)} leaves nothing to train")


def parts(model: Any) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each part that can be frozen; gates are in none, since they never train by gradient."""
    group_neurons(model)
    row, groups = architecture_of(model.config), token_groups(model.config)
    inside: dict[str, list[nn.Parameter]] = {
        **{group["name"]: [] for group in groups},
        EMBEDDING: [],
        FINAL_NORM: [],
        LINEAR_MAPS: [],
    }
    owner = {block: group["name"] for group in groups for block in group.get("blocks", ())}
    for name, parameter in model.base_model.named_parameters():
        before, found, after = f".{name}".partition(f".{row.blocks}.")
        if not found or before:
            norm = any(word in name for word in ("norm", "ln_f"))
            inside[FINAL_NORM if norm else EMBEDDING].append(parameter)
        elif ".gates." not in name:
            block = int(after.partition(".")[0])
            group = after.partition(".groups.")[2].partition(".")[0]
            inside[owner.get(block) or group or LINEAR_MAPS].append(parameter)
    head = model.get_output_embeddings()
    if head is not None:
        inside[EMBEDDING] += [p for p in head.parameters() if not any(p is q for q in inside[EMBEDDING])]
    return inside


def _set(model: Any, names: Iterable[str], *, trains: bool) -> None:
    known, names = parts(model), list(names)
    _check(names, known)
    for name in names:
        for parameter in known[name]:
            parameter.requires_grad_(trains)


def _check(names: Iterable[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise GrowthError(f"frozen names {', '.join(map(repr, unknown))}; this model has {', '.join(known)}")


def freeze_operation(config: Any, names: Iterable[str]) -> Operation:
    """Return the operation that marks parts of a checkpoint, for training to leave alone."""
    return _marked(config, "freeze", names, lambda marked, name: marked | {name})


def unfreeze_operation(config: Any, names: Iterable[str]) -> Operation:
    """Return the operation that takes such marks away."""
    return _marked(config, "unfreeze", names, lambda marked, name: marked - {name})


def _marked(
    config: Any, operation: str, names: Iterable[str], change: Callable[[set[str], str], set[str]]
) -> Operation:
    known, names = [*(g["name"] for g in token_groups(config)), EMBEDDING, FINAL_NORM, LINEAR_MAPS], list(names)
    _check(names, known)
    marked = set(getattr(config, "frozen", None) or [])
    for name in names:
        marked = change(marked, name)
    new = with_groups(config, token_groups(config), frozen=[name for name in known if name in marked])
    blocks = range(getattr(config, architecture_of(config).depth))
    return Operation(operation, new, unchanged, blocks, arguments={"parts": names})
