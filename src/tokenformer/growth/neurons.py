"""The neurons of an ordinary transformer, kept by token group while it is in memory.

`group_neurons(model)` replaces the maps of its MLPs by `GroupedLinear`s: every token group has maps of its own, so that
old neurons compute what they did bit for bit and can be frozen, while the state dict stays that of the ordinary model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import GrowthError
from ..models.fused import why_not_plain
from ..models.ternary import PackedLinear, TernaryLinear, make_linear
from .architectures import architecture_of, places, token_groups, weights_of
from .sites import linear_maps, move_tokens


class GroupedLinear(nn.Module):
    """A linear map whose neurons are split among token groups; computes and saves what the whole map would.

    Args:
        linear: nn.Linear or transformers' Conv1D.
        counts: neurons of each group, in their order in `linear`.
        values: the neurons are its inputs (the groups' outputs are added) rather than its outputs (concatenated).
        weights: how the maps of each group are kept, one of `models.ternary.WEIGHTS`; default "float".
    """

    def __init__(
        self, linear: Any, counts: Mapping[str, int], *, values: bool, weights: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        refuse_unless_plain(linear, "tell the neurons of token groups apart")
        self.axis, self.transposed = int(values), isinstance(linear, Conv1D)
        self.bias = linear.bias if values else None
        self.groups = nn.ModuleDict()
        weight = linear.weight.t() if self.transposed else linear.weight
        biases = [None] * len(counts) if values or linear.bias is None else linear.bias.split(list(counts.values()))
        with torch.no_grad():
            for name, w, b in zip(counts, weight.split(list(counts.values()), self.axis), biases, strict=True):
                kept = (weights or {}).get(name, "float")
                self.set_group(name, w.contiguous().clone(), None if b is None else b.clone(), kept)
        self.requires_grad_(linear.weight.requires_grad)
        self.register_state_dict_post_hook(_join)
        self.register_load_state_dict_pre_hook(_split)

    @property
    def in_features(self) -> int:
        """D, or the neurons of all groups together."""
        sizes = [group.in_features for group in self._maps]
        return sizes[0] if self.axis == 0 else sum(sizes)

    @property
    def out_features(self) -> int:
        """Neurons of all groups together, or E."""
        sizes = [group.out_features for group in self._maps]
        return sum(sizes) if self.axis == 0 else sizes[0]

    @property
    def _maps(self) -> list[Any]:
        return list(self.groups.values())

    def set_group(self, name: str, weight: Tensor, bias: Tensor | None = None, weights: str = "float") -> None:
        """Append or replace a group: weight `[n, D]` and bias `[n]` of keys, weight `[E, n]` of values."""
        with torch.device("meta"):
            group = make_linear(weight.shape[1], weight.shape[0], bias=bias is not None, weights=weights)
        group.weight = as_parameter(weight)
        if bias is not None:
            group.bias = as_parameter(bias)
        self.groups[name] = group

    def forward(self, x: Tensor) -> Tensor:
        """Map `[*, D]` to `[*, n]` (keys), or `[*, n]` to `[*, E]` (values)."""
        maps = self._maps
        if self.axis == 0:
            return torch.cat([m(x) for m in maps], dim=-1) if len(maps) > 1 else maps[0](x)
        # Contiguous, and the bias as nn.Linear adds it: else the same numbers take other paths and round otherwise.
        first, *rest = (h.contiguous() for h in x.split([m.weight.shape[1] for m in maps], dim=-1))
        if type(maps[0]) is TernaryLinear:
            out = maps[0](first) if self.bias is None else maps[0](first) + self.bias
        else:
            out = F.linear(first, maps[0].weight, self.bias)
        for m, h in zip(maps[1:], rest, strict=True):
            out = out + m(h)
        return out


class UnfusedLinear(nn.Module):
    """A linear map whose outputs are those of several maps one after the other (Phi-3's gate and up), taken apart.

    Args:
        linear: the map.
        counts: neurons of each group, in their order in every one of the maps.
        names: of the maps, which become submodules.
        weights: as for `GroupedLinear`.
    """

    def __init__(
        self, linear: Any, counts: Mapping[str, int], names: Sequence[str], *, weights: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        refuse_unless_plain(linear, "tell the neurons of token groups apart")
        self.names = tuple(names)
        biases = [None] * len(names) if linear.bias is None else linear.bias.chunk(len(names))
        for name, weight, bias in zip(names, linear.weight.chunk(len(names)), biases, strict=True):
            with torch.device("meta"):
                piece = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            piece.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
            if bias is not None:
                piece.bias = nn.Parameter(bias)
            self.add_module(name, GroupedLinear(piece, counts, values=False, weights=weights))
        self.register_state_dict_post_hook(_fuse)
        self.register_load_state_dict_pre_hook(_unfuse)

    @property
    def in_features(self) -> int:
        """D."""
        return self._maps[0].in_features

    @property
    def out_features(self) -> int:
        """Neurons of all maps together."""
        return sum(grouped.out_features for grouped in self._maps)

    @property
    def _maps(self) -> list[GroupedLinear]:
        return [getattr(self, name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """Map `[*, D]` to `[*, maps · n]`."""
        return torch.cat([grouped(x) for grouped in self._maps], dim=-1)


def group_neurons(model: PreTrainedModel) -> None:
    """Keep the neurons of an ordinary transformer by token group, in place; a TokenFormer has its groups already.

    Outputs stay what they were: bit for bit where one group is all there is, else, and for Conv1D and fused maps, to
    rounding. Where the configuration says that weights are ternary, they are from then on.

    Raises:
        GrowthError: no row in the table, or maps that are not plain (LoRA, quantised), or ternary ones wanted of
            GPT-2's kind. The model is then untouched.
    """
    config = model.config
    row = architecture_of(config)
    if row.has_pattention:
        return
    if weights_of(config) == "ternary" and any(part.transposed for m in row.maps for part in m.parts):
        raise GrowthError(
            f"weights are ternary, but the linear maps of a {config.model_type!r} model are transformers' Conv1D, "
            "which has no ternary form here; take another architecture, or ternary token groups alone: grow(…, "
            'weights="ternary")'
        )
    groups = token_groups(config)
    weights = {group.name: group.weights for group in groups}
    blocks = row.blocks_of(model)
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for block, token_map in places(config):
        counts = {group.name: group.count(token_map.projection, block) for group in groups}
        parts = [part for part in token_map.parts if part.tensor.endswith(".weight")]
        for name in dict.fromkeys(part.stored.removesuffix(".weight") for part in parts):
            inside = [part for part in parts if part.stored == f"{name}.weight"]
            linear = blocks[block].get_submodule(name)
            if isinstance(linear, (GroupedLinear, UnfusedLinear)):
                continue
            if inside[0].fused:
                pieces = [part.tensor.removeprefix(f"{name}.").removesuffix(".weight") for part in inside]
                found.append((blocks[block], name, UnfusedLinear(linear, counts, pieces, weights=weights)))
            else:
                values = inside[0].axis == 1
                found.append((blocks[block], name, GroupedLinear(linear, counts, values=values, weights=weights)))
    for parent, name, grouped in found:
        move_tokens(parent.get_submodule(name), grouped)
        parent.set_submodule(name, grouped)
        if isinstance(grouped, UnfusedLinear):
            for activation in (m.activation for m in row.maps if m.activation):
                parent.get_submodule(activation).register_forward_pre_hook(_close_together)
    if weights_of(config) == "ternary":
        for linear in linear_maps(blocks).values():
            if type(linear) is nn.Linear:
                linear.__class__ = TernaryLinear  # so it stays the object that it is, with its hooks


def refuse_unless_plain(linear: nn.Module, doing: str) -> None:
    """Raise GrowthError, saying what could not be done, unless a linear map is its weights and nothing else."""
    reason = why_not_plain(linear, kinds=(nn.Linear, TernaryLinear, Conv1D, GroupedLinear))
    if isinstance(linear, PackedLinear):
        raise GrowthError(f"cannot {doing}: it is packed in 2 bits; work on the checkpoint from before it was packed")
    if reason is not None:
        raise GrowthError(
            f"cannot {doing}: {reason}; merge adapters first (merge_and_unload of peft), and work on the model before "
            "it is quantised or sharded"
        )


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """Return a parameter as it is, another tensor as a parameter that trains."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _join(module: GroupedLinear, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """State dict hook: write the whole map that the ordinary architecture knows."""
    for leaf in ("weight", "bias"):
        names = [f"{prefix}groups.{name}.{leaf}" for name in module.groups]
        tensors = [state.pop(name) for name in names if name in state]
        if tensors:
            whole = torch.cat(tensors, dim=module.axis)
            state[f"{prefix}{leaf}"] = whole.t().contiguous() if leaf == "weight" and module.transposed else whole


def _split(module: GroupedLinear, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Loading hook: take the whole map apart, unless its size shows that it is not this one."""
    for leaf in ("weight", "bias"):
        whole = state.get(f"{prefix}{leaf}")
        if whole is None or (leaf == "bias" and module.axis == 1):
            continue
        whole = whole.t() if leaf == "weight" and module.transposed else whole
        maps: dict[str, Any] = dict(module.groups.items())
        sizes = [m.weight.shape[module.axis] for m in maps.values()]
        if whole.shape[module.axis] != sum(sizes):
            continue
        del state[f"{prefix}{leaf}"]
        for name, piece in zip(maps, whole.split(sizes, dim=module.axis), strict=True):
            state[f"{prefix}groups.{name}.{leaf}"] = piece


def _close_together(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook of an activation that reads a piece of a wider tensor."""
    return tuple(argument.contiguous() for argument in arguments)


def _fuse(module: UnfusedLinear, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """State dict hook: write the one map that the ordinary architecture knows."""
    for leaf in ("weight", "bias"):
        names = [f"{prefix}{name}.{leaf}" for name in module.names]
        if names[0] in state:
            state[f"{prefix}{leaf}"] = torch.cat([state.pop(name) for name in names])


def _unfuse(module: UnfusedLinear, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Loading hook: take the one map apart; the maps inside refuse sizes that are not theirs."""
    for leaf in ("weight", "bias"):
        if f"{prefix}{leaf}" in state:
            pieces = state.pop(f"{prefix}{leaf}").chunk(len(module.names))
            state.update({f"{prefix}{name}.{leaf}": piece for name, piece in zip(module.names, pieces, strict=True)})
