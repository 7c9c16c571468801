"""Export a checkpoint to ONNX with transformers' own exporter and compare ONNX Runtime with PyTorch.

One graph is forward pass, prefill and decoding step: it takes text tokens after a key/value cache of any length, an
empty one included. export_openvino.py and export_executorch.py compare in the same way.
Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import arguments, record
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.exporters import AutoExportConfig, AutoHfExporter, ExportedModel

import tokenformer  # noqa: F401

TOLERANCE = 1e-4
NEW_TEXT_TOKENS = 24
MAX_BATCH = 8
# Of different lengths, so that padding is tried too.
PROMPTS = ["ROMEO", "First Citizen:\nBefore we go"]
# Batch, text tokens, text tokens in the cache.
EXPORTED_SHAPE = (2, 3, 5)
OTHER_SHAPES = [(1, 1, 4), (3, 1, 9), (1, 5, 0), (3, 13, 0), (4, 40, 0), (2, 7, 33)]


def empty_cache(model: PreTrainedModel, batch: int) -> DynamicCache:
    """A cache that holds no text token yet but has every layer's tensors, for those are inputs of the graph."""
    config = model.config
    nothing = torch.zeros(batch, config.num_attention_heads, 0, config.hidden_size // config.num_attention_heads)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(nothing, nothing, layer)
    return cache


def example(model: PreTrainedModel, batch: int, length: int, cached: int) -> dict[str, Any]:
    """Arguments of a forward pass over random text tokens, `[batch, length]`, after `cached` ones that were read."""
    ids = torch.randint(0, model.config.vocab_size, (batch, cached + length))
    cache = empty_cache(model, batch)
    if cached:
        model(ids[:, :cached], past_key_values=cache, use_cache=True)
    return {
        "input_ids": ids[:, cached:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(cached, cached + length).repeat(batch, 1),
        "past_key_values": cache,
    }


def greedy(forward: Callable[..., Any], cache: DynamicCache, ids: Tensor, mask: Tensor) -> Tensor:
    """Append the likeliest text token `NEW_TEXT_TOKENS` times, reading one at a time after the prompt."""
    new = ids
    for _ in range(NEW_TEXT_TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = forward(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids


def export(model: PreTrainedModel, export_format: str, **settings: Any) -> ExportedModel:
    """Trace one graph whose batch, length and cache length may vary; `settings` are the format's own."""
    batch = torch.export.Dim.AUTO(max=MAX_BATCH)
    text = torch.export.Dim.AUTO(max=model.config.max_position_embeddings)
    shapes: dict[str, Any] = {key: {0: batch, 1: text} for key in ("input_ids", "attention_mask", "position_ids")}
    shapes["past_key_values"] = [{0: batch, 2: text}] * (2 * model.config.num_hidden_layers)
    config = AutoExportConfig.from_dict({"export_format": export_format, "dynamic_shapes": shapes, **settings})
    inputs = {**example(model, *EXPORTED_SHAPE), "use_cache": True}
    return AutoHfExporter.from_config(config).export(model, inputs, config)


def decodes_alike(model: PreTrainedModel, checkpoint: Path, forward: Callable[..., Any]) -> bool:
    """Whether decoding greedily through `forward` gives `generate`'s text tokens, padded on the left."""
    prompt = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")(PROMPTS, padding=True, return_tensors="pt")
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW_TEXT_TOKENS, "do_sample": False, "use_cache": True}
    expected = model.generate(ids, attention_mask=mask, **options)
    return torch.equal(greedy(forward, empty_cache(model, len(ids)), ids, mask), expected)


@torch.no_grad()
def compare(checkpoint: Path, export_format: str, **settings: Any) -> dict[str, Any]:
    """Export, save, load and run; assert that it does what PyTorch does, and return the outcome and its figures."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    started = time.perf_counter()
    exported = export(model, export_format, **settings)
    seconds = time.perf_counter() - started
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        exported.save_pretrained(folder)
        size = sum(f.stat().st_size for f in Path(folder).iterdir() if f.suffix not in (".py", ".json"))
        exported = ExportedModel.from_pretrained(folder)
        for shape in [EXPORTED_SHAPE, *OTHER_SHAPES]:
            inputs = example(model, *shape)
            expected = model(**copy.deepcopy(inputs), use_cache=True).logits
            difference = (exported(**inputs).logits - expected).abs().max().item()
            assert difference < TOLERANCE, f"logits differ by {difference} at {shape}"
            worst = max(worst, difference)
        assert decodes_alike(model, checkpoint, exported)
    original = (checkpoint / "model.safetensors").stat().st_size
    return {
        "result": f"logits within {worst:.1e} of PyTorch's at {len(OTHER_SHAPES)} other shapes than the exported one; "
        f"{NEW_TEXT_TOKENS} text tokens for each of {len(PROMPTS)} left-padded prompts, decoded with the cache, equal "
        f"model.generate's; {size / 1e6:.1f} MB for a checkpoint of {original / 1e6:.1f} MB",
        "largest_difference": worst,
        "bytes": size,
        "export_seconds": round(seconds, 1),
    }


def main() -> None:
    """Compare and leave the outcome."""
    args = arguments(__doc__ or "")
    outcome = compare(args.checkpoint, "onnx")
    record(
        args.results,
        "ONNX, ONNX Runtime",
        packages=["transformers", "torch", "onnx", "onnxscript", "onnxruntime"],
        ran="transformers.exporters: one graph with dynamic batch, length and cache length; float32, run on a CPU",
        limits="transformers' generate cannot drive an exported model: the decoding loop is the caller's. A checkpoint "
        "with pattention_eps of 1e-8 or less must be exported with optimize=False: onnxscript's optimizer takes that "
        "for 0, and padding gives NaN. optimum-onnx 0.1 not tried: it wants transformers below 4.58",
        **outcome,
    )


if __name__ == "__main__":
    main()
