"""IDX files, in which MNIST and its likes come: a header of sizes, and one byte for each number."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from ..errors import DataError

# The third byte of a header says the type, and this is bytes, which all such files of images and labels hold.
_BYTES = 0x08


def read_idx(file: Path) -> np.ndarray:
    """Read an IDX file of bytes, compressed by gzip or not: uint8, of the shape that it says.

    Raises:
        DataError: it is damaged, truncated, longer than it says, or holds other numbers than bytes.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            content = stream.read()
        zero, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (OSError, EOFError, struct.error, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise DataError(f"{file} cannot be read as an IDX file: {error}; get it again") from error
    if zero or kind != _BYTES:
        raise DataError(f"{file} is no IDX file of bytes: it begins with {content[:4].hex(' ')}, not with 00 00 08")
    first = 4 + 4 * dimensions
    if len(content) - first != math.prod(shape):
        said = " × ".join(map(str, shape))
        raise DataError(f"{file} holds {len(content) - first:,} bytes, and says {said}; get it again")
    return np.frombuffer(content, np.uint8, offset=first).reshape(shape)
