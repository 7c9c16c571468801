"""One graph of a language model that reads a prompt and decodes: any batch, any length, after a cache of any length."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.exporters import AutoExportConfig, AutoHfExporter, ExportedModel

from .engines import find_engine

# Sequences, text tokens and text tokens in the cache of the traced example; 0 and 1 would be taken for constants.
_EXAMPLE = (2, 3, 5)


@torch.no_grad()
def trace(model: PreTrainedModel, to: str, weights: str | None = None) -> ExportedModel:
    """Export `model` for the engine `to`, by transformers' own exporter.

    Args:
        model: a language model in eval mode and float32, as it is to run: its token groups are not united here.
        to: "openvino", "onnx" or "executorch".
        weights: "int8" or "int4"; None leaves them as they are.

    Raises:
        ConversionError, MissingExtraError: as `find_engine`.
    """
    engine = find_engine(to, weights)
    batch = torch.export.Dim.AUTO(max=engine.max_batch)
    text = torch.export.Dim.AUTO(max=model.config.max_position_embeddings)
    shapes: dict[str, Any] = {name: {0: batch, 1: text} for name in ("input_ids", "attention_mask", "position_ids")}
    cached = model.config.get_text_config(decoder=True).num_hidden_layers  # a looped block as often as it runs
    shapes["past_key_values"] = [{0: batch, 2: text}] * (2 * cached)
    shapes["logits_to_keep"] = {0: text}
    inputs = _example(model)
    if engine.computes_all_logits:
        del shapes["logits_to_keep"], inputs["logits_to_keep"]
    config = AutoExportConfig.from_dict(
        {
            "export_format": to,
            "dynamic_shapes": shapes,
            "quantizer": engine.weights[weights][1]() if weights else None,
            **engine.settings,
        }
    )
    exported = AutoHfExporter.from_config(config).export(model, {**inputs, "use_cache": True}, config)
    exported.generation_config = model.generation_config
    return exported


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Return arguments of a forward pass over random text tokens after others that were read."""
    batch, length, cached = _EXAMPLE
    ids = torch.randint(0, model.config.vocab_size, (batch, cached + length))
    cache = DynamicCache()  # of whole layers, where a model has sliding windows too: masks see to those
    model(ids[:, :cached], past_key_values=cache, use_cache=True)
    return {
        "input_ids": ids[:, cached:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(cached, cached + length).repeat(batch, 1),
        "past_key_values": cache,
        "logits_to_keep": torch.arange(length),
    }
