"""One process at a time trains in a run folder, and nobody replaces it meanwhile."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import CheckpointError
from .disk import disk_errors
from .temporary import clear_abandoned, sibling

_PATIENCE = 0.2  # seconds: more than it takes to replace a folder
_held: set[tuple[int, Path]] = set()  # by this process, whose number tells it from one that was forked off it


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder, which need not exist yet, and clear away what killed processes left behind.

    The lock is the operating system's, so that a killed process lets go. It lies beside the folder, which may be
    replaced while it is held.

    Raises:
        CheckpointError: another process holds it, or the disk refuses.
    """
    target = Path(os.path.realpath(run))
    with ExitStack() as stack:
        with disk_errors(run):
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_hold(target))
            for folder in (target.parent, target):
                clear_abandoned(folder)
        yield


@contextmanager
def not_trained_in(target: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, or in the run that it lies in, while it is replaced.

    Raises:
        CheckpointError: one trains there.
        OSError: the disk refuses.
    """
    with ExitStack() as stack:
        for place in (target, target.parent):
            held = (os.getpid(), place) in _held
            if not held and (place == target or _file(place).exists()):
                stack.enter_context(_hold(place))
        yield


@contextmanager
def _hold(place: Path) -> Iterator[None]:
    file, key = _file(place), (os.getpid(), place)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout as error:
        if not file.exists():  # which the library takes for a file that another process has just removed
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
        raise CheckpointError(
            f"{place} is being trained in by {_holder(file)}; wait until it has ended, stop it, or give another place "
            "with --output"
        ) from error
    _held.add(key)
    try:
        with suppress(OSError):  # Windows lets nobody write what is locked
            file.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        _held.discard(key)
        with suppress(OSError):  # nor remove it
            file.unlink()
        lock.release()


def _file(place: Path) -> Path:
    return sibling(place, ".lock")


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
