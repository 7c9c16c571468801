"""What was made of text is kept on the disk, memory-mapped, and found again by what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets

from ..errors import DataError


def cached(
    generator: Callable[..., Iterator[dict[str, Any]]],
    arguments: dict[str, Any],
    features: datasets.Features,
    *,
    key: str,
) -> datasets.Dataset:
    """Return the rows of `generator(**arguments)` as a dataset in the cache of `datasets`.

    Args:
        generator: yields rows.
        arguments: for it.
        features: the columns of its rows.
        key: identifies the rows: equal keys are read back and not made again.

    Raises:
        DataError: the cache cannot be written, or whatever of its own the generator raises.
    """
    folder = str(datasets.config.HF_DATASETS_CACHE / "tokenformer")
    try:
        return datasets.Dataset.from_generator(
            generator, gen_kwargs=arguments, fingerprint=key, features=features, cache_dir=folder
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        if isinstance(cause, OSError):
            raise DataError(
                f"could not keep text in {folder}: {cause}; make room, or set HF_DATASETS_CACHE to another folder"
            ) from error
        raise
