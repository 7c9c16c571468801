"""What the files of a checkpoint hold, and whether they are whole: told from headers and digests, without torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..units import counted
from .files import files_digest, find_checkpoint
from .lineage import Lineage

CONFIG_FILE = "config.json"
ADDON_CONFIG = "addon_config.json"
ADDON_WEIGHTS = "addon_model.safetensors"
EXPORT_FILE = "export.json"
LINEAGE_FILE = "lineage.json"
CARD_FILE = "README.md"
OPTIMIZER_FILE = "optimizer.pt"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
# How names of the files begin that tokenizers and image processors are kept in.
_PROCESSORS = (
    "preprocessor_config",
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens_map",
    "added_tokens",
    "spiece",
    "chat_template",
)
# What other tools keep weights in, beside ours.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz"}
_MOST_CARRIED = 200_000_000  # bytes: tokenizers reach tens of megabytes
_MOST_JSON = 20_000_000  # bytes: the index of a thousand shards has a few; Python needs ten times as much to read it
# The names that safetensors gives to types which weights can have here, narrowest first, and torch's.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Header:
    """What a weight file says of one tensor.

    Attributes:
        file: that holds it.
        shape: its shape.
        dtype: its type in safetensors' words, such as "BF16".
    """

    file: Path
    shape: list[int]
    dtype: str


def is_addon_folder(path: str | Path) -> bool:
    """Whether a folder holds a token group that goes beside linear maps of its parent, and no model."""
    return (Path(path) / ADDON_CONFIG).is_file()


def exported_for(path: str | Path) -> str | None:
    """Return the engine that a folder holds a model for, as `export` writes it; None where it holds none.

    Raises:
        CheckpointError: it does not say which, or cannot be read.
    """
    file = Path(path) / EXPORT_FILE
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["export_format"])
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"export {path} is damaged: {file.name}: {error}") from error


def config_fields(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's config.json as it is.

    Raises:
        CheckpointError: there is no checkpoint at `path`, or its configuration cannot be read.
    """
    return read_fields(find_checkpoint(Path(path)))


def read_fields(file: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint, which holds fields.

    Raises:
        CheckpointError: it cannot be read, is larger than any should be, or holds something else.
    """
    try:
        if not file.is_file():
            raise FileNotFoundError("there is no such file")
        if file.stat().st_size > _MOST_JSON:
            raise ValueError(f"it has {file.stat().st_size:,} bytes, and none that we know has {_MOST_JSON:,}")
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not fields")
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {file.parent} is damaged: {file.name}: {error}") from error
    return content


def verify_checkpoint(path: str | Path) -> Lineage:
    """Check the files of a checkpoint without loading it, and return its lineage.

    Weights, configuration, tokenizer and optimizer must be those that the lineage names, where it names them; weights
    that no lineage names must be whole safetensors files. The card, a licence and generation settings may change.

    Raises:
        CheckpointError: missing, damaged, truncated or changed files.
    """
    config_fields(path)
    read_headers(path)
    found = weights_digest(path)
    lineage = read_lineage(path)
    if lineage.weights_sha256 is None:
        return lineage.model_copy(update={"weights_sha256": found})
    if found != lineage.weights_sha256:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its weights have sha256 {found[:12]}…, its lineage says "
            f"{lineage.weights_sha256[:12]}…; copy it again, or delete {LINEAGE_FILE} if you changed them yourself"
        )
    for name, wanted in (lineage.files_sha256 or {}).items():
        file = Path(path) / name
        if not file.exists() and name == OPTIMIZER_FILE:  # stays behind when a checkpoint is published
            continue
        if not file.exists():
            raise CheckpointError(
                f"checkpoint {path} is incomplete: {name} missing, which {LINEAGE_FILE} names; copy it again, or take "
                "its line out of files_sha256 there if you took it away yourself"
            )
        if (digest := files_digest([file])) != wanted:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has sha256 {digest[:12]}…, its lineage says {wanted[:12]}…; "
                f"copy it again, or take its line out of files_sha256 in {LINEAGE_FILE} if you changed it yourself"
            )
    return lineage


def read_lineage(path: str | Path) -> Lineage:
    """Read a checkpoint's history without verifying what it says; empty where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = Path(path) / LINEAGE_FILE
    try:
        lineage = Lineage.model_validate(read_fields(file)) if file.exists() else Lineage()
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {LINEAGE_FILE}: {error}") from error
    return lineage.model_copy(update={"dtype": lineage.dtype or stored_dtype(path)})


def read_headers(path: str | Path) -> dict[str, Header]:
    """Return what the weight files of a checkpoint say of each tensor, by name.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file, or its weights are quantised.
    """
    found: dict[str, Header] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="np") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                found |= {name: Header(file, s.get_shape(), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {file.name} ({file.stat().st_size} bytes) cannot be read: {error}; "
                "copy it again, or go back to the checkpoint it came from"
            ) from error
    quantised = {name: header.dtype for name, header in found.items() if header.dtype.startswith(("F8_", "F6_", "F4"))}
    if quantised:
        name, dtype = next(iter(quantised.items()))
        raise CheckpointError(
            f"checkpoint {path} is quantised: {len(quantised)} of its {counted(len(found), 'tensor')}, such as "
            f"{name} ({dtype}); give the one that it was made from"
        )
    return found


def is_old_buffer(name: str) -> bool:
    """Whether a tensor is a buffer that older versions of transformers saved, and newer ones make themselves."""
    return name.endswith(("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias"))


def other_code(path: str | Path) -> list[str]:
    """Name the Python files in a checkpoint's folder that are not this package's own, byte for byte.

    Nothing here ever runs them; `trust_remote_code=True` elsewhere would.
    """
    ours = Path(__file__).parents[1] / "models"
    found = sorted(file for file in Path(path).glob("*.py") if file.is_file())
    return [
        file.name
        for file in found
        if not (ours / file.name).is_file() or file.read_bytes() != (ours / file.name).read_bytes()
    ]


def code_note(path: str | Path) -> str:
    """Say which of a checkpoint's code files are not this package's; "" where all are, or there are none."""
    names = other_code(path)
    if not names:
        return ""
    return (
        f"{counted(len(names), 'code file')} in {path} differ from those of this package: {', '.join(names[:3])}"
        f"{', …' if len(names) > 3 else ''}. They were not run; trust_remote_code=True would run them"
    )


def stored_dtype(path: str | Path) -> str | None:
    """Return the widest type of a checkpoint's weights, such as "bfloat16"; None where none is of floating point."""
    dtypes = {header.dtype for header in read_headers(path).values()}
    return next((DTYPES[dtype] for dtype in reversed(DTYPES) if dtype in dtypes), None)


def weights_digest(path: str | Path) -> str:
    """Return the sha256 over the weight files of a checkpoint, in the order of their names."""
    return files_digest(weight_files(path))


def weight_files(path: str | Path) -> list[Path]:
    """List the weight files of a checkpoint or add-on by name: what is loaded, and nothing that lies beside it.

    Raises:
        CheckpointError: one is missing, or the index that names them is damaged.
    """
    folder = Path(path)
    index = folder / INDEX_FILE
    if is_addon_folder(folder):
        names = [ADDON_WEIGHTS]
    elif (folder / WEIGHTS_FILE).exists() or not index.exists():
        names = [WEIGHTS_FILE]
    else:
        named = read_fields(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise CheckpointError(f"checkpoint {path} is damaged: {index.name}: it names no files as weight_map")
        outside = [name for name in named.values() if not (isinstance(name, str) and _is_name(name))]
        if outside:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {index.name}: it names {str(outside[0])[:200]!r}, which is no "
                "*.safetensors in this folder"
            )
        names = sorted(set(named.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"checkpoint {path} keeps its weights in pickles (.bin), which can run code; load and save it in "
            "transformers, if you trust it, and give the folder with its .safetensors"
        )
    if missing:
        raise CheckpointError(f"checkpoint {path} is incomplete: {', '.join(missing)} missing")
    return [folder / name for name in names]


def _is_name(name: str) -> bool:
    """Whether this is the name of a weight file in the same folder."""
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:") and len(name) < 200


def other_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of the files beside the weights on which a checkpoint depends, by name."""
    names = sorted(f.name for f in folder.iterdir() if f.name.startswith((CONFIG_FILE, OPTIMIZER_FILE, *_PROCESSORS)))
    return {name: files_digest([folder / name]) for name in names}


def carry_files(source: str | Path, folder: Path) -> None:
    """Copy into `folder` what lies beside a checkpoint's weights and is not there: tokenizer, licence, settings.

    Weights, code, history and card are not copied: they are written anew.
    """
    written = {CONFIG_FILE, LINEAGE_FILE, CARD_FILE, INDEX_FILE}
    for file in sorted(Path(source).iterdir()):
        beside = file.is_file() and file.name not in written and not file.name.startswith(".")
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json") or file.stat().st_size > _MOST_CARRIED
        if beside and not weights and file.suffix != ".py" and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
