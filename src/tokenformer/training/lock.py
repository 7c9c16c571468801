"""One process at a time trains in a run folder."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..checkpoints.files import disk_errors, sibling
from ..errors import CheckpointError


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder, which need not exist yet, and clear away what a killed process left behind.

    The lock is the operating system's, so that a killed process lets go. It lies beside the folder, which may be
    replaced while it is held.

    Raises:
        CheckpointError: another process holds it, or the disk refuses.
    """
    target = Path(os.path.realpath(run))
    file = sibling(target, ".lock")
    lock = FileLock(file)
    with disk_errors(run):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointError(
                f"{run} is being trained in by {_holder(file)}; wait until it has ended, stop it, or give another "
                "place with --output"
            ) from error
    try:
        with suppress(OSError):  # Windows lets nobody write what is locked
            file.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        ours = re.compile(re.escape(f".{target.name}.") + r"\d+\.tmp")
        for left in (path for path in target.parent.iterdir() if ours.fullmatch(path.name)):
            shutil.rmtree(left, ignore_errors=True)
        for left in target.glob(".stage*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        with suppress(OSError):  # nor remove it
            file.unlink()
        lock.release()


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
