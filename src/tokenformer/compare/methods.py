"""The ways to grow that a comparison pits against each other, on models in memory: `grow_by(model, …)`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.optimizer import OptimizerState
from ..errors import GrowthError
from ..growth.architectures import architecture_of, group_names, token_groups, with_groups
from ..growth.grow import Amount, resolve_amount
from ..growth.neurons import group_neurons
from ..models.token_group import default_tau, reset_linear
from ..training.optimization import grow_with_states, states_by_group

Grown = tuple[PreTrainedModel, OptimizerState]

_TOKENS = ("qkv_param_tokens", "output_param_tokens", "ffn_param_tokens")
_SITES = {"at", "tokens"}  # of linear maps, which any model has
_TOKENFORMER, _BOTH = ("tokenformer",), ("tokenformer", "gpt_neox")
# What shrink_pad_perturb multiplies old weights by, unless told otherwise.
_SHRINK = 0.4
# HyperCloning's noise lies so far below the weights that it is added to.
_SIGNAL_TO_NOISE_DB = 10.0
_EMBEDDING, _HEAD, _FINAL_NORM = "gpt_neox.embed_in.", "lm_head.", "gpt_neox.final_layer_norm."


@dataclass(frozen=True)
class Method:
    """A way to grow.

    Attributes:
        grow: from (model, optimizer's states, amounts by name) to the grown model and its states.
        amounts: names of the amounts that it takes.
        model_types: kinds of model that it grows.
    """

    grow: Callable[..., Grown]
    amounts: tuple[str, ...]
    model_types: tuple[str, ...]


def grow_by(model: PreTrainedModel, states: OptimizerState, method: str, *, seed: int, **amounts: Any) -> Grown:
    """Grow `model` by a row of `METHODS`; the result says what the optimizer remembers.

    Args:
        model: a TokenFormer or GPT-NeoX language model. It is used up: the result may be it, or a new one with its
            mode, dtype and device.
        states: of the optimizer, by parameter name.
        method: name of the row.
        seed: of all that is drawn; torch's own random numbers go on as if nothing had been.
        amounts: what the method takes; those that are None are not asked. Counts are totals, "+256" or "+50%".

    Returns:
        The grown model, and the states of those parameters that had one and go on as they were (for `hyperclone`: of
        all), by their new names. What has none is new to the optimizer.

    Raises:
        GrowthError: an unknown method, one that does not grow this kind of model, amounts that it does not take or
            that are missing, or what the method itself refuses.
    """
    if method not in METHODS:
        raise GrowthError(f"there is no growth method {method!r}; there are {', '.join(METHODS)}")
    row, kind = METHODS[method], model.config.model_type
    if kind not in row.model_types and not amounts.keys() & _SITES:
        raise GrowthError(f"growth method {method!r} grows {' and '.join(row.model_types)} models; this is a {kind!r}")
    asked = {name: amount for name, amount in amounts.items() if amount is not None}
    if not asked or not asked.keys() <= set(row.amounts):
        given = ", ".join(asked) or "nothing"
        raise GrowthError(f"growth method {method!r} was given {given}; it takes {', '.join(row.amounts)}")
    with torch.no_grad(), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return row.grow(model, states_by_group(model, states), **asked)


def _exact(model: PreTrainedModel, states: OptimizerState, **growth: Any) -> Grown:
    """`tokenformer.grow`: bit for bit the same outputs.

    Of a GPT-NeoX: neurons whose output columns are zero; blocks whose last maps are zero (LLaMA Pro, arXiv 2401.02415).
    """
    return model, grow_with_states(model, states, **growth)


def _departing(
    model: PreTrainedModel, states: OptimizerState, *, random_keys: bool, recomputed_tau: bool, **counts: Amount
) -> Grown:
    """Grow as `exact` without one or both of what keeps the outputs: zero keys, and the old τ.

    Without both it is what the official code does (commit 4d56c73): new tokens drawn as a new model's, τ = √n anew.
    """
    config = model.config
    if recomputed_tau and (config.norm_activation_type == "gelu" or config.token_group_norm != "joint"):
        raise GrowthError(
            "τ can be recomputed where one norm is taken over all tokens; this model has norm_activation_type "
            f"{config.norm_activation_type!r} and token_group_norm {config.token_group_norm!r}"
        )
    model, states = model, grow_with_states(model, states, **counts)
    new = group_names(config)[-1]
    for projection, layers in model.pattention_layers.items():
        total = getattr(config, f"{projection}_param_tokens")
        if recomputed_tau and total:
            setattr(config, f"{projection}_tau", default_tau(total, config.norm_activation_type))
        for layer in layers:
            layer.tau = getattr(config, f"{projection}_tau")
            if random_keys and new in layer.groups:
                for half in (layer.groups[new].keys, layer.groups[new].values):
                    if half.weight.is_meta or not half.weight.any():
                        reset_linear(half)
    return model, states


def _shrink_pad_perturb(
    model: PreTrainedModel, states: OptimizerState, *, shrink: float = _SHRINK, **amounts: Amount
) -> Grown:
    """Multiply the old matrices by `shrink`, pad them with zeros, and add those of a new model of the last size.

    Mallik et al., When is warmstarting effective for scaling language models? (arXiv 2605.13405), who find that growth
    need not keep outputs. Only the paper's abstract was at hand: the factor is this project's, of Ash and Adams' shrink
    and perturb (arXiv 1910.08475). Norms and biases stay, τ is kept, and the optimizer starts afresh.
    """
    old = set(model.parameters())
    grow_with_states(model, states, **amounts)
    new = _fresh(model, model.config)
    group_neurons(new)
    drawn = dict(new.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter not in old:
            parameter.copy_(drawn[name])
        elif parameter.dim() >= 2:
            parameter.mul_(shrink).add_(drawn[name])
    return model, {}


def _hyperclone(model: PreTrainedModel, states: OptimizerState, *, factor: int) -> Grown:
    """Multiply hidden size, heads and neurons by `factor`: HyperCloning (arXiv 2409.12903), its noisy symmetric form.

    Every activation becomes `factor` equal copies and every map W blocks of W / factor, plus noise that cancels over
    the copies of an input: outputs stay the same to rounding. The noise (10 dB, as in the paper's ablation) is needed
    here, for without dropout exact copies get equal gradients and never part. Net2Net's random mapping (arXiv
    1511.05641) must copy all hidden units equally often to keep outputs under LayerNorm, which makes it this one.

    The optimizer's moments become those that copies without noise would have had.
    """
    if type(factor) is not int or factor < 2:
        raise GrowthError(f"factor is {factor!r}; hyperclone multiplies the width by a whole number, 2 or more")
    config = model.config
    blocks = range(config.num_hidden_layers)
    groups = [
        replace(group, counts={"ffn": tuple(factor * group.count("ffn", block) for block in blocks)})
        for group in token_groups(config)
    ]
    sizes = {field: factor * getattr(config, field) for field in ("hidden_size", "num_attention_heads")}
    wider = _fresh(model, with_groups(config, groups, **sizes))
    group_neurons(wider)
    # What adds up the copies into logits; a tied head cannot shrink without the embedding, so the norm before it does.
    last = _FINAL_NORM if config.tie_word_embeddings else _HEAD

    def tiled(name: str, tensor: Tensor) -> Tensor:
        rows = 1 if name.startswith((_EMBEDDING, _HEAD)) else factor
        return tensor.repeat(factor) if tensor.dim() == 1 else tensor.repeat(rows, factor)

    old = dict(model.named_parameters())
    for name, parameter in wider.named_parameters():
        weight = tiled(name, old[name])
        inner = weight.dim() == 2 and not name.startswith((_EMBEDDING, _HEAD))
        if inner or name.startswith(last):
            weight = weight / factor
        parameter.copy_(weight + _cancelling_noise(weight, factor) if inner else weight)
        parameter.requires_grad_(old[name].requires_grad)
    moved: OptimizerState = {}
    for name, state in states.items():
        # Copies of an activation share its gradient, which is whole only where they are added up.
        share = 1 if name.startswith(last) else factor
        moved[name] = {
            key: tiled(name, moment) / (share**2 if key.endswith("_sq") else share) if moment.dim() else moment
            for key, moment in state.items()
        }
    return wider, moved


def _cancelling_noise(weight: Tensor, factor: int) -> Tensor:
    """Draw noise for a map `[fE, fD]` that adds up to zero over the `factor` copies of each input."""
    noise = torch.randn(len(weight), factor, weight.shape[1] // factor, dtype=weight.dtype).to(weight.device)
    noise = (noise - noise.mean(1, keepdim=True)).flatten(1)
    return noise * (weight.norm() / noise.norm() * 10 ** (-_SIGNAL_TO_NOISE_DB / 20))


def _stack(model: PreTrainedModel, states: OptimizerState, *, num_hidden_layers: Amount) -> Grown:
    """Repeat the list of blocks, weights and all: G_stack (arXiv 2405.15319); outputs change.

    From one block it is one-layer expansion (arXiv 2511.04981). The copies are new to the optimizer; the official code
    starts it afresh altogether.
    """
    depth, total = _depths(model, num_hidden_layers)
    if not depth or total % depth:
        raise GrowthError(
            f"num_hidden_layers asked {total}, found {depth}: stacking repeats all blocks; ask for a multiple"
        )
    sources = [block % depth for block in range(total)]
    old = architecture_of(model.config).blocks_of(model)
    return _append(model, sources, [copy.deepcopy(old[source]) for source in sources[depth:]]), states


def _random_blocks(model: PreTrainedModel, states: OptimizerState, *, num_hidden_layers: Amount) -> Grown:
    """Put blocks on top, drawn as those of a new model of that depth; outputs change.

    From no block it is zero-layer expansion (arXiv 2511.04981).
    """
    depth, total = _depths(model, num_hidden_layers)
    sources = [min(block, max(depth - 1, 0)) for block in range(total)]
    row, config = architecture_of(model.config), model.config
    new = _fresh(model, with_groups(config, token_groups(config), blocks=sources))
    return _append(model, sources, row.blocks_of(new)[depth:]), states


def _depths(model: PreTrainedModel, asked: Amount) -> tuple[int, int]:
    depth = model.config.num_hidden_layers
    total = resolve_amount(asked, depth, what="num_hidden_layers")
    if total == depth:
        raise GrowthError(f"nothing to grow: the model already has num_hidden_layers {depth}; ask for more than that")
    return depth, total


def _append(model: PreTrainedModel, sources: list[int], new: Iterable[nn.Module]) -> PreTrainedModel:
    """Put blocks on top; `sources` names for each block afterwards the old one whose token counts it has."""
    config, row = model.config, architecture_of(model.config)
    config.__dict__.update(with_groups(config, token_groups(config), blocks=sources).__dict__)
    blocks: Any = nn.ModuleList([*row.blocks_of(model), *new])
    model.base_model.set_submodule(row.blocks, blocks)
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx, module.config = number, config
    group_neurons(model)
    return model


def _fresh(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Make a model of the kind, mode, dtype and device of `model`, initialised as its architecture does."""
    new = type(model)._from_config(config, dtype=model.dtype)
    return new.to(model.device).train(model.training)


METHODS: dict[str, Method] = {
    "exact": Method(_exact, (*_TOKENS, "num_hidden_layers", "num_loops", "norm", *sorted(_SITES)), _BOTH),
    "random_keys": Method(partial(_departing, random_keys=True, recomputed_tau=False), _TOKENS, _TOKENFORMER),
    "recomputed_tau": Method(partial(_departing, random_keys=False, recomputed_tau=True), _TOKENS, _TOKENFORMER),
    "published": Method(partial(_departing, random_keys=True, recomputed_tau=True), _TOKENS, _TOKENFORMER),
    "shrink_pad_perturb": Method(_shrink_pad_perturb, (*_TOKENS, "num_hidden_layers", "shrink"), _BOTH),
    "hyperclone": Method(_hyperclone, ("factor",), ("gpt_neox",)),
    "stack": Method(_stack, ("num_hidden_layers",), _BOTH),
    "random_blocks": Method(_random_blocks, ("num_hidden_layers",), _BOTH),
}
