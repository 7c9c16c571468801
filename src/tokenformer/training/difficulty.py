"""How hard documents are: a small model's bits per byte on each."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher

from ..checkpoints.checkpoint import load_checkpoint, load_tokenizer, need_tokenizer, read_config
from ..checkpoints.verify import verify_checkpoint
from ..data.cache import cached
from ..data.sources import grouped
from ..evaluation import default_block_length, evaluate
from .processes import processes

_FEATURES = datasets.Features({"bits_per_byte": datasets.Value("float64")})


def difficulty(checkpoint: str, documents: datasets.Dataset) -> np.ndarray:
    """Return the bits per byte of each document under a checkpoint, float64 `[documents]`.

    They are computed once and kept in the cache of `datasets`, so that every process that asks finds the same.

    Args:
        checkpoint: folder of the model that judges.
        documents: rows of {"text"}, none of them empty.

    Raises:
        CheckpointError: there is none, or it is damaged. TokenizerError: it has no tokenizer.
    """
    config = read_config(checkpoint)
    need_tokenizer(checkpoint, config, load_tokenizer(checkpoint, config))
    key = Hasher.hash([verify_checkpoint(checkpoint).weights_sha256, documents._fingerprint, 1])
    rows = cached(lambda: _judged(checkpoint, documents), _FEATURES, key=key)
    return np.array(rows["bits_per_byte"][:])


def _judged(checkpoint: str, documents: datasets.Dataset) -> Iterator[dict[str, list[float]]]:
    model, tokenizer, _ = load_checkpoint(checkpoint, dtype=torch.float32)
    assert tokenizer is not None
    model.to(processes().device)
    length, eos = default_block_length(model.config), tokenizer.eos_token_id

    def bits_per_byte(text: str) -> float:
        ids = [eos, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], eos]
        blocks = [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
        rows = datasets.Dataset.from_dict({"input_ids": blocks})
        return evaluate(model, rows, num_bytes=len(text.encode())).bits_per_byte

    for texts in grouped(documents["text"]):
        yield {"bits_per_byte": [bits_per_byte(text) for text in texts]}
