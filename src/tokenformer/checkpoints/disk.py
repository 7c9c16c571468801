"""What a disk refuses, as our error, and what it must have kept before anything else is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, TokenformerError

# What libraries say that have errors of their own for it: Rust's, and torch's, which counts what it could not write.
_REFUSALS = ("os error", "file write", "unexpected pos", "pytorchstreamwriter", "iostream error")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what Python, safetensors, tokenizers and torch raise when a disk refuses (full, no permission) into ours."""
    try:
        yield
    except TokenformerError:
        raise
    except Exception as error:
        said = str(error)
        if isinstance(error, OSError) or any(words in said.lower() for words in _REFUSALS):
            raise CheckpointError(f"could not write {path}: {said}; what was there before is untouched") from error
        raise


def sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder, before anything else is written."""
    windows = not hasattr(os, "O_DIRECTORY")
    if windows and path.is_dir():  # cannot be opened there, and need not be
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
