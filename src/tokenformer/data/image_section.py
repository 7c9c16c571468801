"""The grammar of `images` in recipes: pictures with labels, how they are held out and how they vary in training."""

from __future__ import annotations

from pydantic import Field, model_validator

from ..sections import Section


class ImageSection(Section):
    """The images and their labels: where from, how held out, how varied."""

    source: str
    """"fashion-mnist" (Debian's package dataset-fashion-mnist), a folder with a folder of pictures for each label, a
    folder of IDX files, a .parquet file or glob, or a dataset name. Whatever their size, they are brought to
    model.image_size."""
    split: str = "train"
    """Part of the source to train on: the beginning of an IDX file's name, a folder above those of the labels, or a
    split of a dataset; what has no parts is all "train"."""
    validation_split: str | None = None
    """Part of the source to validate on. Default: images held out of `split`."""
    validation_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of the images of `split` that is held out, by the hash of their pixels; equal ones stay together."""
    image_column: str = "image"
    """Column that holds the pictures in Parquet and datasets."""
    label_column: str = "label"
    """Column that holds the labels there: names, or numbers from 0 on."""
    labels: list[str] | None = Field(None, min_length=2)
    """Names of labels that are numbers, in their order. Default: the source's own, or the numbers."""
    crop: int = Field(0, ge=0)
    """Pixels by which a training image is moved at most, to any side; its outermost pixels fill the gap."""
    flip: bool = False
    """Mirror every other training image, left to right."""
    captions: list[str] | None = Field(None, min_length=1)
    """For a model that reads text and images: sentences with {label} in them. Each image is described by one of them,
    which the model learns to write."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all labels in training; validation never does."""

    @model_validator(mode="after")
    def _captions_name_the_label(self) -> ImageSection:
        odd = [caption for caption in self.captions or [] if caption.count("{label}") != 1]
        if odd:
            raise ValueError(f"captions say what an image shows with one {{label}} in each; {odd[0]!r} does not")
        if self.captions and self.label_smoothing:
            raise ValueError("label_smoothing is for labels, and captions are instead of them: take one of them out")
        return self
