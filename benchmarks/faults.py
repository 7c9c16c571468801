"""Processes that give a command of ours and are killed, or whose disk refuses, for torture.py."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from tokenformer.cli import app as cli
from tokenformer.data import tokens

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def begin(
    folder: Path,
    arguments: list[str],
    fault: Callable[[int, str], None] | None = None,
    *,
    largest: int = -1,
    count: Any = None,
) -> int:
    """Give a command in `folder`, in a process forked off this one, in a group of its own, and return its number.

    Before each of its changes to the disk `fault` is called with its number and kind. No file grows larger than
    `largest` bytes. `count` is sent how many changes there were.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(silence, stream)
        error = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(error, 2)
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        tokens.SHARD_BYTES = 2**14  # so that little text is prepared as much text is
        sys.modules["__main__"].__file__ = None  # which a comparison's workers would import, too
        sys.argv = ["tokenformer", *arguments]
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        changes = watch_changes(fault or (lambda number, event: None))
        try:
            cli.main()
        finally:
            if count is not None:
                count.send(next(changes))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def watch_changes(fault: Callable[[int, str], None]) -> Iterator[int]:
    """Count this process's changes to the disk, and call `fault` before each."""
    numbers = iter(range(10**9))
    us = os.getpid()

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and os.getpid() == us and not str(arguments[0]).startswith("/dev/"):
            fault(next(numbers), event)

    sys.addaudithook(before)
    return numbers


def killed_at(change: int) -> Callable[[int, str], None]:
    """Return the fault of a process that does not survive a change."""

    def kill(number: int, event: str) -> None:
        if number == change:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def full_from(change: int) -> Callable[[int, str], None]:
    """Return the fault of a disk that is full from a change on: names can still be moved and removed."""

    def refuse(number: int, event: str) -> None:
        if number >= change and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return refuse


def read_only(number: int, event: str) -> None:
    """Be the fault of a disk that takes no change at all."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def wait(process: int) -> int:
    """Return the exit code of a process; -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
