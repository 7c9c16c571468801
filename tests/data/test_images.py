"""Images and their labels: every source gives the same rows, and what cannot be read is refused in a sentence."""

import gzip
import io
import shutil
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers import ViTImageProcessorPil

from tokenformer.batches import pixel_values
from tokenformer.data.image_section import ImageSection
from tokenformer.data.image_sources import load_images
from tokenformer.data.images import Varied, images_of, prepare_images
from tokenformer.errors import DataError

SIZE = (6, 8)
NAMES = ["bright", "dark"]


def pictures(count=12):
    """Grey pictures, the bright ones before the dark ones."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 100, (count, *SIZE), dtype=np.uint8) + 100 * (np.arange(count) < count // 2)[
        :, None, None
    ].astype(np.uint8)


def labels(count=12):
    return np.repeat([0, 1], count // 2)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_idx(folder, part="train", count=12, images=None):
    folder.mkdir(exist_ok=True)
    images = pictures(count) if images is None else images
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels(count)))
    return str(folder)


def write_folders(folder):
    for i, (picture, label) in enumerate(zip(pictures(), labels(), strict=True)):
        (folder / NAMES[label] / "more").mkdir(parents=True, exist_ok=True)
        (folder / NAMES[label] / "more" / f"{i:02}.png").write_bytes(png(picture))
    (folder / NAMES[0] / "notes.txt").write_text("no picture")
    return str(folder)


def write_parquet(folder, kind="struct", **label):
    folder.mkdir(exist_ok=True)
    names = [NAMES[i] for i in labels()]
    stored = [png(picture) for picture in pictures()]
    content = {
        "image": [{"bytes": data, "path": None} for data in stored] if kind == "struct" else stored,
        "label": label.get("label", names),
    }
    datasets.Dataset.from_dict(content).to_parquet(folder / "images.parquet")
    return str(folder / "images.parquet")


def write_numbers(folder):
    folder.mkdir()
    datasets.Dataset.from_dict({"image": [1, 2], "label": NAMES}).to_parquet(folder / "images.parquet")
    return str(folder)


SOURCES = {
    "idx": lambda f: (write_idx(f), {"labels": NAMES}),
    "folders": lambda f: (write_folders(f), {}),
    "folders of a part": lambda f: (write_folders(f / "train") and str(f), {}),
    "parquet": lambda f: (write_parquet(f), {}),
    "parquet of bytes": lambda f: (write_parquet(f, "bytes"), {}),
    "parquet, numbers": lambda f: (write_parquet(f, label=labels().tolist()), {"labels": NAMES}),
    "a folder of parquet": lambda f: (write_parquet(f) and str(f), {}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_rows(kind, tmp_path):
    source, options = SOURCES[kind](tmp_path / "x")
    rows = load_images(source, size=SIZE, **options)
    assert rows.features["label"].names == NAMES and rows["label"][:] == labels().tolist()
    found = images_of(rows["pixels"], SIZE)
    assert np.array_equal(found, pictures()[..., None].repeat(3, -1))
    again = load_images(source, size=SIZE, **options)
    assert again._fingerprint == rows._fingerprint


def test_images_are_resized_and_scaled_as_the_image_processor_does(tmp_path):
    rng = np.random.default_rng(1)
    tall = rng.integers(0, 256, (40, 31, 3), dtype=np.uint8)
    for name in NAMES:
        (tmp_path / name).mkdir()
        Image.fromarray(tall).save(tmp_path / name / "tall.png")
    half = [0.5, 0.5, 0.5]
    processor = ViTImageProcessorPil(size={"height": 6, "width": 8}, image_mean=half, image_std=half)
    want = processor(images=Image.fromarray(tall), return_tensors="np")["pixel_values"]
    rows = load_images(str(tmp_path), size=SIZE)
    found = pixel_values(images_of(rows["pixels"], SIZE), processor).numpy()
    assert found.shape == (2, 3, 6, 8) and np.abs(found[:1] - want).max() < 1e-6


def test_a_file_that_changes_is_read_again(tmp_path):
    source = write_folders(tmp_path)
    before = load_images(source, size=SIZE)["pixels"][0]
    file = sorted((tmp_path / "bright" / "more").iterdir())[0]
    file.write_bytes(png(255 - pictures()[0]))
    assert load_images(source, size=SIZE)["pixels"][0] == bytes(255 - b for b in before)


def odd(save):
    """A folder of classes in which one file is odd."""

    def write(folder):
        write_folders(folder)
        save(folder / "bright" / "odd.png")
        return str(folder), {}

    return write


def animated(file):
    frames = [Image.fromarray(p) for p in pictures()[:3]]
    for i, frame in enumerate(frames):
        ImageDraw.Draw(frame).point((i, i), 255)
    frames[0].save(file.with_suffix(".gif"), save_all=True, append_images=frames[1:])


def sixteen(file):
    Image.fromarray(np.full(SIZE, 40_000, np.uint16)).save(file)


def bomb(file):
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + bytes([8, 0, 0, 0, 0])
    chunks = [header, b"IDAT" + zlib.compress(b"")]
    written = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


def without_dark(folder):
    write_folders(folder)
    shutil.rmtree(folder / "dark")
    return str(folder), {}


def idx_with(change, name="train-images-idx3-ubyte.gz"):
    def write(folder):
        source = write_idx(folder)
        file = folder / name
        packed = file.suffix == ".gz"
        content = change(gzip.decompress(file.read_bytes()) if packed else file.read_bytes())
        file.write_bytes(gzip.compress(content) if packed else content)
        return source, {}

    return write


REFUSED = {
    "nothing": (lambda f: (str(f / "none"), {}), "is no folder or file .*, and loading a dataset of that name failed"),
    "no file": (lambda f: (str(f / "x.parquet"), {}), "there is no file"),
    "not an image": (odd(lambda f: f.write_bytes(b"GIF?")), "odd.png cannot be read as an image: .*; mend it or"),
    "truncated": (odd(lambda f: f.write_bytes(png(pictures()[0])[:60])), "odd.png cannot be read as an image"),
    "animated": (odd(animated), "odd.gif is animated, with 3 frames; keep one"),
    "16 bits": (odd(sixteen), "odd.png has more than 8 bits a channel; convert it"),
    "enormous": (odd(bomb), "odd.png cannot be read as an image: .*[Dd]ecompression bomb"),
    "one class": (without_dark, "only one label, 'bright'"),
    "an empty class": (
        lambda f: ((f / "empty").mkdir(parents=True) or write_folders(f), {}),
        "has no pictures in empty",
    ),
    "no folders": (lambda f: (f.mkdir() or str(f), {}), "has no folders; it must have a folder for each label"),
    "no such part": (lambda f: (write_folders(f), {"split": "test"}), "has no part 'test'"),
    "no such part of IDX": (lambda f: (write_idx(f), {"split": "test"}), "begin with test or t10k, .* it has train-im"),
    "too few names": (lambda f: (write_idx(f), {"labels": ["a", "b", "c"]}), "names 3 labels, and .* has 2"),
    "short IDX": (idx_with(lambda c: c[:-1]), r"holds 575 bytes, and says 12 × 6 × 8; get it again"),
    "IDX without header": (idx_with(lambda c: c[:3]), "cannot be read as an IDX file"),
    "IDX of floats": (idx_with(lambda c: c[:2] + b"\x0d" + c[3:]), "no IDX file of bytes: it begins with 00 00 0d 03"),
    "other counts": (
        idx_with(lambda c: idx(labels(10)), "train-labels-idx1-ubyte"),
        r"these are no images with a label each",
    ),
    "no such column": (lambda f: (write_parquet(f), {"image_column": "img"}), "no column 'img', only image, label"),
    "odd labels": (lambda f: (write_parquet(f, label=[-1] * 12), {}), "rows that are no names and no numbers from 0"),
    "no images in it": (lambda f: (write_numbers(f), {}), "column 'image' of .* holds no images"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_read_is_refused(kind, tmp_path):
    write, message = REFUSED[kind]
    source, options = write(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        load_images(source, size=SIZE, **options)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK", "1", "L"])
def test_every_mode_becomes_three_channels(mode, tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        suffix = "tiff" if mode == "CMYK" else "png"
        Image.new("RGB", (1, 1), (255 * i,) * 3).convert(mode).save(tmp_path / name / f"x.{suffix}")
    rows = load_images(str(tmp_path), size=SIZE)
    found = images_of(rows["pixels"], SIZE)
    assert not found[0].any() and (found[1] == 255).all()


# What is held out


def test_equal_images_stay_on_one_side_and_the_seed_plays_no_part(tmp_path):
    images = pictures(200)
    images[100:] = images[:100]
    section = ImageSection(source=write_idx(tmp_path / "x", count=200, images=images), validation_fraction=0.2)
    data = prepare_images(section, size=SIZE)
    train, held = set(data.train["pixels"]), set(data.validation["pixels"])
    assert not train & held and len(train) + len(held) == len({p.tobytes() for p in images})
    assert len(data.train) + len(data.validation) == 200 and 20 <= len(data.validation) <= 60
    assert prepare_images(section, size=SIZE).facts == data.facts
    assert data.facts["training_images"] == len(data.train) and data.facts["labels"] == 2


def test_a_part_to_validate_on_is_not_trained_on(tmp_path):
    write_idx(tmp_path / "x", count=40, images=pictures(40))
    images = pictures(40)[15:25]
    images[1:] += 1
    source = write_idx(tmp_path / "x", "t10k", count=10, images=images)
    data = prepare_images(ImageSection(source=source, validation_split="test"), size=SIZE)
    assert len(data.validation) == 10 and len(data.train) == 39


def test_a_label_without_an_image_to_train_on_is_refused(tmp_path):
    same = np.concatenate([pictures(12)[:6], np.zeros((6, *SIZE), np.uint8)])
    write_idx(tmp_path / "x", "test", images=same)
    source = write_idx(tmp_path / "x", images=same)
    with pytest.raises(DataError, match=r"every image .* is held out"):
        prepare_images(ImageSection(source=source, validation_split="test"), size=SIZE)
    write_idx(tmp_path / "x", images=np.concatenate([pictures(12)[6:], np.zeros((6, *SIZE), np.uint8)]))
    with pytest.raises(DataError, match="no image to train on has the label 1"):
        prepare_images(ImageSection(source=source, validation_split="test"), size=SIZE)


# How they vary


def varied(tmp_path, **section):
    data = prepare_images(ImageSection(source=write_idx(tmp_path / "x", count=40, images=pictures(40))), size=SIZE)
    return data, lambda seed=0, first=0: Varied(
        data, np.arange(20) % len(data.train), ImageSection(source="x", **section), seed=seed, first=first
    )


def test_an_image_varies_by_its_place_and_seed_and_by_nothing_else(tmp_path):
    _, make = varied(tmp_path, crop=2, flip=True)
    one, other = make(), make()
    backwards = [other[i]["pixels"] for i in reversed(range(20))][::-1]
    together = [row["pixels"] for row in one.__getitems__(range(20))]
    assert all(np.array_equal(a, b) for a, b in zip(together, backwards, strict=True))
    shifted, seeded = make(first=1), make(seed=1)
    assert any(not np.array_equal(shifted[i]["pixels"], one[i]["pixels"]) for i in range(20))
    assert any(not np.array_equal(seeded[i]["pixels"], one[i]["pixels"]) for i in range(20))


def test_crops_and_flips_are_all_that_can_happen(tmp_path):
    data, make = varied(tmp_path, crop=1, flip=True)
    seen = set()
    for i, row in enumerate(make().__getitems__(range(20))):
        image = images_of(data.train["pixels"][i : i + 1], SIZE)[0]
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        for down in range(3):
            for right in range(3):
                for mirrored in (False, True):
                    want = padded[down : down + 6, right : right + 8]
                    if np.array_equal(want[:, ::-1] if mirrored else want, row["pixels"]):
                        seen.add((down, right, mirrored))
                        break
        assert row["label"] == data.train["label"][i]
    assert len(seen) > 8 and len({mirrored for *_, mirrored in seen}) == 2


def test_without_crop_and_flip_images_are_what_they_are(tmp_path):
    data, make = varied(tmp_path)
    assert np.array_equal(make()[3]["pixels"], images_of(data.train["pixels"][3:4], SIZE)[0])
