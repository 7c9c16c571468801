"""An operation on token groups, said once for models in memory and checkpoints on disk.

An `Operation` is a new configuration, the blocks to make, and a function from the tensors of one map's token groups to
the new ones. `apply` carries it out on a model in place; `checkpoints.rewrite` on the files of a checkpoint, block
after block, to the same bits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import GrowthError
from ..models.modality import apply_notes
from ..models.pattention import Pattention
from ..models.token_group import TokenGroup
from .architectures import Groups, architecture_of, frozen_names, places, token_groups
from .layout import TokenMap
from .neurons import as_parameter, group_neurons, refuse_unless_plain
from .sequence import Follower
from .sites import CHILD, sites

# What stands between the names of an MLP and of its maps where these are of neurons beside it.
_BESIDE_MLP = re.compile(rf"\.{CHILD}\.groups\.\w+\.")
Change = Callable[[int, TokenMap, Groups], Groups]


def unchanged(block: int, token_map: TokenMap, groups: Groups) -> Groups:
    """Leave the token groups of a map as they are."""
    return groups


@dataclass(frozen=True)
class Operation:
    """What to do to a model.

    Attributes:
        name: as lineage records it.
        config: the configuration afterwards.
        change: from (block, map, its token groups) to the new token groups of that map; the block's number is the new
            one. Keys are `[n, D]`, their biases `[n]`, values `[E, n]`.
        moments: likewise for the optimizer's moments. Default: `change`.
        blocks: for each block afterwards, the one before that it was, or is a copy of.
        silent: the copies, whose last maps are zero.
        keeps_outputs: whether the model computes afterwards what it did before, at least to rounding.
        arguments: as lineage records them.
    """

    name: str
    config: PreTrainedConfig
    change: Change
    blocks: Sequence[int]
    moments: Change | None = None
    silent: Collection[int] = ()
    keeps_outputs: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def apply(model: PreTrainedModel, operation: Operation) -> None:
    """Carry out `operation` on `model` in place; parameters that it leaves alone stay the same objects.

    Raises:
        GrowthError: it changes the number of neurons of a map that has tokens beside it. The model is then untouched.
    """
    row = architecture_of(model.config)
    group_neurons(model)
    _check_sites(model, operation)
    old = list(row.blocks_of(model))
    if list(operation.blocks) != list(range(len(old))):
        blocks: list[Any] = [
            _silent_copy(old[source], row.is_last) if i in operation.silent else old[source]
            for i, source in enumerate(operation.blocks)
        ]
        for i, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = i
                if hasattr(module, "config"):
                    module.config = model.config  # a copied block brought a copy
        model.base_model.set_submodule(row.blocks, nn.ModuleList(blocks))
    model.config.__dict__.update(operation.config.__dict__)
    for block, token_map in places(model.config):
        module = row.blocks_of(model)[block]
        groups = read_groups(module, token_map)
        changed = operation.change(block, token_map, groups)
        if changed is not groups:
            _write_groups(module, token_map, changed, model.config)


def _check_sites(model: PreTrainedModel, operation: Operation) -> None:
    """Tokens beside a map fit its size, so neurons cannot come or go there."""
    row, before, after = architecture_of(model.config), token_groups(model.config), token_groups(operation.config)
    sizes = [
        tuple(sum(group.count(m.projection, block) for group in groups) for m in row.maps)
        for groups, blocks in ((before, operation.blocks), (after, range(len(operation.blocks))))
        for block in blocks
    ]
    if sizes[: len(sizes) // 2] == sizes[len(sizes) // 2 :]:
        return
    inside = {part.stored.rpartition(".")[0] for token_map in row.maps for part in token_map.parts}
    held = [site for site in sites(model) if any(site.endswith(f".{name}") for name in inside)]
    if held:
        raise GrowthError(
            f"{operation.name} changes how many neurons there are, but {held[0]} has tokens beside it, which fit its "
            "size; drop or split these first, or put tokens beside other maps"
        )


def read_groups(block: nn.Module, token_map: TokenMap) -> Groups:
    """Return the parameters of a map's token groups, of a block whose neurons are grouped."""
    groups: Groups = {}
    for part in token_map.parts:
        before, _, after = part.own.partition(".{group}.")
        try:
            owners: Any = block.get_submodule(before)
        except AttributeError:  # a Pattention without gates
            continue
        for name, owner in owners.items():
            tensor = getattr(owner.get_submodule(after.rpartition(".")[0]), after.rpartition(".")[2], None)
            if tensor is not None:
                groups.setdefault(name, {})[part.tensor] = tensor
    return groups


def check_plain(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse token groups whose maps are more than their weight (LoRA) or less (int8), so that tokens cannot move.

    Raises:
        GrowthError: there are such.
    """
    group_neurons(model)
    blocks, names = architecture_of(model.config).blocks_of(model), list(names)
    for block, token_map in places(model.config):
        present = read_groups(blocks[block], token_map)
        for part in (part for part in token_map.parts if part.axis is not None):
            for name in (name for name in names if part.tensor in present.get(name, {})):
                linear = blocks[block].get_submodule(part.own.format(group=name).rpartition(".")[0])
                refuse_unless_plain(linear, f"move the parameter tokens of group {name!r}")


def _write_groups(block: nn.Module, token_map: TokenMap, groups: Groups, config: PreTrainedConfig) -> None:
    layer: Any = block.get_submodule(token_map.name)
    old = read_groups(block, token_map)
    frozen = {name for name, tensors in old.items() if not any(_trains(t) for t in tensors.values())}
    frozen |= set(frozen_names(config))
    kept = [name for name, tensors in groups.items() if name in old and _same(tensors, old[name])]
    weights = {group.name: group.weights for group in token_groups(config)}
    if isinstance(layer, Pattention):
        layer.tau = getattr(config, f"{token_map.projection}_tau")
        layer.token_group_norm = config.token_group_norm
        tokens = {name: own for name, tensors in groups.items() if (own := _inside(tensors, "groups"))}
        layer.groups = nn.ModuleDict(
            {
                name: layer.groups[name] if name in kept else _token_group(layer, own, weights[name])
                for name, own in tokens.items()
            }
        )
        for beside in (layer.gates, layer.scales):
            for name in [name for name in beside if name not in kept]:
                del beside[name]
        for name, tensors in groups.items():
            if name in kept:
                continue
            if gate := _inside(tensors, "gates"):
                layer.add_gate(name)
                layer.gates[name].load_state_dict(gate)
            if scale := _inside(tensors, "scales"):
                layer.add_scale(name)
                layer.scales[name].weight = as_parameter(scale["weight"])
            for owners in (layer.groups, layer.scales):
                if name in frozen and name in owners:
                    owners[name].requires_grad_(False)
        apply_notes(layer, config, token_map.projection)
        return
    for module in dict.fromkeys(part.tensor.rpartition(".")[0] for part in token_map.parts):
        linear: Any = block.get_submodule(module)
        before, linear.groups = linear.groups, nn.ModuleDict()
        for name, tensors in groups.items():
            if name in kept:
                linear.groups[name] = before[name]
            else:
                linear.set_group(name, tensors[f"{module}.weight"], tensors.get(f"{module}.bias"), weights[name])
                if name in frozen:
                    linear.groups[name].requires_grad_(False)


def _inside(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return what of a token group's tensors a Pattention keeps in "groups", "gates" or "scales", by names there."""
    return {part.partition(f".{kind}.{{group}}.")[2]: t for part, t in tensors.items() if f".{kind}." in part}


def _token_group(layer: Pattention, by_leaf: dict[str, Tensor], weights: str) -> TokenGroup:
    with torch.device("meta"):
        group = TokenGroup(
            layer.in_features,
            layer.out_features,
            by_leaf["values.weight"].shape[1],
            bias="keys.bias" in by_leaf,
            weights=weights,
            **layer.stds,
        )
    for name, tensor in by_leaf.items():
        module, _, leaf = name.partition(".")
        owner = group.get_submodule(module)
        setattr(owner, leaf, tensor if leaf in owner._buffers else as_parameter(tensor))
    return group.train(layer.training)


def _trains(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def _silent_copy(block: nn.Module, is_last: Callable[[str], bool]) -> nn.Module:
    # A gate of whole sequences is the model's, so that the copy follows the same one.
    shared = {id(gate): gate for m in block.modules() if isinstance(m, Follower) for gate in m.follows}
    new = copy.deepcopy(block, shared).requires_grad_()
    for name, parameter in new.named_parameters():
        parameter.grad = None
        if is_last(_BESIDE_MLP.sub(".", name)):
            parameter.zero_()
    return new
