"""What the quantisation scripts here share: held-out text, the size of weights, and times taken side by side."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from tokenformer.data.text import prepare
from tokenformer.training.recipe import Recipe


def held_out(checkpoint: Path, *, num_blocks: int) -> tuple[datasets.Dataset, int]:
    """Return the first blocks of the text `checkpoint` was validated on, and the UTF-8 bytes that they predict."""
    history = json.loads((checkpoint / "lineage.json").read_text())["history"]
    recipe = Recipe(**next(event["recipe"] for event in reversed(history) if event.get("recipe")))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert recipe.data is not None
    length = recipe.training.sequence_length
    data = prepare(recipe.data, sequence_length=length, tokenizer_folder=checkpoint, tokenizer=tokenizer)
    (held,) = data.validation.values()
    blocks = held.blocks.select(range(min(num_blocks, len(held.blocks))))
    predicted = [i for ids in blocks["input_ids"] for i in ids[1:]]
    return blocks, len(tokenizer.decode(predicted, skip_special_tokens=True).encode())


def map_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every linear map but the head, which is the embedding."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def side_by_side(runs: dict[str, Callable[[], object]], *, repetitions: int) -> dict[str, dict[str, float]]:
    """Time each of `runs`, in turn and repeatedly, so that whatever else the machine does slows all of them.

    Returns the median seconds of each, and the quartiles of its time over that of the first in the same round.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    reference = next(iter(seconds.values()))
    table = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(values, reference, strict=True)], n=4)
        table[name] = {"seconds": statistics.median(values), "ratio": middle, "ratio_low": low, "ratio_high": high}
    return table


@torch.no_grad()
def speed(models: dict[str, Any], *, text_tokens: int = 16, repetitions: int = 5) -> dict[str, dict]:
    """Time `generate` for `text_tokens` new text tokens, and one forward pass of 4 · `text_tokens` of them."""
    vocabulary = next(iter(models.values())).config.vocab_size
    text = torch.randint(vocabulary, (1, 4 * text_tokens), generator=torch.Generator().manual_seed(0))
    prompt = text[:, :4]

    def decode(model: Any) -> Callable[[], object]:
        mask = torch.ones_like(prompt)
        many = {"min_new_tokens": text_tokens, "max_new_tokens": text_tokens}
        return lambda: model.generate(prompt, attention_mask=mask, do_sample=False, use_cache=True, **many)

    def forward(model: Any) -> Callable[[], object]:
        return lambda: model(input_ids=text, use_cache=False)

    runs = {"decode": decode, "forward": forward}
    return {
        what: side_by_side({name: run(model) for name, model in models.items()}, repetitions=repetitions)
        for what, run in runs.items()
    }
