"""Token groups in a state dict, of a model in memory or of files that are read name by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import CheckpointError
from .architectures import Groups, architecture_of, group_names, places, token_groups
from .layout import TokenMap
from .operations import Operation

State = Mapping[str, Tensor]
States = dict[str, dict[str, Tensor]]


def read_map(config: PreTrainedConfig, state: State, block: int, token_map: TokenMap) -> Groups:
    """Return the token groups of one map: keys `[n, D]`, their biases `[n]`, values `[E, n]`."""
    prefix = architecture_of(config).block_name(block)
    groups: Groups = {}
    listed = token_groups(config)
    for part in token_map.parts:
        if "{group}" in part.tensor:
            for group in listed:
                name = prefix + part.tensor.format(group=group.name)
                if name in state:
                    groups.setdefault(group.name, {})[part.tensor] = state[name]
        elif prefix + part.stored in state:
            assert part.axis is not None
            sizes = [group.count(token_map.projection, block) for group in listed]
            pieces = part.read(state[prefix + part.stored]).split(sizes, dim=part.axis)
            for group, size, piece in zip(listed, sizes, pieces, strict=True):
                if size:
                    groups.setdefault(group.name, {})[part.tensor] = piece
    # In the order of the configuration, whichever part a group was found by.
    return {group.name: groups[group.name] for group in listed if group.name in groups}


def read_own(config: PreTrainedConfig, state: State, block: int, token_map: TokenMap) -> Groups:
    """Return the token groups of one map from tensors that each group has of its own, as in memory."""
    prefix, groups = architecture_of(config).block_name(block), {}
    for group in group_names(config):
        names = {part.tensor: prefix + part.own.format(group=group) for part in token_map.parts}
        found = {part: state[name] for part, name in names.items() if name in state}
        if found:
            groups[group] = found
    return groups


def write_map(token_map: TokenMap, groups: Groups) -> dict[str, Tensor]:
    """Return the tensors of a map, by their names in the block: the inverse of `read_map`."""
    tensors: dict[str, Tensor] = {}
    for part in token_map.parts:
        found = {name: group[part.tensor] for name, group in groups.items() if part.tensor in group}
        if "{group}" in part.tensor:
            tensors |= {part.tensor.format(group=name): tensor for name, tensor in found.items()}
        elif found:
            assert part.axis is not None
            whole = torch.cat(list(found.values()), dim=part.axis)
            whole = whole.t() if part.transposed else whole
            # The pieces of a fused tensor follow each other in the map's parts.
            tensors[part.stored] = torch.cat([tensors[part.stored], whole]) if part.stored in tensors else whole
    return tensors


def names_of_map(token_map: TokenMap, groups: Groups) -> set[str]:
    """Return the names in the block of the tensors that `write_map` makes."""
    return {
        part.stored.format(group=name)
        for part in token_map.parts
        for name, tensors in groups.items()
        if part.tensor in tensors
    }


def rewritten(
    config: PreTrainedConfig, state: State, operation: Operation
) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """Return a function that gives tensors of the model after `operation` by name; it keeps one block at a time."""
    row = architecture_of(config)
    inside: dict[int, list[str]] = {i: [] for i in operation.blocks}
    for name in state:
        number = row.block_number(name)
        if number is not None and number in inside:
            inside[number].append(name.removeprefix(row.block_name(number)))

    @lru_cache(maxsize=1)
    def block(index: int) -> dict[str, Tensor]:
        source, silent = operation.blocks[index], index in operation.silent
        tensors = {name: state[row.block_name(source) + name] for name in inside[source]}
        if silent:
            tensors = {name: torch.zeros_like(t) if row.is_last(name) else t for name, t in tensors.items()}
        for token_map in row.maps:
            groups = read_map(
                config, {row.block_name(source) + name: t for name, t in tensors.items()}, source, token_map
            )
            changed = operation.change(index, token_map, groups)
            if changed is not groups:
                for name in names_of_map(token_map, groups):
                    del tensors[name]
                tensors |= write_map(token_map, changed)
        return tensors

    def give(names: Sequence[str]) -> dict[str, Tensor]:
        given = {}
        for name in names:
            number = row.block_number(name)
            tensor = state[name] if number is None else block(number)[name.removeprefix(row.block_name(number))]
            given[name] = tensor.contiguous()
        return given

    return give


def move_states(config: PreTrainedConfig, states: States, operation: Operation) -> States:
    """Return an optimizer's states, by the names of parameters in memory, after `operation`.

    What moves keeps its moments; what is new or becomes another size by what had none is filled with zeros, as fresh.
    """
    row, moved = architecture_of(config), {}
    first = {source: i for i, source in reversed(list(enumerate(operation.blocks)))}
    owned = {part.own.format(group=g) for m in row.maps for part in m.parts for g in group_names(config)}
    for name, state in states.items():
        number = row.block_number(name)
        if number is None:
            moved[name] = state
        elif number in first and (inside := name.removeprefix(row.block_name(number))) not in owned:
            moved[row.block_name(first[number]) + inside] = state
    for source, index in first.items():
        for token_map in row.maps:
            _move_map_states(config, states, operation, token_map, source, index, moved)
    return moved


def _move_map_states(
    config: PreTrainedConfig,
    states: States,
    operation: Operation,
    token_map: TokenMap,
    source: int,
    index: int,
    moved: States,
) -> None:
    row = architecture_of(config)
    before, after = row.block_name(source), row.block_name(index)
    listed = group_names(config)
    found = {
        (group, part): states[before + part.own.format(group=group)]
        for part in token_map.parts
        for group in listed
        if before + part.own.format(group=group) in states
    }
    # Of several optimizers, where groups were trained by different ones; Muon's has no step.
    moments = {moment for state in found.values() for moment in state if moment != "step"}
    for moment in moments:
        having = {place: state for place, state in found.items() if moment in state}
        groups: Groups = {}
        for part in {part for _, part in having}:
            like = next(state[moment] for (_, p), state in having.items() if p == part)
            for group in token_groups(config):
                count, had = group.count(token_map.projection, source), having.get((group.name, part))
                if count or had:
                    shape = [count if axis == part.axis else n for axis, n in enumerate(like.shape)]
                    groups.setdefault(group.name, {})[part.tensor] = had[moment] if had else like.new_zeros(shape)
        change = operation.moments or operation.change
        for name, tensors in change(index, token_map, groups).items():
            for part in token_map.parts:
                if part.tensor not in tensors:
                    continue
                of_part = {g: s for (g, p), s in having.items() if p == part}
                if not of_part or (name not in of_part and not tensors[part.tensor].any()):
                    continue
                state = moved.setdefault(after + part.own.format(group=name), {})
                state[moment] = tensors[part.tensor]
                steps = {g: s["step"] for g, s in of_part.items() if "step" in s}
                if steps:
                    state["step"] = steps[name] if name in steps else max(steps.values(), key=float)


def shared_differences(
    config: PreTrainedConfig, state: State, other_config: PreTrainedConfig, other: State, shared: Collection[str]
) -> Iterator[str]:
    """Yield what is not bit for bit the same in two models: tensors outside token groups, and the groups `shared`."""
    row = architecture_of(config)
    patterns = [part.stored for token_map in row.maps for part in token_map.parts]

    def rest(c: PreTrainedConfig, s: State) -> set[str]:
        names = {pattern.format(group=g) for pattern in patterns for g in group_names(c)}
        return {n for n in s if (i := row.block_number(n)) is None or n.removeprefix(row.block_name(i)) not in names}

    ours, theirs = rest(config, state), rest(other_config, other)
    yield from sorted(ours ^ theirs)
    for name in sorted(ours & theirs):
        if not _equal(state[name], other[name]):
            yield name
    for block, token_map in places(config):
        a, b = read_map(config, state, block, token_map), read_map(other_config, other, block, token_map)
        for group in shared:
            if (group in a) != (group in b) or any(
                part not in b[group] or not _equal(tensor, b[group][part]) for part, tensor in a.get(group, {}).items()
            ):
                yield f"{row.block_name(block)}{token_map.name}, token group {group}"


def content_digest(config: PreTrainedConfig, state: State, groups: Collection[str]) -> str:
    """Return a sha256 over all of a model outside token groups and these groups.

    It is the same however the files are cut, and in every type up to float32 that holds the same numbers: training
    writes float32, whatever it began with.
    """
    row, digest = architecture_of(config), hashlib.sha256()
    # A state dict has a tied head, files mostly not.
    covered = {f"{row.head}.weight"} if config.tie_word_embeddings else set()
    for block, token_map in places(config):
        found = read_map(config, state, block, token_map)
        covered |= {row.block_name(block) + name for name in names_of_map(token_map, found)}
        for group in sorted(set(groups) & set(found)):
            for part, tensor in sorted(found[group].items()):
                _add(digest, row.block_name(block) + part.replace("{group}", group), tensor)
    for name in sorted(set(state) - covered):
        _add(digest, name, state[name])
    return digest.hexdigest()


def check_finite(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return tensors as they are.

    Raises:
        CheckpointError: some are not finite.
    """
    for name, tensor in tensors.items():
        # Both extremes pass nan on; many times faster than isfinite, which is for the message.
        if tensor.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            odd = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{where} has weights that are not finite: {odd} of {tensor.numel()} in {name}; go back to a "
                "checkpoint from before they became so"
            )
    return tensors


def tensors_digest(state: State) -> str:
    """Return a sha256 over tensors and their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        _add(digest, name, state[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    dtype = torch.float32 if tensor.is_floating_point() and tensor.itemsize < 4 else tensor.dtype
    digest.update(f"{name} {dtype} {list(tensor.shape)}\n".encode())
    for piece in tensor.flatten().split(1 << 24):  # one at a time in float32
        digest.update(piece.to(dtype).view(torch.uint8).numpy().data)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
