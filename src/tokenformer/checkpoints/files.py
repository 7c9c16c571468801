"""Writing files and folders whole or not at all, and digests of them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import CheckpointError


def files_digest(files: Iterable[Path]) -> str:
    """Return the sha256 over the contents of `files`, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        add_file(digest, file)
    return digest.hexdigest()


def add_file(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)


@contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder that becomes `path` when the block ends well and vanishes when it does not.

    Raises:
        CheckpointError: `path` exists and not `force`, or writing failed.
    """
    check_target(path, force=force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = _replaced(path)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            sync(temporary)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)  # of a process killed after its two renames
                path.rename(replaced)
            temporary.rename(path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(path)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what Python, safetensors and torch raise when a disk refuses (full, no permission) into CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) or "os error" in str(error).lower() or "file write" in str(error):
            raise CheckpointError(f"could not write {path}: {error}; what was there before is untouched") from error
        raise


def check_target(path: Path, *, force: bool) -> None:
    """Raise CheckpointError if `path` exists and `force` is not set: asked before long work, not after."""
    if not path.name:
        raise CheckpointError(f"{path} cannot be replaced as a whole; name a folder in it")
    recover(path)
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists already; choose another name, or --force to replace it")
    ours = ("config.json", "recipe.yaml")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not any((path / f).exists() for f in ours)):
        raise CheckpointError(
            f"{path} exists and is neither a checkpoint nor a run: it is not ours to replace; choose another name"
        )


def recover(path: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    if not path.exists() and _replaced(path).exists():
        _replaced(path).rename(path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
