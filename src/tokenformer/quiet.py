"""Keep the terminal to ourselves."""

from __future__ import annotations

import logging

import datasets
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Leave the terminal to us: transformers and datasets draw bars of their own, lm-eval explains what we know."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
