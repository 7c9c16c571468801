"""Official checkpoints on disk: read without running the code that pickles can hold, converted shard by shard."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from ..checkpoints.checkpoint import (
    OnProgress,
    check_tokenizer,
    read_config,
    save_checkpoint,
)
from ..checkpoints.files import check_file, check_target, files_digest, replacing_file
from ..checkpoints.lineage import Lineage
from ..checkpoints.pickles import UnsafePickle, check_stored, is_zip, load_tensors
from ..checkpoints.verify import verify_checkpoint, weight_files
from ..data.tokenizer import open_tokenizer
from ..errors import ConversionError, first_line
from ..growth.architectures import ARCHITECTURES, check_depth
from ..models.modeling_tokenformer import TokenformerForCausalLM
from ..sections import load_yaml
from ..units import counted
from .official import (
    canonical_name,
    check_expressible,
    check_official,
    config_from_official,
    fields_to_official,
    official_tensors,
    state_to_official,
)

_EMBEDDING = "sequential.0.word_embeddings.weight"
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")


def convert_official(
    weights: str | Path,
    config: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    force: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Lineage:
    """Write the official checkpoint `weights` as one of ours, in its own dtype, in about a gigabyte of memory.

    Args:
        weights: `pytorch_model.bin` as released, or a folder of `layer_XX-model_00-model_states.pt`, or one that holds
            such folders as `global_stepN`.
        config: the YAML that the official code was run with.
        output: folder of the new checkpoint.
        tokenizer: name, folder or tokenizer.json to keep beside it; the released models use GPT-NeoX-20B's.
        force: replace what stands at `output`.
        on_progress: called with bytes written so far and in all.

    Returns:
        The new checkpoint's lineage, whose parent is the digest of `weights`.

    Raises:
        ConversionError: `weights` or `config` cannot be read or do not belong together; nothing is written.
        TokenizerError: there is no such tokenizer, or it has more entries than the embedding has rows.
        CheckpointError: `output` exists and not `force`, or it cannot be written.
    """
    check_target(Path(output), force=force)
    fields = _read_yaml(Path(config))
    files = official_files(weights)
    _check_archives(files)
    found = read_official(files)
    if _EMBEDDING not in found:
        raise ConversionError(
            f"{weights} holds no {_EMBEDDING}, so it is no TokenFormer; it holds "
            f"{counted(len(found), 'tensor')}, such as {', '.join(sorted(found)[:3]) or 'none'}"
        )
    try:
        check_depth(ARCHITECTURES["tokenformer"], {"num_hidden_layers": fields.get("num_layers")}, most=len(found))
        ours = config_from_official(fields, vocab_size=found[_EMBEDDING].shape[:1].numel(), where=str(config))
        buffers = check_official(ours, found, where=str(weights))
    except ConversionError:
        raise
    except Exception as error:  # values of kinds that no such field has
        raise ConversionError(f"{config} describes no TokenFormer: {first_line(error)}") from error
    keeper = open_tokenizer(tokenizer) if tokenizer is not None else None
    if keeper is not None:
        check_tokenizer(keeper, ours, where=str(tokenizer))
        ours.bos_token_id, ours.eos_token_id, ours.pad_token_id = (
            keeper.bos_token_id,
            keeper.eos_token_id,
            keeper.pad_token_id,
        )
    dtype = reduce(torch.promote_types, {found[name].dtype for name in official_tensors(ours)})
    source = {name: (official, transposed) for official, (name, _, transposed) in official_tensors(ours).items()}
    with torch.device("meta"):
        model = TokenformerForCausalLM._from_config(ours, dtype=dtype)

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        """Map the files anew for every shard, so that memory read for the last one is given back."""
        official = read_official(files)
        return {
            name: (official[source[name][0]].t() if source[name][1] else official[source[name][0]])
            .to(dtype)
            .contiguous()
            for name in names
        }

    lineage = Lineage().then(
        "convert",
        parent=files_digest(files),
        arguments={
            "from": "official",
            "weights": Path(weights).name,
            "config": Path(config).name,
            "tokenizer": None if tokenizer is None else str(tokenizer),
            "rotary_buffers_checked": buffers or None,
        },
    )
    del found
    return save_checkpoint(output, model, keeper, lineage, force=force, weights=read, on_progress=on_progress)


def convert_to_official(checkpoint: str | Path, output: str | Path, *, force: bool = False) -> Path:
    """Write one of our checkpoints as the official code's single file, and beside it, as `.yml`, its configuration.

    Token groups become one; where τ is not what the official code would compute, see `official.express`.

    Args:
        checkpoint: folder of a checkpoint.
        output: the file, such as pytorch_model.bin.
        force: replace the two files.

    Returns:
        The YAML file.

    Raises:
        ConversionError: the official code cannot express the model; says why.
        CheckpointError: the checkpoint is missing or damaged, or a file exists already, or cannot be written.
    """
    verify_checkpoint(checkpoint)
    config, file = read_config(checkpoint), Path(output)
    check_expressible(config)
    described = file.with_suffix(".yml")
    for target in (file, described):
        check_file(target, force=force)
    state = state_to_official(config, _read_ours(Path(checkpoint)))
    with replacing_file(described, force=force) as fields, replacing_file(file, force=force) as tensors:
        fields.write_text(yaml.safe_dump(fields_to_official(config), sort_keys=False), encoding="utf-8")
        torch.save(state, tensors)
        described.unlink(missing_ok=True)  # a kill between the two renames must not leave one beside the other's old
    return described


def official_files(weights: str | Path) -> list[Path]:
    """Return the files of an official checkpoint: itself, or the layer files of a folder in order.

    Raises:
        ConversionError: nothing there, an unclear choice, or a checkpoint split over model-parallel processes.
    """
    path = Path(weights)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConversionError(f"there is no {path}; give pytorch_model.bin or a folder of layer files")
    layers = {file: match for file in path.iterdir() if (match := _LAYER_FILE.fullmatch(file.name))}
    if layers:
        ranks = {match[2] for match in layers.values()}
        if ranks != {"00"}:
            raise ConversionError(
                f"{path} is split over {len(ranks)} model-parallel processes ({', '.join(sorted(ranks))}); merge them "
                "with the official code's tools first"
            )
        return sorted(layers, key=lambda file: int(layers[file][1]))
    latest = path / "latest"
    named = [path / latest.read_text(encoding="utf-8").strip()] if latest.is_file() else None
    steps = named or sorted(path.glob("global_step*"))
    if len(steps) == 1:
        return official_files(steps[0])
    if steps:
        raise ConversionError(f"{path} holds {len(steps)} checkpoints; name one: {', '.join(s.name for s in steps)}")
    found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    raise ConversionError(f"{path} holds no layer_XX-model_00-model_states.pt, only {found}; name the .bin file itself")


def read_official(files: Sequence[Path]) -> dict[str, Tensor]:
    """Map the tensors of an official checkpoint into memory, by their names `sequential.N.…`, without reading them.

    Raises:
        ConversionError: not a whole PyTorch file, one that holds more than tensors, or two tensors of one name.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        match = _LAYER_FILE.fullmatch(file.name)
        prefix = f"{int(match[1])}." if match else ""
        for name, tensor in _load(file).items():
            name = canonical_name(f"{prefix}{name}")
            if name in found:
                raise ConversionError(f"{file} holds {name} twice, under different prefixes")
            if not isinstance(tensor, Tensor):
                raise ConversionError(f"{file} holds a {type(tensor).__name__} as {name}, where a tensor should be")
            found[name] = tensor
    return found


def _check_archives(files: Sequence[Path]) -> None:
    """Compare what PyTorch's zip files hold with their own checksums, which torch.load does not."""
    for file in files:
        if not is_zip(file):
            continue
        try:
            with zipfile.ZipFile(file) as archive:
                check_stored(archive)
                damaged = archive.testzip()
        except UnsafePickle as error:
            raise ConversionError(f"cannot read {file}: {error}") from error
        except Exception as error:  # a damaged archive, too, can fail in many ways
            damaged = str(error)
        if damaged is not None:
            raise ConversionError(f"cannot read {file}: {damaged} in it does not match its checksum; download it again")


def _load(file: Path) -> dict[str, Any]:
    try:
        content = load_tensors(file)
    except UnsafePickle as error:
        raise ConversionError(f"cannot read {file}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in as many ways as there are
        with file.open("rb") as stream:
            beginning = stream.read(64)
        code = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if code:
            why = f"it holds more than tensors ({code[1]}), which could run code; only tensors are ever read"
        elif beginning.startswith(b"PK") and not is_zip(file):
            why = f"its end is missing ({file.stat().st_size:,} bytes are there); download it again"
        elif beginning.startswith(b"version https://git-lfs"):
            why = "it is a Git LFS pointer, not the file; run git lfs pull"
        else:
            why = f"it is no PyTorch checkpoint (begins with {beginning[:8]!r}): {first_line(error)}"
        raise ConversionError(f"cannot read {file}: {why}") from error
    while isinstance(content, dict) and isinstance(content.get("module"), dict):
        content = content["module"]
    if not isinstance(content, dict):
        raise ConversionError(f"cannot read {file}: it holds a {type(content).__name__}, not named tensors")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConversionError(f"cannot read {path}: {reason}; give the YAML of the official configs/") from error
    except yaml.YAMLError as error:
        raise ConversionError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds {type(content).__name__}, not fields such as num_layers")
    return content


def _read_ours(checkpoint: Path) -> dict[str, Tensor]:
    state = {}
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as tensors:
            state.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    return state
