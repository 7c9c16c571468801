"""Writing files and folders whole or not at all, and digests of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .disk import disk_errors as disk_errors
from .disk import sync
from .lock import not_trained_in
from .temporary import put_back, temporary_folder

_SWAPS = 100  # readers that may put the old folder back in a row while a writer replaces it


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
def replacing_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary file, to be written, that becomes the file `path` when the block ends well.

    It has the name of `path`, in a folder beside it. Where `path` is a symbolic link, the file that it points to is
    replaced.

    Raises:
        CheckpointError: `path` is a folder, or exists and not `force`, or writing failed.
    """
    check_file(path, force=force)
    target = _target(path)
    with disk_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target) as place:
            new = place / "new" / target.name
            yield new
            sync(new)
            check_file(path, force=force)  # another process may have come first
            new.replace(target)
            sync(target.parent)


@contextmanager
def replacing_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well and vanishes when it does not.

    It has the name of `path`, in a folder beside it. Where `path` is a symbolic link, the folder that it points to is
    replaced.

    Raises:
        CheckpointError: `path` exists and not `force`, or is not ours to replace, or is being trained in by another
            process, or writing failed.
    """
    check_target(path, force=force)
    target = _target(path)
    with disk_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with not_trained_in(target):
            pass  # told before the work as well as after it
        with temporary_folder(target) as place:
            new = place / "new" / target.name
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    sync(file)
            sync(new)
            with not_trained_in(target):
                _swap(new, target, place / "old", force=force)
            sync(target.parent)


def _swap(new: Path, target: Path, old: Path, *, force: bool) -> None:
    """Put a new folder where an old one is; a reader may come in between and put the old one back."""
    old.mkdir()
    for left in reversed(range(_SWAPS)):
        if target.exists():
            check_target(target, force=force)  # another process may have come first
            target.rename(old / target.name)
        try:
            new.rename(target)
        except OSError:
            if not left or not target.exists():
                raise
        else:
            return


def check_file(path: Path, *, force: bool) -> None:
    """Raise CheckpointError if `path` cannot become a file, or exists and `force` is not set."""
    with disk_errors(path):
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; name a file in it")
        if path.exists() and not force:
            raise CheckpointError(f"{path} exists already; choose another name, or --force to replace it")


def check_target(path: Path, *, force: bool) -> None:
    """Raise CheckpointError if `path` exists and `force` is not set: asked before long work, not after."""
    if not path.name:
        raise CheckpointError(f"{path} cannot be replaced as a whole; name a folder in it")
    recover(path)
    with disk_errors(path):
        if path.exists() and not force:
            raise CheckpointError(f"{path} exists already; choose another name, or --force to replace it")
        ours = ("config.json", "addon_config.json", "recipe.yaml")
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not any((path / f).exists() for f in ours)):
            raise CheckpointError(
                f"{path} exists and is neither a checkpoint nor a run: it is not ours to replace; choose another name"
            )


def recover(path: Path) -> None:
    """Undo a replacement that was killed between its two renames.

    Raises:
        CheckpointError: the disk refuses, or no file can have this name.
    """
    try:
        put_back(_target(path))
    except OSError as error:
        raise CheckpointError(f"cannot reach {path}: {error}") from error


def find_checkpoint(path: Path, *, hint: str = "") -> Path:
    """Return the configuration's file of a checkpoint, after a killed replacement is undone; `hint` ends the error.

    Raises:
        CheckpointError: there is none.
    """
    recover(path)
    file = path / "config.json"
    if not file.is_file():
        found = "an empty or different folder" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise CheckpointError(f"no checkpoint at {path}: looked for {file.name} in it, found {found}{hint}")
    return file


def _target(path: Path) -> Path:
    """Follow symbolic links: a new file or folder takes the place of what they point to, on its own disk."""
    return Path(os.path.realpath(path))
