"""How much text uses each parameter token, and which to keep when there must be fewer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batches import batches
from ..errors import GrowthError
from ..models.pattention import Pattention
from .architectures import architecture_of, places, token_groups
from .layout import TokenMap
from .neurons import GroupedLinear, group_neurons
from .operations import read_groups

Place = tuple[int, str]  # number of the block, name of the map in it
See = Callable[[int, TokenMap, dict[str, Tensor]], None]
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class GroupUse:
    """How text uses the n parameter tokens of one group in one map; every tensor is `[n]`, float32, on the CPU.

    Attributes:
        weight_std: standard deviation, over text tokens, of the weight that multiplies the value.
        active: share of text tokens where the weight's square is above the mean square of all parameter tokens of the
            map: where the token does more than its equal share. Without units, so it means the same under every
            normalisation and activation. "Not zero" would call all active, for a GELU that is shut gives a small
            negative number, and a fixed threshold would depend on the scale. Tokens that do nothing lower the mean.
        value_norm: L2 norm of the value.
        key_norm: L2 norm of the key; of both keys together where the MLP is gated.
    """

    weight_std: Tensor
    active: Tensor
    value_norm: Tensor
    key_norm: Tensor

    @property
    def importance(self) -> Tensor:
        """`[n]`: spread of what the parameter token adds to the map's output.

        Not the mean length, which prunes worse (docs/lab-notebook.md): what never changes says nothing of the text.
        """
        return self.weight_std * self.value_norm


@dataclass(frozen=True)
class Importance:
    """What `measure` found.

    Attributes:
        uses: of every map and token group.
        projections: of every map's name: "qkv", "output" or "ffn".
        linear: projections with a linear map beside their parameter tokens.
        text_tokens: number of text tokens measured on.
    """

    uses: dict[Place, dict[str, GroupUse]]
    projections: dict[str, str]
    linear: frozenset[str]
    text_tokens: int


@contextmanager
def watched_weights(model: PreTrainedModel, see: See) -> Iterator[None]:
    """Within the context, call `see(block, map, {group: weights [*, n]})` whenever a map of parameter tokens has run.

    The tensors are those that the values are multiplied with, so gradients of what follows reach them. Where a routed
    group is closed for a text token its weights are zero. The neurons of an ordinary model are kept by token group
    from then on, as `group_neurons` does.

    Raises:
        GrowthError: no row in the table of architectures, an ordinary model's maps are not plain, or token groups that
            are packed.
    """
    packed = [group.name for group in token_groups(model.config) if group.weights == "packed"]
    if packed:
        raise GrowthError(
            f"token group {', '.join(packed)} is packed in 2 bits, so that its parameter tokens cannot be looked into; "
            "take the checkpoint that it was packed from"
        )
    group_neurons(model)
    blocks = architecture_of(model.config).blocks_of(model)
    with ExitStack() as undo:
        for block, token_map in places(model.config):
            layer: Any = blocks[block].get_submodule(token_map.name)
            watch = _watch_pattention if isinstance(layer, Pattention) else _watch_neurons
            watch(layer, partial(see, block, token_map), undo)
        yield


@torch.no_grad()
def measure(
    model: PreTrainedModel, blocks: Any, *, batch_size: int = 8, on_batch: Callable[[int, int], None] | None = None
) -> Importance:
    """Measure how text uses each parameter token.

    Args:
        model: a TokenFormer, or an ordinary transformer with a row in the table of architectures, whose neurons are
            kept by token group from then on.
        blocks: text blocks `{"input_ids": [T]}` as `data.blocks.text_blocks` makes them.
        batch_size: text blocks per forward pass; memory grows with it, not with the length of the text.
        on_batch: called with the text blocks done and the text blocks there are.

    Raises:
        GrowthError: no row in the table, no text, or weights that are not finite.
    """
    sums: dict[Place, dict[str, Tensor]] = {}
    counts: Counter[tuple[Place, str]] = Counter()  # of rows: a looped block reads each text token several times
    device = next(model.parameters()).device

    def see(block: int, token_map: TokenMap, weights: dict[str, Tensor]) -> None:
        rows = {group: w.reshape(-1, w.shape[-1]).float() for group, w in weights.items()}
        share = torch.cat(list(rows.values()), dim=-1).square().mean(dim=-1, keepdim=True)
        of_map = sums.setdefault((block, token_map.name), {})
        for group, w in rows.items():
            new = torch.stack([w.sum(0), w.square().sum(0), (w.square() > share).float().sum(0)]).cpu().double()
            of_map[group] = of_map[group] + new if group in of_map else new
            counts[(block, token_map.name), group] += len(w)

    was_training, count, done = model.training, 0, 0
    model.eval()
    try:
        with watched_weights(model, see):
            for ids in batches(blocks, batch_size):
                model.base_model(input_ids=ids.to(device), use_cache=False)
                count += ids.numel()
                done += len(ids)
                if on_batch is not None:
                    on_batch(done, len(blocks))
    finally:
        model.train(was_training)
    if not count:
        raise GrowthError("there is no text to measure the importance of parameter tokens on; give at least one block")
    return Importance(
        uses=_uses(model, sums, counts),
        projections={token_map.name: token_map.projection for token_map in architecture_of(model.config).maps},
        linear=frozenset(getattr(model.config, "linear_projections", None) or ()),
        text_tokens=count,
    )


def ranked(importance: Importance) -> dict[Place, dict[str, Tensor]]:
    """Return for every map and token group the indices `[n]` of its parameter tokens, the most important first."""
    return {
        place: {group: use.importance.argsort(descending=True, stable=True) for group, use in uses.items()}
        for place, uses in importance.uses.items()
    }


def kept(importance: Importance, keep: float, *, scope: str = "layer") -> dict[Place, dict[str, Tensor]]:
    """Choose the most important parameter tokens, as many in every map of one projection and block.

    Args:
        importance: as `measure` gives it.
        keep: the share to keep, above 0 and at most 1; counts are rounded up.
        scope: "layer" keeps this share of every group of every map. "global" keeps it of each projection over all
            blocks and groups, wherever importance is greatest, and at least one token in a block without a linear map.
            Importance is compared as multiples of the map's mean: how large a map's outputs are says little of how
            much they matter, because norms and residual streams of different lengths follow. So maps whose importance
            is spread evenly keep most. Maps of one projection are judged by their mean at equal rank.

    Returns:
        For every map and token group the indices to keep, ascending; possibly none with "global".

    Raises:
        GrowthError: `keep` or `scope` is out of range.
    """
    check_kept(keep, scope)
    counts = {
        (block, group, importance.projections[name]): share_of(keep, len(use.importance))
        for (block, name), uses in importance.uses.items()
        for group, use in uses.items()
    }
    if scope == "global":
        counts = {}
        for projection in dict.fromkeys(importance.projections.values()):
            for (block, group), count in _global_counts(importance, keep, projection).items():
                counts[block, group, projection] = count
    return {
        (block, name): {
            group: order[: counts[block, group, importance.projections[name]]].sort().values
            for group, order in orders.items()
        }
        for (block, name), orders in ranked(importance).items()
    }


def check_kept(keep: float, scope: str = "layer") -> None:
    """Raise GrowthError unless `keep` is a share above 0 and at most 1, and `scope` is one of `SCOPES`."""
    if not 0 < keep <= 1:
        raise GrowthError(f"keep is {keep}; it is the share of parameter tokens to keep, above 0 and at most 1")
    if scope not in SCOPES:
        raise GrowthError(f"scope is {scope!r}; it must be {' or '.join(SCOPES)}")


def share_of(keep: float, count: int) -> int:
    """Return how many of `count` are the share `keep`, rounded up, but not for a rounding error of the product."""
    return min(count, max(1, math.ceil(keep * count - 1e-9)))


def _global_counts(importance: Importance, keep: float, projection: str) -> dict[tuple[int, str], int]:
    # For each block and group, importance from the greatest down, the mean of the projection's maps at each rank.
    curves: dict[tuple[int, str], Tensor] = {}
    for (block, name), uses in importance.uses.items():
        if importance.projections[name] != projection:
            continue
        mean = torch.cat([use.importance for use in uses.values()]).double().mean()
        for group, use in uses.items():
            curve = use.importance.double().sort(descending=True).values / (mean if mean > 0 else 1.0)
            curves[block, group] = curves[block, group] + curve if (block, group) in curves else curve
    if not curves:
        return {}
    forced = 0
    if projection not in importance.linear:
        for block in dict.fromkeys(block for block, _ in curves):
            best = max((at for at in curves if at[0] == block), key=lambda at: curves[at][0].item())
            curves[best] = curves[best].clone().index_fill(0, torch.tensor(0), math.inf)
            forced += 1
    pooled = torch.cat(list(curves.values()))
    # Stable, and every curve falls: what is chosen of a curve is its beginning.
    chosen = pooled.argsort(descending=True, stable=True)[: max(forced, share_of(keep, len(pooled)))]
    owner = torch.repeat_interleave(torch.tensor([len(curve) for curve in curves.values()]))
    counts = owner[chosen].bincount(minlength=len(curves))
    return dict(zip(curves, counts.tolist(), strict=True))


def _uses(
    model: PreTrainedModel, sums: dict[Place, dict[str, Tensor]], counts: Mapping[tuple[Place, str], int]
) -> dict[Place, dict[str, GroupUse]]:
    blocks = architecture_of(model.config).blocks_of(model)
    uses: dict[Place, dict[str, GroupUse]] = {}
    for block, token_map in places(model.config):
        tensors = read_groups(blocks[block], token_map)
        for group, (weight, square, active) in sums.get((block, token_map.name), {}).items():
            squares = [
                sum(
                    tensors[group][part.tensor].detach().float().square().sum(1 - axis)
                    for part in token_map.parts
                    if part.axis == axis and part.tensor.endswith(".weight")
                )
                for axis in (0, 1)
            ]
            key_norm, value_norm = (torch.as_tensor(s).sqrt().cpu() for s in squares)
            count = counts[(block, token_map.name), group]
            std = (square / count - (weight / count).square()).clamp_min(0).sqrt()
            use = GroupUse(std.float(), (active / count).float(), value_norm, key_norm)
            if not (use.importance.isfinite().all() and key_norm.isfinite().all()):
                raise GrowthError(
                    f"block {block}, {token_map.name}, token group {group}: weights or activations are not finite; "
                    "this model is damaged or has diverged"
                )
            uses.setdefault((block, token_map.name), {})[group] = use
    return uses


def _watch_pattention(layer: Any, see: Callable[[dict[str, Tensor]], None], undo: ExitStack) -> None:
    weights: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        weights[name] = args[0]

    def done(*_: Any) -> None:
        if weights:  # nothing where none takes part in a loop
            see(dict(weights))
        weights.clear()

    # A hook on its maps makes a Pattention call them.
    for name, group in layer.groups.items():
        undo.callback(group.values.register_forward_pre_hook(partial(keep, name)).remove)
    if layer.groups:
        undo.callback(layer.register_forward_hook(done).remove)
    if layer.gates:
        # Not sorted by gates, so that weights have the order of the text.
        layer._routed_output = layer._masked_output
        undo.callback(delattr, layer, "_routed_output")


def _watch_neurons(layer: GroupedLinear, see: Callable[[dict[str, Tensor]], None], undo: ExitStack) -> None:
    maps: dict[str, Any] = dict(layer.groups.items())
    sizes = [m.weight.shape[1] for m in maps.values()]

    def split(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        weights = args[0].split(sizes, dim=-1)
        see({name: w for name, w, n in zip(maps, weights, sizes, strict=True) if n})
        return torch.cat(weights, dim=-1)  # so that what follows depends on the parts

    undo.callback(layer.register_forward_pre_hook(split).remove)
