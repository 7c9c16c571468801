"""PyTorch's pickled files, of which only tensors are read, and none that would be larger in memory than on the disk.

`torch.load(weights_only=True)` runs no code, and yet a few bytes can ask it for any amount of memory: a compressed
archive, a tensor that repeats one number, a byte array of a length.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

# What tensors, and the plain values beside them, are pickled as.
_TENSORS = re.compile(
    r"collections OrderedDict|(__builtin__|builtins) set"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)|torch\.nn\.parameter Parameter"
    r"|torch (\w+Storage|Size|device|b?float\w+|u?int\d+|bool)|torch\.storage (Untyped|Typed)Storage"
)
_LEGACY_PICKLES = 5  # in a file of before PyTorch 1.6: magic number, version, machine, content, names of storages
_SLACK = 2**20  # bytes


class UnsafePickle(Exception):
    """A file that holds more than tensors, or tensors that would be larger in memory than on the disk."""


def is_zip(file: Path) -> bool:
    """Whether a file is a whole zip archive; Python raises on some that only seem to be one."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        return False


def load_tensors(file: Path) -> Any:
    """Return what a file of `torch.save` holds: tensors, mapped into memory where it is an archive.

    Raises:
        UnsafePickle: see there.
        Exception: it is damaged, which torch says in many ways.
    """
    archive = is_zip(file)
    for name in _named(file, archive=archive):
        if not _TENSORS.fullmatch(name):
            what = name.strip().replace(" ", ".")
            raise UnsafePickle(f"it holds more than tensors ({what}), which could run code; only tensors are ever read")
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=archive or None)
    size, most = 0, 2 * file.stat().st_size + _SLACK
    for tensor in _tensors(content):
        size += tensor.numel() * tensor.itemsize
        if size > most:
            raise UnsafePickle(
                f"its tensors would take more than {most:,} bytes, and the file has {file.stat().st_size:,}"
            )
    return content


def check_stored(archive: zipfile.ZipFile) -> None:
    """Raise UnsafePickle where something in an archive is larger than it seems."""
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UnsafePickle(f"its {entry.filename[:100]!r} is compressed, as torch never writes it")


def _named(file: Path, *, archive: bool) -> Iterator[str]:
    """Yield all that unpickling would look up, as "module name"."""
    if not archive:
        with file.open("rb") as stream:
            for _ in range(_LEGACY_PICKLES):
                yield from _globals(stream)
        return
    with zipfile.ZipFile(file) as entries:
        check_stored(entries)
        for entry in entries.infolist():
            if entry.filename.endswith(".pkl"):
                with entries.open(entry) as stream:
                    yield from _globals(stream)


def _globals(stream: IO[bytes]) -> Iterator[str]:
    last = ["", ""]
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):  # which torch never writes
            yield f" {' '.join(last)}"  # with a space in front, as no name that is allowed
        elif isinstance(argument, str):
            last = [last[1], argument]


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, each container once."""
    waiting, seen = [content], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend([*item, *item.values()] if isinstance(item, dict) else item)
