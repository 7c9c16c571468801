"""Validation loss of a language model: nats per text token and bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Evaluation:
    """What validation measured.

    Attributes:
        loss: mean cross entropy in nats per predicted text token.
        bits_per_byte: total cross entropy in bits over the UTF-8 bytes of the text; comparable across tokenizers.
        text_tokens: predicted text tokens.
    """

    loss: float
    bits_per_byte: float
    text_tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    blocks: Any,
    *,
    num_bytes: int,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
) -> Evaluation:
    """Predict every text token of `blocks` once.

    Args:
        model: any transformers causal language model.
        blocks: a dataset of `{"input_ids": [T], "labels": [T]}` as `data.pack` makes them; -100 is not predicted.
        num_bytes: UTF-8 bytes of the text the blocks were made from.
        batch_size: blocks per forward pass.
        dtype: autocast to this type; default: compute in the weights' own.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        batch = blocks[start : start + batch_size]
        input_ids = torch.as_tensor(batch["input_ids"], device=device)
        labels = torch.as_tensor(batch["labels"], device=device)[:, 1:]
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        total += losses.cpu().double().sum().item()
        count += int((labels != -100).sum())
    model.train(was_training)
    return Evaluation(total / count, total / math.log(2) / num_bytes, count)
