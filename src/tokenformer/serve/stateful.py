"""A graph that keeps its keys and values to itself, as OpenVINO runs it.

Shape legend: B sequences, T text tokens read at once, P text tokens read before, K positions whose logits are wanted,
V vocab_size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Beginning:
    """Stands for the keys and values that a graph keeps, for transformers' `generate`.

    Attributes:
        length: P.
        rows: `[B]`, which sequence each continues: beam search lets several go on from one.
    """

    def __init__(self, rows: int) -> None:
        self.length = 0
        self.rows = torch.arange(rows, dtype=torch.int32)

    def get_seq_length(self) -> int:
        """Return P."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sequence go on from another."""
        self.rows = self.rows[beam_idx]


class StatefulGraph:
    """Runs OpenVINO's graph in a request of its own, which holds one beginning at a time."""

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        graph = core.read_model(folder / "openvino_model.xml")
        _take_logits_to_keep(graph)
        # In the types and with the weights that were checked: else it may round to bfloat16 and keep keys in 8 bits.
        settings = {"PERFORMANCE_HINT": "LATENCY", "EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": threads}
        self._request = core.compile_model(graph, "CPU", settings).create_infer_request()
        self._held: Beginning | None = None

    def __call__(self, past: Any, logits_to_keep: Tensor, **inputs: Tensor) -> tuple[Tensor, Beginning]:
        """Read text tokens, `[B, T]` each of `inputs` but the mask, `[B, P + T]`: logits `[B, K, V]`, new beginning."""
        if past is None or not past.get_seq_length():
            self._request.reset_state()
            past = Beginning(len(inputs["input_ids"]))
        elif past is not self._held:
            raise ValueError(
                "this model has read another text since, and holds one at a time: read the text from its beginning, or "
                "load the model twice"
            )
        feed = {**inputs, "beam_idx": past.rows, "logits_to_keep": logits_to_keep}
        outputs = self._request.infer({name: tensor.numpy() for name, tensor in feed.items()}, share_inputs=True)
        past.length += inputs["input_ids"].shape[1]
        past.rows = torch.arange(len(past.rows), dtype=torch.int32)
        self._held = past
        return torch.from_numpy(outputs["logits"]), past


def _take_logits_to_keep(graph: Any) -> None:
    """Give a graph one more input: the positions for which it is to compute logits.

    Of a prompt only the last are wanted, and the head may take as long as the rest of a small model.
    """
    import numpy as np
    from openvino import opset15 as operations

    nodes = [graph.output("logits").get_node()]
    while nodes[0].get_type_name() != "MatMul":
        found = nodes.pop(0)
        nodes += [value.get_node() for value in found.input_values()]
    head = nodes[0]
    wanted = operations.parameter([-1], dtype=np.int64, name="logits_to_keep")
    wanted.output(0).get_tensor().set_names({"logits_to_keep"})
    hidden = operations.gather(head.input_value(0), wanted, operations.constant(np.int64(1)))
    head.input(0).replace_source_output(hidden.output(0))
    graph.add_parameters([wanted])
    graph.validate_nodes_and_infer_types()
