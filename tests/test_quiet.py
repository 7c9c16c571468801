"""What a program that uses the package from Python sees on its terminal: what it prints itself."""

import os
import subprocess
import sys

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from tokenformer.quiet import without_bars

PROGRAM = """
from tokenformer import evaluate, load, save, train

sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
recipe = {
    "model": {**sizes, "qkv_param_tokens": 0, "output_param_tokens": 0, "ffn_param_tokens": 16},
    "data": {"source": ["a.txt", "b.txt"], "tokenizer": "bytes"},
    "training": {"batch_size": 2, "sequence_length": 16, "threads": 1},
    "stages": [{"text_tokens": 32}],
}
(checkpoint,) = train(recipe, "run")
model, tokenizer, lineage = load(checkpoint)
save("saved", model, tokenizer, lineage)
evaluate(model, tokenizer, "a.txt")
"""


def test_training_loading_saving_and_evaluating_print_nothing(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} the quick brown fox jumps over the lazy dog. " * 4)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("enabled", [True, False])
def test_bars_are_afterwards_as_they_were(enabled, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", enabled)
    monkeypatch.setattr(sys.modules["datasets.utils.tqdm"], "_hf_datasets_progress_bars_disabled", not enabled)

    def drawn():
        return transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()

    with pytest.raises(ZeroDivisionError), without_bars():
        assert drawn() == (False, False)
        raise ZeroDivisionError
    assert drawn() == (enabled, enabled)
