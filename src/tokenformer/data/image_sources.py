"""Where images with labels come from: folders, IDX files, Parquet, named datasets; each to pixels of one size."""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher
from PIL import Image

from ..errors import DataError, first_line
from .cache import cached
from .idx import read_idx

_SUFFIXES = frozenset(Image.registered_extensions())
_FASHION = Path("/usr/share/datasets/fashion-mnist")
_CLOTHES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
# How the names of the parts of a dataset begin in IDX files: MNIST calls its test part t10k.
_BEGINNINGS = {"test": ("test", "t10k")}

Picture = tuple[Any, int, str]


@dataclass(frozen=True)
class _Source:
    """Images that are not decoded yet.

    Attributes:
        labels: their names.
        pictures: yields (a PIL image, its label, where it is) of each.
        content: tells it from others, and from what it was before its files changed.
    """

    labels: list[str]
    pictures: Callable[[], Iterator[Picture]]
    content: Any


def load_images(
    source: str,
    *,
    size: tuple[int, int],
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    labels: list[str] | None = None,
) -> datasets.Dataset:
    """Return the images of a part of `source` with their labels, brought to `size`, height and width.

    A row is `{"pixels": bytes, "label": number}`, the pixels being uint8 `[height, width, 3]`; the feature of the label
    names all labels. Arguments as the fields of `ImageSection`. A grey image has three equal channels, and transparency
    is left out.

    Raises:
        DataError: nothing there, fewer than two labels, or an image that is damaged, animated, has 16 bits a channel or
            is too large to be one.
    """
    found = _find(source, split, image_column, label_column)
    names = found.labels if labels is None else labels
    if labels is not None and len(labels) != len(found.labels):
        raise DataError(f"images.labels names {len(labels)} labels, and {source!r} has {len(found.labels)}")
    if len(names) < 2:
        raise DataError(f"{source!r} has only one label, {names[0]!r}: there is nothing to tell apart; add another")
    features = {"pixels": datasets.Value("binary"), "label": datasets.ClassLabel(names=names)}
    key = Hasher.hash([found.content, size, names, 1])
    rows = cached(lambda: _rows(found, size), datasets.Features(features), key=key)
    if not len(rows):
        raise DataError(f"{source!r} holds no images in its part {split!r}")
    return rows


def pixels(image: Image.Image, where: str, size: tuple[int, int]) -> bytes:
    """Return an image in `size`, as transformers' image processors resize it: uint8 `[height, width, 3]`.

    Raises:
        DataError: it cannot be decoded, is animated, has 16 bits a channel, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(f"{where} is animated, with {image.n_frames} frames; keep one of them")  # type: ignore[attr-defined]
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{where} has more than 8 bits a channel; convert it to 8")
            image = image.convert("RGB")
            if image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be read as an image: {first_line(error)}; mend it or leave it out") from error
    return image.tobytes()


def _rows(source: _Source, size: tuple[int, int]) -> Iterator[dict[str, list[Any]]]:
    pictures = source.pictures()
    while some := list(itertools.islice(pictures, 256)):
        yield {"pixels": [pixels(image, where, size) for image, _, where in some], "label": [row[1] for row in some]}


def _open(file: Any, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be read as an image: {first_line(error)}; mend it or leave it out") from error


def _find(source: str, split: str, image_column: str, label_column: str) -> _Source:
    if source == "fashion-mnist":
        if not _FASHION.is_dir():
            raise DataError(
                f"fashion-mnist is not in {_FASHION}: apt-get install dataset-fashion-mnist, or name a folder of its "
                "IDX files as images.source"
            )
        found = _idx_files(_FASHION, split)
        return _Source(_CLOTHES, found.pictures, found.content)
    path = Path(source).expanduser()
    if path.is_dir() and (any(path.glob("*-ubyte")) or any(path.glob("*-ubyte.gz"))):
        return _idx_files(path, split)
    if path.is_dir() and not any(path.glob("*.parquet")):
        return _folders(path, split)
    files = sorted(map(str, path.glob("*.parquet"))) if path.is_dir() else sorted(glob.glob(str(path)))
    if not files and source.endswith(".parquet"):
        raise DataError(f"images.source: there is no file {path.absolute()}")
    try:
        if files:
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            name, _, configuration = source.partition(":")
            table = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # a hub can fail in as many ways as a network; all mean that the source is not there
        raise DataError(
            f"images.source {source!r} is no folder or file (looked at {path.absolute()}), and loading a dataset of "
            f"that name failed: {first_line(error)}"
        ) from error
    return _table(table, source, image_column, label_column)


def _digests(files: list[Path]) -> list[str]:
    """Tell files by what they hold: one may change and keep its name, its size and its time."""
    found = []
    for file in files:
        with open(file, "rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return found


def _idx_files(folder: Path, split: str) -> _Source:
    beginnings = _BEGINNINGS.get(split, (split,))
    files = [f for f in sorted(folder.iterdir()) if f.name.startswith(beginnings) and "-ubyte" in f.name]
    images, labels = ([f for f in files if kind in f.name] for kind in ("-images", "-labels"))
    if len(images) != 1 or len(labels) != 1:
        there = ", ".join(sorted(f.name for f in folder.iterdir() if "-ubyte" in f.name))
        raise DataError(
            f"{folder} has no pair of IDX files that begin with {' or '.join(beginnings)}, of images and of labels; it "
            f"has {there}"
        )
    numbers = read_idx(labels[0])

    found = read_idx(images[0])
    if len(found) != len(numbers) or found.ndim not in (3, 4) or numbers.ndim != 1:
        raise DataError(
            f"{images[0].name} holds {found.shape} numbers and {labels[0].name} {numbers.shape}, in {folder}: these "
            "are no images with a label each"
        )

    def pictures() -> Iterator[Picture]:
        for i, (picture, label) in enumerate(zip(found, numbers, strict=True)):
            yield Image.fromarray(picture), int(label), f"{images[0]}, image {i + 1}"

    return _Source([str(i) for i in range(int(numbers.max(initial=0)) + 1)], pictures, _digests([*images, *labels]))


def _folders(path: Path, split: str) -> _Source:
    """Read a folder for each label, or such folders inside one for each part."""
    top = path / split if (path / split).is_dir() else path
    if top == path and split != "train":
        raise DataError(f"{path.absolute()} has no part {split!r}: there is no folder of that name in it")
    folders = sorted(folder for folder in top.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = {
        folder: sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))
        for folder in folders
    }
    empty = [folder.name for folder, inside in files.items() if not inside]
    if empty or not folders:
        what = f"no pictures in {', '.join(empty)}" if empty else "no folders"
        raise DataError(f"{top.absolute()} has {what}; it must have a folder for each label, with its pictures")

    def pictures() -> Iterator[Picture]:
        for label, folder in enumerate(folders):
            for file in files[folder]:
                yield _open(file, str(file)), label, str(file)

    digests = [(folder.name, _digests(files[folder])) for folder in folders]
    return _Source([folder.name for folder in folders], pictures, digests)


def _table(table: datasets.Dataset, source: str, image_column: str, label_column: str) -> _Source:
    for column, option in ((image_column, "image_column"), (label_column, "label_column")):
        if column not in table.column_names:
            there = ", ".join(table.column_names)
            raise DataError(f"{source!r} has no column {column!r}, only {there}; name another as images.{option}")
    try:
        table = table.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:  # whatever Arrow cannot make an image of
        raise DataError(f"column {image_column!r} of {source!r} holds no images: {first_line(error)}") from error
    kind, found = table.features[label_column], table[label_column]
    number: Callable[[Any], int] = int
    if isinstance(kind, datasets.ClassLabel):
        names = kind.names
    elif all(isinstance(label, str) for label in found):
        names = sorted(set(found))
        number = names.index
    elif all(isinstance(label, int) and label >= 0 for label in found):
        names = [str(i) for i in range(max(found, default=0) + 1)]
    else:
        raise DataError(
            f"column {label_column!r} of {source!r} holds {kind.dtype}, with rows that are no names and no numbers "
            "from 0 on; name another as images.label_column"
        )

    def pictures() -> Iterator[Picture]:
        for i, row in enumerate(table.select_columns([image_column, label_column])):
            where, stored = f"{source}, row {i + 1}", row[image_column]
            if stored is None:
                raise DataError(f"{where} has no picture in {image_column!r}; leave the row out")
            content = io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]
            yield _open(content, where), number(row[label_column]), where

    return _Source(names, pictures, [table._fingerprint, image_column, label_column])
