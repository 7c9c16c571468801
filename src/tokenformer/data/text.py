"""Text in, text blocks out: what is held out, document by document, and what is known of the whole."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import DataError
from ..units import counted
from .blocks import pack, utf8_bytes
from .section import DataSection, TextSection, Use, texts_in
from .sources import Documents, load_documents, text_batches, text_sizes, texts_of
from .stream import BlockStream
from .tokenizer import make_tokenizer, vocabulary_size

# How hard each document is for a checkpoint, whatever the unit.
Difficulty: TypeAlias = Callable[[str, datasets.Dataset], np.ndarray]


def hold_out(documents: Documents, *, fraction: float, max_bytes: int | None) -> tuple[Documents, datasets.Dataset]:
    """Split into training and validation documents by the hash of their text; equal texts stay on one side.

    From a dataset, the non-empty documents of lowest hash that make up at most `fraction` of the bytes are held out,
    and at least one: the first, or, where that is more than half of the text, the shortest. From a stream, those whose
    hash, read as a number in [0, 1), is below `fraction`. The validation set ends before the document that would exceed
    `max_bytes`, but has at least one; the rest stays out of training. Empty documents are in neither.

    Raises:
        DataError: fewer than two distinct documents, or a stream without any to hold out.
    """
    if isinstance(documents, datasets.IterableDataset):
        held = list(_take_bytes((text for text in texts_of(documents) if _hash(text) < fraction), max_bytes))
        if not held:
            raise DataError("no document of the stream was held out; raise data.validation_fraction")
        train = documents.filter(_is_training, fn_kwargs={"fraction": fraction})
        return train, datasets.Dataset.from_dict({"text": held})
    hashes, sizes = _hashes(documents), text_sizes(documents)
    distinct, inverse = np.unique(hashes[sizes > 0], return_inverse=True)
    if len(distinct) < 2:
        raise DataError(
            f"the data holds {counted(len(distinct), 'distinct document')}, and validation text must be another "
            "document than training text; give more files, or held-out text as data.validation_source"
        )
    weights = np.bincount(inverse, weights=sizes[sizes > 0])
    count = max(1, int(np.searchsorted(np.cumsum(weights)[:-1], fraction * sizes.sum(), side="right")))
    chosen = distinct[:count] if weights[:count].sum() <= weights.sum() / 2 else distinct[[weights.argmin()]]
    is_held = np.isin(hashes, chosen)
    order = np.flatnonzero(is_held)
    order = order[np.argsort(hashes[order], kind="stable")]
    if max_bytes is not None:
        order = order[: max(1, int(np.searchsorted(np.cumsum(sizes[order]), max_bytes, side="right")))]
    return documents.select(np.flatnonzero(~is_held & (sizes > 0))), documents.select(order)


@dataclass(frozen=True)
class HeldOut:
    """Held-out text: its documents, their text blocks and their UTF-8 bytes."""

    documents: datasets.Dataset
    blocks: datasets.Dataset
    num_bytes: int

    @classmethod
    def of(cls, documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, block_length: int) -> HeldOut:
        """Pack documents; none of their text is left out."""
        blocks = pack(documents, tokenizer, block_length=block_length, keep_tail=True)
        return cls(documents, blocks, utf8_bytes(documents))


@dataclass(frozen=True)
class TextData:
    """Text ready for training.

    Attributes:
        train_blocks: text blocks by `Use.key`; of a stream, those of this process.
        validation: held-out text by the name of the text.
        tokenizer: of all.
        facts: for logs and lineage.
    """

    train_blocks: dict[str, datasets.Dataset | BlockStream]
    validation: dict[str, HeldOut]
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


def prepare(
    section: DataSection,
    *,
    sequence_length: int,
    tokenizer_folder: Path,
    others: Sequence[TextSection | None] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    difficulty: Difficulty | None = None,
    process: tuple[int, int] = (0, 1),
) -> TextData:
    """Read, hold out and pack what a recipe's `data` section says, with its tokenizer.

    The tokenizer is `tokenizer` where given, else the one in `tokenizer_folder`, else made from the training text of
    `section` and kept there.

    Args:
        section: the recipe's `data`.
        sequence_length: text tokens in a text block.
        tokenizer_folder: where the tokenizer is kept.
        others: what stages read in its place. No text trains on what another has held out.
        tokenizer: a checkpoint's own.
        difficulty: says how hard documents are for a checkpoint; needed where a share is `sorted_by` one.
        process: which of how many processes this is, each of which trains on a share of a stream.

    Raises:
        DataError: as `load_documents`, `hold_out` and `pack`. TokenizerError: as `make_tokenizer`.
    """
    uses = texts_in(section, others)
    rows = {use.name: _load(use, section) for use in uses.values()}
    parts = {use.name: _parts(rows[use.name], use, section) for use in uses.values()}
    if len(parts) > 1:
        held = {number for _, validation in parts.values() for number in _hashes(validation).tolist()}
        parts = {name: (_without(train, held), validation) for name, (train, validation) in parts.items()}
    train = {key: _share(parts[use.name][0], use, difficulty) for key, use in uses.items()}
    name = section.tokenizer if tokenizer is None else "the checkpoint's own"
    if tokenizer is None and tokenizer_folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    elif tokenizer is None:
        own = [train[key] for key in section.shares(section)]
        tokenizer = make_tokenizer(section.tokenizer, own[0] if len(own) == 1 else datasets.concatenate_datasets(own))
        temporary = tokenizer_folder.with_name(f".{tokenizer_folder.name}.tmp")
        tokenizer.save_pretrained(temporary)
        temporary.rename(tokenizer_folder)
    blocks = {key: _packed(key, part, tokenizer, sequence_length, process) for key, part in train.items()}
    validation = {name: HeldOut.of(part, tokenizer, block_length=sequence_length) for name, (_, part) in parts.items()}
    facts = {key: _facts(use, rows[use.name], train[key], blocks[key]) for key, use in uses.items()}
    whole = {
        **(next(iter(facts.values())) if len(facts) == 1 else {"source": list(facts), "texts": facts}),
        "tokenizer": name,
        "vocabulary": vocabulary_size(tokenizer),
        "validation_documents": sum(len(held.documents) for held in validation.values()),
        "validation_bytes": sum(held.num_bytes for held in validation.values()),
        "text_sha256": text_sha256(*train.values(), *(held.documents for held in validation.values())),
    }
    return TextData(blocks, validation, tokenizer, whole)


def _load(use: Use, section: DataSection) -> Documents:
    source = use.source[0] if len(use.source) == 1 else use.source
    return load_documents(source, text_column=use.text_column, split=use.split, streaming=section.streaming)


def _parts(documents: Documents, use: Use, section: DataSection) -> tuple[Documents, datasets.Dataset]:
    """Return what a text trains on and what it validates on."""
    if section.validation_source is None or use not in section.uses(section):
        return hold_out(documents, fraction=section.validation_fraction, max_bytes=section.validation_bytes)
    validation = load_documents(section.validation_source, text_column=use.text_column, split=section.validation_split)
    train = _without(documents, set(_hashes(validation).tolist()))
    sizes = text_sizes(validation)
    with_text = np.flatnonzero(sizes)
    if section.validation_bytes is not None:
        ends = np.cumsum(sizes[with_text])
        with_text = with_text[: max(1, int(np.searchsorted(ends, section.validation_bytes, side="right")))]
    return train, validation.select(with_text)


def _without(train: Documents, held: set[float]) -> Documents:
    """Take every text that is held out anywhere out of training documents."""
    if isinstance(train, datasets.IterableDataset):
        return train.filter(_is_another, fn_kwargs={"held": held})
    train = train.select(np.flatnonzero((text_sizes(train) > 0) & ~np.isin(_hashes(train), list(held))))
    if not len(train):
        raise DataError(
            "every document of data.source is held out by data.validation_source, or by another text: name others"
        )
    return train


def _share(train: Documents, use: Use, difficulty: Difficulty | None) -> Documents:
    """Return the documents of a share, in the text's order; at least one."""
    if use.span == (0, 1) or isinstance(train, datasets.IterableDataset):
        return train
    if use.sorted_by is None:
        ranks = _hashes(train, "share ")  # the hash of the text alone tells what is held out
    else:
        assert difficulty is not None
        ranks = difficulty(use.sorted_by, train)
    low, high = (round(bound * len(train)) for bound in use.span)
    chosen = np.argsort(ranks, kind="stable")[min(low, len(train) - 1) : max(low + 1, high)]
    return train.select(np.sort(chosen))


def _packed(
    key: str, train: Documents, tokenizer: PreTrainedTokenizerBase, length: int, process: tuple[int, int]
) -> datasets.Dataset | BlockStream:
    try:
        if isinstance(train, datasets.IterableDataset):
            return BlockStream(train, tokenizer, block_length=length).share(*process)
        return pack(train, tokenizer, block_length=length)
    except DataError as error:
        raise DataError(f"{key!r}: {error}") from error


def _facts(use: Use, documents: Documents, train: Documents, blocks: datasets.Dataset | BlockStream) -> dict[str, Any]:
    """Say of a text what logs and lineage say; of a stream only where it comes from."""
    facts: dict[str, Any] = {"source": use.source[0] if len(use.source) == 1 else list(use.source)}
    if isinstance(documents, datasets.Dataset) and isinstance(blocks, datasets.Dataset):
        facts["rows_without_text"] = int((text_sizes(documents) == 0).sum())
        facts["training_documents"] = len(train)
        facts["training_text_tokens"] = len(blocks) * (len(blocks[0]["input_ids"]) - 1)
    return facts


def text_sha256(*parts: Documents) -> str:
    """Identify text by its documents and their order, whatever files they lie in: 64 hexadecimal digits.

    Of a stream only the first 1,024 documents are read.
    """
    whole = hashlib.sha256()
    for documents in parts:
        limit = 1024 if isinstance(documents, datasets.IterableDataset) else None
        for text in itertools.islice(texts_of(documents), limit):
            whole.update(hashlib.sha256(text.encode()).digest())
        whole.update(b"end of a part")
    return whole.hexdigest()


def _hash(text: str) -> float:
    """Return a number in [0, 1), or 1 for an empty text, which is never held out: there is nothing to measure in it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 if text else 1.0


def _hashes(documents: datasets.Dataset, prefix: str = "") -> np.ndarray:
    """Return the hash of each document, behind a prefix. float64 `[documents]`."""
    texts = itertools.chain.from_iterable(text_batches(documents))
    return np.fromiter((_hash(prefix + text) for text in texts), dtype=np.float64, count=len(documents))


def _is_training(row: dict[str, str], fraction: float) -> bool:
    return bool(row["text"]) and _hash(row["text"]) >= fraction


def _is_another(row: dict[str, str], held: set[float]) -> bool:
    return bool(row["text"]) and _hash(row["text"]) not in held


def _take_bytes(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    taken = 0
    for text in texts:
        size = len(text.encode())
        if max_bytes is not None and taken and taken + size > max_bytes:
            return
        yield text
        taken += size
