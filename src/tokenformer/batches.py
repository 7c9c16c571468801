"""Text blocks as tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def batches(blocks: Any, size: int) -> Iterator[Tensor]:
    """Yield text blocks in order, int64 `[at most size, T]`.

    Args:
        blocks: a dataset of `{"input_ids": [T]}` as `data.blocks.pack` makes it. A block of another length, as the last
            of a text may be, goes into a batch of its own: nothing is padded.
        size: text blocks in a batch.
    """
    for start in range(0, len(blocks), size):
        rows = blocks[start : start + size]["input_ids"]
        for _, alike in itertools.groupby(rows, key=len):
            yield torch.tensor(list(alike))
