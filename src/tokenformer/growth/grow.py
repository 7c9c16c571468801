"""Make a model bigger without changing what it computes: `grow(model, …)` = `tokenformer grow`."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import GrowthError
from ..models.configuration_tokenformer import PRESETS, PROJECTIONS
from ..models.modeling_tokenformer import TokenformerPreTrainedModel
from ..models.pattention import check_group

Amount = int | str


@torch.no_grad()
def grow(
    model: TokenformerPreTrainedModel,
    *,
    preset: str | None = None,
    qkv_param_tokens: Amount | None = None,
    output_param_tokens: Amount | None = None,
    ffn_param_tokens: Amount | None = None,
    num_hidden_layers: Amount | None = None,
    name: str | None = None,
) -> None:
    """Grow `model` in place to the totals given; logits stay bit for bit the same in every dtype.

    New parameter tokens form one token group whose keys are zero and values random (beside a linear map without tokens:
    random keys, zero values). New blocks are copies of the block below, spread evenly, whose output and feed-forward
    values are zero. Trained parameters stay the same objects; τ does not move.

    Args:
        model: TokenformerModel or TokenformerForCausalLM.
        preset: take the three counts and the depth from this preset, which must have the model's width and heads.
        qkv_param_tokens, output_param_tokens, ffn_param_tokens: parameter tokens to reach in each projection, all
            groups together: a total, or what to add as "+256" or "+50%". Default: as they are.
        num_hidden_layers: blocks to reach, in the same notations.
        name: of the new group; default "grown1", "grown2", ….

    Raises:
        GrowthError: a total below the current one, nothing to grow, an unknown preset or one of another width, a name
            already taken or impossible, `softmax` where tokens exist, or new blocks where maps are quantised or
            adapted. The model is then untouched.
    """
    config: Any = model.config
    asked: dict[str, Amount | None] = {
        "qkv_param_tokens": qkv_param_tokens,
        "output_param_tokens": output_param_tokens,
        "ffn_param_tokens": ffn_param_tokens,
        "num_hidden_layers": num_hidden_layers,
    }
    if preset is not None:
        asked = _preset_totals(config, preset) | {
            field: amount for field, amount in asked.items() if amount is not None
        }
    current = {field: getattr(config, field) for field in asked}
    target = {field: resolve_amount(amount, current[field], what=field) for field, amount in asked.items()}
    added = {p: target[f"{p}_param_tokens"] - current[f"{p}_param_tokens"] for p in PROJECTIONS}
    if target == current:
        raise GrowthError(f"nothing to grow: the model already has {_describe(current)}; ask for more than that")
    name = _group_name(config, name)
    for projection, count in added.items():
        if count and current[f"{projection}_param_tokens"] and config.norm_activation_type == "softmax":
            raise GrowthError(
                f"cannot grow {projection}_param_tokens: this model normalises with softmax, where a new zero-score "
                "token has weight exp(0) = 1 and takes it from the old ones, so the outputs would change; only "
                "l2_norm_gelu and gelu_l2_norm models can gain tokens (depth can grow under softmax, too)"
            )
    if target["num_hidden_layers"] > current["num_hidden_layers"]:
        _check_last_maps(model)
        _insert_blocks(model, target["num_hidden_layers"])
    if any(added.values()):
        for projection, layers in model.pattention_layers.items():
            for layer in layers if added[projection] else ():
                layer.add_group(name, added[projection])
                setattr(config, f"{projection}_tau", layer.tau)
        config.token_groups = [*config.token_groups, {"name": name, **added}]
    for field, total in target.items():
        setattr(config, field, total)


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


def _preset_totals(config: Any, preset: str) -> dict[str, Amount | None]:
    if preset not in PRESETS:
        raise GrowthError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    sizes = PRESETS[preset]
    for field in ("hidden_size", "num_attention_heads"):
        if sizes[field] != getattr(config, field):
            raise GrowthError(
                f"preset {preset!r} has {field} {sizes[field]}, the model {getattr(config, field)}; growth adds "
                "parameter tokens and blocks but keeps the width: choose a preset of the model's width, or give totals"
            )
    return {f: sizes[f] for f in (*(f"{p}_param_tokens" for p in PROJECTIONS), "num_hidden_layers")}


def _group_name(config: Any, name: str | None) -> str:
    taken = [group["name"] for group in config.token_groups]
    if name is None:
        return next(f"grown{i}" for i in range(1, len(taken) + 2) if f"grown{i}" not in taken)
    if name in taken:
        raise GrowthError(f"token group {name!r} exists already, beside {', '.join(taken)}; choose another name")
    try:
        check_group(name, 0)
    except ValueError as error:
        raise GrowthError(str(error)) from error
    return name


def _insert_blocks(model: TokenformerPreTrainedModel, total: int) -> None:
    """Spread copies with zero values evenly among the blocks, each right above the block it copies."""
    old = list(model.base_model.layers)
    blocks: list[Any] = []
    for i, block in enumerate(old):
        blocks.append(block)
        copies = (i + 1) * (total - len(old)) // len(old) - i * (total - len(old)) // len(old)
        for _ in range(copies):
            new = copy.deepcopy(block).requires_grad_()
            new.zero_grad(set_to_none=True)
            for name in (*PROJECTIONS["output"], *PROJECTIONS["ffn"]):
                for linear in _last_maps(new.get_submodule(name)):
                    linear.weight.zero_()
            blocks.append(new)
    for i, block in enumerate(blocks):
        block.self_attn.layer_idx = i
    model.base_model.layers = nn.ModuleList(blocks)


def _last_maps(layer: Any) -> list[Any]:
    """Return the maps whose outputs a Pattention adds up: with zeros there it gives zeros."""
    return ([] if layer.linear is None else [layer.linear]) + [group.values for group in layer.groups.values()]


def _check_last_maps(model: TokenformerPreTrainedModel) -> None:
    """Refuse maps that are not their weight alone (LoRA) or whose weight cannot be set to zero (int8)."""
    for projection in ("output", "ffn"):
        for linear in (m for layer in model.pattention_layers[projection] for m in _last_maps(layer)):
            odd = linear if type(linear) is not nn.Linear else linear.weight
            if type(odd) not in (nn.Parameter, DTensor):
                raise GrowthError(
                    "cannot add blocks: a new one starts with zero weights, so that it changes nothing, but here is a "
                    f"{type(odd).__module__}.{type(odd).__name__}; merge adapters first (merge_and_unload of peft), "
                    "and grow before quantising"
                )


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{field} {count}" for field, count in sizes.items())
