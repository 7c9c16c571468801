"""Images in, pixels and labels out: what is held out, what is known of the whole, and how training varies them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..errors import DataError
from .image_section import ImageSection
from .image_sources import load_images


@dataclass(frozen=True)
class ImageData:
    """Images ready for training; rows as `load_images` gives them.

    Attributes:
        train, validation: the rows.
        size: height and width of all, in pixels.
        labels: their names.
        facts: for logs and lineage.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    size: tuple[int, int]
    labels: list[str]
    facts: dict[str, Any]


def prepare_images(section: ImageSection, *, size: tuple[int, int]) -> ImageData:
    """Read and hold out what a recipe's `images` section says, all in one size.

    Raises:
        DataError: as `load_images`, nothing to hold out, or a part to validate on that has labels of its own.
    """
    columns: dict[str, Any] = {
        "image_column": section.image_column,
        "label_column": section.label_column,
        "labels": section.labels,
    }
    rows = load_images(section.source, size=size, split=section.split, **columns)
    labels = rows.features["label"].names
    hashes = _hashes(rows)
    if section.validation_split is None:
        held = hashes < section.validation_fraction * 2.0**64
        if not held.any():
            held = hashes == hashes.min()
        train, validation = rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))
    else:
        validation = load_images(section.source, size=size, split=section.validation_split, **columns)
        if (theirs := validation.features["label"].names) != labels:
            raise DataError(
                f"the images to validate on have the labels {', '.join(theirs)}, those to train on "
                f"{', '.join(labels)}; they must be the same"
            )
        train = rows.select(np.flatnonzero(~np.isin(hashes, _hashes(validation))))
    if not len(train):
        raise DataError(f"every image of {section.source!r} is held out, for all are equal or in both parts; give more")
    missing = sorted(set(range(len(labels))) - set(train["label"]))
    if missing:
        names = ", ".join(labels[i] for i in missing)
        raise DataError(f"no image to train on has the label {names}; add some, or take the label out")
    facts = {
        "source": section.source,
        "labels": len(labels),
        "height_width": list(size),
        "training_images": len(train),
        "validation_images": len(validation),
        "images_sha256": _digest(train, validation),
    }
    return ImageData(train, validation, size, labels, facts)


class Varied:
    """Images in the order in which a stage reads them, each moved and mirrored as its place in that order says.

    An item is `{"pixels": uint8 [height, width, 3], "label": number, "place": number}`, and it is the same whoever asks
    and whenever, so that a run which was interrupted sees what it would have seen.

    Args:
        data: of which the training images are read.
        order: their numbers, int64 `[images]`.
        section: says by how much they vary.
        seed, first: of the variations, with the places of the images counted from `first`.
    """

    def __init__(self, data: ImageData, order: np.ndarray, section: ImageSection, *, seed: int, first: int) -> None:
        self.data, self.order, self.section, self.seed, self.first = data, order, section, seed, first

    def __len__(self) -> int:
        """Count the images."""
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Return one image and its label."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Return several at once, for which torch's DataLoader asks."""
        rows = self.data.train[self.order[list(places)]]
        images = images_of(rows["pixels"], self.data.size)
        return [
            {"pixels": self._vary(image, place), "label": label, "place": self.first + place}
            for image, label, place in zip(images, rows["label"], places, strict=True)
        ]

    def _vary(self, image: np.ndarray, place: int) -> np.ndarray:
        crop = self.section.crop
        if not crop and not self.section.flip:
            return image
        rng = np.random.default_rng([self.seed, self.first + place])
        down, right, mirrored = rng.integers(0, [2 * crop + 1, 2 * crop + 1, 2])
        if crop:
            height, width = self.data.size
            padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="edge")
            image = padded[down : down + height, right : right + width]
        return image[:, ::-1] if self.section.flip and mirrored else image


def images_of(pixels: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    """Return rows' pixels as one array, uint8 `[images, height, width, 3]`."""
    return np.frombuffer(bytearray(b"".join(pixels)), np.uint8).reshape(len(pixels), *size, 3)


def _hashes(rows: datasets.Dataset) -> np.ndarray:
    """Return a number in [0, 2⁶⁴) of each image's pixels, uint64 `[images]`."""
    found = bytearray()
    for batch in rows.select_columns(["pixels"]).iter(batch_size=1024):
        for pixels in batch["pixels"]:
            found += hashlib.sha256(pixels).digest()[:8]
    return np.frombuffer(bytes(found), ">u8")


def _digest(*parts: datasets.Dataset) -> str:
    """Identify images by their pixels, labels and order: 64 hexadecimal digits."""
    whole = hashlib.sha256()
    for rows in parts:
        whole.update(_hashes(rows).tobytes())
        whole.update(np.array(rows["label"]).tobytes())
        whole.update(b"end of a part")
    return whole.hexdigest()
