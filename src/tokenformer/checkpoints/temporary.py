"""Temporary folders beside what they will become, and what remains of them when their writer is killed.

.NAME.1f3c09ab.tmp/                   beside NAME
.NAME.1f3c09ab.tmp/tokenformer.lock   the operating system's: held as long as the writer lives, on whatever host
.NAME.1f3c09ab.tmp/new/NAME           being written
.NAME.1f3c09ab.tmp/old/NAME           what stood there, between the two renames that replace a folder
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_LONGEST_NAME = 255  # bytes, on every file system in common use
_LOCK = "tokenformer.lock"
_CLAIMS = 100  # processes in a row that may take a folder for abandoned before its writer has locked it
_OURS = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Give a new hidden folder beside `target`, and remove it in the end.

    What others left there who were killed is removed first. Whether one was is asked of the system's locks, not of its
    number, which another process may have by now, or has on another host.

    Raises:
        OSError: the disk refuses.
    """
    clear_abandoned(target.parent)
    folder, lock = _claim(target)
    try:
        (folder / "new").mkdir()
        yield folder
    finally:
        _put_back(folder)
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def clear_abandoned(parent: Path) -> None:
    """Remove temporary folders in `parent` whose writers were killed; what one had put aside gets its name back."""
    for folder in parent.glob(".*.tmp"):
        if not _OURS.fullmatch(folder.name) or folder.is_symlink():
            continue
        if not (folder / _LOCK).exists():
            with suppress(OSError):
                folder.rmdir()  # of one killed before it could lock; else it is nobody's whom we know
            continue
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except OSError:  # its writer lives, or is somebody else
            continue
        _put_back(folder)
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def put_back(target: Path) -> None:
    """Give `target`, where it is missing, what a replacement has put aside that was killed between its two renames.

    A writer that lives and is between them tries again.

    Raises:
        OSError: the disk refuses.
    """
    if target.exists():
        return
    for old in target.parent.glob(f".*.tmp/old/{glob.escape(target.name)}"):
        if _OURS.fullmatch(old.parents[1].name):
            _rename_unless_there(old, target)


def sibling(target: Path, ending: str) -> Path:
    """Return a hidden path beside `target` that belongs to it, with a name that no file system finds too long."""
    name = f".{target.name}{ending}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}{ending}"
    return target.with_name(name)


def _claim(target: Path) -> tuple[Path, FileLock]:
    """Make a folder and lock it; another process may take it for abandoned in between, and then it is made anew."""
    for left in reversed(range(_CLAIMS)):
        folder = sibling(target, f".{secrets.token_hex(4)}.tmp")
        folder.mkdir()
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
            return folder, lock
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not left or not isinstance(error, Timeout | FileNotFoundError):
                raise
    raise AssertionError


def _put_back(folder: Path) -> None:
    """Put back what a temporary folder holds of the old; what is not needed must not seem whole while it is removed."""
    for old in (folder / "old").glob("*"):
        with suppress(OSError):
            _rename_unless_there(old, folder.parent / old.name)
    with suppress(OSError):
        (folder / "old").rename(folder / "replaced")


def _rename_unless_there(old: Path, target: Path) -> None:
    try:
        if not os.path.lexists(target):
            old.rename(target)
    except OSError:
        if not os.path.lexists(target):  # else the writer, or another reader, has come first
            raise
