"""Neurons beside an ordinary transformer's MLP, where a gate can keep them out: a site as those beside linear maps.

A group of neurons there is an MLP of the same kind, of its neurons alone, whose output a forward hook adds: mlp(x) +
neurons(x). The MLP itself is then the parent's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fused import add_up
from ..models.pattention import Pattention
from .neurons import as_parameter
from .sites import CHILD, place_tokens, sizes_of


class Neurons(Pattention):
    """Groups of neurons beside an MLP `[*, D]` to `[*, E]`: gated as parameter tokens are, and not normalised."""

    def _tokens_output(
        self, x: Tensor, groups: Mapping[str, Any], closed: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Add up what the neurons of these groups give; `closed`, a mask `[*, 1]` by name, as in Pattention."""
        if not groups:
            return super()._tokens_output(x, groups, closed)
        shut = closed or {}
        outputs = {name: group(x) for name, group in groups.items()}
        return add_up(y.masked_fill(shut[name], 0.0) if name in shut else y for name, y in outputs.items())


def add_neurons(mlp: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> Neurons:
    """Put a group of neurons beside an MLP, and return all that are there.

    Args:
        mlp: of an ordinary transformer.
        name: of the group, which is new there.
        tensors: weights and biases by names in the MLP, the values `[E, n]` last; a parameter stays the object it is.
    """
    weights = [tensor for leaf, tensor in tensors.items() if leaf.endswith(".weight")]
    layer = mlp._modules.get(CHILD)
    if not isinstance(layer, Neurons):
        sizes = (weights[0].shape[1], weights[-1].shape[0])
        kind: dict[str, Any] = {"linear": False, "norm_activation_type": "gelu", "token_group_norm": "per_group"}
        layer = Neurons(*sizes, {}, **kind, device=weights[0].device, dtype=weights[0].dtype)
        place_tokens(mlp, layer.train(mlp.training))
    layer.groups[name] = _alike(mlp, tensors).train(mlp.training)
    return layer


def fits(mlp: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an MLP has the maps to which neurons belong, and these the neurons' width."""
    weights = {leaf.removesuffix(".weight"): t for leaf, t in tensors.items() if leaf.endswith(".weight")}
    found = {name: sizes_of(mlp._modules.get(name) or nn.Identity()) for name in weights}
    *keys, values = weights
    return all((sizes := found[key]) is not None and sizes[0] == weights[key].shape[1] for key in keys) and (
        (sizes := found[values]) is not None and sizes[1] == weights[values].shape[0]
    )


def _alike(mlp: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return an MLP that computes as this one does, with other weights; no bias is added where none is given."""
    new: nn.Module = object.__new__(type(mlp))
    nn.Module.__init__(new)  # so that it shares no hooks
    new.__dict__.update({key: value for key, value in vars(mlp).items() if key not in vars(new)})
    new._modules.update({key: module for key, module in mlp._modules.items() if key != CHILD})
    for leaf, weight in tensors.items():
        name, _, kind = leaf.rpartition(".")
        if kind != "weight":
            continue
        bias = tensors.get(f"{name}.bias")
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight = as_parameter(weight)
        if bias is not None:
            linear.bias = as_parameter(bias)
        new._modules[name] = linear
    return new
