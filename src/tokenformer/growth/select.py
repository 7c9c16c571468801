"""Keep the parameter tokens that matter: `prune`, and `slice`, which sorts them so that any prefix is a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import GrowthError
from .architectures import Groups, TokenMap, architecture_of, count_of, places, token_groups, with_groups
from .importance import kept, measure, ranked, share_of
from .operations import Operation, apply

# For the (block, map)s that have any, and every token group, the parameter tokens to keep, in their new order.
Indices = Mapping[tuple[int, str], Mapping[str, Tensor]]


def prune(model: Any, blocks: Any, *, keep: float, scope: str = "layer") -> None:
    """Keep the most important share of the parameter tokens, in place; measure the loss afterwards.

    Args:
        model: TokenFormer or ordinary transformer.
        blocks: text to judge by, as `data.pack` gives it.
        keep: share of the tokens to keep, above 0, at most 1.
        scope: "layer": that share of every group in every map; "global": that share of all tokens of a projection,
            wherever they are.

    Raises:
        GrowthError: nothing would be left, an unknown scope, or an architecture with one count for all blocks where
            the scope is global. The model is then untouched.
    """
    apply(model, prune_operation(model, blocks, keep=keep, scope=scope))


def prune_operation(model: Any, blocks: Any, *, keep: float, scope: str = "layer") -> Operation:
    """Return what `prune` does to this model, judged by `blocks`."""
    check_share(keep)
    if scope not in ("layer", "global"):
        raise GrowthError(f"scope is {scope!r}; it must be layer or global")
    indices = kept(measure(model, blocks), keep, scope=scope)
    return select_operation(model.config, indices, "prune", {"keep": keep, "scope": scope})


def slice(model: Any, blocks: Any) -> None:
    """Sort the parameter tokens of every group by importance, in place: the same function to rounding.

    Then any prefix is a smaller model: `take(model, keep)`, or `--keep` when loading.

    Args:
        model: TokenFormer or ordinary transformer.
        blocks: text to judge by, as `data.pack` gives it.
    """
    apply(model, slice_operation(model, blocks))


def slice_operation(model: Any, blocks: Any) -> Operation:
    """Return what `slice` does to this model, judged by `blocks`."""
    return select_operation(model.config, ranked(measure(model, blocks)), "slice", {})


def take(model: Any, keep: float) -> None:
    """Keep the first share of the parameter tokens of every group, in place: a size of a sliced model.

    Raises:
        GrowthError: `keep` is not above 0 and at most 1.
    """
    check_share(keep)
    indices: dict[tuple[int, str], dict[str, Tensor]] = {}
    for block, token_map in places(model.config):
        counts = {g["name"]: count_of(g, token_map.projection, block) for g in token_groups(model.config)}
        indices[block, token_map.name] = {g: torch.arange(share_of(keep, n)) for g, n in counts.items() if n}
    apply(model, select_operation(model.config, indices, "take", {"keep": keep}))


def select_operation(config: Any, indices: Indices, name: str, arguments: dict[str, Any]) -> Operation:
    """Return the operation that keeps these parameter tokens in this order."""
    row = architecture_of(config)
    depth = getattr(config, row.depth)
    groups = token_groups(config)
    for group in groups:
        for projection in row.counts:
            token_map = next(m for m in row.maps if m.projection == projection)
            counts = [len(indices.get((i, token_map.name), {}).get(group["name"], ())) for i in range(depth)]
            group[projection] = counts[0] if len(set(counts)) == 1 else counts

    def change(block: int, token_map: TokenMap, old: Groups) -> Groups:
        axes = {part.tensor: part.axis for part in token_map.parts}
        chosen = indices.get((block, token_map.name), {})
        return {
            group: {
                part: tensor if axes[part] is None else _take(tensor, axes[part], chosen[group])
                for part, tensor in tensors.items()
            }
            for group, tensors in old.items()
            if len(chosen.get(group, ()))
        }

    return Operation(name, with_groups(config, groups), change, range(depth), arguments=arguments)


def check_share(keep: float) -> None:
    """Raise GrowthError unless `keep` is a share above 0 and at most 1."""
    if not 0 < keep <= 1:
        raise GrowthError(f"keep is {keep}; it is the share of parameter tokens to keep, above 0 and at most 1")


def _take(tensor: Tensor, axis: int | None, index: Tensor) -> Tensor:
    assert axis is not None
    return tensor.index_select(axis, index.to(tensor.device))
