"""Give up what ternary maps learn with, and keep what they compute with: `pack(model)` = `tokenformer pack`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import GrowthError
from ..models.ternary import PackedLinear, TernaryLinear, ternary
from .architectures import architecture_of, token_groups, weights_of, with_groups
from .neurons import group_neurons


@torch.no_grad()
def pack(model: PreTrainedModel) -> None:
    """Keep 2 bits for each ternary weight, in place; the outputs stay the same to the bit.

    What is packed does not train, nor do its parameter tokens move; groups can be grown beside it, and dropped. An
    ordinary transformer must stay one, so its ternary weights become floating-point numbers that are {-1, 0, 1} · their
    scale, beside inputs that are no longer rounded: what other tools load, and llama.cpp keeps in 2 bits (TQ2_0).

    Args:
        model: TokenFormer or ordinary transformer.

    Raises:
        GrowthError: nothing in it is ternary. The model is then untouched.
    """
    config, row = model.config, architecture_of(model.config)
    groups = token_groups(config)
    kinds = dict.fromkeys([weights_of(config), *(group.weights for group in groups)])
    if "ternary" not in kinds:
        raise GrowthError(
            f"nothing of this model is ternary: its maps are {', '.join(kinds)}. Train one by `weights: ternary` in "
            'the recipe\'s model, or grow ternary token groups: grow(…, weights="ternary")'
        )
    group_neurons(model)
    blocks = row.blocks_of(model)
    for name, module in list(blocks.named_modules()):
        if isinstance(module, TernaryLinear):
            blocks.set_submodule(name, PackedLinear.of(module) if row.has_pattention else _settled(module))
    became = "packed" if row.has_pattention else "float"
    changed = {"ternary": became}
    packed = [replace(group, weights=changed.get(group.weights, group.weights)) for group in groups]
    new = with_groups(config, packed, weights=changed.get(weights_of(config), weights_of(config)))
    config.__dict__.update(new.__dict__)


def _settled(linear: nn.Linear) -> nn.Linear:
    linear.weight.copy_(ternary(linear.weight))
    linear.__class__ = nn.Linear
    return linear
