"""Documents into text blocks: stretches of text-token ids of one length.

A block stores each text token once: what it predicts is itself, one position on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..quiet import without_bars
from .cache import cache_folder, cached
from .sources import load_documents, text_sizes
from .tokens import first_blocks, token_type, tokenised, too_short


def pack(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, block_length: int, keep_tail: bool = False
) -> datasets.Dataset:
    """Tokenise documents once and cut them into text blocks `{"input_ids": [block_length]}`.

    The stream is EOS, document, EOS, document, …, EOS; neighbouring blocks share one text token, so that every one but
    the first is predicted exactly once. They are memory-mapped from the cache of `datasets`, found again by what the
    text and tokenizer are. `BlockStream` makes the same ones of a stream.

    Args:
        documents: rows of {"text"}.
        tokenizer: any with an end-of-text token.
        block_length: text tokens in a text block.
        keep_tail: keep what is left of the text as a last, shorter block.

    Raises:
        DataError: less text than one block.
    """
    identity = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    key = Hasher.hash([documents._fingerprint, identity, tokenizer.eos_token_id, block_length, keep_tail, 3])
    shards = cache_folder() / f"{key}.shards"
    features = datasets.Features({"input_ids": datasets.List(datasets.Value(str(token_type(tokenizer))))})

    def columns() -> Iterator[dict[str, Any]]:
        return map(rows_of, _cut(documents, tokenizer, block_length, keep_tail, shards))

    blocks = cached(columns, features, key=key)
    shutil.rmtree(shards, ignore_errors=True)
    return blocks


def rows_of(blocks: np.ndarray) -> dict[str, pyarrow.Array]:
    """Return the column of text blocks `[blocks, block_length]`."""
    count, length = blocks.shape
    starts = np.arange(0, (count + 1) * length, length, dtype=np.int32)
    return {"input_ids": pyarrow.ListArray.from_arrays(starts, blocks.reshape(-1))}


@without_bars()
def text_blocks(
    source: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_length: int = 512,
    text_tokens: int = 65_536,
) -> datasets.Dataset:
    """Return a sample of a text in text blocks, to judge a model by: what `prune`, `sort` and `route` take.

    Args:
        source: as `data.source` of a recipe: a name, file, folder or glob, or several.
        tokenizer: the model's, with an end-of-text token.
        block_length: text tokens in a text block; the model's context at most.
        text_tokens: about how many to take, from all over the text.

    Raises:
        DataError: there is no such text, it cannot be read, or it is shorter than a block.
    """
    documents = load_documents(source)
    order = np.random.default_rng(0).permutation(len(documents))
    sizes = np.cumsum([len(documents[int(i)]["text"]) for i in order[: text_tokens // 8]])
    enough = int(np.searchsorted(sizes, 16 * text_tokens)) + 1
    blocks = pack(documents.select(order[:enough].tolist()), tokenizer, block_length=block_length)
    step = max(1, len(blocks) * (block_length - 1) // text_tokens)
    return blocks.select(range(0, len(blocks), step))


def utf8_bytes(documents: datasets.Dataset) -> int:
    """Bytes of text in rows of {"text"}."""
    return int(text_sizes(documents).sum())


def _cut(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, length: int, keep_tail: bool, shards: Path
) -> Iterator[np.ndarray]:
    """Yield text blocks, some at a time `[blocks, length]`; a tail, which may be shorter, comes alone and last."""
    rest, made = np.array([tokenizer.eos_token_id], dtype=token_type(tokenizer)), 0
    for ids in tokenised(documents, tokenizer, shards=shards):
        blocks, rest = first_blocks(np.concatenate([rest, ids]), length)
        made += len(blocks)
        if len(blocks):
            yield blocks
    if keep_tail and len(rest) > 1:
        yield rest[None]
    elif not made:
        raise too_short(length, len(rest))
