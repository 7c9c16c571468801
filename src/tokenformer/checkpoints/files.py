"""Writing files and folders whole or not at all, and digests of them."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import CheckpointError

_LONGEST_NAME = 255  # bytes, on every file system in common use
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
    """Give a temporary sibling, to be written, that becomes the file `path` when the block ends well.

    It ends in the suffix of `path`. Where `path` is a symbolic link, the file that it points to is replaced.

    Raises:
        CheckpointError: `path` is a folder, or exists and not `force`, or writing failed.
    """
    check_file(path, force=force)
    target = _target(path)
    temporary = sibling(target, f".{os.getpid()}.tmp{target.suffix}")
    with disk_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(target)
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder that becomes `path` when the block ends well and vanishes when it does not.

    Where `path` is a symbolic link, the folder that it points to is replaced.

    Raises:
        CheckpointError: `path` exists and not `force`, or is not ours to replace, or writing failed.
    """
    check_target(path, force=force)
    target = _target(path)
    temporary, replaced = sibling(target, f".{os.getpid()}.tmp"), _replaced(target)
    try:
        with disk_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            sync(temporary)
            _swap(temporary, target, replaced)
            sync(target.parent)
            if replaced.exists():
                replaced.rename(temporary)  # so that a kill while it is removed leaves nothing that seems whole
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(path)


def clear_unfinished(path: Path) -> None:
    """Remove the temporary siblings that killed processes have left of `path`; for who alone writes there."""
    target = _target(path)
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _swap(temporary: Path, target: Path, replaced: Path) -> None:
    """Put a new folder where an old one is; a reader may come in between and put the old one back."""
    for left in reversed(range(_SWAPS)):
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # of a process killed after its two renames
            target.rename(replaced)
        try:
            temporary.rename(target)
        except OSError:
            if not left or not target.exists():
                raise
        else:
            return


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what Python, safetensors and torch raise when a disk refuses (full, no permission) into CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) or "os error" in str(error).lower() or "file write" in str(error):
            raise CheckpointError(f"could not write {path}: {error}; what was there before is untouched") from error
        raise


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
    target = _target(path)
    replaced = _replaced(target)
    try:
        if not target.exists() and replaced.exists():
            replaced.rename(target)
    except OSError as error:
        if os.path.lexists(target):  # the writer has come first
            return
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


def _replaced(target: Path) -> Path:
    return sibling(target, ".replaced")


def sibling(target: Path, ending: str) -> Path:
    """Return a hidden path beside `target` that belongs to it, with a name that no file system finds too long."""
    name = f".{target.name}{ending}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}{ending}"
    return target.with_name(name)


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
