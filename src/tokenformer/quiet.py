"""Keep the terminal to ourselves."""

from __future__ import annotations

import logging
import os
import warnings

from .after_import import after_import


def quiet_libraries() -> None:
    """Leave the terminal to us for the rest of this process: other libraries draw bars, and warn about each other."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.WARNING)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    after_import("transformers.utils.logging", _quiet_transformers)
    after_import("datasets", _quiet_datasets)


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _quiet_datasets() -> None:
    import datasets

    datasets.disable_progress_bars()
