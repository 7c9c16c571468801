"""Checkpoints on disk: written whole or not at all, verified before use, and carrying their lineage.

A checkpoint is a folder that transformers can load (config.json, model.safetensors, tokenizer files, a TokenFormer's
code) plus `lineage.json`, the history of what was done to get there, and README.md, the model card made from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.serialization import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_processing_utils import BaseImageProcessor

from ..data.tokenizer import read_tokenizer, vocabulary_size
from ..errors import CheckpointError, GrowthError, TokenizerError
from ..growth.architectures import ARCHITECTURES, auto_class, check_depth, frozen_names, row_of, site_groups
from ..growth.beside import has_row, names_beside
from ..growth.freeze import freeze
from ..growth.neurons import group_neurons
from ..growth.select import shrink
from ..growth.sequence import sequence_gates
from ..growth.tokenise import build, load_with_sites, note_sites
from ..models.processing_tokenformer_multimodal import TokenformerProcessor
from ..quiet import without_bars
from .beside import attach_beside, load_parent
from .card import model_card
from .disk import sync
from .files import add_file, replacing_folder
from .lineage import Lineage
from .verify import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    LINEAGE_FILE,
    code_note,
    config_fields,
    is_addon_folder,
    is_old_buffer,
    other_digests,
    read_headers,
    read_lineage,
    stored_dtype,
    verify_checkpoint,
    weights_digest,
)

# Small enough that reading, changing and writing a model of any size fits in about a gigabyte.
_SHARD_BYTES = 200_000_000

Weights = Callable[[Sequence[str]], dict[str, Tensor]]
OnProgress = Callable[[int, int], None]


@without_bars()
def save_checkpoint(
    path: str | Path,
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
    lineage: Lineage | Callable[[], Lineage] | None = None,
    *,
    force: bool = False,
    extra: Callable[[Path], None] | None = None,
    weights: Weights | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Lineage:
    """Write a checkpoint to `path` through a temporary sibling, and return its lineage with the digests of its files.

    Args:
        path: the new folder.
        model: TokenFormer or ordinary transformer; on the meta device where `weights` is given.
        processor: tokenizer or image processor, to write beside it.
        lineage: what happened up to here; a function is called once the weights are written.
        force: replace what stands at `path`.
        extra: may write further files into the folder before it gets its name.
        weights: gives the tensors of these names, for models that need not fit in memory: called for one shard after
            the other, each written before the next is asked for. Each is stored in the type it is given in.
        on_progress: called with bytes written so far and in all, where `weights` is given.

    Raises:
        CheckpointError: `path` exists and not `force`, or it cannot be written (full disk, no permission); or a gate of
            the model decides for whole sequences, which only an add-on keeps.
    """
    note_sites(model)
    gated = [*sequence_gates(model), *(name for name in names_beside(model) if name not in site_groups(model.config))]
    if gated:
        raise CheckpointError(
            f"token group {gated[0]} has a gate that decides for whole sequences, or is neurons beside MLPs, which a "
            f"checkpoint of the whole model does not keep; write an add-on: tokenformer.split(model, {gated[0]!r}, "
            "FOLDER)"
        )
    with replacing_folder(Path(path), force=force) as folder:
        if weights is None:
            model.save_pretrained(folder)
            digest = weights_digest(folder)
        else:
            digest = _save_streamed(folder, model, weights, on_progress)
        _add_older_rope_fields(folder / CONFIG_FILE)
        if processor is not None:
            processor.save_pretrained(folder)
        if extra is not None:
            extra(folder)
        known = (lineage() if callable(lineage) else lineage) or Lineage()
        written = known.model_copy(
            update={
                "weights_sha256": digest,
                "files_sha256": other_digests(folder),
                "dtype": stored_dtype(folder),
            }
        )
        text = written.model_dump_json(indent=2, exclude_none=True) + "\n"
        (folder / LINEAGE_FILE).write_text(text, encoding="utf-8")
        (folder / CARD_FILE).write_text(model_card(model.config, written), encoding="utf-8")
    return written


def _save_streamed(folder: Path, model: PreTrainedModel, weights: Weights, on_progress: OnProgress) -> str:
    """Do what `save_pretrained` does for a model whose weights come shard by shard; returns their digest."""
    config, shapes, split = model.config, *_split(model)
    row = row_of(config)
    stored = row.stored if row else {}
    total, done, written, digest = int(split.metadata["total_size"]), 0, 0, hashlib.sha256()
    dtypes: set[torch.dtype] = set()

    def flush(file: Path) -> None:
        add_file(digest, file)
        sync(file)

    with ThreadPoolExecutor(max_workers=1) as flushing:  # one shard is hashed and flushed while the next is made
        flushed = []
        for file, names in sorted(split.filename_to_tensors.items()):
            on_progress(done, total)
            tensors = {stored.get(name, name): tensor for name, tensor in weights(names).items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            dtypes |= {tensor.dtype for tensor in tensors.values()}
            written += sum(tensor.nbytes for tensor in tensors.values())
            del tensors  # before the next ones are made
            flushed.append(flushing.submit(flush, folder / file))
            done += sum(shapes[name].nbytes for name in names)
        for future in flushed:
            future.result()
    on_progress(total, total)
    if split.is_sharded:
        files = {stored.get(name, name): file for name, file in split.tensor_to_filename.items()}
        index = {"metadata": {"total_size": written}, "weight_map": files}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype if model.dtype in dtypes else reduce(torch.promote_types, dtypes)
    if model._auto_class is not None:
        custom_object_save(model, folder, config)
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    return digest.hexdigest()


def shards_of(model: PreTrainedModel) -> list[list[str]]:
    """Return the names that `save_checkpoint` asks `weights` for, call by call."""
    _, split = _split(model)
    return [names for _, names in sorted(split.filename_to_tensors.items())]


def _split(model: PreTrainedModel) -> tuple[dict[str, Tensor], Any]:
    shapes = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return shapes, split_torch_state_dict_into_shards(shapes, max_shard_size=_SHARD_BYTES)


def _add_older_rope_fields(file: Path) -> None:
    """Say the rotary embedding's base where transformers 4 looks for it too, which knows no `rope_parameters`."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    rope = fields.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope or fields["model_type"] == "tokenformer":  # which no transformers 4 can run
        return
    neox = fields["model_type"] == "gpt_neox"
    older = {"rotary_emb_base" if neox else "rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        older["rotary_pct" if neox else "partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "sliding_attention" in fields["rope_parameters"]:
        older["rope_local_base_freq"] = fields["rope_parameters"]["sliding_attention"]["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    file.write_text(json.dumps(dict(sorted((fields | older).items())), indent=2) + "\n", encoding="utf-8")


@without_bars()
def load_checkpoint(
    path: str | Path, *, dtype: torch.dtype | None = None, keep: float = 1.0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, Lineage]:
    """Verify and read the checkpoint at `path`: model in eval mode (dtype as stored by default), tokenizer, lineage.

    Of an add-on folder the parent is loaded, any model of transformers, and the token group put beside its maps.

    An ordinary transformer's neurons are kept by token group; what `freeze` froze in the checkpoint is frozen. `keep`
    below 1 takes the first share of each token group: a smaller size of a checkpoint that `sort` has sorted. No code
    that lies in the folder is run; where it is not this package's, a warning says so.

    Raises:
        GrowthError: `keep` is not a share.
        CheckpointError: missing, damaged, truncated, of an unknown kind, or tensors that do not fit its configuration.
        TokenizerError: the tokenizer has entries the model has no embedding for.
    """
    if is_addon_folder(path):
        return _load_addon(path, dtype=dtype, keep=keep)
    config = read_config(path)
    lineage = verify_checkpoint(path)
    if note := code_note(path):
        warnings.warn(note, stacklevel=2)
    _check_size(path, config)
    try:
        kind = getattr(transformers, (config.architectures or [""])[0], object)
        whole = kind if getattr(config, "token_sites", None) else auto_class(config)
        options: Any = {"dtype": dtype or "auto", "output_loading_info": True}
        model, report = load_with_sites(whole, path, config, **options)
    except Exception as error:  # tensors of other shapes, and whatever else its files can have wrong
        raise CheckpointError(f"checkpoint {path} does not fit its own config.json: {error}") from error
    report["unexpected_keys"] = [name for name in report["unexpected_keys"] if not is_old_buffer(name)]
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise CheckpointError(f"checkpoint {path} does not fit its own config.json: {problems}")
    if not model.all_tied_weights_keys:  # transformers leaves a head that differs untied, but says so nowhere
        model.config.tie_word_embeddings = False
    if has_row(model):
        group_neurons(model)
    if keep != 1:
        shrink(model, keep)
    freeze(model, frozen_names(model.config))
    return model.eval(), load_tokenizer(path, config), lineage


def _load_addon(
    path: str | Path, *, dtype: torch.dtype | None, keep: float
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, Lineage]:
    if keep != 1:
        raise GrowthError(f"keep is {keep}, but the tokens of add-on {path} lie beside linear maps and are in no order")
    model, tokenizer = load_parent(path, dtype=dtype)
    attach_beside(model, path)
    return model, tokenizer, read_lineage(path)


def load_tokenizer(path: str | Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """Read the tokenizer kept with a checkpoint, or return None where there is none.

    A bare tokenizer.json does not say which entry ends a text; the configuration does.

    Raises:
        CheckpointError: it is damaged.
        TokenizerError: it has entries the model has no embedding for, or none that ends a text.
    """
    whole, bare = Path(path) / "tokenizer_config.json", Path(path) / "tokenizer.json"
    if not whole.exists() and not bare.exists():
        return None
    try:
        tokenizer = read_tokenizer(path) if whole.exists() else _bare_tokenizer(bare, config)
    except TokenizerError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: its tokenizer cannot be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"the tokenizer in {path} has no end-of-text token, which separates documents; set one")
    check_tokenizer(tokenizer, config, where=f"in {path}")
    return tokenizer


def need_tokenizer(
    path: str | Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was loaded with a checkpoint.

    Raises:
        TokenizerError: there is none, because the model reads images or because it was not kept.
    """
    if tokenizer is not None:
        return tokenizer
    row = row_of(config)
    if row is not None and row.auto == "AutoModelForImageClassification":
        raise TokenizerError(f"checkpoint {path} reads images, and text was given; take one that reads text")
    raise TokenizerError(f"checkpoint {path} has no tokenizer; save the one it was trained with beside it")


def load_image_processor(path: str | Path) -> BaseImageProcessor | None:
    """Read the image processor kept with a checkpoint, by Pillow; None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not (Path(path) / "preprocessor_config.json").exists():
        return None
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except Exception as error:  # whatever is wrong in it
        raise CheckpointError(f"checkpoint {path} is damaged: its image processor cannot be read: {error}") from error


def load_processor(path: str | Path) -> TokenformerProcessor:
    """Read what makes the inputs of a checkpoint that reads text and images: its tokenizer and image processor.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return TokenformerProcessor.from_pretrained(path)
    except Exception as error:  # whatever is wrong in it
        raise CheckpointError(f"checkpoint {path} is damaged: its processor cannot be read: {error}") from error


def _bare_tokenizer(file: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    tokenizer: Any = read_tokenizer(file)
    for name in ("bos_token", "eos_token", "pad_token"):
        index = getattr(config, f"{name}_id", None)
        index = index[0] if isinstance(index, list) else index
        if index is not None and 0 <= index < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, *, where: str) -> None:
    """Raise TokenizerError if the tokenizer `where` has an id that the model has no embedding for."""
    needed = vocabulary_size(tokenizer)
    if needed - 1 == getattr(config, "image_token_id", None):  # which stands for patches and is never embedded
        needed -= 1
    if needed > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer {where} needs {needed} rows of the model's embedding, which has {config.vocab_size}: "
            "they do not belong together; take the tokenizer that the model was trained with"
        )


def read_config(path: str | Path) -> PreTrainedConfig:
    """Read a checkpoint's configuration alone; errors as in `load_checkpoint`."""
    content = config_fields(path)
    try:
        if content.get("quantization_config"):
            raise CheckpointError(f"checkpoint {path} is quantised; give the one that it was made from")
        check_depth(ARCHITECTURES.get(content.get("model_type") or ""), content, most=len(read_headers(path)))
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        auto_class(config)
        return config
    except CheckpointError:
        raise
    except GrowthError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    except Exception as error:  # each class checks its fields in its own way
        raise CheckpointError(f"checkpoint {path} is damaged: {CONFIG_FILE}: {error}") from error


def empty_model(path: str | Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Make the model of a checkpoint without weights, on the meta device.

    Raises:
        CheckpointError: its configuration makes none.
    """
    try:
        with torch.device("meta"):
            return build(config)
    except Exception as error:  # sizes that do not go together, names of functions that there are not
        raise CheckpointError(f"checkpoint {path} is damaged: {CONFIG_FILE}: {error}") from error


def _check_size(path: str | Path, config: PreTrainedConfig) -> None:
    """Raise CheckpointError where far more is described than the files hold: the rest would be drawn in memory."""
    model = empty_model(path, config)
    described = sum(t.numel() for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys)
    held = sum(math.prod(header.shape) for header in read_headers(path).values())
    if described > 2 * held:
        raise CheckpointError(
            f"checkpoint {path} does not fit its own config.json: that describes {described:,} parameters, and the "
            f"files hold {held:,}"
        )
