"""Keep the terminal to ourselves."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from .after_import import after_import


def quiet_libraries() -> None:
    """Leave the terminal to us for the rest of this process: other libraries draw bars, and warn about each other."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.WARNING)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    after_import("transformers.utils.logging", _quiet_transformers)
    after_import("datasets", _quiet_datasets)


def quietly(rank: int, module: str, function: str, *arguments: Any) -> None:
    """Call a function of a module, in a process that has just begun, before what it imports can write anything."""
    quiet_libraries()
    getattr(import_module(module), function)(rank, *arguments)


@contextmanager
def without_logs() -> Iterator[None]:
    """Keep what others log up to warnings to themselves within the context: some do as they are imported."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers and datasets from drawing bars within the context, or the function that it decorates."""
    from transformers.utils import logging as transformers_logging

    datasets = sys.modules.get("datasets")  # which draws none where nobody has imported it
    one = transformers_logging.is_progress_bar_enabled()
    other = datasets is not None and not datasets.are_progress_bars_disabled()
    if one:
        transformers_logging.disable_progress_bar()
    if datasets is not None and other:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if one:
            transformers_logging.enable_progress_bar()
        if datasets is not None and other:
            datasets.enable_progress_bars()


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _quiet_datasets() -> None:
    import datasets

    datasets.disable_progress_bars()
