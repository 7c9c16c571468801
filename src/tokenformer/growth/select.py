"""Keep the parameter tokens that matter: `prune`; `sort`, which makes any prefix a model; `shrink`, which takes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import GrowthError
from .architectures import Count, Groups, architecture_of, places, token_groups, with_groups
from .importance import check_kept, kept, measure, ranked, share_of
from .layout import TokenMap, is_scale
from .operations import Operation, apply

# For the (block, map)s that have any, and every token group, the parameter tokens to keep, in their new order.
Indices = Mapping[tuple[int, str], Mapping[str, Tensor]]


def prune(model: PreTrainedModel, blocks: Any, *, keep: float, scope: str = "layer") -> None:
    """Keep the most important share of the parameter tokens, in place; measure the loss afterwards.

    Args:
        model: TokenFormer or ordinary transformer.
        blocks: text blocks to judge by, as `text_blocks` gives them.
        keep: share of the tokens to keep, above 0, at most 1.
        scope: "layer": that share of every group in every map; "global": that share of all tokens of a projection,
            wherever they are.

    Raises:
        GrowthError: nothing would be left, an unknown scope, or an architecture with one count for all blocks where
            the scope is global. The model is then untouched.
    """
    apply(model, prune_operation(model, blocks, keep=keep, scope=scope))


def prune_operation(model: PreTrainedModel, blocks: Any, *, keep: float, scope: str = "layer") -> Operation:
    """Return what `prune` does to this model, judged by `blocks`."""
    check_kept(keep, scope)  # before the model runs
    check_scales(model.config, "prune")
    indices = kept(measure(model, blocks), keep, scope=scope)
    return select_operation(model.config, indices, "prune", {"keep": keep, "scope": scope})


def sort(model: PreTrainedModel, blocks: Any) -> None:
    """Sort the parameter tokens of every group by importance, in place: the same function to rounding.

    Then any prefix is a smaller model: `shrink(model, keep)`, or `--keep` when loading.

    Args:
        model: TokenFormer or ordinary transformer.
        blocks: text blocks to judge by, as `text_blocks` gives them.
    """
    apply(model, sort_operation(model, blocks))


def sort_operation(model: PreTrainedModel, blocks: Any) -> Operation:
    """Return what `sort` does to this model, judged by `blocks`."""
    check_scales(model.config, "sort")
    operation = select_operation(model.config, ranked(measure(model, blocks)), "sort", {})
    return replace(operation, keeps_outputs=True)


def shrink(model: PreTrainedModel, keep: float) -> None:
    """Keep the first share of the parameter tokens of every group, in place: a size of a model that `sort` has sorted.

    Raises:
        GrowthError: `keep` is not above 0 and at most 1.
    """
    apply(model, shrink_operation(model.config, keep))


def shrink_operation(config: PreTrainedConfig, keep: float) -> Operation:
    """Return what `shrink` does."""
    check_kept(keep)
    indices: dict[tuple[int, str], dict[str, Tensor]] = {}
    for block, token_map in places(config):
        counts = {group.name: group.count(token_map.projection, block) for group in token_groups(config)}
        indices[block, token_map.name] = {name: torch.arange(share_of(keep, n)) for name, n in counts.items() if n}
    return select_operation(config, indices, "shrink", {"keep": keep})


def select_operation(config: PreTrainedConfig, indices: Indices, name: str, arguments: dict[str, Any]) -> Operation:
    """Return the operation that keeps these parameter tokens in this order."""
    check_scales(config, name)
    row = architecture_of(config)
    depth = row.depth_of(config)
    # Every map of a projection keeps as many.
    first = {token_map.projection: token_map.name for token_map in reversed(row.maps)}

    def counts(group: str) -> dict[str, Count]:
        return {p: tuple(len(indices.get((i, first[p]), {}).get(group, ())) for i in range(depth)) for p in row.counts}

    groups = [replace(group, counts=counts(group.name)) for group in token_groups(config)]

    def change(block: int, token_map: TokenMap, old: Groups) -> Groups:
        axes = {part.tensor: part.axis for part in token_map.parts}
        chosen = indices.get((block, token_map.name), {})
        new: Groups = {}
        for group, tensors in old.items():
            index = chosen.get(group, ())
            for part, tensor in tensors.items():
                if len(index) or is_scale(part):  # which a loop needs without tokens, too
                    whole = axes[part] is None
                    new.setdefault(group, {})[part] = tensor if whole else _take(tensor, axes[part], index)
        return new

    return Operation(name, with_groups(config, groups), change, range(depth), arguments=arguments)


def check_scales(config: PreTrainedConfig, doing: str) -> None:
    """Raise GrowthError, saying what could not be done, where a token group is ternary."""
    scaled = [group.name for group in token_groups(config) if group.weights != "float"]
    if scaled:
        raise GrowthError(
            f"cannot {doing}: token group {', '.join(scaled)} is ternary, and its scale is the mean over all its "
            "parameter tokens, so that what is left would compute something else. Drop whole groups instead"
        )


def _take(tensor: Tensor, axis: int | None, index: Any) -> Tensor:
    assert axis is not None
    return tensor.index_select(axis, index.to(tensor.device))
