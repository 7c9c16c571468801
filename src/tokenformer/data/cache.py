"""What was made of text is kept on the disk, memory-mapped, and found again by what it was made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow
from filelock import FileLock

from ..errors import DataError


def cached(
    columns: Callable[[], Iterable[Mapping[str, Any]]], features: datasets.Features, *, key: str
) -> datasets.Dataset:
    """Return rows as a dataset in the cache of `datasets`; whoever asks for the same ones at the same time waits.

    Args:
        columns: makes the rows, some at a time: what each column holds of them, as a list or an Arrow array.
        features: the columns.
        key: identifies the rows: equal keys are read back and not made again.

    Raises:
        DataError: the cache cannot be written, or whatever of its own `columns` raises.
    """
    file = cache_folder() / f"{key}.arrow"
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_suffix(".lock")):
                if not file.exists():
                    for left in file.parent.glob(f"{key}.*.tmp"):  # of killed processes: whoever lives holds the lock
                        left.unlink()
                    _write(file, columns(), features.arrow_schema)
        rows = datasets.Dataset.from_file(str(file))
    except OSError as error:
        raise DataError(
            f"could not keep text in {file.parent}: {error}; make room, or set HF_DATASETS_CACHE to another folder"
        ) from error
    rows._fingerprint = key
    return rows


def cache_folder() -> Path:
    """Return where the cache of `datasets` holds what is ours."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "tokenformer"


@contextmanager
def written_whole(file: Path) -> Iterator[BinaryIO]:
    """Give a temporary file, to be written, that becomes `file` when the block ends well.

    What a killed process leaves is for whoever knows that nobody else writes there to remove: what it has started may
    live on for a moment, and write.
    """
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: Path, columns: Iterable[Mapping[str, Any]], schema: pyarrow.Schema) -> None:
    with written_whole(file) as stream, pyarrow.ipc.new_stream(stream, schema) as writer:
        for some in columns:
            writer.write_batch(pyarrow.RecordBatch.from_pydict(some, schema=schema))
