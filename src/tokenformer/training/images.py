"""Images as a stage reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ViTImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor

from .. import cost
from ..batches import pixel_values
from ..checkpoints.checkpoint import load_image_processor
from ..data.image_section import ImageSection
from ..data.images import ImageData, Varied, images_of, prepare_images
from ..data.order import Reading
from ..errors import RecipeError
from ..evaluation import ImageEvaluation, evaluate_image_rows
from ..growth.architectures import ARCHITECTURES
from .log import finite
from .material import Material
from .precision import autocast_type
from .recipe import Recipe, TrainingSection


@dataclass(frozen=True)
class ImageValidation(ImageEvaluation):
    """What validation measured on the held-out images."""

    def results(self) -> dict[str, Any]:
        """Say of it what events and lineage say."""
        return {"loss": finite(self.loss), "accuracy": self.accuracy, "top5_accuracy": self.top5_accuracy}

    def numbers(self) -> dict[str, float]:
        """Say of it what loggers take."""
        return {"loss": self.loss, "accuracy": self.accuracy, "top5_accuracy": self.top5_accuracy}


class ImageMaterial(Material):
    """Images that predict their labels.

    Args:
        data: the images.
        section: how they vary in training.
        processor: whose scale the pixels take.
    """

    unit: Literal["images"] = "images"
    processor: BaseImageProcessor

    def __init__(self, data: ImageData, section: ImageSection, processor: BaseImageProcessor) -> None:
        self.data, self.section, self.facts, self.processor = data, section, data.facts, processor
        self.loss = self._smoothed if section.label_smoothing else None

    def _smoothed(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of training with smoothed labels, as the Trainer asks for it."""
        sums = num_items_in_batch is not None
        smoothing = self.section.label_smoothing
        logits = outputs["logits"]
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum" if sums else "mean")
        return loss / num_items_in_batch if num_items_in_batch is not None else loss

    def config(self, recipe: Recipe) -> PreTrainedConfig:
        """Return the configuration of a recipe's first model: the sizes of `model`, and the labels of the images."""
        return _first_config(recipe, self.data.labels)

    def check(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Refuse a checkpoint that tells other labels apart."""
        theirs = [config.id2label[i] for i in range(config.num_labels)]
        if theirs != self.data.labels:
            raise RecipeError(
                f"{recipe.model.checkpoint} tells {', '.join(theirs)} apart, and the labels of the images are "
                f"{', '.join(self.data.labels)}; images.labels can name them, in the model's order"
            )

    def adapt(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Change nothing: all images are brought to the model's size."""

    def per_step(self, training: TrainingSection) -> int:
        """Images in an optimizer step."""
        return training.batch_size

    def flops(self, model: PreTrainedModel, training: TrainingSection) -> float:
        """FLOPs of training on an image."""
        return cost.training_flops_of(model)

    def examples(self, reading: Reading, *, seed: int) -> Varied:
        """Take the stage's stretch of the one global order of images."""
        (source,) = reading.shares
        order = reading.order({source: len(self.data.train)}, seed=seed)
        return Varied(self.data, order, self.section, seed=seed, first=reading.skipped.get(source, 0))

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Stack images on the model's scale, and their labels."""
        images = np.stack([row["pixels"] for row in rows])
        labels = torch.tensor([row["label"] for row in rows])
        return {"pixel_values": pixel_values(images, self.processor), "labels": labels}

    def reads(self, reading: Reading) -> dict[str, dict[str, float]]:
        """Say how many times over the images are read."""
        return reading.told(dict.fromkeys(reading.shares, len(self.data.train)))

    def sample(self) -> dict[str, Any]:
        """Return four images."""
        some = self.data.validation.select(range(min(4, len(self.data.validation))))
        return {"pixel_values": pixel_values(images_of(some["pixels"], self.data.size), self.processor)}

    def measure(self, model: PreTrainedModel, training: TrainingSection) -> ImageValidation:
        """Measure a model on the held-out images, as precisely as it trains."""
        found = evaluate_image_rows(
            model,
            self.data.validation,
            self.processor,
            batch_size=training.micro_batch_size or 64,
            dtype=autocast_type(training.precision),
        )
        return ImageValidation(found.loss, found.accuracy, found.top5_accuracy, found.images)


def prepare_pictures(recipe: Recipe, run: Path, config: PreTrainedConfig | None) -> ImageMaterial:
    """Read the images of a recipe, in the size of its model; `config` is that of the checkpoint that it starts from.

    Raises:
        DataError: from the images. RecipeError: a model that reads no such images.
    """
    assert recipe.images is not None
    initial = recipe.model.checkpoint
    model: Any = config or _first_config(recipe, ["one", "another"])
    row = ARCHITECTURES.get(model.model_type)
    if row is not None and row.auto == "AutoModelForImageTextToText":
        raise RecipeError(f'{initial} describes images in words; say in images.captions how: ["This is a {{label}}."]')
    if row is None or row.auto != "AutoModelForImageClassification":
        raise RecipeError(
            f"{initial or 'model'}: a {model.model_type!r} model reads text, not images; give data in place of images, "
            'or an architecture that sees, such as "tokenformer_vision"'
        )
    if model.num_channels != 3:
        raise RecipeError(
            f"{initial or 'model'} reads {model.num_channels} channels; every image is read with 3, grey ones too: set "
            "num_channels to 3"
        )
    size = model.image_height_width
    half = [0.5, 0.5, 0.5]
    plain = ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, image_mean=half, image_std=half)
    processor = load_image_processor(initial) if initial is not None else None
    return ImageMaterial(prepare_images(recipe.images, size=size), recipe.images, processor or plain)


def _first_config(recipe: Recipe, labels: list[str]) -> PreTrainedConfig:
    try:
        return recipe.model.config(
            id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
        )
    except ValueError as error:
        raise RecipeError(f"model: {error}") from error
