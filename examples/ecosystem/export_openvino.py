"""Export a checkpoint to OpenVINO with transformers' own exporter and compare its CPU runtime with PyTorch.

Twice: with the key/value cache as inputs and outputs (export_onnx.py says what is compared), and stateful, the cache
inside the model, run by OpenVINO alone. Needs openvino.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino
import torch
from export_onnx import compare, decodes_alike, export
from record import arguments, record
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import tokenformer  # noqa: F401


@torch.no_grad()
def stateful_decodes_alike(checkpoint: Path) -> bool:
    """Whether a graph that keeps its cache to itself decodes what `generate` does."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    compiled = openvino.Core().compile_model(export(model, "openvino", stateful=True).program, "CPU")
    request = compiled.create_infer_request()

    def forward(past_key_values: Any, **inputs: Tensor) -> CausalLMOutputWithPast:
        rows = torch.arange(len(inputs["input_ids"]), dtype=torch.int32)
        out = request.infer({name: tensor.numpy() for name, tensor in {**inputs, "beam_idx": rows}.items()})
        return CausalLMOutputWithPast(logits=torch.tensor(out["logits"]))

    return decodes_alike(model, checkpoint, forward)


def main() -> None:
    """Compare and leave the outcome."""
    args = arguments(__doc__ or "")
    outcome = compare(args.checkpoint, "openvino", stateful=False)
    assert stateful_decodes_alike(args.checkpoint)
    outcome["result"] += "; decoding equal too with a stateful graph, run by OpenVINO alone"
    record(
        args.results,
        "OpenVINO",
        packages=["transformers", "torch", "openvino"],
        ran="transformers.exporters: one graph with dynamic batch, length and cache length; float32, run on a CPU",
        limits="optimum-intel and OpenVINO GenAI not tried: optimum-intel 2.2 wants transformers below 5.6. "
        "ExportedModel runs graphs without state only",
        **outcome,
    )


if __name__ == "__main__":
    main()
