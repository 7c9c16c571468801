"""What a disk refuses, as our error, and what it must have kept before anything else is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what Python, safetensors and torch raise when a disk refuses (full, no permission) into CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) or "os error" in str(error).lower() or "file write" in str(error):
            raise CheckpointError(f"could not write {path}: {error}; what was there before is untouched") from error
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
