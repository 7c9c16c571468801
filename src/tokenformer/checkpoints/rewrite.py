"""Operations on the files of a checkpoint, block after block, to the bits that they give in memory.

What `growth` does to a model in place is done here to a checkpoint of any size in about a gigabyte of memory; the
optimizer's state, where there is one, moves along.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, GrowthError
from ..growth.architectures import Groups, architecture_of, group_names
from ..growth.groups import check_siblings, merge_operation
from ..growth.layout import TokenMap
from ..growth.operations import Operation
from ..growth.state import States, check_finite, move_states, read_map, rewritten
from ..growth.tokenise import build
from .checkpoint import OnProgress, empty_model, read_config, save_checkpoint
from .files import check_target
from .lineage import Lineage
from .optimizer import OPTIMIZER_FILE, load_states
from .verify import DTYPES, carry_files, is_old_buffer, read_headers, read_lineage, verify_checkpoint

_GENERATION = "generation_config.json"


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in files by name, each read when it is asked for and kept by nobody.

    Args:
        files: for each name, the file and the name there.
    """

    def __init__(self, files: dict[str, tuple[Path, str]]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        """Map one tensor into memory; its pages go when it goes."""
        file, stored = self._files[name]
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._files)


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk, verified by a thread.

    Attributes:
        path: its folder.
        config: its configuration; says that embedding and head are tied only where they are.
        tensors: its weights by name.
        dtype: of the weights: what the configuration says, or what most have where none has that.
        empty: a model of its configuration without weights, on the meta device.
        verification: gives its history, or raises CheckpointError, once all its files have been read.
    """

    path: Path
    config: PreTrainedConfig
    tensors: StoredTensors
    dtype: torch.dtype
    empty: PreTrainedModel
    verification: Future[Lineage]

    @property
    def lineage(self) -> Lineage:
        """Its history, once it is verified."""
        return self.verification.result()

    def read(self, block: int, token_map: TokenMap) -> Groups:
        """Return the token groups of a map."""
        return read_map(self.config, self.tensors, block, token_map)


def open_checkpoint(path: str | Path) -> Stored:
    """Open the checkpoint at `path` without loading it, while a thread verifies it; errors as in `verify_checkpoint`.

    What only reading all of it can show is raised when `lineage` is asked for, and before `rewrite` leaves anything.
    """
    config = read_config(path)
    if getattr(config, "token_sites", None):
        raise CheckpointError(
            f"checkpoint {path} has token groups at linear maps, for which this is not done file by file; what can be "
            "done is done in memory: tokenformer.load, change the model, tokenformer.save"
        )
    headers = read_headers(path)
    files = {name: (header.file, name) for name, header in headers.items()}
    verifying = ThreadPoolExecutor(max_workers=1)
    verification = verifying.submit(verify_checkpoint, path)
    verifying.shutdown(wait=False)
    row = architecture_of(config)
    files = {name: files[stored] for stored, name in row.names_in_memory(files).items()}
    empty = empty_model(path, config)
    ignored = [re.compile(pattern) for pattern in empty._keys_to_ignore_on_load_unexpected or []]
    needed = set(empty.state_dict())
    files = {
        name: where
        for name, where in files.items()
        if name in needed or not (is_old_buffer(name) or any(pattern.search(name) for pattern in ignored))
    }
    for tied, origin in empty.all_tied_weights_keys.items():
        if tied in files and origin not in files:
            files[origin] = files.pop(tied)
        elif tied in files and _equal(*(StoredTensors(files)[name] for name in (tied, origin))):
            del files[tied]
        elif tied in files:
            config.tie_word_embeddings = False  # as transformers loads it
            empty = empty_model(path, config)
    dtypes = Counter(DTYPES[header.dtype] for header in headers.values() if header.dtype in DTYPES)
    named = str(config.dtype).removeprefix("torch.")
    dtype = named if named in dtypes else dtypes.most_common(1)[0][0] if dtypes else "float32"
    return Stored(Path(path), config, StoredTensors(files), getattr(torch, dtype), empty, verification)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def without_weights(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a model of a configuration on the meta device."""
    with torch.device("meta"):
        return build(config, dtype=dtype)


def rewrite(
    source: Stored,
    output: str | Path,
    operation: Operation,
    *,
    force: bool = False,
    on_progress: OnProgress = lambda done, total: None,
    more_states: States | None = None,
    **event: Any,
) -> Lineage:
    """Write what `operation` makes of a checkpoint as a new one, whose lineage says so.

    Args:
        source: the checkpoint.
        output: folder of the new one.
        operation: made for `source.config`.
        force: replace what stands at `output`.
        on_progress: called with bytes written so far and in all.
        more_states: the optimizer's states of parameters that come from elsewhere.
        event: further fields of the lineage's event.

    Returns:
        The new lineage.

    Raises:
        CheckpointError: `output` exists and not `force`, it cannot be written, or `source` is damaged or has weights
            that are not finite. Nothing is then written.
    """
    check_target(Path(output), force=force)
    check_names(source)
    model = without_weights(operation.config, source.dtype)
    earlier = _earlier_dtypes(source.path) if operation.name == "drop" else []
    states = move_states(source.config, load_states(source.path), operation) | (more_states or {})

    give = rewritten(source.config, source.tensors, operation)

    def weights(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = check_finite(give(names), f"checkpoint {source.path}")
        return {name: _as_before_training(tensor, earlier) for name, tensor in tensors.items()}

    def lineage() -> Lineage:
        last = source.lineage.last
        losses = {"loss": last.loss, "bits_per_byte": last.bits_per_byte} if operation.keeps_outputs else {}
        return source.lineage.then(operation.name, arguments=operation.arguments, **losses, **event)

    def keep(folder: Path) -> None:
        if (source.path / _GENERATION).exists():  # what the user has set there, where the new model has only defaults
            (folder / _GENERATION).unlink(missing_ok=True)
        carry_files(source.path, folder)
        if states:
            torch.save(states, folder / OPTIMIZER_FILE)

    return save_checkpoint(
        output,
        model,
        None,  # its files are carried as they are
        lineage,
        force=force,
        extra=keep,
        weights=weights,
        on_progress=on_progress,
    )


def merge_checkpoints(
    source: Stored,
    other: Stored,
    output: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    norm: str | None = None,
    **options: Any,
) -> Lineage:
    """Write the union of two children of one parent; see `growth.groups.merge`, and `rewrite` for the options.

    Raises:
        GrowthError: their lineages have no parent in common, or as `merge`.
        CheckpointError: as `rewrite`.
    """
    ancestors = [
        [event.parent for event in stored.lineage.history if event.parent] + [str(stored.lineage.weights_sha256)]
        for stored in (source, other)
    ]
    if not set(ancestors[0]) & set(ancestors[1]):
        raise GrowthError(
            f"{source.path} and {other.path} are strangers: no checkpoint is a parent of both (theirs: "
            f"{', '.join(' '.join(digest[:8] for digest in line) for line in ancestors)}). Only children of one parent "
            "can be merged"
        )
    check_siblings(source.config, source.tensors, other.config, other.tensors, rename=rename)
    operation = merge_operation(source.config, other.config, other.read, rename=rename, norm=norm)
    ours = group_names(source.config)
    theirs = {name: (rename or {}).get(name, name) for name in group_names(other.config)}
    states = {
        parameter.replace(f".groups.{old}.", f".groups.{new}."): state
        for parameter, state in load_states(other.path).items()
        for old, new in theirs.items()
        if f".groups.{old}." in parameter and new not in ours
    }
    arguments = {"other": other.lineage.weights_sha256, **operation.arguments}
    return rewrite(source, output, replace(operation, arguments=arguments), more_states=states, **options)


def _earlier_dtypes(path: Path) -> list[torch.dtype]:
    """Return the types that a checkpoint's weights had before it was trained, narrowest first."""
    names = {event.parent_dtype for event in read_lineage(path).history if event.parent_dtype}
    return sorted((getattr(torch, name) for name in names), key=lambda dtype: dtype.itemsize)


def _as_before_training(tensor: Tensor, earlier: Sequence[torch.dtype]) -> Tensor:
    """Return a tensor in an earlier, narrower type if that holds all its values, as one does that never moved.

    Training computes and writes float32; what was frozen meanwhile becomes the tensor that it was.
    """
    narrow = [tensor.to(dtype) for dtype in earlier if dtype.itemsize < tensor.dtype.itemsize]
    return next((before for before in narrow if torch.equal(before.to(tensor.dtype), tensor)), tensor)


def check_names(source: Stored) -> None:
    """Raise CheckpointError where files do not hold just what the configuration describes, as loading them would."""
    model = source.empty
    state, found = model.state_dict(), set(source.tensors)
    tied = set(model.all_tied_weights_keys)
    missing = sorted(set(state) - tied - found)
    unknown = sorted(found - set(state))
    shared = {name: _kind(source.tensors[name]) for name in sorted(found & set(state))}
    misshapen = [
        f"{name} is {list(shape)}, not {list(state[name].shape)}"
        for name, (shape, _) in shared.items()
        if shape != state[name].shape
    ]
    odd = [
        f"{name} is {dtype}"
        for name, (_, dtype) in shared.items()
        if dtype.is_floating_point != state[name].is_floating_point()
    ]
    problems = {"missing": missing, "unknown": unknown, "of other shapes": misshapen, "not of floating point": odd}
    told = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise CheckpointError(f"checkpoint {source.path} does not fit its own config.json: {'; '.join(told)}")


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
