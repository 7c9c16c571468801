"""Text in, blocks of text-token ids out: hold-out by document, tokenizers, packing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import DataError, TokenizerError
from ..training.recipe import DataSection
from .sources import Documents, first_line, load_documents

END_OF_TEXT = "<|endoftext|>"


def hold_out(documents: Documents, *, fraction: float, max_bytes: int | None) -> tuple[Documents, datasets.Dataset]:
    """Split into training and validation documents by the hash of their text; equal texts stay on one side.

    From a dataset, the non-empty documents of lowest hash that make up at most `fraction` of the bytes are held out,
    and at least one: the first, or, where that is more than half of the text, the shortest. From a stream, those whose
    hash, read as a number in [0, 1), is below `fraction`. The validation set ends before the document that would exceed
    `max_bytes`, but has at least one; the rest stays out of training.

    Raises:
        DataError: fewer than two distinct documents, or a stream without any to hold out.
    """
    if isinstance(documents, datasets.IterableDataset):
        held = list(_take_bytes((text for text in _texts(documents) if _hash(text) < fraction), max_bytes))
        if not held:
            raise DataError("no document of the stream was held out; raise data.validation_fraction")
        train = documents.filter(_is_training, fn_kwargs={"fraction": fraction})
        return train, datasets.Dataset.from_dict({"text": held})
    hashes = np.array([_hash(text) for text in documents["text"]])
    sizes = np.array([len(text.encode()) for text in documents["text"]])
    distinct, inverse = np.unique(hashes[sizes > 0], return_inverse=True)
    if len(distinct) < 2:
        raise DataError(
            f"the data holds {len(distinct)} distinct document, and validation text must be another document than "
            "training text; give more files, or held-out text as data.validation_source"
        )
    weights = np.bincount(inverse, weights=sizes[sizes > 0])
    count = max(1, int(np.searchsorted(np.cumsum(weights)[:-1], fraction * sizes.sum(), side="right")))
    chosen = distinct[:count] if weights[:count].sum() <= weights.sum() / 2 else distinct[[weights.argmin()]]
    is_held = np.isin(hashes, chosen)
    order = np.flatnonzero(is_held)
    order = order[np.argsort(hashes[order], kind="stable")]
    if max_bytes is not None:
        order = order[: max(1, int(np.searchsorted(np.cumsum(sizes[order]), max_bytes, side="right")))]
    return documents.select(np.flatnonzero(~is_held)), documents.select(order)


def make_tokenizer(spec: str, documents: Documents) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `spec` names; ours give every text back exactly, all have an end-of-text token.

    Args:
        spec: "bpe:N" (byte-level BPE of N entries trained on `documents`; fewer where the text has no more to merge),
            "bytes" (257 entries), or what `open_tokenizer` opens.
        documents: the training text.

    Raises:
        TokenizerError: a spec that is none of these, or a tokenizer without an end-of-text token.
    """
    kind, _, size = spec.partition(":")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if spec == "bytes" or (kind == "bpe" and size):
        if spec == "bytes":
            vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, *alphabet])}
            tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        else:
            tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "bpe":
            if not size.isdecimal() or int(size) <= len(alphabet):
                raise TokenizerError(
                    f'tokenizer {spec!r}: write "bpe:N" with N above {len(alphabet)}, such as bpe:4096'
                )
            trainer = trainers.BpeTrainer(
                vocab_size=int(size), special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
            )
            tokenizer.train_from_iterator(_texts(documents), trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END_OF_TEXT,
            bos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
        )
    return open_tokenizer(spec)


def open_tokenizer(spec: str | Path) -> PreTrainedTokenizerBase:
    """Open an existing tokenizer: a Hugging Face name, a folder, or a single tokenizer.json.

    A bare tokenizer.json does not say which entry ends a text; "<|endoftext|>" does, GPT-NeoX's name for it.

    Raises:
        TokenizerError: there is none, or it has no end-of-text token.
    """
    try:
        if Path(spec).is_file():
            loaded: Any = PreTrainedTokenizerFast(tokenizer_file=str(spec))
            if END_OF_TEXT in loaded.get_vocab():
                loaded.add_special_tokens({"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT})
        else:
            loaded = AutoTokenizer.from_pretrained(spec)
    except Exception as error:  # a damaged file can fail in as many ways as a hub; all mean there is no tokenizer
        raise TokenizerError(
            f'tokenizer {str(spec)!r} is neither "bytes", "bpe:N", a tokenizer.json, a folder with a tokenizer nor a '
            f"name that could be downloaded: {first_line(error)}"
        ) from error
    if loaded.eos_token_id is None:
        raise TokenizerError(
            f"tokenizer {str(spec)!r} has no end-of-text token, which separates documents; choose another"
        )
    return loaded


def pack(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, block_length: int, keep_tail: bool = False
) -> Documents:
    """Tokenise documents once and cut them into blocks `{"input_ids": [block_length], "labels": [block_length]}`.

    The stream is EOS, document, EOS, document, …, EOS; neighbouring blocks share one text token, so that every one but
    the first is predicted exactly once. A dataset's blocks are memory-mapped from the cache of `datasets`, found again
    by what the text and tokenizer are; a stream's are made on the fly, and its errors raised then.

    Args:
        documents: rows of {"text"}.
        tokenizer: any with an end-of-text token.
        block_length: text tokens in a block.
        keep_tail: fill the last block up (labels -100) instead of leaving its rest out.

    Raises:
        DataError: less text than one block.
    """
    arguments = {"documents": documents, "tokenizer": tokenizer, "block_length": block_length, "keep_tail": keep_tail}
    if isinstance(documents, datasets.IterableDataset):
        return datasets.IterableDataset.from_generator(_blocks, gen_kwargs=arguments)
    identity = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    key = Hasher.hash([documents._fingerprint, identity, tokenizer.eos_token_id, block_length, keep_tail, 1])
    cache = str(datasets.config.HF_DATASETS_CACHE / "tokenformer")
    try:
        return datasets.Dataset.from_generator(
            _blocks, gen_kwargs=arguments, fingerprint=key, features=_FEATURES, cache_dir=cache
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):
            raise DataError(f"could not keep the tokenised text in {cache}: {error.__cause__}") from error
        raise


def training_order(num_blocks: int, start: int, count: int, *, seed: int) -> np.ndarray:
    """Return which block each of the positions start … start + count - 1 of the endless training order holds.

    Every epoch is a permutation drawn from (seed, epoch). int64 `[count]`.
    """
    epochs = range(start // num_blocks, (start + max(count, 1) - 1) // num_blocks + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_blocks) for epoch in epochs])
    first = start - epochs.start * num_blocks
    return order[first : first + count]


def sample_blocks(
    source: str, tokenizer: PreTrainedTokenizerBase, *, block_length: int, text_tokens: int = 65_536
) -> datasets.Dataset:
    """Return about `text_tokens` of the text of `source`, from all over it, packed into blocks: to judge a model by.

    Raises:
        DataError: there is no such text, it cannot be read, or it is shorter than a block.
    """
    documents = load_documents(source, text_column="text", split="train", streaming=False)
    order = np.random.default_rng(0).permutation(len(documents))
    sizes = np.cumsum([len(documents[int(i)]["text"]) for i in order[: text_tokens // 8]])
    enough = int(np.searchsorted(sizes, 16 * text_tokens)) + 1
    blocks = pack(documents.select(order[:enough].tolist()), tokenizer, block_length=block_length)
    step = max(1, len(blocks) * (block_length - 1) // text_tokens)
    return blocks.select(range(0, len(blocks), step))


def utf8_bytes(documents: Iterable[Any]) -> int:
    """Bytes of text in rows of {"text"}."""
    return sum(len(row["text"].encode()) for row in documents)


@dataclass(frozen=True)
class TextData:
    """Text ready for training: packed blocks, the tokenizer, and `facts` for logs and lineage."""

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
    """Do all of the above for a recipe's `data` section.

    The tokenizer is `tokenizer` where given, else the one in `tokenizer_folder`, else made from the training text and
    kept there.

    Raises:
        DataError, TokenizerError: as the functions above.
    """
    column = section.text_column
    train = load_documents(section.source, text_column=column, split=section.split, streaming=section.streaming)
    if section.validation_source is not None:
        validation = load_documents(section.validation_source, text_column=column, split=section.validation_split)
        train = train.filter(_is_another, fn_kwargs={"held": {_hash(text) for text in validation["text"] if text}})
        sizes = np.cumsum([len(text.encode()) for text in validation["text"]])
        limit = sizes[-1] if section.validation_bytes is None else section.validation_bytes
        validation = validation.select(range(max(1, int(np.searchsorted(sizes, limit, side="right")))))
        if not section.streaming and not any(train["text"]):
            raise DataError("data.source holds no text that data.validation_source does not: name other documents")
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
    facts: dict[str, Any] = {
        "source": section.source,
        "tokenizer": name,
        "vocabulary": len(tokenizer),
        "validation_documents": len(validation),
        "validation_bytes": validation_bytes,
    }
    if not section.streaming:
        facts |= {"training_documents": len(train), "training_text_tokens": len(train_blocks) * (sequence_length - 1)}
    return TextData(train_blocks, validation, validation_blocks, validation_bytes, tokenizer, facts)


def halve_validation(data: TextData, *, sequence_length: int) -> tuple[TextData, TextData]:
    """Return `data` twice, each with about half of the held-out documents: one to choose by, one to report.

    Raises:
        DataError: there is one held-out document only.
    """
    documents = data.validation_documents
    if len(documents) < 2:
        raise DataError(
            f"{len(documents)} document is held out, and one to tune on must be another than one to report on; raise "
            "data.validation_bytes or data.validation_fraction, or give text of more documents"
        )
    sizes = np.cumsum([len(text.encode()) for text in documents["text"]])
    middle = int(np.clip(np.searchsorted(sizes, sizes[-1] / 2) + 1, 1, len(documents) - 1))
    halves = [documents.select(range(middle)), documents.select(range(middle, len(documents)))]
    first, second = (
        replace(
            data,
            validation_documents=half,
            validation_blocks=pack(half, data.tokenizer, block_length=sequence_length, keep_tail=True),
            validation_bytes=utf8_bytes(half),
        )
        for half in halves
    )
    return first, second


_FEATURES = datasets.Features({c: datasets.List(datasets.Value("int32")) for c in ("input_ids", "labels")})


def _texts(documents: Documents) -> Iterator[str]:
    """Yield the text of each document, in batches underneath; what only reading a stream can show raises here."""
    try:
        for batch in documents.iter(batch_size=64):
            if None in batch["text"]:
                raise DataError("a row of the text stream has no text; leave such rows out")
            yield from batch["text"]
    except UnicodeDecodeError as error:
        raise DataError(f"a file of the text stream is not UTF-8: {error}; convert it or leave it out") from error


def _hash(text: str) -> float:
    """Return a number in [0, 1), or 1 for an empty text, which is never held out: there is nothing to measure in it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 if text else 1.0


def _is_training(row: dict[str, str], fraction: float) -> bool:
    return _hash(row["text"]) >= fraction


def _is_another(row: dict[str, str], held: set[float]) -> bool:
    return _hash(row["text"]) not in held


def _take_bytes(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    taken = 0
    for text in texts:
        size = len(text.encode())
        if max_bytes is not None and taken and taken + size > max_bytes:
            return
        yield text
        taken += size


def _blocks(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, block_length: int, keep_tail: bool
) -> Iterator[dict[str, list[int]]]:
    eos = tokenizer.eos_token_id
    stream = [eos]
    made = 0
    texts = _texts(documents)
    while batch := list(itertools.islice(texts, 64)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, eos]
        start = 0
        while start + block_length <= len(stream):
            block = stream[start : start + block_length]
            yield {"input_ids": block, "labels": block}
            start += block_length - 1
            made += 1
        stream = stream[start:]
    if keep_tail and len(stream) > 1:
        missing = block_length - len(stream)
        yield {"input_ids": stream + [eos] * missing, "labels": stream + [-100] * missing}
    elif not made:
        raise DataError(
            f"the text is shorter than one block of {block_length} text tokens; give more than these {len(stream)}, or "
            "shorter blocks"
        )
