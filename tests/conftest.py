"""Tiny models run faster on one thread than on two, and bit equality is claimed for a fixed number of threads."""

import gc
import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until all is imported: of what modules make, collections free nothing

LONGEST = {"test_docs.py", "test_compare_running.py", "test_train.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: the core that ends first then waits for a short one."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _keep_what_is_imported() -> None:
    """Trainer collects garbage after every training: a second each time, if it looks at all that was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # Python's own rhythm, 700, takes a tenth of the time that the tests take
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _wait_for_no_disk() -> Iterator[None]:
    """A save waits for the disk a dozen times, a tenth of a second in all; no test cuts the power to see why."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is not open, too
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Commands silence other libraries for the rest of their process; tests after them must hear them."""
    yield
    logging.disable(logging.NOTSET)
