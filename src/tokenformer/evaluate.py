"""How good a language model is: nats per text token and bits per byte on text, and lm-eval's tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .data.blocks import pack, utf8_bytes
from .data.sources import load_documents
from .errors import EvaluationError, MissingExtraError, first_line


@dataclass(frozen=True)
class Evaluation:
    """What validation measured.

    Attributes:
        loss: mean cross entropy in nats per predicted text token.
        bits_per_byte: total cross entropy in bits over the UTF-8 bytes of the text; comparable across tokenizers.
        text_tokens: predicted text tokens.
    """

    loss: float
    bits_per_byte: float
    text_tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    blocks: Any,
    *,
    num_bytes: int,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
) -> Evaluation:
    """Predict every text token of `blocks` once.

    Args:
        model: any transformers causal language model.
        blocks: a dataset of `{"input_ids": [T], "labels": [T]}` as `data.pack` makes them; -100 is not predicted.
        num_bytes: UTF-8 bytes of the text the blocks were made from.
        batch_size: blocks per forward pass.
        dtype: autocast to this type; default: compute in the weights' own.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        batch = blocks[start : start + batch_size]
        input_ids = torch.as_tensor(batch["input_ids"], device=device)
        labels = torch.as_tensor(batch["labels"], device=device)[:, 1:]
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        total += losses.cpu().double().sum().item()
        count += int((labels != -100).sum())
    model.train(was_training)
    return Evaluation(total / count, total / math.log(2) / num_bytes, count)


def evaluate_text(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, source: str, *, sequence_length: int, batch_size: int = 16
) -> Evaluation:
    """Predict all text of `source`, packed as in training: documents apart by end-of-text, in blocks.

    Args:
        model: any transformers causal language model.
        tokenizer: its tokenizer, with an end-of-text token.
        source: as `data.source` of a recipe: a name, file, folder or glob.
        sequence_length: text tokens in a block; the first of each is context only.
        batch_size: blocks per forward pass.

    Raises:
        EvaluationError: `sequence_length` is longer than the model's context.
        DataError: there is no such text, or it cannot be read.
    """
    context: Any = model.config.max_position_embeddings  # type: ignore[union-attr]
    if sequence_length > context:
        raise EvaluationError(
            f"blocks of {sequence_length} text tokens were asked for; the model reads {context} at most"
        )
    documents = load_documents(source, text_column="text", split="train", streaming=False)
    blocks = pack(documents, tokenizer, block_length=sequence_length, keep_tail=True)
    return evaluate(model, blocks, num_bytes=utf8_bytes(documents), batch_size=batch_size)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Run lm-eval's tasks and return its results, as `lm_eval --model hf` gives them.

    Args:
        model: any transformers causal language model.
        tokenizer: its tokenizer.
        tasks: names that lm-eval knows, or task files (YAML).
        limit: documents of each task; default all.
        batch_size: requests per forward pass.

    Raises:
        MissingExtraError: lm-eval is not installed.
        EvaluationError: a task is unknown, or its data cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError(
            f"tasks need lm-eval, which cannot be imported ({error}): pip install 'tokenformer[evaluate]'"
        ) from error
    named = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_defaults=bool(named))  # finding the thousands that lm-eval brings takes seconds
    unknown = [task for task in named if task not in manager.all_tasks]
    if unknown:
        raise EvaluationError(
            f"lm-eval knows no task {', '.join(map(repr, unknown))}, and there is no such file; `lm_eval ls tasks` "
            "lists what it knows"
        )
    harness = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
    try:
        return lm_eval.simple_evaluate(harness, tasks=tasks, limit=limit, task_manager=manager, log_samples=False)
    except (OSError, ValueError, KeyError, TypeError) as error:  # what a missing file, data set or field becomes there
        raise EvaluationError(f"lm-eval could not run {', '.join(tasks)}: {first_line(error)}") from error
