"""Text in, text blocks out: what is held out, document by document, and what is known of the whole."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pydantic import Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import DataError
from ..sections import Section
from ..units import counted
from .blocks import pack, utf8_bytes
from .sources import Documents, load_documents, texts_of
from .tokenizer import make_tokenizer, vocabulary_size


class DataSection(Section):
    """The text: where from, how held out, how tokenised."""

    source: str | list[str]
    """"shakespeare", "python-stdlib", a file, folder, glob, .jsonl, .parquet, a dataset name, or a list."""
    validation_source: str | list[str] | None = None
    """Text to validate on. Default: documents held out of `source`."""
    validation_split: str = "validation"
    """Split of a named dataset given as `validation_source`."""
    text_column: str = "text"
    """Column that holds the text in JSONL, Parquet and datasets."""
    split: str = "train"
    """Split of a named dataset."""
    validation_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of the text (in UTF-8 bytes) whose documents are held out for validation."""
    validation_bytes: int | None = Field(262_144, gt=0)
    """Most held-out text to evaluate on, in UTF-8 bytes, whole documents (at least one); null for all of it."""
    tokenizer: str = "bpe:4096"
    """"bpe:N" (byte-level BPE trained on the training text), "bytes", or a Hugging Face name or folder. A checkpoint's
    own tokenizer goes before it."""
    streaming: bool = False
    """Read and tokenise on the fly instead of caching: for corpora larger than the disk."""


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
    hashes = np.array([_hash(text) for text in documents["text"]])
    sizes = np.array([len(text.encode()) for text in documents["text"]])
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
class TextData:
    """Text ready for training: text blocks, the tokenizer, and `facts` for logs and lineage."""

    train_blocks: Documents
    validation_documents: datasets.Dataset
    validation_blocks: datasets.Dataset
    validation_bytes: int
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


def prepare(
    section: DataSection,
    *,
    sequence_length: int,
    tokenizer_folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TextData:
    """Read, hold out and pack what a recipe's `data` section says, with its tokenizer.

    The tokenizer is `tokenizer` where given, else the one in `tokenizer_folder`, else made from the training text and
    kept there.

    Raises:
        DataError: as `load_documents`, `hold_out` and `pack`. TokenizerError: as `make_tokenizer`.
    """
    column = section.text_column
    train = load_documents(section.source, text_column=column, split=section.split, streaming=section.streaming)
    facts: dict[str, Any] = {"source": section.source}
    if not section.streaming:
        facts["rows_without_text"] = sum(not text for text in train["text"])
    if section.validation_source is not None:
        validation = load_documents(section.validation_source, text_column=column, split=section.validation_split)
        train, validation = _apart(train, validation, max_bytes=section.validation_bytes)
    else:
        train, validation = hold_out(train, fraction=section.validation_fraction, max_bytes=section.validation_bytes)
    name = section.tokenizer if tokenizer is None else "the checkpoint's own"
    if tokenizer is None and tokenizer_folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    elif tokenizer is None:
        tokenizer = make_tokenizer(section.tokenizer, train)
        temporary = tokenizer_folder.with_name(f".{tokenizer_folder.name}.tmp")
        tokenizer.save_pretrained(temporary)
        temporary.rename(tokenizer_folder)
    train_blocks = pack(train, tokenizer, block_length=sequence_length)
    validation_blocks = pack(validation, tokenizer, block_length=sequence_length, keep_tail=True)
    validation_bytes = utf8_bytes(validation)
    facts |= {
        "tokenizer": name,
        "vocabulary": vocabulary_size(tokenizer),
        "validation_documents": len(validation),
        "validation_bytes": validation_bytes,
        "text_sha256": text_sha256(train, validation),
    }
    if not section.streaming:
        facts |= {"training_documents": len(train), "training_text_tokens": len(train_blocks) * (sequence_length - 1)}
    return TextData(train_blocks, validation, validation_blocks, validation_bytes, tokenizer, facts)


def _apart(
    train: Documents, validation: datasets.Dataset, *, max_bytes: int | None
) -> tuple[Documents, datasets.Dataset]:
    """Take every validation text out of the training documents, and the first `max_bytes` of them to validate on."""
    held = {_hash(text) for text in validation["text"]}
    sizes = np.array([len(text.encode()) for text in validation["text"]])
    with_text = np.flatnonzero(sizes)
    if max_bytes is not None:
        with_text = with_text[: max(1, int(np.searchsorted(np.cumsum(sizes[with_text]), max_bytes, side="right")))]
    validation = validation.select(with_text)
    if isinstance(train, datasets.IterableDataset):
        return train.filter(_is_another, fn_kwargs={"held": held}), validation
    train = train.select([i for i, text in enumerate(train["text"]) if text and _hash(text) not in held])
    if not len(train):
        raise DataError("data.source holds no text that data.validation_source does not: name other documents")
    return train, validation


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
