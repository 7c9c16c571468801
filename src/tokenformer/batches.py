"""Text blocks and images as tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
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


def pixel_values(images: np.ndarray, processor: Any) -> Tensor:
    """Return images of the model's size as it takes them: float32 `[B, 3, height, width]`.

    Args:
        images: uint8 `[B, height, width, 3]`.
        processor: an image processor of transformers, whose scale and mean the model was trained with.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    if processor.do_rescale:
        pixels = pixels * processor.rescale_factor
    if processor.do_normalize:
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (processor.image_mean, processor.image_std))
        pixels = (pixels - mean) / std
    return pixels.contiguous()
