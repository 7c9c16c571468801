"""Text blocks of a stream, made on the fly: each process reads its own share, and goes on by state."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from .sources import text_batches
from .tokens import encoder, first_blocks, too_short


class BlockStream(IterableDataset):
    """Text blocks `{"input_ids": [block_length]}` of streamed documents, in the order of the text.

    About 1 MiB of text is tokenised ahead, while what came before it is read.

    Args:
        documents: rows of {"text"}.
        tokenizer: any with an end-of-text token.
        block_length: text tokens in a text block.
        keep_tail: give what is left of the text as a last, shorter block.
        endless: begin again where the text ends.

    It is share `number` of `shares`, the only one unless `share` made it.
    """

    number, shares = 0, 1

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_length: int,
        keep_tail: bool = False,
        endless: bool = False,
    ) -> None:
        self._documents, self._tokenizer = documents, tokenizer
        self._length, self._keep_tail, self._endless = block_length, keep_tail, endless
        self._beginning = _state(0, None, np.array([tokenizer.eos_token_id]), 0)
        self._start, self._state, self._skipped = self._beginning, self._beginning, 0

    def share(self, process: int, processes: int) -> BlockStream:
        """Return what one of several processes reads, endlessly: no text is in two shares.

        Where the files or shards of the source can be dealt out evenly, a process reads its own only; else it reads all
        and tokenises every so manieth document.
        """
        documents = self._documents
        if processes > 1:
            documents = split_dataset_by_node(documents, process, processes)
        part = BlockStream(documents, self._tokenizer, block_length=self._length, endless=True)
        part.number, part.shares = process, processes
        return part

    def state_dict(self) -> dict[str, Any]:
        """Return from where to go on after the last block that was given; numbers and text alone."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin after the block that was the last one when `state_dict` returned `state`."""
        self._start, self._state, self._skipped = state, state, 0

    def begin_after(self, count: int) -> None:
        """Begin after so many blocks: at once where that many have just been read, else by reading past them."""
        if self._state["given"] == count:
            self.load_state_dict(self._state)
        else:
            self.load_state_dict(self._beginning)
            self._skipped = count

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """Yield text blocks, without end where the stream is endless.

        Raises:
            DataError: less text than one block, or text that cannot be read.
        """
        return itertools.islice(self._from(self._start), self._skipped, None)

    def _from(self, state: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
        yield from self._one_pass(state)
        while self._endless:
            yield from self._one_pass({**self._beginning, "given": self._state["given"]})

    def _one_pass(self, state: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
        given, before, first = state["given"], state["documents"], state["of_these"]
        documents = copy.deepcopy(self._documents)
        if before is not None:
            documents.load_state_dict(before)
        batches = self._tokenised(documents)
        rest = np.array(state["rest"], dtype=np.uint32)
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = ahead.submit(next, batches, None)
                ids, after = batch
                blocks, left = first_blocks(np.concatenate([rest, ids]), self._length)
                for number in range(first, len(blocks)):
                    given += 1
                    self._state = _state(given, before, rest, number + 1)
                    yield {"input_ids": blocks[number].tolist()}
                before, rest, first = after, left, 0
        if self._keep_tail and len(rest) > 1:
            yield {"input_ids": rest.tolist()}
        elif not given:
            raise too_short(self._length, len(rest))

    def _tokenised(self, documents: datasets.IterableDataset) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield text tokens, some documents' at a time, and the state of the documents behind them."""
        encode = encoder(self._tokenizer)
        for batch in text_batches(documents):
            if texts := list(filter(None, batch)):
                yield encode(texts), documents.state_dict()


def _state(given: int, documents: dict[str, Any] | None, rest: np.ndarray, of_these: int) -> dict[str, Any]:
    """Return a place in a stream.

    Args:
        given: text blocks up to there, in all passes.
        documents: state of the documents from which the last text blocks were made; None: from the beginning.
        rest: text tokens that were left over before them.
        of_these: how many text blocks of those documents have been given.
    """
    return {"given": given, "documents": documents, "rest": rest.tolist(), "of_these": of_these}
