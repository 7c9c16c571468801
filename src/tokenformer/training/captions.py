"""Images with sentences that describe them, as a stage of a model that reads text and images learns them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .. import cost
from ..batches import pixel_values
from ..checkpoints.checkpoint import load_processor
from ..data.image_section import ImageSection
from ..data.images import ImageData, images_of, prepare_images
from ..errors import RecipeError
from ..models.processing_tokenformer_multimodal import TokenformerProcessor
from .images import ImageMaterial
from .log import finite
from .precision import autocast_type
from .recipe import Recipe, TrainingSection

# What comes before a description: an image alone in a message, by the processor's chat template.
PROMPT = "<image>\n"


@dataclass(frozen=True)
class CaptionValidation:
    """What validation measured on the held-out images.

    Attributes:
        loss: mean cross entropy in nats per text token of a caption.
        accuracy: share of the images whose label a greedy writer of the caption gets right, given the words before it.
        images: how many.
    """

    loss: float
    accuracy: float
    images: int

    def results(self) -> dict[str, Any]:
        """Say of it what events and lineage say."""
        return {"loss": finite(self.loss), "accuracy": self.accuracy}

    def numbers(self) -> dict[str, float]:
        """Say of it what loggers take."""
        return {"loss": self.loss, "accuracy": self.accuracy}


class CaptionMaterial(ImageMaterial):
    """Images that predict sentences about their labels.

    Args:
        data: the images.
        section: the sentences, and how images vary in training.
        processor: of the model.
    """

    processor: Any

    def __init__(self, data: ImageData, section: ImageSection, processor: TokenformerProcessor) -> None:
        super().__init__(data, section, processor.image_processor)
        self.processor = processor
        self.captions = [
            [_encoded(processor, caption, label) for label in data.labels] for caption in section.captions or []
        ]

    def check(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Accept any model that `prepare_captions` has accepted: it writes words, whatever the labels are."""

    def flops(self, model: PreTrainedModel, training: TrainingSection) -> float:
        """FLOPs of training on an image with its caption."""
        sample = {name: tensor.to(model.device) for name, tensor in self.sample(1).items()}
        return cost.training_flops_of(model, inputs={**sample, "use_cache": False})

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make the model's inputs and labels of images; which sentence describes one is decided by its place."""
        images = images_of([row["pixels"].tobytes() for row in rows], self.data.size)
        batch = self._batch(images, [row["label"] for row in rows], [row["place"] for row in rows])
        del batch["named"]
        return batch

    def sample(self, images: int = 4) -> dict[str, Any]:
        """Return a few held-out images with their captions."""
        some = self.data.validation.select(range(min(images, len(self.data.validation))))
        batch = self._batch(images_of(some["pixels"], self.data.size), some["label"], range(len(some)))
        return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, training: TrainingSection) -> CaptionValidation:  # type: ignore[override]
        """Measure a model on the held-out images, as precisely as it trains."""
        device, dtype, was_training = model.device, autocast_type(training.precision), model.training
        total, count, right, first = 0.0, 0, 0, 0
        model.eval()
        try:
            for rows in self.data.validation.iter(batch_size=training.micro_batch_size or 64):
                places = range(first, first + len(rows["label"]))
                found = self._batch(images_of(rows["pixels"], self.data.size), rows["label"], places)
                batch = {name: tensor.to(device) for name, tensor in found.items()}
                labels, named = batch.pop("labels")[:, 1:], batch.pop("named")[:, 1:]
                with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                    logits = model(**batch, use_cache=False).logits[:, :-1].float()
                total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
                count += int((labels >= 0).sum())
                right += int(((logits.argmax(-1) == labels) | ~named).all(1).sum())
                first = places.stop
        finally:
            model.train(was_training)
        return CaptionValidation(total / count, right / first, first)

    def _batch(self, images: Any, labels: Any, places: Any) -> dict[str, Tensor]:
        """Return inputs, labels, and which positions name what is seen, of images with their captions."""
        prompt = self.processor.tokenizer(
            PROMPT.replace("<image>", "<image>" * self.processor.image_positions), add_special_tokens=False
        )["input_ids"]
        texts = [self.captions[place % len(self.captions)][label] for label, place in zip(labels, places, strict=True)]
        longest = max(len(ids) for ids, _ in texts)
        ids, wanted, named, mask = [], [], [], []
        for text, names in texts:
            padding = longest - len(text)
            ids.append([*prompt, *text, *[0] * padding])
            wanted.append([*[-100] * len(prompt), *text, *[-100] * padding])
            named.append([*[False] * len(prompt), *names, *[False] * padding])
            mask.append([*[1] * (len(prompt) + len(text)), *[0] * padding])
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "pixel_values": pixel_values(images, self.processor.image_processor),
            "labels": torch.tensor(wanted),
            "named": torch.tensor(named),
        }


def prepare_captions(recipe: Recipe, run: Path, config: PreTrainedConfig | None) -> CaptionMaterial:
    """Read the images of a recipe, in the size of its model, whose processor it takes.

    Raises:
        DataError: from the images. RecipeError: a model that does not read both text and images.
    """
    assert recipe.images is not None
    initial, model = recipe.model.checkpoint, config
    if initial is None or model is None or model.model_type != "tokenformer_multimodal":
        kind = recipe.model.architecture if model is None else model.model_type
        raise RecipeError(
            f"images.captions are for a model that reads text and images; {initial or 'model'} is a {kind!r} model. "
            "`tokenformer merge LANGUAGE VISION -o BOTH --by modality` makes one, for model.checkpoint"
        )
    data = prepare_images(recipe.images, size=model.image_height_width)
    return CaptionMaterial(data, recipe.images, load_processor(initial))


def _encoded(processor: TokenformerProcessor, caption: str, label: str) -> tuple[list[int], list[bool]]:
    """Return the text tokens of a sentence and the end of text, and which of them name the label."""
    text, start = caption.replace("{label}", label), caption.index("{label}")
    found = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    names = [first < start + len(label) and last > start for first, last in found["offset_mapping"]]
    return [*found["input_ids"], processor.tokenizer.eos_token_id], [*names, False]
