"""The texts in a file: plain text, JSON rows or Parquet; of a row only the column that holds the text."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from fsspec.compression import compr
from pyarrow.parquet import ParquetFile

from ..errors import DataError, first_line

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java", ".js")
JSON_SUFFIXES = (".jsonl", ".json")
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


def kind_of(file: Path) -> str | None:
    """Return "text", "json" or "parquet" by the suffix, whatever its case and compression; None for every other."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "json" if last in JSON_SUFFIXES else "text" if last in TEXT_SUFFIXES else None


def read_texts(file: Path, column: str) -> Iterator[str]:
    """Yield the texts of a file, "" for a row that has none.

    A file of unknown suffix is one text; of ".jsonl" and ".json" each line, or each item of a list, is a row.

    Raises:
        DataError: what is damaged, is not UTF-8, or has no such column, with the file and the row.
    """
    kind = kind_of(file) or "text"
    rows = {"text": _read_text, "json": _read_json, "parquet": _read_parquet}[kind](file, column)
    number = 0

    def row(error: Exception) -> str:
        after_reading = isinstance(error, UnicodeEncodeError)
        return f", row {number if after_reading else number + 1}," if kind == "json" else ""

    try:
        for text in rows:
            number += 1
            text.encode()
            yield text
    except UnicodeError as error:
        raise DataError(f"{file}{row(error)} is not UTF-8 text: {error}; convert it or leave it out") from error
    except DataError:
        raise
    except Exception as error:  # every codec and format has errors of its own; all mean that the file is damaged
        raise DataError(
            f"{file}{row(error)} cannot be read as {kind}: {first_line(error)}; mend it or leave it out"
        ) from error


@contextlib.contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    compression = _COMPRESSIONS.get(file.suffix.lower())
    if compression not in (None, *compr):
        raise DataError(f"{file} is compressed by {compression}, which needs a package: pip install zstandard")
    with open(file, "rb") as packed, compr[compression](packed, mode="rb") as stream:
        yield io.BufferedReader(stream)


def _read_text(file: Path, column: str) -> Iterator[str]:
    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
        yield text.read()


def _read_json(file: Path, column: str) -> Iterator[str]:
    with _open(file) as stream:
        yield from _column_of(_json_rows(stream), file, column)


def _json_rows(stream: BinaryIO) -> Iterator[Any]:
    for number, line in enumerate(stream):
        text = line.decode("utf-8-sig")
        if number == 0 and text.lstrip().startswith("["):
            yield from json.loads(text + stream.read().decode("utf-8"))
        elif text.strip():
            yield json.loads(text)


def _column_of(rows: Iterable[Any], file: Path, column: str) -> Iterator[str]:
    others: dict[str, None] = {}
    has_column = False
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {number} holds {type(row).__name__}, not an object with a field {column!r}")
        if column in row:
            has_column = True
        elif not has_column:
            others |= dict.fromkeys(row)
        text = row.get(column)
        if not isinstance(text, str | None):
            raise DataError(f"{file}, row {number}: {column!r} holds {type(text).__name__}, not text")
        yield text or ""
    if others and not has_column:
        raise no_column(str(file), column, list(others))


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    with ParquetFile(file) as parquet:
        if not parquet.metadata.num_rows:
            return
        schema = parquet.schema_arrow
        if column not in schema.names:
            raise no_column(str(file), column, schema.names)
        kind = schema.field(column).type
        if not is_text(kind.value_type if pyarrow.types.is_dictionary(kind) else kind):
            raise DataError(f"{file}: column {column!r} holds {kind}, not text; name another as data.text_column")
        for batch in parquet.iter_batches(batch_size=1024, columns=[column]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def is_text(kind: pyarrow.DataType) -> bool:
    """Tell whether an Arrow type is one of its types of text."""
    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def no_column(where: str, column: str, columns: list[str]) -> DataError:
    """Return the error that names what there is in place of a column."""
    near = difflib.get_close_matches(column, columns, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; name the one that holds the text as data.text_column"
    return DataError(f"{where!r} has no column {column!r}, only {', '.join(columns)}{hint}")
