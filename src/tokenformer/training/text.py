"""Text as a stage reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch.utils.data import Subset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import cost
from ..batches import batches
from ..checkpoints.checkpoint import load_tokenizer
from ..data.order import Reading, cut
from ..data.stream import BlockStream
from ..data.text import TextData, prepare
from ..data.tokenizer import vocabulary_size
from ..errors import RecipeError, TokenizerError
from ..evaluation import Evaluation, evaluate
from ..growth.architectures import ARCHITECTURES
from .difficulty import difficulty
from .log import finite
from .material import Material
from .model import ModelSection
from .precision import autocast_type
from .processes import reader
from .recipe import Recipe, TrainingSection


@dataclass(frozen=True)
class Validation(Evaluation):
    """What validation measured on all held-out text together.

    Attributes:
        texts: on that of each text, by its name.
    """

    texts: dict[str, Evaluation]

    def results(self) -> dict[str, Any]:
        """Say of it what events and lineage say."""
        each = {name: finite(found.bits_per_byte) for name, found in self.texts.items()}
        return {
            "loss": finite(self.loss),
            "bits_per_byte": finite(self.bits_per_byte),
            **({"bits_per_byte_of": each} if len(each) > 1 else {}),
        }

    def numbers(self) -> dict[str, float]:
        """Say of it what loggers take."""
        each = {f"bits_per_byte_of_{name}": found.bits_per_byte for name, found in self.texts.items()}
        both = {"loss": self.loss, "bits_per_byte": self.bits_per_byte}
        return {**both, **(each if len(each) > 1 else {})}


class TextMaterial(Material):
    """Text blocks that predict their next text tokens.

    Args:
        data: the text.
    """

    unit: Literal["text_tokens"] = "text_tokens"
    processor: PreTrainedTokenizerBase

    def __init__(self, data: TextData) -> None:
        self.data, self.facts, self.processor = data, data.facts, data.tokenizer

    def config(self, recipe: Recipe) -> PreTrainedConfig:
        """Return the configuration of a recipe's first model."""
        return first_config(recipe.model, self.data, context=recipe.training.sequence_length, where="model")

    def check(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Refuse an embedding or a context that is too small."""
        initial, length = recipe.model.checkpoint, recipe.training.sequence_length
        if vocabulary_size(self.processor) > config.vocab_size:
            assert recipe.data is not None
            remedy = (
                "take vocab_size out of model"
                if initial is None
                else "name the one it was trained with as data.tokenizer"
            )
            raise TokenizerError(
                f"the ids of tokenizer {recipe.data.tokenizer} go up to {vocabulary_size(self.processor) - 1}, and the "
                f"embedding of {initial or 'the model'} has {config.vocab_size} rows: {remedy}"
            )
        longest = getattr(config, "max_position_embeddings", None) or length  # what is recurrent has no end
        if config.model_type != "tokenformer" and length > longest:
            raise RecipeError(
                f"training.sequence_length is {length}, more than the {longest} text tokens "
                f"that the model{f' in {initial}' if initial else ''} can read"
            )

    def adapt(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Let a TokenFormer, whose rotary embedding has no end, read what it trains on."""
        if config.model_type == "tokenformer":
            config.max_position_embeddings = max(config.max_position_embeddings, recipe.training.sequence_length)

    def per_step(self, training: TrainingSection) -> int:
        """Text tokens in an optimizer step."""
        return training.tokens_per_step

    def flops(self, model: PreTrainedModel, training: TrainingSection) -> float:
        """FLOPs of training on a text token."""
        return cost.training_flops_of(model, training.sequence_length)

    def examples(self, reading: Reading, *, seed: int) -> BlockStream | Subset[dict[str, Any]]:
        """Take the stage's stretch of the one global order of text; of a stream, this process's share."""
        texts = {text: self.data.train_blocks[text] for text in reading.shares}
        for text, blocks in texts.items():
            if isinstance(blocks, BlockStream):  # then it is the only one
                blocks.begin_after(reading.skipped.get(text, 0) // blocks.shares)
                return blocks
        cached = {text: blocks for text, blocks in texts.items() if isinstance(blocks, datasets.Dataset)}
        order = reading.order({text: len(blocks) for text, blocks in cached.items()}, seed=seed)
        parts = [cut(blocks, reading.pieces).with_format("numpy") for blocks in cached.values()]
        return Subset(parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts), order.tolist())

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack sequences, which are their own labels."""
        input_ids = torch.from_numpy(np.array([row["input_ids"] for row in rows], dtype=np.int64))
        return {"input_ids": input_ids, "labels": input_ids}

    def reads(self, reading: Reading) -> dict[str, dict[str, float]]:
        """Say what share of the stage each text is, and how many times over it is read; of a stream nobody knows."""
        blocks = self.data.train_blocks
        return reading.told({text: len(b) for text, b in blocks.items() if isinstance(b, datasets.Dataset)})

    def sample(self) -> dict[str, Any]:
        """Return four text blocks."""
        return {"input_ids": next(batches(next(iter(self.data.validation.values())).blocks, 4)), "use_cache": False}

    def measure(self, model: PreTrainedModel, training: TrainingSection) -> Validation:
        """Measure a model on the held-out text, as precisely as it trains."""
        held = self.data.validation
        texts = {
            name: evaluate(
                model,
                text.blocks,
                num_bytes=text.num_bytes,
                batch_size=training.micro_batch_size or 16,
                dtype=autocast_type(training.precision),
            )
            for name, text in held.items()
        }
        if len(texts) == 1:
            (only,) = texts.values()
            return Validation(only.loss, only.bits_per_byte, only.text_tokens, texts)
        count = sum(found.text_tokens for found in texts.values())
        loss = sum(found.loss * found.text_tokens for found in texts.values()) / count
        num_bytes = sum(text.num_bytes for text in held.values())
        return Validation(loss, loss * count / math.log(2) / num_bytes, count, texts)


def prepare_text(recipe: Recipe, run: Path, config: PreTrainedConfig | None) -> TextMaterial:
    """Read the text of a recipe; `config` is that of the checkpoint that it starts from, whose tokenizer it takes.

    Raises:
        DataError, TokenizerError: from the text. RecipeError: the checkpoint does not read text.
    """
    assert recipe.data is not None
    initial, tokenizer = recipe.model.checkpoint, None
    _check_reads_text(config.model_type if config else recipe.model.architecture, where=str(initial or "model"))
    if config is not None and initial is not None:
        tokenizer = load_tokenizer(initial, config)
        if tokenizer is None and any(stage.at is not None for stage in recipe.stages):
            raise TokenizerError(
                f"{initial} has no tokenizer, and an add-on takes that of its parent: save the one that the model was "
                "trained with beside it"
            )
    data = prepare(
        recipe.data,
        sequence_length=recipe.training.sequence_length,
        tokenizer_folder=run / "tokenizer",
        others=recipe.other_texts,
        tokenizer=tokenizer,
        difficulty=difficulty,
        process=reader(recipe.training),
    )
    return TextMaterial(data)


def first_config(model: ModelSection, data: TextData, *, context: int, where: str) -> PreTrainedConfig:
    """Return a first stage's configuration: the sizes of `model`, the tokenizer's vocabulary, embeddings tied.

    Args:
        model: a recipe's section, or that of an arm of a comparison.
        data: the text.
        context: text tokens that it can read.
        where: the section is, for the error.

    Raises:
        RecipeError: sizes that make no model, or a model that does not read text.
    """
    _check_reads_text(model.architecture, where=where)
    end = data.tokenizer.eos_token_id
    try:
        return model.config(
            vocab_size=vocabulary_size(data.tokenizer),
            max_position_embeddings=context,
            tie_word_embeddings=True,
            eos_token_id=end,
            bos_token_id=end,
        )
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_reads_text(architecture: str, *, where: str) -> None:
    row = ARCHITECTURES.get(architecture)
    if row is not None and row.auto == "AutoModelForImageTextToText":
        raise RecipeError(f"{where}: this model learns from images with captions; give images in place of data")
    if row is not None and row.auto != "AutoModelForCausalLM":
        raise RecipeError(
            f"{where}: a {architecture!r} model reads images, not text; give images in place of data, or another model"
        )
