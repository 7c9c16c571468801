"""Which parameters train: `freeze(model, names)` = `tokenformer freeze`, and back."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..errors import GrowthError
from ..models.names import BASE_GROUP
from .architectures import (
    architecture_of,
    frozen_names,
    group_names,
    row_of,
    site_groups,
    token_groups,
    with_groups,
)
from .beside import has_row, parameters_beside
from .neurons import group_neurons
from .operations import Operation, unchanged

# What a model has beside token groups.
EMBEDDING, FINAL_NORM, LINEAR_MAPS = "embedding", "final_norm", "linear_maps"


def freeze(model: nn.Module, names: Iterable[str] = (), *, all_but: Iterable[str] | None = None) -> None:
    """Stop these parts of `model` from training: no gradient, no optimizer memory, and they do not move by one bit.

    The model's configuration says so from then on, so that a saved checkpoint keeps it.

    Args:
        model: TokenFormer, an ordinary transformer of an architecture in the table, or any model with token groups
            beside its linear maps.
        names: token groups (with what came with them), "embedding" (with the output head), "final_norm", or
            "linear_maps": all else in the blocks. Of a model that is not in the table, or is tokenised: "base", all
            that is no token group, or is of the one of that name.
        all_but: freeze every part but these, and let these train.

    Raises:
        GrowthError: a name that the model does not have, or both names and `all_but`. Nothing is then frozen.
    """
    names = list(names)
    if all_but is not None:
        if names:
            raise GrowthError(f"names are {', '.join(names)} and all_but is given as well; give one of them")
        kept = list(all_but)
        unfreeze(model, kept)
        names = [name for name in trainable_parts(model) if name not in kept]
    _set(model, names, trains=False)
    _mark_model(model, more=names)


def unfreeze(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Let these parts train again, by default all; names and errors as for `freeze`."""
    names = list(trainable_parts(model) if names is None else names)
    _set(model, names, trains=True)
    _mark_model(model, less=names)


def freeze_only(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze these parts and no others while the model is in memory; its configuration does not say so.

    Raises:
        GrowthError: as `freeze`, or nothing would be left to train.
    """
    names = list(names)
    _set(model, trainable_parts(model), trains=True)
    _set(model, names, trains=False)
    if not any(p.requires_grad for p in model.parameters()):
        raise GrowthError(f"freezing {', '.join(names)} leaves nothing to train")


def trainable_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each part that can be frozen; gates are in none, since they never train by gradient."""
    beside = parameters_beside(model)
    own = _own_parts(model) if has_row(model) else {BASE_GROUP: list(model.parameters())}
    new = {id(p) for parameters in beside.values() for p in parameters}
    parts = {name: [p for p in parameters if id(p) not in new] for name, parameters in own.items()}
    return parts | {name: [*parts.get(name, []), *parameters] for name, parameters in beside.items()}


def _own_parts(model: Any) -> dict[str, list[nn.Parameter]]:
    """Return the parts of a model in the table of architectures; what is beside its maps lies anywhere."""
    group_neurons(model)
    row = architecture_of(model.config)
    inside: dict[str, list[nn.Parameter]] = {name: [] for name in _known(model.config)}
    owner = {block: group.name for group in token_groups(model.config) for block in group.blocks}
    blocks, norm = row.blocks_of(model), row.final_norm_of(model)
    for number, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            found = re.search(r"\.(?:groups|scales)\.(\w+)\.", name)
            group = found[1] if found else ""
            inside[owner.get(number) or (group if group in inside else LINEAR_MAPS)].append(parameter)
    inside[FINAL_NORM] = [] if norm is None else list(norm.parameters())
    elsewhere = {id(p) for p in [*blocks.parameters(), *inside[FINAL_NORM]]}
    inside[EMBEDDING] = [p for p in model.parameters() if id(p) not in elsewhere]
    return inside


def freeze_operation(config: PreTrainedConfig, names: Iterable[str]) -> Operation:
    """Return the operation that marks parts of a checkpoint, for training to leave alone."""
    return _marking(config, "freeze", more=list(names))


def unfreeze_operation(config: PreTrainedConfig, names: Iterable[str]) -> Operation:
    """Return the operation that takes such marks away."""
    return _marking(config, "unfreeze", less=list(names))


def _mark_model(model: nn.Module, *, more: Iterable[str] = (), less: Iterable[str] = ()) -> None:
    """Let a model's configuration, where it has one, say what of its parts is frozen."""
    config: Any = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        known = _known(config)
        _mark(config, more=[name for name in more if name in known], less=[name for name in less if name in known])


def _set(model: nn.Module, names: Iterable[str], *, trains: bool) -> None:
    known, names = trainable_parts(model), list(names)
    _check(names, known)
    for name in names:
        for parameter in known[name]:
            parameter.requires_grad_(trains)


def _known(config: PreTrainedConfig) -> list[str]:
    own = [BASE_GROUP] if row_of(config) is None else [*group_names(config), EMBEDDING, FINAL_NORM, LINEAR_MAPS]
    return list(dict.fromkeys([*own, *site_groups(config)]))


def _check(names: Iterable[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise GrowthError(f"there is no part {', '.join(map(repr, unknown))}; this model has {', '.join(known)}")


def _mark(config: PreTrainedConfig, *, more: Collection[str] = (), less: Collection[str] = ()) -> None:
    known = _known(config)
    _check([*more, *less], known)
    marked = {*frozen_names(config), *more} - {*less}
    if marked != set(frozen_names(config)):
        config.frozen = [name for name in known if name in marked]


def _marking(
    config: PreTrainedConfig, operation: str, *, more: Collection[str] = (), less: Collection[str] = ()
) -> Operation:
    new = with_groups(config, token_groups(config))
    _mark(new, more=more, less=less)
    blocks = range(architecture_of(config).depth_of(config))
    return Operation(operation, new, unchanged, blocks, keeps_outputs=True, arguments={"parts": [*more, *less]})
