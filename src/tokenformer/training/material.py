"""What a stage asks of its data, whatever that is: text (`training.text`) or images (`training.images`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.order import Reading
from .recipe import Recipe, TrainingSection


class Measured(Protocol):
    """What a validation measured."""

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats for each thing that was predicted."""

    def results(self) -> dict[str, Any]:
        """Say of it what events and lineage say."""

    def numbers(self) -> dict[str, float]:
        """Say of it what loggers take."""


class Material(ABC):
    """Data that is ready for training and validation.

    Attributes:
        unit: what is counted: how much of it a stage reads, and `UNIT_seen` in events and lineage.
        facts: for logs and lineage.
        processor: what makes a model's inputs, to be written beside it: a tokenizer, or an image processor.
        loss: of training, in place of the model's own: from its outputs, the labels and their number in the step.
    """

    unit: Literal["text_tokens", "images"]
    facts: dict[str, Any]
    processor: Any
    loss: Callable[..., Tensor] | None = None

    @abstractmethod
    def config(self, recipe: Recipe) -> PreTrainedConfig:
        """Return the configuration of a recipe's first model, of random weights.

        Raises:
            RecipeError: sizes that make no model, or a model that does not read such data.
        """

    @abstractmethod
    def check(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Refuse a configuration, of the recipe's own model or of its checkpoint, that does not fit the data.

        Raises:
            RecipeError, TokenizerError: what does not fit.
        """

    @abstractmethod
    def adapt(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Change in a loaded model's configuration what the recipe makes larger."""

    @abstractmethod
    def per_step(self, training: TrainingSection) -> int:
        """Text tokens, or images, in an optimizer step."""

    @abstractmethod
    def flops(self, model: PreTrainedModel, training: TrainingSection) -> float:
        """FLOPs of training on one of them."""

    @abstractmethod
    def examples(self, reading: Reading, *, seed: int) -> Any:
        """Return what a stage trains on, in its order, for transformers' Trainer."""

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make the model's inputs and labels of some examples."""

    @abstractmethod
    def reads(self, reading: Reading) -> dict[str, dict[str, float]]:
        """Say what share of a stage each of its sources is, and where it is known how many times over it is read."""

    @abstractmethod
    def sample(self) -> dict[str, Any]:
        """Return a few held-out inputs of the model, to compare its outputs on."""

    @abstractmethod
    def measure(self, model: PreTrainedModel, training: TrainingSection) -> Measured:
        """Measure a model on what is held out, as precisely as it trains."""
