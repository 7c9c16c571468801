"""Checkpoints on disk: written whole or not at all, verified before use, and carrying their lineage.

A checkpoint is a folder that transformers can load (config.json, model.safetensors, tokenizer files, a TokenFormer's
code) plus `lineage.json`, the history of what was done to get there, and README.md, the model card made from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.serialization import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..errors import CheckpointError, TokenizerError
from ..growth.architectures import ARCHITECTURES, architecture_of
from ..growth.freeze import freeze
from ..growth.neurons import group_neurons
from ..growth.select import shrink
from .card import model_card
from .files import add_file, files_digest, recover, replacing_folder, sync
from .lineage import Lineage

LINEAGE_FILE = "lineage.json"
CARD_FILE = "README.md"
# Small enough that reading, changing and writing a model of any size fits in about a gigabyte.
_SHARD_BYTES = 200_000_000

Weights = Callable[[Sequence[str]], dict[str, Tensor]]
OnProgress = Callable[[int, int], None]


def save_checkpoint(
    path: str | Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    lineage: Lineage | Callable[[], Lineage],
    *,
    force: bool = False,
    extra: Callable[[Path], None] | None = None,
    weights: Weights | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Lineage:
    """Write a checkpoint to `path` through a temporary sibling, and return its lineage with the weights' digest.

    Args:
        path: the new folder.
        model: TokenFormer or ordinary transformer; on the meta device where `weights` is given.
        tokenizer: to write beside it.
        lineage: what happened up to here; a function is called once the weights are written.
        force: replace what stands at `path`.
        extra: may write further files into the folder before it gets its name.
        weights: gives the tensors of these names, for models that need not fit in memory: called for one shard after
            the other, each written before the next is asked for.
        on_progress: called with bytes written so far and in all, where `weights` is given.

    Raises:
        CheckpointError: `path` exists and not `force`, or it cannot be written (full disk, no permission).
    """
    with replacing_folder(Path(path), force=force) as folder:
        if weights is None:
            model.save_pretrained(folder)
            digest = weights_digest(folder)
        else:
            digest = _save_streamed(folder, model, weights, on_progress)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if extra is not None:
            extra(folder)
        known = lineage() if callable(lineage) else lineage
        written = known.model_copy(update={"weights_sha256": digest})
        (folder / LINEAGE_FILE).write_text(written.model_dump_json(indent=2, exclude_none=True) + "\n")
        (folder / CARD_FILE).write_text(model_card(model.config, written), encoding="utf-8")
    return written


def _save_streamed(folder: Path, model: Any, weights: Weights, on_progress: OnProgress) -> str:
    """Do what `save_pretrained` does for a model whose weights come shard by shard; returns their digest."""
    config = model.config
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    if model._auto_class is not None:
        custom_object_save(model, folder, config)
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    shapes = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    stored = architecture_of(config).stored
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=_SHARD_BYTES)
    total, done, digest = int(split.metadata["total_size"]), 0, hashlib.sha256()

    def flush(file: Path) -> None:
        add_file(digest, file)
        sync(file)

    with ThreadPoolExecutor(max_workers=1) as flushing:  # one shard is hashed and flushed while the next is made
        flushed = []
        for file, names in sorted(split.filename_to_tensors.items()):
            on_progress(done, total)
            tensors = {stored.get(name, name): tensor for name, tensor in weights(names).items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            del tensors  # before the next ones are made
            flushed.append(flushing.submit(flush, folder / file))
            done += sum(shapes[name].nbytes for name in names)
        for future in flushed:
            future.result()
    on_progress(total, total)
    if split.is_sharded:
        files = {stored.get(name, name): file for name, file in split.tensor_to_filename.items()}
        index = {"metadata": split.metadata, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return digest.hexdigest()


def load_checkpoint(
    path: str | Path, *, dtype: torch.dtype | None = None, keep: float = 1.0
) -> tuple[Any, PreTrainedTokenizerBase | None, Lineage]:
    """Verify and read the checkpoint at `path`: model in eval mode (dtype as stored by default), tokenizer, lineage.

    An ordinary transformer's neurons are kept by token group; what `freeze` froze in the checkpoint is frozen. `keep`
    below 1 takes the first share of each token group: a smaller size of a checkpoint whose tokens `slice` has sorted.

    Raises:
        GrowthError: `keep` is not a share.
        CheckpointError: missing, damaged, truncated, of an unknown kind, or tensors that do not fit its configuration.
        TokenizerError: the tokenizer has entries the model has no embedding for.
    """
    lineage = verify_checkpoint(path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True)
    except RuntimeError as error:  # tensors of other shapes
        raise CheckpointError(f"checkpoint {path} does not fit its own config.json: {error}") from error
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise CheckpointError(f"checkpoint {path} does not fit its own config.json: {problems}")
    group_neurons(model)
    if keep != 1:
        shrink(model, keep)
    freeze(model, getattr(model.config, "frozen", None) or [])
    return model.eval(), load_tokenizer(path, model.config), lineage


def load_tokenizer(path: str | Path, config: Any) -> PreTrainedTokenizerBase | None:
    """Read the tokenizer kept with a checkpoint, or return None where there is none.

    Raises:
        CheckpointError: it is damaged.
        TokenizerError: it has entries the model has no embedding for.
    """
    if not (Path(path) / "tokenizer_config.json").exists():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"checkpoint {path} is damaged: its tokenizer cannot be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"the tokenizer in {path} has no end-of-text token, which separates documents; set one")
    check_tokenizer(tokenizer, config, where=f"in {path}")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any, *, where: str) -> None:
    """Raise TokenizerError if the tokenizer `where` has entries the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer {where} has {len(tokenizer)} entries but the model's embedding only {config.vocab_size}: "
            "they do not belong together; take the tokenizer that the model was trained with"
        )


def read_config(path: str | Path) -> Any:
    """Read a checkpoint's configuration alone; errors as in `load_checkpoint`."""
    file = Path(path) / "config.json"
    recover(Path(path))
    if not file.is_file():
        found = (
            "an empty or different folder" if Path(path).is_dir() else "a file" if Path(path).exists() else "nothing"
        )
        raise CheckpointError(f"no checkpoint at {path}: looked for {file.name} in it, found {found}")
    try:
        content = json.loads(file.read_text())
        if content.get("model_type") not in ARCHITECTURES:
            raise CheckpointError(
                f"checkpoint {path} is a {content.get('model_type')!r} model, which is not in the table of "
                f"architectures ({', '.join(ARCHITECTURES)}); a row in growth/architectures.py adds one"
            )
        if content.get("quantization_config"):
            raise CheckpointError(f"checkpoint {path} is quantised; give the one that it was made from")
        return AutoConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {file.name}: {error}") from error


def verify_checkpoint(path: str | Path) -> Lineage:
    """Check that every file of a checkpoint is whole, without loading it, and return its lineage.

    Raises:
        CheckpointError: missing, damaged or truncated files, or weights that are not those the lineage names.
    """
    read_config(path)
    tensor_files(path)
    try:
        lineage = Lineage.model_validate_json((Path(path) / LINEAGE_FILE).read_text())
    except FileNotFoundError:
        return Lineage(weights_sha256=weights_digest(path))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {LINEAGE_FILE}: {error}") from error
    found = weights_digest(path)
    if found != lineage.weights_sha256:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its weights have sha256 {found[:12]}…, its lineage says "
            f"{str(lineage.weights_sha256)[:12]}…; copy it again, or delete {LINEAGE_FILE} if you changed them yourself"
        )
    return lineage


def tensor_files(path: str | Path) -> dict[str, Path]:
    """Return the names of all tensors of a checkpoint, and the file that each is in.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file.
    """
    found: dict[str, Path] = {}
    for file in weight_files(Path(path)):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {file.name} ({file.stat().st_size} bytes) cannot be read: {error}; "
                "copy it again, or go back to the checkpoint it came from"
            ) from error
    return found


def weights_digest(path: str | Path) -> str:
    """Return the sha256 over the weight files of a checkpoint, in the order of their names."""
    return files_digest(weight_files(Path(path)))


def weight_files(path: Path) -> list[Path]:
    """List the weight files of a checkpoint by name; CheckpointError if one that its index names is missing."""
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {index.name}: {type(error).__name__} {error}") from error
    missing = names - {file.name for file in files}
    if missing and any(path.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"checkpoint {path} keeps its weights in pickles (.bin), which can run code; load and save it in "
            "transformers, if you trust it, and give the folder with its .safetensors"
        )
    if missing:
        raise CheckpointError(f"checkpoint {path} is incomplete: {', '.join(sorted(missing))} missing")
    return files
