"""Documents into text blocks: stretches of text-token ids of one length.

A block stores each text token once: what it predicts is itself, one position on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..quiet import without_bars
from .cache import cached
from .sources import Documents, load_documents, texts_of

BLOCK_FEATURES = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


def pack(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, block_length: int, keep_tail: bool = False
) -> Documents:
    """Tokenise documents once and cut them into text blocks `{"input_ids": [block_length]}`.

    The stream is EOS, document, EOS, document, …, EOS; neighbouring blocks share one text token, so that every one but
    the first is predicted exactly once. A dataset's blocks are memory-mapped from the cache of `datasets`, found again
    by what the text and tokenizer are; a stream's are made on the fly, and its errors raised then.

    Args:
        documents: rows of {"text"}.
        tokenizer: any with an end-of-text token.
        block_length: text tokens in a text block.
        keep_tail: keep what is left of the text as a last, shorter block.

    Raises:
        DataError: less text than one block.
    """
    arguments = {"documents": documents, "tokenizer": tokenizer, "block_length": block_length, "keep_tail": keep_tail}
    if isinstance(documents, datasets.IterableDataset):
        return datasets.IterableDataset.from_generator(_text_blocks, gen_kwargs=arguments)
    identity = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    key = Hasher.hash([documents._fingerprint, identity, tokenizer.eos_token_id, block_length, keep_tail, 2])
    return cached(_text_blocks, arguments, BLOCK_FEATURES, key=key)


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


def utf8_bytes(documents: Iterable[Any]) -> int:
    """Bytes of text in rows of {"text"}."""
    return sum(len(row["text"].encode()) for row in documents)


def _text_blocks(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, block_length: int, keep_tail: bool
) -> Iterator[dict[str, list[int]]]:
    eos = tokenizer.eos_token_id
    stream = [eos]
    made = 0
    texts = texts_of(documents)
    while batch := list(itertools.islice(texts, 64)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, eos]
        start = 0
        while start + block_length <= len(stream):
            yield {"input_ids": stream[start : start + block_length]}
            start += block_length - 1
            made += 1
        stream = stream[start:]
    if keep_tail and len(stream) > 1:
        yield {"input_ids": stream}
    elif not made:
        raise DataError(
            f"the text is shorter than one text block of {block_length} text tokens; give more than these "
            f"{len(stream)}, or shorter blocks"
        )
