"""An exported model that transformers' `generate` drives and `evaluate` measures: the engine does the forward pass.

Shape legend: B sequences, T text tokens read at once, P text tokens read before, K positions whose logits are wanted,
V vocab_size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.exporters import ExportedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checkpoints.verify import exported_for
from ..errors import CheckpointError
from .engines import find_engine
from .stateful import StatefulGraph


class ExportedForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that runs on the engine it was exported for, on the CPU.

    Greedy decoding, sampling and beams are transformers' own, with all of their settings:
    `ExportedForCausalLM.from_pretrained("fast").generate(**tokenizer("To be", return_tensors="pt"))`. It has no
    weights that PyTorch sees and cannot be trained. On OpenVINO it holds one text at a time, so that assisted decoding,
    which takes text tokens back, is refused there.
    """

    main_input_name = "input_ids"

    def __init__(self, config: Any, graph: Any) -> None:
        super().__init__(config)
        self._graph = graph
        self._is_stateful = isinstance(graph, StatefulGraph)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, threads: int | None = None) -> ExportedForCausalLM:
        """Load what `export` wrote.

        Args:
            path: the folder.
            threads: for OpenVINO and ONNX Runtime. Default: as many as PyTorch takes.

        Raises:
            CheckpointError: there is no export there, or it cannot be read.
            MissingExtraError: its engine is not installed.
        """
        folder = Path(path)
        name = exported_for(folder)
        if name is None:
            raise CheckpointError(f"{folder} is not what `tokenformer export` writes: it has no export.json")
        find_engine(name)
        threads = threads or torch.get_num_threads()
        try:
            graph = StatefulGraph(folder, threads) if name == "openvino" else _PassingGraph(folder, name, threads)
            model = cls(AutoConfig.from_pretrained(folder), graph)
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # each engine raises its own
            raise CheckpointError(f"export {folder} is damaged: it cannot be read: {error}") from error
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Where text tokens are read and logits come out."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        return torch.float32

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Read `input_ids` `[B, T]` after what `past_key_values` holds: logits `[B, K, V]`, float32.

        `logits_to_keep`: the last so many positions (0: all), or the positions as a 1-D tensor. The mask is
        `[B, P + T]`, positions `[B, T]`; default: nothing is masked. `use_cache=False` returns no cache.
        """
        rows, length = input_ids.shape
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(rows, before + length, dtype=torch.long)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if isinstance(logits_to_keep, int):
            logits_to_keep = torch.arange(max(0, length - logits_to_keep) if logits_to_keep else 0, length)
        logits, past = self._graph(
            past_key_values,
            logits_to_keep,
            input_ids=input_ids.contiguous(),
            attention_mask=attention_mask.long(),
            position_ids=position_ids.expand(rows, length).contiguous(),
        )
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else past)


class _PassingGraph:
    """Runs a graph that takes all keys and values and gives them back, as ONNX Runtime and ExecuTorch do."""

    def __init__(self, folder: Path, name: str, threads: int) -> None:
        options = {}
        if name == "onnx":
            import onnxruntime

            options["session_options"] = onnxruntime.SessionOptions()
            options["session_options"].intra_op_num_threads = threads
        self._most_rows = find_engine(name).max_batch
        self._graph = ExportedModel.from_pretrained(folder, device="cpu", **options)

    def __call__(self, past: Any, logits_to_keep: Tensor, **inputs: Tensor) -> tuple[Tensor, Any]:
        rows = len(inputs["input_ids"])
        if self._most_rows is not None and rows > self._most_rows:
            if past is not None:
                raise ValueError(f"{rows} sequences to write; this export writes {self._most_rows} at a time at most")
            parts = zip(*(tensor.split(self._most_rows) for tensor in inputs.values()), strict=True)
            read = [self(None, logits_to_keep, **dict(zip(inputs, part, strict=True))) for part in parts]
            return torch.cat([logits for logits, _ in read]), None
        if past is None or not past.get_seq_length():
            past = _empty_cache(self._graph.config, rows)
        out = self._graph(**inputs, past_key_values=past, logits_to_keep=logits_to_keep)
        return out.logits, out.past_key_values


def _empty_cache(config: Any, rows: int) -> DynamicCache:
    """Return a cache that holds no text token yet but has every block's tensors, for those are inputs of the graph."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache()
    for block in range(config.get_text_config(decoder=True).num_hidden_layers):
        cache.update(torch.zeros(rows, heads, 0, size), torch.zeros(rows, heads, 0, size), block)
    return cache
