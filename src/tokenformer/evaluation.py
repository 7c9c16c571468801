"""How good a model is: nats per text token and bits per byte on text, lm-eval's tasks, labels found of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Value
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from .batches import batches, pixel_values
from .checkpoints.checkpoint import check_tokenizer
from .data.blocks import pack, utf8_bytes
from .data.image_sources import load_images
from .data.images import images_of
from .data.sources import load_documents
from .errors import EvaluationError, MissingExtraError, first_line
from .quiet import without_bars


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
        model: any transformers causal language model, or an exported one.
        blocks: text blocks `{"input_ids": [T]}` as `data.blocks.pack` makes them.
        num_bytes: UTF-8 bytes of the text the blocks were made from.
        batch_size: text blocks per forward pass.
        dtype: autocast to this type; default: compute in the weights' own.
    """
    device: Any = model.device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for ids in batches(blocks, batch_size):
            input_ids = ids.to(device)
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
            predicted = input_ids[:, 1:].flatten()
            losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), predicted, reduction="none")
            total += losses.cpu().double().sum().item()
            count += predicted.numel()
    finally:
        model.train(was_training)
    return Evaluation(total / count, total / math.log(2) / num_bytes, count)


@without_bars()
def evaluate_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    source: str | Sequence[str],
    *,
    block_length: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Predict all text of `source`, packed as in training: documents apart by end-of-text, in text blocks.

    Args:
        model: any transformers causal language model.
        tokenizer: its tokenizer, with an end-of-text token.
        source: as `data.source` of a recipe: a name, file, folder or glob, or several.
        block_length: text tokens in a text block; the first of each is context only. Default: the model's context, but
            2,048 at most, on every machine: bits per byte depend on it.
        batch_size: text blocks per forward pass. Default: 16, or fewer where their logits would take more than 1 GiB.

    Raises:
        EvaluationError: `block_length` is longer than the model's context.
        TokenizerError: an id of the tokenizer has no row in the model's embedding.
        DataError: there is no such text, or it cannot be read.
    """
    config: Any = model.config
    length = block_length or default_block_length(config)
    if length > config.max_position_embeddings:
        raise EvaluationError(
            f"text blocks of {length} text tokens were asked for; the model reads {config.max_position_embeddings} at "
            "most"
        )
    check_tokenizer(tokenizer, config, where="that was given")
    documents = load_documents(source)
    blocks = pack(documents, tokenizer, block_length=length, keep_tail=True)
    batch_size = batch_size or _batch_size(length, config.vocab_size)
    return evaluate(model, blocks, num_bytes=utf8_bytes(documents), batch_size=batch_size)


def default_block_length(config: PreTrainedConfig) -> int:
    """Return the text tokens of a text block to judge a model by where nobody says: its context, at most 2,048."""
    return min(config.max_position_embeddings, 2048)


def _batch_size(block_length: int, vocabulary: int) -> int:
    """Return how many text blocks of logits, in float32, fit in 1 GiB: from 1 to 16."""
    return max(1, min(16, 2**30 // (4 * block_length * vocabulary)))


@dataclass(frozen=True)
class ImageEvaluation:
    """What a model makes of images whose labels are known.

    Attributes:
        loss: mean cross entropy in nats per image.
        accuracy: share of the images whose label is the likeliest.
        top5_accuracy: share of those whose label is among the five likeliest.
        images: how many.
    """

    loss: float
    accuracy: float
    top5_accuracy: float
    images: int


@torch.no_grad()
def evaluate_image_rows(
    model: nn.Module, rows: Any, processor: Any, *, batch_size: int = 64, dtype: torch.dtype | None = None
) -> ImageEvaluation:
    """Classify every image of `rows` once.

    Args:
        model: any transformers image classifier.
        rows: images in the model's size, as `data.image_sources.load_images` gives them.
        processor: its image processor.
        batch_size: images per forward pass.
        dtype: autocast to this type; default: compute in the weights' own.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    was_training, total, right, near = model.training, 0.0, 0, 0
    model.eval()
    try:
        for batch in rows.iter(batch_size=batch_size):
            images = pixel_values(images_of(batch["pixels"], config.image_height_width), processor).to(device)
            labels = torch.tensor(batch["label"], device=device)
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                logits = model(pixel_values=images).logits.float()
            total += nn.functional.cross_entropy(logits, labels, reduction="none").cpu().double().sum().item()
            # How many labels are found likelier; where several are equally likely, those count as likelier.
            above = (logits >= logits.gather(1, labels[:, None])).sum(1) - 1
            right, near = right + int((above < 1).sum()), near + int((above < 5).sum())
    finally:
        model.train(was_training)
    return ImageEvaluation(total / len(rows), right / len(rows), near / len(rows), len(rows))


@without_bars()
def evaluate_images(
    model: PreTrainedModel, processor: BaseImageProcessor, source: str, *, batch_size: int = 64, **columns: Any
) -> ImageEvaluation:
    """Classify all images of a part of `source`.

    Args:
        model: an image classifier, TokenFormer or other.
        processor: its image processor.
        source, columns: as `load_images`; `split` is the part, "test" where it is not named.
        batch_size: images per forward pass.

    Raises:
        DataError: there are no such images, or they cannot be read.
        EvaluationError: a label whose name the model does not know; labels that are only numbers are the model's.
    """
    config: Any = model.config
    rows = load_images(source, size=config.image_height_width, **{"split": "test", **columns})
    theirs, ours = rows.features["label"].names, [config.id2label[i] for i in range(config.num_labels)]
    if theirs == [str(i) for i in range(len(ours))]:  # the source has no names for its labels
        theirs = ours
    unknown = [name for name in theirs if name not in ours]
    if unknown:
        raise EvaluationError(
            f"the model tells {', '.join(ours)} apart, and {source!r} has images of {', '.join(unknown)}; take them out"
        )
    if theirs != ours:
        numbers = [ours.index(name) for name in theirs]
        rows = rows.cast_column("label", Value("int64"))
        rows = rows.map(lambda batch: {"label": [numbers[i] for i in batch["label"]]}, batched=True)
    return evaluate_image_rows(model, rows, processor, batch_size=batch_size)


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
