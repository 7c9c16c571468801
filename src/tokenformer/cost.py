"""What a model costs: parameters, FLOPs, bytes; mostly from a configuration alone.

Of architectures in the table FLOPs are computed; of others, whose blocks may do anything, torch's counter counts them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .growth.architectures import architecture_of, group_names, places, row_of, site_groups, token_groups
from .growth.neurons import GroupedLinear
from .growth.sites import sites
from .growth.state import read_map
from .growth.tokenise import build
from .models.ternary import PackedLinear


def group_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters in each token group: keys and values of all its tokens, with biases."""
    listed, row = site_groups(config), row_of(config)
    counts = dict.fromkeys([*(group_names(config) if row else []), *listed], 0)
    if row:
        state = _model(config).state_dict()
        for block, token_map in places(config):
            for name, tensors in read_map(config, state, block, token_map).items():
                counts[name] += sum(t.numel() for part, t in tensors.items() if ".gates." not in part)
    if listed:
        for layer in sites(_model(config)).values():
            for name, group in layer.groups.items():
                counts[name] += sum(p.numel() for p in group.parameters())
    return counts


def group_tokens(config: PreTrainedConfig) -> dict[str, int]:
    """Parameter tokens in each token group, over all maps that have some."""
    listed = list(places(config)) if row_of(config) else []
    own = {
        group.name: sum(group.count(token_map.projection, block) for block, token_map in listed)
        for group in (token_groups(config) if listed else [])
    }
    return own | site_groups(config)


def parameters(config: PreTrainedConfig) -> int:
    """All trainable numbers, a tied embedding counted once."""
    return sum(p.numel() for p in _model(config).parameters())


def matrix_parameters(config: PreTrainedConfig) -> int:
    """Parameters that multiply every text token: the weights of all linear maps, the output head among them."""
    return sum(m.weight.numel() for m in _model(config).modules() if isinstance(m, nn.Linear | Conv1D))


def block_parameters(config: PreTrainedConfig) -> int:
    """Weights of the linear maps in the blocks: without embedding and output head."""
    return matrix_parameters(config) - config.vocab_size * config.hidden_size


def forward_flops(config: PreTrainedConfig, context: int) -> float:
    """FLOPs per text token of one forward pass over `context` text tokens.

    2N + 4·layers·width·context (paper, table 3), N including the output head, width that of all attention heads; what
    a looped model uses again is counted again, attention without the causal half, norms and activations not at all.
    Of an architecture that is not in the table those that torch's counter sees, which are of the same kind.
    """
    if row_of(config) is None:
        return counted_flops(build(config), context, backward=False)
    runs = config.num_hidden_layers * getattr(config, "num_loops", 1)
    return 2.0 * _multiplied(config) + runs * _attention_flops(config, context)


def _multiplied(config: PreTrainedConfig) -> int:
    """Parameters that multiply a text token, each as often as it does: in the loops in which its group takes part."""
    row, times = architecture_of(config), getattr(config, "num_loops", 1)
    own = {group.name: len(group.loops) for group in token_groups(config) if group.loops}
    total = 0
    for name, module in _model(config).named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            group = name.partition(".groups.")[2].partition(".")[0]
            inside = row.block_number(name) is not None
            total += module.weight.numel() * (own.get(group, times) if inside else 1)
    return total


def head_share(config: PreTrainedConfig, context: int) -> float:
    """Share of a pass's FLOPs that the output head takes, over `context` text tokens."""
    return 2.0 * config.vocab_size * config.hidden_size / forward_flops(config, context)


def training_flops(config: PreTrainedConfig, context: int) -> float:
    """FLOPs per text token of forward and backward where all of a model trains: three forward passes."""
    return 3.0 * forward_flops(config, context)


def training_flops_of(
    model: PreTrainedModel, context: int | None = None, *, inputs: Mapping[str, Any] | None = None
) -> float:
    """FLOPs of forward and backward of a model in memory, whose frozen parts may save some.

    They are those per text token over `context` text tokens, or per image of a model that reads images. Every map
    multiplies once forward, once for the gradient of its weight where that trains, and once for the gradient of its
    input where anything below it trains. Which inputs those are is seen in a pass over one text token, or one image, or
    `inputs`, whose FLOPs are then returned.
    """
    config = model.config
    row = row_of(config)
    if row is None:
        return counted_flops(model, context or 1)
    blocks = row.blocks_of(model)
    grouped: list[Any] = [m for m in model.modules() if isinstance(m, GroupedLinear)]
    within = {inner for m in grouped for inner in m.groups.values()}
    plain: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D | PackedLinear)]
    plain = [m for m in plain if m not in within]
    mixers = [block.get_submodule(row.last[0]) for block in blocks]
    rows, reached = _read(model, {*grouped, *plain, *mixers}, inputs or _smallest(model))
    weights = [(m, m) for m in plain] + [(inner, m) for m in grouped for inner in m.groups.values()]
    products = sum(_numbers(w) * (rows[m] * (1 + w.weight.requires_grad) + reached[m]) for w, m in weights)
    length = context or max((rows[m] for m in mixers), default=0) // getattr(config, "num_loops", 1)
    attention = sum(rows[m] + 2 * reached[m] for m in mixers) * _attention_flops(config, length)
    return 2.0 * products + attention


def _numbers(linear: Any) -> int:
    """Count the numbers in a map's weight."""
    packed = isinstance(linear, PackedLinear)
    return linear.in_features * linear.out_features if packed else linear.weight.numel()


def counted_flops(model: PreTrainedModel, context: int, *, backward: bool = True) -> float:
    """Count the FLOPs per text token of a pass over `context` text tokens, forward and by default backward.

    torch's counter watches the real modules, frozen ones included, with attention written out: its kernels on CPUs are
    unknown to the counter, and fused ones compute scores twice, which is no work of the model's.
    """
    attention = model.config._attn_implementation
    ids = torch.zeros(1, context, dtype=torch.long, device=next(model.parameters()).device)
    model.set_attn_implementation("eager")
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if backward:
            loss.backward()
            model.zero_grad(set_to_none=True)
    model.set_attn_implementation(attention)
    return counter.get_total_flops() / context


def _read(
    model: PreTrainedModel, modules: Collection[nn.Module], inputs: Mapping[str, Any]
) -> tuple[Counter[nn.Module], Counter[nn.Module]]:
    """Return how many rows each of `modules` reads of `inputs`, and how many of them depend on what trains."""
    rows: Counter[nn.Module] = Counter()
    reached: Counter[nn.Module] = Counter()

    def look(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        count = arguments[0].numel() // arguments[0].shape[-1]
        rows[module] += count
        reached[module] += count if arguments[0].requires_grad else 0

    hooks = [module.register_forward_pre_hook(look) for module in modules]
    training = model.training
    try:
        with torch.enable_grad():
            model.eval()(**inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return rows, reached


def _smallest(model: PreTrainedModel) -> dict[str, Any]:
    """Return one text token, or one image, as the model takes it."""
    device = next(model.parameters()).device
    if model.main_input_name == "pixel_values":
        shape = (1, model.config.num_channels, *model.config.image_height_width)
        return {"pixel_values": torch.zeros(shape, device=device)}
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device), "use_cache": False}


def _attention_flops(config: PreTrainedConfig, context: int) -> float:
    """FLOPs per text token of one block's scores, and of its sums of values."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4.0 * width * context


def training_bytes(config: PreTrainedConfig) -> int:
    """Bytes of float32 weights, gradients and AdamW's two moments; activations come on top."""
    return 16 * parameters(config)


def _model(config: PreTrainedConfig) -> nn.Module:
    """Return the model without its weights."""
    return _built(json.dumps(config.to_dict(), sort_keys=True))


@lru_cache(maxsize=8)
def _built(content: str) -> nn.Module:
    fields = json.loads(content)
    # What is packed is counted as what it was packed from: as many numbers multiply each text token.
    for entry in (fields, *(fields.get("token_groups") or ())):
        if entry.get("weights") == "packed":
            entry["weights"] = "ternary"
    with torch.device("meta"):
        return build(AutoConfig.for_model(**fields))
