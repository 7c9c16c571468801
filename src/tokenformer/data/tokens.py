"""Documents into text tokens: a batch at a time, and where there is much text in shards, by one process a core."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .cache import written_whole
from .sources import ranges, text_batches, text_sizes
from .tokenizer import vocabulary_size

SHARD_BYTES = 2**21  # about a second of a core: what a kill costs, and what an interruption waits for
FEW_SHARDS = 8  # up to which starting processes does not pay
Encode = Callable[[list[str]], np.ndarray]


def token_type(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """Return the narrowest unsigned integer that holds every id."""
    return np.min_scalar_type(vocabulary_size(tokenizer) - 1)


def tokenised(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, shards: Path, workers: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the text tokens of documents in order, an end of text after each, as `token_type`; empty ones have none.

    Args:
        documents: rows of {"text"}.
        tokenizer: any with an end-of-text token.
        shards: folder for the text tokens of large texts, a file for every 2 MiB of text. What is finished there is not
            made again; whoever has kept the text tokens elsewhere removes it.
        workers: processes for large texts; default: one for every core. What is yielded does not depend on it.

    Raises:
        DataError: one of the processes was killed.
    """
    parts = ranges(text_sizes(documents), SHARD_BYTES)
    if len(parts) <= FEW_SHARDS:
        yield from _encoded(documents, encoder(tokenizer))
        return
    shards.mkdir(parents=True, exist_ok=True)
    files = {shards / f"{i:06}.npy": part for i, part in enumerate(parts)}
    missing = [file for file in files if not file.exists()]
    context = get_context("fork" if sys.platform == "linux" else None)
    workers = max(1, min(len(missing), workers or _cores()))
    pool = ProcessPoolExecutor(workers, context, _begin, (documents, tokenizer, os.getpid()))
    try:
        with warnings.catch_warnings():  # of Python 3.12 about threads, whose locks these processes never wait for
            warnings.simplefilter("ignore", DeprecationWarning)
            made = {file: pool.submit(_make, file, files[file]) for file in missing}
        for file in files:
            if file in made:
                made[file].result()
            yield np.load(file)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that prepares text was killed, perhaps because memory ran out; the same command goes on from "
            "what is finished"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Return what turns texts into text tokens, as calling the tokenizer does, but without what nobody needs here."""
    kind, end = token_type(tokenizer), tokenizer.eos_token_id
    if tokenizer.is_fast:
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens

    def encode(texts: list[str]) -> np.ndarray:
        if tokenizer.is_fast:
            found = (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))
        else:
            found = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        together = array("I")  # which takes a list three times as fast as numpy does
        for ids in found:
            together.fromlist(ids)
            together.append(end)
        return np.frombuffer(together, dtype=np.uintc).astype(kind)

    return encode


def first_blocks(ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the text blocks that text tokens begin with `[blocks, length]`, and what is left for the next ones.

    Neighbouring blocks share one text token.
    """
    count = (len(ids) - 1) // (length - 1)
    if not count:
        return np.empty((0, length), dtype=ids.dtype), ids
    return np.lib.stride_tricks.sliding_window_view(ids, length)[:: length - 1], ids[count * (length - 1) :]


def too_short(length: int, found: int) -> DataError:
    """Return the error of a text that does not fill one text block."""
    return DataError(
        f"the text is shorter than one text block of {length} text tokens; give more than these {found}, or shorter "
        "blocks"
    )


def _encoded(documents: datasets.Dataset, encode: Encode) -> Iterator[np.ndarray]:
    for batch in text_batches(documents):
        if texts := list(filter(None, batch)):
            yield encode(texts)


# What a process makes shards of: set once in each, so that it need not go along with every shard.
_work: tuple[datasets.Dataset, Encode]


def _begin(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, parent: int) -> None:
    """Begin a process, which ends with the one that it works for and leaves Ctrl-C to it."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along, and the cores are taken
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    _work = documents, encoder(tokenizer)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _make(file: Path, rows: range) -> None:
    """Write the text tokens of a shard."""
    documents, encode = _work
    arrays = list(_encoded(documents.select(rows), encode))
    with written_whole(file) as stream:
        np.save(stream, np.concatenate(arrays) if arrays else np.empty(0, np.uint8))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
