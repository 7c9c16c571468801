"""The grammar of `data` in recipes: one text, or a mixture of several, and how it is held out and tokenised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from ..sections import Section


@dataclass(frozen=True)
class Use:
    """A text as a stage reads it.

    Attributes:
        name: of the text, which has one meaning in a run.
        source: as `data.source`.
        text_column, split: likewise.
        span: which of its training documents, from where to where.
        sorted_by: checkpoint that says in which order they are counted; None: by hash.
    """

    name: str
    source: tuple[str, ...]
    text_column: str
    split: str
    span: tuple[float, float] = (0.0, 1.0)
    sorted_by: str | None = None

    @property
    def key(self) -> str:
        """What tells this text, or this share of it, from others."""
        by = f" by {self.sorted_by}" if self.sorted_by else ""
        return self.name if self.span == (0, 1) else f"{self.name} {self.span[0]:g}–{self.span[1]:g}{by}"

    @property
    def origin(self) -> tuple[tuple[str, ...], str, str]:
        """Where its documents come from."""
        return self.source, self.text_column, self.split


class PartSection(Section):
    """A text of a mixture; a number alone is its weight."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of the text tokens, in proportion to the weights of the others."""
    source: str | list[str] | None = None
    """As `data.source`. Default: its name."""
    share: float | list[float] = 1.0
    """Which of its training documents: 0.1 is a tenth, [0.1, 0.5] what lies between, in the order of their hash."""
    sorted_by: str | None = None
    """Checkpoint: `share` counts documents in the order of its bits per byte instead, easiest first."""
    text_column: str | None = None
    """As `data.text_column`, which is the default."""
    split: str | None = None
    """As `data.split`, which is the default."""

    @property
    def span(self) -> tuple[float, float]:
        """Where `share` begins and ends."""
        low, high = self.share if isinstance(self.share, list) else (0.0, self.share)
        return low, high

    @model_validator(mode="before")
    @classmethod
    def _number_is_a_weight(cls, given: Any) -> Any:
        if isinstance(given, int | float) and not isinstance(given, bool):
            return {"weight": given}
        if not isinstance(given, dict | PartSection):
            raise ValueError(f"write a weight, such as 0.5, or fields ({', '.join(cls.model_fields)}); found {given!r}")
        return given

    @model_validator(mode="after")
    def _share_is_one(self) -> PartSection:
        if (isinstance(self.share, list) and len(self.share) != 2) or not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"share is {self.share!r}; write one above 0 and up to 1, or where it begins and ends")
        if self.sorted_by is not None and self.span == (0, 1):
            raise ValueError("sorted_by says how a share is counted; give a share, such as 0.5 for the easier half")
        return self


class TextSection(Section):
    """What is read: one text, or a mixture of several."""

    source: str | list[str] | None = None
    """"shakespeare", "python-stdlib", a file, folder, glob, .jsonl, .parquet, a dataset name, or a list."""
    mixture: dict[str, PartSection] = Field({})
    """Instead: several texts by name, each with its weight, as in {new: 0.9, old: 0.1}, or with the fields below."""

    @model_validator(mode="after")
    def _one_of_both(self) -> TextSection:
        if (self.source is None) == (not self.mixture):
            raise ValueError("name one text as source, or several with their weights as mixture")
        return self

    def uses(self, whole: DataSection) -> dict[Use, float]:
        """Return the texts with their shares of the text tokens, which add up to 1.

        Args:
            whole: the recipe's `data`, for what is not said here.
        """
        parts = self.mixture or {_name(self.source): PartSection(source=self.source)}
        total = sum(part.weight for part in parts.values())
        return {
            Use(
                name,
                _listed(name if part.source is None else part.source),
                part.text_column or whole.text_column,
                part.split or whole.split,
                part.span,
                part.sorted_by,
            ): part.weight / total
            for name, part in parts.items()
        }

    def shares(self, whole: DataSection) -> dict[str, float]:
        """Return the shares of the text tokens by `Use.key`."""
        return {use.key: share for use, share in self.uses(whole).items()}


class DataSection(TextSection):
    """The text: where from, how held out, how tokenised."""

    validation_source: str | list[str] | None = None
    """Text to validate on. Default: documents held out of `source`."""
    validation_split: str = "validation"
    """Split of a named dataset given as `validation_source`."""
    text_column: str = "text"
    """Column that holds the text in JSONL, Parquet and datasets."""
    split: str = "train"
    """Split of a named dataset."""
    validation_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of each text (in UTF-8 bytes) whose documents are held out for validation."""
    validation_bytes: int | None = Field(262_144, gt=0)
    """Most held-out text to evaluate on, in UTF-8 bytes of each text, whole documents (at least one); null for all."""
    tokenizer: str = "bpe:4096"
    """"bpe:N" (byte-level BPE trained on the training text), "bytes", or a Hugging Face name or folder. A checkpoint's
    own tokenizer goes before it."""
    streaming: bool = False
    """Read and tokenise on the fly instead of caching: for corpora larger than the disk."""

    @model_validator(mode="after")
    def _texts_of_a_mixture_hold_out_their_own(self) -> DataSection:
        if self.mixture and self.validation_source is not None:
            raise ValueError("each text of a mixture holds out documents of its own; take validation_source out")
        return self


def texts_in(whole: DataSection, others: Iterable[TextSection | None]) -> dict[str, Use]:
    """Return all uses of texts in a recipe by their keys, those of `data` first.

    Raises:
        ValueError: a name with two meanings, a text under two names, or a stream among several.
    """
    found: dict[str, Use] = {}
    names: dict[tuple[tuple[str, ...], str, str], str] = {}
    origins: dict[str, tuple[tuple[str, ...], str, str]] = {}
    for section in (whole, *(other for other in others if other is not None)):
        for use in section.uses(whole):
            if origins.setdefault(use.name, use.origin) != use.origin:
                raise ValueError(f"the text {use.name!r} has two sources; one name means one text in all stages")
            if names.setdefault(use.origin, use.name) != use.name:
                raise ValueError(f"the texts {names[use.origin]!r} and {use.name!r} have one source; keep one name")
            found[use.key] = use
    if whole.streaming and (len(found) > 1 or whole.mixture):
        raise ValueError("data.streaming goes with one text in all stages; take out streaming, or the other texts")
    return found


def _listed(source: str | list[str]) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else tuple(source)


def _name(source: str | list[str] | None) -> str:
    return ", ".join(_listed(source or []))
