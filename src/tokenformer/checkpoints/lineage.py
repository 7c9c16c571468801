"""Where a checkpoint came from: the history of what was done to get there, kept beside its weights as lineage.json."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import pydantic


class Event(pydantic.BaseModel):
    """One thing that happened to a checkpoint.

    Costs are totals up to and including this event, so that the last one tells what the checkpoint cost.
    """

    operation: str
    """"train", "convert", or what was done to token groups: "grow", "freeze", "unfreeze", "drop", "consolidate",
    "merge", "attach", "prune", "sort", "shrink" or "route"; or "export"."""
    arguments: dict[str, Any] = {}
    """What it was asked to do."""
    parent: str | None = None
    """sha256 of the weights it started from; null for random ones, and for grown ones that were never written."""
    parent_dtype: str | None = None
    """Type of those weights, such as "bfloat16": training computes and writes float32, and `drop` gives it back."""
    recipe: dict[str, Any] | None = None
    """The whole training recipe."""
    data: dict[str, Any] | None = None
    """What the text or the images were: source, tokenizer, what was held out, and of training what share each text
    was."""
    seed: int | None = None
    """Of everything random in it."""
    text_tokens_seen: int = 0
    """Text tokens trained on."""
    images_seen: int = 0
    """Images trained on."""
    training_flops: float = 0.0
    """FLOPs spent on training."""
    training_seconds: float = 0.0
    """Wall time spent on training."""
    loss: float | None = None
    """Validation loss afterwards, in nats per text token or per image."""
    bits_per_byte: float | None = None
    """Validation loss afterwards, in bits per UTF-8 byte."""
    bits_per_byte_of: dict[str, float | None] | None = None
    """The same of each text, where there are several."""
    accuracy: float | None = None
    """Share of the held-out images whose label the model found likeliest afterwards."""
    top5_accuracy: float | None = None
    """Share of those whose label was among the five likeliest."""
    date: str = pydantic.Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """When, in UTC."""
    versions: dict[str, str] = pydantic.Field(
        default_factory=lambda: {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{package: metadata.version(package) for package in ("tokenformer", "torch", "transformers")},
        }
    )
    """Of the software that did it."""


class Lineage(pydantic.BaseModel):
    """Where a checkpoint came from: its history, oldest event first, and digests of the files it led to."""

    weights_sha256: str | None = None
    """Over the weight files, in the order of their names."""
    files_sha256: dict[str, str] | None = None
    """Of each file beside them on which the checkpoint depends: configuration, tokenizer, optimizer."""
    dtype: str | None = None
    """Type of the weights, such as "bfloat16"; the widest where they differ."""
    history: list[Event] = []

    @property
    def last(self) -> Event:
        """The newest event, or an empty one."""
        return self.history[-1] if self.history else Event(operation="unknown")

    @property
    def last_recipe(self) -> dict[str, Any] | None:
        """The recipe of the last training, or None where there was none."""
        return next((event.recipe for event in reversed(self.history) if event.recipe), None)

    @property
    def ordered(self) -> bool:
        """Whether the parameter tokens that matter most were put first: sorted, or trained with nested dropout."""
        return any(event.operation == "sort" or _nested_dropout(event) for event in self.history)

    def then(self, operation: str, **event: Any) -> Lineage:
        """Return this lineage with one more event, which carries the costs on where it does not state them."""
        fields = ("text_tokens_seen", "images_seen", "training_flops", "training_seconds")
        costs = {field: getattr(self.last, field) for field in fields}
        before = {"parent": self.weights_sha256, "parent_dtype": self.dtype}
        new = Event(**{"operation": operation, **before, **costs, **event})
        return Lineage(history=[*self.history, new])


def _nested_dropout(event: Event) -> bool:
    try:  # both may be anything: lineages are files, too
        return bool((event.recipe or {})["stages"][event.arguments["stage"] - 1]["nested_dropout"])
    except (KeyError, IndexError, TypeError):
        return False
