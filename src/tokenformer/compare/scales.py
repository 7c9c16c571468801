"""Is a model's beginning sound? How large its parts are at initialisation, and which of them drown the others.

A block adds attention's and the feed-forward's outputs to the residual stream. Where one of them is many times as
large as the stream, what reads it next sees hardly anything else, and a short training shows how fast a model gets out
of that rather than what its layers are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..growth.architectures import row_of
from .results import Line

# Times the root mean square of the residual stream from which on what a block adds to it drowns it. As transformers
# draws them, GPT-2, GPT-NeoX and Llama of widths 32 to 256 add up to 6 times; TokenFormers as published, whose
# embedding is drawn at 0.02 and whose output maps at 2 / (layers · √width), add 16 to 130 times.
DROWNS = 8.0

PARTS = ("attention", "feed_forward")


def initial_scales(model: PreTrainedModel, ids: Tensor) -> list[dict[str, float]]:
    """Measure each block of a model on some text.

    Args:
        model: at initialisation.
        ids: int64 `[B, T]`.

    Returns:
        For each block the root mean square over all numbers of the residual `stream` that enters it (in the first block
        that is the embedding), and of what its `attention`, or what mixes text tokens in its place, and its
        `feed_forward`, where it has one, add to it; where blocks are looped, the first time. None of a model that is
        not in the table and has no blocks.
    """
    row = row_of(model.config)
    blocks = _blocks(model) if row is None else row.blocks_of(model)
    found: list[dict[str, float]] = [{} for _ in blocks]
    hooks = []
    for block, scales in zip(blocks, found, strict=True):

        def enters(module: nn.Module, arguments: Any, named: dict[str, Any], scales: dict[str, float] = scales) -> None:
            scales.setdefault("stream", _size(arguments[0] if arguments else named["hidden_states"]))

        hooks.append(block.register_forward_pre_hook(enters, with_kwargs=True))
        names = _parts(block) if row is None else row.adds or row.last
        for part, name in zip(PARTS, names, strict=row is not None):

            def leaves(
                module: nn.Module, arguments: Any, output: Any, scales: dict[str, float] = scales, part: str = part
            ) -> None:
                scales.setdefault(part, _size(output[0] if isinstance(output, tuple) else output))

            hooks.append(block.get_submodule(name).register_forward_hook(leaves))
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [dict.fromkeys(PARTS, 0.0) | scales for scales in found]


def _blocks(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the blocks of a model that is not in the table: its first list of as many modules as it has layers."""
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return list(lists[0]) if lists else []


def _parts(block: nn.Module) -> list[str]:
    """Return the names of what adds to the stream in a block that is not in the table: what holds maps in it."""
    held = [name for name, child in block.named_children() if any(p.dim() >= 2 for p in child.parameters())]
    return held if len(held) < 2 else [held[0], held[-1]]


def drowned(blocks: Sequence[Line]) -> list[str]:
    """Say which parts of a model drown the others at initialisation: nothing of a sound one."""
    return [
        f"the {part.replace('_', '-')} of block {number} adds {times:.0f} × the stream it is added to"
        for number, scales in enumerate(blocks, 1)
        for part in PARTS
        if (times := relative(scales, part)) > DROWNS
    ]


def relative(scales: Line, part: str) -> float:
    """Return what a part of a block adds, in multiples of the stream that enters the block."""
    if scales[part] == 0:
        return 0.0
    return scales[part] / scales["stream"] if scales["stream"] else math.inf


def _size(x: Tensor) -> float:
    """Return the root mean square, rounded so that the number of threads does not show."""
    return float(f"{x.float().square().mean().sqrt().item():.4g}")
