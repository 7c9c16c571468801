"""Make a model bigger without changing what it computes: `grow(model, …)` = `tokenformer grow`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import GrowthError
from ..models.names import PROJECTIONS
from ..models.token_group import default_tau, draw_tokens, zero_of_new_group
from .architectures import (
    GroupEntry,
    Groups,
    architecture_of,
    check_new,
    group_names,
    token_groups,
    weights_of,
    with_groups,
)
from .beside import all_group_names, check_new_beside, fresh_name, grow_beside, names_beside
from .layout import TokenMap
from .neurons import refuse_unless_plain
from .operations import Operation, apply, unchanged
from .sites import check_whole

Amount = int | str


def grow(
    model: nn.Module,
    *,
    at: str | Mapping[str, int | None] | None = None,
    tokens: int | None = None,
    preset: str | None = None,
    qkv_param_tokens: Amount | None = None,
    output_param_tokens: Amount | None = None,
    ffn_param_tokens: Amount | None = None,
    num_hidden_layers: Amount | None = None,
    num_loops: Amount | None = None,
    name: str | None = None,
    norm: str | None = None,
    weights: str | None = None,
    seed: int | None = None,
) -> None:
    """Grow `model` in place to the totals given; logits stay bit for bit the same in every dtype.

    New parameter tokens form one token group. Beside tokens that share their norm its keys are zero and its values
    random; elsewhere (beside a linear map alone, norms per group, the neurons of an ordinary transformer) its keys are
    random and its values zero. New blocks are copies of the block below, spread evenly, whose last maps are zero; they
    belong to the new group. New loops run all blocks of a TokenFormer once more; what a block adds there is multiplied
    with vectors of the new group, which are zero, and its parameter tokens take part in these loops alone. Trained
    parameters stay the same objects; τ does not move. An ordinary transformer's neurons are first told apart by
    `group_neurons`, which for GPT-2 and Phi-3 is exact to rounding.

    With `at`, any PyTorch model gets parameter tokens beside its linear maps: y = L(x) + tokens(x). Their keys are
    random, their values zero, and they have a norm of their own. The maps stay the objects that they are, whatever they
    are: plain, quantised, wrapped by LoRA.

    Args:
        model: TokenFormer, or an ordinary transformer of an architecture in `growth.architectures`; with `at` any
            `nn.Module`.
        at: which linear maps get tokens beside them: a regular expression that matches their whole name, or the end of
            it after a dot, as in "q_proj|v_proj"; "all-linear": all but the output head; or several of these with the
            number of tokens that each map gets.
        tokens: that each of these maps gets.
        preset: take the three counts and the depth from this preset, which must have the model's width and heads.
        qkv_param_tokens, output_param_tokens, ffn_param_tokens: parameter tokens to reach in each projection, all
            groups together: a total, or what to add as "+256" or "+50%". Default: as they are. An ordinary
            transformer's are its MLP's neurons, `ffn_param_tokens`.
        num_hidden_layers: blocks to reach, in the same notations.
        num_loops: times to reach that the blocks run, likewise.
        name: of the new group; default "grown1", "grown2", ….
        norm: "joint" or "per_group": one norm over all token groups or one each, where the model has one group and both
            compute the same.
        weights: how the new group's keys and values are kept: "float", or "ternary": {-1, 0, 1} · one scale for the
            keys and one for the values of each map, beside 8-bit inputs. Default: as the model's linear maps are.
        seed: of the new random values; the same on disk and in memory. Default: drawn from torch's.

    Raises:
        GrowthError: `at` matches no linear map (the nearest names are shown) or something that is none, or a map that
            is tied, compiled, sharded or on the meta device; a total below the current one, nothing to grow, an unknown
            preset or one of another width, a name already taken or impossible, a jointly normalised `softmax` where
            tokens exist, an architecture without a row in the table, or maps that are quantised or adapted where they
            would have to change. The model is then untouched.
    """
    drawn = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
    sizes: dict[str, Any] = {
        "preset": preset,
        "qkv_param_tokens": qkv_param_tokens,
        "output_param_tokens": output_param_tokens,
        "ffn_param_tokens": ffn_param_tokens,
        "num_hidden_layers": num_hidden_layers,
        "num_loops": num_loops,
        "norm": norm,
        "weights": weights,
    }
    if at is not None:
        if weights is not None:
            raise GrowthError(f"weights is {weights!r}, but tokens beside linear maps are float; leave it out")
        more = [field for field, amount in sizes.items() if amount is not None]
        if more:
            raise GrowthError(f"at puts tokens beside linear maps; grow {', '.join(more)} in a call of its own")
        check_whole(model)
        grow_beside(model, at, tokens, name=name, seed=drawn)
        return
    if tokens is not None:
        raise GrowthError(f'tokens={tokens} goes with at, which says beside which linear maps: at="q_proj|v_proj"')
    if not isinstance(model, PreTrainedModel):
        raise GrowthError(
            f"a {type(model).__name__} is no model of transformers, so that where it keeps neurons is not known; put "
            'tokens beside its linear maps instead: grow(model, at="all-linear", tokens=64)'
        )
    if names_beside(model):
        name = fresh_name(all_group_names(model)) if name is None else name
        check_new_beside(model, name)
    like = next(model.parameters())
    operation = grow_operation(model.config, **sizes, name=name, seed=drawn, dtype=like.dtype, device=like.device)
    if operation.silent:
        _check_last_maps(model)
    apply(model, operation)


def grow_operation(
    config: PreTrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    preset: str | None = None,
    num_hidden_layers: Amount | None = None,
    num_loops: Amount | None = None,
    name: str | None = None,
    norm: str | None = None,
    weights: str | None = None,
    **param_tokens: Amount | None,
) -> Operation:
    """Return what `grow` does; every new tensor is drawn from `seed` and its own place alone.

    Args:
        config: of the model.
        seed: of the random values.
        dtype, device: of the new tensors.
        preset, num_hidden_layers, num_loops, name, norm, weights, param_tokens: as for `grow`.

    Raises:
        GrowthError: as `grow`.
    """
    row = architecture_of(config)
    fields = {**{f"{p}_param_tokens": field for p, field in row.counts.items()}, "num_hidden_layers": row.depth}
    if row.has_pattention:
        fields["num_loops"] = "num_loops"
    elif num_loops is not None:
        raise GrowthError(
            f"num_loops is {num_loops}, but the code of a {config.model_type!r} model runs each block once; only a "
            "TokenFormer can be looped. Add blocks instead, with num_hidden_layers"
        )
    asked = {**param_tokens, "num_hidden_layers": num_hidden_layers, "num_loops": num_loops}
    if preset is not None:
        given = {field: amount for field, amount in asked.items() if amount is not None}
        asked = {**_preset_totals(config, preset), **given}
    foreign = [field for field, amount in asked.items() if amount is not None and field not in fields]
    if foreign:
        raise GrowthError(
            f"a {config.model_type!r} model has no parameter tokens of the kind {', '.join(foreign)}: its are the "
            f"neurons of its MLP, {', '.join(fields)}"
        )
    if not row.depth_of(config):
        raise GrowthError("a model without blocks has nothing to grow from")
    groups = token_groups(config)
    blocks = range(row.depth_of(config))
    current = {
        f"{p}_param_tokens": max(sum(group.count(p, block) for group in groups) for block in blocks) for p in row.counts
    }
    current["num_hidden_layers"] = len(blocks)
    if "num_loops" in fields:
        current["num_loops"] = config.num_loops
    target = {field: resolve_amount(asked.get(field), current[field], what=field) for field in fields}
    added = {p: target[f"{p}_param_tokens"] - current[f"{p}_param_tokens"] for p in row.counts}
    if target == current:
        raise GrowthError(f"nothing to grow: the model already has {_describe(current)}; ask for more than that")
    chosen = _group_norm(config, groups, norm)
    loops = tuple(range(current.get("num_loops", 1), target.get("num_loops", 1)))
    for projection, count in added.items():
        # In silent loops alone, new parameter tokens change nothing, whatever they are.
        if not count or loops or not current[f"{projection}_param_tokens"] or chosen != "joint":
            continue
        if _kind(config) == "softmax":
            raise GrowthError(
                f"cannot grow {projection}_param_tokens: this model normalises with softmax, where a new zero-score "
                "token has weight exp(0) = 1 and takes it from the old ones, so the outputs would change; only "
                "l2_norm_gelu and gelu_l2_norm models can gain tokens (depth can grow under softmax, too)"
            )
        if not all(_always(groups, projection, block) for block in blocks if _any(groups, projection, block)):
            raise GrowthError(
                f"cannot grow {projection}_param_tokens: {', '.join(g.name for g in groups if g.loops)} has some that "
                "take part in its loops alone, and beside none and beside these new ones cannot be exact at once; put "
                "the new ones into loops of their own with num_loops, or drop it first"
            )
    depth, total = current["num_hidden_layers"], target["num_hidden_layers"]
    reason = row.why_not_deeper(config) if total > depth else None
    if reason is not None:
        raise GrowthError(f"cannot add blocks to this {config.model_type!r} model: {reason}")
    sources = [i for i in blocks for _ in range(1 + (i + 1) * (total - depth) // depth - i * (total - depth) // depth)]
    silent = [i for i, source in enumerate(sources) if i and sources[i - 1] == source]
    if silent and "packed" in (weights_of(config), *(group.weights for group in groups)):
        raise GrowthError(
            "cannot add blocks: they begin with last maps of zero, and this model's are packed in 2 bits; grow the "
            "checkpoint from before it was packed"
        )
    new = _group_name(config, name)
    kept = _weights(config, weights)
    more: dict[str, Any] = {"token_group_norm": chosen} if chosen is not None else {}
    if loops:
        more["num_loops"] = target["num_loops"]
    for projection, count in added.items():
        if count and not current[f"{projection}_param_tokens"]:
            more[f"{projection}_tau"] = default_tau(count, config.norm_activation_type)
    entry = GroupEntry(new, {**added}, weights=kept, loops=loops)
    grown = with_groups(config, [*groups, entry], blocks=sources if silent else None, **more)
    if silent:
        grown.token_groups[-1]["blocks"] = silent

    def change(block: int, token_map: TokenMap, old: Groups) -> Groups:
        count = added[token_map.projection]
        tokens: dict[str, Tensor] = {}
        if loops and token_map.name in row.last:
            scale = torch.zeros(config.hidden_size, device=device, dtype=dtype)
            tokens = {f"{token_map.name}.scales.{{group}}.weight": scale}
        if not count:
            return {**old, new: tokens} if tokens else old
        place = f"{seed} {block} {token_map.name} {new}"
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest())
        )
        if row.has_pattention:
            beside = _always(groups, token_map.projection, sources[block])
            zero = zero_of_new_group(beside, chosen or "joint")
            tokens |= _new_tokens(grown, token_map, count, zero, generator, device, dtype)
        else:
            tokens = _new_neurons(token_map, count, next(iter(old.values())), generator)
        return {**old, new: tokens}

    wanted = {"preset": preset, **asked, "name": new, "norm": norm, "weights": weights}
    arguments = {field: amount for field, amount in wanted.items() if amount is not None}
    return Operation(
        "grow", grown, change, sources, moments=unchanged, silent=silent, keeps_outputs=True, arguments=arguments
    )


def resolve_amount(amount: Amount | None, current: int, *, what: str) -> int:
    """Turn a total, "+256" or "+50%" (rounded up) into a total; None keeps `current`.

    Raises:
        GrowthError: not an amount, or below `current`.
    """
    if amount is None:
        return current
    match = re.fullmatch(r"(\+?)(\d+(?:\.\d+)?)(%?)", str(amount).replace("_", "").strip())
    if match is None or (match[3] and not match[1]) or ("." in match[2] and not match[3]):
        raise GrowthError(f'{what} is {amount!r}; write a total (1024), an addition ("+256") or a percentage ("+50%")')
    number = float(match[2])
    if match[3]:
        total = current + math.ceil(current * number / 100 - 1e-9)
    else:
        total = int(number) + (current if match[1] else 0)
    if total < current:
        raise GrowthError(f"{what} asked {total}, found {current}: growing never takes away; ask for {current} or more")
    if match[1] and total == current:
        raise GrowthError(f"{what} asked {amount!r} on top of {current}, which adds nothing; give a total instead")
    return total


def _new_tokens(
    config: PreTrainedConfig,
    token_map: TokenMap,
    count: int,
    zero: Any,
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    keys, values = draw_tokens(
        config.hidden_size,
        config.hidden_size,
        count,
        zero=zero,
        std=config.value_std if zero == "keys" else config.initializer_range,
        generator=generator,
        device=device,
        dtype=dtype,
    )
    group = f"{token_map.name}.groups.{{group}}"
    biases = {f"{group}.keys.bias": keys.new_zeros(count)} if config.pattention_bias else {}
    return {f"{group}.keys.weight": keys, f"{group}.values.weight": values, **biases}


def _new_neurons(
    token_map: TokenMap, count: int, like: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw keys as spread as the old ones, since smaller ones hardly move a pretrained model; all else is zero."""
    neurons = {}
    for part in token_map.parts:
        if part.tensor not in like:
            continue
        old = like[part.tensor]
        shape = [count if axis == part.axis else size for axis, size in enumerate(old.shape)]
        neurons[part.tensor] = old.new_zeros(shape)
        if part.axis == 0 and old.dim() == 2 and not old.is_meta:
            std = old.float().std().item()
            neurons[part.tensor].copy_(torch.empty(shape, dtype=old.dtype).normal_(std=std, generator=generator))
    return neurons


def _kind(config: PreTrainedConfig) -> str:
    return getattr(config, "norm_activation_type", "gelu")


def _group_norm(config: PreTrainedConfig, groups: list[GroupEntry], asked: str | None) -> str | None:
    found = getattr(config, "token_group_norm", None)
    if asked in (None, found):
        return found
    if found is None:
        raise GrowthError(f"norm {asked!r} was asked; a {config.model_type!r} model has no such norm")
    if asked not in ("joint", "per_group"):
        raise GrowthError(f"norm is {asked!r}; it must be joint or per_group")
    if len(groups) > 1:
        raise GrowthError(
            f"this model normalises its {len(groups)} token groups {found}; {asked} would compute something else. It "
            "can be chosen while there is one group"
        )
    return asked


def _weights(config: PreTrainedConfig, asked: str | None) -> str:
    if asked not in (None, "float", "ternary"):
        raise GrowthError(f"weights is {asked!r}; it must be float or ternary")
    # What is packed does not learn, and what is new must.
    return asked or ("float" if weights_of(config) == "float" else "ternary")


def _preset_totals(config: PreTrainedConfig, preset: str) -> dict[str, Amount | None]:
    if not architecture_of(config).has_pattention:
        raise GrowthError(f"presets are sizes of TokenFormers; this is a {config.model_type!r} model: give totals")
    try:
        sizes = config.preset_sizes(preset)
    except ValueError as error:
        raise GrowthError(str(error)) from error
    for field in ("hidden_size", "num_attention_heads", "use_parallel_residual", "use_embedding_norm"):
        if sizes.get(field, False) != getattr(config, field):
            raise GrowthError(
                f"preset {preset!r} has {field} {sizes.get(field, False)}, the model {getattr(config, field)}; growth "
                "adds parameter tokens and blocks and keeps all else: choose a preset that fits the model, or give "
                "totals"
            )
    return {f: int(sizes[f]) for f in (*(f"{p}_param_tokens" for p in PROJECTIONS), "num_hidden_layers")}


def _group_name(config: PreTrainedConfig, name: str | None) -> str:
    if name is None:
        return fresh_name(group_names(config))
    check_new(config, name)
    return name


def _check_last_maps(model: PreTrainedModel) -> None:
    """Refuse maps that are not their weight alone (LoRA) or whose weight cannot be set to zero (int8)."""
    row = architecture_of(model.config)
    for block in row.blocks_of(model):
        for name, module in block.named_modules():
            if row.is_last(f"{name}.weight") and hasattr(module, "weight"):
                refuse_unless_plain(module, "add blocks, which begin with zero weights so that they change nothing")


def _any(groups: list[GroupEntry], projection: str, block: int) -> bool:
    return any(group.count(projection, block) for group in groups)


def _always(groups: list[GroupEntry], projection: str, block: int) -> bool:
    """Whether a projection has parameter tokens that take part in every loop."""
    return _any([group for group in groups if not group.loops], projection, block)


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{field} {count}" for field, count in sizes.items())
