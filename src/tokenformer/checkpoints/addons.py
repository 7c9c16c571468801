"""One token group as a file of its own: `split` takes it off a model, `attach` puts it onto the right parent again."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import CheckpointError, GrowthError
from ..growth.architectures import Groups, architecture_of, check_known, group_names, places, token_groups
from ..growth.beside import has_row, names_beside, own_state
from ..growth.groups import is_normalised, merge_operation
from ..growth.layout import TokenMap
from ..growth.neurons import group_neurons
from ..growth.operations import Operation, apply
from ..growth.state import State, check_finite, content_digest, read_map, read_own, tensors_digest
from .beside import attach_beside, split_beside
from .files import check_file, replacing_file
from .rewrite import StoredTensors
from .verify import is_addon_folder

_KEY = "tokenformer_addon"
_GATES = ".gates."  # in names of what has a type of its own


class Addon(pydantic.BaseModel):
    """What an add-on file says of its token group."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    group: dict[str, Any]
    """Its entry in the configuration."""
    model_type: str
    """Of the model that it was taken off."""
    taus: dict[str, float | None]
    """The constants τ there."""
    norm: str | None
    """What its scores are normalised with; None where they are not."""
    parent_groups: list[str]
    """The other token groups there."""
    parent: str
    """Digest of all that the model has beside the group."""
    tensors: str
    """Digest of the group's."""


def split(model: nn.Module, name: str, output: str | Path, *, force: bool = False) -> Path:
    """Write one token group of a model in memory to an add-on, which holds nothing of the parent.

    Args:
        model: TokenFormer or ordinary transformer, or any model with the group beside its linear maps; not changed.
        name: of the token group.
        output: the file, named *.safetensors; of a group beside linear maps the folder.
        force: replace it.

    Raises:
        GrowthError: no such group, or one that came with blocks.
        CheckpointError: the file exists and not `force`, lies in a checkpoint's folder or cannot be written; or weights
            are not finite.
    """
    if name in names_beside(model) or not has_row(model):
        return split_beside(model, name, output, force=force)
    listed: Any = model
    group_neurons(listed)
    return split_state(listed.config, own_state(listed), name, output, force=force)


def split_state(config: PreTrainedConfig, state: State, name: str, output: str | Path, *, force: bool = False) -> Path:
    """Do what `split` does with a model's tensors by name, which may be read from files; errors as there."""
    file = Path(output)
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} should be called *.safetensors: it holds tensors, and loading it runs no code")
    check_file(file, force=force)
    if (file.parent / "config.json").exists():
        raise CheckpointError(
            f"{file.parent} is a checkpoint, and some tools load every *.safetensors in its folder; "
            "name a file elsewhere"
        )
    check_known(config, [name])
    listed = {entry.name: entry for entry in token_groups(config)}
    if listed[name].brought:
        raise GrowthError(f"token group {name!r} came with {listed[name].brought}, which an add-on cannot carry")
    if listed[name].weights == "packed":
        raise GrowthError(f"token group {name!r} is packed in 2 bits; split the checkpoint from before it was packed")
    others = [other for other in listed if other != name]
    if not others:
        raise GrowthError(f"token group {name!r} is the only one: without it there is no parent to attach it to")
    taus = {field: getattr(config, field) for field in sorted(_taus(config))}
    tensors: dict[str, Tensor] = {}
    for block, token_map in places(config):
        own = {part.tensor: part.own.format(group=name) for part in token_map.parts}
        for part, tensor in read_map(config, state, block, token_map).get(name, {}).items():
            tensors[architecture_of(config).block_name(block) + own[part]] = tensor.contiguous()
    check_finite(tensors, f"token group {name!r}")
    parent, own_digest = content_digest(config, state, others), tensors_digest(tensors)
    norm = config.token_group_norm if is_normalised(config) else None
    addon = Addon(
        group=listed[name].to_config(),
        model_type=config.model_type,
        taus=taus,
        norm=norm,
        parent_groups=others,
        parent=parent,
        tensors=own_digest,
    )
    with replacing_file(file, force=force) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _KEY: addon.model_dump_json()})
    return file


def attach(model: nn.Module, file: str | Path, *, name: str | None = None) -> None:
    """Put the token group of an add-on onto a model in memory, in place; it takes the model's type.

    Args:
        model: with the weights of the add-on's parent, in any type that holds them; it may have further token groups.
            Beside linear maps, these may be quantised: what is not is compared.
        file: that `split` wrote, or the folder.
        name: of the group there; default as it was.

    Raises:
        GrowthError: the add-on belongs to another parent, or the name is taken. The model is then untouched.
        CheckpointError: the file is missing, damaged or no add-on.
    """
    if is_addon_folder(file) or not has_row(model):
        attach_beside(model, file, name=name)
        return
    listed: Any = model
    group_neurons(listed)
    apply(listed, attach_operation(listed.config, own_state(listed), file, name=name))


def attach_operation(config: PreTrainedConfig, state: State, file: str | Path, *, name: str | None = None) -> Operation:
    """Return what `attach` does to a model with these tensors; errors as there."""
    addon, tensors = _read(Path(file))
    try:
        return _attach_operation(config, state, Path(file), addon, tensors, name=name)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is damaged: what it says of its token group makes no sense ({type(error).__name__}: {error})"
        ) from error


def _attach_operation(
    config: PreTrainedConfig, state: State, file: Path, addon: Addon, tensors: State, *, name: str | None
) -> Operation:
    dtype = _dtype(state)
    _check_parent(config, state, addon, file, types=(_dtype(tensors), dtype))
    taken = group_names(config)
    target = name or addon.group["name"]
    if target in taken:
        raise GrowthError(f"token group {target!r} exists already, beside {', '.join(taken)}; choose another name")
    theirs = copy.deepcopy(config)
    theirs.token_groups = [addon.group]
    for field in _taus(config) & addon.taus.keys():
        setattr(theirs, field, addon.taus[field])

    def read(block: int, token_map: TokenMap) -> Groups:
        return {
            group: {part: tensor if _GATES in part else tensor.to(dtype) for part, tensor in parts.items()}
            for group, parts in read_own(theirs, tensors, block, token_map).items()
        }

    norm = getattr(config, "token_group_norm", None)
    if is_normalised(config) and norm != addon.norm and len(taken) > 1:
        raise GrowthError(f"{file} was trained under token_group_norm {addon.norm}; this model's groups are {norm}")
    rename = {addon.group["name"]: target} if name else None
    operation = merge_operation(config, theirs, read, rename=rename, norm=addon.norm)
    arguments = {"addon": file.name, "groups": [target], "parent": addon.parent}
    return replace(operation, name="attach", arguments=arguments)


def _taus(config: PreTrainedConfig) -> set[str]:
    """Return the fields of a configuration that hold a τ."""
    fields = {f"{projection}_tau" for projection in architecture_of(config).counts}
    return {field for field in fields if hasattr(config, field)}


def _read(file: Path) -> tuple[Addon, Mapping[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            facts = json.loads((tensors.metadata() or {})[_KEY])
            addon, stored = Addon(**facts), StoredTensors({name: (file, name) for name in tensors.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no add-on; `tokenformer split` writes them") from error
    if tensors_digest(stored) != addon.tensors:
        raise CheckpointError(f"{file} is damaged: its tensors are not those that were written; copy it again")
    return addon, stored


def _dtype(state: State) -> torch.dtype:
    """Return the type of weights: that of the first, an embedding or a key."""
    return next(tensor.dtype for name, tensor in state.items() if _GATES not in name)


def _check_parent(
    config: PreTrainedConfig, state: State, addon: Addon, file: Path, *, types: tuple[torch.dtype, torch.dtype]
) -> None:
    if addon.model_type != config.model_type:
        raise GrowthError(f"{file} belongs to a {addon.model_type!r} model; this is a {config.model_type!r} model")
    digest = content_digest(config, state, addon.parent_groups)
    if digest != addon.parent:
        theirs, ours = (str(dtype).removeprefix("torch.") for dtype in types)
        remedy = "Attach it to the checkpoint it was split from"
        if theirs != ours:
            remedy = (
                f"It was split from a {theirs} checkpoint, and this one is {ours}. If this is its parent rounded, load "
                f"the child as {ours}, save it and split that; or attach it to the {theirs} parent"
            )
        raise GrowthError(
            f"{file} belongs to another parent: the weights that it grew on have sha256 {addon.parent[:12]}… (token "
            f"groups {', '.join(addon.parent_groups)}), the same of this model {digest[:12]}… (it has "
            f"{', '.join(group_names(config))}). {remedy}"
        )
