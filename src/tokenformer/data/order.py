"""Which text blocks a stage reads, in which order: a stretch of each text's endless order, evenly mixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from .blocks import rows_of
from .cache import cached


@dataclass(frozen=True)
class Reading:
    """What a stage reads.

    Attributes:
        sequences: how many, of all texts together.
        shares: of the sequences, by text; they add up to 1.
        skipped: text blocks of each that earlier stages have read; none where it is not named.
        pieces: sequences in a text block: 1, or more where the stage's sequences are shorter.
    """

    sequences: int
    shares: Mapping[str, float]
    skipped: Mapping[str, int]
    pieces: int = 1

    @property
    def counts(self) -> dict[str, int]:
        """Sequences of each text: its share, exact to one sequence."""
        wanted = {text: share * self.sequences for text, share in self.shares.items()}
        counts = {text: int(count) for text, count in wanted.items()}
        short = sorted(wanted, key=lambda text: counts[text] - wanted[text])[: self.sequences - sum(counts.values())]
        return {text: count + (text in short) for text, count in counts.items()}

    def after(self) -> dict[str, int]:
        """Return the text blocks of each text that have been read by the end."""
        begun = {text: -(-count // self.pieces) for text, count in self.counts.items()}
        return {text: self.skipped.get(text, 0) + begun.get(text, 0) for text in {**self.skipped, **begun}}

    def passes(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Return how many times over each text is read, given how many text blocks it has."""
        return {text: count / (sizes[text] * self.pieces) for text, count in self.counts.items()}

    def told(self, sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """Say what share of the sequences each text is and, where sizes are known, how many times over it is read."""
        passes = self.passes(sizes) if sizes else {}
        return {
            text: {"share": share, **({"passes": passes[text]} if text in passes else {})}
            for text, share in self.shares.items()
        }

    def order(self, sizes: Mapping[str, int], *, seed: int) -> np.ndarray:
        """Return the sequences to read, as places in the texts' cut blocks, laid one after the other as in `shares`.

        Every text goes on in its own endless order where earlier stages stopped, and is spread evenly over the stage,
        so that each batch holds its share of it. int64 `[sequences]`.
        """
        places, moments, first = [], [], 0
        for text, count in self.counts.items():
            start = self.skipped.get(text, 0)
            blocks = training_order(sizes[text], start, -(-count // self.pieces), seed=seed)
            own = (blocks[:, None] * self.pieces + np.arange(self.pieces)).flatten()[:count]
            if self.pieces > 1:  # neighbours in the text would make a batch of one subject
                own = np.random.default_rng([seed, start, self.pieces]).permutation(own)
            places.append(first + own)
            moments.append((np.arange(count) + 0.5) / max(count, 1))
            first += sizes[text] * self.pieces
        return np.concatenate(places)[np.argsort(np.concatenate(moments), kind="stable")]


def training_order(num_blocks: int, start: int, count: int, *, seed: int) -> np.ndarray:
    """Return which block each of the positions start … start + count - 1 of the endless training order holds.

    Every epoch is a permutation drawn from (seed, epoch). int64 `[count]`.
    """
    epochs = range(start // num_blocks, (start + max(count, 1) - 1) // num_blocks + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_blocks) for epoch in epochs])
    first = start - epochs.start * num_blocks
    return order[first : first + count]


def cut(blocks: datasets.Dataset, pieces: int) -> datasets.Dataset:
    """Cut every text block into `pieces` of equal length, in their order; the first text token of each is context."""
    if pieces == 1:
        return blocks
    key = Hasher.hash([blocks._fingerprint, pieces, 2])
    return cached(lambda: _pieces(blocks, pieces), blocks.features, key=key)


def _pieces(blocks: datasets.Dataset, pieces: int) -> Iterator[dict[str, Any]]:
    for batch in blocks.with_format("numpy").iter(batch_size=1024):
        rows = batch["input_ids"]
        length = rows.shape[1] // pieces
        yield rows_of(rows[:, : pieces * length].reshape(-1, length))
